/* Matrices of made-up weights in every float type, and room for their quantized form: what test_kernels holds
 * against the naive grid and test_instruction_sets against one another. */
#ifndef GEMCUT_TESTS_UNIT_KERNEL_CASES_H
#define GEMCUT_TESTS_UNIT_KERNEL_CASES_H

#include "kernels/backend.h"

#include <stdbool.h>
#include <stdint.h>

struct kernel_case {
    enum dtype dtype;
    int64_t rows, cols, group; /* group 0: a whole row */
    int bits;
    bool symmetric;
    struct scale_spec spec;
};

/* Every combination of three dtypes, 4 and 8 bits, symmetric or not, six scale rules, five groups and several
 * widths, most of which the group does not divide. Numbered from 0; false when there is no such case. */
bool kernel_case(size_t index, struct kernel_case *out);
const char *kernel_case_text(const struct kernel_case *c);

struct kernel_data {
    struct mat weights;
    struct qmat q;
    struct mat restored; /* BF16 */
    void *memory[5];
};

/* Weights of several kinds, one a row in turn: both signs, one sign, zeros, tiny and huge values, an outlier in
 * each group, exact halves. Rows are longer than the width, and what lies beyond is filled with 0x5a. */
void kernel_data_make(struct kernel_data *d, const struct kernel_case *c);
void kernel_data_free(struct kernel_data *d);

#endif

/* Cuts as AutoRound, GPTQModel and llm-compressor write them, made of one of ours an element at a time: nothing of
 * formats/quant_layout takes part. For tests. */
#ifndef GEMCUT_TESTS_UNIT_FOREIGN_H
#define GEMCUT_TESTS_UNIT_FOREIGN_H

#include "runtime/model.h"

struct foreign {
    enum quant_format format;
    enum quant_layout layout;
    int zero_bias;
    enum dtype scales;
    float scale_factor;  /* 1 leaves scales as they are, BF16 values; 0x1.004p0 takes them out of it */
    bool g_idx;          /* written */
    const char *spoiled; /* module whose tensors are spoiled as follows; NULL: none */
    bool swap_g_idx, nan_scale, odd_zero, no_zeros; /* odd_zero: 15 as it is stored, where zeros are */
};

/* cut: bound, by rows. */
void foreign_write(const struct foreign *f, const struct model *cut, const char *folder);

/* Weight (row, col) of the same: bf16((code − zero) · scale). */
uint16_t foreign_weight(const struct foreign *f, const struct model *cut, const struct model_linear *l,
                        int64_t row, int64_t col);

#endif

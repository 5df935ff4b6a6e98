/* One operation on two backends: the CPU's, which is the reference, and a device's. Both get the same values: what a
 * device takes as BF16 is rounded to BF16 before the CPU gets it as F32. Whatever the CPU did not write, the gaps
 * between rows too, the device must not have written, and twice the same operation must give the same bytes. */
#ifndef GEMCUT_TESTS_CUDA_PARITY_H
#define GEMCUT_TESTS_CUDA_PARITY_H

#include "kernels/backend.h"
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

enum side { CPU, DEVICE, N_SIDES };

extern struct backend side[N_SIDES];

/* Runs the tests on the device that the first argument names, by default cuda:0. Exit code 77 (skipped) only where a
 * CUDA device is asked for and the machine has none at all. */
int parity_main(int argc, char **argv, const struct CMUnitTest *tests, size_t n);
int parity_run(int argc, char **argv, const struct CMUnitTest *tests, size_t n, CMFixtureFunction setup,
               CMFixtureFunction teardown);

/* Test fixtures around every test: the memory of its cases is given back. */
int parity_clean_up(void **state);

/* --- matrices on both sides ------------------------------------------------------------------------------------- */

/* In place of a dtype: the backend's activation type. */
enum { ACT = N_DTYPES };

/* initial: on the host, what the device's matrix holds before each run; m[CPU] begins with the same values. A view
 * (rows, columns) is for reading: uploads, downloads and comparisons are of whole matrices. */
struct twin {
    struct mat m[N_SIDES], initial;
    bool act;
};

/* All bits set. slack: elements between the end of a row and the next one. */
struct twin twin_make(int dtype, int64_t rows, int64_t cols, int64_t slack);
struct twin twin_random(int dtype, int64_t rows, int64_t cols, int64_t slack, double amplitude);
/* A matrix on the host, bit for bit, on both sides; data NULL stays NULL. */
struct twin twin_of(const struct mat *m);
struct twin twin_rows(const struct twin *t, int64_t first, int64_t n);
struct twin twin_cols(const struct twin *t, int64_t first, int64_t n);
void twin_put(struct twin *t, int64_t row, int64_t col, double value); /* rounded to BF16 where it is ACT */
void twin_upload(const struct twin *t);                                /* after the last twin_put */
void twin_download(const struct twin *t, void *out); /* the device's; initial.rows · stride elements */
size_t twin_bytes(const struct twin *t);

struct twin_q {
    struct qmat m[N_SIDES];
};
struct twin_q twin_q_of(const struct qmat *q);

/* Memory on the device until the end of the test, and on the host for the CPU. */
void *parity_memory(enum side s, size_t bytes);

/* Everything that the cases so far have taken. */
void parity_free(void);

/* --- comparing -------------------------------------------------------------------------------------------------- */

/* A matrix that an operation writes; measured by relative L2 error, or by the largest difference of any element. */
struct result {
    struct outcome *o;
    struct twin *t;
    bool absolute;
};

typedef int (*op_fn)(const struct backend *b, enum side s, const void *args);

/* Once on the CPU, twice on the device. */
void parity_case(op_fn run, const void *args, const struct result *results, size_t n, const char *text);
void parity_print(const struct outcome *o, const char *measure);

/* One number against the CPU's: |got − expected| / size, size > 0. NaN must be NaN. */
void parity_number(struct outcome *o, double got, double expected, double size, const char *text);

#endif

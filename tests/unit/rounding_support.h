/* What the tests of the calibrated operations share beyond forward_support.h: weights with scales and codes, reading
 * them back, and running an operation with every number of threads. */
#ifndef GEMCUT_TESTS_UNIT_ROUNDING_SUPPORT_H
#define GEMCUT_TESTS_UNIT_ROUNDING_SUPPORT_H

#include "tests/unit/forward_support.h"

/* Inputs with columns of very different size that share a few latent directions, F32 [tokens, cols]. */
struct mat make_inputs(int64_t tokens, int64_t cols);

/* Σ xᵀx in double, rounded to F32. */
struct mat make_hessian(const struct mat *x);

/* Room for scales, zero points and packed codes; nothing in it is set. group 0: a whole row. */
struct qmat make_qmat(const struct q_kind *kind, int64_t rows, int64_t cols);

double scale_at(const struct qmat *q, int64_t row, int64_t col); /* col: of the weight */
int zero_at(const struct qmat *q, int64_t row, int64_t col);
int packed_at(const struct qmat *q, int64_t row, int64_t col); /* the code as stored, without its offset */

/* A weight on its way into codes: random w, scales that `range` finds for it, nearest codes. */
struct placed {
    struct mat w, codes;
    struct qmat q;
    struct rounding r; /* of the above */
};
void make_placed(struct placed *p, enum dtype dtype, const struct q_kind *kind, int64_t rows, int64_t cols);
int code_at(const struct rounding *r, int64_t row, int64_t col); /* q − zero */
double restored_at(const struct rounding *r, int64_t row, int64_t col);

/* Runs an operation with one, two and three threads from the same content of `outs`, which must end up with the same
 * bytes each time. */
typedef int (*op_fn)(const struct backend *b, const void *args);
void run_alike(op_fn run, const void *args, const struct mat *const *outs, size_t n, const char *text);

/* What lies between the rows is as `make` left it. */
void check_gaps(const struct mat *m, const char *text);

/* Allowed and worst relative difference of a figure. */
void compare_figure(struct outcome *o, double got, double expected, double size, const char *text);

#endif

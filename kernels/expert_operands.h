/* What operands of the operations for mixtures of experts must be on every backend; types that a backend may choose are its
 * own to check. */
#ifndef GEMCUT_KERNELS_EXPERT_OPERANDS_H
#define GEMCUT_KERNELS_EXPERT_OPERANDS_H

#include "base/err.h"
#include "kernels/backend.h"

/* ERR_UNSUPPORTED: more than route can choose from, or take. */
static inline int check_route(const struct mat *logits, const struct mat *factors, const struct mat *experts,
                              const struct mat *weights)
{
    CHECK(logits->dtype == DTYPE_F32 && experts->dtype == DTYPE_I32 && weights->dtype == DTYPE_F32);
    CHECK(experts->rows == logits->rows && weights->rows == logits->rows && weights->cols == experts->cols);
    CHECK(experts->cols > 0 && experts->cols <= logits->cols && (!factors || factors->cols == logits->cols));
    return logits->cols <= MAX_EXPERTS && experts->cols <= MAX_CHOSEN
               ? 0
               : err_set(ERR_UNSUPPORTED, "route: %lld of %lld experts, expected at most %d of %d",
                         (long long)experts->cols, (long long)logits->cols, MAX_CHOSEN, MAX_EXPERTS);
}

static inline void check_gather_rows(const struct mat *x, const struct mat *rows, const struct mat *factors,
                                     const struct mat *out)
{
    CHECK(x->cols == out->cols);
    CHECK(rows ? rows->dtype == DTYPE_I32 && rows->cols == out->rows : x->rows == out->rows);
    CHECK(!factors || (factors->dtype == DTYPE_F32 && factors->cols == out->rows));
}

static inline void check_combine_rows(const struct mat *y, const struct mat *slots, const struct mat *weights,
                                      const struct mat *out)
{
    CHECK(y->cols == out->cols);
    CHECK(slots->dtype == DTYPE_I32 && slots->cols > 0 && slots->rows == out->rows);
    CHECK(!weights ||
          (weights->dtype == DTYPE_F32 && weights->rows == out->rows && weights->cols == slots->cols));
}

static inline void check_route_backward(const struct route_tape *t, const struct mat *dout,
                                        const struct mat *dlogits)
{
    CHECK(t->logits.dtype == DTYPE_F32 && t->experts.dtype == DTYPE_I32 && t->slots.dtype == DTYPE_I32);
    CHECK(t->logits.rows == dout->rows && t->experts.rows == dout->rows && t->slots.rows == dout->rows);
    CHECK(dlogits->rows == dout->rows && dlogits->cols == t->logits.cols && t->y.cols == dout->cols);
    CHECK(t->experts.cols > 0 && t->experts.cols <= MAX_CHOSEN && t->slots.cols == t->experts.cols);
    CHECK(dlogits->dtype == DTYPE_F32);
}

#endif

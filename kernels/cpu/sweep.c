/* The two loops over columns that place codes under a Hessian: GPTQ's sweep and coordinate descent. Rows are
 * independent and are what the threads share; of a row a block of columns stands in the first-level cache. */
#include "kernels/cpu/rounding.h"

#include "base/err.h"

#include <math.h>

struct block_job {
    const struct rounding *r;
    const struct mat *order, *factor, *h, *gradient, *feedback, *out;
    int64_t first;
};

/* target[k] += step·row[k], k in [from, n) */
CPU_CLONES static void add_scaled(float *target, const float *row, float step, int64_t from, int64_t n)
{
    for (int64_t k = from; k < n; k++)
        target[k] += step * row[k];
}

/* The nearest code of t, less the zero point. */
CPU_INLINE float nearest(float t, struct step s, int bits)
{
    const float half = (float)(1 << (bits - 1));
    return rintf(fminf(fmaxf(t / s.scale, -half - s.zero), half - 1 - s.zero));
}

static int sweep_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct block_job *j = ctx;
    const struct rounding *r = j->r;
    const int64_t row = (int64_t)index, n = j->out->cols;
    const int32_t *order = (const int32_t *)j->order->data + j->first;
    int8_t *codes = (int8_t *)r->codes->data + row * r->codes->stride;
    float *errors = (float *)j->out->data + row * j->out->stride, target[SWEEP_COLUMNS];
    memcpy(target, (const float *)j->feedback->data + row * j->feedback->stride + j->first,
           (size_t)n * sizeof *target);
    for (int64_t k = 0; k < n; k++) {
        const int64_t col = order[k];
        const float w = load_one(r->w, row, col);
        const struct step s = step_of(r->q, row, col / r->q->group);
        const float code = nearest(w + target[k], s, r->q->bits);
        codes[col] = (int8_t)code;
        errors[k] = w - half_round_bf16(code * s.scale);
        const float *factor = (const float *)j->factor->data + (j->first + k) * j->factor->stride + j->first;
        add_scaled(target, factor, errors[k], k + 1, n);
    }
    return 0;
}

int cpu_sweep_block(const struct backend *b, const struct rounding *r, const struct mat *order,
                    const struct mat *factor, const struct mat *feedback, int64_t first,
                    const struct mat *errors)
{
    const int rc = cpu_check_rounding(r, "sweep_block");
    CHECK(errors->cols >= 1 && errors->cols <= SWEEP_COLUMNS && first >= 0 &&
          first + errors->cols <= r->w->cols);
    CHECK(order->dtype == DTYPE_I32 && factor->dtype == DTYPE_F32 && feedback->dtype == DTYPE_F32 &&
          feedback->cols == r->w->cols && errors->dtype == DTYPE_F32 && errors->rows == r->w->rows);
    struct block_job j = {
        .r = r, .order = order, .factor = factor, .feedback = feedback, .out = errors, .first = first};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)r->w->rows, sweep_row, &j);
}

static int descend_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct block_job *j = ctx;
    const struct rounding *r = j->r;
    const int64_t row = (int64_t)index, n = j->out->cols;
    int8_t *codes = (int8_t *)r->codes->data + row * r->codes->stride + j->first;
    const float *gradient = (const float *)j->gradient->data + row * j->gradient->stride + j->first;
    const float *feedback = (const float *)j->feedback->data + row * j->feedback->stride;
    float *changes = (float *)j->out->data + row * j->out->stride, g[SWEEP_COLUMNS];
    for (int64_t k = 0; k < n; k++)
        g[k] = gradient[k] + feedback[k];
    for (int64_t k = 0; k < n; k++) {
        const float *h = (const float *)j->h->data + (j->first + k) * j->h->stride + j->first;
        const struct step s = step_of(r->q, row, (j->first + k) / r->q->group);
        const float old = (float)codes[k], wish = old + g[k] / (h[k] * s.scale);
        changes[k] = 0;
        if (!(h[k] > 0) || !isfinite(wish))
            continue;
        const float code = nearest(wish * s.scale, s, r->q->bits);
        if (code == old)
            continue;
        codes[k] = (int8_t)code;
        changes[k] = half_round_bf16(code * s.scale) - half_round_bf16(old * s.scale);
        add_scaled(g, h, -changes[k], k + 1, n);
    }
    return 0;
}

int cpu_descend_block(const struct backend *b, const struct rounding *r, const struct mat *h,
                      const struct mat *gradient, const struct mat *feedback, int64_t first,
                      const struct mat *changes)
{
    const int rc = cpu_check_rounding(r, "descend_block");
    CHECK(changes->cols >= 1 && changes->cols <= SWEEP_COLUMNS && first >= 0 &&
          first + changes->cols <= r->w->cols);
    CHECK(h->dtype == DTYPE_F32 && gradient->dtype == DTYPE_F32 && gradient->cols == r->w->cols &&
          feedback->dtype == DTYPE_F32 && feedback->cols == changes->cols && changes->dtype == DTYPE_F32);
    struct block_job j = {
        .r = r, .h = h, .gradient = gradient, .feedback = feedback, .out = changes, .first = first};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)r->w->rows, descend_row, &j);
}

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

/* What a row's descent through a block works on; all [n]. */
struct descent {
    const struct block_job *j;
    int64_t row, n;
    int8_t *codes;
    float changes[SWEEP_COLUMNS], g[SWEEP_COLUMNS];
};

static const float *block_h(const struct block_job *j, int64_t k)
{
    return (const float *)j->h->data + (j->first + k) * j->h->stride + j->first;
}

/* The scale of least error for the codes of columns [from, to) of the block, which are one group's:
 * f(s + d) = f(s) − 2·d·(g·c) + d²·cHcᵀ. */
static void fit_scale(struct descent *t, int64_t from, int64_t to)
{
    const struct qmat *q = t->j->r->q;
    uint16_t *place =
        (uint16_t *)q->scales.data + t->row * q->scales.stride + (t->j->first + from) / q->group;
    const float old = half_from_bf16(*place);
    float ch[SWEEP_COLUMNS] = {0}, gain = 0, curvature = 0;
    for (int64_t k = from; k < to; k++) {
        gain += t->g[k] * (float)t->codes[k];
        add_scaled(ch, block_h(t->j, k), (float)t->codes[k], 0, t->n);
    }
    for (int64_t k = from; k < to; k++)
        curvature += ch[k] * (float)t->codes[k];
    const float wish = old + gain / curvature;
    if (!(curvature > 0) || !isfinite(wish) || !(wish * old > 0))
        return;
    const float scale = cpu_storable_scale(wish), step = scale - old;
    if (!(step * (step * curvature - 2 * gain) < 0))
        return;
    *place = half_to_bf16(scale);
    for (int64_t k = from; k < to; k++)
        t->changes[k] +=
            half_round_bf16((float)t->codes[k] * scale) - half_round_bf16((float)t->codes[k] * old);
    add_scaled(t->g, ch, -step, 0, t->n);
}

static void fit_codes(struct descent *t, int64_t from, int64_t to)
{
    const struct qmat *q = t->j->r->q;
    const struct step s = step_of(q, t->row, (t->j->first + from) / q->group);
    for (int64_t k = from; k < to; k++) {
        const float *h = block_h(t->j, k);
        const float old = (float)t->codes[k], wish = old + t->g[k] / (h[k] * s.scale);
        if (!(h[k] > 0) || !isfinite(wish))
            continue;
        const float code = nearest(wish * s.scale, s, q->bits);
        if (code == old)
            continue;
        const float change = half_round_bf16(code * s.scale) - half_round_bf16(old * s.scale);
        t->codes[k] = (int8_t)code;
        t->changes[k] += change;
        add_scaled(t->g, h, -change, k + 1, t->n);
    }
}

static int descend_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct block_job *j = ctx;
    const struct rounding *r = j->r;
    const int64_t row = (int64_t)index, n = j->out->cols, group = r->q->group;
    const float *gradient = (const float *)j->gradient->data + row * j->gradient->stride + j->first;
    const float *feedback = (const float *)j->feedback->data + row * j->feedback->stride;
    struct descent t = {
        .j = j, .row = row, .n = n, .codes = (int8_t *)r->codes->data + row * r->codes->stride + j->first};
    for (int64_t k = 0; k < n; k++)
        t.g[k] = gradient[k] + feedback[k];
    for (int64_t k = 0, end; k < n; k = end) {
        const int64_t begin = (j->first + k) / group * group,
                      whole = begin + group < r->w->cols ? begin + group : r->w->cols;
        end = whole - j->first < n ? whole - j->first : n;
        if (begin == j->first + k && whole - j->first == end) /* all of the group is here */
            fit_scale(&t, k, end);
        fit_codes(&t, k, end);
    }
    uint16_t *changes = (uint16_t *)j->out->data + row * j->out->stride;
    for (int64_t k = 0; k < n; k++)
        changes[k] = half_to_bf16(t.changes[k]);
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
          feedback->dtype == DTYPE_F32 && feedback->cols == changes->cols && changes->dtype == DTYPE_BF16);
    struct block_job j = {
        .r = r, .h = h, .gradient = gradient, .feedback = feedback, .out = changes, .first = first};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)r->w->rows, descend_row, &j);
}

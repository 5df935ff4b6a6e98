/* AutoRound's step: rounding moved by the signs of gradients (Cheng et al. 2023, arXiv 2309.05516). Rows are shared
 * among the threads; within a row group after group. */
#include "kernels/cpu/rounding.h"

#include "base/err.h"

#include <math.h>

struct tune_job {
    const struct tuning *t;
    const struct mat *gradient, *codes;
    const struct tune_rates *rates;
    bool keep;
};

/* One group of a row. */
struct part {
    int64_t row, group, first, end; /* columns */
    float least, most;              /* of its codes, the zero point taken off */
    struct step step;
};

static struct part part_of(const struct tuning *t, int64_t row, int64_t group)
{
    const float half = (float)(1 << (t->q->bits - 1));
    struct part p = {.row = row, .group = group, .first = group * t->q->group};
    p.end = p.first + t->q->group < t->w->cols ? p.first + t->q->group : t->w->cols;
    p.step = step_of(t->q, row, group);
    p.least = -half - p.step.zero;
    p.most = half - 1 - p.step.zero;
    return p;
}

CPU_INLINE float *float_at(const struct mat *m, const struct part *p)
{
    return (float *)m->data + p->row * m->stride + p->group;
}

CPU_INLINE float sign_of(float x)
{
    return (float)((x > 0) - (x < 0));
}

CPU_INLINE float clamped(float x, float least, float most)
{
    return fminf(fmaxf(x, least), most);
}

/* --- the iterate ------------------------------------------------------------------------------------------------ */

/* Least and greatest weight of a group, 0 included. */
struct extremes {
    float low, high;
};

static struct extremes extremes_of(const struct mat *w, const struct part *p)
{
    struct extremes e = {0, 0};
    for (int64_t c = p->first; c < p->end; c++) {
        const float x = load_one(w, p->row, c);
        e.low = x < e.low ? x : e.low;
        e.high = x > e.high ? x : e.high;
    }
    return e;
}

static struct step new_step(const struct tuning *t, const struct part *p)
{
    const float high = *float_at(t->high, p), half = (float)(1 << (t->q->bits - 1));
    if (t->start)
        return (struct step){cpu_storable_scale(load_one(t->start, p->row, p->group) * high), p->step.zero};
    const struct extremes e = extremes_of(t->w, p);
    const float low = e.low * *float_at(t->low, p);
    if (t->q->zeros.data)
        return cpu_asymmetric_step(low, e.high * high, 1, t->q->bits);
    return (struct step){cpu_storable_scale((e.high * high >= -low ? e.high * high : low) / -half), 0};
}

/* Scale, zero point and restored weights. */
static void place(const struct tuning *t, struct part *p)
{
    const struct qmat *q = t->q;
    const struct mat *out = t->restored;
    const struct step s = new_step(t, p);
    ((uint16_t *)q->scales.data)[p->row * q->scales.stride + p->group] = half_to_bf16(s.scale);
    if (q->zeros.data)
        ((int8_t *)q->zeros.data)[p->row * q->zeros.stride + p->group] = (int8_t)s.zero;
    *p = part_of(t, p->row, p->group);
    const float *v = (const float *)t->v->data + p->row * t->v->stride;
    for (int64_t c = p->first; c < p->end; c++) {
        const float code =
            clamped(rintf(load_one(t->w, p->row, c) / p->step.scale + v[c]), p->least, p->most);
        const uint16_t bits = half_to_bf16(code * p->step.scale);
        if (out->dtype == DTYPE_BF16)
            ((uint16_t *)out->data)[p->row * out->stride + c] = bits;
        else
            ((float *)out->data)[p->row * out->stride + c] = half_from_bf16(bits);
    }
}

static void keep(const struct tuning *t, const struct part *p)
{
    const struct qmat *q = t->kept;
    int8_t *codes = (int8_t *)t->codes->data + p->row * t->codes->stride;
    const float *v = (const float *)t->v->data + p->row * t->v->stride;
    ((uint16_t *)q->scales.data)[p->row * q->scales.stride + p->group] = half_to_bf16(p->step.scale);
    if (q->zeros.data)
        ((int8_t *)q->zeros.data)[p->row * q->zeros.stride + p->group] = (int8_t)p->step.zero;
    for (int64_t c = p->first; c < p->end; c++)
        codes[c] =
            (int8_t)clamped(rintf(load_one(t->w, p->row, c) / p->step.scale + v[c]), p->least, p->most);
}

/* --- the step --------------------------------------------------------------------------------------------------- */

/* What a group's factors move by. */
struct slopes {
    float scale; /* of the loss by the scale, roundings taken as straight lines */
    float zero;  /* by the zero point: clipped weights alone */
};

/* Moves v, and sums up for the factors, all by the iterate as it was. */
static struct slopes move_v(const struct tune_job *j, const struct part *p)
{
    const struct tuning *t = j->t;
    const float *g = (const float *)j->gradient->data + p->row * j->gradient->stride;
    float *v = (float *)t->v->data + p->row * t->v->stride;
    const float s = p->step.scale;
    struct slopes sum = {0, 0};
    for (int64_t c = p->first; c < p->end; c++) {
        const float u = load_one(t->w, p->row, c) / s, r = rintf(u + v[c]);
        if (t->ends_clip ? r > p->least && r < p->most : r >= p->least && r <= p->most) {
            sum.scale += g[c] * (r - u);
            v[c] -= j->rates->v * sign_of(g[c] * sign_of(s));
        } else {
            sum.scale += g[c] * clamped(r, p->least, p->most);
            sum.zero -= s * g[c];
        }
    }
    return sum;
}

static void move_range(const struct tune_job *j, const struct part *p, struct slopes by)
{
    const struct tuning *t = j->t;
    float *high = float_at(t->high, p);
    float dlow = 0, dhigh;
    if (t->start) {
        dhigh = by.scale * load_one(t->start, p->row, p->group);
    } else {
        const struct extremes e = extremes_of(t->w, p);
        const float low = *float_at(t->low, p), s = p->step.scale;
        if (t->q->zeros.data) {
            const float steps = p->most - p->least, scale = by.scale + by.zero * (e.low * low / (s * s));
            dlow = scale * (-e.low / steps) + by.zero * (-e.low / s);
            dhigh = scale * (e.high / steps);
        } else { /* the larger side alone decides; equal ones both do */
            const float a = -e.low * low, b = e.high * *high;
            dlow = a >= b ? (a > b ? by.scale : -by.scale) * -e.low : 0;
            dhigh = a <= b ? -by.scale * e.high : 0;
        }
        *float_at(t->low, p) = clamped(low - j->rates->range * sign_of(dlow), t->lowest, t->highest);
    }
    *high = clamped(*high - j->rates->range * sign_of(dhigh), t->lowest, t->highest);
}

static int step_row(void *ctx, size_t row, int worker)
{
    (void)worker;
    const struct tune_job *j = ctx;
    for (int64_t g = 0; g < j->t->q->scales.cols; g++) {
        struct part p = part_of(j->t, (int64_t)row, g);
        if (j->keep)
            keep(j->t, &p);
        if (j->gradient)
            move_range(j, &p, move_v(j, &p));
        place(j->t, &p);
    }
    return 0;
}

static int check_tuning(const struct tuning *t, const char *op)
{
    const struct qmat *q = t->q;
    const int64_t rows = t->w->rows, groups = q->scales.cols;
    CHECK(q->cols == t->w->cols && q->scales.rows == rows && q->group > 0 &&
          groups == (q->cols + q->group - 1) / q->group);
    CHECK(t->v->dtype == DTYPE_F32 && t->v->rows == rows && t->v->cols == q->cols);
    CHECK(t->high->dtype == DTYPE_F32 && t->high->rows == rows && t->high->cols == groups);
    CHECK(t->start ? t->start->dtype == DTYPE_BF16 && t->start->rows == rows && t->start->cols == groups
                   : t->low->dtype == DTYPE_F32 && t->low->rows == rows && t->low->cols == groups);
    if (q->bits != 4 && q->bits != 8)
        return err_set(ERR_UNSUPPORTED, "%s: %d bits, expected 4 or 8", op, q->bits);
    return cpu_check_float(t->w, op);
}

int cpu_tune_step(const struct backend *b, const struct tuning *t, const struct mat *gradient,
                  const struct tune_rates *rates, const int32_t *keep_it)
{
    const int rc = check_tuning(t, "tune_step");
    CHECK(!gradient ||
          (gradient->dtype == DTYPE_F32 && gradient->rows == t->w->rows && gradient->cols == t->w->cols));
    CHECK(t->restored->rows == t->w->rows && t->restored->cols == t->w->cols);
    CHECK(t->restored->dtype == DTYPE_BF16 || t->restored->dtype == DTYPE_F32);
    struct tune_job j = {t, gradient, NULL, rates, keep_it && *keep_it};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)t->w->rows, step_row, &j);
}

/* --- the start -------------------------------------------------------------------------------------------------- */

static void begin_part(const struct tune_job *j, const struct part *p)
{
    const struct tuning *t = j->t;
    float *v = (float *)t->v->data + p->row * t->v->stride;
    if (t->low)
        *float_at(t->low, p) = 1;
    *float_at(t->high, p) = 1;
    if (!j->codes) {
        memset(v + p->first, 0, (size_t)(p->end - p->first) * sizeof *v);
        return;
    }
    const int8_t *codes = (const int8_t *)j->codes->data + p->row * j->codes->stride;
    const float scale = load_one(t->start, p->row, p->group);
    for (int64_t c = p->first; c < p->end; c++) {
        const float u = load_one(t->w, p->row, c) / scale, code = (float)codes[c];
        const float nearest = clamped(rintf(u), p->least, p->most);
        v[c] = code == nearest ? 0 : code > nearest ? code - t->distance - u : code + t->distance - u;
    }
}

static int begin_row(void *ctx, size_t row, int worker)
{
    (void)worker;
    const struct tune_job *j = ctx;
    for (int64_t g = 0; g < j->t->q->scales.cols; g++) {
        const struct part p = part_of(j->t, (int64_t)row, g);
        begin_part(j, &p);
    }
    return 0;
}

int cpu_tune_begin(const struct backend *b, const struct tuning *t, const struct mat *codes)
{
    const int rc = check_tuning(t, "tune_begin");
    CHECK(!codes ||
          (t->start && codes->dtype == DTYPE_I8 && codes->rows == t->w->rows && codes->cols == t->w->cols));
    struct tune_job j = {.t = t, .codes = codes};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)t->w->rows, begin_row, &j);
}

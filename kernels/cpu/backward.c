/* Gradients of the forward pass's operations, but for attention's: products, norms, rotary positions, the gated
 * activation, the loss of a block. */
#include "kernels/cpu/runs.h"

#include "base/err.h"
#include "kernels/cpu/blas.h"

#include <math.h>

enum {
    TILE = 256,   /* rows of a product's result in a task, … */
    PANEL = 512,  /* … columns of it, … */
    DEPTH = 2048, /* … and terms of its sums at a time */
};

static int64_t at_most(int64_t a, int64_t limit)
{
    return a < limit ? a : limit;
}

static size_t pieces(int64_t n, int64_t each)
{
    return (size_t)((n + each - 1) / each);
}

static void check_f32(const struct mat *m)
{
    CHECK(m->dtype == DTYPE_F32);
}

/* --- products --------------------------------------------------------------------------------------------------- */

struct product_job {
    const struct cpu_state *state;
    const struct mat *dy, *other, *out; /* other: the weight, or x */
    bool add;
    int64_t n_panels;
};

/* Rows [row, row + n), columns [col, col + cols) of a weight, as floats without gaps. */
static void widen(const struct mat *w, int64_t row, int64_t n, int64_t col, int64_t cols, float *out)
{
    float tail[LANES];
    const int64_t whole = cols / LANES * LANES;
    for (int64_t r = 0; r < n; r++, out += cols) {
        load_row(w, row + r, col, whole, out);
        load_row(w, row + r, col + whole, cols - whole, tail); /* its padding must not reach the next row */
        memcpy(out + whole, tail, (size_t)(cols - whole) * sizeof *tail);
    }
}

static int dgrad_task(void *ctx, size_t index, int worker)
{
    const struct product_job *j = ctx;
    const struct mat *w = j->other;
    const int64_t row = (int64_t)index / j->n_panels * TILE, col = (int64_t)index % j->n_panels * PANEL;
    const int64_t cols = at_most(w->cols - col, PANEL);
    struct blas_product p = {.m = (int)at_most(j->dy->rows - row, TILE),
                             .n = (int)cols,
                             .alpha = 1,
                             .lda = (int)j->dy->stride,
                             .c = row_of(j->out, row) + col,
                             .ldc = (int)j->out->stride};
    for (int64_t k = 0; k < w->rows; k += DEPTH) {
        p.k = (int)at_most(w->rows - k, DEPTH);
        p.beta = j->add || k ? 1 : 0;
        p.a = row_of(j->dy, row) + k;
        p.b = w->dtype == DTYPE_F32 ? row_of(w, k) + col : j->state->scratch[worker];
        p.ldb = (int)(w->dtype == DTYPE_F32 ? w->stride : cols);
        if (w->dtype != DTYPE_F32)
            widen(w, k, p.k, col, cols, j->state->scratch[worker]);
        blas_product(&p);
    }
    return 0;
}

int cpu_gemm_dgrad(const struct backend *b, const struct mat *dy, const struct mat *w, bool add,
                   const struct mat *out)
{
    check_f32(dy);
    check_f32(out);
    CHECK(dy->cols == w->rows && w->cols == out->cols && dy->rows == out->rows && w->rows > 0);
    int rc = cpu_check_float(w, "gemm_dgrad");
    if (!rc)
        rc = blas_load();
    struct product_job j = {cpu_state(b), dy, w, out, add, (int64_t)pieces(w->cols, PANEL)};
    return rc ? rc : parallel_for(j.state->pool, pieces(dy->rows, TILE) * (size_t)j.n_panels, dgrad_task, &j);
}

static int wgrad_task(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct product_job *j = ctx;
    const int64_t row = (int64_t)index / j->n_panels * TILE, col = (int64_t)index % j->n_panels * PANEL;
    blas_product(&(struct blas_product){.transpose_a = true,
                                        .m = (int)at_most(j->out->rows - row, TILE),
                                        .n = (int)at_most(j->out->cols - col, PANEL),
                                        .k = (int)j->dy->rows,
                                        .alpha = 1,
                                        .beta = j->add ? 1 : 0,
                                        .a = (const float *)j->dy->data + row,
                                        .lda = (int)j->dy->stride,
                                        .b = (const float *)j->other->data + col,
                                        .ldb = (int)j->other->stride,
                                        .c = row_of(j->out, row) + col,
                                        .ldc = (int)j->out->stride});
    return 0;
}

int cpu_gemm_wgrad(const struct backend *b, const struct mat *dy, const struct mat *x, bool add,
                   const struct mat *dw)
{
    check_f32(dy);
    check_f32(x);
    check_f32(dw);
    CHECK(dy->rows == x->rows && dw->rows == dy->cols && dw->cols == x->cols);
    if (dy->rows == 0)
        return add ? 0 : cpu_zero(b, dw);
    const int rc = blas_load();
    struct product_job j = {cpu_state(b), dy, x, dw, add, (int64_t)pieces(dw->cols, PANEL)};
    return rc ? rc : parallel_for(j.state->pool, pieces(dw->rows, TILE) * (size_t)j.n_panels, wgrad_task, &j);
}

/* --- RMSNorm ---------------------------------------------------------------------------------------------------- */

struct norm_job {
    const struct norm_spec *spec;
    const struct mat *x, *w, *dy, *add, *out;
};

/* With r = 1/sqrt(mean(x²) + eps) and g = dy·w: dx = r·(g − x·r²·mean(g·x)). add: n floats or NULL. */
CPU_CLONES static void norm_row_backward(const float *x, const struct mat *weight,
                                         const struct norm_spec *spec, const float *dy, const float *add,
                                         float *dx, int64_t n)
{
    const float offset = weight && spec->unit_offset ? 1 : 0;
    float w[256];
    double squares = 0, dots = 0;
    for (int pass = 0; pass < 2; pass++) {
        const float r = (float)(1 / sqrt(squares / (double)n + (double)spec->eps)),
                    back = r * r * (float)(dots / (double)n);
        for (int64_t c = 0; c < n; c += 256) {
            const int64_t part = n - c < 256 ? n - c : 256;
            if (weight)
                load_row(weight, 0, c, part, w);
            float square = 0, dot = 0;
            for (int64_t i = 0; i < part; i++) {
                const float v = x[c + i], g = dy[c + i] * (weight ? offset + w[i] : 1);
                if (pass) {
                    dx[c + i] = (add ? add[c + i] : 0) + r * (g - v * back);
                } else {
                    square += v * v;
                    dot += g * v;
                }
            }
            squares += (double)square;
            dots += (double)dot;
        }
    }
}

static int norm_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct norm_job *j = ctx;
    const int64_t first = (int64_t)run * RUN, end = at_most(first + RUN, j->x->rows);
    for (int64_t r = first; r < end; r++)
        norm_row_backward(row_of(j->x, r), j->w, j->spec, row_of(j->dy, r), j->add ? row_of(j->add, r) : NULL,
                          row_of(j->out, r), j->x->cols);
    return 0;
}

int cpu_rms_norm_backward(const struct backend *b, const struct mat *x, const struct mat *w,
                          const struct norm_spec *spec, const struct mat *dy, const struct mat *add,
                          const struct mat *out)
{
    check_f32(x);
    check_f32(dy);
    check_f32(out);
    CHECK(dy->rows == x->rows && dy->cols == x->cols && out->rows == x->rows && out->cols == x->cols);
    CHECK(!w || w->cols == x->cols);
    CHECK(!add || (add->dtype == DTYPE_F32 && add->rows == x->rows && add->cols == x->cols));
    const int rc = w ? cpu_check_float(w, "rms_norm_backward") : 0;
    struct norm_job j = {spec, x, w, dy, add, out};
    return rc ? rc : parallel_for(cpu_state(b)->pool, pieces(x->rows, RUN), norm_task, &j);
}

/* --- queries and keys ------------------------------------------------------------------------------------------- */

struct qkv_job {
    const struct qkv_spec *spec;
    const struct mat *qkv, *dq, *dkeys, *dvalues, *dqkv;
    int64_t n_new; /* tokens of a sequence */
};

/* A gradient by a turned head becomes one by the head before: turned back by the same angles. */
CPU_CLONES static void turn_back(const float *restrict dy, const float *restrict table, int64_t half,
                                 float *restrict out)
{
    for (int64_t i = 0; i < half; i++) {
        const float u = dy[i], v = dy[half + i], c = table[i], s = table[half + i];
        out[i] = u * c + v * s;
        out[half + i] = v * c - u * s;
    }
}

enum { MAX_HEAD = 1024 };

static void heads_backward(const struct qkv_job *j, const float *x, const struct mat *norm, int n,
                           const float *table, const float *dy, float *out)
{
    const int64_t d = j->spec->heads.head_dim;
    float turned[MAX_HEAD];
    for (int h = 0; h < n; h++, x += d, dy += d, out += d) {
        turn_back(dy, table, d / 2, turned);
        if (norm)
            norm_row_backward(x, norm, &j->spec->norm, turned, NULL, out, d);
        else
            memcpy(out, turned, (size_t)d * sizeof *out);
    }
}

/* One head of values, which is normed without a weight or not at all; out: added to, where add. */
static void value_backward(const struct qkv_job *j, const float *x, const float *dy, bool add, float *out)
{
    const int64_t d = j->spec->heads.head_dim;
    if (j->spec->values_normed)
        norm_row_backward(x, NULL, &j->spec->norm, dy, add ? out : NULL, out, d);
    else
        for (int64_t i = 0; i < d; i++)
            out[i] = (add ? out[i] : 0) + dy[i];
}

/* Keys and values of one token; x and out, which may be x: where the keys are in qkv. */
static void cache_backward(const struct qkv_job *j, const float *x, const float *table, const float *dkeys,
                           const float *dvalues, float *out)
{
    const struct qkv_spec *s = j->spec;
    const int64_t d = s->heads.head_dim, values = s->k_is_v ? 0 : j->dkeys->cols;
    float key[MAX_HEAD]; /* read twice where it is the value too */
    for (int64_t at = 0; at < j->dkeys->cols; at += d) {
        memcpy(key, x + at, (size_t)d * sizeof *key);
        heads_backward(j, key, s->k_norm, 1, table, dkeys + at, out + at);
        value_backward(j, s->k_is_v ? key : x + values + at, dvalues + at, s->k_is_v, out + values + at);
    }
}

static int qkv_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct qkv_job *j = ctx;
    const struct qkv_spec *s = j->spec;
    const int64_t first = (int64_t)run * RUN, end = at_most(first + RUN, j->qkv->rows);
    for (int64_t r = first; r < end; r++) {
        const int64_t token = r % j->n_new;
        const int64_t slot = r / j->n_new * s->sequences.max_positions + s->sequences.first_position + token;
        const float *x = row_of(j->qkv, r), *table = row_of(s->rope, token);
        float *out = row_of(j->dqkv, r);
        heads_backward(j, x, s->q_norm, s->heads.n_heads, table, row_of(j->dq, r), out);
        if (j->dkeys)
            cache_backward(j, x + j->dq->cols, table, row_of(j->dkeys, slot), row_of(j->dvalues, slot),
                           out + j->dq->cols);
    }
    return 0;
}

int cpu_split_qkv_backward(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                           const struct mat *dq, const struct mat *dkeys, const struct mat *dvalues,
                           const struct mat *dqkv)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t q_cols = (int64_t)h->n_heads * h->head_dim, kv_cols = (int64_t)h->n_kv_heads * h->head_dim;
    const struct mat *const all[] = {qkv, dq, dqkv, spec->rope, dkeys, dvalues};
    CHECK(!dkeys == !dvalues);
    for (int i = 0; i < (dkeys ? 6 : 4); i++)
        check_f32(all[i]);
    CHECK(h->head_dim > 0 && h->head_dim % 2 == 0 && qkv->rows % s->n == 0);
    CHECK(qkv->cols == q_cols + (!dkeys         ? 0
                                 : spec->k_is_v ? 1
                                                : 2) *
                                    kv_cols &&
          dqkv->cols == qkv->cols && dqkv->rows == qkv->rows);
    CHECK(dq->cols == q_cols && dq->rows == qkv->rows);
    CHECK(!dkeys || (dkeys->cols == kv_cols && dvalues->cols == kv_cols &&
                     dkeys->rows >= s->n * s->max_positions && dvalues->rows == dkeys->rows));
    CHECK(s->first_position + qkv->rows / s->n <= s->max_positions);
    CHECK(spec->rope->cols == h->head_dim && spec->rope->rows >= qkv->rows / s->n);
    if (h->head_dim > MAX_HEAD)
        return err_set(ERR_UNSUPPORTED, "split_qkv_backward: heads of %d, expected at most %d", h->head_dim,
                       MAX_HEAD);
    int rc = spec->q_norm ? cpu_check_float(spec->q_norm, "split_qkv_backward") : 0;
    if (!rc && spec->k_norm)
        rc = cpu_check_float(spec->k_norm, "split_qkv_backward");
    struct qkv_job j = {spec, qkv, dq, dkeys, dvalues, dqkv, qkv->rows / s->n};
    return rc ? rc : parallel_for(cpu_state(b)->pool, pieces(qkv->rows, RUN), qkv_task, &j);
}

/* --- the gated activation --------------------------------------------------------------------------------------- */

struct geglu_job {
    const struct mat *gate, *up, *dy, *dgate, *dup;
};

/* Of 16 elements: with u = √(2/π)·(z + 0.044715·z³) and t = tanh u, gelu(z) = z·(1 + t)/2 and its derivative is
 * (1 + t)/2 + z·(1 − t²)·u'/2. */
CPU_INLINE void geglu_vector(const float *gate, const float *up, const float *dy, float *dgate, float *dup)
{
    const float sqrt_2_pi = 0.7978845608f;
    const vfloat z = vload(gate), g = vload(dy);
    const vfloat t = vtanh(sqrt_2_pi * (z + 0.044715f * z * z * z));
    /* u' finite where z² is not, for 1 − t² is 0 there */
    const vfloat slope = sqrt_2_pi * (1.0f + 3 * 0.044715f * vmin(vset(1e30f), z * z));
    const vfloat dgelu = 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * slope;
    const vfloat du = g * (0.5f * z * (1.0f + t)), dz = g * vload(up) * dgelu;
    vstore(dgate, dz);
    vstore(dup, du);
}

CPU_CLONES static void geglu_row_backward(const float *gate, const float *up, const float *dy, float *dgate,
                                          float *dup, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        geglu_vector(gate + i, up + i, dy + i, dgate + i, dup + i);
    float rest[5][LANES] = {{0}};
    const size_t bytes = (size_t)(n - i) * sizeof(float);
    memcpy(rest[0], gate + i, bytes);
    memcpy(rest[1], up + i, bytes);
    memcpy(rest[2], dy + i, bytes);
    geglu_vector(rest[0], rest[1], rest[2], rest[3], rest[4]);
    memcpy(dgate + i, rest[3], bytes);
    memcpy(dup + i, rest[4], bytes);
}

static int geglu_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct geglu_job *j = ctx;
    const int64_t first = (int64_t)run * RUN, end = at_most(first + RUN, j->dy->rows);
    for (int64_t r = first; r < end; r++)
        geglu_row_backward(row_of(j->gate, r), row_of(j->up, r), row_of(j->dy, r), row_of(j->dgate, r),
                           row_of(j->dup, r), j->dy->cols);
    return 0;
}

int cpu_geglu_backward(const struct backend *b, const struct mat *gate, const struct mat *up,
                       const struct mat *dy, const struct mat *dgate, const struct mat *dup)
{
    const struct mat *const all[] = {gate, up, dy, dgate, dup};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        check_f32(all[i]);
        CHECK(all[i]->rows == dy->rows && all[i]->cols == dy->cols);
    }
    struct geglu_job j = {gate, up, dy, dgate, dup};
    return parallel_for(cpu_state(b)->pool, pieces(dy->rows, RUN), geglu_task, &j);
}

/* --- the loss of a block ---------------------------------------------------------------------------------------- */

int cpu_error_backward(const struct backend *b, const struct mat *y, const struct mat *target, float factor,
                       double *sum, const struct mat *dy)
{
    (void)b;
    check_f32(y);
    check_f32(target);
    CHECK(target->rows == y->rows && target->cols == y->cols);
    CHECK(!dy || (dy->dtype == DTYPE_F32 && dy->rows == y->rows && dy->cols == y->cols));
    for (int64_t r = 0; r < y->rows; r++) {
        const float *a = row_of(y, r), *t = row_of(target, r);
        double row = 0;
        for (int64_t c = 0; c < y->cols; c++) {
            const float e = a[c] - t[c];
            row += (double)e * (double)e;
            if (dy)
                row_of(dy, r)[c] = factor * e;
        }
        *sum += row;
    }
    return 0;
}

int cpu_keep_best(const struct backend *b, const double *loss, double *best, int32_t *improved)
{
    (void)b;
    *improved = *loss < *best;
    if (*improved)
        *best = *loss;
    return 0;
}

/* Operations that touch each element once: embedding, norms, rotary positions, the gated activation. Rows are
 * shared among the threads in runs of fixed length. */
#include "kernels/cpu/runs.h"

#include "base/err.h"

#include <math.h>

static void check_f32(const struct mat *m)
{
    CHECK(m->dtype == DTYPE_F32);
}

/* --- embedding ------------------------------------------------------------------------------------------------ */

int cpu_embed(const struct backend *b, const struct mat *table, const int32_t *ids, float scale,
              const struct mat *out)
{
    (void)b;
    const int rc = cpu_check_float(table, "embed");
    check_f32(out);
    CHECK(out->cols == table->cols);
    for (int64_t r = 0; !rc && r < out->rows; r++) {
        CHECK(ids[r] >= 0 && ids[r] < table->rows);
        float *y = row_of(out, r);
        float part[256];
        for (int64_t c = 0; c < out->cols; c += 256) {
            const int64_t n = out->cols - c < 256 ? out->cols - c : 256;
            load_row(table, ids[r], c, n, part);
            for (int64_t i = 0; i < n; i++)
                y[c + i] = part[i] * scale;
        }
    }
    return rc;
}

/* --- RMSNorm -------------------------------------------------------------------------------------------------- */

struct norm_job {
    const struct norm_spec *spec;
    const struct mat *x, *w, *out;       /* rms_norm: out = norm(x); add_norm: the second of its two */
    const struct mat *branch, *branch_w; /* add_norm: x += norm(branch) comes first */
};

/* Σ x², in lanes and then over them. */
CPU_INLINE float sum_of_squares(const float *x, int64_t n)
{
    vfloat sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += vload(x + i) * vload(x + i);
    float s = vsum(sum);
    for (; i < n; i++)
        s += x[i] * x[i];
    return s;
}

/* y = (residual or 0) + RMSNorm(x)·w for one row of n; y may be x or residual. */
CPU_CLONES static void norm_row(const float *x, const struct mat *weight, const struct norm_spec *spec,
                                const float *residual, float *y, int64_t n)
{
    const float scale = 1 / sqrtf(sum_of_squares(x, n) / (float)n + spec->eps);
    const float offset = spec->unit_offset ? 1 : 0;
    float w[256];
    for (int64_t c = 0; c < n; c += 256) {
        const int64_t part = n - c < 256 ? n - c : 256;
        if (weight)
            load_row(weight, 0, c, part, w);
        for (int64_t i = 0; i < part; i++)
            w[i] = (weight ? offset + w[i] : 1) * scale;
        if (residual)
            for (int64_t i = 0; i < part; i++)
                y[c + i] = residual[c + i] + x[c + i] * w[i];
        else
            for (int64_t i = 0; i < part; i++)
                y[c + i] = x[c + i] * w[i];
    }
}

static int norm_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct norm_job *j = ctx;
    const int64_t n = j->x->cols;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->x->rows); r++) {
        if (j->branch)
            norm_row(row_of(j->branch, r), j->branch_w, j->spec, row_of(j->x, r), row_of(j->x, r), n);
        norm_row(row_of(j->x, r), j->w, j->spec, NULL, row_of(j->out, r), n);
    }
    return 0;
}

static int check_norm(const struct mat *x, const struct mat *w, const struct mat *out, const char *op)
{
    check_f32(x);
    check_f32(out);
    CHECK(out->rows == x->rows && out->cols == x->cols && (!w || w->cols == x->cols));
    return w ? cpu_check_float(w, op) : 0;
}

int cpu_rms_norm(const struct backend *b, const struct mat *x, const struct mat *w,
                 const struct norm_spec *spec, const struct mat *out)
{
    const int rc = check_norm(x, w, out, "rms_norm");
    struct norm_job j = {.spec = spec, .x = x, .w = w, .out = out};
    return rc < 0 ? rc : parallel_for(cpu_state(b)->pool, n_runs(x->rows), norm_task, &j);
}

int cpu_add_norm(const struct backend *b, const struct mat *branch, const struct mat *branch_norm,
                 const struct mat *x, const struct mat *next_norm, const struct norm_spec *spec,
                 const struct mat *out)
{
    int rc = check_norm(branch, branch_norm, x, "add_norm");
    if (!rc)
        rc = check_norm(x, next_norm, out, "add_norm");
    struct norm_job j = {spec, x, next_norm, out, branch, branch_norm};
    return rc < 0 ? rc : parallel_for(cpu_state(b)->pool, n_runs(x->rows), norm_task, &j);
}

/* --- rotary positions ------------------------------------------------------------------------------------------- */

struct rope_job {
    const struct mat *table;
    const float *inv_freq; /* [half] */
    int64_t half, first_position;
};

static int table_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct rope_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->table->rows); r++)
        for (int64_t i = 0; i < j->half; i++) {
            const float angle = (float)(j->first_position + r) * j->inv_freq[i];
            row_of(j->table, r)[i] = cosf(angle);
            row_of(j->table, r)[j->half + i] = sinf(angle);
        }
    return 0;
}

int cpu_rope_table(const struct backend *b, const float *inv_freq, int64_t first_position,
                   const struct mat *table)
{
    check_f32(table);
    CHECK(table->cols % 2 == 0);
    struct rope_job j = {
        .table = table, .inv_freq = inv_freq, .half = table->cols / 2, .first_position = first_position};
    return parallel_for(cpu_state(b)->pool, n_runs(table->rows), table_task, &j);
}

CPU_CLONES static void rotate_head(float *restrict x, const float *restrict table, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        const float u = x[i], v = x[half + i], c = table[i], s = table[half + i];
        x[i] = u * c - v * s;
        x[half + i] = v * c + u * s;
    }
}

struct qkv_job {
    const struct qkv_spec *spec;
    const struct mat *qkv, *q, *keys, *values;
    int64_t n_new; /* tokens of a sequence */
};

/* n heads of one token, normed without a weight. */
static void norm_heads(const struct qkv_job *j, const float *x, int n, float *out)
{
    const int64_t d = j->spec->heads.head_dim;
    for (int h = 0; h < n; h++)
        norm_row(x + h * d, NULL, &j->spec->norm, NULL, out + h * d, d);
}

/* n heads of one token, normed and turned into out. */
static void turn_heads(const struct qkv_job *j, const float *x, const struct mat *norm, int n,
                       const float *table, float *out)
{
    const int64_t d = j->spec->heads.head_dim;
    for (int h = 0; h < n; h++, x += d, out += d) {
        if (norm)
            norm_row(x, norm, &j->spec->norm, NULL, out, d);
        else
            memcpy(out, x, (size_t)d * sizeof *out);
        rotate_head(out, table, d / 2);
    }
}

static int qkv_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct qkv_job *j = ctx;
    const struct qkv_spec *s = j->spec;
    const int64_t q_cols = (int64_t)s->heads.n_heads * s->heads.head_dim,
                  kv_cols = j->keys ? j->keys->cols : 0;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->qkv->rows); r++) {
        const int64_t token = r % j->n_new;
        const int64_t slot = r / j->n_new * s->sequences.max_positions + s->sequences.first_position + token;
        const float *x = row_of(j->qkv, r), *table = row_of(s->rope, token);
        turn_heads(j, x, s->q_norm, s->heads.n_heads, table, row_of(j->q, r));
        if (!j->keys)
            continue;
        turn_heads(j, x + q_cols, s->k_norm, s->heads.n_kv_heads, table, row_of(j->keys, slot));
        const float *values = x + q_cols + (s->k_is_v ? 0 : kv_cols);
        if (s->values_normed)
            norm_heads(j, values, s->heads.n_kv_heads, row_of(j->values, slot));
        else
            memcpy(row_of(j->values, slot), values, (size_t)kv_cols * sizeof(float));
    }
    return 0;
}

int cpu_split_qkv(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                  const struct mat *q, const struct mat *keys, const struct mat *values)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t q_cols = (int64_t)h->n_heads * h->head_dim, kv_cols = (int64_t)h->n_kv_heads * h->head_dim;
    check_f32(qkv);
    check_f32(q);
    check_f32(spec->rope);
    CHECK(h->head_dim > 0 && h->head_dim % 2 == 0 && qkv->rows % s->n == 0);
    CHECK(qkv->cols == q_cols + (!keys ? 0 : spec->k_is_v ? 1 : 2) * kv_cols);
    CHECK(q->cols == q_cols && q->rows == qkv->rows && !keys == !values);
    CHECK(s->first_position + qkv->rows / s->n <= s->max_positions);
    if (keys) {
        check_f32(keys);
        check_f32(values);
        CHECK(keys->cols == kv_cols && values->cols == kv_cols && keys->rows >= s->n * s->max_positions);
        CHECK(values->rows == keys->rows);
    }
    CHECK(spec->rope->cols == h->head_dim && spec->rope->rows >= qkv->rows / s->n);
    CHECK(!spec->q_norm || spec->q_norm->cols == h->head_dim);
    CHECK(!spec->k_norm || spec->k_norm->cols == h->head_dim);
    int rc = spec->q_norm ? cpu_check_float(spec->q_norm, "split_qkv") : 0;
    if (!rc && spec->k_norm)
        rc = cpu_check_float(spec->k_norm, "split_qkv");
    struct qkv_job j = {spec, qkv, q, keys, values, qkv->rows / s->n};
    return rc < 0 ? rc : parallel_for(cpu_state(b)->pool, n_runs(qkv->rows), qkv_task, &j);
}

/* --- activations ------------------------------------------------------------------------------------------------ */

struct geglu_job {
    const struct mat *gate, *up, *out;
};

CPU_INLINE vfloat gelu_tanh(vfloat z)
{
    const float sqrt_2_pi = 0.7978845608f;
    return 0.5f * z * (1.0f + vtanh(sqrt_2_pi * (z + 0.044715f * z * z * z)));
}

/* gelu(gate)·up for n elements; the last, partial vector goes through a buffer. */
CPU_CLONES static void geglu_row(const float *gate, const float *up, float *out, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        vstore(out + i, gelu_tanh(vload(gate + i)) * vload(up + i));
    float rest[LANES] = {0};
    memcpy(rest, gate + i, (size_t)(n - i) * sizeof *rest);
    vstore(rest, gelu_tanh(vload(rest)));
    for (int64_t k = i; k < n; k++)
        out[k] = rest[k - i] * up[k];
}

static int geglu_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct geglu_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->out->rows); r++)
        geglu_row(row_of(j->gate, r), row_of(j->up, r), row_of(j->out, r), j->out->cols);
    return 0;
}

int cpu_geglu(const struct backend *b, const struct mat *gate, const struct mat *up, const struct mat *out)
{
    check_f32(gate);
    check_f32(up);
    check_f32(out);
    CHECK(gate->rows == out->rows && up->rows == out->rows && gate->cols == out->cols &&
          up->cols == out->cols);
    struct geglu_job j = {gate, up, out};
    return parallel_for(cpu_state(b)->pool, n_runs(out->rows), geglu_task, &j);
}

struct over_job {
    const struct mat *x, *y, *out;
};

CPU_CLONES static void over_row(const float *x, const float *y, float *out, int64_t n, int64_t n_y)
{
    vfloat sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n_y; i += LANES)
        sum += vload(y + i) * vload(y + i);
    float total = vsum(sum);
    for (; i < n_y; i++)
        total += y[i] * y[i];
    const float factor = total == 0 ? 0 : 1 / sqrtf(total / (float)n_y);
    for (int64_t k = 0; k < n; k++)
        out[k] = x[k] * factor;
}

static int over_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct over_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->out->rows); r++)
        over_row(row_of(j->x, r), row_of(j->y, r), row_of(j->out, r), j->out->cols, j->y->cols);
    return 0;
}

int cpu_over_norm(const struct backend *b, const struct mat *x, const struct mat *y, const struct mat *out)
{
    check_f32(x);
    check_f32(y);
    check_f32(out);
    CHECK(x->rows == out->rows && y->rows == out->rows && x->cols == out->cols);
    struct over_job j = {x, y, out};
    return parallel_for(cpu_state(b)->pool, n_runs(out->rows), over_task, &j);
}

struct scale_job {
    const struct mat *x, *out;
    float factor;
    bool add;
};

static int scale_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct scale_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->out->rows); r++) {
        const float *x = row_of(j->x, r);
        float *out = row_of(j->out, r);
        for (int64_t c = 0; c < j->out->cols; c++)
            out[c] = (j->add ? out[c] : 0) + j->factor * x[c];
    }
    return 0;
}

int cpu_scale(const struct backend *b, float factor, const struct mat *x, bool add, const struct mat *out)
{
    check_f32(x);
    check_f32(out);
    CHECK(x->rows == out->rows && x->cols == out->cols);
    struct scale_job j = {x, out, factor, add};
    return parallel_for(cpu_state(b)->pool, n_runs(out->rows), scale_task, &j);
}

int cpu_softcap(const struct backend *b, const struct mat *x, float cap)
{
    (void)b;
    check_f32(x);
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t c = 0; c < x->cols; c++)
            row_of(x, r)[c] = cap * tanhf(row_of(x, r)[c] / cap);
    return 0;
}

/* Causal attention with an optional window. A task is one query head and a run of queries: their scores against
 * the keys in reach stand in the thread's scratch memory, get softmax row by row, and multiply the values. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"
#include "kernels/cpu/blas.h"

#include <math.h>

enum { QUERIES = 64 }; /* queries a task takes, fewer where that many rows of scores do not fit */

struct attention_job {
    const struct cpu_state *state;
    const struct attention_spec *spec;
    const struct mat *q, *keys, *values, *out, *lse;
    int64_t n_new; /* tokens of a sequence */
    int64_t run, n_runs;
};

/* softmax of scale·s[0..n), capped where cap is not 0, in place, zero beyond up to `padded`; returns ln Σ exp of what it
 * is the softmax of. */
CPU_CLONES static float softmax_row(float *s, int64_t n, int64_t padded, float scale, float cap)
{
    if (cap > 0) {
        cap_scores(s, n, scale, cap);
        scale = 1;
    }
    float highest = s[0];
    for (int64_t i = 1; i < n; i++)
        highest = s[i] > highest ? s[i] : highest;
    const float shift = highest * scale; /* scale > 0 */
    vfloat sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vfloat e = vexp(vload(s + i) * scale - shift);
        vstore(s + i, e);
        sum += e;
    }
    float total = vsum(sum);
    for (; i < n; i++) {
        s[i] = expf(s[i] * scale - shift);
        total += s[i];
    }
    const float inverse = 1 / total;
    for (int64_t k = 0; k < n; k++)
        s[k] *= inverse;
    for (int64_t k = n; k < padded; k++)
        s[k] = 0;
    return shift + logf(total);
}

static int attention_task(void *ctx, size_t index, int worker)
{
    const struct attention_job *j = ctx;
    const struct attention_spec *a = j->spec;
    const int64_t part = (int64_t)index % j->n_runs, sequence = (int64_t)index / j->n_runs / a->heads.n_heads;
    const int head = (int)((int64_t)index / j->n_runs % a->heads.n_heads);
    const int kv_head = head / (a->heads.n_heads / a->heads.n_kv_heads);
    const int64_t d = a->heads.head_dim, token = part * j->run, row = sequence * j->n_new + token;
    const int64_t n = j->n_new - token < j->run ? j->n_new - token : j->run;
    /* keys that any of these queries sees: [from, to) */
    const int64_t first = a->sequences.first_position + token, to = first + n;
    const int64_t from = a->window && first - a->window + 1 > 0 ? first - a->window + 1 : 0;
    const int64_t width = to - from, slot = sequence * a->sequences.max_positions + from;
    float *scores = j->state->scratch[worker];
    const float *q = (const float *)j->q->data + row * j->q->stride + head * d;
    const float *k = (const float *)j->keys->data + slot * j->keys->stride + kv_head * d;
    const float *v = (const float *)j->values->data + slot * j->values->stride + kv_head * d;
    blas_sgemm(true, (int)n, (int)width, (int)d, q, (int)j->q->stride, k, (int)j->keys->stride, scores,
               (int)width);
    for (int64_t r = 0; r < n; r++) {
        const int64_t position = first + r;
        const int64_t begin =
            a->window && position - a->window + 1 > from ? position - a->window + 1 - from : 0;
        float *s = scores + r * width;
        const float lse =
            softmax_row(s + begin, position + 1 - from - begin, width - begin, a->scale, a->softcap);
        if (j->lse)
            ((float *)j->lse->data)[(row + r) * j->lse->stride + head] = lse;
        for (int64_t i = 0; i < begin; i++)
            s[i] = 0;
    }
    blas_sgemm(false, (int)n, (int)d, (int)width, scores, (int)width, v, (int)j->values->stride,
               (float *)j->out->data + row * j->out->stride + head * d, (int)j->out->stride);
    return 0;
}

int cpu_attention(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                  const struct mat *keys, const struct mat *values, const struct mat *out,
                  const struct mat *lse)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t n_new = q->rows / s->n, positions = s->first_position + n_new;
    CHECK(q->dtype == DTYPE_F32 && keys->dtype == DTYPE_F32 && values->dtype == DTYPE_F32 &&
          out->dtype == DTYPE_F32);
    CHECK(h->n_heads % h->n_kv_heads == 0 && q->cols == h->n_heads * h->head_dim && q->rows % s->n == 0);
    CHECK(positions <= s->max_positions && keys->rows >= s->n * s->max_positions);
    CHECK(keys->cols == h->n_kv_heads * h->head_dim && spec->scale > 0 && spec->softcap >= 0);
    CHECK(!lse || (lse->dtype == DTYPE_F32 && lse->rows == q->rows && lse->cols == h->n_heads));
    const int64_t reach = spec->window && spec->window < positions ? spec->window : positions;
    const int64_t fitting = CPU_SCRATCH_BYTES / 4 / (reach + QUERIES);
    if (fitting < 1)
        return err_set(ERR_UNSUPPORTED, "attention: %lld positions, expected at most %d",
                       (long long)positions, CPU_SCRATCH_BYTES / 4 - QUERIES);
    const int rc = blas_load();
    if (rc < 0)
        return rc;
    struct attention_job j = {.state = cpu_state(b),
                              .spec = spec,
                              .q = q,
                              .keys = keys,
                              .values = values,
                              .out = out,
                              .lse = lse,
                              .n_new = n_new,
                              .run = fitting < QUERIES ? fitting : QUERIES};
    j.n_runs = (n_new + j.run - 1) / j.run;
    return parallel_for(j.state->pool, (size_t)(s->n * h->n_heads * j.n_runs), attention_task, &j);
}

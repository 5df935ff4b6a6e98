/* Attention's gradients. A task is one sequence and one key/value head, with all query heads that read it, so that
 * sums over these heads have a fixed order; queries come in runs whose scores stand in the thread's scratch memory. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"
#include "kernels/cpu/blas.h"

#include <math.h>

enum { QUERIES = 64 }; /* queries of a run, fewer where that many rows of scores do not fit */

struct backward_job {
    const struct cpu_state *state;
    const struct attention_spec *spec;
    const struct attention_tape *tape;
    const struct mat *dout, *dq, *dkeys, *dvalues;
    int64_t length, run;
};

/* A run of queries of one head, and the keys [from, to) that any of them sees. */
struct run {
    int64_t row, token, n, from, width;
    int head;
};

CPU_INLINE float *head_of(const struct mat *m, int64_t row, int64_t head, int64_t d)
{
    return (float *)m->data + row * m->stride + head * d;
}

/* Softmax by the sums that are known, and the gradient by the scores in place of that by the weights. */
CPU_CLONES static void score_row(float *p, float *dp, int64_t n, float scale, float lse, float inner)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vfloat w = vexp(vload(p + i) * scale - lse);
        vstore(p + i, w);
        vstore(dp + i, w * (vload(dp + i) - inner) * scale);
    }
    for (; i < n; i++) {
        p[i] = expf(p[i] * scale - lse);
        dp[i] = p[i] * (dp[i] - inner) * scale;
    }
}

/* The same of capped scores: the gradient by scale·qk is that by its cap·tanh, times 1 − tanh². */
CPU_CLONES static void capped_row(float *p, float *dp, int64_t n, const struct attention_spec *a, float lse,
                                  float inner)
{
    cap_scores(p, n, a->scale, a->softcap);
    for (int64_t i = 0; i < n; i++) {
        const float t = p[i] / a->softcap;
        dp[i] = (dp[i] - inner) * (1 - t * t) * a->scale;
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        vstore(p + i, vexp(vload(p + i) - lse));
    for (; i < n; i++)
        p[i] = expf(p[i] - lse);
    for (int64_t k = 0; k < n; k++)
        dp[k] *= p[k];
}

static void mask_and_score(const struct backward_job *j, const struct run *r, float *p, float *dp)
{
    const struct attention_spec *a = j->spec;
    const int64_t d = a->heads.head_dim;
    for (int64_t i = 0; i < r->n; i++) {
        const int64_t position = r->token + i;
        const int64_t begin =
            a->window && position - a->window + 1 > r->from ? position - a->window + 1 - r->from : 0;
        const int64_t end = position + 1 - r->from;
        float *scores = p + i * r->width, *slopes = dp + i * r->width, inner = 0;
        const float *out = head_of(&j->tape->out, r->row + i, r->head, d),
                    *dout = head_of(j->dout, r->row + i, r->head, d);
        for (int64_t c = 0; c < d; c++)
            inner += out[c] * dout[c];
        const float lse = head_of(&j->tape->lse, r->row + i, r->head, 1)[0];
        if (a->softcap > 0)
            capped_row(scores + begin, slopes + begin, end - begin, a, lse, inner);
        else
            score_row(scores + begin, slopes + begin, end - begin, a->scale, lse, inner);
        for (int64_t c = 0; c < begin; c++)
            scores[c] = slopes[c] = 0;
        for (int64_t c = end; c < r->width; c++)
            scores[c] = slopes[c] = 0;
    }
}

static void run_backward(const struct backward_job *j, const struct run *r, int64_t slot, int kv_head,
                         float *p)
{
    const int64_t d = j->spec->heads.head_dim;
    const struct attention_tape *t = j->tape;
    float *dp = p + r->n * r->width;
    const float *q = head_of(&t->q, r->row, r->head, d), *dout = head_of(j->dout, r->row, r->head, d);
    const float *k = head_of(&t->keys, slot + r->from, kv_head, d),
                *v = head_of(&t->values, slot + r->from, kv_head, d);
    const int n = (int)r->n, width = (int)r->width;
    blas_sgemm(true, n, width, (int)d, q, (int)t->q.stride, k, (int)t->keys.stride, p, width);
    blas_sgemm(true, n, width, (int)d, dout, (int)j->dout->stride, v, (int)t->values.stride, dp, width);
    mask_and_score(j, r, p, dp);
    blas_sgemm(false, n, (int)d, width, dp, width, k, (int)t->keys.stride, head_of(j->dq, r->row, r->head, d),
               (int)j->dq->stride);
    struct blas_product add = {.transpose_a = true,
                               .m = width,
                               .n = (int)d,
                               .k = n,
                               .alpha = 1,
                               .beta = 1,
                               .a = dp,
                               .lda = width,
                               .b = q,
                               .ldb = (int)t->q.stride,
                               .c = head_of(j->dkeys, slot + r->from, kv_head, d),
                               .ldc = (int)j->dkeys->stride};
    blas_product(&add);
    add.a = p;
    add.b = dout;
    add.ldb = (int)j->dout->stride;
    add.c = head_of(j->dvalues, slot + r->from, kv_head, d);
    add.ldc = (int)j->dvalues->stride;
    blas_product(&add);
}

static int backward_task(void *ctx, size_t index, int worker)
{
    const struct backward_job *j = ctx;
    const struct attention_spec *a = j->spec;
    const int64_t d = a->heads.head_dim, sequence = (int64_t)index / a->heads.n_kv_heads;
    const int kv_head = (int)((int64_t)index % a->heads.n_kv_heads),
              shared = a->heads.n_heads / a->heads.n_kv_heads;
    const int64_t slot = sequence * a->sequences.max_positions;
    for (int64_t i = 0; i < j->length; i++) {
        memset(head_of(j->dkeys, slot + i, kv_head, d), 0, (size_t)d * sizeof(float));
        memset(head_of(j->dvalues, slot + i, kv_head, d), 0, (size_t)d * sizeof(float));
    }
    for (int h = 0; h < shared; h++)
        for (int64_t token = 0; token < j->length; token += j->run) {
            struct run r = {.row = sequence * j->length + token,
                            .token = token,
                            .n = j->length - token < j->run ? j->length - token : j->run,
                            .from = a->window && token - a->window + 1 > 0 ? token - a->window + 1 : 0,
                            .head = kv_head * shared + h};
            r.width = token + r.n - r.from;
            run_backward(j, &r, slot, kv_head, j->state->scratch[worker]);
        }
    return 0;
}

static void check_tape(const struct attention_spec *a, const struct attention_tape *t, const struct mat *dout,
                       const struct mat *dq, const struct mat *dkeys, const struct mat *dvalues)
{
    const struct mat *const queries[] = {&t->q, &t->out, dout, dq}, *const cache[] = {&t->keys, &t->values,
                                                                                      dkeys, dvalues};
    const int64_t q_cols = (int64_t)a->heads.n_heads * a->heads.head_dim,
                  kv_cols = (int64_t)a->heads.n_kv_heads * a->heads.head_dim;
    CHECK(a->heads.n_heads % a->heads.n_kv_heads == 0 && a->scale > 0 && a->sequences.first_position == 0);
    CHECK(t->q.rows % a->sequences.n == 0 && t->q.rows / a->sequences.n <= a->sequences.max_positions);
    for (int i = 0; i < 4; i++) {
        CHECK(queries[i]->dtype == DTYPE_F32 && queries[i]->rows == t->q.rows && queries[i]->cols == q_cols);
        CHECK(cache[i]->dtype == DTYPE_F32 && cache[i]->cols == kv_cols &&
              cache[i]->rows >= a->sequences.n * a->sequences.max_positions);
    }
    CHECK(t->lse.dtype == DTYPE_F32 && t->lse.rows == t->q.rows && t->lse.cols == a->heads.n_heads);
}

int cpu_attention_backward(const struct backend *b, const struct attention_spec *spec,
                           const struct attention_tape *tape, const struct mat *dout, const struct mat *dq,
                           const struct mat *dkeys, const struct mat *dvalues)
{
    const struct sequences *s = &spec->sequences;
    check_tape(spec, tape, dout, dq, dkeys, dvalues);
    const int64_t length = tape->q.rows / s->n;
    const int64_t reach = spec->window && spec->window < length ? spec->window : length;
    const int64_t fitting = CPU_SCRATCH_BYTES / 8 / (reach + QUERIES);
    if (fitting < 1)
        return err_set(ERR_UNSUPPORTED, "attention_backward: %lld positions, expected at most %d",
                       (long long)length, CPU_SCRATCH_BYTES / 8 - QUERIES);
    const int rc = blas_load();
    struct backward_job j = {
        cpu_state(b), spec, tape, dout, dq, dkeys, dvalues, length, fitting < QUERIES ? fitting : QUERIES};
    return rc ? rc : parallel_for(j.state->pool, (size_t)(s->n * spec->heads.n_kv_heads), backward_task, &j);
}

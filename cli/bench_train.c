/* Measured operations of training: gradients, and AutoRound's step. */
#include "cli/bench_builder.h"

#include "runtime/gemma.h"

static int run_dgrad(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->train->gemm_dgrad(b, &m[0], &m[1], false, &m[2]);
}

static int run_wgrad(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->train->gemm_wgrad(b, &m[0], &m[1], false, &m[2]);
}

static void add_gradients_of_products(struct bench_builder *k)
{
    struct bench_linear linears[BENCH_LINEARS];
    bench_linears(k->c, linears);
    for (int by_weight = 0; by_weight < 2; by_weight++)
        for (int i = 0; i < BENCH_LINEARS; i++) {
            const int64_t n = k->tokens, rows = linears[i].rows, cols = linears[i].cols;
            struct bench_case *c = bench_add(k, by_weight ? "gemm_wgrad" : "gemm_dgrad",
                                             by_weight ? run_wgrad : run_dgrad, "%s [%lld, %lld] × %lld",
                                             linears[i].name, (long long)rows, (long long)cols, (long long)n);
            bench_activations(c, OPERAND_IN, n, rows);
            if (by_weight) {
                bench_activations(c, OPERAND_IN, n, cols);
                bench_operand(c, OPERAND_OUT, DTYPE_F32, rows, cols);
            } else {
                bench_weight(c, rows, cols);
                bench_activations(c, OPERAND_OUT, n, cols);
            }
            c->bytes = bench_bytes(k, c);
            c->flops = 2.0 * (double)n * (double)rows * (double)cols;
        }
}

/* As before a branch: what comes back through it is added to the gradient of the residual stream. */
static int run_norm_before(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return b->train->rms_norm_backward(b, &m[0], &m[1], &c->norm, &m[2], &m[3], &m[3]);
}

static int run_norm_after(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return b->train->rms_norm_backward(b, &m[0], &m[1], &c->norm, &m[2], NULL, &m[3]);
}

static int run_geglu_backward(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct mat gate = mat_cols(&m[0], 0, c->cols), up = mat_cols(&m[0], c->cols, c->cols),
                     dgate = mat_cols(&m[2], 0, c->cols), dup = mat_cols(&m[2], c->cols, c->cols);
    return b->train->geglu_backward(b, &gate, &up, &m[1], &dgate, &dup);
}

static int run_split_qkv_backward(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct qkv_spec spec = {c->heads, c->sequences, c->norm, &m[1], &m[1], &m[2], false, false};
    return b->train->split_qkv_backward(b, &spec, &m[0], &m[3], &m[4], &m[5], &m[6]);
}

static int run_error_backward(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->train->error_backward(b, &m[0], &m[1], 1e-3f, m[2].data, &m[3]);
}

static void add_gradients_of_rows(struct bench_builder *k)
{
    const int64_t n = k->tokens, h = k->c->hidden_size, ffn = k->c->intermediate_size, d = k->c->head_dim,
                  q = k->c->n_heads * d, kv = k->c->n_kv_heads * d;
    struct bench_case *c;
    for (int after = 0; after < 2; after++) {
        c = bench_add(k, "rms_norm_backward", after ? run_norm_after : run_norm_before, "%s [%lld, %lld]",
                      after ? "after" : "before", (long long)n, (long long)h);
        bench_operand(c, OPERAND_IN, DTYPE_F32, n, h)->activation = after;
        bench_weight(c, 1, h);
        bench_operand(c, OPERAND_IN, DTYPE_F32, n, h)->activation = !after;
        bench_operand(c, after ? OPERAND_OUT : OPERAND_INOUT, DTYPE_F32, n, h)->activation = after;
        c->bytes = bench_bytes(k, c);
    }
    c = bench_add(k, "geglu_backward", run_geglu_backward, "[%lld, 2·%lld]", (long long)n, (long long)ffn);
    bench_activations(c, OPERAND_IN, n, 2 * ffn);
    bench_activations(c, OPERAND_IN, n, ffn);
    bench_activations(c, OPERAND_OUT, n, 2 * ffn);
    c->cols = ffn;
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "split_qkv_backward", run_split_qkv_backward, "[%lld, %lld]", (long long)n,
                  (long long)(q + 2 * kv));
    bench_activations(c, OPERAND_IN, n, q + 2 * kv);
    bench_weight(c, 1, d);
    bench_operand(c, OPERAND_IN, DTYPE_F32, k->length, d);
    bench_activations(c, OPERAND_IN, n, q);
    bench_activations(c, OPERAND_IN, n, kv);
    bench_activations(c, OPERAND_IN, n, kv);
    bench_activations(c, OPERAND_OUT, n, q + 2 * kv);
    c->bytes =
        bench_bytes(k, c) - (double)(n * kv) * (double)dtype_bytes(k->b->activation); /* of the values */
    c = bench_add(k, "error_backward", run_error_backward, "[%lld, %lld]", (long long)n, (long long)h);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, h);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, h);
    bench_operand(c, OPERAND_INOUT, DTYPE_F64, 1, 1)->fill = FILL_ZERO;
    bench_operand(c, OPERAND_OUT, DTYPE_F32, n, h);
    c->alone = true;
    c->bytes = bench_bytes(k, c);
}

/* w, v, gradient, start or low, high, scales, restored */
static int run_tune_step(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const bool started = m[3].dtype == DTYPE_BF16;
    const struct qmat q = bench_packed(c, &(struct mat){.dtype = DTYPE_I32, .rows = m[0].rows}, &m[5]);
    const struct tuning t = {.w = &m[0],
                             .v = &m[1],
                             .start = started ? &m[3] : NULL,
                             .low = started ? NULL : &m[3],
                             .high = &m[4],
                             .lowest = 0.5f,
                             .highest = 1.5f,
                             .q = &q,
                             .restored = &m[6]};
    return b->train->tune_step(b, &t, &m[2], &(struct tune_rates){.v = 0.005f, .range = 0.005f}, NULL);
}

static struct operand *factors(struct bench_case *c, enum operand_use use, enum dtype dtype, int64_t rows,
                               double mean)
{
    struct operand *o = bench_operand(c, use, dtype, rows, (c->cols + c->group - 1) / c->group);
    o->mean = mean;
    o->sigma = mean / 10; /* never 0 */
    return o;
}

static void add_tuning(struct bench_builder *k)
{
    const int64_t cols = k->c->hidden_size, rows = k->small ? 64 : k->c->intermediate_size;
    for (int started = 1; started >= 0; started--) {
        struct bench_case *c = bench_add(k, "tune_step", run_tune_step, "%s [%lld, %lld]",
                                         started ? "scales" : "range", (long long)rows, (long long)cols);
        c->bits = 4;
        c->group = cols < 128 ? cols : 128;
        c->cols = cols;
        bench_weight(c, rows, cols);
        bench_operand(c, OPERAND_INOUT, DTYPE_F32, rows, cols)->sigma = 0.2;
        bench_operand(c, OPERAND_IN, DTYPE_F32, rows, cols);
        if (started)
            factors(c, OPERAND_IN, DTYPE_BF16, rows, 0.003);
        else
            factors(c, OPERAND_INOUT, DTYPE_F32, rows, 1);
        factors(c, OPERAND_INOUT, DTYPE_F32, rows, 1);
        factors(c, OPERAND_INOUT, DTYPE_BF16, rows, 0.003);
        bench_operand(c, OPERAND_OUT, DTYPE_BF16, rows, cols);
        c->bytes = bench_bytes(k, c);
    }
}

void bench_train_cases(struct bench_builder *k)
{
    add_gradients_of_products(k);
    add_gradients_of_rows(k);
    add_tuning(k);
}

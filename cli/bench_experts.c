/* The operations of mixtures of experts, and the products of all experts of a layer. */
#include "cli/bench_builder.h"

#include "runtime/gemma.h"

static int run_route(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->route(b, &m[0], &m[1], &m[2], &m[3]);
}

static int run_gather_rows(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->gather_rows(b, &m[0], &m[1], NULL, &m[2]);
}

static int run_combine_rows(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->combine_rows(b, &m[0], &m[1], &m[2], &m[3]);
}

static void add_indices(struct bench_case *c, int64_t rows, int64_t cols, int64_t limit)
{
    struct operand *o = bench_operand(c, OPERAND_IN, DTYPE_I32, rows, cols);
    o->fill = FILL_IDS;
    o->limit = limit;
}

static void add_rows(struct bench_builder *k)
{
    const int64_t n = k->tokens, h = k->c->hidden_size, experts = k->c->n_experts, chosen = k->c->top_k;
    struct bench_case *c = bench_add(k, "route", run_route, "%lld of [%lld, %lld]", (long long)chosen,
                                     (long long)n, (long long)experts);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, experts);
    bench_weight(c, 1, experts)->mean = 1;
    bench_operand(c, OPERAND_OUT, DTYPE_I32, n, chosen);
    bench_operand(c, OPERAND_OUT, DTYPE_F32, n, chosen);
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "gather_rows", run_gather_rows, "%lld of [%lld, %lld]", (long long)(n * chosen),
                  (long long)n, (long long)h);
    bench_activations(c, OPERAND_IN, n, h);
    add_indices(c, 1, n * chosen, n);
    bench_activations(c, OPERAND_OUT, n * chosen, h);
    c->bytes = bench_bytes(k, c); /* each row of x once, whatever a cache makes of that */
    c = bench_add(k, "combine_rows", run_combine_rows, "[%lld, %lld] to %lld", (long long)(n * chosen),
                  (long long)h, (long long)n);
    bench_activations(c, OPERAND_IN, n * chosen, h);
    add_indices(c, n, chosen, n * chosen);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, chosen);
    bench_activations(c, OPERAND_OUT, n, h);
    c->bytes = bench_bytes(k, c);
}

/* An expert's share of the rows: from none to twice the mean. */
static int64_t share_of(int64_t expert)
{
    return (int64_t)(bench_mix((uint64_t)expert) % 1000);
}

/* x, w or codes and scales, out: of all experts one below the other, each with a different number of rows of x. */
static int run_products(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const bool quantized = c->bits != 0;
    const struct mat *x = &m[0], *out = &m[quantized ? 3 : 2];
    const int64_t n = m[1].rows / c->n_experts;
    int64_t all = 0, before = 0, first = 0;
    int rc = 0;
    for (int64_t e = 0; e < c->n_experts; e++)
        all += share_of(e);
    for (int64_t e = 0; !rc && e < c->n_experts; e++) {
        before += share_of(e);
        const int64_t end = x->rows * before / all;
        const struct mat part = mat_rows(x, first, end - first), to = mat_rows(out, first, end - first),
                         w = mat_rows(&m[1], e * n, n);
        first = end;
        if (quantized) {
            const struct mat scales = mat_rows(&m[2], e * n, n);
            const struct qmat q = bench_packed(c, &w, &scales);
            rc = b->core->q_gemm(b, &part, &q, &to);
        } else {
            rc = b->core->gemm(b, &part, &w, &to);
        }
    }
    return rc;
}

static void add_products(struct bench_builder *k, const char *name, bool quantized, int64_t rows,
                         int64_t cols)
{
    const int64_t few = 8, experts = k->small && k->c->n_experts > few ? few : k->c->n_experts;
    const int64_t n = k->tokens * k->c->top_k;
    struct bench_case *c =
        bench_add(k, quantized ? "q_gemm" : "gemm", run_products, "%lld %s [%lld, %lld] × %lld",
                  (long long)experts, name, (long long)rows, (long long)cols, (long long)n);
    bench_activations(c, OPERAND_IN, n, cols);
    if (quantized)
        bench_packed_weight(c, OPERAND_IN, experts * rows, cols);
    else
        bench_weight(c, experts * rows, cols);
    bench_activations(c, OPERAND_OUT, n, rows);
    c->n_experts = experts;
    c->bytes = bench_bytes(k, c);
    c->flops = 2.0 * (double)n * (double)rows * (double)cols;
}

void bench_expert_cases(struct bench_builder *k)
{
    const int64_t h = k->c->hidden_size, width = k->c->expert_size;
    if (!k->c->n_experts)
        return;
    add_rows(k);
    for (int quantized = 0; quantized < 2; quantized++) {
        add_products(k, "gate_up", quantized, 2 * width, h);
        add_products(k, "down", quantized, h, width);
    }
}

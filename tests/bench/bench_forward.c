/* Speed of the forward pass beside its bounds, measured in the same run: OpenBLAS on the same threads for prefill,
 * a loop that only reads memory for decode.
 *     bench_forward MODEL [TOKENS]        TOKENS of prefill (1024) */
#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/parallel.h"
#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu.h"
#include "runtime/forward.h"

#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 5, READ_BYTES = 1 << 30, DECODE_TOKENS = 32 };

/* --- bounds ------------------------------------------------------------------------------------------------------- */

struct bound {
    float *a, *b, *c;
    const uint64_t *memory;
    int n_workers;
    uint64_t sums[64];
};

enum { M = 1024, N = 2048, K = 640 };

static int sgemm_task(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct bound *t = ctx;
    blas_sgemm(true, M, N, K, t->a, K, t->b, K, t->c + index * M * N, N);
    return 0;
}

CPU_CLONES static uint64_t read_words(const uint64_t *p, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += p[i];
    return sum;
}

static int read_task(void *ctx, size_t index, int worker)
{
    struct bound *t = ctx;
    const size_t n = READ_BYTES / sizeof *t->memory / 64;
    t->sums[worker] += read_words(t->memory + index * n, n);
    return 0;
}

static double best_of(struct parallel *pool, size_t n, parallel_task task, void *ctx)
{
    double best = 1e30;
    for (int i = 0; i < ROUNDS; i++) {
        const double start = clock_seconds();
        CHECK(parallel_for(pool, n, task, ctx) == 0);
        const double seconds = clock_seconds() - start;
        best = seconds < best ? seconds : best;
    }
    return best;
}

static void fill(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(i * 2654435761u % 1000) / 1000 - 0.5f;
}

static void measure_bounds(struct parallel *pool, double *flops, double *bytes)
{
    const size_t workers = (size_t)parallel_workers(pool);
    struct bound t = {.a = mem_alloc_aligned(M * K * sizeof(float), "bench"),
                      .b = mem_alloc_aligned(N * K * sizeof(float), "bench"),
                      .c = mem_alloc_aligned(workers * M * N * sizeof(float), "bench")};
    uint64_t *memory = mem_alloc_huge(READ_BYTES, "bench");
    CHECK(t.a && t.b && t.c && memory && workers <= 64);
    fill(t.a, M * K);
    fill(t.b, N * K);
    for (size_t i = 0; i < READ_BYTES / sizeof *memory; i++)
        memory[i] = i;
    t.memory = memory;
    CHECK(blas_load() == 0);
    *flops = 2.0 * M * N * K * (double)workers / best_of(pool, workers, sgemm_task, &t);
    *bytes = READ_BYTES / best_of(pool, 64, read_task, &t);
    free(t.a);
    free(t.b);
    free(t.c);
    free(memory);
}

/* --- the model ---------------------------------------------------------------------------------------------------- */

static double linear_weights(const struct model *m)
{
    double n = 0;
    for (size_t i = 0; i < m->n_linears; i++)
        n += (double)m->linears[i].spec->shape[0] * (double)m->linears[i].spec->shape[1];
    return n;
}

/* Multiplications and additions of the scores and of their products with the values, in reach of the window. */
static double attention_flops(const struct weights *w, int64_t tokens)
{
    double flops = 0;
    for (int64_t l = 0; l < w->config.n_layers; l++)
        for (int64_t t = 1; t <= tokens; t++) {
            const int64_t window = w->blocks[l].window, keys = window && window < t ? window : t;
            flops += 4.0 * (double)(keys * w->blocks[l].n_heads * w->blocks[l].head_dim);
        }
    return flops;
}

static double prefill_seconds(struct forward *f, const int32_t *ids, int64_t tokens)
{
    double best = 1e30;
    for (int i = 0; i < ROUNDS; i++) {
        struct mat hidden;
        forward_begin(f, 1);
        const double start = clock_seconds();
        CHECK(forward_run(f, ids, tokens, &hidden) == 0);
        const double seconds = clock_seconds() - start;
        best = seconds < best ? seconds : best;
    }
    return best;
}

static double decode_seconds(struct forward *f, const struct weights *w, const struct mat *logits)
{
    double best = 1e30;
    for (int round = 0; round < ROUNDS; round++) {
        const double start = clock_seconds();
        for (int i = 0; i < DECODE_TOKENS; i++) {
            const int32_t id = 5 + i;
            struct mat hidden;
            CHECK(forward_run(f, &id, 1, &hidden) == 0 && forward_logits(w, &hidden, logits) == 0);
        }
        const double seconds = (clock_seconds() - start) / DECODE_TOKENS;
        best = seconds < best ? seconds : best;
    }
    return best;
}

int main(int argc, char **argv)
{
    const int64_t tokens = argc > 2 ? atoll(argv[2]) : 1024;
    struct model m;
    struct backend b;
    struct weights w;
    struct forward *f;
    struct parallel *pool;
    if (argc < 2 || model_open(&m, argv[1]) < 0 || model_bind(&m, NULL, NULL) < 0 ||
        backend_open(&b, "cpu", 0) < 0 || weights_load(&w, &m, &b) < 0 ||
        forward_open(&f, &w, &(struct forward_size){1, tokens + ROUNDS * DECODE_TOKENS, tokens}) < 0 || parallel_open(&pool, 0) < 0) {
        fprintf(stderr, "bench_forward: %s\n", argc < 2 ? "MODEL is missing" : err_message());
        return 3;
    }
    const int64_t vocab = w.embedding.rows;
    int32_t *ids = mem_alloc((size_t)tokens, sizeof *ids, "bench");
    const struct mat logits = {mem_alloc_aligned((size_t)vocab * sizeof(float), "bench"), DTYPE_F32, 1, vocab,
                               vocab};
    CHECK(ids && logits.data);
    for (int64_t i = 0; i < tokens; i++)
        ids[i] = i ? (int32_t)(3 + i * 7919 % (vocab - 3)) : 2;
    double sgemm, memory;
    measure_bounds(pool, &sgemm, &memory);
    const double prefill = prefill_seconds(f, ids, tokens), decode = decode_seconds(f, &w, &logits);
    const double flops = 2 * linear_weights(&m) * (double)tokens + attention_flops(&w, tokens);
    printf("%d threads; bounds: sgemm %.1f GFLOP/s, memory reads %.1f GB/s\n", parallel_workers(pool),
           sgemm / 1e9, memory / 1e9);
    printf("prefill of %lld tokens: %.3f s, %.1f GFLOP/s, %.0f %% of sgemm\n", (long long)tokens, prefill,
           flops / prefill / 1e9, 100 * flops / prefill / sgemm);
    printf("decode: %.2f ms a token, %.1f tokens/s, %.1f GB/s of weights, %.0f %% of memory reads\n",
           1e3 * decode, 1 / decode, (double)w.bytes / decode / 1e9, 100 * (double)w.bytes / decode / memory);
    free(ids);
    free(logits.data);
    forward_close(f);
    parallel_close(pool);
    weights_free(&w);
    model_close(&m);
    backend_close(&b);
    return 0;
}

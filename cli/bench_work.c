#include "cli/bench_work.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/bench_case.h"
#include "quantize/layer_inputs.h"
#include "runtime/weights.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const enum bench_unit bench_work_units[N_WORK] = {
    [WORK_LOAD] = UNIT_BYTES,   [WORK_FORWARD] = UNIT_FLOP,  [WORK_HESSIAN] = UNIT_FLOP,
    [WORK_FACTOR] = UNIT_FLOP,  [WORK_SEARCH] = UNIT_TRIALS, [WORK_MEASURE] = UNIT_FLOP,
    [WORK_SWEEP] = UNIT_FLOP,   [WORK_REFIT] = UNIT_FLOP,    [WORK_DESCEND] = UNIT_FLOP,
    [WORK_EXPERTS] = UNIT_FLOP, [WORK_TUNE] = UNIT_FLOP,     [WORK_DELIVER] = UNIT_BYTES};

int bench_shape_config(const struct bench_shape *shape, struct gemma_config *out)
{
    struct hf_config config;
    int rc =
        hf_config_parse(&config, shape->config, (size_t)(shape->config_end - shape->config), shape->name);
    if (rc < 0)
        return rc;
    rc = gemma_config_read(out, &config);
    hf_config_close(&config);
    return rc;
}

/* --- amounts of work ---------------------------------------------------------------------------------------------- */

enum { LONGEST_BLOCK = 128 }; /* columns of a group that the block is asked about */

/* Candidates that a weight is tried with (docs/algorithms.md): a ladder of scales, of either sign where codes are
 * symmetric, by the diagonal; of those the neighbours of the best by the block. */
static double candidates(const struct recipe *r, bool symmetric, int64_t group)
{
    const double signs = symmetric && !r->scales.positive_only ? 2 : 1, ladder = symmetric ? 61 : 45,
                 neighbours = 13, plain = 26;
    switch (r->scales.rule) {
    case SCALE_WEIGHTED:
        return signs * ladder;
    case SCALE_BLOCK:
        return signs * (ladder + (group <= LONGEST_BLOCK ? neighbours : 0));
    case SCALE_MSE:
        return plain;
    case SCALE_RANGE:
    case SCALE_ABSMAX:
        break;
    }
    return 1;
}

/* Linears with the same inputs. */
struct set {
    enum gemma_fused kind;
    const struct linear_plan *first;
    double rows, cols;
};

/* The set that begins with linear *at, which ends up behind it. */
static struct set next_set(const struct recipe_plan *plan, size_t *at)
{
    const struct linear_plan *first = &plan->linears[*at];
    struct set s = {gemma_fused_set(first->tensor->role), first, 0, (double)first->tensor->shape[1]};
    for (; *at < plan->n; ++*at) {
        const struct gemma_tensor *t = plan->linears[*at].tensor;
        if (t->layer != first->tensor->layer || t->expert != first->tensor->expert ||
            gemma_fused_set(t->role) != s.kind)
            break;
        s.rows += (double)t->shape[0];
    }
    return s;
}

static double result_bytes(const struct set *s)
{
    const struct quant_scheme q = s->first->scheme;
    const int64_t cols = s->first->tensor->shape[1];
    const double words = (double)quant_packed_cols(q, cols), groups = (double)quant_groups(q, cols);
    return s->rows * (words * sizeof(uint32_t) + groups * (sizeof(uint16_t) + (q.symmetric ? 0 : 1)));
}

/* Whether codes are found under Hessians, as the result or as a tuning's start. */
static bool solves(const struct recipe *r)
{
    return r->tune.iterations == 0 || r->tune.init == TUNE_FROM_CODES;
}

static void count_solving(double out[N_WORK], const struct set *s, const struct recipe *r, double tokens)
{
    const bool expert = s->first->tensor->expert >= 0, sweep = r->sweep,
               weighed = !expert && (s->kind == FUSED_O || s->kind == FUSED_DOWN);
    const double n = s->rows, k = s->cols, triangle = n * k * k, passes = r->passes;
    const int64_t group = s->first->scheme.group ? s->first->scheme.group : s->first->tensor->shape[1];
    const bool apart = SWEEP_COLUMNS % group != 0 && s->first->tensor->shape[1] > SWEEP_COLUMNS;
    out[WORK_HESSIAN] += k * k * tokens + (weighed ? 2 * n * k * tokens : 0);
    out[WORK_SEARCH] += candidates(r, s->first->scheme.symmetric, group) * n * k;
    out[WORK_MEASURE] += 3 * 2 * triangle;
    out[WORK_FACTOR] += sweep ? k * k * k / 3 : 0;
    out[WORK_SWEEP] += sweep ? triangle : 0;
    if (passes > 0) {
        out[WORK_REFIT] += apart ? (passes + 1) * triangle : 0;
        out[WORK_DESCEND] += (apart ? 3 * passes : 2 * passes + 2) * triangle;
    }
}

/* Of an expert's set, whose share of the tokens that is. Solvers stand side by side, so what they do is one kind of work; what
 * they compute in other numbers, candidates and FP64, is left out. */
static void count_expert(double out[N_WORK], const struct set *s, const struct recipe *r, double tokens)
{
    double own[N_WORK] = {0};
    count_solving(own, s, r, tokens);
    out[WORK_HESSIAN] += own[WORK_HESSIAN];
    out[WORK_EXPERTS] += own[WORK_MEASURE] + own[WORK_SWEEP] + own[WORK_REFIT] + own[WORK_DESCEND];
}

/* How often all tokens go through a set of linears. Attention runs with q/k/v. */
static double pass_runs(enum gemma_fused kind, bool last, const struct recipe *r,
                        const struct bench_pass *pass)
{
    if (r->tune.iterations) /* the reference, set by set for the start, and at last by the tuned weights */
        return 1 + (solves(r) && kind != FUSED_DOWN) + !last;
    if (kind == FUSED_DOWN)
        return last ? 0 : 1;
    return kind == FUSED_GATE_UP && !last && !pass->keep_inner ? 2 : 1;
}

/* Of an expert's set, by the tokens that are sent to it; the inputs of its down take those of its gate and up. */
static double expert_runs(const struct set *s, bool last, const struct recipe *r)
{
    const bool for_down = s->kind != FUSED_DOWN && s->first->quantized && solves(r);
    return (r->tune.iterations > 0) + for_down + !last;
}

/* Forward passes of a mini-batch: its iterations, and the one that judges the last iterate. */
static double batch_passes(const struct tune_options *t)
{
    return (double)t->iterations + (t->iterations && t->keep == TUNE_KEEP_LAST ? 1 : 0);
}

static double batch_samples(const struct tune_options *t, const struct bench_pass *pass)
{
    return (double)(t->batch < pass->samples ? t->batch : pass->samples);
}

/* Products of a tuning with a set, which its share of the tokens goes through: forward, by the weights, and by the inputs but for
 * q/k/v's, which need no gradient. */
static double tuning_flop(const struct set *s, const struct recipe *r, const struct bench_pass *pass,
                          double share)
{
    const double tokens = batch_samples(&r->tune, pass) * (double)pass->length * share;
    const double product = 2 * s->rows * s->cols * tokens;
    const double back = (s->kind == FUSED_QKV ? 0 : 1) + (s->first->quantized ? 1 : 0);
    return product * (batch_passes(&r->tune) + back * (double)r->tune.iterations);
}

/* Of a layer: two products for each pair of query and key, five on the way back. */
static void count_attention(double out[N_WORK], const struct gemma_config *g, int layer,
                            const struct recipe *r, const struct bench_pass *pass)
{
    const int64_t window = g->layers[layer].sliding ? g->sliding_window : 0;
    const double product =
        2 * (double)(g->n_heads * g->head_dim) * bench_attention_pairs(0, pass->length, window);
    const bool last = layer == (int)g->n_layers - 1;
    out[WORK_FORWARD] += 2 * product * (double)pass->samples * pass_runs(FUSED_QKV, last, r, pass);
    out[WORK_TUNE] += product * batch_samples(&r->tune, pass) *
                      (2 * batch_passes(&r->tune) + 5 * (double)r->tune.iterations);
}

void bench_work_count(double out[N_WORK], const struct model *m, const struct recipe_plan *plan,
                      const struct recipe *recipe, const struct bench_pass *pass)
{
    const struct gemma_config *g = &m->gemma;
    const double tokens = (double)pass->samples * (double)pass->length;
    memset(out, 0, N_WORK * sizeof *out);
    out[WORK_LOAD] = (double)(weights_part_bytes(m, WEIGHTS_OUTER) + layer_inputs_read_bytes(m, pass->n_ids));
    for (int layer = 0; layer < (int)g->n_layers; layer++) {
        out[WORK_LOAD] += (double)weights_part_bytes(m, layer);
        count_attention(out, g, layer, recipe, pass);
    }
    for (size_t i = 0; i < plan->n;) {
        const struct set s = next_set(plan, &i);
        const bool last = s.first->tensor->layer == (int)g->n_layers - 1,
                   expert = s.first->tensor->expert >= 0;
        const double share = expert ? (double)g->top_k / (double)g->n_experts : 1, sent = tokens * share;
        const double runs = expert ? expert_runs(&s, last, recipe) : pass_runs(s.kind, last, recipe, pass);
        out[WORK_FORWARD] += runs * 2 * s.rows * s.cols * sent;
        out[WORK_TUNE] += tuning_flop(&s, recipe, pass, share);
        if (!s.first->quantized)
            continue;
        if (solves(recipe))
            (expert ? count_expert : count_solving)(out, &s, recipe, sent);
        out[WORK_DELIVER] += result_bytes(&s);
    }
}

/* --- bounds ------------------------------------------------------------------------------------------------------- */

enum { COPY_BYTES = 256 << 20, DEPTH = 512, CPU_ROUNDS = 3 };

/* What is measured, one after another; a matrix that an operation does not have is empty. */
struct trial {
    const struct backend *b;
    struct parallel *pool;
    struct mat x, m, out; /* x·m, or the Hessian of x in m */
    struct mat order, work, factor;
    float ridge;
    struct buf bufs[6], host;
    int n_bufs;
};

static void raise_rate(double *rate, double amount, const struct bench_time *t)
{
    *rate = fmax(*rate, amount / t->median);
}

static int take(struct trial *t, enum dtype dtype, int64_t rows, int64_t cols, struct mat *out)
{
    CHECK(t->n_bufs < (int)(sizeof t->bufs / sizeof *t->bufs));
    struct buf *memory = &t->bufs[t->n_bufs];
    const int rc = t->b->core->acquire(t->b, (size_t)(rows * cols) * dtype_bytes(dtype),
                                       "a matrix to measure with", memory);
    *out = (struct mat){memory->ptr, dtype, rows, cols, cols};
    t->n_bufs += !rc;
    return rc;
}

/* The same with numbers in it: of a normal distribution, or for codes any bits. */
static int take_filled(struct trial *t, enum dtype dtype, int64_t rows, int64_t cols, struct mat *out)
{
    struct bench_values v;
    const uint64_t seed = (uint64_t)t->n_bufs + 1;
    const int rc = take(t, dtype, rows, cols, out);
    if (!rc)
        bench_values_normal(&v, 0, 1);
    return rc ? rc : bench_fill_device(t->b, t->pool, dtype == DTYPE_I8 ? NULL : &v, seed, out);
}

static void give_back(struct trial *t)
{
    for (int i = 0; i < t->n_bufs; i++)
        t->b->core->release(t->b, &t->bufs[i]);
    t->b->core->release_host(t->b, &t->host);
    *t = (struct trial){.b = t->b, .pool = t->pool};
}

static int time_trial(struct trial *t, bench_call call, struct bench_time *time)
{
    return bench_time(t->b, t->b->host_memory ? CPU_ROUNDS : BENCH_PEAK_ROUNDS, call, t, time);
}

static int gemm_call(void *ctx, int64_t i)
{
    (void)i;
    const struct trial *t = ctx;
    return t->b->core->gemm(t->b, &t->x, &t->m, &t->out);
}

static int matmul_call(void *ctx, int64_t i)
{
    (void)i;
    const struct trial *t = ctx;
    return t->b->core->matmul(t->b, 1, &t->x, &t->m, true, &t->out);
}

static int hessian_call(void *ctx, int64_t i)
{
    (void)i;
    const struct trial *t = ctx;
    return t->b->quant->hessian_add(t->b, &t->x, &t->m);
}

static int factorize_call(void *ctx, int64_t i)
{
    (void)i;
    const struct trial *t = ctx;
    int definite = 0;
    const int rc = t->b->quant->factorize(t->b, &t->m, &t->order, t->ridge, &t->work, &t->factor, &definite);
    return rc || definite ? rc : err_set(ERR_FORMAT, "a made-up Hessian is not positive definite");
}

static int upload_call(void *ctx, int64_t i)
{
    (void)i;
    const struct trial *t = ctx;
    return t->b->core->upload(t->b, t->x.data, t->host.ptr, COPY_BYTES);
}

static int download_call(void *ctx, int64_t i)
{
    (void)i;
    const struct trial *t = ctx;
    return t->b->core->download(t->b, t->host.ptr, t->x.data, COPY_BYTES);
}

static int measure_gemm(struct trial *t, const struct gemma_config *g, struct bench_bounds *out)
{
    const int64_t n = bench_many_tokens(t->b), rows = 2 * g->intermediate_size, cols = g->hidden_size;
    struct bench_time time;
    int rc = take_filled(t, t->b->activation, n, cols, &t->x);
    if (!rc)
        rc = take_filled(t, DTYPE_BF16, rows, cols, &t->m);
    if (!rc)
        rc = take(t, t->b->activation, n, rows, &t->out);
    if (!rc)
        rc = time_trial(t, gemm_call, &time);
    if (!rc)
        raise_rate(&out->rates[WORK_FORWARD], 2.0 * (double)n * (double)rows * (double)cols, &time);
    return rc;
}

static int measure_matmul(struct trial *t, const struct gemma_config *g, enum dtype dtype, enum dtype m_dtype,
                          double *rate)
{
    const int64_t n = 2 * g->intermediate_size, cols = g->hidden_size;
    struct bench_time time;
    int rc = take_filled(t, dtype, n, DEPTH, &t->x);
    if (!rc)
        rc = take_filled(t, m_dtype, DEPTH, cols, &t->m);
    if (!rc)
        rc = take(t, DTYPE_F32, n, cols, &t->out);
    if (!rc)
        rc = t->b->core->zero(t->b, &t->out);
    if (!rc)
        rc = time_trial(t, matmul_call, &time);
    if (!rc)
        raise_rate(rate, 2.0 * (double)n * DEPTH * (double)cols, &time);
    return rc;
}

/* The order as it stands, and a ridge as large as the diagonal: the Hessian may come from fewer rows than columns. */
static int prepare_factor(struct trial *t, int64_t k)
{
    float *diagonal = mem_alloc((size_t)k, sizeof *diagonal, "a diagonal");
    int32_t *order = mem_alloc((size_t)k, sizeof *order, "an order of columns");
    int rc = diagonal && order ? 0 : ERR_MEMORY;
    for (int64_t i = 0; !rc && i < k; i++)
        order[i] = (int32_t)i;
    if (!rc)
        rc = t->b->quant->hessian_finish(t->b, &t->m);
    if (!rc)
        rc = t->b->quant->diagonal(t->b, &t->m, diagonal);
    if (!rc)
        rc = take(t, DTYPE_I32, 1, k, &t->order);
    if (!rc)
        rc = t->b->core->upload(t->b, t->order.data, order, (size_t)k * sizeof *order);
    if (!rc)
        t->ridge = diagonal[0];
    free(diagonal);
    free(order);
    return rc;
}

static int measure_hessian(struct trial *t, const struct gemma_config *g, struct bench_bounds *out)
{
    const int64_t n = bench_many_tokens(t->b), k = g->intermediate_size;
    const double square = (double)k * (double)k;
    struct bench_time time;
    int rc = take_filled(t, t->b->activation, n, k, &t->x);
    if (!rc)
        rc = take(t, DTYPE_F32, k, k, &t->m);
    if (!rc)
        rc = t->b->core->zero(t->b, &t->m);
    if (!rc)
        rc = time_trial(t, hessian_call, &time);
    if (!rc)
        raise_rate(&out->rates[WORK_HESSIAN], square * (double)n, &time);
    if (!rc)
        rc = prepare_factor(t, k);
    if (!rc)
        rc = take(t, DTYPE_F64, k, k, &t->work);
    if (!rc)
        rc = take(t, DTYPE_F32, k, k, &t->factor);
    if (!rc)
        rc = time_trial(t, factorize_call, &time);
    if (!rc)
        raise_rate(&out->rates[WORK_FACTOR], square * (double)k / 3, &time);
    return rc;
}

static int measure_copies(struct trial *t, struct bench_bounds *out)
{
    struct bench_time time;
    int rc = take_filled(t, DTYPE_F32, 1, COPY_BYTES / (int64_t)sizeof(float), &t->x);
    if (!rc)
        rc = t->b->core->acquire_host(t->b, COPY_BYTES, "bytes to copy", &t->host);
    if (!rc)
        rc = time_trial(t, download_call, &time);
    if (!rc)
        raise_rate(&out->rates[WORK_DELIVER], COPY_BYTES, &time);
    if (!rc)
        rc = time_trial(t, upload_call, &time);
    if (!rc)
        raise_rate(&out->rates[WORK_LOAD], COPY_BYTES, &time);
    return rc;
}

int bench_bounds_measure(const struct backend *b, struct parallel *pool, const struct gemma_config *g,
                         struct bench_bounds *out)
{
    struct trial t = {.b = b, .pool = pool};
    double *rates = out->rates;
    int rc = measure_gemm(&t, g, out);
    give_back(&t);
    if (!rc)
        rc = measure_hessian(&t, g, out);
    give_back(&t);
    if (!rc)
        rc = measure_matmul(&t, g, DTYPE_F32, DTYPE_F32, &rates[WORK_SWEEP]);
    give_back(&t);
    if (!rc)
        rc = measure_matmul(&t, g, DTYPE_I8, DTYPE_F32, &rates[WORK_REFIT]);
    give_back(&t);
    if (!rc)
        rc = measure_matmul(&t, g, b->activation, b->activation, &rates[WORK_DESCEND]);
    give_back(&t);
    rates[WORK_MEASURE] = rates[WORK_EXPERTS] = rates[WORK_DESCEND];
    rates[WORK_TUNE] = rates[WORK_FORWARD];
    if (!rc && !b->host_memory)
        rc = measure_copies(&t, out);
    give_back(&t);
    return rc;
}

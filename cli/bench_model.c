/* gemcut bench prefill and decode: the forward pass on made-up weights, beside the rate of one large product. */
#include "cli/bench_case.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/half.h"
#include "base/mem.h"
#include "cli/cmd.h"
#include "cli/human.h"
#include "cli/output.h"
#include "runtime/forward.h"

#include <math.h>
#include <stdlib.h>

/* --- a model on the device ------------------------------------------------------------------------------------------ */

struct bench_run {
    const struct bench *q;
    struct parallel *pool;
    struct bench_place place;
    struct backend b;
    struct model model;
    struct weights weights;
    int64_t rounds, tokens, sequences;
    double error, bound; /* error: −1 when it was not compared */
    double peak;         /* FLOP/s for prefill, bytes/s for decode */
    uint64_t forward_bytes;
};

static int load(struct bench_run *r, const char *folder)
{
    int rc = model_open(&r->model, folder);
    if (!rc)
        rc = model_bind(&r->model, NULL, NULL);
    return rc ? rc : weights_load(&r->weights, &r->model, &r->b);
}

/* Release with close_run whatever it returns. */
static int open_run(struct bench_run *r, const struct bench *q)
{
    *r = (struct bench_run){.q = q, .error = -1};
    int rc = parallel_open(&r->pool, (int)q->machine.threads);
    if (!rc)
        rc = backend_open(&r->b, q->machine.name, (int)q->machine.threads);
    const struct bench_wish wish = {.cut = q->cut, .in_memory = true, .loads = r->b.host_memory ? 2 : 1};
    if (!rc)
        rc = bench_place_open(&r->place, q, &wish, r->pool);
    if (!rc && q->cut)
        rc = bench_cut(q, &r->place);
    return rc ? rc : load(r, q->cut ? r->place.out : r->place.model);
}

static void close_run(struct bench_run *r)
{
    weights_free(&r->weights);
    model_close(&r->model);
    bench_place_close(&r->place);
    backend_close(&r->b);
    parallel_close(r->pool);
}

static void make_ids(const struct weights *w, int32_t *ids, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(bench_mix((uint64_t)i) % (uint64_t)w->config.vocab_size);
}

/* --- is it right ---------------------------------------------------------------------------------------------------- */

enum { CHECK_SEQUENCES = 2, CHECK_TOKENS = 64 };

/* The hidden states of a short prompt, as floats in fresh memory [CHECK_SEQUENCES·CHECK_TOKENS, hidden]. */
static int short_pass(const struct weights *w, float **out)
{
    const struct backend *b = w->backend;
    const struct forward_size size = {CHECK_SEQUENCES, CHECK_TOKENS, CHECK_TOKENS};
    const size_t n = (size_t)(CHECK_SEQUENCES * CHECK_TOKENS * w->config.hidden_size);
    const size_t bytes = n * dtype_bytes(b->activation);
    int32_t ids[CHECK_SEQUENCES * CHECK_TOKENS];
    struct mat hidden = {0};
    struct forward *f = NULL;
    make_ids(w, ids, CHECK_SEQUENCES * CHECK_TOKENS);
    float *values = *out = mem_alloc_aligned(n * sizeof(float), "hidden states");
    int rc = values ? forward_open(&f, w, &size) : ERR_MEMORY;
    if (!rc) {
        forward_begin(f, CHECK_SEQUENCES);
        rc = forward_run(f, ids, CHECK_TOKENS, &hidden);
    }
    CHECK(rc || hidden.stride == hidden.cols);
    if (!rc)
        rc = b->core->download(b, values, hidden.data, bytes);
    if (!rc && b->activation == DTYPE_BF16) /* widened in place, from the end */
        for (size_t i = n; i-- > 0;)
            values[i] = half_from_bf16(((const uint16_t *)values)[i]);
    CHECK(b->activation == DTYPE_BF16 || b->activation == DTYPE_F32);
    forward_close(f);
    return rc;
}

/* The same on the CPU; where that is the device itself, with one thread. */
static int reference_pass(const struct bench_run *r, float **out)
{
    struct backend cpu;
    struct weights w = {0};
    *out = NULL;
    int rc = backend_open(&cpu, "cpu", r->b.host_memory ? 1 : 0);
    if (!rc)
        rc = weights_load(&w, &r->model, &cpu);
    if (!rc)
        rc = short_pass(&w, out);
    weights_free(&w);
    backend_close(&cpu);
    return rc;
}

static int check(struct bench_run *r)
{
    const uint64_t few = 2000000000; /* parameters; the CPU needs the weights too */
    if (r->q->check == BENCH_CHECK_NO || (r->q->check == BENCH_CHECK_AUTO && r->place.model_bytes / 2 > few))
        return 0;
    float *got = NULL, *expected = NULL;
    output_detail("comparing with the CPU");
    int rc = short_pass(&r->weights, &got);
    if (!rc)
        rc = reference_pass(r, &expected);
    double difference = 0, size = 0;
    for (int64_t i = 0; !rc && i < CHECK_SEQUENCES * CHECK_TOKENS * r->weights.config.hidden_size; i++) {
        const double d = (double)got[i] - (double)expected[i];
        difference += d * d;
        size += (double)expected[i] * (double)expected[i];
    }
    r->error = sqrt(difference / size);
    r->bound = r->b.activation == DTYPE_F32 ? 1e-4 : 0.05;
    free(got);
    free(expected);
    return rc;
}

static int verdict(const struct bench_run *r)
{
    return r->error < 0 || r->error <= r->bound ? CMD_DONE : CMD_NO;
}

static void head_text(const struct bench_run *r, struct text *out)
{
    bench_text_begin(out, r->q);
    bench_place_text(&r->place, out);
    if (r->q->cut) {
        text_add(out, "cut          ");
        bench_recipe_text(r->q, out);
        text_add(out, "\n");
    }
    text_printf(out, "memory       %s of weights, %s of activations and cache\n",
                human_bytes(r->weights.bytes).s, human_bytes(r->forward_bytes).s);
    if (r->error < 0)
        text_add(out, "check        none\n");
    else
        text_printf(
            out, "check        %s: hidden states of %d × %d tokens are %.1e from %s, expected at most %g\n",
            verdict(r) == CMD_DONE ? "ok" : "WRONG", CHECK_SEQUENCES, CHECK_TOKENS, r->error,
            r->b.host_memory ? "those of one thread" : "the CPU's", r->bound);
}

static void head_json(const struct bench_run *r, struct text *out)
{
    bench_json_begin(out, r->q);
    bench_place_json(&r->place, out);
    if (r->q->cut) {
        json_put_key(out, "recipe");
        recipe_write(&r->q->recipe, out);
    }
    json_kv_uint(out, "weight_bytes", r->weights.bytes);
    json_kv_uint(out, "forward_bytes", r->forward_bytes);
    if (r->error >= 0) {
        json_kv_double(out, "relative_error", r->error);
        json_kv_double(out, "bound", r->bound);
    }
    json_kv_bool(out, "ok", verdict(r) == CMD_DONE);
    json_kv_int(out, "rounds", r->rounds);
    json_kv_int(out, "tokens", r->tokens);
}

/* --- prefill -------------------------------------------------------------------------------------------------------- */

struct pass {
    struct forward *f;
    const int32_t *ids;
    int64_t sequences, tokens;
};

static int pass_call(void *ctx, int64_t i)
{
    (void)i;
    const struct pass *p = ctx;
    struct mat hidden;
    forward_begin(p->f, p->sequences);
    return forward_run(p->f, p->ids, p->tokens, &hidden);
}

static double linear_parameters(const struct model *m)
{
    double n = 0;
    for (size_t i = 0; i < m->n_linears; i++)
        n += (double)m->linears[i].spec->shape[0] * (double)m->linears[i].spec->shape[1];
    return n;
}

/* Multiplications and additions of a pass: of the linears, and of attention in reach of the windows. */
static double pass_flops(const struct bench_run *r)
{
    double flops = 2 * linear_parameters(&r->model) * (double)(r->sequences * r->tokens);
    for (int64_t l = 0; l < r->weights.config.n_layers; l++) {
        const struct block *k = &r->weights.blocks[l];
        flops += 4 * (double)(k->n_heads * k->head_dim) * (double)r->sequences *
                 bench_attention_pairs(0, r->tokens, k->window);
    }
    return flops;
}

static int time_prefill(struct bench_run *r, struct bench_time *t)
{
    const struct forward_size size = {r->sequences, r->tokens, r->tokens};
    struct pass p = {.sequences = r->sequences, .tokens = r->tokens};
    int32_t *ids = mem_alloc((size_t)(r->sequences * r->tokens), sizeof *ids, "tokens");
    int rc = ids ? forward_open(&p.f, &r->weights, &size) : ERR_MEMORY;
    if (!rc) {
        make_ids(&r->weights, ids, r->sequences * r->tokens);
        p.ids = ids;
        rc = bench_time(&r->b, r->rounds, pass_call, &p, t);
    }
    r->forward_bytes = forward_bytes(&r->weights.config, &r->b, &size);
    forward_close(p.f);
    free(ids);
    return rc;
}

static int print_prefill(const struct bench_run *r, const struct bench_time *t)
{
    struct text out = {0};
    const double flops = pass_flops(r), tokens = (double)(r->sequences * r->tokens);
    if (!output_json()) {
        head_text(r, &out);
        text_printf(&out, "pass         %lld × %lld tokens: %.4f s median of %lld, %.4f s at best\n",
                    (long long)r->sequences, (long long)r->tokens, t->median, (long long)r->rounds, t->min);
        text_printf(
            &out,
            "rate         %.0f tokens/s, %.4g TFLOP/s, %.0f %% of the %.4g of gemm [10240, 2560] × %lld\n",
            tokens / t->median, flops / t->median / 1e12, 100 * flops / t->median / r->peak, r->peak / 1e12,
            (long long)bench_many_tokens(&r->b));
        return output_print(&out);
    }
    head_json(r, &out);
    json_kv_int(&out, "sequences", r->sequences);
    json_kv_double(&out, "seconds_median", t->median);
    json_kv_double(&out, "seconds_min", t->min);
    json_kv_double(&out, "tokens_per_s", tokens / t->median);
    json_kv_double(&out, "tflop", flops / 1e12);
    json_kv_double(&out, "tflop_per_s", flops / t->median / 1e12);
    json_kv_double(&out, "gemm_tflop_per_s", r->peak / 1e12);
    json_kv_double(&out, "share_of_peak", flops / t->median / r->peak);
    return output_json_end(&out);
}

int bench_prefill(const struct bench *q)
{
    struct bench_run r;
    struct bench_time t;
    int rc = open_run(&r, q);
    r.rounds = q->rounds ? q->rounds : r.b.host_memory ? 3 : 10;
    r.tokens = q->tokens ? q->tokens : r.b.host_memory ? 512 : 2048;
    r.sequences = q->sequences ? q->sequences : r.b.host_memory ? 1 : 8;
    if (!rc)
        rc = check(&r);
    if (!rc)
        rc = bench_gemm_peak(&r.b, r.pool, &r.peak);
    if (!rc)
        rc = time_prefill(&r, &t);
    if (!rc)
        rc = bench_gemm_peak(&r.b, r.pool, &r.peak);
    if (!rc)
        rc = print_prefill(&r, &t);
    const int answer = verdict(&r);
    close_run(&r);
    return rc ? rc : answer;
}

/* --- decode --------------------------------------------------------------------------------------------------------- */

enum { PROMPT = 128 };

/* One round: the prompt, then token after token with its logits, waited for each time as sampling would. */
static int decode_round(const struct bench_run *r, struct forward *f, const struct mat *logits, double *steps)
{
    const struct backend *b = &r->b;
    int32_t ids[PROMPT];
    struct mat hidden;
    make_ids(&r->weights, ids, PROMPT);
    forward_begin(f, 1);
    int rc = forward_run(f, ids, PROMPT, &hidden);
    if (!rc)
        rc = b->core->wait(b);
    for (int64_t i = 0; !rc && i < r->tokens; i++) {
        const double start = clock_seconds();
        rc = err_interrupt_requested() ? err_interrupted() : forward_run(f, &ids[i % PROMPT], 1, &hidden);
        if (!rc)
            rc = forward_logits(&r->weights, &hidden, logits);
        if (!rc)
            rc = b->core->wait(b);
        steps[i] = clock_seconds() - start;
    }
    return rc;
}

/* The median over all steps, and the best mean of a round. */
static int time_decode(struct bench_run *r, struct bench_time *t)
{
    const struct backend *b = &r->b;
    const struct forward_size size = {1, PROMPT + r->tokens, PROMPT};
    const int64_t vocab = r->weights.config.vocab_size;
    struct forward *f = NULL;
    struct buf memory = {0};
    double *steps = mem_alloc((size_t)((r->rounds + 1) * r->tokens), sizeof *steps, "times");
    int rc = steps ? forward_open(&f, &r->weights, &size) : ERR_MEMORY;
    if (!rc)
        rc = b->core->acquire(b, (size_t)vocab * sizeof(float), "logits", &memory);
    const struct mat logits = {memory.ptr, DTYPE_F32, 1, vocab, vocab};
    t->min = INFINITY;
    for (int64_t i = -1; !rc && i < r->rounds; i++) { /* the first one is not counted */
        double *round = steps + (i + 1) * r->tokens, mean = 0;
        rc = decode_round(r, f, &logits, round);
        for (int64_t k = 0; k < r->tokens; k++)
            mean += round[k] / (double)r->tokens;
        t->min = i >= 0 && mean < t->min ? mean : t->min;
    }
    if (!rc)
        t->median = bench_median(steps + r->tokens, (size_t)(r->rounds * r->tokens));
    r->forward_bytes = forward_bytes(&r->weights.config, b, &size);
    b->core->release(b, &memory);
    forward_close(f);
    free(steps);
    return rc;
}

static int print_decode(const struct bench_run *r, const struct bench_time *t)
{
    struct text out = {0};
    const double rate = (double)r->weights.bytes / t->median;
    if (!output_json()) {
        head_text(r, &out);
        text_printf(
            &out,
            "token        %.3f ms median of %lld × %lld after a prompt of %d, logits included; mean of the best round %.3f ms\n",
            t->median * 1e3, (long long)r->rounds, (long long)r->tokens, PROMPT, t->min * 1e3);
        text_printf(
            &out,
            "rate         %.1f tokens/s, %.1f GB/s of weights, %.0f %% of the %.1f of gemm [65536, 8192] × 1\n",
            1 / t->median, rate / 1e9, 100 * rate / r->peak, r->peak / 1e9);
        return output_print(&out);
    }
    head_json(r, &out);
    json_kv_bool(&out, "cut", r->q->cut);
    json_kv_int(&out, "prompt_tokens", PROMPT);
    json_kv_double(&out, "seconds_median", t->median);
    json_kv_double(&out, "seconds_best_round", t->min);
    json_kv_double(&out, "tokens_per_s", 1 / t->median);
    json_kv_double(&out, "gb_per_s", rate / 1e9);
    json_kv_double(&out, "gemv_gb_per_s", r->peak / 1e9);
    json_kv_double(&out, "share_of_peak", rate / r->peak);
    return output_json_end(&out);
}

int bench_decode(const struct bench *q)
{
    struct bench_run r;
    struct bench_time t;
    int rc = open_run(&r, q);
    r.rounds = q->rounds ? q->rounds : 3;
    r.tokens = q->tokens ? q->tokens : 128;
    r.sequences = 1;
    if (!rc)
        rc = check(&r);
    if (!rc)
        rc = bench_gemv_peak(&r.b, r.pool, &r.peak);
    if (!rc)
        rc = time_decode(&r, &t);
    if (!rc)
        rc = bench_gemv_peak(&r.b, r.pool, &r.peak);
    if (!rc)
        rc = print_decode(&r, &t);
    const int answer = verdict(&r);
    close_run(&r);
    return rc ? rc : answer;
}

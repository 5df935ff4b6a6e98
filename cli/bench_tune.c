/* gemcut bench tune: one iteration of AutoRound on a block, operation by operation and as a whole. The tuner itself
 * runs, on made-up weights and tokens, and its backend does the counting. */
#include "cli/bench_profile.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/bench_work.h"
#include "cli/cmd.h"
#include "cli/human.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "quantize/autoround.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_KINDS = 2, PASSES = 3 /* over each kind of block: as a whole, apart, as a whole */ };

/* Blocks that see equally far: one of them is measured. */
struct kind {
    int layer;
    int64_t window, n_layers;
    struct profile_op ops[N_ROWS]; /* of an iteration; medians */
    double whole;                  /* seconds of one without waiting */
};

struct tuning_run {
    struct bench request; /* with the samples that it comes to */
    struct parallel *pool;
    struct bench_place place;
    struct backend b;
    struct model model;
    struct recipe_plan plan;
    struct dataset data;
    struct tune_options options;
    struct calibrate_plan memory;
    struct weights weights;
    struct work_clock clock;
    struct capture *capture;
    struct tuner *tuner;
    struct profile_iteration *iterations; /* [options.iterations] */
    double *scratch;                      /* [rounds] */
    double gemm, copy;                    /* FLOP/s, bytes/s */
    struct kind kinds[MAX_KINDS];
    int n_kinds;
    int64_t rounds;
};

/* --- what is tuned ------------------------------------------------------------------------------------------------ */

static int settle_samples(const struct tuning_run *r, struct calib_spec *calib)
{
    const struct bench *q = &r->request;
    struct gemma_config g;
    const int rc = bench_shape_config(q->shape, &g);
    if (rc < 0)
        return rc;
    const int64_t most = g.max_positions, usual = r->b.host_memory ? 512 : 2048;
    gemma_config_free(&g);
    calib->samples = q->sequences ? q->sequences : r->b.host_memory ? 1 : 8;
    calib->length = q->tokens ? q->tokens : usual < most ? usual : most;
    if (calib->length > most)
        return err_set(ERR_USAGE, "--tokens %lld: the context of %s is %lld tokens", (long long)calib->length,
                       q->shape->name, (long long)most);
    if (calib->samples > TUNE_MAX_BATCH)
        return err_set(ERR_USAGE, "--sequences %lld: an iteration has at most %d samples",
                       (long long)calib->samples, TUNE_MAX_BATCH);
    return 0;
}

/* The first iteration warms up. */
static int settle(struct tuning_run *r)
{
    struct recipe *recipe = &r->request.recipe;
    const int rc = settle_samples(r, &recipe->calib);
    if (rc < 0)
        return rc;
    r->rounds = r->request.rounds ? r->request.rounds : r->b.host_memory ? 3 : 10;
    recipe->tune.batch = recipe->calib.samples;
    r->options = recipe->tune;
    r->options.iterations = r->rounds + 1;
    r->iterations = mem_alloc((size_t)r->options.iterations, sizeof *r->iterations, "times");
    r->scratch = mem_alloc((size_t)r->rounds, sizeof *r->scratch, "times");
    return r->iterations && r->scratch ? 0 : ERR_MEMORY;
}

static void find_kinds(struct tuning_run *r)
{
    const struct gemma_config *g = &r->model.gemma;
    for (int layer = 0; layer < (int)g->n_layers; layer++) {
        const int64_t window = g->layers[layer].sliding ? g->sliding_window : 0;
        int i = 0;
        while (i < r->n_kinds && r->kinds[i].window != window)
            i++;
        CHECK(i < MAX_KINDS);
        if (i == r->n_kinds)
            r->kinds[r->n_kinds++] = (struct kind){.layer = layer, .window = window};
        r->kinds[i].n_layers++;
    }
}

static int open_model(struct tuning_run *r)
{
    const struct bench_wish wish = {.in_memory = true};
    int rc = bench_place_open(&r->place, &r->request, &wish, r->pool);
    if (!rc)
        rc = model_open_unquantized(&r->model, r->place.model);
    if (!rc)
        rc = model_bind(&r->model, NULL, NULL);
    return rc ? rc : recipe_resolve(&r->plan, &r->request.recipe, &r->model.tensors);
}

/* As calibrate_run has it. */
static int open_tuning(struct tuning_run *r)
{
    const struct model *m = &r->model;
    int rc = bench_ids(&r->request, &r->data);
    if (!rc)
        rc = calibrate_plan(&r->memory, m, &r->plan, &r->b, &r->data, &r->options, 0);
    if (!rc)
        rc = weights_open(&r->weights, m, &r->b);
    if (!rc)
        rc = capture_open(&r->capture, &r->weights, &r->data, &r->memory.capture, -1, &r->clock);
    return rc ? rc
              : tuner_open(&r->tuner, m, &r->plan, &r->weights, &r->data, &r->options, r->memory.micro_batch,
                           &r->clock);
}

static void close_tuning(struct tuning_run *r)
{
    tuner_close(r->tuner);
    capture_close(r->capture);
    weights_free(&r->weights);
    r->tuner = NULL;
    r->capture = NULL;
}

/* Release with close_run whatever it returns. */
static int open_run(struct tuning_run *r, const struct bench *q)
{
    *r = (struct tuning_run){.request = *q};
    work_begin(&r->clock, NULL);
    int rc = parallel_open(&r->pool, (int)q->machine.threads);
    if (!rc)
        rc = backend_open(&r->b, q->machine.name, (int)q->machine.threads);
    if (!rc)
        rc = settle(r);
    if (!rc)
        rc = open_model(r);
    if (!rc)
        find_kinds(r);
    return rc;
}

static void close_run(struct tuning_run *r)
{
    dataset_free(&r->data);
    recipe_plan_free(&r->plan);
    model_close(&r->model);
    bench_place_close(&r->place);
    backend_close(&r->b);
    parallel_close(r->pool);
    free(r->iterations);
    free(r->scratch);
}

/* --- a block ------------------------------------------------------------------------------------------------------ */

static int start_set(const struct tuning_run *r, int layer, const struct set *s)
{
    const struct gemma_tensor *t = s->members->tensor;
    const struct scale_spec range = {SCALE_RANGE, false};
    struct piece pieces[GPTQ_MAX_PARTS];
    const int n =
        set_pieces(s, set_place(&r->weights.blocks[layer], gemma_fused_set(t->role), t->expert), pieces);
    int rc = 0;
    for (int i = 0; !rc && i < n; i++) {
        const struct mat *w = &pieces[i].linear->weight;
        struct tuned_weight start = tuner_weight(r->tuner, s, pieces[i].row, pieces[i].rows);
        rc = r->b.quant->find_scales(&r->b, w, &range, &start.q);
        if (!rc)
            rc = r->b.quant->round_codes(&r->b, &(struct rounding){w, &start.q, &start.codes});
    }
    return rc;
}

/* Codes to begin with, for those who want some: the nearest ones under plain scales. */
static int make_start(const struct tuning_run *r, int layer)
{
    const int n_experts = (int)r->model.gemma.n_experts;
    int rc = 0;
    for (int k = 0; r->options.init == TUNE_FROM_CODES && k < N_BLOCK_SETS; k++)
        for (int e = 0; !rc && e < (k < N_FUSED ? 1 : n_experts); e++) {
            const struct set s = set_find(&r->plan, layer, set_kind(k), k < N_FUSED ? SET_DENSE : e);
            rc = set_quantized(&s) ? start_set(r, layer, &s) : 0;
        }
    return rc;
}

/* A whole tuning of the block that is loaded, watched. */
static int watch(struct tuning_run *r, int layer, bool apart, struct profile_log *log)
{
    struct bench_profile profile;
    struct tune_stats stats;
    for (int64_t i = 0; i < r->options.iterations; i++)
        r->iterations[i] = (struct profile_iteration){0};
    *log = (struct profile_log){.apart = apart, .iterations = r->iterations, .n = r->options.iterations};
    bench_profile_begin(&profile, &r->b, log, &r->weights.blocks[layer]);
    r->weights.backend = &profile.backend;
    const int rc = tuner_run(r->tuner, r->capture, &stats, NULL);
    r->weights.backend = &r->b;
    CHECK(rc || log->at == log->n);
    return rc;
}

/* Medians over the iterations but the first, which has what comes before them. */
static void summarize(struct tuning_run *r, struct kind *k)
{
    for (int row = 0; row < N_ROWS; row++) {
        for (int64_t i = 0; i < r->rounds; i++)
            r->scratch[i] = r->iterations[i + 1].ops[row].seconds;
        k->ops[row] = r->iterations[1].ops[row];
        k->ops[row].seconds = bench_median(r->scratch, (size_t)r->rounds);
    }
}

static int watch_kind(struct tuning_run *r, struct kind *k, int *n_done)
{
    int rc = 0;
    k->whole = INFINITY;
    for (int i = 0; !rc && i < PASSES; i++) {
        const bool apart = i == 1;
        struct profile_log log;
        progress_update((uint64_t)(*n_done)++, apart ? "operation by operation" : "as a whole");
        rc = watch(r, k->layer, apart, &log);
        if (!rc && apart)
            summarize(r, k);
        if (!rc && !apart)
            k->whole = fmin(k->whole, (log.end - log.begin) / (double)r->rounds);
    }
    return rc;
}

static int measure_kind(struct tuning_run *r, struct kind *k, int *n_done)
{
    int rc = weights_load_part(&r->weights, k->layer);
    if (!rc)
        rc = tuner_begin(r->tuner, k->layer);
    if (!rc)
        rc = capture_block(r->capture, k->layer, CAPTURE_REFERENCE);
    if (!rc)
        rc = make_start(r, k->layer);
    if (!rc)
        rc = watch_kind(r, k, n_done);
    if (!rc) /* both streams agree again for the next block */
        rc = tuner_restore(r->tuner);
    if (!rc)
        rc = capture_block(r->capture, k->layer, CAPTURE_INPUTS);
    if (!rc)
        rc = r->b.core->wait(&r->b);
    weights_unload_part(&r->weights, k->layer);
    return rc;
}

static int measure_peaks(struct tuning_run *r)
{
    const int rc = bench_gemm_peak(&r->b, r->pool, &r->gemm);
    return rc ? rc : bench_copy_peak(&r->b, &r->copy);
}

static int measure(struct tuning_run *r)
{
    int n_done = 0, rc = open_tuning(r);
    progress_begin("measuring", PROGRESS_ITEMS, (uint64_t)(PASSES * r->n_kinds));
    for (int i = 0; !rc && i < r->n_kinds; i++)
        rc = measure_kind(r, &r->kinds[i], &n_done);
    progress_end();
    close_tuning(r); /* the bounds that follow want its memory */
    return rc;
}

/* --- the result --------------------------------------------------------------------------------------------------- */

static double peak_of(const struct tuning_run *r, int row)
{
    return profile_row_computes(row) ? r->gemm : r->copy;
}

static double all_operations(const struct kind *k)
{
    double seconds = 0;
    for (int row = 0; row < N_ROWS; row++)
        seconds += k->ops[row].seconds;
    return seconds;
}

/* Seconds of the iterations that were asked for over all blocks: as measured, and at the bounds' rates. */
static void tune_seconds(const struct tuning_run *r, double *measured, double *at_least)
{
    *measured = *at_least = 0;
    for (int i = 0; i < r->n_kinds; i++) {
        const struct kind *k = &r->kinds[i];
        const double n = (double)(k->n_layers * r->request.recipe.tune.iterations);
        *measured += n * k->whole;
        for (int row = 0; row < N_ROWS; row++)
            *at_least += n * k->ops[row].amount / peak_of(r, row);
    }
}

static void put_op(const struct tuning_run *r, const struct kind *k, int row, struct human_table *t)
{
    const struct profile_op *op = &k->ops[row];
    const bool flop = profile_row_computes(row);
    const double amount = op->amount / (flop ? 1e12 : 1e9), rate = amount / op->seconds;
    human_table_cell(t, "%s", profile_row_name(row));
    human_table_cell(t, "%lld", (long long)op->calls);
    human_table_cell(t, "%.3f", op->seconds * 1e3);
    human_table_cell(t, flop ? "%.3g TFLOP" : "%.3g GB", amount);
    human_table_cell(t, flop ? "%.3g TFLOP/s" : "%.1f GB/s", rate);
    human_table_cell(t, "%.0f %%", 100 * op->amount / op->seconds / peak_of(r, row));
    human_table_cell(t, "%.1f %%", 100 * op->seconds / k->whole);
}

static void put_total(const char *name, int64_t calls, double seconds, double whole, struct human_table *t)
{
    human_table_cell(t, "%s", name);
    if (calls)
        human_table_cell(t, "%lld", (long long)calls);
    else
        human_table_cell(t, "-");
    human_table_cell(t, "%.3f", seconds * 1e3);
    for (int i = 0; i < 3; i++)
        human_table_cell(t, "-");
    human_table_cell(t, "%.1f %%", 100 * seconds / whole);
}

static int put_kind(const struct tuning_run *r, const struct kind *k, struct text *out)
{
    static const struct human_column columns[] = {{"operation", false},  {"calls", true}, {"median ms", true},
                                                  {"work", true},        {"rate", true},  {"of bound", true},
                                                  {"of iteration", true}};
    struct human_table t = {.columns = columns, .n_columns = 7};
    const double sum = all_operations(k);
    int64_t calls = 0;
    text_printf(out, "\nblock %d: ", k->layer);
    if (k->window)
        text_printf(out, "a window of %lld tokens", (long long)k->window);
    else
        text_add(out, "all tokens are seen");
    text_printf(out, ", as in %lld of %lld blocks\n\n", (long long)k->n_layers,
                (long long)r->model.gemma.n_layers);
    for (int row = 0; row < N_ROWS; row++) {
        calls += k->ops[row].calls;
        if (k->ops[row].calls)
            put_op(r, k, row, &t);
    }
    put_total("sum", calls, sum, k->whole, &t);
    put_total("iteration, not waited for", 0, k->whole, k->whole, &t);
    put_total("rest", 0, k->whole - sum, k->whole, &t);
    const int rc = human_table_render(&t, out);
    human_table_free(&t);
    return rc;
}

static void put_head(const struct tuning_run *r, struct text *out)
{
    bench_text_begin(out, &r->request);
    bench_place_text(&r->place, out);
    text_add(out, "recipe       ");
    bench_recipe_text(&r->request, out);
    text_printf(out, "\niteration    %lld × %lld random tokens, %lld at a time, from %s; %lld measured\n",
                (long long)r->data.samples, (long long)r->data.length, (long long)r->memory.micro_batch,
                r->options.init == TUNE_FROM_CODES ? "codes" : "the range", (long long)r->rounds);
    text_printf(out, "bounds       gemm [10240, 2560] × %lld: %.4g TFLOP/s; copy of %s: %.1f GB/s\n",
                (long long)bench_many_tokens(&r->b), r->gemm / 1e12, r->b.host_memory ? "256 MiB" : "1 GiB",
                r->copy / 1e9);
}

static int print_text(const struct tuning_run *r)
{
    struct text out = {0};
    double measured, at_least;
    int rc = 0;
    put_head(r, &out);
    for (int i = 0; !rc && i < r->n_kinds; i++)
        rc = put_kind(r, &r->kinds[i], &out);
    tune_seconds(r, &measured, &at_least);
    text_printf(&out, "\n%lld iterations of all %lld blocks: %s; at the rates of the bounds %s\n",
                (long long)r->request.recipe.tune.iterations, (long long)r->model.gemma.n_layers,
                human_seconds(measured).s, human_seconds(at_least).s);
    text_add(
        &out,
        "\nbound: gemm for products and attention, copy for the rest. The device is waited for before and "
        "behind each\noperation; rest: gaps between operations, less what waiting costs.\n");
    if (rc < 0) {
        text_free(&out);
        return rc;
    }
    return output_print(&out);
}

/* On one line, as bench ops has them. */
static void op_json(const struct tuning_run *r, const struct kind *k, int row, struct text *out)
{
    const struct profile_op *op = &k->ops[row];
    const bool flop = profile_row_computes(row);
    const double amount = op->amount / (flop ? 1e12 : 1e9);
    const int indent = out->indent;
    json_begin_object(out);
    out->indent = 0;
    json_kv_string(out, "op", profile_row_name(row));
    json_kv_int(out, "calls", op->calls);
    json_kv_double(out, "seconds_median", op->seconds);
    json_kv_double(out, flop ? "tflop" : "gb", amount);
    json_kv_double(out, flop ? "tflop_per_s" : "gb_per_s", amount / op->seconds);
    json_kv_double(out, "share_of_bound", op->amount / op->seconds / peak_of(r, row));
    json_kv_double(out, "share_of_iteration", op->seconds / k->whole);
    json_end_object(out);
    out->indent = indent;
}

static void kind_json(const struct tuning_run *r, const struct kind *k, struct text *out)
{
    const double sum = all_operations(k);
    json_begin_object(out);
    json_kv_int(out, "block", k->layer);
    json_kv_int(out, "window", k->window);
    json_kv_int(out, "n_blocks", k->n_layers);
    json_kv_double(out, "seconds_operations", sum);
    json_kv_double(out, "seconds_iteration", k->whole);
    json_kv_double(out, "seconds_rest", k->whole - sum);
    json_put_key(out, "ops");
    json_begin_array(out);
    for (int row = 0; row < N_ROWS; row++)
        if (k->ops[row].calls)
            op_json(r, k, row, out);
    json_end_array(out);
    json_end_object(out);
}

static int print_json(const struct tuning_run *r)
{
    struct text out = {0};
    double measured, at_least;
    tune_seconds(r, &measured, &at_least);
    bench_json_begin(&out, &r->request);
    bench_place_json(&r->place, &out);
    json_put_key(&out, "recipe");
    recipe_write(&r->request.recipe, &out);
    json_kv_int(&out, "rounds", r->rounds);
    json_kv_int(&out, "tokens", r->data.length);
    json_kv_int(&out, "sequences", r->data.samples);
    json_kv_int(&out, "micro_batch", r->memory.micro_batch);
    json_kv_double(&out, "gemm_tflop_per_s", r->gemm / 1e12);
    json_kv_double(&out, "copy_gb_per_s", r->copy / 1e9);
    json_put_key(&out, "blocks");
    json_begin_array(&out);
    for (int i = 0; i < r->n_kinds; i++)
        kind_json(r, &r->kinds[i], &out);
    json_end_array(&out);
    json_kv_int(&out, "iterations", r->request.recipe.tune.iterations);
    json_kv_double(&out, "seconds_all_blocks", measured);
    json_kv_double(&out, "seconds_at_bounds", at_least);
    return output_json_end(&out);
}

int bench_tune(const struct bench *q)
{
    struct tuning_run r;
    int rc = open_run(&r, q);
    if (!rc)
        rc = measure_peaks(&r);
    if (!rc)
        rc = measure(&r);
    if (!rc)
        rc = measure_peaks(&r);
    if (!rc)
        rc = output_json() ? print_json(&r) : print_text(&r);
    close_run(&r);
    return rc;
}

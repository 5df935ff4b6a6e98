#include "cli/quantize_run.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "cli/human.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "quantize/capture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void describe_scheme(struct quant_scheme s, struct text *out)
{
    text_printf(out, "%s, ", recipe_scheme_name(s));
    if (s.group)
        text_printf(out, "groups of %lld", (long long)s.group);
    else
        text_add(out, "one scale a row");
}

/* --- the plan ------------------------------------------------------------------------------------------------- */

/* How many linears of the plan from i on one line speaks of: all of a layer's experts, which are decided alike; else 1. */
static size_t line_linears(const struct recipe_plan *plan, size_t i)
{
    const struct gemma_tensor *first = plan->linears[i].tensor;
    size_t n = 1;
    while (first->expert >= 0 && i + n < plan->n && plan->linears[i + n].tensor->expert >= 0 &&
           plan->linears[i + n].tensor->layer == first->layer)
        n++;
    return n;
}

/* A linear's name, or of experts the glob for all of a layer's. */
static void put_line_name(struct human_table *table, const struct gemma_tensor *t)
{
    static const char last[] = ".experts.";
    const char *experts = t->expert >= 0 ? strstr(t->name, last) : NULL;
    if (experts)
        human_table_cell(table, "%.*s*", (int)(experts - t->name + (ptrdiff_t)strlen(last)), t->name);
    else
        human_table_cell(table, "%s", t->name);
}

/* Linears that the recipe's own scheme does not cover, and what happens to them instead. */
static int describe_exceptions(const struct cut *cut, struct text *out)
{
    const struct recipe_plan *plan = cut_plan(cut);
    static const struct human_column columns[] = {
        {"linear", false}, {"count", true}, {"instead", false}, {"why", false}};
    struct human_table table = {.columns = columns, .n_columns = 4};
    for (size_t i = 0, n; i < plan->n; i += n) {
        const struct linear_plan *l = &plan->linears[i];
        struct text scheme = {0};
        n = line_linears(plan, i);
        if (!l->why)
            continue;
        if (l->quantized)
            describe_scheme(l->scheme, &scheme);
        put_line_name(&table, l->tensor);
        human_table_cell(&table, "%zu", n);
        human_table_cell(&table, "%s", l->quantized && scheme.data ? scheme.data : "16 bits");
        human_table_cell(&table, "%s", l->why);
        text_free(&scheme);
    }
    int rc = 0;
    if (table.n_cells) {
        text_add(out, "\n");
        rc = human_table_render(&table, out);
    }
    human_table_free(&table);
    return rc;
}

static int describe_plan(const struct cut *cut, const struct recipe *recipe, struct text *out)
{
    const struct cut_totals t = cut_totals(cut);
    double seconds;
    int rc = cut_estimate(cut, &seconds);
    if (rc < 0)
        return rc;
    text_printf(out, "plan     %s, ", recipe->method);
    describe_scheme(recipe->scheme, out);
    text_printf(out, ", scales %s; nothing is written\n", recipe_scales_name(recipe->scales.rule));
    text_printf(out, "source   %s in %zu tensors, %.1f million parameters: %s\n",
                human_bytes(t.source_bytes).s, t.n_tensors, (double)t.n_parameters / 1e6,
                cut_source(cut)->folder);
    text_printf(out, "output   %s, %.0f %% of it\n", human_bytes(t.output_bytes).s,
                t.source_bytes ? 100 * (double)t.output_bytes / (double)t.source_bytes : 0);
    text_printf(out, "linears  %zu quantized (%.1f million weights), %zu stay in 16 bits\n", t.n_linears,
                (double)t.n_quantized / 1e6, t.n_kept);
    text_printf(out, "memory   about %s with %d thread%s\n", human_bytes(t.memory_bytes).s, t.n_workers,
                t.n_workers == 1 ? "" : "s");
    if (cut_data(cut)) {
        text_printf(out, "         %s of the device for calibration",
                    human_bytes(t.calibration.device_bytes).s);
        if (t.calibration.host_bytes)
            text_printf(out, ", %s of the host", human_bytes(t.calibration.host_bytes).s);
        text_printf(out, "\ntext     %s, %lld samples of %lld tokens\n", recipe->calib.text,
                    (long long)cut_data(cut)->samples, (long long)cut_data(cut)->length);
    }
    text_printf(out, "time     about %s, if storage keeps up with 2 GB/s\n", human_seconds(seconds).s);
    return describe_exceptions(cut, out);
}

static int plan_json(const struct cut *cut, const struct recipe *recipe, struct text *out)
{
    const struct cut_totals t = cut_totals(cut);
    double seconds;
    const int rc = cut_estimate(cut, &seconds);
    if (rc < 0)
        return rc;
    json_kv_bool(out, "dry_run", true);
    json_put_key(out, "recipe");
    recipe_write(recipe, out);
    json_kv_uint(out, "source_bytes", t.source_bytes);
    json_kv_uint(out, "output_bytes", t.output_bytes);
    json_kv_uint(out, "memory_bytes", t.memory_bytes);
    if (cut_data(cut)) {
        json_kv_uint(out, "calibration_device_bytes", t.calibration.device_bytes);
        json_kv_uint(out, "calibration_host_bytes", t.calibration.host_bytes);
    }
    json_kv_uint(out, "quantized_linears", t.n_linears);
    json_kv_uint(out, "kept_linears", t.n_kept);
    json_kv_int(out, "quantized_parameters", t.n_quantized);
    json_kv_double(out, "estimated_seconds", seconds);
    return 0;
}

/* --- progress ------------------------------------------------------------------------------------------------- */

/* A block that has been tuned. */
struct tuned_block {
    double seconds, *losses; /* [recipe.tune.iterations]; NULL: an earlier run has tuned it */
};

/* One projection of a layer's experts: errors of those that are done. */
struct expert_errors {
    int n, worst_expert;
    double sum, nearest, worst;
};

/* Which kind of progress there is, and what it has left. */
struct watch {
    enum cut_stage stage;
    const struct recipe *recipe;
    struct tuned_block *blocks; /* [n_blocks] */
    int n_blocks;
    struct expert_errors *experts; /* [n_blocks, N_PROJECTIONS] */
    int n_experts;
};
enum { N_PROJECTIONS = 3 }; /* gate, up, down */

static void on_stage(void *ctx, enum cut_stage stage, uint64_t total)
{
    struct watch *w = ctx;
    static const char *const labels[] = {
        [CUT_QUANTIZE] = "cutting", [CUT_CALIBRATE] = "cutting", [CUT_CHECK] = "reading back"};
    w->stage = stage;
    progress_begin(stage == CUT_QUANTIZE && w->recipe->calibrated ? "copying" : labels[stage],
                   stage == CUT_CALIBRATE ? PROGRESS_ITEMS : PROGRESS_BYTES, total);
}

static void on_bytes(void *ctx, uint64_t bytes)
{
    (void)ctx;
    progress_advance(bytes, NULL);
}

static void print_experts(const struct watch *w, int layer, int projection)
{
    static const char *const names[N_PROJECTIONS] = {"gate_proj", "up_proj", "down_proj"};
    const struct expert_errors *e = &w->experts[layer * N_PROJECTIONS + projection];
    const bool calibrated = w->recipe->calibrated && !w->recipe->tune.iterations;
    char nearest[64] = "";
    if (calibrated)
        snprintf(nearest, sizeof nearest, ", nearest codes %.4f", e->nearest / e->n);
    output_detail("layer %d, %s of %d experts: %serror %.4f, worst %.4f (expert %d)%s", layer,
                  names[projection], e->n, calibrated ? "output " : "", e->sum / e->n, e->worst,
                  e->worst_expert, nearest);
}

/* Experts come in any order, and a line for each would be thousands: one when the last of a layer's is there. */
static void count_expert(const struct watch *w, const struct gemma_tensor *t, double error, double nearest)
{
    const int projection = t->role == GEMMA_GATE ? 0 : t->role == GEMMA_UP ? 1 : 2;
    struct expert_errors *e = &w->experts[t->layer * N_PROJECTIONS + projection];
    if (!e->n || error > e->worst) {
        e->worst = error;
        e->worst_expert = t->expert;
    }
    e->sum += error;
    e->nearest += nearest;
    if (++e->n == w->n_experts)
        print_experts(w, t->layer, projection);
}

static void on_linear(void *ctx, const struct cut_linear *l)
{
    const struct watch *w = ctx;
    const bool outputs = w->recipe->calibrated && !w->recipe->tune.iterations;
    const double error = outputs ? sqrt(fmax(l->stats.error, 0)) : l->error,
                 nearest = sqrt(fmax(l->stats.nearest_error, 0));
    char text[256];
    if (outputs)
        snprintf(text, sizeof text, "%s output error %.4f, nearest codes %.4f", l->plan->tensor->name, error,
                 nearest);
    else
        snprintf(text, sizeof text, "%s error %.4f", l->plan->tensor->name, error);
    progress_advance(w->recipe->calibrated, text);
    if (l->plan->tensor->expert >= 0)
        count_expert(w, l->plan->tensor, error, nearest);
    else
        output_detail("%s", text);
}

/* The losses as a row of bars, each the mean of its share of them, from nothing to the largest. */
static void draw_losses(const double *losses, int64_t n, char *out)
{
    enum { WIDTH = 16, BAR_BYTES = 3 };
    static const char bars[] = "▁▂▃▄▅▆▇█";
    double means[WIDTH], most = 0;
    const int width = n < WIDTH ? (int)n : WIDTH;
    for (int i = 0; i < width; i++) {
        const int64_t from = i * n / width, to = (i + 1) * n / width;
        means[i] = 0;
        for (int64_t k = from; k < to; k++)
            means[i] += losses[k] / (double)(to - from);
        most = fmax(most, means[i]);
    }
    for (int i = 0; i < width; i++) {
        const int height = means[i] >= 0 && most > 0 ? (int)(7 * means[i] / most + 0.5) : 0;
        memcpy(out + i * BAR_BYTES, bars + height * BAR_BYTES, BAR_BYTES);
    }
    out[width * BAR_BYTES] = '\0';
}

static void on_block(void *ctx, const struct calibrated_block *b)
{
    struct watch *w = ctx;
    char text[256], bars[64] = "";
    if (progress_terminal())
        draw_losses(b->losses, b->n, bars);
    snprintf(text, sizeof text, "block %d: loss %.3e → %.3e (%+.1f %%) by iteration %lld of %lld, %.1f s %s",
             b->layer, b->stats.first, b->stats.last, 100 * (b->stats.last / b->stats.first - 1),
             (long long)b->stats.kept, (long long)b->n, b->seconds, bars);
    if (progress_terminal())
        progress_print_line(text);
    else
        progress_block(text);
    if (b->layer < w->n_blocks) {
        struct tuned_block *kept = &w->blocks[b->layer];
        kept->seconds = b->seconds;
        kept->losses = mem_alloc((size_t)b->n, sizeof *kept->losses, "losses");
        if (kept->losses)
            memcpy(kept->losses, b->losses, (size_t)b->n * sizeof *kept->losses);
    }
}

/* --- the result ----------------------------------------------------------------------------------------------- */

struct summary {
    size_t n;
    double mean, worst;
    const char *worst_name;
    int64_t n_nonfinite;
    double output, nearest; /* means of relative output errors, when calibrated */
    double damping;         /* the most that any linear took */
    double first, last;     /* means of the blocks' losses, when tuned */
};

static struct summary summarize(const struct cut *cut)
{
    struct summary s = {.worst = -1};
    const struct cut_linear *l = cut_linears(cut, &s.n);
    for (size_t i = 0; i < s.n; i++) {
        s.mean += l[i].error / (double)s.n;
        s.n_nonfinite += l[i].n_nonfinite;
        s.output += sqrt(fmax(l[i].stats.error, 0)) / (double)s.n;
        s.nearest += sqrt(fmax(l[i].stats.nearest_error, 0)) / (double)s.n;
        s.damping = fmax(s.damping, l[i].stats.damping);
        if (l[i].error > s.worst) {
            s.worst = l[i].error;
            s.worst_name = l[i].plan->tensor->name;
        }
    }
    int n_blocks = 0;
    for (int layer = 0; layer < (int)cut_source(cut)->gemma.n_layers; layer++) {
        const struct cut_linear *block = cut_block(cut, layer);
        n_blocks += block != NULL;
        s.first += block ? block->tuned.first : 0;
        s.last += block ? block->tuned.last : 0;
    }
    s.first /= n_blocks;
    s.last /= n_blocks;
    return s;
}

static void describe_result(const struct cut *cut, const struct quantize_job *a, double seconds,
                            struct text *out)
{
    const struct recipe *recipe = a->recipe;
    const struct cut_totals t = cut_totals(cut);
    const struct summary s = summarize(cut);
    text_printf(out, "cut      %s\n", a->out);
    text_printf(out, "size     %s → %s\n", human_bytes(t.source_bytes).s, human_bytes(t.output_bytes).s);
    text_printf(out, "linears  %zu by %s, ", s.n, recipe->method);
    describe_scheme(recipe->scheme, out);
    text_printf(out, "; %zu stay in 16 bits\n", t.n_kept);
    text_printf(out, "error    mean %.4f of the weights, worst %.4f (%s)\n", s.mean, s.worst, s.worst_name);
    if (recipe->tune.iterations)
        text_printf(out, "         mean squared %.3e of the blocks' outputs, %.3e before %lld iterations\n",
                    s.last, s.first, (long long)recipe->tune.iterations);
    else if (recipe->calibrated)
        text_printf(out, "         mean %.4f of the outputs over the calibration, %.4f with nearest codes\n",
                    s.output, s.nearest);
    if (recipe->calibrated) {
        text_printf(out, "text     %s, %lld samples of %lld tokens\n", recipe->calib.text,
                    (long long)cut_data(cut)->samples, (long long)cut_data(cut)->length);
    }
    if (s.damping > recipe->damping)
        text_printf(out, "         damping had to be raised to %g\n", s.damping);
    if (s.n_nonfinite)
        text_printf(out, "         %lld NaN or infinite weights were taken as 0\n", (long long)s.n_nonfinite);
    if (cut_recalled(cut))
        text_printf(out, "resumed  %zu linears had been finished before\n", cut_recalled(cut));
    text_printf(out, "time     %s, %s\n", human_seconds(seconds).s,
                a->no_verify ? "not read back" : "read back and compared");
}

/* Seconds by kind of work, where they were counted. */
static void put_times(const double *seconds, struct text *out)
{
    double sum = 0;
    for (int i = 0; i < N_WORK; i++)
        sum += seconds[i];
    if (!(sum > 0))
        return;
    json_put_key(out, "calibration_seconds");
    json_begin_object(out);
    for (int i = 0; i < N_WORK; i++)
        json_kv_double(out, work_names[i], seconds[i]);
    json_end_object(out);
}

/* The blocks of a tuning; losses and seconds of those that this run has tuned. */
static void put_blocks(const struct cut *cut, const struct watch *w, struct text *out)
{
    const int64_t n = w->recipe->tune.iterations;
    if (!n)
        return;
    json_kv_int(out, "micro_batch", cut_totals(cut).calibration.micro_batch);
    json_put_key(out, "blocks");
    json_begin_array(out);
    for (int layer = 0; layer < w->n_blocks; layer++) {
        const struct cut_linear *l = cut_block(cut, layer);
        const struct tuned_block *block = &w->blocks[layer];
        if (!l)
            continue;
        json_begin_object(out);
        json_kv_int(out, "block", layer);
        json_kv_double(out, "loss_first", l->tuned.first);
        json_kv_double(out, "loss_last", l->tuned.last);
        json_kv_int(out, "iteration", l->tuned.kept);
        if (block->losses) {
            json_kv_double(out, "seconds", block->seconds);
            json_put_key(out, "losses");
            json_begin_array(out);
            for (int64_t k = 0; k < n; k++)
                json_put_double(out, block->losses[k]);
            json_end_array(out);
        }
        json_end_object(out);
    }
    json_end_array(out);
}

/* How many of the quantized experts the text sent fewer tokens than each should have, for its Hessians. */
static void put_experts(const struct cut *cut, const struct recipe *r, struct text *out)
{
    size_t n;
    const struct cut_linear *l = cut_linears(cut, &n);
    int64_t n_experts = 0, starved = 0;
    if (!r->calibrated || (r->tune.iterations && r->tune.init == TUNE_FROM_NONE))
        return;
    const int64_t floor = capture_expert_floor(&cut_source(cut)->gemma, cut_data(cut));
    for (size_t i = 0; i < n; i++)
        if (l[i].plan->tensor->expert >= 0 && l[i].plan->tensor->role == GEMMA_DOWN) {
            n_experts++;
            starved += l[i].stats.n_tokens < floor;
        }
    if (!n_experts)
        return;
    json_put_key(out, "experts");
    json_begin_object(out);
    json_kv_int(out, "n", n_experts);
    json_kv_int(out, "token_floor", floor);
    json_kv_int(out, "starved", starved);
    json_end_object(out);
}

static void result_json(const struct cut *cut, const struct quantize_job *a, const struct watch *w,
                        double seconds, struct text *out)
{
    const struct recipe *recipe = w->recipe;
    const struct cut_totals t = cut_totals(cut);
    size_t n;
    const struct cut_linear *l = cut_linears(cut, &n);
    json_kv_string(out, "out", a->out);
    json_kv_uint(out, "source_bytes", t.source_bytes);
    json_kv_uint(out, "output_bytes", t.output_bytes);
    json_kv_double(out, "seconds", seconds);
    json_kv_int(out, "threads", t.n_workers);
    json_kv_bool(out, "read_back", !a->no_verify);
    json_put_key(out, "linears");
    json_begin_array(out);
    for (size_t i = 0; i < n; i++) {
        json_begin_object(out);
        json_kv_string(out, "name", l[i].plan->tensor->name);
        json_kv_string(out, "scheme", recipe_scheme_name(l[i].plan->scheme));
        json_kv_int(out, "group_size",
                    l[i].plan->scheme.group ? l[i].plan->scheme.group : l[i].plan->tensor->shape[1]);
        json_kv_double(out, "weight_error", l[i].error);
        cut_write_stats(recipe, &l[i], out);
        json_end_object(out);
    }
    json_end_array(out);
    put_experts(cut, recipe, out);
    put_blocks(cut, w, out);
    if (cut_data(cut))
        put_times(cut_seconds(cut), out);
}

static int write_report(const struct cut *cut, const struct quantize_job *a, const struct watch *w,
                        double seconds)
{
    struct text t = {0};
    output_json_begin(&t, a->device, NULL);
    result_json(cut, a, w, seconds, &t);
    json_end_object(&t);
    text_add(&t, "\n");
    int rc = text_finish(&t);
    if (!rc)
        rc = file_write_atomic(a->report, t.data, t.len);
    text_free(&t);
    return rc;
}

/* --- running ---------------------------------------------------------------------------------------------------- */

static int dry_run(const struct cut *cut, const struct quantize_job *a)
{
    struct text out = {0};
    int rc;
    if (output_json()) {
        output_json_begin(&out, a->device, NULL);
        rc = plan_json(cut, a->recipe, &out);
        if (!rc)
            rc = output_json_end(&out);
    } else {
        rc = describe_plan(cut, a->recipe, &out);
        if (!rc)
            rc = output_print(&out);
    }
    text_free(&out);
    return rc;
}

static int report(const struct cut *cut, const struct quantize_job *a, const struct watch *w, double seconds)
{
    struct text out = {0};
    const int rc = a->report ? write_report(cut, a, w, seconds) : 0;
    if (rc < 0)
        return rc;
    if (output_json()) {
        output_json_begin(&out, a->device, NULL);
        result_json(cut, a, w, seconds, &out);
        return output_json_end(&out);
    }
    describe_result(cut, a, seconds, &out);
    return output_print(&out);
}

static int run(struct cut *cut, const struct quantize_job *a)
{
    const struct gemma_config *g = &cut_source(cut)->gemma;
    struct watch watch = {.recipe = a->recipe, .n_blocks = (int)g->n_layers, .n_experts = (int)g->n_experts};
    const struct cut_events events = {on_stage, on_bytes, on_linear, on_block, &watch};
    watch.blocks = mem_alloc((size_t)watch.n_blocks, sizeof *watch.blocks, "blocks");
    watch.experts = mem_alloc((size_t)watch.n_blocks * N_PROJECTIONS, sizeof *watch.experts, "blocks");
    const double start = clock_seconds();
    int rc = watch.blocks && watch.experts ? cut_run(cut, &events) : ERR_MEMORY;
    const double seconds = clock_seconds() - start;
    progress_end();
    if (!rc)
        rc = report(cut, a, &watch, seconds);
    for (int i = 0; watch.blocks && i < watch.n_blocks; i++)
        free(watch.blocks[i].losses);
    free(watch.blocks);
    free(watch.experts);
    return rc;
}

int quantize_run(struct cut *cut, const struct quantize_job *job)
{
    return job->dry_run ? dry_run(cut, job) : run(cut, job);
}

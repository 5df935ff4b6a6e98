/* gemcut bench quantize with a method that calibrates: the whole job, and each kind of work in it beside what the device
 * does when it does nothing else. */
#include "cli/bench_work.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "cli/human.h"
#include "cli/output.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- what is calibrated with -------------------------------------------------------------------------------------- */

enum { BOS = 2, USUAL_LENGTH = 2048 };

int bench_settle_length(const struct bench_shape *shape, int64_t *length)
{
    struct gemma_config g;
    const int rc = bench_shape_config(shape, &g);
    if (rc < 0)
        return rc;
    const int64_t most = g.max_positions;
    gemma_config_free(&g);
    if (*length == 0)
        *length = most < USUAL_LENGTH ? most : USUAL_LENGTH;
    if (*length > most)
        return err_set(ERR_USAGE, "--length %lld: the context of %s is %lld tokens", (long long)*length,
                       shape->name, (long long)most);
    return 0;
}

int bench_ids(const struct bench *q, struct dataset *out)
{
    struct gemma_config g;
    *out = (struct dataset){.samples = q->recipe.calib.samples, .length = q->recipe.calib.length};
    const size_t n = (size_t)(out->samples * out->length);
    int rc = bench_shape_config(q->shape, &g);
    if (rc < 0)
        return rc;
    if (!(out->ids = mem_alloc(n, sizeof *out->ids, "token ids")))
        rc = ERR_MEMORY;
    const uint64_t start = bench_mix((uint64_t)q->seed + 1);
    for (size_t i = 0; !rc && i < n; i++)
        out->ids[i] =
            i % (size_t)out->length ? (int32_t)(bench_mix(start + i) % (uint64_t)g.vocab_size) : BOS;
    gemma_config_free(&g);
    return rc;
}

/* --- a round ------------------------------------------------------------------------------------------------------ */

/* Tensors that stay as they are are copied beside the calibration. */
enum phase { PHASE_OPEN, PHASE_CALIBRATE, PHASE_CHECK, PHASE_FLUSH, N_PHASES };

static const char *const phase_names[] = {"open", "calibrate and copy", "check", "flush"};
static const char *const phase_keys[] = {"open", "calibrate", "check", "flush"};

struct round {
    double seconds, phases[N_PHASES], works[N_WORK];
};

struct result {
    const struct bench *q;
    const struct bench_place *place;
    struct dataset data;
    struct cut_totals totals;
    double amounts[N_WORK];
    struct bench_bounds bounds;
    struct round *rounds, median;
    size_t n, n_done;
    double min;
};

static void on_end(void *ctx, const struct cut *cut)
{
    struct result *r = ctx;
    r->totals = cut_totals(cut);
    const struct bench_pass pass = {r->data.samples, r->data.length, r->totals.calibration.capture.keep_inner,
                                    r->totals.calibration.capture.n_ids};
    bench_work_count(r->amounts, cut_source(cut), cut_plan(cut), &r->q->recipe, &pass);
    memcpy(r->rounds[r->n_done].works, cut_seconds(cut), sizeof r->rounds->works);
}

static int run_round(struct result *r)
{
    struct round *round = &r->rounds[r->n_done];
    struct bench_job j = {.data = &r->data, .count_time = true, .on_end = on_end, .ctx = r};
    int rc = bench_run_job(r->q, r->place, &j);
    if (!rc)
        rc = file_remove_folder(r->place->out);
    const double checked = j.stages[CUT_CHECK] > 0 ? j.stages[CUT_CHECK] : j.last;
    const double phases[N_PHASES] = {j.stages[CUT_QUANTIZE] - j.start, checked - j.stages[CUT_QUANTIZE],
                                     j.last - checked, j.end - j.last};
    round->seconds = j.end - j.start;
    memcpy(round->phases, phases, sizeof phases);
    if (rc < 0)
        return rc;
    r->n_done++;
    output_detail("round %zu: %.3f s", r->n_done, round->seconds);
    return 0;
}

/* The bounds on a handle of their own, which holds no memory while the job runs. */
static int measure_bounds(struct result *r)
{
    const struct bench *q = r->q;
    struct backend b;
    struct parallel *pool = NULL;
    struct gemma_config g;
    int rc = backend_open(&b, q->machine.name, (int)q->machine.threads);
    if (rc < 0)
        return rc;
    rc = parallel_open(&pool, (int)q->machine.threads);
    if (!rc)
        rc = bench_shape_config(q->shape, &g);
    if (!rc) {
        output_detail("measuring what the device can do");
        rc = bench_bounds_measure(&b, pool, &g, &r->bounds);
        gemma_config_free(&g);
    }
    parallel_close(pool);
    backend_close(&b);
    return rc;
}

/* Medians over the rounds of struct round, which is nothing but doubles. */
static int summarize(struct result *r)
{
    enum { N = sizeof(struct round) / sizeof(double) };
    double *scratch = mem_alloc(r->n, sizeof *scratch, "times");
    if (!scratch)
        return ERR_MEMORY;
    for (size_t i = N; i-- > 0;) { /* the first member last: what is left in scratch is sorted */
        for (size_t k = 0; k < r->n; k++)
            memcpy(&scratch[k], (const char *)&r->rounds[k] + i * sizeof(double), sizeof(double));
        const double median = bench_median(scratch, r->n);
        memcpy((char *)&r->median + i * sizeof(double), &median, sizeof median);
    }
    r->min = scratch[0];
    free(scratch);
    return 0;
}

/* --- the result --------------------------------------------------------------------------------------------------- */

static const char *const unit_names[] = {[UNIT_BYTES] = "B", [UNIT_FLOP] = "FLOP", [UNIT_TRIALS] = "trials"};
static const char *const unit_keys[] = {
    [UNIT_BYTES] = "bytes", [UNIT_FLOP] = "flop", [UNIT_TRIALS] = "trials"};

/* "12.3 TFLOP", "4.5 GB" */
static struct human amount(double v, enum bench_unit unit, const char *suffix)
{
    static const struct {
        double size;
        const char *prefix;
    } scales[] = {{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1, ""}};
    struct human h;
    size_t i = unit == UNIT_BYTES ? 1 : 0; /* a TB is 1000 GB here: they are compared */
    while (v < scales[i].size && i + 1 < sizeof scales / sizeof *scales)
        i++;
    snprintf(h.s, sizeof h.s, "%.*f %s%s%s", v / scales[i].size < 10 ? 2 : 1, v / scales[i].size,
             scales[i].prefix, unit_names[unit], suffix);
    return h;
}

/* Rates need some time to be measured in. */
static const double LEAST_SECONDS = 1e-5;

static double rate(const struct result *r, int kind)
{
    const double seconds = r->median.works[kind];
    return seconds > LEAST_SECONDS ? r->amounts[kind] / seconds : 0;
}

static void put_row(const struct result *r, int kind, struct human_table *table)
{
    const enum bench_unit unit = bench_work_units[kind];
    const double speed = rate(r, kind), bound = r->bounds.rates[kind];
    human_table_cell(table, "%s", work_names[kind]);
    human_table_cell(table, "%.3f", r->median.works[kind]);
    human_table_cell(table, "%s", r->amounts[kind] > 0 ? amount(r->amounts[kind], unit, "").s : "-");
    human_table_cell(table, "%s", speed > 0 ? amount(speed, unit, "/s").s : "-");
    human_table_cell(table, "%s", bound > 0 ? amount(bound, unit, "/s").s : "-");
    if (speed > 0 && bound > 0)
        human_table_cell(table, "%.0f %%", 100 * speed / bound);
    else
        human_table_cell(table, "-");
}

/* All kinds together; FLOP are added up. */
static void put_sum(const struct result *r, struct human_table *table)
{
    double seconds = 0, flop = 0;
    for (int i = 0; i < N_WORK; i++) {
        seconds += r->median.works[i];
        flop += bench_work_units[i] == UNIT_FLOP ? r->amounts[i] : 0;
    }
    human_table_cell(table, "all");
    human_table_cell(table, "%.3f", seconds);
    human_table_cell(table, "%s", amount(flop, UNIT_FLOP, "").s);
    human_table_cell(table, "%s", seconds > 0 ? amount(flop / seconds, UNIT_FLOP, "/s").s : "-");
    human_table_cell(table, "-");
    human_table_cell(table, "-");
}

/* Samples of an iteration. */
static int64_t batch_of(const struct result *r)
{
    const int64_t batch = r->q->recipe.tune.batch;
    return batch < r->data.samples ? batch : r->data.samples;
}

static void put_head(const struct result *r, struct text *out)
{
    const struct bench *q = r->q;
    const struct cut_totals *t = &r->totals;
    const struct calibrate_plan *plan = &t->calibration;
    bench_text_begin(out, q);
    bench_place_text(r->place, out);
    text_add(out, "recipe       ");
    bench_recipe_text(q, out);
    text_add(out, q->no_verify ? ", not read back\n" : ", read back\n");
    text_printf(out, "calibration  %lld samples of %lld random tokens, %lld at a time\n",
                (long long)r->data.samples, (long long)r->data.length, (long long)plan->capture.batch);
    if (plan->micro_batch)
        text_printf(
            out, "tuning       %lld iteration%s on each block, %lld samples each, %lld at a time, from %s\n",
            (long long)q->recipe.tune.iterations, q->recipe.tune.iterations == 1 ? "" : "s",
            (long long)batch_of(r), (long long)plan->micro_batch,
            q->recipe.tune.init == TUNE_FROM_CODES ? "codes" : "the range");
    text_printf(out, "memory       %s of the device, %s of the host, as planned%s%s\n",
                human_bytes(plan->device_bytes).s, human_bytes(plan->host_bytes).s,
                plan->capture.states_on_host ? "; states on the host" : "",
                plan->capture.keep_inner || plan->micro_batch ? "" : "; gate and up run twice");
    text_printf(out, "bytes        %s in, %s out, %d threads\n", human_bytes(t->source_bytes).s,
                human_bytes(t->output_bytes).s, t->n_workers);
    text_printf(out, "time         %.3f s median of %zu, %.3f s at best\n", r->median.seconds, r->n, r->min);
    text_add(out, "of which    ");
    for (size_t i = 0; i < N_PHASES; i++)
        text_printf(out, "%s %s %.3f s", i ? "," : "", phase_names[i], r->median.phases[i]);
    text_add(out, "\n\n");
}

static int print_text(const struct result *r)
{
    static const struct human_column columns[] = {{"kind of work", false}, {"seconds", true},
                                                  {"work", true},          {"rate", true},
                                                  {"bound", true},         {"share", true}};
    struct human_table table = {.columns = columns, .n_columns = 6};
    struct text out = {0};
    put_head(r, &out);
    for (int i = 0; i < N_WORK; i++)
        put_row(r, i, &table);
    put_sum(r, &table);
    const int rc = human_table_render(&table, &out);
    human_table_free(&table);
    text_add(
        &out,
        "\nbound: gemm for forward and tune, hessian_add, factorize in FP64, matmul for measure, sweep, refit, "
        "descend and\nexperts (of their operands' types), copies to and from pinned memory for load and deliver; each by "
        "itself before and after\nall rounds, the better rate. Medians. The device is waited for after "
        "each kind of work.\n");
    if (rc < 0) {
        text_free(&out);
        return rc;
    }
    return output_print(&out);
}

static void put_works(const struct result *r, struct text *out)
{
    json_put_key(out, "work");
    json_begin_object(out);
    for (int i = 0; i < N_WORK; i++) {
        const double speed = rate(r, i), bound = r->bounds.rates[i];
        json_put_key(out, work_names[i]);
        json_begin_object(out);
        json_kv_double(out, "seconds_median", r->median.works[i]);
        json_kv_double(out, unit_keys[bench_work_units[i]], r->amounts[i]);
        if (speed > 0)
            json_kv_double(out, "per_s", speed);
        if (bound > 0)
            json_kv_double(out, "bound_per_s", bound);
        if (speed > 0 && bound > 0)
            json_kv_double(out, "share_of_bound", speed / bound);
        json_end_object(out);
    }
    json_end_object(out);
}

static void put_calibration(const struct result *r, struct text *out)
{
    const struct calibrate_plan *plan = &r->totals.calibration;
    json_put_key(out, "calibration");
    json_begin_object(out);
    json_kv_int(out, "samples", r->data.samples);
    json_kv_int(out, "length", r->data.length);
    json_kv_int(out, "batch", plan->capture.batch);
    json_kv_bool(out, "states_on_host", plan->capture.states_on_host);
    json_kv_bool(out, "keep_inner", plan->capture.keep_inner);
    if (plan->micro_batch) {
        json_kv_int(out, "iterations", r->q->recipe.tune.iterations);
        json_kv_int(out, "iteration_samples", batch_of(r));
        json_kv_int(out, "micro_batch", plan->micro_batch);
    }
    json_kv_uint(out, "device_bytes", plan->device_bytes);
    json_kv_uint(out, "host_bytes", plan->host_bytes);
    json_end_object(out);
}

static int print_json(const struct result *r)
{
    const struct bench *q = r->q;
    struct text out = {0};
    bench_json_begin(&out, q);
    bench_place_json(r->place, &out);
    json_put_key(&out, "recipe");
    recipe_write(&q->recipe, &out);
    put_calibration(r, &out);
    json_kv_bool(&out, "read_back", !q->no_verify);
    json_kv_int(&out, "threads", r->totals.n_workers);
    json_kv_uint(&out, "source_bytes", r->totals.source_bytes);
    json_kv_uint(&out, "output_bytes", r->totals.output_bytes);
    json_kv_double(&out, "seconds_median", r->median.seconds);
    json_kv_double(&out, "seconds_min", r->min);
    json_put_key(&out, "phases");
    json_begin_object(&out);
    for (size_t i = 0; i < N_PHASES; i++)
        json_kv_double(&out, phase_keys[i], r->median.phases[i]);
    json_end_object(&out);
    put_works(r, &out);
    json_put_key(&out, "seconds");
    json_begin_array(&out);
    for (size_t i = 0; i < r->n; i++)
        json_put_double(&out, r->rounds[i].seconds);
    json_end_array(&out);
    return output_json_end(&out);
}

int bench_calibrate(const struct bench *q, const struct bench_place *place)
{
    struct result r = {.q = q, .place = place, .n = q->rounds ? (size_t)q->rounds : 3};
    int rc = bench_ids(q, &r.data);
    if (!rc && !(r.rounds = mem_alloc(r.n, sizeof *r.rounds, "times")))
        rc = ERR_MEMORY;
    if (!rc)
        rc = measure_bounds(&r);
    while (!rc && r.n_done < r.n)
        rc = run_round(&r);
    if (!rc)
        rc = measure_bounds(&r);
    if (!rc)
        rc = summarize(&r);
    if (!rc)
        rc = output_json() ? print_json(&r) : print_text(&r);
    free(r.rounds);
    dataset_free(&r.data);
    return rc;
}

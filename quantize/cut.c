#include "quantize/cut.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/text.h"
#include "formats/record.h"
#include "kernels/budget.h"
#include "quantize/beside.h"
#include "quantize/staging.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* What is not quantized is passed on by a thread of its own while a calibrated run begins. */
struct copying {
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
    int rc;
    char *message; /* of its failure */
};

struct cut {
    struct cut_options options;
    struct backend backend;
    struct staging place;
    struct model source;
    struct checkpoint live; /* a view of the source's: what is passed on or quantized */
    struct recipe_plan plan;
    struct writer *writer;
    struct pipeline *pipeline;
    struct parallel *pool;
    struct calibrate_plan calibration;
    struct dataset own;         /* read for recipe.calib */
    const struct dataset *data; /* NULL, unless calibrated */
    int32_t bos;
    double seconds[N_WORK];
    struct pipeline_events events;
    const struct cut_events *told; /* while a calibrated run is under way */
    struct copying copying;
    struct journal *journal; /* while a calibrated run is under way */
    size_t n_recalled;       /* linears that an earlier run had finished */
};

/* --- opening -------------------------------------------------------------------------------------------------- */

/* Beside a calibrated run few threads do for what is passed on, and more would get in its way. */
enum { COPY_WORKERS = 8 };

/* As many workers as are asked for; fewer where they would not fit --memory, and one where calibration wants that. */
static int open_pool(struct cut *c)
{
    const bool calibrated = c->options.recipe.calibrated;
    int rc = parallel_open(&c->pool, c->options.n_workers);
    if (rc < 0)
        return rc;
    const uint64_t each = pipeline_worker_bytes(c->pipeline), limit = budget_limit();
    uint64_t n = (uint64_t)parallel_workers(c->pool);
    if (calibrated)
        n = limit ? 1 : n < COPY_WORKERS ? n : COPY_WORKERS;
    else if (limit && limit / each < n)
        n = limit / each;
    if (n == (uint64_t)parallel_workers(c->pool))
        return 0;
    parallel_close(c->pool);
    c->pool = NULL;
    char needed[32], allowed[32];
    return n ? parallel_open(&c->pool, (int)n)
             : err_set(ERR_MEMORY,
                       "%s: %s are needed to quantize rows of the largest tensor, the memory budget is %s",
                       c->backend.name, text_bytes(each, needed), text_bytes(limit, allowed));
}

/* What the thread that passes tensors on takes from the backend. */
static uint64_t copying_bytes(const struct cut *c)
{
    return (uint64_t)parallel_workers(c->pool) * pipeline_worker_bytes(c->pipeline);
}

/* What a calibrated method looks at, and what it will need. */
static int open_calibration(struct cut *c)
{
    const struct recipe *r = &c->options.recipe;
    int rc = 0;
    if (!r->calibrated)
        return 0;
    c->data = c->options.data ? c->options.data : &c->own;
    c->bos = -1;
    if (!c->options.data)
        rc = calib_data_make(&c->own, &c->source, &c->backend, &r->calib, &c->bos);
    return rc ? rc
              : calibrate_plan(&c->calibration, &c->source, &c->plan, &c->backend, c->data, &r->tune,
                               copying_bytes(c));
}

/* What is passed on or quantized: experts that stay in 16 bits lie together as they did. */
static int list_tensors(struct cut *c)
{
    bool *apart = mem_alloc((size_t)c->source.gemma.n_layers, sizeof *apart, "a list of layers");
    if (!apart)
        return ERR_MEMORY;
    for (size_t i = 0; i < c->plan.n; i++)
        if (c->plan.linears[i].tensor->expert >= 0)
            apart[c->plan.linears[i].tensor->layer] = c->plan.linears[i].quantized;
    const int rc = model_live_tensors(&c->source, apart, &c->live);
    free(apart);
    return rc;
}

int cut_open(struct cut **out, const struct cut_options *options)
{
    *out = NULL;
    struct cut *c = mem_alloc(1, sizeof *c, "a cut");
    if (!c)
        return ERR_MEMORY;
    c->options = *options;
    int rc = staging_init(&c->place, options->out);
    if (!rc)
        rc = backend_open(&c->backend, options->device, options->recipe.calibrated ? options->n_workers : 1);
    if (!rc)
        rc = model_open_unquantized(&c->source, options->model);
    if (!rc)
        rc = model_bind(&c->source, NULL, NULL);
    if (!rc)
        rc = recipe_resolve(&c->plan, &c->options.recipe, &c->source.tensors);
    if (!rc)
        rc = list_tensors(c);
    if (!rc)
        rc = writer_open(&c->writer, c->place.partial, options->shard_bytes);
    if (!rc)
        rc = pipeline_open(&c->pipeline, &c->live, &c->source.tensors, &c->plan, &c->options.recipe,
                           c->writer, &c->backend);
    if (!rc)
        rc = open_pool(c);
    if (!rc)
        rc = open_calibration(c);
    if (rc < 0)
        cut_close(c);
    else
        *out = c;
    return rc;
}

void cut_close(struct cut *c)
{
    if (!c)
        return;
    journal_close(c->journal);
    dataset_free(&c->own);
    pipeline_close(c->pipeline);
    writer_close(c->writer);
    parallel_close(c->pool);
    recipe_plan_free(&c->plan);
    free(c->live.tensors);
    model_close(&c->source);
    staging_free(&c->place);
    backend_close(&c->backend);
    free(c);
}

struct cut_totals cut_totals(const struct cut *c)
{
    struct cut_totals t = {.source_bytes = pipeline_source_bytes(c->pipeline),
                           .output_bytes = writer_bytes(c->writer),
                           .n_workers = parallel_workers(c->pool),
                           .n_tensors = c->live.n_tensors,
                           .calibration = c->calibration};
    t.memory_bytes = pipeline_memory_bytes(c->pipeline, t.n_workers);
    for (size_t i = 0; i < t.n_tensors; i++) {
        const struct tensor *source = &c->live.tensors[i];
        t.n_parameters += tensor_rows(source) * tensor_cols(source);
    }
    for (size_t i = 0; i < c->plan.n; i++) {
        const struct linear_plan *l = &c->plan.linears[i];
        t.n_linears += l->quantized;
        t.n_kept += !l->quantized;
        t.n_quantized += l->quantized ? l->tensor->shape[0] * l->tensor->shape[1] : 0;
    }
    return t;
}

const struct model *cut_source(const struct cut *c)
{
    return &c->source;
}

const struct recipe_plan *cut_plan(const struct cut *c)
{
    return &c->plan;
}

const struct cut_linear *cut_linears(const struct cut *c, size_t *n)
{
    return pipeline_linears(c->pipeline, n);
}

const double *cut_seconds(const struct cut *c)
{
    return c->seconds;
}

const struct dataset *cut_data(const struct cut *c)
{
    return c->data;
}

size_t cut_recalled(const struct cut *c)
{
    return c->n_recalled;
}

int cut_estimate(const struct cut *c, double *seconds)
{
    const double storage_rate = 2e9;
    const struct cut_totals t = cut_totals(c);
    double each = 0, calibration = 0;
    const int rc = c->data
                       ? calibrate_estimate(&c->source, &c->plan, &c->backend, c->data,
                                            &c->options.recipe.tune, c->options.recipe.passes, &calibration)
                       : pipeline_measure(&c->backend, &c->options.recipe, &each);
    if (!rc)
        *seconds = (double)t.n_quantized * each / t.n_workers + calibration +
                   (double)(t.source_bytes + t.output_bytes) / storage_rate;
    return rc;
}

/* --- running -------------------------------------------------------------------------------------------------- */

static int write_config(const struct cut *c)
{
    const struct recipe *recipe = &c->options.recipe;
    struct quant_config quant;
    int rc =
        recipe_quant_config(&quant, &c->plan, recipe->format, recipe_act_order(recipe), &c->source.gemma);
    if (rc < 0)
        return rc;
    rc = beside_write_config(&c->place, &c->source.config, &quant);
    quant_config_free(&quant);
    return rc;
}

void cut_write_stats(const struct recipe *r, const struct cut_linear *l, struct text *t)
{
    const struct gptq_stats *s = &l->stats;
    if (!r->calibrated)
        return;
    json_kv_double(t, "clipped", s->clipped);
    if (r->tune.iterations && r->tune.init == TUNE_FROM_NONE)
        return;
    json_kv_double(t, r->tune.iterations ? "start_output_error" : "output_error", sqrt(fmax(s->error, 0)));
    json_kv_double(t, "nearest_output_error", sqrt(fmax(s->nearest_error, 0)));
    json_kv_double(t, "damping", s->damping);
    json_kv_int(t, "dead_inputs", s->n_dead);
    if (l->plan->tensor->expert >= 0)
        json_kv_int(t, "tokens", s->n_tokens);
}

static struct hash128 hash_ids(const struct dataset *d)
{
    return hash_bytes(d->ids, (size_t)(d->samples * d->length) * sizeof *d->ids);
}

/* What was calibrated with: enough to make the same ids again, and their hash to see that they are. */
static void write_calibration(const struct cut *c, struct text *t)
{
    const struct calib_spec *spec = &c->options.recipe.calib;
    if (!c->data)
        return;
    json_put_key(t, "calibration");
    json_begin_object(t);
    if (spec->text)
        json_kv_string(t, "text", calib_data_name(spec));
    json_kv_int(t, "samples", c->data->samples);
    json_kv_int(t, "length", c->data->length);
    json_kv_uint(t, "seed", spec->seed);
    json_kv_string(t, "order", spec->shuffle ? "shuffle" : "file");
    json_kv_bool(t, "skip_bos", spec->skip_bos);
    beside_put_hash(t, "ids", hash_ids(c->data));
    json_end_object(t);
}

static void write_linears(const struct cut *c, struct text *t)
{
    size_t n;
    const struct cut_linear *linears = pipeline_linears(c->pipeline, &n);
    json_put_key(t, "linears");
    json_begin_object(t);
    for (size_t i = 0; i < n; i++) {
        const struct linear_plan *plan = linears[i].plan;
        char *module = gemma_module(plan->tensor);
        if (!module) {
            t->failed = true;
            return;
        }
        json_put_key(t, module);
        free(module);
        json_begin_object(t);
        json_kv_string(t, "scheme", recipe_scheme_name(plan->scheme));
        json_kv_int(t, "group_size", plan->scheme.group ? plan->scheme.group : plan->tensor->shape[1]);
        json_kv_double(t, "weight_error", linears[i].error);
        cut_write_stats(&c->options.recipe, &linears[i], t);
        if (linears[i].n_nonfinite)
            json_kv_int(t, "nonfinite_as_zero", linears[i].n_nonfinite);
        beside_put_hash(t, "source", linears[i].source_hash);
        json_end_object(t);
    }
    json_end_object(t);
}

const struct cut_linear *cut_block(const struct cut *c, int layer)
{
    size_t n;
    const struct cut_linear *l = pipeline_linears(c->pipeline, &n);
    for (size_t i = 0; i < n; i++)
        if (l[i].plan->tensor->layer == layer)
            return &l[i];
    return NULL;
}

static void write_tuning(const struct cut *c, struct text *t)
{
    if (!c->options.recipe.tune.iterations)
        return;
    json_put_key(t, "tuning");
    json_begin_object(t);
    json_kv_int(t, "micro_batch", c->calibration.micro_batch);
    json_put_key(t, "blocks");
    json_begin_array(t);
    for (int layer = 0; layer < (int)c->source.gemma.n_layers; layer++) {
        const struct cut_linear *l = cut_block(c, layer);
        if (!l)
            continue;
        json_begin_object(t);
        json_kv_int(t, "block", layer);
        json_kv_double(t, "loss_first", l->tuned.first);
        json_kv_double(t, "loss_last", l->tuned.last);
        json_kv_int(t, "iteration", l->tuned.kept);
        json_end_object(t);
    }
    json_end_array(t);
    json_end_object(t);
}

static int write_record(const struct cut *c)
{
    struct text t = {.indent = 1};
    size_t n;
    const struct written_tensor *tensors = pipeline_tensors(c->pipeline, &n);
    json_begin_object(&t);
    json_kv_string(&t, "schema", RECORD_SCHEMA);
    json_kv_string(&t, "version", c->options.version);
    json_kv_string(&t, "backend", c->backend.name);
    json_put_key(&t, "recipe");
    recipe_write(&c->options.recipe, &t);
    json_put_key(&t, "source");
    json_begin_object(&t);
    beside_put_hash(&t, "config", hash_bytes(c->source.config.text, c->source.config.text_len));
    json_kv_uint(&t, "tensor_bytes", pipeline_source_bytes(c->pipeline));
    json_end_object(&t);
    write_calibration(c, &t);
    write_tuning(c, &t);
    write_linears(c, &t);
    const int rc = beside_finish_record(&c->place, tensors, n, &t);
    text_free(&t);
    return rc;
}

static int check_written(const struct cut *c, const struct cut_events *events)
{
    size_t n;
    const struct written_tensor *tensors = pipeline_tensors(c->pipeline, &n);
    if (events->on_stage)
        events->on_stage(events->ctx, CUT_CHECK, writer_bytes(c->writer));
    return beside_check_weights(&c->place, tensors, n, c->pool, events->on_bytes, events->ctx);
}

static void *copy_rest(void *arg)
{
    struct cut *c = arg;
    const int rc = pipeline_run(c->pipeline, c->pool, &c->backend, &c->events);
    pthread_mutex_lock(&c->copying.lock);
    c->copying.rc = rc;
    c->copying.message = rc < 0 ? mem_strdup(err_message()) : NULL;
    c->copying.done = true;
    pthread_cond_broadcast(&c->copying.changed);
    pthread_mutex_unlock(&c->copying.lock);
    return NULL;
}

static int copying_start(struct cut *c)
{
    pthread_mutex_init(&c->copying.lock, NULL);
    pthread_cond_init(&c->copying.changed, NULL);
    if (pthread_create(&c->copying.thread, NULL, copy_rest, c))
        return err_set(ERR_MEMORY, "cannot start a thread to copy tensors");
    c->copying.started = true;
    return 0;
}

/* Until it is done; its error. */
static int copying_wait(struct cut *c)
{
    struct copying *k = &c->copying;
    pthread_mutex_lock(&k->lock);
    while (!k->done)
        pthread_cond_wait(&k->changed, &k->lock);
    const int rc = k->rc < 0 ? err_set((enum err)k->rc, "%s", k->message ? k->message : "out of memory") : 0;
    pthread_mutex_unlock(&k->lock);
    return rc;
}

static void copying_end(struct cut *c)
{
    if (!c->copying.started)
        return;
    pthread_join(c->copying.thread, NULL);
    pthread_mutex_destroy(&c->copying.lock);
    pthread_cond_destroy(&c->copying.changed);
    free(c->copying.message);
    c->copying = (struct copying){0};
}

/* A weight's hash is known when it has been read by the other thread. */
static int deliver(void *ctx, const struct calibrated_linear *l)
{
    struct cut *c = ctx;
    struct journal_entry entry;
    int rc = copying_wait(c);
    if (!rc)
        rc = pipeline_deliver(c->pipeline, l, &entry);
    return rc ? rc : journal_add(c->journal, l->plan->tensor->name, &entry);
}

/* Linears that are tuned together count together. */
static bool block_is_noted(const struct cut *c, int layer)
{
    bool noted = true;
    for (size_t i = 0; i < c->plan.n; i++) {
        const struct linear_plan *l = &c->plan.linears[i];
        if (l->quantized && l->tensor->layer == layer)
            noted = noted && journal_find(c->journal, l->tensor->name);
    }
    return noted;
}

static int recall(void *ctx, const struct linear_plan *plan, const struct qmat *q)
{
    struct cut *c = ctx;
    const struct journal_entry *entry = journal_find(c->journal, plan->tensor->name);
    if (c->options.recipe.tune.iterations && !block_is_noted(c, plan->tensor->layer))
        return 0;
    int rc = entry ? copying_wait(c) : 0;
    if (!rc && entry)
        rc = pipeline_recall(c->pipeline, plan, q, entry);
    c->n_recalled += rc > 0;
    return rc;
}

static void on_block(void *ctx, const struct calibrated_block *block)
{
    const struct cut *c = ctx;
    if (c->told->on_block)
        c->told->on_block(c->told->ctx, block);
}

/* The journal is of this run if the same things were asked for. */
static int open_journal(struct cut *c)
{
    struct text recipe = {0};
    recipe_write(&c->options.recipe, &recipe);
    text_printf(&recipe, " in files of %llu", (unsigned long long)c->options.shard_bytes);
    if (c->calibration.micro_batch)
        text_printf(&recipe, ", tuned with %lld samples at a time", (long long)c->calibration.micro_batch);
    char *path = file_join(c->place.partial, JOURNAL_NAME);
    int rc = path ? text_finish(&recipe) : ERR_MEMORY;
    const struct journal_key key = {.version = c->options.version,
                                    .backend = c->backend.name,
                                    .recipe = recipe.data,
                                    .source = hash_bytes(c->source.config.text, c->source.config.text_len),
                                    .ids = hash_ids(c->data)};
    if (!rc)
        rc = journal_open(&c->journal, path, &key, c->options.resume);
    free(path);
    text_free(&recipe);
    return rc;
}

static int calibrate(struct cut *c, const struct cut_events *events)
{
    const struct recipe *r = &c->options.recipe;
    const struct calibrate_options options = {.gptq = recipe_gptq(r),
                                              .tune = r->tune,
                                              .skip_id = r->calib.skip_bos ? c->bos : -1,
                                              .allow_nonfinite = r->allow_nonfinite,
                                              .reserved = copying_bytes(c)};
    const struct calibrate_events inner = {
        .on_linear = deliver, .known = c->options.resume ? recall : NULL, .on_block = on_block, .ctx = c};
    c->told = events;
    c->events = (struct pipeline_events){.on_linear = events->on_linear, .ctx = events->ctx};
    if (events->on_stage)
        events->on_stage(events->ctx, CUT_CALIBRATE, cut_totals(c).n_linears);
    int rc = copying_start(c);
    if (!rc)
        rc = calibrate_run(&c->source, &c->plan, &c->backend, c->data, &options, &inner,
                           c->options.count_time ? c->seconds : NULL);
    if (!rc)
        rc = copying_wait(c);
    copying_end(c);
    return rc;
}

static int build(struct cut *c, const struct cut_events *events)
{
    if (events->on_stage)
        events->on_stage(events->ctx, CUT_QUANTIZE, pipeline_source_bytes(c->pipeline));
    int rc = c->data ? open_journal(c) : 0;
    if (!rc)
        rc = writer_begin(c->writer, c->options.resume);
    c->events = (struct pipeline_events){events->on_bytes, events->on_linear, events->ctx};
    if (!rc)
        rc = c->data ? calibrate(c, events) : pipeline_run(c->pipeline, c->pool, &c->backend, &c->events);
    if (!rc)
        rc = staging_copy_side_files(&c->place, c->source.folder);
    if (!rc)
        rc = write_config(c);
    if (!rc)
        rc = write_record(c);
    if (!rc)
        rc = writer_index(c->writer);
    if (!rc && !c->options.skip_check)
        rc = check_written(c, events); /* while the disk still writes */
    return rc ? rc : writer_finish(c->writer);
}

/* A run that can be resumed leaves its state: when it was interrupted, or when something ran out. */
static bool worth_keeping(const struct cut *c, int rc)
{
    return c->journal && journal_entries(c->journal) > 0 &&
           (rc == ERR_INTERRUPTED || rc == ERR_IO || rc == ERR_MEMORY);
}

int cut_run(struct cut *c, const struct cut_events *events)
{
    if (c->options.resume && !c->data)
        return err_set(ERR_USAGE,
                       "--resume is for methods with calibration; this one begins anew in no time");
    char *journal = file_join(c->place.partial, JOURNAL_NAME);
    if (!journal)
        return ERR_MEMORY;
    c->options.resume = c->options.resume && c->data && file_exists(journal);
    free(journal);
    int rc = staging_begin(&c->place, c->options.overwrite, c->options.resume);
    if (rc < 0)
        return rc;
    rc = build(c, events);
    if (!rc && err_interrupt_requested())
        rc = err_interrupted();
    if (!rc && c->data)
        rc = staging_remove(&c->place, JOURNAL_NAME);
    if (!rc)
        rc = staging_commit(&c->place);
    if (rc < 0 && worth_keeping(c, rc))
        return err_context(rc, "%s is kept, --resume goes on from there", c->place.partial);
    /* another run's journal is not this run's to remove */
    if (rc < 0 && !(c->options.resume && !c->journal))
        staging_abandon(&c->place);
    return rc;
}

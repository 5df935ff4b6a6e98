#include "quantize/convert.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/record.h"
#include "quantize/beside.h"
#include "quantize/pipeline.h"
#include "runtime/packed.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* A worker holds a whole linear, twice when it is transposed; more of them would not read faster. */
enum { MAX_WORKERS = 8 };

struct convert {
    struct convert_options options;
    struct backend backend; /* of the host: for tensors that are passed on */
    struct staging place;
    struct model source;
    struct recipe_plan plan; /* the linears as they are quantized already */
    struct checkpoint
        rest; /* a view of the source's: tensors of quantized linears, and dead ones, left out */
    struct writer *writer;
    struct pipeline *copying; /* of the rest */
    struct linear_out *linears;
    const struct model_linear **from; /* of linears[i] */
    size_t n_linears, n_written, n_copied;
    struct written_tensor *written; /* first the rest's, which the pipeline owns, then the linears' */
    struct parallel *pool;
    const struct convert_events *events;
    pthread_mutex_t lock;
};

/* --- opening ---------------------------------------------------------------------------------------------------- */

static bool same_scheme(const struct linear_plan *a, const struct linear_plan *b)
{
    return a->quantized == b->quantized &&
           (!a->quantized || (a->scheme.bits == b->scheme.bits && a->scheme.group == b->scheme.group &&
                              a->scheme.symmetric == b->scheme.symmetric));
}

/* Linears that readers run as one matrix are described together. */
static int check_sets(const struct convert *c)
{
    for (size_t i = 1; i < c->plan.n; i++) {
        const struct linear_plan *a = &c->plan.linears[i - 1], *b = &c->plan.linears[i];
        const bool experts = a->tensor->expert >= 0, alike = experts == (b->tensor->expert >= 0);
        if (a->tensor->layer == b->tensor->layer && alike &&
            (experts || gemma_fused_set(a->tensor->role) == gemma_fused_set(b->tensor->role)) &&
            !same_scheme(a, b))
            return err_set(ERR_UNSUPPORTED,
                           "%s: '%s' and '%s' are quantized differently, and readers run them as one matrix",
                           c->source.folder, a->tensor->name, b->tensor->name);
    }
    return 0;
}

static int make_plan(struct convert *c)
{
    const struct model *m = &c->source;
    if (!m->quantized)
        return err_set(ERR_UNSUPPORTED, "%s: is not quantized, expected a cut (gemcut quantize makes one)",
                       m->folder);
    c->plan.linears = mem_alloc(m->n_linears, sizeof *c->plan.linears, "the plan");
    int rc = c->plan.linears ? 0 : ERR_MEMORY;
    for (size_t i = 0; !rc && i < m->n_linears; i++) {
        const struct model_linear *l = &m->linears[i];
        c->plan.linears[c->plan.n++] =
            (struct linear_plan){.tensor = l->spec, .quantized = l->quantized, .scheme = l->scheme};
        c->n_linears += l->quantized;
        if (l->quantized)
            rc = quant_format_check(c->options.format, l->scheme, l->spec->name, l->spec->shape);
    }
    if (!rc && !c->n_linears)
        rc = err_set(ERR_UNSUPPORTED, "%s: has no quantized linear", m->folder);
    return rc ? rc : check_sets(c);
}

/* Marks the tensors of quantized linears, and keeps the others that anything reads. */
static int make_rest(struct convert *c)
{
    const struct checkpoint *all = &c->source.checkpoint;
    bool *taken = mem_alloc(all->n_tensors, sizeof *taken, "a list of tensors");
    c->rest = *all;
    c->rest.n_tensors = 0;
    c->rest.tensors = mem_alloc(all->n_tensors, sizeof *c->rest.tensors, "a list of tensors");
    const int rc = taken && c->rest.tensors ? 0 : ERR_MEMORY;
    for (size_t i = 0; !rc && i < c->source.n_linears; i++) {
        const struct model_linear *l = &c->source.linears[i];
        const struct tensor *const parts[] = {l->packed, l->scales, l->zeros, l->shape, l->middle, l->g_idx};
        for (size_t k = 0; l->quantized && k < sizeof parts / sizeof *parts; k++)
            if (parts[k])
                taken[parts[k] - all->tensors] = true;
    }
    for (size_t i = 0; !rc && i < all->n_tensors; i++)
        if (!taken[i] && !gemma_is_dead(&c->source.gemma, c->source.prefix, all->tensors[i].name))
            c->rest.tensors[c->rest.n_tensors++] = all->tensors[i];
    if (!rc)
        c->rest.n_tensors = fused_restore(&c->source.fused, c->rest.tensors, c->rest.n_tensors, NULL);
    free(taken);
    return rc;
}

/* Passes everything on, whatever its values. */
static int open_copying(struct convert *c)
{
    const struct recipe recipe = {.method = "rtn", .format = c->options.format, .allow_nonfinite = true};
    const struct recipe_plan nothing = {0};
    int rc = writer_open(&c->writer, c->place.partial, c->options.shard_bytes);
    if (!rc)
        rc = pipeline_open(&c->copying, &c->rest, &c->source.tensors, &nothing, &recipe, c->writer,
                           &c->backend);
    return rc;
}

static int announce_linears(struct convert *c)
{
    const size_t n = c->n_linears;
    c->linears = mem_alloc(n, sizeof *c->linears, "linears");
    c->from = mem_alloc(n, sizeof *c->from, "linears");
    c->written = mem_alloc(c->rest.n_tensors + LINEAR_MAX_TENSORS * n, sizeof *c->written, "the tensor list");
    int rc = c->linears && c->from && c->written ? 0 : ERR_MEMORY;
    c->n_copied = c->n_written = rc ? 0 : c->rest.n_tensors;
    for (size_t i = 0, k = 0; !rc && i < c->source.n_linears; i++) {
        const struct model_linear *l = &c->source.linears[i];
        if (!l->quantized)
            continue;
        char *module = gemma_module(l->spec);
        size_t added = 0;
        c->from[k] = l;
        c->linears[k] = (struct linear_out){.format = c->options.format,
                                            .scheme = l->scheme,
                                            .rows = l->spec->shape[0],
                                            .cols = l->spec->shape[1],
                                            .name = l->spec->name};
        rc = module
                 ? linear_out_announce(&c->linears[k++], c->writer, module, &c->written[c->n_written], &added)
                 : ERR_MEMORY;
        c->n_written += added;
        free(module);
    }
    return rc;
}

static int open_pool(struct convert *c)
{
    int rc = parallel_open(&c->pool, c->options.n_workers);
    if (!rc && parallel_workers(c->pool) > MAX_WORKERS) {
        parallel_close(c->pool);
        c->pool = NULL;
        rc = parallel_open(&c->pool, MAX_WORKERS);
    }
    return rc;
}

int convert_open(struct convert **out, const struct convert_options *options)
{
    *out = NULL;
    struct convert *c = mem_alloc(1, sizeof *c, "a conversion");
    if (!c)
        return ERR_MEMORY;
    c->options = *options;
    pthread_mutex_init(&c->lock, NULL);
    int rc = staging_init(&c->place, options->out);
    if (!rc)
        rc = backend_open(&c->backend, "cpu", 1);
    if (!rc)
        rc = model_open(&c->source, options->model);
    if (!rc)
        rc = model_bind(&c->source, NULL, NULL);
    if (!rc)
        rc = make_plan(c);
    if (!rc)
        rc = make_rest(c);
    if (!rc)
        rc = open_copying(c);
    if (!rc)
        rc = announce_linears(c);
    if (!rc)
        rc = open_pool(c);
    if (rc < 0)
        convert_close(c);
    else
        *out = c;
    return rc;
}

void convert_close(struct convert *c)
{
    if (!c)
        return;
    for (size_t i = c->n_copied; i < c->n_written; i++)
        free(c->written[i].name);
    pipeline_close(c->copying);
    writer_close(c->writer);
    parallel_close(c->pool);
    recipe_plan_free(&c->plan);
    free(c->rest.tensors);
    free(c->linears);
    free(c->from);
    free(c->written);
    model_close(&c->source);
    staging_free(&c->place);
    backend_close(&c->backend);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

struct convert_totals convert_totals(const struct convert *c)
{
    struct convert_totals t = {.output_bytes = writer_bytes(c->writer), .n_linears = c->n_linears};
    for (size_t i = 0; i < c->source.checkpoint.n_tensors; i++)
        t.source_bytes += c->source.checkpoint.tensors[i].bytes;
    return t;
}

const struct model *convert_source(const struct convert *c)
{
    return &c->source;
}

/* --- running ---------------------------------------------------------------------------------------------------- */

static void tell_bytes(struct convert *c, uint64_t bytes)
{
    pthread_mutex_lock(&c->lock);
    if (c->events->on_bytes)
        c->events->on_bytes(c->events->ctx, bytes);
    pthread_mutex_unlock(&c->lock);
}

static int convert_task(void *ctx, size_t index, int worker)
{
    (void)worker;
    struct convert *c = ctx;
    const struct model_linear *l = c->from[index];
    const struct linear_out *o = &c->linears[index];
    float *scales = NULL;
    int8_t *zeros = NULL;
    uint32_t *codes =
        mem_alloc_aligned((size_t)(o->rows * quant_packed_cols(o->scheme, o->cols)) * sizeof *codes, "codes");
    int rc = codes ? packed_read_all_steps(&c->source, l, &scales, &zeros) : ERR_MEMORY;
    if (!rc)
        rc = packed_read_codes(&c->source, l, 0, o->rows, codes);
    if (!rc)
        rc = linear_out_put_codes(o, c->writer, codes);
    if (!rc)
        rc = linear_out_put_steps(o, c->writer, scales, zeros);
    if (!rc)
        tell_bytes(c, l->packed->bytes + l->scales->bytes);
    free(codes);
    free(scales);
    free(zeros);
    return rc;
}

/* How the codes were found: compressed-tensors says it, else gemcut's record may. */
static int find_act_order(const struct convert *c, const struct record *record, bool *act_order)
{
    const char *method, *order, *init;
    *act_order = c->source.quant.act_order;
    int rc = json_opt_string(record->recipe, "method", "", &method);
    if (!rc)
        rc = json_opt_string(record->recipe, "order_columns", "", &order);
    if (!rc)
        rc = json_opt_string(json_member(record->recipe, "tuning"), "init", "", &init);
    if (!rc && c->source.quant.format != QUANT_COMPRESSED_TENSORS)
        *act_order = (!strcmp(method, "gptq") || !strcmp(init, "gptq")) && !strcmp(order, "activation");
    return rc;
}

static int write_config(const struct convert *c, const struct record *record)
{
    struct quant_config quant;
    bool act_order;
    int rc = find_act_order(c, record, &act_order);
    if (rc < 0)
        return rc;
    rc = recipe_quant_config(&quant, &c->plan, c->options.format, act_order, &c->source.gemma);
    if (rc < 0)
        return rc;
    rc = beside_write_config(&c->place, &c->source.config, &quant);
    quant_config_free(&quant);
    return rc;
}

/* What the record has to say of a cut that gemcut did not make. */
static void put_no_origin(const struct convert *c, struct text *t)
{
    json_kv_string(t, "schema", RECORD_SCHEMA);
    json_kv_string(t, "version", c->options.version);
    json_put_key(t, "recipe");
    json_begin_object(t);
    json_end_object(t);
    json_put_key(t, "linears");
    json_begin_object(t);
    json_end_object(t);
}

static int write_record(struct convert *c, bool found)
{
    struct text t = {.indent = 1};
    int rc = 0;
    json_begin_object(&t);
    if (found)
        rc = record_copy_origin(c->source.folder, &t);
    else
        put_no_origin(c, &t);
    json_put_key(&t, "converted");
    json_begin_object(&t);
    json_kv_string(&t, "from", quant_config_title(&c->source.quant));
    json_kv_string(&t, "to", quant_format_names[c->options.format]);
    json_kv_string(&t, "version", c->options.version);
    beside_put_hash(&t, "config", hash_bytes(c->source.config.text, c->source.config.text_len));
    json_end_object(&t);
    size_t n;
    memcpy(c->written, pipeline_tensors(c->copying, &n), c->n_copied * sizeof *c->written);
    CHECK(n == c->n_copied);
    if (!rc)
        rc = beside_finish_record(&c->place, c->written, c->n_written, &t);
    text_free(&t);
    return rc;
}

static int write_beside(struct convert *c)
{
    struct record record;
    bool found;
    int rc = record_open(&record, c->source.folder, &found);
    if (rc < 0)
        return rc;
    rc = staging_copy_side_files(&c->place, c->source.folder);
    if (!rc)
        rc = write_config(c, &record);
    if (!rc)
        rc = write_record(c, found);
    record_close(&record);
    return rc;
}

static int build(struct convert *c)
{
    const struct pipeline_events copied = {.on_bytes = c->events->on_bytes, .ctx = c->events->ctx};
    int rc = writer_begin(c->writer, false);
    if (!rc)
        rc = pipeline_run(c->copying, c->pool, &c->backend, &copied);
    if (!rc)
        rc = parallel_for(c->pool, c->n_linears, convert_task, c);
    if (!rc)
        rc = write_beside(c);
    if (!rc)
        rc = writer_index(c->writer);
    if (!rc && c->events->on_check)
        c->events->on_check(c->events->ctx, writer_bytes(c->writer));
    if (!rc)
        rc = beside_check_weights(&c->place, c->written, c->n_written, c->pool, c->events->on_bytes,
                                  c->events->ctx);
    return rc ? rc : writer_finish(c->writer);
}

int convert_run(struct convert *c, const struct convert_events *events)
{
    c->events = events;
    int rc = staging_begin(&c->place, c->options.overwrite, false);
    if (rc < 0)
        return rc;
    rc = build(c);
    if (!rc && err_interrupt_requested())
        rc = err_interrupted();
    if (!rc)
        rc = staging_commit(&c->place);
    if (rc < 0)
        staging_abandon(&c->place);
    return rc;
}

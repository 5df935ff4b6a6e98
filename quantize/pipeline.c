#include "quantize/pipeline_impl.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

/* --- planning ------------------------------------------------------------------------------------------------- */

static int announce_linear(struct pipeline *p, struct item *it)
{
    char *module = gemma_module(it->linear->tensor);
    if (!module)
        return ERR_MEMORY;
    it->out = (struct linear_out){.format = p->format,
                                  .scheme = it->linear->scheme,
                                  .rows = it->source->shape[0],
                                  .cols = it->source->shape[1],
                                  .name = it->source->name};
    size_t n;
    const int rc = linear_out_announce(&it->out, p->writer, module, &p->written[p->n_written], &n);
    p->n_written += n;
    free(module);
    return rc;
}

/* A tensor that is passed on keeps its name. */
static int announce_copy(struct pipeline *p, struct item *it)
{
    const struct tensor *t = it->source;
    char *name = mem_strdup(t->name);
    if (!name)
        return ERR_MEMORY;
    p->written[p->n_written++].name = name;
    return writer_add(p->writer, name, name, t->dtype, t->n_dims, t->shape, &it->id);
}

static void grow_to(size_t *size, uint64_t need)
{
    if (need > *size)
        *size = (size_t)need;
}

int64_t pipeline_block_rows(const struct pipeline *p, uint64_t row_bytes, int64_t task_rows)
{
    const int64_t fitting = (int64_t)(p->block_bytes / row_bytes), rows = fitting ? fitting : 1;
    return rows < task_rows ? rows : task_rows;
}

static int plan_item(struct pipeline *p, struct item *it)
{
    const struct tensor *t = it->source;
    const int64_t rows = tensor_rows(t), cols = tensor_cols(t);
    const uint64_t row_bytes = (uint64_t)cols * dtype_bytes(t->dtype);
    const int64_t source_piece = tensor_piece_rows(cols, t->dtype);
    it->written = p->n_written;
    int rc;
    if (it->linear && p->calibrated) {
        it->cut = p->n_linears++;
        it->task_rows = source_piece * TASK_PIECES;
        rc = announce_linear(p, it);
    } else if (it->linear) {
        it->cut = p->n_linears++;
        const int64_t words = quant_packed_cols(it->linear->scheme, cols);
        const int64_t packed_piece = tensor_piece_rows(words, DTYPE_I32);
        /* both are powers of two, so whole pieces of either fit */
        const int64_t least = packed_piece > source_piece ? packed_piece : source_piece;
        it->task_rows = p->on_host || least > source_piece * TASK_PIECES ? least : source_piece * TASK_PIECES;
        grow_to(&p->packed_run, (uint64_t)it->task_rows * (uint64_t)words * 4);
        grow_to(&p->scale_run, (uint64_t)(it->task_rows * quant_groups(it->linear->scheme, cols)));
        grow_to(&p->block_run, (uint64_t)(pipeline_block_rows(p, row_bytes, it->task_rows) * cols) * 2);
        rc = announce_linear(p, it);
    } else {
        it->task_rows = source_piece * TASK_PIECES;
        rc = announce_copy(p, it);
    }
    const int64_t run = it->task_rows < rows ? it->task_rows : rows;
    grow_to(&p->source_run,
            (uint64_t)(pipeline_rounds(p, it) || run < source_piece ? run : source_piece) * row_bytes);
    it->n_tasks = t->bytes ? (size_t)pipeline_pieces(rows, it->task_rows) : 0;
    it->first_task = p->n_tasks;
    p->n_tasks += it->n_tasks;
    return rc;
}

static int match_plan(struct pipeline *p, const struct gemma_tensors *tensors, const struct recipe_plan *plan)
{
    struct name_table items;
    int rc = name_table_init(&items, p->n_items);
    for (size_t i = 0; !rc && i < p->n_items; i++)
        rc = name_table_add(&items, p->items[i].source->name, i);
    size_t at;
    for (size_t i = 0; !rc && i < tensors->n; i++)
        if (name_table_find(&items, tensors->list[i].name, &at))
            p->items[at].must_be_finite = true;
    for (size_t i = 0; !rc && i < plan->n; i++)
        if (plan->linears[i].quantized && name_table_find(&items, plan->linears[i].tensor->name, &at))
            p->items[at].linear = &plan->linears[i];
    name_table_free(&items);
    return rc;
}

int pipeline_open(struct pipeline **out, const struct checkpoint *source, const struct gemma_tensors *tensors,
                  const struct recipe_plan *plan, const struct recipe *recipe, struct writer *writer,
                  const struct backend *b)
{
    *out = NULL;
    struct pipeline *p = mem_alloc(1, sizeof *p, "the pipeline");
    if (!p)
        return ERR_MEMORY;
    *p = (struct pipeline){.checkpoint = source,
                           .writer = writer,
                           .format = recipe->format,
                           .scales = recipe->scales,
                           .allow_nonfinite = recipe->allow_nonfinite,
                           .calibrated = recipe->calibrated,
                           .block_bytes = b->block_bytes,
                           .on_host = b->host_memory,
                           .n_items = source->n_tensors};
    pthread_mutex_init(&p->lock, NULL);
    p->items = mem_alloc(source->n_tensors, sizeof *p->items, "the pipeline");
    p->written = mem_alloc(LINEAR_MAX_TENSORS * source->n_tensors, sizeof *p->written, "the pipeline");
    p->linears = mem_alloc(plan->n, sizeof *p->linears, "the pipeline");
    int rc = p->items && p->written && p->linears ? 0 : ERR_MEMORY;
    for (size_t i = 0; !rc && i < p->n_items; i++)
        p->items[i].source = &source->tensors[i];
    if (!rc)
        rc = match_plan(p, tensors, plan);
    for (size_t i = 0; !rc && i < p->n_items; i++)
        rc = plan_item(p, &p->items[i]);
    for (size_t i = 0; !rc && i < p->n_items; i++)
        if (p->items[i].linear)
            p->linears[p->items[i].cut].plan = p->items[i].linear;
    if (rc < 0)
        pipeline_close(p);
    else
        *out = p;
    return rc;
}

void pipeline_release(struct item *it)
{
    free(it->source_pieces);
    free(it->packed_pieces);
    free(it->squares);
    free(it->scales);
    free(it->zeros);
    free(it->words);
    it->source_pieces = it->packed_pieces = NULL;
    it->squares = NULL;
    it->scales = NULL;
    it->zeros = NULL;
    it->words = NULL;
}

void pipeline_close(struct pipeline *p)
{
    if (!p)
        return;
    for (size_t i = 0; p->items && i < p->n_items; i++)
        pipeline_release(&p->items[i]);
    for (size_t i = 0; i < p->n_written; i++)
        free(p->written[i].name);
    pthread_mutex_destroy(&p->lock);
    free(p->items);
    free(p->written);
    free(p->linears);
    free(p);
}

uint64_t pipeline_source_bytes(const struct pipeline *p)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < p->n_items; i++)
        bytes += p->items[i].source->bytes;
    return bytes;
}

uint64_t pipeline_worker_bytes(const struct pipeline *p)
{
    const uint64_t staged = p->source_run + p->packed_run + 3 * p->scale_run + 2 * sizeof(struct block_stats);
    return staged + p->block_run;
}

uint64_t pipeline_memory_bytes(const struct pipeline *p, int n_workers)
{
    uint64_t state =
        0; /* scales, and transposed codes, of the largest tensors under way: one a worker and one more */
    for (size_t i = 0; i < p->n_items; i++) {
        const struct item *it = &p->items[i];
        if (!pipeline_rounds(p, it))
            continue;
        const struct quant_scheme s = it->linear->scheme;
        const uint64_t rows = (uint64_t)it->source->shape[0];
        uint64_t bytes = rows * (uint64_t)quant_groups(s, it->source->shape[1]) * 3;
        if (!linear_out_by_rows(&it->out))
            bytes += rows * (uint64_t)quant_packed_cols(s, it->source->shape[1]) * sizeof *it->words;
        state = bytes > state ? bytes : state;
    }
    /* where the device has memory of its own, what is staged lies on the host as well */
    return (uint64_t)n_workers * ((p->on_host ? 1 : 2) * pipeline_worker_bytes(p) + state) + state;
}
int pipeline_measure(const struct backend *b, const struct recipe *r, double *seconds_per_weight)
{
    enum { ROWS = 64, COLS = 1024, N = ROWS * COLS };
    const struct quant_scheme s = r->scheme;
    const int64_t group = s.group ? s.group : COLS, words = quant_packed_cols(s, COLS);
    struct staged_buf memory; /* weights, codes, scales */
    int rc =
        b->core->acquire_staging(b, N * sizeof(float) + N + N * sizeof(uint16_t), "a trial block", &memory);
    if (rc < 0)
        return rc;
    char *device = memory.device;
    const struct mat weights = {device, DTYPE_F32, ROWS, COLS, COLS};
    struct qmat q = {.packed = {device + N * sizeof(float), DTYPE_I32, ROWS, words, words},
                     .scales = {device + N * sizeof(float) + N, DTYPE_BF16, ROWS, COLS / group, COLS / group},
                     .bits = s.bits,
                     .group = group,
                     .cols = COLS};
    for (int i = 0; i < N; i++)
        ((float *)memory.host)[i] = sinf((float)i); /* any spread of values will do */
    rc = b->core->stage_in(b, &memory, 0, N * sizeof(float));
    if (!rc)
        rc = b->core->wait(b);
    const double start = clock_seconds();
    if (!rc)
        rc = b->quant->find_scales(b, &weights, &r->scales, &q);
    if (!rc)
        rc = b->quant->quantize(b, &weights, &q);
    if (!rc)
        rc = b->core->wait(b);
    *seconds_per_weight = (clock_seconds() - start) / N;
    b->core->release_staging(b, &memory);
    return rc;
}

const struct written_tensor *pipeline_tensors(const struct pipeline *p, size_t *n)
{
    *n = p->n_written;
    return p->written;
}

const struct cut_linear *pipeline_linears(const struct pipeline *p, size_t *n)
{
    *n = p->n_linears;
    return p->linears;
}

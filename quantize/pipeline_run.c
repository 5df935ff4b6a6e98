/* The pipeline at work: what a worker does with a run of rows, and how a tensor begins and ends. */
#include "quantize/pipeline_impl.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_layout.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- running -------------------------------------------------------------------------------------------------- */

static int nonfinite_error(const struct pipeline *p, const struct item *it, int64_t index)
{
    const int64_t cols = tensor_cols(it->source);
    return err_set(ERR_FORMAT,
                   "%s: tensor '%s' has a NaN or an infinity at row %lld, column %lld "
                   "(--allow-nonfinite takes such weights as 0)",
                   checkpoint_path(p->checkpoint, it->source), it->source->name, (long long)(index / cols),
                   (long long)(index % cols));
}

static bool is_float(enum dtype t)
{
    return t == DTYPE_BF16 || t == DTYPE_F16 || t == DTYPE_F32;
}

/* Copies the task's rows, a piece at a time; those of a weight whose codes come from elsewhere are only hashed. */
static int copy_rows(struct pipeline *p, struct item *it, struct worker *w, int64_t row, int64_t end)
{
    const struct tensor *t = it->source;
    const int64_t cols = tensor_cols(t), piece_rows = tensor_piece_rows(cols, t->dtype);
    const uint64_t row_bytes = (uint64_t)cols * dtype_bytes(t->dtype);
    for (; row < end; row += piece_rows) {
        const int64_t rows = end - row < piece_rows ? end - row : piece_rows;
        const uint64_t at = (uint64_t)row * row_bytes;
        const size_t bytes = (size_t)((uint64_t)rows * row_bytes);
        void *source = w->source.host;
        const struct mat m = {source, t->dtype, rows, cols, cols};
        int64_t nonfinite = -1;
        int rc = checkpoint_read(p->checkpoint, t, at, bytes, source);
        if (!rc && it->must_be_finite && !p->allow_nonfinite && is_float(t->dtype))
            rc = w->host.core->find_nonfinite(&w->host, &m, &nonfinite);
        if (!rc && nonfinite >= 0)
            rc = nonfinite_error(p, it, row * cols + nonfinite);
        if (!rc && !it->linear)
            rc = writer_put(p->writer, it->id, at, source, bytes);
        if (rc < 0)
            return rc;
        it->source_pieces[row / piece_rows] = hash_bytes(source, bytes);
    }
    return 0;
}

/* The worker's memory of a task, as matrices on the device. */
struct task {
    struct item *item;
    struct mat source;
    struct qmat q;
};

static struct task describe_task(struct item *it, const struct worker *w, int64_t rows)
{
    const struct quant_scheme s = it->linear->scheme;
    const int64_t cols = it->source->shape[1], words = quant_packed_cols(s, cols),
                  groups = quant_groups(s, cols);
    return (struct task){
        .item = it,
        .source = {w->source.device, it->source->dtype, rows, cols, cols},
        .q = {.packed = {w->packed.device, DTYPE_I32, rows, words, words},
              .scales = {w->scales.device, DTYPE_BF16, rows, groups, groups},
              .zeros = {s.symmetric ? NULL : w->zeros.device, DTYPE_I8, rows, groups, groups},
              .bits = s.bits,
              .group = s.group ? s.group : cols,
              .cols = cols}};
}

/* Rows [row, row + n) of the task: scales, codes, and what the codes give back. Enqueues only. */
static int quantize_block(const struct pipeline *p, const struct worker *w, const struct task *t, int64_t row,
                          int64_t n)
{
    const struct backend *b = &w->backend;
    const struct mat block = mat_rows(&t->source, row, n);
    const struct mat restored = {w->restored.ptr, DTYPE_BF16, n, block.cols, block.cols};
    struct block_stats *stats = w->stats.device;
    struct qmat q = t->q;
    q.packed = mat_rows(&t->q.packed, row, n);
    q.scales = mat_rows(&t->q.scales, row, n);
    if (q.zeros.data)
        q.zeros = mat_rows(&t->q.zeros, row, n);
    int rc = p->allow_nonfinite ? b->core->zero_nonfinite(b, &block, &stats->first_nonfinite)
                                : b->core->find_nonfinite(b, &block, &stats->first_nonfinite);
    if (!rc)
        rc = b->quant->find_scales(b, &block, &p->scales, &q);
    if (!rc)
        rc = b->quant->quantize(b, &block, &q);
    if (!rc)
        rc = b->quant->dequantize(b, &q, &restored);
    if (!rc)
        rc = b->core->squared_error(b, &block, &restored, stats->squares);
    if (!rc)
        rc = b->core->stage_out(b, &w->stats, 0, sizeof *stats);
    return rc < 0 ? err_context(rc, "tensor '%s'", t->item->source->name) : 0;
}

/* What the kernels found in rows that begin at first_row of the tensor. */
static int settle_block(struct pipeline *p, struct item *it, const struct block_stats *stats,
                        int64_t first_row, double squares[2])
{
    squares[0] += stats->squares[0];
    squares[1] += stats->squares[1];
    if (!p->allow_nonfinite)
        return stats->first_nonfinite < 0
                   ? 0
                   : nonfinite_error(p, it, first_row * it->source->shape[1] + stats->first_nonfinite);
    pthread_mutex_lock(&p->lock);
    it->n_nonfinite += stats->first_nonfinite;
    pthread_mutex_unlock(&p->lock);
    return 0;
}

/* Codes, scales and zero points back to the host, and the scales to their place in the whole tensor. */
static int collect_scales(const struct worker *w, const struct task *t, int64_t row)
{
    struct item *it = t->item;
    const struct core_ops *core = w->backend.core;
    const size_t n = (size_t)(t->q.scales.rows * t->q.scales.cols), at = (size_t)(row * t->q.scales.cols);
    int rc = core->stage_out(&w->backend, &w->packed, 0,
                             (size_t)(t->q.packed.rows * t->q.packed.cols) * sizeof(uint32_t));
    if (!rc)
        rc = core->stage_out(&w->backend, &w->scales, 0, n * sizeof *it->scales);
    if (!rc && it->zeros)
        rc = core->stage_out(&w->backend, &w->zeros, 0, n);
    if (rc < 0)
        return rc;
    memcpy(it->scales + at, w->scales.host, n * sizeof *it->scales);
    if (it->zeros)
        memcpy(it->zeros + at, w->zeros.host, n);
    return 0;
}

static int quantize_rows(struct pipeline *p, struct item *it, struct worker *w, int64_t row, int64_t end,
                         double squares[2])
{
    const struct tensor *t = it->source;
    const struct task task = describe_task(it, w, end - row);
    const int64_t words = task.q.packed.cols;
    const uint64_t row_bytes = (uint64_t)t->shape[1] * dtype_bytes(t->dtype);
    const size_t bytes = (size_t)((uint64_t)(end - row) * row_bytes);
    const int64_t block = pipeline_block_rows(p, row_bytes, end - row);
    int rc = checkpoint_read(p->checkpoint, t, (uint64_t)row * row_bytes, bytes, w->source.host);
    if (!rc)
        rc = w->backend.core->stage_in(&w->backend, &w->source, 0, bytes);
    if (rc < 0)
        return rc;
    pipeline_hash_rows(w->source.host, t->shape[1], t->dtype, row, end, it->source_pieces);
    squares[0] = squares[1] = 0;
    for (int64_t r = row; !rc && r < end; r += block) {
        rc = quantize_block(p, w, &task, r - row, end - r < block ? end - r : block);
        if (!rc)
            rc = settle_block(p, it, w->stats.host, r, squares);
    }
    if (!rc)
        rc = collect_scales(w, &task, row);
    if (rc < 0)
        return rc;
    if (it->words) {
        layout_transpose(w->packed.host, end - row, words, it->words + row, t->shape[0]);
        return 0;
    }
    pipeline_hash_rows(w->packed.host, words, DTYPE_I32, row, end, it->packed_pieces);
    return writer_put(p->writer, it->out.codes_id, (uint64_t)(row * words) * 4, w->packed.host,
                      (size_t)((end - row) * words) * 4);
}

/* --- a tensor's beginning and end ------------------------------------------------------------------------------ */

static int begin_item(const struct pipeline *p, struct item *it)
{
    const struct tensor *t = it->source;
    const int64_t rows = tensor_rows(t), cols = tensor_cols(t);
    it->tasks_left = it->n_tasks;
    it->source_pieces = mem_alloc((size_t)pipeline_pieces(rows, tensor_piece_rows(cols, t->dtype)),
                                  sizeof *it->source_pieces, "tensor hashes");
    if (!it->source_pieces)
        return ERR_MEMORY;
    if (!pipeline_rounds(p, it))
        return 0;
    const struct quant_scheme s = it->linear->scheme;
    const size_t n_scales = (size_t)(rows * quant_groups(s, cols));
    const int64_t words = quant_packed_cols(s, cols);
    it->packed_pieces = mem_alloc((size_t)pipeline_pieces(rows, tensor_piece_rows(words, DTYPE_I32)),
                                  sizeof *it->packed_pieces, "tensor hashes");
    it->squares = mem_alloc(2 * it->n_tasks, sizeof *it->squares, "weight errors");
    it->scales = mem_alloc(n_scales, sizeof *it->scales, "scales");
    if (!s.symmetric)
        it->zeros = mem_alloc(n_scales, sizeof *it->zeros, "zero points");
    const bool by_rows = linear_out_by_rows(&it->out);
    if (!by_rows)
        it->words = mem_alloc_aligned((size_t)(rows * words) * sizeof *it->words, "transposed codes");
    if (it->packed_pieces && it->squares && it->scales && (s.symmetric || it->zeros) &&
        (by_rows || it->words))
        return 0;
    pipeline_release(it); /* another worker that is about to enter must not take it for begun */
    return ERR_MEMORY;
}

/* The codes of a linear are written when its last rows are, or were on the way. */
static int finish_codes(const struct pipeline *p, const struct item *it)
{
    const int64_t rows = it->source->shape[0],
                  words = quant_packed_cols(it->linear->scheme, it->source->shape[1]);
    if (it->words)
        return linear_out_put_words(&it->out, p->writer, it->words);
    return tensor_hash_combine(it->packed_pieces,
                               (size_t)pipeline_pieces(rows, tensor_piece_rows(words, DTYPE_I32)), DTYPE_I32,
                               2, (int64_t[]){rows, words}, &it->out.written[0].hash);
}

static int finish_linear(struct pipeline *p, struct item *it, struct hash128 source_hash)
{
    struct cut_linear *cut = &p->linears[it->cut];
    cut->source_hash = source_hash;
    if (p->calibrated)
        return 0;
    double error = 0, reference = 0;
    for (size_t i = 0; i < it->n_tasks; i++) {
        error += it->squares[2 * i];
        reference += it->squares[2 * i + 1];
    }
    cut->error = reference > 0 ? sqrt(error / reference) : 0;
    cut->n_nonfinite = it->n_nonfinite;
    const int rc = finish_codes(p, it);
    return rc ? rc : pipeline_put_steps(p, it, it->scales, it->zeros);
}

static int finish_item(struct pipeline *p, struct item *it)
{
    const struct tensor *t = it->source;
    const size_t n =
        t->bytes ? (size_t)pipeline_pieces(tensor_rows(t), tensor_piece_rows(tensor_cols(t), t->dtype)) : 0;
    struct hash128 hash;
    int rc = tensor_hash_combine(it->source_pieces, n, t->dtype, t->n_dims, t->shape, &hash);
    if (!rc && it->linear)
        rc = finish_linear(p, it, hash);
    else if (!rc)
        p->written[it->written].hash = hash;
    pipeline_release(it);
    return rc;
}

/* By each worker for itself, with its first task: pinning memory takes a while, in which others can read. */
static int open_worker(const struct pipeline *p, struct worker *w)
{
    const struct backend *b = p->backend;
    int rc = backend_open_beside(&w->backend, b);
    if (!rc)
        rc = backend_open(&w->host, "cpu", 1);
    const struct staged_need needs[] = {{&w->source, p->source_run, "rows of a tensor"},
                                        {&w->packed, p->packed_run, "codes"},
                                        {&w->scales, 2 * p->scale_run, "scales"},
                                        {&w->zeros, p->scale_run, "zero points"},
                                        {&w->stats, sizeof(struct block_stats), "weight errors"}};
    if (!rc)
        rc = backend_acquire_staged(&w->backend, needs, sizeof needs / sizeof *needs);
    return rc || !p->block_run
               ? rc
               : b->core->acquire(&w->backend, p->block_run, "dequantized rows", &w->restored);
}

static int run_task(void *arg, size_t task, int worker)
{
    struct pipeline *p = arg;
    struct item *it = &p->items[parallel_find(&p->items->first_task, sizeof *p->items, p->n_items, task)];
    struct worker *w = &p->workers[worker];
    const size_t part = task - it->first_task;
    const int64_t rows = tensor_rows(it->source), row = (int64_t)part * it->task_rows;
    const int64_t end = rows - row < it->task_rows ? rows : row + it->task_rows;
    int rc = w->backend.state ? 0 : open_worker(p, w);
    pthread_mutex_lock(&p->lock);
    if (!rc && !it->source_pieces)
        rc = begin_item(p, it);
    pthread_mutex_unlock(&p->lock);
    if (!rc)
        rc = pipeline_rounds(p, it) ? quantize_rows(p, it, w, row, end, it->squares + 2 * part)
                                    : copy_rows(p, it, w, row, end);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&p->lock);
    const bool last = --it->tasks_left == 0;
    if (p->events->on_bytes)
        p->events->on_bytes(p->events->ctx, (uint64_t)(end - row) * (uint64_t)tensor_cols(it->source) *
                                                dtype_bytes(it->source->dtype));
    pthread_mutex_unlock(&p->lock);
    if (!last)
        return 0;
    rc = finish_item(p, it);
    if (!rc && pipeline_rounds(p, it) && p->events->on_linear) {
        pthread_mutex_lock(&p->lock);
        p->events->on_linear(p->events->ctx, &p->linears[it->cut]);
        pthread_mutex_unlock(&p->lock);
    }
    return rc;
}

static void close_worker(struct worker *w)
{
    if (!w->backend.state)
        return;
    struct staged_buf *const pieces[] = {&w->source, &w->packed, &w->scales, &w->zeros, &w->stats};
    backend_release_staged(&w->backend, pieces, sizeof pieces / sizeof *pieces);
    if (w->restored.ptr)
        w->backend.core->release(&w->backend, &w->restored);
    backend_close(&w->backend);
    backend_close(&w->host);
}

int pipeline_run(struct pipeline *p, struct parallel *pool, const struct backend *b,
                 const struct pipeline_events *events)
{
    const size_t n_workers = (size_t)parallel_workers(pool);
    p->events = events;
    p->workers = mem_alloc(n_workers, sizeof *p->workers, "workers");
    p->backend = b;
    int rc = p->workers ? 0 : ERR_MEMORY;
    if (!rc)
        rc = parallel_for(pool, p->n_tasks, run_task, p);
    /* tensors without a single element have no task, but a hash all the same */
    for (size_t i = 0; !rc && i < p->n_items; i++)
        if (!p->items[i].n_tasks)
            rc = finish_item(p, &p->items[i]);
    for (size_t i = 0; p->workers && i < n_workers; i++)
        close_worker(&p->workers[i]);
    free(p->workers);
    p->workers = NULL;
    return rc;
}
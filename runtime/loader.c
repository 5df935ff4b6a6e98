#include "runtime/loader.h"

#include "base/err.h"
#include "base/mem.h"
#include "runtime/packed.h"

#include <stdlib.h>

enum {
    PIECE_BYTES = 8 << 20, /* read, then copied, at a time by one thread */
    MAX_LOADERS = 16,
};

static int add_task(struct loader *l, struct transfer t, uint64_t n_tasks)
{
    const int rc = mem_grow(&l->list, &l->capacity, l->n + 1, sizeof *l->list, "the list of tensors");
    if (rc < 0)
        return rc;
    t.first_task = l->n_tasks;
    l->list[l->n++] = t;
    l->n_tasks += (size_t)n_tasks;
    return 0;
}

int loader_add(struct loader *l, const struct tensor *t, void *to)
{
    return add_task(l, (struct transfer){.tensor = t, .to = to}, (t->bytes + PIECE_BYTES - 1) / PIECE_BYTES);
}

static uint64_t unpacked_row_bytes(const struct model_linear *l)
{
    const int64_t cols = l->spec->shape[1];
    return (uint64_t)(l->direct ? quant_packed_cols(l->scheme, cols) * 4 : cols * 2);
}

/* Rows that are unpacked at a time: what fits a piece. */
static int64_t unpacked_rows(const struct model_linear *l)
{
    return (int64_t)(PIECE_BYTES / unpacked_row_bytes(l)) / PACKED_ROWS * PACKED_ROWS;
}

int loader_add_unpacked(struct loader *l, const struct model_linear *from, void *to)
{
    const int64_t rows = unpacked_rows(from);
    if (!rows)
        return err_set(ERR_UNSUPPORTED, "tensor '%s' has rows of %lld columns, too long to unpack",
                       from->packed->name, (long long)from->spec->shape[1]);
    return add_task(l, (struct transfer){.linear = from, .to = to},
                    (uint64_t)((from->spec->shape[0] + rows - 1) / rows));
}

static int unpack_task(const struct loader *l, const struct load_worker *k, const struct transfer *t,
                       size_t task)
{
    const struct model_linear *from = t->linear;
    const int64_t step = unpacked_rows(from), row = (int64_t)task * step, left = from->spec->shape[0] - row;
    const int64_t n = left < step ? left : step;
    const uint64_t row_bytes = unpacked_row_bytes(from);
    char *to = t->to + (uint64_t)row * row_bytes;
    void *piece = k->backend.host_memory ? to : k->piece.host;
    const int rc = from->direct ? packed_read_codes(l->m, from, row, n, piece)
                                : packed_read_weights(l->m, from, row, n, piece);
    return rc || k->backend.host_memory
               ? rc
               : k->backend.core->upload(&k->backend, to, piece, (size_t)((uint64_t)n * row_bytes));
}

static int transfer_task(void *ctx, size_t task, int worker)
{
    const struct loader *l = ctx;
    const struct load_worker *k = &l->workers[worker];
    const struct transfer *t = &l->list[parallel_find(&l->list->first_task, sizeof *l->list, l->n, task)];
    if (t->linear)
        return unpack_task(l, k, t, task - t->first_task);
    const uint64_t at = (task - t->first_task) * (uint64_t)PIECE_BYTES;
    const size_t n = (size_t)(t->tensor->bytes - at < PIECE_BYTES ? t->tensor->bytes - at : PIECE_BYTES);
    if (k->backend.host_memory)
        return checkpoint_read(&l->m->checkpoint, t->tensor, at, n, t->to + at);
    const int rc = checkpoint_read(&l->m->checkpoint, t->tensor, at, n, k->piece.host);
    return rc ? rc : k->backend.core->upload(&k->backend, t->to + at, k->piece.host, n);
}

/* A thread for each processor, up to as many as storage can feed. */
static int count_loaders(void)
{
    const int n = parallel_processors();
    return n < MAX_LOADERS ? n : MAX_LOADERS;
}

uint64_t weights_loader_bytes(const struct backend *b)
{
    return b->host_memory ? 0 : (uint64_t)count_loaders() * PIECE_BYTES;
}

static int open_workers(struct loader *l)
{
    int rc = parallel_open(&l->pool, count_loaders());
    if (rc < 0)
        return rc;
    const int n = parallel_workers(l->pool);
    l->workers = mem_alloc((size_t)n, sizeof *l->workers, "workers");
    rc = l->workers ? 0 : ERR_MEMORY;
    for (int i = 0; !rc && i < n; i++) {
        struct load_worker *k = &l->workers[i];
        rc = backend_open_beside(&k->backend, l->w->backend);
        if (!rc && !k->backend.host_memory)
            rc = k->backend.core->acquire_staging(&k->backend, PIECE_BYTES, "a piece of a tensor", &k->piece);
    }
    return rc;
}

void loader_close(struct loader *l)
{
    if (!l)
        return;
    for (int i = 0; l->workers && i < parallel_workers(l->pool); i++) {
        struct load_worker *k = &l->workers[i];
        if (k->piece.host)
            k->backend.core->release_staging(&k->backend, &k->piece);
        backend_close(&k->backend);
    }
    free(l->workers);
    free(l->list);
    parallel_close(l->pool);
    free(l);
}

int loader_run(struct loader *l)
{
    int rc = l->pool ? 0 : open_workers(l);
    if (!rc)
        rc = parallel_for(l->pool, l->n_tasks, transfer_task, l);
    l->n = l->n_tasks = 0;
    return rc;
}

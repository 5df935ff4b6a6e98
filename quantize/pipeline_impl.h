/* What the two halves of the pipeline share: pipeline.c plans, pipeline_run.c runs. Nobody else includes this. */
#ifndef GEMCUT_QUANTIZE_PIPELINE_IMPL_H
#define GEMCUT_QUANTIZE_PIPELINE_IMPL_H

#include "quantize/pipeline.h"

#include <pthread.h>

/* A task that copies, or that quantizes on a device, reads this many pieces (4 MiB). */
enum { TASK_PIECES = 16 };

/* One tensor of the source. The state below the line lives from the first of its tasks to the last. */
struct item {
    const struct tensor *source;
    const struct linear_plan *linear; /* NULL: passed on as it is */
    bool must_be_finite;              /* language tensors; vision towers may hold infinities by design */
    size_t id;                        /* the writer's, of a tensor that is passed on */
    struct linear_out out;            /* of a linear */
    size_t written, cut;              /* index of its first result; of its linear */
    int64_t task_rows;
    size_t first_task, n_tasks;

    size_t tasks_left;
    struct hash128 *source_pieces, *packed_pieces;
    double *squares; /* [n_tasks][2]: Σ (w − ŵ)², Σ w² */
    int64_t n_nonfinite;
    uint16_t *scales;
    int8_t *zeros;
    uint32_t *words; /* codes of the whole linear, where they are written transposed */
};

/* What the kernels report of a block of rows. */
struct block_stats {
    double squares[2];       /* Σ (w − ŵ)², Σ w² */
    int64_t first_nonfinite; /* or the number of those that were set to zero (allow_nonfinite) */
};

/* What one worker computes with: pieces of memory as large as the largest task needs. */
struct worker {
    struct backend backend, host; /* host: for rows that are passed on */
    struct staged_buf source, packed, scales, zeros, stats;
    struct buf restored; /* dequantized rows of a block */
};

struct pipeline {
    const struct checkpoint *checkpoint;
    struct writer *writer;
    enum quant_format format;
    struct scale_spec scales;
    bool allow_nonfinite, calibrated;
    struct item *items;
    size_t n_items, n_tasks;
    struct written_tensor *written;
    size_t n_written;
    struct cut_linear *linears;
    size_t n_linears;
    size_t source_run, packed_run, block_run, scale_run; /* bytes a worker needs; scale_run: as many scales */
    size_t block_bytes;                                  /* of a weight that the kernels get at a time */
    bool on_host;                                        /* the kernels work on host memory */
    /* while running */
    struct worker *workers;
    const struct backend *backend;
    const struct pipeline_events *events;
    pthread_mutex_t lock;
};

static inline int64_t pipeline_pieces(int64_t rows, int64_t piece_rows)
{
    return (rows + piece_rows - 1) / piece_rows;
}

/* Rows of a task that the kernels get at a time. */
int64_t pipeline_block_rows(const struct pipeline *p, uint64_t row_bytes, int64_t task_rows);

/* What a task does with rows of an item. */
static inline bool pipeline_rounds(const struct pipeline *p, const struct item *it)
{
    return it->linear && !p->calibrated;
}

/* Hashes the pieces of rows [row, end) that lie in buf. */
void pipeline_hash_rows(const void *buf, int64_t cols, enum dtype dtype, int64_t row, int64_t end,
                        struct hash128 *pieces);

/* Everything of a linear but its codes, from the host. */
int pipeline_put_steps(struct pipeline *p, const struct item *it, const uint16_t *scales,
                       const int8_t *zeros);

/* Frees what an item holds while it is under way. */
void pipeline_release(struct item *it);

#endif

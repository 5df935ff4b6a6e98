#include "report/weights.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_layout.h"
#include "runtime/packed.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows that are looked at together: about 1 MiB of floats where that stays in cache, more on other devices. */
enum { HOST_BLOCK = 256 << 10, DEVICE_BLOCK = 4 << 20 };

/* What a worker computes with: each piece of memory is as large as the largest linear needs. */
struct worker {
    struct backend backend;
    struct staged_buf packed, scales, zeros, source,
        sums;            /* packed: codes, or weights of a linear that is not direct */
    struct buf restored; /* [rows, cols] */
};

struct job {
    const struct model *cut, *source;
    const char *device;
    struct worker *workers;
    struct weight_report *out;
};

static int64_t block_rows(const struct backend *b, const struct model_linear *l)
{
    const int64_t cols = l->spec->shape[1];
    const int64_t rows = (b->host_memory ? HOST_BLOCK : DEVICE_BLOCK) / cols / PACKED_ROWS * PACKED_ROWS;
    return rows < PACKED_ROWS ? PACKED_ROWS : rows < l->spec->shape[0] ? rows : l->spec->shape[0];
}

/* Finite, non-zero and not subnormal: what every reader can multiply by. */
static void check_scales(const struct model_linear *l, const float *scales, struct weight_report *out)
{
    const int64_t n = l->scales->shape[0] * l->scales->shape[1];
    for (int64_t i = 0; i < n; i++)
        if (!isnormal(scales[i])) {
            out->first_bad = out->bad_scales ? out->first_bad : i;
            out->bad_scales++;
        }
}

/* Rows of the cut on the device, as BF16. Where the linear is direct, from its codes by the device's own arithmetic. */
static int restore_block(const struct job *job, struct worker *w, const struct model_linear *l,
                         const struct qmat *q, int64_t row, struct mat *restored)
{
    const struct backend *b = &w->backend;
    const int64_t cols = q->cols, rows = q->packed.rows;
    const size_t bytes = (size_t)(rows * (l->direct ? q->packed.cols * 4 : cols * 2));
    int rc = l->direct ? packed_read_codes(job->cut, l, row, rows, w->packed.host)
                       : packed_read_weights(job->cut, l, row, rows, w->packed.host);
    if (!rc)
        rc = b->core->stage_in(b, &w->packed, 0, bytes);
    *restored = (struct mat){l->direct ? w->restored.ptr : w->packed.device, DTYPE_BF16, rows, cols, cols};
    return rc || !l->direct ? rc : b->quant->dequantize(b, q, restored);
}

/* Adds one block of rows to the sums, group by group so that a single damaged scale stands out. q: on the device. */
static int compare_block(const struct job *job, struct worker *w, const struct model_linear *l,
                         const struct tensor *weight, const struct qmat *q, int64_t row, double sums[2],
                         double *worst)
{
    const struct backend *b = &w->backend;
    const int64_t cols = q->cols, rows = q->packed.rows;
    const size_t row_bytes = (size_t)cols * dtype_bytes(weight->dtype), n = (size_t)(rows * q->scales.cols);
    const struct mat source = {w->source.device, weight->dtype, rows, cols, cols};
    struct mat restored;
    int rc = restore_block(job, w, l, q, row, &restored);
    if (!rc)
        rc = checkpoint_read(&job->source->checkpoint, weight, (uint64_t)row * row_bytes,
                             (size_t)rows * row_bytes, w->source.host);
    if (!rc)
        rc = b->core->stage_in(b, &w->source, 0, (size_t)rows * row_bytes);
    if (!rc)
        rc = b->core->group_squared_error(b, &source, &restored, q->group, w->sums.device);
    if (!rc)
        rc = b->core->stage_out(b, &w->sums, 0, n * 2 * sizeof(double));
    const double *pairs = w->sums.host;
    for (size_t i = 0; !rc && i < n; i++) {
        const double error = pairs[2 * i], reference = pairs[2 * i + 1];
        sums[0] += error;
        sums[1] += reference;
        if (reference > 0 && !isnan(*worst) && !(error / reference <= *worst))
            *worst = error / reference;
    }
    return rc;
}

static int compare_linear(const struct job *job, struct worker *w, const struct model_linear *l,
                          const struct tensor *weight, const float *scales, const int8_t *zeros,
                          struct weight_report *out)
{
    const struct backend *b = &w->backend;
    const int64_t rows = l->spec->shape[0], block = block_rows(b, l),
                  groups = quant_groups(l->scheme, l->spec->shape[1]);
    double sums[2] = {0, 0}, worst = 0;
    int rc = 0;
    for (int64_t row = 0; !rc && row < rows; row += block) {
        const int64_t n = rows - row < block ? rows - row : block;
        const size_t count = (size_t)(n * groups);
        layout_write_scales(scales + row * groups, n, groups, false, DTYPE_BF16, w->scales.host);
        rc = b->core->stage_in(b, &w->scales, 0, count * sizeof(uint16_t));
        if (!rc && zeros) {
            memcpy(w->zeros.host, zeros + row * groups, count);
            rc = b->core->stage_in(b, &w->zeros, 0, count);
        }
        const struct qmat q =
            packed_qmat(l, 0, n, w->packed.device, w->scales.device, zeros ? w->zeros.device : NULL);
        if (!rc)
            rc = compare_block(job, w, l, weight, &q, row, sums, &worst);
    }
    out->error = sums[1] > 0 ? sqrt(sums[0] / sums[1]) : 0;
    out->worst_group = sqrt(worst);
    return rc;
}

static void keep_greatest(size_t *bytes, int64_t need)
{
    if ((size_t)need > *bytes)
        *bytes = (size_t)need;
}

/* By each worker for itself, when it has something to compare. */
static int open_worker(const struct job *job, struct worker *w)
{
    int rc = backend_open(&w->backend, job->device, 1);
    size_t packed = 0, groups = 0, source = 0, restored = 0;
    for (size_t i = 0; !rc && i < job->cut->n_linears; i++) {
        const struct model_linear *l = &job->cut->linears[i];
        const struct tensor *weight = job->source ? job->source->linears[i].weight : NULL;
        if (!model_is_bound(l) || !weight)
            continue;
        const int64_t rows = block_rows(&w->backend, l), cols = l->spec->shape[1], n = rows * cols;
        keep_greatest(&packed, l->direct ? rows * quant_packed_cols(l->scheme, cols) * 4 : n * 2);
        keep_greatest(&groups, rows * quant_groups(l->scheme, cols));
        keep_greatest(&source, n * (int64_t)dtype_bytes(weight->dtype));
        keep_greatest(&restored, n * 2);
    }
    const struct staged_need needs[] = {{&w->packed, packed, "codes"},
                                        {&w->scales, 2 * groups, "scales"},
                                        {&w->zeros, groups, "zero points"},
                                        {&w->source, source, "rows of a tensor"},
                                        {&w->sums, 2 * sizeof(double) * groups, "weight errors"}};
    if (!rc)
        rc = backend_acquire_staged(&w->backend, needs, sizeof needs / sizeof *needs);
    return rc || !restored
               ? rc
               : w->backend.core->acquire(&w->backend, restored, "dequantized rows", &w->restored);
}

static int compare_task(void *ctx, size_t index, int worker)
{
    const struct job *job = ctx;
    const struct model_linear *l = &job->cut->linears[index];
    struct weight_report *out = &job->out[index];
    *out = (struct weight_report){.first_bad = -1};
    if (!model_is_bound(l))
        return 0;
    out->linear = l;
    float *scales;
    int8_t *zeros;
    int rc = packed_read_all_steps(job->cut, l, &scales, &zeros);
    if (rc < 0)
        return rc;
    check_scales(l, scales, out);
    const struct tensor *weight = job->source ? job->source->linears[index].weight : NULL;
    struct worker *w = &job->workers[worker];
    if (weight && !w->backend.state)
        rc = open_worker(job, w);
    if (!rc && weight)
        rc = compare_linear(job, w, l, weight, scales, zeros, out);
    free(scales);
    free(zeros);
    return rc;
}

static void close_worker(struct worker *w)
{
    if (!w->backend.state)
        return;
    struct staged_buf *const pieces[] = {&w->packed, &w->scales, &w->zeros, &w->source, &w->sums};
    backend_release_staged(&w->backend, pieces, sizeof pieces / sizeof *pieces);
    if (w->restored.ptr)
        w->backend.core->release(&w->backend, &w->restored);
    backend_close(&w->backend);
}

int weights_compare(const struct model *cut, const struct model *source, struct parallel *pool,
                    const char *device, struct weight_report *out)
{
    CHECK(!source || source->n_linears == cut->n_linears);
    const int n = parallel_workers(pool);
    struct job job = {cut, source, device, mem_alloc((size_t)n, sizeof *job.workers, "workers"), out};
    int rc = job.workers ? 0 : ERR_MEMORY;
    if (!rc)
        rc = parallel_for(pool, cut->n_linears, compare_task, &job);
    for (int i = 0; job.workers && i < n; i++)
        close_worker(&job.workers[i]);
    free(job.workers);
    return rc;
}

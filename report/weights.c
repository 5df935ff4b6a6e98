#include "report/weights.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

struct job {
    const struct model *cut, *source;
    const char *device;
    struct weight_report *out;
};

/* Rows that are looked at together: about 1 MiB of floats. */
static int64_t block_rows(int64_t cols)
{
    const int64_t rows = (256 << 10) / cols;
    return rows ? rows : 1;
}

/* Finite, non-zero and not subnormal: what every reader can multiply by. */
static bool usable_scale(uint16_t s)
{
    const int exponent = s >> 7 & 0xff;
    return exponent != 0 && exponent != 0xff;
}

static void check_scales(const struct model_linear *l, const uint16_t *scales, struct weight_report *out)
{
    const int64_t n = l->scales->shape[0] * l->scales->shape[1];
    for (int64_t i = 0; i < n; i++)
        if (!usable_scale(scales[i])) {
            out->first_bad = out->bad_scales ? out->first_bad : i;
            out->bad_scales++;
        }
}

struct buffers {
    uint32_t *packed;
    float *restored; /* [rows, cols] */
    char *source;    /* [rows, cols] of the source's type */
};

/* Adds one block of rows to the sums, group by group so that a single damaged scale stands out. */
static int compare_block(const struct job *job, const struct backend *b, const struct model_linear *l,
                         const struct tensor *weight, struct qmat *q, int64_t row, const struct buffers *buf,
                         double sums[2], double *worst)
{
    const int64_t cols = q->cols, rows = q->packed.rows;
    const size_t row_bytes = (size_t)cols * dtype_bytes(weight->dtype);
    const struct mat restored = {buf->restored, DTYPE_F32, rows, cols, cols};
    int rc = model_read_packed(job->cut, l, row, rows, buf->packed);
    if (!rc)
        rc = checkpoint_read(&job->source->checkpoint, weight, (uint64_t)row * row_bytes,
                             (size_t)rows * row_bytes, buf->source);
    if (!rc)
        rc = b->quant->dequantize(q, &restored);
    for (int64_t r = 0; !rc && r < rows; r++)
        for (int64_t c = 0; !rc && c < cols; c += q->group) {
            const int64_t n = cols - c < q->group ? cols - c : q->group;
            const size_t at = (size_t)(r * cols + c);
            const struct mat w = {buf->source + at * dtype_bytes(weight->dtype), weight->dtype, 1, n, n};
            const struct mat v = {buf->restored + at, DTYPE_F32, 1, n, n};
            double error, reference;
            rc = b->core->squared_error(&w, &v, &error, &reference);
            sums[0] += error;
            sums[1] += reference;
            if (reference > 0 && !(error / reference <= *worst))
                *worst = error / reference;
        }
    return rc;
}

static int compare_linear(const struct job *job, const struct backend *b, const struct model_linear *l,
                          const struct tensor *weight, uint16_t *scales, int8_t *zeros,
                          struct weight_report *out)
{
    const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1], block = block_rows(cols);
    const size_t n = (size_t)(block * cols);
    struct buffers buf = {mem_alloc_aligned((size_t)(block * l->packed->shape[1]) * 4, "codes"),
                          mem_alloc_aligned(n * sizeof(float), "dequantized rows"),
                          mem_alloc_aligned(n * dtype_bytes(weight->dtype), "rows of a tensor")};
    int rc = buf.packed && buf.restored && buf.source ? 0 : ERR_MEMORY;
    double sums[2] = {0, 0}, worst = 0;
    for (int64_t row = 0; !rc && row < rows; row += block) {
        struct qmat q =
            model_qmat(l, row, rows - row < block ? rows - row : block, buf.packed, scales, zeros);
        rc = compare_block(job, b, l, weight, &q, row, &buf, sums, &worst);
    }
    out->error = sums[1] > 0 ? sqrt(sums[0] / sums[1]) : 0;
    out->worst_group = sqrt(worst);
    free(buf.packed);
    free(buf.restored);
    free(buf.source);
    return rc;
}

static int compare_task(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct job *job = ctx;
    const struct model_linear *l = &job->cut->linears[index];
    struct weight_report *out = &job->out[index];
    *out = (struct weight_report){.first_bad = -1};
    if (!l->quantized || !l->packed || !l->scales || (!l->scheme.symmetric && !l->zeros))
        return 0;
    out->linear = l;
    struct backend b;
    int rc = backend_open(&b, job->device, 1);
    if (rc < 0)
        return rc;
    uint16_t *scales;
    int8_t *zeros;
    rc = model_read_scales(job->cut, l, &scales, &zeros);
    if (!rc) {
        check_scales(l, scales, out);
        const struct tensor *weight = job->source ? job->source->linears[index].weight : NULL;
        if (weight)
            rc = compare_linear(job, &b, l, weight, scales, zeros, out);
        free(scales);
        free(zeros);
    }
    backend_close(&b);
    return rc;
}

int weights_compare(const struct model *cut, const struct model *source, struct parallel *pool,
                    const char *device, struct weight_report *out)
{
    CHECK(!source || source->n_linears == cut->n_linears);
    struct job job = {cut, source, device, out};
    return parallel_for(pool, cut->n_linears, compare_task, &job);
}

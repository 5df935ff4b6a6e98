/* The results of calibrated recipes: whole linears, from memory; read back, too, where an earlier run had finished
 * them. */
#include "quantize/pipeline_impl.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_layout.h"

#include <math.h>
#include <stdlib.h>

void pipeline_hash_rows(const void *buf, int64_t cols, enum dtype dtype, int64_t row, int64_t end,
                        struct hash128 *pieces)
{
    const int64_t piece_rows = tensor_piece_rows(cols, dtype);
    const size_t row_bytes = (size_t)cols * dtype_bytes(dtype);
    for (int64_t r = row; r < end; r += piece_rows) {
        const int64_t rows = end - r < piece_rows ? end - r : piece_rows;
        pieces[r / piece_rows] =
            hash_bytes((const char *)buf + (size_t)(r - row) * row_bytes, (size_t)rows * row_bytes);
    }
}

int pipeline_put_steps(struct pipeline *p, const struct item *it, const uint16_t *scales, const int8_t *zeros)
{
    const int64_t rows = it->source->shape[0],
                  groups = quant_groups(it->linear->scheme, it->source->shape[1]);
    float *values = mem_alloc_aligned((size_t)(rows * groups) * sizeof *values, "scales");
    if (!values)
        return ERR_MEMORY;
    layout_read_scales(scales, DTYPE_BF16, rows, groups, false, values);
    const int rc = linear_out_put_steps(&it->out, p->writer, values, zeros);
    free(values);
    return rc;
}

/* --- results of calibrated recipes ------------------------------------------------------------------------------ */

static struct item *find_item(struct pipeline *p, const struct linear_plan *linear)
{
    size_t i = 0;
    while (i < p->n_items && p->items[i].linear != linear)
        i++;
    CHECK(i < p->n_items && p->calibrated);
    return &p->items[i];
}

static void note_result(struct pipeline *p, const struct item *it, const struct journal_entry *entry)
{
    struct cut_linear *cut = &p->linears[it->cut];
    cut->error = sqrt(entry->stats.weight_error);
    cut->stats = entry->stats;
    cut->tuned = entry->tuned;
    cut->n_nonfinite = entry->n_nonfinite;
    if (p->events->on_linear)
        p->events->on_linear(p->events->ctx, cut);
}

int pipeline_deliver(struct pipeline *p, const struct calibrated_linear *l, struct journal_entry *entry)
{
    const struct item *it = find_item(p, l->plan);
    const struct qmat *q = &l->q;
    int rc = linear_out_put_codes(&it->out, p->writer, q->packed.data);
    if (!rc)
        rc = pipeline_put_steps(p, it, q->scales.data, q->zeros.data);
    if (rc < 0)
        return rc;
    *entry = (struct journal_entry){.source = p->linears[it->cut].source_hash,
                                    .packed = it->out.written[0].hash,
                                    .scales = it->out.written[1].hash,
                                    .stats = l->stats,
                                    .tuned = l->tuned,
                                    .n_nonfinite = l->n_nonfinite};
    if (q->zeros.data)
        entry->zeros = it->out.written[3].hash;
    note_result(p, it, entry);
    return 0;
}

int pipeline_recall(struct pipeline *p, const struct linear_plan *linear, const struct qmat *q,
                    const struct journal_entry *entry)
{
    const struct item *it = find_item(p, linear);
    const struct hash128 expected[3] = {entry->packed, entry->scales, entry->zeros};
    if (!hash_equal(p->linears[it->cut].source_hash, entry->source))
        return 0;
    int rc = linear_out_get(&it->out, p->writer, q->packed.data, q->scales.data, q->zeros.data, expected);
    if (rc <= 0)
        return rc;
    it->out.written[0].hash = entry->packed;
    rc = pipeline_put_steps(p, it, q->scales.data,
                            q->zeros.data); /* the last tensors may not have been written */
    if (!rc)
        note_result(p, it, entry);
    return rc ? rc : 1;
}

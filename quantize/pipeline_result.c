/* What is written of a quantized linear: whole tensors, from memory. And the results of calibrated recipes, which come
 * in that form; read back, too, where an earlier run had finished them. */
#include "quantize/pipeline_impl.h"

#include "base/err.h"
#include "base/mem.h"

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

/* A whole tensor's hash. shape: rows and columns, or columns alone. */
static int hash_whole(const void *data, enum dtype dtype, int n_dims, const int64_t *shape,
                      struct hash128 *hash)
{
    const int64_t rows = n_dims == 2 ? shape[0] : 1, cols = shape[n_dims - 1];
    const size_t n = (size_t)pipeline_pieces(rows, tensor_piece_rows(cols, dtype));
    struct hash128 *pieces = mem_alloc(n, sizeof *pieces, "tensor hashes");
    if (!pieces)
        return ERR_MEMORY;
    pipeline_hash_rows(data, cols, dtype, 0, rows, pieces);
    const int rc = tensor_hash_combine(pieces, n, dtype, n_dims, shape, hash);
    free(pieces);
    return rc;
}

static size_t whole_bytes(enum dtype dtype, int n_dims, const int64_t *shape)
{
    return (size_t)(shape[0] * (n_dims == 2 ? shape[1] : 1)) * dtype_bytes(dtype);
}

/* Writes a whole tensor and returns its hash. */
static int put_whole(struct pipeline *p, size_t id, const void *data, enum dtype dtype, int n_dims,
                     const int64_t *shape, struct hash128 *hash)
{
    const int rc = hash_whole(data, dtype, n_dims, shape, hash);
    return rc ? rc : writer_put(p->writer, id, 0, data, whole_bytes(dtype, n_dims, shape));
}

/* Reads one back: 1 where it has that hash, else 0. */
static int get_whole(const struct pipeline *p, size_t id, void *data, enum dtype dtype, int n_dims,
                     const int64_t *shape, const struct hash128 *expected)
{
    struct hash128 hash;
    int rc = writer_get(p->writer, id, 0, data, whole_bytes(dtype, n_dims, shape));
    if (!rc)
        rc = hash_whole(data, dtype, n_dims, shape, &hash);
    return rc ? rc : hash_equal(hash, *expected);
}

/* --- zero points ------------------------------------------------------------------------------------------------ */

/* As they are stored. */
struct packed_zeros {
    uint32_t *words;
    int64_t shape[2];
};

static int alloc_zeros(const struct item *it, struct packed_zeros *z)
{
    const struct quant_scheme s = it->linear->scheme;
    *z = (struct packed_zeros){
        .shape = {quant_zero_rows(s, it->source->shape[0]), quant_groups(s, it->source->shape[1])}};
    z->words = mem_alloc((size_t)(z->shape[0] * z->shape[1]), sizeof *z->words, "zero points");
    return z->words ? 0 : ERR_MEMORY;
}

static int put_zeros(struct pipeline *p, const struct item *it, const int8_t *zeros, struct hash128 *hash)
{
    struct packed_zeros z;
    int rc = alloc_zeros(it, &z);
    if (rc < 0)
        return rc;
    quant_pack_zeros(it->linear->scheme, zeros, it->source->shape[0], z.shape[1], z.words);
    rc = put_whole(p, it->zero_id, z.words, DTYPE_I32, 2, z.shape, hash);
    free(z.words);
    return rc;
}

static int get_zeros(const struct pipeline *p, const struct item *it, int8_t *zeros,
                     const struct hash128 *expected)
{
    struct packed_zeros z;
    int rc = alloc_zeros(it, &z);
    if (rc < 0)
        return rc;
    rc = get_whole(p, it->zero_id, z.words, DTYPE_I32, 2, z.shape, expected);
    if (rc > 0)
        quant_unpack_zeros(it->linear->scheme, z.words, it->source->shape[0], z.shape[1], zeros);
    free(z.words);
    return rc;
}

int pipeline_put_scales(struct pipeline *p, const struct item *it, const uint16_t *scales,
                        const int8_t *zeros, struct written_tensor *out)
{
    const struct quant_scheme s = it->linear->scheme;
    const int64_t rows = it->source->shape[0], cols = it->source->shape[1], groups = quant_groups(s, cols);
    int rc = put_whole(p, it->scale_id, scales, DTYPE_BF16, 2, (int64_t[]){rows, groups}, &out[1].hash);
    if (!rc)
        rc = put_whole(p, it->shape_id, (int64_t[]){rows, cols}, DTYPE_I64, 1, (int64_t[]){2}, &out[2].hash);
    return rc || s.symmetric ? rc : put_zeros(p, it, zeros, &out[3].hash);
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
    struct written_tensor *out = &p->written[it->written];
    int rc = put_whole(p, it->id, q->packed.data, DTYPE_I32, 2, (int64_t[]){q->packed.rows, q->packed.cols},
                       &out[0].hash);
    if (!rc)
        rc = pipeline_put_scales(p, it, q->scales.data, q->zeros.data, out);
    if (rc < 0)
        return rc;
    *entry = (struct journal_entry){.source = p->linears[it->cut].source_hash,
                                    .packed = out[0].hash,
                                    .scales = out[1].hash,
                                    .stats = l->stats,
                                    .tuned = l->tuned,
                                    .n_nonfinite = l->n_nonfinite};
    if (q->zeros.data)
        entry->zeros = out[3].hash;
    note_result(p, it, entry);
    return 0;
}

int pipeline_recall(struct pipeline *p, const struct linear_plan *linear, const struct qmat *q,
                    const struct journal_entry *entry)
{
    const struct item *it = find_item(p, linear);
    struct written_tensor *out = &p->written[it->written];
    if (!hash_equal(p->linears[it->cut].source_hash, entry->source))
        return 0;
    int rc = get_whole(p, it->id, q->packed.data, DTYPE_I32, 2, (int64_t[]){q->packed.rows, q->packed.cols},
                       &entry->packed);
    if (rc > 0)
        rc = get_whole(p, it->scale_id, q->scales.data, DTYPE_BF16, 2,
                       (int64_t[]){q->scales.rows, q->scales.cols}, &entry->scales);
    if (rc > 0 && q->zeros.data)
        rc = get_zeros(p, it, q->zeros.data, &entry->zeros);
    if (rc <= 0)
        return rc;
    out[0].hash = entry->packed;
    rc = pipeline_put_scales(p, it, q->scales.data, q->zeros.data,
                             out); /* the shape may not have been written yet */
    if (!rc)
        note_result(p, it, entry);
    return rc ? rc : 1;
}

#include "quantize/linear_out.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_layout.h"
#include "formats/safetensors.h"

#include <stdlib.h>

/* --- whole tensors ---------------------------------------------------------------------------------------------- */

/* shape: rows and columns, or columns alone. */
struct whole {
    enum dtype dtype;
    int n_dims;
    int64_t shape[2];
};

static size_t whole_bytes(const struct whole *t)
{
    return (size_t)(t->shape[0] * (t->n_dims == 2 ? t->shape[1] : 1)) * dtype_bytes(t->dtype);
}

static int hash_whole(const void *data, const struct whole *t, struct hash128 *hash)
{
    const int64_t rows = t->n_dims == 2 ? t->shape[0] : 1, cols = t->shape[t->n_dims - 1];
    const int64_t piece_rows = tensor_piece_rows(cols, t->dtype);
    const size_t n = (size_t)((rows + piece_rows - 1) / piece_rows);
    const size_t row_bytes = (size_t)cols * dtype_bytes(t->dtype);
    struct hash128 *pieces = mem_alloc(n, sizeof *pieces, "tensor hashes");
    if (!pieces)
        return ERR_MEMORY;
    for (int64_t r = 0; r < rows; r += piece_rows) {
        const int64_t left = rows - r, count = left < piece_rows ? left : piece_rows;
        pieces[r / piece_rows] =
            hash_bytes((const char *)data + (size_t)r * row_bytes, (size_t)count * row_bytes);
    }
    const int rc = tensor_hash_combine(pieces, n, t->dtype, t->n_dims, t->shape, hash);
    free(pieces);
    return rc;
}

static int put_whole(const struct writer *w, size_t id, const void *data, const struct whole *t,
                     struct hash128 *hash)
{
    const int rc = hash_whole(data, t, hash);
    return rc ? rc : writer_put(w, id, 0, data, whole_bytes(t));
}

/* 1 where it has that hash, else 0. */
static int get_whole(const struct writer *w, size_t id, void *data, const struct whole *t,
                     const struct hash128 *expected)
{
    struct hash128 hash;
    int rc = writer_get(w, id, 0, data, whole_bytes(t));
    if (!rc)
        rc = hash_whole(data, t, &hash);
    return rc ? rc : hash_equal(hash, *expected);
}

/* --- what a linear consists of ---------------------------------------------------------------------------------- */

bool linear_out_by_rows(const struct linear_out *o)
{
    return o->format == QUANT_COMPRESSED_TENSORS;
}

static struct whole codes_of(const struct linear_out *o)
{
    const int64_t words = quant_packed_cols(o->scheme, o->cols);
    return linear_out_by_rows(o) ? (struct whole){DTYPE_I32, 2, {o->rows, words}}
                                 : (struct whole){DTYPE_I32, 2, {words, o->rows}};
}

static struct whole scales_of(const struct linear_out *o)
{
    const int64_t groups = quant_groups(o->scheme, o->cols);
    return linear_out_by_rows(o) ? (struct whole){DTYPE_BF16, 2, {o->rows, groups}}
                                 : (struct whole){DTYPE_F16, 2, {groups, o->rows}};
}

static struct whole zeros_of(const struct linear_out *o)
{
    const int64_t groups = quant_groups(o->scheme, o->cols), words = quant_zero_rows(o->scheme, o->rows);
    return linear_out_by_rows(o) ? (struct whole){DTYPE_I32, 2, {words, groups}}
                                 : (struct whole){DTYPE_I32, 2, {groups, words}};
}

static struct whole closing_of(const struct linear_out *o)
{
    return linear_out_by_rows(o) ? (struct whole){DTYPE_I64, 1, {2}}
                                 : (struct whole){DTYPE_I32, 1, {o->cols}};
}

static bool has_closing(const struct linear_out *o)
{
    return o->format != QUANT_AUTO_ROUND;
}

/* Transposed, symmetric linears have zero points too. */
static bool has_zeros(const struct linear_out *o)
{
    return !linear_out_by_rows(o) || !o->scheme.symmetric;
}

static int announce(struct linear_out *o, struct writer *w, const char *module, const char *suffix,
                    const struct whole *t, size_t *n, size_t *id)
{
    char *name = mem_printf("%s%s", module, suffix);
    if (!name)
        return ERR_MEMORY;
    o->written[(*n)++].name = name;
    return writer_add(w, name, module, t->dtype, t->n_dims, t->shape, id);
}

int linear_out_announce(struct linear_out *o, struct writer *w, const char *module,
                        struct written_tensor *written, size_t *n)
{
    const bool by_rows = linear_out_by_rows(o);
    const struct whole codes = codes_of(o), scales = scales_of(o), zeros = zeros_of(o),
                       closing = closing_of(o);
    o->written = written;
    *n = 0;
    int rc = announce(o, w, module, by_rows ? QUANT_PACKED : QUANT_QWEIGHT, &codes, n, &o->codes_id);
    if (!rc)
        rc = announce(o, w, module, by_rows ? QUANT_SCALE : QUANT_SCALES, &scales, n, &o->scales_id);
    if (!rc && has_closing(o))
        rc = announce(o, w, module, by_rows ? QUANT_SHAPE : QUANT_G_IDX, &closing, n, &o->closing_id);
    if (!rc && has_zeros(o))
        rc = announce(o, w, module, by_rows ? QUANT_ZERO : QUANT_QZEROS, &zeros, n, &o->zeros_id);
    return rc;
}

static struct written_tensor *written_zeros(const struct linear_out *o)
{
    return &o->written[has_closing(o) ? 3 : 2];
}

/* --- writing ---------------------------------------------------------------------------------------------------- */

int linear_out_put_words(const struct linear_out *o, const struct writer *w, const uint32_t *words)
{
    const struct whole t = codes_of(o);
    return put_whole(w, o->codes_id, words, &t, &o->written[0].hash);
}

int linear_out_put_codes(const struct linear_out *o, const struct writer *w, const uint32_t *codes)
{
    const struct whole t = codes_of(o);
    if (linear_out_by_rows(o))
        return linear_out_put_words(o, w, codes);
    uint32_t *words = mem_alloc_aligned(whole_bytes(&t), "transposed codes");
    if (!words)
        return ERR_MEMORY;
    layout_transpose(codes, o->rows, t.shape[0], words, o->rows);
    const int rc = linear_out_put_words(o, w, words);
    free(words);
    return rc;
}

static int put_scales(const struct linear_out *o, const struct writer *w, const float *scales)
{
    const struct whole t = scales_of(o);
    const int64_t groups = quant_groups(o->scheme, o->cols);
    uint16_t *out = mem_alloc_aligned(whole_bytes(&t), "scales");
    if (!out)
        return ERR_MEMORY;
    const int64_t bad = layout_write_scales(scales, o->rows, groups, !linear_out_by_rows(o), t.dtype, out);
    const int rc =
        bad < 0 ? put_whole(w, o->scales_id, out, &t, &o->written[1].hash)
                : err_set(ERR_UNSUPPORTED,
                          "tensor '%s': the scale of row %lld, group %lld is %.9g, which %s does not have "
                          "exactly; %s stores scales in %s",
                          o->name, (long long)(bad / groups), (long long)(bad % groups), scales[bad],
                          dtype_name(t.dtype), quant_format_names[o->format], dtype_name(t.dtype));
    free(out);
    return rc;
}

static int put_zeros(const struct linear_out *o, const struct writer *w, const int8_t *zeros)
{
    const struct whole t = zeros_of(o);
    uint32_t *words = mem_alloc(1, whole_bytes(&t), "zero points");
    if (!words)
        return ERR_MEMORY;
    if (linear_out_by_rows(o))
        quant_pack_zeros(o->scheme, zeros, o->rows, t.shape[1], words);
    else
        layout_pack_zeros(o->scheme, zeros, o->rows, t.shape[0], 1, words);
    const int rc = put_whole(w, o->zeros_id, words, &t, &written_zeros(o)->hash);
    free(words);
    return rc;
}

static int put_g_idx(const struct linear_out *o, const struct writer *w)
{
    const struct whole t = closing_of(o);
    const int64_t group = o->scheme.group ? o->scheme.group : o->cols;
    int32_t *index = mem_alloc_aligned(whole_bytes(&t), "the order of groups");
    if (!index)
        return ERR_MEMORY;
    for (int64_t c = 0; c < o->cols; c++)
        index[c] = (int32_t)(c / group);
    const int rc = put_whole(w, o->closing_id, index, &t, &o->written[2].hash);
    free(index);
    return rc;
}

int linear_out_put_steps(const struct linear_out *o, const struct writer *w, const float *scales,
                         const int8_t *zeros)
{
    const struct whole shape = closing_of(o);
    int rc = put_scales(o, w, scales);
    if (!rc && linear_out_by_rows(o))
        rc = put_whole(w, o->closing_id, (int64_t[]){o->rows, o->cols}, &shape, &o->written[2].hash);
    else if (!rc && has_closing(o))
        rc = put_g_idx(o, w);
    return rc || !has_zeros(o) ? rc : put_zeros(o, w, zeros);
}

/* --- reading back ----------------------------------------------------------------------------------------------- */

static int get_codes(const struct linear_out *o, const struct writer *w, uint32_t *codes,
                     const struct hash128 *expected)
{
    const struct whole t = codes_of(o);
    if (linear_out_by_rows(o))
        return get_whole(w, o->codes_id, codes, &t, expected);
    uint32_t *words = mem_alloc_aligned(whole_bytes(&t), "transposed codes");
    const int rc = words ? get_whole(w, o->codes_id, words, &t, expected) : ERR_MEMORY;
    if (rc > 0)
        layout_transpose(words, t.shape[0], o->rows, codes, t.shape[0]);
    free(words);
    return rc;
}

static int get_scales(const struct linear_out *o, const struct writer *w, uint16_t *scales,
                      const struct hash128 *expected)
{
    const struct whole t = scales_of(o);
    const int64_t groups = quant_groups(o->scheme, o->cols);
    if (linear_out_by_rows(o))
        return get_whole(w, o->scales_id, scales, &t, expected);
    uint16_t *found = mem_alloc_aligned(whole_bytes(&t), "scales");
    float *values = mem_alloc_aligned(2 * whole_bytes(&t), "scales");
    int rc = found && values ? get_whole(w, o->scales_id, found, &t, expected) : ERR_MEMORY;
    if (rc > 0) {
        layout_read_scales(found, t.dtype, o->rows, groups, true, values);
        rc = layout_write_scales(values, o->rows, groups, false, DTYPE_BF16, scales) < 0;
    }
    free(found);
    free(values);
    return rc;
}

/* Asymmetric, so by rows. */
static int get_zeros(const struct linear_out *o, const struct writer *w, int8_t *zeros,
                     const struct hash128 *expected)
{
    const struct whole t = zeros_of(o);
    uint32_t *words = mem_alloc_aligned(whole_bytes(&t), "zero points");
    const int rc = words ? get_whole(w, o->zeros_id, words, &t, expected) : ERR_MEMORY;
    if (rc > 0)
        quant_unpack_zeros(o->scheme, words, o->rows, t.shape[1], zeros);
    free(words);
    return rc;
}

int linear_out_get(const struct linear_out *o, const struct writer *w, uint32_t *codes, uint16_t *scales,
                   int8_t *zeros, const struct hash128 expected[3])
{
    int rc = get_codes(o, w, codes, &expected[0]);
    if (rc > 0)
        rc = get_scales(o, w, scales, &expected[1]);
    return rc > 0 && zeros ? get_zeros(o, w, zeros, &expected[2]) : rc;
}

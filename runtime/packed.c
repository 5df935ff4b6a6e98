#include "runtime/packed.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_layout.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* --- reading ---------------------------------------------------------------------------------------------------- */

/* Columns [col, col + n) of every row of a matrix. */
static int read_columns(const struct model *m, const struct tensor *t, int64_t col, int64_t n, void *buf)
{
    const size_t size = dtype_bytes(t->dtype), bytes = (size_t)n * size;
    const int64_t rows = t->shape[0], cols = t->shape[1];
    if (n == cols)
        return checkpoint_read(&m->checkpoint, t, 0, (size_t)t->bytes, buf);
    int rc = 0;
    for (int64_t r = 0; !rc && r < rows; r++)
        rc = checkpoint_read(&m->checkpoint, t, (uint64_t)(r * cols + col) * size, bytes,
                             (char *)buf + (size_t)r * bytes);
    return rc;
}

/* Rows [row, row + n) of a matrix. */
static int read_rows(const struct model *m, const struct tensor *t, int64_t row, int64_t n, void *buf)
{
    const uint64_t row_bytes = (uint64_t)t->shape[1] * dtype_bytes(t->dtype);
    return checkpoint_read(&m->checkpoint, t, (uint64_t)row * row_bytes, (size_t)((uint64_t)n * row_bytes),
                           buf);
}

int packed_read_codes(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                      uint32_t *packed)
{
    const struct tensor *t = l->packed;
    const int64_t words = quant_packed_cols(l->scheme, l->spec->shape[1]);
    const bool awq = m->quant.layout == QUANT_AWQ;
    CHECK(row % PACKED_ROWS == 0);
    if (m->quant.layout == QUANT_BY_ROWS)
        return read_rows(m, t, row, n, packed);
    const int64_t col = awq ? row / 8 : row, n_cols = awq ? n / 8 : n;
    uint32_t *found = mem_alloc_aligned((size_t)(t->shape[0] * n_cols) * sizeof *found, "codes");
    if (!found)
        return ERR_MEMORY;
    const int rc = read_columns(m, t, col, n_cols, found);
    if (!rc && awq)
        layout_unpack_awq(found, t->shape[0], n_cols, packed, words);
    else if (!rc)
        layout_transpose(found, t->shape[0], n, packed, words);
    free(found);
    return rc;
}

static int read_scales(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                       float *scales)
{
    const struct tensor *t = l->scales;
    const bool transposed = m->quant.layout != QUANT_BY_ROWS;
    const int64_t groups = quant_groups(l->scheme, l->spec->shape[1]);
    void *found = mem_alloc_aligned((size_t)(n * groups) * dtype_bytes(t->dtype), "scales");
    if (!found)
        return ERR_MEMORY;
    const int rc = transposed ? read_columns(m, t, row, n, found) : read_rows(m, t, row, n, found);
    if (!rc)
        layout_read_scales(found, t->dtype, n, groups, transposed, scales);
    free(found);
    return rc;
}

/* t: l->zeros, or the zero points of a symmetric linear. *bad: as layout_unpack_zeros. */
static int read_zeros(const struct model *m, const struct model_linear *l, const struct tensor *t,
                      int64_t row, int64_t n, int8_t *zeros, int64_t *bad)
{
    const struct quant_scheme s = l->scheme;
    const int64_t groups = quant_groups(s, l->spec->shape[1]), n_words = quant_zero_rows(s, n);
    const int64_t first = row * s.bits / 32;
    *bad = -1;
    uint32_t *found = mem_alloc_aligned((size_t)(n_words * groups) * sizeof *found, "zero points");
    if (!found)
        return ERR_MEMORY;
    const int rc = m->quant.layout == QUANT_BY_ROWS ? read_rows(m, t, first, n_words, found)
                                                    : read_columns(m, t, first, n_words, found);
    if (!rc && m->quant.layout == QUANT_BY_ROWS)
        quant_unpack_zeros(s, found, n, groups, zeros);
    else if (!rc && m->quant.layout == QUANT_AWQ)
        layout_unpack_awq_zeros(found, n, groups, zeros);
    else if (!rc)
        *bad = layout_unpack_zeros(s, found, n, groups, m->quant.zero_bias, zeros);
    free(found);
    return rc;
}

int packed_read_steps(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                      float *scales, int8_t *zeros)
{
    int64_t bad;
    CHECK(row % PACKED_ROWS == 0);
    const int rc = read_scales(m, l, row, n, scales);
    return rc || !l->zeros ? rc : read_zeros(m, l, l->zeros, row, n, zeros, &bad);
}

int packed_read_all_steps(const struct model *m, const struct model_linear *l, float **scales, int8_t **zeros)
{
    const int64_t rows = l->spec->shape[0];
    const size_t n = (size_t)(rows * quant_groups(l->scheme, l->spec->shape[1]));
    *scales = mem_alloc(n, sizeof **scales, "scales");
    *zeros = l->zeros ? mem_alloc(n, 1, "zero points") : NULL;
    int rc = *scales && (*zeros || !l->zeros) ? 0 : ERR_MEMORY;
    if (!rc)
        rc = packed_read_steps(m, l, 0, rows, *scales, *zeros);
    if (rc < 0) {
        free(*scales);
        free(*zeros);
        *scales = NULL;
        *zeros = NULL;
    }
    return rc;
}

int packed_read_weights(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                        uint16_t *out)
{
    const int64_t cols = l->spec->shape[1], groups = quant_groups(l->scheme, cols);
    const size_t n_words = (size_t)(n * quant_packed_cols(l->scheme, cols)), n_steps = (size_t)(n * groups);
    uint32_t *packed = mem_alloc_aligned(n_words * sizeof *packed, "codes");
    float *scales = mem_alloc_aligned(n_steps * sizeof *scales, "scales");
    int8_t *zeros = l->zeros ? mem_alloc_aligned(n_steps, "zero points") : NULL;
    int rc = packed && scales && (zeros || !l->zeros) ? 0 : ERR_MEMORY;
    if (!rc)
        rc = packed_read_codes(m, l, row, n, packed);
    if (!rc)
        rc = packed_read_steps(m, l, row, n, scales, zeros);
    if (!rc)
        layout_dequantize(l->scheme, packed, scales, zeros, n, cols, out);
    free(packed);
    free(scales);
    free(zeros);
    return rc;
}

struct qmat packed_qmat(const struct model_linear *l, int64_t row, int64_t n, uint32_t *packed,
                        uint16_t *scales, int8_t *zeros)
{
    const int64_t cols = l->spec->shape[1], words = quant_packed_cols(l->scheme, cols),
                  groups = quant_groups(l->scheme, cols);
    return (struct qmat){.packed = {packed, DTYPE_I32, n, words, words},
                         .scales = {scales + row * groups, DTYPE_BF16, n, groups, groups},
                         .zeros = {zeros ? zeros + row * groups : NULL, DTYPE_I8, n, groups, groups},
                         .bits = l->scheme.bits,
                         .group = l->scheme.group ? l->scheme.group : cols,
                         .cols = cols};
}

/* --- checking --------------------------------------------------------------------------------------------------- */

/* What the kernels divide a row into. */
enum { KERNEL_COLUMNS = 16 };

static int check_scales(const struct model *m, struct model_linear *l, char message[PACKED_MESSAGE_BYTES])
{
    const int64_t rows = l->spec->shape[0], groups = quant_groups(l->scheme, l->spec->shape[1]);
    float *scales = mem_alloc_aligned((size_t)(rows * groups) * sizeof *scales, "scales");
    int rc = scales ? read_scales(m, l, 0, rows, scales) : ERR_MEMORY;
    for (int64_t i = 0; !rc && i < rows * groups; i++)
        if (!isfinite(scales[i])) {
            snprintf(message, PACKED_MESSAGE_BYTES, "has a NaN or infinite scale at row %lld, group %lld",
                     (long long)(i / groups), (long long)(i % groups));
            rc = 1;
        }
    if (!rc)
        l->direct &= layout_write_scales(scales, rows, groups, false, DTYPE_BF16, NULL) < 0;
    free(scales);
    return rc;
}

/* Zero points that are stored for a symmetric linear must be the middle of the codes; all must be codes. */
static int check_zeros(const struct model *m, const struct model_linear *l, const struct tensor *t,
                       char message[PACKED_MESSAGE_BYTES])
{
    const int64_t rows = l->spec->shape[0], groups = quant_groups(l->scheme, l->spec->shape[1]);
    const int half = 1 << (l->scheme.bits - 1);
    int64_t bad = -1;
    int8_t *zeros = mem_alloc_aligned((size_t)(rows * groups), "zero points");
    int rc = zeros ? read_zeros(m, l, t, 0, rows, zeros, &bad) : ERR_MEMORY;
    if (!rc && bad >= 0) {
        snprintf(
            message, PACKED_MESSAGE_BYTES,
            "has zero point %d at row %lld, group %lld, expected at most %d: the layout stores it less one, and "
            "readers differ in what they take this for",
            2 * half, (long long)(bad / groups), (long long)(bad % groups), 2 * half - 1);
        rc = 1;
    }
    for (int64_t i = 0; !rc && l->scheme.symmetric && i < rows * groups; i++)
        if (zeros[i]) {
            snprintf(
                message, PACKED_MESSAGE_BYTES,
                "has zero point %d at row %lld, group %lld, expected %d, as config.json calls it symmetric",
                zeros[i] + half, (long long)(i / groups), (long long)(i % groups), half);
            rc = 1;
        }
    free(zeros);
    return rc;
}

static int check_group_order(const struct model *m, const struct model_linear *l,
                             char message[PACKED_MESSAGE_BYTES])
{
    const int64_t cols = l->spec->shape[1], group = l->scheme.group ? l->scheme.group : cols;
    int32_t *order = mem_alloc_aligned((size_t)l->g_idx->bytes, "the order of groups");
    int rc =
        order ? checkpoint_read(&m->checkpoint, l->g_idx, 0, (size_t)l->g_idx->bytes, order) : ERR_MEMORY;
    for (int64_t c = 0; !rc && c < cols; c++)
        if (order[c] != c / group) {
            snprintf(
                message, PACKED_MESSAGE_BYTES,
                "puts column %lld into group %d, expected %lld: groups in order of activation (desc_act) are not "
                "supported",
                (long long)c, (int)order[c], (long long)(c / group));
            rc = 1;
        }
    free(order);
    return rc;
}

int packed_check(const struct model *m, struct model_linear *l, const struct tensor **object,
                 char message[PACKED_MESSAGE_BYTES])
{
    const struct tensor *zeros = l->zeros ? l->zeros : l->middle;
    int rc = 0;
    l->direct = l->scheme.group % KERNEL_COLUMNS == 0 || l->scheme.group >= l->spec->shape[1];
    *object = l->scales;
    if (l->scales->dtype != DTYPE_BF16)
        rc = check_scales(m, l, message);
    if (!rc && zeros && m->quant.layout != QUANT_BY_ROWS) {
        *object = zeros;
        rc = check_zeros(m, l, zeros, message);
    }
    if (!rc && l->g_idx) {
        *object = l->g_idx;
        rc = check_group_order(m, l, message);
    }
    return rc;
}

#include "kernels/cpu/cpu.h"

#include "base/err.h"

enum { CHUNK = 4096 }; /* columns worked on at a time: 16 KiB of floats */

int cpu_check_float(const struct mat *m, const char *op)
{
    if (m->dtype == DTYPE_BF16 || m->dtype == DTYPE_F16 || m->dtype == DTYPE_F32)
        return 0;
    return err_set(ERR_UNSUPPORTED, "%s: dtype %s, expected BF16, F16 or F32", op, dtype_name(m->dtype));
}

/* The exponent bits that are all set in NaNs and infinities. */
static uint32_t exponent_mask(enum dtype t)
{
    return t == DTYPE_F32 ? 0x7f800000 : t == DTYPE_F16 ? 0x7c00 : 0x7f80;
}

CPU_CLONES static int64_t first_nonfinite_16(const uint16_t *p, int64_t n, uint16_t mask)
{
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t end = i + CHUNK < n ? i + CHUNK : n;
        uint16_t found = 0;
        for (int64_t k = i; k < end; k++)
            found |= (uint16_t)((p[k] & mask) == mask);
        for (int64_t k = i; found && k < end; k++)
            if ((p[k] & mask) == mask)
                return k;
    }
    return -1;
}

CPU_CLONES static int64_t first_nonfinite_32(const uint32_t *p, int64_t n, uint32_t mask)
{
    for (int64_t i = 0; i < n; i++)
        if ((p[i] & mask) == mask)
            return i;
    return -1;
}

static int64_t first_nonfinite(const struct mat *w, int64_t row, int64_t from)
{
    const size_t at = (size_t)(row * w->stride + from);
    const uint32_t mask = exponent_mask(w->dtype);
    const int64_t found =
        w->dtype == DTYPE_F32
            ? first_nonfinite_32((const uint32_t *)w->data + at, w->cols - from, mask)
            : first_nonfinite_16((const uint16_t *)w->data + at, w->cols - from, (uint16_t)mask);
    return found < 0 ? -1 : found + from;
}

int cpu_find_nonfinite(const struct mat *w, int64_t *index)
{
    const int rc = cpu_check_float(w, "find_nonfinite");
    *index = -1;
    for (int64_t r = 0; !rc && *index < 0 && r < w->rows; r++) {
        const int64_t col = first_nonfinite(w, r, 0);
        if (col >= 0)
            *index = r * w->cols + col;
    }
    return rc;
}

int cpu_zero_nonfinite(const struct mat *w, int64_t *count)
{
    const int rc = cpu_check_float(w, "zero_nonfinite");
    *count = 0;
    for (int64_t r = 0; !rc && r < w->rows; r++)
        for (int64_t col = 0; (col = first_nonfinite(w, r, col)) >= 0; ++*count)
            memset((char *)w->data + (size_t)(r * w->stride + col) * dtype_bytes(w->dtype), 0,
                   dtype_bytes(w->dtype));
    return rc;
}

/* Float lanes over one chunk of a row, doubles beyond. */
CPU_CLONES static void row_squared_error(const struct mat *a, const struct mat *b, int64_t row, double *error,
                                         double *reference)
{
    float x[CHUNK], y[CHUNK];
    for (int64_t c = 0; c < a->cols; c += CHUNK) {
        const int64_t n = a->cols - c < CHUNK ? a->cols - c : CHUNK;
        load_row(a, row, c, n, x);
        load_row(b, row, c, n, y);
        vfloat sum_error = {0}, sum_reference = {0};
        for (int64_t i = 0; i < n; i += LANES) {
            const vfloat u = vload(x + i), d = u - vload(y + i);
            sum_error += d * d;
            sum_reference += u * u;
        }
        *error += (double)vsum(sum_error);
        *reference += (double)vsum(sum_reference);
    }
}

int cpu_squared_error(const struct mat *a, const struct mat *b, double *error, double *reference)
{
    int rc = cpu_check_float(a, "squared_error");
    if (!rc)
        rc = cpu_check_float(b, "squared_error");
    CHECK(a->rows == b->rows && a->cols == b->cols);
    *error = *reference = 0;
    for (int64_t r = 0; !rc && r < a->rows; r++)
        row_squared_error(a, b, r, error, reference);
    return rc;
}

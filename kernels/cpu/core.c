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

int cpu_find_nonfinite(const struct backend *b, const struct mat *w, int64_t *index)
{
    (void)b;
    const int rc = cpu_check_float(w, "find_nonfinite");
    *index = -1;
    for (int64_t r = 0; !rc && *index < 0 && r < w->rows; r++) {
        const int64_t col = first_nonfinite(w, r, 0);
        if (col >= 0)
            *index = r * w->cols + col;
    }
    return rc;
}

int cpu_zero_nonfinite(const struct backend *b, const struct mat *w, int64_t *count)
{
    (void)b;
    const int rc = cpu_check_float(w, "zero_nonfinite");
    *count = 0;
    for (int64_t r = 0; !rc && r < w->rows; r++)
        for (int64_t col = 0; (col = first_nonfinite(w, r, col)) >= 0; ++*count)
            memset((char *)w->data + (size_t)(r * w->stride + col) * dtype_bytes(w->dtype), 0,
                   dtype_bytes(w->dtype));
    return rc;
}

/* The same in double, for values whose squares leave FP32's range. */
static void add_squares_precisely(const float *u, const float *v, int64_t n, double sums[2])
{
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)u[i] - (double)v[i];
        sums[0] += d * d;
        sums[1] += (double)u[i] * (double)u[i];
    }
}

/* Columns [col, col + n) of a row: float lanes over one chunk, doubles beyond. Adds to sums. */
CPU_CLONES static void row_squared_error(const struct mat *x, const struct mat *y, int64_t row, int64_t col,
                                         int64_t n, double sums[2])
{
    float u[CHUNK], v[CHUNK];
    for (int64_t c = 0; c < n; c += CHUNK) {
        const int64_t part = n - c < CHUNK ? n - c : CHUNK;
        load_row(x, row, col + c, part, u);
        load_row(y, row, col + c, part, v);
        vfloat error = {0}, reference = {0};
        for (int64_t i = 0; i < part; i += LANES) {
            const vfloat a = vload(u + i), d = a - vload(v + i);
            error += d * d;
            reference += a * a;
        }
        const float whole = vsum(reference);
        if (whole > 1e-30f && whole < 1e30f) {
            sums[0] += (double)vsum(error);
            sums[1] += (double)whole;
        } else {
            add_squares_precisely(u, v, part, sums);
        }
    }
}

static int check_pair(const struct mat *x, const struct mat *y)
{
    CHECK(x->rows == y->rows && x->cols == y->cols);
    const int rc = cpu_check_float(x, "squared_error");
    return rc ? rc : cpu_check_float(y, "squared_error");
}

int cpu_squared_error(const struct backend *b, const struct mat *x, const struct mat *y, double sums[2])
{
    (void)b;
    const int rc = check_pair(x, y);
    sums[0] = sums[1] = 0;
    for (int64_t r = 0; !rc && r < x->rows; r++)
        row_squared_error(x, y, r, 0, x->cols, sums);
    return rc;
}

int cpu_group_squared_error(const struct backend *b, const struct mat *x, const struct mat *y, int64_t group,
                            double *sums)
{
    (void)b;
    const int rc = check_pair(x, y);
    CHECK(group > 0);
    for (int64_t r = 0; !rc && r < x->rows; r++)
        for (int64_t c = 0; c < x->cols; c += group, sums += 2) {
            sums[0] = sums[1] = 0;
            row_squared_error(x, y, r, c, x->cols - c < group ? x->cols - c : group, sums);
        }
    return rc;
}

CPU_CLONES static void row_dot(const struct mat *x, const struct mat *y, int64_t row, double *sum)
{
    float u[CHUNK], v[CHUNK];
    for (int64_t c = 0; c < x->cols; c += CHUNK) {
        const int64_t part = x->cols - c < CHUNK ? x->cols - c : CHUNK;
        load_row(x, row, c, part, u);
        load_row(y, row, c, part, v);
        vfloat products = {0};
        for (int64_t i = 0; i < part; i += LANES)
            products += vload(u + i) * vload(v + i);
        *sum += (double)vsum(products);
    }
}

int cpu_dot(const struct backend *b, const struct mat *x, const struct mat *y, double *sum)
{
    (void)b;
    const int rc = check_pair(x, y);
    *sum = 0;
    for (int64_t r = 0; !rc && r < x->rows; r++)
        row_dot(x, y, r, sum);
    return rc;
}

int cpu_zero(const struct backend *b, const struct mat *m)
{
    (void)b;
    const size_t each = dtype_bytes(m->dtype);
    for (int64_t r = 0; r < m->rows; r++)
        memset((char *)m->data + (size_t)(r * m->stride) * each, 0, (size_t)m->cols * each);
    return 0;
}

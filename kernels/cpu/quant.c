/* Weights to 4 or 8 bits and back, a group at a time: the group's weights stand as floats in the first-level
 * cache while its scale is found and its codes are rounded. */
#include "kernels/cpu/rounding.h"

#include "base/err.h"

#include <float.h>
#include <math.h>

/* Columns of a group that are held at a time. A group longer than this (one scale a row) is walked in parts. */
enum { PART = 4096 };

struct code_range {
    float low, high; /* −2^(bits−1), 2^(bits−1) − 1 */
};

CPU_INLINE struct code_range code_range(int bits)
{
    const float half = (float)(1 << (bits - 1));
    return (struct code_range){-half, half - 1};
}

CPU_INLINE int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

float cpu_storable_scale(float s)
{
    if (s == 0)
        return 0.0078125f;
    s = half_round_bf16(s);
    return fabsf(s) < FLT_MIN ? copysignf(FLT_MIN, s) : s;
}

/* --- scales --------------------------------------------------------------------------------------------------- */

struct extremes {
    float low, high; /* least and greatest weight, 0 included */
};

CPU_CLONES static struct extremes group_extremes(const struct mat *w, int64_t row, int64_t col, int64_t n)
{
    float x[PART];
    vfloat low = {0}, high = {0};
    for (int64_t at = 0; at < n; at += PART) {
        const int64_t part = min64(n - at, PART);
        load_row(w, row, col + at, part, x);
        for (int64_t i = 0; i < part; i += LANES) {
            low = vmin(low, vload(x + i));
            high = vmax(high, vload(x + i));
        }
    }
    return (struct extremes){vlowest(low), vhighest(high)};
}

/* Squared error of a group under a scale and zero point, with the reciprocal in place of the division: this
 * only ranks candidates. */
CPU_CLONES static float group_error(const struct mat *w, int64_t row, int64_t col, int64_t n, float scale,
                                    float zero, struct code_range range)
{
    float x[PART];
    const float inverse = 1 / scale;
    const vfloat low = vset(range.low - zero), high = vset(range.high - zero);
    vfloat sum = {0};
    for (int64_t at = 0; at < n; at += PART) {
        const int64_t part = min64(n - at, PART);
        load_row(w, row, col + at, part, x);
        for (int64_t i = 0; i < part; i += LANES) {
            const vfloat v = vload(x + i);
            const vfloat d = vround(vmin(vmax(v * inverse, low), high)) * scale - v;
            sum += d * d;
        }
    }
    return vsum(sum);
}

/* The whole range of the group, clipped, over the whole range of codes. */
static struct step asymmetric_step(struct extremes e, struct code_range r, float shrink)
{
    const float width = e.high - e.low, steps = r.high - r.low;
    const float step =
        width <= FLT_MAX ? width * shrink / steps : e.high * shrink / steps - e.low * shrink / steps;
    const float scale = cpu_storable_scale(step);
    const float zero = rintf(r.low - e.low * shrink / scale);
    return (struct step){scale, fminf(fmaxf(zero, r.low), r.high)};
}

struct step cpu_asymmetric_step(float low, float high, float shrink, int bits)
{
    return asymmetric_step((struct extremes){low, high}, code_range(bits), shrink);
}

/* The scale that `range` and `absmax` ask for; `shrink` ≤ 1 clips the extremes. */
static struct step plain_choice(struct extremes e, const struct scale_spec *spec, struct code_range r,
                                bool symmetric, float shrink)
{
    if (!symmetric) /* both rules */
        return asymmetric_step(e, r, shrink);
    const float half_step = r.high + 0.5f;
    if (spec->rule == SCALE_ABSMAX)
        return (struct step){cpu_storable_scale(fmaxf(-e.low, e.high) * shrink / half_step), 0};
    if (spec->positive_only)
        return (struct step){cpu_storable_scale(fmaxf(e.low / r.low, e.high / half_step) * shrink), 0};
    return (struct step){cpu_storable_scale((e.high > -e.low ? e.high : e.low) * shrink / r.low), 0};
}

/* Candidates of the least-squares search: the extreme at the lowest code and at the highest, each clipped in
 * steps of 3 % down to 67 %; then the two neighbours half a step away from the best. Finer ladders and a wider
 * range changed the error by less than 0.1 %. */
static struct step mse_choice(const struct mat *w, int64_t row, int64_t col, int64_t n, const struct qmat *q,
                              const struct scale_spec *spec)
{
    const struct code_range r = code_range(q->bits);
    const bool symmetric = !q->zeros.data;
    const struct extremes e = group_extremes(w, row, col, n);
    const struct scale_spec range = {SCALE_RANGE, spec->positive_only};
    const float extreme = e.high > -e.low ? e.high : e.low, step = 0.03f;
    const int n_steps = 12, n_ends = symmetric && !spec->positive_only ? 2 : 1;
    struct step best = plain_choice(e, &range, r, symmetric, 1);
    float best_error = group_error(w, row, col, n, best.scale, best.zero, r), best_shrink = 1;
    int best_end = 0;
    for (int pass = 0; pass < 2; pass++) {
        const float centre = best_shrink;
        const int end_from = pass ? best_end : 0, end_to = pass ? best_end + 1 : n_ends;
        for (int end = end_from; end < end_to; end++)
            for (int i = 0; i < (pass ? 2 : n_steps); i++) {
                const float shrink = pass ? centre + (i ? 0.5f : -0.5f) * step : 1 - (float)i * step;
                const struct step c = end ? (struct step){cpu_storable_scale(extreme * shrink / r.high), 0}
                                          : plain_choice(e, &range, r, symmetric, shrink);
                const float error = group_error(w, row, col, n, c.scale, c.zero, r);
                if (error < best_error) {
                    best = c;
                    best_error = error;
                    best_shrink = shrink;
                    best_end = end;
                }
            }
    }
    return best;
}

static int check_qmat(const struct qmat *q, const char *op)
{
    if (q->bits != 4 && q->bits != 8)
        return err_set(ERR_UNSUPPORTED, "%s: %d bits, expected 4 or 8", op, q->bits);
    CHECK(q->group > 0 && q->scales.dtype == DTYPE_BF16);
    if (q->group % LANES && q->group < q->cols) /* a group begins at a whole vector of its row */
        return err_set(ERR_UNSUPPORTED, "%s: groups of %d columns, expected a multiple of %d or whole rows",
                       op, (int)q->group, LANES);
    CHECK(q->scales.cols == (q->cols + q->group - 1) / q->group);
    CHECK(!q->zeros.data || (q->zeros.dtype == DTYPE_I8 && q->zeros.cols == q->scales.cols));
    return 0;
}

static int find_scales(const struct backend *b, const struct mat *w, const struct scale_spec *spec,
                       struct qmat *q)
{
    (void)b;
    int rc = cpu_check_float(w, "find_scales");
    if (rc < 0 || (rc = check_qmat(q, "find_scales")) < 0)
        return rc;
    CHECK(w->cols == q->cols && w->rows == q->scales.rows);
    const struct code_range range = code_range(q->bits);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t g = 0; g < q->scales.cols; g++) {
            const int64_t col = g * q->group, n = min64(q->group, w->cols - col);
            const struct step c = spec->rule == SCALE_MSE ? mse_choice(w, r, col, n, q, spec)
                                                          : plain_choice(group_extremes(w, r, col, n), spec,
                                                                         range, !q->zeros.data, 1);
            ((uint16_t *)q->scales.data)[r * q->scales.stride + g] = half_to_bf16(c.scale);
            if (q->zeros.data)
                ((int8_t *)q->zeros.data)[r * q->zeros.stride + g] = (int8_t)c.zero;
        }
    return 0;
}

/* --- codes ---------------------------------------------------------------------------------------------------- */

/* Eight codes in the low nibbles of eight bytes → 32 bits, lowest byte to lowest nibble. */
CPU_INLINE uint32_t pack_nibbles(uint64_t x)
{
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (uint32_t)(x | x >> 16);
}

CPU_INLINE uint64_t unpack_nibbles(uint32_t word)
{
    uint64_t x = word;
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
}

/* Codes (q + 2^(bits−1)) of columns [col, col + n) of a row; `codes` has room up to a multiple of LANES. */
CPU_INLINE void round_codes(const struct mat *w, const struct qmat *q, int64_t row, int64_t col, int64_t n,
                            uint8_t *codes)
{
    float x[PART];
    const struct code_range range = code_range(q->bits);
    load_row(w, row, col, n, x);
    for (int64_t at = 0; at < n;) {
        const int64_t g = (col + at) / q->group, end = min64((g + 1) * q->group - col, n);
        const struct step s = step_of(q, row, g);
        const vint offset = (vint){0} + (ROUND_MAGIC_BITS + (int32_t)range.low);
        /* a group that ends inside a vector is overwritten by its successor from there on */
        for (int64_t i = at; i < end; i += LANES) {
            const vfloat t = vmin(vmax(vload(x + i) / s.scale + s.zero, vset(range.low)), vset(range.high));
            const vbyte b = __builtin_convertvector((vint)(t + ROUND_MAGIC) - offset, vbyte);
            memcpy(codes + i, &b, sizeof b);
        }
        at = end;
    }
}

CPU_CLONES static void quantize_row(const struct mat *w, struct qmat *q, int64_t row)
{
    uint8_t codes[PART + 2 * LANES];
    uint32_t *words = (uint32_t *)q->packed.data + row * q->packed.stride;
    for (int64_t col = 0; col < w->cols; col += PART) {
        const int64_t n = min64(w->cols - col, PART);
        round_codes(w, q, row, col, n, codes);
        memset(codes + n, 0, 2 * LANES); /* unused bits of the last word are 0 */
        if (q->bits == 8) {
            memcpy(words + col / 4, codes, (size_t)(n + 3) / 4 * 4);
            continue;
        }
        for (int64_t i = 0; i < n; i += 8) {
            uint64_t eight;
            memcpy(&eight, codes + i, sizeof eight);
            words[(col + i) / 8] = pack_nibbles(eight);
        }
    }
}

static int quantize(const struct backend *b, const struct mat *w, struct qmat *q)
{
    (void)b;
    int rc = cpu_check_float(w, "quantize");
    if (rc < 0 || (rc = check_qmat(q, "quantize")) < 0)
        return rc;
    CHECK(w->cols == q->cols && w->rows == q->packed.rows && q->packed.dtype == DTYPE_I32);
    for (int64_t r = 0; r < w->rows; r++)
        quantize_row(w, q, r);
    return 0;
}

/* Dequantized columns [col, col + n) of a row as floats that are BF16 values. */
CPU_INLINE void dequantize_part(const struct qmat *q, int64_t row, int64_t col, int64_t n, float *out)
{
    uint8_t codes[PART + 2 * LANES];
    const uint32_t *words = (const uint32_t *)q->packed.data + row * q->packed.stride;
    if (q->bits == 8)
        memcpy(codes, words + col / 4, (size_t)(n + 3) / 4 * 4);
    else
        for (int64_t i = 0; i < n; i += 8) {
            const uint64_t eight = unpack_nibbles(words[(col + i) / 8]);
            memcpy(codes + i, &eight, sizeof eight);
        }
    const float half = (float)(1 << (q->bits - 1));
    for (int64_t at = 0; at < n;) {
        const int64_t g = (col + at) / q->group, end = min64((g + 1) * q->group - col, n);
        const struct step s = step_of(q, row, g);
        for (int64_t i = at; i < end; i += LANES) {
            vbyte b;
            memcpy(&b, codes + i, sizeof b);
            const vfloat code = __builtin_convertvector(__builtin_convertvector(b, vint), vfloat);
            vstore(out + i, vround_bf16((code - (half + s.zero)) * s.scale));
        }
        at = end;
    }
}

CPU_CLONES static void dequantize_row_bf16(const struct qmat *q, const struct mat *out, int64_t row)
{
    float x[PART + LANES];
    for (int64_t col = 0; col < q->cols; col += PART) {
        const int64_t n = min64(q->cols - col, PART);
        dequantize_part(q, row, col, n, x);
        uint16_t *h = (uint16_t *)out->data + row * out->stride + col;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            const vhalf narrow = __builtin_convertvector((vuint)vload(x + i) >> 16, vhalf);
            memcpy(h + i, &narrow, sizeof narrow);
        }
        for (; i < n; i++)
            h[i] = (uint16_t)(half_bits(x[i]) >> 16);
    }
}

CPU_CLONES static void dequantize_row_floats(const struct qmat *q, int64_t row, float *out)
{
    float x[PART + LANES];
    for (int64_t col = 0; col < q->cols; col += PART) {
        const int64_t n = min64(q->cols - col, PART);
        dequantize_part(q, row, col, n, x);
        memcpy(out + col, x, (size_t)n * sizeof *x);
    }
}

void cpu_dequantize_rows(const struct qmat *q, int64_t row, int64_t n, float *out)
{
    for (int64_t r = 0; r < n; r++)
        dequantize_row_floats(q, row + r, out + r * q->cols);
}

static int dequantize(const struct backend *b, const struct qmat *q, const struct mat *out)
{
    (void)b;
    const int rc = check_qmat(q, "dequantize");
    if (rc < 0)
        return rc;
    if (out->dtype != DTYPE_BF16 && out->dtype != DTYPE_F32)
        return err_set(ERR_UNSUPPORTED, "dequantize: to %s, expected BF16 or F32", dtype_name(out->dtype));
    CHECK(out->cols == q->cols && out->rows == q->packed.rows);
    for (int64_t r = 0; r < out->rows; r++) {
        if (out->dtype == DTYPE_F32)
            dequantize_row_floats(q, r, (float *)out->data + r * out->stride);
        else
            dequantize_row_bf16(q, out, r);
    }
    return 0;
}

const struct quant_ops cpu_quant_ops = {
    .find_scales = find_scales,
    .quantize = quantize,
    .dequantize = dequantize,
    .hessian_add = cpu_hessian_add,
    .hessian_finish = cpu_hessian_finish,
    .diagonal = cpu_diagonal,
    .add_diagonal = cpu_add_diagonal,
    .factorize = cpu_factorize,
    .search_scales = cpu_search_scales,
    .round_codes = cpu_round_codes,
    .sweep_block = cpu_sweep_block,
    .descend_block = cpu_descend_block,
    .group_dots = cpu_group_dots,
    .solve_scales = cpu_solve_scales,
    .residual = cpu_residual,
    .count_clipped = cpu_count_clipped,
    .pack_codes = cpu_pack_codes,
};

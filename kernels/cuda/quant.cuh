/* What the files that make scales and codes share: the rounding of the CPU, step by step, and views of their operands.
 * Nothing here multiplies and adds in one expression but whole_range, whose users are compiled without contraction. */
#ifndef GEMCUT_KERNELS_CUDA_QUANT_CUH
#define GEMCUT_KERNELS_CUDA_QUANT_CUH

#include "kernels/cuda/common.cuh"

enum { LANES = 16 }; /* a group begins at a multiple of these columns */

struct code_range {
    float low, high; /* −2^(bits−1), 2^(bits−1) − 1 */
};

static __host__ __device__ __forceinline__ struct code_range code_range(int bits)
{
    const float half = (float)(1 << (bits - 1));
    return (struct code_range){-half, half - 1};
}

/* The CPU's vmin and vmax: what they make of NaNs is theirs too. */
static __device__ __forceinline__ float lesser(float a, float b)
{
    return a < b ? a : b;
}
static __device__ __forceinline__ float greater(float a, float b)
{
    return a > b ? a : b;
}

/* Adding 1.5·2^23 leaves the nearest integer (ties to even) in the low bits; exact for |x| < 2^22. */
static __device__ const float ROUND_MAGIC = 12582912.0f;
static __device__ const int32_t ROUND_MAGIC_BITS = 0x4b400000;

static __device__ __forceinline__ float round_bf16(float f)
{
    const uint32_t u = __float_as_uint(f);
    const uint32_t h = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16 | 0x40) : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return __uint_as_float(h << 16);
}

/* A scale as it is stored: BF16, never zero and never subnormal; BF16's machine epsilon for an all-zero group. */
static __device__ __forceinline__ float storable_scale(float s)
{
    if (s == 0)
        return 0.0078125f;
    s = round_bf16(s);
    return fabsf(s) < FLT_MIN ? copysignf(FLT_MIN, s) : s;
}

/* The bits of a float that is a BF16 value, and back. */
static __device__ __forceinline__ uint16_t bf16_bits(float bf16_value)
{
    return (uint16_t)(__float_as_uint(bf16_value) >> 16);
}
static __device__ __forceinline__ float bf16_value(uint16_t bits)
{
    return __uint_as_float((uint32_t)bits << 16);
}

struct extremes {
    float low, high; /* least and greatest weight, 0 included */
};

struct choice {
    float scale, zero;
};

/* Asymmetric: the whole range of the group, `shrink` ≤ 1 of it, over the whole range of codes. */
static __device__ __forceinline__ struct choice whole_range(struct extremes e, struct code_range r,
                                                            float shrink)
{
    const float width = e.high - e.low, steps = r.high - r.low;
    const float step =
        width <= FLT_MAX ? width * shrink / steps : e.high * shrink / steps - e.low * shrink / steps;
    const float scale = storable_scale(step);
    const float zero = rintf(r.low - e.low * shrink / scale);
    return (struct choice){scale, fminf(fmaxf(zero, r.low), r.high)};
}

static inline int check_qmat(const struct qmat *q, const char *op)
{
    if (q->bits != 4 && q->bits != 8)
        return err_set(ERR_UNSUPPORTED, "%s: %d bits, expected 4 or 8", op, q->bits);
    CHECK(q->group > 0 && q->scales.dtype == DTYPE_BF16);
    if (q->group % LANES && q->group < q->cols)
        return err_set(ERR_UNSUPPORTED, "%s: groups of %d columns, expected a multiple of %d or whole rows",
                       op, (int)q->group, LANES);
    CHECK(q->scales.cols == (q->cols + q->group - 1) / q->group);
    CHECK(!q->zeros.data || (q->zeros.dtype == DTYPE_I8 && q->zeros.cols == q->scales.cols));
    return 0;
}

/* The scales and zero points of a quantized matrix, and its codes one in a byte, as the kernels take them. */
struct grid_view {
    const uint16_t *scales;
    const int8_t *zeros;
    int8_t *codes; /* q − zero */
    int64_t rows, cols, group, scales_stride, zeros_stride, codes_stride;
    int bits;
};

static inline struct grid_view grid_view_of(const struct qmat *q, const struct mat *codes)
{
    return (struct grid_view){(const uint16_t *)q->scales.data,
                              (const int8_t *)q->zeros.data,
                              (int8_t *)codes->data,
                              codes->rows,
                              codes->cols,
                              q->group,
                              q->scales.stride,
                              q->zeros.stride,
                              codes->stride,
                              q->bits};
}

static inline int check_rounding(const struct rounding *r, const char *op)
{
    int rc = cuda_check_float(r->w, op);
    if (rc < 0 || (rc = check_qmat(r->q, op)) < 0)
        return rc;
    CHECK(r->codes->dtype == DTYPE_I8 && r->codes->rows == r->w->rows && r->codes->cols == r->w->cols);
    CHECK(r->w->cols == r->q->cols && r->w->rows == r->q->scales.rows);
    return 0;
}

struct group_scale {
    float scale, zero;
};

static __device__ __forceinline__ struct group_scale group_scale_at(const struct grid_view &v, int64_t row,
                                                                    int64_t col)
{
    const int64_t g = col / v.group;
    return (struct group_scale){bf16_value(v.scales[row * v.scales_stride + g]),
                                v.zeros ? (float)v.zeros[row * v.zeros_stride + g] : 0};
}

#endif

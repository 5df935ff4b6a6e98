/* Weights to 4 or 8 bits and back. Every number that decides a code or a scale is computed as kernels/cpu/quant.c
 * computes it, step by step and in the same order of summation, so that both give the same bytes; this file is compiled
 * without contraction into fused multiply-adds. 16 threads take a group and hold it as the CPU's 16 lanes do. */
#include "kernels/cuda/quant.cuh"

enum { THREADS = 256 };

/* --- scales ------------------------------------------------------------------------------------------------------- */

/* A group as its 16 threads see it. */
struct group {
    const void *w;
    enum dtype dtype;
    int64_t at, n; /* first element, number of elements */
    int lane;
    unsigned mask; /* of the 16 threads in their warp */
};

/* Columns lane, lane + 16, …; 0 beyond the end of the group, up to a whole vector. */
template <typename F> static __device__ __forceinline__ void for_lane(const struct group &g, F f)
{
    for (int64_t i = g.lane; i < (g.n + LANES - 1) / LANES * LANES; i += LANES)
        f(i < g.n ? load_as_float(g.w, g.dtype, g.at + i) : 0.0f);
}

static __device__ struct extremes group_extremes(const struct group &g)
{
    float low = 0, high = 0;
    for_lane(g, [&](float x) {
        low = lesser(low, x);
        high = greater(high, x);
    });
    for (int i = LANES / 2; i; i >>= 1) {
        low = lesser(low, __shfl_xor_sync(g.mask, low, i, LANES));
        high = greater(high, __shfl_xor_sync(g.mask, high, i, LANES));
    }
    return (struct extremes){low, high};
}

static __device__ float group_error(const struct group &g, float scale, float zero, struct code_range range)
{
    const float inverse = 1 / scale, low = range.low - zero, high = range.high - zero;
    float sum = 0;
    for_lane(g, [&](float x) {
        const float t = lesser(greater(x * inverse, low), high);
        const float d = ((t + ROUND_MAGIC) - ROUND_MAGIC) * scale - x;
        sum += d * d;
    });
    for (int i = LANES / 2; i; i >>= 1) /* lane i and lane i + 8, then 4, 2, 1 */
        sum += __shfl_xor_sync(g.mask, sum, i, LANES);
    return sum;
}

static __device__ struct choice plain_choice(struct extremes e, struct scale_spec spec, struct code_range r,
                                             bool symmetric, float shrink)
{
    if (!symmetric)
        return whole_range(e, r, shrink);
    const float half_step = r.high + 0.5f;
    if (spec.rule == SCALE_ABSMAX)
        return (struct choice){storable_scale(fmaxf(-e.low, e.high) * shrink / half_step), 0};
    if (spec.positive_only)
        return (struct choice){storable_scale(fmaxf(e.low / r.low, e.high / half_step) * shrink), 0};
    return (struct choice){storable_scale((e.high > -e.low ? e.high : e.low) * shrink / r.low), 0};
}

/* The ladder of kernels/cpu/quant.c. */
static __device__ struct choice mse_choice(const struct group &g, struct scale_spec spec, struct code_range r,
                                           bool symmetric)
{
    const struct extremes e = group_extremes(g);
    const struct scale_spec range = {SCALE_RANGE, spec.positive_only};
    const float extreme = e.high > -e.low ? e.high : e.low, step = 0.03f;
    const int n_steps = 12, n_ends = symmetric && !spec.positive_only ? 2 : 1;
    struct choice best = plain_choice(e, range, r, symmetric, 1);
    float best_error = group_error(g, best.scale, best.zero, r), best_shrink = 1;
    int best_end = 0;
    for (int pass = 0; pass < 2; pass++) {
        const float centre = best_shrink;
        const int end_from = pass ? best_end : 0, end_to = pass ? best_end + 1 : n_ends;
        for (int end = end_from; end < end_to; end++)
            for (int i = 0; i < (pass ? 2 : n_steps); i++) {
                const float shrink = pass ? centre + (i ? 0.5f : -0.5f) * step : 1 - (float)i * step;
                struct choice c = plain_choice(e, range, r, symmetric, shrink);
                if (end)
                    c = (struct choice){storable_scale(extreme * shrink / r.high), 0};
                const float error = group_error(g, c.scale, c.zero, r);
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

struct scales_job {
    const void *w;
    enum dtype dtype;
    int64_t cols, w_stride, group, per_row, n_groups, scales_stride, zeros_stride;
    struct scale_spec spec;
    int bits;
    uint16_t *scales;
    int8_t *zeros;
};

static __global__ void find_scales_kernel(struct scales_job j)
{
    const int64_t index = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    if (index >= j.n_groups)
        return;
    const int64_t row = index / j.per_row, part = index % j.per_row, col = part * j.group;
    const struct group g = {j.w,
                            j.dtype,
                            row * j.w_stride + col,
                            j.cols - col < j.group ? j.cols - col : j.group,
                            (int)(threadIdx.x % LANES),
                            0xffffu << (threadIdx.x & LANES)};
    const struct code_range range = code_range(j.bits);
    const bool symmetric = !j.zeros;
    const struct choice c = j.spec.rule == SCALE_MSE
                                ? mse_choice(g, j.spec, range, symmetric)
                                : plain_choice(group_extremes(g), j.spec, range, symmetric, 1);
    if (g.lane)
        return;
    j.scales[row * j.scales_stride + part] = (uint16_t)(__float_as_uint(round_bf16(c.scale)) >> 16);
    if (j.zeros)
        j.zeros[row * j.zeros_stride + part] = (int8_t)c.zero;
}

static unsigned blocks_for(int64_t n)
{
    return (unsigned)((n + THREADS - 1) / THREADS);
}

extern "C" int cuda_find_scales(const struct backend *b, const struct mat *w, const struct scale_spec *spec,
                                struct qmat *q)
{
    int rc = cuda_check_float(w, "find_scales");
    if (rc < 0 || (rc = check_qmat(q, "find_scales")) < 0)
        return rc;
    CHECK(w->cols == q->cols && w->rows == q->scales.rows);
    const int64_t n = w->rows * q->scales.cols;
    if (n == 0)
        return 0;
    const struct scales_job j = {w->data,
                                 w->dtype,
                                 w->cols,
                                 w->stride,
                                 q->group,
                                 q->scales.cols,
                                 n,
                                 q->scales.stride,
                                 q->zeros.stride,
                                 *spec,
                                 q->bits,
                                 (uint16_t *)q->scales.data,
                                 (int8_t *)q->zeros.data};
    find_scales_kernel<<<blocks_for(n * LANES), THREADS, 0, cuda_state(b)->stream>>>(j);
    return cuda_launched("find_scales");
}

/* --- codes -------------------------------------------------------------------------------------------------------- */

/* A quantized matrix as the kernels take it. */
struct codes {
    uint32_t *packed;
    const uint16_t *scales;
    const int8_t *zeros;
    int64_t cols, group, words, n_words, packed_stride, scales_stride, zeros_stride;
    int bits;
};

static struct codes codes_of(const struct qmat *q)
{
    return (struct codes){(uint32_t *)q->packed.data,
                          (const uint16_t *)q->scales.data,
                          (const int8_t *)q->zeros.data,
                          q->cols,
                          q->group,
                          q->packed.cols,
                          q->packed.rows * q->packed.cols,
                          q->packed.stride,
                          q->scales.stride,
                          q->zeros.stride,
                          q->bits};
}

/* All columns of a word are in one group: groups are multiples of 16 columns. */
static __device__ __forceinline__ struct group_scale scale_of(const struct codes &q, int64_t row, int64_t col)
{
    const int64_t g = col / q.group;
    return (struct group_scale){__uint_as_float((uint32_t)q.scales[row * q.scales_stride + g] << 16),
                                q.zeros ? (float)q.zeros[row * q.zeros_stride + g] : 0};
}

/* A thread for each word. */
static __global__ void quantize_kernel(const void *w, enum dtype dtype, int64_t w_stride, struct codes q)
{
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= q.n_words)
        return;
    const int64_t row = index / q.words, word = index % q.words, per_word = 32 / q.bits,
                  col = word * per_word;
    const struct code_range range = code_range(q.bits);
    const struct group_scale s = scale_of(q, row, col);
    const int32_t offset = ROUND_MAGIC_BITS + (int32_t)range.low;
    uint32_t bits = 0;
    for (int i = 0; i < per_word && col + i < q.cols; i++) {
        const float x = load_as_float(w, dtype, row * w_stride + col + i);
        const float t = lesser(greater(x / s.scale + s.zero, range.low), range.high);
        const uint32_t code = (uint32_t)(__float_as_int(t + ROUND_MAGIC) - offset) & 0xff;
        bits |= (code & ((1u << q.bits) - 1)) << i * q.bits;
    }
    q.packed[row * q.packed_stride + word] = bits;
}

extern "C" int cuda_quantize(const struct backend *b, const struct mat *w, struct qmat *q)
{
    int rc = cuda_check_float(w, "quantize");
    if (rc < 0 || (rc = check_qmat(q, "quantize")) < 0)
        return rc;
    CHECK(w->cols == q->cols && w->rows == q->packed.rows && q->packed.dtype == DTYPE_I32);
    const struct codes c = codes_of(q);
    if (c.n_words == 0)
        return 0;
    quantize_kernel<<<blocks_for(c.n_words), THREADS, 0, cuda_state(b)->stream>>>(w->data, w->dtype,
                                                                                  w->stride, c);
    return cuda_launched("quantize");
}

template <typename T> static __device__ __forceinline__ T store_value(float bf16_value);
template <> __device__ __forceinline__ float store_value<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ uint16_t store_value<uint16_t>(float x)
{
    return (uint16_t)(__float_as_uint(x) >> 16);
}

/* T: the bits of BF16, or float. WHOLE: rows are whole words and aligned to 16 bytes. */
template <typename T, int BITS, bool WHOLE>
static __global__ void dequantize_kernel(struct codes q, T *out, int64_t out_stride)
{
    constexpr int PER_WORD = 32 / BITS;
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= q.n_words)
        return;
    const int64_t row = index / q.words, word = index % q.words, col = word * PER_WORD;
    const struct group_scale s = scale_of(q, row, col);
    const float offset = (float)(1 << (BITS - 1)) + s.zero;
    const uint32_t bits = q.packed[row * q.packed_stride + word];
    struct alignas(sizeof(T) * PER_WORD < 16 ? sizeof(T) * PER_WORD : 16) vec {
        T e[PER_WORD];
    } v;
#pragma unroll
    for (int i = 0; i < PER_WORD; i++)
        v.e[i] =
            store_value<T>(round_bf16(((float)(bits >> i * BITS & ((1u << BITS) - 1)) - offset) * s.scale));
    T *to = out + row * out_stride + col;
    if constexpr (WHOLE) {
        *(struct vec *)to = v;
    } else {
#pragma unroll
        for (int i = 0; i < PER_WORD; i++)
            if (col + i < q.cols)
                to[i] = v.e[i];
    }
}

template <typename T, int BITS>
static void launch_dequantize(const struct codes &q, const struct mat *out, cudaStream_t stream)
{
    const bool whole = q.cols % (32 / BITS) == 0 && (uintptr_t)out->data % 16 == 0 &&
                       (size_t)out->stride * sizeof(T) % 16 == 0;
    (whole ? dequantize_kernel<T, BITS, true>
           : dequantize_kernel<T, BITS, false>)<<<blocks_for(q.n_words), THREADS, 0, stream>>>(
        q, (T *)out->data, out->stride);
}

extern "C" int cuda_dequantize(const struct backend *b, const struct qmat *q, const struct mat *out)
{
    const int rc = check_qmat(q, "dequantize");
    if (rc < 0)
        return rc;
    if (out->dtype != DTYPE_BF16 && out->dtype != DTYPE_F32)
        return err_set(ERR_UNSUPPORTED, "dequantize: to %s, expected BF16 or F32", dtype_name(out->dtype));
    CHECK(out->cols == q->cols && out->rows == q->packed.rows);
    const struct codes c = codes_of(q);
    const cudaStream_t stream = cuda_state(b)->stream;
    if (c.n_words == 0)
        return 0;
    if (out->dtype == DTYPE_BF16)
        (q->bits == 4 ? launch_dequantize<uint16_t, 4> : launch_dequantize<uint16_t, 8>)(c, out, stream);
    else
        (q->bits == 4 ? launch_dequantize<float, 4> : launch_dequantize<float, 8>)(c, out, stream);
    return cuda_launched("dequantize");
}

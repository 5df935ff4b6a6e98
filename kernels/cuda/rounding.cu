/* Codes as bytes, on their way between weights and packed words. What decides a code is computed as quant.cu computes
 * it, so that both give the same; this file too is compiled without contraction into fused multiply-adds. */
#include "kernels/cuda/quant.cuh"

enum { THREADS = 256, PER_THREAD = 4 /* columns: never of two groups, which begin at multiples of LANES */ };

static unsigned blocks_for(int64_t n)
{
    return (unsigned)((n + THREADS - 1) / THREADS);
}

/* The columns of one row that a thread takes; n = 0 where it has none. */
struct share {
    int64_t row, col;
    int n;
};

static __device__ __forceinline__ struct share share_of(int64_t rows, int64_t cols)
{
    const int64_t per_row = (cols + PER_THREAD - 1) / PER_THREAD,
                  index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    struct share s = {index / per_row, index % per_row * PER_THREAD, 0};
    if (s.row < rows)
        s.n = cols - s.col < PER_THREAD ? (int)(cols - s.col) : PER_THREAD;
    return s;
}

static unsigned blocks_of_shares(int64_t rows, int64_t cols)
{
    return blocks_for(rows * ((cols + PER_THREAD - 1) / PER_THREAD));
}

static __global__ void round_codes_kernel(const void *w, enum dtype dtype, int64_t w_stride,
                                          struct grid_view v)
{
    const struct share s = share_of(v.rows, v.cols);
    if (!s.n)
        return;
    const struct code_range range = code_range(v.bits);
    const struct group_scale g = group_scale_at(v, s.row, s.col);
    for (int i = 0; i < s.n; i++) {
        const float x = load_as_float(w, dtype, s.row * w_stride + s.col + i);
        const float t = lesser(greater(x / g.scale + g.zero, range.low), range.high);
        const int32_t q = __float_as_int(t + ROUND_MAGIC) - ROUND_MAGIC_BITS;
        v.codes[s.row * v.codes_stride + s.col + i] = (int8_t)(q - (int32_t)g.zero);
    }
}

extern "C" int cuda_round_codes(const struct backend *b, const struct rounding *r)
{
    const int rc = check_rounding(r, "round_codes");
    if (rc < 0 || r->w->rows == 0 || r->w->cols == 0)
        return rc;
    round_codes_kernel<<<blocks_of_shares(r->w->rows, r->w->cols), THREADS, 0, cuda_state(b)->stream>>>(
        r->w->data, r->w->dtype, r->w->stride, grid_view_of(r->q, r->codes));
    return cuda_launched("round_codes");
}

static __global__ void residual_kernel(const void *w, enum dtype dtype, int64_t w_stride, struct grid_view v,
                                       float *out, int64_t out_stride)
{
    const struct share s = share_of(v.rows, v.cols);
    if (!s.n)
        return;
    const float scale = group_scale_at(v, s.row, s.col).scale;
    for (int i = 0; i < s.n; i++) {
        const float x = load_as_float(w, dtype, s.row * w_stride + s.col + i);
        const float code = (float)v.codes[s.row * v.codes_stride + s.col + i];
        out[s.row * out_stride + s.col + i] = x - round_bf16(code * scale);
    }
}

extern "C" int cuda_residual(const struct backend *b, const struct rounding *r, const struct mat *out)
{
    const int rc = check_rounding(r, "residual");
    if (rc < 0)
        return rc;
    CHECK(out->dtype == DTYPE_F32 && out->rows == r->w->rows && out->cols == r->w->cols);
    if (out->rows == 0 || out->cols == 0)
        return 0;
    residual_kernel<<<blocks_of_shares(out->rows, out->cols), THREADS, 0, cuda_state(b)->stream>>>(
        r->w->data, r->w->dtype, r->w->stride, grid_view_of(r->q, r->codes), (float *)out->data, out->stride);
    return cuda_launched("residual");
}

static __global__ void count_clipped_kernel(const void *w, enum dtype dtype, int64_t w_stride,
                                            struct grid_view v, unsigned long long *count)
{
    const struct share s = share_of(v.rows, v.cols);
    const struct code_range range = code_range(v.bits);
    int n = 0;
    if (s.n) {
        const struct group_scale g = group_scale_at(v, s.row, s.col);
        for (int i = 0; i < s.n; i++) {
            const float t = load_as_float(w, dtype, s.row * w_stride + s.col + i) / g.scale + g.zero;
            n += t < range.low - 0.5f || t > range.high + 0.5f;
        }
    }
    n = warp_sum(n);
    if (threadIdx.x % 32 == 0 && n)
        atomicAdd(count, (unsigned long long)n);
}

extern "C" int cuda_count_clipped(const struct backend *b, const struct rounding *r, int64_t *count)
{
    int rc = check_rounding(r, "count_clipped");
    const cudaStream_t stream = cuda_state(b)->stream;
    if (!rc)
        rc = cuda_status(cudaMemsetAsync(count, 0, sizeof *count, stream), "count_clipped");
    if (rc < 0 || r->w->rows == 0 || r->w->cols == 0)
        return rc;
    count_clipped_kernel<<<blocks_of_shares(r->w->rows, r->w->cols), THREADS, 0, stream>>>(
        r->w->data, r->w->dtype, r->w->stride, grid_view_of(r->q, r->codes), (unsigned long long *)count);
    return cuda_launched("count_clipped");
}

/* A thread for each word, all of whose columns are in one group. */
static __global__ void pack_codes_kernel(struct grid_view v, uint32_t *packed, int64_t words,
                                         int64_t packed_stride)
{
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x, row = index / words,
                  word = index % words;
    if (row >= v.rows)
        return;
    const int per_word = 32 / v.bits;
    const int64_t col = word * per_word;
    const int32_t offset = (int32_t)group_scale_at(v, row, col).zero + (1 << (v.bits - 1));
    uint32_t bits = 0;
    for (int i = 0; i < per_word && col + i < v.cols; i++) {
        const uint32_t code = (uint32_t)(v.codes[row * v.codes_stride + col + i] + offset);
        bits |= (code & ((1u << v.bits) - 1)) << i * v.bits;
    }
    packed[row * packed_stride + word] = bits;
}

extern "C" int cuda_pack_codes(const struct backend *b, const struct mat *codes, const struct qmat *q)
{
    const int rc = check_qmat(q, "pack_codes");
    if (rc < 0)
        return rc;
    CHECK(codes->dtype == DTYPE_I8 && codes->cols == q->cols && codes->rows == q->scales.rows);
    CHECK(q->packed.dtype == DTYPE_I32 && q->packed.rows == codes->rows &&
          q->packed.cols == (q->cols * q->bits + 31) / 32);
    if (q->packed.rows == 0 || q->packed.cols == 0)
        return 0;
    pack_codes_kernel<<<blocks_for(q->packed.rows * q->packed.cols), THREADS, 0, cuda_state(b)->stream>>>(
        grid_view_of(q, codes), (uint32_t *)q->packed.data, q->packed.cols, q->packed.stride);
    return cuda_launched("pack_codes");
}

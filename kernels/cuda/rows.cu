/* What two models' logits say about a token: negative log-likelihood, divergence, the most likely token. A block takes
 * a row and walks it three times: the greatest logit, the sum of exponentials, the divergence. And tokens drawn from
 * logits: the greatest one, then the greatest sum with noise. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 1024, WARPS = THREADS / 32 };

struct top {
    float value;
    int32_t index;
};

/* The greater of two; of equals the first in the row. */
static __device__ __forceinline__ struct top better(struct top a, struct top b)
{
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

/* The best of the threads' own, known to all of them. */
static __device__ struct top block_top(struct top t, struct top *shared)
{
    for (int i = 16; i; i >>= 1)
        t = better(t, (struct top){__shfl_xor_sync(0xffffffffu, t.value, i),
                                   __shfl_xor_sync(0xffffffffu, t.index, i)});
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = t;
    __syncthreads();
    for (int i = 0; i < WARPS; i++)
        t = better(t, shared[i]);
    return t;
}

static __device__ struct top top_of(const float *x, int64_t n, struct top *shared)
{
    struct top t = {x[0], 0};
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        t = better(t, (struct top){x[i], (int32_t)i});
    return block_top(t, shared);
}

/* log Σ e^x; a thread's few hundred terms are added up in FP32, the threads' sums in FP64. */
static __device__ double log_sum_exp(const float *x, int64_t n, float highest, double *shared)
{
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        sum += expf(x[i] - highest);
    return (double)highest + log(block_sum((double)sum, shared));
}

/* Σ p_a·(log p_a − log p_b) */
static __device__ double divergence(const float *a, const float *b, int64_t n, double lse_a, double lse_b,
                                    double *shared)
{
    const float shift = (float)lse_a, difference = (float)(lse_a - lse_b);
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        sum += expf(a[i] - shift) * (a[i] - b[i] - difference);
    return block_sum((double)sum, shared);
}

static __global__ void __launch_bounds__(THREADS)
    compare_rows_kernel(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t n,
                        const int32_t *targets, struct row_comparison *out)
{
    __shared__ struct top tops[WARPS];
    __shared__ double sums[WARPS];
    const int64_t row = blockIdx.x;
    struct row_comparison c = {};
    a += row * a_stride;
    const struct top top_a = top_of(a, n, tops);
    const double lse_a = log_sum_exp(a, n, top_a.value, sums);
    c.top_a = top_a.index;
    c.nll_a = (float)(lse_a - (double)a[targets[row]]);
    if (b) {
        b += row * b_stride;
        const struct top top_b = top_of(b, n, tops);
        const double lse_b = log_sum_exp(b, n, top_b.value, sums);
        c.top_b = top_b.index;
        c.nll_b = (float)(lse_b - (double)b[targets[row]]);
        c.kl = (float)divergence(a, b, n, lse_a, lse_b, sums);
    }
    if (threadIdx.x == 0)
        out[row] = c;
}

extern "C" int cuda_compare_rows(const struct backend *b, const struct mat *logits_a,
                                 const struct mat *logits_b, const int32_t *targets,
                                 struct row_comparison *out)
{
    const int64_t rows = logits_a->rows, cols = logits_a->cols;
    CHECK(logits_a->dtype == DTYPE_F32 &&
          (!logits_b || (logits_b->dtype == DTYPE_F32 && logits_b->rows == rows && logits_b->cols == cols)));
    for (int64_t r = 0; r < rows; r++)
        CHECK(targets[r] >= 0 && targets[r] < cols);
    const size_t target_bytes = ((size_t)rows * sizeof *targets + 255) / 256 * 256;
    if (target_bytes + (size_t)rows * sizeof *out > CUDA_SCRATCH_BYTES)
        return err_set(ERR_UNSUPPORTED, "compare_rows: %lld rows at a time are too many", (long long)rows);
    void *scratch;
    int rc = cuda_scratch(b, &scratch);
    if (rc < 0 || rows == 0)
        return rc;
    const cudaStream_t stream = cuda_state(b)->stream;
    struct row_comparison *result = (struct row_comparison *)((char *)scratch + target_bytes);
    rc = cuda_status(
        cudaMemcpyAsync(scratch, targets, (size_t)rows * sizeof *targets, cudaMemcpyHostToDevice, stream),
        "compare_rows");
    if (rc < 0)
        return rc;
    compare_rows_kernel<<<(unsigned)rows, THREADS, 0, stream>>>(
        (const float *)logits_a->data, logits_a->stride, logits_b ? (const float *)logits_b->data : NULL,
        logits_b ? logits_b->stride : 0, cols, (const int32_t *)scratch, result);
    rc = cuda_launched("compare_rows");
    return rc ? rc : b->core->download(b, out, result, (size_t)rows * sizeof *out);
}

/* --- drawing ---------------------------------------------------------------------------------------------------- */

/* SplitMix64: the states are multiples of GAMMA from a start on, the outputs are their mix64. */
static const uint64_t GAMMA = 0x9e3779b97f4a7c15u;

static __device__ __forceinline__ uint64_t mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* As on the CPU: small v for large g, so that 2^18 columns do not share a few values of it. */
static __device__ __forceinline__ float gumbel(uint32_t h)
{
    const float v = fminf((float)h * 0x1p-32f + 0x1p-33f, 0x1.fffffep-1f);
    return -logf(-log1pf(-v));
}

static __device__ bool block_has_nan(const float *x, int64_t n)
{
    int found = 0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        found |= isnan(x[i]);
    return __syncthreads_or(found);
}

/* out [rows]: −1 where the logits are not finite. */
static __global__ void __launch_bounds__(THREADS)
    sample_rows_kernel(const float *x, int64_t stride, int64_t n, float temperature, uint64_t seed,
                       uint64_t step, int32_t *out)
{
    __shared__ struct top tops[WARPS];
    const int64_t row = blockIdx.x;
    x += row * stride;
    const bool nan = block_has_nan(x, n);
    const struct top highest = top_of(x, n, tops);
    struct top best = highest;
    if (temperature > 0) {
        const uint64_t start = mix64(mix64(seed + (uint64_t)row) + step);
        best = {-INFINITY, 0};
        for (int64_t i = threadIdx.x; i < n; i += THREADS) {
            const uint32_t h = (uint32_t)(mix64(start + (uint64_t)i * GAMMA) >> 32);
            best = better(best, {(x[i] - highest.value) / temperature + gumbel(h), (int32_t)i});
        }
        best = block_top(best, tops);
    }
    if (threadIdx.x == 0)
        out[row] = !nan && isfinite(highest.value) ? best.index : -1;
}

extern "C" int cuda_sample_rows(const struct backend *b, const struct mat *logits, float temperature,
                                uint64_t seed, int64_t step, int32_t *out)
{
    const int64_t rows = logits->rows, cols = logits->cols;
    CHECK(logits->dtype == DTYPE_F32 && cols >= 1 && cols <= INT32_MAX);
    CHECK(temperature >= 0 && step >= 0);
    const size_t bytes = (size_t)rows * sizeof *out;
    if (bytes > CUDA_SCRATCH_BYTES)
        return err_set(ERR_UNSUPPORTED, "sample_rows: %lld rows at a time are too many", (long long)rows);
    void *result;
    int rc = cuda_scratch(b, &result);
    if (rc < 0 || rows == 0)
        return rc;
    sample_rows_kernel<<<(unsigned)rows, THREADS, 0, cuda_state(b)->stream>>>(
        (const float *)logits->data, logits->stride, cols, temperature, seed, (uint64_t)step,
        (int32_t *)result);
    rc = cuda_launched("sample_rows");
    if (!rc)
        rc = b->core->download(b, out, result, bytes);
    for (int64_t r = 0; !rc && r < rows; r++)
        if (out[r] < 0)
            rc = err_set(ERR_FORMAT, "sample_rows: the logits of row %lld are not finite: damaged weights?",
                         (long long)r);
    return rc;
}

/* Operations on matrices as such: values that are not finite, zeros, sums over pairs of elements. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256 };

/* The exponent bits that are all set in NaNs and infinities. */
static uint32_t exponent_mask(enum dtype t)
{
    return t == DTYPE_F32 ? 0x7f800000 : t == DTYPE_F16 ? 0x7c00 : 0x7f80;
}

static int blocks_for(int64_t n)
{
    const int64_t blocks = (n + THREADS - 1) / THREADS;
    return blocks < 1 ? 1 : blocks < REDUCE_BLOCKS ? (int)blocks : REDUCE_BLOCKS;
}

/* T: the bits of an element. Elements are taken from the matrix as if it were one row after another. */
template <typename T>
static __global__ void find_nonfinite_kernel(const T *w, int64_t rows, int64_t cols, int64_t stride, T mask,
                                             unsigned long long *index)
{
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < rows * cols; i += step)
        if ((w[i / cols * stride + i % cols] & mask) == mask)
            atomicMin(index, (unsigned long long)i);
}

/* The same for a matrix without gaps, 16 bytes at a time. */
template <typename T>
static __global__ void find_nonfinite_packed(const uint4 *w, int64_t n, T mask, unsigned long long *index)
{
    constexpr int EACH = 16 / sizeof(T);
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        const uint4 v = w[i];
        const T *e = (const T *)&v;
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if ((e[k] & mask) == mask)
                atomicMin(index, (unsigned long long)(i * EACH + k));
    }
}

template <typename T>
static __global__ void zero_nonfinite_kernel(T *w, int64_t rows, int64_t cols, int64_t stride, T mask,
                                             unsigned long long *count)
{
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < rows * cols; i += step) {
        T *e = w + i / cols * stride + i % cols;
        if ((*e & mask) != mask)
            continue;
        *e = 0;
        atomicAdd(count, 1ull);
    }
}

template <typename T>
static void launch_find(const struct mat *w, T mask, unsigned long long *index, cudaStream_t stream)
{
    const int64_t n = w->rows * w->cols, bytes = n * (int64_t)sizeof(T);
    if (w->stride == w->cols && bytes % 16 == 0 && (uintptr_t)w->data % 16 == 0)
        find_nonfinite_packed<T>
            <<<blocks_for(bytes / 16), THREADS, 0, stream>>>((const uint4 *)w->data, bytes / 16, mask, index);
    else
        find_nonfinite_kernel<T><<<blocks_for(n), THREADS, 0, stream>>>((const T *)w->data, w->rows, w->cols,
                                                                        w->stride, mask, index);
}

extern "C" int cuda_find_nonfinite(const struct backend *b, const struct mat *w, int64_t *index)
{
    int rc = cuda_check_float(w, "find_nonfinite");
    if (rc < 0)
        return rc;
    const cudaStream_t stream = cuda_state(b)->stream;
    const uint32_t mask = exponent_mask(w->dtype);
    /* all bits set: −1, and as an unsigned number greater than every index */
    rc = cuda_status(cudaMemsetAsync(index, 0xff, sizeof *index, stream), "find_nonfinite");
    if (rc < 0 || w->rows * w->cols == 0)
        return rc;
    if (w->dtype == DTYPE_F32)
        launch_find<uint32_t>(w, mask, (unsigned long long *)index, stream);
    else
        launch_find<uint16_t>(w, (uint16_t)mask, (unsigned long long *)index, stream);
    return cuda_launched("find_nonfinite");
}

extern "C" int cuda_zero_nonfinite(const struct backend *b, const struct mat *w, int64_t *count)
{
    int rc = cuda_check_float(w, "zero_nonfinite");
    if (rc < 0)
        return rc;
    const cudaStream_t stream = cuda_state(b)->stream;
    const uint32_t mask = exponent_mask(w->dtype);
    const int64_t n = w->rows * w->cols;
    unsigned long long *total = (unsigned long long *)count;
    rc = cuda_status(cudaMemsetAsync(count, 0, sizeof *count, stream), "zero_nonfinite");
    if (rc < 0 || n == 0)
        return rc;
    if (w->dtype == DTYPE_F32)
        zero_nonfinite_kernel<uint32_t><<<blocks_for(n), THREADS, 0, stream>>>(
            (uint32_t *)w->data, w->rows, w->cols, w->stride, mask, total);
    else
        zero_nonfinite_kernel<uint16_t><<<blocks_for(n), THREADS, 0, stream>>>(
            (uint16_t *)w->data, w->rows, w->cols, w->stride, (uint16_t)mask, total);
    return cuda_launched("zero_nonfinite");
}

/* Gaps between rows keep what they hold. */
extern "C" int cuda_zero(const struct backend *b, const struct mat *m)
{
    const cudaStream_t stream = cuda_state(b)->stream;
    const size_t size = dtype_bytes(m->dtype), width = (size_t)m->cols * size, rows = (size_t)m->rows;
    if (width == 0 || rows == 0)
        return 0;
    if (m->stride == m->cols || rows == 1)
        return cuda_status(cudaMemsetAsync(m->data, 0, rows * width, stream), "zero");
    return cuda_status(cudaMemset2DAsync(m->data, (size_t)m->stride * size, 0, width, rows, stream), "zero");
}

/* --- sums over pairs of elements ---------------------------------------------------------------------------------- */

struct pair {
    const void *x, *y;
    enum dtype x_type, y_type;
    int64_t cols, x_stride, y_stride;
};

static __device__ __forceinline__ void add_squares(const struct pair &p, int64_t row, int64_t col,
                                                   double &error, double &reference)
{
    const float u = load_as_float(p.x, p.x_type, row * p.x_stride + col);
    const float d = u - load_as_float(p.y, p.y_type, row * p.y_stride + col);
    error += (double)d * d;
    reference += (double)u * u;
}

/* Which elements a thread adds up, and in which order, depends on the shape alone. */
static __global__ void squared_error_kernel(struct pair p, int64_t n, double *partials)
{
    __shared__ double shared[THREADS / 32];
    double error = 0, reference = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        add_squares(p, i / p.cols, i % p.cols, error, reference);
    error = block_sum(error, shared);
    reference = block_sum(reference, shared);
    if (threadIdx.x == 0) {
        partials[2 * blockIdx.x] = error;
        partials[2 * blockIdx.x + 1] = reference;
    }
}

/* As above, x·y and 0 in place of (x − y)² and x². */
static __global__ void dot_kernel(struct pair p, int64_t n, double *partials)
{
    __shared__ double shared[THREADS / 32];
    double sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / p.cols, col = i % p.cols;
        sum += (double)load_as_float(p.x, p.x_type, row * p.x_stride + col) *
               (double)load_as_float(p.y, p.y_type, row * p.y_stride + col);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        partials[2 * blockIdx.x] = sum;
        partials[2 * blockIdx.x + 1] = 0;
    }
}

/* sums: the first n_sums of the two */
static __global__ void add_partials(const double *partials, int n, double *sums, int n_sums)
{
    __shared__ double shared[THREADS / 32];
    double error = 0, reference = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        error += partials[2 * i];
        reference += partials[2 * i + 1];
    }
    error = block_sum(error, shared);
    reference = block_sum(reference, shared);
    if (threadIdx.x == 0) {
        sums[0] = error;
        if (n_sums > 1)
            sums[1] = reference;
    }
}

/* A warp for each group. */
static __global__ void group_squared_error_kernel(struct pair p, int64_t n_groups, int64_t per_row,
                                                  int64_t group, double *sums)
{
    const int64_t g = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (g >= n_groups)
        return;
    const int64_t row = g / per_row, from = g % per_row * group;
    const int64_t to = from + group < p.cols ? from + group : p.cols;
    double error = 0, reference = 0;
    for (int64_t c = from + threadIdx.x % 32; c < to; c += 32)
        add_squares(p, row, c, error, reference);
    error = warp_sum(error);
    reference = warp_sum(reference);
    if (threadIdx.x % 32 == 0) {
        sums[2 * g] = error;
        sums[2 * g + 1] = reference;
    }
}

static int make_pair(const struct mat *x, const struct mat *y, const char *op, struct pair *out)
{
    CHECK(x->rows == y->rows && x->cols == y->cols);
    *out = (struct pair){x->data, y->data, x->dtype, y->dtype, x->cols, x->stride, y->stride};
    const int rc = cuda_check_float(x, op);
    return rc ? rc : cuda_check_float(y, op);
}

extern "C" int cuda_squared_error(const struct backend *b, const struct mat *x, const struct mat *y,
                                  double sums[2])
{
    struct pair p;
    const int rc = make_pair(x, y, "squared_error", &p);
    if (rc < 0)
        return rc;
    const struct cuda_state *s = cuda_state(b);
    const int64_t n = x->rows * x->cols;
    const int blocks = blocks_for(n);
    squared_error_kernel<<<blocks, THREADS, 0, s->stream>>>(p, n, s->partials);
    add_partials<<<1, THREADS, 0, s->stream>>>(s->partials, blocks, sums, 2);
    return cuda_launched("squared_error");
}

extern "C" int cuda_dot(const struct backend *b, const struct mat *x, const struct mat *y, double *sum)
{
    struct pair p;
    const int rc = make_pair(x, y, "dot", &p);
    if (rc < 0)
        return rc;
    const struct cuda_state *s = cuda_state(b);
    const int64_t n = x->rows * x->cols;
    const int blocks = blocks_for(n);
    dot_kernel<<<blocks, THREADS, 0, s->stream>>>(p, n, s->partials);
    add_partials<<<1, THREADS, 0, s->stream>>>(s->partials, blocks, sum, 1);
    return cuda_launched("dot");
}

extern "C" int cuda_group_squared_error(const struct backend *b, const struct mat *x, const struct mat *y,
                                        int64_t group, double *sums)
{
    struct pair p;
    const int rc = make_pair(x, y, "squared_error", &p);
    CHECK(group > 0);
    const int64_t per_row = (x->cols + group - 1) / group, n = x->rows * per_row;
    if (rc < 0 || n == 0)
        return rc;
    group_squared_error_kernel<<<(unsigned)((n + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0,
                                 cuda_state(b)->stream>>>(p, n, per_row, group, sums);
    return cuda_launched("squared_error");
}

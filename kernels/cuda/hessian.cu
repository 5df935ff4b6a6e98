/* Hessians H = Σ xᵀx: added up on tensor cores, mirrored, and factorized in FP64 by cuSOLVER. */
#include "kernels/cuda/lt.cuh"

extern "C" {
#include "base/mem.h"
}

#include <cusolverDn.h>
#include <stdlib.h>

enum {
    THREADS = 256,
    TILE = 32, /* a block of 32 × 8 threads takes a tile of 32 × 32 */
    TILE_ROWS = 8,
    PANEL = 1024, /* rows of H: what is computed above the diagonal is at most this wide */
    WHOLE = 4096, /* up to here one product is as fast */
};

/* --- sums --------------------------------------------------------------------------------------------------------- */

static void check_hessian(const struct mat *h)
{
    CHECK(h->dtype == DTYPE_F32 && h->rows == h->cols && h->rows > 0);
}

extern "C" int cuda_hessian_add(const struct backend *b, const struct mat *x, const struct mat *h)
{
    check_hessian(h);
    CHECK(x->cols == h->cols);
    if (x->dtype != DTYPE_BF16)
        return err_set(ERR_UNSUPPORTED, "hessian_add: activations are %s, expected BF16",
                       dtype_name(x->dtype));
    const int64_t k = h->cols, panel = k > WHOLE ? (int64_t)PANEL : k;
    int rc = 0;
    for (int64_t r = 0; !rc && x->rows && r < k; r += panel) {
        const int64_t n = k - r < panel ? k - r : panel;
        const struct mat rows = mat_rows(h, r, n);
        const struct lt_product p = {
            mat_cols(x, r, n), mat_cols(x, 0, r + n), mat_cols(&rows, 0, r + n), true, false, true, 1};
        rc = lt_multiply(b, &p, "hessian_add");
    }
    return rc;
}

static int64_t tiles(int64_t n)
{
    return (n + TILE - 1) / TILE;
}

/* Block (i, j): tile i, j of rows and columns, to its mirror image. */
static __global__ void mirror_kernel(float *h, int64_t n, int64_t stride)
{
    __shared__ float tile[TILE][TILE + 1];
    if (blockIdx.x > blockIdx.y)
        return;
    const int64_t row = (int64_t)blockIdx.y * TILE, col = (int64_t)blockIdx.x * TILE;
    for (int y = threadIdx.y; y < TILE; y += TILE_ROWS)
        if (row + y < n && col + threadIdx.x < n)
            tile[y][threadIdx.x] = h[(row + y) * stride + col + threadIdx.x];
    __syncthreads();
    for (int y = threadIdx.y; y < TILE; y += TILE_ROWS) {
        const int64_t r = col + y, c = row + threadIdx.x;
        if (r < c && c < n)
            h[r * stride + c] = tile[threadIdx.x][y];
    }
}

extern "C" int cuda_hessian_finish(const struct backend *b, const struct mat *h)
{
    check_hessian(h);
    const unsigned n = (unsigned)tiles(h->rows);
    mirror_kernel<<<dim3(n, n), dim3(TILE, TILE_ROWS), 0, cuda_state(b)->stream>>>((float *)h->data, h->rows,
                                                                                   h->stride);
    return cuda_launched("hessian_finish");
}

static __global__ void diagonal_kernel(const float *h, int64_t n, int64_t stride, float *out)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n)
        out[i] = h[i * (stride + 1)];
}

static __global__ void add_diagonal_kernel(float *h, int64_t n, int64_t stride, float value)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n)
        h[i * stride + i] += value;
}

extern "C" int cuda_add_diagonal(const struct backend *b, const struct mat *h, float value)
{
    check_hessian(h);
    add_diagonal_kernel<<<(unsigned)((h->rows + THREADS - 1) / THREADS), THREADS, 0, cuda_state(b)->stream>>>(
        (float *)h->data, h->rows, h->stride, value);
    return cuda_launched("add_diagonal");
}

extern "C" int cuda_diagonal(const struct backend *b, const struct mat *h, float *to)
{
    check_hessian(h);
    const size_t bytes = (size_t)h->rows * sizeof *to;
    CHECK(bytes <= CUDA_SCRATCH_BYTES);
    void *scratch;
    int rc = cuda_scratch(b, &scratch);
    if (rc < 0)
        return rc;
    diagonal_kernel<<<(unsigned)((h->rows + THREADS - 1) / THREADS), THREADS, 0, cuda_state(b)->stream>>>(
        (const float *)h->data, h->rows, h->stride, (float *)scratch);
    rc = cuda_launched("diagonal");
    return rc ? rc : b->core->download(b, to, scratch, bytes);
}

/* --- cuSOLVER ----------------------------------------------------------------------------------------------------- */

struct solver {
    cusolverDnHandle_t handle;
    cusolverDnParams_t params;
    struct buf workspace; /* for matrices so large that the scratch memory is not enough */
};

static int solver_status(cusolverStatus_t e)
{
    if (e == CUSOLVER_STATUS_SUCCESS)
        return 0;
    cudaGetLastError();
    return err_set(e == CUSOLVER_STATUS_ALLOC_FAILED ? ERR_MEMORY : ERR_UNSUPPORTED,
                   "factorize: cuSOLVER: status %d", (int)e);
}

extern "C" void cuda_solver_close(const struct backend *b, struct solver *s)
{
    if (!s)
        return;
    b->core->release(b, &s->workspace);
    if (s->params)
        cusolverDnDestroyParams(s->params);
    if (s->handle)
        cusolverDnDestroy(s->handle);
    free(s);
}

/* Its default mode gives the same bits every time. */
static int get_solver(const struct backend *b, struct solver **out)
{
    struct cuda_state *s = cuda_state(b);
    int rc = 0;
    if (!s->solver) {
        struct solver *v = (struct solver *)mem_alloc(1, sizeof *v, "cuSOLVER");
        rc = v ? solver_status(cusolverDnCreate(&v->handle)) : ERR_MEMORY;
        if (!rc)
            rc = solver_status(cusolverDnSetStream(v->handle, s->stream));
        if (!rc)
            rc = solver_status(cusolverDnCreateParams(&v->params));
        if (rc < 0)
            cuda_solver_close(b, v);
        else
            s->solver = v;
    }
    *out = s->solver;
    return rc;
}

/* Memory for the factorization; no other operation is at work on the stream's scratch memory while it runs. */
static int get_workspace(const struct backend *b, struct solver *s, size_t bytes, void **out)
{
    if (bytes <= CUDA_SCRATCH_BYTES)
        return cuda_scratch(b, out);
    int rc = 0;
    if (s->workspace.bytes < bytes) {
        b->core->release(b, &s->workspace);
        rc = b->core->acquire(b, bytes, "the workspace of a factorization", &s->workspace);
    }
    *out = s->workspace.ptr;
    return rc;
}

/* --- the factor --------------------------------------------------------------------------------------------------- */

/* Counted from the last place to the first, M turns into a lower triangle: with A[r, c] = (P(H + added·I)Pᵀ)[n−1−r, n−1−c]
 * = L·Lᵀ, M[k, j] = L[n−1−k, n−1−j] / L[n−1−j, n−1−j]. A and L are stored by columns, as cuSOLVER has them. */

/* A block for each column of A; the triangle r ≥ c. By H's symmetry it reads a row of H. */
static __global__ void __launch_bounds__(THREADS)
    gather_kernel(const float *h, int64_t h_stride, const int32_t *order, double added, int64_t n, double *a,
                  int64_t a_stride)
{
    const int64_t c = blockIdx.x;
    const float *row = h + (int64_t)order[n - 1 - c] * h_stride;
    for (int64_t r = c + threadIdx.x; r < n; r += THREADS)
        a[c * a_stride + r] = (double)row[order[n - 1 - r]] + (r == c ? added : 0);
}

/* A NaN or infinity anywhere in A has reached the diagonal of L, whatever the library made of it. One block. */
static __global__ void check_pivots(const double *l, int64_t n, int64_t stride, int *info)
{
    int bad = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const double pivot = l[i * (stride + 1)];
        bad |= !(pivot > 0 && pivot <= DBL_MAX);
    }
    if (__syncthreads_or(bad) && threadIdx.x == 0)
        *info = 1;
}

/* Block (i, j): tile i, j of columns and rows of L, i ≤ j. */
static __global__ void factor_kernel(const double *l, int64_t n, int64_t l_stride, float *m, int64_t m_stride)
{
    __shared__ double tile[TILE][TILE + 1]; /* [column][row] */
    if (blockIdx.x > blockIdx.y)
        return;
    const int64_t row = (int64_t)blockIdx.y * TILE, col = (int64_t)blockIdx.x * TILE;
    for (int y = threadIdx.y; y < TILE; y += TILE_ROWS)
        if (col + y < n && row + threadIdx.x < n)
            tile[y][threadIdx.x] = l[(col + y) * l_stride + row + threadIdx.x];
    __syncthreads();
    const int64_t c = col + threadIdx.x;
    const double pivot = c < n ? l[c * (l_stride + 1)] : 1;
    for (int y = threadIdx.y; y < TILE; y += TILE_ROWS) {
        const int64_t r = row + y;
        if (c <= r && r < n)
            m[(n - 1 - r) * m_stride + n - 1 - c] = (float)(tile[threadIdx.x][y] / pivot);
    }
}

/* work: A, then L. *info (device): 0 where A is positive definite. */
static int decompose(const struct backend *b, const struct mat *work, int *info)
{
    struct solver *s;
    void *device = NULL, *host = NULL;
    size_t device_bytes = 0, host_bytes = 0;
    int rc = get_solver(b, &s);
    if (!rc)
        rc = solver_status(cusolverDnXpotrf_bufferSize(s->handle, s->params, CUBLAS_FILL_MODE_LOWER,
                                                       work->rows, CUDA_R_64F, work->data, work->stride,
                                                       CUDA_R_64F, &device_bytes, &host_bytes));
    if (!rc)
        rc = get_workspace(b, s, device_bytes, &device);
    if (!rc && !(host = mem_alloc(1, host_bytes, "a factorization")))
        rc = ERR_MEMORY;
    if (!rc) {
        rc = solver_status(cusolverDnXpotrf(s->handle, s->params, CUBLAS_FILL_MODE_LOWER, work->rows,
                                            CUDA_R_64F, work->data, work->stride, CUDA_R_64F, device,
                                            device_bytes, host, host_bytes, info));
        check_pivots<<<1, 1024, 0, cuda_state(b)->stream>>>((const double *)work->data, work->rows,
                                                            work->stride, info);
        const int launched = cuda_launched("factorize"),
                  waited = b->core->wait(b); /* it may still read host */
        rc = rc ? rc : launched ? launched : waited;
    }
    free(host);
    return rc;
}

extern "C" int cuda_factorize(const struct backend *b, const struct mat *h, const struct mat *order,
                              float added, const struct mat *work, const struct mat *factor, int *definite)
{
    const int64_t n = h->rows;
    check_hessian(h);
    CHECK(order->dtype == DTYPE_I32 && order->cols == n && work->dtype == DTYPE_F64 && work->rows == n &&
          work->cols == n && factor->dtype == DTYPE_F32 && factor->rows == n && factor->cols == n);
    const struct cuda_state *s = cuda_state(b);
    int *info = (int *)s->partials, found = 0;
    *definite = 0;
    gather_kernel<<<(unsigned)n, THREADS, 0, s->stream>>>((const float *)h->data, h->stride,
                                                          (const int32_t *)order->data, added, n,
                                                          (double *)work->data, work->stride);
    int rc = cuda_launched("factorize");
    if (!rc)
        rc = decompose(b, work, info);
    if (!rc)
        rc = b->core->download(b, &found, info, sizeof found);
    CHECK(found >= 0); /* else an argument that potrf does not take */
    if (rc < 0 || found)
        return rc;
    *definite = 1;
    const unsigned blocks = (unsigned)tiles(n);
    factor_kernel<<<dim3(blocks, blocks), dim3(TILE, TILE_ROWS), 0, s->stream>>>(
        (const double *)work->data, n, work->stride, (float *)factor->data, factor->stride);
    return cuda_launched("factorize");
}

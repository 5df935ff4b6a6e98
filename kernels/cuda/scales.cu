/* Scales under a Hessian: the search among candidates for each group, and the closed form for given codes. Candidates
 * and the codes under them are computed as kernels/cpu/scales.c computes them, without contraction into fused
 * multiply-adds; those are written out where they only add errors up. */
#include "kernels/cuda/search.cuh"

/* --- the search: by the diagonal ---------------------------------------------------------------------------------- */

/* A lane has a row, a warp a share of the candidates, and columns come through shared memory: errors are added up
 * without a word between lanes. Where the block is to decide, the numbers of the best candidates are left in place of
 * the scale: of the positive ones, plus 64 times that of the negative ones. */
enum { TILE = 128 /* columns at a time */, TILE_ROWS = 32, PITCH = TILE_ROWS + 1 };

struct tile {
    float w[TILE * PITCH], weight[TILE];
    float error[WARPS][2][TILE_ROWS];
    int number[WARPS][2][TILE_ROWS];
};

/* Columns [first, first + n) of the group. A column that no input ever touches counts for a millionth of the mean, so
 * that nothing is decided by nothing. */
static __device__ void load_tile(const struct search_job &j, const struct place &p, int64_t row,
                                 int64_t first, int n, float mean, struct tile *t)
{
    const int lane = threadIdx.x % 32;
    __syncthreads(); /* it may still be read */
    for (int r = threadIdx.x / 32; r < TILE_ROWS; r += WARPS)
        for (int c = lane; c < n; c += 32)
            t->w[c * PITCH + r] =
                row + r < j.rows ? load_as_float(j.w, j.dtype, (row + r) * j.w_stride + p.col + first + c)
                                 : 0;
    for (int c = threadIdx.x; c < n; c += THREADS)
        t->weight[c] = mean > 0 ? j.h[(p.col + first + c) * (j.h_stride + 1)] + 1e-6f * mean : 1;
    __syncthreads();
}

static __device__ __forceinline__ int tile_columns(const struct place &p, int64_t first)
{
    return p.n - first < TILE ? (int)(p.n - first) : TILE;
}

/* A warp's share of the candidates for its lanes' rows, and their errors so far. */
template <enum kind KIND> struct candidates {
    static constexpr int N = KIND == ASYMMETRIC ? N_SHRINKS : N_RATIOS, EACH = (N + WARPS - 1) / WARPS,
                         SIGNS = KIND == SIGNED ? 2 : 1;
    float scale[EACH], inverse[EACH], zero[EACH], error[SIGNS][EACH];
};

/* Under a negative scale −s the code is that of s with the limits turned round: the two share the rounding. */
template <enum kind KIND>
static __device__ __forceinline__ void add_errors(const struct tile *t, int n, struct code_range r,
                                                  struct candidates<KIND> &c)
{
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < n; k++) {
        const float w = t->w[k * PITCH + lane], weight = t->weight[k];
#pragma unroll
        for (int i = 0; i < c.EACH; i++) {
            const float q = nearest_integer(w * c.inverse[i]);
#pragma unroll
            for (int sign = 0; sign < c.SIGNS; sign++) {
                const float zero = KIND == ASYMMETRIC ? c.zero[i] : 0;
                const float low = sign ? -r.high : r.low - zero, high = sign ? -r.low : r.high - zero;
                const float e = __fmaf_rn(fminf(fmaxf(q, low), high), c.scale[i], -w);
                c.error[sign][i] = __fmaf_rn(e * weight, e, c.error[sign][i]);
            }
        }
    }
}

/* The best of all warps for this lane's row, 0 where no error is a number: {positive, negative}; *sign: the better. */
template <enum kind KIND>
static __device__ int2 best_of(struct tile *t, const struct candidates<KIND> &c, int *sign)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int s = 0; s < c.SIGNS; s++) {
        float least = INFINITY;
        int number = 0;
#pragma unroll
        for (int i = 0; i < c.EACH; i++)
            if (warp * c.EACH + i < c.N && c.error[s][i] < least) {
                least = c.error[s][i];
                number = warp * c.EACH + i;
            }
        t->error[warp][s][lane] = least;
        t->number[warp][s][lane] = number;
    }
    __syncthreads();
    float least[2] = {INFINITY, INFINITY};
    int number[2] = {0, 0};
    for (int s = 0; s < c.SIGNS; s++)
        for (int i = 0; i < WARPS; i++)
            if (t->error[i][s][lane] < least[s]) {
                least[s] = t->error[i][s][lane];
                number[s] = t->number[i][s][lane];
            }
    *sign = c.SIGNS == 2 && (least[1] < least[0] || (least[1] == least[0] && number[1] < number[0]));
    return make_int2(number[0], number[1]);
}

template <enum kind KIND>
static __global__ void __launch_bounds__(THREADS) search_diagonal_kernel(struct search_job j)
{
    __shared__ struct tile t;
    const struct place p = place_of(j);
    const struct code_range range = code_range(j.bits);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float mean = mean_diagonal(j, p);
    for (int64_t row = p.row; row < p.row + j.rows_per_block && row < j.rows; row += TILE_ROWS) {
        struct extremes e = {0, 0};
        for (int64_t first = 0; first < p.n; first += TILE) {
            const int n = tile_columns(p, first);
            load_tile(j, p, row, first, n, mean, &t);
            for (int k = 0; k < n; k++) {
                e.low = fminf(e.low, t.w[k * PITCH + lane]);
                e.high = fmaxf(e.high, t.w[k * PITCH + lane]);
            }
        }
        struct candidates<KIND> c;
#pragma unroll
        for (int i = 0; i < c.EACH; i++) {
            const struct choice x = candidate(e, j.bits, KIND != ASYMMETRIC, 1, warp * c.EACH + i);
            c.scale[i] = x.scale;
            c.inverse[i] = 1 / x.scale;
            c.zero[i] = x.zero;
            c.error[0][i] = c.error[c.SIGNS - 1][i] = 0;
        }
        for (int64_t first = 0; first < p.n; first += TILE) {
            const int n = tile_columns(p, first);
            if (p.n > TILE)
                load_tile(j, p, row, first, n, mean, &t);
            add_errors<KIND>(&t, n, range, c);
        }
        int sign;
        const int2 best = best_of<KIND>(&t, c, &sign);
        if (warp == 0 && row + lane < j.rows) {
            if (by_block(j, p, mean))
                j.scales[(row + lane) * j.scales_stride + p.g] = (uint16_t)(best.x + 64 * best.y);
            else
                store_choice(j, row + lane, p.g,
                             candidate(e, j.bits, KIND != ASYMMETRIC, sign_of(sign), sign ? best.y : best.x));
        }
    }
}

/* --- the search: from outside ------------------------------------------------------------------------------------- */

/* Rows of a thread block: as many as leave every processor several blocks. */
static unsigned split_rows(struct search_job *j, int n_processors)
{
    int64_t chunks;
    for (j->rows_per_block = 256;; j->rows_per_block /= 2) {
        chunks = (j->rows + j->rows_per_block - 1) / j->rows_per_block;
        if (chunks * j->per_row >= 8 * n_processors || j->rows_per_block == TILE_ROWS)
            return (unsigned)(chunks * j->per_row);
    }
}

template <int PARTS, enum kind KIND>
static int launch_block(const struct search_job &j, unsigned blocks, cudaStream_t stream)
{
    const int bytes = (half_block<PARTS>::FLOATS + WARPS * WARP_FLOATS) * (int)sizeof(float);
    const int rc = cuda_status(cudaFuncSetAttribute(search_block_kernel<PARTS, KIND>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                               "search_scales");
    if (rc < 0)
        return rc;
    search_block_kernel<PARTS, KIND><<<blocks, THREADS, (size_t)bytes, stream>>>(j);
    return cuda_launched("search_scales");
}

template <enum kind KIND>
static int launch_search(const struct search_job &j, unsigned blocks, cudaStream_t stream)
{
    search_diagonal_kernel<KIND><<<blocks, THREADS, 0, stream>>>(j);
    const int rc = cuda_launched("search_scales");
    const int64_t longest = j.group < j.cols ? j.group : j.cols, last = j.cols - (j.per_row - 1) * j.group;
    if (rc < 0 || !j.block || last > BLOCK_COLUMNS)
        return rc;
    const int64_t n = longest > BLOCK_COLUMNS ? last : longest;
    if (n <= 2 * LANES)
        return launch_block<2, KIND>(j, blocks, stream);
    if (n <= 4 * LANES)
        return launch_block<4, KIND>(j, blocks, stream);
    return launch_block<8, KIND>(j, blocks, stream);
}

extern "C" int cuda_search_scales(const struct backend *b, const struct mat *w, const struct mat *h,
                                  const struct search_spec *spec, const struct qmat *q)
{
    int rc = cuda_check_float(w, "search_scales");
    if (rc < 0 || (rc = check_qmat(q, "search_scales")) < 0)
        return rc;
    CHECK(w->cols == q->cols && w->rows == q->scales.rows);
    CHECK(h->dtype == DTYPE_F32 && h->rows == w->cols && h->cols == w->cols);
    if (w->rows == 0 || w->cols == 0)
        return 0;
    struct search_job j = {};
    j.w = w->data;
    j.dtype = w->dtype;
    j.h = (const float *)h->data;
    j.scales = (uint16_t *)q->scales.data;
    j.zeros = (int8_t *)q->zeros.data;
    j.rows = w->rows;
    j.cols = w->cols;
    j.w_stride = w->stride;
    j.h_stride = h->stride;
    j.group = q->group;
    j.per_row = q->scales.cols;
    j.scales_stride = q->scales.stride;
    j.zeros_stride = q->zeros.stride;
    j.bits = q->bits;
    j.block = spec->block;
    const struct cuda_state *s = cuda_state(b);
    const unsigned blocks = split_rows(&j, s->n_processors);
    if (j.zeros)
        return launch_search<ASYMMETRIC>(j, blocks, s->stream);
    return (spec->positive_only ? launch_search<POSITIVE> : launch_search<SIGNED>)(j, blocks, s->stream);
}

/* --- the closed form ---------------------------------------------------------------------------------------------- */

/* A warp for each group of a row. */
static __global__ void __launch_bounds__(THREADS)
    group_dots_kernel(const float *x, int64_t x_stride, const int8_t *codes, int64_t codes_stride,
                      int64_t cols, int64_t group, int64_t n_dots, int64_t per_row, float *out,
                      int64_t out_stride)
{
    const int64_t index = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (index >= n_dots)
        return;
    const int64_t row = index / per_row, g = index % per_row, end = min((g + 1) * group, cols);
    float sum = 0;
    for (int64_t c = g * group + threadIdx.x % 32; c < end; c += 32)
        sum = __fmaf_rn(x[row * x_stride + c], (float)codes[row * codes_stride + c], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        out[row * out_stride + g] = sum;
}

extern "C" int cuda_group_dots(const struct backend *b, const struct mat *x, const struct mat *codes,
                               int64_t group, const struct mat *out)
{
    CHECK(x->dtype == DTYPE_F32 && codes->dtype == DTYPE_I8 && out->dtype == DTYPE_F32 && group > 0);
    CHECK(x->rows == codes->rows && x->cols == codes->cols && out->rows == x->rows &&
          out->cols == (x->cols + group - 1) / group);
    const int64_t n = out->rows * out->cols;
    if (n == 0)
        return 0;
    group_dots_kernel<<<(unsigned)((n + WARPS - 1) / WARPS), THREADS, 0, cuda_state(b)->stream>>>(
        (const float *)x->data, x->stride, (const int8_t *)codes->data, codes->stride, x->cols, group, n,
        out->cols, (float *)out->data, out->stride);
    return cuda_launched("group_dots");
}

/* A block for each row. A + ridge = U·Uᵀ with U upper triangular, column by column from the last; U[i, j] stands at
 * [j, i], below the diagonal, where threads that have an i each read it side by side, and its diagonal beside the
 * matrix, so that A stays as it was given. Products are added up in FP64. Rows of up to SHARED_GROUPS groups are solved
 * in shared memory, longer ones in the given memory. */
enum { SOLVE_WARPS = 16 /* at most */, SHARED_GROUPS = 100 };

struct solve_job {
    float *a;
    const float *rhs;
    uint16_t *scales;
    unsigned long long *n_kept;
    int64_t a_stride, rhs_stride, scales_stride;
    int n; /* groups */
    bool positive_only;
};

/* One row's system. */
struct system {
    float *a;
    int n, pitch;
    const float *rhs;
    double *x;    /* [n]: right side, then solution */
    float *pivot; /* [n]: the diagonal of U */
    double *sums; /* a warp each */
};

/* s·A·sᵀ − 2·s·bᵀ, s[i] of any type; known to every thread. */
template <typename F> static __device__ double objective(const struct system &y, F s)
{
    double sum = 0;
    for (int i = threadIdx.x / 32; i < y.n; i += (int)blockDim.x / 32) {
        double row = 0;
        for (int k = i + 1 + (int)threadIdx.x % 32; k < y.n; k += 32)
            row += 2 * s(k) * (double)y.a[i * y.pitch + k];
        if (threadIdx.x % 32 == 0)
            row += s(i) * (double)y.a[i * y.pitch + i] - 2 * (double)y.rhs[i];
        sum += s(i) * row;
    }
    return block_sum(sum, y.sums);
}

/* false, for every thread, where the matrix is not positive definite. */
static __device__ bool factorize(const struct system &y, double ridge)
{
    for (int j = y.n - 1; j >= 0; j--) {
        __syncthreads();
        const float *column = y.a + j; /* U[j, k] at [k, j] */
        double diagonal = 0;
        for (int k = j + 1 + (int)threadIdx.x; k < y.n; k += (int)blockDim.x)
            diagonal += (double)column[k * y.pitch] * (double)column[k * y.pitch];
        diagonal = (double)column[j * y.pitch] + ridge - block_sum(diagonal, y.sums);
        if (!(diagonal > 0))
            return false;
        const double pivot = sqrt(diagonal);
        for (int i = threadIdx.x; i < j; i += (int)blockDim.x) {
            double sum = (double)y.a[i * y.pitch + j];
#pragma unroll 8
            for (int k = j + 1; k < y.n; k++)
                sum -= (double)y.a[k * y.pitch + i] * (double)column[k * y.pitch];
            y.a[j * y.pitch + i] = (float)(sum / pivot);
        }
        if (threadIdx.x == 0)
            y.pivot[j] = (float)pivot;
    }
    __syncthreads();
    return true;
}

/* U·Uᵀ·x = b in place, each known element taken from those that still are not. */
static __device__ void substitute(const struct system &y)
{
    for (int j = y.n - 1; j >= 0; j--) {
        const double x = y.x[j] / (double)y.pivot[j];
        __syncthreads();
        for (int i = threadIdx.x; i < j; i += (int)blockDim.x)
            y.x[i] -= (double)y.a[j * y.pitch + i] * x;
        if (threadIdx.x == 0)
            y.x[j] = x;
        __syncthreads();
    }
    for (int j = 0; j < y.n; j++) {
        const double x = y.x[j] / (double)y.pivot[j];
        __syncthreads();
        for (int i = j + 1 + (int)threadIdx.x; i < y.n; i += (int)blockDim.x)
            y.x[i] -= (double)y.a[i * y.pitch + j] * x;
        if (threadIdx.x == 0)
            y.x[j] = x;
        __syncthreads();
    }
}

/* Solves, rounds, and stores what lowers the objective. old: the row's present scales, of the stored type. */
static __device__ void solve(const struct solve_job &j, const struct system &y, uint16_t *old)
{
    double trace = 0;
    for (int i = threadIdx.x; i < y.n; i += (int)blockDim.x)
        trace += (double)y.a[i * y.pitch + i];
    const double ridge = 1e-6 * (block_sum(trace, y.sums) / y.n) + 1e-12;
    const double before = objective(y, [&](int i) { return (double)bf16_value(old[i]); });
    if (!factorize(y, ridge))
        return;
    substitute(y);
    int usable = true;
    for (int i = threadIdx.x; i < y.n; i += (int)blockDim.x) { /* a group without a code keeps its scale */
        const float s = y.a[i * y.pitch + i] > 0 ? storable_scale((float)y.x[i]) : bf16_value(old[i]);
        y.x[i] = (double)s;
        usable = usable && fabsf(s) <= FLT_MAX && (s > 0 || !j.positive_only);
    }
    if (!__syncthreads_and(usable) || !(objective(y, [&](int i) { return y.x[i]; }) < before))
        return;
    for (int i = threadIdx.x; i < y.n; i += (int)blockDim.x)
        old[i] = bf16_bits((float)y.x[i]);
    if (threadIdx.x == 0)
        atomicAdd(j.n_kept, 1ull);
}

template <bool IN_SHARED> static __global__ void solve_scales_kernel(struct solve_job j)
{
    extern __shared__ double solve_room[];
    __shared__ double sums[SOLVE_WARPS];
    const int64_t row = blockIdx.x;
    float *a = j.a + row * j.a_stride;
    struct system y = {a,   j.n, j.n, j.rhs + row * j.rhs_stride, solve_room, (float *)(solve_room + j.n),
                       sums};
    if (IN_SHARED) {
        y.a = y.pivot + j.n;
        y.pitch = j.n | 1; /* columns in different banks */
        for (int i = threadIdx.x / 32; i < j.n; i += (int)blockDim.x / 32)
            for (int k = i + (int)threadIdx.x % 32; k < j.n; k += 32)
                y.a[i * y.pitch + k] = a[i * j.n + k];
    }
    for (int i = threadIdx.x; i < j.n; i += (int)blockDim.x)
        y.x[i] = (double)y.rhs[i];
    __syncthreads();
    solve(j, y, j.scales + row * j.scales_stride);
}

extern "C" int cuda_solve_scales(const struct backend *b, const struct mat *a, const struct mat *rhs,
                                 bool positive_only, const struct qmat *q, int64_t *n_kept)
{
    const int64_t n = rhs->cols;
    CHECK(a->dtype == DTYPE_F32 && rhs->dtype == DTYPE_F32 && q->scales.dtype == DTYPE_BF16);
    CHECK(a->cols == n * n && a->rows == rhs->rows && q->scales.cols == n && q->scales.rows == rhs->rows);
    if (n > 2048)
        return err_set(ERR_UNSUPPORTED, "solve_scales: %lld groups in a row are too many", (long long)n);
    const cudaStream_t stream = cuda_state(b)->stream;
    const int rc = cuda_status(cudaMemsetAsync(n_kept, 0, sizeof *n_kept, stream), "solve_scales");
    if (rc < 0 || a->rows == 0 || n == 0)
        return rc;
    struct solve_job j = {};
    j.a = (float *)a->data;
    j.rhs = (const float *)rhs->data;
    j.scales = (uint16_t *)q->scales.data;
    j.n_kept = (unsigned long long *)n_kept;
    j.a_stride = a->stride;
    j.rhs_stride = rhs->stride;
    j.scales_stride = q->scales.stride;
    j.n = (int)n;
    j.positive_only = positive_only;
    const bool in_shared = n <= SHARED_GROUPS;
    const size_t bytes = (size_t)n * (sizeof(double) + sizeof(float)) +
                         (in_shared ? (size_t)(n * (n | 1)) * sizeof(float) : 0);
    const int warps = n > 32 * SOLVE_WARPS ? SOLVE_WARPS : (int)(n + 31) / 32;
    (in_shared ? solve_scales_kernel<true>
               : solve_scales_kernel<false>)<<<(unsigned)a->rows, (unsigned)warps * 32, bytes, stream>>>(j);
    return cuda_launched("solve_scales");
}

/* The two loops over columns that place codes under a Hessian: GPTQ's sweep and coordinate descent. A warp takes a few
 * rows; a lane holds columns lane, lane + 32, lane + 64 and lane + 96 of a block, and the block's triangle of the matrix
 * that spreads errors lies in shared memory. Each step is one column: every lane works its own column's code out, of
 * which that of the column's owner is passed on to all. As the triangle is 0 on and below its diagonal, a column no
 * longer changes after its step, and what was decided is worked out again for all 32 owners at once. */
#include "kernels/cuda/quant.cuh"

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    ROWS = 4,                   /* of a warp: so many steps are under way side by side */
    PARTS = SWEEP_COLUMNS / 32, /* columns of a lane */
};

/* Which block of which matrices. */
struct block_job {
    const void *w;
    enum dtype dtype;
    int64_t w_stride;
    struct grid_view v;
    const int32_t *order;       /* sweep_block; at `first` */
    const float *matrix;        /* factor or h, at [first, first] */
    const float *in, *feedback; /* gradient or NULL, at `first`; feedback, at the block's first column */
    float *out;                 /* errors or changes [rows, n] */
    int64_t matrix_stride, in_stride, feedback_stride, out_stride, first;
    int n; /* columns */
};

/* [n, SWEEP_COLUMNS]: what stands behind the diagonal, 0 elsewhere. */
static __device__ void load_triangle(const struct block_job &j, float *to)
{
    for (int i = threadIdx.x; i < j.n * SWEEP_COLUMNS; i += THREADS) {
        const int row = i / SWEEP_COLUMNS, col = i % SWEEP_COLUMNS;
        to[i] = col > row && col < j.n ? j.matrix[row * j.matrix_stride + col] : 0;
    }
    __syncthreads();
}

/* Codes of one column that a row may take. */
struct grid {
    float scale, inverse, low, high;
};

static __device__ __forceinline__ struct grid grid_of(const struct group_scale &g, struct code_range r)
{
    return (struct grid){g.scale, 1 / g.scale, r.low - g.zero, r.high - g.zero};
}

static __device__ __forceinline__ float nearest(float t, const struct grid &g)
{
    return lesser(greater(t, g.low), g.high) + ROUND_MAGIC - ROUND_MAGIC;
}

static __device__ __forceinline__ float dequantized(float code, const struct grid &g)
{
    return to_float(__float2bfloat16_rn(code * g.scale));
}

/* x[row, column] += change·matrix[step, column], for this lane's columns from part PART on; change: of the lane `owner` */
template <int PART>
static __device__ __forceinline__ void spread(const float *matrix_row, const float *change, int owner,
                                              float (*x)[PARTS])
{
    float c[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        c[r] = __shfl_sync(0xffffffffu, change[r], owner);
#pragma unroll
    for (int p = PART; p < PARTS; p++) {
        const float m = matrix_row[p * 32];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            x[r][p] = fmaf(c[r], m, x[r][p]);
    }
}

/* --- the sweep ---------------------------------------------------------------------------------------------------- */

/* The rows of a warp: the weights, and what the errors so far ask to add to them. */
struct sweep_state {
    float w[ROWS][PARTS], added[ROWS][PARTS];
};

static __device__ __forceinline__ float sweep_code(const struct sweep_state &s, int r, int part,
                                                   const struct grid &g)
{
    return nearest((s.w[r][part] + s.added[r][part]) * g.inverse, g);
}

template <int PART>
static __device__ __forceinline__ void sweep_part(const struct block_job &j, const float *triangle,
                                                  int64_t row, struct sweep_state &s)
{
    const int lane = threadIdx.x % 32, steps = j.n - PART * 32 < 32 ? j.n - PART * 32 : 32;
    const int k = PART * 32 + (lane < steps ? lane : steps - 1); /* lanes without a column: any of them */
    const int64_t col = j.order[k];
    const struct code_range range = code_range(j.v.bits);
    struct grid g[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        g[r] = grid_of(group_scale_at(j.v, row + r < j.v.rows ? row + r : j.v.rows - 1, col), range);
#pragma unroll 4
    for (int step = 0; step < steps; step++) {
        float error[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            error[r] = s.w[r][PART] - dequantized(sweep_code(s, r, PART, g[r]), g[r]);
        spread<PART>(triangle + (PART * 32 + step) * SWEEP_COLUMNS + lane, error, step, s.added);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane < steps && row + r < j.v.rows) {
            const float code = sweep_code(s, r, PART, g[r]);
            j.v.codes[(row + r) * j.v.codes_stride + col] = (int8_t)code;
            j.out[(row + r) * j.out_stride + k] = s.w[r][PART] - dequantized(code, g[r]);
        }
}

static __global__ void __launch_bounds__(THREADS) sweep_kernel(struct block_job j)
{
    extern __shared__ float triangle[];
    load_triangle(j, triangle);
    const int lane = threadIdx.x % 32;
    const int64_t row = ((int64_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    if (row >= j.v.rows)
        return;
    struct sweep_state s;
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int k = p * 32 + lane;
        const int64_t col = k < j.n ? j.order[k] : -1;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool here = col >= 0 && row + r < j.v.rows;
            s.w[r][p] = here ? load_as_float(j.w, j.dtype, (row + r) * j.w_stride + col) : 0;
            s.added[r][p] = here ? j.feedback[(row + r) * j.feedback_stride + k] : 0;
        }
    }
    sweep_part<0>(j, triangle, row, s);
    if (j.n > 32)
        sweep_part<1>(j, triangle, row, s);
    if (j.n > 64)
        sweep_part<2>(j, triangle, row, s);
    if (j.n > 96)
        sweep_part<3>(j, triangle, row, s);
}

/* --- coordinate descent ------------------------------------------------------------------------------------------- */

/* A column of a row: its grid, the code that it has, and how far a unit of the gradient moves it. */
struct place {
    struct grid grid;
    float code, old, step; /* old: the dequantized weight */
};

static __device__ __forceinline__ float descend_code(float gradient, const struct place &p)
{
    const float wish = fmaf(gradient, p.step, p.code);
    return fabsf(wish) <= FLT_MAX ? nearest(wish, p.grid) : p.code;
}

static __device__ __forceinline__ struct place place_of(const struct block_job &j, int64_t row, int64_t k)
{
    const struct grid g = grid_of(group_scale_at(j.v, row, j.first + k), code_range(j.v.bits));
    const float h = j.matrix[k * j.matrix_stride + k],
                code = (float)j.v.codes[row * j.v.codes_stride + j.first + k];
    return (struct place){g, code, dequantized(code, g), h > 0 ? 1 / (h * g.scale) : 0};
}

template <int PART>
static __device__ __forceinline__ void descend_part(const struct block_job &j, const float *triangle,
                                                    int64_t row, float (*gradient)[PARTS])
{
    const int lane = threadIdx.x % 32, steps = j.n - PART * 32 < 32 ? j.n - PART * 32 : 32;
    const int k = PART * 32 + (lane < steps ? lane : steps - 1); /* lanes without a column: any of them */
    struct place p[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        p[r] = place_of(j, row + r < j.v.rows ? row + r : j.v.rows - 1, k);
#pragma unroll 4
    for (int step = 0; step < steps; step++) {
        float back[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            back[r] = p[r].old - dequantized(descend_code(gradient[r][PART], p[r]), p[r].grid);
        spread<PART>(triangle + (PART * 32 + step) * SWEEP_COLUMNS + lane, back, step, gradient);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane < steps && row + r < j.v.rows) {
            const float code = descend_code(gradient[r][PART], p[r]);
            j.v.codes[(row + r) * j.v.codes_stride + j.first + k] = (int8_t)code;
            j.out[(row + r) * j.out_stride + k] = dequantized(code, p[r].grid) - p[r].old;
        }
}

static __global__ void __launch_bounds__(THREADS) descend_kernel(struct block_job j)
{
    extern __shared__ float triangle[];
    load_triangle(j, triangle);
    const int lane = threadIdx.x % 32;
    const int64_t row = ((int64_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    if (row >= j.v.rows)
        return;
    float gradient[ROWS][PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int k = p * 32 + lane;
            gradient[r][p] = k < j.n && row + r < j.v.rows ? j.in[(row + r) * j.in_stride + k] +
                                                                 j.feedback[(row + r) * j.feedback_stride + k]
                                                           : 0;
        }
    descend_part<0>(j, triangle, row, gradient);
    if (j.n > 32)
        descend_part<1>(j, triangle, row, gradient);
    if (j.n > 64)
        descend_part<2>(j, triangle, row, gradient);
    if (j.n > 96)
        descend_part<3>(j, triangle, row, gradient);
}

/* --- from outside ------------------------------------------------------------------------------------------------- */

static const float *at(const struct mat *m, int64_t row, int64_t col)
{
    return (const float *)m->data + row * m->stride + col;
}

static int make_job(const struct rounding *r, const struct mat *matrix, const struct mat *feedback,
                    int64_t first, const struct mat *out, const char *op, struct block_job *j)
{
    const int rc = check_rounding(r, op);
    if (rc < 0)
        return rc;
    CHECK(out->cols >= 1 && out->cols <= SWEEP_COLUMNS && first >= 0 && first + out->cols <= r->w->cols);
    CHECK(out->dtype == DTYPE_F32 && out->rows == r->w->rows);
    CHECK(matrix->dtype == DTYPE_F32 && matrix->rows == r->w->cols && matrix->cols == r->w->cols);
    CHECK(feedback->dtype == DTYPE_F32 && feedback->rows == r->w->rows);
    *j = (struct block_job){};
    j->w = r->w->data;
    j->dtype = r->w->dtype;
    j->w_stride = r->w->stride;
    j->v = grid_view_of(r->q, r->codes);
    j->matrix = at(matrix, first, first);
    j->matrix_stride = matrix->stride;
    j->feedback_stride = feedback->stride;
    j->out = (float *)out->data;
    j->out_stride = out->stride;
    j->first = first;
    j->n = (int)out->cols;
    return 0;
}

static int launch(const struct backend *b, void (*kernel)(struct block_job), const struct block_job &j,
                  const char *op)
{
    const size_t bytes = (size_t)j.n * SWEEP_COLUMNS * sizeof(float);
    const cudaStream_t stream = cuda_state(b)->stream;
    /* the most that any needs: other threads may be about to launch the same kernel */
    const int most = SWEEP_COLUMNS * SWEEP_COLUMNS * sizeof(float);
    const int rc =
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), op);
    if (rc < 0 || j.v.rows == 0)
        return rc;
    kernel<<<(unsigned)((j.v.rows + WARPS * ROWS - 1) / (WARPS * ROWS)), THREADS, bytes, stream>>>(j);
    return cuda_launched(op);
}

extern "C" int cuda_sweep_block(const struct backend *b, const struct rounding *r, const struct mat *order,
                                const struct mat *factor, const struct mat *feedback, int64_t first,
                                const struct mat *errors)
{
    struct block_job j;
    const int rc = make_job(r, factor, feedback, first, errors, "sweep_block", &j);
    if (rc < 0)
        return rc;
    CHECK(order->dtype == DTYPE_I32 && order->cols == r->w->cols && feedback->cols == r->w->cols);
    j.order = (const int32_t *)order->data + first;
    j.feedback = at(feedback, 0, first);
    return launch(b, sweep_kernel, j, "sweep_block");
}

extern "C" int cuda_descend_block(const struct backend *b, const struct rounding *r, const struct mat *h,
                                  const struct mat *gradient, const struct mat *feedback, int64_t first,
                                  const struct mat *changes)
{
    struct block_job j;
    const int rc = make_job(r, h, feedback, first, changes, "descend_block", &j);
    if (rc < 0)
        return rc;
    CHECK(gradient->dtype == DTYPE_F32 && gradient->rows == r->w->rows && gradient->cols == r->w->cols);
    CHECK(feedback->cols == changes->cols);
    j.in = at(gradient, 0, first);
    j.in_stride = gradient->stride;
    j.feedback = (const float *)feedback->data;
    return launch(b, descend_kernel, j, "descend_block");
}

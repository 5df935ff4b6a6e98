/* The two loops over columns that place codes under a Hessian: GPTQ's sweep and coordinate descent. A warp takes a few
 * rows; a lane holds columns lane, lane + 32, lane + 64 and lane + 96 of a block, and the block of the matrix that
 * spreads errors lies in shared memory. Each step is one column: every lane works its own column's code out, of which
 * that of the column's owner is passed on to all that lie behind it. A column no longer changes after its step, so what
 * was decided is worked out again for all 32 owners at once. */
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
    void *out;                  /* errors F32 or changes BF16 [rows, n] */
    int64_t matrix_stride, in_stride, feedback_stride, out_stride, first;
    int n; /* columns */
};

/* [n, SWEEP_COLUMNS], 0 beyond column n. */
static __device__ void load_block(const struct block_job &j, float *to)
{
    for (int i = threadIdx.x; i < j.n * SWEEP_COLUMNS; i += THREADS) {
        const int row = i / SWEEP_COLUMNS, col = i % SWEEP_COLUMNS;
        to[i] = col < j.n ? j.matrix[row * j.matrix_stride + col] : 0;
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

/* x[row, column] += change·matrix[step, column] for this lane's columns behind that of the step, which is the one of the
 * lane `owner` in part PART; change: the owner's */
template <int PART>
static __device__ __forceinline__ void spread(const float *matrix_row, const float *change, int owner,
                                              float (*x)[PARTS])
{
    const int lane = threadIdx.x % 32;
    float c[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        c[r] = __shfl_sync(0xffffffffu, change[r], owner);
#pragma unroll
    for (int p = PART; p < PARTS; p++) {
        const float m = p > PART || lane > owner ? matrix_row[p * 32] : 0;
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
static __device__ __forceinline__ void sweep_part(const struct block_job &j, const float *block, int64_t row,
                                                  struct sweep_state &s)
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
        spread<PART>(block + (PART * 32 + step) * SWEEP_COLUMNS + lane, error, step, s.added);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane < steps && row + r < j.v.rows) {
            const float code = sweep_code(s, r, PART, g[r]);
            j.v.codes[(row + r) * j.v.codes_stride + col] = (int8_t)code;
            ((float *)j.out)[(row + r) * j.out_stride + k] = s.w[r][PART] - dequantized(code, g[r]);
        }
}

static __global__ void __launch_bounds__(THREADS) sweep_kernel(struct block_job j)
{
    extern __shared__ float block[];
    load_block(j, block);
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
    sweep_part<0>(j, block, row, s);
    if (j.n > 32)
        sweep_part<1>(j, block, row, s);
    if (j.n > 64)
        sweep_part<2>(j, block, row, s);
    if (j.n > 96)
        sweep_part<3>(j, block, row, s);
}

/* --- coordinate descent ------------------------------------------------------------------------------------------- */

/* The rows of a warp. */
struct descent {
    float gradient[ROWS][PARTS], code[ROWS][PARTS];
    struct group_scale group[ROWS]; /* of the columns that are at work */
    float old_scale[ROWS];          /* before it was fitted */
};

/* A column of a row: its grid, the code and value that it has, and how far a unit of the gradient moves it. */
struct place {
    struct grid grid;
    float code, value, step;
};

static __device__ __forceinline__ float descend_code(float gradient, const struct place &p)
{
    const float wish = fmaf(gradient, p.step, p.code);
    return fabsf(wish) <= FLT_MAX ? nearest(wish, p.grid) : p.code;
}

/* The least of f(s + d) = f(s) − 2·d·gain + d²·curvature among storable scales, or the old one. */
static __device__ __forceinline__ float fitted(float old, float gain, float curvature)
{
    const float wish = old + gain / curvature;
    if (!(curvature > 0) || !(fabsf(wish) <= FLT_MAX) || !(wish * old > 0))
        return old;
    const float scale = storable_scale(wish), d = scale - old;
    return d * (d * curvature - 2 * gain) < 0 ? scale : old;
}

/* Fits the scale of the group that begins with part PART and ends before column `end`, for its codes. */
template <int PART>
static __device__ __forceinline__ void fit_scale(const struct block_job &j, const float *block, int64_t row,
                                                 int end, struct descent &d)
{
    const int lane = threadIdx.x % 32;
    float ch[ROWS][PARTS] = {}; /* codes·H */
#pragma unroll
    for (int q = PART; q < PARTS; q++)
        for (int step = 0; step < 32 && q * 32 + step < end; step++) {
            const float *matrix_row = block + (q * 32 + step) * SWEEP_COLUMNS + lane;
            float c[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                c[r] = __shfl_sync(0xffffffffu, d.code[r][q], step);
#pragma unroll
            for (int p = PART; p < PARTS; p++)
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    ch[r][p] = fmaf(c[r], matrix_row[p * 32], ch[r][p]);
        }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float gain = 0, curvature = 0;
#pragma unroll
        for (int p = PART; p < PARTS; p++)
            if (p * 32 + lane < end) {
                gain = fmaf(d.gradient[r][p], d.code[r][p], gain);
                curvature = fmaf(ch[r][p], d.code[r][p], curvature);
            }
        const float old = d.group[r].scale, scale = fitted(old, warp_sum(gain), warp_sum(curvature));
        d.group[r].scale = scale;
#pragma unroll
        for (int p = PART; p < PARTS; p++)
            d.gradient[r][p] = fmaf(old - scale, ch[r][p], d.gradient[r][p]);
        if (lane == 0 && row + r < j.v.rows && scale != old)
            ((uint16_t *)j.v.scales)[(row + r) * j.v.scales_stride + (j.first + PART * 32) / j.v.group] =
                bf16_bits(scale);
    }
}

/* What a group that begins with this part, or goes on from the block before, has as its scale. */
template <int PART>
static __device__ __forceinline__ void begin_group(const struct block_job &j, const float *block, int64_t row,
                                                   struct descent &d)
{
    const int64_t col = j.first + PART * 32, begin = col / j.v.group * j.v.group;
    if (PART > 0 && begin != col)
        return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        d.group[r] = group_scale_at(j.v, row + r < j.v.rows ? row + r : j.v.rows - 1, col);
        d.old_scale[r] = d.group[r].scale;
    }
    const int64_t whole = begin + j.v.group < j.v.cols ? begin + j.v.group : j.v.cols;
    if (begin == col && whole <= j.first + j.n)
        fit_scale<PART>(j, block, row, (int)(whole - j.first), d);
}

template <int PART>
static __device__ __forceinline__ void descend_part(const struct block_job &j, const float *block,
                                                    int64_t row, struct descent &d)
{
    begin_group<PART>(j, block, row, d);
    const int lane = threadIdx.x % 32, steps = j.n - PART * 32 < 32 ? j.n - PART * 32 : 32;
    const int k = PART * 32 + (lane < steps ? lane : steps - 1); /* lanes without a column: any of them */
    const float h = block[k * SWEEP_COLUMNS + k];
    struct place p[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        p[r].grid = grid_of(d.group[r], code_range(j.v.bits));
        p[r].code = d.code[r][PART];
        p[r].value = dequantized(p[r].code, p[r].grid);
        p[r].step = h > 0 ? 1 / (h * p[r].grid.scale) : 0;
    }
#pragma unroll 4
    for (int step = 0; step < steps; step++) {
        float back[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            back[r] = p[r].value - dequantized(descend_code(d.gradient[r][PART], p[r]), p[r].grid);
        spread<PART>(block + (PART * 32 + step) * SWEEP_COLUMNS + lane, back, step, d.gradient);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane < steps && row + r < j.v.rows) {
            const float code = descend_code(d.gradient[r][PART], p[r]),
                        before = to_float(__float2bfloat16_rn(p[r].code * d.old_scale[r]));
            j.v.codes[(row + r) * j.v.codes_stride + j.first + k] = (int8_t)code;
            ((__nv_bfloat16 *)j.out)[(row + r) * j.out_stride + k] =
                __float2bfloat16_rn(dequantized(code, p[r].grid) - before);
        }
}

static __global__ void __launch_bounds__(THREADS) descend_kernel(struct block_job j)
{
    extern __shared__ float block[];
    load_block(j, block);
    const int lane = threadIdx.x % 32;
    const int64_t row = ((int64_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    if (row >= j.v.rows)
        return;
    struct descent d;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int k = p * 32 + lane;
            const bool here = k < j.n && row + r < j.v.rows;
            d.gradient[r][p] =
                here ? j.in[(row + r) * j.in_stride + k] + j.feedback[(row + r) * j.feedback_stride + k] : 0;
            d.code[r][p] = here ? (float)j.v.codes[(row + r) * j.v.codes_stride + j.first + k] : 0;
        }
    descend_part<0>(j, block, row, d);
    if (j.n > 32)
        descend_part<1>(j, block, row, d);
    if (j.n > 64)
        descend_part<2>(j, block, row, d);
    if (j.n > 96)
        descend_part<3>(j, block, row, d);
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
    CHECK(out->rows == r->w->rows);
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
    j->out = out->data;
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
    CHECK(errors->dtype == DTYPE_F32 && order->dtype == DTYPE_I32 && order->cols == r->w->cols &&
          feedback->cols == r->w->cols);
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
    CHECK(feedback->cols == changes->cols && changes->dtype == DTYPE_BF16);
    if (r->q->group % 32 && r->q->group < r->w->cols)
        return err_set(ERR_UNSUPPORTED,
                       "descend_block: groups of %d columns, expected a multiple of 32 or whole rows",
                       (int)r->q->group);
    if (first % 32)
        return err_set(ERR_UNSUPPORTED, "descend_block: from column %lld on, expected a multiple of 32",
                       (long long)first);
    j.in = at(gradient, 0, first);
    j.in_stride = gradient->stride;
    j.feedback = (const float *)feedback->data;
    return launch(b, descend_kernel, j, "descend_block");
}

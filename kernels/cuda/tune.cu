/* AutoRound's step (Cheng et al. 2023, arXiv 2309.05516) in one pass over a weight. Every number is computed as
 * kernels/cpu/tune.c computes it, step by step, so that both give the same codes; this file too is compiled without
 * contraction into fused multiply-adds. Only a group's sums are added in another order. */
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/quant.cuh"

struct tune_job {
    const void *w;
    const uint16_t *start; /* NULL: scales by the range */
    const float *gradient; /* NULL: no step */
    const int32_t *keep;   /* NULL: no */
    float *v, *low, *high; /* low: without start */
    void *restored;
    int8_t *codes, *zeros, *kept_zeros; /* zeros: NULL when symmetric; codes, kept: with keep */
    uint16_t *scales, *kept_scales;
    int64_t w_stride, v_stride, gradient_stride, restored_stride, codes_stride;
    int64_t start_stride, low_stride, high_stride, scales_stride, zeros_stride, kept_scales_stride,
        kept_zeros_stride;
    int64_t cols, group;
    uint32_t per_row, n_groups;
    struct tune_rates rates;
    float lowest, highest, distance;
    int bits;
    bool ends_clip;
};

/* --- a group ------------------------------------------------------------------------------------------------------ */

struct place {
    int64_t row, g, col, n; /* first column, columns */
};

static __device__ __forceinline__ struct place place_of(const struct tune_job &j, uint32_t index)
{
    const uint32_t row = index / j.per_row, g = index - row * j.per_row;
    const int64_t col = (int64_t)g * j.group, left = j.cols - col;
    return (struct place){row, g, col, left < j.group ? left : j.group};
}

/* Its numbers; what the job has none of is not set. */
struct state {
    float scale, zero, start, low, high;
};

static __device__ __forceinline__ struct state load_state(const struct tune_job &j, const struct place &p)
{
    struct state s = {};
    s.scale = bf16_value(j.scales[p.row * j.scales_stride + p.g]);
    s.high = j.high[p.row * j.high_stride + p.g];
    if (j.zeros)
        s.zero = (float)j.zeros[p.row * j.zeros_stride + p.g];
    if (j.start)
        s.start = bf16_value(j.start[p.row * j.start_stride + p.g]);
    else
        s.low = j.low[p.row * j.low_stride + p.g];
    return s;
}

static __device__ __forceinline__ void keep_state(const struct tune_job &j, const struct place &p,
                                                  const struct state &s)
{
    j.kept_scales[p.row * j.kept_scales_stride + p.g] = bf16_bits(s.scale);
    if (j.kept_zeros)
        j.kept_zeros[p.row * j.kept_zeros_stride + p.g] = (int8_t)s.zero;
}

static __device__ __forceinline__ void store_state(const struct tune_job &j, const struct place &p,
                                                   const struct state &s)
{
    j.scales[p.row * j.scales_stride + p.g] = bf16_bits(s.scale);
    if (j.zeros && !j.start)
        j.zeros[p.row * j.zeros_stride + p.g] = (int8_t)s.zero;
    if (!j.gradient)
        return;
    j.high[p.row * j.high_stride + p.g] = s.high;
    if (!j.start)
        j.low[p.row * j.low_stride + p.g] = s.low;
}

static __device__ __forceinline__ float sign_of(float x)
{
    return (float)((x > 0) - (x < 0));
}

static __device__ __forceinline__ float clamped(float x, float least, float most)
{
    return fminf(fmaxf(x, least), most);
}

/* What low and high move by. */
struct slopes {
    float scale; /* of the loss by the scale, roundings taken as straight lines */
    float zero;  /* by the zero point: clipped weights alone */
};

static __device__ __forceinline__ void move_range(const struct tune_job &j, struct state &s,
                                                  const struct extremes &e, const struct slopes &by)
{
    float dlow = 0, dhigh = 0;
    if (j.start) {
        dhigh = by.scale * s.start;
    } else if (j.zeros) {
        const float steps = (float)((1 << j.bits) - 1);
        const float scale = by.scale + by.zero * (e.low * s.low / (s.scale * s.scale));
        dlow = scale * (-e.low / steps) + by.zero * (-e.low / s.scale);
        dhigh = scale * (e.high / steps);
    } else { /* the larger side alone decides; equal ones both do */
        const float a = -e.low * s.low, b = e.high * s.high;
        dlow = a >= b ? (a > b ? by.scale : -by.scale) * -e.low : 0;
        dhigh = a <= b ? -by.scale * e.high : 0;
    }
    s.low = clamped(s.low - j.rates.range * sign_of(dlow), j.lowest, j.highest);
    s.high = clamped(s.high - j.rates.range * sign_of(dhigh), j.lowest, j.highest);
}

/* Scale and zero point that follow from low and high. */
static __device__ __forceinline__ void move_grid(const struct tune_job &j, struct state &s,
                                                 const struct extremes &e)
{
    if (j.start) {
        s.scale = storable_scale(s.start * s.high);
        return;
    }
    const float low = e.low * s.low, high = e.high * s.high;
    const struct code_range r = code_range(j.bits);
    const struct choice c = j.zeros ? whole_range((struct extremes){low, high}, r, 1)
                                    : (struct choice){storable_scale((high >= -low ? high : low) / r.low), 0};
    s.scale = c.scale;
    s.zero = c.zero;
}

/* --- its weights --------------------------------------------------------------------------------------------------- */

/* V of them, by the iterate as it was: codes are kept, v moves, slopes are summed up. */
template <int V>
static __device__ __forceinline__ void step_piece(const struct tune_job &j, const struct state &s, bool keep,
                                                  const struct place &p, int64_t at, const float *w, float *v,
                                                  const float *gradient, struct slopes &by)
{
    const struct code_range r = code_range(j.bits);
    const float least = r.low - s.zero, most = r.high - s.zero, sign = sign_of(s.scale);
    struct alignas(V) {
        int8_t e[V];
    } codes;
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float u = w[i] / s.scale, nearest = rintf(u + v[i]), code = clamped(nearest, least, most);
        const bool inside =
            j.ends_clip ? nearest > least && nearest < most : nearest >= least && nearest <= most;
        codes.e[i] = (int8_t)code;
        by.scale += gradient[i] * (inside ? code - u : code);
        if (inside)
            v[i] -= j.rates.v * sign_of(gradient[i] * sign);
        else
            by.zero -= s.scale * gradient[i];
    }
    if (keep)
        *(decltype(codes) *)(j.codes + p.row * j.codes_stride + p.col + at) = codes;
    if (j.gradient)
        store<float, V>(j.v + p.row * j.v_stride + p.col + at, v);
}

/* ŵ of V of them. */
template <typename T, int V>
static __device__ __forceinline__ void restore_piece(const struct tune_job &j, const struct state &s,
                                                     const struct place &p, int64_t at, const float *w,
                                                     const float *v)
{
    const struct code_range r = code_range(j.bits);
    const float least = r.low - s.zero, most = r.high - s.zero;
    float out[V];
#pragma unroll
    for (int i = 0; i < V; i++)
        out[i] = to_float(__float2bfloat16_rn(clamped(rintf(w[i] / s.scale + v[i]), least, most) * s.scale));
    store<T, V>((T *)j.restored + p.row * j.restored_stride + p.col + at, out);
}

template <int V> static __device__ __forceinline__ void widen(struct extremes &e, const float *w)
{
#pragma unroll
    for (int i = 0; i < V; i++) {
        e.low = lesser(e.low, w[i]);
        e.high = greater(e.high, w[i]);
    }
}

/* Whether this step keeps the iterate it finds. */
static __device__ __forceinline__ bool keeps(const struct tune_job &j)
{
    return j.keep && *j.keep != 0;
}

/* --- groups in registers ------------------------------------------------------------------------------------------ */

enum {
    EACH = 4,                          /* columns of a lane side by side */
    MOST_PIECES = 2,                   /* such pieces of a lane */
    LONGEST = 32 * EACH * MOST_PIECES, /* group that lanes of one warp hold */
};

/* Over `lanes` lanes, a power of two, known to all of them. */
template <typename F> static __device__ __forceinline__ float fold_lanes(float x, int lanes, F f)
{
    for (int i = lanes / 2; i; i >>= 1)
        x = f(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

/* The lanes' part of a group: what they all must know of it. */
static __device__ __forceinline__ void share(const struct tune_job &j, int lanes, struct extremes &e,
                                             struct slopes &by)
{
    const auto add = [](float a, float b) { return a + b; };
    if (!j.start) {
        e.low = fold_lanes(e.low, lanes, lesser);
        e.high = fold_lanes(e.high, lanes, greater);
    }
    if (j.gradient)
        by.scale = fold_lanes(by.scale, lanes, add);
    if (j.gradient && j.zeros && !j.start)
        by.zero = fold_lanes(by.zero, lanes, add);
}

/* 1 << shift lanes for each group, N pieces each; groups begin at whole pieces. */
template <typename TW, typename T, int N>
static __global__ void __launch_bounds__(THREADS) step_kernel(struct tune_job j, int shift)
{
    const uint32_t index = blockIdx.x * (THREADS >> shift) + (threadIdx.x >> shift);
    const int lanes = 1 << shift, lane = threadIdx.x & (lanes - 1);
    const bool here = index < j.n_groups;
    struct place p = place_of(j, here ? index : j.n_groups - 1);
    p.n = here ? p.n : 0;
    const bool keep = keeps(j);
    struct state s = load_state(j, p);
    struct extremes e = {0, 0};
    struct slopes by = {0, 0};
    float w[N][EACH] = {}, v[N][EACH] = {}, gradient[N][EACH] = {};
    const auto for_pieces = [&](auto f) {
#pragma unroll
        for (int k = 0; k < N; k++)
            if ((k * lanes + lane) * EACH < p.n)
                f(k, (k * lanes + lane) * EACH);
    };
    for_pieces([&](int k, int64_t at) {
        load<TW, EACH>((const TW *)j.w + p.row * j.w_stride + p.col + at, w[k]);
        load<float, EACH>(j.v + p.row * j.v_stride + p.col + at, v[k]);
        if (j.gradient)
            load<float, EACH>(j.gradient + p.row * j.gradient_stride + p.col + at, gradient[k]);
    });
    for_pieces([&](int k, int64_t at) {
        widen<EACH>(e, w[k]);
        if (j.gradient || keep)
            step_piece<EACH>(j, s, keep, p, at, w[k], v[k], gradient[k], by);
    });
    share(j, lanes, e, by);
    __syncwarp(); /* all have read the state */
    const bool first = here && lane == 0;
    if (first && keep)
        keep_state(j, p, s);
    if (j.gradient)
        move_range(j, s, e, by);
    move_grid(j, s, e);
    if (first)
        store_state(j, p, s);
    for_pieces([&](int k, int64_t at) { restore_piece<T, EACH>(j, s, p, at, w[k], v[k]); });
}

/* --- groups of any length ------------------------------------------------------------------------------------------ */

/* Over the block, known to every thread; shared: [THREADS / 32]. */
template <typename F> static __device__ __forceinline__ float fold_block(float x, float *shared, F f)
{
    x = fold_lanes(x, 32, f);
    __syncthreads(); /* shared may still be read from a fold before */
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (int i = 1; i < THREADS / 32; i++)
        x = f(x, shared[i]);
    return x;
}

/* A block for each group, which is read twice. */
template <typename TW, typename T, int V>
static __global__ void __launch_bounds__(THREADS) long_step_kernel(struct tune_job j)
{
    __shared__ float shared[THREADS / 32];
    const auto add = [](float a, float b) { return a + b; };
    const struct place p = place_of(j, blockIdx.x);
    const bool keep = keeps(j);
    struct state s = load_state(j, p);
    struct extremes e = {0, 0};
    struct slopes by = {0, 0};
    const TW *weights = (const TW *)j.w + p.row * j.w_stride + p.col;
    const float *offsets = j.v + p.row * j.v_stride + p.col;
    for (int64_t at = (int64_t)threadIdx.x * V; at < p.n; at += THREADS * V) {
        float w[V], v[V], gradient[V] = {};
        load<TW, V>(weights + at, w);
        load<float, V>(offsets + at, v);
        if (j.gradient)
            load<float, V>(j.gradient + p.row * j.gradient_stride + p.col + at, gradient);
        widen<V>(e, w);
        if (j.gradient || keep)
            step_piece<V>(j, s, keep, p, at, w, v, gradient, by);
    }
    e.low = fold_block(e.low, shared, lesser); /* after which all have read the state */
    e.high = fold_block(e.high, shared, greater);
    by.scale = fold_block(by.scale, shared, add);
    by.zero = fold_block(by.zero, shared, add);
    if (threadIdx.x == 0 && keep)
        keep_state(j, p, s);
    if (j.gradient)
        move_range(j, s, e, by);
    move_grid(j, s, e);
    if (threadIdx.x == 0)
        store_state(j, p, s);
    for (int64_t at = (int64_t)threadIdx.x * V; at < p.n; at += THREADS * V) {
        float w[V], v[V];
        load<TW, V>(weights + at, w);
        load<float, V>(offsets + at, v); /* this thread's own */
        restore_piece<T, V>(j, s, p, at, w, v);
    }
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

static int check_tuning(const struct tuning *t, const char *op)
{
    const struct qmat *q = t->q;
    const int64_t rows = t->w->rows, groups = q->scales.cols;
    CHECK(q->cols == t->w->cols && q->scales.rows == rows && q->group > 0 &&
          groups == (q->cols + q->group - 1) / q->group && q->scales.dtype == DTYPE_BF16);
    CHECK(!q->zeros.data || (q->zeros.dtype == DTYPE_I8 && q->zeros.rows == rows && q->zeros.cols == groups));
    CHECK(t->v->dtype == DTYPE_F32 && t->v->rows == rows && t->v->cols == q->cols);
    CHECK(t->high->dtype == DTYPE_F32 && t->high->rows == rows && t->high->cols == groups);
    CHECK(t->start ? t->start->dtype == DTYPE_BF16 && t->start->rows == rows && t->start->cols == groups
                   : t->low->dtype == DTYPE_F32 && t->low->rows == rows && t->low->cols == groups);
    CHECK(rows * groups <= INT32_MAX);
    if (q->bits != 4 && q->bits != 8)
        return err_set(ERR_UNSUPPORTED, "%s: %d bits, expected 4 or 8", op, q->bits);
    return cuda_check_float(t->w, op);
}

/* Where the best iterate goes. */
static void set_kept(struct tune_job *j, const struct tuning *t)
{
    const struct qmat *k = t->kept;
    CHECK(t->codes->dtype == DTYPE_I8 && t->codes->rows == t->w->rows && t->codes->cols == t->w->cols);
    CHECK(k->scales.dtype == DTYPE_BF16 && k->scales.rows == t->w->rows &&
          k->scales.cols == t->q->scales.cols);
    j->codes = (int8_t *)t->codes->data;
    j->codes_stride = t->codes->stride;
    j->kept_scales = (uint16_t *)k->scales.data;
    j->kept_scales_stride = k->scales.stride;
    j->kept_zeros = (int8_t *)k->zeros.data;
    j->kept_zeros_stride = k->zeros.stride;
}

static struct tune_job make_job(const struct tuning *t, const struct mat *gradient,
                                const struct tune_rates *rates)
{
    struct tune_job j = {};
    j.w = t->w->data;
    j.w_stride = t->w->stride;
    j.v = (float *)t->v->data;
    j.v_stride = t->v->stride;
    j.high = (float *)t->high->data;
    j.high_stride = t->high->stride;
    if (t->start) {
        j.start = (const uint16_t *)t->start->data;
        j.start_stride = t->start->stride;
    } else {
        j.low = (float *)t->low->data;
        j.low_stride = t->low->stride;
    }
    if (gradient) {
        j.gradient = (const float *)gradient->data;
        j.gradient_stride = gradient->stride;
        j.rates = *rates;
    }
    j.restored = t->restored->data;
    j.restored_stride = t->restored->stride;
    j.scales = (uint16_t *)t->q->scales.data;
    j.scales_stride = t->q->scales.stride;
    j.zeros = (int8_t *)t->q->zeros.data;
    j.zeros_stride = t->q->zeros.stride;
    j.cols = t->w->cols;
    j.group = t->q->group;
    j.per_row = (uint32_t)t->q->scales.cols;
    j.n_groups = (uint32_t)t->w->rows * j.per_row;
    j.lowest = t->lowest;
    j.highest = t->highest;
    j.bits = t->q->bits;
    j.distance = t->distance;
    j.ends_clip = t->ends_clip;
    return j;
}

template <typename TW, typename T>
static void launch_step(const struct tune_job &j, bool pieces, cudaStream_t stream)
{
    const int64_t longest = j.group < j.cols ? j.group : j.cols;
    if (!pieces || longest > LONGEST) {
        (pieces ? long_step_kernel<TW, T, EACH>
                : long_step_kernel<TW, T, 1>)<<<j.n_groups, THREADS, 0, stream>>>(j);
        return;
    }
    int shift = 0;
    while (shift < 5 && (EACH << shift) < longest)
        shift++;
    const int64_t threads = (int64_t)j.n_groups << shift, blocks = (threads + THREADS - 1) / THREADS;
    (longest > 32 * EACH ? step_kernel<TW, T, MOST_PIECES>
                         : step_kernel<TW, T, 1>)<<<(unsigned)blocks, THREADS, 0, stream>>>(j, shift);
}

template <typename TW>
static void launch_step_to(enum dtype restored, const struct tune_job &j, bool pieces, cudaStream_t stream)
{
    (restored == DTYPE_BF16 ? launch_step<TW, bf16> : launch_step<TW, float>)(j, pieces, stream);
}

extern "C" int cuda_tune_step(const struct backend *b, const struct tuning *t, const struct mat *gradient,
                              const struct tune_rates *rates, const int32_t *keep)
{
    const int rc = check_tuning(t, "tune_step");
    const struct mat *const all[] = {t->w, t->v, t->restored, gradient ? gradient : t->v,
                                     keep ? t->codes : t->v};
    bool pieces = t->q->group % EACH == 0 || t->q->group >= t->w->cols;
    for (int i = 0; i < 5; i++) {
        CHECK(all[i]->rows == t->w->rows && all[i]->cols == t->w->cols);
        pieces = pieces && in_pieces(all[i], EACH * dtype_bytes(all[i]->dtype));
    }
    CHECK((!gradient || gradient->dtype == DTYPE_F32) &&
          (t->restored->dtype == DTYPE_BF16 || t->restored->dtype == DTYPE_F32));
    if (rc < 0 || t->w->rows == 0 || t->w->cols == 0)
        return rc;
    struct tune_job j = make_job(t, gradient, rates);
    if (keep) {
        j.keep = keep;
        set_kept(&j, t);
    }
    const cudaStream_t stream = cuda_state(b)->stream;
    (t->w->dtype == DTYPE_BF16  ? launch_step_to<bf16>
     : t->w->dtype == DTYPE_F16 ? launch_step_to<__half>
                                : launch_step_to<float>)(t->restored->dtype, j, pieces, stream);
    return cuda_launched("tune_step");
}

/* --- the start ---------------------------------------------------------------------------------------------------- */

/* A block for each row. codes: NULL, or to begin from. */
static __global__ void begin_kernel(struct tune_job j, enum dtype dtype, const int8_t *codes)
{
    const int64_t row = blockIdx.x;
    const struct code_range r = code_range(j.bits);
    for (int64_t g = threadIdx.x; g < j.per_row; g += THREADS) {
        j.high[row * j.high_stride + g] = 1;
        if (j.low)
            j.low[row * j.low_stride + g] = 1;
    }
    for (int64_t c = threadIdx.x; c < j.cols; c += THREADS) {
        float v = 0;
        if (codes) {
            const int64_t g = c / j.group;
            const float zero = j.zeros ? (float)j.zeros[row * j.zeros_stride + g] : 0;
            const float u = load_as_float(j.w, dtype, row * j.w_stride + c) /
                            bf16_value(j.start[row * j.start_stride + g]);
            const float code = (float)codes[row * j.codes_stride + c];
            const float nearest = clamped(rintf(u), r.low - zero, r.high - zero);
            v = code == nearest ? 0 : code > nearest ? code - j.distance - u : code + j.distance - u;
        }
        j.v[row * j.v_stride + c] = v;
    }
}

extern "C" int cuda_tune_begin(const struct backend *b, const struct tuning *t, const struct mat *codes)
{
    const int rc = check_tuning(t, "tune_begin");
    CHECK(!codes ||
          (t->start && codes->dtype == DTYPE_I8 && codes->rows == t->w->rows && codes->cols == t->w->cols));
    if (rc < 0 || t->w->rows == 0 || t->w->cols == 0)
        return rc;
    struct tune_job j = make_job(t, NULL, NULL);
    if (t->low) { /* with start too, where there is one */
        j.low = (float *)t->low->data;
        j.low_stride = t->low->stride;
    }
    j.codes_stride = codes ? codes->stride : 0;
    begin_kernel<<<(unsigned)t->w->rows, THREADS, 0, cuda_state(b)->stream>>>(
        j, t->w->dtype, codes ? (const int8_t *)codes->data : NULL);
    return cuda_launched("tune_begin");
}

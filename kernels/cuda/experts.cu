/* Mixtures of experts: which experts a token goes to and how much each counts, rows of tokens side by side for an
 * expert's products, and the experts' results added up again; the router's gradient. A warp takes a row, or a piece of
 * one. */
#include "kernels/cuda/elements.cuh"
#include "kernels/expert_operands.h"

enum {
    WARPS = THREADS / 32,
    PIECES = 2, /* of a row, that a lane has under way at a time */
};

static const unsigned ALL = 0xffffffffu;

static unsigned blocks_of(int64_t warps)
{
    return (unsigned)((warps + WARPS - 1) / WARPS);
}

static __device__ __forceinline__ int64_t warp_of_grid(void)
{
    return (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
}

/* --- routing ------------------------------------------------------------------------------------------------------ */

struct route_job {
    const float *logits;
    const void *factors; /* NULL: all ones */
    enum dtype factors_dtype;
    int32_t *experts;
    float *weights;
    int64_t rows, logits_stride, experts_stride, weights_stride;
    int n, k;
};

/* Greater where the number is; > 0 but for NaNs. −0 is 0. */
static __device__ __forceinline__ unsigned sort_key(float x)
{
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Of a lane's E logits those that are not chosen yet: the greatest, of equals the first. */
template <int E> static __device__ __forceinline__ unsigned greatest(const float *x, unsigned gone, int *at)
{
    unsigned best = 0;
#pragma unroll
    for (int i = 0; i < E; i++) {
        const unsigned key = gone >> i & 1 ? 0 : sort_key(x[i]);
        *at = key > best ? i : *at;
        best = key > best ? key : best;
    }
    return best;
}

/* Which of the lane's logits are among the row's k greatest, as bits; *highest: the row's greatest. Of lanes with equals
 * the lowest has the first, for a lane's logits are neighbours. */
template <int E>
static __device__ __forceinline__ unsigned choose(const float *x, unsigned absent, int k, float *highest)
{
    const int lane = threadIdx.x % 32;
    int at = 0;
    unsigned gone = absent, best = greatest<E>(x, gone, &at);
    for (int round = 0; round < k; round++) {
        const unsigned top = __reduce_max_sync(ALL, best);
        const int owner = __ffs(__ballot_sync(ALL, best == top)) - 1;
        if (round == 0)
            *highest = __uint_as_float(top & 0x80000000u ? top ^ 0x80000000u : ~top);
        if (lane == owner) {
            gone |= 1u << at;
            best = greatest<E>(x, gone, &at);
        }
    }
    return gone & ~absent;
}

/* Σ over the lanes before this one. */
static __device__ __forceinline__ int sum_before(int own)
{
    int sum = own;
    for (int i = 1; i < 32; i *= 2) {
        const int other = __shfl_up_sync(ALL, sum, i);
        sum += (int)(threadIdx.x % 32) >= i ? other : 0;
    }
    return sum - own;
}

/* A lane has the E logits from lane·E on, so that the chosen ones come in ascending order, lane by lane. */
template <int E> static __global__ void __launch_bounds__(THREADS) route_kernel(struct route_job j)
{
    const int64_t row = warp_of_grid();
    const int first = threadIdx.x % 32 * E;
    if (row >= j.rows)
        return;
    const float *logits = j.logits + row * j.logits_stride + first;
    int32_t *experts = j.experts + row * j.experts_stride;
    float *weights = j.weights + row * j.weights_stride;
    float x[E], highest = 0, sum = 0;
    unsigned absent = 0;
    bool damaged = false;
#pragma unroll
    for (int i = 0; i < E; i++) {
        absent |= first + i < j.n ? 0 : 1u << i;
        x[i] = first + i < j.n ? logits[i] : 0;
        damaged = damaged || x[i] != x[i];
    }
    if (__any_sync(ALL, damaged)) {
        for (int i = threadIdx.x % 32; i < j.k; i += 32) {
            experts[i] = i;
            weights[i] = __uint_as_float(0x7fc00000u);
        }
        return;
    }
    const unsigned chosen = choose<E>(x, absent, j.k, &highest);
#pragma unroll
    for (int i = 0; i < E; i++) {
        x[i] = chosen >> i & 1 ? expf(x[i] - highest) : 0;
        sum += x[i];
    }
    sum = warp_sum(sum);
    int at = sum_before(__popc(chosen));
#pragma unroll
    for (int i = 0; i < E; i++)
        if (chosen >> i & 1) {
            experts[at] = first + i;
            weights[at++] =
                x[i] / sum * (j.factors ? load_as_float(j.factors, j.factors_dtype, first + i) : 1);
        }
}

extern "C" int cuda_route(const struct backend *b, const struct mat *logits, const struct mat *factors,
                          const struct mat *experts, const struct mat *weights)
{
    int rc = check_route(logits, factors, experts, weights);
    if (!rc && factors)
        rc = cuda_check_float(factors, "route");
    if (rc < 0 || logits->rows == 0)
        return rc;
    struct route_job j = {};
    j.logits = (const float *)logits->data;
    j.logits_stride = logits->stride;
    if (factors) {
        j.factors = factors->data;
        j.factors_dtype = factors->dtype;
    }
    j.experts = (int32_t *)experts->data;
    j.experts_stride = experts->stride;
    j.weights = (float *)weights->data;
    j.weights_stride = weights->stride;
    j.rows = logits->rows;
    j.n = (int)logits->cols;
    j.k = (int)experts->cols;
    static_assert(MAX_EXPERTS <= 32 * 32, "a lane's bits");
    (j.n <= 128   ? route_kernel<4>
     : j.n <= 256 ? route_kernel<8>
                  : route_kernel<32>)<<<blocks_of(j.rows), THREADS, 0, cuda_state(b)->stream>>>(j);
    return cuda_launched("route");
}

/* --- rows there and back ------------------------------------------------------------------------------------------ */

/* How warps share rows: each takes up to PIECES·32·V columns of one. */
static int64_t parts_of(int64_t cols, int v)
{
    return (cols + 32 * v * PIECES - 1) / (32 * v * PIECES);
}

/* f(k, column) for the lane's pieces of V columns in a warp's part of a row. */
template <int V, typename F>
static __device__ __forceinline__ void for_pieces(int64_t part, int64_t cols, F f)
{
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int64_t c = ((part * PIECES + k) * 32 + threadIdx.x % 32) * V;
        if (c < cols)
            f(k, c);
    }
}

struct gather_job {
    const int32_t *rows;  /* NULL: in order */
    const float *factors; /* NULL: all ones */
    int64_t n, cols, parts, x_stride, out_stride;
};

template <typename TX, typename TOUT, int V>
static __global__ void __launch_bounds__(THREADS) gather_kernel(const TX *x, TOUT *out, struct gather_job j)
{
    const int64_t warp = warp_of_grid(), row = warp / j.parts, part = warp % j.parts;
    if (row >= j.n)
        return;
    const float factor = j.factors ? j.factors[row] : 1;
    x += (j.rows ? j.rows[row] : row) * j.x_stride;
    out += row * j.out_stride;
    float e[PIECES][V];
    for_pieces<V>(part, j.cols, [&](int k, int64_t c) { load<TX, V>(x + c, e[k]); });
    for_pieces<V>(part, j.cols, [&](int k, int64_t c) {
#pragma unroll
        for (int i = 0; i < V; i++)
            e[k][i] *= factor;
        store<TOUT, V>(out + c, e[k]);
    });
}

template <typename TX, typename TOUT>
static void launch_gather(const struct mat *x, const struct mat *out, struct gather_job j,
                          cudaStream_t stream)
{
    const bool pieces = in_pieces(x, 8 * sizeof(TX)) && in_pieces(out, 8 * sizeof(TOUT));
    j.parts = parts_of(j.cols, pieces ? 8 : 1);
    (pieces ? gather_kernel<TX, TOUT, 8>
            : gather_kernel<TX, TOUT, 1>)<<<blocks_of(j.n * j.parts), THREADS, 0, stream>>>(
        (const TX *)x->data, (TOUT *)out->data, j);
}

extern "C" int cuda_gather_rows(const struct backend *b, const struct mat *x, const struct mat *rows,
                                const struct mat *factors, const struct mat *out)
{
    check_gather_rows(x, rows, factors, out);
    int rc = x->dtype == DTYPE_F32 ? 0 : check_dtype(x, DTYPE_BF16, "gather_rows");
    if (!rc && out->dtype != DTYPE_F32)
        rc = check_dtype(out, DTYPE_BF16, "gather_rows");
    if (rc < 0 || out->rows == 0)
        return rc;
    struct gather_job j = {};
    j.rows = rows ? (const int32_t *)rows->data : NULL;
    j.factors = factors ? (const float *)factors->data : NULL;
    j.n = out->rows;
    j.cols = out->cols;
    j.x_stride = x->stride;
    j.out_stride = out->stride;
    const bool from_f32 = x->dtype == DTYPE_F32, to_f32 = out->dtype == DTYPE_F32;
    (from_f32 && to_f32 ? launch_gather<float, float>
     : from_f32         ? launch_gather<float, bf16>
     : to_f32           ? launch_gather<bf16, float>
                        : launch_gather<bf16, bf16>)(x, out, j, cuda_state(b)->stream);
    return cuda_launched("gather_rows");
}

struct combine_job {
    const bf16 *y;
    bf16 *out;
    const int32_t *slots;
    const float *weights; /* NULL: all ones */
    int64_t n, cols, parts, y_stride, out_stride, slots_stride, weights_stride;
    int k;
};

template <int V> static __global__ void __launch_bounds__(THREADS) combine_kernel(struct combine_job j)
{
    const int64_t warp = warp_of_grid(), row = warp / j.parts, part = warp % j.parts;
    if (row >= j.n)
        return;
    const int32_t *slots = j.slots + row * j.slots_stride;
    const float *weights = j.weights ? j.weights + row * j.weights_stride : NULL;
    float sum[PIECES][V] = {};
    int64_t from[PIECES] = {}; /* beyond the row's end its beginning: loads without a condition overlap */
    for_pieces<V>(part, j.cols, [&](int k, int64_t c) { from[k] = c; });
#pragma unroll 4
    for (int s = 0; s < j.k; s++) {
        const bf16 *y = j.y + slots[s] * j.y_stride;
        const float weight = weights ? weights[s] : 1;
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            float e[V];
            load<bf16, V>(y + from[k], e);
#pragma unroll
            for (int i = 0; i < V; i++)
                sum[k][i] += weight * e[i];
        }
    }
    for_pieces<V>(part, j.cols,
                  [&](int k, int64_t c) { store<bf16, V>(j.out + row * j.out_stride + c, sum[k]); });
}

extern "C" int cuda_combine_rows(const struct backend *b, const struct mat *y, const struct mat *slots,
                                 const struct mat *weights, const struct mat *out)
{
    check_combine_rows(y, slots, weights, out);
    CHECK(slots->cols <= INT32_MAX);
    int rc = check_dtype(y, DTYPE_BF16, "combine_rows");
    if (!rc)
        rc = check_dtype(out, DTYPE_BF16, "combine_rows");
    if (rc < 0 || out->rows == 0)
        return rc;
    const bool pieces = in_pieces(y, 16) && in_pieces(out, 16);
    struct combine_job j = {};
    j.y = (const bf16 *)y->data;
    j.y_stride = y->stride;
    j.out = (bf16 *)out->data;
    j.out_stride = out->stride;
    j.slots = (const int32_t *)slots->data;
    j.slots_stride = slots->stride;
    if (weights) {
        j.weights = (const float *)weights->data;
        j.weights_stride = weights->stride;
    }
    j.n = out->rows;
    j.cols = out->cols;
    j.k = (int)slots->cols;
    j.parts = parts_of(j.cols, pieces ? 8 : 1);
    (pieces ? combine_kernel<8>
            : combine_kernel<1>)<<<blocks_of(j.n * j.parts), THREADS, 0, cuda_state(b)->stream>>>(j);
    return cuda_launched("combine_rows");
}

/* --- the router's gradient ---------------------------------------------------------------------------------------- */

struct route_backward_job {
    const bf16 *y, *dout;
    const float *logits;
    const void *factors; /* NULL: all ones */
    enum dtype factors_dtype;
    const int32_t *experts, *slots;
    float *dlogits;
    int64_t n, cols, y_stride, dout_stride, logits_stride, experts_stride, slots_stride, dlogits_stride;
    int n_experts, k;
};

/* x·y over the warp, known to every lane. */
template <int V> static __device__ __forceinline__ float dot_rows(const bf16 *x, const bf16 *y, int64_t n)
{
    float sum = 0;
#pragma unroll 4
    for (int64_t c = threadIdx.x % 32 * V; c < n; c += 32 * V) {
        float a[V], b[V];
        load<bf16, V>(x + c, a);
        load<bf16, V>(y + c, b);
#pragma unroll
        for (int i = 0; i < V; i++)
            sum += a[i] * b[i];
    }
    return warp_sum(sum);
}

/* With p the softmax over the chosen logits, weights are p·factor; with g = factor·(dout·y) a chosen logit gains by
 * p·(g − Σ p·g). Lane i has the chosen ones i and i + 32. */
template <int V>
static __global__ void __launch_bounds__(THREADS) route_backward_kernel(struct route_backward_job j)
{
    const int64_t row = warp_of_grid();
    const int lane = threadIdx.x % 32;
    if (row >= j.n)
        return;
    const int32_t *experts = j.experts + row * j.experts_stride, *slots = j.slots + row * j.slots_stride;
    const float *logits = j.logits + row * j.logits_stride;
    float *out = j.dlogits + row * j.dlogits_stride;
    float x[2], p[2], g[2] = {}, highest = -INFINITY;
    for (int s = 0; s < j.k; s++) {
        const float dot = dot_rows<V>(j.dout + row * j.dout_stride, j.y + slots[s] * j.y_stride, j.cols);
        g[0] = s == lane ? dot : g[0];
        g[1] = s == lane + 32 ? dot : g[1];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int s = lane + 32 * i;
        x[i] = s < j.k ? logits[experts[s]] : -INFINITY;
        g[i] *= s < j.k && j.factors ? load_as_float(j.factors, j.factors_dtype, experts[s]) : 1;
        highest = x[i] > highest ? x[i] : highest;
    }
    for (int i = 16; i; i /= 2) {
        const float other = __shfl_xor_sync(ALL, highest, i);
        highest = other > highest ? other : highest;
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        p[i] = lane + 32 * i < j.k ? expf(x[i] - highest) : 0;
    const float sum = warp_sum(p[0] + p[1]);
    const float mean = warp_sum(p[0] / sum * g[0] + p[1] / sum * g[1]);
    __syncwarp(); /* the logits may lie here */
    for (int e = lane; e < j.n_experts; e += 32)
        out[e] = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (lane + 32 * i < j.k)
            out[experts[lane + 32 * i]] = p[i] / sum * (g[i] - mean);
}

static struct route_backward_job route_backward_job(const struct route_tape *t, const struct mat *dout,
                                                    const struct mat *dlogits)
{
    struct route_backward_job j = {};
    j.y = (const bf16 *)t->y.data;
    j.y_stride = t->y.stride;
    j.dout = (const bf16 *)dout->data;
    j.dout_stride = dout->stride;
    j.logits = (const float *)t->logits.data;
    j.logits_stride = t->logits.stride;
    j.factors = t->factors.data;
    j.factors_dtype = t->factors.dtype;
    j.experts = (const int32_t *)t->experts.data;
    j.experts_stride = t->experts.stride;
    j.slots = (const int32_t *)t->slots.data;
    j.slots_stride = t->slots.stride;
    j.dlogits = (float *)dlogits->data;
    j.dlogits_stride = dlogits->stride;
    j.n = dout->rows;
    j.cols = dout->cols;
    j.n_experts = (int)dlogits->cols;
    j.k = (int)t->experts.cols;
    return j;
}

extern "C" int cuda_route_backward(const struct backend *b, const struct route_tape *tape,
                                   const struct mat *dout, const struct mat *dlogits)
{
    const struct route_tape *t = tape;
    check_route_backward(t, dout, dlogits);
    int rc = t->factors.data ? cuda_check_float(&t->factors, "route_backward") : 0;
    if (!rc)
        rc = check_dtype(&t->y, DTYPE_BF16, "route_backward");
    if (!rc)
        rc = check_dtype(dout, DTYPE_BF16, "route_backward");
    if (rc < 0 || dout->rows == 0)
        return rc;
    static_assert(MAX_CHOSEN <= 2 * 32, "two of a row for a lane");
    const bool pieces = in_pieces(&t->y, 16) && in_pieces(dout, 16);
    (pieces ? route_backward_kernel<8>
            : route_backward_kernel<1>)<<<blocks_of(dout->rows), THREADS, 0, cuda_state(b)->stream>>>(
        route_backward_job(t, dout, dlogits));
    return cuda_launched("route_backward");
}

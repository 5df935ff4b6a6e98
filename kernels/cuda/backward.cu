/* Gradients of norms, of rotary positions and of the gated activation, limited by memory as their forward passes are; the
 * loss of a block. Those of products are in gemm.cu. */
#include "kernels/cuda/elements.cuh"

static int check_float_or_act(const struct mat *m, const char *op)
{
    return m->dtype == DTYPE_F32 ? 0 : check_dtype(m, DTYPE_BF16, op);
}

/* --- RMSNorm ------------------------------------------------------------------------------------------------------ */

/* With r = 1/sqrt(mean(x²) + eps) and g = dy·w: dx = r·(g − x·r²·mean(g·x)). */
struct norm_factors {
    float r, back; /* back: r²·mean(g·x) */
};

static __device__ __forceinline__ struct norm_factors norm_factors(float squares, float dots, float eps,
                                                                   int64_t n)
{
    const float r = 1 / sqrtf(squares / (float)n + eps);
    return (struct norm_factors){r, r * r * (dots / (float)n)};
}

enum {
    FEW_PER_THREAD =
        12, /* elements of a row that a thread keeps in registers, of x and of dy: rows of up to 3072; … */
    MANY_PER_THREAD = 24, /* … of up to 6144, or with four times the threads 24576 */
    MOST_THREADS = 4 * THREADS,
};

template <typename TX, typename TDY, typename TOUT> struct norm_job {
    const TX *x;
    const TDY *dy;
    const float *add; /* or NULL */
    TOUT *out;
    int64_t x_stride, dy_stride, add_stride, out_stride, cols;
    struct norm_weight w;
    float eps;
};

/* Of V elements of the block's row: dx, and add. */
template <int V, typename TX, typename TDY, typename TOUT>
static __device__ __forceinline__ void put_dx(const struct norm_job<TX, TDY, TOUT> &j, struct norm_factors f,
                                              int64_t c, const float *x, const float *g)
{
    float y[V], rest[V] = {};
    if (j.add)
        load<float, V>(j.add + blockIdx.x * j.add_stride + c, rest);
#pragma unroll
    for (int i = 0; i < V; i++)
        y[i] = rest[i] + f.r * (g[i] - x[i] * f.back);
    store<TOUT, V>(j.out + blockIdx.x * j.out_stride + c, y);
}

/* Both sums over the block, known to every thread; once in a kernel. */
static __device__ __forceinline__ float2 block_sums(float first, float second)
{
    __shared__ float2 shared[MOST_THREADS / 32];
    const float2 of_warp = make_float2(warp_sum(first), warp_sum(second));
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = of_warp;
    __syncthreads();
    float2 total = make_float2(0, 0);
    for (int i = 0; i < (int)blockDim.x / 32; i++)
        total = make_float2(total.x + shared[i].x, total.y + shared[i].y);
    return total;
}

/* A row stands in the registers of a block: element (k·threads + thread)·V + i in x[k·V + i], 0 beyond its end. */
template <int V, int N, int T, typename TX, typename TDY, typename TOUT>
static __global__ void __launch_bounds__(T) norm_kept_kernel(struct norm_job<TX, TDY, TOUT> j)
{
    const auto for_row = [&](auto f) {
#pragma unroll
        for (int k = 0; k < N / V; k++) {
            const int64_t c = ((int64_t)k * blockDim.x + threadIdx.x) * V;
            if (c < j.cols)
                f(k * V, c);
        }
    };
    float x[N] = {}, g[N] = {}, squares = 0, dots = 0;
    for_row([&](int i, int64_t c) {
        load<TX, V>(j.x + blockIdx.x * j.x_stride + c, x + i);
        load<TDY, V>(j.dy + blockIdx.x * j.dy_stride + c, g + i);
    });
    for_row([&](int i, int64_t c) {
        float w[V];
        load_weight<V>(j.w, c, w);
#pragma unroll
        for (int e = 0; e < V; e++) {
            g[i + e] *= w[e];
            squares += x[i + e] * x[i + e];
            dots += g[i + e] * x[i + e];
        }
    });
    const float2 sums = block_sums(squares, dots);
    const struct norm_factors f = norm_factors(sums.x, sums.y, j.eps, j.cols);
    for_row([&](int i, int64_t c) { put_dx<V>(j, f, c, x + i, g + i); });
}

/* A row of any length and alignment, read twice. */
template <typename TX, typename TDY, typename TOUT>
static __global__ void __launch_bounds__(THREADS) norm_streamed_kernel(struct norm_job<TX, TDY, TOUT> j)
{
    const TX *x = j.x + blockIdx.x * j.x_stride;
    const TDY *dy = j.dy + blockIdx.x * j.dy_stride;
    float squares = 0, dots = 0, w;
    for (int64_t c = threadIdx.x; c < j.cols; c += THREADS) {
        const float v = to_float(x[c]);
        load_weight<1>(j.w, c, &w);
        squares += v * v;
        dots += to_float(dy[c]) * w * v;
    }
    const float2 sums = block_sums(squares, dots);
    const struct norm_factors f = norm_factors(sums.x, sums.y, j.eps, j.cols);
    for (int64_t c = threadIdx.x; c < j.cols; c += THREADS) {
        load_weight<1>(j.w, c, &w);
        const float v = to_float(x[c]), g = to_float(dy[c]) * w;
        put_dx<1>(j, f, c, &v, &g);
    }
}

/* What a norm's gradient is worked out from, and where it goes. */
struct norm_operands {
    const struct mat *x, *w, *dy, *add, *out;
    const struct norm_spec *spec;
};

template <typename TX, typename TDY, typename TOUT>
static void launch_norm(const struct norm_operands &o, cudaStream_t stream)
{
    struct norm_job<TX, TDY, TOUT> j = {
    };
    j.x = (const TX *)o.x->data;
    j.dy = (const TDY *)o.dy->data;
    j.out = (TOUT *)o.out->data;
    j.x_stride = o.x->stride;
    j.dy_stride = o.dy->stride;
    j.out_stride = o.out->stride;
    j.cols = o.x->cols;
    j.w = norm_weight(o.w, o.spec);
    j.eps = o.spec->eps;
    if (o.add) {
        j.add = (const float *)o.add->data;
        j.add_stride = o.add->stride;
    }
    const bool pieces = in_pieces(o.x, 4 * sizeof(TX)) && in_pieces(o.dy, 4 * sizeof(TDY)) &&
                        in_pieces(o.out, 4 * sizeof(TOUT)) && (!o.add || in_pieces(o.add, 16)) &&
                        weight_in_pieces(o.w);
    const unsigned rows = (unsigned)o.x->rows;
    const int64_t each = (j.cols + MANY_PER_THREAD - 1) / MANY_PER_THREAD;
    if (pieces && j.cols <= (int64_t)FEW_PER_THREAD * THREADS)
        norm_kept_kernel<4, FEW_PER_THREAD, THREADS><<<rows, THREADS, 0, stream>>>(j);
    else if (pieces && each <= THREADS)
        norm_kept_kernel<4, MANY_PER_THREAD, THREADS><<<rows, THREADS, 0, stream>>>(j);
    else if (pieces && each <= MOST_THREADS)
        norm_kept_kernel<4, MANY_PER_THREAD, MOST_THREADS>
            <<<rows, (unsigned)(each + 31) / 32 * 32, 0, stream>>>(j);
    else
        norm_streamed_kernel<<<rows, THREADS, 0, stream>>>(j);
}

template <typename TX, typename TDY>
static void launch_norm_to(const struct norm_operands &o, cudaStream_t stream)
{
    (o.out->dtype == DTYPE_F32 ? launch_norm<TX, TDY, float> : launch_norm<TX, TDY, bf16>)(o, stream);
}

extern "C" int cuda_rms_norm_backward(const struct backend *b, const struct mat *x, const struct mat *w,
                                      const struct norm_spec *spec, const struct mat *dy,
                                      const struct mat *add, const struct mat *out)
{
    CHECK(dy->rows == x->rows && dy->cols == x->cols && out->rows == x->rows && out->cols == x->cols);
    CHECK((!w || w->cols == x->cols) && (!add || (add->rows == x->rows && add->cols == x->cols)));
    const struct mat *const acts[] = {x, dy, out};
    int rc = w ? cuda_check_float(w, "rms_norm_backward") : 0;
    for (int i = 0; !rc && i < 3; i++)
        rc = check_float_or_act(acts[i], "rms_norm_backward");
    if (!rc && add)
        rc = check_dtype(add, DTYPE_F32, "rms_norm_backward");
    if (rc < 0 || x->rows == 0)
        return rc;
    const struct norm_operands o = {x, w, dy, add, out, spec};
    const cudaStream_t stream = cuda_state(b)->stream;
    if (x->dtype == DTYPE_F32)
        (dy->dtype == DTYPE_F32 ? launch_norm_to<float, float> : launch_norm_to<float, bf16>)(o, stream);
    else
        (dy->dtype == DTYPE_F32 ? launch_norm_to<bf16, float> : launch_norm_to<bf16, bf16>)(o, stream);
    return cuda_launched("rms_norm_backward");
}

/* --- the gated activation ----------------------------------------------------------------------------------------- */

/* gelu(z) = z·σ with σ = ½·(1 + tanh u) = 1 / (1 + e^−2u), u = √(2/π)·(z + 0.044715·z³), as elementwise.cu has it; its
 * derivative is σ + z·2u'·σ·(1 − σ). Far out, where σ is 0 or 1, u' may have overflown and must not count. */
static __device__ __forceinline__ void gelu_tanh(float z, float *value, float *slope)
{
    const float sqrt_2_pi = 0.7978845608f, cube = 0.044715f;
    const float s = 1 / (1 + __expf(-2 * sqrt_2_pi * (z + cube * z * z * z))), rise = s * (1 - s);
    *value = z * s;
    *slope = rise == 0 ? s : s + z * (2 * sqrt_2_pi * (1 + 3 * cube * z * z)) * rise;
}

struct geglu_job {
    const bf16 *gate, *up, *dy;
    bf16 *dgate, *dup;
    int64_t gate_stride, up_stride, dy_stride, dgate_stride, dup_stride, cols;
};

template <int V> static __global__ void __launch_bounds__(THREADS) geglu_kernel(struct geglu_job j)
{
    const int64_t row = blockIdx.y, c = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (c >= j.cols)
        return;
    float z[V], up[V], dy[V];
    load<bf16, V>(j.gate + row * j.gate_stride + c, z);
    load<bf16, V>(j.up + row * j.up_stride + c, up);
    load<bf16, V>(j.dy + row * j.dy_stride + c, dy);
#pragma unroll
    for (int i = 0; i < V; i++) {
        float value, slope;
        gelu_tanh(z[i], &value, &slope);
        z[i] = dy[i] * up[i] * slope;
        up[i] = dy[i] * value;
    }
    store<bf16, V>(j.dgate + row * j.dgate_stride + c, z);
    store<bf16, V>(j.dup + row * j.dup_stride + c, up);
}

extern "C" int cuda_geglu_backward(const struct backend *b, const struct mat *gate, const struct mat *up,
                                   const struct mat *dy, const struct mat *dgate, const struct mat *dup)
{
    enum { MAX_ROWS = 32768 }; /* of a grid */
    const struct mat *const acts[] = {gate, up, dy, dgate, dup};
    int rc = 0;
    bool pieces = true;
    for (int i = 0; !rc && i < 5; i++) {
        CHECK(acts[i]->rows == dy->rows && acts[i]->cols == dy->cols);
        rc = check_dtype(acts[i], DTYPE_BF16, "geglu_backward");
        pieces = pieces && in_pieces(acts[i], 16);
    }
    const int64_t each = (int64_t)THREADS * (pieces ? 8 : 1), blocks = (dy->cols + each - 1) / each;
    for (int64_t r = 0; !rc && blocks && r < dy->rows; r += MAX_ROWS) {
        const int64_t left = dy->rows - r, n = left < MAX_ROWS ? left : (int64_t)MAX_ROWS;
        const struct geglu_job j = {(const bf16 *)mat_rows(gate, r, n).data,
                                    (const bf16 *)mat_rows(up, r, n).data,
                                    (const bf16 *)mat_rows(dy, r, n).data,
                                    (bf16 *)mat_rows(dgate, r, n).data,
                                    (bf16 *)mat_rows(dup, r, n).data,
                                    gate->stride,
                                    up->stride,
                                    dy->stride,
                                    dgate->stride,
                                    dup->stride,
                                    dy->cols};
        const dim3 grid((unsigned)blocks, (unsigned)n);
        (pieces ? geglu_kernel<8> : geglu_kernel<1>)<<<grid, THREADS, 0, cuda_state(b)->stream>>>(j);
        rc = cuda_launched("geglu_backward");
    }
    return rc;
}

/* --- queries, keys and values ------------------------------------------------------------------------------------- */

struct qkv_job {
    const bf16 *qkv, *dq, *dkeys, *dvalues; /* dkeys and dvalues NULL: queries alone */
    bf16 *dqkv;
    const float *rope;
    int64_t qkv_stride, dq_stride, dkeys_stride, dvalues_stride, dqkv_stride, rope_stride;
    int64_t first_position, max_positions;
    uint32_t n_new, n_tasks;
    int n_heads, n_kv_heads, head_dim, n; /* n: heads of a row of qkv */
    bool q_normed, k_normed, values_normed, k_is_v;
    struct norm_weight q_norm, k_norm;
    float eps;
};

/* A head of qkv, and what its gradient follows from. */
struct head_job {
    const bf16 *x, *dy;
    const bf16 *dvalue; /* where the head is a value too, or NULL */
    bf16 *out;
    const float *table; /* by which it was turned, or NULL */
    bool normed;        /* before it was turned */
    struct norm_weight norm;
};

/* V elements of either half of a head. */
template <int V>
static __device__ __forceinline__ void load_halves(const bf16 *head, int i, int half, float (&out)[2][V])
{
    load<bf16, V>(head + i, out[0]);
    load<bf16, V>(head + half + i, out[1]);
}

/* The gradient by the normed head, times the norm's weight: dy, turned back by the angles by which the head was turned. */
template <int V>
static __device__ __forceinline__ void turn_back(const struct head_job &h, int i, int half, float (&g)[2][V])
{
    float c[V], s[V];
    load_halves<V>(h.dy, i, half, g);
    if (h.table) {
        load<float, V>(h.table + i, c);
        load<float, V>(h.table + half + i, s);
#pragma unroll
        for (int e = 0; e < V; e++) {
            const float low = g[0][e], high = g[1][e];
            g[0][e] = low * c[e] + high * s[e];
            g[1][e] = high * c[e] - low * s[e];
        }
    }
    load_weight<V>(h.norm, i, c);
    load_weight<V>(h.norm, half + i, s);
#pragma unroll
    for (int e = 0; e < V; e++) {
        g[0][e] *= c[e];
        g[1][e] *= s[e];
    }
}

template <int V>
static __device__ __forceinline__ float dot_halves(const float (&x)[2][V], const float (&y)[2][V])
{
    float sum = 0;
#pragma unroll
    for (int e = 0; e < V; e++)
        sum += x[0][e] * y[0][e] + x[1][e] * y[1][e];
    return sum;
}

/* One head, by L threads of a warp; lane l has dimensions (l + L·k)·V … of either half, k < STEPS. Where the head is a
 * value too, its gradients as the one and the other are added up: a norm's gradient is linear in its dy, and both norms
 * have the same r. */
template <int V, int L, int STEPS>
static __device__ __forceinline__ void head_backward(const struct qkv_job &j, const struct head_job &h)
{
    const int lane = threadIdx.x % L, half = j.head_dim / 2;
    const bool value_normed = h.dvalue && j.values_normed, any = h.normed || value_normed;
    float u[STEPS][2][V] = {}, g[STEPS][2][V] = {}, v[2][V], squares = 0, dots = 0;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const int i = (lane + L * k) * V;
        if (i >= half)
            continue;
        if (any)
            load_halves<V>(h.x, i, half, u[k]);
        turn_back<V>(h, i, half, g[k]);
        squares += dot_halves<V>(u[k], u[k]);
        if (h.normed)
            dots += dot_halves<V>(g[k], u[k]);
        if (value_normed) {
            load_halves<V>(h.dvalue, i, half, v);
            dots += dot_halves<V>(v, u[k]);
        }
    }
    const unsigned mask = L == 32 ? 0xffffffffu : 0xffffu << (threadIdx.x & 16);
    for (int i = L / 2; i; i >>= 1) {
        squares += __shfl_xor_sync(mask, squares, i, L);
        dots += __shfl_xor_sync(mask, dots, i, L);
    }
    const struct norm_factors f =
        any ? norm_factors(squares, dots, j.eps, j.head_dim) : (struct norm_factors){1, 0};
    const float own = h.normed ? f.r : 1, other = value_normed ? f.r : 1, back = f.r * f.back;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const int i = (lane + L * k) * V;
        if (i >= half)
            continue;
        if (h.dvalue)
            load_halves<V>(h.dvalue, i, half, v);
#pragma unroll
        for (int e = 0; e < 2 * V; e++) {
            float *to = &g[k][e / V][e % V];
            *to = own * *to - u[k][e / V][e % V] * back + (h.dvalue ? other * v[e / V][e % V] : 0);
        }
        store<bf16, V>(h.out + i, g[k][0]);
        store<bf16, V>(h.out + half + i, g[k][1]);
    }
}

/* L threads, a warp or half of one, for each head of each token's row of qkv. */
template <int V, int L, int STEPS>
static __global__ void __launch_bounds__(THREADS) split_qkv_kernel(struct qkv_job j)
{
    const uint32_t task = blockIdx.x * (THREADS / L) + threadIdx.x / L;
    if (task >= j.n_tasks)
        return;
    const uint32_t in_row = task / (uint32_t)j.n, sequence = in_row / j.n_new;
    const int head = (int)(task - in_row * (uint32_t)j.n), key = head - j.n_heads,
              value = key - j.n_kv_heads; /* not negative: it is one */
    const int64_t row = in_row, token = in_row - sequence * j.n_new;
    const int64_t slot = sequence * j.max_positions + j.first_position + token;
    const bf16 *value_rows = j.dvalues + slot * j.dvalues_stride;
    struct head_job h = {};
    h.x = j.qkv + row * j.qkv_stride + (int64_t)head * j.head_dim;
    h.out = j.dqkv + row * j.dqkv_stride + (int64_t)head * j.head_dim;
    h.table = value < 0 ? j.rope + token * j.rope_stride : NULL;
    if (key < 0) {
        h.dy = j.dq + row * j.dq_stride + head * j.head_dim;
        h.normed = j.q_normed, h.norm = j.q_norm;
    } else if (value < 0) {
        h.dy = j.dkeys + slot * j.dkeys_stride + key * j.head_dim;
        h.dvalue = j.k_is_v ? value_rows + key * j.head_dim : NULL;
        h.normed = j.k_normed, h.norm = j.k_norm;
    } else {
        h.dy = value_rows + value * j.head_dim;
        h.normed = j.values_normed, h.norm = {NULL, DTYPE_F32, 0};
    }
    head_backward<V, L, STEPS>(j, h);
}

static struct qkv_job make_qkv_job(const struct qkv_spec *spec, const struct mat *const acts[5])
{
    const struct heads *h = &spec->heads;
    struct qkv_job j = {};
    j.qkv = (const bf16 *)acts[0]->data;
    j.dq = (const bf16 *)acts[1]->data;
    j.dqkv = (bf16 *)acts[2]->data;
    j.rope = (const float *)spec->rope->data;
    j.qkv_stride = acts[0]->stride;
    j.dq_stride = acts[1]->stride;
    j.dqkv_stride = acts[2]->stride;
    j.rope_stride = spec->rope->stride;
    if (acts[3]) {
        j.dkeys = (const bf16 *)acts[3]->data;
        j.dvalues = (const bf16 *)acts[4]->data;
        j.dkeys_stride = acts[3]->stride;
        j.dvalues_stride = acts[4]->stride;
    }
    j.n_new = (uint32_t)(acts[0]->rows / spec->sequences.n);
    j.first_position = spec->sequences.first_position;
    j.max_positions = spec->sequences.max_positions;
    j.n = qkv_heads(spec, !acts[3]);
    j.n_tasks = (uint32_t)acts[0]->rows * (uint32_t)j.n;
    j.n_heads = h->n_heads;
    j.n_kv_heads = h->n_kv_heads;
    j.head_dim = h->head_dim;
    j.q_normed = spec->q_norm != NULL;
    j.k_normed = spec->k_norm != NULL;
    j.values_normed = spec->values_normed;
    j.k_is_v = spec->k_is_v;
    j.q_norm = norm_weight(spec->q_norm, &spec->norm);
    j.k_norm = norm_weight(spec->k_norm, &spec->norm);
    j.eps = spec->norm.eps;
    return j;
}

extern "C" int cuda_split_qkv_backward(const struct backend *b, const struct qkv_spec *spec,
                                       const struct mat *qkv, const struct mat *dq, const struct mat *dkeys,
                                       const struct mat *dvalues, const struct mat *dqkv)
{
    int rc = cuda_check_qkv("split_qkv_backward", spec, qkv, dq, dkeys, dvalues);
    CHECK(dqkv->cols == qkv->cols && dqkv->rows == qkv->rows);
    if (!rc)
        rc = check_dtype(dqkv, DTYPE_BF16, "split_qkv_backward");
    if (rc < 0 || qkv->rows == 0)
        return rc;
    const struct mat *const acts[5] = {qkv, dq, dqkv, dkeys, dvalues};
    const struct qkv_job j = make_qkv_job(spec, acts);
    const bool pieces = qkv_in_pieces(spec, acts, 5);
    const int64_t lanes = pieces ? 16 : 32, blocks = (j.n_tasks * lanes + THREADS - 1) / THREADS;
    const auto kernel = !pieces             ? split_qkv_kernel<1, 32, MAX_HALF / 32>
                        : j.head_dim <= 256 ? split_qkv_kernel<8, 16, 1>
                                            : split_qkv_kernel<8, 16, MAX_HALF / 128>;
    kernel<<<(unsigned)blocks, THREADS, 0, cuda_state(b)->stream>>>(j);
    return cuda_launched("split_qkv_backward");
}

/* --- the loss of a block ------------------------------------------------------------------------------------------ */

struct error_job {
    const float *y, *target;
    float *dy; /* or NULL */
    int64_t y_stride, target_stride, dy_stride;
    int64_t rows, per_row; /* pieces of V elements */
    float factor;
};

/* Which elements a thread adds up, and in which order, depends on the shape and the strides alone. */
template <int V>
static __global__ void __launch_bounds__(THREADS) error_kernel(struct error_job j, double *partials)
{
    enum { AT_ONCE = 4 };
    __shared__ double shared[THREADS / 32];
    const int64_t n = j.rows * j.per_row, step = (int64_t)gridDim.x * THREADS;
    double sum = 0;
    for (int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x; first < n; first += AT_ONCE * step) {
        float y[AT_ONCE][V] = {}, target[AT_ONCE][V] = {};
        int64_t row[AT_ONCE], col[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int64_t i = first + k * step;
            row[k] = j.rows == 1 ? 0 : i / j.per_row;
            col[k] = (i - row[k] * j.per_row) * V;
            if (i >= n)
                continue;
            load<float, V>(j.y + row[k] * j.y_stride + col[k], y[k]);
            load<float, V>(j.target + row[k] * j.target_stride + col[k], target[k]);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
            for (int e = 0; e < V; e++) {
                y[k][e] -= target[k][e];
                sum += (double)y[k][e] * y[k][e];
                y[k][e] *= j.factor;
            }
            if (j.dy && first + k * step < n)
                store<float, V>(j.dy + row[k] * j.dy_stride + col[k], y[k]);
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = sum;
}

static __global__ void add_partials(const double *partials, int n, double *sum)
{
    __shared__ double shared[THREADS / 32];
    double x = 0;
    for (int i = threadIdx.x; i < n; i += THREADS)
        x += partials[i];
    x = block_sum(x, shared);
    if (threadIdx.x == 0)
        *sum += x;
}

extern "C" int cuda_error_backward(const struct backend *b, const struct mat *y, const struct mat *target,
                                   float factor, double *sum, const struct mat *dy)
{
    const struct mat *const all[] = {y, target, dy ? dy : y};
    int rc = 0;
    bool pieces = true, whole = true;
    for (int i = 0; !rc && i < 3; i++) {
        CHECK(all[i]->rows == y->rows && all[i]->cols == y->cols);
        rc = check_dtype(all[i], DTYPE_F32, "error_backward");
        pieces = pieces && in_pieces(all[i], 16);
        whole = whole && all[i]->stride == all[i]->cols;
    }
    if (rc < 0 || y->rows == 0 || y->cols == 0)
        return rc;
    const struct cuda_state *s = cuda_state(b);
    const int64_t v = pieces ? 4 : 1, n = y->rows * y->cols / v, blocks = (n + THREADS - 1) / THREADS;
    struct error_job j = {};
    j.y = (const float *)y->data;
    j.target = (const float *)target->data;
    j.dy = dy ? (float *)dy->data : NULL;
    j.y_stride = y->stride;
    j.target_stride = target->stride;
    j.dy_stride = dy ? dy->stride : 0;
    j.rows = whole ? 1 : y->rows; /* without gaps: one long row */
    j.per_row = whole ? n : y->cols / v;
    j.factor = factor;
    const int grid = blocks < REDUCE_BLOCKS ? (int)blocks : REDUCE_BLOCKS;
    (pieces ? error_kernel<4> : error_kernel<1>)<<<grid, THREADS, 0, s->stream>>>(j, s->partials);
    add_partials<<<1, THREADS, 0, s->stream>>>(s->partials, grid, sum);
    return cuda_launched("error_backward");
}

static __global__ void keep_best_kernel(const double *loss, double *best, int32_t *improved)
{
    *improved = *loss < *best;
    if (*improved)
        *best = *loss;
}

extern "C" int cuda_keep_best(const struct backend *b, const double *loss, double *best, int32_t *improved)
{
    keep_best_kernel<<<1, 1, 0, cuda_state(b)->stream>>>(loss, best, improved);
    return cuda_launched("keep_best");
}

/* Operations that touch each element once: embedding, norms, rotary positions, the gated activation. They are limited
 * by memory; each reads its inputs once, several elements an access where rows allow it. */
#include "kernels/cuda/elements.cuh"

enum {
    MAX_PER_THREAD = 32, /* elements of a row that a thread keeps in registers: rows of up to 8192; … */
    FEW_PER_THREAD = 12, /* … of up to 3072, so that more rows are under way */
};

/* --- embedding ---------------------------------------------------------------------------------------------------- */

static __global__ void embed_kernel(const void *table, enum dtype dtype, int64_t stride, const int32_t *ids,
                                    float scale, float *out, int64_t out_stride, int64_t cols)
{
    const int64_t row = blockIdx.x, from = ids[row] * stride;
    for (int64_t c = threadIdx.x; c < cols; c += THREADS)
        out[row * out_stride + c] = load_as_float(table, dtype, from + c) * scale;
}

extern "C" int cuda_embed(const struct backend *b, const struct mat *table, const int32_t *ids, float scale,
                          const struct mat *out)
{
    int rc = cuda_check_float(table, "embed");
    if (!rc)
        rc = check_dtype(out, DTYPE_F32, "embed");
    CHECK(out->cols == table->cols);
    for (int64_t r = 0; r < out->rows; r++)
        CHECK(ids[r] >= 0 && ids[r] < table->rows);
    const size_t bytes = (size_t)out->rows * sizeof *ids;
    if (!rc && bytes > CUDA_SCRATCH_BYTES)
        rc = err_set(ERR_UNSUPPORTED, "embed: %lld tokens at a time are too many", (long long)out->rows);
    void *scratch;
    if (!rc)
        rc = cuda_scratch(b, &scratch);
    if (rc < 0 || out->rows == 0)
        return rc;
    const cudaStream_t stream = cuda_state(b)->stream;
    rc = cuda_status(cudaMemcpyAsync(scratch, ids, bytes, cudaMemcpyHostToDevice, stream), "embed");
    if (rc < 0)
        return rc;
    embed_kernel<<<(unsigned)out->rows, THREADS, 0, stream>>>(table->data, table->dtype, table->stride,
                                                              (const int32_t *)scratch, scale,
                                                              (float *)out->data, out->stride, out->cols);
    return cuda_launched("embed");
}

/* --- RMSNorm ------------------------------------------------------------------------------------------------------ */

/* A row stands in the block's registers: element (k·THREADS + thread)·V + i in x[k·V + i], 0 beyond its end. */
template <int V, int N, typename F> static __device__ __forceinline__ void for_row(int64_t cols, F f)
{
#pragma unroll
    for (int k = 0; k < N / V; k++) {
        const int64_t c = ((int64_t)k * THREADS + threadIdx.x) * V;
        if (c < cols)
            f(k * V, c);
    }
}

template <int N>
static __device__ __forceinline__ float inverse_rms(const float *x, float eps, int64_t cols, float *shared)
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += x[i] * x[i];
    return 1 / sqrtf(block_sum(sum, shared) / (float)cols + eps);
}

template <typename TX, typename TOUT, int V, int N>
static __global__ void __launch_bounds__(THREADS)
    rms_norm_kernel(const TX *x, int64_t x_stride, struct norm_weight w, float eps, TOUT *out,
                    int64_t out_stride, int64_t cols)
{
    __shared__ float shared[THREADS / 32];
    float v[N] = {};
    x += blockIdx.x * x_stride;
    out += blockIdx.x * out_stride;
    for_row<V, N>(cols, [&](int i, int64_t c) { load<TX, V>(x + c, v + i); });
    const float scale = inverse_rms<N>(v, eps, cols, shared);
    for_row<V, N>(cols, [&](int i, int64_t c) {
        float y[V];
        load_weight<V>(w, c, y);
#pragma unroll
        for (int j = 0; j < V; j++)
            y[j] = v[i + j] * (y[j] * scale);
        store<TOUT, V>(out + c, y);
    });
}

template <int V, int N>
static __global__ void __launch_bounds__(THREADS)
    add_norm_kernel(const bf16 *branch, int64_t branch_stride, struct norm_weight branch_w, float *x,
                    int64_t x_stride, struct norm_weight next_w, float eps, bf16 *out, int64_t out_stride,
                    int64_t cols)
{
    __shared__ float shared[THREADS / 32];
    float v[N] = {};
    branch += blockIdx.x * branch_stride;
    x += blockIdx.x * x_stride;
    out += blockIdx.x * out_stride;
    for_row<V, N>(cols, [&](int i, int64_t c) { load<bf16, V>(branch + c, v + i); });
    const float first = inverse_rms<N>(v, eps, cols, shared);
    for_row<V, N>(cols, [&](int i, int64_t c) {
        float y[V], weight[V];
        load<float, V>(x + c, y);
        load_weight<V>(branch_w, c, weight);
#pragma unroll
        for (int j = 0; j < V; j++)
            v[i + j] = y[j] + v[i + j] * (weight[j] * first);
        store<float, V>(x + c, v + i);
    });
    const float second = inverse_rms<N>(v, eps, cols, shared);
    for_row<V, N>(cols, [&](int i, int64_t c) {
        float y[V];
        load_weight<V>(next_w, c, y);
#pragma unroll
        for (int j = 0; j < V; j++)
            y[j] = v[i + j] * (y[j] * second);
        store<bf16, V>(out + c, y);
    });
}

static int check_norm(const struct mat *x, const struct mat *w, const struct mat *out, const char *op)
{
    CHECK(out->rows == x->rows && out->cols == x->cols && (!w || w->cols == x->cols));
    if (x->cols > (int64_t)MAX_PER_THREAD * THREADS)
        return err_set(ERR_UNSUPPORTED, "%s: rows of %lld, expected at most %d", op, (long long)x->cols,
                       MAX_PER_THREAD * THREADS);
    return w ? cuda_check_float(w, op) : 0;
}

template <typename TX, typename TOUT>
static void launch_norm(const struct mat *x, const struct norm_weight &w, bool pieces, float eps,
                        const struct mat *out, cudaStream_t stream)
{
    const bool whole = pieces && in_pieces(x, 4 * sizeof(TX)) && in_pieces(out, 4 * sizeof(TOUT));
    const auto kernel = !whole ? rms_norm_kernel<TX, TOUT, 1, MAX_PER_THREAD>
                        : x->cols <= (int64_t)FEW_PER_THREAD * THREADS
                            ? rms_norm_kernel<TX, TOUT, 4, FEW_PER_THREAD>
                            : rms_norm_kernel<TX, TOUT, 4, MAX_PER_THREAD>;
    kernel<<<(unsigned)x->rows, THREADS, 0, stream>>>((const TX *)x->data, x->stride, w, eps,
                                                      (TOUT *)out->data, out->stride, x->cols);
}

extern "C" int cuda_rms_norm(const struct backend *b, const struct mat *x, const struct mat *w,
                             const struct norm_spec *spec, const struct mat *out)
{
    int rc = check_norm(x, w, out, "rms_norm");
    if (!rc && x->dtype != DTYPE_F32)
        rc = check_dtype(x, DTYPE_BF16, "rms_norm");
    if (!rc && out->dtype != DTYPE_F32)
        rc = check_dtype(out, DTYPE_BF16, "rms_norm");
    if (rc < 0 || x->rows == 0)
        return rc;
    const cudaStream_t stream = cuda_state(b)->stream;
    const struct norm_weight weight = norm_weight(w, spec);
    if (x->dtype == DTYPE_F32 && out->dtype == DTYPE_F32)
        launch_norm<float, float>(x, weight, weight_in_pieces(w), spec->eps, out, stream);
    else if (x->dtype == DTYPE_F32)
        launch_norm<float, bf16>(x, weight, weight_in_pieces(w), spec->eps, out, stream);
    else if (out->dtype == DTYPE_F32)
        launch_norm<bf16, float>(x, weight, weight_in_pieces(w), spec->eps, out, stream);
    else
        launch_norm<bf16, bf16>(x, weight, weight_in_pieces(w), spec->eps, out, stream);
    return cuda_launched("rms_norm");
}

extern "C" int cuda_add_norm(const struct backend *b, const struct mat *branch, const struct mat *branch_norm,
                             const struct mat *x, const struct mat *next_norm, const struct norm_spec *spec,
                             const struct mat *out)
{
    int rc = check_norm(branch, branch_norm, x, "add_norm");
    if (!rc)
        rc = check_norm(x, next_norm, out, "add_norm");
    if (!rc)
        rc = check_dtype(branch, DTYPE_BF16, "add_norm");
    if (!rc)
        rc = check_dtype(x, DTYPE_F32, "add_norm");
    if (!rc)
        rc = check_dtype(out, DTYPE_BF16, "add_norm");
    if (rc < 0 || x->rows == 0)
        return rc;
    const struct norm_weight first = norm_weight(branch_norm, spec), second = norm_weight(next_norm, spec);
    const bool pieces = in_pieces(branch, 8) && in_pieces(x, 16) && in_pieces(out, 8) &&
                        weight_in_pieces(branch_norm) && weight_in_pieces(next_norm);
    const auto kernel = !pieces                                        ? add_norm_kernel<1, MAX_PER_THREAD>
                        : x->cols <= (int64_t)FEW_PER_THREAD * THREADS ? add_norm_kernel<4, FEW_PER_THREAD>
                                                                       : add_norm_kernel<4, MAX_PER_THREAD>;
    kernel<<<(unsigned)x->rows, THREADS, 0, cuda_state(b)->stream>>>(
        (const bf16 *)branch->data, branch->stride, first, (float *)x->data, x->stride, second, spec->eps,
        (bf16 *)out->data, out->stride, x->cols);
    return cuda_launched("add_norm");
}

/* --- rotary positions --------------------------------------------------------------------------------------------- */

struct frequencies {
    float inv[MAX_HALF];
};

static __global__ void rope_table_kernel(struct frequencies f, int64_t first_position, float *table,
                                         int64_t stride, int half)
{
    const int64_t row = blockIdx.x;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float angle = (float)(first_position + row) * f.inv[i];
        table[row * stride + i] = cosf(angle);
        table[row * stride + half + i] = sinf(angle);
    }
}

extern "C" int cuda_rope_table(const struct backend *b, const float *inv_freq, int64_t first_position,
                               const struct mat *table)
{
    struct frequencies f;
    const int64_t half = table->cols / 2;
    CHECK(table->cols % 2 == 0);
    const int rc = check_dtype(table, DTYPE_F32, "rope_table");
    if (rc < 0 || table->rows == 0)
        return rc;
    if (half > MAX_HALF)
        return err_set(ERR_UNSUPPORTED, "rope_table: heads of %lld, expected at most %d",
                       (long long)table->cols, 2 * MAX_HALF);
    for (int64_t i = 0; i < half; i++)
        f.inv[i] = inv_freq[i];
    rope_table_kernel<<<(unsigned)table->rows, 128, 0, cuda_state(b)->stream>>>(
        f, first_position, (float *)table->data, table->stride, (int)half);
    return cuda_launched("rope_table");
}

/* --- queries, keys and values ------------------------------------------------------------------------------------- */

struct qkv_job {
    const bf16 *qkv;
    bf16 *q, *keys, *values; /* keys and values NULL: queries alone */
    const float *rope;
    int64_t qkv_stride, q_stride, keys_stride, values_stride, rope_stride;
    int64_t n_new, first_position, max_positions, n_tasks;
    int n_heads, n_kv_heads, head_dim;
    bool q_normed, k_normed, values_normed, k_is_v;
    struct norm_weight q_norm, k_norm;
    float eps;
};

/* A head on its way. */
struct head_job {
    const bf16 *x;
    bf16 *out;
    const float *table; /* by which it is turned, or NULL */
    bool normed;
    struct norm_weight norm;
};

/* Norm and turn of one head by L threads of a warp; lane l holds dimensions (l + L·k)·V … of either half. */
template <int V, int L>
static __device__ __forceinline__ void turn_head(const struct head_job &h, float eps, int half)
{
    constexpr int STEPS = MAX_HALF / L / V;
    float u[STEPS][V] = {}, v[STEPS][V] = {}, sum = 0;
    const int lane = threadIdx.x % L;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const int i = (lane + L * k) * V;
        if (i >= half)
            continue;
        load<bf16, V>(h.x + i, u[k]);
        load<bf16, V>(h.x + half + i, v[k]);
#pragma unroll
        for (int e = 0; e < V; e++)
            sum += u[k][e] * u[k][e] + v[k][e] * v[k][e];
    }
    for (int i = L / 2; i; i >>= 1)
        sum += __shfl_xor_sync(L == 32 ? 0xffffffffu : 0xffffu << (threadIdx.x & 16), sum, i, L);
    const float scale = h.normed ? 1 / sqrtf(sum / (float)(2 * half) + eps) : 1;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const int i = (lane + L * k) * V;
        if (i >= half)
            continue;
        float c[V] = {}, s[V] = {}, low[V], high[V];
        load_weight<V>(h.norm, i, low);
        load_weight<V>(h.norm, half + i, high);
        if (h.table) {
            load<float, V>(h.table + i, c);
            load<float, V>(h.table + half + i, s);
        }
#pragma unroll
        for (int e = 0; e < V; e++) {
            const float a = h.normed ? u[k][e] * (low[e] * scale) : u[k][e];
            const float b = h.normed ? v[k][e] * (high[e] * scale) : v[k][e];
            u[k][e] = h.table ? a * c[e] - b * s[e] : a;
            v[k][e] = h.table ? b * c[e] + a * s[e] : b;
        }
        store<bf16, V>(h.out + i, u[k]);
        store<bf16, V>(h.out + half + i, v[k]);
    }
}

/* L threads, a warp or half of one, for each head that a token gets: of queries, then of keys, then of values. */
template <int V, int L> static __global__ void split_qkv_kernel(struct qkv_job j)
{
    const int64_t task = (int64_t)blockIdx.x * (blockDim.x / L) + threadIdx.x / L;
    if (task >= j.n_tasks)
        return;
    const int n = j.n_heads + (j.keys ? 2 * j.n_kv_heads : 0), head = (int)(task % n), key = head - j.n_heads,
              value = key - j.n_kv_heads; /* not negative: it is one */
    const int64_t row = task / n, token = row % j.n_new;
    const int64_t slot = row / j.n_new * j.max_positions + j.first_position + token;
    const int from = value >= 0 && j.k_is_v ? head - j.n_kv_heads : head;
    struct head_job h;
    h.x = j.qkv + row * j.qkv_stride + (int64_t)from * j.head_dim;
    h.table = value < 0 ? j.rope + token * j.rope_stride : NULL;
    if (key < 0) {
        h.out = j.q + row * j.q_stride + head * j.head_dim;
        h.normed = j.q_normed, h.norm = j.q_norm;
    } else if (value < 0) {
        h.out = j.keys + slot * j.keys_stride + key * j.head_dim;
        h.normed = j.k_normed, h.norm = j.k_norm;
    } else {
        h.out = j.values + slot * j.values_stride + value * j.head_dim;
        h.normed = j.values_normed, h.norm = {NULL, DTYPE_F32, 0};
    }
    turn_head<V, L>(h, j.eps, j.head_dim / 2);
}

extern "C" int cuda_check_qkv(const char *op, const struct qkv_spec *spec, const struct mat *qkv,
                              const struct mat *q, const struct mat *keys, const struct mat *values)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t kv_cols = (int64_t)h->n_kv_heads * h->head_dim;
    const struct mat *const acts[] = {qkv, q, keys, values}, *const norms[] = {spec->q_norm, spec->k_norm};
    CHECK(h->head_dim > 0 && h->head_dim % 2 == 0 && qkv->rows % s->n == 0 && !keys == !values);
    CHECK(qkv->rows <= INT32_MAX / (h->n_heads + 2 * h->n_kv_heads));
    CHECK(qkv->cols == (int64_t)qkv_heads(spec, !keys) * h->head_dim);
    CHECK(q->cols == (int64_t)h->n_heads * h->head_dim && q->rows == qkv->rows);
    CHECK(!keys || (keys->cols == kv_cols && values->cols == kv_cols));
    CHECK(!keys || (keys->rows >= s->n * s->max_positions && values->rows == keys->rows));
    CHECK(s->first_position + qkv->rows / s->n <= s->max_positions);
    CHECK(spec->rope->cols == h->head_dim && spec->rope->rows >= qkv->rows / s->n);
    int rc = check_dtype(spec->rope, DTYPE_F32, op);
    for (int i = 0; !rc && i < (keys ? 4 : 2); i++)
        rc = check_dtype(acts[i], DTYPE_BF16, op);
    for (int i = 0; !rc && i < 2; i++) {
        CHECK(!norms[i] || norms[i]->cols == h->head_dim);
        rc = norms[i] ? cuda_check_float(norms[i], op) : 0;
    }
    if (!rc && h->head_dim > 2 * MAX_HALF)
        rc = err_set(ERR_UNSUPPORTED, "%s: heads of %d, expected at most %d", op, h->head_dim, 2 * MAX_HALF);
    return rc;
}

extern "C" int cuda_split_qkv(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                              const struct mat *q, const struct mat *keys, const struct mat *values)
{
    const int rc = cuda_check_qkv("split_qkv", spec, qkv, q, keys, values);
    if (rc < 0 || qkv->rows == 0)
        return rc;
    const struct heads *h = &spec->heads;
    struct qkv_job j = {};
    j.qkv = (const bf16 *)qkv->data;
    j.q = (bf16 *)q->data;
    j.rope = (const float *)spec->rope->data;
    j.qkv_stride = qkv->stride;
    j.q_stride = q->stride;
    if (keys) {
        j.keys = (bf16 *)keys->data;
        j.values = (bf16 *)values->data;
        j.keys_stride = keys->stride;
        j.values_stride = values->stride;
    }
    j.rope_stride = spec->rope->stride;
    j.n_new = qkv->rows / spec->sequences.n;
    j.first_position = spec->sequences.first_position;
    j.max_positions = spec->sequences.max_positions;
    j.n_tasks = qkv->rows * (h->n_heads + (keys ? 2 * h->n_kv_heads : 0));
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
    const struct mat *const acts[] = {qkv, q, keys, values};
    const bool pieces = qkv_in_pieces(spec, acts, 4);
    const int64_t lanes = pieces ? 16 : 32, blocks = (j.n_tasks * lanes + THREADS - 1) / THREADS;
    (pieces ? split_qkv_kernel<8, 16>
            : split_qkv_kernel<1, 32>)<<<(unsigned)blocks, THREADS, 0, cuda_state(b)->stream>>>(j);
    return cuda_launched("split_qkv");
}

/* --- activations -------------------------------------------------------------------------------------------------- */

/* z·Φ(z) by tanh: ½·(1 + tanh u) = 1 / (1 + e^−2u). */
static __device__ __forceinline__ float gelu_tanh(float z)
{
    const float sqrt_2_pi = 0.7978845608f;
    return z / (1 + __expf(-2 * sqrt_2_pi * (z + 0.044715f * z * z * z)));
}

template <int V>
static __global__ void geglu_kernel(const bf16 *gate, int64_t gate_stride, const bf16 *up, int64_t up_stride,
                                    bf16 *out, int64_t out_stride, int64_t cols)
{
    const int64_t row = blockIdx.y;
    for (int64_t c = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V; c < cols;
         c += (int64_t)gridDim.x * THREADS * V) {
        float g[V], u[V];
        load<bf16, V>(gate + row * gate_stride + c, g);
        load<bf16, V>(up + row * up_stride + c, u);
#pragma unroll
        for (int i = 0; i < V; i++)
            g[i] = gelu_tanh(g[i]) * u[i];
        store<bf16, V>(out + row * out_stride + c, g);
    }
}

extern "C" int cuda_geglu(const struct backend *b, const struct mat *gate, const struct mat *up,
                          const struct mat *out)
{
    enum { MAX_ROWS = 32768 }; /* of a grid */
    CHECK(gate->rows == out->rows && up->rows == out->rows && gate->cols == out->cols &&
          up->cols == out->cols);
    const struct mat *acts[] = {gate, up, out};
    int rc = 0;
    for (int i = 0; !rc && i < 3; i++)
        rc = check_dtype(acts[i], DTYPE_BF16, "geglu");
    const bool pieces = in_pieces(gate, 16) && in_pieces(up, 16) && in_pieces(out, 16);
    const int64_t each = (int64_t)THREADS * (pieces ? 8 : 1), blocks = (out->cols + each - 1) / each;
    for (int64_t r = 0; !rc && r < out->rows; r += MAX_ROWS) {
        const int64_t left = out->rows - r, n = left < MAX_ROWS ? left : (int64_t)MAX_ROWS;
        (pieces
             ? geglu_kernel<8>
             : geglu_kernel<1>)<<<dim3((unsigned)blocks, (unsigned)n), THREADS, 0, cuda_state(b)->stream>>>(
            (const bf16 *)gate->data + r * gate->stride, gate->stride,
            (const bf16 *)up->data + r * up->stride, up->stride, (bf16 *)out->data + r * out->stride,
            out->stride, out->cols);
        rc = cuda_launched("geglu");
    }
    return rc;
}

/* A block for each row. */
template <int V>
static __global__ void over_norm_kernel(const bf16 *x, int64_t x_stride, const bf16 *y, int64_t y_stride,
                                        int64_t y_cols, bf16 *out, int64_t out_stride, int64_t cols)
{
    __shared__ float shared[THREADS / 32];
    const int64_t row = blockIdx.x;
    float sum = 0;
    for (int64_t c = (int64_t)threadIdx.x * V; c < y_cols; c += THREADS * V) {
        float e[V];
        load<bf16, V>(y + row * y_stride + c, e);
#pragma unroll
        for (int i = 0; i < V; i++)
            sum += e[i] * e[i];
    }
    sum = block_sum(sum, shared);
    const float factor = sum == 0 ? 0 : rsqrtf(sum / (float)y_cols);
    for (int64_t c = (int64_t)threadIdx.x * V; c < cols; c += THREADS * V) {
        float e[V];
        load<bf16, V>(x + row * x_stride + c, e);
#pragma unroll
        for (int i = 0; i < V; i++)
            e[i] *= factor;
        store<bf16, V>(out + row * out_stride + c, e);
    }
}

extern "C" int cuda_over_norm(const struct backend *b, const struct mat *x, const struct mat *y,
                              const struct mat *out)
{
    CHECK(x->rows == out->rows && y->rows == out->rows && x->cols == out->cols);
    const struct mat *acts[] = {x, y, out};
    int rc = 0;
    for (int i = 0; !rc && i < 3; i++)
        rc = check_dtype(acts[i], DTYPE_BF16, "over_norm");
    if (rc < 0 || out->rows == 0)
        return rc;
    const bool pieces = in_pieces(x, 16) && in_pieces(y, 16) && in_pieces(out, 16);
    (pieces ? over_norm_kernel<8>
            : over_norm_kernel<1>)<<<(unsigned)out->rows, THREADS, 0, cuda_state(b)->stream>>>(
        (const bf16 *)x->data, x->stride, (const bf16 *)y->data, y->stride, y->cols, (bf16 *)out->data,
        out->stride, out->cols);
    return cuda_launched("over_norm");
}

static __global__ void softcap_kernel(float *x, int64_t rows, int64_t cols, int64_t stride, float cap)
{
    const int64_t n = rows * cols, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        float *e = x + i / cols * stride + i % cols;
        *e = cap * tanhf(*e / cap);
    }
}

extern "C" int cuda_softcap(const struct backend *b, const struct mat *x, float cap)
{
    const int rc = check_dtype(x, DTYPE_F32, "softcap");
    const int64_t blocks = (x->rows * x->cols + THREADS - 1) / THREADS;
    if (rc < 0 || blocks == 0)
        return rc;
    softcap_kernel<<<(unsigned)(blocks < 65536 ? blocks : 65536), THREADS, 0, cuda_state(b)->stream>>>(
        (float *)x->data, x->rows, x->cols, x->stride, cap);
    return cuda_launched("softcap");
}

template <typename TX, typename TOUT>
static __global__ void scale_kernel(const TX *x, int64_t x_stride, TOUT *out, int64_t out_stride,
                                    int64_t rows, int64_t cols, float factor, bool add)
{
    const int64_t n = rows * cols, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        TOUT *to = out + i / cols * out_stride + i % cols;
        const float y = factor * to_float(x[i / cols * x_stride + i % cols]);
        *to = from_float<TOUT>(add ? to_float(*to) + y : y);
    }
}

extern "C" int cuda_scale(const struct backend *b, float factor, const struct mat *x, bool add,
                          const struct mat *out)
{
    CHECK(x->rows == out->rows && x->cols == out->cols);
    int rc = x->dtype == DTYPE_F32 ? 0 : check_dtype(x, DTYPE_BF16, "scale");
    if (!rc && out->dtype != DTYPE_F32)
        rc = check_dtype(out, DTYPE_BF16, "scale");
    const int64_t n = (x->rows * x->cols + THREADS - 1) / THREADS;
    if (rc < 0 || n == 0)
        return rc;
    const unsigned blocks = (unsigned)(n < 65536 ? n : 65536);
    const cudaStream_t stream = cuda_state(b)->stream;
    const bool from_f32 = x->dtype == DTYPE_F32, to_f32 = out->dtype == DTYPE_F32;
    if (from_f32 && to_f32)
        scale_kernel<<<blocks, THREADS, 0, stream>>>((const float *)x->data, x->stride, (float *)out->data,
                                                     out->stride, x->rows, x->cols, factor, add);
    else if (from_f32)
        scale_kernel<<<blocks, THREADS, 0, stream>>>((const float *)x->data, x->stride, (bf16 *)out->data,
                                                     out->stride, x->rows, x->cols, factor, add);
    else if (to_f32)
        scale_kernel<<<blocks, THREADS, 0, stream>>>((const bf16 *)x->data, x->stride, (float *)out->data,
                                                     out->stride, x->rows, x->cols, factor, add);
    else
        scale_kernel<<<blocks, THREADS, 0, stream>>>((const bf16 *)x->data, x->stride, (bf16 *)out->data,
                                                     out->stride, x->rows, x->cols, factor, add);
    return cuda_launched("scale");
}

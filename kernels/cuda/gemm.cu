/* out = x·wᵀ in BF16 with FP32 accumulation. Many rows of x: cuBLASLt; weights that are not BF16 become it in scratch
 * memory, a panel of rows at a time. Few rows (decode): the weight, BF16 or in codes, is streamed once by a kernel of
 * ours, because cuBLASLt's algorithms that add in a fixed order reach a quarter of the memory's rate there. Products of
 * FP32 matrices become one BF16 product of their parts. And the products of the backward pass, dy·w and dyᵀ·x. */
#include "kernels/cuda/lt.cuh"

typedef __nv_bfloat16 bf16;

enum {
    THREADS = 256,
    FEW_ROWS = 8,      /* up to this many rows of x are multiplied by streaming codes, … */
    FEW_ROWS_BF16 = 4, /* … this many by streaming a BF16 weight */
    DEPTH = 4096,      /* columns of x that matmul takes at a time, at most */
};

/* w: BF16. */
static int multiply(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out)
{
    const struct lt_product p = {*x, *w, *out, false, true, false, 1};
    return lt_multiply(b, &p, "gemm");
}

/* --- panels ------------------------------------------------------------------------------------------------------- */

static __global__ void narrow_kernel(const void *w, enum dtype dtype, int64_t stride, bf16 *out,
                                     int64_t out_stride, int64_t rows, int64_t cols)
{
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < rows * cols; i += step)
        out[i / cols * out_stride + i % cols] =
            __float2bfloat16_rn(load_as_float(w, dtype, i / cols * stride + i % cols));
}

/* A weight of another float type, or (w = NULL) in codes. */
static int multiply_panels(const struct backend *b, const struct mat *x, const struct mat *w,
                           const struct qmat *q, const struct mat *out)
{
    const int64_t cols = x->cols, rows = out->cols;
    const int64_t padded = (cols + 7) / 8 * 8, fitting = (int64_t)(OPERAND_BYTES / sizeof(bf16)) / padded;
    void *scratch;
    int rc = cuda_scratch(b, &scratch);
    if (!rc && fitting < 1)
        rc = err_set(ERR_UNSUPPORTED, "gemm: %lld columns are too many", (long long)cols);
    for (int64_t r = 0; !rc && r < rows; r += fitting) {
        const int64_t n = rows - r < fitting ? rows - r : fitting;
        const struct mat panel = {scratch, DTYPE_BF16, n, cols, padded}, part = mat_cols(out, r, n);
        if (w) {
            const struct mat from = mat_rows(w, r, n);
            narrow_kernel<<<4096, THREADS, 0, cuda_state(b)->stream>>>(from.data, from.dtype, from.stride,
                                                                       (bf16 *)scratch, padded, n, cols);
            rc = cuda_launched("gemm");
        } else {
            struct qmat from = *q;
            from.packed = mat_rows(&q->packed, r, n);
            from.scales = mat_rows(&q->scales, r, n);
            if (q->zeros.data)
                from.zeros = mat_rows(&q->zeros, r, n);
            rc = cuda_dequantize(b, &from, &panel);
        }
        if (!rc)
            rc = multiply(b, x, &panel, &part);
    }
    return rc;
}

/* --- few rows ----------------------------------------------------------------------------------------------------- */

struct stream_job {
    const bf16 *x, *w; /* w: a BF16 weight, instead of codes */
    const uint32_t *packed;
    const uint16_t *scales;
    const int8_t *zeros;
    void *out;
    int64_t x_stride, w_stride, packed_stride, scales_stride, zeros_stride, out_stride;
    int64_t rows, pieces, group;
    bool out_f32;
};

/* Eight elements of x as floats; rows of x are whole pieces of 16 bytes here. */
static __device__ __forceinline__ void load_eight(const bf16 *p, float *out)
{
    const uint4 v = *(const uint4 *)p;
    const uint32_t e[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(e[i] << 16);
        out[2 * i + 1] = __uint_as_float(e[i] & 0xffff0000u);
    }
}

/* The eight weights of columns [8·i, 8·i + 8) of a row; those in codes each rounded to BF16, as every reader of the format
 * has them. BITS = 16: a BF16 weight. */
template <int BITS>
static __device__ __forceinline__ void decode_eight(const struct stream_job &j, int64_t row, int64_t i,
                                                    float *out)
{
    if constexpr (BITS == 16) {
        load_eight(j.w + row * j.w_stride + 8 * i, out);
    } else {
        const int64_t g = 8 * i / j.group;
        const float scale = __uint_as_float((uint32_t)j.scales[row * j.scales_stride + g] << 16);
        const float offset = (1 << (BITS - 1)) + (j.zeros ? (float)j.zeros[row * j.zeros_stride + g] : 0);
        const uint32_t *p = j.packed + row * j.packed_stride + i * (BITS / 4);
        const uint32_t words[2] = {p[0], BITS == 8 ? p[BITS / 8] : 0};
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t code = words[k * BITS / 32] >> k * BITS % 32 & ((1u << BITS) - 1);
            out[k] = to_float(__float2bfloat16_rn(((float)code - offset) * scale));
        }
    }
}

/* A warp for each row of the weight; N rows of x at once. pieces: of eight columns. */
template <int BITS, int N>
static __global__ void __launch_bounds__(THREADS) stream_kernel(struct stream_job j)
{
    const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= j.rows)
        return;
    float sum[N] = {};
#pragma unroll 4
    for (int64_t i = threadIdx.x % 32; i < j.pieces; i += 32) {
        float w[8], x[8];
        decode_eight<BITS>(j, row, i, w);
#pragma unroll
        for (int n = 0; n < N; n++) {
            load_eight(j.x + n * j.x_stride + 8 * i, x);
#pragma unroll
            for (int k = 0; k < 8; k++)
                sum[n] += w[k] * x[k];
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float total = warp_sum(sum[n]);
        if (threadIdx.x % 32)
            continue;
        if (j.out_f32)
            ((float *)j.out)[n * j.out_stride + row] = total;
        else
            ((bf16 *)j.out)[n * j.out_stride + row] = __float2bfloat16_rn(total);
    }
}

template <int BITS> static void launch_stream(const struct stream_job &j, int64_t n, cudaStream_t stream)
{
    static void (*const kernels[FEW_ROWS])(struct stream_job) = {
        stream_kernel<BITS, 1>, stream_kernel<BITS, 2>, stream_kernel<BITS, 3>, stream_kernel<BITS, 4>,
        stream_kernel<BITS, 5>, stream_kernel<BITS, 6>, stream_kernel<BITS, 7>, stream_kernel<BITS, 8>};
    kernels[n - 1]<<<(unsigned)((j.rows + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0, stream>>>(j);
}

/* Whether every row is a whole number of pieces of eight 16-bit elements, and aligned to them. */
static bool rows_in_pieces(const struct mat *m)
{
    return m->cols % 8 == 0 && m->stride % 8 == 0 && (uintptr_t)m->data % 16 == 0;
}

/* w: BF16; or NULL, and q. */
static int stream(const struct backend *b, const struct mat *x, const struct mat *w, const struct qmat *q,
                  const struct mat *out)
{
    struct stream_job j = {};
    j.x = (const bf16 *)x->data;
    j.x_stride = x->stride;
    j.out = out->data;
    j.out_stride = out->stride;
    j.out_f32 = out->dtype == DTYPE_F32;
    j.rows = out->cols;
    j.pieces = x->cols / 8;
    if (w) {
        j.w = (const bf16 *)w->data;
        j.w_stride = w->stride;
    } else {
        j.packed = (const uint32_t *)q->packed.data;
        j.packed_stride = q->packed.stride;
        j.scales = (const uint16_t *)q->scales.data;
        j.scales_stride = q->scales.stride;
        j.zeros = (const int8_t *)q->zeros.data;
        j.zeros_stride = q->zeros.stride;
        j.group = q->group;
    }
    (w              ? launch_stream<16>
     : q->bits == 4 ? launch_stream<4>
                    : launch_stream<8>)(j, x->rows, cuda_state(b)->stream);
    return cuda_launched(w ? "gemm" : "q_gemm");
}

/* --- FP32 operands ------------------------------------------------------------------------------------------------ */

/* matmul: an FP32 value is high + low, each BF16, to 2⁻¹⁷ of it; operands made of such parts side by side give x·m in one
 * BF16 product:
 *     x exact in BF16: [x, x] · [high; low] of m          else: [high, high, low] of x · [high; low; high] of m */
struct split {
    const void *from; /* [rows, cols] */
    bf16 *to;         /* [to_rows, to_cols], once for each part, with zeros beyond what `from` has */
    int64_t rows, cols, stride, to_rows, to_cols, to_stride;
    int64_t part; /* elements from a part to the next */
    int parts, low_part;
    bool aligned; /* `from`, to pieces of eight elements */
};

template <typename T> struct alignas(8 * sizeof(T) < 16 ? 8 * sizeof(T) : 16) eight {
    T e[8];
};

static __device__ __forceinline__ float to_float(int8_t x)
{
    return (float)x;
}

/* A thread takes eight columns of a row at a time. to_cols, to_stride and part are multiples of 8. */
template <typename T> static __global__ void __launch_bounds__(THREADS) split_kernel(struct split s)
{
    const int64_t pieces = s.to_cols / 8, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < s.to_rows * pieces; i += step) {
        const int64_t row = i / pieces, col = i % pieces * 8;
        const T *from = (const T *)s.from + row * s.stride + col;
        float v[8] = {};
        if (s.aligned && row < s.rows && col + 8 <= s.cols) {
            const eight<T> piece = *(const eight<T> *)from;
#pragma unroll
            for (int k = 0; k < 8; k++)
                v[k] = to_float(piece.e[k]);
        } else if (row < s.rows) {
#pragma unroll
            for (int k = 0; k < 8; k++)
                v[k] = col + k < s.cols ? to_float(from[k]) : 0;
        }
        eight<bf16> high, low;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            high.e[k] = __float2bfloat16_rn(v[k]);
            low.e[k] = __float2bfloat16_rn(v[k] - __bfloat162float(high.e[k]));
        }
        bf16 *to = s.to + row * s.to_stride + col;
        for (int p = 0; p < s.parts; p++, to += s.part)
            *(eight<bf16> *)to = p == s.low_part ? low : high;
    }
}

static int64_t ceil_to(int64_t n, int64_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

/* s has its target already. */
static int split(const struct backend *b, const struct mat *from, struct split s)
{
    s.from = from->data;
    s.rows = from->rows;
    s.cols = from->cols;
    s.stride = from->stride;
    const uintptr_t size = dtype_bytes(from->dtype), piece = size == 1 ? 8 : 16;
    s.aligned = (uintptr_t)from->data % piece == 0 && (uintptr_t)from->stride * size % piece == 0;
    const int64_t blocks = ceil_to(s.to_rows * s.to_cols / 8, THREADS) / THREADS;
    void (*const kernel)(struct split) = from->dtype == DTYPE_F32    ? split_kernel<float>
                                         : from->dtype == DTYPE_F16  ? split_kernel<__half>
                                         : from->dtype == DTYPE_BF16 ? split_kernel<bf16>
                                                                     : split_kernel<int8_t>;
    kernel<<<(unsigned)(blocks < 8192 ? blocks : 8192), THREADS, 0, cuda_state(b)->stream>>>(s);
    return cuda_launched("matmul");
}

/* How much is multiplied at a time. Columns of x go in turns, each added to out and rounded to nearest: tensor cores cut
 * their sums off, and the longer a sum, the more it loses. A turn costs a pass over out, so there are no more of them than
 * DEPTH asks for, unless m's parts would take more than half the memory. */
struct turns {
    int parts;
    int64_t k, n;   /* columns of x, rows of x */
    int64_t m_cols; /* padded to whole pieces */
};

/* `total` in equal turns of at most `most`, each a multiple of the greatest of `multiple` and 8 that fits. */
static int64_t turn_of(int64_t total, int64_t most, int64_t multiple)
{
    const int64_t unit = most >= multiple ? multiple : 8,
                  n = (total + most / unit * unit - 1) / (most / unit * unit);
    return ceil_to((total + n - 1) / n, unit);
}

static int plan_turns(const struct mat *x, int64_t cols, struct turns *t)
{
    const int64_t elements = OPERAND_BYTES / sizeof(bf16);
    t->parts = x->dtype == DTYPE_BF16 || x->dtype == DTYPE_I8 ? 2 : 3;
    t->m_cols = ceil_to(cols, 8);
    const int64_t most_k = elements / 2 / (t->parts * t->m_cols);
    if (most_k < 8)
        return err_set(ERR_UNSUPPORTED, "matmul: %lld columns are too many", (long long)cols);
    t->k = turn_of(x->cols, most_k < DEPTH ? most_k : (int64_t)DEPTH, 64);
    const int64_t left = elements - t->parts * t->k * t->m_cols;
    t->n = turn_of(x->rows, left / (t->parts * t->k), 128);
    return 0;
}

/* p: of the columns of x that are next. */
static int multiply_turn(const struct backend *b, const struct turns *t, const struct lt_product *p,
                         bf16 *scratch)
{
    const int64_t k = ceil_to(p->x.cols, 8), wide = t->parts * k, m_elements = wide * t->m_cols;
    struct split s = {};
    s.to = scratch;
    s.to_rows = k;
    s.to_cols = s.to_stride = t->m_cols;
    s.part = k * t->m_cols;
    s.parts = t->parts;
    s.low_part = 1;
    int rc = split(b, &p->y, s);
    for (int64_t r = 0; !rc && r < p->x.rows; r += t->n) {
        const int64_t n = p->x.rows - r < t->n ? p->x.rows - r : t->n;
        const struct mat x = mat_rows(&p->x, r, n);
        s.to = scratch + m_elements;
        s.to_rows = n;
        s.to_cols = s.part = k;
        s.to_stride = wide;
        s.low_part = 2; /* of two there is none */
        rc = split(b, &x, s);
        struct lt_product part = *p;
        part.x = (struct mat){s.to, DTYPE_BF16, n, wide, wide};
        part.y = (struct mat){scratch, DTYPE_BF16, wide, p->y.cols, t->m_cols};
        part.out = mat_rows(&p->out, r, n);
        if (!rc)
            rc = lt_multiply(b, &part, "matmul");
    }
    return rc;
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

static int check_product(const struct mat *x, const struct mat *out, int64_t rows, int64_t cols)
{
    CHECK(x->rows == out->rows && x->cols == cols && out->cols == rows);
    if (x->dtype != DTYPE_BF16)
        return err_set(ERR_UNSUPPORTED, "gemm: activations are %s, expected BF16", dtype_name(x->dtype));
    if (out->dtype != DTYPE_BF16 && out->dtype != DTYPE_F32)
        return err_set(ERR_UNSUPPORTED, "gemm: to %s, expected BF16 or F32", dtype_name(out->dtype));
    return 0;
}

extern "C" int cuda_gemm(const struct backend *b, const struct mat *x, const struct mat *w,
                         const struct mat *out)
{
    int rc = cuda_check_float(w, "gemm");
    if (!rc)
        rc = check_product(x, out, w->rows, w->cols);
    if (rc < 0 || x->rows == 0)
        return rc;
    if (w->dtype != DTYPE_BF16)
        return multiply_panels(b, x, w, NULL, out);
    return x->rows <= FEW_ROWS_BF16 && rows_in_pieces(x) && rows_in_pieces(w) ? stream(b, x, w, NULL, out)
                                                                              : multiply(b, x, w, out);
}

extern "C" int cuda_q_gemm(const struct backend *b, const struct mat *x, const struct qmat *w,
                           const struct mat *out)
{
    if (w->bits != 4 && w->bits != 8)
        return err_set(ERR_UNSUPPORTED, "q_gemm: %d bits, expected 4 or 8", w->bits);
    const int rc = check_product(x, out, w->packed.rows, w->cols);
    if (rc < 0 || x->rows == 0)
        return rc;
    /* a group must not begin inside a piece */
    const bool few = x->rows <= FEW_ROWS && rows_in_pieces(x) && (w->group % 8 == 0 || w->group >= w->cols);
    return few ? stream(b, x, NULL, w, out) : multiply_panels(b, x, NULL, w, out);
}

extern "C" int cuda_matmul(const struct backend *b, float alpha, const struct mat *x, const struct mat *m,
                           bool add, const struct mat *out)
{
    CHECK(x->rows == out->rows && x->cols == m->rows && m->cols == out->cols && x->cols > 0);
    const bool plain = m->dtype == DTYPE_BF16; /* operands as they lie */
    CHECK((plain ? x->dtype == DTYPE_BF16 : m->dtype == DTYPE_F32) && out->dtype == DTYPE_F32);
    struct turns t = {};
    t.k = DEPTH;
    void *scratch = NULL;
    int rc = x->dtype == DTYPE_I8 ? 0 : cuda_check_float(x, "matmul");
    if (rc < 0 || out->rows == 0 || out->cols == 0)
        return rc;
    if (!plain)
        rc = plan_turns(x, m->cols, &t);
    if (!rc && !plain)
        rc = cuda_scratch(b, &scratch);
    for (int64_t k = 0; !rc && k < x->cols; k += t.k) {
        const int64_t n = x->cols - k < t.k ? x->cols - k : t.k;
        const struct lt_product p = {
            mat_cols(x, k, n), mat_rows(m, k, n), *out, false, false, add || k > 0, alpha};
        rc = plain ? lt_multiply(b, &p, "matmul") : multiply_turn(b, &t, &p, (bf16 *)scratch);
    }
    return rc;
}

/* --- the backward pass -------------------------------------------------------------------------------------------- */

static int check_bf16(const struct mat *m, const char *op)
{
    return m->dtype == DTYPE_BF16
               ? 0
               : err_set(ERR_UNSUPPORTED, "%s: activations are %s, expected BF16", op, dtype_name(m->dtype));
}

/* A weight that is not BF16 becomes it in scratch memory, a panel of columns at a time, so that no sum is cut. */
static int dgrad_panels(const struct backend *b, const struct lt_product *p)
{
    const struct mat *w = &p->y;
    const int64_t fitting = (int64_t)(OPERAND_BYTES / sizeof(bf16)) / w->rows / 8 * 8;
    void *scratch;
    int rc = cuda_scratch(b, &scratch);
    if (!rc && fitting < 8)
        rc = err_set(ERR_UNSUPPORTED, "gemm_dgrad: %lld rows are too many", (long long)w->rows);
    for (int64_t c = 0; !rc && c < w->cols; c += fitting) {
        const int64_t n = w->cols - c < fitting ? w->cols - c : fitting, padded = ceil_to(n, 8);
        const struct mat from = mat_cols(w, c, n);
        narrow_kernel<<<4096, THREADS, 0, cuda_state(b)->stream>>>(from.data, from.dtype, from.stride,
                                                                   (bf16 *)scratch, padded, w->rows, n);
        rc = cuda_launched("gemm_dgrad");
        struct lt_product part = *p;
        part.y = (struct mat){scratch, DTYPE_BF16, w->rows, n, padded};
        part.out = mat_cols(&p->out, c, n);
        if (!rc)
            rc = lt_multiply(b, &part, "gemm_dgrad");
    }
    return rc;
}

extern "C" int cuda_gemm_dgrad(const struct backend *b, const struct mat *dy, const struct mat *w, bool add,
                               const struct mat *out)
{
    CHECK(dy->cols == w->rows && w->cols == out->cols && dy->rows == out->rows && w->rows > 0);
    int rc = cuda_check_float(w, "gemm_dgrad");
    if (!rc)
        rc = check_bf16(dy, "gemm_dgrad");
    if (!rc && out->dtype != DTYPE_F32)
        rc = check_bf16(out, "gemm_dgrad");
    if (rc < 0 || out->rows == 0 || out->cols == 0)
        return rc;
    const struct lt_product p = {*dy, *w, *out, false, false, add, 1};
    return w->dtype == DTYPE_BF16 ? lt_multiply(b, &p, "gemm_dgrad") : dgrad_panels(b, &p);
}

extern "C" int cuda_gemm_wgrad(const struct backend *b, const struct mat *dy, const struct mat *x, bool add,
                               const struct mat *dw)
{
    CHECK(dy->rows == x->rows && dw->rows == dy->cols && dw->cols == x->cols && dw->dtype == DTYPE_F32);
    int rc = check_bf16(dy, "gemm_wgrad");
    if (!rc)
        rc = check_bf16(x, "gemm_wgrad");
    if (rc < 0 || dw->rows == 0 || dw->cols == 0)
        return rc;
    if (dy->rows == 0)
        return add ? 0 : cuda_zero(b, dw);
    const struct lt_product p = {*dy, *x, *dw, true, false, add, 1};
    return lt_multiply(b, &p, "gemm_wgrad");
}

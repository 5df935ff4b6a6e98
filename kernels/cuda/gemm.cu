/* out = x·wᵀ in BF16 with FP32 accumulation. Many rows of x: cuBLASLt; weights that are not BF16 become it in scratch
 * memory, a panel of rows at a time. Few rows (decode): the weight, BF16 or in codes, is streamed once by a kernel of
 * ours, because cuBLASLt's algorithms that add in a fixed order reach a quarter of the memory's rate there. */
#include "kernels/cuda/common.cuh"

extern "C" {
#include "base/mem.h"
}

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

typedef __nv_bfloat16 bf16;

enum {
    THREADS = 256,
    FEW_ROWS = 8,      /* up to this many rows of x are multiplied by streaming codes, … */
    FEW_ROWS_BF16 = 4, /* … this many by streaming a BF16 weight */
    MAX_PLANS = 256,
};

static const size_t WORKSPACE_BYTES = (size_t)32 << 20, PANEL_BYTES = CUDA_SCRATCH_BYTES - WORKSPACE_BYTES;

/* --- cuBLASLt ----------------------------------------------------------------------------------------------------- */

/* What the choice of an algorithm may depend on; no padding, so that it can be compared as bytes. */
struct shape {
    int64_t n, rows, cols, x_stride, w_stride, out_stride;
    int32_t out_type, x_align, w_align, out_align;
};

struct plan {
    struct shape shape;
    cublasLtMatmulAlgo_t algo;
};

struct products {
    cublasLtHandle_t lt;
    cublasLtMatmulDesc_t desc;
    struct plan *plans; /* [MAX_PLANS], of which n are filled; then the oldest gives way */
    int n, next;
};

static int blas_status(cublasStatus_t e, const char *op)
{
    return e == CUBLAS_STATUS_SUCCESS
               ? 0
               : err_set(ERR_UNSUPPORTED, "%s: cuBLAS: %s", op, cublasLtGetStatusString(e));
}

extern "C" void cuda_products_close(struct products *p)
{
    if (!p)
        return;
    if (p->desc)
        cublasLtMatmulDescDestroy(p->desc);
    if (p->lt)
        cublasLtDestroy(p->lt);
    free(p->plans);
    free(p);
}

/* Row-major x·wᵀ is, read by columns, out = wᵀ·x: the weight is transposed, x is not. */
static int open_products(struct products *p)
{
    const cublasOperation_t t = CUBLAS_OP_T;
    p->plans = (struct plan *)mem_alloc(MAX_PLANS, sizeof *p->plans, "products");
    if (!p->plans)
        return ERR_MEMORY;
    int rc = blas_status(cublasLtCreate(&p->lt), "gemm");
    if (!rc)
        rc = blas_status(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "gemm");
    if (!rc)
        rc = blas_status(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t),
                         "gemm");
    return rc;
}

static int get_products(const struct backend *b, struct products **out)
{
    struct cuda_state *s = cuda_state(b);
    int rc = 0;
    if (!s->products) {
        struct products *p = (struct products *)mem_alloc(1, sizeof *p, "products");
        rc = p ? open_products(p) : ERR_MEMORY;
        if (rc < 0)
            cuda_products_close(p);
        else
            s->products = p;
    }
    *out = s->products;
    return rc;
}

struct layouts {
    cublasLtMatrixLayout_t w, x, out;
};

static void close_layouts(struct layouts *l)
{
    if (l->w)
        cublasLtMatrixLayoutDestroy(l->w);
    if (l->x)
        cublasLtMatrixLayoutDestroy(l->x);
    if (l->out)
        cublasLtMatrixLayoutDestroy(l->out);
}

static int open_layouts(struct layouts *l, const struct shape *s)
{
    *l = (struct layouts){};
    int rc =
        blas_status(cublasLtMatrixLayoutCreate(&l->w, CUDA_R_16BF, s->cols, s->rows, s->w_stride), "gemm");
    if (!rc)
        rc = blas_status(cublasLtMatrixLayoutCreate(&l->x, CUDA_R_16BF, s->cols, s->n, s->x_stride), "gemm");
    if (!rc)
        rc = blas_status(
            cublasLtMatrixLayoutCreate(&l->out, (cudaDataType_t)s->out_type, s->rows, s->n, s->out_stride),
            "gemm");
    return rc;
}

/* The library's first choice among algorithms that add in a fixed order: no sums by atomics, none split over blocks. */
static int choose(struct products *p, const struct shape *s, const struct layouts *l,
                  cublasLtMatmulAlgo_t *algo)
{
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t result;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE, w = s->w_align, x = s->x_align,
                   out = s->out_align;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t bytes;
    } settings[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES, sizeof WORKSPACE_BYTES},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w, sizeof w},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x, sizeof x},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out, sizeof out},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out, sizeof out},
    };
    int n = 0, rc = blas_status(cublasLtMatmulPreferenceCreate(&pref), "gemm");
    for (size_t i = 0; !rc && i < sizeof settings / sizeof *settings; i++)
        rc = blas_status(cublasLtMatmulPreferenceSetAttribute(pref, settings[i].name, settings[i].value,
                                                              settings[i].bytes),
                         "gemm");
    if (!rc)
        rc = blas_status(
            cublasLtMatmulAlgoGetHeuristic(p->lt, p->desc, l->w, l->x, l->out, l->out, pref, 1, &result, &n),
            "gemm");
    if (!rc && n == 0)
        rc = err_set(ERR_UNSUPPORTED, "gemm: cuBLAS has no algorithm for [%lld, %lld] · [%lld, %lld]ᵀ",
                     (long long)s->n, (long long)s->cols, (long long)s->rows, (long long)s->cols);
    if (!rc)
        *algo = result.algo;
    if (pref)
        cublasLtMatmulPreferenceDestroy(pref);
    return rc;
}

static int find_plan(struct products *p, const struct shape *s, const struct layouts *l,
                     const cublasLtMatmulAlgo_t **out)
{
    for (int i = 0; i < p->n; i++)
        if (!memcmp(&p->plans[i].shape, s, sizeof *s)) {
            *out = &p->plans[i].algo;
            return 0;
        }
    struct plan *plan = &p->plans[p->next];
    const int rc = choose(p, s, l, &plan->algo);
    if (rc < 0)
        return rc;
    plan->shape = *s;
    p->next = (p->next + 1) % MAX_PLANS;
    p->n = p->n < MAX_PLANS ? p->n + 1 : MAX_PLANS;
    *out = &plan->algo;
    return 0;
}

/* The greatest power of two, at most 256, that every row's address is a multiple of. */
static int32_t alignment(const struct mat *m)
{
    const uintptr_t bits = (uintptr_t)m->data | (uintptr_t)m->stride * dtype_bytes(m->dtype) | 256;
    return (int32_t)(bits & -bits);
}

/* w: BF16. */
static int multiply(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out)
{
    struct products *p;
    void *scratch;
    int rc = get_products(b, &p);
    if (!rc)
        rc = cuda_scratch(b, &scratch);
    if (rc < 0)
        return rc;
    const struct shape s = {x->rows,
                            w->rows,
                            x->cols,
                            x->stride,
                            w->stride,
                            out->stride,
                            out->dtype == DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF,
                            alignment(x),
                            alignment(w),
                            alignment(out)};
    struct layouts l;
    const cublasLtMatmulAlgo_t *algo;
    const float one = 1, zero = 0;
    rc = open_layouts(&l, &s);
    if (!rc)
        rc = find_plan(p, &s, &l, &algo);
    if (!rc)
        rc = blas_status(cublasLtMatmul(p->lt, p->desc, &one, w->data, l.w, x->data, l.x, &zero, out->data,
                                        l.out, out->data, l.out, algo, (char *)scratch + PANEL_BYTES,
                                        WORKSPACE_BYTES, cuda_state(b)->stream),
                         "gemm");
    close_layouts(&l);
    return rc;
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
    const int64_t padded = (cols + 7) / 8 * 8, fitting = (int64_t)(PANEL_BYTES / sizeof(bf16)) / padded;
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

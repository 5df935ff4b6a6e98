/* cuBLASLt: its handle, and for every shape the algorithm that was chosen for it; rows of x, which may be any number from
 * call to call, are looked up in steps. */
#include "kernels/cuda/lt.cuh"

extern "C" {
#include "base/mem.h"
}

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

enum {
    PLAN_SETS = 512,
    PLANS_EACH = 4,
    /* Numbers of rows between these take the algorithm of the next step; from a power of two to the next there are eight. */
    STEPS_FROM = 16,
    STEPS_TO = 4096,
};

/* What the choice of an algorithm depends on; no padding, so that it can be compared as bytes. */
struct shape {
    int64_t n, m, k, x_stride, y_stride, out_stride;
    int32_t x_transposed, y_transposed, out_type, x_align, y_align, out_align;
};
static_assert(sizeof(struct shape) == 6 * (sizeof(int64_t) + sizeof(int32_t)), "a shape has padding");

struct plan {
    struct shape shape;
    cublasLtMatmulAlgo_t algo;
};

/* A shape's plan can stand in one set only. */
struct plan_set {
    struct plan plans[PLANS_EACH];
    int n, next; /* of which n are filled; then the oldest gives way */
};

struct products {
    cublasLtHandle_t lt;
    cublasLtMatmulDesc_t descs[2][2]; /* [y transposed][x transposed] */
    struct plan_set *sets;            /* [PLAN_SETS] */
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
    for (int i = 0; i < 4; i++)
        if (p->descs[i / 2][i % 2])
            cublasLtMatmulDescDestroy(p->descs[i / 2][i % 2]);
    if (p->lt)
        cublasLtDestroy(p->lt);
    free(p->sets);
    free(p);
}

/* Row-major x·y is, read by columns, out = y·x: y is the library's first operand. */
static int open_desc(cublasLtMatmulDesc_t *out, bool y_transposed, bool x_transposed)
{
    const cublasOperation_t y = y_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                            x = x_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    int rc = blas_status(cublasLtMatmulDescCreate(out, CUBLAS_COMPUTE_32F, CUDA_R_32F), "products");
    if (!rc)
        rc = blas_status(cublasLtMatmulDescSetAttribute(*out, CUBLASLT_MATMUL_DESC_TRANSA, &y, sizeof y),
                         "products");
    if (!rc)
        rc = blas_status(cublasLtMatmulDescSetAttribute(*out, CUBLASLT_MATMUL_DESC_TRANSB, &x, sizeof x),
                         "products");
    return rc;
}

static int open_products(struct products *p)
{
    p->sets = (struct plan_set *)mem_alloc(PLAN_SETS, sizeof *p->sets, "products");
    if (!p->sets)
        return ERR_MEMORY;
    int rc = blas_status(cublasLtCreate(&p->lt), "products");
    for (int i = 0; !rc && i < 4; i++)
        rc = open_desc(&p->descs[i / 2][i % 2], i / 2, i % 2);
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
    cublasLtMatrixLayout_t x, y, out;
};

static void close_layouts(struct layouts *l)
{
    if (l->x)
        cublasLtMatrixLayoutDestroy(l->x);
    if (l->y)
        cublasLtMatrixLayoutDestroy(l->y);
    if (l->out)
        cublasLtMatrixLayoutDestroy(l->out);
}

static cudaDataType_t blas_type(const struct mat *m)
{
    return m->dtype == DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

/* As it lies in memory, by columns. */
static int open_layout(cublasLtMatrixLayout_t *out, const struct mat *m, const char *op)
{
    return blas_status(cublasLtMatrixLayoutCreate(out, blas_type(m), m->cols, m->rows, m->stride), op);
}

static int open_layouts(struct layouts *l, const struct lt_product *p, const char *op)
{
    *l = (struct layouts){};
    int rc = open_layout(&l->x, &p->x, op);
    if (!rc)
        rc = open_layout(&l->y, &p->y, op);
    if (!rc)
        rc = open_layout(&l->out, &p->out, op);
    return rc;
}

/* The library's first choice among algorithms that add in a fixed order: no sums by atomics, none split over blocks. s: of
 * the product. */
static int choose(struct products *p, const struct lt_product *product, const struct shape *s, const char *op,
                  cublasLtMatmulAlgo_t *algo)
{
    cublasLtMatmulPreference_t pref = NULL;
    struct layouts l;
    cublasLtMatmulHeuristicResult_t result;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE, x = s->x_align, y = s->y_align,
                   out = s->out_align;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t bytes;
    } settings[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &LT_WORKSPACE_BYTES, sizeof LT_WORKSPACE_BYTES},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &y, sizeof y},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x, sizeof x},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out, sizeof out},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out, sizeof out},
    };
    int n = 0, rc = open_layouts(&l, product, op);
    if (!rc)
        rc = blas_status(cublasLtMatmulPreferenceCreate(&pref), op);
    for (size_t i = 0; !rc && i < sizeof settings / sizeof *settings; i++)
        rc = blas_status(cublasLtMatmulPreferenceSetAttribute(pref, settings[i].name, settings[i].value,
                                                              settings[i].bytes),
                         op);
    if (!rc)
        rc = blas_status(cublasLtMatmulAlgoGetHeuristic(p->lt, p->descs[s->y_transposed][s->x_transposed],
                                                        l.y, l.x, l.out, l.out, pref, 1, &result, &n),
                         op);
    if (!rc && n == 0)
        rc = err_set(ERR_UNSUPPORTED, "%s: cuBLAS has no algorithm for [%lld, %lld]%s · [%lld, %lld]%s", op,
                     (long long)(s->x_transposed ? s->k : s->n), (long long)(s->x_transposed ? s->n : s->k),
                     s->x_transposed ? "ᵀ" : "", (long long)(s->y_transposed ? s->m : s->k),
                     (long long)(s->y_transposed ? s->k : s->m), s->y_transposed ? "ᵀ" : "");
    if (!rc)
        *algo = result.algo;
    if (pref)
        cublasLtMatmulPreferenceDestroy(pref);
    close_layouts(&l);
    return rc;
}

/* FNV-1a over 32-bit words, folded. */
static unsigned set_of(const struct shape *s)
{
    uint32_t words[sizeof *s / sizeof(uint32_t)];
    uint64_t h = 0xcbf29ce484222325u;
    memcpy(words, s, sizeof *s);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        h = (h ^ words[i]) * 0x100000001b3u;
    return (unsigned)((h ^ h >> 32) % PLAN_SETS);
}

/* The greatest power of two, at most 256, that every row's address is a multiple of. */
static int32_t alignment(const struct mat *m)
{
    const uintptr_t bits = (uintptr_t)m->data | (uintptr_t)m->stride * dtype_bytes(m->dtype) | 256;
    return (int32_t)(bits & -bits);
}

static struct shape shape_of(const struct lt_product *p)
{
    return (struct shape){p->out.rows,      p->out.cols,      p->x_transposed ? p->x.rows : p->x.cols,
                          p->x.stride,      p->y.stride,      p->out.stride,
                          p->x_transposed,  p->y_transposed,  blas_type(&p->out),
                          alignment(&p->x), alignment(&p->y), alignment(&p->out)};
}

static int find_plan(struct products *p, const struct lt_product *product, const char *op,
                     const cublasLtMatmulAlgo_t **out)
{
    const struct shape s = shape_of(product);
    struct plan_set *set = &p->sets[set_of(&s)];
    for (int i = 0; i < set->n; i++)
        if (!memcmp(&set->plans[i].shape, &s, sizeof s)) {
            *out = &set->plans[i].algo;
            return 0;
        }
    cublasLtMatmulAlgo_t algo;
    const int rc = choose(p, product, &s, op, &algo);
    if (rc < 0)
        return rc;
    struct plan *plan = &set->plans[set->next];
    *plan = (struct plan){s, algo};
    set->next = (set->next + 1) % PLANS_EACH;
    set->n = set->n < PLANS_EACH ? set->n + 1 : PLANS_EACH;
    *out = &plan->algo;
    return 0;
}

/* The number of rows whose algorithm these take. An expert's rows are ever other numbers, and asking the library about each
 * of them would keep the device waiting. From 1024 on a step is at least 128, as a tile is. */
static int64_t standing_for(int64_t rows)
{
    int64_t step = 1;
    if (rows <= STEPS_FROM || rows >= STEPS_TO)
        return rows;
    while (16 * step < rows)
        step *= 2;
    return (rows + step - 1) / step * step;
}

/* The product as it is looked up. Rows of x are rows of out too or, with x transposed, of y. */
static struct lt_product looked_up(const struct lt_product *p)
{
    struct lt_product q = *p;
    q.x.rows = standing_for(p->x.rows);
    (p->x_transposed ? &q.y : &q.out)->rows = q.x.rows;
    return q;
}

/* p by the algorithm for `by`: p itself or what it is looked up as. *status: what the library says to that. */
static int multiply_by(struct products *products, const struct backend *b, const struct lt_product *p,
                       const struct lt_product *by, const char *op, cublasStatus_t *status)
{
    struct layouts l;
    const cublasLtMatmulAlgo_t *algo;
    const float alpha = p->alpha, beta = p->add ? 1 : 0;
    int rc = open_layouts(&l, p, op);
    if (!rc)
        rc = find_plan(products, by, op, &algo);
    if (!rc)
        *status = cublasLtMatmul(products->lt, products->descs[p->y_transposed][p->x_transposed], &alpha,
                                 p->y.data, l.y, p->x.data, l.x, &beta, p->out.data, l.out, p->out.data,
                                 l.out, algo, (char *)cuda_state(b)->scratch + OPERAND_BYTES,
                                 LT_WORKSPACE_BYTES, cuda_state(b)->stream);
    close_layouts(&l);
    return rc;
}

extern "C" int lt_multiply(const struct backend *b, const struct lt_product *p, const char *op)
{
    const struct shape s = shape_of(p);
    CHECK(p->x.dtype == DTYPE_BF16 && p->y.dtype == DTYPE_BF16);
    CHECK((p->x_transposed ? p->x.cols : p->x.rows) == s.n &&
          (p->y_transposed ? p->y.rows : p->y.cols) == s.m);
    CHECK((p->y_transposed ? p->y.cols : p->y.rows) == s.k && !(p->x_transposed && p->y_transposed));
    const struct lt_product by = looked_up(p);
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    struct products *products;
    void *scratch;
    int rc = get_products(b, &products);
    if (!rc)
        rc = cuda_scratch(b, &scratch);
    if (!rc)
        rc = multiply_by(products, b, p, &by, op, &status);
    /* an algorithm that does not take fewer rows than it was chosen for has done nothing */
    if (!rc && by.x.rows != p->x.rows &&
        (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE))
        rc = multiply_by(products, b, p, p, op, &status);
    return rc ? rc : blas_status(status, op);
}

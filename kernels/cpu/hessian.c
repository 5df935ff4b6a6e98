/* Products that calibration needs: the Hessian of a linear's inputs, its factor, and products of matrices with it. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"
#include "kernels/cpu/blas.h"

#include <math.h>

enum {
    TILE = 256,  /* columns of a task of hessian_add */
    RUN = 256,   /* rows and … */
    PANEL = 512, /* … columns of a task of matmul, … */
    DEPTH = 4096,       /* … which takes so many columns of x at a time, … */
    WIDENED_DEPTH = 1024 /* … or so many where m is widened too */
};

/* --- out (+)= alpha·x·m ----------------------------------------------------------------------------------------- */

struct matmul_job {
    const struct cpu_state *state;
    const struct mat *x, *m, *out;
    float alpha;
    bool add;
    int64_t n_panels;
};

/* Rows [row, row + n) of x, columns [col, col + cols), as floats. */
static void widen(const struct mat *x, int64_t row, int64_t n, int64_t col, int64_t cols, float *out)
{
    float tail[LANES];
    const int64_t whole = cols / LANES * LANES;
    for (int64_t r = 0; r < n; r++, out += cols) {
        if (x->dtype == DTYPE_I8) {
            const int8_t *p = (const int8_t *)x->data + (row + r) * x->stride + col;
            for (int64_t c = 0; c < cols; c++)
                out[c] = (float)p[c];
            continue;
        }
        load_row(x, row + r, col, whole, out);
        load_row(x, row + r, col + whole, cols - whole, tail); /* its padding must not reach the next row */
        memcpy(out + whole, tail, (size_t)(cols - whole) * sizeof *tail);
    }
}

static int64_t at_most(int64_t a, int64_t limit)
{
    return a < limit ? a : limit;
}

static int matmul_task(void *ctx, size_t index, int worker)
{
    const struct matmul_job *j = ctx;
    const int64_t row = (int64_t)index / j->n_panels * RUN, col = (int64_t)index % j->n_panels * PANEL;
    const int64_t n = at_most(j->x->rows - row, RUN), cols = at_most(j->m->cols - col, PANEL);
    const bool widens = j->m->dtype != DTYPE_F32;
    const int64_t depth = widens ? WIDENED_DEPTH : DEPTH;
    float *wide_x = j->state->scratch[worker], *wide_m = wide_x + RUN * DEPTH;
    struct blas_product p = {.m = (int)n,
                             .n = (int)cols,
                             .alpha = j->alpha,
                             .ldb = (int)(widens ? cols : j->m->stride),
                             .c = (float *)j->out->data + row * j->out->stride + col,
                             .ldc = (int)j->out->stride};
    for (int64_t k = 0; k < j->x->cols; k += depth) {
        p.k = (int)at_most(j->x->cols - k, depth);
        p.beta = j->add || k ? 1 : 0;
        p.b = widens ? wide_m : (const float *)j->m->data + k * j->m->stride + col;
        if (widens)
            widen(j->m, k, p.k, col, cols, wide_m);
        if (j->x->dtype == DTYPE_F32) {
            p.a = (const float *)j->x->data + row * j->x->stride + k;
            p.lda = (int)j->x->stride;
        } else {
            widen(j->x, row, n, k, p.k, wide_x);
            p.a = wide_x;
            p.lda = p.k;
        }
        blas_product(&p);
    }
    return 0;
}

int cpu_matmul(const struct backend *b, float alpha, const struct mat *x, const struct mat *m, bool add,
               const struct mat *out)
{
    CHECK(x->cols == m->rows && x->rows == out->rows && m->cols == out->cols && x->cols > 0);
    CHECK((m->dtype == DTYPE_F32 || (m->dtype == DTYPE_BF16 && x->dtype == DTYPE_BF16)) &&
          out->dtype == DTYPE_F32);
    _Static_assert((RUN * DEPTH + WIDENED_DEPTH * PANEL) * sizeof(float) <= CPU_SCRATCH_BYTES,
                   "widened pieces of x and m fit");
    int rc = x->dtype == DTYPE_I8 ? 0 : cpu_check_float(x, "matmul");
    if (!rc)
        rc = blas_load();
    if (rc < 0)
        return rc;
    struct matmul_job j = {cpu_state(b), x, m, out, alpha, add, (m->cols + PANEL - 1) / PANEL};
    const int64_t n_runs = (x->rows + RUN - 1) / RUN;
    return parallel_for(j.state->pool, (size_t)(n_runs * j.n_panels), matmul_task, &j);
}

/* --- the Hessian ------------------------------------------------------------------------------------------------ */

struct hessian_job {
    const struct mat *x, *h;
    int64_t n_tiles;
};

/* Tile `index` of the lower triangle, its rows in order. */
static int hessian_task(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct hessian_job *j = ctx;
    int64_t tile = 0, rest = (int64_t)index;
    while (rest > tile)
        rest -= ++tile;
    const int64_t row = tile * TILE, col = rest * TILE;
    blas_product(&(struct blas_product){.transpose_a = true,
                                        .m = (int)at_most(j->h->rows - row, TILE),
                                        .n = (int)at_most(j->h->cols - col, TILE),
                                        .k = (int)j->x->rows,
                                        .alpha = 1,
                                        .beta = 1,
                                        .a = (const float *)j->x->data + row,
                                        .b = (const float *)j->x->data + col,
                                        .lda = (int)j->x->stride,
                                        .ldb = (int)j->x->stride,
                                        .c = (float *)j->h->data + row * j->h->stride + col,
                                        .ldc = (int)j->h->stride});
    return 0;
}

static void check_hessian(const struct mat *h)
{
    CHECK(h->dtype == DTYPE_F32 && h->rows == h->cols);
}

int cpu_hessian_add(const struct backend *b, const struct mat *x, const struct mat *h)
{
    check_hessian(h);
    CHECK(x->dtype == DTYPE_F32 && x->cols == h->cols);
    const int rc = blas_load();
    if (rc < 0 || x->rows == 0)
        return rc;
    struct hessian_job j = {x, h, (h->cols + TILE - 1) / TILE};
    return parallel_for(cpu_state(b)->pool, (size_t)(j.n_tiles * (j.n_tiles + 1) / 2), hessian_task, &j);
}

int cpu_hessian_finish(const struct backend *b, const struct mat *h)
{
    (void)b;
    check_hessian(h);
    float *p = h->data;
    for (int64_t r = 0; r < h->rows; r++)
        for (int64_t c = 0; c < r; c++)
            p[c * h->stride + r] = p[r * h->stride + c];
    return 0;
}

int cpu_diagonal(const struct backend *b, const struct mat *h, float *to)
{
    (void)b;
    check_hessian(h);
    for (int64_t i = 0; i < h->rows; i++)
        to[i] = ((const float *)h->data)[i * h->stride + i];
    return 0;
}

int cpu_add_diagonal(const struct backend *b, const struct mat *h, float value)
{
    (void)b;
    check_hessian(h);
    for (int64_t i = 0; i < h->rows; i++)
        ((float *)h->data)[i * h->stride + i] += value;
    return 0;
}

/* P(H + added·I)Pᵀ with rows and columns in reverse is L·Lᵀ; L, its columns divided by the diagonal and turned back, is
 * the unit upper triangular factor. */
int cpu_factorize(const struct backend *b, const struct mat *h, const struct mat *order, float added,
                  const struct mat *work, const struct mat *factor, int *definite)
{
    (void)b;
    check_hessian(h);
    check_hessian(factor);
    CHECK(work->dtype == DTYPE_F64 && work->rows == h->rows && work->cols == h->cols &&
          order->dtype == DTYPE_I32);
    const int rc = blas_load();
    if (rc < 0)
        return rc;
    const int32_t *place = order->data;
    const int64_t n = h->rows;
    double *a = work->data;
    for (int64_t r = 0; r < n; r++) {
        const float *row = (const float *)h->data + place[n - 1 - r] * h->stride;
        for (int64_t c = 0; c <= r; c++)
            a[r * work->stride + c] = (double)row[place[n - 1 - c]] + (r == c ? (double)added : 0);
    }
    *definite = blas_cholesky((int)n, a, (int)work->stride);
    for (int64_t c = 0; *definite && c < n; c++)
        *definite = isfinite(a[c * work->stride + c]); /* a NaN passes LAPACK's own test */
    for (int64_t k = 0; *definite && k < n; k++)
        for (int64_t j = k; j < n; j++) {
            const int64_t r = n - 1 - k, c = n - 1 - j;
            ((float *)factor->data)[k * factor->stride + j] =
                (float)(a[r * work->stride + c] / a[c * work->stride + c]);
        }
    return 0;
}

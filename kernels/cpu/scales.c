/* Scales under a Hessian: the search among candidates for each group, and the closed form for given codes. */
#include "kernels/cpu/rounding.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

/* --- the search ------------------------------------------------------------------------------------------------- */

enum {
    N_RATIOS = 61,       /* symmetric: the extreme over 5, 5.1 … 11 of eight steps, either sign */
    N_SHRINKS = 45,      /* asymmetric: both ends times 1, 0.99 … 0.56 */
    NEIGHBOURS = 6,      /* on either side of the best that are judged by the block */
    BLOCK_COLUMNS = 128, /* of the longest group that is */
};

/* A group as the search sees it; part: elements held, a multiple of LANES and padded with zeros. */
struct group {
    const float *w, *weight; /* [n up to LANES] */
    const float *h;          /* its block of the Hessian */
    int64_t n, h_stride;
    float low, high; /* least and greatest weight, 0 included */
    int bits;
};

static struct step candidate(const struct group *g, bool symmetric, float sign, int i)
{
    if (!symmetric)
        return cpu_asymmetric_step(g->low, g->high, 1 - 0.01f * (float)i, g->bits);
    const float extreme = fmaxf(-g->low, g->high);
    const float ratio = (5 + 0.1f * (float)i) * (float)(1 << (g->bits - 1)) / 8;
    return (struct step){cpu_storable_scale(sign * (extreme / ratio)), 0};
}

/* e = q·s − w */
CPU_INLINE vfloat error_of(vfloat w, struct step s, float inverse, int bits)
{
    const float half = (float)(1 << (bits - 1));
    return vround(vmin(vmax(w * inverse, vset(-half - s.zero)), vset(half - 1 - s.zero))) * s.scale - w;
}

CPU_CLONES static float diagonal_error(const struct group *g, struct step s)
{
    const float inverse = 1 / s.scale;
    vfloat sum = {0};
    for (int64_t i = 0; i < g->n; i += LANES) {
        const vfloat e = error_of(vload(g->w + i), s, inverse, g->bits);
        sum += e * e * vload(g->weight + i);
    }
    return vsum(sum);
}

CPU_CLONES static float block_error(const struct group *g, struct step s)
{
    float e[BLOCK_COLUMNS + LANES], sum = 0;
    const float inverse = 1 / s.scale;
    for (int64_t i = 0; i < g->n; i += LANES)
        vstore(e + i, error_of(vload(g->w + i), s, inverse, g->bits));
    for (int64_t r = 0; r < g->n; r++) {
        const float *h = g->h + r * g->h_stride;
        vfloat dot = {0};
        int64_t c = 0;
        for (; c + LANES <= g->n; c += LANES)
            dot += vload(e + c) * vload(h + c);
        float rest = vsum(dot);
        for (; c < g->n; c++)
            rest += e[c] * h[c];
        sum += e[r] * rest;
    }
    return sum;
}

static struct step search_group(const struct group *g, const struct search_spec *spec, bool symmetric,
                                bool block)
{
    const int n = symmetric ? N_RATIOS : N_SHRINKS, n_signs = symmetric && !spec->positive_only ? 2 : 1;
    int best[2] = {0, 0};
    float least[2] = {INFINITY, INFINITY};
    for (int i = 0; i < n; i++)
        for (int k = 0; k < n_signs; k++) {
            const float error = diagonal_error(g, candidate(g, symmetric, k ? -1 : 1, i));
            if (error < least[k]) {
                least[k] = error;
                best[k] = i;
            }
        }
    int sign = n_signs == 2 && (least[1] < least[0] || (least[1] == least[0] && best[1] < best[0]));
    int chosen = best[sign];
    float error = INFINITY;
    for (int k = 0; block && k < n_signs; k++)
        for (int i = best[k] - NEIGHBOURS; i <= best[k] + NEIGHBOURS; i++) {
            if (i < 0 || i >= n)
                continue;
            const float e = block_error(g, candidate(g, symmetric, k ? -1 : 1, i));
            if (e < error) {
                error = e;
                sign = k;
                chosen = i;
            }
        }
    return candidate(g, symmetric, sign ? -1 : 1, chosen);
}

struct search_job {
    const struct cpu_state *state;
    const struct mat *w, *h;
    const struct search_spec *spec;
    const struct qmat *q;
    const float *diagonal; /* of h */
};

/* Where the whole group is dead its weights count alike; otherwise a dead column counts for a millionth of the mean,
 * so that nothing is decided by nothing. *mean: of the diagonal. */
static void group_weights(const float *diagonal, int64_t n, float *weight, float *mean)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)diagonal[i];
    *mean = (float)(sum / (double)n);
    for (int64_t i = 0; i < n; i++)
        weight[i] = *mean > 0 ? diagonal[i] + 1e-6f * *mean : 1;
    for (int64_t i = n; i % LANES; i++)
        weight[i] = 0;
}

static int search_row(void *ctx, size_t index, int worker)
{
    const struct search_job *j = ctx;
    const struct qmat *q = j->q;
    const int64_t row = (int64_t)index;
    float *w = j->state->scratch[worker], *weight = w + q->group + LANES;
    for (int64_t k = 0; k < q->scales.cols; k++) {
        const int64_t col = k * q->group, n = j->w->cols - col < q->group ? j->w->cols - col : q->group;
        struct group g = {.w = w,
                          .weight = weight,
                          .h = (const float *)j->h->data + col * j->h->stride + col,
                          .n = n,
                          .h_stride = j->h->stride,
                          .bits = q->bits};
        float mean;
        load_row(j->w, row, col, n, w);
        group_weights(j->diagonal + col, n, weight, &mean);
        for (int64_t i = 0; i < n; i++) {
            g.low = fminf(g.low, w[i]);
            g.high = fmaxf(g.high, w[i]);
        }
        const bool block = j->spec->block && n <= BLOCK_COLUMNS && mean > 0;
        const struct step s = search_group(&g, j->spec, !q->zeros.data, block);
        ((uint16_t *)q->scales.data)[row * q->scales.stride + k] = half_to_bf16(s.scale);
        if (q->zeros.data)
            ((int8_t *)q->zeros.data)[row * q->zeros.stride + k] = (int8_t)s.zero;
    }
    return 0;
}

int cpu_search_scales(const struct backend *b, const struct mat *w, const struct mat *h,
                      const struct search_spec *spec, const struct qmat *q)
{
    int rc = cpu_check_float(w, "search_scales");
    CHECK(h->dtype == DTYPE_F32 && h->rows == w->cols && h->cols == w->cols && q->cols == w->cols &&
          q->scales.rows == w->rows && q->scales.cols == (q->cols + q->group - 1) / q->group);
    if (!rc && 2 * (q->group + 2 * LANES) * (int64_t)sizeof(float) > CPU_SCRATCH_BYTES)
        rc = err_set(ERR_UNSUPPORTED, "search_scales: groups of %lld columns are too long",
                     (long long)q->group);
    float *diagonal = rc ? NULL : mem_alloc((size_t)w->cols, sizeof *diagonal, "the Hessian's diagonal");
    if (!rc && !diagonal)
        rc = ERR_MEMORY;
    if (!rc)
        rc = cpu_diagonal(b, h, diagonal);
    struct search_job j = {cpu_state(b), w, h, spec, q, diagonal};
    if (!rc)
        rc = parallel_for(j.state->pool, (size_t)w->rows, search_row, &j);
    free(diagonal);
    return rc;
}

/* --- the closed form -------------------------------------------------------------------------------------------- */

struct dots_job {
    const struct mat *x, *codes, *out;
    int64_t group;
};

CPU_CLONES static float dot_codes(const float *x, const int8_t *codes, int64_t n)
{
    vfloat sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        int8_t c[LANES];
        float f[LANES];
        memcpy(c, codes + i, sizeof c);
        for (int k = 0; k < LANES; k++)
            f[k] = (float)c[k];
        sum += vload(x + i) * vload(f);
    }
    float rest = vsum(sum);
    for (; i < n; i++)
        rest += x[i] * (float)codes[i];
    return rest;
}

static int dots_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct dots_job *j = ctx;
    const int64_t row = (int64_t)index;
    const float *x = (const float *)j->x->data + row * j->x->stride;
    const int8_t *codes = (const int8_t *)j->codes->data + row * j->codes->stride;
    float *out = (float *)j->out->data + row * j->out->stride;
    for (int64_t g = 0; g < j->out->cols; g++) {
        const int64_t col = g * j->group, n = j->x->cols - col < j->group ? j->x->cols - col : j->group;
        out[g] = dot_codes(x + col, codes + col, n);
    }
    return 0;
}

int cpu_group_dots(const struct backend *b, const struct mat *x, const struct mat *codes, int64_t group,
                   const struct mat *out)
{
    CHECK(x->dtype == DTYPE_F32 && codes->dtype == DTYPE_I8 && out->dtype == DTYPE_F32);
    CHECK(x->rows == codes->rows && x->cols == codes->cols && out->rows == x->rows &&
          out->cols == (x->cols + group - 1) / group);
    struct dots_job j = {x, codes, out, group};
    return parallel_for(cpu_state(b)->pool, (size_t)x->rows, dots_row, &j);
}

struct solve_job {
    const struct cpu_state *state;
    const struct mat *a, *rhs;
    bool positive_only;
    const struct qmat *q;
    int8_t *kept; /* [rows] */
};

/* sAsᵀ − 2sbᵀ; a: the triangle j ≥ i of [n, n] */
static double objective(const float *a, const float *rhs, const double *s, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double row = s[i] * (double)a[i * n + i] - 2 * (double)rhs[i];
        for (int64_t k = i + 1; k < n; k++)
            row += 2 * s[k] * (double)a[i * n + k];
        sum += s[i] * row;
    }
    return sum;
}

/* (A + ridge)·s = b by Cholesky, L in the doubles of `l` [n, n]. A group without a code keeps its scale. */
static bool solve(const float *a, const float *rhs, double *l, double *s, int64_t n)
{
    double mean = 0;
    for (int64_t i = 0; i < n; i++)
        mean += (double)a[i * n + i] / (double)n;
    const double ridge = 1e-6 * mean + 1e-12;
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c <= r; c++) {
            double sum = (double)a[c * n + r] + (r == c ? ridge : 0);
            for (int64_t k = 0; k < c; k++)
                sum -= l[r * n + k] * l[c * n + k];
            if (r == c && !(sum > 0))
                return false;
            l[r * n + c] = r == c ? sqrt(sum) : sum / l[c * n + c];
        }
    for (int64_t r = 0; r < n; r++) {
        double sum = (double)rhs[r];
        for (int64_t k = 0; k < r; k++)
            sum -= l[r * n + k] * s[k];
        s[r] = sum / l[r * n + r];
    }
    for (int64_t r = n - 1; r >= 0; r--) {
        for (int64_t k = r + 1; k < n; k++)
            s[r] -= l[k * n + r] * s[k];
        s[r] /= l[r * n + r];
    }
    return true;
}

static int solve_row(void *ctx, size_t index, int worker)
{
    const struct solve_job *j = ctx;
    const int64_t row = (int64_t)index, n = j->rhs->cols;
    const float *a = (const float *)j->a->data + row * j->a->stride,
                *rhs = (const float *)j->rhs->data + row * j->rhs->stride;
    uint16_t *scales = (uint16_t *)j->q->scales.data + row * j->q->scales.stride;
    double *l = (double *)j->state->scratch[worker], *s = l + n * n, *old = s + n;
    if (!solve(a, rhs, l, s, n))
        return 0;
    bool usable = true;
    for (int64_t i = 0; i < n; i++) {
        old[i] = (double)half_from_bf16(scales[i]);
        s[i] = a[i * n + i] > 0 ? (double)cpu_storable_scale((float)s[i]) : old[i];
        usable = usable && isfinite(s[i]) && (s[i] > 0 || !j->positive_only);
    }
    if (!usable || !(objective(a, rhs, s, n) < objective(a, rhs, old, n)))
        return 0;
    for (int64_t i = 0; i < n; i++)
        scales[i] = half_to_bf16((float)s[i]);
    j->kept[row] = 1;
    return 0;
}

int cpu_solve_scales(const struct backend *b, const struct mat *a, const struct mat *rhs, bool positive_only,
                     const struct qmat *q, int64_t *n_kept)
{
    const int64_t n = rhs->cols;
    CHECK(a->dtype == DTYPE_F32 && rhs->dtype == DTYPE_F32 && a->cols == n * n && a->rows == rhs->rows &&
          q->scales.cols == n && q->scales.rows == rhs->rows);
    *n_kept = 0;
    if ((uint64_t)(n * n + 2 * n) * sizeof(double) > CPU_SCRATCH_BYTES)
        return err_set(ERR_UNSUPPORTED, "solve_scales: %lld groups in a row are too many", (long long)n);
    struct solve_job j = {cpu_state(b), a, rhs, positive_only, q, mem_alloc((size_t)rhs->rows, 1, "rows")};
    if (!j.kept)
        return ERR_MEMORY;
    const int rc = parallel_for(j.state->pool, (size_t)rhs->rows, solve_row, &j);
    for (int64_t r = 0; r < rhs->rows; r++)
        *n_kept += j.kept[r];
    free(j.kept);
    return rc;
}

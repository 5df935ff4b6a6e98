/* Mixtures of experts: which experts a token goes to and how much each counts, rows of tokens side by side for an
 * expert's products, and the experts' results added up again; the router's gradient. */
#include "kernels/cpu/runs.h"

#include "base/err.h"
#include "kernels/expert_operands.h"

#include <math.h>

/* --- routing ---------------------------------------------------------------------------------------------------- */

struct route_job {
    const struct mat *logits, *factors, *experts, *weights;
};

static bool has_nan(const float *x, int64_t n)
{
    int found = 0;
    for (int64_t i = 0; i < n; i++)
        found |= x[i] != x[i];
    return found;
}

/* The k greatest of x, from the greatest down, of equals the first first. */
static void find_greatest(const float *x, int64_t n, int k, int32_t *best)
{
    int held = 0;
    for (int32_t i = 0; i < n; i++) {
        if (held == k && !(x[i] > x[best[k - 1]]))
            continue;
        int at = held < k ? held++ : k - 1;
        for (; at > 0 && x[i] > x[best[at - 1]]; at--)
            best[at] = best[at - 1];
        best[at] = i;
    }
}

static void sort_ascending(int32_t *v, int n)
{
    for (int i = 1; i < n; i++) {
        const int32_t moved = v[i];
        int at = i;
        for (; at > 0 && v[at - 1] > moved; at--)
            v[at] = v[at - 1];
        v[at] = moved;
    }
}

static void route_row(const struct route_job *j, int64_t row)
{
    const int k = (int)j->experts->cols;
    const float *x = row_of(j->logits, row);
    int32_t *experts = (int32_t *)j->experts->data + row * j->experts->stride;
    float *weights = row_of(j->weights, row), sum = 0;
    if (has_nan(x, j->logits->cols)) {
        for (int i = 0; i < k; i++) {
            experts[i] = i;
            weights[i] = NAN;
        }
        return;
    }
    find_greatest(x, j->logits->cols, k, experts);
    const float highest = x[experts[0]]; /* infinite: ∞ − ∞ makes every weight NaN */
    sort_ascending(experts, k);
    for (int i = 0; i < k; i++) {
        weights[i] = expf(x[experts[i]] - highest);
        sum += weights[i];
    }
    for (int i = 0; i < k; i++) {
        float factor[LANES] = {1};
        if (j->factors)
            load_row(j->factors, 0, experts[i], 1, factor);
        weights[i] = weights[i] / sum * factor[0];
    }
}

static int route_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct route_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->logits->rows); r++)
        route_row(j, r);
    return 0;
}

int cpu_route(const struct backend *b, const struct mat *logits, const struct mat *factors,
              const struct mat *experts, const struct mat *weights)
{
    int rc = check_route(logits, factors, experts, weights);
    if (!rc && factors)
        rc = cpu_check_float(factors, "route");
    struct route_job j = {logits, factors, experts, weights};
    return rc < 0 ? rc : parallel_for(cpu_state(b)->pool, n_runs(logits->rows), route_task, &j);
}

/* --- rows there and back ------------------------------------------------------------------------------------------ */

/* out = factor·x, or out += factor·x */
CPU_CLONES static void scale_row(const float *x, float factor, bool add, float *out, int64_t n)
{
    if (add)
        for (int64_t i = 0; i < n; i++)
            out[i] += factor * x[i];
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = factor * x[i];
}

struct gather_job {
    const struct mat *x, *out;
    const int32_t *rows;  /* [out->rows] or NULL */
    const float *factors; /* [out->rows] or NULL */
};

static int gather_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct gather_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->out->rows); r++) {
        const int64_t from = j->rows ? j->rows[r] : r;
        CHECK(from >= 0 && from < j->x->rows);
        const float *x = row_of(j->x, from);
        float *out = row_of(j->out, r);
        if (j->factors)
            scale_row(x, j->factors[r], false, out, j->out->cols);
        else if (x != out)
            memcpy(out, x, (size_t)j->out->cols * sizeof *out);
    }
    return 0;
}

int cpu_gather_rows(const struct backend *b, const struct mat *x, const struct mat *rows,
                    const struct mat *factors, const struct mat *out)
{
    check_gather_rows(x, rows, factors, out);
    CHECK(x->dtype == DTYPE_F32 && out->dtype == DTYPE_F32);
    struct gather_job j = {x, out, rows ? rows->data : NULL, factors ? factors->data : NULL};
    return parallel_for(cpu_state(b)->pool, n_runs(out->rows), gather_task, &j);
}

struct combine_job {
    const struct mat *y, *slots, *weights, *out;
};

static int combine_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct combine_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->out->rows); r++) {
        const int32_t *slots = (const int32_t *)j->slots->data + r * j->slots->stride;
        const float *weights = j->weights ? row_of(j->weights, r) : NULL;
        for (int64_t k = 0; k < j->slots->cols; k++) {
            CHECK(slots[k] >= 0 && slots[k] < j->y->rows);
            scale_row(row_of(j->y, slots[k]), weights ? weights[k] : 1, k > 0, row_of(j->out, r),
                      j->out->cols);
        }
    }
    return 0;
}

int cpu_combine_rows(const struct backend *b, const struct mat *y, const struct mat *slots,
                     const struct mat *weights, const struct mat *out)
{
    check_combine_rows(y, slots, weights, out);
    CHECK(y->dtype == DTYPE_F32 && out->dtype == DTYPE_F32);
    struct combine_job j = {y, slots, weights, out};
    return parallel_for(cpu_state(b)->pool, n_runs(out->rows), combine_task, &j);
}

/* --- the router's gradient ---------------------------------------------------------------------------------------- */

struct route_backward_job {
    const struct route_tape *tape;
    const struct mat *dout, *dlogits;
};

CPU_CLONES static float dot_rows(const float *x, const float *y, int64_t n)
{
    const int64_t whole = n / LANES * LANES;
    vfloat sums = {0};
    for (int64_t c = 0; c < whole; c += LANES)
        sums += vload(x + c) * vload(y + c);
    float sum = vsum(sums);
    for (int64_t c = whole; c < n; c++)
        sum += x[c] * y[c];
    return sum;
}

/* With p the softmax over the chosen logits, weights are p·factor; with g = factor·(dout·y) a chosen logit gains by
 * p·(g − Σ p·g). */
static void route_row_backward(const struct route_backward_job *j, int64_t row)
{
    const struct route_tape *t = j->tape;
    const int k = (int)t->experts.cols;
    const int32_t *experts = (const int32_t *)t->experts.data + row * t->experts.stride,
                  *slots = (const int32_t *)t->slots.data + row * t->slots.stride;
    const float *logits = row_of(&t->logits, row);
    float *out = row_of(j->dlogits, row), p[MAX_CHOSEN], g[MAX_CHOSEN], highest = -INFINITY, sum = 0,
          mean = 0;
    for (int i = 0; i < k; i++)
        highest = logits[experts[i]] > highest ? logits[experts[i]] : highest;
    for (int i = 0; i < k; i++) {
        float factor[LANES] = {1};
        CHECK(slots[i] >= 0 && slots[i] < t->y.rows);
        if (t->factors.data)
            load_row(&t->factors, 0, experts[i], 1, factor);
        sum += p[i] = expf(logits[experts[i]] - highest);
        g[i] = factor[0] * dot_rows(row_of(j->dout, row), row_of(&t->y, slots[i]), t->y.cols);
    }
    for (int i = 0; i < k; i++)
        mean += (p[i] /= sum) * g[i];
    memset(out, 0, (size_t)j->dlogits->cols * sizeof *out);
    for (int i = 0; i < k; i++)
        out[experts[i]] = p[i] * (g[i] - mean);
}

static int route_backward_task(void *ctx, size_t run, int worker)
{
    (void)worker;
    const struct route_backward_job *j = ctx;
    for (int64_t r = (int64_t)run * RUN; r < run_end(run, j->dout->rows); r++)
        route_row_backward(j, r);
    return 0;
}

int cpu_route_backward(const struct backend *b, const struct route_tape *tape, const struct mat *dout,
                       const struct mat *dlogits)
{
    const struct route_tape *t = tape;
    check_route_backward(t, dout, dlogits);
    CHECK(t->y.dtype == DTYPE_F32 && dout->dtype == DTYPE_F32);
    const int rc = t->factors.data ? cpu_check_float(&t->factors, "route_backward") : 0;
    struct route_backward_job j = {tape, dout, dlogits};
    return rc < 0 ? rc : parallel_for(cpu_state(b)->pool, n_runs(dout->rows), route_backward_task, &j);
}

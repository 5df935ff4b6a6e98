/* What two models' logits say about a token: negative log-likelihood, divergence, the most likely token; and tokens
 * drawn from them. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"

#include <math.h>

struct rows_job {
    const struct mat *a, *b; /* b: NULL for one model alone */
    const int32_t *targets;
    struct row_comparison *out;
};

/* --- comparing -------------------------------------------------------------------------------------------------- */

/* The place of the greatest logit; the first of equals. */
static int32_t top_of(const float *x, int64_t n)
{
    int32_t top = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[top])
            top = (int32_t)i;
    return top;
}

/* log Σ e^x, with the greatest value taken out. Lanes are folded into a double every 64 vectors, so that a
 * vocabulary of 262 144 keeps its precision. */
CPU_CLONES static double log_sum_exp(const float *x, int64_t n, float highest)
{
    double total = 0;
    int64_t i = 0;
    while (i + LANES <= n) {
        vfloat sum = {0};
        for (int k = 0; k < 64 && i + LANES <= n; k++, i += LANES)
            sum += vexp(vload(x + i) - highest);
        total += (double)vsum(sum);
    }
    for (; i < n; i++)
        total += (double)expf(x[i] - highest);
    return (double)highest + log(total);
}

/* Σ p_a·(log p_a − log p_b) */
CPU_CLONES static double divergence(const float *a, const float *b, int64_t n, double lse_a, double lse_b)
{
    const float shift = (float)lse_a, difference = (float)(lse_a - lse_b);
    double total = 0;
    int64_t i = 0;
    while (i + LANES <= n) {
        vfloat sum = {0};
        for (int k = 0; k < 64 && i + LANES <= n; k++, i += LANES) {
            const vfloat u = vload(a + i);
            sum += vexp(u - shift) * (u - vload(b + i) - difference);
        }
        total += (double)vsum(sum);
    }
    for (; i < n; i++)
        total += (double)(expf(a[i] - shift) * (a[i] - b[i] - difference));
    return total;
}

static int rows_task(void *ctx, size_t row, int worker)
{
    (void)worker;
    const struct rows_job *j = ctx;
    const int64_t n = j->a->cols;
    const float *a = (const float *)j->a->data + (int64_t)row * j->a->stride;
    struct row_comparison *out = &j->out[row];
    const int32_t target = j->targets[row];
    CHECK(target >= 0 && target < n);
    *out = (struct row_comparison){.top_a = top_of(a, n)};
    const double lse_a = log_sum_exp(a, n, a[out->top_a]);
    out->nll_a = (float)(lse_a - (double)a[target]);
    if (!j->b)
        return 0;
    const float *b = (const float *)j->b->data + (int64_t)row * j->b->stride;
    out->top_b = top_of(b, n);
    const double lse_b = log_sum_exp(b, n, b[out->top_b]);
    out->nll_b = (float)(lse_b - (double)b[target]);
    out->kl = (float)divergence(a, b, n, lse_a, lse_b);
    return 0;
}

int cpu_compare_rows(const struct backend *b, const struct mat *logits_a, const struct mat *logits_b,
                     const int32_t *targets, struct row_comparison *out)
{
    CHECK(logits_a->dtype == DTYPE_F32 &&
          (!logits_b || (logits_b->dtype == DTYPE_F32 && logits_b->rows == logits_a->rows &&
                         logits_b->cols == logits_a->cols)));
    struct rows_job j = {logits_a, logits_b, targets, out};
    return parallel_for(cpu_state(b)->pool, (size_t)logits_a->rows, rows_task, &j);
}

/* --- drawing ---------------------------------------------------------------------------------------------------- */

struct draw_job {
    const struct mat *logits;
    float temperature;
    uint64_t seed, step;
    int32_t *out;
};

/* SplitMix64: the states are multiples of GAMMA from a start on, the outputs are their mix64. */
#define GAMMA UINT64_C(0x9e3779b97f4a7c15)

static inline uint64_t mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* log1p and small v for large g: −log u with u near 1 would leave 2¹⁸ columns five bits to differ in. */
static float gumbel(uint32_t h)
{
    const float v = fminf((float)h * 0x1p-32f + 0x1p-33f, 0x1.fffffep-1f);
    return -logf(-log1pf(-v));
}

/* gumbel(h) is below it: −log(1 − v) > v ≥ 2^−(leading zeros + 1). It spares all but a few columns their logarithms. */
static inline float gumbel_bound(uint32_t h)
{
    return (float)(h ? __builtin_clz(h) + 1 : 33) * 0.69314724f;
}

static int32_t draw(const float *x, int64_t n, float highest, float temperature, uint64_t start)
{
    float best = -INFINITY;
    int32_t drawn = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t h = (uint32_t)(mix64(start + (uint64_t)i * GAMMA) >> 32);
        const float scaled = (x[i] - highest) / temperature;
        if (!(scaled + gumbel_bound(h) > best))
            continue;
        const float score = scaled + gumbel(h);
        if (score > best) {
            best = score;
            drawn = (int32_t)i;
        }
    }
    return drawn;
}

static bool has_nan(const float *x, int64_t n)
{
    int found = 0;
    for (int64_t i = 0; i < n; i++)
        found |= x[i] != x[i];
    return found;
}

static int draw_task(void *ctx, size_t row, int worker)
{
    (void)worker;
    const struct draw_job *j = ctx;
    const int64_t n = j->logits->cols;
    const float *x = (const float *)j->logits->data + (int64_t)row * j->logits->stride;
    const int32_t top = top_of(x, n);
    if (!isfinite(x[top]) || has_nan(x, n))
        return err_set(ERR_FORMAT, "sample_rows: the logits of row %zu are not finite: damaged weights?",
                       row);
    const uint64_t start = mix64(mix64(j->seed + row) + j->step);
    j->out[row] = j->temperature == 0 ? top : draw(x, n, x[top], j->temperature, start);
    return 0;
}

int cpu_sample_rows(const struct backend *b, const struct mat *logits, float temperature, uint64_t seed,
                    int64_t step, int32_t *out)
{
    CHECK(logits->dtype == DTYPE_F32 && logits->cols >= 1 && logits->cols <= INT32_MAX);
    CHECK(temperature >= 0 && step >= 0);
    struct draw_job j = {logits, temperature, seed, (uint64_t)step, out};
    return parallel_for(cpu_state(b)->pool, (size_t)logits->rows, draw_task, &j);
}

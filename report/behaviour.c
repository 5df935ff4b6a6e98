#include "report/behaviour.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

/* One model while it is measured. */
struct side {
    const struct weights *w;
    struct forward *forward;
    struct buf logits; /* of logit_rows(w) tokens */
};

/* Everything that is collected about tokens, in order of windows. */
struct measurement {
    struct side a, b; /* b.w = NULL: one model alone */
    const struct windows *text;
    int64_t batch;               /* windows that run together */
    struct row_comparison *rows; /* [windows, length − 1] */
    float *states;               /* [layers, length, hidden] of a's residual stream in the first window */
    struct buf state;            /* one of them on b's device, then two sums */
    double *block_error;
};

int64_t behaviour_logit_rows(const struct backend *b, int64_t vocab)
{
    const int64_t rows = (int64_t)(b->logit_bytes / sizeof(float)) / vocab;
    return rows ? rows : 1;
}

static int open_side(struct side *s, const struct weights *w, int64_t batch, int64_t length)
{
    const struct forward_size size = {.n_sequences = batch, .max_positions = length, .max_rows = length};
    const int64_t vocab = w->embedding.rows;
    s->w = w;
    int rc = forward_open(&s->forward, w, &size);
    if (!rc)
        rc = w->backend->core->acquire(
            w->backend, (size_t)(behaviour_logit_rows(w->backend, vocab) * vocab) * sizeof(float), "logits",
            &s->logits);
    return rc;
}

static void close_side(struct side *s)
{
    if (s->logits.ptr)
        s->w->backend->core->release(s->w->backend, &s->logits);
    forward_close(s->forward);
}

/* --- where the error arises -------------------------------------------------------------------------------------- */

static int keep_states(void *ctx, int layer, const struct mat *x)
{
    const struct measurement *m = ctx;
    const size_t n = (size_t)(m->text->length * x->cols);
    return m->a.w->backend->core->download(m->a.w->backend, m->states + (size_t)layer * n, x->data,
                                           n * sizeof(float));
}

static int compare_states(void *ctx, int layer, const struct mat *x)
{
    const struct measurement *m = ctx;
    const struct backend *b = m->b.w->backend;
    const size_t n = (size_t)(m->text->length * x->cols);
    const struct mat theirs = mat_rows(x, 0, m->text->length);
    const struct mat ours = {m->state.ptr, DTYPE_F32, theirs.rows, x->cols, x->cols};
    double *device_sums = (double *)((char *)m->state.ptr + n * sizeof(float)), sums[2];
    int rc = b->core->upload(b, ours.data, m->states + (size_t)layer * n, n * sizeof(float));
    if (!rc)
        rc = b->core->squared_error(b, &ours, &theirs, device_sums);
    if (!rc)
        rc = b->core->download(b, sums, device_sums, sizeof sums);
    if (!rc)
        m->block_error[layer] = sums[1] > 0 ? sqrt(sums[0] / sums[1]) : 0;
    return rc;
}

/* --- windows ------------------------------------------------------------------------------------------------------- */

static int run_batch(struct side *s, const int32_t *ids, int64_t n_windows, int64_t length,
                     struct mat *hidden)
{
    forward_begin(s->forward, n_windows);
    return forward_run(s->forward, ids, length, hidden);
}

/* Logits of rows [row, row + n) of the batch, in the side's buffer. */
static int logits_of(const struct side *s, const struct mat *hidden, int64_t row, int64_t n,
                     struct mat *logits)
{
    const int64_t vocab = s->w->embedding.rows;
    const struct mat rows = mat_rows(hidden, row, n);
    *logits = (struct mat){s->logits.ptr, DTYPE_F32, n, vocab, vocab};
    return forward_logits(s->w, &rows, logits);
}

/* The window whose states are rows [first, first + length) of both. */
static int score_window(struct measurement *m, const struct mat *hidden_a, const struct mat *hidden_b,
                        int64_t first, size_t index)
{
    const int64_t length = m->text->length,
                  step = behaviour_logit_rows(m->a.w->backend, m->a.w->embedding.rows);
    const int32_t *ids = m->text->ids + (int64_t)index * length;
    struct row_comparison *out = m->rows + (int64_t)index * (length - 1);
    struct mat logits_a, logits_b;
    int rc = 0;
    for (int64_t row = 0; !rc && row < length - 1; row += step) {
        const int64_t n = length - 1 - row < step ? length - 1 - row : step;
        rc = logits_of(&m->a, hidden_a, first + row, n, &logits_a);
        if (!rc && m->b.w)
            rc = logits_of(&m->b, hidden_b, first + row, n, &logits_b);
        if (!rc)
            rc = m->a.w->backend->core->compare_rows(m->a.w->backend, &logits_a, m->b.w ? &logits_b : NULL,
                                                     ids + row + 1, out + row);
    }
    return rc;
}

static int measure_batch(struct measurement *m, size_t index, int64_t n)
{
    const int64_t length = m->text->length;
    const int32_t *ids = m->text->ids + (int64_t)index * length;
    struct mat hidden_a, hidden_b = {0};
    const bool first = index == 0 && m->block_error;
    forward_observe(m->a.forward, first ? keep_states : NULL, m);
    int rc = run_batch(&m->a, ids, n, length, &hidden_a);
    if (!rc && m->b.w) {
        forward_observe(m->b.forward, first ? compare_states : NULL, m);
        rc = run_batch(&m->b, ids, n, length, &hidden_b);
    }
    for (int64_t i = 0; !rc && i < n; i++)
        rc = score_window(m, &hidden_a, &hidden_b, i * length, index + (size_t)i);
    return rc;
}

/* --- statistics ---------------------------------------------------------------------------------------------------- */

/* Which number of a row is averaged. */
enum quantity { NLL_A, NLL_B, KL };

static double value_of(const struct row_comparison *r, enum quantity q)
{
    return (double)(q == NLL_A ? r->nll_a : q == NLL_B ? r->nll_b : r->kl);
}

/* Mean over tokens, and half the width of its 95 % interval. Tokens of a window depend on each other, so windows
 * are the units: Student's t would be wider for few of them; 1.96 is stated as what it is. */
static double mean_of(const struct measurement *m, enum quantity q, double *half_width)
{
    const size_t n = m->text->n, per_window = (size_t)m->text->length - 1;
    double sum = 0, squares = 0;
    for (size_t w = 0; w < n; w++) {
        double window = 0;
        for (size_t i = 0; i < per_window; i++)
            window += value_of(&m->rows[w * per_window + i], q);
        window /= (double)per_window;
        sum += window;
        squares += window * window;
    }
    const double mean = sum / (double)n;
    const double variance = n > 1 ? fmax(0, (squares - (double)n * mean * mean) / (double)(n - 1)) : NAN;
    *half_width = 1.96 * sqrt(variance / (double)n);
    return mean;
}

static struct likelihood likelihood_of(const struct measurement *m, enum quantity q)
{
    double half;
    const double nll = mean_of(m, q, &half);
    return (struct likelihood){.n_tokens = m->text->n * ((size_t)m->text->length - 1),
                               .n_windows = m->text->n,
                               .nll = nll,
                               .perplexity = exp(nll),
                               .perplexity_low = exp(nll - half),
                               .perplexity_high = exp(nll + half)};
}

/* NaN last */
static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    if (isnan(x) || isnan(y))
        return !!isnan(x) - !!isnan(y);
    return (x > y) - (x < y);
}

/* Linear interpolation between order statistics, as numpy's default. */
static double quantile(const float *sorted, size_t n, double q)
{
    const double at = q * (double)(n - 1);
    const size_t low = (size_t)at, high = low + 1 < n ? low + 1 : low;
    return (double)sorted[low] + (at - (double)low) * ((double)sorted[high] - (double)sorted[low]);
}

static int summarize(const struct measurement *m, struct behaviour *out)
{
    const size_t n = m->text->n * ((size_t)m->text->length - 1);
    float *kl = mem_alloc(n, sizeof *kl, "divergences");
    if (!kl)
        return ERR_MEMORY;
    size_t agree = 0;
    for (size_t i = 0; i < n; i++) {
        kl[i] = m->rows[i].kl;
        agree += m->rows[i].top_a == m->rows[i].top_b;
    }
    qsort(kl, n, sizeof *kl, by_value);
    double half;
    out->original = likelihood_of(m, NLL_A);
    out->cut = likelihood_of(m, NLL_B);
    out->kl_mean = mean_of(m, KL, &half);
    out->kl_low = out->kl_mean - half;
    out->kl_high = out->kl_mean + half;
    out->kl_median = quantile(kl, n, 0.5);
    out->kl_p99 = quantile(kl, n, 0.99);
    out->top1 = (double)agree / (double)n;
    free(kl);
    return 0;
}

/* --- both ---------------------------------------------------------------------------------------------------------- */

static int run_windows(struct measurement *m, behaviour_progress on_window, void *ctx)
{
    m->rows = mem_alloc(m->text->n * ((size_t)m->text->length - 1), sizeof *m->rows, "token scores");
    int rc = m->rows ? 0 : ERR_MEMORY;
    for (size_t i = 0; !rc && i < m->text->n; i += (size_t)m->batch) {
        const size_t left = m->text->n - i, n = left < (size_t)m->batch ? left : (size_t)m->batch;
        rc = measure_batch(m, i, (int64_t)n);
        if (!rc && err_interrupt_requested())
            rc = err_interrupted();
        for (size_t k = 0; !rc && on_window && k < n; k++)
            on_window(ctx, i + k);
    }
    return rc;
}

static void close_measurement(struct measurement *m)
{
    if (m->state.ptr)
        m->b.w->backend->core->release(m->b.w->backend, &m->state);
    close_side(&m->a);
    close_side(&m->b);
    free(m->rows);
    free(m->states);
}

int likelihood_measure(struct likelihood *out, const struct weights *w, const struct windows *text,
                       int64_t batch, behaviour_progress on_window, void *ctx)
{
    struct measurement m = {.text = text, .batch = batch};
    int rc = open_side(&m.a, w, batch, text->length);
    if (!rc)
        rc = run_windows(&m, on_window, ctx);
    if (!rc)
        *out = likelihood_of(&m, NLL_A);
    if (!rc && !isfinite(out->nll))
        rc = err_set(ERR_FORMAT, "the model's logits are not finite: damaged weights?");
    close_measurement(&m);
    return rc;
}

int behaviour_measure(struct behaviour *out, const struct weights *original, const struct weights *cut,
                      const struct windows *text, int64_t batch, behaviour_progress on_window, void *ctx)
{
    const size_t state = (size_t)(text->length * original->config.hidden_size) * sizeof(float);
    *out = (struct behaviour){.n_layers = original->config.n_layers};
    out->block_error = mem_alloc((size_t)out->n_layers, sizeof *out->block_error, "block errors");
    struct measurement m = {.text = text,
                            .batch = batch,
                            .block_error = out->block_error,
                            .states = mem_alloc((size_t)out->n_layers, state, "residual streams")};
    int rc = out->block_error && m.states ? 0 : ERR_MEMORY;
    if (!rc)
        rc = open_side(&m.a, original, batch, text->length);
    if (!rc)
        rc = open_side(&m.b, cut, batch, text->length);
    if (!rc)
        rc = cut->backend->core->acquire(cut->backend, state + 2 * sizeof(double), "a residual stream",
                                         &m.state);
    if (!rc)
        rc = run_windows(&m, on_window, ctx);
    if (!rc)
        rc = summarize(&m, out);
    close_measurement(&m);
    if (rc < 0)
        behaviour_free(out);
    return rc;
}

void behaviour_free(struct behaviour *b)
{
    free(b->block_error);
    *b = (struct behaviour){0};
}

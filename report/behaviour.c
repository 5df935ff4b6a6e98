#include "report/behaviour.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

/* Rows whose logits stand side by side: 64 rows of 262 144 columns are 67 MB for each model. */
enum { LOGIT_ROWS = 64 };

/* One model while it is measured. */
struct side {
    const struct weights *w;
    struct forward *forward;
    struct buf logits;
};

/* Everything that is collected about tokens, in order of windows. */
struct measurement {
    struct side a, b; /* b.w = NULL: one model alone */
    const struct windows *text;
    struct row_comparison *rows; /* [windows, length − 1] */
    float *states;               /* [layers, length, hidden] of a's residual stream in the first window */
    float *scratch;              /* [length, hidden] of b's */
    double *block_error;
};

static int open_side(struct side *s, const struct weights *w, int64_t length)
{
    s->w = w;
    int rc = forward_open(&s->forward, w, length, length);
    if (!rc)
        rc = w->backend->core->acquire(w->backend, (size_t)(LOGIT_ROWS * w->embedding.rows) * sizeof(float),
                                       "logits", &s->logits);
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
    const size_t n = (size_t)(x->rows * x->cols);
    return m->a.w->backend->core->download(m->a.w->backend, m->states + (size_t)layer * n, x->data,
                                           n * sizeof(float));
}

static int compare_states(void *ctx, int layer, const struct mat *x)
{
    const struct measurement *m = ctx;
    const struct backend *b = m->b.w->backend;
    const size_t n = (size_t)(x->rows * x->cols);
    const int rc = b->core->download(b, m->scratch, x->data, n * sizeof(float));
    const struct mat ours = {m->states + (size_t)layer * n, DTYPE_F32, x->rows, x->cols, x->cols};
    const struct mat theirs = {m->scratch, DTYPE_F32, x->rows, x->cols, x->cols};
    double error, reference;
    if (rc < 0 || b->core->squared_error(&ours, &theirs, &error, &reference) < 0)
        return rc < 0 ? rc : ERR_UNSUPPORTED;
    m->block_error[layer] = reference > 0 ? sqrt(error / reference) : 0;
    return 0;
}

/* --- windows ------------------------------------------------------------------------------------------------------- */

static int run_window(struct side *s, const int32_t *ids, int64_t length, struct mat *hidden)
{
    forward_reset(s->forward);
    return forward_run(s->forward, ids, length, hidden);
}

/* Logits of rows [row, row + n) of the window, in the side's buffer. */
static int logits_of(const struct side *s, const struct mat *hidden, int64_t row, int64_t n,
                     struct mat *logits)
{
    const int64_t vocab = s->w->embedding.rows;
    const struct mat rows = {(float *)hidden->data + row * hidden->stride, DTYPE_F32, n, hidden->cols,
                             hidden->stride};
    *logits = (struct mat){s->logits.ptr, DTYPE_F32, n, vocab, vocab};
    return forward_logits(s->w, &rows, logits);
}

static int measure_window(struct measurement *m, size_t index)
{
    const int64_t length = m->text->length;
    const int32_t *ids = m->text->ids + (int64_t)index * length;
    struct row_comparison *out = m->rows + (int64_t)index * (length - 1);
    struct mat hidden_a, hidden_b = {0}, logits_a, logits_b;
    const bool first = index == 0 && m->block_error;
    forward_observe(m->a.forward, first ? keep_states : NULL, m);
    int rc = run_window(&m->a, ids, length, &hidden_a);
    if (!rc && m->b.w) {
        forward_observe(m->b.forward, first ? compare_states : NULL, m);
        rc = run_window(&m->b, ids, length, &hidden_b);
    }
    for (int64_t row = 0; !rc && row < length - 1; row += LOGIT_ROWS) {
        const int64_t n = length - 1 - row < LOGIT_ROWS ? length - 1 - row : LOGIT_ROWS;
        rc = logits_of(&m->a, &hidden_a, row, n, &logits_a);
        if (!rc && m->b.w)
            rc = logits_of(&m->b, &hidden_b, row, n, &logits_b);
        if (!rc)
            rc = m->a.w->backend->core->compare_rows(m->a.w->backend, &logits_a, m->b.w ? &logits_b : NULL,
                                                     ids + row + 1, out + row);
    }
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

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
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
    for (size_t i = 0; !rc && i < m->text->n; i++) {
        rc = measure_window(m, i);
        if (!rc && on_window)
            on_window(ctx, i);
    }
    return rc;
}

static void close_measurement(struct measurement *m)
{
    close_side(&m->a);
    close_side(&m->b);
    free(m->rows);
    free(m->states);
    free(m->scratch);
}

int likelihood_measure(struct likelihood *out, const struct weights *w, const struct windows *text,
                       behaviour_progress on_window, void *ctx)
{
    struct measurement m = {.text = text};
    int rc = open_side(&m.a, w, text->length);
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
                      const struct windows *text, behaviour_progress on_window, void *ctx)
{
    const size_t state = (size_t)(text->length * original->config.hidden_size);
    *out = (struct behaviour){.n_layers = original->config.n_layers};
    out->block_error = mem_alloc((size_t)out->n_layers, sizeof *out->block_error, "block errors");
    struct measurement m = {.text = text,
                            .block_error = out->block_error,
                            .states =
                                mem_alloc((size_t)out->n_layers * state, sizeof(float), "residual streams"),
                            .scratch = mem_alloc(state, sizeof(float), "a residual stream")};
    int rc = out->block_error && m.states && m.scratch ? 0 : ERR_MEMORY;
    if (!rc)
        rc = open_side(&m.a, original, text->length);
    if (!rc)
        rc = open_side(&m.b, cut, text->length);
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

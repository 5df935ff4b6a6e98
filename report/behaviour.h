/* How a cut behaves beside its original on text: perplexity of both, the divergence of their next-token
 * distributions, how often they agree on the most likely token, and after which block the error arises. */
#ifndef GEMCUT_REPORT_BEHAVIOUR_H
#define GEMCUT_REPORT_BEHAVIOUR_H

#include "calib/windows.h"
#include "runtime/forward.h"

/* One model on text. */
struct likelihood {
    size_t n_tokens, n_windows;
    double nll;                             /* mean −log p a token, nats */
    double perplexity;                      /* e^nll */
    double perplexity_low, perplexity_high; /* 95 % interval, windows taken as the independent units */
};

/* A cut (b) beside its original (a). */
struct behaviour {
    struct likelihood original, cut;
    double kl_mean, kl_low, kl_high; /* KL(original ‖ cut), nats a token; 95 % interval over windows */
    double kl_median, kl_p99;
    double top1; /* share of tokens on whose successor both agree */
    int64_t n_layers;
    double *block_error; /* [n_layers]: ‖x − x̂‖ / ‖x‖ of the residual stream after each block */
};

/* Told after each window, from the calling thread. */
typedef void (*behaviour_progress)(void *ctx, size_t window);

/* batch: windows that run together, as run_plan says. */
int likelihood_measure(struct likelihood *out, const struct weights *w, const struct windows *text,
                       int64_t batch, behaviour_progress on_window, void *ctx);
int behaviour_measure(struct behaviour *out, const struct weights *original, const struct weights *cut,
                      const struct windows *text, int64_t batch, behaviour_progress on_window, void *ctx);
void behaviour_free(struct behaviour *b);

/* Tokens whose logits stand side by side. */
int64_t behaviour_logit_rows(const struct backend *b, int64_t vocab);

#endif

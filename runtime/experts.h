/* A block's mixture of experts, beside its MLP: a router sends each token to top_k of them, each works on the tokens that
 * are sent to it, lying together, and a token's results are added, weighed by the router. Forward passes take all steps in one
 * (experts_add); a calibration looks between them, and a backward pass (runtime/block_grad.h) at what they leave. */
#ifndef GEMCUT_RUNTIME_EXPERTS_H
#define GEMCUT_RUNTIME_EXPERTS_H

#include "runtime/weights.h"

/* What the steps work in. Rows are what all experts take: expert e has [starts[e], starts[e + 1]) of them. */
struct experts_room {
    int64_t max_tokens, max_rows;
    struct mat normed;          /* act [tokens, hidden] */
    struct mat logits, sum;     /* F32 [tokens, experts], [tokens, hidden] */
    struct mat chosen, weights; /* I32, F32 [tokens, top_k], of experts_add */
    struct mat order, slots; /* I32 [1, rows]: the token of each; I32 [tokens, top_k]: the rows of a token */
    struct mat gathered, gate_up; /* act [rows, hidden], [rows, 2·inner] */
    struct mat inner,
        results;       /* act [rows, inner], [rows, hidden]: what down reads and gives; in gate_up's and
                                     gathered's place, unless these are kept */
    struct mat places; /* I32 [1, rows]: which of the chosen each row is for, token·top_k + j; data NULL: not
                                     wanted */
    int32_t *host;     /* of chosen, order, slots and places */
    int64_t *starts;   /* [experts + 1], on the host */
};

/* Takes a room's matrices from an arena (kernels/arena.h), for so many tokens and rows; nothing where the model has no
 * experts. */
void experts_lay_out(struct experts_room *r, void *base, uint64_t *at, const struct gemma_config *c,
                     enum dtype act, int64_t tokens, int64_t rows);
/* The same for a backward pass: what linears read is kept, and rows know their places. */
void experts_lay_out_kept(struct experts_room *r, void *base, uint64_t *at, const struct gemma_config *c,
                          enum dtype act, int64_t tokens, int64_t rows);
int experts_open(struct experts_room *r, const struct gemma_config *c); /* its memory on the host */
void experts_close(struct experts_room *r);

/* Which experts each token of x (F32 [tokens, hidden]) goes to: chosen I32, weights F32 [tokens, top_k] */
int experts_route(const struct weights *w, int layer, const struct experts_room *r, const struct mat *x,
                  const struct mat *chosen, const struct mat *weights);

/* A token that an expert takes in addition, and whose result is not wanted. */
struct extra_row {
    int32_t expert, token;
};

/* Which tokens go where, on the host. */
struct expert_tokens {
    int64_t n;
    const int32_t *chosen; /* [n, top_k]; −1: goes nowhere */
    const struct extra_row *extra;
    int64_t n_extra;
};

/* Sorts tokens by the experts that take them. */
int experts_assign(const struct weights *w, int layer, struct experts_room *r, const struct expert_tokens *t);

/* r->gathered: what the experts' gate and up read of x, expert by expert */
int experts_gather(const struct weights *w, int layer, const struct experts_room *r, const struct mat *x);

/* r->inner: what their down reads */
int experts_inner(const struct weights *w, int layer, const struct experts_room *r);

/* One expert's rows of either. */
struct mat experts_input_rows(const struct experts_room *r, int expert);
struct mat experts_inner_rows(const struct experts_room *r, int expert);
struct mat experts_rows(const struct experts_room *r, const struct mat *m,
                        int expert); /* of any such matrix */

/* branch, the MLP's result: act [tokens, hidden] = RMSNorm(branch) + RMSNorm(what the experts give) */
int experts_join(const struct weights *w, int layer, const struct experts_room *r, const struct mat *weights,
                 const struct mat *branch);

/* From a routing that is known to the end: chosen on the host, [tokens, top_k]. */
int experts_run(const struct weights *w, int layer, struct experts_room *r, const struct mat *x,
                const int32_t *chosen, const struct mat *weights, const struct mat *branch);

/* All of it, by r->chosen and r->weights. */
int experts_add(const struct weights *w, int layer, struct experts_room *r, const struct mat *x,
                const struct mat *branch);

#endif

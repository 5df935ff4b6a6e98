/* The forward pass of one sequence: token ids in, hidden states and logits out, with a KV cache between calls.
 * Activations and the cache are FP32 on the CPU; what that means against BF16 is in docs/model-gemma.md. */
#ifndef GEMCUT_RUNTIME_FORWARD_H
#define GEMCUT_RUNTIME_FORWARD_H

#include "runtime/weights.h"

struct forward;

/* Told after every block with the residual stream x [n, hidden] on the device; a negative return ends the pass. */
typedef int (*forward_observer)(void *ctx, int layer, const struct mat *x);

/* Room for sequences of max_positions tokens, fed at most max_rows at a time. */
int forward_open(struct forward **out, const struct weights *w, int64_t max_positions, int64_t max_rows);
void forward_close(struct forward *f);

/* Bytes that forward_open takes from the device. */
uint64_t forward_bytes(const struct weights *w, int64_t max_positions, int64_t max_rows);

/* Forgets the sequence. */
void forward_reset(struct forward *f);
int64_t forward_position(const struct forward *f);

/* Runs n tokens at the end of the sequence, 1 … max_rows of them. ids in [0, vocab). *hidden: their final states
 * [n, hidden] after the last norm, a view that the next call overwrites. */
int forward_run(struct forward *f, const int32_t *ids, int64_t n, struct mat *hidden);
void forward_observe(struct forward *f, forward_observer observer, void *ctx);

/* logits [hidden->rows, vocab] = hidden · embeddingᵀ */
int forward_logits(const struct weights *w, const struct mat *hidden, const struct mat *logits);

#endif

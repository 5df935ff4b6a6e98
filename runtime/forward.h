/* The forward pass of a batch of sequences of equal length: token ids in, hidden states and logits out, with a KV cache
 * between calls. The residual stream is FP32; other activations and the cache have the backend's type. What that means
 * against BF16 is in docs/model-gemma.md. */
#ifndef GEMCUT_RUNTIME_FORWARD_H
#define GEMCUT_RUNTIME_FORWARD_H

#include "runtime/weights.h"

struct forward;

/* Room for n_sequences of max_positions tokens each, fed at most max_rows tokens of each at a time. */
struct forward_size {
    int64_t n_sequences, max_positions, max_rows;
};

/* Told after every block with the residual stream x [tokens, hidden], FP32 on the device; a negative return ends the
 * pass. */
typedef int (*forward_observer)(void *ctx, int layer, const struct mat *x);

int forward_open(struct forward **out, const struct weights *w, const struct forward_size *size);
void forward_close(struct forward *f);

/* Bytes that forward_open takes from the device. */
uint64_t forward_bytes(const struct gemma_config *c, const struct backend *b,
                       const struct forward_size *size);

/* Forgets the sequences; the next ones are n_sequences, at most as many as there is room for. */
void forward_begin(struct forward *f, int64_t n_sequences);
int64_t forward_position(const struct forward *f);

/* Runs n tokens at the end of each sequence, 1 … max_rows of them. ids [n_sequences, n] in [0, vocab). *hidden: their
 * final states [n_sequences·n, hidden] after the last norm, a view that the next call overwrites. */
int forward_run(struct forward *f, const int32_t *ids, int64_t n, struct mat *hidden);
void forward_observe(struct forward *f, forward_observer observer, void *ctx);

/* logits F32 [hidden->rows, vocab] = hidden · embeddingᵀ, capped where the model has it so */
int forward_logits(const struct weights *w, const struct mat *hidden, const struct mat *logits);

#endif

/* One decoder block's two branches up to their last linear: what the forward pass and calibration share. */
#ifndef GEMCUT_RUNTIME_BLOCK_H
#define GEMCUT_RUNTIME_BLOCK_H

#include "runtime/weights.h"

/* Where a block's tokens stand and what it works in. Matrices are act, their rows the tokens of all sequences. */
struct block_pass {
    struct sequences sequences;
    const struct mat *rope;  /* [new tokens of a sequence, head_dim] by the block's frequencies */
    struct mat qkv, q;       /* [tokens, …], overwritten */
    struct mat keys, values; /* the cache, [sequences·max_positions, kv] */
    struct mat lse; /* F32 [tokens, heads]: attention's, for a backward pass; data NULL: not wanted */
};

/* How this model's norms are meant. */
struct norm_spec block_norm(const struct gemma_config *c);

/* out [tokens, heads·head_dim]: attention, which the o projection reads; normed [tokens, hidden]: what q, k and v read */
int block_attention(const struct weights *w, int layer, const struct block_pass *pass,
                    const struct mat *normed, const struct mat *out);

/* out [tokens, intermediate]: what the down projection reads; gate_up [tokens, 2·intermediate] is overwritten, and out
 * may be its first half */
int block_mlp(const struct weights *w, int layer, const struct mat *normed, const struct mat *gate_up,
              const struct mat *out);

#endif

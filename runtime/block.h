/* One decoder block's two branches up to their last linear: what the forward pass and calibration share. */
#ifndef GEMCUT_RUNTIME_BLOCK_H
#define GEMCUT_RUNTIME_BLOCK_H

#include "runtime/weights.h"

/* Where a block's tokens stand and what it works in. Matrices are act, their rows the tokens of all sequences; where
 * layers differ in width, they are as wide as the widest needs. */
struct block_pass {
    struct sequences sequences;
    const struct mat *rope;  /* [new tokens of a sequence, head_dim] by the block's frequencies */
    struct mat qkv, q;       /* [tokens, …], overwritten */
    struct mat keys, values; /* the cache of the block's kv_source, [sequences·max_positions, kv] */
    struct mat lse; /* F32 [tokens, heads]: attention's, for a backward pass; data NULL: not wanted */
};

/* Layers' own inputs, of these tokens. */
struct block_input {
    struct mat table;       /* [·, layers·ple]: all rows of weights.per_layer's, or those of some ids */
    const int32_t *ids;     /* rows of it, on the host */
    struct mat x0;          /* act [tokens, hidden]: what the first block begins with */
    struct mat sum;         /* F32 [tokens, ple], overwritten as the gate */
    struct mat input;       /* act [tokens, ple], as the next ones: the layer's */
    struct mat gate, gated; /* of it in the block: W_gate·x, and gelu(gate) ⊙ input; they may be one */
};

/* How this model's norms are meant. */
struct norm_spec block_norm(const struct gemma_config *c);

/* Columns of a block's queries, which the o projection reads. */
int64_t block_heads(const struct block *k);

/* From the block's projections to its queries, keys and values. */
struct qkv_spec block_split(const struct weights *w, int layer, const struct sequences *sequences,
                            const struct mat *rope);

/* out [tokens, block_heads]: attention; normed [tokens, hidden]: what q, k and v read */
int block_attention(const struct weights *w, int layer, const struct block_pass *pass,
                    const struct mat *normed, const struct mat *out);

/* out [tokens, inner]: what the down projection reads; gate_up [tokens, 2·inner] is overwritten, and out
 * may be its first half */
int block_mlp(const struct weights *w, int layer, const struct mat *normed, const struct mat *gate_up,
              const struct mat *out);

/* What stands between two branches: x += branch, normed where post_norm is given (data NULL: as it is), then normed =
 * RMSNorm(x)·next (NULL: no weight). x: F32 [tokens, hidden] */
int block_join(const struct weights *w, const struct mat *branch, const struct mat *post_norm,
               const struct mat *x, const struct mat *next, const struct mat *normed);

/* A layer's own input from table, ids and x0. The outer weights are loaded. */
int block_make_input(const struct weights *w, int layer, const struct block_input *in);

/* x += what the layer's own input gives; branch and normed [tokens, hidden] are overwritten */
int block_add_input(const struct weights *w, int layer, const struct block_input *in,
                    const struct mat *branch, const struct mat *x, const struct mat *normed);

/* From the MLP's branch, overwritten, to the block's result in x, and normed = RMSNorm(x)·next for what follows. input:
 * as block_make_input leaves it; not read where the model has none. */
int block_end(const struct weights *w, int layer, const struct block_input *input, const struct mat *branch,
              const struct mat *x, const struct mat *next, const struct mat *normed);

#endif

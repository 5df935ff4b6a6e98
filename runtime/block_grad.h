/* A decoder block's forward pass with everything kept that its backward pass needs, and that backward pass: gradients
 * with respect to the weights of its linears and, where wanted, to its input. Norm weights are not differentiated, nor are
 * the layer's own input and the weights of 16 bits that it goes through, nor keys and values of another layer, nor the
 * router's weights. Which experts a token is sent to is taken as it is; how much each counts is not. */
#ifndef GEMCUT_RUNTIME_BLOCK_GRAD_H
#define GEMCUT_RUNTIME_BLOCK_GRAD_H

#include "runtime/block.h"
#include "runtime/experts.h"

/* What the forward pass keeps, [tokens, …], act where nothing is said. */
struct block_tape {
    struct sequences sequences; /* whole ones: first_position 0 */
    const struct mat *rope;     /* [tokens of a sequence, head_dim] by the block's frequencies */
    struct mat x;               /* F32: the block's input, as the caller leaves it here */
    struct mat middle, out;     /* F32: with attention's branch added; with the MLP's too */
    struct mat normed, mlp_normed;
    /* lse F32; keys and values of a layer that shares them: those of its donor, as the caller leaves them here */
    struct mat qkv, q, keys, values, lse, attention;
    struct mat o, gate_up, inner, down;
    struct block_input input; /* the layer's own, as the caller leaves it in its `input` before every pass */
    struct mat added;         /* what it gives, before its norm */
    struct experts_room experts;
    struct mat joined; /* what the MLP and the experts give; without experts, down */
    /* Of the backward pass: */
    struct mat dx;                          /* F32: of the residual stream */
    struct mat dbranch, dinner, dattention; /* of o's and down's results and inputs */
    struct mat dq, dkeys, dvalues;
    struct mat row_weights, dexpert_inner,
        dlogits; /* of experts: F32 [1, rows], act [rows, inner], [tokens, experts] */
};

/* Memory of the host, for up to so many sequences of that length; nothing where the model has no experts. t begins as
 * zeros. */
int block_tape_open(struct block_tape *t, const struct gemma_config *c, int64_t sequences, int64_t length);
void block_tape_close(struct block_tape *t);

/* Lays a layer's matrices out from base on (NULL: only counts) for so many sequences of that length; returns the
 * bytes. block_tape_bytes: the most that any layer needs. */
uint64_t block_tape_place(struct block_tape *t, const struct gemma_config *c, int layer, enum dtype act,
                          void *base, int64_t sequences, int64_t length);
uint64_t block_tape_bytes(const struct gemma_config *c, enum dtype act, int64_t sequences, int64_t length);

/* t->x to t->out. */
int block_grad_forward(const struct weights *w, int layer, struct block_tape *t);

/* Gradients by the weights of each set of linears, F32 [rows of the set, cols], data NULL: not wanted. */
struct block_grads {
    struct mat sets[N_BLOCK_SETS];
};

/* t->dx: the gradient by t->out, and afterwards, with_input, by t->x. add: grads gain, else they are set. What the
 * forward pass kept is used up. No linear is packed. */
int block_grad_backward(const struct weights *w, int layer, struct block_tape *t, bool add, bool with_input,
                        const struct block_grads *grads);

#endif

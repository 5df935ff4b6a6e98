/* A decoder block in double, for the test of its gradients: the plainest implementation, of a small model's shapes. */
#ifndef GEMCUT_TESTS_UNIT_NAIVE_BLOCK_H
#define GEMCUT_TESTS_UNIT_NAIVE_BLOCK_H

#include "runtime/block_grad.h"
#include "tests/unit/forward_support.h"

enum { SEQUENCES = 2, LENGTH = 11, TOKENS = SEQUENCES * LENGTH };
enum {
    HIDDEN = 48,
    HEADS = 4,
    KV_HEADS = 2,
    PLE = 8,
    MAX_DIM = 32,
    MAX_FFN = 144,
    EXPERTS = 16,
    TOP = 2,
    EXPERT_FFN = 40,
    MAX_KV = TOKENS * KV_HEADS * MAX_DIM
};

/* A block with its weights and what it reads in double; the loss is Σ dout⊙block(x). */
struct naive_block {
    const struct block *k;
    struct norm_spec spec;
    const struct mat *rope;
    double *sets[N_BLOCK_SETS], *x, *dout; /* the whole sets; [TOKENS, hidden] */
    double *input, *gate, *projection;     /* of the layer's own input; NULL: it has none */
    double *keys, *values;                 /* of another layer; NULL: its own */
    double *router;                        /* NULL: no experts */
    const int32_t *chosen;                 /* [TOKENS, TOP]; differences leave the choice as it is */
    double *out;
};

double naive_block_loss(const void *block);

#endif

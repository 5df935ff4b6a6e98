/* A made-up mixture of experts in double, for the tests of mixtures: the plainest implementation, from its definition in
 * docs/model-gemma.md; and its blocks step by step, by the runtime's operations but for the experts. */
#ifndef GEMCUT_TESTS_UNIT_EXPERT_SUPPORT_H
#define GEMCUT_TESTS_UNIT_EXPERT_SUPPORT_H

#include "runtime/block.h"
#include "tests/unit/forward_support.h"
#include "tests/unit/tiny_gemma.h"

extern const struct tiny_gemma *const mixture;
enum { HIDDEN = 64, INNER = TINY_EXPERT_SIZE, N_EXPERTS = TINY_EXPERTS, TOP = TINY_TOP, LAYERS = 3 };

/* Samples of which some experts get more tokens than their inputs have columns, others fewer; SKIPPED: an id that comes
 * often. */
enum { SAMPLES = 3, LENGTH = 120, TOKENS = SAMPLES * LENGTH, SKIPPED = 2 };
const int32_t *mixture_ids(void); /* [TOKENS] */

/* A block's experts; what they hold is released by free_matrices. */
struct naive_experts {
    const struct block *k;
    struct norm_spec spec;
    double *gate[N_EXPERTS], *up[N_EXPERTS], *down[N_EXPERTS], *router;
};
struct naive_experts naive_experts_of(const struct weights *w, int layer);

/* Where a token goes: softmax over all experts, the TOP largest, together 1, times each one's factor. */
struct route {
    int expert[TOP];
    double weight[TOP];
};
struct route naive_expert_route(const struct naive_experts *n, const double *x);

/* What an expert's gate and up read of x [HIDDEN], and what its down reads [INNER]. */
void naive_expert_inputs(const struct naive_experts *n, int expert, const double *x, double *in,
                         double *inner);

/* Of one token the MLP's branch, normed, and what the experts add to it. */
void naive_experts_add(const struct naive_experts *n, const double *x, const double *branch, double *out);

/* A block step by step: operations that other tests hold against others, and the experts from above. */
struct walk {
    const struct weights *w;
    struct mat x, normed, branch, qkv, q, attention, gate_up, rope[GEMMA_KINDS];
};
struct mat dense(int64_t rows, int64_t cols); /* F32, without slack */
struct walk walk_open(const struct weights *w, const int32_t *ids);
void walk_to_experts(struct walk *s, int layer); /* x and the MLP's branch as the experts find them */
void walk_to_end(struct walk *s, int layer);

#endif

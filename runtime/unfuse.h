/* Experts' weights one by one. Releases hold those of a layer in two tensors, `experts.gate_up_proj` [experts, 2·inner,
 * hidden], gate above up, and `experts.down_proj` [experts, hidden, inner]; cuts, and what some tools write, hold a tensor for
 * each linear. Here the former look like the latter. */
#ifndef GEMCUT_RUNTIME_UNFUSE_H
#define GEMCUT_RUNTIME_UNFUSE_H

#include "runtime/gemma.h"

/* A tensor that has been taken apart, and the layer that it is of. */
struct fused_tensor {
    struct tensor whole; /* as it lies in its file; the name is owned */
    int layer;
};

struct fused_tensors {
    struct fused_tensor *list;
    size_t n;
};

/* Puts parts in the place of every such tensor of the checkpoint; *out: the tensors themselves. A shape that is not the
 * config's is ERR_FORMAT. */
int unfuse_experts(struct fused_tensors *out, struct checkpoint *ck, const struct gemma_config *c,
                   const char *prefix);
void fused_tensors_free(struct fused_tensors *f);

/* Puts the tensors themselves back in the place of their parts in a list of a checkpoint's tensors, but for layers with
 * apart[layer] (NULL: none). Returns the new length. */
size_t fused_restore(const struct fused_tensors *f, struct tensor *list, size_t n, const bool *apart);

#endif

/* A model's weights on a device, ready for the forward pass. BF16 and packed linears look the same from outside. */
#ifndef GEMCUT_RUNTIME_WEIGHTS_H
#define GEMCUT_RUNTIME_WEIGHTS_H

#include "base/parallel.h"
#include "kernels/backend.h"
#include "runtime/model.h"

/* A linear: out = x·Wᵀ. */
struct linear {
    bool quantized;
    struct mat weight; /* [rows, cols], when not quantized */
    struct qmat packed;
};

/* Linears that read the same input; their outputs stand side by side. Where all of them lie in the same form, they lie
 * one after another and are one product. */
struct linear_set {
    int n;
    struct linear parts[3];
    bool fused;
    struct linear whole; /* when fused */
};

/* One of a mixture of experts: an MLP. */
struct expert {
    struct linear_set gate_up, down;
};

/* One decoder block: what it computes with, and how. Settings are per layer, because families differ in them from
 * layer to layer. Matrices with data NULL: this block has none. */
struct block {
    int n_heads, n_kv_heads, head_dim;
    int64_t inner;  /* of the MLP */
    int64_t window; /* keys a query sees; 0 = all */
    float score_scale, softcap;
    int rope;           /* which of weights.inv_freq it turns by */
    int kv_source;      /* the layer whose keys and values it reads: itself, or one before it */
    bool k_is_v;        /* values are what the k projection gives; qkv is q and k */
    bool values_normed; /* without a weight */
    float scalar;       /* of the block's result */
    struct linear_set qkv, o, gate_up, down;
    struct mat input_norm, q_norm, k_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm; /* [1, n] */
    struct mat ple_gate, ple_projection,
        ple_norm; /* of the layer's own input: [ple, hidden], [hidden, ple], [1, hidden] */
    /* Experts beside the MLP; each token takes top_k of them. */
    int n_experts, top_k;
    int64_t expert_inner;
    struct expert *experts; /* [n_experts] */
    struct mat router, router_scale,
        expert_scales; /* [experts, hidden], [1, hidden] of its inputs, [1, experts] of the experts' results */
    struct mat pre_experts_norm, post_experts_norm,
        post_dense_norm; /* [1, hidden]; the last: of the MLP beside them */
};

/* Where layers have inputs of their own; of layer i are columns [i·ple, …) of the table and such rows of the projection.
 */
struct per_layer_weights {
    struct mat table;      /* [vocab, layers·ple] */
    struct mat projection; /* [layers·ple, hidden] */
    struct mat norm;       /* [1, ple] */
};

struct weights {
    const struct model *model;
    const struct backend *backend;
    struct gemma_config config; /* its layers are the model's own */
    struct mat embedding;       /* [vocab, hidden]; the output head too */
    struct mat final_norm;
    struct per_layer_weights per_layer; /* data NULL: none */
    struct block *blocks;               /* [n_layers] */
    struct expert *experts;             /* [n_layers·n_experts], the blocks' */
    float *inv_freq[GEMMA_KINDS];       /* [rope_dim / 2] of global and of sliding layers, on the host */
    struct weight_buf *bufs;            /* what was acquired */
    size_t n_bufs, capacity;
    uint64_t bytes; /* of all of them */
    struct loader *loader;
};

/* Loads a bound model (model_bind without problems) with as many threads as the machine has processors. The model must
 * stay open as long as the weights. */
int weights_load(struct weights *out, const struct model *m, const struct backend *b);
void weights_free(struct weights *w);

/* The same in parts, for models that are worked on a block at a time: nothing is on the device after weights_open, and
 * only what has been loaded may be used. */
enum {
    WEIGHTS_TABLE = -2, /* of the layers' own inputs: large, and few of its rows may do */
    WEIGHTS_OUTER = -1, /* embedding, last norm, what else the layers' own inputs need; blocks count from 0 */
};
int weights_open(struct weights *out, const struct model *m, const struct backend *b);
int weights_load_part(struct weights *w, int part);
void weights_unload_part(struct weights *w, int part);

/* Which part a tensor belongs to. */
static inline int weights_part(const struct model *m, const struct gemma_tensor *t)
{
    return t == model_table(m) ? WEIGHTS_TABLE : t->layer;
}

/* Bytes that weights_load takes from the device, and weights_load_part. */
uint64_t weights_bytes(const struct model *m);
uint64_t weights_part_bytes(const struct model *m, int part);

/* What the threads that load them take of the device beside, until weights_load returns or, in parts, weights_free. */
uint64_t weights_loader_bytes(const struct backend *b);

/* out [n, Σ rows] = x [n, cols]·Wᵀ, part by part from left to right */
int linear_set_forward(const struct backend *b, const struct linear_set *s, const struct mat *x,
                       const struct mat *out);

#endif

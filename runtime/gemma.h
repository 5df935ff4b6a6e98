/* What gemcut knows of Gemma models, as data: the families and their defaults, the settings of one model, and
 * the list of tensors that its language part consists of. Everything else works on these lists. */
#ifndef GEMCUT_RUNTIME_GEMMA_H
#define GEMCUT_RUNTIME_GEMMA_H

#include "formats/checkpoint.h"
#include "formats/hf_config.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { GEMMA_MAX_IGNORES = 8, GEMMA_MAX_PREFIXES = 3 };

/* How positions turn heads. Layers are of two kinds, which differ in it: [GEMMA_GLOBAL] and [GEMMA_SLIDING]. */
enum gemma_kind { GEMMA_GLOBAL, GEMMA_SLIDING, GEMMA_KINDS };
struct gemma_rope {
    double theta;
    double factor;  /* positions are divided by it */
    double rotated; /* share of the pairs that turn, the first ones */
};

/* One row a family: how config.json names it, what holds when config.json is silent, and what its blocks consist of. */
struct gemma_family {
    const char *title;                        /* "Gemma 3" */
    const char *model_type;                   /* of config.json */
    const char *text_model_type;              /* of its text_config; NULL when the model is text only */
    const char *prefixes[GEMMA_MAX_PREFIXES]; /* of the language tensors on disk, NULL-padded */
    const char *ignores[GEMMA_MAX_IGNORES];   /* regexes that keep other parts unquantized in every reader */
    int64_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim;
    int64_t sliding_window, sliding_pattern; /* every sliding_pattern-th layer is global */
    int64_t max_positions;
    int64_t ple_size;             /* columns of a layer's own input */
    double query_pre_attn_scalar; /* scores are divided by its root; 0: not a setting, head_dim is it */
    struct gemma_rope rope[GEMMA_KINDS];
    double attention_softcap, final_softcap;             /* 0 = none */
    bool pattern_is_set;                                 /* config.json may have another sliding_pattern */
    bool one_rope;                                       /* config.json has one for both kinds of layers */
    bool attention_softcap_is_set, final_softcap_is_set; /* by config.json; where not, one there is refused */
    bool plain_norms;                                    /* norms multiply by w, not by 1 + w */
    bool two_norms; /* a block has two norms: branches are added to the residual stream as they are */
    bool no_qk_norm;
    /* Gemma 4: scores are not divided, values are normed, layers differ in shape, may share keys and values, have
     * inputs of their own, experts and a scalar */
    bool varied;
};

/* What may differ from layer to layer. */
struct gemma_layer {
    bool sliding;
    bool k_is_v; /* there is no v_proj: values are what k_proj gives */
    int64_t n_kv_heads, head_dim, intermediate_size;
    int64_t kv_source; /* the layer whose keys and values it reads: itself, or one before it */
};

/* The settings of one model's language part. Sizes that may differ by layer are those of config.json's first level here;
 * what a layer has is in its row. */
struct gemma_config {
    const struct gemma_family *family;
    int64_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim;
    int64_t sliding_window, max_positions;
    int64_t ple_size; /* columns of a layer's own input (hidden_size_per_layer_input); 0 = none */
    int64_t n_experts, top_k,
        expert_size; /* experts of a block, beside its MLP, of which each token takes top_k, and what
                                              an expert's is wide; n_experts 0 = none */
    double rms_norm_eps;
    double query_pre_attn_scalar;            /* scores are divided by its root */
    double attention_softcap, final_softcap; /* 0 = none */
    struct gemma_rope rope[GEMMA_KINDS];
    int64_t rope_dim[GEMMA_KINDS]; /* head_dim of the layers of a kind */
    struct gemma_layer *layers;    /* [n_layers] */
};

/* The largest that any layer needs, for buffers that all of them use. */
struct gemma_widths {
    int64_t q, kv, qkv; /* columns of the queries, of keys or values, of what is projected to all three */
    int64_t inner;      /* of the MLP */
};
struct gemma_widths gemma_widest(const struct gemma_config *c);

/* Finds the family and reads the settings. ERR_UNSUPPORTED names the architecture and lists what is known, or
 * names the setting that changes the mathematics in a way gemcut does not implement. */
int gemma_config_read(struct gemma_config *out, const struct hf_config *cfg);
void gemma_config_free(struct gemma_config *cfg);

enum gemma_role {
    GEMMA_EMBEDDING,
    GEMMA_NORM,
    GEMMA_PER_LAYER, /* a matrix of the layers' own inputs: never quantized */
    GEMMA_SCALAR,
    GEMMA_ROUTER,       /* never quantized: a token that goes to another expert is computed anew */
    GEMMA_ROUTER_SCALE, /* a vector of the router, named without ".weight" */
    GEMMA_Q,
    GEMMA_K,
    GEMMA_V,
    GEMMA_O,
    GEMMA_GATE,
    GEMMA_UP,
    GEMMA_DOWN,
};

/* Linears that a reader fuses into one kernel must be quantized alike. */
enum gemma_fused { FUSED_QKV, FUSED_O, FUSED_GATE_UP, FUSED_DOWN, N_FUSED };

/* A block's sets of linears where experts are taken together: those of enum gemma_fused; then, each one below the other, the
 * gates and ups of all experts, and their downs. */
enum { SET_EXPERTS_GATE_UP = N_FUSED, SET_EXPERTS_DOWN, N_BLOCK_SETS };

/* One tensor of the language part. */
struct gemma_tensor {
    char *name; /* on disk, with prefix and ".weight" (but for scalars and the router's vectors) */
    enum gemma_role role;
    int layer;  /* -1 outside the blocks */
    int expert; /* whose linear it is; -1 outside the experts */
    int n_dims;
    int64_t shape[2]; /* linears: rows = out_features, cols = in_features */
};

struct gemma_tensors {
    struct gemma_tensor *list;
    size_t n;
};

/* Every tensor that the language part of this model must have, in model order, under the given prefix. */
int gemma_tensors(struct gemma_tensors *out, const struct gemma_config *cfg, const char *prefix);
void gemma_tensors_free(struct gemma_tensors *t);

/* What a layer's tensor is called behind "layers.N.", and the layer; NULL: it is not of a layer of this model. */
const char *gemma_name_in_layer(const struct gemma_config *cfg, const char *prefix, const char *name,
                                int *layer);

/* Whether a tensor on disk is one that no computation reads: keys' and values' projections of layers that share those of
 * another. Released checkpoints hold them; cuts leave them out. */
bool gemma_is_dead(const struct gemma_config *cfg, const char *prefix, const char *name);

/* The name prefix that this checkpoint uses ("model.", "language_model.model.", …), found by its embedding. */
int gemma_prefix(const char **prefix, const struct gemma_config *cfg, const struct checkpoint *ck);

bool gemma_is_linear(enum gemma_role role); /* a weight of a decoder block that can be quantized */
enum gemma_fused gemma_fused_set(enum gemma_role role);

/* A linear's name without ".weight", in fresh memory. */
char *gemma_module(const struct gemma_tensor *t);

#endif

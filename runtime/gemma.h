/* What gemcut knows of Gemma models, as data: the families and their defaults, the settings of one model, and
 * the list of tensors that its language part consists of. Everything else works on these lists. */
#ifndef GEMCUT_RUNTIME_GEMMA_H
#define GEMCUT_RUNTIME_GEMMA_H

#include "formats/checkpoint.h"
#include "formats/hf_config.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { GEMMA_MAX_IGNORES = 4, GEMMA_MAX_PREFIXES = 3 };

/* One row a family: how config.json names it and what holds when config.json is silent. */
struct gemma_family {
    const char *title;                        /* "Gemma 3" */
    const char *model_type;                   /* of config.json */
    const char *text_model_type;              /* of its text_config; NULL when the model is text only */
    const char *prefixes[GEMMA_MAX_PREFIXES]; /* of the language tensors on disk, NULL-padded */
    const char *ignores[GEMMA_MAX_IGNORES];   /* regexes that keep other parts unquantized in every reader */
    int64_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim;
    int64_t sliding_window, sliding_pattern; /* every sliding_pattern-th layer is global */
    int64_t max_positions;
    double query_pre_attn_scalar, rope_theta, rope_local_theta;
};

/* The settings of one model's language part. */
struct gemma_config {
    const struct gemma_family *family;
    int64_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim;
    int64_t sliding_window, max_positions;
    double rms_norm_eps, query_pre_attn_scalar;
    double rope_theta, rope_local_theta; /* global and sliding layers */
    double rope_factor;                  /* linear scaling of global layers' positions; 1 = none */
    bool *is_sliding;                    /* [n_layers] */
};

/* Finds the family and reads the settings. ERR_UNSUPPORTED names the architecture and lists what is known, or
 * names the setting that changes the mathematics in a way gemcut does not implement. */
int gemma_config_read(struct gemma_config *out, const struct hf_config *cfg);
void gemma_config_free(struct gemma_config *cfg);

enum gemma_role {
    GEMMA_EMBEDDING,
    GEMMA_NORM,
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

/* One tensor of the language part. */
struct gemma_tensor {
    char *name; /* on disk, with prefix and ".weight" */
    enum gemma_role role;
    int layer; /* -1 outside the blocks */
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

/* The name prefix that this checkpoint uses ("model.", "language_model.model.", …), found by its embedding. */
int gemma_prefix(const char **prefix, const struct gemma_config *cfg, const struct checkpoint *ck);

bool gemma_is_linear(enum gemma_role role); /* a weight of a decoder block that can be quantized */
enum gemma_fused gemma_fused_set(enum gemma_role role);

/* A linear's name without ".weight", in fresh memory. */
char *gemma_module(const struct gemma_tensor *t);

#endif

/* A made-up Gemma on disk: config.json, random weights of any float type, a few files beside. Written with
 * formats/writer; sizes are small but large enough that tensors are cut into several tasks. */
#ifndef GEMCUT_TESTS_UNIT_TINY_GEMMA_H
#define GEMCUT_TESTS_UNIT_TINY_GEMMA_H

#include "runtime/gemma.h"

#include <stdint.h>

struct tiny_gemma {
    const char *model_type; /* of config.json; NULL: Gemma 3's */
    const char *
        more; /* members of config.json beside those that follow from the next ones: "\"key\": value,"; or NULL */
    int64_t hidden, ffn, vocab;
    int layers, heads, kv_heads, head_dim;
    enum dtype dtype;
    int window;           /* keys that a sliding layer sees; 0: the family's own */
    int pattern;          /* every pattern-th layer is global; 0: the family's own */
    uint64_t shard_bytes; /* 0: one file */
    bool
        dead; /* with the projections and norms that layers which share keys and values do not read, as releases have */
    bool
        apart; /* a mixture's experts have a tensor for each linear; else two for all of a layer's, as in releases */
    /* one weight that is replaced: tensor NULL = none */
    const char *bad_tensor;
    int64_t bad_index;
    float bad_value;
};

/* Two layers, three tasks for each linear of the MLP, widths that 32 … 256 divide. */
extern const struct tiny_gemma tiny_gemma_plain;

/* One of every other family, as small as that: Gemma 1; 2; 4 whose last three layers share keys and values and whose
 * layers have inputs of their own; 4 whose global layers' values are their keys; the same with a mixture of experts. */
enum {
    TINY_GEMMA1,
    TINY_GEMMA2,
    TINY_GEMMA4_SHARING,
    TINY_GEMMA4_K_IS_V,
    TINY_GEMMA4_EXPERTS,
    TINY_FAMILIES
};
extern const struct tiny_gemma tiny_families[TINY_FAMILIES];
extern const char *const tiny_family_names[TINY_FAMILIES];

/* Of the mixture. */
enum { TINY_EXPERTS = 8, TINY_TOP = 2, TINY_EXPERT_SIZE = 96 };

/* Writes the model into a new folder. */
void tiny_gemma_write(const struct tiny_gemma *g, const char *folder);

/* Its settings and tensor list alone, as gemma_config_read and gemma_tensors see them. */
void tiny_gemma_tensors(const struct tiny_gemma *g, struct gemma_config *cfg, struct gemma_tensors *tensors);

#endif

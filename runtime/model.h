/* A model folder opened and bound: its settings, and for every tensor that the family demands the place where the
 * checkpoint has it. BF16 models and cuts of every layout are the same to everything that comes after; packed.h reads
 * what a quantized linear holds. */
#ifndef GEMCUT_RUNTIME_MODEL_H
#define GEMCUT_RUNTIME_MODEL_H

#include "formats/quant_config.h"
#include "kernels/backend.h"
#include "runtime/gemma.h"
#include "runtime/unfuse.h"

/* One linear of a decoder block, as it lies in the checkpoint. */
struct model_linear {
    const struct gemma_tensor *spec;
    bool quantized;
    struct quant_scheme scheme;                           /* when quantized */
    const struct tensor *weight;                          /* when not quantized */
    const struct tensor *packed, *scales, *zeros, *shape; /* when quantized; zeros: asymmetric only */
    const struct tensor *middle,
        *g_idx; /* zero points of a symmetric linear, the columns' groups: where stored */
    bool
        direct; /* when quantized: the kernels take it as it is, for its scales are BF16 values; else its weight is
                    dequantized when it is loaded */
};

struct model {
    char *folder;
    struct hf_config config;
    struct gemma_config gemma;
    struct checkpoint checkpoint; /* experts one by one */
    struct fused_tensors fused;   /* as they lie together */
    const char *prefix;
    struct gemma_tensors tensors;
    bool quantized;
    struct quant_config quant; /* when quantized */
    struct model_linear *linears;
    size_t n_linears;
};

/* Opens MODEL (a folder or a cached "org/name"): config, checkpoint, quantization_config, the expected tensors. */
int model_open(struct model *out, const char *name);

/* The same for a model that is to be quantized: one that already is, is refused by name. */
int model_open_unquantized(struct model *out, const char *name);
void model_close(struct model *m);

/* What model_bind finds wrong: the object and one line about it. A negative return ends the binding. */
typedef int (*model_problem)(void *ctx, const char *object, const char *message);

/* Finds every expected tensor and fills m->linears. Each deviation in presence, dtype, shape, or between the
 * description in config.json and the tensors goes to on_problem; with on_problem = NULL the first one is the
 * error that is returned. */
int model_bind(struct model *m, model_problem on_problem, void *ctx);

/* Whether a quantized linear has all that it needs, after model_bind with problems. */
bool model_is_bound(const struct model_linear *l);

/* The table of the layers' own inputs, [vocab, layers·ple]; NULL where they have none. */
const struct gemma_tensor *model_table(const struct model *m);

/* A view of the checkpoint without the tensors that nothing reads (gemma_is_dead), and with experts one by one in layers with
 * apart[layer] alone: what a cut is made from. Its list is the caller's to free; the rest is the model's. */
int model_live_tensors(const struct model *m, const bool *apart, struct checkpoint *out);

/* Quantized linears that are not direct. */
size_t model_n_dequantized(const struct model *m);

#endif

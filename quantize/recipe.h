/* What the user asked for, and what that means for each linear of a model. Decisions are made for a whole fused
 * set (q/k/v, gate/up of one layer): readers run such a set as one matrix and refuse mixed parts. */
#ifndef GEMCUT_QUANTIZE_RECIPE_H
#define GEMCUT_QUANTIZE_RECIPE_H

#include "base/text.h"
#include "formats/quant_config.h"
#include "kernels/backend.h"
#include "quantize/calib_data.h"
#include "quantize/gptq.h"
#include "quantize/tuning.h"
#include "runtime/gemma.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Where groups do not divide a width. AUTO: experts get smaller groups, and so do linears whose width is a multiple of 128;
 * others stay in 16 bits, because that is what vLLM's kernels for dense linears want (Marlin until June 2026). */
enum ragged_rule { RAGGED_SMALLER, RAGGED_KEEP, RAGGED_ERROR, RAGGED_AUTO };

/* "GLOB=scheme,group" */
struct recipe_override {
    char *glob;
    struct quant_scheme scheme;
};

struct recipe {
    const char *method; /* "rtn", "gptq", "autoround" */
    enum quant_format format;
    struct quant_scheme scheme;
    struct scale_spec scales;
    bool calibrated;         /* the method looks at activations; the following count then */
    struct calib_spec calib; /* what it looks at */
    bool natural_order;
    double damping;
    int passes;
    bool sweep;               /* GPTQ's codes, as the result or as a tuning's start; else the nearest */
    struct tune_options tune; /* iterations = 0 where nothing is tuned */
    enum ragged_rule ragged;
    const char *const *ignore; /* globs on tensor names or on names without ".weight" */
    size_t n_ignore;
    const char *const *only;
    size_t n_only;
    struct recipe_override *overrides; /* later ones win */
    size_t n_overrides;
    bool allow_nonfinite;
};

/* "w4a16", "w4a16-asym", "w8a16" → bits and symmetry; the name of a scheme. */
int recipe_parse_scheme(const char *name, struct quant_scheme *out);
const char *recipe_scheme_name(struct quant_scheme s);

/* "32", "64", "128", "256" or "channel" (0). */
int recipe_parse_group(const char *text, int64_t *group);

/* "range", "absmax", "mse", "weighted", "block" */
int recipe_parse_scales(const char *name, enum scale_rule *out);
const char *recipe_scales_name(enum scale_rule rule);

/* The recipe as GPTQ takes it. */
struct gptq_options recipe_gptq(const struct recipe *recipe);

/* "GLOB=scheme,group"; either part after '=' may be missing, base fills it in. */
int recipe_parse_override(const char *text, struct quant_scheme base, struct recipe_override *out);

/* What happens to one linear. */
struct linear_plan {
    const struct gemma_tensor *tensor;
    bool quantized;
    struct quant_scheme scheme; /* when quantized */
    const char *why; /* when the recipe's own scheme does not apply: "ignored", "override", "ragged", … */
};

struct recipe_plan {
    struct linear_plan *linears; /* in the order of the model's tensor list */
    size_t n;
};

/* Resolves the recipe for every linear. A pattern that matches nothing, and a plan that quantizes nothing, are
 * usage errors. Widths that the group does not divide follow recipe->ragged and are reported as warnings. */
int recipe_resolve(struct recipe_plan *out, const struct recipe *recipe, const struct gemma_tensors *tensors);
void recipe_plan_free(struct recipe_plan *plan);

/* The quantization_config that describes the plan in a format. act_order: how the codes were found. */
int recipe_quant_config(struct quant_config *out, const struct recipe_plan *plan, enum quant_format format,
                        bool act_order, const struct gemma_config *cfg);
bool recipe_act_order(const struct recipe *recipe);

/* The recipe as the JSON object that gemcut.json keeps. */
void recipe_write(const struct recipe *recipe, struct text *out);

#endif

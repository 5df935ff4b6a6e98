/* What the two halves of calibration share: calibrate_plan.c plans, calibrate.c runs. Nobody else includes this. */
#ifndef GEMCUT_QUANTIZE_CALIBRATE_IMPL_H
#define GEMCUT_QUANTIZE_CALIBRATE_IMPL_H

#include "quantize/autoround.h"
#include "quantize/calibrate.h"
#include "quantize/outbox.h"

/* A set's results, on their way out. */
struct result {
    struct set set;
    struct gptq_stats stats[GPTQ_MAX_PARTS];
    struct tune_stats tuned;
    int64_t n_nonfinite[GPTQ_MAX_PARTS];
};

/* Whether codes are found under Hessians. */
static inline bool calibrate_solves(const struct tune_options *tune)
{
    return tune->iterations == 0 || tune->init == TUNE_FROM_CODES;
}

/* The sizes of all sets that are quantized; returns their number. */
size_t calibrate_sizes(const struct recipe_plan *plan, int64_t n_layers, struct gptq_size *out);

#endif

/* Methods that look at activations: block by block and within a block set by set (q/k/v, o, gate/up, down), the
 * calibration's tokens run to the inputs of the set, its weights are quantized under their Hessian, and take the place
 * of the originals before the tokens go on. A tuning follows on each block, with what GPTQ found or without it. */
#ifndef GEMCUT_QUANTIZE_CALIBRATE_H
#define GEMCUT_QUANTIZE_CALIBRATE_H

#include "calib/dataset.h"
#include "quantize/capture.h"
#include "quantize/gptq.h"
#include "quantize/recipe.h"
#include "quantize/tuning.h"

struct calibrate_options {
    struct gptq_options gptq; /* of the codes that a tuning begins with, or that are the result */
    struct tune_options tune; /* iterations = 0: none */
    int32_t skip_id;          /* a token whose activations are left out of the Hessians, or −1 */
    uint64_t reserved;        /* bytes of the device that others take meanwhile */
    bool allow_nonfinite;     /* such weights are taken as 0; otherwise they are refused */
};

/* A quantized linear on its way out. The memory is only lent. */
struct calibrated_linear {
    const struct linear_plan *plan;
    struct qmat q; /* on the host; zeros.data NULL when symmetric */
    struct gptq_stats stats;
    struct tune_stats tuned; /* of its block; zeros without a tuning */
    int64_t n_nonfinite;     /* weights that were taken as 0 */
};

/* A block that has been tuned. */
struct calibrated_block {
    int layer;
    struct tune_stats stats;
    const double *losses; /* [n], of every iteration's mini-batch */
    int64_t n;
    double seconds; /* of the whole block */
};

struct calibrate_events {
    /* A linear's result; called from another thread, but never beside `known`. */
    int (*on_linear)(void *ctx, const struct calibrated_linear *linear);
    /* Of the first blocks the result may be known: fills q (host memory of the right shape) and returns 1, else 0. NULL:
     * it never is. */
    int (*known)(void *ctx, const struct linear_plan *plan, const struct qmat *q);
    void (*on_block)(void *ctx, const struct calibrated_block *block); /* or NULL */
    void *ctx;
};

struct calibrate_plan {
    struct capture_plan capture;
    int experts_at_once;               /* whose Hessians are held together; 0 without any */
    int64_t micro_batch;               /* samples that a tuning works on at a time; 0 without one */
    uint64_t device_bytes, host_bytes; /* the most that a run holds */
};

/* What a run will hold, and how. ERR_MEMORY where the device has not enough in any way. */
int calibrate_plan(struct calibrate_plan *out, const struct model *m, const struct recipe_plan *plan,
                   const struct backend *b, const struct dataset *data, const struct tune_options *tune,
                   uint64_t reserved);

/* Seconds that a run will take, from the rate of one product on this device; a rough guide. */
int calibrate_estimate(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                       const struct dataset *data, const struct tune_options *tune, int passes,
                       double *seconds);

/* seconds: [N_WORK] of quantize/work.h, or NULL */
int calibrate_run(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                  const struct dataset *data, const struct calibrate_options *options,
                  const struct calibrate_events *events, double *seconds);

#endif

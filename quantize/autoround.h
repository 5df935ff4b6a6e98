/* AutoRound (Cheng et al. 2023, arXiv 2309.05516): a block's roundings and scales are tuned together, by the signs of
 * the gradients of the block's mean squared output error against what the 16-bit block gives on its own stream.
 *
 * Of a weight w with scale s, the code is the nearest to w/s + v. In the original v begins at 0, and a group's scale
 * spans its range from low·min to high·max. Here both begin where GPTQ ended: s = start·high, and v is just beyond the
 * boundary where GPTQ's code is not the nearest. That start is worth more than three times the iterations.
 *
 * All experts of a block are tuned with the rest of it, each by the tokens that come to it in a mini-batch; one without any
 * stays as it is. */
#ifndef GEMCUT_QUANTIZE_AUTOROUND_H
#define GEMCUT_QUANTIZE_AUTOROUND_H

#include "quantize/capture.h"
#include "quantize/sets.h"
#include "quantize/tuning.h"

struct tuner;

/* Samples that are worked on at a time: an iteration's, or the largest part of them that fits. */
int64_t tuner_micro_batch(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                          const struct dataset *data, const struct tune_options *o, uint64_t available);
uint64_t tuner_bytes(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                     const struct dataset *data, const struct tune_options *o, int64_t micro_batch);

int tuner_open(struct tuner **out, const struct model *m, const struct recipe_plan *plan, struct weights *w,
               const struct dataset *data, const struct tune_options *o, int64_t micro_batch,
               struct work_clock *clock);
void tuner_close(struct tuner *t);

/* Takes over the weights of a block that is loaded, before they are quantized; tuner_restore puts them back. */
int tuner_begin(struct tuner *t, int layer);
int tuner_restore(struct tuner *t);

/* Where the start of rows [row, row + n) of a set, an expert's too, is to be put (TUNE_FROM_CODES), and where the result is
 * afterwards: codes I8, q − zero; scales and zero points. */
struct tuned_weight {
    struct mat codes;
    struct qmat q; /* packed is not used */
};
struct tuned_weight tuner_weight(const struct tuner *t, const struct set *set, int64_t row, int64_t n);

/* Tunes the block. losses [iterations], host: of every iteration's mini-batch, or NULL. The block's weights are some
 * iterate's afterwards. */
int tuner_run(struct tuner *t, const struct capture *c, struct tune_stats *stats, double *losses);

/* Of the result, for each part of a piece of a set: Σ (w − ŵ)² / Σ w², and the share of weights beyond their group's
 * codes. */
int tuner_measure(struct tuner *t, const struct set *set, const struct piece *piece, double *weight_errors,
                  double *clipped);

#endif

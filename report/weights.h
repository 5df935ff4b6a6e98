/* How far the weights of a cut are from the source's, linear by linear: no data needed, only both checkpoints. */
#ifndef GEMCUT_REPORT_WEIGHTS_H
#define GEMCUT_REPORT_WEIGHTS_H

#include "base/parallel.h"
#include "runtime/model.h"

struct weight_report {
    const struct model_linear *linear; /* of the cut */
    double error;                      /* ‖W − Ŵ‖ / ‖W‖ (Frobenius); 0 for an all-zero weight */
    double worst_group;                /* the greatest such ratio of a single group */
    int64_t bad_scales;                /* NaN, infinite, zero or subnormal */
    int64_t first_bad;                 /* row · groups + group of the first of them; −1 */
};

/* Fills out[i] for cut->linears[i] when it is quantized and bound; others are skipped (linear = NULL). With
 * source = NULL only the scales are looked at. source's linears have the same shapes. */
int weights_compare(const struct model *cut, const struct model *source, struct parallel *pool,
                    const char *device, struct weight_report *out);

#endif

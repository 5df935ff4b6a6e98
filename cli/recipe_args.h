/* From options that several commands have to a recipe: which method, and which scales come with it. */
#ifndef GEMCUT_CLI_RECIPE_ARGS_H
#define GEMCUT_CLI_RECIPE_ARGS_H

#include "quantize/recipe.h"

/* What was asked for. */
struct recipe_args {
    const char *method; /* "rtn", "gptq" */
    const char *scales; /* "auto", or as recipe_parse_scales knows them */
    bool natural_order;
    double damping;
    int64_t passes;          /* of refinement */
    struct calib_spec calib; /* text NULL: none was named */
};

/* Fills in the method, the rule of the scales and, where the method looks at activations, what belongs to that.
 * Calibration costs time: GPTQ needs it, rounding to nearest only where it is asked for. */
int recipe_args_apply(const struct recipe_args *a, struct recipe *r);

#endif

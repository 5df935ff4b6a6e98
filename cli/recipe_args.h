/* From options that several commands have to a recipe: which method, and which scales come with it. */
#ifndef GEMCUT_CLI_RECIPE_ARGS_H
#define GEMCUT_CLI_RECIPE_ARGS_H

#include "cli/opt.h"
#include "quantize/recipe.h"

/* AutoRound's options. −1, and 0 of the rates and the batch: not given. Begin with TUNE_ARGS_NONE. */
struct tune_args {
    int64_t iterations, batch;
    double lr, range_lr;
    int init;
    bool compat;
};
#define TUNE_ARGS_NONE                                                                                       \
    {                                                                                                        \
        .iterations = -1, .init = -1                                                                         \
    }

extern const char *const tune_inits[]; /* NULL-terminated */

#define TUNE_OPTS(s, member)                                                                                 \
    {.name = "iters",                                                                                        \
     OPT_TO_INT(s, member.iterations),                                                                       \
     .value = "N",                                                                                           \
     .min = 1,                                                                                               \
     .max = 100000,                                                                                          \
     .initial_note = "200; 50 with --quality better",                                                        \
     .help = "steps on each block"},                                                                         \
        {.name = "batch",                                                                                    \
         OPT_TO_INT(s, member.batch),                                                                        \
         .value = "N",                                                                                       \
         .min = 1,                                                                                           \
         .max = TUNE_MAX_BATCH,                                                                              \
         .initial_note = "8",                                                                                \
         .help = "samples of a step; --memory decides how many of them run at a time"},                      \
        {.name = "lr",                                                                                       \
         OPT_TO_DOUBLE(s, member.lr),                                                                        \
         .value = "X",                                                                                       \
         .low = 1e-7,                                                                                        \
         .high = 10,                                                                                         \
         .initial_note = "0.5/iters from codes, 0.01 at most; 1/iters from none",                            \
         .help = "of the roundings, in steps of the codes; falls to 0"},                                     \
        {.name = "scale-lr",                                                                                 \
         OPT_TO_DOUBLE(s, member.range_lr),                                                                  \
         .value = "X",                                                                                       \
         .low = 1e-7,                                                                                        \
         .high = 10,                                                                                         \
         .initial_note = "0.1/iters from codes, 0.002 at most; 1/iters from none",                           \
         .help = "of the factors of the scales"},                                                            \
        {.name = "init",                                                                                     \
         OPT_TO_CHOICE(s, member.init),                                                                      \
         .choices = tune_inits,                                                                              \
         .initial_note = "gptq",                                                                             \
         .help =                                                                                             \
             "where it begins: GPTQ's codes and scales; the nearest codes under searched scales (rtn); or "  \
             "the range of each group (none)"},                                                              \
    {                                                                                                        \
        .name = "compat", OPT_TO_FLAG(s, member.compat),                                                     \
        .help = "as Intel's auto-round: from none, and of the iterates the one whose own samples had the "   \
                "least error is kept; to compare"                                                            \
    }

/* What was asked for. */
struct recipe_args {
    const char *method; /* "rtn", "gptq", "autoround" */
    const char *scales; /* "auto", or as recipe_parse_scales knows them */
    bool natural_order;
    double damping;
    int64_t passes;          /* of refinement; −1: not given */
    struct calib_spec calib; /* text NULL: none was named */
    struct tune_args tune;
    int64_t iterations; /* of a tuning, where none are asked for */
};

/* Fills in the method, the rule of the scales and, where the method looks at activations, what belongs to that.
 * Calibration costs time: GPTQ and AutoRound need it, rounding to nearest only where it is asked for. An option that
 * the method has no use for is ERR_USAGE. */
int recipe_args_apply(const struct recipe_args *a, struct recipe *r);

#endif

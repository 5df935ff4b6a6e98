/* What a tuning is asked for, and what came of it. */
#ifndef GEMCUT_QUANTIZE_TUNING_H
#define GEMCUT_QUANTIZE_TUNING_H

#include <stdbool.h>
#include <stdint.h>

/* Where a block's rounding begins. */
enum tune_init {
    TUNE_FROM_NONE,  /* the range of each group, nearest codes */
    TUNE_FROM_CODES, /* codes and scales that another method has found */
};

/* Which iterate is the result. */
enum tune_keep {
    TUNE_KEEP_LAST, /* the last one, unless the first was better on the same samples */
    TUNE_KEEP_BEST, /* the one whose own mini-batch had the least loss, as the original has it */
};

struct tune_options {
    int64_t iterations; /* 0: nothing is tuned */
    int64_t batch;      /* samples of an iteration */
    double lr;          /* of v, in steps of the codes; falls to 0 */
    double range_lr;    /* of the factors */
    enum tune_init init;
    enum tune_keep keep;
    bool
        ends_clip; /* weights at the lowest and the highest code get no gradient, as auto-round on PyTorch ≥ 2.14 */
    uint64_t seed;
};

/* What became of a block: mean squared errors of its output. */
struct tune_stats {
    double first,
        last; /* of the first iterate, and of the one that was kept, on the same samples (TUNE_KEEP_BEST: on
                           the mini-batch of each) */
    int64_t kept; /* how many iterations led to it */
};

enum { TUNE_MAX_BATCH = 1024 };

#endif

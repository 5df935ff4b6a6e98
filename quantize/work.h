/* Where the time of a calibrated run goes. It is counted only when asked for, because the device is waited for at every
 * change from one kind of work to another. */
#ifndef GEMCUT_QUANTIZE_WORK_H
#define GEMCUT_QUANTIZE_WORK_H

#include "kernels/backend.h"

enum work {
    WORK_LOAD,    /* memory, weights from disk, embeddings */
    WORK_FORWARD, /* the pass */
    WORK_HESSIAN, /* its products, and what they are weighed by */
    WORK_FACTOR,  /* order, damping, Cholesky */
    WORK_SEARCH,  /* scales */
    WORK_MEASURE, /* output errors, W·H */
    WORK_SWEEP,
    WORK_REFIT,
    WORK_DESCEND,
    WORK_EXPERTS, /* all of that for experts, side by side */
    WORK_TUNE,    /* AutoRound's iterations */
    WORK_DELIVER, /* codes packed, taken to the host, waiting for those who write them */
    N_WORK
};

extern const char *const work_names[N_WORK];

struct work_clock {
    double *seconds; /* [N_WORK]; NULL: nothing is counted, nothing waited for */
    double mark;
};

void work_begin(struct work_clock *c, double *seconds);

/* Everything since the last call was that kind of work. */
int work_spent(struct work_clock *c, const struct backend *b, enum work kind);

#endif

/* What the parts of calibration share: calibrate_plan.c plans, calibrate.c runs, calibrate_experts.c does so with mixtures of
 * experts. Nobody else includes this. */
#ifndef GEMCUT_QUANTIZE_CALIBRATE_IMPL_H
#define GEMCUT_QUANTIZE_CALIBRATE_IMPL_H

#include "quantize/autoround.h"
#include "quantize/calibrate.h"
#include "quantize/outbox.h"

#include <pthread.h>

/* A set's results, on their way out. */
struct result {
    struct set set;
    struct gptq_stats stats[GPTQ_MAX_PARTS];
    struct tune_stats tuned;
    int64_t n_nonfinite[GPTQ_MAX_PARTS];
};

/* What quantizes one set at a time. */
struct solver {
    const struct backend *b;
    struct gptq *gptq; /* NULL where no codes are found under Hessians */
    struct buf codes;  /* with scales and zero points, of the largest set */
    struct staged_buf
        n_found; /* places or numbers of weights that are not finite, one for each of a set's linears */
};

/* Solvers side by side, each with a stream of its own: one expert keeps a device less than busy. */
struct expert_solvers {
    struct parallel *pool;
    struct backend *backends; /* [workers], as the next one */
    struct solver *list;
    int n;              /* of them that are open */
    struct buf hessian; /* of `at_once` experts */
    int at_once;
    struct result *results; /* [2][experts] of a block under tuning: gate and up, down */
    pthread_mutex_t lock;   /* of the outbox, and of the following */
    int64_t n_seen;         /* experts of all layers that are quantized, … */
    int64_t n_starved;      /* … and those of them that had fewer tokens than the floor */
    int64_t fewest;         /* of any, … */
    int fewest_layer, fewest_expert;
};

struct run {
    const struct model *m;
    const struct recipe_plan *plan;
    const struct backend *b;
    const struct calibrate_options *o;
    const struct calibrate_events *events;
    const struct dataset *data;
    struct work_clock clock;
    struct weights weights;
    struct capture *capture;
    struct solver solver;
    struct buf hessian;
    struct tuner *tuner; /* NULL without a tuning */
    double *losses;      /* [iterations] */
    struct expert_solvers experts;
    struct outbox *outbox;
};

int solver_open(struct solver *s, const struct run *r, const struct backend *b, const struct gptq_size *sizes,
                size_t n, struct work_clock *clock);
void solver_close(struct solver *s);

/* The steps of a set. Counts weights that are not finite and sets them to 0, or refuses them. */
int calibrate_check_finite(const struct run *r, const struct solver *v, const struct set *s,
                           struct linear_set *l, int64_t *n_nonfinite);
/* Codes under the Hessian take the weights' place; a tuning gets them as its start, else they are the result. */
int calibrate_solve(struct run *r, const struct solver *v, struct linear_set *l, const struct mat *h,
                    struct result *result);
/* The tuning's codes in the result's form, in place of the weights, and on their way out. */
int calibrate_finish(struct run *r, struct linear_set *l, struct result *result);
/* One at a time. */
int calibrate_send(struct run *r, const struct solver *v, const struct result *result);
/* 1: the whole set's result was known and has taken its place. */
int calibrate_take_known(struct run *r, const struct set *s, struct linear_set *l);

/* The different sizes of experts' sets, which layers may have in groups of their own; returns their number. */
enum { EXPERT_SIZES = 10 }; /* two widths, five sizes of groups */
size_t calibrate_expert_sizes(const struct recipe_plan *plan, struct gptq_size out[EXPERT_SIZES]);
int calibrate_expert_workers(const struct backend *b);
int calibrate_open_experts(struct run *r, const struct calibrate_plan *plan);
void calibrate_close_experts(struct run *r);
void calibrate_warn_of_starved(const struct run *r); /* in all layers so far */

/* All experts of a layer whose other sets are done. */
int calibrate_run_experts(struct run *r, int layer);

/* The same step by step, of a block under tuning. Whether there is anything to quantize, all of it finite. 1: all of it was
 * known and has taken its place. Codes to begin with. The results, after the tuning that has these statistics. */
int calibrate_begin_experts(struct run *r, int layer, bool *quantized);
int calibrate_recall_experts(struct run *r, int layer);
int calibrate_start_experts(struct run *r, int layer);
int calibrate_finish_experts(struct run *r, int layer, const struct tune_stats *stats);

/* Whether codes are found under Hessians. */
static inline bool calibrate_solves(const struct tune_options *tune)
{
    return tune->iterations == 0 || tune->init == TUNE_FROM_CODES;
}

/* The sizes of all sets that are quantized; returns their number. */
size_t calibrate_sizes(const struct recipe_plan *plan, int64_t n_layers, struct gptq_size *out);

#endif

/* Cutting the made-up mixture of experts, and what must hold of every cut of it. */
#ifndef GEMCUT_TESTS_UNIT_EXPERT_CUTTING_H
#define GEMCUT_TESTS_UNIT_EXPERT_CUTTING_H

#include "tests/unit/cutting.h"

enum { SAMPLES = 4, LENGTH = 24, LAYERS = 3, N_EXPERTS = TINY_EXPERTS };
enum { DENSE = 7 * LAYERS - 1, N_LINEARS = DENSE + 3 * N_EXPERTS * LAYERS };

extern const struct tiny_gemma *const mixture;
extern const char *const mixture_all_experts[1]; /* globs */
extern const char *const mixture_middle_layer[1];
int mixture_make(void **state);        /* a group fixture: a folder, and ids to calibrate with */
int mixture_lift_budget(void **state); /* a teardown of tests that set one */

/* The source, with experts in two tensors a layer or a tensor for each linear. */
const char *mixture_whole(void);
const char *mixture_apart(void);

/* Of the whole, in groups of 32. */
struct cut_options mixture_rtn(const char *out);
struct cut_options mixture_gptq(const char *out);
const char *mixture_made(const struct cut_options *o); /* o->out, cut unless it is there */

void mixture_check_same(const char *a, const char *b); /* the weights of two cuts, byte for byte */

/* What verify finds first, or with finding NULL that it finds nothing. source may be NULL. */
void mixture_check_verified(const char *cut, const char *source, const char *object, const char *finding);
void mixture_check_good(const char *cut); /* nothing, alone and against the source of either layout */

/* A layer's experts lie in the cut as they lie in the source: two tensors, the same bytes, and no others. */
void mixture_check_kept(const char *cut, const char *source, int layer);

/* The tensor "…layers.LAYER.experts.NAME" as it is stored; or NULL. */
const struct tensor *mixture_stored(const struct checkpoint *ck, int layer, const char *name);

#endif

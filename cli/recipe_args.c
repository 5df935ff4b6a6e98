#include "cli/recipe_args.h"

#include "base/err.h"

#include <string.h>

enum { INIT_GPTQ, INIT_RTN, INIT_NONE };
const char *const tune_inits[] = {[INIT_GPTQ] = "gptq", [INIT_RTN] = "rtn", [INIT_NONE] = "none", NULL};

/* Passes of refinement, of codes that are the result and of those that a tuning begins with. */
enum { GPTQ_PASSES = 8, START_PASSES = 4, SAMPLES_OF_A_STEP = 8 };

static int refuse_foreign(const struct recipe_args *a)
{
    const struct tune_args *t = &a->tune;
    const bool tuned = !strcmp(a->method, "autoround"), from_range = t->compat || t->init == INIT_NONE;
    const struct {
        const char *option;
        bool given, fits;
        const char *what;
    } rules[] = {
        {"iters", t->iterations >= 0, tuned, "autoround"},
        {"batch", t->batch > 0, tuned, "autoround"},
        {"lr", t->lr > 0, tuned, "autoround"},
        {"scale-lr", t->range_lr > 0, tuned, "autoround"},
        {"init", t->init >= 0, tuned, "autoround"},
        {"compat", t->compat, tuned, "autoround"},
        {"refine", a->passes >= 0, !strcmp(a->method, "gptq") || (tuned && !from_range),
         "gptq, and autoround that begins with codes"},
        {"init", t->init >= 0 && t->init != INIT_NONE, !t->compat,
         "autoround without --compat, which begins "
         "with none"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].given && !rules[i].fits)
            return err_set(ERR_USAGE, "option '--%s' is only for %s", rules[i].option, rules[i].what);
    return 0;
}

/* Rates that measured best on Gemma 3 270M (docs/benchmarks.md): in all a weight can move by a quarter of a step; not
 * faster for few iterations. From none, those of auto-round. */
static double rate(double given, double share, int64_t iterations, bool cold)
{
    const int64_t at_least = cold ? 1 : 50;
    return given > 0 ? given : share / (double)(iterations > at_least ? iterations : at_least);
}

static struct tune_options choose_tuning(const struct recipe_args *a)
{
    const struct tune_args *t = &a->tune;
    const bool cold = t->compat || t->init == INIT_NONE;
    const int64_t n = t->iterations >= 0 ? t->iterations : a->iterations;
    return (struct tune_options){.iterations = n,
                                 .batch = t->batch > 0 ? t->batch : SAMPLES_OF_A_STEP,
                                 .lr = rate(t->lr, cold ? 1 : 0.5, n, cold),
                                 .range_lr = rate(t->range_lr, cold ? 1 : 0.1, n, cold),
                                 .init = cold ? TUNE_FROM_NONE : TUNE_FROM_CODES,
                                 .keep = t->compat ? TUNE_KEEP_BEST : TUNE_KEEP_LAST,
                                 .ends_clip = t->compat,
                                 .seed = a->calib.seed};
}

int recipe_args_apply(const struct recipe_args *a, struct recipe *r)
{
    const bool is_auto = !strcmp(a->scales, "auto"), tuned = !strcmp(a->method, "autoround");
    int rc = refuse_foreign(a);
    if (!rc && !is_auto)
        rc = recipe_parse_scales(a->scales, &r->scales.rule);
    if (rc < 0)
        return rc;
    const bool searched = !is_auto && (r->scales.rule == SCALE_WEIGHTED || r->scales.rule == SCALE_BLOCK);
    r->method = a->method;
    if (tuned)
        r->tune = choose_tuning(a);
    const bool cold = tuned && r->tune.init == TUNE_FROM_NONE;
    r->sweep = !strcmp(a->method, "gptq") || (tuned && !cold && a->tune.init != INIT_RTN);
    r->calibrated = r->sweep || tuned || a->calib.text || searched;
    if (is_auto)
        r->scales.rule = r->calibrated && !cold ? SCALE_BLOCK : SCALE_RANGE;
    if (!r->calibrated)
        return 0;
    if (cold && r->scales.rule != SCALE_RANGE)
        return err_set(ERR_USAGE, "--scales %s: from none, autoround begins with the range", a->scales);
    if (cold && r->scales.positive_only)
        return err_set(ERR_USAGE, "--scale-sign positive: from none, autoround has scales of either sign");
    r->calib = a->calib;
    if (!r->calib.text)
        r->calib.text = DOCUMENTS_BUILTIN;
    r->natural_order = a->natural_order;
    r->damping = a->damping;
    r->passes = !r->sweep ? 0 : a->passes >= 0 ? (int)a->passes : tuned ? START_PASSES : GPTQ_PASSES;
    return 0;
}

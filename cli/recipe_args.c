#include "cli/recipe_args.h"

#include "base/err.h"

#include <string.h>

int recipe_args_apply(const struct recipe_args *a, struct recipe *r)
{
    const bool is_auto = !strcmp(a->scales, "auto"), sweep = !strcmp(a->method, "gptq");
    r->method = a->method;
    if (!is_auto && recipe_parse_scales(a->scales, &r->scales.rule) < 0)
        return ERR_USAGE;
    const bool searched = !is_auto && (r->scales.rule == SCALE_WEIGHTED || r->scales.rule == SCALE_BLOCK);
    r->calibrated = sweep || a->calib.text || searched;
    if (is_auto)
        r->scales.rule = r->calibrated ? SCALE_BLOCK : SCALE_RANGE;
    if (!r->calibrated)
        return 0;
    r->calib = a->calib;
    if (!r->calib.text)
        r->calib.text = DOCUMENTS_BUILTIN;
    r->natural_order = a->natural_order;
    r->damping = a->damping;
    r->passes = sweep ? (int)a->passes : 0;
    return 0;
}

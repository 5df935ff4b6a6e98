#include "quantize/work.h"

#include "base/clock.h"

#include <string.h>

const char *const work_names[N_WORK] = {
    [WORK_LOAD] = "load",     [WORK_FORWARD] = "forward", [WORK_HESSIAN] = "hessian",
    [WORK_FACTOR] = "factor", [WORK_SEARCH] = "search",   [WORK_MEASURE] = "measure",
    [WORK_SWEEP] = "sweep",   [WORK_REFIT] = "refit",     [WORK_DESCEND] = "descend",
    [WORK_EXPERTS] = "experts", [WORK_TUNE] = "tune",     [WORK_DELIVER] = "deliver"};

void work_begin(struct work_clock *c, double *seconds)
{
    *c = (struct work_clock){seconds, clock_seconds()};
    if (seconds)
        memset(seconds, 0, N_WORK * sizeof *seconds);
}

int work_spent(struct work_clock *c, const struct backend *b, enum work kind)
{
    if (!c->seconds)
        return 0;
    const int rc = b->core->wait(b);
    const double now = clock_seconds();
    c->seconds[kind] += now - c->mark;
    c->mark = now;
    return rc;
}

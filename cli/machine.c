#include "cli/machine.h"

#include "cli/output.h"
#include "kernels/budget.h"

#include <string.h>

int machine_begin(struct machine_options *m)
{
    const int rc = backend_resolve(m->device, m->name, m->title);
    if (rc < 0)
        return rc;
    budget_set(m->memory);
    output_detail("device %s: %s", m->name, m->title);
    return 0;
}

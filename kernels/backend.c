#include "kernels/backend.h"

#include "base/err.h"
#include "kernels/cpu/cpu.h"

#include <string.h>

int backend_open(struct backend *out, const char *device, int n_threads)
{
    if (strcmp(device, "cpu") && strcmp(device, "auto"))
        return err_set(ERR_UNSUPPORTED, "device '%s' is not available; this build has: cpu", device);
    *out = (struct backend){.name = "cpu", .core = &cpu_core_ops, .quant = &cpu_quant_ops};
    return cpu_open(out, n_threads);
}

void backend_close(struct backend *b)
{
    if (b->state)
        cpu_close(b);
    *b = (struct backend){0};
}

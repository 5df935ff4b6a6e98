#include "kernels/budget.h"

#include "base/err.h"

#include <stdatomic.h>

static uint64_t limit;
static _Atomic uint64_t taken;

void budget_set(uint64_t bytes)
{
    limit = bytes;
}

uint64_t budget_limit(void)
{
    return limit;
}

uint64_t budget_taken(void)
{
    return atomic_load(&taken);
}

int budget_take(const char *device, size_t bytes, const char *what)
{
    const uint64_t before = atomic_fetch_add(&taken, bytes);
    if (!limit || (before <= limit && bytes <= limit - before))
        return 0;
    atomic_fetch_sub(&taken, bytes);
    return err_set(
        ERR_MEMORY,
        "%s: %.2f GiB for %s do not fit the memory budget of %.2f GiB, of which %.2f GiB are taken", device,
        (double)bytes / 0x1p30, what, (double)limit / 0x1p30, (double)before / 0x1p30);
}

void budget_give(size_t bytes)
{
    atomic_fetch_sub(&taken, bytes);
}

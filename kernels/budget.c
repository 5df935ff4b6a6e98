#include "kernels/budget.h"

#include "base/err.h"
#include "base/text.h"

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

static int refuse(const char *device, size_t bytes, const char *what, uint64_t held_bytes)
{
    char asked[32], allowed[32], held[32];
    return err_set(ERR_MEMORY, "%s: %s for %s do not fit the memory budget of %s, of which %s are taken",
                   device, text_bytes(bytes, asked), what, text_bytes(limit, allowed),
                   text_bytes(held_bytes, held));
}

int budget_take(const char *device, size_t bytes, const char *what)
{
    uint64_t before = atomic_load(&taken);
    do
        if (limit && (before > limit || bytes > limit - before))
            return refuse(device, bytes, what, before);
    while (!atomic_compare_exchange_weak(&taken, &before, before + bytes));
    return 0;
}

void budget_give(size_t bytes)
{
    atomic_fetch_sub(&taken, bytes);
}

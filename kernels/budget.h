/* How much memory the backends of this process may hold in all, on whichever device: what --memory sets. Every backend
 * takes from it before it allocates and gives back what it frees. */
#ifndef GEMCUT_KERNELS_BUDGET_H
#define GEMCUT_KERNELS_BUDGET_H

#include <stddef.h>
#include <stdint.h>

/* 0 = no limit. Set before the first backend is opened. */
void budget_set(uint64_t bytes);
uint64_t budget_limit(void);
uint64_t budget_taken(void);

/* 0, or ERR_MEMORY saying what was asked on which device, for what, and what is left. */
int budget_take(const char *device, size_t bytes, const char *what);
void budget_give(size_t bytes);

#endif

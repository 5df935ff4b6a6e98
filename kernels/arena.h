/* Matrices side by side in one piece of memory that is planned before it is taken. */
#ifndef GEMCUT_KERNELS_ARENA_H
#define GEMCUT_KERNELS_ARENA_H

#include "kernels/backend.h"

/* [rows, cols] at *offset, which moves on behind it; every matrix begins at a multiple of 256 bytes. base NULL: only
 * counts. */
static inline struct mat arena_take(void *base, uint64_t *offset, enum dtype dtype, int64_t rows,
                                    int64_t cols)
{
    const struct mat m = {base ? (char *)base + *offset : NULL, dtype, rows, cols, cols};
    *offset += ((uint64_t)(rows * cols) * dtype_bytes(dtype) + 255) / 256 * 256;
    return m;
}

#endif

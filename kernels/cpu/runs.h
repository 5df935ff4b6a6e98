/* What files share whose tasks are runs of rows: rows that are alike and many. */
#ifndef GEMCUT_KERNELS_CPU_RUNS_H
#define GEMCUT_KERNELS_CPU_RUNS_H

#include "kernels/cpu/cpu.h"

enum { RUN = 32 }; /* rows a task takes */

CPU_INLINE size_t n_runs(int64_t rows)
{
    return (size_t)((rows + RUN - 1) / RUN);
}

CPU_INLINE int64_t run_end(size_t run, int64_t rows)
{
    const int64_t end = ((int64_t)run + 1) * RUN;
    return end < rows ? end : rows;
}

CPU_INLINE float *row_of(const struct mat *m, int64_t row) /* F32 */
{
    return (float *)m->data + row * m->stride;
}

#endif

/* What the files that place codes share. */
#ifndef GEMCUT_KERNELS_CPU_ROUNDING_H
#define GEMCUT_KERNELS_CPU_ROUNDING_H

#include "kernels/cpu/cpu.h"

/* A group's grid: ŵ = bf16((q − zero)·scale). */
struct step {
    float scale, zero;
};

CPU_INLINE struct step step_of(const struct qmat *q, int64_t row, int64_t group)
{
    return (struct step){half_from_bf16(((const uint16_t *)q->scales.data)[row * q->scales.stride + group]),
                         q->zeros.data ? (float)((const int8_t *)q->zeros.data)[row * q->zeros.stride + group]
                                       : 0};
}

CPU_INLINE float load_one(const struct mat *m, int64_t row, int64_t col)
{
    const size_t at = (size_t)(row * m->stride + col);
    if (m->dtype == DTYPE_BF16)
        return half_from_bf16(((const uint16_t *)m->data)[at]);
    if (m->dtype == DTYPE_F16)
        return half_from_f16(((const uint16_t *)m->data)[at]);
    return ((const float *)m->data)[at];
}

/* 0 when the parts fit together and the types are known. */
int cpu_check_rounding(const struct rounding *r, const char *op);

/* A scale as it is stored: BF16, never zero and never subnormal (GPUs flush those). An all-zero group gets BF16's
 * machine epsilon, as compressed-tensors does. */
float cpu_storable_scale(float s);

/* Scale and zero point of an asymmetric group from low ≤ 0 to high ≥ 0, both clipped to a share `shrink` of them. */
struct step cpu_asymmetric_step(float low, float high, float shrink, int bits);

#endif

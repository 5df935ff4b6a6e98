/* The CPU backend's tables, and what its files share: vectors of 16 floats. They are GCC's portable vector types:
 * the same source becomes SSE2, AVX2 or AVX-512 (chosen when the program starts, see CPU_CLONES), and because
 * lanes and order of summation are written out, every instruction set gives the same bits. */
#ifndef GEMCUT_KERNELS_CPU_CPU_H
#define GEMCUT_KERNELS_CPU_CPU_H

#include "base/half.h"
#include "kernels/backend.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern const struct core_ops cpu_core_ops;
extern const struct quant_ops cpu_quant_ops;

enum { LANES = 16 };
typedef float vfloat __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint16_t vhalf __attribute__((vector_size(32)));
typedef uint8_t vbyte __attribute__((vector_size(16)));

#define CPU_INLINE static inline __attribute__((always_inline))

/* Sanitizers and other architectures take the plain version. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CPU_CLONES
#endif

CPU_INLINE vfloat vload(const float *p)
{
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

CPU_INLINE void vstore(float *p, vfloat v)
{
    memcpy(p, &v, sizeof v);
}

CPU_INLINE vfloat vset(float x)
{
    return (vfloat){0} + x;
}

/* Where the mask (a comparison's result, 0 or −1 a lane) is set: a, elsewhere b. */
CPU_INLINE vfloat vselect(vint mask, vfloat a, vfloat b)
{
    return (vfloat)(((vint)a & mask) | ((vint)b & ~mask));
}

CPU_INLINE vfloat vmin(vfloat a, vfloat b)
{
    return vselect(a < b, a, b);
}

CPU_INLINE vfloat vmax(vfloat a, vfloat b)
{
    return vselect(a > b, a, b);
}

/* Adding 1.5·2^23 leaves the nearest integer (ties to even) in the low bits; exact for |x| < 2^22. */
#define ROUND_MAGIC 12582912.0f
#define ROUND_MAGIC_BITS 0x4b400000

CPU_INLINE vfloat vround(vfloat x)
{
    return (x + ROUND_MAGIC) - ROUND_MAGIC;
}

CPU_INLINE vfloat vround_bf16(vfloat x) /* finite x */
{
    const vuint u = (vuint)x;
    return (vfloat)((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000);
}

CPU_INLINE float vsum(vfloat v)
{
    float s[LANES];
    vstore(s, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

CPU_INLINE float vhighest(vfloat v)
{
    float m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] > m ? v[i] : m;
    return m;
}

CPU_INLINE float vlowest(vfloat v)
{
    float m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] < m ? v[i] : m;
    return m;
}

/* n elements of a row as floats, padded with zeros to a multiple of LANES. */
CPU_INLINE void load_row(const struct mat *m, int64_t row, int64_t col, int64_t n, float *out)
{
    const size_t at = (size_t)(row * m->stride + col);
    int64_t i = 0;
    if (m->dtype == DTYPE_BF16) {
        const uint16_t *p = (const uint16_t *)m->data + at;
        for (; i + LANES <= n; i += LANES) {
            vhalf h;
            memcpy(&h, p + i, sizeof h);
            vstore(out + i, (vfloat)(__builtin_convertvector(h, vuint) << 16));
        }
        for (; i < n; i++)
            out[i] = half_from_bf16(p[i]);
    } else if (m->dtype == DTYPE_F16) {
        for (const uint16_t *p = (const uint16_t *)m->data + at; i < n; i++)
            out[i] = half_from_f16(p[i]);
    } else {
        memcpy(out, (const float *)m->data + at, (size_t)n * sizeof *out);
        i = n;
    }
    for (; i % LANES; i++)
        out[i] = 0;
}

/* 0 when the matrix holds one of the float types that load_row knows. */
int cpu_check_float(const struct mat *m, const char *op);

#endif

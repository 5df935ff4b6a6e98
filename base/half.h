/* 16-bit floats. Rounding is to nearest even; NaNs stay NaNs (quieted), infinities and signs are kept. */
#ifndef GEMCUT_BASE_HALF_H
#define GEMCUT_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t half_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float half_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline float half_from_bf16(uint16_t h)
{
    return half_float((uint32_t)h << 16);
}

static inline uint16_t half_to_bf16(float f)
{
    const uint32_t u = half_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* f rounded to the nearest bf16 value, as a float. */
static inline float half_round_bf16(float f)
{
    return half_from_bf16(half_to_bf16(f));
}

static inline float half_from_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN */
        return half_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) /* normal: rebias the exponent from 15 to 127 */
        return half_float(sign | ((magnitude << 13) + (112u << 23)));
    /* subnormal: magnitude · 2^-24, exact in FP32 */
    return half_float(sign | half_bits((float)magnitude * 0x1p-24f));
}

static inline uint16_t half_to_f16(float f)
{
    const uint32_t u = half_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        /* below 2^-14: adding 0.5 aligns the last kept bit (2^-24) with FP32's last bit, which rounds to even */
        const float shifted = half_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (half_bits(shifted) - half_bits(0.5f)));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
}

#endif

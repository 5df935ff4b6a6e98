#include "tests/unit/naive.h"

#include <math.h>
#include <string.h>

double naive_round(double x, int significant, int least_exponent)
{
    if (x == 0 || !isfinite(x))
        return x;
    int exponent;
    frexp(x, &exponent); /* |x| in [2^(exponent−1), 2^exponent) */
    if (exponent - 1 < least_exponent)
        exponent = least_exponent + 1;
    const double quantum = ldexp(1, exponent - significant);
    const double rounded = nearbyint(x / quantum) * quantum;
    /* the greatest exponent is one more than the negative of the least, in every IEEE format */
    return fabs(rounded) >= ldexp(1, 2 - least_exponent) ? copysign(INFINITY, x) : rounded;
}

double naive_bf16(double x)
{
    return naive_round(x, 8, -126);
}

double naive_value16(uint16_t bits, int exponent_bits)
{
    const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    const int fraction = bits & ((1 << fraction_bits) - 1);
    double v;
    if (exponent == (1 << exponent_bits) - 1)
        v = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        v = ldexp(fraction, 1 - bias - fraction_bits);
    else
        v = ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
    return bits >> 15 ? -v : v;
}

uint16_t naive_bits16(double x, int exponent_bits)
{
    const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    if (isnan(x)) /* a quiet one */
        return (uint16_t)(((2u << exponent_bits) - 1) << (fraction_bits - 1));
    const double v = fabs(naive_round(x, fraction_bits + 1, 1 - bias));
    unsigned bits = signbit(x) ? 0x8000u : 0;
    if (isinf(v))
        return (uint16_t)(bits | ((1u << exponent_bits) - 1) << fraction_bits);
    if (v < ldexp(1, 1 - bias))
        return (uint16_t)(bits | (unsigned)ldexp(v, bias - 1 + fraction_bits));
    int exponent;
    const double fraction = frexp(v, &exponent) * 2 - 1;
    bits |= (unsigned)(exponent - 1 + bias) << fraction_bits;
    return (uint16_t)(bits | (unsigned)ldexp(fraction, fraction_bits));
}

double naive_storable(double s)
{
    if (s == 0)
        return 0.0078125;
    s = naive_bf16(s);
    return fabs(s) < 0x1p-126 ? copysign(0x1p-126, s) : s;
}

void naive_scale(const double *w, int64_t n, const struct naive_grid *grid, double *scale, int *zero)
{
    const double bottom = -ldexp(1, grid->bits - 1), top = -bottom - 1;
    double low = 0, high = 0;
    for (int64_t i = 0; i < n; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    *zero = 0;
    if (!grid->symmetric) {
        *scale = naive_storable((float)((double)(float)(high - low) / (top - bottom)));
        const double z = nearbyint((float)(bottom - (double)(float)(low / *scale)));
        *zero = (int)(z < bottom ? bottom : z > top ? top : z);
    } else if (grid->rule == SCALE_ABSMAX) {
        *scale = naive_storable((float)((high > -low ? high : -low) / (top + 0.5)));
    } else if (grid->positive_only) {
        const double a = (float)(low / bottom), b = (float)(high / (top + 0.5));
        *scale = naive_storable(a > b ? a : b);
    } else {
        *scale = naive_storable((float)((high > -low ? high : low) / bottom));
    }
}

int naive_code(double w, double scale, int zero, int bits)
{
    const double bottom = -ldexp(1, bits - 1), top = -bottom - 1;
    const double t = (float)((double)(float)(w / scale) + zero);
    return (int)nearbyint(t < bottom ? bottom : t > top ? top : t);
}

void naive_pack(const int *codes, int64_t n, int bits, uint32_t *words)
{
    const int per_word = 32 / bits;
    for (int64_t w = 0; w < (n + per_word - 1) / per_word; w++)
        words[w] = 0;
    for (int64_t c = 0; c < n; c++) {
        const unsigned code = (unsigned)(codes[c] + (1 << (bits - 1)));
        for (int b = 0; b < bits; b++)
            if (code >> b & 1)
                words[c / per_word] |= 1u << (c % per_word * bits + b);
    }
}

double naive_error(const double *w, int64_t n, double scale, int zero, int bits)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (naive_code(w[i], scale, zero, bits) - zero) * scale - w[i];
        sum += d * d;
    }
    return sum;
}

double naive_element(const struct mat *m, int64_t row, int64_t col)
{
    const int64_t at = row * m->stride + col;
    if (m->dtype == DTYPE_F32) {
        float f;
        memcpy(&f, (const char *)m->data + 4 * at, sizeof f);
        return f;
    }
    if (m->dtype == DTYPE_I32) {
        int32_t i;
        memcpy(&i, (const char *)m->data + 4 * at, sizeof i);
        return i;
    }
    uint16_t h;
    memcpy(&h, (const char *)m->data + 2 * at, sizeof h);
    return naive_value16(h, m->dtype == DTYPE_F16 ? 5 : 8);
}

double naive_slope(double (*f)(const void *ctx), const void *ctx, double *x, double step)
{
    const double centre = *x;
    *x = centre + step;
    const double above = f(ctx);
    *x = centre - step;
    const double below = f(ctx);
    *x = centre;
    return (above - below) / (2 * step);
}

/* The grid of docs/algorithms.md once more, an element at a time and in double, to hold the kernels against.
 * Steps that the text defines in FP32 are rounded to FP32 by a cast; 16-bit floats are rounded by arithmetic on
 * their quantum, not on their bits. Nothing of base/half.h or kernels/ is used. */
#ifndef GEMCUT_TESTS_UNIT_NAIVE_H
#define GEMCUT_TESTS_UNIT_NAIVE_H

#include "base/dtype.h"
#include "kernels/backend.h"

#include <stdbool.h>
#include <stdint.h>

/* A binary float with that many significant bits (the implied one included) and least normal exponent, e.g. BF16:
 * 8 and −126; F16: 11 and −14. Nearest value, ties to even; infinity beyond the greatest finite one. */
double naive_round(double x, int significant, int least_exponent);
double naive_bf16(double x);

/* Bits ↔ value of a 16-bit float with `exponent_bits`, built from sign, exponent and fraction. */
double naive_value16(uint16_t bits, int exponent_bits);
uint16_t naive_bits16(double x, int exponent_bits); /* x: representable, or rounded here */

struct naive_grid {
    enum scale_rule rule; /* SCALE_RANGE or SCALE_ABSMAX */
    bool positive_only, symmetric;
    int bits;
    int64_t group;
};

/* A scale as it is stored: BF16, neither zero nor subnormal. */
double naive_storable(double s);

/* Scale and zero point of n weights. */
void naive_scale(const double *w, int64_t n, const struct naive_grid *grid, double *scale, int *zero);

/* The code of one weight, and the weight that the code stands for before it is rounded to BF16. */
int naive_code(double w, double scale, int zero, int bits);

/* Little-endian words along a row: element c at bit (c mod 32/bits)·bits of word c / (32/bits), plus 2^(bits−1). */
void naive_pack(const int *codes, int64_t n, int bits, uint32_t *words);

/* Σ (w − (code − zero)·scale)² over n weights, not rounded to BF16. */
double naive_error(const double *w, int64_t n, double scale, int zero, int bits);

/* One element of a matrix of BF16, F16, F32 or I32 as a double. */
double naive_element(const struct mat *m, int64_t row, int64_t col);

/* ∂f/∂*x by the central difference f(*x + step) − f(*x − step); x points into what f reads, and keeps its value. */
double naive_slope(double (*f)(const void *ctx), const void *ctx, double *x, double step);

#endif

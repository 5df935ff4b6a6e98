/* sample_rows in double, straight from its definition in kernels/backend.h: every column's logarithms are taken. */
#ifndef GEMCUT_TESTS_UNIT_NAIVE_DRAW_H
#define GEMCUT_TESTS_UNIT_NAIVE_DRAW_H

#include <math.h>
#include <stdint.h>

/* SplitMix64 (Steele, Lea, Flood 2014): the output for a state. */
static inline uint64_t naive_splitmix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline double naive_gumbel(uint64_t seed, uint64_t row, uint64_t step, uint64_t column)
{
    const uint64_t start = naive_splitmix(naive_splitmix(seed + row) + step);
    const uint64_t h = naive_splitmix(start + column * 0x9e3779b97f4a7c15u) >> 32;
    return -log(-log1p(-((double)h + 0.5) / 4294967296.0));
}

struct naive_drawing {
    int32_t token;
    double margin; /* by which its score exceeds the second */
};

static inline struct naive_drawing naive_draw(const float *logits, int64_t n, double temperature,
                                              uint64_t seed, uint64_t row, uint64_t step)
{
    double best = -INFINITY, second = -INFINITY;
    struct naive_drawing d = {0};
    for (int64_t c = 0; c < n; c++) {
        const double score =
            temperature > 0 ? (double)logits[c] / temperature + naive_gumbel(seed, row, step, (uint64_t)c)
                            : (double)logits[c];
        if (score > best) {
            second = best;
            best = score;
            d.token = (int32_t)c;
        } else if (score > second) {
            second = score;
        }
    }
    d.margin = best - second;
    return d;
}

#endif

/* Random numbers that are the same everywhere: PCG32 (O'Neill, pcg-random.org), seeded by the user. */
#ifndef GEMCUT_BASE_RNG_H
#define GEMCUT_BASE_RNG_H

#include <stdint.h>

struct rng {
    uint64_t state;
};

void rng_seed(struct rng *r, uint64_t seed);
uint32_t rng_u32(struct rng *r);

/* Uniform in [0, 1), 24 bits. */
float rng_float(struct rng *r);

#endif

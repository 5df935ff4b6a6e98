#include "base/rng.h"

static const uint64_t multiplier = 6364136223846793005u, increment = 1442695040888963407u;

void rng_seed(struct rng *r, uint64_t seed)
{
    r->state = 0;
    rng_u32(r);
    r->state += seed;
    rng_u32(r);
}

uint32_t rng_u32(struct rng *r)
{
    const uint64_t old = r->state;
    r->state = old * multiplier + increment;
    const uint32_t mixed = (uint32_t)((old >> 18 ^ old) >> 27);
    const uint32_t turn = (uint32_t)(old >> 59);
    return mixed >> turn | mixed << (-turn & 31);
}

float rng_float(struct rng *r)
{
    return (float)(rng_u32(r) >> 8) * 0x1p-24f;
}

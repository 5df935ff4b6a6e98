/* Keys and values that later layers read too (Gemma 4), of all tokens, as each stream gives them: a layer that shares
 * replays those of the same tokens. All layers of a kind that share, share those of the same one. */
#ifndef GEMCUT_QUANTIZE_DONORS_H
#define GEMCUT_QUANTIZE_DONORS_H

#include "quantize/states.h"
#include "runtime/gemma.h"

enum { DONOR_STREAMS = 2 };

struct donor {
    int layer, last_reader;                                   /* −1: there is none */
    struct states keys[DONOR_STREAMS], values[DONOR_STREAMS]; /* act [tokens, kv] */
};

struct donors {
    struct donor of[GEMMA_KINDS];
    int n_streams;
};

uint64_t donors_bytes(const struct gemma_config *c, enum dtype act, int64_t tokens, int n_streams);

/* keys, values: act, of a batch on the device, as wide as the widest; where on_host, they hold what is fetched. d: zeros */
int donors_open(struct donors *d, const struct backend *b, const struct gemma_config *c, int64_t tokens,
                int n_streams, bool on_host, const struct mat *keys, const struct mat *values);

/* Gives back what no layer from this one on reads. */
void donors_release(struct donors *d, const struct backend *b, int layer);

/* The donor that is or that serves this layer, whose keys and values are kv_source's; NULL: nobody else reads them. */
const struct donor *donors_find(const struct donors *d, int kv_source);

#endif

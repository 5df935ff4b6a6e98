#include "quantize/donors.h"

#include "base/err.h"

/* Who reads whose; the widths of their rows. */
static void find_donors(struct donors *d, const struct gemma_config *c, int64_t widths[GEMMA_KINDS])
{
    for (int kind = 0; kind < GEMMA_KINDS; kind++) {
        d->of[kind].layer = d->of[kind].last_reader = -1;
        widths[kind] = 0;
    }
    for (int64_t i = 0; i < c->n_layers; i++) {
        const struct gemma_layer *l = &c->layers[i];
        const int kind = l->sliding ? GEMMA_SLIDING : GEMMA_GLOBAL;
        struct donor *donor = &d->of[kind];
        if (l->kv_source == i)
            continue;
        CHECK(donor->layer < 0 || donor->layer == l->kv_source);
        donor->layer = (int)l->kv_source;
        donor->last_reader = (int)i;
        widths[kind] = l->n_kv_heads * l->head_dim;
    }
}

uint64_t donors_bytes(const struct gemma_config *c, enum dtype act, int64_t tokens, int n_streams)
{
    struct donors unused;
    int64_t widths[GEMMA_KINDS], sum = 0;
    find_donors(&unused, c, widths);
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        sum += widths[kind];
    return (uint64_t)(2 * n_streams * tokens * sum) * dtype_bytes(act);
}

/* shape: of all tokens; batch: dense memory of the device */
static int take(struct states *s, const struct backend *b, const struct mat *shape, bool on_host,
                const struct mat *batch)
{
    const char *what = "keys and values that later layers read";
    const int rc = on_host ? b->core->acquire_host(b, states_bytes(shape), what, &s->memory)
                           : b->core->acquire(b, states_bytes(shape), what, &s->memory);
    s->all = *shape;
    s->all.data = s->memory.ptr;
    s->batch = on_host ? mat_dense(batch, shape->cols) : (struct mat){0};
    return rc;
}

int donors_open(struct donors *d, const struct backend *b, const struct gemma_config *c, int64_t tokens,
                int n_streams, bool on_host, const struct mat *keys, const struct mat *values)
{
    int64_t widths[GEMMA_KINDS];
    int rc = 0;
    CHECK(n_streams <= DONOR_STREAMS);
    find_donors(d, c, widths);
    d->n_streams = n_streams;
    for (int kind = 0; kind < GEMMA_KINDS; kind++) {
        const struct mat shape = {NULL, b->activation, tokens, widths[kind], widths[kind]};
        for (int i = 0; !rc && d->of[kind].layer >= 0 && i < n_streams; i++) {
            rc = take(&d->of[kind].keys[i], b, &shape, on_host, keys);
            if (!rc)
                rc = take(&d->of[kind].values[i], b, &shape, on_host, values);
        }
    }
    return rc;
}

static void give_back(struct states *s, const struct backend *b)
{
    if (states_on_host(s))
        b->core->release_host(b, &s->memory);
    else
        b->core->release(b, &s->memory);
    *s = (struct states){0};
}

void donors_release(struct donors *d, const struct backend *b, int layer)
{
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        for (int i = 0; d->of[kind].last_reader < layer && i < d->n_streams; i++) {
            give_back(&d->of[kind].keys[i], b);
            give_back(&d->of[kind].values[i], b);
        }
}

const struct donor *donors_find(const struct donors *d, int kv_source)
{
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        if (d->of[kind].layer == kv_source)
            return &d->of[kind];
    return NULL;
}

/* Results on their way to the disk: a thread hashes and writes them while the device works on the next ones. */
#ifndef GEMCUT_QUANTIZE_OUTBOX_H
#define GEMCUT_QUANTIZE_OUTBOX_H

#include "kernels/backend.h"

#include <stddef.h>

struct outbox;

/* Memory of the host for one result, lent until it has been delivered. */
struct outbox_slot {
    struct buf packed, scales, zeros; /* pinned, as large as the largest result */
    size_t index;
};

/* Delivers the contents of a slot; `item` is what outbox_put was given. */
typedef int (*outbox_deliver)(void *ctx, const struct outbox_slot *slot, const void *item);

struct outbox_size {
    size_t packed, scales, zeros, item; /* bytes */
};

/* Of the host, that outbox_open takes. */
uint64_t outbox_bytes(const struct outbox_size *size);

int outbox_open(struct outbox **out, const struct backend *b, const struct outbox_size *size,
                outbox_deliver deliver, void *ctx);

/* Waits for what is under way; its failure is lost unless outbox_wait has been called. */
void outbox_close(struct outbox *o);

/* A free slot; waits for one. Also an error of earlier deliveries. */
int outbox_take(struct outbox *o, struct outbox_slot **slot);

/* Hands a slot from outbox_take over; *item is copied. */
void outbox_put(struct outbox *o, struct outbox_slot *slot, const void *item);

/* Until everything is delivered. */
int outbox_wait(struct outbox *o);

#endif

#include "quantize/outbox.h"

#include "base/err.h"
#include "base/mem.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { N_SLOTS = 8 }; /* what comes while other things are still being written */

/* Slots go around: taken in order, delivered in order. */
struct outbox {
    const struct backend *b;
    struct outbox_size size;
    outbox_deliver deliver;
    void *ctx;
    struct outbox_slot slots[N_SLOTS];
    void *items[N_SLOTS];
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    size_t n_put, n_done; /* under the lock, like the following */
    bool closing;
    int failed;
    char *message; /* of the failure */
};

static void fail(struct outbox *o, int rc)
{
    o->failed = rc;
    o->message = mem_strdup(err_message());
}

static void *run(void *arg)
{
    struct outbox *o = arg;
    pthread_mutex_lock(&o->lock);
    for (;;) {
        while (o->n_done == o->n_put && !o->closing)
            pthread_cond_wait(&o->changed, &o->lock);
        if (o->n_done == o->n_put)
            break;
        const size_t i = o->n_done % N_SLOTS;
        const bool skip = o->failed < 0;
        pthread_mutex_unlock(&o->lock);
        const int rc = skip ? 0 : o->deliver(o->ctx, &o->slots[i], o->items[i]);
        pthread_mutex_lock(&o->lock);
        if (rc < 0)
            fail(o, rc);
        o->n_done++;
        pthread_cond_broadcast(&o->changed);
    }
    pthread_mutex_unlock(&o->lock);
    return NULL;
}

static int open_slot(struct outbox *o, size_t i)
{
    struct outbox_slot *s = &o->slots[i];
    s->index = i;
    o->items[i] = mem_alloc(1, o->size.item, "a result");
    int rc = o->items[i] ? o->b->core->acquire_host(o->b, o->size.packed, "codes", &s->packed) : ERR_MEMORY;
    if (!rc)
        rc = o->b->core->acquire_host(o->b, o->size.scales, "scales", &s->scales);
    return rc ? rc : o->b->core->acquire_host(o->b, o->size.zeros, "zero points", &s->zeros);
}

uint64_t outbox_bytes(const struct outbox_size *size)
{
    return (uint64_t)N_SLOTS * (size->packed + size->scales + size->zeros);
}

int outbox_open(struct outbox **out, const struct backend *b, const struct outbox_size *size,
                outbox_deliver deliver, void *ctx)
{
    *out = NULL;
    struct outbox *o = mem_alloc(1, sizeof *o, "results");
    if (!o)
        return ERR_MEMORY;
    *o = (struct outbox){.b = b, .size = *size, .deliver = deliver, .ctx = ctx};
    pthread_mutex_init(&o->lock, NULL);
    pthread_cond_init(&o->changed, NULL);
    int rc = 0;
    for (size_t i = 0; !rc && i < N_SLOTS; i++)
        rc = open_slot(o, i);
    if (!rc && pthread_create(&o->thread, NULL, run, o))
        rc = err_set(ERR_MEMORY, "cannot start a thread for results");
    o->started = !rc;
    if (rc < 0)
        outbox_close(o);
    else
        *out = o;
    return rc;
}

void outbox_close(struct outbox *o)
{
    if (!o)
        return;
    pthread_mutex_lock(&o->lock);
    o->closing = true;
    pthread_cond_broadcast(&o->changed);
    pthread_mutex_unlock(&o->lock);
    if (o->started)
        pthread_join(o->thread, NULL);
    for (size_t i = 0; i < N_SLOTS; i++) {
        o->b->core->release_host(o->b, &o->slots[i].packed);
        o->b->core->release_host(o->b, &o->slots[i].scales);
        o->b->core->release_host(o->b, &o->slots[i].zeros);
        free(o->items[i]);
    }
    pthread_mutex_destroy(&o->lock);
    pthread_cond_destroy(&o->changed);
    free(o->message);
    free(o);
}

/* Waits until at most `n` are on their way. */
static int wait_for(struct outbox *o, size_t n)
{
    pthread_mutex_lock(&o->lock);
    while (o->n_put - o->n_done > n)
        pthread_cond_wait(&o->changed, &o->lock);
    const int rc =
        o->failed < 0 ? err_set((enum err)o->failed, "%s", o->message ? o->message : "out of memory") : 0;
    pthread_mutex_unlock(&o->lock);
    return rc;
}

int outbox_take(struct outbox *o, struct outbox_slot **slot)
{
    const int rc = wait_for(o, N_SLOTS - 1);
    *slot = &o->slots[o->n_put % N_SLOTS];
    return rc;
}

void outbox_put(struct outbox *o, struct outbox_slot *slot, const void *item)
{
    CHECK(slot->index == o->n_put % N_SLOTS);
    memcpy(o->items[slot->index], item, o->size.item);
    pthread_mutex_lock(&o->lock);
    o->n_put++;
    pthread_cond_broadcast(&o->changed);
    pthread_mutex_unlock(&o->lock);
}

int outbox_wait(struct outbox *o)
{
    return wait_for(o, 0);
}

#include "base/parallel.h"

#include "base/err.h"
#include "base/mem.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

/* Loops of a forward pass follow each other within microseconds, and waking a sleeping thread takes as long: who
 * waits looks around for about 20 µs before it sleeps. */
enum { SPINS = 1000 };

struct parallel {
    pthread_mutex_t lock;
    pthread_cond_t start, finish;
    pthread_t *threads; /* [n_workers - 1] */
    int n_workers, n_started;
    atomic_ulong generation; /* counts loops, so that a worker knows a new one from the last */
    atomic_bool closing;
    /* the loop under way */
    parallel_task task;
    void *ctx;
    size_t n, next;
    atomic_int n_running;
    size_t failed_index;
    int failed_code;
    char *failed_message;
};

struct worker {
    struct parallel *pool;
    int index;
};

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Hands out indices until none is left. Called and returns with the lock held. */
static void run_share(struct parallel *p, int worker)
{
    while (p->next < p->n && !p->failed_code) {
        if (err_interrupt_requested()) {
            p->failed_code = err_interrupted();
            p->failed_index = p->next;
            free(p->failed_message);
            p->failed_message = mem_strdup(err_message());
            break;
        }
        const size_t index = p->next++;
        pthread_mutex_unlock(&p->lock);
        const int rc = p->task(p->ctx, index, worker);
        pthread_mutex_lock(&p->lock);
        if (rc < 0 && (!p->failed_code || index < p->failed_index)) {
            p->failed_code = rc;
            p->failed_index = index;
            free(p->failed_message);
            p->failed_message = mem_strdup(err_message());
        }
    }
}

static void *worker_main(void *arg)
{
    struct worker w = *(struct worker *)arg;
    struct parallel *p = w.pool;
    free(arg);
    for (unsigned long seen = 0;;) {
        for (int i = 0; i < SPINS && p->generation == seen && !p->closing; i++)
            pause_briefly();
        pthread_mutex_lock(&p->lock);
        while (!p->closing && p->generation == seen)
            pthread_cond_wait(&p->start, &p->lock);
        if (p->closing)
            break;
        seen = p->generation;
        run_share(p, w.index);
        if (--p->n_running == 0)
            pthread_cond_signal(&p->finish);
        pthread_mutex_unlock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int parallel_processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

int parallel_open(struct parallel **out, int n_workers)
{
    *out = NULL;
    if (n_workers == 0)
        n_workers = parallel_processors();
    CHECK(n_workers >= 1);
    struct parallel *p = mem_alloc(1, sizeof *p, "a thread pool");
    if (!p)
        return ERR_MEMORY;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->start, NULL);
    pthread_cond_init(&p->finish, NULL);
    p->n_workers = n_workers;
    p->threads = mem_alloc((size_t)n_workers, sizeof *p->threads, "a thread pool");
    int rc = p->threads ? 0 : ERR_MEMORY;
    for (int i = 1; !rc && i < n_workers; i++) {
        struct worker *w = mem_alloc(1, sizeof *w, "a thread");
        if (!w) {
            rc = ERR_MEMORY;
            break;
        }
        *w = (struct worker){p, i};
        if (pthread_create(&p->threads[i - 1], NULL, worker_main, w)) {
            free(w);
            rc = err_set(ERR_MEMORY, "cannot start thread %d of %d", i + 1, n_workers);
            break;
        }
        p->n_started++;
    }
    if (rc < 0) {
        parallel_close(p);
        return rc;
    }
    *out = p;
    return 0;
}

void parallel_close(struct parallel *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->closing = true;
    pthread_cond_broadcast(&p->start);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n_started; i++)
        pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->finish);
    pthread_cond_destroy(&p->start);
    pthread_mutex_destroy(&p->lock);
    free(p->threads);
    free(p);
}

int parallel_workers(const struct parallel *p)
{
    return p->n_workers;
}

int parallel_for(struct parallel *p, size_t n, parallel_task task, void *ctx)
{
    if (n == 1) /* not worth waking anybody */
        return err_interrupt_requested() ? err_interrupted() : task(ctx, 0, 0);
    pthread_mutex_lock(&p->lock);
    CHECK(p->n_running == 0);
    p->task = task;
    p->ctx = ctx;
    p->n = n;
    p->next = 0;
    p->failed_code = 0;
    p->n_running = p->n_started;
    p->generation++;
    pthread_cond_broadcast(&p->start);
    run_share(p, 0);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < SPINS && p->n_running > 0; i++)
        pause_briefly();
    pthread_mutex_lock(&p->lock);
    while (p->n_running > 0)
        pthread_cond_wait(&p->finish, &p->lock);
    const int code = p->failed_code;
    char *message = p->failed_message;
    p->failed_message = NULL;
    pthread_mutex_unlock(&p->lock);
    if (code < 0)
        err_set((enum err)code, "%s", message ? message : "out of memory");
    free(message);
    return code;
}

size_t parallel_find(const size_t *first, size_t stride, size_t n, size_t task)
{
    size_t low = 0, high = n;
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        if (*(const size_t *)((const char *)first + middle * stride) <= task)
            low = middle;
        else
            high = middle;
    }
    return low;
}

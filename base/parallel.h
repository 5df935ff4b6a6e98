/* A fixed set of threads that share the indices of one loop at a time. Results must not depend on which thread
 * takes which index: work is cut by the caller, never by the number of threads. */
#ifndef GEMCUT_BASE_PARALLEL_H
#define GEMCUT_BASE_PARALLEL_H

#include <stddef.h>

struct parallel;

/* One task: index in [0, n), worker in [0, parallel_workers). 0, or a negative error that ends the loop. */
typedef int (*parallel_task)(void *ctx, size_t index, int worker);

/* n_workers ≥ 1 in all, the calling thread included; 0 = one for each processor that this process may use. */
int parallel_open(struct parallel **out, int n_workers);
int parallel_processors(void); /* that this process may use */
void parallel_close(struct parallel *p);
int parallel_workers(const struct parallel *p);

/* Runs task(ctx, i, worker) for every i, in ascending order of start. After a failure or an interrupt no new
 * index starts; the error of the lowest failed index is returned, with its message. */
int parallel_for(struct parallel *p, size_t n, parallel_task task, void *ctx);

/* Of n things whose tasks follow one another, the one that a task belongs to: the last whose first task is not after it.
 * first: of the first thing, stride: bytes from one such number to the next, so that they may be members of structs. */
size_t parallel_find(const size_t *first, size_t stride, size_t n, size_t task);

#endif

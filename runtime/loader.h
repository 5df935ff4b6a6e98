/* Bringing tensors to the device, many at once: what is to lie where is noted first, then threads read, unpack where that is
 * needed, and upload. weights.c notes and runs; nobody else includes this. */
#ifndef GEMCUT_RUNTIME_LOADER_H
#define GEMCUT_RUNTIME_LOADER_H

#include "runtime/weights.h"

/* A tensor as it lies in the file, or, with `linear`, a linear that is unpacked on the way: its codes by rows, or where
 * it is not direct its weight. */
struct transfer {
    const struct tensor *tensor;
    const struct model_linear *linear;
    char *to; /* on the device */
    size_t first_task;
};

struct load_worker {
    struct backend backend;
    struct staged_buf piece;
};

struct loader {
    struct weights *w;
    const struct model *m;
    int part; /* that is being loaded */
    struct transfer *list;
    size_t n, capacity, n_tasks;
    struct parallel *pool; /* opened by the first transfer */
    struct load_worker *workers;
};

/* Notes that a tensor is to lie at `to`, as it lies in the file. */
int loader_add(struct loader *l, const struct tensor *t, void *to);

/* Notes that a linear is to lie at `to`, unpacked. */
int loader_add_unpacked(struct loader *l, const struct model_linear *from, void *to);

/* Everything that was noted. */
int loader_run(struct loader *l);
void loader_close(struct loader *l);

#endif

/* What a calibration keeps of all tokens: a row a token, on the device, or in pinned host memory where it does not fit; then
 * one batch of it is on the device. */
#ifndef GEMCUT_QUANTIZE_STATES_H
#define GEMCUT_QUANTIZE_STATES_H

#include "kernels/backend.h"

struct states {
    struct mat all;   /* dense; on the device, or on the host */
    struct mat batch; /* dense, on the device; data NULL where all is there */
    struct buf
        memory; /* of what is not in an arena: on the host, pinned, where there is a batch; else on the device */
};

/* One batch of whole sequences. */
struct token_batch {
    int64_t first_row, rows, sequences;
};

uint64_t states_bytes(const struct mat *m);

/* shape: of all; as arena_take, of a batch alone where all is on the host, whose memory is s->memory */
void states_place(struct states *s, void *base, uint64_t *at, bool on_host, const struct mat *shape,
                  int64_t batch_rows);

/* The same memory with rows of so many columns, at most those that it was placed with; what it held is lost. */
void states_fit(struct states *s, int64_t cols);

/* The batch's rows, on the device. */
struct mat states_rows(const struct states *s, const struct token_batch *t);

/* From the host to the batch and back; nothing where all is on the device. from: on the device */
int states_fetch(const struct backend *b, const struct states *s, const struct token_batch *t);
int states_keep(const struct backend *b, const struct states *s, const struct mat *from,
                const struct token_batch *t);

/* These rows to a dense matrix on the device. */
int states_copy(const struct backend *b, const struct states *s, int64_t first_row, const struct mat *to);

static inline bool states_on_host(const struct states *s)
{
    return s->batch.data != NULL;
}

/* The memory of m, with rows of so many columns one after another. */
static inline struct mat mat_dense(const struct mat *m, int64_t cols)
{
    return (struct mat){m->data, m->dtype, m->rows, cols, cols};
}

#endif

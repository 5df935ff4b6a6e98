/* A block's sets of linears under tuning, on the device: the weights as they were, what is tuned of them, and the codes that
 * come of it. Those of all experts are one weight. */
#ifndef GEMCUT_QUANTIZE_TUNED_SETS_H
#define GEMCUT_QUANTIZE_TUNED_SETS_H

#include "quantize/sets.h"

/* The sets of a block lie one behind the other, each weight's rows together. */
struct tuned_set {
    struct set set;    /* n = 0: not quantized; of experts the first one's */
    int64_t rows;      /* of all experts */
    struct linear all; /* of experts */
    struct piece pieces[GPTQ_MAX_PARTS];
    int n_pieces;
    void *copies; /* the weights as they were, as many bytes an element as the widest has */
    size_t copy_bytes;
    enum dtype dtypes[GPTQ_MAX_PARTS]; /* of each piece */
    struct mat v, gradient;            /* F32 [rows, cols] */
    struct mat low, high, start;       /* F32, F32, BF16 [rows, groups] */
    struct mat codes; /* I8 [rows, cols]: the start's, then those of the iterate that is kept */
    struct mat scales, zeros, kept_scales, kept_zeros; /* of the iterate; of the one that is kept */
};

/* Lays a layer's sets out from base on (NULL: only counts); returns the bytes. tuned_sets_bytes: the most that any layer
 * needs. */
uint64_t tuned_sets_place(struct tuned_set sets[N_BLOCK_SETS], const struct model *m,
                          const struct recipe_plan *plan, int layer, void *base);
uint64_t tuned_sets_bytes(const struct model *m, const struct recipe_plan *plan);

/* Copies a loaded block's weights, as they are; puts them back. */
int tuned_sets_take(struct tuned_set sets[N_BLOCK_SETS], const struct backend *b, struct block *block);
int tuned_sets_restore(struct tuned_set sets[N_BLOCK_SETS], const struct backend *b, struct block *block);

/* Weights that are restored from codes are BF16, where they take 16 bits. */
void tuned_sets_narrow(struct tuned_set sets[N_BLOCK_SETS], struct block *block);

/* The first row of a set, or of an expert's in that of all experts; the piece that a row belongs to. */
int64_t tuned_first_row(const struct set *set);
int tuned_piece(const struct tuned_set *s, int64_t row);

/* Of rows [row, row + n), all of one piece: the weights as they were; scales and zero points, without codes. */
struct mat tuned_original(const struct tuned_set *s, int64_t row, int64_t n);
struct qmat tuned_grid(const struct tuned_set *s, const struct mat *scales, const struct mat *zeros,
                       int64_t row, int64_t n);

#endif

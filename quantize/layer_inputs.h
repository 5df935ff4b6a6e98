/* Layers' own inputs (Gemma 4). They follow from a token's id alone, so they are computed once for each of the ids that
 * occur in the text, for all layers, while the embeddings are loaded; a batch then picks its rows. */
#ifndef GEMCUT_QUANTIZE_LAYER_INPUTS_H
#define GEMCUT_QUANTIZE_LAYER_INPUTS_H

#include "calib/dataset.h"
#include "quantize/states.h"
#include "runtime/block.h"

struct layer_inputs {
    int64_t n_ids;   /* different ones */
    int32_t *places; /* [tokens]: which of them each token has */
    struct states
        states; /* act [layers·n_ids, ple]: of every layer the ids in ascending order; a batch is a layer */
    int layer;  /* whose rows are on the device */
};

/* How many different ids there are, all below vocab. */
int layer_inputs_count(const struct dataset *data, int64_t vocab, int64_t *n);

/* Computes them all; l->states is placed, the outer weights are loaded. Of the table only the rows of these ids are read.
 * x: F32 [rows, hidden] to work in, at most so many ids at a time; in: the same rows, table and ids left out. */
int layer_inputs_make(struct layer_inputs *l, const struct weights *w, const struct dataset *data,
                      const struct mat *x, const struct block_input *in);

/* What that takes beside, of the device and, where it has memory of its own, of the host too; and what it reads of the
 * table. rows: of x */
uint64_t layer_inputs_bytes(const struct model *m, int64_t n_ids, int64_t rows);
uint64_t layer_inputs_read_bytes(const struct model *m, int64_t n_ids);

void layer_inputs_free(struct layer_inputs *l);

/* Brings a layer's to the device. */
int layer_inputs_enter(struct layer_inputs *l, const struct backend *b, int layer);

/* to->input of the tokens [first, first + its rows) of the text, of the layer that was entered; to->sum is overwritten. */
int layer_inputs_pick(const struct layer_inputs *l, const struct backend *b, int64_t first,
                      const struct block_input *to);

#endif

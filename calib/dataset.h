/* Documents as a matrix of token ids: what calibration runs through the model. Each document's tokens, <bos> in
 * front, follow those of the one before without anything between, and the row of all of them is cut into samples of
 * equal length: a document may begin anywhere in a sample and go on in the next. */
#ifndef GEMCUT_CALIB_DATASET_H
#define GEMCUT_CALIB_DATASET_H

#include "calib/text.h"
#include "formats/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct dataset_options {
    int64_t samples, length; /* both ≥ 1 */
    uint64_t seed;           /* of the order of documents */
    bool shuffle;            /* false: in file order, whatever the seed */
};

/* A document that went in: its place in struct documents, and its tokens with <bos>, of which the last one's may not
 * all have had room. */
struct dataset_use {
    size_t document, n_tokens;
};

struct dataset {
    int32_t *ids; /* [samples, length] row-major */
    int64_t samples, length;
    struct dataset_use *used; /* [n_used] in the order they stand in */
    size_t n_used;
};

/* Takes documents, skipping empty ones, until the matrix is full; the others are not tokenized. Too little text is an
 * error that says how much there is and how much is needed. n_tokens_max: ids must be below it (the model's
 * vocabulary). `name` is the documents' file, for messages. */
int dataset_make(struct dataset *out, const struct tokenizer *t, const struct documents *documents,
                 const struct dataset_options *options, int64_t n_tokens_max, const char *name);
void dataset_free(struct dataset *d);

#endif

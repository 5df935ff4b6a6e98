/* Linears that read the same inputs (q/k/v, gate/up) and are therefore quantized together. */
#ifndef GEMCUT_QUANTIZE_SETS_H
#define GEMCUT_QUANTIZE_SETS_H

#include "quantize/gptq.h"
#include "quantize/recipe.h"
#include "runtime/weights.h"

/* One set of a layer, and what becomes of it. */
struct set {
    const struct linear_plan *members; /* in model order */
    int n;                             /* 0: the layer has no such set */
    int64_t rows, cols;                /* of all of them, one below the other */
};

/* expert: whose set, of a mixture of experts, or SET_DENSE */
enum { SET_DENSE = -1 };
struct set set_find(const struct recipe_plan *plan, int layer, enum gemma_fused kind, int expert);
/* One of enum gemma_fused, or of all experts together: such a set is the first expert's. */
struct set set_of_block(const struct recipe_plan *plan, int layer, int block_set);
int set_in_block(const struct set *s); /* which it is, or belongs to */
enum gemma_fused set_kind(int block_set);
bool set_quantized(const struct set *s);
int64_t set_group(const struct set *s); /* columns */

/* Where a block keeps it. */
struct linear_set *set_place(struct block *b, enum gemma_fused kind, int expert);

/* Linears of one set that lie together as one weight, or a single one: members [first, first + parts.n), from `row` of
 * the set on. */
struct piece {
    struct linear *linear;
    int first;
    struct gptq_parts parts;
    int64_t row, rows;
};

/* The pieces of a set: one where the weights lie together. Returns their number. */
int set_pieces(const struct set *s, struct linear_set *l, struct piece out[GPTQ_MAX_PARTS]);

/* Codes, scales and zero points of a whole set in memory, packed first, one behind the other. */
struct result_bytes {
    size_t packed, scales, zeros;
};
struct result_bytes set_result_bytes(const struct set *s);
struct result_bytes sets_largest_result(const struct recipe_plan *plan);
size_t result_total(const struct result_bytes *r);

/* Rows [row, row + n) of a result that lies in these three places, or from base on. */
struct qmat set_result(const struct set *s, void *const places[3], int64_t row, int64_t n);
struct qmat set_result_at(const struct set *s, void *base, int64_t row, int64_t n);

#endif

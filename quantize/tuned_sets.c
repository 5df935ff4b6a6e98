#include "quantize/tuned_sets.h"

#include "base/err.h"
#include "kernels/arena.h"

/* --- memory ----------------------------------------------------------------------------------------------------- */

static enum dtype source_dtype(const struct model *m, const struct gemma_tensor *tensor)
{
    size_t i = 0;
    while (m->linears[i].spec != tensor)
        i++;
    return m->linears[i].weight->dtype;
}

static void place_set(struct tuned_set *s, const struct model *m, void *base, uint64_t *at)
{
    const int64_t rows = s->rows, cols = s->set.cols;
    const int64_t groups = quant_groups(s->set.members->scheme, cols);
    const bool symmetric = s->set.members->scheme.symmetric;
    enum dtype widest = DTYPE_BF16;
    for (int i = 0; i < s->set.n; i++)
        if (source_dtype(m, s->set.members[i].tensor) == DTYPE_F32)
            widest = DTYPE_F32;
    const struct mat copies = arena_take(base, at, widest, rows, cols);
    s->copies = copies.data;
    s->copy_bytes = dtype_bytes(widest);
    s->v = arena_take(base, at, DTYPE_F32, rows, cols);
    s->gradient = arena_take(base, at, DTYPE_F32, rows, cols);
    s->low = arena_take(base, at, DTYPE_F32, rows, groups);
    s->high = arena_take(base, at, DTYPE_F32, rows, groups);
    s->start = arena_take(base, at, DTYPE_BF16, rows, groups);
    s->codes = arena_take(base, at, DTYPE_I8, rows, cols);
    s->scales = arena_take(base, at, DTYPE_BF16, rows, groups);
    s->kept_scales = arena_take(base, at, DTYPE_BF16, rows, groups);
    s->zeros = s->kept_zeros = (struct mat){0};
    if (!symmetric) {
        s->zeros = arena_take(base, at, DTYPE_I8, rows, groups);
        s->kept_zeros = arena_take(base, at, DTYPE_I8, rows, groups);
    }
}

uint64_t tuned_sets_place(struct tuned_set sets[N_BLOCK_SETS], const struct model *m,
                          const struct recipe_plan *plan, int layer, void *base)
{
    uint64_t at = 0;
    for (int k = 0; k < N_BLOCK_SETS; k++) {
        sets[k] = (struct tuned_set){.set = set_of_block(plan, layer, k)};
        sets[k].rows = sets[k].set.rows * (k < N_FUSED ? 1 : m->gemma.n_experts);
        if (set_quantized(&sets[k].set))
            place_set(&sets[k], m, base, &at);
        else
            sets[k].set.n = 0;
    }
    return at;
}

uint64_t tuned_sets_bytes(const struct model *m, const struct recipe_plan *plan)
{
    uint64_t most = 0;
    for (int layer = 0; layer < (int)m->gemma.n_layers; layer++) {
        struct tuned_set unused[N_BLOCK_SETS];
        const uint64_t bytes = tuned_sets_place(unused, m, plan, layer, NULL);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* --- a block's weights ------------------------------------------------------------------------------------------ */

int tuned_piece(const struct tuned_set *s, int64_t row)
{
    int i = 0;
    while (row >= s->pieces[i].row + s->pieces[i].rows)
        i++;
    return i;
}

struct mat tuned_original(const struct tuned_set *s, int64_t row, int64_t n)
{
    char *at = (char *)s->copies + (size_t)(row * s->set.cols) * s->copy_bytes;
    return (struct mat){at, s->dtypes[tuned_piece(s, row)], n, s->set.cols, s->set.cols};
}

static size_t weight_bytes(const struct mat *w)
{
    CHECK(w->stride == w->cols);
    return (size_t)(w->rows * w->cols) * dtype_bytes(w->dtype);
}

/* A set's weights as the block holds them. */
static void find_pieces(struct tuned_set *s, int block_set, struct block *block)
{
    const enum gemma_fused kind = set_kind(block_set);
    if (block_set < N_FUSED) {
        s->n_pieces = set_pieces(&s->set, set_place(block, kind, SET_DENSE), s->pieces);
        return;
    }
    s->all = set_place(block, kind, 0)->whole;
    s->all.weight.rows = s->rows;
    s->pieces[0] = (struct piece){.linear = &s->all, .rows = s->rows};
    s->n_pieces = 1;
}

static void set_dtype(struct tuned_set *s, int piece, int block_set, struct block *block, enum dtype dtype)
{
    s->pieces[piece].linear->weight.dtype = dtype;
    for (int e = 0; block_set >= N_FUSED && e < block->n_experts; e++)
        set_place(block, set_kind(block_set), e)->whole.weight.dtype = dtype;
}

int tuned_sets_take(struct tuned_set sets[N_BLOCK_SETS], const struct backend *b, struct block *block)
{
    int rc = 0;
    for (int k = 0; k < N_BLOCK_SETS; k++) {
        struct tuned_set *s = &sets[k];
        if (s->set.n)
            find_pieces(s, k, block);
        for (int i = 0; !rc && i < s->n_pieces; i++) {
            const struct mat *w = &s->pieces[i].linear->weight;
            s->dtypes[i] = w->dtype;
            const struct mat copy = tuned_original(s, s->pieces[i].row, w->rows);
            rc = b->core->copy(b, copy.data, w->data, weight_bytes(w));
        }
    }
    return rc;
}

int tuned_sets_restore(struct tuned_set sets[N_BLOCK_SETS], const struct backend *b, struct block *block)
{
    int rc = 0;
    for (int k = 0; k < N_BLOCK_SETS; k++)
        for (int i = 0; !rc && i < sets[k].n_pieces; i++) {
            const struct piece *p = &sets[k].pieces[i];
            const struct mat w = tuned_original(&sets[k], p->row, p->rows);
            set_dtype(&sets[k], i, k, block, w.dtype);
            rc = b->core->copy(b, p->linear->weight.data, w.data, weight_bytes(&w));
        }
    return rc;
}

void tuned_sets_narrow(struct tuned_set sets[N_BLOCK_SETS], struct block *block)
{
    for (int k = 0; k < N_BLOCK_SETS; k++)
        for (int i = 0; i < sets[k].n_pieces; i++)
            set_dtype(&sets[k], i, k, block, sets[k].dtypes[i] == DTYPE_F16 ? DTYPE_BF16 : sets[k].dtypes[i]);
}

struct qmat tuned_grid(const struct tuned_set *s, const struct mat *scales, const struct mat *zeros,
                       int64_t row, int64_t n)
{
    struct qmat q = {.scales = mat_rows(scales, row, n),
                     .bits = s->set.members->scheme.bits,
                     .group = set_group(&s->set),
                     .cols = s->set.cols};
    if (zeros->data)
        q.zeros = mat_rows(zeros, row, n);
    return q;
}

int64_t tuned_first_row(const struct set *set)
{
    const int expert = set->members->tensor->expert;
    return expert < 0 ? 0 : expert * set->rows;
}

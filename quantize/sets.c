#include "quantize/sets.h"

#include "base/err.h"

/* The first linear of a layer; the plan is sorted by layer. */
static size_t first_of(const struct recipe_plan *plan, int layer)
{
    size_t low = 0, high = plan->n;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (plan->linears[middle].tensor->layer < layer)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct set set_find(const struct recipe_plan *plan, int layer, enum gemma_fused kind, int expert)
{
    struct set s = {0};
    for (size_t i = first_of(plan, layer); i < plan->n && plan->linears[i].tensor->layer == layer; i++) {
        const struct linear_plan *l = &plan->linears[i];
        if (l->tensor->expert != expert || gemma_fused_set(l->tensor->role) != kind)
            continue;
        if (!s.n++)
            s.members = l;
        s.rows += l->tensor->shape[0];
        s.cols = l->tensor->shape[1];
    }
    return s;
}

enum gemma_fused set_kind(int block_set)
{
    return block_set < N_FUSED                ? (enum gemma_fused)block_set
           : block_set == SET_EXPERTS_GATE_UP ? FUSED_GATE_UP
                                              : FUSED_DOWN;
}

struct set set_of_block(const struct recipe_plan *plan, int layer, int block_set)
{
    return set_find(plan, layer, set_kind(block_set), block_set < N_FUSED ? SET_DENSE : 0);
}

int set_in_block(const struct set *s)
{
    const struct gemma_tensor *t = s->members->tensor;
    const enum gemma_fused kind = gemma_fused_set(t->role);
    return t->expert < 0 ? (int)kind : kind == FUSED_DOWN ? SET_EXPERTS_DOWN : SET_EXPERTS_GATE_UP;
}

bool set_quantized(const struct set *s)
{
    return s->n && s->members->quantized;
}

int64_t set_group(const struct set *s)
{
    const struct quant_scheme scheme = s->members->scheme;
    return scheme.group ? scheme.group : s->cols;
}

struct linear_set *set_place(struct block *b, enum gemma_fused kind, int expert)
{
    if (expert >= 0)
        return kind == FUSED_DOWN ? &b->experts[expert].down : &b->experts[expert].gate_up;
    struct linear_set *const places[N_FUSED] = {
        [FUSED_QKV] = &b->qkv, [FUSED_O] = &b->o, [FUSED_GATE_UP] = &b->gate_up, [FUSED_DOWN] = &b->down};
    return places[kind];
}

int set_pieces(const struct set *s, struct linear_set *l, struct piece out[GPTQ_MAX_PARTS])
{
    CHECK(s->n <= GPTQ_MAX_PARTS);
    const int n = l->fused ? 1 : s->n;
    int64_t row = 0;
    for (int i = 0; i < n; i++) {
        out[i] = (struct piece){.linear = l->fused ? &l->whole : &l->parts[i], .first = i, .row = row};
        for (int k = i; k < (l->fused ? s->n : i + 1); k++) {
            const int64_t rows = s->members[k].tensor->shape[0];
            out[i].parts.rows[out[i].parts.n++] = rows;
            out[i].rows += rows;
        }
        row += out[i].rows;
    }
    return n;
}

/* --- results ---------------------------------------------------------------------------------------------------- */

struct result_bytes set_result_bytes(const struct set *s)
{
    const struct quant_scheme q = s->members->scheme;
    const size_t scales = (size_t)(s->rows * quant_groups(q, s->cols));
    return (struct result_bytes){(size_t)(s->rows * quant_packed_cols(q, s->cols)) * sizeof(uint32_t),
                                 scales * sizeof(uint16_t), q.symmetric ? 0 : scales};
}

static void grow_to(size_t *size, size_t need)
{
    *size = need > *size ? need : *size;
}

struct result_bytes sets_largest_result(const struct recipe_plan *plan)
{
    struct result_bytes most = {0};
    for (size_t i = 0; i < plan->n; i++) {
        const struct gemma_tensor *t = plan->linears[i].tensor;
        if (t->expert > 0) /* all are alike */
            continue;
        const struct set s = set_find(plan, t->layer, gemma_fused_set(t->role), t->expert);
        if (!set_quantized(&s))
            continue;
        const struct result_bytes bytes = set_result_bytes(&s);
        grow_to(&most.packed, bytes.packed);
        grow_to(&most.scales, bytes.scales);
        grow_to(&most.zeros, bytes.zeros);
    }
    return most;
}

static size_t rounded(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

size_t result_total(const struct result_bytes *r)
{
    return rounded(r->packed) + rounded(r->scales) + rounded(r->zeros);
}

struct qmat set_result(const struct set *s, void *const places[3], int64_t row, int64_t n)
{
    const struct quant_scheme scheme = s->members->scheme;
    const int64_t words = quant_packed_cols(scheme, s->cols), groups = quant_groups(scheme, s->cols);
    const struct mat packed = {places[0], DTYPE_I32, s->rows, words, words};
    const struct mat scales = {places[1], DTYPE_BF16, s->rows, groups, groups};
    const struct mat zeros = {places[2], DTYPE_I8, s->rows, groups, groups};
    struct qmat q = {.packed = mat_rows(&packed, row, n),
                     .scales = mat_rows(&scales, row, n),
                     .bits = scheme.bits,
                     .group = set_group(s),
                     .cols = s->cols};
    if (!scheme.symmetric)
        q.zeros = mat_rows(&zeros, row, n);
    return q;
}

struct qmat set_result_at(const struct set *s, void *base, int64_t row, int64_t n)
{
    const struct result_bytes bytes = set_result_bytes(s);
    char *scales = (char *)base + rounded(bytes.packed);
    return set_result(s, (void *const[]){base, scales, scales + rounded(bytes.scales)}, row, n);
}

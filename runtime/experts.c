#include "runtime/experts.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"
#include "runtime/block.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void experts_lay_out(struct experts_room *r, void *base, uint64_t *at, const struct gemma_config *c,
                     enum dtype act, int64_t tokens, int64_t rows)
{
    const int64_t h = c->hidden_size;
    if (!c->n_experts)
        return;
    r->max_tokens = tokens;
    r->max_rows = rows;
    r->normed = arena_take(base, at, act, tokens, h);
    r->logits = arena_take(base, at, DTYPE_F32, tokens, c->n_experts);
    r->sum = arena_take(base, at, DTYPE_F32, tokens, h);
    r->chosen = arena_take(base, at, DTYPE_I32, tokens, c->top_k);
    r->weights = arena_take(base, at, DTYPE_F32, tokens, c->top_k);
    r->order = arena_take(base, at, DTYPE_I32, 1, rows);
    r->slots = arena_take(base, at, DTYPE_I32, tokens, c->top_k);
    r->gathered = arena_take(base, at, act, rows, h);
    r->gate_up = arena_take(base, at, act, rows, 2 * c->expert_size);
    r->inner = mat_cols(&r->gate_up, 0, c->expert_size);
    r->results = r->gathered;
    r->places = (struct mat){0};
}

void experts_lay_out_kept(struct experts_room *r, void *base, uint64_t *at, const struct gemma_config *c,
                          enum dtype act, int64_t tokens, int64_t rows)
{
    experts_lay_out(r, base, at, c, act, tokens, rows);
    if (!c->n_experts)
        return;
    r->inner = arena_take(base, at, act, rows, c->expert_size);
    r->results = arena_take(base, at, act, rows, c->hidden_size);
    r->places = arena_take(base, at, DTYPE_I32, 1, rows);
}

int experts_open(struct experts_room *r, const struct gemma_config *c)
{
    if (!c->n_experts)
        return 0;
    r->host =
        mem_alloc((size_t)(2 * (r->max_tokens * c->top_k + r->max_rows)), sizeof *r->host, "tokens' experts");
    r->starts = mem_alloc((size_t)c->n_experts + 1, sizeof *r->starts, "tokens' experts");
    return r->host && r->starts ? 0 : ERR_MEMORY;
}

void experts_close(struct experts_room *r)
{
    free(r->host);
    free(r->starts);
    r->host = NULL;
    r->starts = NULL;
}

int experts_route(const struct weights *w, int layer, const struct experts_room *r, const struct mat *x,
                  const struct mat *chosen, const struct mat *weights)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const struct mat normed = mat_rows(&r->normed, 0, x->rows), logits = mat_rows(&r->logits, 0, x->rows);
    int rc = b->core->rms_norm(b, x, &k->router_scale, &spec, &normed);
    if (!rc)
        rc = b->core->gemm(b, &normed, &k->router, &logits);
    if (!rc) /* the router's inputs are divided by √hidden too */
        rc = b->core->scale(b, 1 / sqrtf((float)w->config.hidden_size), &logits, false, &logits);
    return rc ? rc : b->core->route(b, &logits, &k->expert_scales, chosen, weights);
}

/* Row i of those that are sorted: its expert (−1: none) and its token. */
static struct extra_row row_at(const struct expert_tokens *t, int64_t i, int top_k)
{
    const int64_t n = t->n * top_k;
    return i < n ? (struct extra_row){t->chosen[i], (int32_t)(i / top_k)} : t->extra[i - n];
}

int experts_assign(const struct weights *w, int layer, struct experts_room *r, const struct expert_tokens *t)
{
    const struct core_ops *core = w->backend->core;
    const struct block *k = &w->blocks[layer];
    const int64_t n = t->n * k->top_k, all = n + t->n_extra;
    int32_t *order = r->host + r->max_tokens * k->top_k, *places = order + r->max_rows,
            *slots = places + r->max_rows;
    int64_t *next = r->starts; /* shifted by one place, so that placing rows leaves the beginnings */
    CHECK(t->n <= r->max_tokens && all <= r->max_rows);
    memset(next, 0, ((size_t)k->n_experts + 1) * sizeof *next);
    for (int64_t i = 0; i < all; i++) {
        const int e = row_at(t, i, k->top_k).expert;
        if (e >= 0 && e + 2 <= k->n_experts)
            next[e + 2]++;
    }
    for (int e = 2; e <= k->n_experts; e++)
        next[e] += next[e - 1];
    for (int64_t i = 0; i < all; i++) {
        const struct extra_row at = row_at(t, i, k->top_k);
        if (at.expert < 0)
            continue;
        const int64_t row = next[at.expert + 1]++;
        order[row] = at.token;
        places[row] = (int32_t)i;
        if (i < n)
            slots[i] = (int32_t)row;
    }
    int rc = core->upload(w->backend, r->order.data, order, (size_t)all * sizeof *order);
    if (!rc && r->places.data)
        rc = core->upload(w->backend, r->places.data, places, (size_t)all * sizeof *places);
    return rc ? rc : core->upload(w->backend, r->slots.data, slots, (size_t)n * sizeof *slots);
}

int experts_gather(const struct weights *w, int layer, const struct experts_room *r, const struct mat *x)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const int64_t n = r->starts[k->n_experts];
    const struct mat normed = mat_rows(&r->normed, 0, x->rows), order = mat_cols(&r->order, 0, n),
                     gathered = mat_rows(&r->gathered, 0, n);
    const int rc = b->core->rms_norm(b, x, &k->pre_experts_norm, &spec, &normed);
    return rc ? rc : b->core->gather_rows(b, &normed, &order, NULL, &gathered);
}

struct mat experts_rows(const struct experts_room *r, const struct mat *m, int expert)
{
    return mat_rows(m, r->starts[expert], r->starts[expert + 1] - r->starts[expert]);
}

struct mat experts_input_rows(const struct experts_room *r, int expert)
{
    return experts_rows(r, &r->gathered, expert);
}

struct mat experts_inner_rows(const struct experts_room *r, int expert)
{
    return experts_rows(r, &r->inner, expert);
}

int experts_inner(const struct weights *w, int layer, const struct experts_room *r)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct mat all = mat_rows(&r->gate_up, 0, r->starts[k->n_experts]),
                     gate = mat_cols(&all, 0, k->expert_inner),
                     up = mat_cols(&all, k->expert_inner, k->expert_inner),
                     inner = mat_rows(&r->inner, 0, all.rows);
    int rc = 0;
    for (int e = 0; !rc && e < k->n_experts; e++) {
        const struct mat in = experts_input_rows(r, e), out = experts_rows(r, &r->gate_up, e);
        if (in.rows)
            rc = linear_set_forward(b, &k->experts[e].gate_up, &in, &out);
    }
    return rc ? rc : b->core->geglu(b, &gate, &up, &inner);
}

int experts_join(const struct weights *w, int layer, const struct experts_room *r, const struct mat *weights,
                 const struct mat *branch)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const int64_t tokens = branch->rows;
    const struct mat slots = mat_rows(&r->slots, 0, tokens), sum = mat_rows(&r->sum, 0, tokens),
                     mixed = mat_rows(&r->normed, 0, tokens);
    int rc = 0;
    for (int e = 0; !rc && e < k->n_experts; e++) {
        const struct mat in = experts_inner_rows(r, e), out = experts_rows(r, &r->results, e);
        if (in.rows)
            rc = linear_set_forward(b, &k->experts[e].down, &in, &out);
    }
    if (!rc)
        rc = b->core->combine_rows(b, &r->results, &slots, weights, &mixed);
    if (!rc)
        rc = b->core->rms_norm(b, branch, &k->post_dense_norm, &spec, &sum);
    if (!rc) /* the second norm's result is not wanted */
        rc = b->core->add_norm(b, &mixed, &k->post_experts_norm, &sum, NULL, &spec, branch);
    return rc ? rc : b->core->scale(b, 1, &sum, false, branch);
}

int experts_run(const struct weights *w, int layer, struct experts_room *r, const struct mat *x,
                const int32_t *chosen, const struct mat *weights, const struct mat *branch)
{
    int rc = experts_assign(w, layer, r, &(struct expert_tokens){.n = x->rows, .chosen = chosen});
    if (!rc)
        rc = experts_gather(w, layer, r, x);
    if (!rc)
        rc = experts_inner(w, layer, r);
    return rc ? rc : experts_join(w, layer, r, weights, branch);
}

int experts_add(const struct weights *w, int layer, struct experts_room *r, const struct mat *x,
                const struct mat *branch)
{
    const struct backend *b = w->backend;
    const int64_t tokens = x->rows;
    const struct mat chosen = mat_rows(&r->chosen, 0, tokens), weights = mat_rows(&r->weights, 0, tokens);
    int rc = experts_route(w, layer, r, x, &chosen, &weights);
    if (!rc)
        rc = b->core->download(b, r->host, chosen.data, (size_t)(tokens * chosen.cols) * sizeof *r->host);
    return rc ? rc : experts_run(w, layer, r, x, r->host, &weights, branch);
}

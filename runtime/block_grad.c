#include "runtime/block_grad.h"

#include "base/err.h"
#include "kernels/arena.h"

#include <math.h>

/* An expert may get any share of the tokens' rows. */
static void place_experts(struct block_tape *t, const struct gemma_config *c, enum dtype act, void *base,
                          uint64_t *at)
{
    const int64_t n = t->x.rows, rows = n * c->top_k;
    experts_lay_out_kept(&t->experts, base, at, c, act, n, rows);
    t->joined = arena_take(base, at, act, n, c->hidden_size);
    t->row_weights = arena_take(base, at, DTYPE_F32, 1, rows);
    t->dexpert_inner = arena_take(base, at, act, rows, c->expert_size);
    t->dlogits = arena_take(base, at, act, n, c->n_experts);
}

uint64_t block_tape_place(struct block_tape *t, const struct gemma_config *c, int layer, enum dtype act,
                          void *base, int64_t sequences, int64_t length)
{
    const struct gemma_layer *l = &c->layers[layer];
    const int64_t n = sequences * length, hidden = c->hidden_size, inner = l->intermediate_size,
                  heads = c->n_heads * l->head_dim, kv = l->n_kv_heads * l->head_dim;
    const int64_t qkv = heads + (l->kv_source != layer ? 0 : l->k_is_v ? 1 : 2) * kv;
    uint64_t at = 0;
    t->sequences = (struct sequences){sequences, 0, length};
    t->x = arena_take(base, &at, DTYPE_F32, n, hidden);
    t->middle = arena_take(base, &at, DTYPE_F32, n, hidden);
    t->out = arena_take(base, &at, DTYPE_F32, n, hidden);
    t->normed = arena_take(base, &at, act, n, hidden);
    t->mlp_normed = arena_take(base, &at, act, n, hidden);
    t->qkv = arena_take(base, &at, act, n, qkv);
    t->q = arena_take(base, &at, act, n, heads);
    t->keys = arena_take(base, &at, act, n, kv);
    t->values = arena_take(base, &at, act, n, kv);
    t->lse = arena_take(base, &at, DTYPE_F32, n, c->n_heads);
    t->attention = arena_take(base, &at, act, n, heads);
    t->o = arena_take(base, &at, act, n, hidden);
    t->gate_up = arena_take(base, &at, act, n, 2 * inner);
    t->inner = arena_take(base, &at, act, n, inner);
    t->down = arena_take(base, &at, act, n, hidden);
    t->input = (struct block_input){.sum = arena_take(base, &at, DTYPE_F32, n, c->ple_size),
                                    .input = arena_take(base, &at, act, n, c->ple_size),
                                    .gate = arena_take(base, &at, act, n, c->ple_size),
                                    .gated = arena_take(base, &at, act, n, c->ple_size)};
    t->added = arena_take(base, &at, act, n, c->ple_size ? hidden : 0);
    t->dx = t->out; /* the loss is known by then */
    t->dbranch = arena_take(base, &at, act, n, hidden);
    t->dinner = arena_take(base, &at, act, n, inner);
    t->dattention = arena_take(base, &at, act, n, heads);
    t->dq = arena_take(base, &at, act, n, heads);
    t->dkeys = arena_take(base, &at, act, n, kv);
    t->dvalues = arena_take(base, &at, act, n, kv);
    t->joined = t->down;
    if (c->n_experts)
        place_experts(t, c, act, base, &at);
    return at;
}

uint64_t block_tape_bytes(const struct gemma_config *c, enum dtype act, int64_t sequences, int64_t length)
{
    struct block_tape unused;
    uint64_t most = 0;
    for (int layer = 0; layer < (int)c->n_layers; layer++) {
        const uint64_t bytes = block_tape_place(&unused, c, layer, act, NULL, sequences, length);
        most = bytes > most ? bytes : most;
    }
    return most;
}

int block_tape_open(struct block_tape *t, const struct gemma_config *c, int64_t sequences, int64_t length)
{
    t->experts.max_tokens = sequences * length;
    t->experts.max_rows = t->experts.max_tokens * c->top_k;
    return experts_open(&t->experts, c);
}

void block_tape_close(struct block_tape *t)
{
    experts_close(&t->experts);
}

static size_t bytes_of(const struct mat *m)
{
    return (size_t)(m->rows * m->cols) * dtype_bytes(m->dtype);
}

/* --- forward ---------------------------------------------------------------------------------------------------- */

/* to = from + the branch, and what follows, as block_join has them */
static int add_branch(const struct weights *w, const struct mat *from, const struct mat *branch,
                      const struct mat *weight, const struct mat *to, const struct mat *next,
                      const struct mat *normed)
{
    const struct backend *b = w->backend;
    const int rc = b->core->copy(b, to->data, from->data, bytes_of(from));
    return rc ? rc : block_join(w, branch, weight, to, next, normed);
}

int block_grad_forward(const struct weights *w, int layer, struct block_tape *t)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const struct block_pass pass = {t->sequences, t->rope, t->qkv, t->q, t->keys, t->values, t->lse};
    int rc = b->core->rms_norm(b, &t->x, &k->input_norm, &spec, &t->normed);
    if (!rc)
        rc = block_attention(w, layer, &pass, &t->normed, &t->attention);
    if (!rc)
        rc = linear_set_forward(b, &k->o, &t->attention, &t->o);
    if (!rc)
        rc = add_branch(w, &t->x, &t->o, &k->post_attention_norm, &t->middle, &k->pre_mlp_norm,
                        &t->mlp_normed);
    if (!rc)
        rc = block_mlp(w, layer, &t->mlp_normed, &t->gate_up, &t->inner);
    if (!rc)
        rc = linear_set_forward(b, &k->down, &t->inner, &t->down);
    if (!rc && k->n_experts)
        rc = b->core->copy(b, t->joined.data, t->down.data, bytes_of(&t->down));
    if (!rc && k->n_experts)
        rc = experts_add(w, layer, &t->experts, &t->middle, &t->joined);
    if (!rc) /* the norm that follows belongs to the next block; its result is not kept */
        rc = add_branch(w, &t->middle, &t->joined, &k->post_mlp_norm, &t->out, NULL, &t->dbranch);
    if (!rc && k->ple_gate.data)
        rc = block_add_input(w, layer, &t->input, &t->added, &t->out, &t->dbranch);
    return rc || k->scalar == 1 ? rc : b->core->scale(b, k->scalar, &t->out, false, &t->out);
}

/* --- backward --------------------------------------------------------------------------------------------------- */

/* The linears of a set, as one or one by one. */
static int n_linears(const struct linear_set *s)
{
    return s->fused ? 1 : s->n;
}

static const struct mat *linear_weight(const struct linear_set *s, int i)
{
    const struct linear *l = s->fused ? &s->whole : &s->parts[i];
    CHECK(!l->quantized);
    return &l->weight;
}

/* Through a set of linears: dx (NULL: not wanted) by its input x, dw (data NULL) by its weights. */
static int set_backward(const struct backend *b, const struct linear_set *s, const struct mat *dy,
                        const struct mat *x, const struct mat *dx, bool add, const struct mat *dw)
{
    int rc = 0;
    for (int64_t i = 0, row = 0; !rc && i < n_linears(s); i++) {
        const struct mat *weight = linear_weight(s, (int)i);
        const struct mat part = mat_cols(dy, row, weight->rows);
        if (dx)
            rc = b->train->gemm_dgrad(b, &part, weight, i > 0, dx);
        if (!rc && dw->data) {
            const struct mat rows = mat_rows(dw, row, weight->rows);
            rc = b->train->gemm_wgrad(b, &part, x, add, &rows);
        }
        row += weight->rows;
    }
    return rc;
}

/* From the residual stream's gradient to a branch's, through its norm where it has one: t->dbranch. */
static int branch_backward(const struct weights *w, const struct mat *branch, const struct mat *weight,
                           const struct block_tape *t)
{
    const struct backend *b = w->backend;
    const struct norm_spec spec = block_norm(&w->config);
    return weight->data ? b->train->rms_norm_backward(b, branch, weight, &spec, &t->dx, NULL, &t->dbranch)
                        : b->core->scale(b, 1, &t->dx, false, &t->dbranch);
}

/* From the block's result to x behind the MLP's branch: its scalar, and what the layer's own input added. */
static int end_backward(const struct weights *w, int layer, const struct block_tape *t)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct block_input *in = &t->input;
    int rc = k->scalar == 1 ? 0 : b->core->scale(b, k->scalar, &t->dx, false, &t->dx);
    if (rc || !k->ple_gate.data)
        return rc;
    rc = branch_backward(w, &t->added, &k->ple_norm, t);
    if (!rc)
        rc = b->train->gemm_dgrad(b, &t->dbranch, &k->ple_projection, false, &in->gated);
    if (!rc) /* what the input gains by goes nowhere */
        rc = b->train->geglu_backward(b, &in->gate, &in->input, &in->gated, &in->gate, &in->input);
    if (!rc)
        rc = b->train->gemm_dgrad(b, &in->gate, &k->ple_gate, false, &t->dbranch);
    return rc ? rc : b->core->scale(b, 1, &t->dbranch, true, &t->dx);
}

/* --- experts ------------------------------------------------------------------------------------------------------ */

/* An expert's linears, from dy to dx, [rows of all experts, …] each; rows of an expert are rows of dw. */
static int expert_set_backward(const struct weights *w, int layer, const struct block_tape *t, int set,
                               const struct mat *dy, const struct mat *x, const struct mat *dx, bool add,
                               const struct mat *dw)
{
    const struct block *k = &w->blocks[layer];
    int rc = 0;
    for (int e = 0; !rc && e < k->n_experts; e++) {
        const struct linear_set *s = set == SET_EXPERTS_DOWN ? &k->experts[e].down : &k->experts[e].gate_up;
        const struct mat rows = experts_rows(&t->experts, dy, e), in = experts_rows(&t->experts, x, e),
                         out = experts_rows(&t->experts, dx, e);
        const struct mat own = dw->data ? mat_rows(dw, e * s->whole.weight.rows, s->whole.weight.rows) : *dw;
        rc = set_backward(w->backend, s, &rows, &in, rows.rows ? &out : NULL, add, &own);
    }
    return rc;
}

/* From the sum's gradient, in t->joined, to that of every expert's inputs, which takes the results' place. */
static int rows_backward(const struct weights *w, int layer, struct block_tape *t, bool add,
                         const struct block_grads *g)
{
    const struct backend *b = w->backend;
    const struct experts_room *r = &t->experts;
    const int64_t n = r->max_rows, width = w->blocks[layer].expert_inner;
    const struct mat gate = mat_cols(&r->gate_up, 0, width), up = mat_cols(&r->gate_up, width, width);
    const struct mat weights = {r->weights.data, DTYPE_F32, n, 1, 1},
                     row_weights = {t->row_weights.data, DTYPE_F32, n, 1, 1};
    int rc = b->core->gather_rows(b, &weights, &r->places, NULL, &row_weights);
    if (!rc)
        rc = b->core->gather_rows(b, &t->joined, &r->order, &t->row_weights, &r->results);
    if (!rc)
        rc = expert_set_backward(w, layer, t, SET_EXPERTS_DOWN, &r->results, &r->inner, &t->dexpert_inner,
                                 add, &g->sets[SET_EXPERTS_DOWN]);
    if (!rc)
        rc = b->train->geglu_backward(b, &gate, &up, &t->dexpert_inner, &gate, &up);
    return rc ? rc
              : expert_set_backward(w, layer, t, SET_EXPERTS_GATE_UP, &r->gate_up, &r->gathered, &r->results,
                                    add, &g->sets[SET_EXPERTS_GATE_UP]);
}

/* t->dx gains by what the router read. */
static int router_backward(const struct weights *w, int layer, struct block_tape *t)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct experts_room *r = &t->experts;
    const struct norm_spec spec = block_norm(&w->config);
    const struct route_tape tape = {r->logits, k->expert_scales, r->chosen, r->results, r->slots};
    int rc = b->train->route_backward(b, &tape, &t->joined, &r->logits);
    if (!rc)
        rc = b->core->scale(b, 1 / sqrtf((float)w->config.hidden_size), &r->logits, false, &t->dlogits);
    if (!rc)
        rc = b->train->gemm_dgrad(b, &t->dlogits, &k->router, false, &r->normed);
    return rc ? rc
              : b->train->rms_norm_backward(b, &t->middle, &k->router_scale, &spec, &r->normed, &t->dx,
                                            &t->dx);
}

/* t->dbranch: from the gradient by t->joined to that by the MLP's result. t->dx gains by what the experts and their router
 * read. */
static int experts_backward(const struct weights *w, int layer, struct block_tape *t, bool add,
                            const struct block_grads *g)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct experts_room *r = &t->experts;
    const struct norm_spec spec = block_norm(&w->config);
    /* what the experts give together is not needed beyond its norm, nor is what came of it */
    int rc = b->train->rms_norm_backward(b, &r->normed, &k->post_experts_norm, &spec, &t->dbranch, NULL,
                                         &t->joined);
    if (!rc)
        rc = b->train->rms_norm_backward(b, &t->down, &k->post_dense_norm, &spec, &t->dbranch, NULL,
                                         &t->dbranch);
    if (!rc)
        rc = router_backward(w, layer, t);
    if (!rc)
        rc = rows_backward(w, layer, t, add, g);
    if (!rc)
        rc = b->core->combine_rows(b, &r->results, &r->slots, NULL, &r->normed);
    return rc ? rc
              : b->train->rms_norm_backward(b, &t->middle, &k->pre_experts_norm, &spec, &r->normed, &t->dx,
                                            &t->dx);
}

/* --- branches ----------------------------------------------------------------------------------------------------- */

static int mlp_backward(const struct weights *w, int layer, struct block_tape *t, bool add,
                        const struct block_grads *g)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const int64_t width = k->inner;
    const struct mat gate = mat_cols(&t->gate_up, 0, width), up = mat_cols(&t->gate_up, width, width);
    int rc = branch_backward(w, &t->joined, &k->post_mlp_norm, t);
    if (!rc && k->n_experts)
        rc = experts_backward(w, layer, t, add, g);
    if (!rc)
        rc = set_backward(b, &k->down, &t->dbranch, &t->inner, &t->dinner, add, &g->sets[FUSED_DOWN]);
    if (!rc)
        rc = b->train->geglu_backward(b, &gate, &up, &t->dinner, &gate, &up);
    if (!rc)
        rc = set_backward(b, &k->gate_up, &t->gate_up, &t->mlp_normed, &t->dbranch, add,
                          &g->sets[FUSED_GATE_UP]);
    return rc ? rc
              : b->train->rms_norm_backward(b, &t->middle, &k->pre_mlp_norm, &spec, &t->dbranch, &t->dx,
                                            &t->dx);
}

static int attention_backward(const struct weights *w, int layer, struct block_tape *t, bool add,
                              const struct block_grads *g)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct qkv_spec split = block_split(w, layer, &t->sequences, t->rope);
    const struct attention_spec attend = {split.heads, t->sequences, k->score_scale, k->window, k->softcap};
    const bool own = k->kv_source == layer; /* else what the keys and values gain by goes nowhere */
    const struct attention_tape tape = {t->q, t->keys, t->values, t->attention, t->lse};
    int rc = branch_backward(w, &t->o, &k->post_attention_norm, t);
    if (!rc)
        rc = set_backward(b, &k->o, &t->dbranch, &t->attention, &t->dattention, add, &g->sets[FUSED_O]);
    if (!rc)
        rc = b->train->attention_backward(b, &attend, &tape, &t->dattention, &t->dq, &t->dkeys, &t->dvalues);
    return rc ? rc
              : b->train->split_qkv_backward(b, &split, &t->qkv, &t->dq, own ? &t->dkeys : NULL,
                                             own ? &t->dvalues : NULL, &t->qkv);
}

int block_grad_backward(const struct weights *w, int layer, struct block_tape *t, bool add, bool with_input,
                        const struct block_grads *g)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    int rc = end_backward(w, layer, t);
    if (!rc)
        rc = mlp_backward(w, layer, t, add, g);
    if (!rc)
        rc = attention_backward(w, layer, t, add, g);
    if (!rc)
        rc = set_backward(b, &k->qkv, &t->qkv, &t->normed, with_input ? &t->dbranch : NULL, add,
                          &g->sets[FUSED_QKV]);
    return rc || !with_input
               ? rc
               : b->train->rms_norm_backward(b, &t->x, &k->input_norm, &spec, &t->dbranch, &t->dx, &t->dx);
}

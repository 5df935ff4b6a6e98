#include "runtime/forward.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"
#include "runtime/block.h"
#include "runtime/experts.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

/* Views into one allocation, planned once: nothing is acquired while tokens run. */
struct forward {
    const struct weights *w;
    struct forward_size size;
    int64_t n_sequences, position;
    struct buf memory;
    struct mat x; /* [tokens, hidden], the residual stream */
    struct mat normed, branch, qkv, q, attention,
        gate_up; /* [tokens, …], as wide as the widest layer needs */
    struct experts_room experts;
    struct block_input input;     /* data NULL where layers have no inputs of their own */
    struct mat rope[GEMMA_KINDS]; /* [max_rows, head_dim] of global and sliding layers */
    struct mat *keys, *values;    /* [n_layers] of [sequences·max_positions, kv] */
    forward_observer observer;
    void *observer_ctx;
};

/* Lays out everything; with f = NULL only the size is computed. */
static uint64_t plan(const struct gemma_config *c, enum dtype act, const struct forward_size *size,
                     struct forward *f)
{
    const struct gemma_widths widest = gemma_widest(c);
    const int64_t tokens = size->n_sequences * size->max_rows,
                  slots = size->n_sequences * size->max_positions;
    struct forward unused;
    struct forward *p = f ? f : &unused;
    char *base = f ? f->memory.ptr : NULL;
    uint64_t at = 0;
    p->x = arena_take(base, &at, DTYPE_F32, tokens, c->hidden_size);
    p->normed = arena_take(base, &at, act, tokens, c->hidden_size);
    p->branch = arena_take(base, &at, act, tokens, c->hidden_size);
    p->qkv = arena_take(base, &at, act, tokens, widest.qkv);
    p->q = arena_take(base, &at, act, tokens, widest.q);
    p->attention = arena_take(base, &at, act, tokens, widest.q);
    p->gate_up = arena_take(base, &at, act, tokens, 2 * widest.inner);
    experts_lay_out(&p->experts, base, &at, c, act, tokens, tokens * c->top_k);
    if (c->ple_size) {
        p->input.x0 = arena_take(base, &at, act, tokens, c->hidden_size);
        p->input.sum = arena_take(base, &at, DTYPE_F32, tokens, c->ple_size);
        p->input.input = arena_take(base, &at, act, tokens, c->ple_size);
        p->input.gate = arena_take(base, &at, act, tokens, c->ple_size);
    }
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        p->rope[kind] = arena_take(base, &at, DTYPE_F32, size->max_rows, c->rope_dim[kind]);
    for (int64_t i = 0; i < c->n_layers; i++) {
        const struct gemma_layer *l = &c->layers[i];
        if (l->kv_source != i) { /* before it */
            if (f) {
                f->keys[i] = f->keys[l->kv_source];
                f->values[i] = f->values[l->kv_source];
            }
            continue;
        }
        const struct mat keys = arena_take(base, &at, act, slots, l->n_kv_heads * l->head_dim),
                         values = arena_take(base, &at, act, slots, l->n_kv_heads * l->head_dim);
        if (f) {
            f->keys[i] = keys;
            f->values[i] = values;
        }
    }
    return at;
}

uint64_t forward_bytes(const struct gemma_config *c, const struct backend *b, const struct forward_size *size)
{
    return plan(c, b->activation, size, NULL);
}

int forward_open(struct forward **out, const struct weights *w, const struct forward_size *size)
{
    *out = NULL;
    CHECK(size->n_sequences >= 1 && size->max_rows >= 1 && size->max_positions >= size->max_rows);
    struct forward *f = mem_alloc(1, sizeof *f, "a forward pass");
    if (!f)
        return ERR_MEMORY;
    *f = (struct forward){.w = w, .size = *size, .n_sequences = size->n_sequences};
    const size_t n = (size_t)w->config.n_layers;
    f->keys = mem_alloc(n, sizeof *f->keys, "the KV cache");
    f->values = mem_alloc(n, sizeof *f->values, "the KV cache");
    int rc = f->keys && f->values ? 0 : ERR_MEMORY;
    if (!rc)
        rc = w->backend->core->acquire(w->backend, (size_t)forward_bytes(&w->config, w->backend, size),
                                       "activations and KV cache", &f->memory);
    if (!rc) {
        plan(&w->config, w->backend->activation, size, f);
        rc = experts_open(&f->experts, &w->config);
    }
    if (rc < 0) {
        forward_close(f);
        return rc;
    }
    *out = f;
    return 0;
}

void forward_close(struct forward *f)
{
    if (!f)
        return;
    if (f->memory.ptr)
        f->w->backend->core->release(f->w->backend, &f->memory);
    experts_close(&f->experts);
    free(f->keys);
    free(f->values);
    free(f);
}

void forward_begin(struct forward *f, int64_t n_sequences)
{
    CHECK(n_sequences >= 1 && n_sequences <= f->size.n_sequences);
    f->n_sequences = n_sequences;
    f->position = 0;
}

int64_t forward_position(const struct forward *f)
{
    return f->position;
}

void forward_observe(struct forward *f, forward_observer observer, void *ctx)
{
    f->observer = observer;
    f->observer_ctx = ctx;
}

/* A branch reads RMSNorm(x); its output is normed again and added to the residual stream. The norm that the next
 * branch begins with follows at once, while the row is at hand. n: tokens of a sequence. */
static int attention_branch(struct forward *f, int layer, int64_t n)
{
    const struct block *k = &f->w->blocks[layer];
    const int64_t tokens = f->n_sequences * n;
    const struct mat x = mat_rows(&f->x, 0, tokens), normed = mat_rows(&f->normed, 0, tokens),
                     branch = mat_rows(&f->branch, 0, tokens), widest = mat_rows(&f->attention, 0, tokens),
                     attention = mat_cols(&widest, 0, block_heads(k));
    const struct block_pass pass = {.sequences = {f->n_sequences, f->position, f->size.max_positions},
                                    .rope = &f->rope[k->rope],
                                    .qkv = mat_rows(&f->qkv, 0, tokens),
                                    .q = mat_rows(&f->q, 0, tokens),
                                    .keys = f->keys[layer],
                                    .values = f->values[layer]};
    int rc = block_attention(f->w, layer, &pass, &normed, &attention);
    if (!rc)
        rc = linear_set_forward(f->w->backend, &k->o, &attention, &branch);
    return rc ? rc : block_join(f->w, &branch, &k->post_attention_norm, &x, &k->pre_mlp_norm, &normed);
}

/* ids: of these tokens */
static int mlp_branch(struct forward *f, int layer, int64_t n, const int32_t *ids)
{
    const struct block *k = &f->w->blocks[layer];
    const int64_t tokens = f->n_sequences * n;
    const struct mat x = mat_rows(&f->x, 0, tokens), normed = mat_rows(&f->normed, 0, tokens),
                     branch = mat_rows(&f->branch, 0, tokens), widest = mat_rows(&f->gate_up, 0, tokens),
                     gate_up = mat_cols(&widest, 0, 2 * k->inner), inner = mat_cols(&gate_up, 0, k->inner);
    const struct mat *next =
        layer + 1 < f->w->config.n_layers ? &f->w->blocks[layer + 1].input_norm : &f->w->final_norm;
    struct block_input input = f->input;
    if (f->w->config.ple_size)
        input = (struct block_input){.table = f->w->per_layer.table,
                                     .ids = ids,
                                     .x0 = mat_rows(&input.x0, 0, tokens),
                                     .sum = mat_rows(&input.sum, 0, tokens),
                                     .input = mat_rows(&input.input, 0, tokens),
                                     .gate = mat_rows(&input.gate, 0, tokens)};
    input.gated = input.gate;
    int rc = block_mlp(f->w, layer, &normed, &gate_up, &inner);
    if (!rc)
        rc = linear_set_forward(f->w->backend, &k->down, &inner, &branch);
    if (!rc && k->n_experts)
        rc = experts_add(f->w, layer, &f->experts, &x, &branch);
    if (!rc && f->w->config.ple_size)
        rc = block_make_input(f->w, layer, &input);
    return rc ? rc : block_end(f->w, layer, &input, &branch, &x, next, &normed);
}

/* x = E[id]·√hidden, and what of it the layers' own inputs need. The scale is √hidden itself here; BF16 runtimes round it
 * to BF16. */
static int embed(struct forward *f, const int32_t *ids, const struct mat *x)
{
    const struct gemma_config *c = &f->w->config;
    const struct backend *b = f->w->backend;
    const int rc = b->core->embed(b, &f->w->embedding, ids, sqrtf((float)c->hidden_size), x);
    if (rc < 0 || !c->ple_size)
        return rc;
    const struct mat x0 = mat_rows(&f->input.x0, 0, x->rows);
    return b->core->scale(b, 1, x, false, &x0);
}

int forward_run(struct forward *f, const int32_t *ids, int64_t n, struct mat *hidden)
{
    const struct gemma_config *c = &f->w->config;
    const struct backend *b = f->w->backend;
    CHECK(n >= 1 && n <= f->size.max_rows);
    if (n > f->size.max_positions - f->position)
        return err_set(ERR_USAGE, "the sequence has %" PRId64 " tokens, expected at most %" PRId64,
                       f->position + n, f->size.max_positions);
    const struct mat x = mat_rows(&f->x, 0, f->n_sequences * n),
                     normed = mat_rows(&f->normed, 0, f->n_sequences * n);
    const struct norm_spec norm = block_norm(c);
    int rc = embed(f, ids, &x);
    for (int i = 0; !rc && i < GEMMA_KINDS; i++) {
        const struct mat table = mat_rows(&f->rope[i], 0, n);
        rc = b->core->rope_table(b, f->w->inv_freq[i], f->position, &table);
    }
    if (!rc)
        rc = b->core->rms_norm(b, &x, &f->w->blocks[0].input_norm, &norm, &normed);
    for (int layer = 0; !rc && layer < c->n_layers; layer++) {
        rc = attention_branch(f, layer, n);
        if (!rc)
            rc = mlp_branch(f, layer, n, ids);
        if (!rc && f->observer)
            rc = f->observer(f->observer_ctx, layer, &x);
    }
    if (!rc)
        f->position += n;
    *hidden = normed;
    return rc;
}

int forward_logits(const struct weights *w, const struct mat *hidden, const struct mat *logits)
{
    const struct backend *b = w->backend;
    const int rc = b->core->gemm(b, hidden, &w->embedding, logits);
    return rc || !(w->config.final_softcap > 0) ? rc
                                                : b->core->softcap(b, logits, (float)w->config.final_softcap);
}

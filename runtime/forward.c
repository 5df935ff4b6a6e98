#include "runtime/forward.h"

#include "base/err.h"
#include "base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

/* Views into one allocation, planned once: nothing is acquired while tokens run. */
struct forward {
    const struct weights *w;
    int64_t max_positions, max_rows, position;
    struct buf memory;
    struct mat x, normed, q, attention, gate, up, branch; /* [max_rows, …] */
    struct mat rope[2];        /* [max_rows, head_dim] of global and sliding layers */
    struct mat *keys, *values; /* [n_layers] of [max_positions, kv] */
    forward_observer observer;
    void *observer_ctx;
};

/* Takes [rows, cols] floats from the plan at *offset, aligned to 64 bytes; base NULL: only counts. */
static struct mat take(char *base, uint64_t *offset, int64_t rows, int64_t cols)
{
    const struct mat m = {base ? base + *offset : NULL, DTYPE_F32, rows, cols, cols};
    *offset += ((uint64_t)(rows * cols) * sizeof(float) + 63) / 64 * 64;
    return m;
}

/* Lays out everything; with f = NULL only the size is computed. */
static uint64_t plan(const struct weights *w, int64_t max_positions, int64_t max_rows, struct forward *f)
{
    const struct gemma_config *c = &w->config;
    const int64_t heads = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    struct forward unused;
    struct forward *p = f ? f : &unused;
    char *base = f ? f->memory.ptr : NULL;
    uint64_t at = 0;
    p->x = take(base, &at, max_rows, c->hidden_size);
    p->normed = take(base, &at, max_rows, c->hidden_size);
    p->branch = take(base, &at, max_rows, c->hidden_size);
    p->q = take(base, &at, max_rows, heads);
    p->attention = take(base, &at, max_rows, heads);
    p->gate = take(base, &at, max_rows, c->intermediate_size);
    p->up = take(base, &at, max_rows, c->intermediate_size);
    p->rope[0] = take(base, &at, max_rows, c->head_dim);
    p->rope[1] = take(base, &at, max_rows, c->head_dim);
    for (int64_t i = 0; i < c->n_layers; i++) {
        const struct mat keys = take(base, &at, max_positions, kv),
                         values = take(base, &at, max_positions, kv);
        if (f) {
            f->keys[i] = keys;
            f->values[i] = values;
        }
    }
    return at;
}

uint64_t forward_bytes(const struct weights *w, int64_t max_positions, int64_t max_rows)
{
    return plan(w, max_positions, max_rows, NULL);
}

int forward_open(struct forward **out, const struct weights *w, int64_t max_positions, int64_t max_rows)
{
    *out = NULL;
    CHECK(max_rows >= 1 && max_positions >= max_rows);
    struct forward *f = mem_alloc(1, sizeof *f, "a forward pass");
    if (!f)
        return ERR_MEMORY;
    *f = (struct forward){.w = w, .max_positions = max_positions, .max_rows = max_rows};
    const size_t n = (size_t)w->config.n_layers;
    f->keys = mem_alloc(n, sizeof *f->keys, "the KV cache");
    f->values = mem_alloc(n, sizeof *f->values, "the KV cache");
    int rc = f->keys && f->values ? 0 : ERR_MEMORY;
    if (!rc)
        rc = w->backend->core->acquire(w->backend, (size_t)forward_bytes(w, max_positions, max_rows),
                                       "activations and KV cache", &f->memory);
    if (rc < 0) {
        forward_close(f);
        return rc;
    }
    plan(w, max_positions, max_rows, f);
    *out = f;
    return 0;
}

void forward_close(struct forward *f)
{
    if (!f)
        return;
    if (f->memory.ptr)
        f->w->backend->core->release(f->w->backend, &f->memory);
    free(f->keys);
    free(f->values);
    free(f);
}

void forward_reset(struct forward *f)
{
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

/* The first n rows, and rows [first, first + n). */
static struct mat rows_of(const struct mat *m, int64_t first, int64_t n)
{
    struct mat v = *m;
    v.data = (float *)m->data + first * m->stride;
    v.rows = n;
    return v;
}

/* Every head of x [n, heads·d] as a row of its own: [n·heads, d]. Only for matrices without a gap between rows. */
static struct mat heads_of(const struct mat *x, int head_dim)
{
    CHECK(x->stride == x->cols && x->cols % head_dim == 0);
    return (struct mat){x->data, x->dtype, x->rows * (x->cols / head_dim), head_dim, head_dim};
}

/* A branch reads RMSNorm(x); its output is normed again and added to the residual stream. */
static int attention_branch(struct forward *f, int layer, int64_t n, const struct norm_spec *norm)
{
    const struct block *k = &f->w->blocks[layer];
    const struct backend *b = f->w->backend;
    const struct mat x = rows_of(&f->x, 0, n), normed = rows_of(&f->normed, 0, n), q = rows_of(&f->q, 0, n);
    const struct mat keys = rows_of(&f->keys[layer], f->position, n),
                     values = rows_of(&f->values[layer], f->position, n);
    const struct mat attention = rows_of(&f->attention, 0, n), branch = rows_of(&f->branch, 0, n);
    const struct mat q_heads = heads_of(&q, k->head_dim), k_heads = heads_of(&keys, k->head_dim);
    const struct attention_spec spec = {.n_heads = k->n_heads,
                                        .n_kv_heads = k->n_kv_heads,
                                        .head_dim = k->head_dim,
                                        .scale = k->score_scale,
                                        .window = k->window,
                                        .first_position = f->position};
    int rc = b->core->rms_norm(b, &x, &k->input_norm, norm, NULL, &normed);
    if (!rc)
        rc = linear_forward(b, &k->q, &normed, &q);
    if (!rc)
        rc = linear_forward(b, &k->k, &normed, &keys);
    if (!rc)
        rc = linear_forward(b, &k->v, &normed, &values);
    if (!rc)
        rc = b->core->rms_norm(b, &q_heads, &k->q_norm, norm, NULL, &q_heads);
    if (!rc)
        rc = b->core->rms_norm(b, &k_heads, &k->k_norm, norm, NULL, &k_heads);
    if (!rc)
        rc = b->core->rope(b, &q, k->head_dim, &f->rope[k->rope]);
    if (!rc)
        rc = b->core->rope(b, &keys, k->head_dim, &f->rope[k->rope]);
    if (!rc)
        rc = b->core->attention(b, &spec, &q, &f->keys[layer], &f->values[layer], &attention);
    if (!rc)
        rc = linear_forward(b, &k->o, &attention, &branch);
    return rc ? rc : b->core->rms_norm(b, &branch, &k->post_attention_norm, norm, &x, &x);
}

static int mlp_branch(struct forward *f, int layer, int64_t n, const struct norm_spec *norm)
{
    const struct block *k = &f->w->blocks[layer];
    const struct backend *b = f->w->backend;
    const struct mat x = rows_of(&f->x, 0, n), normed = rows_of(&f->normed, 0, n),
                     branch = rows_of(&f->branch, 0, n);
    const struct mat gate = rows_of(&f->gate, 0, n), up = rows_of(&f->up, 0, n);
    int rc = b->core->rms_norm(b, &x, &k->pre_mlp_norm, norm, NULL, &normed);
    if (!rc)
        rc = linear_forward(b, &k->gate, &normed, &gate);
    if (!rc)
        rc = linear_forward(b, &k->up, &normed, &up);
    if (!rc)
        rc = b->core->geglu(b, &gate, &up, &gate);
    if (!rc)
        rc = linear_forward(b, &k->down, &gate, &branch);
    return rc ? rc : b->core->rms_norm(b, &branch, &k->post_mlp_norm, norm, &x, &x);
}

int forward_run(struct forward *f, const int32_t *ids, int64_t n, struct mat *hidden)
{
    const struct gemma_config *c = &f->w->config;
    const struct backend *b = f->w->backend;
    CHECK(n >= 1 && n <= f->max_rows);
    if (n > f->max_positions - f->position)
        return err_set(ERR_USAGE, "the sequence has %" PRId64 " tokens, expected at most %" PRId64,
                       f->position + n, f->max_positions);
    const struct mat x = rows_of(&f->x, 0, n);
    const struct norm_spec norm = {.eps = (float)c->rms_norm_eps, .unit_offset = true};
    /* the scale is √hidden itself here; BF16 runtimes round it to BF16 */
    int rc = b->core->embed(b, &f->w->embedding, ids, sqrtf((float)c->hidden_size), &x);
    for (int i = 0; !rc && i < 2; i++) {
        const struct mat table = rows_of(&f->rope[i], 0, n);
        rc = b->core->rope_table(b, f->w->inv_freq[i], f->position, &table);
    }
    for (int layer = 0; !rc && layer < c->n_layers; layer++) {
        rc = attention_branch(f, layer, n, &norm);
        if (!rc)
            rc = mlp_branch(f, layer, n, &norm);
        if (!rc && f->observer)
            rc = f->observer(f->observer_ctx, layer, &x);
    }
    *hidden = rows_of(&f->normed, 0, n);
    if (!rc)
        rc = b->core->rms_norm(b, &x, &f->w->final_norm, &norm, NULL, hidden);
    if (!rc)
        f->position += n;
    return rc;
}

int forward_logits(const struct weights *w, const struct mat *hidden, const struct mat *logits)
{
    return w->backend->core->gemm(w->backend, hidden, &w->embedding, logits);
}

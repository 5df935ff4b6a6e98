#include "runtime/block.h"

#include <math.h>

struct norm_spec block_norm(const struct gemma_config *c)
{
    return (struct norm_spec){.eps = (float)c->rms_norm_eps, .unit_offset = !c->family->plain_norms};
}

int64_t block_heads(const struct block *k)
{
    return (int64_t)k->n_heads * k->head_dim;
}

struct qkv_spec block_split(const struct weights *w, int layer, const struct sequences *sequences,
                            const struct mat *rope)
{
    const struct block *k = &w->blocks[layer];
    return (struct qkv_spec){.heads = {k->n_heads, k->n_kv_heads, k->head_dim},
                             .sequences = *sequences,
                             .norm = block_norm(&w->config),
                             .q_norm = k->q_norm.data ? &k->q_norm : NULL,
                             .k_norm = k->k_norm.data ? &k->k_norm : NULL,
                             .rope = rope,
                             .k_is_v = k->k_is_v,
                             .values_normed = k->values_normed};
}

int block_attention(const struct weights *w, int layer, const struct block_pass *pass,
                    const struct mat *normed, const struct mat *out)
{
    const struct block *k = &w->blocks[layer];
    const struct backend *b = w->backend;
    const bool own = k->kv_source == layer;
    const struct qkv_spec split = block_split(w, layer, &pass->sequences, pass->rope);
    const struct attention_spec attend = {split.heads, pass->sequences, k->score_scale, k->window,
                                          k->softcap};
    const int64_t kv_cols = (int64_t)k->n_kv_heads * k->head_dim * (!own ? 0 : k->k_is_v ? 1 : 2);
    const struct mat q = mat_cols(&pass->q, 0, block_heads(k)),
                     qkv = mat_cols(&pass->qkv, 0, q.cols + kv_cols);
    int rc = linear_set_forward(b, &k->qkv, normed, &qkv);
    if (!rc)
        rc = b->core->split_qkv(b, &split, &qkv, &q, own ? &pass->keys : NULL, own ? &pass->values : NULL);
    return rc ? rc
              : b->core->attention(b, &attend, &q, &pass->keys, &pass->values, out,
                                   pass->lse.data ? &pass->lse : NULL);
}

int block_mlp(const struct weights *w, int layer, const struct mat *normed, const struct mat *gate_up,
              const struct mat *out)
{
    const int64_t width = w->blocks[layer].inner;
    const struct mat gate = mat_cols(gate_up, 0, width), up = mat_cols(gate_up, width, width);
    const int rc = linear_set_forward(w->backend, &w->blocks[layer].gate_up, normed, gate_up);
    return rc ? rc : w->backend->core->geglu(w->backend, &gate, &up, out);
}

int block_join(const struct weights *w, const struct mat *branch, const struct mat *post_norm,
               const struct mat *x, const struct mat *next, const struct mat *normed)
{
    const struct backend *b = w->backend;
    const struct norm_spec spec = block_norm(&w->config);
    if (post_norm->data)
        return b->core->add_norm(b, branch, post_norm, x, next, &spec, normed);
    const int rc = b->core->scale(b, 1, branch, true, x);
    return rc ? rc : b->core->rms_norm(b, x, next, &spec, normed);
}

/* --- layers' own inputs ------------------------------------------------------------------------------------------- */

/* in->input = (RMSNorm(P·x0 / √hidden)·norm + E[id]·√ple) / √2, of the layer's rows of P and columns of E. The division by
 * √hidden is in the ε of a norm that follows: RMSNorm(x·s) with ε is RMSNorm(x) with ε/s². */
int block_make_input(const struct weights *w, int layer, const struct block_input *in)
{
    const struct backend *b = w->backend;
    const struct gemma_config *c = &w->config;
    const struct mat table = mat_cols(&in->table, layer * c->ple_size, c->ple_size),
                     projection = mat_rows(&w->per_layer.projection, layer * c->ple_size, c->ple_size);
    struct norm_spec spec = block_norm(c);
    spec.eps *= (float)c->hidden_size;
    int rc = b->core->embed(b, &table, in->ids, sqrtf((float)c->ple_size), &in->sum);
    if (!rc)
        rc = b->core->gemm(b, &in->x0, &projection, &in->gate);
    if (!rc) /* the second norm's result is not wanted */
        rc = b->core->add_norm(b, &in->gate, &w->per_layer.norm, &in->sum, NULL, &spec, &in->input);
    return rc ? rc : b->core->scale(b, sqrtf(0.5f), &in->sum, false, &in->input);
}

/* x += RMSNorm(W_projection·(gelu(W_gate·x) ⊙ input))·norm */
int block_add_input(const struct weights *w, int layer, const struct block_input *in,
                    const struct mat *branch, const struct mat *x, const struct mat *normed)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    int rc = b->core->scale(b, 1, x, false, normed);
    if (!rc)
        rc = b->core->gemm(b, normed, &k->ple_gate, &in->gate);
    if (!rc)
        rc = b->core->geglu(b, &in->gate, &in->input, &in->gated);
    if (!rc)
        rc = b->core->gemm(b, &in->gated, &k->ple_projection, branch);
    return rc ? rc : block_join(w, branch, &k->ple_norm, x, NULL, normed);
}

int block_end(const struct weights *w, int layer, const struct block_input *input, const struct mat *branch,
              const struct mat *x, const struct mat *next, const struct mat *normed)
{
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const bool more = k->ple_gate.data || k->scalar != 1;
    int rc = block_join(w, branch, &k->post_mlp_norm, x, more ? NULL : next, normed);
    if (!rc && k->ple_gate.data)
        rc = block_add_input(w, layer, input, branch, x, normed);
    if (!rc && more)
        rc = b->core->scale(b, k->scalar, x, false, x);
    return rc || !more ? rc : b->core->rms_norm(b, x, next, &spec, normed);
}

#include "runtime/block.h"

struct norm_spec block_norm(const struct gemma_config *c)
{
    return (struct norm_spec){.eps = (float)c->rms_norm_eps, .unit_offset = true};
}

int block_attention(const struct weights *w, int layer, const struct block_pass *pass,
                    const struct mat *normed, const struct mat *out)
{
    const struct block *k = &w->blocks[layer];
    const struct backend *b = w->backend;
    const struct heads heads = {k->n_heads, k->n_kv_heads, k->head_dim};
    const struct qkv_spec split = {heads,      pass->sequences, block_norm(&w->config),
                                   &k->q_norm, &k->k_norm,      pass->rope};
    const struct attention_spec attend = {heads, pass->sequences, k->score_scale, k->window};
    int rc = linear_set_forward(b, &k->qkv, normed, &pass->qkv);
    if (!rc)
        rc = b->core->split_qkv(b, &split, &pass->qkv, &pass->q, &pass->keys, &pass->values);
    return rc ? rc
              : b->core->attention(b, &attend, &pass->q, &pass->keys, &pass->values, out,
                                   pass->lse.data ? &pass->lse : NULL);
}

int block_mlp(const struct weights *w, int layer, const struct mat *normed, const struct mat *gate_up,
              const struct mat *out)
{
    const int64_t width = w->config.intermediate_size;
    const struct mat gate = mat_cols(gate_up, 0, width), up = mat_cols(gate_up, width, width);
    const int rc = linear_set_forward(w->backend, &w->blocks[layer].gate_up, normed, gate_up);
    return rc ? rc : w->backend->core->geglu(w->backend, &gate, &up, out);
}

/* The tensors that a model's language part consists of, by its settings. */
#include "runtime/gemma.h"

#include "base/err.h"
#include "base/mem.h"
#include "base/text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One of a block, or of what surrounds the blocks. */
struct entry {
    const char *name; /* without ".weight" */
    enum gemma_role role;
    int64_t rows, cols; /* cols 0: a vector */
    bool absent;        /* not in this model, or this layer */
};

/* where: what stands before the names */
static int add_tensors(struct gemma_tensors *out, const char *where, int layer, int expert,
                       const struct entry *entries, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const struct entry *e = &entries[i];
        const char *end = e->role == GEMMA_SCALAR || e->role == GEMMA_ROUTER_SCALE ? "" : ".weight";
        if (e->absent)
            continue;
        char *name = mem_printf("%s%s%s", where, e->name, end);
        if (!name)
            return ERR_MEMORY;
        out->list[out->n++] = (struct gemma_tensor){.name = name,
                                                    .role = e->role,
                                                    .layer = layer,
                                                    .expert = expert,
                                                    .n_dims = e->cols ? 2 : 1,
                                                    .shape = {e->rows, e->cols}};
    }
    return 0;
}

enum { BLOCK_TENSORS = 23, EXPERT_TENSORS = 3, OUTER_TENSORS = 5 };

static int add_block(struct gemma_tensors *out, const struct gemma_config *c, const char *prefix, int layer)
{
    const struct gemma_layer *l = &c->layers[layer];
    const struct gemma_family *f = c->family;
    const int64_t h = c->hidden_size, ffn = l->intermediate_size, d = l->head_dim, ple = c->ple_size;
    const int64_t q = c->n_heads * d, kv = l->n_kv_heads * d;
    const int64_t inner = c->expert_size;
    const bool shared = l->kv_source != layer, dense = !c->n_experts;
    const struct entry block[BLOCK_TENSORS] = {
        {"input_layernorm", GEMMA_NORM, h, 0, false},
        {"self_attn.q_proj", GEMMA_Q, q, h, false},
        {"self_attn.k_proj", GEMMA_K, kv, h, shared},
        {"self_attn.v_proj", GEMMA_V, kv, h, shared || l->k_is_v},
        {"self_attn.q_norm", GEMMA_NORM, d, 0, f->no_qk_norm},
        {"self_attn.k_norm", GEMMA_NORM, d, 0, f->no_qk_norm || shared},
        {"self_attn.o_proj", GEMMA_O, h, q, false},
        {"post_attention_layernorm", GEMMA_NORM, h, 0, false},
        {"pre_feedforward_layernorm", GEMMA_NORM, h, 0, f->two_norms},
        {"mlp.gate_proj", GEMMA_GATE, ffn, h, false},
        {"mlp.up_proj", GEMMA_UP, ffn, h, false},
        {"mlp.down_proj", GEMMA_DOWN, h, ffn, false},
        {"post_feedforward_layernorm", GEMMA_NORM, h, 0, f->two_norms},
        {"post_feedforward_layernorm_1", GEMMA_NORM, h, 0, dense},
        {"pre_feedforward_layernorm_2", GEMMA_NORM, h, 0, dense},
        {"post_feedforward_layernorm_2", GEMMA_NORM, h, 0, dense},
        {"router.proj", GEMMA_ROUTER, c->n_experts, h, dense},
        {"router.scale", GEMMA_ROUTER_SCALE, h, 0, dense},
        {"router.per_expert_scale", GEMMA_ROUTER_SCALE, c->n_experts, 0, dense},
        {"per_layer_input_gate", GEMMA_PER_LAYER, ple, h, !ple},
        {"per_layer_projection", GEMMA_PER_LAYER, h, ple, !ple},
        {"post_per_layer_input_norm", GEMMA_NORM, h, 0, !ple},
        {"layer_scalar", GEMMA_SCALAR, 1, 0, !f->varied},
    };
    const struct entry expert[EXPERT_TENSORS] = {
        {"gate_proj", GEMMA_GATE, inner, h, false},
        {"up_proj", GEMMA_UP, inner, h, false},
        {"down_proj", GEMMA_DOWN, h, inner, false},
    };
    char *where = mem_printf("%slayers.%d.", prefix, layer);
    int rc = where ? add_tensors(out, where, layer, -1, block, BLOCK_TENSORS) : ERR_MEMORY;
    free(where);
    for (int e = 0; !rc && e < (int)c->n_experts; e++) {
        where = mem_printf("%slayers.%d.experts.%d.", prefix, layer, e);
        rc = where ? add_tensors(out, where, layer, e, expert, EXPERT_TENSORS) : ERR_MEMORY;
        free(where);
    }
    return rc;
}

int gemma_tensors(struct gemma_tensors *out, const struct gemma_config *c, const char *prefix)
{
    const int64_t h = c->hidden_size, ple = c->ple_size;
    const struct entry outer[OUTER_TENSORS] = {
        {"embed_tokens", GEMMA_EMBEDDING, c->vocab_size, h, false},
        {"embed_tokens_per_layer", GEMMA_PER_LAYER, c->vocab_size, c->n_layers * ple, !ple},
        {"per_layer_model_projection", GEMMA_PER_LAYER, c->n_layers * ple, h, !ple},
        {"per_layer_projection_norm", GEMMA_NORM, ple, 0, !ple},
        {"norm", GEMMA_NORM, h, 0, false},
    };
    *out = (struct gemma_tensors){0};
    out->list = mem_alloc(OUTER_TENSORS +
                              (BLOCK_TENSORS + EXPERT_TENSORS * (size_t)c->n_experts) * (size_t)c->n_layers,
                          sizeof *out->list, "the model's tensor list");
    int rc = out->list ? add_tensors(out, prefix, -1, -1, outer, OUTER_TENSORS - 1) : ERR_MEMORY;
    for (int layer = 0; !rc && layer < (int)c->n_layers; layer++)
        rc = add_block(out, c, prefix, layer);
    if (!rc)
        rc = add_tensors(out, prefix, -1, -1, outer + OUTER_TENSORS - 1, 1);
    if (rc < 0)
        gemma_tensors_free(out);
    return rc;
}

const char *gemma_name_in_layer(const struct gemma_config *c, const char *prefix, const char *name,
                                int *layer)
{
    static const char layers[] = "layers.";
    const size_t n = strlen(prefix);
    if (strncmp(name, prefix, n) || strncmp(name + n, layers, sizeof layers - 1))
        return NULL;
    char *end;
    const long long i = strtoll(name + n + sizeof layers - 1, &end, 10);
    if (i < 0 || i >= c->n_layers || *end != '.')
        return NULL;
    *layer = (int)i;
    return end + 1;
}

bool gemma_is_dead(const struct gemma_config *c, const char *prefix, const char *name)
{
    int layer;
    const char *own = gemma_name_in_layer(c, prefix, name, &layer);
    return own && c->layers[layer].kv_source != layer &&
           (!strncmp(own, "self_attn.k_proj.", 17) || !strncmp(own, "self_attn.v_proj.", 17));
}

void gemma_tensors_free(struct gemma_tensors *t)
{
    for (size_t i = 0; i < t->n; i++)
        free(t->list[i].name);
    free(t->list);
    *t = (struct gemma_tensors){0};
}

int gemma_prefix(const char **prefix, const struct gemma_config *cfg, const struct checkpoint *ck)
{
    struct text tried = {0};
    for (int i = 0; i < GEMMA_MAX_PREFIXES && cfg->family->prefixes[i]; i++) {
        char name[128];
        snprintf(name, sizeof name, "%sembed_tokens.weight", cfg->family->prefixes[i]);
        if (checkpoint_tensor(ck, name)) {
            *prefix = cfg->family->prefixes[i];
            text_free(&tried);
            return 0;
        }
        text_printf(&tried, "%s'%s'", i ? " or " : "", name);
    }
    const int rc = err_set(ERR_FORMAT, "%s: has no tensor %s, which every %s has", ck->folder,
                           tried.data ? tried.data : "", cfg->family->title);
    text_free(&tried);
    return rc;
}

bool gemma_is_linear(enum gemma_role role)
{
    return role >= GEMMA_Q;
}

enum gemma_fused gemma_fused_set(enum gemma_role role)
{
    switch (role) {
    case GEMMA_Q:
    case GEMMA_K:
    case GEMMA_V:
        return FUSED_QKV;
    case GEMMA_O:
        return FUSED_O;
    case GEMMA_GATE:
    case GEMMA_UP:
        return FUSED_GATE_UP;
    default:
        CHECK(role == GEMMA_DOWN);
        return FUSED_DOWN;
    }
}

char *gemma_module(const struct gemma_tensor *t)
{
    const size_t n = strlen(t->name), suffix = strlen(".weight");
    CHECK(n > suffix);
    return mem_strndup(t->name, n - suffix);
}

#include "runtime/gemma.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Defaults are those of the transformers classes: released Gemma 3 multimodal configs omit most keys. */
#define GEMMA3_TEXT_DEFAULTS                                                                                 \
    .vocab_size = 262208, .hidden_size = 2304, .intermediate_size = 9216, .n_layers = 26, .n_heads = 8,      \
    .n_kv_heads = 4, .head_dim = 256, .sliding_window = 4096, .sliding_pattern = 6, .max_positions = 131072, \
    .query_pre_attn_scalar = 256, .rope_theta = 1e6, .rope_local_theta = 1e4

static const struct gemma_family families[] = {
    {.title = "Gemma 3",
     .model_type = "gemma3_text",
     .prefixes = {"model."},
     .ignores = {"re:.*lm_head", "lm_head"},
     GEMMA3_TEXT_DEFAULTS},
    {.title = "Gemma 3 multimodal",
     .model_type = "gemma3",
     .text_model_type = "gemma3_text",
     .prefixes = {"language_model.model.", "model.language_model."},
     .ignores = {"re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head", "lm_head"},
     GEMMA3_TEXT_DEFAULTS},
};
static const size_t n_families = sizeof families / sizeof *families;

/* Bounds that no Gemma comes near; they keep products of sizes far from overflow. */
static const int64_t max_size = 1 << 24, max_layers = 4096;

static int find_family(const struct gemma_family **out, const struct hf_config *cfg)
{
    struct text known = {0};
    for (size_t i = 0; i < n_families; i++) {
        const struct gemma_family *f = &families[i];
        if (!strcmp(f->model_type, cfg->model_type) && (!f->text_model_type || !*cfg->text_model_type ||
                                                        !strcmp(f->text_model_type, cfg->text_model_type))) {
            *out = f;
            text_free(&known);
            return 0;
        }
        text_printf(&known, "%s%s (%s)", i ? ", " : "", f->model_type, f->title);
    }
    const int rc =
        err_set(ERR_UNSUPPORTED, "%s: model_type '%s' (%s) is not supported; supported: %s", cfg->path,
                cfg->model_type, *cfg->architecture ? cfg->architecture : "no architecture named",
                known.data ? known.data : "");
    text_free(&known);
    return rc;
}

static int read_sizes(struct gemma_config *c, const struct hf_config *cfg)
{
    const struct gemma_family *f = c->family;
    const struct json t = cfg->text_config;
    const struct {
        const char *key;
        int64_t max, fallback, *out;
    } sizes[] = {
        {"vocab_size", max_size, f->vocab_size, &c->vocab_size},
        {"hidden_size", max_size, f->hidden_size, &c->hidden_size},
        {"intermediate_size", max_size, f->intermediate_size, &c->intermediate_size},
        {"num_hidden_layers", max_layers, f->n_layers, &c->n_layers},
        {"num_attention_heads", max_layers, f->n_heads, &c->n_heads},
        {"num_key_value_heads", max_layers, f->n_kv_heads, &c->n_kv_heads},
        {"head_dim", max_layers, f->head_dim, &c->head_dim},
        {"sliding_window", max_size, f->sliding_window, &c->sliding_window},
        {"max_position_embeddings", INT32_MAX, f->max_positions, &c->max_positions},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int rc = json_opt_int(t, sizes[i].key, 1, sizes[i].max, sizes[i].fallback, sizes[i].out);
        if (rc < 0)
            return rc;
    }
    if (c->n_heads % c->n_kv_heads)
        return json_error(t, "has %lld attention heads, not a multiple of its %lld key/value heads",
                          (long long)c->n_heads, (long long)c->n_kv_heads);
    return 0;
}

/* RoPE bases: "rope_parameters" by layer type (newer), or rope_theta, rope_local_base_freq and rope_scaling. */
static int read_rope(struct gemma_config *c, struct json t)
{
    const struct json by_type = json_member(t, "rope_parameters");
    const struct json global = json_exists(by_type) ? json_member(by_type, "full_attention") : t;
    const struct json local = json_exists(by_type) ? json_member(by_type, "sliding_attention") : t;
    const struct json scaling = json_exists(by_type) ? global : json_member(t, "rope_scaling");
    const char *local_key = json_exists(by_type) ? "rope_theta" : "rope_local_base_freq", *type;
    int rc = json_opt_double(global, "rope_theta", c->family->rope_theta, &c->rope_theta);
    if (!rc)
        rc = json_opt_double(local, local_key, c->family->rope_local_theta, &c->rope_local_theta);
    c->rope_factor = 1;
    if (rc < 0 || !json_exists(scaling))
        return rc;
    if ((rc = json_opt_string(scaling, "type", "default", &type)) < 0 ||
        (rc = json_opt_string(scaling, "rope_type", type, &type)) < 0)
        return rc;
    if (!strcmp(type, "linear"))
        return json_get_double(scaling, "factor", &c->rope_factor);
    if (strcmp(type, "default"))
        return err_set(ERR_UNSUPPORTED, "%s: RoPE type '%s' is not supported for %s", json_path(scaling),
                       type, c->family->title);
    return 0;
}

static int read_layer_types(struct gemma_config *c, struct json t)
{
    if (!(c->is_sliding = mem_alloc((size_t)c->n_layers, sizeof *c->is_sliding, "layer types")))
        return ERR_MEMORY;
    int64_t pattern;
    int rc = json_opt_int(t, "_sliding_window_pattern", 1, max_layers, c->family->sliding_pattern, &pattern);
    if (!rc)
        rc = json_opt_int(t, "sliding_window_pattern", 1, max_layers, pattern, &pattern);
    if (rc < 0)
        return rc;
    for (int64_t i = 0; i < c->n_layers; i++)
        c->is_sliding[i] = (i + 1) % pattern != 0;
    const struct json types = json_member(t, "layer_types");
    if (!json_exists(types))
        return 0;
    if (!json_is_array(types) || json_count(types) != (size_t)c->n_layers)
        return json_error(types, "is not a list of %lld layer types", (long long)c->n_layers);
    size_t i = 0;
    for (struct json e = json_first(types); e.node; e = json_next(e), i++) {
        const char *type;
        if ((rc = json_as_string(e, &type)) < 0)
            return rc;
        if (strcmp(type, "sliding_attention") && strcmp(type, "full_attention"))
            return json_error(e, "is '%s', expected sliding_attention or full_attention", type);
        c->is_sliding[i] = type[0] == 's';
    }
    return 0;
}

/* Settings that would change the mathematics: a Gemma 3 that sets one of them is not the Gemma 3 we know. */
static int refuse_unknown_maths(const struct hf_config *cfg)
{
    static const char *const null_expected[] = {"attn_logit_softcapping", "final_logit_softcapping"};
    static const char *const false_expected[] = {"attention_bias", "use_bidirectional_attention"};
    const struct json t = cfg->text_config;
    for (size_t i = 0; i < 2; i++) {
        if (json_exists(json_member(t, null_expected[i])))
            return err_set(ERR_UNSUPPORTED, "%s: '%s' is set, which is not supported for %s", cfg->path,
                           null_expected[i], cfg->model_type);
        bool set;
        const int rc = json_opt_bool(t, false_expected[i], false, &set);
        if (rc < 0)
            return rc;
        if (set)
            return err_set(ERR_UNSUPPORTED, "%s: '%s' is true, which is not supported for %s", cfg->path,
                           false_expected[i], cfg->model_type);
    }
    const char *act;
    int rc = json_opt_string(t, "hidden_activation", "gelu_pytorch_tanh", &act);
    if (!rc && strcmp(act, "gelu_pytorch_tanh"))
        rc = err_set(ERR_UNSUPPORTED,
                     "%s: hidden_activation '%s' is not supported, expected gelu_pytorch_tanh", cfg->path,
                     act);
    return rc;
}

int gemma_config_read(struct gemma_config *c, const struct hf_config *cfg)
{
    *c = (struct gemma_config){0};
    const struct json t = cfg->text_config;
    int rc = find_family(&c->family, cfg);
    if (!rc)
        rc = refuse_unknown_maths(cfg);
    if (!rc)
        rc = read_sizes(c, cfg);
    if (!rc)
        rc = json_opt_double(t, "rms_norm_eps", 1e-6, &c->rms_norm_eps);
    if (!rc)
        rc = json_opt_double(t, "query_pre_attn_scalar", c->family->query_pre_attn_scalar,
                             &c->query_pre_attn_scalar);
    if (!rc)
        rc = read_rope(c, t);
    if (!rc)
        rc = read_layer_types(c, t);
    if (rc < 0)
        gemma_config_free(c);
    return rc;
}

void gemma_config_free(struct gemma_config *c)
{
    free(c->is_sliding);
    *c = (struct gemma_config){0};
}

/* --- tensors -------------------------------------------------------------------------------------------------- */

static int add_tensor(struct gemma_tensors *out, char *name, enum gemma_role role, int layer, int64_t rows,
                      int64_t cols)
{
    if (!name)
        return ERR_MEMORY;
    out->list[out->n++] = (struct gemma_tensor){
        .name = name, .role = role, .layer = layer, .n_dims = cols ? 2 : 1, .shape = {rows, cols}};
    return 0;
}

int gemma_tensors(struct gemma_tensors *out, const struct gemma_config *c, const char *prefix)
{
    const int64_t h = c->hidden_size, ffn = c->intermediate_size, d = c->head_dim;
    const int64_t q = c->n_heads * d, kv = c->n_kv_heads * d;
    const struct {
        const char *name;
        enum gemma_role role;
        int64_t rows, cols;
    } block[] = {
        {"input_layernorm", GEMMA_NORM, h, 0},
        {"self_attn.q_proj", GEMMA_Q, q, h},
        {"self_attn.k_proj", GEMMA_K, kv, h},
        {"self_attn.v_proj", GEMMA_V, kv, h},
        {"self_attn.q_norm", GEMMA_NORM, d, 0},
        {"self_attn.k_norm", GEMMA_NORM, d, 0},
        {"self_attn.o_proj", GEMMA_O, h, q},
        {"post_attention_layernorm", GEMMA_NORM, h, 0},
        {"pre_feedforward_layernorm", GEMMA_NORM, h, 0},
        {"mlp.gate_proj", GEMMA_GATE, ffn, h},
        {"mlp.up_proj", GEMMA_UP, ffn, h},
        {"mlp.down_proj", GEMMA_DOWN, h, ffn},
        {"post_feedforward_layernorm", GEMMA_NORM, h, 0},
    };
    const size_t n_block = sizeof block / sizeof *block;
    *out = (struct gemma_tensors){0};
    out->list = mem_alloc(2 + n_block * (size_t)c->n_layers, sizeof *out->list, "the model's tensor list");
    int rc = out->list ? 0 : ERR_MEMORY;
    if (!rc)
        rc = add_tensor(out, mem_printf("%sembed_tokens.weight", prefix), GEMMA_EMBEDDING, -1, c->vocab_size,
                        h);
    for (int layer = 0; layer < c->n_layers; layer++)
        for (size_t i = 0; !rc && i < n_block; i++)
            rc = add_tensor(out, mem_printf("%slayers.%d.%s.weight", prefix, layer, block[i].name),
                            block[i].role, layer, block[i].rows, block[i].cols);
    if (!rc)
        rc = add_tensor(out, mem_printf("%snorm.weight", prefix), GEMMA_NORM, -1, h, 0);
    if (rc < 0)
        gemma_tensors_free(out);
    return rc;
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

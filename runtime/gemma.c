#include "runtime/gemma.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Defaults are those of the transformers classes: released Gemma 3 multimodal configs omit most keys. */
#define GEMMA1_DEFAULTS                                                                                      \
    .vocab_size = 256000, .hidden_size = 3072, .intermediate_size = 24576, .n_layers = 28, .n_heads = 16,    \
    .n_kv_heads = 16, .head_dim = 256, .sliding_window = 4096, .sliding_pattern = 1, .max_positions = 8192,  \
    .rope = {{1e4, 1, 1}, {1e4, 1, 1}}, .one_rope = true, .two_norms = true, .no_qk_norm = true

#define GEMMA2_DEFAULTS                                                                                      \
    .vocab_size = 256000, .hidden_size = 2304, .intermediate_size = 9216, .n_layers = 26, .n_heads = 8,      \
    .n_kv_heads = 4, .head_dim = 256, .sliding_window = 4096, .sliding_pattern = 2, .max_positions = 8192,   \
    .query_pre_attn_scalar = 256, .rope = {{1e4, 1, 1}, {1e4, 1, 1}}, .one_rope = true,                      \
    .attention_softcap = 50, .final_softcap = 30, .attention_softcap_is_set = true,                          \
    .final_softcap_is_set = true, .no_qk_norm = true

#define GEMMA3_DEFAULTS                                                                                      \
    .vocab_size = 262208, .hidden_size = 2304, .intermediate_size = 9216, .n_layers = 26, .n_heads = 8,      \
    .n_kv_heads = 4, .head_dim = 256, .sliding_window = 4096, .sliding_pattern = 6, .max_positions = 131072, \
    .query_pre_attn_scalar = 256, .rope = {{1e6, 1, 1}, {1e4, 1, 1}}, .pattern_is_set = true

#define GEMMA4_DEFAULTS                                                                                      \
    .vocab_size = 262144, .hidden_size = 2304, .intermediate_size = 9216, .n_layers = 30, .n_heads = 8,      \
    .n_kv_heads = 4, .head_dim = 256, .sliding_pattern = 6, .query_pre_attn_scalar = 1,                      \
    .rope = {{1e6, 1, 0.25}, {1e4, 1, 1}}, .final_softcap_is_set = true, .plain_norms = true, .varied = true

static const struct gemma_family families[] = {
    {.title = "Gemma 1",
     .model_type = "gemma",
     .prefixes = {"model."},
     .ignores = {"re:.*lm_head", "lm_head"},
     GEMMA1_DEFAULTS},
    {.title = "Gemma 2",
     .model_type = "gemma2",
     .prefixes = {"model."},
     .ignores = {"re:.*lm_head", "lm_head"},
     GEMMA2_DEFAULTS},
    {.title = "Gemma 3",
     .model_type = "gemma3_text",
     .prefixes = {"model."},
     .ignores = {"re:.*lm_head", "lm_head"},
     GEMMA3_DEFAULTS},
    {.title = "Gemma 3 multimodal",
     .model_type = "gemma3",
     .text_model_type = "gemma3_text",
     .prefixes = {"language_model.model.", "model.language_model."},
     .ignores = {"re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head", "lm_head"},
     GEMMA3_DEFAULTS},
    {.title = "Gemma 4",
     .model_type = "gemma4_text",
     .sliding_window = 512,
     .max_positions = 131072,
     .ple_size = 256,
     .prefixes = {"model."},
     .ignores = {"re:.*per_layer_.*", "re:.*lm_head", "lm_head"},
     GEMMA4_DEFAULTS},
    {.title = "Gemma 4 multimodal",
     .model_type = "gemma4",
     .text_model_type = "gemma4_text",
     .sliding_window = 512,
     .max_positions = 131072,
     .ple_size = 256,
     .prefixes = {"model.language_model."},
     .ignores = {"re:.*per_layer_.*", "re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*embed_vision.*",
                 "re:.*embed_audio.*", "re:.*lm_head", "lm_head"},
     GEMMA4_DEFAULTS},
    {.title = "Gemma 4 unified",
     .model_type = "gemma4_unified",
     .text_model_type = "gemma4_unified_text",
     .sliding_window = 1024,
     .max_positions = 262144,
     .prefixes = {"model.language_model."},
     .ignores = {"re:.*per_layer_.*", "re:.*vision_embedder.*", "re:.*embed_vision.*", "re:.*embed_audio.*",
                 "re:.*lm_head", "lm_head"},
     GEMMA4_DEFAULTS},
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
        int64_t min, max, fallback, *out;
    } sizes[] = {
        {"vocab_size", 1, max_size, f->vocab_size, &c->vocab_size},
        {"hidden_size", 1, max_size, f->hidden_size, &c->hidden_size},
        {"intermediate_size", 1, max_size, f->intermediate_size, &c->intermediate_size},
        {"num_hidden_layers", 1, max_layers, f->n_layers, &c->n_layers},
        {"num_attention_heads", 1, max_layers, f->n_heads, &c->n_heads},
        {"num_key_value_heads", 1, max_layers, f->n_kv_heads, &c->n_kv_heads},
        {"head_dim", 1, max_layers, f->head_dim, &c->head_dim},
        {"sliding_window", 1, max_size, f->sliding_window, &c->sliding_window},
        {"max_position_embeddings", 1, INT32_MAX, f->max_positions, &c->max_positions},
        {"hidden_size_per_layer_input", 0, max_size, f->ple_size, &c->ple_size},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int rc =
            json_opt_int(t, sizes[i].key, sizes[i].min, sizes[i].max, sizes[i].fallback, sizes[i].out);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* One kind of layers' positions; what is missing stays as it is. */
static int read_rope_kind(struct gemma_rope *r, const char *theta_key, struct json thetas,
                          struct json scaling, const struct gemma_family *f)
{
    const char *type;
    int rc = json_opt_double(thetas, theta_key, r->theta, &r->theta);
    if (rc < 0 || !json_exists(scaling))
        return rc;
    if ((rc = json_opt_string(scaling, "type", "default", &type)) < 0 ||
        (rc = json_opt_string(scaling, "rope_type", type, &type)) < 0)
        return rc;
    r->rotated = 1;
    if (!strcmp(type, "linear"))
        return json_get_double(scaling, "factor", &r->factor);
    if (f->varied && !strcmp(type, "proportional")) {
        rc = json_opt_double(scaling, "partial_rotary_factor", 1, &r->rotated);
        if (!rc)
            rc = json_opt_double(scaling, "factor", 1, &r->factor);
        if (!rc && !(r->rotated >= 0 && r->rotated <= 1))
            rc = json_error(scaling, "has a partial_rotary_factor of %g, expected 0 … 1", r->rotated);
        return rc;
    }
    if (strcmp(type, "default"))
        return err_set(ERR_UNSUPPORTED, "%s: RoPE type '%s' is not supported for %s", json_path(scaling),
                       type, f->title);
    return 0;
}

/* RoPE bases: "rope_parameters", by layer type where a family has two (newer), or rope_theta, rope_local_base_freq and
 * rope_scaling. */
static int read_rope(struct gemma_config *c, struct json t)
{
    const struct gemma_family *f = c->family;
    const struct json parameters = json_member(t, "rope_parameters"), none = {0};
    const bool newer = json_exists(parameters),
               by_type = newer && !json_exists(json_member(parameters, "rope_theta"));
    int rc = 0;
    for (int kind = 0; !rc && kind < GEMMA_KINDS; kind++) {
        static const char *const types[GEMMA_KINDS] = {"full_attention", "sliding_attention"};
        const bool local = kind == GEMMA_SLIDING && !f->one_rope;
        struct gemma_rope *r = &c->rope[kind];
        *r = f->rope[kind];
        if (newer) {
            const struct json own = by_type       ? json_member(parameters, types[kind])
                                    : f->one_rope ? parameters
                                                  : none;
            rc = read_rope_kind(r, "rope_theta", own, own, f);
        } else {
            rc = read_rope_kind(r, local ? "rope_local_base_freq" : "rope_theta", t,
                                local ? none : json_member(t, "rope_scaling"), f);
        }
        if (!rc && !(r->theta > 0 && r->factor > 0))
            rc = json_error(t, "has RoPE with θ = %g and factor %g, expected positive ones", r->theta,
                            r->factor);
    }
    return rc;
}

/* --- layers ----------------------------------------------------------------------------------------------------- */

static int read_layer_types(struct gemma_config *c, struct json t)
{
    int64_t pattern = c->family->sliding_pattern;
    int rc = 0;
    if (c->family->pattern_is_set)
        rc = json_opt_int(t, "_sliding_window_pattern", 1, max_layers, pattern, &pattern);
    if (!rc && c->family->pattern_is_set)
        rc = json_opt_int(t, "sliding_window_pattern", 1, max_layers, pattern, &pattern);
    if (rc < 0)
        return rc;
    for (int64_t i = 0; i < c->n_layers; i++)
        c->layers[i].sliding = (i + 1) % pattern != 0;
    const struct json types = json_member(t, "layer_types");
    if (!json_exists(types) || c->family->two_norms) /* Gemma 1 has no windows */
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
        c->layers[i].sliding = type[0] == 's';
    }
    return 0;
}

/* "per_layer_config": {"05": {"head_dim": 512, …}, …}, as transformers writes it. */
static int read_overrides(struct gemma_config *c, struct json overrides)
{
    for (struct json e = json_first(overrides); e.node; e = json_next(e)) {
        char *end;
        const long long i = strtoll(json_key(e), &end, 10);
        if (!*json_key(e) || *end || i < 0 || i >= c->n_layers)
            return json_error(e, "is not the number of a layer, expected 0 … %lld",
                              (long long)c->n_layers - 1);
        for (struct json m = json_first(e); m.node; m = json_next(m)) {
            struct gemma_layer *l = &c->layers[i];
            int64_t *const out = !strcmp(json_key(m), "head_dim")              ? &l->head_dim
                                 : !strcmp(json_key(m), "num_key_value_heads") ? &l->n_kv_heads
                                                                               : NULL;
            if (!out)
                return err_set(ERR_UNSUPPORTED, "%s: is set, which is not supported for %s", json_path(m),
                               c->family->title);
            const int rc = json_as_int(m, 1, max_layers, out);
            if (rc < 0)
                return rc;
        }
    }
    return 0;
}

/* Global layers' heads, in either of the two dialects that config.json comes in. */
static int read_heads(struct gemma_config *c, struct json t)
{
    bool k_is_v;
    int64_t head_dim, n_kv_heads;
    int rc = json_opt_bool(t, "attention_k_eq_v", false, &k_is_v);
    if (!rc)
        rc = json_opt_int(t, "global_head_dim", 1, max_layers, 512, &head_dim);
    if (!rc)
        rc = json_opt_int(t, "num_global_key_value_heads", 1, max_layers, c->n_kv_heads, &n_kv_heads);
    const struct json overrides = json_member(t, "per_layer_config");
    for (int64_t i = 0; !rc && i < c->n_layers; i++) {
        struct gemma_layer *l = &c->layers[i];
        l->k_is_v = k_is_v && !l->sliding;
        if (l->sliding || json_exists(overrides))
            continue;
        l->head_dim = head_dim;
        l->n_kv_heads = k_is_v ? n_kv_heads : c->n_kv_heads;
    }
    return rc ? rc : read_overrides(c, overrides);
}

/* The last layers read the keys and values of the last one of their kind that has its own. */
static int read_sharing(struct gemma_config *c, struct json t)
{
    int64_t n_shared;
    bool double_wide;
    int rc = json_opt_int(t, "num_kv_shared_layers", 0, c->n_layers - 1, 0, &n_shared);
    if (!rc)
        rc = json_opt_bool(t, "use_double_wide_mlp", false, &double_wide);
    for (int64_t i = rc ? c->n_layers : c->n_layers - n_shared; i < c->n_layers; i++) {
        struct gemma_layer *l = &c->layers[i];
        int64_t source = c->n_layers - n_shared - 1;
        while (source >= 0 && c->layers[source].sliding != l->sliding)
            source--;
        if (source < 0)
            return json_error(t, "has layer %lld share keys and values, but none of its kind before it",
                              (long long)i);
        const struct gemma_layer *from = &c->layers[source];
        if (from->head_dim != l->head_dim || from->n_kv_heads != l->n_kv_heads)
            return json_error(t, "has layer %lld share keys and values of layer %lld, whose heads are others",
                              (long long)i, (long long)source);
        l->kv_source = source;
        if (double_wide)
            l->intermediate_size *= 2;
    }
    return rc;
}

/* Layers of a kind turn by the same table, so that their heads must be equal. */
static int check_layers(struct gemma_config *c, struct json t)
{
    c->rope_dim[GEMMA_GLOBAL] = c->rope_dim[GEMMA_SLIDING] = 0;
    for (int64_t i = 0; i < c->n_layers; i++) {
        const struct gemma_layer *l = &c->layers[i];
        int64_t *dim = &c->rope_dim[l->sliding ? GEMMA_SLIDING : GEMMA_GLOBAL];
        if (c->n_heads % l->n_kv_heads)
            return json_error(t, "has %lld attention heads, not a multiple of its %lld key/value heads",
                              (long long)c->n_heads, (long long)l->n_kv_heads);
        if (l->head_dim % 2 || (*dim && *dim != l->head_dim))
            return json_error(t, "has heads of %lld in layer %lld, expected an even number%s",
                              (long long)l->head_dim, (long long)i,
                              *dim ? ", the same in all layers of a kind" : "");
        *dim = l->head_dim;
    }
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        if (!c->rope_dim[kind])
            c->rope_dim[kind] = c->head_dim + c->head_dim % 2; /* no layer turns by it */
    return 0;
}

static int read_layers(struct gemma_config *c, struct json t)
{
    if (!(c->layers = mem_alloc((size_t)c->n_layers, sizeof *c->layers, "the layers")))
        return ERR_MEMORY;
    int rc = read_layer_types(c, t);
    if (c->family->varied) /* as transformers has it, whatever layer_types says */
        c->layers[c->n_layers - 1].sliding = false;
    for (int64_t i = 0; i < c->n_layers; i++) {
        struct gemma_layer *l = &c->layers[i];
        l->n_kv_heads = c->n_kv_heads;
        l->head_dim = c->head_dim;
        l->intermediate_size = c->intermediate_size;
        l->kv_source = i;
    }
    if (!rc && c->family->varied)
        rc = read_heads(c, t);
    if (!rc && c->family->varied)
        rc = read_sharing(c, t);
    return rc ? rc : check_layers(c, t);
}

/* --- what changes the mathematics -------------------------------------------------------------------------------- */

static int refuse(const struct hf_config *cfg, const char *key, const char *how)
{
    return err_set(ERR_UNSUPPORTED, "%s: '%s' is %s, which is not supported for %s", cfg->path, key, how,
                   cfg->model_type);
}

static int read_softcap(const struct hf_config *cfg, const char *key, bool allowed, double fallback,
                        double *out)
{
    const struct json v = json_member(cfg->text_config, key);
    *out = v.node && !json_exists(v) ? 0 : fallback; /* null: none */
    if (!json_exists(v))
        return 0;
    if (!allowed)
        return refuse(cfg, key, "set");
    const int rc = json_as_double(v, out);
    return !rc && !(*out > 0) ? json_error(v, "is %g, expected more than 0", *out) : rc;
}

static int check_activation(const struct hf_config *cfg)
{
    static const char expected[] = "gelu_pytorch_tanh";
    const char *act, *older;
    int rc = json_opt_string(cfg->text_config, "hidden_act", expected, &older);
    if (!rc && (!strcmp(older, "gelu") || json_exists(json_member(cfg->text_config, "hidden_activation"))))
        older = expected; /* early releases of Gemma 1 say gelu, and mean this */
    if (!rc)
        rc = json_opt_string(cfg->text_config, "hidden_activation", older, &act);
    return rc || !strcmp(act, expected)
               ? rc
               : err_set(ERR_UNSUPPORTED, "%s: hidden_activation '%s' is not supported, expected %s",
                         cfg->path, act, expected);
}

/* A mixture of experts, beside the MLP of every layer. */
static int read_experts(struct gemma_config *c, struct json t)
{
    enum { MAX_EXPERTS = 1024, MAX_TOP = 64 }; /* that the router can choose from, and take */
    bool has_experts = false;
    int rc = c->family->varied ? json_opt_bool(t, "enable_moe_block", false, &has_experts) : 0;
    if (rc < 0 || !has_experts)
        return rc;
    rc = json_get_int(t, "num_experts", 1, MAX_EXPERTS, &c->n_experts);
    if (!rc)
        rc = json_get_int(t, "top_k_experts", 1, c->n_experts < MAX_TOP ? c->n_experts : MAX_TOP, &c->top_k);
    return rc ? rc : json_get_int(t, "moe_intermediate_size", 1, max_size, &c->expert_size);
}

/* Settings that would change the mathematics: a model that sets one of them is not the Gemma that we know. */
static int refuse_unknown_maths(const struct hf_config *cfg, const struct gemma_family *family)
{
    static const char *const false_expected[] = {"attention_bias", "use_bidirectional_attention",
                                                 "enable_moe_block"}; /* the last: where no family has it */
    const struct json t = cfg->text_config;
    const size_t n = sizeof false_expected / sizeof *false_expected - (family->varied ? 1 : 0);
    for (size_t i = 0; i < n; i++) {
        const struct json v = json_member(t, false_expected[i]);
        bool set = false;
        /* Gemma 4's images see both ways, its text does not */
        if (json_is_string(v)) {
            const char *text;
            const int rc = json_as_string(v, &text);
            if (rc < 0 || strcmp(text, "vision"))
                return rc ? rc : refuse(cfg, false_expected[i], text);
            continue;
        }
        const int rc = json_opt_bool(t, false_expected[i], false, &set);
        if (rc < 0)
            return rc;
        if (set)
            return refuse(cfg, false_expected[i], "true");
    }
    return check_activation(cfg);
}

/* --- all ---------------------------------------------------------------------------------------------------------- */

int gemma_config_read(struct gemma_config *c, const struct hf_config *cfg)
{
    *c = (struct gemma_config){0};
    const struct json t = cfg->text_config;
    int rc = find_family(&c->family, cfg);
    if (!rc)
        rc = refuse_unknown_maths(cfg, c->family);
    if (!rc)
        rc = read_softcap(cfg, "attn_logit_softcapping", c->family->attention_softcap_is_set,
                          c->family->attention_softcap, &c->attention_softcap);
    if (!rc)
        rc = read_softcap(cfg, "final_logit_softcapping", c->family->final_softcap_is_set,
                          c->family->final_softcap, &c->final_softcap);
    if (!rc)
        rc = read_sizes(c, cfg);
    if (!rc)
        rc = read_experts(c, t);
    if (!rc)
        rc = json_opt_double(t, "rms_norm_eps", 1e-6, &c->rms_norm_eps);
    if (rc < 0)
        return rc;
    c->query_pre_attn_scalar =
        c->family->query_pre_attn_scalar > 0 ? c->family->query_pre_attn_scalar : (double)c->head_dim;
    if (!c->family->two_norms && !c->family->varied)
        rc = json_opt_double(t, "query_pre_attn_scalar", c->query_pre_attn_scalar, &c->query_pre_attn_scalar);
    if (!rc)
        rc = read_rope(c, t);
    if (!rc)
        rc = read_layers(c, t);
    if (rc < 0)
        gemma_config_free(c);
    return rc;
}

void gemma_config_free(struct gemma_config *c)
{
    free(c->layers);
    *c = (struct gemma_config){0};
}

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

struct gemma_widths gemma_widest(const struct gemma_config *c)
{
    struct gemma_widths w = {0};
    for (int64_t i = 0; i < c->n_layers; i++) {
        const struct gemma_layer *l = &c->layers[i];
        const int64_t q = c->n_heads * l->head_dim, kv = l->n_kv_heads * l->head_dim;
        w.q = larger(w.q, q);
        w.kv = larger(w.kv, kv);
        w.qkv = larger(w.qkv, q + 2 * kv);
        w.inner = larger(w.inner, l->intermediate_size);
    }
    return w;
}

#include "tests/unit/tiny_gemma.h"

#include "base/file.h"
#include "base/text.h"
#include "formats/writer.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>

const struct tiny_gemma tiny_gemma_plain = {.hidden = 256,
                                            .ffn = 4352,
                                            .vocab = 1100,
                                            .layers = 2,
                                            .heads = 4,
                                            .kv_heads = 2,
                                            .head_dim = 64,
                                            .dtype = DTYPE_BF16};

#define TYPE(name) "\"" name "_attention\", "
#define TYPES                                                                                                \
    "\"layer_types\": [" TYPE("sliding") TYPE("sliding") TYPE("full") TYPE("sliding")                        \
        TYPE("sliding") "\"full_attention\"], "
#define EXPERTS                                                                                              \
    "\"enable_moe_block\": true, \"num_experts\": 8, \"top_k_experts\": 2, \"moe_intermediate_size\": 96, "
#define SMALL                                                                                                \
    .hidden = 64, .ffn = 96, .vocab = 128, .heads = 4, .kv_heads = 2, .head_dim = 32, .window = 5,           \
    .dtype = DTYPE_BF16

const struct tiny_gemma tiny_families[TINY_FAMILIES] = {
    {.model_type = "gemma", .layers = 2, SMALL},
    {.model_type = "gemma2",
     .more =
         "\"query_pre_attn_scalar\": 24, \"attn_logit_softcapping\": 0.5, \"final_logit_softcapping\": 2.0,",
     .layers = 4,
     SMALL},
    {.model_type = "gemma4_text",
     .more =
         "\"num_kv_shared_layers\": 3, \"use_double_wide_mlp\": true, \"hidden_size_per_layer_input\": 16, " TYPES
         "\"global_head_dim\": 64, \"final_logit_softcapping\": 2.0,",
     .layers = 6,
     SMALL},
    {.model_type = "gemma4_text",
     .more = TYPES "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0, \"per_layer_config\": "
                   "{\"2\": {\"head_dim\": 64, \"num_key_value_heads\": 1}, "
                   "\"05\": {\"head_dim\": 64, \"num_key_value_heads\": 1}},",
     .layers = 6,
     SMALL},
    {.model_type = "gemma4_text",
     .more = "\"layer_types\": [" TYPE("sliding") TYPE(
         "sliding") "\"full_attention\"], " EXPERTS
                    "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0, \"per_layer_config\": "
                    "{\"2\": {\"head_dim\": 64, \"num_key_value_heads\": 1}},",
     .layers = 3,
     SMALL},
};
const char *const tiny_family_names[TINY_FAMILIES] = {"gemma1", "gemma2", "gemma4-sharing", "gemma4-k-is-v",
                                                      "gemma4-experts"};

static const char *const torch_names[] = {
    [DTYPE_BF16] = "bfloat16", [DTYPE_F16] = "float16", [DTYPE_F32] = "float32"};

static void config_text(const struct tiny_gemma *g, char *out, size_t size)
{
    char window[80] = "", pattern[80] = "";
    if (g->window)
        snprintf(window, sizeof window, "  \"sliding_window\": %d,\n", g->window);
    if (g->pattern)
        snprintf(pattern, sizeof pattern, "  \"sliding_window_pattern\": %d,\n", g->pattern);
    snprintf(out, size,
             "{\n  \"architectures\": [\"Gemma3ForCausalLM\"],\n  \"model_type\": \"%s\",\n%s"
             "  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n  \"num_hidden_layers\": %d,\n"
             "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n"
             "%s%s  \"vocab_size\": %d,\n  \"torch_dtype\": \"%s\"\n}\n",
             g->model_type ? g->model_type : "gemma3_text", g->more ? g->more : "", (int)g->hidden,
             (int)g->ffn, g->layers, g->heads, g->kv_heads, g->head_dim, window, pattern, (int)g->vocab,
             torch_names[g->dtype]);
}

void tiny_gemma_tensors(const struct tiny_gemma *g, struct gemma_config *cfg, struct gemma_tensors *tensors)
{
    char text[2048];
    struct hf_config config;
    config_text(g, text, sizeof text);
    assert_ok(hf_config_parse(&config, text, strlen(text), "config.json"));
    assert_ok(gemma_config_read(cfg, &config));
    assert_ok(gemma_tensors(tensors, cfg, "model."));
    hf_config_close(&config);
}

/* Where a tensor's bytes go. */
struct place {
    size_t id;
    uint64_t offset;
};

/* What the values of a tensor lie around, and how large they are. Where norms multiply by their weights alone, nothing divides
 * the scores: keys that were as long as queries would leave a softmax of nearly one key. A router's logits are divided
 * by √hidden: small weights would leave it without a preference. */
static void values_of(const struct gemma_tensor *t, bool plain_norms, float *offset, float *length)
{
    const bool factor = t->role == GEMMA_NORM || t->role == GEMMA_SCALAR || t->role == GEMMA_ROUTER_SCALE;
    *offset = plain_norms && factor ? 1 : 0;
    *length = t->role == GEMMA_ROUTER ? 40 : 1;
    if (plain_norms && text_ends_with(t->name, "k_norm.weight"))
        *length = 2 / sqrtf((float)t->shape[0]);
}

static void write_tensor(const struct tiny_gemma *g, const struct writer *w, struct place place,
                         const struct gemma_tensor *t, bool plain_norms, uint64_t *seed)
{
    const int64_t n = t->shape[0] * (t->n_dims == 2 ? t->shape[1] : 1);
    const size_t size = dtype_bytes(g->dtype);
    float offset, length;
    values_of(t, plain_norms, &offset, &length);
    char *data = malloc((size_t)n * size);
    assert_non_null(data);
    for (int64_t i = 0; i < n; i++) {
        const double u = support_uniform(seed), v = support_uniform(seed);
        float x = length * ((float)(0.1 * u * v + (i % 97 == 3 ? 0.2 * u : 0)) + offset); /* a few outliers */
        if (g->bad_tensor && !strcmp(g->bad_tensor, t->name) && i == g->bad_index)
            x = g->bad_value;
        const uint16_t h = x != x ? (g->dtype == DTYPE_F16 ? 0x7e00 : 0x7fc0)
                                  : naive_bits16(x, g->dtype == DTYPE_F16 ? 5 : 8);
        memcpy(data + (size_t)i * size, g->dtype == DTYPE_F32 ? (const void *)&x : (const void *)&h, size);
    }
    assert_ok(writer_put(w, place.id, place.offset, data, (size_t)n * size));
    free(data);
}

/* The keys' and values' tensors of layers that read those of another, like those of layer 0. */
static void add_dead(struct gemma_tensors *t, const struct gemma_config *c)
{
    static const struct {
        const char *name;
        enum gemma_role role;
    } parts[] = {{"k_proj", GEMMA_K}, {"v_proj", GEMMA_V}, {"k_norm", GEMMA_NORM}};
    t->list = realloc(t->list, (t->n + 3 * (size_t)c->n_layers) * sizeof *t->list);
    assert_non_null(t->list);
    for (int64_t i = 0; i < c->n_layers; i++)
        for (size_t k = 0; k < N_OF(parts) && c->layers[i].kv_source != i; k++) {
            char name[100];
            snprintf(name, sizeof name, "model.layers.%d.self_attn.%s.weight", (int)i, parts[k].name);
            t->list[t->n++] = (struct gemma_tensor){.name = strdup(name),
                                                    .role = parts[k].role,
                                                    .expert = -1,
                                                    .n_dims = parts[k].role == GEMMA_NORM ? 1 : 2,
                                                    .shape = {c->head_dim, c->hidden_size}};
        }
}

/* Announces a tensor, or with the first of a layer's experts the two that hold them all: *whole, the last ones. */
static struct place announce(const struct tiny_gemma *g, struct writer *w, const struct gemma_config *c,
                             const struct gemma_tensor *t, size_t whole[2])
{
    const bool down = t->role == GEMMA_DOWN;
    const int64_t n_parts = down ? 1 : 2, part = t->expert * n_parts + (t->role == GEMMA_UP);
    struct place p = {0};
    if (t->expert < 0 || g->apart) {
        assert_ok(writer_add(w, t->name, t->name, g->dtype, t->n_dims, t->shape, &p.id));
        return p;
    }
    if (t->expert == 0 && t->role != GEMMA_UP) {
        const int64_t shape[3] = {c->n_experts, n_parts * t->shape[0], t->shape[1]};
        char name[100];
        snprintf(name, sizeof name, "model.layers.%d.experts.%s", t->layer,
                 down ? "down_proj" : "gate_up_proj");
        assert_ok(writer_add(w, name, name, g->dtype, 3, shape, &whole[down]));
    }
    p.id = whole[down];
    p.offset = (uint64_t)(part * t->shape[0] * t->shape[1]) * dtype_bytes(g->dtype);
    return p;
}

static void write_tensors(const struct tiny_gemma *g, const char *folder, const struct gemma_config *c,
                          const struct gemma_tensors *tensors)
{
    struct writer *w;
    struct place *places = calloc(tensors->n, sizeof *places);
    size_t whole[2];
    uint64_t seed = 11;
    assert_non_null(places);
    assert_ok(writer_open(&w, folder, g->shard_bytes ? g->shard_bytes : UINT64_MAX));
    for (size_t i = 0; i < tensors->n; i++)
        places[i] = announce(g, w, c, &tensors->list[i], whole);
    assert_ok(writer_begin(w, false));
    for (size_t i = 0; i < tensors->n; i++)
        write_tensor(g, w, places[i], &tensors->list[i], c->family->plain_norms, &seed);
    assert_ok(writer_index(w));
    assert_ok(writer_finish(w));
    writer_close(w);
    free(places);
}

void tiny_gemma_write(const struct tiny_gemma *g, const char *folder)
{
    static const char *const beside[] = {
        "tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE",
        "model.bin",      "other.index.json",       ".hidden.json"};
    struct gemma_config cfg;
    struct gemma_tensors tensors;
    char text[2048];
    tiny_gemma_tensors(g, &cfg, &tensors);
    if (g->dead)
        add_dead(&tensors, &cfg);
    assert_ok(file_make_folder(folder));
    write_tensors(g, folder, &cfg, &tensors);
    config_text(g, text, sizeof text);
    char *path = file_join(folder, "config.json");
    support_write(path, text, strlen(text));
    free(path);
    for (size_t i = 0; i < N_OF(beside); i++) {
        path = file_join(folder, beside[i]);
        support_write(path, beside[i], strlen(beside[i]));
        free(path);
    }
    gemma_tensors_free(&tensors);
    gemma_config_free(&cfg);
}

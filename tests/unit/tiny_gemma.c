#include "tests/unit/tiny_gemma.h"

#include "base/file.h"
#include "formats/writer.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

const struct tiny_gemma tiny_gemma_plain = {.hidden = 256,
                                            .ffn = 4352,
                                            .vocab = 1100,
                                            .layers = 2,
                                            .heads = 4,
                                            .kv_heads = 2,
                                            .head_dim = 64,
                                            .dtype = DTYPE_BF16};

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
             "{\n  \"architectures\": [\"Gemma3ForCausalLM\"],\n  \"model_type\": \"gemma3_text\",\n"
             "  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n  \"num_hidden_layers\": %d,\n"
             "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n"
             "%s%s  \"vocab_size\": %d,\n  \"torch_dtype\": \"%s\"\n}\n",
             (int)g->hidden, (int)g->ffn, g->layers, g->heads, g->kv_heads, g->head_dim, window, pattern,
             (int)g->vocab, torch_names[g->dtype]);
}

void tiny_gemma_tensors(const struct tiny_gemma *g, struct gemma_config *cfg, struct gemma_tensors *tensors)
{
    char text[1024];
    struct hf_config config;
    config_text(g, text, sizeof text);
    assert_ok(hf_config_parse(&config, text, strlen(text), "config.json"));
    assert_ok(gemma_config_read(cfg, &config));
    assert_ok(gemma_tensors(tensors, cfg, "model."));
    hf_config_close(&config);
}

static void write_tensor(const struct tiny_gemma *g, const struct writer *w, size_t id,
                         const struct gemma_tensor *t, uint64_t *seed)
{
    const int64_t n = t->shape[0] * (t->n_dims == 2 ? t->shape[1] : 1);
    const size_t size = dtype_bytes(g->dtype);
    char *data = malloc((size_t)n * size);
    assert_non_null(data);
    for (int64_t i = 0; i < n; i++) {
        const double u = support_uniform(seed), v = support_uniform(seed);
        float x = (float)(0.1 * u * v + (i % 97 == 3 ? 0.2 * u : 0)); /* a few outliers */
        if (g->bad_tensor && !strcmp(g->bad_tensor, t->name) && i == g->bad_index)
            x = g->bad_value;
        const uint16_t h = x != x ? (g->dtype == DTYPE_F16 ? 0x7e00 : 0x7fc0)
                                  : naive_bits16(x, g->dtype == DTYPE_F16 ? 5 : 8);
        memcpy(data + (size_t)i * size, g->dtype == DTYPE_F32 ? (const void *)&x : (const void *)&h, size);
    }
    assert_ok(writer_put(w, id, 0, data, (size_t)n * size));
    free(data);
}

void tiny_gemma_write(const struct tiny_gemma *g, const char *folder)
{
    static const char *const beside[] = {
        "tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE",
        "model.bin",      "other.index.json",       ".hidden.json"};
    struct gemma_config cfg;
    struct gemma_tensors tensors;
    struct writer *w;
    size_t ids[64];
    char text[1024];
    uint64_t seed = 11;
    tiny_gemma_tensors(g, &cfg, &tensors);
    assert_ok(file_make_folder(folder));
    assert_ok(writer_open(&w, folder, g->shard_bytes ? g->shard_bytes : UINT64_MAX));
    assert_true(tensors.n <= N_OF(ids));
    for (size_t i = 0; i < tensors.n; i++)
        assert_ok(writer_add(w, tensors.list[i].name, tensors.list[i].name, g->dtype, tensors.list[i].n_dims,
                             tensors.list[i].shape, &ids[i]));
    assert_ok(writer_begin(w, false));
    for (size_t i = 0; i < tensors.n; i++)
        write_tensor(g, w, ids[i], &tensors.list[i], &seed);
    assert_ok(writer_index(w));
    assert_ok(writer_finish(w));
    writer_close(w);
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

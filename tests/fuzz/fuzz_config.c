/* config.json: what model it declares, its tensors, its quantization_config and its matching, and the splice. */
#include "base/err.h"
#include "formats/hf_config.h"
#include "formats/quant_config.h"
#include "runtime/gemma.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A description that was read is written and read again to the same text. */
static void check_quant(const struct quant_config *q)
{
    struct text first = {0}, second = {0};
    struct json_doc *doc;
    struct quant_config back;
    quant_config_write(q, &first);
    CHECK(text_finish(&first) == 0);
    CHECK(json_parse(&doc, first.data, first.len, "written") == 0);
    CHECK(quant_config_read(&back, json_root(doc)) == 0);
    quant_config_write(&back, &second);
    CHECK(text_finish(&second) == 0 && !strcmp(first.data, second.data));
    quant_config_free(&back);
    json_free(doc);
    text_free(&first);
    text_free(&second);
}

static void try_quant(struct json quantization)
{
    static const char *const modules[] = {"model.layers.0.self_attn.q_proj", "lm_head"};
    struct quant_config q;
    if (quant_config_read(&q, quantization) < 0)
        return;
    for (size_t i = 0; i < 2; i++) {
        struct quant_scheme s = {0};
        const int rc = quant_config_match(&q, modules[i], &s);
        if (rc != 1)
            continue;
        CHECK((s.bits == 4 || s.bits == 8) && s.group >= 0);
        CHECK(quant_packed_cols(s, 100) > 0 && quant_groups(s, 100) > 0 && quant_zero_rows(s, 100) > 0);
    }
    check_quant(&q);
    quant_config_free(&q);
}

static void try_gemma(const struct hf_config *cfg)
{
    struct gemma_config gemma;
    struct gemma_tensors tensors;
    if (gemma_config_read(&gemma, cfg) < 0)
        return;
    CHECK(gemma.family && gemma.n_layers >= 1);
    for (int64_t i = 0; i < gemma.n_layers; i++) {
        const struct gemma_layer *l = &gemma.layers[i], *from = &gemma.layers[l->kv_source];
        CHECK(gemma.n_heads % l->n_kv_heads == 0 && l->head_dim % 2 == 0 && l->intermediate_size > 0);
        CHECK(l->kv_source <= i && from->kv_source == l->kv_source && from->head_dim == l->head_dim &&
              from->n_kv_heads == l->n_kv_heads && from->sliding == l->sliding);
    }
    if (gemma.n_layers <= 64 && gemma_tensors(&tensors, &gemma, "model.") == 0) {
        for (size_t i = 0; i < tensors.n; i++)
            CHECK(tensors.list[i].shape[0] > 0 && tensors.list[i].layer < gemma.n_layers);
        gemma_tensors_free(&tensors);
    }
    gemma_config_free(&gemma);
}

/* The spliced text is JSON again, has the member, and no other one is lost or gained. */
static void try_splice(const struct hf_config *cfg)
{
    struct text out = {0};
    if (hf_config_splice(cfg, "{\"quant_method\": \"q\"}", &out) == 0) {
        struct json_doc *doc;
        CHECK(json_parse(&doc, out.data, out.len, "spliced") == 0);
        CHECK(json_is_object(json_member(json_root(doc), "quantization_config")));
        const size_t had = json_member(cfg->root, "quantization_config").node ? 0 : 1;
        CHECK(json_count(json_root(doc)) == json_count(cfg->root) + had);
        json_free(doc);
    }
    text_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct hf_config cfg;
    if (hf_config_parse(&cfg, (const char *)data, size, "config.json") < 0) {
        CHECK(*err_message());
        return 0;
    }
    try_gemma(&cfg);
    if (json_exists(cfg.quantization))
        try_quant(cfg.quantization);
    try_splice(&cfg);
    hf_config_close(&cfg);
    return 0;
}

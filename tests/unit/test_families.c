/* What config.json says of each family, as settings, layers and tensors: full-size models by the numbers of tensors and
 * parameters that transformers 5.17 makes of them; what is refused. And small made-up ones, cut. */
#include "base/file.h"
#include "quantize/recipe.h"
#include "runtime/model.h"
#include "tests/unit/cutting.h"
#include "tests/unit/support.h"

#include <math.h>

/* --- settings ------------------------------------------------------------------------------------------------------- */

static int read_config(struct gemma_config *out, const char *text)
{
    struct hf_config config;
    assert_ok(hf_config_parse(&config, text, strlen(text), "config.json"));
    const int rc = gemma_config_read(out, &config);
    hf_config_close(&config);
    return rc;
}

#define SIZES(hidden, layers, heads, kv, ffn)                                                                \
    "\"hidden_size\": " #hidden ", \"num_hidden_layers\": " #layers ", \"num_attention_heads\": " #heads     \
    ", \"num_key_value_heads\": " #kv ", \"intermediate_size\": " #ffn
#define TEXT4(members)                                                                                       \
    "{\"model_type\": \"gemma4\", \"text_config\": {\"model_type\": \"gemma4_text\", " members "}}"
#define EXPERTS(n, top, size)                                                                                \
    "\"enable_moe_block\": true, \"num_experts\": " #n ", \"top_k_experts\": " #top                          \
    ", \"moe_intermediate_size\": " #size
#define FOUR      "\"sliding_attention\", \"sliding_attention\", \"sliding_attention\", \"sliding_attention\", "
#define FIVE      FOUR "\"full_attention\", "
#define E2B_TYPES "[" FIVE FIVE FIVE FIVE FIVE FIVE FOUR "\"full_attention\"]"
#define E2B                                                                                                  \
    SIZES(1536, 35, 8, 1, 6144)                                                                              \
    ", \"num_kv_shared_layers\": 20, \"use_double_wide_mlp\": true, \"layer_types\": " E2B_TYPES

static const struct {
    const char *text;
    size_t n_tensors; /* of the language part */
    int64_t parameters;
} models[] = {
    {"{\"model_type\": \"gemma\", " SIZES(2048, 18, 8, 1, 16384) "}", 164, 2506172416},
    {"{\"model_type\": \"gemma\", \"hidden_act\": \"gelu\"}", 254, 8537680896},
    {"{\"model_type\": \"gemma2\"}", 288, 2614341888},
    {"{\"model_type\": \"gemma2\", " SIZES(4608, 46, 32, 16, 36864) ", \"head_dim\": 128}", 508, 27227128320},
    {"{\"model_type\": \"gemma3\", \"text_config\": {\"model_type\": \"gemma3_text\", " SIZES(2560, 34, 8, 4,
                                                                                              10240) "}}",
     444, 3880263168},
    {TEXT4(E2B), 540, 4628569379},
    {TEXT4(SIZES(2560, 42, 8, 2, 10240) ", \"num_kv_shared_layers\": 18"), 665, 7463013418},
    {TEXT4(SIZES(5376, 60, 32, 16,
                 21504) ", \"num_global_key_value_heads\": 4, \"attention_k_eq_v\": true, "
                        "\"hidden_size_per_layer_input\": 0, \"use_bidirectional_attention\": \"vision\""),
     832, 30697345340},
    {"{\"model_type\": \"gemma4_unified\", \"text_config\": {\"model_type\": \"gemma4_unified_text\", " SIZES(
         3840, 48, 16, 8, 15360) ", \"num_global_key_value_heads\": 1, \"attention_k_eq_v\": true}}",
     666, 11907350320},
    {TEXT4(SIZES(2816, 30, 16, 8, 2112) ", \"num_global_key_value_heads\": 2, \"attention_k_eq_v\": true, "
                                        "\"hidden_size_per_layer_input\": 0, " EXPERTS(128, 8, 704)),
     597 + 30 * 128 * 3, 25233141790}, /* transformers has two tensors for the experts of a layer: 657 */
};

static void test_full_size(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(models); i++) {
        struct gemma_config c;
        struct gemma_tensors t;
        assert_ok(read_config(&c, models[i].text));
        assert_ok(gemma_tensors(&t, &c, "model."));
        int64_t parameters = 0;
        for (size_t k = 0; k < t.n; k++)
            parameters += t.list[k].shape[0] * (t.list[k].n_dims == 2 ? t.list[k].shape[1] : 1);
        if (t.n != models[i].n_tensors || parameters != models[i].parameters)
            fail_msg("%s: %zu tensors, %lld parameters, expected %zu, %lld", models[i].text, t.n,
                     (long long)parameters, models[i].n_tensors, (long long)models[i].parameters);
        gemma_tensors_free(&t);
        gemma_config_free(&c);
    }
}

static void check_layer(const struct gemma_config *c, int i, struct gemma_layer want)
{
    const struct gemma_layer *l = &c->layers[i];
    if (l->sliding != want.sliding || l->k_is_v != want.k_is_v || l->n_kv_heads != want.n_kv_heads ||
        l->head_dim != want.head_dim || l->intermediate_size != want.intermediate_size ||
        l->kv_source != want.kv_source)
        fail_msg("layer %d: sliding %d, k is v %d, %d key/value heads of %d, MLP %d, keys of layer %d", i,
                 l->sliding, l->k_is_v, (int)l->n_kv_heads, (int)l->head_dim, (int)l->intermediate_size,
                 (int)l->kv_source);
}

static void test_layers(void **state)
{
    (void)state;
    struct gemma_config c;
    assert_ok(read_config(&c, TEXT4(E2B)));
    check_layer(&c, 0, (struct gemma_layer){true, false, 1, 256, 6144, 0});
    check_layer(&c, 14, (struct gemma_layer){false, false, 1, 512, 6144, 14});
    check_layer(&c, 15, (struct gemma_layer){true, false, 1, 256, 12288, 13});
    check_layer(&c, 34, (struct gemma_layer){false, false, 1, 512, 12288, 14});
    assert_true(gemma_is_dead(&c, "model.", "model.layers.15.self_attn.k_proj.weight"));
    assert_true(gemma_is_dead(&c, "model.", "model.layers.34.self_attn.v_proj.weight_packed"));
    assert_false(gemma_is_dead(&c, "model.", "model.layers.34.self_attn.k_norm.weight"));
    assert_false(gemma_is_dead(&c, "model.", "model.layers.14.self_attn.k_proj.weight"));
    assert_false(gemma_is_dead(&c, "model.", "tower.layers.15.self_attn.k_proj.weight"));
    const struct gemma_widths w = gemma_widest(&c);
    assert_true(w.q == 8 * 512 && w.kv == 512 && w.qkv == 10 * 512 && w.inner == 12288);
    gemma_config_free(&c);
    /* the other dialect, and a last layer that is global whatever the list says */
    assert_ok(read_config(
        &c, "{\"model_type\": \"gemma4_text\", " SIZES(
                64, 3, 8, 4, 96) ", \"head_dim\": 32, \"attention_k_eq_v\": true, \"layer_types\": "
                                 "[\"full_attention\", \"sliding_attention\", \"sliding_attention\"], "
                                 "\"per_layer_config\": {\"00\": {\"head_dim\": 64}, \"2\": {\"head_dim\": "
                                 "64, \"num_key_value_heads\": 2}}}"));
    check_layer(&c, 0, (struct gemma_layer){false, true, 4, 64, 96, 0});
    check_layer(&c, 1, (struct gemma_layer){true, false, 4, 32, 96, 1});
    check_layer(&c, 2, (struct gemma_layer){false, true, 2, 64, 96, 2});
    gemma_config_free(&c);
}

static void test_settings(void **state)
{
    (void)state;
    struct gemma_config c;
    assert_ok(read_config(&c, "{\"model_type\": \"gemma\", \"sliding_window_pattern\": 2}"));
    assert_true(c.query_pre_attn_scalar == 256 && c.attention_softcap == 0 && c.final_softcap == 0);
    assert_true(!c.layers[0].sliding && c.rope[GEMMA_GLOBAL].theta == 1e4 && c.ple_size == 0);
    gemma_config_free(&c);
    assert_ok(read_config(&c,
                          "{\"model_type\": \"gemma2\", \"query_pre_attn_scalar\": 144, \"rope_parameters\": "
                          "{\"rope_theta\": 5e4, \"rope_type\": \"default\"}}"));
    assert_true(c.query_pre_attn_scalar == 144 && c.attention_softcap == 50 && c.final_softcap == 30);
    assert_true(c.layers[0].sliding && !c.layers[1].sliding && c.rope[GEMMA_SLIDING].theta == 5e4);
    gemma_config_free(&c);
    assert_ok(read_config(&c, "{\"model_type\": \"gemma2\", \"attn_logit_softcapping\": null, "
                              "\"final_logit_softcapping\": 20, \"rope_theta\": 2e4}"));
    assert_true(c.attention_softcap == 0 && c.final_softcap == 20 && c.rope[GEMMA_SLIDING].theta == 2e4);
    gemma_config_free(&c);
    assert_ok(read_config(&c, TEXT4("\"final_logit_softcapping\": 30.0")));
    assert_true(c.query_pre_attn_scalar == 1 && c.final_softcap == 30 && c.ple_size == 256);
    assert_true(c.rope[GEMMA_GLOBAL].rotated == 0.25 && c.rope[GEMMA_GLOBAL].theta == 1e6 &&
                c.rope_dim[GEMMA_GLOBAL] == 512 && c.rope[GEMMA_SLIDING].rotated == 1);
    gemma_config_free(&c);
}

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int code;
        const char *message;
    } bad[] = {
        {"{\"model_type\": \"gemma3n\"}", ERR_UNSUPPORTED, "supported: gemma (Gemma 1), gemma2 (Gemma 2)"},
        {"{\"model_type\": \"gemma\", \"attn_logit_softcapping\": 50.0}", ERR_UNSUPPORTED,
         "'attn_logit_softcapping' is set"},
        {"{\"model_type\": \"gemma\", \"hidden_act\": \"silu\"}", ERR_UNSUPPORTED, "'silu' is not supported"},
        {"{\"model_type\": \"gemma2\", \"attn_logit_softcapping\": 0}", ERR_FORMAT,
         "is 0, expected more than 0"},
        {"{\"model_type\": \"gemma3_text\", \"final_logit_softcapping\": 30.0}", ERR_UNSUPPORTED,
         "'final_logit_softcapping' is set"},
        {TEXT4("\"enable_moe_block\": true"), ERR_FORMAT, "num_experts"},
        {TEXT4(EXPERTS(8, 9, 64)), ERR_FORMAT, "top_k_experts' is 9, expected 1 … 8"},
        {TEXT4(EXPERTS(128, 65, 64)), ERR_FORMAT, "top_k_experts' is 65, expected 1 … 64"},
        {TEXT4(EXPERTS(1025, 8, 64)), ERR_FORMAT, "num_experts' is 1025, expected 1 … 1024"},
        {TEXT4(EXPERTS(8, 2, 0)), ERR_FORMAT, "moe_intermediate_size' is 0"},
        {"{\"model_type\": \"gemma3_text\", \"enable_moe_block\": true}", ERR_UNSUPPORTED,
         "'enable_moe_block' is true"},
        {TEXT4("\"use_bidirectional_attention\": \"all\""), ERR_UNSUPPORTED,
         "'use_bidirectional_attention' is all"},
        {TEXT4("\"attn_logit_softcapping\": 50.0"), ERR_UNSUPPORTED, "'attn_logit_softcapping' is set"},
        {TEXT4("\"num_kv_shared_layers\": 30"), ERR_FORMAT, "num_kv_shared_layers"},
        {TEXT4("\"num_kv_shared_layers\": 26"), ERR_FORMAT,
         "layer 5 share keys and values, but none of its kind"},
        {TEXT4("\"per_layer_config\": {\"5\": {\"sliding_window\": 3}}"), ERR_UNSUPPORTED, "sliding_window"},
        {TEXT4("\"per_layer_config\": {\"30\": {\"head_dim\": 64}}"), ERR_FORMAT, "expected 0 … 29"},
        {TEXT4("\"per_layer_config\": {\"5\": {\"head_dim\": 64}}"), ERR_FORMAT,
         "the same in all layers of a kind"},
        {TEXT4("\"num_kv_shared_layers\": 6, \"per_layer_config\": {\"29\": {\"num_key_value_heads\": 2}}"),
         ERR_FORMAT, "share keys and values of layer 23, whose heads are others"},
        {TEXT4("\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"yarn\"}}"), ERR_UNSUPPORTED,
         "RoPE type 'yarn'"},
        {TEXT4(
             "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"proportional\", \"partial_rotary_factor\": 2}}"),
         ERR_FORMAT, "expected 0 … 1"},
    };
    for (size_t i = 0; i < N_OF(bad); i++) {
        struct gemma_config c;
        assert_error(read_config(&c, bad[i].text), bad[i].code, bad[i].message);
    }
}

/* --- cuts ----------------------------------------------------------------------------------------------------------- */

static struct cut_options cut_of(int family, const char *out)
{
    static struct tiny_gemma g[TINY_FAMILIES];
    g[family] = tiny_families[family];
    g[family].dead = true;
    struct cut_options o = cutting_options(cutting_model(tiny_family_names[family], &g[family]), out);
    o.recipe.scheme.group = 32;
    return o;
}

/* What sharing layers do not read is left out, what stays in 16 bits is the source's. */
static void test_cut(void **state)
{
    (void)state;
    for (int i = 0; i < TINY_FAMILIES; i++) {
        struct model source, cut;
        const struct cut_options o = cut_of(i, support_path("cut-%s", tiny_family_names[i]));
        assert_ok(cutting_run(&o, &cutting_silent));
        assert_ok(model_open(&source, o.model));
        assert_ok(model_open(&cut, o.out));
        assert_ok(model_bind(&cut, NULL, NULL));
        for (size_t k = 0; k < cut.n_linears; k++)
            assert_true(cut.linears[k].quantized);
        size_t n_dead = 0;
        for (size_t k = 0; k < source.checkpoint.n_tensors; k++) {
            const char *name = source.checkpoint.tensors[k].name;
            n_dead += gemma_is_dead(&source.gemma, source.prefix, name);
            assert_true(!gemma_is_dead(&source.gemma, source.prefix, name) ||
                        !checkpoint_tensor(&cut.checkpoint, name));
            if (text_ends_with(name, "norm.weight") || strstr(name, "per_layer"))
                assert_non_null(checkpoint_tensor(&cut.checkpoint, name));
        }
        assert_int_equal(n_dead, i == TINY_GEMMA4_SHARING ? 6 : 0);
        model_close(&source);
        model_close(&cut);
    }
}

static bool lists(const struct quant_config *q, const char *name)
{
    for (size_t i = 0; i < q->n_ignore; i++)
        if (!strcmp(q->ignore[i], name))
            return true;
    return false;
}

/* AutoRound's readers quantize every linear of the blocks that they are not told of. */
static void test_names(void **state)
{
    (void)state;
    struct model m;
    struct recipe_plan plan;
    struct quant_config q;
    const char *const kept[] = {"*layers.2.self_attn.*"};
    const struct recipe r = {
        .method = "rtn", .format = QUANT_AUTO_ROUND, .scheme = {4, true, 32}, .ignore = kept, .n_ignore = 1};
    for (int i = TINY_GEMMA4_SHARING; i < TINY_FAMILIES; i++) {
        const bool sharing = i == TINY_GEMMA4_SHARING;
        assert_ok(model_open(&m, cut_of(i, "").model));
        assert_ok(recipe_resolve(&plan, &r, &m.tensors));
        assert_ok(recipe_quant_config(&q, &plan, r.format, false, &m.gemma));
        assert_true(lists(&q, "model.layers.5.per_layer_input_gate") == sharing &&
                    lists(&q, "model.layers.0.per_layer_projection") == sharing);
        assert_true(lists(&q, "model.layers.2.self_attn.k_proj") &&
                    lists(&q, "model.layers.2.self_attn.v_proj"));
        assert_false(lists(&q, "model.layers.1.self_attn.v_proj"));
        quant_config_free(&q);
        recipe_plan_free(&plan);
        model_close(&m);
    }
}

enum { SAMPLES = 3, LENGTH = 20 };

/* Methods that look at activations take every family; the same bytes with one and with three threads. */
static void test_calibrated(void **state)
{
    (void)state;
    static int32_t ids[SAMPLES * LENGTH];
    for (int i = 0; i < SAMPLES * LENGTH; i++)
        ids[i] = i % LENGTH ? (i * 7919 + 13) % 128 : 2;
    const struct dataset data = {.samples = SAMPLES, .length = LENGTH, .ids = ids};
    for (int i = 0; i < TINY_FAMILIES * 2; i++) {
        const int family = i / 2;
        const char *outs[2];
        for (int k = 0; k < 2; k++) {
            struct cut_options o = cut_of(family, support_path("calibrated-%d-%d", i, k));
            o.recipe.method = i % 2 ? "autoround" : "gptq";
            o.recipe.sweep = o.recipe.calibrated = true;
            o.recipe.scales.rule = SCALE_BLOCK;
            o.recipe.damping = 0.01;
            o.recipe.passes = 1;
            o.recipe.calib.text = "made up";
            if (i % 2)
                o.recipe.tune = (struct tune_options){
                    .iterations = 3, .batch = 2, .lr = 0.1, .range_lr = 0.02, .init = TUNE_FROM_CODES};
            o.data = &data;
            o.n_workers = 2 * k + 1;
            outs[k] = o.out;
            assert_ok(cutting_run(&o, &cutting_silent));
        }
        cutting_check_same(outs[0], outs[1]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_size),  cmocka_unit_test(test_layers), cmocka_unit_test(test_settings),
        cmocka_unit_test(test_refused),    cmocka_unit_test(test_cut),    cmocka_unit_test(test_names),
        cmocka_unit_test(test_calibrated),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

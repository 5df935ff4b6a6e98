/* config.json spliced without disturbing a byte, and quantization_config written, read back and matched. */
#include "formats/hf_config.h"
#include "formats/quant_match.h"
#include "tests/unit/support.h"

/* --- config.json ---------------------------------------------------------------------------------------------- */

static const struct {
    const char *text, *spliced;
} splices[] = {
    {"{\"model_type\": \"g\"}", "{\n  \"quantization_config\": {Q},\"model_type\": \"g\"}"},
    /* numbers, spaces, escapes, order and repeated keys stay as they are */
    {"  {\r\n\t\"model_type\" : \"g\",  \"x\":1000000.0, \"y\":1e-06,\"y\":\"\\u00e9\\\"dtype\\\": \\\"float32\\\"\" }\n\n",
     "  {\n  \"quantization_config\": {Q},\r\n\t\"model_type\" : \"g\",  \"x\":1000000.0, \"y\":1e-06,"
     "\"y\":\"\\u00e9\\\"dtype\\\": \\\"float32\\\"\" }\n\n"},
    /* both spellings, at every depth; not as a value, not when null or a number */
    {"{\"torch_dtype\": \"float32\", \"model_type\": \"g\", \"text_config\": {\"dtype\"\n:\"float16\",\"a\": [{\"dtype\":\"x\"}]}}",
     "{\n  \"quantization_config\": {Q},\"torch_dtype\": \"bfloat16\", \"model_type\": \"g\", \"text_config\": "
     "{\"dtype\"\n:\"bfloat16\",\"a\": [{\"dtype\":\"bfloat16\"}]}}"},
    {"{\"model_type\": \"dtype\", \"a\": [\"dtype\", \"float32\"], \"b\": {\"dtype\": null, \"torch_dtype\": 3}, "
     "\"my_dtype\": \"float32\"}",
     "{\n  \"quantization_config\": {Q},\"model_type\": \"dtype\", \"a\": [\"dtype\", \"float32\"], \"b\": "
     "{\"dtype\": null, \"torch_dtype\": 3}, \"my_dtype\": \"float32\"}"},
    /* a null one further down is nobody's business */
    {"{\"model_type\": \"g\", \"text_config\": {\"quantization_config\": null}}",
     "{\n  \"quantization_config\": {Q},\"model_type\": \"g\", \"text_config\": {\"quantization_config\": null}}"},
    {"{\"quantization_config\" :\tnull, \"model_type\": \"g\", \"a\": [{\"quantization_config\": null}]}",
     "{\"quantization_config\" :\t{Q}, \"model_type\": \"g\", \"a\": [{\"quantization_config\": null}]}"},
    {"{\"model_type\": \"g\", \"dtype\": \"\"}",
     "{\n  \"quantization_config\": {Q},\"model_type\": \"g\", \"dtype\": \"bfloat16\"}"},
    {"{\"model_type\": \"g\", \"dtype\": \"a\\\\\"}",
     "{\n  \"quantization_config\": {Q},\"model_type\": \"g\", \"dtype\": \"bfloat16\"}"},
};

static void test_splice(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(splices); i++) {
        struct hf_config cfg;
        struct text out = {0};
        assert_ok(hf_config_parse(&cfg, splices[i].text, strlen(splices[i].text), "config.json"));
        assert_ok(hf_config_splice(&cfg, "{Q}", &out));
        assert_string_equal(out.data, splices[i].spliced);
        assert_int_equal(out.len, strlen(splices[i].spliced));
        text_free(&out);
        hf_config_close(&cfg);
    }
}

/* A member that is there but null would come second, and readers let the last one win. */
static void test_splice_over_null(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "{\"model_type\": \"g\", \"quantization_config\": null, \"z\": 1}",
        "{\"quantization_config\" :\tnull, \"model_type\": \"g\"}",
        "{\"model_type\": \"g\", \"quantization_config\": null}",
    };
    for (size_t i = 0; i < N_OF(texts); i++) {
        struct hf_config cfg;
        struct text out = {0};
        struct json_doc *doc;
        int n = 0;
        assert_ok(hf_config_parse(&cfg, texts[i], strlen(texts[i]), "config.json"));
        assert_false(json_exists(cfg.quantization));
        assert_ok(hf_config_splice(&cfg, "{\"quant_method\": \"q\"}", &out));
        assert_ok(json_parse(&doc, out.data, out.len, "spliced"));
        struct json last = {0};
        for (struct json e = json_first(json_root(doc)); e.node; e = json_next(e))
            if (!strcmp(json_key(e), "quantization_config")) {
                last = e;
                n++;
            }
        assert_int_equal(n, 1);
        assert_true(json_is_object(last));
        json_free(doc);
        text_free(&out);
        hf_config_close(&cfg);
    }
}

static void test_config_fields(void **state)
{
    (void)state;
    static const char multimodal[] =
        "{\"architectures\": [\"A\", \"B\"], \"model_type\": \"gemma3\", \"text_config\": {\"model_type\": "
        "\"gemma3_text\", \"torch_dtype\": \"float16\", \"quantization_config\": {\"quant_method\": \"x\"}}}";
    struct hf_config cfg;
    assert_ok(hf_config_parse(&cfg, multimodal, strlen(multimodal), "c"));
    assert_string_equal(cfg.model_type, "gemma3");
    assert_string_equal(cfg.text_model_type, "gemma3_text");
    assert_string_equal(cfg.architecture, "A");
    assert_string_equal(cfg.dtype, "float16");
    assert_true(json_exists(cfg.quantization));
    hf_config_close(&cfg);
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"[]", "is not an object"},
        {"{}", "has no member 'model_type'"},
        {"{\"model_type\": 3}", "'model_type' is not a string"},
        {"{\"model_type\": \"g\", \"text_config\": []}", "'text_config' is not an object"},
        {"{\"model_type\": \"g\", \"quantization_config\": []}", "'quantization_config' is not an object"},
        {"{\"model_type\": \"g\", \"dtype\": 3}", "'dtype' is not a string"},
        {"{\"model_type\": \"g\", \"architectures\": [3]}", "'architectures[0]' is not a string"},
    };
    for (size_t i = 0; i < N_OF(bad); i++)
        assert_error(hf_config_parse(&cfg, bad[i].text, strlen(bad[i].text), "c"), ERR_FORMAT,
                     bad[i].message);
}

/* --- quantization_config -------------------------------------------------------------------------------------- */

static void add_group(struct quant_config *cfg, struct quant_scheme scheme, const char *target)
{
    struct quant_group *g;
    assert_ok(quant_config_add_group(cfg, scheme, &g));
    assert_ok(quant_config_add(&g->targets, &g->n_targets, target));
}

static void check_match(const struct quant_config *cfg, const char *module, int expected,
                        struct quant_scheme s)
{
    struct quant_scheme scheme = {0};
    const int rc = quant_config_match(cfg, module, &scheme);
    if (rc != expected)
        fail_msg("'%s' gives %d, expected %d", module, rc, expected);
    if (rc == 1 && (scheme.bits != s.bits || scheme.symmetric != s.symmetric || scheme.group != s.group))
        fail_msg("'%s' gets %d bits, symmetric %d, group %d", module, scheme.bits, scheme.symmetric,
                 (int)scheme.group);
}

static void check_matches(const struct quant_config *cfg)
{
    const struct quant_scheme none = {0}, w4 = {4, true, 128}, w8 = {8, true, 0}, asym = {4, false, 32};
    check_match(cfg, "model.layers.0.mlp.up_proj", 1, w4);
    check_match(cfg, "model.layers.1.mlp.down_proj", 1, w8);
    check_match(cfg, "model.layers.11.mlp.down_proj", 1, w4);  /* the dots of "layers\.1\." hold */
    check_match(cfg, "model.layers.2.mlp.down_proj", 1, asym); /* a name before an expression */
    check_match(cfg, "model.layers.1.mlp.down_proj.x", 1, w4); /* $ */
    check_match(cfg, "xlayers.1.mlp.down_proj", 1, w8);        /* .* at the start */
    check_match(cfg, "lm_head", 0, none);
    check_match(cfg, "model.lm_head", 0, none);
    check_match(cfg, "lm_heads", 0, none); /* re.match does not demand the end … */
    check_match(cfg, "head.lm_headless", 0, none);
    check_match(cfg, "vision_tower.layers.1.mlp.down_proj", 0, none); /* ignore before any target */
    check_match(cfg, "model.vision_tower.x", 1, w4);                  /* … but it does the start */
    check_match(cfg, "model.layers.3.mlp.gate_proj", 0, none);        /* an exact ignore */
    check_match(cfg, "model.layers.3.mlp.gate_proj2", 1, w4);
}

static void test_quant_config(void **state)
{
    (void)state;
    struct quant_config cfg = {.act_order = true}, back;
    add_group(&cfg, (struct quant_scheme){4, true, 128}, "Linear");
    add_group(&cfg, (struct quant_scheme){8, true, 0}, "re:.*layers\\.(1|2)\\.mlp\\.down_proj$");
    add_group(&cfg, (struct quant_scheme){4, false, 32}, "model.layers.2.mlp.down_proj");
    static const char *const ignore[] = {"re:.*lm_head", "lm_head", "re:vision_tower",
                                         "model.layers.3.mlp.gate_proj"};
    for (size_t i = 0; i < N_OF(ignore); i++)
        assert_ok(quant_config_add(&cfg.ignore, &cfg.n_ignore, ignore[i]));
    check_matches(&cfg);
    struct text first = {.indent = 2}, second = {.indent = 2};
    struct json_doc *doc;
    quant_config_write(&cfg, &first);
    assert_ok(text_finish(&first));
    assert_ok(json_parse(&doc, first.data, first.len, "q"));
    assert_ok(quant_config_read(&back, json_root(doc)));
    assert_true(back.act_order && back.n_groups == 3 && back.n_ignore == 4);
    check_matches(&back);
    quant_config_write(&back, &second);
    assert_ok(text_finish(&second));
    assert_string_equal(first.data, second.data);
    json_free(doc);
    text_free(&first);
    text_free(&second);
    quant_config_free(&back);
    quant_config_free(&cfg);
}

/* What readers of several releases demand, forbid or misread (see formats/quant_config.h). */
static void test_quant_config_keys(void **state)
{
    (void)state;
    struct quant_config cfg = {0};
    struct text t = {0};
    add_group(&cfg, (struct quant_scheme){4, true, 128}, "Linear");
    add_group(&cfg, (struct quant_scheme){8, true, 0}, "re:x");
    quant_config_write(&cfg, &t);
    assert_ok(text_finish(&t));
    assert_string_equal(
        t.data,
        "{\"config_groups\": {\"group_0\": {\"targets\": [\"Linear\"], \"weights\": {\"num_bits\": 4, \"type\": "
        "\"int\", \"symmetric\": true, \"strategy\": \"group\", \"group_size\": 128, \"dynamic\": false, "
        "\"actorder\": null, \"observer\": \"minmax\", \"observer_kwargs\": {}, \"block_structure\": null}, "
        "\"input_activations\": null, \"output_activations\": null}, \"group_1\": {\"targets\": [\"re:x\"], "
        "\"weights\": {\"num_bits\": 8, \"type\": \"int\", \"symmetric\": true, \"strategy\": \"channel\", "
        "\"group_size\": null, \"dynamic\": false, \"actorder\": null, \"observer\": \"minmax\", "
        "\"observer_kwargs\": {}, \"block_structure\": null}, \"input_activations\": null, \"output_activations\": "
        "null}}, \"format\": \"pack-quantized\", \"global_compression_ratio\": null, \"ignore\": [], "
        "\"kv_cache_scheme\": null, \"quant_method\": \"compressed-tensors\", \"quantization_status\": "
        "\"compressed\"}");
    text_free(&t);
    quant_config_free(&cfg);
}

#define QUANT(method, format, weights)                                                                       \
    "{\"quant_method\": \"" method "\", \"format\": \"" format                                               \
    "\", \"config_groups\": {\"g\": {\"targets\": "                                                          \
    "[\"Linear\"], \"weights\": " weights "}}}"
#define CT(weights) QUANT("compressed-tensors", "pack-quantized", weights)

static void test_quant_config_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } bad[] = {
        {QUANT("awq", "pack-quantized", "{}"), "is 'awq', expected compressed-tensors"},
        {QUANT("compressed-tensors", "int-quantized", "{}"), "is 'int-quantized', expected pack-quantized"},
        {CT("null"), "has no member 'weights'"},
        {CT("{\"num_bits\": 3, \"strategy\": \"group\", \"group_size\": 32}"),
         "is int3, expected int4 or int8"},
        {CT("{\"num_bits\": 4, \"type\": \"float\", \"strategy\": \"group\"}"), "is float4"},
        {CT("{\"num_bits\": 4, \"strategy\": \"tensor\"}"), "has strategy 'tensor'"},
        {CT("{\"num_bits\": 4, \"strategy\": \"group\", \"group_size\": -2}"),
         "'config_groups.g.weights.group_size'"},
        {CT("{\"num_bits\": 4, \"strategy\": \"group\", \"group_size\": 0}"), "'config_groups.g.weights"},
        {CT("{\"num_bits\": 4, \"strategy\": \"group\"}"), "'config_groups.g.weights"},
        {"{\"quant_method\": \"compressed-tensors\", \"format\": \"pack-quantized\"}", "'config_groups'"},
    };
    for (size_t i = 0; i < N_OF(bad); i++) {
        struct json_doc *doc;
        struct quant_config cfg;
        assert_ok(json_parse(&doc, bad[i].text, strlen(bad[i].text), "q"));
        assert_error(quant_config_read(&cfg, json_root(doc)), ERR_FORMAT, bad[i].message);
        json_free(doc);
    }
}

/* Patterns beyond POSIX are refused, not guessed. */
static void test_patterns(void **state)
{
    (void)state;
    static const char *const beyond[] = {
        "re:(?i)x", "re:\\d+",   "re:a{2}", "re:.*?x",
        "re:a++",   "re:(a)\\2", "re:\\bx", "re:((((((((((a+)+)+)+)+)+)+)+)+)+)"};
    struct quant_scheme s;
    for (size_t i = 0; i < N_OF(beyond); i++) {
        struct quant_config cfg = {0};
        assert_ok(quant_config_add(&cfg.ignore, &cfg.n_ignore, beyond[i]));
        assert_error(quant_config_match(&cfg, "a.b", &s), ERR_UNSUPPORTED, beyond[i]);
        quant_config_free(&cfg);
    }
    struct quant_config cfg = {0};
    assert_ok(quant_config_add(&cfg.ignore, &cfg.n_ignore, "re:(a"));
    assert_error(quant_config_match(&cfg, "a.b", &s), ERR_FORMAT, "is not a regular expression");
    quant_config_free(&cfg);
}

/* Of many modules each gets what it gets alone, whatever was asked before it; the first group that names one counts. */
static void test_many_modules(void **state)
{
    (void)state;
    enum { LAYERS = 30, EXPERTS = 40 };
    struct quant_config cfg = {0};
    struct quant_matcher *m;
    char name[64];
    add_group(&cfg, (struct quant_scheme){4, true, 128}, "Linear");
    add_group(&cfg, (struct quant_scheme){8, true, 0}, "re:.*experts\\.[0-9]*[05]\\.up$");
    add_group(&cfg, (struct quant_scheme){8, true, 64}, "model.layers.7.experts.10.up");
    add_group(&cfg, (struct quant_scheme){4, false, 32}, "language_model.layers.7.experts.10.up");
    for (int e = 0; e < EXPERTS; e++) {
        snprintf(name, sizeof name, "model.layers.3.experts.%d.up", e);
        assert_ok(quant_config_add(&cfg.ignore, &cfg.n_ignore, name));
    }
    assert_ok(quant_config_add(&cfg.ignore, &cfg.n_ignore, "re:.*layers\\.(5|15)\\."));
    assert_ok(quant_matcher_open(&m, &cfg));
    for (int i = 0; i < 2 * LAYERS * EXPERTS; i++) {
        struct quant_scheme s = {0};
        const int layer = i % LAYERS, e = i / LAYERS % EXPERTS;
        snprintf(name, sizeof name, "model.layers.%d.experts.%d.up", layer, e);
        const int rc = quant_matcher_find(m, name, &s);
        assert_int_equal(rc, layer != 3 && layer != 5 && layer != 15);
        if (rc)
            assert_true(s.group == (layer == 7 && e == 10 ? 64 : e % 5 ? 128 : 0));
        check_match(&cfg, name, rc, s);
    }
    quant_matcher_close(m);
    quant_config_free(&cfg);
}

static void test_shapes(void **state)
{
    (void)state;
    const struct quant_scheme w4 = {4, true, 128}, w8 = {8, true, 0};
    assert_int_equal(quant_packed_cols(w4, 128), 16);
    assert_int_equal(quant_packed_cols(w4, 13), 2);
    assert_int_equal(quant_packed_cols(w8, 10), 3);
    assert_int_equal(quant_groups(w4, 256), 2);
    assert_int_equal(quant_groups(w4, 100), 1);
    assert_int_equal(quant_groups(w8, 4100), 1);
    assert_int_equal(quant_zero_rows(w4, 9), 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_splice),
        cmocka_unit_test(test_splice_over_null),
        cmocka_unit_test(test_config_fields),
        cmocka_unit_test(test_quant_config),
        cmocka_unit_test(test_quant_config_keys),
        cmocka_unit_test(test_quant_config_refused),
        cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_many_modules),
        cmocka_unit_test(test_shapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

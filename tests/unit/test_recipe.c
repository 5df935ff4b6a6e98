/* From what the user asks to what happens to each linear: patterns, fused sets, ragged widths, and the
 * quantization_config that describes the outcome to every reader. */
#include "tests/unit/recipe_support.h"

/* 96 = 3 · 32; the MLP's 4352 = 17 · 256 */
static const struct tiny_gemma model = {.hidden = 96,
                                        .ffn = 4352,
                                        .vocab = 64,
                                        .layers = 3,
                                        .heads = 4,
                                        .kv_heads = 2,
                                        .head_dim = 64,
                                        .dtype = DTYPE_BF16};

static int setup(void **state)
{
    (void)state;
    return recipe_setup(&model);
}

static const struct recipe g32 = {.method = "rtn", .scheme = {4, true, 32}};

static void resolve(struct recipe_plan *plan, const struct recipe *r)
{
    recipe_settle(plan, r);
    assert_int_equal(plan->n, 3 * 7);
}

static void check_refused(const struct recipe *r, int code, const char *message)
{
    struct recipe_plan plan;
    assert_error(recipe_resolve(&plan, r, &recipe_tensors), code, message);
}

static const struct linear_plan *find(const struct recipe_plan *plan, int layer, enum gemma_role role)
{
    for (size_t i = 0; i < plan->n; i++)
        if (plan->linears[i].tensor->layer == layer && plan->linears[i].tensor->role == role)
            return &plan->linears[i];
    fail_msg("layer %d has no role %d", layer, role);
    return NULL;
}

/* bits 0: kept in 16 bits */
static void check_linear(const struct recipe_plan *plan, int layer, enum gemma_role role, int bits,
                         int64_t group)
{
    const struct linear_plan *l = find(plan, layer, role);
    if (l->quantized != (bits > 0) || (bits && (l->scheme.bits != bits || l->scheme.group != group)))
        fail_msg("%s: quantized %d, %d bits, group %d; expected %d bits, group %d", l->tensor->name,
                 l->quantized, l->scheme.bits, (int)l->scheme.group, bits, (int)group);
}

static void check_all(const struct recipe_plan *plan, int bits, int64_t group)
{
    for (int layer = 0; layer < model.layers; layer++)
        for (int role = GEMMA_Q; role <= GEMMA_DOWN; role++)
            check_linear(plan, layer, (enum gemma_role)role, bits, group);
}

static void test_words(void **state)
{
    (void)state;
    struct quant_scheme s = {0, false, 77};
    int64_t group;
    enum scale_rule rule;
    assert_ok(recipe_parse_scheme("w4a16-asym", &s));
    assert_true(s.bits == 4 && !s.symmetric && s.group == 77);
    assert_string_equal(recipe_scheme_name(s), "w4a16-asym");
    assert_ok(recipe_parse_scheme("w8a16", &s));
    assert_true(s.bits == 8 && s.symmetric);
    assert_error(recipe_parse_scheme("w3", &s), ERR_USAGE, "unknown scheme 'w3'");
    assert_ok(recipe_parse_group("channel", &group));
    assert_int_equal(group, 0);
    assert_error(recipe_parse_group("100", &group), ERR_USAGE, "unknown group size '100'");
    assert_error(recipe_parse_group("0", &group), ERR_USAGE, "unknown group size '0'");
    assert_ok(recipe_parse_scales("mse", &rule));
    assert_int_equal(rule, SCALE_MSE);
    assert_error(recipe_parse_scales("best", &rule), ERR_USAGE, "unknown scale rule 'best'");
}

static void test_override_text(void **state)
{
    (void)state;
    const struct quant_scheme base = {4, true, 128};
    static const struct {
        const char *text, *glob;
        struct quant_scheme scheme;
    } good[] = {
        {"*.q_proj=w8a16,64", "*.q_proj", {8, true, 64}},
        {"*=w4a16-asym", "*", {4, false, 128}},
        {"a=b=,channel", "a=b", {4, true, 0}},
    };
    for (size_t i = 0; i < N_OF(good); i++) {
        struct recipe_override o;
        assert_ok(recipe_parse_override(good[i].text, base, &o));
        assert_string_equal(o.glob, good[i].glob);
        assert_memory_equal(&o.scheme.bits, &good[i].scheme.bits, sizeof(int));
        assert_true(o.scheme.symmetric == good[i].scheme.symmetric && o.scheme.group == good[i].scheme.group);
        free(o.glob);
    }
    static const char *const bad[] = {"", "x", "=w8a16", "x=", "x=w9", "x=w8a16,5", "x=w8a16,"};
    for (size_t i = 0; i < N_OF(bad); i++) {
        struct recipe_override o;
        assert_error(recipe_parse_override(bad[i], base, &o), ERR_USAGE, "override");
    }
}

static void test_everything(void **state)
{
    (void)state;
    struct recipe_plan plan;
    resolve(&plan, &g32);
    check_all(&plan, 4, 32);
    assert_string_equal(recipe_warnings, "");
    recipe_plan_free(&plan);
}

/* A pattern that names one member of a set takes the set; globs may or may not end in ".weight". */
static void test_fused_sets(void **state)
{
    (void)state;
    struct recipe_plan plan;
    struct recipe r = g32;
    static const char *const ignore[] = {"model.layers.1.self_attn.k_proj", "*.2.mlp.up_proj.weight",
                                         "model.layers.0.mlp.down_proj"};
    r.ignore = ignore;
    r.n_ignore = N_OF(ignore);
    resolve(&plan, &r);
    for (int role = GEMMA_Q; role <= GEMMA_DOWN; role++) {
        check_linear(&plan, 0, (enum gemma_role)role, role == GEMMA_DOWN ? 0 : 4, 32);
        check_linear(&plan, 1, (enum gemma_role)role, role <= GEMMA_V ? 0 : 4, 32);
        check_linear(&plan, 2, (enum gemma_role)role, role == GEMMA_GATE || role == GEMMA_UP ? 0 : 4, 32);
    }
    assert_non_null(strstr(recipe_warnings, "'model.layers.1.self_attn.k_proj' names only a part"));
    assert_null(strstr(recipe_warnings, "down_proj'"));
    assert_string_equal(find(&plan, 0, GEMMA_DOWN)->why, "ignored");
    recipe_plan_free(&plan);
}

/* ignore beats only and override; of two overrides the later one wins. */
static void test_precedence(void **state)
{
    (void)state;
    struct recipe_plan plan;
    struct recipe r = g32;
    static const char *const only[] = {"*.0.*", "*.1.mlp.*"}, *const ignore[] = {"*.0.self_attn.[qkv]_proj"};
    struct recipe_override overrides[] = {
        {(char[]){"*.mlp.*"}, {8, true, 64}},
        {(char[]){"*.1.mlp.down_proj"}, {4, false, 0}},
        {(char[]){"*.0.self_attn.q_proj"}, {8, true, 32}},
    };
    r.only = only;
    r.n_only = N_OF(only);
    r.ignore = ignore;
    r.n_ignore = N_OF(ignore);
    r.overrides = overrides;
    r.n_overrides = N_OF(overrides);
    r.ragged = RAGGED_KEEP;
    resolve(&plan, &r);
    check_linear(&plan, 0, GEMMA_Q, 0, 0);
    check_linear(&plan, 0, GEMMA_O, 4, 32);
    check_linear(&plan, 0, GEMMA_GATE, 0, 0); /* 96 columns, groups of 64 */
    assert_string_equal(find(&plan, 0, GEMMA_GATE)->why, "ragged");
    check_linear(&plan, 0, GEMMA_DOWN, 8, 64);
    check_linear(&plan, 1, GEMMA_DOWN, 4, 0);
    assert_false(find(&plan, 1, GEMMA_DOWN)->scheme.symmetric);
    check_linear(&plan, 1, GEMMA_O, 0, 0);
    check_linear(&plan, 2, GEMMA_DOWN, 0, 0);
    assert_string_equal(find(&plan, 2, GEMMA_DOWN)->why, "not in --only");
    recipe_plan_free(&plan);
}

static void test_ragged(void **state)
{
    (void)state;
    struct recipe_plan plan;
    struct recipe r = g32;
    r.scheme.group = 128;
    resolve(&plan, &r);
    check_linear(&plan, 0, GEMMA_Q, 4, 32); /* 96 columns */
    check_linear(&plan, 0, GEMMA_GATE, 4, 32);
    check_linear(&plan, 0, GEMMA_O, 4, 128); /* 256 columns */
    check_linear(&plan, 0, GEMMA_DOWN, 4, 128);
    assert_non_null(strstr(recipe_warnings, "the group size does not divide the width of 15 linears"));
    recipe_plan_free(&plan);
    r.ragged = RAGGED_KEEP;
    resolve(&plan, &r);
    check_linear(&plan, 2, GEMMA_Q, 0, 0);
    check_linear(&plan, 2, GEMMA_DOWN, 4, 128);
    recipe_plan_free(&plan);
    r.ragged = RAGGED_ERROR;
    check_refused(&r, ERR_UNSUPPORTED, "'model.layers.0.self_attn.q_proj.weight' has 96 columns");
    r.scheme.group = 0;
    resolve(&plan, &r);
    check_all(&plan, 4, 0);
    recipe_plan_free(&plan);
    r.scheme.group = 256;
    r.ragged = RAGGED_SMALLER;
    resolve(&plan, &r);
    assert_non_null(strstr(recipe_warnings, "groups of 256 have no fast kernel"));
    recipe_plan_free(&plan);
}

static void test_unused_patterns(void **state)
{
    (void)state;
    static const char *const typo[] = {"*.q_prj"}, *const norm[] = {"*norm*"}, *const everything[] = {"*"};
    struct recipe_override override = {(char[]){"*.embed_tokens"}, {8, true, 32}};
    struct recipe r = g32;
    r.ignore = typo;
    r.n_ignore = 1;
    check_refused(&r, ERR_USAGE, "--ignore '*.q_prj' matches no linear");
    r = g32;
    r.only = norm;
    r.n_only = 1;
    check_refused(&r, ERR_USAGE, "--only '*norm*' matches no linear");
    r = g32;
    r.overrides = &override;
    r.n_overrides = 1;
    check_refused(&r, ERR_USAGE, "--override '*.embed_tokens' matches no linear");
    r = g32;
    r.ignore = everything;
    r.n_ignore = 1;
    check_refused(&r, ERR_USAGE, "quantizes nothing");
}

/* --- the description ------------------------------------------------------------------------------------------ */

/* What a reader makes of the description must be the plan, linear by linear. */
static void check_described(const struct recipe *r, struct quant_config *q)
{
    struct recipe_plan plan;
    resolve(&plan, r);
    assert_ok(recipe_quant_config(q, &plan, r->format, recipe_act_order(r), &recipe_config));
    for (size_t i = 0; i < plan.n; i++) {
        const struct linear_plan *l = &plan.linears[i];
        char *module = gemma_module(l->tensor);
        struct quant_scheme s = {0};
        const int rc = quant_config_match(q, module, &s);
        if (rc != (int)l->quantized ||
            (rc == 1 &&
             (s.bits != l->scheme.bits || s.symmetric != l->scheme.symmetric || s.group != l->scheme.group)))
            fail_msg("%s is described as %d: %d bits, group %d", module, rc, s.bits, (int)s.group);
        free(module);
    }
    recipe_plan_free(&plan);
}

static void test_described_plainly(void **state)
{
    (void)state;
    struct quant_config q;
    struct quant_scheme s;
    check_described(&g32, &q);
    assert_true(q.n_groups == 1 && q.groups[0].n_targets == 1 && !q.act_order);
    assert_string_equal(q.groups[0].targets[0], "Linear");
    assert_int_equal(quant_config_match(&q, "lm_head", &s), 0);
    quant_config_free(&q);
    struct recipe gptq = g32;
    gptq.method = "gptq";
    gptq.sweep = true;
    check_described(&gptq, &q);
    assert_true(q.act_order);
    quant_config_free(&q);
}

static bool has(char *const *list, size_t n, const char *entry)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i], entry))
            return true;
    return false;
}

/* Mixed plans: expressions that also match the names under which vLLM fuses q/k/v and gate/up. */
static void test_described_mixed(void **state)
{
    (void)state;
    static const char *const ignore[] = {"*.0.mlp.down_proj", "*.2.self_attn.v_proj"};
    struct recipe_override overrides[] = {
        {(char[]){"*.self_attn.o_proj"}, {8, true, 64}},
        {(char[]){"*.1.mlp.gate_proj"}, {8, true, 32}},
    };
    struct recipe r = g32;
    struct quant_config q;
    struct quant_scheme s;
    r.ignore = ignore;
    r.n_ignore = N_OF(ignore);
    r.overrides = overrides;
    r.n_overrides = N_OF(overrides);
    check_described(&r, &q);
    assert_int_equal(q.n_groups, 3);
    assert_true(has(q.ignore, q.n_ignore, "re:.*layers\\.(0)\\.mlp\\.down_proj$"));
    assert_true(has(q.ignore, q.n_ignore, "re:.*layers\\.(2)\\.self_attn\\.(q|k|v|qkv)_proj$"));
    assert_int_equal(quant_config_match(&q, "model.layers.2.self_attn.qkv_proj", &s), 0);
    assert_int_equal(quant_config_match(&q, "model.layers.1.mlp.gate_up_proj", &s), 1);
    assert_true(s.bits == 8 && s.group == 32);
    assert_int_equal(quant_config_match(&q, "model.layers.1.self_attn.qkv_proj", &s), 1);
    assert_true(s.bits == 4 && s.group == 32);
    quant_config_free(&q);
}

static void test_described_ragged(void **state)
{
    (void)state;
    struct recipe r = g32;
    struct quant_config q;
    r.scheme.group = 128;
    check_described(&r, &q);
    assert_int_equal(q.n_groups, 2);
    quant_config_free(&q);
    r.ragged = RAGGED_KEEP;
    check_described(&r, &q);
    assert_int_equal(q.n_groups, 1);
    quant_config_free(&q);
}

static void test_written(void **state)
{
    (void)state;
    static const char *const ignore[] = {"*.q_proj"};
    struct recipe_override override = {(char[]){"*.o_proj"}, {8, true, 0}};
    const struct recipe r = {.method = "rtn",
                             .scheme = {4, false, 64},
                             .scales = {SCALE_MSE, true},
                             .ragged = RAGGED_KEEP,
                             .ignore = ignore,
                             .n_ignore = 1,
                             .overrides = &override,
                             .n_overrides = 1,
                             .allow_nonfinite = true};
    struct text t = {0};
    recipe_write(&r, &t);
    assert_ok(text_finish(&t));
    assert_string_equal(
        t.data,
        "{\"method\": \"rtn\", \"format\": \"compressed-tensors\", \"scheme\": \"w4a16-asym\", \"group_size\": 64, \"scales\": "
        "\"mse\", \"scale_sign\": \"positive\", \"ragged\": \"keep\", \"ignore\": "
        "[\"*.q_proj\"], \"only\": [], \"override\": [{\"glob\": \"*.o_proj\", \"scheme\": "
        "\"w8a16\", \"group_size\": \"channel\"}], \"allow_nonfinite\": true}");
    text_free(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words),           cmocka_unit_test(test_override_text),
        cmocka_unit_test(test_everything),      cmocka_unit_test(test_fused_sets),
        cmocka_unit_test(test_precedence),      cmocka_unit_test(test_ragged),
        cmocka_unit_test(test_unused_patterns), cmocka_unit_test(test_described_plainly),
        cmocka_unit_test(test_described_mixed), cmocka_unit_test(test_described_ragged),
        cmocka_unit_test(test_written),
    };
    return cmocka_run_group_tests(tests, setup, recipe_teardown);
}

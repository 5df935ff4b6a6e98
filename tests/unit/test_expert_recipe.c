/* What becomes of a mixture of experts by a recipe: all experts of a layer alike, in groups that divide both of their widths,
 * and described to every reader so. */
#include "tests/unit/recipe_support.h"

/* 384 = 3 · 128, the MLP's 320 and the experts' 192 are multiples of 64; the last layer's values are its keys. */
static const struct tiny_gemma model = {
    .model_type = "gemma4_text",
    .more =
        "\"enable_moe_block\": true, \"num_experts\": 4, \"top_k_experts\": 2, \"moe_intermediate_size\": 192, "
        "\"layer_types\": [\"sliding_attention\", \"sliding_attention\", \"full_attention\"], "
        "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0, ",
    .hidden = 384,
    .ffn = 320,
    .vocab = 64,
    .layers = 3,
    .heads = 4,
    .kv_heads = 2,
    .head_dim = 64,
    .dtype = DTYPE_BF16};
enum { LAYERS = 3, N_EXPERTS = 4, N_LINEARS = LAYERS * (7 + 3 * N_EXPERTS) - 1 };

static int setup(void **state)
{
    (void)state;
    return recipe_setup(&model);
}

static struct recipe recipe_of(int64_t group, enum ragged_rule ragged)
{
    return (struct recipe){.method = "rtn", .scheme = {4, true, group}, .ragged = ragged};
}

static void resolve(struct recipe_plan *plan, const struct recipe *r)
{
    recipe_settle(plan, r);
    assert_int_equal(plan->n, N_LINEARS);
}

/* Every linear of that role in a layer (−1: in all), of the experts or beside them. bits 0: kept in 16 bits. */
static void check_linears(const struct recipe_plan *plan, int layer, bool experts, enum gemma_role role,
                          int bits, int64_t group)
{
    int n = 0;
    for (size_t i = 0; i < plan->n; i++) {
        const struct linear_plan *l = &plan->linears[i];
        if ((layer >= 0 && l->tensor->layer != layer) || l->tensor->role != role ||
            (l->tensor->expert >= 0) != experts)
            continue;
        n++;
        if (l->quantized != (bits > 0) || (bits && (l->scheme.bits != bits || l->scheme.group != group)))
            fail_msg("%s: quantized %d, %d bits, group %d; expected %d bits, group %d", l->tensor->name,
                     l->quantized, l->scheme.bits, (int)l->scheme.group, bits, (int)group);
    }
    assert_true(n >= (layer < 0 ? LAYERS - 1 : 1) * (experts ? N_EXPERTS : 1));
}

static void check_experts(const struct recipe_plan *plan, int layer, int bits, int64_t group)
{
    for (int role = GEMMA_GATE; role <= GEMMA_DOWN; role++)
        check_linears(plan, layer, true, (enum gemma_role)role, bits, group);
}

/* --- groups --------------------------------------------------------------------------------------------------------- */

static void test_ragged(void **state)
{
    (void)state;
    static const struct {
        int64_t asked;
        enum ragged_rule rule;
        int64_t wide, down,
            experts; /* groups of linears 384 wide, of the MLP's down, of experts; −1: 16 bits */
        const char *warning;
    } cases[] = {
        {32, RAGGED_ERROR, 32, 32, 32, NULL},
        {64, RAGGED_ERROR, 64, 64, 64, NULL},
        {0, RAGGED_ERROR, 0, 0, 0, NULL},
        {128, RAGGED_AUTO, 128, -1, 64,
         "width of 39 linears (first: model.layers.0.mlp.down_proj.weight): 36 get a smaller group, 3 stay"},
        {128, RAGGED_SMALLER, 128, 64, 64,
         "width of 39 linears (first: model.layers.0.mlp.down_proj.weight): 39 get a smaller group, 0 stay"},
        {128, RAGGED_KEEP, 128, -1, -1,
         "width of 39 linears (first: model.layers.0.mlp.down_proj.weight): 0 get a smaller group, 39 stay"},
        {256, RAGGED_AUTO, 128, -1, 64,
         "width of 53 linears (first: model.layers.0.self_attn.q_proj.weight): 50 get a smaller group, 3 stay"},
        {256, RAGGED_KEEP, -1, -1, -1, "0 get a smaller group"},
    };
    for (size_t i = 0; i < N_OF(cases); i++) {
        struct recipe_plan plan;
        const struct recipe r = recipe_of(cases[i].asked, cases[i].rule);
        resolve(&plan, &r);
        check_linears(&plan, -1, false, GEMMA_Q, cases[i].wide < 0 ? 0 : 4, cases[i].wide);
        check_linears(&plan, -1, false, GEMMA_UP, cases[i].wide < 0 ? 0 : 4, cases[i].wide);
        check_linears(&plan, -1, false, GEMMA_DOWN, cases[i].down < 0 ? 0 : 4, cases[i].down);
        check_experts(&plan, -1, cases[i].experts < 0 ? 0 : 4, cases[i].experts);
        if (cases[i].warning ? !strstr(recipe_warnings, cases[i].warning) : recipe_warnings[0])
            fail_msg("case %zu warns: %s", i, recipe_warnings);
        recipe_plan_free(&plan);
    }
}

static void test_ragged_refused(void **state)
{
    (void)state;
    struct recipe_plan plan;
    static const char *const down[] = {"*mlp.down_proj"};
    struct recipe r = recipe_of(128, RAGGED_ERROR);
    assert_error(recipe_resolve(&plan, &r, &recipe_tensors), ERR_UNSUPPORTED,
                 "'model.layers.0.mlp.down_proj.weight' has 320 columns, which groups of 128 do not divide");
    r.ignore = down;
    r.n_ignore = 1;
    assert_error(
        recipe_resolve(&plan, &r, &recipe_tensors), ERR_UNSUPPORTED,
        "'model.layers.0.experts.0.down_proj.weight' has 192 columns, which groups of 128 do not divide");
}

/* --- patterns ------------------------------------------------------------------------------------------------------- */

/* A glob that names some of a layer's experts, or some of their linears, takes all of them. */
static void test_partial(void **state)
{
    (void)state;
    static const char *const globs[] = {"*layers.1.experts.3.up_proj",
                                        "model.layers.1.experts.*.down_proj.weight", "*layers.1.experts.0.*"};
    for (size_t i = 0; i < N_OF(globs); i++) {
        struct recipe_plan plan;
        struct recipe r = recipe_of(32, RAGGED_AUTO);
        r.ignore = &globs[i];
        r.n_ignore = 1;
        resolve(&plan, &r);
        check_experts(&plan, 0, 4, 32);
        check_experts(&plan, 1, 0, 0);
        check_experts(&plan, 2, 4, 32);
        check_linears(&plan, -1, false, GEMMA_DOWN, 4, 32);
        if (!strstr(recipe_warnings,
                    "names only a part of what readers run as one matrix in 1 places (first: with "
                    "model.layers.1.experts.0.gate_proj.weight); it is applied to the whole there"))
            fail_msg("--ignore '%s' warns: %s", globs[i], recipe_warnings);
        recipe_plan_free(&plan);
    }
}

static void test_whole(void **state)
{
    (void)state;
    static const char *const ignore[] = {"*layers.0.experts.*"}, *const only[] = {"*.experts.*", "*o_proj"};
    struct recipe_override override = {(char[]){"*layers.[12].experts*"}, {8, false, 64}};
    struct recipe_plan plan;
    struct recipe r = recipe_of(32, RAGGED_AUTO);
    r.ignore = ignore;
    r.only = only;
    r.overrides = &override;
    r.n_ignore = r.n_overrides = 1;
    r.n_only = 2;
    resolve(&plan, &r);
    assert_string_equal(recipe_warnings, "");
    check_experts(&plan, 0, 0, 0);
    check_experts(&plan, 1, 8, 64);
    check_experts(&plan, 2, 8, 64);
    check_linears(&plan, -1, false, GEMMA_O, 4, 32);
    check_linears(&plan, -1, false, GEMMA_GATE, 0, 0);
    recipe_plan_free(&plan);
}

/* One name of two sets: the MLP's own down as it is meant, all of the experts with theirs. */
static void test_name_of_both(void **state)
{
    (void)state;
    struct recipe_override override = {(char[]){"*.down_proj"}, {8, true, 32}};
    struct recipe_plan plan;
    struct recipe r = recipe_of(64, RAGGED_AUTO);
    r.overrides = &override;
    r.n_overrides = 1;
    resolve(&plan, &r);
    check_linears(&plan, -1, false, GEMMA_DOWN, 8, 32);
    check_linears(&plan, -1, false, GEMMA_GATE, 4, 64);
    check_experts(&plan, -1, 8, 32);
    assert_non_null(
        strstr(recipe_warnings, "in 3 places (first: with model.layers.0.experts.0.gate_proj.weight)"));
    recipe_plan_free(&plan);
}

/* No linear that is ever quantized. */
static void test_router(void **state)
{
    (void)state;
    static const char *const router[] = {"*router*"};
    struct recipe_plan plan;
    struct recipe r = recipe_of(64, RAGGED_AUTO);
    r.ignore = router;
    r.n_ignore = 1;
    assert_error(recipe_resolve(&plan, &r, &recipe_tensors), ERR_USAGE,
                 "--ignore '*router*' matches no linear");
}

/* --- the description ------------------------------------------------------------------------------------------------ */

static bool has(char *const *list, size_t n, const char *entry)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i], entry))
            return true;
    return false;
}

/* What a reader makes of it, after it was written, must be the plan, linear by linear; and what a router is is left alone. */
static void check_described(const struct recipe *r, struct quant_config *q)
{
    struct recipe_plan plan;
    struct text t = {0};
    struct json_doc *doc;
    struct quant_config read;
    struct quant_scheme s;
    resolve(&plan, r);
    assert_ok(recipe_quant_config(q, &plan, r->format, false, &recipe_config));
    quant_config_write(q, &t);
    assert_ok(text_finish(&t));
    assert_ok(json_parse(&doc, t.data, t.len, "config.json"));
    assert_ok(quant_config_read(&read, json_root(doc)));
    for (size_t i = 0; i < plan.n; i++) {
        const struct linear_plan *l = &plan.linears[i];
        char *module = gemma_module(l->tensor);
        const int rc = quant_config_match(&read, module, &s);
        if (rc != (int)l->quantized ||
            (rc == 1 &&
             (s.bits != l->scheme.bits || s.symmetric != l->scheme.symmetric || s.group != l->scheme.group)))
            fail_msg("%s: %s is described as %d: %d bits, group %d", quant_format_names[r->format], module,
                     rc, s.bits, (int)s.group);
        free(module);
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        char router[60];
        snprintf(router, sizeof router, "model.layers.%d.router.proj", layer);
        if (quant_config_match(&read, router, &s) != 0)
            fail_msg("%s: %s is described as quantized", quant_format_names[r->format], router);
    }
    quant_config_free(&read);
    json_free(doc);
    text_free(&t);
    recipe_plan_free(&plan);
}

/* Experts of a scheme of their own, of none, and of different ones by layer, in every format. */
static void test_described(void **state)
{
    (void)state;
    static const char *const all[] = {"*experts*"}, *const one[] = {"*layers.1.experts*"};
    struct recipe_override override = {(char[]){"*layers.2.experts*"}, {8, true, 64}};
    for (int format = 0; format < N_QUANT_FORMATS; format++)
        for (int i = 0; i < 5; i++) {
            struct quant_config q;
            struct recipe r = recipe_of(i == 0 ? 64 : 128, RAGGED_AUTO);
            r.format = (enum quant_format)format;
            r.ignore = i == 2 ? all : one;
            r.n_ignore = i >= 2;
            r.overrides = &override;
            r.n_overrides = i == 4;
            check_described(&r, &q);
            quant_config_free(&q);
        }
}

static void test_expressions(void **state)
{
    (void)state;
    static const char experts[] = "re:.*layers\\.[0-9]+\\.(.*\\.)?experts\\..*_proj$";
    static const char *const all[] = {"*experts*"};
    struct quant_config q;
    struct quant_scheme s;
    struct recipe r = recipe_of(128, RAGGED_AUTO);
    check_described(&r, &q);
    assert_int_equal(q.n_groups, 2);
    assert_true(q.groups[0].scheme.group == 128 && q.groups[1].scheme.group == 64);
    assert_true(q.groups[1].n_targets == 1);
    assert_string_equal(q.groups[1].targets[0], experts);
    assert_true(has(q.ignore, q.n_ignore, "re:.*layers\\.[0-9]+\\.mlp\\.down_proj$"));
    assert_true(has(q.ignore, q.n_ignore, "re:.*router.*"));
    /* under the names of vLLM, and beside a multimodal model's other parts */
    assert_int_equal(quant_config_match(&q, "model.language_model.layers.2.moe.experts.3.up_proj", &s), 1);
    assert_int_equal(s.group, 64);
    assert_int_equal(quant_config_match(&q, "language_model.model.layers.2.router.proj", &s), 0);
    quant_config_free(&q);
    r.ignore = all;
    r.n_ignore = 1;
    check_described(&r, &q);
    assert_int_equal(q.n_groups, 1);
    assert_true(has(q.ignore, q.n_ignore, experts));
    assert_int_equal(quant_config_match(&q, "model.layers.2.experts.gate_up_proj", &s), 0);
    assert_int_equal(quant_config_match(&q, "model.layers.2.mlp.gate_up_proj", &s), 1);
    quant_config_free(&q);
}

/* AutoRound's readers take names alone. */
static void test_names(void **state)
{
    (void)state;
    struct quant_config q;
    struct recipe r = recipe_of(128, RAGGED_AUTO);
    r.format = QUANT_AUTO_ROUND;
    check_described(&r, &q);
    assert_string_equal(q.block, "model.layers");
    assert_int_equal(q.n_groups, 2);
    assert_int_equal(q.groups[1].n_targets, LAYERS * N_EXPERTS * 3);
    assert_true(has(q.groups[1].targets, q.groups[1].n_targets, "model.layers.2.experts.3.down_proj"));
    assert_int_equal(q.n_ignore, LAYERS * 2);
    assert_true(has(q.ignore, q.n_ignore, "model.layers.1.router.proj"));
    assert_true(has(q.ignore, q.n_ignore, "model.layers.1.mlp.down_proj"));
    quant_config_free(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ragged),       cmocka_unit_test(test_ragged_refused),
        cmocka_unit_test(test_partial),      cmocka_unit_test(test_whole),
        cmocka_unit_test(test_name_of_both), cmocka_unit_test(test_router),
        cmocka_unit_test(test_described),    cmocka_unit_test(test_expressions),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, setup, recipe_teardown);
}

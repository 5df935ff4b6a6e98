/* Cuts of a mixture of experts: with its experts and without, from either layout of the source, interrupted among them,
 * converted and damaged; and what verify says of each. The model is made up (tiny_gemma.h). */
#include "base/file.h"
#include "kernels/budget.h"
#include "quantize/convert.h"
#include "report/verify.h"
#include "runtime/weights.h"
#include "tests/unit/cutting.h"
#include "tests/unit/support.h"

enum { SAMPLES = 4, LENGTH = 24, LAYERS = 3, N_EXPERTS = TINY_EXPERTS };
enum { DENSE = 7 * LAYERS - 1, EACH = 3 * N_EXPERTS, N_LINEARS = DENSE + EACH * LAYERS };

static const struct tiny_gemma *const mixture = &tiny_families[TINY_GEMMA4_EXPERTS];
static struct dataset data = {.samples = SAMPLES, .length = LENGTH};

static int make_data(void **state)
{
    static int32_t ids[SAMPLES * LENGTH];
    for (int i = 0; i < SAMPLES * LENGTH; i++)
        ids[i] = i % LENGTH ? (i * 7919 + 13) % (int32_t)mixture->vocab : 2;
    data.ids = ids;
    return support_make_folder(state);
}

/* With experts in two tensors a layer, or a tensor for each linear. */
static const char *whole(void)
{
    return cutting_model("whole", mixture);
}

static const char *apart(void)
{
    struct tiny_gemma g = *mixture;
    g.apart = true;
    return cutting_model("apart", &g);
}

static const char *const all_experts[] = {"*experts*"}, *const middle_layer[] = {"*layers.1.experts*"};

static struct cut_options rtn(const char *out)
{
    struct cut_options o = cutting_options(whole(), out);
    o.recipe.scheme.group = 32;
    return o;
}

static struct cut_options gptq(const char *out)
{
    struct cut_options o = rtn(out);
    o.recipe.method = "gptq";
    o.recipe.sweep = o.recipe.calibrated = true;
    o.recipe.scales.rule = SCALE_BLOCK;
    o.recipe.damping = 0.01;
    o.recipe.passes = 1;
    o.recipe.calib.text = "made up";
    o.data = &data;
    return o;
}

static const char *made(const struct cut_options *o)
{
    if (!file_exists(o->out))
        assert_ok(cutting_run(o, &cutting_silent));
    return o->out;
}

static void check_same_weights(const char *a, const char *b)
{
    size_t n, m;
    char *p = file_join(a, "model.safetensors"), *q = file_join(b, "model.safetensors");
    char *s = support_read(p, &n), *t = support_read(q, &m);
    if (n != m || memcmp(s, t, n))
        fail_msg("%s and %s differ", p, q);
    free(p);
    free(q);
    free(s);
    free(t);
}

/* --- what verify says ----------------------------------------------------------------------------------------------- */

/* finding: what the first one says; NULL: there is none */
static void check_verified(const char *cut, const char *source, const char *object, const char *finding)
{
    struct verify_report r;
    const struct verify_options o = {.cut = cut, .source = source, .device = "cpu", .n_workers = 2};
    assert_ok(verify_run(&r, &o));
    if (!finding && r.n_findings)
        fail_msg("%s against %s: '%s' %s", cut, source ? source : "nothing", r.findings[0].object,
                 r.findings[0].message);
    if (finding &&
        (!r.n_findings || !strstr(r.findings[0].object, object) || !strstr(r.findings[0].message, finding)))
        fail_msg("%s: found '%s' %s, expected '%s' %s", cut, r.n_findings ? r.findings[0].object : "nothing",
                 r.n_findings ? r.findings[0].message : "", object, finding);
    if (!finding && r.has_record) {
        assert_true(r.n_recorded_equal > 0 && r.n_files_equal > 0);
        assert_true(!source || (r.n_unquantized > 0 && r.n_source_equal == r.n_unquantized));
    }
    verify_free(&r);
}

/* Alone and against the source, however that holds its experts. */
static void check_good(const char *cut)
{
    check_verified(cut, NULL, NULL, NULL);
    check_verified(cut, whole(), NULL, NULL);
    check_verified(cut, apart(), NULL, NULL);
}

/* --- cuts ----------------------------------------------------------------------------------------------------------- */

static const struct tensor *stored(const struct checkpoint *ck, int layer, const char *name)
{
    char full[100];
    snprintf(full, sizeof full, "model.layers.%d.experts.%s", layer, name);
    return checkpoint_tensor(ck, full);
}

/* Whether a layer's experts lie in a cut as they lie in the source: two tensors, the same bytes, and none else. */
static void check_kept(const char *cut, const char *source, int layer)
{
    static const char *const names[] = {"gate_up_proj", "down_proj"};
    struct checkpoint a, b;
    assert_ok(checkpoint_open(&a, cut));
    assert_ok(checkpoint_open(&b, source));
    for (size_t i = 0; i < N_OF(names); i++) {
        const struct tensor *x = stored(&a, layer, names[i]), *y = stored(&b, layer, names[i]);
        assert_true(x && y && x->n_dims == 3 && x->dtype == y->dtype && x->bytes == y->bytes);
        assert_memory_equal(x->shape, y->shape, 3 * sizeof *x->shape);
        char *p = malloc(x->bytes), *q = malloc(x->bytes);
        assert_true(p && q);
        assert_ok(checkpoint_read(&a, x, 0, x->bytes, p));
        assert_ok(checkpoint_read(&b, y, 0, x->bytes, q));
        assert_memory_equal(p, q, x->bytes);
        free(p);
        free(q);
    }
    assert_null(stored(&a, layer, "0.gate_proj.weight"));
    assert_null(stored(&a, layer, "0.gate_proj.weight_packed"));
    checkpoint_close(&a);
    checkpoint_close(&b);
}

static void check_unfused(const char *cut, int layer)
{
    struct checkpoint ck;
    assert_ok(checkpoint_open(&ck, cut));
    assert_null(stored(&ck, layer, "gate_up_proj"));
    assert_null(stored(&ck, layer, "down_proj"));
    for (int e = 0; e < N_EXPERTS; e++) {
        char name[40];
        snprintf(name, sizeof name, "%d.up_proj.weight_packed", e);
        const struct tensor *t = stored(&ck, layer, name);
        assert_true(t && t->n_dims == 2 && t->shape[0] == TINY_EXPERT_SIZE &&
                    t->shape[1] == mixture->hidden / 8);
    }
    checkpoint_close(&ck);
}

/* All linears of the experts, from either layout of the source and with any number of threads. */
static void test_all(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct cut_options o = i ? gptq(support_path("gptq")) : rtn(support_path("rtn"));
        const char *first = made(&o);
        o.out = support_path("%s-3", o.recipe.method);
        o.n_workers = 3;
        cutting_check_same(first, made(&o));
        o.out = support_path("%s-apart", o.recipe.method);
        o.model = apart();
        o.n_workers = 1;
        check_same_weights(first, made(&o)); /* the record lists them in the source's order */
        for (int layer = 0; layer < LAYERS; layer++)
            check_unfused(first, layer);
        check_good(first);
    }
}

/* GPTQ's experts are not those of RTN, and their record says how many tokens they saw. */
static void test_record(void **state)
{
    (void)state;
    struct cut *c;
    size_t n;
    int64_t sum[LAYERS] = {0};
    const struct cut_options o = gptq(support_path("counted"));
    assert_ok(cut_open(&c, &o));
    assert_int_equal(cut_totals(c).n_linears, N_LINEARS);
    assert_ok(cut_run(c, &cutting_silent));
    const struct cut_linear *l = cut_linears(c, &n);
    assert_int_equal(n, N_LINEARS);
    for (size_t i = 0; i < n; i++) {
        const struct gemma_tensor *t = l[i].plan->tensor;
        if (t->expert >= 0 && t->role == GEMMA_DOWN)
            sum[t->layer] += l[i].stats.n_tokens;
        assert_true(l[i].stats.error <= l[i].stats.nearest_error);
    }
    for (int layer = 0; layer < LAYERS; layer++)
        assert_int_equal(sum[layer], SAMPLES * LENGTH * TINY_TOP);
    cut_close(c);
    char *text = support_read(support_path("counted/gemcut.json"), &n);
    assert_non_null(strstr(text, "\"tokens\": "));
    free(text);
}

/* Experts that stay in 16 bits come out as they lie in the source. */
static void test_kept(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct cut_options o = i / 2 ? gptq(support_path("kept-%d", i)) : rtn(support_path("kept-%d", i));
        o.recipe.ignore = i % 2 ? middle_layer : all_experts;
        o.recipe.n_ignore = 1;
        made(&o);
        for (int layer = 0; layer < LAYERS; layer++)
            if (i % 2 == 0 || layer == 1)
                check_kept(o.out, whole(), layer);
            else
                check_unfused(o.out, layer);
        check_good(o.out);
        struct cut_options other = o;
        other.out = support_path("kept-apart-%d", i);
        other.model = apart();
        made(&other);
        check_good(other.out);
    }
}

/* Layers may have groups of their own. */
static void test_own_groups(void **state)
{
    (void)state;
    struct recipe_override overrides[] = {{(char[]){"*layers.1.experts*"}, {4, false, 32}},
                                          {(char[]){"*layers.2.experts*"}, {8, true, 32}}};
    struct cut_options o = gptq(support_path("groups"));
    o.recipe.scheme.group = 0;
    o.recipe.overrides = overrides;
    o.recipe.n_overrides = N_OF(overrides);
    check_good(made(&o));
}

static uint64_t planned(const char *glob)
{
    static const struct tiny_gemma wide = {
        .model_type = "gemma4_text",
        .more =
            "\"enable_moe_block\": true, \"num_experts\": 2, \"top_k_experts\": 1, \"moe_intermediate_size\": "
            "512, \"hidden_size_per_layer_input\": 0,",
        .hidden = 512,
        .ffn = 64,
        .vocab = 64,
        .layers = 2,
        .heads = 2,
        .kv_heads = 1,
        .head_dim = 32,
        .dtype = DTYPE_BF16};
    struct recipe_override override = {(char *)glob, {4, true, 256}};
    struct cut_options o = gptq("unused");
    struct cut *c;
    o.model = cutting_model("wide", &wide);
    o.recipe.scheme.group = 0;
    o.recipe.overrides = &override;
    o.recipe.n_overrides = 1;
    assert_ok(cut_open(&c, &o));
    const uint64_t bytes = cut_totals(c).calibration.device_bytes;
    cut_close(c);
    return bytes;
}

/* The equations for the scales of several long groups in a row take most, whichever layer has them. */
static void test_planned_for_all(void **state)
{
    (void)state;
    assert_int_equal(planned("*layers.1.experts*"), planned("*experts*"));
    assert_int_equal(planned("*layers.0.experts*"), planned("*experts*"));
}

static int lift_budget(void **state)
{
    (void)state;
    budget_set(0);
    return 0;
}

/* Where there is little memory, fewer experts' Hessians are held at once; the same bytes. */
static void test_few_at_once(void **state)
{
    (void)state;
    const struct cut_options o = gptq(support_path("gptq"));
    struct cut_options few = gptq(support_path("few"));
    struct cut *c;
    made(&o);
    few.n_workers = 1;
    assert_ok(cut_open(&c, &few));
    assert_int_equal(cut_totals(c).calibration.experts_at_once, N_EXPERTS);
    uint64_t budget = cut_totals(c).calibration.device_bytes;
    cut_close(c);
    int at_once = N_EXPERTS;
    while (at_once == N_EXPERTS) { /* with a budget, workers are counted anew */
        budget_set(budget -= 4096);
        assert_ok(cut_open(&c, &few));
        at_once = cut_totals(c).calibration.experts_at_once;
        cut_close(c);
    }
    assert_true(at_once >= 1);
    assert_ok(cutting_run(&few, &cutting_silent));
    budget_set(0);
    cutting_check_same(few.out, o.out);
}

/* --- interrupted ---------------------------------------------------------------------------------------------------- */

static void test_killed(void **state)
{
    (void)state;
    const struct cut_options reference = gptq(support_path("gptq"));
    made(&reference);
    for (int n = 4; n <= N_LINEARS; n += 11) {
        struct cut_options o = gptq(support_path("killed-%d", n));
        struct cut *c;
        int left = n;
        cutting_run_killed(&o, &(struct cut_events){.on_linear = cutting_kill_here, .ctx = &left});
        assert_false(file_exists(o.out));
        o.resume = true;
        assert_ok(cut_open(&c, &o));
        assert_ok(cut_run(c, &cutting_silent));
        const size_t recalled = cut_recalled(c), noted = (size_t)n - 1;
        assert_true(recalled <= noted && recalled + 2 >= noted);
        cut_close(c);
        cutting_check_same(o.out, reference.out);
    }
}

/* --- converted ------------------------------------------------------------------------------------------------------ */

static int convert(const char *from, const char *to, enum quant_format format)
{
    static const struct convert_events silent;
    const struct convert_options o = {.model = from,
                                      .out = to,
                                      .version = "test",
                                      .format = format,
                                      .shard_bytes = UINT64_MAX,
                                      .n_workers = 2};
    struct convert *c;
    int rc = convert_open(&c, &o);
    if (!rc)
        rc = convert_run(c, &silent);
    convert_close(c);
    return rc;
}

/* To another format and back: the same bytes. Experts that stay in 16 bits lie as they did. */
static void test_converted(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct cut_options o = gptq(support_path("from-%d", i));
        o.recipe.ignore = i == 1 ? all_experts : middle_layer;
        o.recipe.n_ignore = i > 0;
        made(&o);
        for (int f = QUANT_AUTO_ROUND; f < N_QUANT_FORMATS; f++) {
            struct cut_options direct = o;
            const char *to = support_path("to-%d-%d", i, f), *back = support_path("back-%d-%d", i, f);
            assert_ok(convert(o.out, to, (enum quant_format)f));
            check_good(to);
            if (i)
                check_kept(to, whole(), 1);
            assert_ok(convert(to, back, QUANT_COMPRESSED_TENSORS));
            check_good(back);
            check_same_weights(back, o.out);
            direct.out = support_path("direct-%d-%d", i, f);
            direct.recipe.format = (enum quant_format)f;
            check_same_weights(to, made(&direct));
        }
    }
}

/* --- damaged -------------------------------------------------------------------------------------------------------- */

/* A copy of the cut's two files with one place of one of them changed, which both have the length of. */
static const char *damaged(const char *name, const char *file, const char *from, const char *to)
{
    static const char *const files[] = {"config.json", "model.safetensors"};
    const struct cut_options o = rtn(support_path("rtn"));
    const char *folder = support_path("%s", name);
    made(&o);
    assert_ok(file_make_folder(folder));
    assert_int_equal(strlen(from), strlen(to));
    for (size_t i = 0; i < N_OF(files); i++) {
        char *in = file_join(o.out, files[i]), *out = file_join(folder, files[i]);
        size_t n, at = 0, length = strlen(from);
        char *text = support_read(in, &n);
        while (!strcmp(file, files[i]) && at + length <= n && memcmp(text + at, from, length))
            at++;
        assert_true(at + length <= n);
        if (!strcmp(file, files[i]))
            memcpy(text + at, to, length);
        support_write(out, text, n);
        free(in);
        free(out);
        free(text);
    }
    return folder;
}

static int load(const char *folder)
{
    struct backend b;
    struct model m;
    struct weights w;
    assert_ok(backend_open(&b, "cpu", 1));
    int rc = model_open(&m, folder);
    if (!rc && !(rc = model_bind(&m, NULL, NULL)) && !(rc = weights_load(&w, &m, &b)))
        weights_free(&w);
    model_close(&m);
    backend_close(&b);
    return rc;
}

static void test_damaged(void **state)
{
    (void)state;
    static const char missing[] = "model.layers.1.experts.3.up_proj.weight_packed";
    const char *gone =
        damaged("gone", "model.safetensors", missing, "model.layers.1.experts.9.up_proj.weight_packed");
    check_verified(gone, NULL, missing, "is missing, expected I32 [96, 8]");
    assert_error(load(gone), ERR_FORMAT, "experts.3.up_proj.weight_packed' is missing");
    assert_error(convert(gone, support_path("never"), QUANT_GPTQ), ERR_FORMAT, "is missing");
    const char *shape = damaged("shape", "model.safetensors", "experts.7.down_proj.weight_scale\"",
                                "experts.7.down_proj.weight_scald\"");
    check_verified(shape, NULL, "experts.7.down_proj.weight_scale", "is missing, expected BF16 [64, 3]");
    const char *groups = damaged("coarser", "config.json", "\"group_size\": 32", "\"group_size\": 64");
    check_verified(groups, NULL, "q_proj.weight_scale", "is BF16 [128, 2], expected BF16 [128, 1]");
    cutting_check_absent(support_path("never"));
}

/* Some tensors of one cut's file, the others of another's, announced or put. */
static void take_tensors(struct writer *w, const struct checkpoint *ck, const char *name, bool named,
                         bool put, size_t *ids)
{
    for (size_t i = 0; i < ck->n_tensors; i++) {
        const struct tensor *t = &ck->tensors[i];
        if ((strstr(t->name, name) != NULL) != named)
            continue;
        if (!put) {
            assert_ok(writer_add(w, t->name, t->name, t->dtype, t->n_dims, t->shape, &ids[i]));
            continue;
        }
        char *bytes = malloc(t->bytes);
        assert_non_null(bytes);
        assert_ok(checkpoint_read(ck, t, 0, t->bytes, bytes));
        assert_ok(writer_put(w, ids[i], 0, bytes, t->bytes));
        free(bytes);
    }
}

/* One linear of one expert with groups of 64 among groups of 32, in tensors and description. */
static const char *one_other(void)
{
    static const char module[] = "model.layers.1.experts.3.up_proj", groups[] = "\"config_groups\": {";
    const struct cut_options fine = rtn(support_path("rtn"));
    struct cut_options coarse = rtn(support_path("coarse"));
    struct recipe_override override = {(char[]){"*experts*"}, {4, true, 0}};
    const char *folder = support_path("one-other");
    struct checkpoint a, b;
    struct writer *w;
    struct text config = {0};
    size_t *ids[2], n;
    coarse.recipe.overrides = &override;
    coarse.recipe.n_overrides = 1;
    assert_ok(checkpoint_open(&a, made(&fine)));
    assert_ok(checkpoint_open(&b, made(&coarse)));
    ids[0] = calloc(a.n_tensors, sizeof **ids);
    ids[1] = calloc(b.n_tensors, sizeof **ids);
    assert_true(ids[0] && ids[1]);
    assert_ok(file_make_folder(folder));
    assert_ok(writer_open(&w, folder, UINT64_MAX));
    take_tensors(w, &a, module, false, false, ids[0]);
    take_tensors(w, &b, module, true, false, ids[1]);
    assert_ok(writer_begin(w, false));
    take_tensors(w, &a, module, false, true, ids[0]);
    take_tensors(w, &b, module, true, true, ids[1]);
    assert_ok(writer_finish(w));
    writer_close(w);
    free(ids[0]);
    free(ids[1]);
    checkpoint_close(&a);
    checkpoint_close(&b);
    char *text = support_read(support_path("rtn/config.json"), &n), *at;
    text[n - 1] = '\0';
    assert_non_null(at = strstr(text, groups));
    at += strlen(groups);
    text_printf(&config,
                "%.*s\"group_9\": {\"targets\": [\"%s\"], \"weights\": {\"num_bits\": 4, \"type\": \"int\", "
                "\"symmetric\": true, \"strategy\": \"channel\"}}, %s",
                (int)(at - text), text, module, at);
    assert_ok(text_finish(&config));
    support_write(support_path("one-other/config.json"), config.data, config.len);
    text_free(&config);
    free(text);
    return folder;
}

/* It is whole, but readers run all experts of a layer in one go, and so does gemcut. */
static void test_one_other(void **state)
{
    (void)state;
    const char *folder = one_other();
    check_verified(folder, NULL, NULL, NULL);
    assert_error(load(folder), ERR_UNSUPPORTED, "which is not supported for experts");
    assert_non_null(strstr(err_message(), "'model.layers.1.experts.0.gate_proj.weight' and "
                                          "'model.layers.1.experts.3.up_proj.weight'"));
    assert_error(convert(folder, support_path("never"), QUANT_GPTQ), ERR_UNSUPPORTED,
                 "are quantized differently, and readers run them as one matrix");
    cutting_check_absent(support_path("never"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all),
        cmocka_unit_test(test_record),
        cmocka_unit_test(test_kept),
        cmocka_unit_test(test_own_groups),
        cmocka_unit_test(test_planned_for_all),
        cmocka_unit_test_teardown(test_few_at_once, lift_budget),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_converted),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_one_other),
    };
    return cmocka_run_group_tests(tests, make_data, support_remove_folder);
}

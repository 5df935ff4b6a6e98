/* Cuts of a mixture of experts: with its experts and without, from either layout of the source, in groups of their own, in
 * little memory, interrupted among them. The model is made up (tiny_gemma.h). */
#include "base/file.h"
#include "base/log.h"
#include "kernels/budget.h"
#include "tests/unit/expert_cutting.h"
#include "tests/unit/support.h"

#include <sys/wait.h>
#include <unistd.h>

static void check_unfused(const char *cut, int layer)
{
    struct checkpoint ck;
    assert_ok(checkpoint_open(&ck, cut));
    assert_null(mixture_stored(&ck, layer, "gate_up_proj"));
    assert_null(mixture_stored(&ck, layer, "down_proj"));
    for (int e = 0; e < N_EXPERTS; e++) {
        char name[40];
        snprintf(name, sizeof name, "%d.up_proj.weight_packed", e);
        const struct tensor *t = mixture_stored(&ck, layer, name);
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
        struct cut_options o = i ? mixture_gptq(support_path("gptq")) : mixture_rtn(support_path("rtn"));
        const char *first = mixture_made(&o);
        o.out = support_path("%s-3", o.recipe.method);
        o.n_workers = 3;
        cutting_check_same(first, mixture_made(&o));
        o.out = support_path("%s-apart", o.recipe.method);
        o.model = mixture_apart();
        o.n_workers = 1;
        mixture_check_same(first, mixture_made(&o)); /* the record lists them in the source's order */
        for (int layer = 0; layer < LAYERS; layer++)
            check_unfused(first, layer);
        mixture_check_good(first);
    }
}

/* GPTQ's experts are not those of RTN, and their record says how many tokens they saw. */
static void test_record(void **state)
{
    (void)state;
    struct cut *c;
    size_t n;
    int64_t sum[LAYERS] = {0};
    const struct cut_options o = mixture_gptq(support_path("counted"));
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

static char warnings[1024];

static void take_warning(void *ctx, const char *message)
{
    (void)ctx;
    const size_t n = strlen(warnings);
    snprintf(warnings + n, sizeof warnings - n, "%s\n", message);
}

/* Of 96 tokens each expert gets a few, and each that is quantized counts. */
static void test_starved(void **state)
{
    (void)state;
    static const char *const last_layer[] = {"*layers.2.experts*"};
    struct cut_options o = mixture_gptq(support_path("starved"));
    o.recipe.ignore = last_layer;
    o.recipe.n_ignore = 1;
    warnings[0] = '\0';
    log_set_sink(take_warning, NULL);
    mixture_made(&o);
    log_set_sink(NULL, NULL);
    int n_starved, n_all, fewest, layer, expert;
    assert_int_equal(
        sscanf(warnings,
               "the text sent fewer than 64 tokens to %d of %d experts (fewest: %d, layer %d, expert %d); "
               "they got others up to that",
               &n_starved, &n_all, &fewest, &layer, &expert),
        5);
    assert_true(n_all == 2 * N_EXPERTS && n_starved > 0 && n_starved <= n_all && fewest < 24 && layer < 2);
}

/* Experts that stay in 16 bits come out as they lie in the source. */
static void test_kept(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct cut_options o =
            i / 2 ? mixture_gptq(support_path("kept-%d", i)) : mixture_rtn(support_path("kept-%d", i));
        o.recipe.ignore = i % 2 ? mixture_middle_layer : mixture_all_experts;
        o.recipe.n_ignore = 1;
        mixture_made(&o);
        for (int layer = 0; layer < LAYERS; layer++)
            if (i % 2 == 0 || layer == 1)
                mixture_check_kept(o.out, mixture_whole(), layer);
            else
                check_unfused(o.out, layer);
        mixture_check_good(o.out);
        struct cut_options other = o;
        other.out = support_path("kept-apart-%d", i);
        other.model = mixture_apart();
        mixture_made(&other);
        mixture_check_good(other.out);
    }
}

/* Layers may have groups of their own. */
static void test_own_groups(void **state)
{
    (void)state;
    struct recipe_override overrides[] = {{(char[]){"*layers.1.experts*"}, {4, false, 32}},
                                          {(char[]){"*layers.2.experts*"}, {8, true, 32}}};
    struct cut_options o = mixture_gptq(support_path("groups"));
    o.recipe.scheme.group = 0;
    o.recipe.overrides = overrides;
    o.recipe.n_overrides = N_OF(overrides);
    mixture_check_good(mixture_made(&o));
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
    struct cut_options o = mixture_gptq("unused");
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

/* Where there is little memory, fewer experts' Hessians are held at once; the same bytes. */
static void test_few_at_once(void **state)
{
    (void)state;
    const struct cut_options o = mixture_gptq(support_path("gptq"));
    struct cut_options few = mixture_gptq(support_path("few"));
    struct cut *c;
    mixture_made(&o);
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
    const struct cut_options reference = mixture_gptq(support_path("gptq"));
    mixture_made(&reference);
    for (int n = 4; n <= N_LINEARS; n += 11) {
        struct cut_options o = mixture_gptq(support_path("killed-%d", n));
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

static void interrupt_here(void *ctx, const struct cut_linear *linear)
{
    *(int *)ctx -= linear->plan->tensor->expert >= 0;
    if (*(int *)ctx == 0)
        err_request_interrupt();
}

/* At the ninth expert's linear that is done: few are at work beside it. */
static void test_interrupted(void **state)
{
    (void)state;
    const struct cut_options reference = mixture_gptq(support_path("gptq"));
    struct cut_options o = mixture_gptq(support_path("interrupted"));
    struct cut *c;
    int status;
    mixture_made(&reference);
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) { /* a request to stop cannot be taken back */
        int left = 9;
        const int rc = cutting_run(&o, &(struct cut_events){.on_linear = interrupt_here, .ctx = &left});
        _exit(rc == ERR_INTERRUPTED && strstr(err_message(), "--resume") ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    o.resume = true;
    assert_ok(cut_open(&c, &o));
    assert_ok(cut_run(c, &cutting_silent));
    assert_true(cut_recalled(c) >= 7 + 8 && cut_recalled(c) < N_LINEARS);
    cut_close(c);
    cutting_check_same(o.out, reference.out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all),
        cmocka_unit_test(test_record),
        cmocka_unit_test(test_starved),
        cmocka_unit_test(test_kept),
        cmocka_unit_test(test_own_groups),
        cmocka_unit_test(test_planned_for_all),
        cmocka_unit_test_teardown(test_few_at_once, mixture_lift_budget),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_interrupted),
    };
    return cmocka_run_group_tests(tests, mixture_make, support_remove_folder);
}

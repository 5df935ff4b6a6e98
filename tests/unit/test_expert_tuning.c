/* AutoRound of a mixture of experts: its experts are tuned with the rest of each block, from either layout of the source and
 * from weights of every type; with some linears left as they are; interrupted between blocks; in little memory. The model is
 * made up (tiny_gemma.h). */
#include "base/file.h"
#include "kernels/budget.h"
#include "tests/unit/expert_cutting.h"
#include "tests/unit/support.h"

static struct cut_options mixture_tuned(const char *out)
{
    struct cut_options o = mixture_gptq(out);
    o.recipe.method = "autoround";
    o.recipe.tune = (struct tune_options){
        .iterations = 8, .batch = 2, .lr = 0.05, .range_lr = 0.005, .init = TUNE_FROM_CODES};
    return o;
}

/* Blocks that a tuning made better, of all of them. */
struct blocks {
    int n, n_better;
};

static void count_block(void *ctx, const struct calibrated_block *block)
{
    struct blocks *b = ctx;
    b->n++;
    b->n_better += block->stats.last < block->stats.first;
    assert_true(block->stats.last <= block->stats.first);
}

static void check_tuned(const struct cut_options *o)
{
    struct blocks blocks = {0};
    assert_ok(cutting_run(o, &(struct cut_events){.on_block = count_block, .ctx = &blocks}));
    assert_true(blocks.n == LAYERS && blocks.n_better > 0);
}

/* Tensors of experts' codes that differ. */
static int count_changed(const char *a, const char *b)
{
    struct checkpoint ck[2];
    int n = 0;
    assert_ok(checkpoint_open(&ck[0], a));
    assert_ok(checkpoint_open(&ck[1], b));
    for (size_t i = 0; i < ck[0].n_tensors; i++) {
        const struct tensor *t = &ck[0].tensors[i], *u = checkpoint_tensor(&ck[1], t->name);
        if (!strstr(t->name, ".experts.") || !strstr(t->name, "weight_packed"))
            continue;
        assert_true(u && u->bytes == t->bytes);
        char *p = malloc(t->bytes), *q = malloc(t->bytes);
        assert_true(p && q);
        assert_ok(checkpoint_read(&ck[0], t, 0, t->bytes, p));
        assert_ok(checkpoint_read(&ck[1], u, 0, t->bytes, q));
        n += memcmp(p, q, t->bytes) != 0;
        free(p);
        free(q);
    }
    checkpoint_close(&ck[0]);
    checkpoint_close(&ck[1]);
    return n;
}

/* Most experts have other codes than GPTQ found; their layout and the number of threads change nothing. */
static void test_all(void **state)
{
    (void)state;
    const struct cut_options gptq = mixture_gptq(support_path("gptq"));
    struct cut_options o = mixture_tuned(support_path("tuned"));
    mixture_made(&gptq);
    check_tuned(&o);
    mixture_check_good(o.out);
    assert_in_range(count_changed(o.out, gptq.out), 3 * N_EXPERTS * LAYERS / 2, 3 * N_EXPERTS * LAYERS);
    const char *first = o.out;
    o.out = support_path("tuned-3");
    o.n_workers = 3;
    cutting_check_same(first, mixture_made(&o));
    o.out = support_path("tuned-apart");
    o.model = mixture_apart();
    mixture_check_same(first, mixture_made(&o));
}

/* Experts' records have what GPTQ knew of them, and what became of their block. */
static void test_record(void **state)
{
    (void)state;
    struct cut *c;
    size_t n;
    int64_t sum[LAYERS] = {0};
    const struct cut_options o = mixture_tuned(support_path("recorded"));
    assert_ok(cut_open(&c, &o));
    assert_ok(cut_run(c, &cutting_silent));
    const struct cut_linear *l = cut_linears(c, &n);
    assert_int_equal(n, N_LINEARS);
    for (size_t i = 0; i < n; i++) {
        const struct gemma_tensor *t = l[i].plan->tensor;
        if (t->expert >= 0 && t->role == GEMMA_DOWN)
            sum[t->layer] += l[i].stats.n_tokens;
        assert_true(l[i].stats.weight_error > 0 && l[i].stats.weight_error < 0.1 && l[i].tuned.first > 0);
    }
    for (int layer = 0; layer < LAYERS; layer++)
        assert_int_equal(sum[layer], SAMPLES * LENGTH * TINY_TOP);
    cut_close(c);
}

/* From weights of every type, from codes and from none, with zero points and without. */
static void test_ways(void **state)
{
    (void)state;
    static const struct {
        enum dtype dtype;
        bool asymmetric, from_none;
    } ways[] = {{DTYPE_F16, false, false},
                {DTYPE_F32, true, false},
                {DTYPE_BF16, false, true},
                {DTYPE_F16, true, true}};
    for (size_t i = 0; i < N_OF(ways); i++) {
        struct tiny_gemma g = *mixture;
        struct cut_options o = mixture_tuned(support_path("way-%zu", i));
        g.dtype = ways[i].dtype;
        o.model = cutting_model(dtype_name(g.dtype), &g);
        o.recipe.scheme.symmetric = !ways[i].asymmetric;
        if (ways[i].from_none) {
            o.recipe.tune.init = TUNE_FROM_NONE;
            o.recipe.tune.keep = TUNE_KEEP_BEST;
        }
        check_tuned(&o);
        mixture_check_verified(o.out, o.model, NULL, NULL);
    }
}

/* Experts alone, all but the experts, all but a layer's experts. */
static void test_kept(void **state)
{
    (void)state;
    static const char *const dense[] = {"*self_attn*", "*.mlp.*"};
    struct cut_options experts = mixture_tuned(support_path("experts")),
                       others = mixture_tuned(support_path("others")),
                       some = mixture_tuned(support_path("some"));
    experts.recipe.ignore = dense;
    experts.recipe.n_ignore = N_OF(dense);
    others.recipe.ignore = mixture_all_experts;
    some.recipe.ignore = mixture_middle_layer;
    others.recipe.n_ignore = some.recipe.n_ignore = 1;
    check_tuned(&experts);
    check_tuned(&others);
    check_tuned(&some);
    for (int layer = 0; layer < LAYERS; layer++)
        mixture_check_kept(others.out, mixture_whole(), layer);
    mixture_check_kept(some.out, mixture_whole(), 1);
    mixture_check_good(experts.out);
    mixture_check_good(others.out);
    mixture_check_good(some.out);
}

/* A block counts when all of it was noted. */
static void test_killed(void **state)
{
    (void)state;
    enum { EACH = 7 + 3 * N_EXPERTS };
    const struct cut_options reference = mixture_tuned(support_path("tuned"));
    mixture_made(&reference);
    for (int n = 3; n <= N_LINEARS; n += 14) {
        struct cut_options o = mixture_tuned(support_path("killed-%d", n));
        struct cut *c;
        int left = n;
        cutting_run_killed(&o, &(struct cut_events){.on_linear = cutting_kill_here, .ctx = &left});
        assert_false(file_exists(o.out));
        o.resume = true;
        assert_ok(cut_open(&c, &o));
        assert_ok(cut_run(c, &cutting_silent));
        assert_int_equal(cut_recalled(c), (n - 1) / EACH * EACH);
        cut_close(c);
        cutting_check_same(o.out, reference.out);
    }
}

/* What is planned is enough; where less is there, samples are worked on one by one. */
static void test_little_memory(void **state)
{
    (void)state;
    struct cut_options o = mixture_tuned(support_path("little"));
    struct cut *c;
    int64_t micro = 2;
    o.n_workers = 1;
    assert_ok(cut_open(&c, &o));
    uint64_t budget = cut_totals(c).calibration.device_bytes;
    assert_int_equal(cut_totals(c).calibration.micro_batch, micro);
    cut_close(c);
    while (micro > 1) { /* with a budget, workers are counted anew */
        budget_set(budget -= 4096);
        assert_ok(cut_open(&c, &o));
        micro = cut_totals(c).calibration.micro_batch;
        cut_close(c);
    }
    check_tuned(&o);
    budget_set(0);
    mixture_check_good(o.out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all),    cmocka_unit_test(test_record),
        cmocka_unit_test(test_ways),   cmocka_unit_test(test_kept),
        cmocka_unit_test(test_killed), cmocka_unit_test_teardown(test_little_memory, mixture_lift_budget),
    };
    return cmocka_run_group_tests(tests, mixture_make, support_remove_folder);
}

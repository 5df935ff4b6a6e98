/* The calibration's streams against the runtime's own pass, block by block: the reference against the model as it is, the
 * inputs against the model whose weights are coarser, which takes place set by set as it does in a calibration. The
 * models are made up (tiny_gemma.h); that of Gemma 4 has layers that read the keys and values of earlier ones, and inputs
 * of their own. */
#include "quantize/capture.h"
#include "kernels/budget.h"
#include "quantize/layer_inputs.h"
#include "quantize/sets.h"
#include "runtime/forward.h"
#include "tests/unit/cutting.h"
#include "tests/unit/forward_support.h"

#include <math.h>

/* Batches of two samples: the last one is shorter. */
enum { SAMPLES = 3, LENGTH = 11, TOKENS = SAMPLES * LENGTH, BATCH = 2, MAX_LAYERS = 6 };

struct way {
    bool tuned, on_host, keep_inner;
};

static struct dataset data = {.samples = SAMPLES, .length = LENGTH};

static int make_data(void **state)
{
    static int32_t ids[TOKENS];
    for (int i = 0; i < TOKENS; i++)
        ids[i] = i % LENGTH ? (i * 7919 + 13) % 61 : 2; /* no sample like another */
    data.ids = ids;
    const int rc = support_make_folder(state);
    return rc ? rc : open_backends(state);
}

/* Rounds a set's weights towards 0, as no method would: what they give is far from what they gave. */
static void coarsen(struct block *k, enum gemma_fused set, int expert)
{
    const struct linear_set *l = set_place(k, set, expert);
    for (int i = 0; i < l->n; i++) {
        const struct mat *w = &l->parts[i].weight;
        assert_true(w->dtype == DTYPE_BF16 && w->stride == w->cols);
        for (int64_t e = 0; e < w->rows * w->cols; e++)
            ((uint16_t *)w->data)[e] &= 0xffc0;
    }
}

/* The i-th set: the dense ones, then the experts', which are of two kinds. */
static void coarsen_any(struct block *k, int i)
{
    const enum gemma_fused set = (enum gemma_fused)(i % N_FUSED);
    if (i < N_FUSED || set == FUSED_GATE_UP || set == FUSED_DOWN)
        coarsen(k, set, i / N_FUSED - 1);
}

/* --- what the runtime makes of it ------------------------------------------------------------------------------------ */

struct streams {
    double *x[MAX_LAYERS]; /* [TOKENS, hidden] behind each block */
};

static int observe(void *ctx, int layer, const struct mat *x)
{
    ((struct streams *)ctx)->x[layer] = naive_rows(x);
    return 0;
}

static void run_model(const struct model *m, bool coarse, struct streams *out)
{
    struct weights w;
    struct forward *f;
    struct mat hidden;
    assert_ok(weights_load(&w, m, &cpu[0]));
    for (int layer = 0; coarse && layer < (int)m->gemma.n_layers; layer++)
        for (int i = 0; i < N_FUSED * (m->gemma.n_experts + 1); i++)
            coarsen_any(&w.blocks[layer], i);
    assert_ok(forward_open(&f, &w, &(struct forward_size){SAMPLES, LENGTH, LENGTH}));
    forward_observe(f, observe, out);
    assert_ok(forward_run(f, data.ids, LENGTH, &hidden));
    forward_close(f);
    weights_free(&w);
}

/* --- what the calibration makes of it -------------------------------------------------------------------------------- */

/* Dense zeros, released with free(). */
static struct mat matrix(int64_t rows, int64_t cols)
{
    struct mat m = {calloc((size_t)(rows * cols), sizeof(float)), DTYPE_F32, rows, cols, cols};
    assert_non_null(m.data);
    return m;
}

/* A sample's rows against those of what the runtime has of it. */
static void check_sample(struct outcome *o, const struct mat *got, const double *expected, int sample,
                         const char *text)
{
    const double *from = expected + sample * got->rows * got->cols;
    double error = 0, size = 0;
    assert_true(got->rows == LENGTH && got->stride == got->cols);
    for (int64_t e = 0; e < got->rows * got->cols; e++) {
        const double x = (double)((const float *)got->data)[e];
        error += (x - from[e]) * (x - from[e]);
        size += from[e] * from[e];
    }
    const double relative = sqrt(error / size);
    if (!(relative <= o->bound))
        fail_msg("%s, sample %d: %s: relative L2 error %.3e, at most %.1e allowed", text, sample, o->op,
                 relative, o->bound);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

static void check_stream(struct outcome *o, const struct capture *c, enum capture_stream stream,
                         const double *expected, int64_t hidden, const char *text)
{
    const struct mat spare = matrix(LENGTH, hidden);
    for (int i = 0; i < SAMPLES; i++) {
        struct mat got;
        assert_ok(capture_sample(c, stream, i, &spare, &got));
        check_sample(o, &got, expected, i, text);
    }
    free(spare.data);
}

/* What a tuning reads of samples in any order, taken through the block. */
static void check_tape(struct outcome *o, const struct capture *c, const struct weights *w, int layer,
                       const double *expected, const char *text)
{
    static const int order[] = {2, 0};
    struct block_tape t = {0};
    void *memory = malloc((size_t)block_tape_bytes(&w->config, DTYPE_F32, N_OF(order), LENGTH));
    assert_non_null(memory);
    assert_ok(block_tape_open(&t, &w->config, N_OF(order), LENGTH));
    block_tape_place(&t, &w->config, layer, DTYPE_F32, memory, N_OF(order), LENGTH);
    t.rope = capture_rope(c, layer);
    for (int i = 0; i < (int)N_OF(order); i++)
        assert_ok(capture_to_tape(c, layer, order[i], i, &t));
    assert_ok(block_grad_forward(w, layer, &t));
    for (int i = 0; i < (int)N_OF(order); i++) {
        const struct mat out = mat_rows(&t.out, (int64_t)i * LENGTH, LENGTH);
        check_sample(o, &out, expected, order[i], text);
    }
    block_tape_close(&t);
    free(memory);
}

/* All sets in order, each under a Hessian, which must be finite. */
static void run_sets(struct capture *c, struct weights *w, int layer)
{
    for (int set = 0; set < N_FUSED; set++) {
        const struct linear_set *l = set_place(&w->blocks[layer], (enum gemma_fused)set, SET_DENSE);
        const int64_t cols = l->parts[0].weight.cols;
        const struct mat h = matrix(cols, cols);
        assert_ok(capture_inputs(c, layer, (enum gemma_fused)set, &h));
        for (int64_t i = 0; i < cols; i++)
            assert_true(((const float *)h.data)[i * cols + i] > 0 &&
                        isfinite(((const float *)h.data)[i * cols + i]));
        coarsen(&w->blocks[layer], (enum gemma_fused)set, SET_DENSE);
        free(h.data);
    }
}

/* The experts after them; test_expert_capture.c looks at their Hessians. */
static void run_experts(struct capture *c, struct weights *w, int layer)
{
    static const enum gemma_fused sets[] = {FUSED_GATE_UP, FUSED_DOWN};
    const int n = w->blocks[layer].n_experts;
    if (n)
        assert_ok(capture_route(c, layer));
    for (int i = 0; i < 2 * n; i++)
        coarsen(&w->blocks[layer], sets[i / n], i % n);
}

static void check_way(struct outcome *o, struct outcome *tape, const struct model *m, const struct way *way,
                      const char *name, const struct streams *plain, const struct streams *coarse)
{
    struct backend b = cpu[1];
    struct weights w;
    struct capture *c;
    struct capture_plan plan;
    struct work_clock clock;
    const int64_t hidden = m->gemma.hidden_size;
    b.batch_tokens = BATCH * LENGTH;
    b.host_memory = false;
    work_begin(&clock, NULL);
    assert_ok(capture_plan(&plan, &m->gemma, &b, &data, way->tuned, way->on_host ? 0 : UINT64_MAX));
    assert_true(plan.batch == BATCH && plan.states_on_host == way->on_host);
    plan.keep_inner = way->keep_inner;
    assert_ok(weights_open(&w, m, &b));
    assert_ok(capture_open(&c, &w, &data, &plan, -1, &clock));
    for (int layer = 0; layer < (int)m->gemma.n_layers; layer++) {
        char text[120];
        snprintf(text, sizeof text, "%s, tuned %d, on the host %d, MLP kept %d: block %d", name, way->tuned,
                 way->on_host, way->keep_inner, layer);
        assert_ok(weights_load_part(&w, layer));
        if (way->tuned) {
            assert_ok(capture_block(c, layer, CAPTURE_REFERENCE));
            check_stream(o, c, CAPTURE_REFERENCE, plain->x[layer], hidden, text);
        }
        run_sets(c, &w, layer);
        run_experts(c, &w, layer);
        if (way->tuned)
            check_tape(tape, c, &w, layer, coarse->x[layer], text);
        assert_ok(way->tuned ? capture_block(c, layer, CAPTURE_INPUTS) : capture_end(c, layer));
        check_stream(o, c, CAPTURE_INPUTS, coarse->x[layer], hidden, text);
        weights_unload_part(&w, layer);
    }
    capture_close(c);
    weights_free(&w);
}

static void test_streams(void **state)
{
    (void)state;
    static const struct way ways[] = {
        {false, false, true}, {false, false, false}, {false, true, false},
        {true, false, true},  {true, false, false},  {true, true, false},
    };
    struct outcome o = {"streams of a calibration", 1e-5, 0, 0}, tape = {"blocks of a tuning", 1e-5, 0, 0};
    for (int family = 0; family < TINY_FAMILIES; family++) {
        struct model m;
        struct streams plain, coarse;
        assert_ok(model_open(&m, cutting_model(tiny_family_names[family], &tiny_families[family])));
        assert_ok(model_bind(&m, NULL, NULL));
        assert_true(m.gemma.n_layers <= MAX_LAYERS);
        run_model(&m, false, &plain);
        run_model(&m, true, &coarse);
        for (size_t i = 0; i < N_OF(ways); i++)
            check_way(&o, &tape, &m, &ways[i], tiny_family_names[family], &plain, &coarse);
        model_close(&m);
        free_matrices();
    }
    print_outcome(&o);
    print_outcome(&tape);
}

/* The table of layers' own inputs stays in the file but for the rows of the ids that occur, and what the plan counts is
 * what is taken. */
static void test_table(void **state)
{
    struct model m;
    struct weights w;
    struct capture *c;
    struct capture_plan plan;
    struct work_clock clock;
    bool seen[61] = {false};
    int64_t n_ids = 0;
    (void)state;
    const struct tiny_gemma *g = &tiny_families[TINY_GEMMA4_SHARING];
    assert_ok(model_open(&m, cutting_model(tiny_family_names[TINY_GEMMA4_SHARING], g)));
    assert_ok(model_bind(&m, NULL, NULL));
    for (int i = 0; i < TOKENS; i++) {
        n_ids += !seen[data.ids[i]];
        seen[data.ids[i]] = true;
    }
    const struct gemma_tensor *t = model_table(&m);
    const uint64_t row = (uint64_t)t->shape[1] * 2;
    assert_true(t->shape[0] == g->vocab && t->shape[1] == g->layers * m.gemma.ple_size);
    assert_int_equal(weights_part_bytes(&m, WEIGHTS_TABLE), (uint64_t)g->vocab * row);
    assert_int_equal(layer_inputs_bytes(&m, n_ids, 10000), (uint64_t)n_ids * row);
    assert_int_equal(layer_inputs_bytes(&m, n_ids, 5), 5 * row);
    assert_int_equal(layer_inputs_bytes(&m, 9000, 10000), 4096 * row);
    work_begin(&clock, NULL);
    assert_ok(capture_plan(&plan, &m.gemma, &cpu[1], &data, false, UINT64_MAX));
    assert_int_equal(plan.n_ids, n_ids);
    assert_ok(weights_open(&w, &m, &cpu[1]));
    /* all of it fits, and not a byte less does */
    const uint64_t rows = (uint64_t)(plan.batch * LENGTH),
                   need = plan.device_bytes + weights_part_bytes(&m, WEIGHTS_OUTER) +
                          layer_inputs_bytes(&m, n_ids, (int64_t)rows);
    const uint64_t before = budget_taken();
    budget_set(before + need - 1);
    assert_error(capture_open(&c, &w, &data, &plan, -1, &clock), ERR_MEMORY, "embed_tokens_per_layer");
    budget_set(before + need);
    assert_ok(capture_open(&c, &w, &data, &plan, -1, &clock));
    budget_set(0);
    capture_close(c);
    weights_free(&w);
    model_close(&m);
}

static int close_all(void **state)
{
    close_backends(state);
    return support_remove_folder(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test_teardown(test_streams, clean_up),
                                       cmocka_unit_test_teardown(test_table, clean_up)};
    return cmocka_run_group_tests(tests, make_data, close_all);
}

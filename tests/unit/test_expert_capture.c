/* A mixture's Hessians in a calibration, expert by expert, against the plainest implementation in double
 * (expert_support.h): over the tokens that a router sends there, and over no others. */
#include "quantize/capture.h"
#include "quantize/sets.h"
#include "tests/unit/cutting.h"
#include "tests/unit/expert_support.h"
#include "tests/unit/naive.h"

#include <math.h>

/* What one layer's experts should see. */
struct expected {
    struct naive_experts n;
    const double *x; /* [TOKENS, hidden], in front of the experts */
    int32_t skip_id;
    int64_t counts[N_EXPERTS];
    struct route routes[TOKENS];
};

static bool is_left_out(const struct expected *e, int64_t token)
{
    return mixture_ids()[token] == e->skip_id;
}

static bool is_sent(const struct expected *e, int64_t token, int expert)
{
    for (int i = 0; i < TOP; i++)
        if (e->routes[token].expert[i] == expert)
            return true;
    return false;
}

static void expect_routes(struct expected *e)
{
    memset(e->counts, 0, sizeof e->counts);
    for (int64_t t = 0; t < TOKENS; t++) {
        e->routes[t] = naive_expert_route(&e->n, e->x + t * HIDDEN);
        for (int k = 0; k < N_EXPERTS; k++)
            e->counts[k] += is_sent(e, t, k) && !is_left_out(e, t);
    }
}

/* h += xᵀx of one token's inputs of an expert. */
static void add_token(const struct expected *e, enum gemma_fused set, int expert, int64_t token, double *h)
{
    double in[HIDDEN], inner[INNER];
    const int cols = set == FUSED_DOWN ? INNER : HIDDEN;
    const double *x = set == FUSED_DOWN ? inner : in;
    if (is_left_out(e, token))
        return;
    naive_expert_inputs(&e->n, expert, e->x + token * HIDDEN, in, inner);
    for (int i = 0; i < cols; i++)
        for (int k = 0; k < cols; k++)
            h[i * cols + k] += x[i] * x[k];
}

/* The tokens that are sent to it, and where they are fewer than hidden, others: of the rest, without what is left out, as
 * many as are missing, but no larger share than hidden is of the text; the k-th of m behind k/m of the rest. */
static void expect_hessian(const struct expected *e, enum gemma_fused set, int expert, double *h)
{
    int64_t rest[TOKENS], n = 0, missing = HIDDEN - e->counts[expert];
    for (int64_t t = 0; t < TOKENS; t++)
        if (is_sent(e, t, expert))
            add_token(e, set, expert, t, h);
        else if (!is_left_out(e, t))
            rest[n++] = t;
    if (missing > n * HIDDEN / TOKENS)
        missing = n * HIDDEN / TOKENS;
    for (int64_t k = 1; k <= missing; k++)
        add_token(e, set, expert, rest[(k * n + missing - 1) / missing - 1], h);
}

static double distance(const double *a, const double *b, int64_t n)
{
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        size += b[i] * b[i];
    }
    return sqrt(error / size);
}

/* Hessians of experts [first, first + n) into h, one below the other. */
static void capture_hessians(struct capture *c, int layer, enum gemma_fused set, int first, int n,
                             const struct mat *h)
{
    const struct mat own = mat_rows(h, first * h->cols, n * h->cols);
    assert_ok(cpu[1].core->zero(&cpu[1], &own));
    assert_ok(capture_expert_inputs(c, layer, set, first, n, &own));
    for (int e = 0; e < n; e++) {
        const struct mat one = mat_rows(&own, e * h->cols, h->cols);
        assert_ok(cpu[1].quant->hessian_finish(&cpu[1], &one));
    }
}

struct margins {
    struct outcome o;
    double nearest; /* relative distance to what another expert, or all tokens, would give: the least */
    int n_starved, n_fed;
};

static void check_hessians(struct margins *g, const struct expected *e, enum gemma_fused set,
                           const struct mat *h, const char *text)
{
    const int64_t n = h->cols * h->cols;
    double *all = zeros(n), *rows[N_EXPERTS];
    for (int k = 0; k < N_EXPERTS; k++)
        expect_hessian(e, set, k, rows[k] = zeros(n));
    for (int k = 0; k < N_EXPERTS; k++) {
        const struct mat own = mat_rows(h, k * h->cols, h->cols);
        memset(all, 0, (size_t)n * sizeof *all);
        for (int64_t t = 0; t < TOKENS; t++)
            add_token(e, set, k, t, all);
        const double error = distance(naive_rows(&own), rows[k], n);
        if (!(error <= g->o.bound))
            fail_msg("%s: expert %d, set %d: relative error %.3e, at most %.1e allowed", text, k, set, error,
                     g->o.bound);
        g->o.worst = error > g->o.worst ? error : g->o.worst;
        g->o.cases++;
        g->nearest = fmin(g->nearest, distance(all, rows[k], n));
        g->nearest = fmin(g->nearest, distance(rows[(k + 1) % N_EXPERTS], rows[k], n));
    }
}

/* Rounds weights towards 0, as no method would, so that what follows reads other inputs. */
static void coarsen(struct weights *w, int layer)
{
    for (int e = 0; e < N_EXPERTS; e++) {
        const struct linear_set *l = set_place(&w->blocks[layer], FUSED_GATE_UP, e);
        for (int64_t i = 0; i < l->whole.weight.rows * l->whole.weight.cols; i++)
            ((uint16_t *)l->whole.weight.data)[i] &= 0xffe0;
    }
}

/* Slices of experts give the bytes of all of them. */
static void check_slices(struct capture *c, int layer, enum gemma_fused set, const struct mat *h)
{
    static const int slices[][2] = {{0, 3}, {6, 2}, {3, 3}};
    const struct mat again = dense(h->rows, h->cols);
    for (size_t i = 0; i < N_OF(slices); i++)
        capture_hessians(c, layer, set, slices[i][0], slices[i][1], &again);
    assert_memory_equal(again.data, h->data, (size_t)(h->rows * h->cols) * sizeof(float));
}

static void check_layer(struct margins *g, struct capture *c, struct walk *k, struct weights *w, int layer,
                        int32_t skip_id, const char *text)
{
    const struct mat gate_up = dense(N_EXPERTS * HIDDEN, HIDDEN), down = dense(N_EXPERTS * INNER, INNER);
    struct expected *e = room(1, sizeof *e);
    for (int set = 0; set < N_FUSED; set++)
        assert_ok(capture_inputs(c, layer, (enum gemma_fused)set, NULL));
    assert_ok(capture_route(c, layer));
    walk_to_experts(k, layer);
    *e = (struct expected){.n = naive_experts_of(w, layer), .x = naive_rows(&k->x), .skip_id = skip_id};
    expect_routes(e);
    for (int i = 0; i < N_EXPERTS; i++) {
        assert_int_equal(capture_expert_tokens(c, i), e->counts[i]);
        g->n_starved += e->counts[i] < HIDDEN;
        g->n_fed += e->counts[i] >= HIDDEN;
    }
    capture_hessians(c, layer, FUSED_GATE_UP, 0, N_EXPERTS, &gate_up);
    check_hessians(g, e, FUSED_GATE_UP, &gate_up, text);
    check_slices(c, layer, FUSED_GATE_UP, &gate_up);
    coarsen(w, layer);
    e->n = naive_experts_of(w, layer);
    capture_hessians(c, layer, FUSED_DOWN, 0, N_EXPERTS, &down);
    check_hessians(g, e, FUSED_DOWN, &down, text);
    check_slices(c, layer, FUSED_DOWN, &down);
    walk_to_end(k, layer);
    assert_ok(capture_end(c, layer));
}

static void check_stream(struct outcome *o, const struct capture *c, const struct mat *expected,
                         const char *text)
{
    double *rows = naive_rows(expected);
    for (int i = 0; i < SAMPLES; i++) {
        const struct mat spare = dense(LENGTH, HIDDEN);
        struct mat got;
        assert_ok(capture_sample(c, CAPTURE_INPUTS, i, &spare, &got));
        const double error =
            distance(naive_rows(&got), rows + (int64_t)i * LENGTH * HIDDEN, (int64_t)LENGTH * HIDDEN);
        if (!(error <= o->bound))
            fail_msg("%s, sample %d: %s: relative error %.3e, at most %.1e allowed", text, i, o->op, error,
                     o->bound);
        o->worst = error > o->worst ? error : o->worst;
        o->cases++;
    }
}

/* Batches of one sample, or of two: the last one is shorter. */
static void check_capture(struct margins *g, struct outcome *streams, int32_t skip_id, bool on_host)
{
    const struct dataset data = {.samples = SAMPLES, .length = LENGTH, .ids = (int32_t *)mixture_ids()};
    struct backend b = cpu[1];
    struct model m;
    struct weights w;
    struct capture *c;
    struct capture_plan plan;
    struct work_clock clock;
    const int batch = on_host ? 1 : 2;
    b.batch_tokens = batch * LENGTH;
    b.host_memory = false;
    work_begin(&clock, NULL);
    assert_ok(model_open(&m, cutting_model("plain", mixture)));
    assert_ok(model_bind(&m, NULL, NULL));
    assert_ok(weights_open(&w, &m, &b));
    assert_ok(weights_load_part(&w, WEIGHTS_OUTER));
    struct walk k = walk_open(&w, data.ids);
    weights_unload_part(&w, WEIGHTS_OUTER);
    assert_ok(capture_plan(&plan, &m.gemma, &b, &data, false, on_host ? 0 : UINT64_MAX));
    assert_true(plan.batch == batch && plan.states_on_host == on_host);
    assert_int_equal(capture_expert_floor(&m.gemma, &data), HIDDEN);
    assert_ok(capture_open(&c, &w, &data, &plan, skip_id, &clock));
    for (int layer = 0; layer < LAYERS; layer++) {
        char text[100];
        snprintf(text, sizeof text, "without %d, on the host %d, layer %d", skip_id, on_host, layer);
        assert_ok(weights_load_part(&w, layer));
        check_layer(g, c, &k, &w, layer, skip_id, text);
        check_stream(streams, c, &k.x, text);
        weights_unload_part(&w, layer);
    }
    capture_close(c);
    weights_free(&w);
    model_close(&m);
    free_matrices();
}

static void test_hessians(void **state)
{
    (void)state;
    struct margins g = {.o = {"experts' Hessians", 1e-5, 0, 0}, .nearest = INFINITY};
    struct outcome streams = {"streams behind experts", 1e-5, 0, 0};
    for (int i = 0; i < 4; i++)
        check_capture(&g, &streams, i % 2 ? SKIPPED : -1, i / 2);
    print_outcome(&g.o);
    print_outcome(&streams);
    print_message(
        "the tokens of another expert, or all of them, are %.1e away; %d experts of %d were starved\n",
        g.nearest, g.n_starved, g.n_starved + g.n_fed);
    assert_true(g.nearest > 100 * g.o.bound && g.n_starved > 0 && g.n_fed > 0);
}

static int open_all(void **state)
{
    const int rc = support_make_folder(state);
    return rc ? rc : open_backends(state);
}

static int close_all(void **state)
{
    close_backends(state);
    return support_remove_folder(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test_teardown(test_hessians, clean_up)};
    return cmocka_run_group_tests(tests, open_all, close_all);
}

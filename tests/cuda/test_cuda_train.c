/* A device against the CPU: the gradients of the forward pass's operations, but for attention's; and that a NaN comes
 * through every one of them. AutoRound's step is in test_cuda_tune.c.
 *   test_cuda_train [DEVICE]      default: cuda:0 */
#include "tests/cuda/parity.h"
#include "tests/cuda/split_case.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
/* Gaps between rows: whole pieces of 16 bytes with and without them; and no alignment. */
static const int64_t slacks[] = {0, 8, 3};
/* Rounding to BF16 alone: 1.6e-3. To F32: the same terms, added up in FP32 in another order. */
static const double act_bound = 5e-3, f32_bound = 1e-5, product_bound = 2e-5;

static const char *kind_of(int dtype)
{
    return dtype == ACT ? "act" : "F32";
}

/* --- products --------------------------------------------------------------------------------------------------- */

struct product_args {
    struct twin dy, other, out; /* other: the weight, or x */
    bool add;
};

static int run_dgrad(const struct backend *b, enum side s, const void *args)
{
    const struct product_args *a = args;
    return b->train->gemm_dgrad(b, &a->dy.m[s], &a->other.m[s], a->add, &a->out.m[s]);
}

static int run_wgrad(const struct backend *b, enum side s, const void *args)
{
    const struct product_args *a = args;
    return b->train->gemm_wgrad(b, &a->dy.m[s], &a->other.m[s], a->add, &a->out.m[s]);
}

/* What is added to, or only written. */
static struct twin target(int dtype, int64_t rows, int64_t cols, int64_t slack, bool add)
{
    return add ? twin_random(dtype, rows, cols, slack, 2) : twin_make(dtype, rows, cols, slack);
}

/* Weights that BF16 can hold, in any type: exact on both sides. */
static struct twin bf16_weight(enum dtype dtype, int64_t rows, int64_t cols, int64_t slack)
{
    struct twin w = twin_random(dtype, rows, cols, slack, 0.1);
    for (int64_t i = 0; i < rows * cols; i++)
        twin_put(&w, i / cols, i % cols, naive_bf16(naive_element(&w.initial, i / cols, i % cols)));
    twin_upload(&w);
    return w;
}

static const int64_t heights[] = {1, 3, 17, 128, 300}, out_features[] = {64, 300, 1024, 257},
                     in_features[] = {256, 640, 1152, 100};

static void test_dgrad(void **state)
{
    (void)state;
    struct outcome o[2] = {{"gemm_dgrad to F32", product_bound, 0, 0},
                           {"gemm_dgrad to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(heights) * N_OF(out_features) * N_OF(in_features) * 4; i++) {
        const int64_t n = heights[i / 64], rows = out_features[i / 16 % 4], cols = in_features[i / 4 % 4];
        const int out_type = i % 2 ? ACT : DTYPE_F32;
        const enum dtype type = float_types[i % 3];
        struct product_args a = {.dy = twin_random(ACT, n, rows, slacks[i % 3], 1),
                                 .other = bf16_weight(type, rows, cols, slacks[i / 3 % 3]),
                                 .add = i / 2 % 2};
        char text[120];
        snprintf(text, sizeof text, "[%d, %d] · %s [%d, %d], gaps %d, to %s%s", (int)n, (int)rows,
                 dtype_name(type), (int)rows, (int)cols, (int)slacks[i % 3], kind_of(out_type),
                 a.add ? ", added" : "");
        a.out = target(out_type, n, cols, slacks[i / 2 % 3], a.add);
        parity_case(run_dgrad, &a, &(struct result){&o[i % 2], &a.out, false}, 1, text);
        parity_free();
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* More columns than a panel of scratch memory holds. */
static void test_dgrad_in_panels(void **state)
{
    (void)state;
    enum { ROWS = 65536, COLS = 1800 };
    struct outcome o = {"gemm_dgrad, 65536 rows of w", product_bound, 0, 0};
    struct product_args a = {.dy = twin_random(ACT, 9, ROWS, 0, 1),
                             .other = twin_make(DTYPE_F16, ROWS, COLS, 0),
                             .out = twin_make(DTYPE_F32, 9, COLS, 0)};
    uint16_t *w[] = {a.other.m[CPU].data, a.other.initial.data};
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) /* ±1/16, ±5/64, ±3/32, ±7/64 */
        w[0][i] = w[1][i] =
            (uint16_t)(0x2c00 | (i * 2654435761u >> 24 & 3) << 8 | (i * 40503u >> 8 & 1) << 15);
    twin_upload(&a.other);
    parity_case(run_dgrad, &a, &(struct result){&o, &a.out, false}, 1, "F16");
    parity_free();
    parity_print(&o, "relative L2 error");
}

static void test_wgrad(void **state)
{
    (void)state;
    struct outcome o = {"gemm_wgrad", product_bound, 0, 0};
    for (size_t i = 0; i < (N_OF(heights) + 1) * N_OF(out_features) * N_OF(in_features) * 2; i++) {
        const size_t tall = i / 32;
        const int64_t n = tall < N_OF(heights) ? heights[tall] : 2000;
        struct product_args a = {.dy = twin_random(ACT, n, out_features[i / 8 % 4], slacks[i % 3], 1),
                                 .other = twin_random(ACT, n, in_features[i / 2 % 4], slacks[i / 3 % 3], 1),
                                 .add = i % 2};
        char text[120];
        snprintf(text, sizeof text, "%d tokens, [%d, %d], gaps %d and %d%s", (int)n, (int)a.dy.initial.cols,
                 (int)a.other.initial.cols, (int)slacks[i % 3], (int)slacks[i / 3 % 3],
                 a.add ? ", added" : "");
        a.out = target(DTYPE_F32, a.dy.initial.cols, a.other.initial.cols, slacks[i / 9 % 3], a.add);
        parity_case(run_wgrad, &a, &(struct result){&o, &a.out, false}, 1, text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

static void test_products_of_no_tokens(void **state)
{
    (void)state;
    struct outcome o = {"gemm_wgrad, no tokens", 0, 0, 0};
    const struct twin dy = twin_random(ACT, 1, 64, 0, 1), x = twin_random(ACT, 1, 128, 0, 1),
                      w = twin_random(DTYPE_BF16, 64, 128, 0, 1), dx = twin_make(ACT, 1, 128, 0);
    for (int add = 0; add < 2; add++) {
        struct product_args a = {twin_rows(&dy, 0, 0), twin_rows(&x, 0, 0),
                                 target(DTYPE_F32, 64, 128, 3, add), add};
        parity_case(run_wgrad, &a, &(struct result){&o, &a.out, false}, 1, add ? "added" : "written");
    }
    const struct product_args a = {twin_rows(&dy, 0, 0), w, twin_rows(&dx, 0, 0), false};
    assert_ok(run_dgrad(&side[DEVICE], DEVICE, &a));
    assert_ok(side[DEVICE].core->wait(&side[DEVICE]));
}

/* --- RMSNorm ---------------------------------------------------------------------------------------------------- */

enum place { APART, IN_DY, IN_ADD };

struct norm_args {
    struct twin x, w, dy, rest, out; /* rest: what is added */
    bool has_w, has_rest;
    enum place place;
    struct norm_spec spec;
};

static int run_norm(const struct backend *b, enum side s, const void *args)
{
    const struct norm_args *a = args;
    const struct mat *out = &a->out.m[s], *dy = a->place == IN_DY ? out : &a->dy.m[s],
                     *rest = a->place == IN_ADD ? out : &a->rest.m[s];
    return b->train->rms_norm_backward(b, &a->x.m[s], a->has_w ? &a->w.m[s] : NULL, &a->spec, dy,
                                       a->has_rest ? rest : NULL, out);
}

/* Rows from tiny, where eps decides, to large. */
static struct twin norm_input(int dtype, int64_t rows, int64_t cols, int64_t slack)
{
    struct twin t = twin_make(dtype, rows, cols, slack);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            twin_put(&t, r, c, support_uniform(&random_state) * pow(10, (double)(r % 7) - 4));
    twin_upload(&t);
    return t;
}

static void check_norm(struct outcome o[2], int64_t rows, int64_t cols, size_t kind)
{
    const int types[] = {DTYPE_F32, ACT}, x_type = types[kind % 2], dy_type = types[kind / 2 % 2],
              out_type = types[kind / 4 % 2];
    const int64_t slack = slacks[kind / 8 % 3];
    struct norm_args a = {.has_w = kind % 5 < 4,
                          .has_rest = kind / 24 % 2,
                          .place = (enum place)(kind / 48 % 3),
                          .spec = {1e-6f, kind % 7 < 4}};
    if ((a.place == IN_DY && dy_type != out_type) || (a.place == IN_ADD && (!a.has_rest || out_type == ACT)))
        return;
    char text[140];
    snprintf(text, sizeof text, "%d × %d, slack %d, x %s, dy %s, out %s%s, place %d", (int)rows, (int)cols,
             (int)slack, kind_of(x_type), kind_of(dy_type), kind_of(out_type), a.has_rest ? ", added" : "",
             (int)a.place);
    a.x = norm_input(x_type, rows, cols, slack);
    a.w = twin_random(float_types[kind % 3], 1, cols, 0, 2);
    a.dy = twin_random(dy_type, rows, cols, slack, 1);
    a.rest = twin_random(DTYPE_F32, rows, cols, slack, 1);
    a.out = a.place == IN_DY ? a.dy : a.place == IN_ADD ? a.rest : twin_make(out_type, rows, cols, slack);
    parity_case(run_norm, &a, &(struct result){&o[out_type == ACT], &a.out, false}, 1, text);
    parity_free();
}

static void test_rms_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 100, 256, 257, 640, 2560, 5376, 12288, 21504, 24580};
    struct outcome o[2] = {{"rms_norm_backward to F32", f32_bound, 0, 0},
                           {"rms_norm_backward to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(widths) * 144; i++)
        check_norm(o, i % 5 ? 9 : 1, widths[i / 144], i % 144);
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* --- the gated activation --------------------------------------------------------------------------------------- */

struct geglu_args {
    struct twin gate, up, dy, dgate, dup;
};

static int run_geglu(const struct backend *b, enum side s, const void *args)
{
    const struct geglu_args *a = args;
    return b->train->geglu_backward(b, &a->gate.m[s], &a->up.m[s], &a->dy.m[s], &a->dgate.m[s], &a->dup.m[s]);
}

/* As the backward pass has it: gate and up side by side, the results in their place; or five matrices. */
static void test_geglu(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 100, 640, 2048, 6912}, rows_of[] = {1, 9, 70};
    struct outcome o = {"geglu_backward", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(rows_of) * 3 * 2; i++) {
        const int64_t cols = widths[i % 7], rows = rows_of[i / 7 % 3], slack = slacks[i / 21 % 3];
        const bool in_place = i / 63;
        /* beyond −3 the CPU's 1 + tanh loses digits */
        struct twin both = twin_random(ACT, rows, 2 * cols, slack, 3);
        struct geglu_args a = {twin_cols(&both, 0, cols), twin_cols(&both, cols, cols),
                               twin_random(ACT, rows, cols, slack, 1), twin_make(ACT, rows, cols, slack),
                               twin_make(ACT, rows, cols, slack)};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, slack %d%s", (int)rows, (int)cols, (int)slack,
                 in_place ? ", in place" : "");
        const struct result apart[] = {{&o, &a.dgate, false}, {&o, &a.dup, false}},
                            whole = {&o, &both, false};
        struct geglu_args placed = a;
        placed.dgate = a.gate;
        placed.dup = a.up;
        if (in_place)
            parity_case(run_geglu, &placed, &whole, 1, text);
        else
            parity_case(run_geglu, &a, apart, 2, text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

/* The device's result at one place. */
static double seen(const struct twin *t, int64_t row, int64_t col)
{
    struct mat m = t->initial;
    m.data = room(twin_bytes(t), 1);
    twin_download(t, m.data);
    return naive_element(&m, row, col);
}

/* Far out the derivative is 0 or 1, and no infinity gets in between. */
static void test_geglu_extremes(void **state)
{
    (void)state;
    enum { COLS = 24 };
    static const double extremes[] = {0, -0.0, 1e-30, -1e-30, 12, -12, 50, -50, 1e4, -1e4, 1e25, -1e25};
    for (size_t i = 0; i < N_OF(extremes); i++) {
        struct twin gate = twin_make(ACT, 1, COLS, 0), ones = twin_make(ACT, 1, COLS, 0),
                    dgate = twin_make(ACT, 1, COLS, 0), dup = twin_make(ACT, 1, COLS, 0);
        for (int64_t c = 0; c < COLS; c++) {
            twin_put(&gate, 0, c, extremes[i]);
            twin_put(&ones, 0, c, 1);
        }
        twin_upload(&gate);
        twin_upload(&ones);
        const struct geglu_args a = {gate, ones, ones, dgate, dup};
        assert_ok(run_geglu(&side[DEVICE], DEVICE, &a));
        const double z = extremes[i], slope = fabs(z) < 1 ? 0.5 : z > 0, value = z > 0 ? z : 0;
        for (int64_t c = 0; c < COLS; c++) {
            assert_true(fabs(seen(&dgate, 0, c) - slope) <= 1e-5);
            assert_true(fabs(seen(&dup, 0, c) - value) <= 1e-2 * fabs(value) + 1e-5);
        }
        parity_free();
    }
}

/* --- queries, keys and values ----------------------------------------------------------------------------------- */

struct split_args {
    struct split_case c; /* the matrices of its spec are set from those below */
    struct twin qkv, rope, q_norm, k_norm, dq, dkeys, dvalues, dqkv;
    bool in_place;
};

static int run_split(const struct backend *b, enum side s, const void *args)
{
    const struct split_args *a = args;
    struct qkv_spec spec = a->c.spec;
    spec.q_norm = a->c.q_normed ? &a->q_norm.m[s] : NULL;
    spec.k_norm = a->c.k_normed ? &a->k_norm.m[s] : NULL;
    spec.rope = &a->rope.m[s];
    const struct mat *dqkv = &a->dqkv.m[s];
    return b->train->split_qkv_backward(b, &spec, a->in_place ? dqkv : &a->qkv.m[s], &a->dq.m[s],
                                        a->c.alone ? NULL : &a->dkeys.m[s],
                                        a->c.alone ? NULL : &a->dvalues.m[s], dqkv);
}

static void check_split(struct outcome *o, const struct split_case *c)
{
    const struct heads *h = &c->spec.heads;
    const struct sequences *s = &c->spec.sequences;
    const int64_t q = h->n_heads * h->head_dim, kv = h->n_kv_heads * h->head_dim, tokens = s->n * c->length,
                  slots = s->n * s->max_positions + 2, slack = slacks[c->kind % 3];
    struct split_args a = {
        .c = *c,
        .qkv = twin_random(ACT, tokens, c->cols, slack, 3),
        .rope = twin_random(DTYPE_F32, c->length + (int64_t)(c->kind % 2), h->head_dim, slack, 1),
        .q_norm = twin_random(float_types[c->kind % 3], 1, h->head_dim, 0, 1),
        .k_norm = twin_random(float_types[c->kind / 3 % 3], 1, h->head_dim, 0, 1),
        .dq = twin_random(ACT, tokens, q, slack, 1),
        .dkeys = twin_random(ACT, slots, kv, slack, 1),
        .dvalues = twin_random(ACT, slots, kv, slack + 8, 1),
        .in_place = c->kind / 4 % 2};
    char text[200];
    snprintf(text, sizeof text, "%s%s", c->text, a.in_place ? ", in place" : "");
    a.dqkv = a.in_place ? a.qkv : twin_make(ACT, tokens, c->cols, slack);
    parity_case(run_split, &a, &(struct result){o, &a.dqkv, false}, 1, text);
    parity_free();
}

static void test_split_qkv(void **state)
{
    (void)state;
    struct outcome o = {"split_qkv_backward", act_bound, 0, 0};
    for (size_t i = 0; i < SPLIT_CASES; i++) {
        const struct split_case c = split_case_of(i);
        check_split(&o, &c);
    }
    parity_print(&o, "relative L2 error");
}

/* --- the loss of a block ---------------------------------------------------------------------------------------- */

struct error_args {
    struct twin y, target, dy;
    double *sum[N_SIDES];
    bool has_dy, in_place;
};

static int run_error(const struct backend *b, enum side s, const void *args)
{
    const struct error_args *a = args;
    const double before = 3;
    const struct mat *dy = &a->dy.m[s];
    const int rc = b->core->upload(b, a->sum[s], &before, sizeof before);
    return rc ? rc
              : b->train->error_backward(b, a->in_place ? dy : &a->y.m[s], &a->target.m[s], 0.37f, a->sum[s],
                                         a->has_dy ? dy : NULL);
}

static void test_error(void **state)
{
    (void)state;
    static const int64_t rows_of[] = {1, 7, 300}, widths[] = {1, 100, 257, 640, 5376};
    struct outcome o = {"error_backward: dy", 1e-7, 0, 0}, sums = {"error_backward: sum", 1e-12, 0, 0};
    for (size_t i = 0; i < N_OF(rows_of) * N_OF(widths) * 9; i++) {
        const int64_t rows = rows_of[i % 3], cols = widths[i / 3 % 5], slack = slacks[i / 15 % 3];
        struct error_args a = {.y = twin_random(DTYPE_F32, rows, cols, slack, 2),
                               .target = twin_random(DTYPE_F32, rows, cols, slacks[i % 3], 2),
                               .has_dy = i / 45 > 0,
                               .in_place = i / 45 == 2};
        a.dy = a.in_place ? a.y : twin_make(DTYPE_F32, rows, cols, slack);
        for (int s = 0; s < N_SIDES; s++)
            a.sum[s] = parity_memory((enum side)s, sizeof(double));
        char text[80];
        snprintf(text, sizeof text, "%d × %d, slack %d, place %d", (int)rows, (int)cols, (int)slack,
                 (int)(i / 45));
        parity_case(run_error, &a, &(struct result){&o, &a.dy, false}, 1, text);
        double got;
        assert_ok(side[DEVICE].core->download(&side[DEVICE], &got, a.sum[DEVICE], sizeof got));
        parity_number(&sums, got, *a.sum[CPU], fabs(*a.sum[CPU]), text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
    parity_print(&sums, "relative error");
}

static void test_keep_best(void **state)
{
    (void)state;
    static const double cases[][2] = {{1, 2}, {2, 1}, {1, 1}, {NAN, 1}, {1, INFINITY}, {1, NAN}};
    const struct backend *b = &side[DEVICE];
    double *loss = parity_memory(DEVICE, sizeof *loss), *best = parity_memory(DEVICE, sizeof *best);
    int32_t *improved = parity_memory(DEVICE, sizeof *improved);
    for (size_t i = 0; i < N_OF(cases); i++) {
        int32_t expected, got;
        double expected_best = cases[i][1], got_best;
        assert_ok(side[CPU].train->keep_best(&side[CPU], &cases[i][0], &expected_best, &expected));
        assert_ok(b->core->upload(b, loss, &cases[i][0], sizeof *loss));
        assert_ok(b->core->upload(b, best, &cases[i][1], sizeof *best));
        assert_ok(b->train->keep_best(b, loss, best, improved));
        assert_ok(b->core->download(b, &got, improved, sizeof got));
        assert_ok(b->core->download(b, &got_best, best, sizeof got_best));
        assert_true(got == expected && !memcmp(&got_best, &expected_best, sizeof got_best));
    }
}

/* --- NaNs ------------------------------------------------------------------------------------------------------- */

/* One row of 64 whose column 33 is a NaN. */
static struct twin with_nan(int dtype)
{
    struct twin t = twin_random(dtype, 1, 64, 0, 1);
    twin_put(&t, 0, 33, NAN);
    twin_upload(&t);
    return t;
}

static void test_nan_comes_through(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct norm_spec norm = {1e-6f, true};
    const struct twin bad = with_nan(ACT), good = twin_random(ACT, 1, 64, 0, 1),
                      out = twin_make(ACT, 1, 64, 0), other = twin_make(ACT, 1, 64, 0),
                      bad_f32 = with_nan(DTYPE_F32), good_f32 = twin_random(DTYPE_F32, 1, 64, 0, 1),
                      dy = twin_make(DTYPE_F32, 1, 64, 0);
    for (int where = 0; where < 2; where++) {
        const struct mat *x = &(where ? good : bad).m[DEVICE], *g = &(where ? bad : good).m[DEVICE];
        assert_ok(b->train->rms_norm_backward(b, x, NULL, &norm, g, NULL, &out.m[DEVICE]));
        assert_true(isnan(seen(&out, 0, 33)) && isnan(seen(&out, 0, 0)));
        assert_ok(b->train->geglu_backward(b, x, &good.m[DEVICE], g, &out.m[DEVICE], &other.m[DEVICE]));
        assert_true(isnan(seen(&out, 0, 33)) && isfinite(seen(&out, 0, 32)));
        assert_true(isnan(seen(&other, 0, 33)) && isfinite(seen(&other, 0, 32)));
    }
    double *sum = parity_memory(DEVICE, sizeof *sum), got = 0;
    assert_ok(b->core->upload(b, sum, &got, sizeof got));
    assert_ok(b->train->error_backward(b, &good_f32.m[DEVICE], &bad_f32.m[DEVICE], 1, sum, &dy.m[DEVICE]));
    assert_ok(b->core->download(b, &got, sum, sizeof got));
    assert_true(isnan(got) && isnan(seen(&dy, 0, 33)) && isfinite(seen(&dy, 0, 32)));
    const struct twin w = twin_random(DTYPE_BF16, 64, 64, 0, 1), dw = twin_make(DTYPE_F32, 64, 64, 0);
    assert_ok(b->train->gemm_dgrad(b, &bad.m[DEVICE], &w.m[DEVICE], false, &out.m[DEVICE]));
    assert_true(isnan(seen(&out, 0, 5)));
    assert_ok(b->train->gemm_wgrad(b, &bad.m[DEVICE], &good.m[DEVICE], false, &dw.m[DEVICE]));
    assert_true(isnan(seen(&dw, 33, 5)) && isfinite(seen(&dw, 32, 5)));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_dgrad, parity_clean_up),
        cmocka_unit_test_teardown(test_dgrad_in_panels, parity_clean_up),
        cmocka_unit_test_teardown(test_wgrad, parity_clean_up),
        cmocka_unit_test_teardown(test_products_of_no_tokens, parity_clean_up),
        cmocka_unit_test_teardown(test_rms_norm, parity_clean_up),
        cmocka_unit_test_teardown(test_geglu, parity_clean_up),
        cmocka_unit_test_teardown(test_geglu_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_split_qkv, parity_clean_up),
        cmocka_unit_test_teardown(test_error, parity_clean_up),
        cmocka_unit_test_teardown(test_keep_best, parity_clean_up),
        cmocka_unit_test_teardown(test_nan_comes_through, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

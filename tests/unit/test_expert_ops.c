/* The operations of mixtures of experts against the plainest implementation in double: which experts a row of logits
 * means, ties and rows without a meaning among them, rows that are gathered more than once, sums of experts' rows, the
 * router's gradient. Each case runs with one, two and three threads, which must give the same bytes. */
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

static int32_t *index_of(const struct mat *m, int64_t row, int64_t col)
{
    return (int32_t *)m->data + row * m->stride + col;
}

/* Rows of x in no order, some of them more than once. */
static struct mat make_indices(int64_t rows, int64_t cols, int64_t limit)
{
    const struct mat m = make(DTYPE_I32, rows, cols);
    for (int64_t i = 0; i < rows * cols; i++)
        *index_of(&m, i / cols, i % cols) = (int32_t)(support_random(&random_state) % (uint64_t)limit);
    return m;
}

/* --- route ------------------------------------------------------------------------------------------------------ */

struct route_case {
    struct mat logits, factors, experts, weights;
    bool has_factors;
};

static int run_route(const struct backend *b, const void *args, const struct mat *weights)
{
    const struct route_case *a = args;
    poison(&a->experts);
    return b->core->route(b, &a->logits, a->has_factors ? &a->factors : NULL, &a->experts, weights);
}

/* How many of the row come before this expert in the order of choice. */
static int64_t place_of(const struct mat *logits, int64_t row, int64_t expert)
{
    int64_t place = 0;
    for (int64_t i = 0; i < logits->cols; i++) {
        const float other = at(logits, row, i), own = at(logits, row, expert);
        place += other > own || (other == own && i < expert);
    }
    return place;
}

static void naive_route_row(const struct route_case *a, int64_t row, int32_t *experts, double *weights)
{
    double sum = 0;
    int64_t n = 0;
    for (int64_t e = 0; e < a->logits.cols; e++)
        if (place_of(&a->logits, row, e) < a->experts.cols)
            experts[n++] = (int32_t)e;
    assert_int_equal(n, a->experts.cols);
    for (int64_t i = 0; i < n; i++)
        sum += exp((double)at(&a->logits, row, experts[i]));
    for (int64_t i = 0; i < n; i++)
        weights[i] = exp((double)at(&a->logits, row, experts[i])) / sum *
                     (a->has_factors ? naive_element(&a->factors, 0, experts[i]) : 1);
}

static void check_experts(const struct route_case *a, const int32_t *expected, const char *text)
{
    const int64_t k = a->experts.cols;
    for (int64_t r = 0; r < a->experts.rows; r++) {
        if (memcmp(index_of(&a->experts, r, 0), expected + r * k, (size_t)k * sizeof *expected))
            fail_msg("%s: row %d has other experts", text, (int)r);
        for (int64_t c = k; c < a->experts.stride; c++)
            assert_int_equal(*index_of(&a->experts, r, c), -1); /* not written */
    }
}

static void check_route(struct outcome *o, const struct route_case *a, const char *text)
{
    const int64_t rows = a->logits.rows, k = a->experts.cols;
    int32_t *experts = room((size_t)(rows * k), sizeof *experts);
    double *weights = room((size_t)(rows * k), sizeof *weights);
    for (int64_t r = 0; r < rows; r++)
        naive_route_row(a, r, experts + r * k, weights + r * k);
    for (int i = 0; i < N_BACKENDS; i++) {
        poison(&a->weights);
        assert_ok(run_route(&cpu[i], a, &a->weights));
        check_experts(a, experts, text);
    }
    run_everywhere(run_route, a, &a->weights, text);
    check(o, &a->weights, weights, 0, text);
}

static struct route_case make_route(int64_t rows, int64_t n, int64_t k, enum dtype factors)
{
    return (struct route_case){.logits = make_random(DTYPE_F32, rows, n, 8),
                               .factors = make_random(factors, 1, n, 2),
                               .experts = make(DTYPE_I32, rows, k),
                               .weights = make(DTYPE_F32, rows, k),
                               .has_factors = true};
}

/* With every second case's logits rounded to whole numbers, so that most rows have equals at the edge of choice. */
static void test_route(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{1, 1}, {8, 2}, {8, 8}, {100, 7}, {128, 8}, {1024, 64}},
                         heights[] = {1, 33, 70};
    struct outcome o = {"route", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(sizes) * N_OF(heights) * 2 * 4; i++) {
        const int64_t *size = sizes[i % 6], rows = heights[i / 6 % 3];
        const bool ties = i / 18 % 2;
        const size_t factors = i / 36;
        struct route_case a = make_route(rows, size[0], size[1], float_types[factors % 3]);
        char text[100];
        snprintf(text, sizeof text, "%d × %d, %d chosen, ties %d, factors %d", (int)rows, (int)size[0],
                 (int)size[1], ties, (int)factors);
        a.has_factors = factors < 3;
        for (int64_t e = 0; ties && e < rows * size[0]; e++)
            put(&a.logits, e / size[0], e % size[0],
                nearbyint((double)at(&a.logits, e / size[0], e % size[0]) / 4)); /* −2 … 2; −0 is 0 */
        check_route(&o, &a, text);
        free_matrices();
    }
    print_outcome(&o);
}

/* One of equals, all equal, hundreds apart, some at −∞: by hand. */
static void test_route_by_hand(void **state)
{
    (void)state;
    static const struct {
        float logits[5];
        int32_t experts[2];
        double weights[2];
    } rows[] = {{{1, 3, 2, 3, 3}, {1, 3}, {0.5, 0.5}},
                {{0, 0, 0, 0, 0}, {0, 1}, {0.5, 0.5}},
                {{0, -0.0f, -1, 0, 0}, {0, 1}, {0.5, 0.5}},
                {{-900, 5, 4, 3, 700}, {1, 4}, {0, 1}},
                {{-INFINITY, 2, -INFINITY, -INFINITY, -INFINITY}, {0, 1}, {0, 1}},
                {{5, 4, 3, 2, 1}, {0, 1}, {0.7310585786300049, 0.2689414213699951}},
                {{1, 2, 3, 4, 5}, {3, 4}, {0.2689414213699951, 0.7310585786300049}}};
    const struct route_case a = {.logits = make(DTYPE_F32, N_OF(rows), 5),
                                 .experts = make(DTYPE_I32, N_OF(rows), 2),
                                 .weights = make(DTYPE_F32, N_OF(rows), 2)};
    for (size_t r = 0; r < N_OF(rows); r++)
        for (int64_t c = 0; c < 5; c++)
            put(&a.logits, (int64_t)r, c, (double)rows[r].logits[c]);
    assert_ok(run_route(&cpu[1], &a, &a.weights));
    for (size_t r = 0; r < N_OF(rows); r++)
        for (int64_t c = 0; c < 2; c++) {
            assert_int_equal(*index_of(&a.experts, (int64_t)r, c), rows[r].experts[c]);
            assert_true(fabs((double)at(&a.weights, (int64_t)r, c) - rows[r].weights[c]) < 1e-7);
        }
}

/* A NaN anywhere, an infinite greatest logit, nothing but −∞: indices in range, weights of NaN, other rows untouched. */
static void test_route_of_damaged_rows(void **state)
{
    (void)state;
    enum { N = 20, K = 4, ROWS = 40 };
    struct route_case a = make_route(ROWS, N, K, DTYPE_F32);
    for (int64_t c = 0; c < N; c++)
        put(&a.logits, 12, c, -INFINITY);
    for (int64_t r = 0; r < 3; r++)
        put(&a.logits, 3 * r, 9 * r, NAN);
    put(&a.logits, 9, 17, INFINITY);
    for (int i = 0; i < N_BACKENDS; i++) {
        assert_ok(run_route(&cpu[i], &a, &a.weights));
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t c = 0; c < K; c++) {
                const int32_t expert = *index_of(&a.experts, r, c);
                const bool damaged = r <= 12 && r % 3 == 0;
                assert_int_equal(isnan(at(&a.weights, r, c)), damaged);
                assert_in_range(expert, c, N - K + c);
                if (damaged && r != 9)
                    assert_int_equal(expert, c);
            }
    }
    bool found = false;
    for (int64_t c = 0; c < K; c++)
        found = found || *index_of(&a.experts, 9, c) == 17;
    assert_true(found);
}

static void test_route_refuses(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{MAX_EXPERTS + 1, 8}, {128, MAX_CHOSEN + 1}};
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const struct route_case a = make_route(1, sizes[i][0], sizes[i][1], DTYPE_F32);
        char expected[100];
        assert_int_equal(run_route(&cpu[0], &a, &a.weights), ERR_UNSUPPORTED);
        snprintf(expected, sizeof expected, "route: %d of %d experts, expected at most 64 of 1024",
                 (int)sizes[i][1], (int)sizes[i][0]);
        assert_string_equal(err_message(), expected);
        free_matrices();
    }
    struct route_case a = make_route(1, 8, 2, DTYPE_F32);
    a.factors.dtype = DTYPE_I8;
    assert_int_equal(run_route(&cpu[0], &a, &a.weights), ERR_UNSUPPORTED);
}

/* --- gather_rows -------------------------------------------------------------------------------------------------- */

struct gather_args {
    const struct mat *x, *rows, *factors;
    bool in_place;
};

static int run_gather(const struct backend *b, const void *args, const struct mat *out)
{
    const struct gather_args *a = args;
    if (a->in_place)
        copy(a->x, out);
    return b->core->gather_rows(b, a->in_place ? out : a->x, a->rows, a->factors, out);
}

static void check_gather(struct outcome *o, const struct gather_args *a, const struct mat *out,
                         const char *text)
{
    double *expected = room((size_t)(out->rows * out->cols), sizeof *expected);
    for (int64_t r = 0; r < out->rows; r++)
        for (int64_t c = 0; c < out->cols; c++)
            expected[r * out->cols + c] = (double)at(a->x, a->rows ? *index_of(a->rows, 0, r) : r, c) *
                                          (a->factors ? (double)at(a->factors, 0, r) : 1);
    run_everywhere(run_gather, a, out, text);
    check(o, out, expected, 0, text);
}

static void test_gather_rows(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 101, 704}, heights[] = {1, 33, 150};
    struct outcome copies = {"gather_rows", 0, 0, 0}, o = {"gather_rows with factors", 6e-8, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 2 * 3; i++) {
        const int64_t cols = widths[i % 4], n = heights[i / 4 % 3];
        const bool scaled = i / 12 % 2;
        const size_t kind = i / 24; /* by rows; in order; in order and in place */
        const struct mat x = make_random(DTYPE_F32, kind ? n : 40, cols, 3), out = make(DTYPE_F32, n, cols),
                         rows = make_indices(1, n, 40), factors = make_random(DTYPE_F32, 1, n, 2);
        const struct gather_args a = {&x, kind ? NULL : &rows, scaled ? &factors : NULL, kind == 2};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, kind %d, factors %d", (int)n, (int)cols, (int)kind, scaled);
        check_gather(scaled ? &o : &copies, &a, &out, text);
        free_matrices();
    }
    print_outcome(&copies);
    print_outcome(&o);
}

/* --- combine_rows ------------------------------------------------------------------------------------------------- */

struct combine_args {
    const struct mat *y, *slots, *weights;
};

static int run_combine(const struct backend *b, const void *args, const struct mat *out)
{
    const struct combine_args *a = args;
    return b->core->combine_rows(b, a->y, a->slots, a->weights, out);
}

static void test_combine_rows(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 101, 704}, heights[] = {1, 33, 150}, chosen[] = {1, 2, 8, 64};
    struct outcome o = {"combine_rows", 5e-7, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * N_OF(chosen) * 2; i++) {
        const int64_t cols = widths[i % 4], n = heights[i / 4 % 3], k = chosen[i / 12 % 4];
        const bool weighed = i < 48;
        const struct mat y = make_random(DTYPE_F32, 50, cols, 3), slots = make_indices(n, k, 50),
                         weights = make_random(DTYPE_F32, n, k, 1), out = make(DTYPE_F32, n, cols);
        double *expected = zeros(n * cols), size_squared = 0;
        for (int64_t e = 0; e < n * cols * k; e++) {
            const int64_t r = e / k / cols, c = e / k % cols;
            const double term = (weighed ? (double)at(&weights, r, e % k) : 1) *
                                (double)at(&y, *index_of(&slots, r, e % k), c);
            expected[e / k] += term;
            size_squared += row_chosen(r, n) ? term * term : 0; /* terms of both signs cancel */
        }
        char text[100];
        snprintf(text, sizeof text, "%d × %d, %d chosen%s", (int)n, (int)cols, (int)k,
                 weighed ? ", weights" : "");
        run_everywhere(run_combine, &(struct combine_args){&y, &slots, weighed ? &weights : NULL}, &out,
                       text);
        check(&o, &out, expected, size_squared, text);
        free_matrices();
    }
    print_outcome(&o);
}

/* Terms are added in the order of j: 2²⁴ + 1 + 1 is lost step by step, 1 + 1 + 2²⁴ is not. */
static void test_combine_in_order(void **state)
{
    (void)state;
    const struct mat y = make(DTYPE_F32, 2, 1), slots = make(DTYPE_I32, 2, 3), out = make(DTYPE_F32, 2, 1),
                     weights = make(DTYPE_F32, 2, 3);
    static const int32_t order[2][3] = {{1, 0, 0}, {0, 0, 1}};
    put(&y, 0, 0, 1);
    put(&y, 1, 0, 0x1p24);
    for (int64_t i = 0; i < 6; i++) {
        *index_of(&slots, i / 3, i % 3) = order[i / 3][i % 3];
        put(&weights, i / 3, i % 3, 1);
    }
    assert_ok(run_combine(&cpu[0], &(struct combine_args){&y, &slots, &weights}, &out));
    assert_true(at(&out, 0, 0) == 0x1p24f && at(&out, 1, 0) == 0x1p24f + 2);
}

/* --- route_backward ----------------------------------------------------------------------------------------------- */

struct route_backward_case {
    struct route_tape tape;
    struct mat dout;
    bool in_place;
};

static int run_route_backward(const struct backend *b, const void *args, const struct mat *dlogits)
{
    const struct route_backward_case *a = args;
    struct route_tape tape = a->tape;
    if (a->in_place) {
        copy(&a->tape.logits, dlogits);
        tape.logits = *dlogits;
    }
    return b->train->route_backward(b, &tape, &a->dout, dlogits);
}

/* A row in double, the choice held fast: the loss is Σ dout⊙Σ_j factor_j·softmax_j·y_j. */
struct naive_route {
    double logits[MAX_CHOSEN], factors[MAX_CHOSEN], dots[MAX_CHOSEN];
    int k;
};

static double route_loss(const void *ctx)
{
    const struct naive_route *n = ctx;
    double sum = 0, loss = 0;
    for (int i = 0; i < n->k; i++)
        sum += exp(n->logits[i]);
    for (int i = 0; i < n->k; i++)
        loss += exp(n->logits[i]) / sum * n->factors[i] * n->dots[i];
    return loss;
}

/* Central differences, the error of which is far below the bound. */
static void naive_route_backward(const struct route_backward_case *a, int64_t row, double *dlogits)
{
    const struct route_tape *t = &a->tape;
    struct naive_route n = {.k = (int)t->experts.cols};
    for (int i = 0; i < n.k; i++) {
        const int32_t expert = *index_of(&t->experts, row, i), slot = *index_of(&t->slots, row, i);
        n.logits[i] = (double)at(&t->logits, row, expert);
        n.factors[i] = t->factors.data ? naive_element(&t->factors, 0, expert) : 1;
        for (int64_t c = 0; c < a->dout.cols; c++)
            n.dots[i] += (double)at(&a->dout, row, c) * (double)at(&t->y, slot, c);
    }
    for (int i = 0; i < n.k; i++)
        dlogits[*index_of(&t->experts, row, i)] = naive_slope(route_loss, &n, &n.logits[i], 1e-4);
}

/* What route makes of random logits. Slots repeat, as they never do in a model. */
static struct route_backward_case make_route_backward(int64_t rows, const int64_t *size, int64_t cols,
                                                      size_t factors)
{
    const struct route_case a = make_route(rows, size[0], size[1], float_types[factors % 3]);
    struct route_backward_case out = {.tape = {.logits = a.logits,
                                               .experts = a.experts,
                                               .y = make_random(DTYPE_F32, 50, cols, 1),
                                               .slots = make_indices(rows, size[1], 50)},
                                      .dout = make_random(DTYPE_F32, rows, cols, 1)};
    if (factors < 3)
        out.tape.factors = a.factors;
    assert_ok(run_route(&cpu[0], &a, &a.weights));
    return out;
}

/* Exactly, where an expert was not chosen. */
static void check_zeros(const struct mat *experts, const struct mat *dlogits)
{
    for (int64_t r = 0; r < dlogits->rows; r++)
        for (int64_t e = 0; e < dlogits->cols; e++) {
            bool chosen = false;
            for (int64_t i = 0; i < experts->cols; i++)
                chosen = chosen || *index_of(experts, r, i) == e;
            assert_true(chosen || at(dlogits, r, e) == 0);
        }
}

static void test_route_backward(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{1, 1}, {8, 2}, {8, 8}, {100, 7}, {128, 8}, {1024, 64}},
                         widths[] = {1, 16, 101}, heights[] = {1, 33, 70};
    struct outcome o = {"route_backward", 5e-6, 0, 0};
    for (size_t i = 0; i < N_OF(sizes) * N_OF(widths) * N_OF(heights) * 4 * 2; i++) {
        const int64_t *size = sizes[i % 6], cols = widths[i / 6 % 3], rows = heights[i / 18 % 3];
        const size_t factors = i / 54 % 4;
        struct route_backward_case a = make_route_backward(rows, size, cols, factors);
        const struct mat dlogits = make(DTYPE_F32, rows, size[0]);
        double *expected = zeros(rows * size[0]), size_squared = 0;
        char text[100];
        a.in_place = i / 216;
        for (int64_t r = 0; r < rows; r++)
            naive_route_backward(&a, r, expected + r * size[0]);
        for (int64_t c = 0; c < rows * size[0]; c++) /* where one weight is nearly 1, all terms cancel */
            size_squared +=
                row_chosen(c / size[0], rows) ? fmax(expected[c] * expected[c], 1e-4 * (double)cols) : 0;
        snprintf(text, sizeof text, "%d × %d, %d chosen, %d columns, factors %d%s", (int)rows, (int)size[0],
                 (int)size[1], (int)cols, (int)factors, a.in_place ? ", in place" : "");
        run_everywhere(run_route_backward, &a, &dlogits, text);
        check(&o, &dlogits, expected, size_squared, text);
        check_zeros(&a.tape.experts, &dlogits);
        free_matrices();
    }
    print_outcome(&o);
}

/* A factor of 0 takes an expert's result away, not the router's preference for it. */
static void test_route_backward_by_hand(void **state)
{
    (void)state;
    struct route_backward_case a = {.tape = {.logits = make(DTYPE_F32, 1, 3),
                                             .factors = make(DTYPE_F32, 1, 3),
                                             .experts = make(DTYPE_I32, 1, 2),
                                             .y = make(DTYPE_F32, 2, 1),
                                             .slots = make(DTYPE_I32, 1, 2)},
                                    .dout = make(DTYPE_F32, 1, 1)};
    const struct mat dlogits = make(DTYPE_F32, 1, 3);
    static const double expected[] = {-1.5, 0, 1.5}; /* ½·(g − 3), g = 0 and 2·3 */
    for (int i = 0; i < 3; i++) {
        put(&a.tape.logits, 0, i, i == 1 ? -4 : 7);
        put(&a.tape.factors, 0, i, i);
    }
    for (int i = 0; i < 2; i++) {
        *index_of(&a.tape.experts, 0, i) = 2 * i;
        *index_of(&a.tape.slots, 0, i) = i;
        put(&a.tape.y, i, 0, i ? 3 : 5);
    }
    put(&a.dout, 0, 0, 1);
    assert_ok(run_route_backward(&cpu[0], &a, &dlogits));
    for (int i = 0; i < 3; i++)
        assert_true((double)at(&dlogits, 0, i) == expected[i]);
    a.tape.factors.dtype = DTYPE_I8;
    assert_int_equal(run_route_backward(&cpu[0], &a, &dlogits), ERR_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_route, clean_up),
        cmocka_unit_test_teardown(test_route_by_hand, clean_up),
        cmocka_unit_test_teardown(test_route_of_damaged_rows, clean_up),
        cmocka_unit_test_teardown(test_route_refuses, clean_up),
        cmocka_unit_test_teardown(test_gather_rows, clean_up),
        cmocka_unit_test_teardown(test_combine_rows, clean_up),
        cmocka_unit_test_teardown(test_combine_in_order, clean_up),
        cmocka_unit_test_teardown(test_route_backward, clean_up),
        cmocka_unit_test_teardown(test_route_backward_by_hand, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

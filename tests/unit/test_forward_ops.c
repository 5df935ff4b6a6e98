/* The element-wise operations of the forward pass and the comparison of logits, against the plainest implementation in
 * double that the description in kernels/backend.h allows. Each case runs with one, two and three threads, which must
 * give the same bytes. */
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

/* --- embed ------------------------------------------------------------------------------------------------------ */

struct embed_args {
    const struct mat *table;
    const int32_t *ids;
    float scale;
};

static int run_embed(const struct backend *b, const void *args, const struct mat *out)
{
    const struct embed_args *a = args;
    return b->core->embed(b, a->table, a->ids, a->scale, out);
}

static void test_embed(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 100, 256, 300, 640};
    const int32_t ids[] = {0, 49, 7, 7, 31, 0, 48};
    struct outcome o = {"embed", 1e-7, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(float_types); i++) {
        const int64_t cols = widths[i / N_OF(float_types)];
        const struct mat table = make_random(float_types[i % N_OF(float_types)], 50, cols, 0.1);
        const struct mat out = make(DTYPE_F32, N_OF(ids), cols);
        const struct embed_args a = {&table, ids, i % 2 ? 1 : sqrtf((float)cols)};
        double *expected = room(N_OF(ids) * (size_t)cols, sizeof *expected);
        for (size_t r = 0; r < N_OF(ids); r++)
            for (int64_t c = 0; c < cols; c++)
                expected[r * (size_t)cols + (size_t)c] = naive_element(&table, ids[r], c) * (double)a.scale;
        run_everywhere(run_embed, &a, &out, "embed");
        check(&o, &out, expected, 0, dtype_name(table.dtype));
        free_matrices();
    }
    print_outcome(&o);
}

/* --- rms_norm --------------------------------------------------------------------------------------------------- */

struct norm_args {
    const struct mat *x, *w;
    struct norm_spec spec;
    bool in_place;
};

static int run_norm(const struct backend *b, const void *args, const struct mat *out)
{
    const struct norm_args *a = args;
    if (a->in_place)
        copy(a->x, out);
    return b->core->rms_norm(b, a->in_place ? out : a->x, a->w, &a->spec, out);
}

static double *naive_norm(const struct norm_args *a)
{
    double *x = naive_rows(a->x);
    for (int64_t r = 0; r < a->x->rows; r++)
        naive_norm_row(x + r * a->x->cols, a->x->cols, a->w, &a->spec, x + r * a->x->cols);
    return x;
}

/* Rows from tiny, where eps decides, to huge; the last one is zero. */
static struct mat norm_input(int64_t rows, int64_t cols)
{
    const struct mat x = make_random(DTYPE_F32, rows, cols, 1);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            put(&x, r, c, (double)at(&x, r, c) * (r == rows - 1 && r ? 0 : pow(10, (double)(r % 9) - 5)));
    return x;
}

static void test_rms_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 100, 256, 257, 640, 1000}, heights[] = {1, 33, 100};
    struct outcome o = {"rms_norm", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 4 * 2 * 2; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = heights[i / N_OF(widths) % N_OF(heights)];
        const size_t rest = i / N_OF(widths) / N_OF(heights), weight = rest % 4;
        const struct mat x = norm_input(rows, cols), out = make(DTYPE_F32, rows, cols);
        const struct mat w = make_random(float_types[weight % 3], 1, cols, 2);
        const struct norm_args a = {&x, weight < 3 ? &w : NULL, {1e-6f, rest / 4 % 2 == 1}, rest / 8 == 1};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, weight %d, offset %d, in place %d", (int)rows, (int)cols,
                 (int)weight, a.spec.unit_offset, a.in_place);
        run_everywhere(run_norm, &a, &out, text);
        check(&o, &out, naive_norm(&a), 0, text);
        free_matrices();
    }
    print_outcome(&o);
}

/* Rows that follow one another without a gap, normed in place. */
static void test_rms_norm_of_heads(void **state)
{
    (void)state;
    enum { ROWS = 40, HEADS = 4, DIM = 32 };
    struct outcome o = {"rms_norm of heads", 1e-6, 0, 0};
    struct mat x = make_random(DTYPE_F32, 1, ROWS * HEADS * DIM, 2),
               out = make(DTYPE_F32, 1, ROWS * HEADS * DIM);
    const struct mat w = make_random(DTYPE_BF16, 1, DIM, 1);
    x.rows = out.rows = ROWS * HEADS;
    x.cols = x.stride = out.cols = out.stride = DIM;
    const struct norm_args a = {&x, &w, {1e-6f, true}, true};
    run_everywhere(run_norm, &a, &out, "heads");
    check(&o, &out, naive_norm(&a), 0, "heads");
    assert_true(isnan(((float *)out.data)[ROWS * HEADS * DIM]));
    free_matrices();
    print_outcome(&o);
}

/* --- add_norm --------------------------------------------------------------------------------------------------- */

struct add_args {
    const struct mat *branch, *branch_norm, *x, *next_norm, *sum; /* sum: where x is worked on */
    struct norm_spec spec;
};

static int run_add(const struct backend *b, const void *args, const struct mat *out)
{
    const struct add_args *a = args;
    copy(a->x, a->sum);
    return b->core->add_norm(b, a->branch, a->branch_norm, a->sum, a->next_norm, &a->spec, out);
}

/* The sum with its own spare columns, like any other result. */
static int run_sum(const struct backend *b, const void *args, const struct mat *out)
{
    struct add_args a = *(const struct add_args *)args;
    const struct mat unused = make(DTYPE_F32, out->rows, out->cols);
    a.sum = out;
    return run_add(b, &a, &unused);
}

static void check_add(struct outcome *sums, struct outcome *o, struct add_args *a, const char *text)
{
    const int64_t rows = a->x->rows, cols = a->x->cols;
    const struct mat out = make(DTYPE_F32, rows, cols), sum = make(DTYPE_F32, rows, cols),
                     branch = make(DTYPE_F32, rows, cols);
    double *x = naive_rows(a->x), *added = naive_rows(a->branch);
    for (int64_t r = 0; r < rows; r++) {
        naive_norm_row(added + r * cols, cols, a->branch_norm, &a->spec, added + r * cols);
        for (int64_t c = r * cols; c < (r + 1) * cols; c++)
            x[c] += added[c];
    }
    copy(a->branch, &branch);
    a->sum = &sum;
    run_everywhere(run_add, a, &out, text);
    run_everywhere(run_sum, a, &sum, text);
    check(sums, &sum, x, 0, text);
    /* the second norm is of x as it is stored: where its terms cancel, rounding it shows */
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++)
            x[r * cols + c] = (double)at(&sum, r, c);
        naive_norm_row(x + r * cols, cols, a->next_norm, &a->spec, x + r * cols);
        assert_memory_equal((float *)branch.data + r * branch.stride,
                            (float *)a->branch->data + r * a->branch->stride, (size_t)cols * sizeof(float));
    }
    check(o, &out, x, 0, text);
}

static void test_add_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 100, 257, 640, 1000}, heights[] = {1, 33, 100};
    struct outcome sums = {"add_norm: x", 1e-6, 0, 0}, o = {"add_norm: out", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 4 * 4 * 2; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = heights[i / N_OF(widths) % N_OF(heights)];
        const size_t rest = i / N_OF(widths) / N_OF(heights), first = rest % 4, second = rest / 4 % 4;
        const struct mat branch = norm_input(rows, cols), x = make_random(DTYPE_F32, rows, cols, 3);
        const struct mat w1 = make_random(float_types[first % 3], 1, cols, 2),
                         w2 = make_random(float_types[second % 3], 1, cols, 2);
        struct add_args a = {&branch, first < 3 ? &w1 : NULL, &x, second < 3 ? &w2 : NULL,
                             NULL,    {1e-6f, rest / 16 == 1}};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, weights %d and %d, offset %d", (int)rows, (int)cols, (int)first,
                 (int)second, a.spec.unit_offset);
        check_add(&sums, &o, &a, text);
        free_matrices();
    }
    print_outcome(&sums);
    print_outcome(&o);
}

/* --- activations ------------------------------------------------------------------------------------------------ */

struct geglu_args {
    const struct mat *gate, *up;
    bool in_place;
};

static int run_geglu(const struct backend *b, const void *args, const struct mat *out)
{
    const struct geglu_args *a = args;
    if (a->in_place)
        copy(a->gate, out);
    return b->core->geglu(b, a->in_place ? out : a->gate, a->up, out);
}

static void check_geglu(struct outcome *o, const struct geglu_args *a, const char *text)
{
    const int64_t rows = a->gate->rows, cols = a->gate->cols;
    const struct mat out = make(DTYPE_F32, rows, cols);
    double *expected = room((size_t)(rows * cols), sizeof *expected), size_squared = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const double z = (double)at(a->gate, r, c), up = (double)at(a->up, r, c);
            size_squared += 0.25 * z * z * up * up; /* 1 + tanh cancels for negative gates */
            expected[r * cols + c] =
                0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z))) * up;
        }
    run_everywhere(run_geglu, a, &out, text);
    check(o, &out, expected, size_squared, text);
}

static void test_geglu(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 17, 33, 100, 1001}, heights[] = {1, 40, 70};
    static const double extremes[] = {0, -0.0, 1e-30, -1e-30, 50, -50, 1e4, -1e4, 1e20, -1e20};
    struct outcome o = {"geglu", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 2; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = heights[i / N_OF(widths) % N_OF(heights)];
        const struct mat gate = make_random(DTYPE_F32, rows, cols, 8),
                         up = make_random(DTYPE_F32, rows, cols, 2);
        char text[60];
        snprintf(text, sizeof text, "%d × %d", (int)rows, (int)cols);
        check_geglu(&o, &(struct geglu_args){&gate, &up, i / N_OF(widths) / N_OF(heights) == 1}, text);
        free_matrices();
    }
    for (size_t i = 0; i < N_OF(extremes); i++) {
        const struct mat gate = make(DTYPE_F32, 1, 19), up = make_random(DTYPE_F32, 1, 19, 2);
        for (int64_t c = 0; c < 19; c++)
            put(&gate, 0, c, extremes[i]);
        check_geglu(&o, &(struct geglu_args){&gate, &up, false}, "extreme gates");
        free_matrices();
    }
    print_outcome(&o);
}

struct over_args {
    const struct mat *x, *y;
};

static int run_over(const struct backend *b, const void *args, const struct mat *out)
{
    const struct over_args *a = args;
    return b->core->over_norm(b, a->x, a->y, out);
}

static void test_over_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 33, 1001}, y_widths[] = {1, 17, 64};
    struct outcome o = {"over_norm", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(y_widths); i++) {
        const int64_t rows = 37, cols = widths[i % N_OF(widths)], y_cols = y_widths[i / N_OF(widths)];
        const struct mat x = make_random(DTYPE_F32, rows, cols, 3),
                         y = make_random(DTYPE_F32, rows, y_cols, 100), out = make(DTYPE_F32, rows, cols);
        double *expected = room((size_t)(rows * cols), sizeof *expected), size_squared = 0;
        for (int64_t c = 0; c < y_cols; c++)
            put(&y, 5, c, 0); /* no output at all: nothing can be said of it */
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < y_cols; c++)
                sum += pow((double)at(&y, r, c), 2);
            for (int64_t c = 0; c < cols; c++) {
                expected[r * cols + c] = r == 5 ? 0 : (double)at(&x, r, c) / sqrt(sum / (double)y_cols);
                size_squared += pow(expected[r * cols + c], 2);
            }
        }
        char text[60];
        snprintf(text, sizeof text, "%d over %d", (int)cols, (int)y_cols);
        run_everywhere(run_over, &(struct over_args){&x, &y}, &out, text);
        check(&o, &out, expected, size_squared, text);
        free_matrices();
    }
    print_outcome(&o);
}

struct softcap_args {
    const struct mat *x;
    float cap;
};

static int run_softcap(const struct backend *b, const void *args, const struct mat *out)
{
    const struct softcap_args *a = args;
    copy(a->x, out);
    return b->core->softcap(b, out, a->cap);
}

static void test_softcap(void **state)
{
    (void)state;
    static const double amplitudes[] = {1e-3, 1, 50, 1e4};
    struct outcome o = {"softcap", 2e-7, 0, 0};
    for (size_t i = 0; i < N_OF(amplitudes) * 2; i++) {
        const struct mat x = make_random(DTYPE_F32, 3, 101, amplitudes[i / 2]), out = make(DTYPE_F32, 3, 101);
        const struct softcap_args a = {&x, i % 2 ? 30 : 50};
        double expected[3 * 101];
        for (int64_t k = 0; k < 3 * 101; k++)
            expected[k] = (double)a.cap * tanh((double)at(&x, k / 101, k % 101) / (double)a.cap);
        run_everywhere(run_softcap, &a, &out, "softcap");
        check(&o, &out, expected, 0, "softcap");
        free_matrices();
    }
    print_outcome(&o);
}

/* --- scale ------------------------------------------------------------------------------------------------------ */

struct scale_args {
    const struct mat *x, *before; /* before: of out */
    float factor;
    bool add, in_place;
};

static int run_scale(const struct backend *b, const void *args, const struct mat *out)
{
    const struct scale_args *a = args;
    copy(a->before, out);
    return b->core->scale(b, a->factor, a->in_place ? out : a->x, a->add, out);
}

static void test_scale(void **state)
{
    (void)state;
    static const float factors[] = {1, 0.0045f, -3};
    enum { ROWS = 67, COLS = 101 };
    struct outcome o = {"scale", 1e-7, 0, 0};
    for (int i = 0; i < 3 * 2 * 2; i++) {
        const struct mat x = make_random(DTYPE_F32, ROWS, COLS, 1),
                         before = make_random(DTYPE_F32, ROWS, COLS, 1), out = make(DTYPE_F32, ROWS, COLS);
        const struct scale_args a = {&x, &before, factors[i % 3], i / 3 % 2, i / 6};
        static double expected[ROWS * COLS];
        for (int64_t k = 0; k < ROWS * COLS; k++) {
            const double was = (double)at(&before, k / COLS, k % COLS);
            expected[k] = (a.add ? was : 0) +
                          (double)a.factor * (a.in_place ? was : (double)at(&x, k / COLS, k % COLS));
        }
        run_everywhere(run_scale, &a, &out, "scale");
        check(&o, &out, expected, 0, "scale");
        free_matrices();
    }
    print_outcome(&o);
}

/* --- compare_rows ----------------------------------------------------------------------------------------------- */

struct naive_row {
    double nll_a, nll_b, kl;
    double moved; /* Σ p_a·|log p_a − log p_b|: what the divergence is a difference of */
};

static double naive_log_sum(const struct mat *m, int64_t row)
{
    double highest = -INFINITY, total = 0;
    for (int64_t c = 0; c < m->cols; c++)
        highest = fmax(highest, (double)at(m, row, c));
    for (int64_t c = 0; c < m->cols; c++)
        total += exp((double)at(m, row, c) - highest);
    return highest + log(total);
}

static struct naive_row naive_compare(const struct mat *a, const struct mat *b, int64_t row, int32_t target)
{
    const double sum_a = naive_log_sum(a, row), sum_b = naive_log_sum(b, row);
    struct naive_row out = {sum_a - (double)at(a, row, target), sum_b - (double)at(b, row, target), 0, 0};
    for (int64_t c = 0; c < a->cols; c++) {
        const double log_a = (double)at(a, row, c) - sum_a, log_b = (double)at(b, row, c) - sum_b;
        out.kl += exp(log_a) * (log_a - log_b);
        out.moved += exp(log_a) * fabs(log_a - log_b);
    }
    return out;
}

static int32_t naive_top(const struct mat *m, int64_t row)
{
    int32_t top = 0;
    for (int32_t c = 0; c < m->cols; c++)
        if (at(m, row, c) > at(m, row, top))
            top = c;
    return top;
}

static void close_to(struct outcome *o, double got, double expected, double size, const char *what)
{
    const double relative = fabs(got - expected) / size;
    if (!(relative <= o->bound))
        fail_msg("%s: %s is %.9g, expected %.9g", o->op, what, got, expected);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

enum { COMPARED = 7 };

static void check_compared(struct outcome *o, const struct mat *a, const struct mat *b)
{
    int32_t targets[COMPARED];
    struct row_comparison rows[N_BACKENDS][COMPARED], alone[COMPARED];
    for (int r = 0; r < COMPARED; r++)
        targets[r] = (int32_t)(a->cols - 1 - r * (a->cols - 1) / (COMPARED - 1));
    memset(rows, 0xff, sizeof rows);
    for (int i = 0; i < N_BACKENDS; i++)
        assert_ok(cpu[i].core->compare_rows(&cpu[i], a, b, targets, rows[i]));
    assert_memory_equal(rows[0], rows[1], sizeof rows[0]);
    assert_memory_equal(rows[0], rows[2], sizeof rows[0]);
    assert_ok(cpu[1].core->compare_rows(&cpu[1], a, NULL, targets, alone));
    for (int r = 0; r < COMPARED; r++) {
        const struct row_comparison *got = &rows[0][r];
        const struct naive_row e = naive_compare(a, b, r, targets[r]);
        close_to(o, (double)got->nll_a, e.nll_a, 1 + e.nll_a, "nll_a");
        close_to(o, (double)got->nll_b, e.nll_b, 1 + e.nll_b, "nll_b");
        /* some 10^-7 nats come from the FP32 exponentials in both log-sums; the rest from shifting by a log-sum that
           near 80 is known to 2^-18, which scales every probability */
        close_to(o, (double)got->kl, e.kl, 0.1 + 10 * e.moved, "kl");
        assert_int_equal(got->top_a, naive_top(a, r));
        assert_int_equal(got->top_b, naive_top(b, r));
        assert_memory_equal(&alone[r].nll_a, &got->nll_a, sizeof got->nll_a);
        assert_int_equal(alone[r].top_a, got->top_a);
    }
}

static void test_compare_rows(void **state)
{
    (void)state;
    static const int64_t vocabularies[] = {1, 17, 2048, 5000};
    static const double noises[] = {1e-3, 0.1, 3};
    struct outcome o = {"compare_rows", 2e-6, 0, 0};
    for (size_t i = 0; i < N_OF(vocabularies) * N_OF(noises); i++) {
        const int64_t n = vocabularies[i % 4];
        const struct mat a = make_random(DTYPE_F32, COMPARED, n, 12),
                         b = make_random(DTYPE_F32, COMPARED, n, 1);
        for (int64_t r = 0; r < COMPARED; r++)
            for (int64_t c = 0; c < n; c++)
                put(&b, r, c, (double)at(&a, r, c) + noises[i / 4] * (double)at(&b, r, c));
        check_compared(&o, &a, &b);
        free_matrices();
    }
    print_outcome(&o);
}

static void test_compare_extremes(void **state)
{
    (void)state;
    struct outcome o = {"compare_rows, logits of ±80", 1e-6, 0, 0};
    for (int64_t n = 17; n <= 5000; n += 4983)
        for (int kind = 0; kind < 4; kind++) {
            const struct mat a = make(DTYPE_F32, COMPARED, n), b = make(DTYPE_F32, COMPARED, n);
            for (int64_t r = 0; r < COMPARED; r++)
                for (int64_t c = 0; c < n; c++) {
                    /* one peak each, in different places; half and half, opposite; all equal; the same peak */
                    const bool in_a[] = {c == r, (c + r) % 2 == 0, true, c == 3};
                    const bool in_b[] = {c == n - 1 - r, (c + r) % 2 == 1, false, c == 3};
                    put(&a, r, c, in_a[kind] ? 80 : -80);
                    put(&b, r, c, in_b[kind] ? 80 : -80);
                }
            check_compared(&o, &a, &b);
            free_matrices();
        }
    print_outcome(&o);
}

static void test_compare_equal(void **state)
{
    (void)state;
    const int32_t targets[COMPARED] = {0};
    struct row_comparison rows[COMPARED];
    const struct mat a = make_random(DTYPE_F32, COMPARED, 5000, 30), b = make(DTYPE_F32, COMPARED, 5000);
    copy(&a, &b);
    assert_ok(cpu[2].core->compare_rows(&cpu[2], &a, &b, targets, rows));
    for (int r = 0; r < COMPARED; r++)
        assert_true(rows[r].kl == 0 && rows[r].nll_a == rows[r].nll_b && rows[r].top_a == rows[r].top_b);
    /* of equal logits the first counts */
    for (int64_t c = 100; c < 5000; c += 700)
        put(&a, 0, c, 31);
    assert_ok(cpu[2].core->compare_rows(&cpu[2], &a, NULL, targets, rows));
    assert_int_equal(rows[0].top_a, 100);
    free_matrices();
}

/* --- what must not pass unseen ---------------------------------------------------------------------------------- */

/* A model that has gone wrong shows in its numbers: no operation turns a NaN into something finite. */
static void test_nan_stays(void **state)
{
    (void)state;
    const struct backend *b = &cpu[1];
    const struct mat a = make_random(DTYPE_F32, 1, 64, 1), x = make_random(DTYPE_F32, 1, 64, 1);
    const struct mat out = make_random(DTYPE_F32, 1, 64, 1);
    const int32_t target = 0;
    struct row_comparison row;
    put(&a, 0, 33, NAN);
    assert_ok(b->core->compare_rows(b, &a, NULL, &target, &row));
    assert_true(isnan(row.nll_a));
    assert_ok(b->core->compare_rows(b, &x, &a, &target, &row));
    assert_true(isnan(row.nll_b) && isnan(row.kl));
    assert_ok(b->core->geglu(b, &a, &x, &out));
    assert_true(isnan(at(&out, 0, 33)) && isfinite(at(&out, 0, 32)));
    const struct mat keys = make_random(DTYPE_F32, 40, 64, 1);
    const struct attention_spec spec = {{1, 1, 64}, {1, 39, 40}, 1, 0, 0};
    assert_ok(b->core->attention(b, &spec, &a, &keys, &keys, &out, NULL));
    for (int64_t c = 0; c < 64; c++)
        assert_true(isnan(at(&out, 0, c)));
    const struct norm_spec norm = {1e-6f, true};
    assert_ok(b->core->rms_norm(b, &a, NULL, &norm, &out));
    assert_true(isnan(at(&out, 0, 33)) && isnan(at(&out, 0, 0)));
    const struct mat sum = make_random(DTYPE_F32, 1, 64, 1);
    assert_ok(b->core->add_norm(b, &a, NULL, &sum, NULL, &norm, &out));
    assert_true(isnan(at(&sum, 0, 0)) && isnan(at(&sum, 0, 33)) && isnan(at(&out, 0, 5)));
    put(&x, 0, 7, NAN);
    assert_ok(b->core->softcap(b, &x, 30));
    assert_true(isnan(at(&x, 0, 7)) && isfinite(at(&x, 0, 8)));
    free_matrices();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_embed, clean_up),
        cmocka_unit_test_teardown(test_rms_norm, clean_up),
        cmocka_unit_test_teardown(test_rms_norm_of_heads, clean_up),
        cmocka_unit_test_teardown(test_add_norm, clean_up),
        cmocka_unit_test_teardown(test_geglu, clean_up),
        cmocka_unit_test_teardown(test_over_norm, clean_up),
        cmocka_unit_test_teardown(test_softcap, clean_up),
        cmocka_unit_test_teardown(test_scale, clean_up),
        cmocka_unit_test_teardown(test_compare_rows, clean_up),
        cmocka_unit_test_teardown(test_compare_extremes, clean_up),
        cmocka_unit_test_teardown(test_compare_equal, clean_up),
        cmocka_unit_test_teardown(test_nan_stays, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

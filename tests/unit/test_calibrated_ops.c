/* The products and factors that calibration needs, against the plainest implementation in double that the
 * description in kernels/backend.h allows. Each case runs with one, two and three threads, which must give the same
 * bytes. Scales and codes are in test_scale_ops.c and test_rounding_ops.c. */
#include "tests/unit/naive.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

static double element(const struct mat *m, int64_t row, int64_t col)
{
    return m->dtype == DTYPE_I8 ? ((const int8_t *)m->data)[row * m->stride + col]
                                : naive_element(m, row, col);
}

static struct mat make_codes(int64_t rows, int64_t cols, int half)
{
    const struct mat codes = make(DTYPE_I8, rows, cols);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            ((int8_t *)codes.data)[r * codes.stride + c] =
                (int8_t)((int)(support_random(&random_state) % (uint64_t)(2 * half)) - half);
    return codes;
}

/* --- matmul, dot, zero ------------------------------------------------------------------------------------------ */

struct matmul_args {
    float alpha;
    bool add;
    struct mat x, m, start;
};

static int run_matmul(const struct backend *b, const void *args, const struct mat *out)
{
    const struct matmul_args *a = args;
    if (a->add)
        copy(&a->start, out);
    return b->core->matmul(b, a->alpha, &a->x, &a->m, a->add, out);
}

static double naive_matmul(const struct matmul_args *a, double *out)
{
    const int64_t k = a->x.cols, n = a->m.cols;
    const double *m = naive_rows(&a->m);
    double size_squared = 0;
    for (int64_t r = 0; r < a->x.rows; r++) {
        double *row = out + r * n;
        for (int64_t c = 0; c < n; c++)
            row[c] = a->add ? (double)at(&a->start, r, c) : 0;
        for (int64_t i = 0; row_chosen(r, a->x.rows) && i < k; i++) {
            const double x = (double)a->alpha * element(&a->x, r, i);
            for (int64_t c = 0; c < n; c++) {
                const double term = x * m[i * n + c];
                row[c] += term;
                size_squared += term * term;
            }
        }
    }
    return size_squared;
}

static void test_matmul(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 1},       {1, 512, 640},  {3, 13, 15},     {64, 128, 513},
                                        {256, 300, 512}, {257, 100, 64}, {300, 512, 130}, {5, 4100, 600},
                                        {2, 9000, 3},    {40, 33, 1030}};
    static const float alphas[] = {1, -1, 0.5f};
    struct outcome o = {"matmul", 2e-6, 0, 0};
    for (size_t i = 0; i < N_OF(shapes); i++)
        for (int kind = 0; kind < 5; kind++) /* the last: m in BF16 too */
            for (int add = 0; add < 2; add++) {
                const int64_t rows = shapes[i][0], k = shapes[i][1], n = shapes[i][2];
                const struct matmul_args a = {.alpha = alphas[o.cases % N_OF(alphas)],
                                              .add = add,
                                              .x = kind == 4  ? make_random(DTYPE_BF16, rows, k, 1)
                                                   : kind < 3 ? make_random(float_types[kind], rows, k, 1)
                                                              : make_codes(rows, k, 128),
                                              .m = make_random(kind == 4 ? DTYPE_BF16 : DTYPE_F32, k, n, 1),
                                              .start = make_random(DTYPE_F32, rows, n, 1)};
                const struct mat out = make(DTYPE_F32, rows, n);
                double *expected = room((size_t)(rows * n), sizeof *expected);
                char text[120];
                snprintf(text, sizeof text, "%s %d × %d × %d, alpha %g%s", dtype_name(a.x.dtype), (int)rows,
                         (int)k, (int)n, (double)a.alpha, add ? ", added" : "");
                const double size_squared = naive_matmul(&a, expected);
                run_everywhere(run_matmul, &a, &out, text);
                check(&o, &out, expected, size_squared, text);
                free_matrices();
            }
    print_outcome(&o);
}

static void test_dot(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{1, 1}, {3, 13}, {7, 300}, {5, 1024}, {2, 4100}};
    struct outcome o = {"dot", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(shapes); i++)
        for (size_t t = 0; t < 9; t++) {
            const struct mat x = make_random(float_types[t % 3], shapes[i][0], shapes[i][1], 1),
                             y = make_random(float_types[t / 3], shapes[i][0], shapes[i][1], 1);
            double sum = 0, size_squared = 0, got[N_BACKENDS];
            for (int64_t e = 0; e < x.rows * x.cols; e++) {
                const double term = element(&x, e / x.cols, e % x.cols) * element(&y, e / x.cols, e % x.cols);
                sum += term;
                size_squared += term * term;
            }
            for (int b = 0; b < N_BACKENDS; b++) {
                assert_ok(cpu[b].core->dot(&cpu[b], &x, &y, &got[b]));
                assert_memory_equal(&got[b], &got[0], sizeof *got);
            }
            compare_figure(&o, got[0], sum, sqrt(size_squared), dtype_name(x.dtype));
            free_matrices();
        }
    print_outcome(&o);
    struct mat x = make_random(DTYPE_F32, 2, 3, 1);
    double sum;
    const struct mat y = x;
    x.dtype = DTYPE_I8;
    assert_error(cpu[0].core->dot(&cpu[0], &x, &y, &sum), ERR_UNSUPPORTED, "I8");
}

static void test_zero(void **state)
{
    (void)state;
    static const enum dtype types[] = {DTYPE_I8, DTYPE_BF16, DTYPE_F16, DTYPE_I32, DTYPE_F32, DTYPE_F64};
    for (size_t t = 0; t < N_OF(types); t++)
        for (int64_t cols = 1; cols < 40; cols++) {
            const struct mat whole = make(types[t], 5, cols + 2);
            const struct mat rows = mat_rows(&whole, 1, 3), inner = mat_cols(&rows, 1, cols);
            assert_ok(cpu[0].core->zero(&cpu[0], &inner));
            const size_t each = dtype_bytes(types[t]);
            for (int64_t i = 0; i < whole.rows * whole.stride * (int64_t)each; i++) {
                const int64_t row = i / (whole.stride * (int64_t)each),
                              col = i / (int64_t)each % whole.stride;
                const bool inside = row >= 1 && row < 4 && col >= 1 && col <= cols;
                assert_int_equal(((const uint8_t *)whole.data)[i], inside ? 0 : 0xff);
            }
            free_matrices();
        }
}

/* --- the Hessian ------------------------------------------------------------------------------------------------ */

struct hessian_args {
    struct mat x;
    int64_t piece; /* rows at a time */
};

static int run_hessian(const struct backend *b, const void *args, const struct mat *out)
{
    const struct hessian_args *a = args;
    int rc = b->core->zero(b, out);
    for (int64_t row = 0; !rc && row < a->x.rows; row += a->piece) {
        const int64_t left = a->x.rows - row;
        const struct mat part = mat_rows(&a->x, row, left < a->piece ? left : a->piece),
                         none = mat_rows(&a->x, row, 0);
        rc = b->quant->hessian_add(b, &part, out);
        if (!rc)
            rc = b->quant->hessian_add(b, &none, out);
    }
    return rc ? rc : b->quant->hessian_finish(b, out);
}

static void test_hessian(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 1},     {5, 13, 5},     {300, 128, 300}, {300, 129, 100},
                                        {100, 256, 7}, {300, 257, 64}, {64, 640, 64},   {50, 700, 50}};
    struct outcome o = {"hessian_add, hessian_finish", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(shapes); i++) {
        const struct hessian_args a = {make_inputs(shapes[i][0], shapes[i][1]), shapes[i][2]};
        const struct mat out = make(DTYPE_F32, a.x.cols, a.x.cols), naive = make_hessian(&a.x);
        char text[80];
        snprintf(text, sizeof text, "%d × %d", (int)a.x.rows, (int)a.x.cols);
        run_everywhere(run_hessian, &a, &out, text);
        check(&o, &out, naive_rows(&naive), 0, text);
        float *diagonal = room((size_t)a.x.cols, sizeof *diagonal);
        assert_ok(cpu[0].quant->diagonal(&cpu[0], &out, diagonal));
        for (int64_t r = 0; r < a.x.cols; r++) {
            assert_true(diagonal[r] == at(&out, r, r));
            for (int64_t c = 0; c < r; c++)
                if (!(at(&out, r, c) == at(&out, c, r)))
                    fail_msg("%s: the Hessian is not symmetric at %d, %d", text, (int)r, (int)c);
        }
        free_matrices();
    }
    print_outcome(&o);
}

struct factor_args {
    const struct mat *h, *order, *work, *factor;
    float added;
    int *definite;
};

static int run_factorize(const struct backend *b, const void *args)
{
    const struct factor_args *a = args;
    *a->definite = -1;
    return b->quant->factorize(b, a->h, a->order, a->added, a->work, a->factor, a->definite);
}

/* From the middle to both ends. */
static struct mat make_order(int64_t n)
{
    const struct mat order = make(DTYPE_I32, 1, n);
    for (int64_t i = 0; i < n; i++)
        ((int32_t *)order.data)[i] = (int32_t)(i % 2 ? n / 2 - (i + 1) / 2 : n / 2 + i / 2);
    return order;
}

/* Factorizes with every number of threads. */
static int factorize(const struct mat *h, const struct mat *order, float added, const struct mat *factor)
{
    int definite;
    const struct mat work = make(DTYPE_F64, h->rows, h->cols);
    const struct factor_args a = {h, order, &work, factor, added, &definite};
    run_alike(run_factorize, &a, &factor, 1, "factorize");
    assert_true(definite == 0 || definite == 1);
    return definite;
}

/* D follows from M and the diagonal; all other elements are then free to disagree. The error of an element is measured
 * against √(Aᵢᵢ·Aⱼⱼ), which bounds it. */
static void check_factor(struct outcome *o, const struct mat *h, const struct mat *order, double added,
                         const struct mat *factor)
{
    const int64_t n = h->rows;
    const int32_t *place = order->data;
    double *a = room((size_t)(n * n), sizeof *a), *m = room((size_t)(n * n), sizeof *m),
           *d = room((size_t)n, sizeof *d), worst = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            a[i * n + j] = (double)at(h, place[i], place[j]) + (i == j ? added : 0);
            m[i * n + j] = i <= j ? (double)at(factor, i, j) : 0;
        }
    for (int64_t j = n - 1; j >= 0; j--) {
        assert_true(m[j * n + j] == 1);
        d[j] = a[j * n + j];
        for (int64_t k = j + 1; k < n; k++)
            d[j] -= d[k] * m[j * n + k] * m[j * n + k];
        if (!(d[j] > 0))
            fail_msg("factorize: %d columns: D is %g at place %d", (int)n, d[j], (int)j);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i + 1; j < n; j++) {
            double sum = 0;
            for (int64_t k = j; k < n; k++)
                sum += m[i * n + k] * d[k] * m[j * n + k];
            worst = fmax(worst, fabs(sum - a[i * n + j]) / sqrt(a[i * n + i] * a[j * n + j]));
        }
    char text[80];
    snprintf(text, sizeof text, "%d columns, M·D·Mᵀ is off by", (int)n);
    compare_figure(o, worst, 0, 1, text);
}

static void test_factorize(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 2, 13, 128, 130, 257, 640};
    static const double dampings[] = {0, 0.01, 1}; /* of the mean diagonal */
    struct outcome o = {"factorize", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths); i++)
        for (size_t k = 0; k < N_OF(dampings); k++) {
            const int64_t n = widths[i];
            const struct mat x = make_inputs(2 * n + 5, n), h = make_hessian(&x),
                             factor = make(DTYPE_F32, n, n), order = make_order(n);
            double mean = 0;
            for (int64_t c = 0; c < n; c++)
                mean += (double)at(&h, c, c) / (double)n;
            const float added = (float)(dampings[k] * mean);
            assert_int_equal(factorize(&h, &order, added, &factor), 1);
            check_factor(&o, &h, &order, (double)added, &factor);
            check_gaps(&factor, "factorize");
            free_matrices();
        }
    print_outcome(&o);
}

/* Not positive definite is an answer, not an error: by its eigenvalues, or because it is not finite. */
static void test_factorize_refuses(void **state)
{
    (void)state;
    static const double bad[] = {-1,  0,        5,
                                 NAN, INFINITY, -INFINITY}; /* at one place, off or on the diagonal */
    static const int64_t places[][2] = {{0, 0}, {39, 39}, {17, 17}, {0, 39}, {16, 17}};
    for (size_t i = 0; i < N_OF(bad); i++)
        for (size_t k = 0; k < N_OF(places); k++) {
            const bool diagonal = places[k][0] == places[k][1];
            const struct mat h = make(DTYPE_F32, 40, 40), factor = make(DTYPE_F32, 40, 40),
                             order = make_order(40);
            assert_ok(cpu[0].core->zero(&cpu[0], &h));
            for (int64_t c = 0; c < 40; c++)
                put(&h, c, c, 1);
            put(&h, places[k][0], places[k][1], bad[i]);
            put(&h, places[k][1], places[k][0], bad[i]);
            const bool fine = isfinite(bad[i]) && (diagonal ? bad[i] > 0 : fabs(bad[i]) < 1);
            const int definite = factorize(&h, &order, 0, &factor);
            if (definite != fine)
                fail_msg("factorize: %g at %d, %d: definite is %d", bad[i], (int)places[k][0],
                         (int)places[k][1], definite);
            free_matrices();
        }
}

/* --- group_dots ------------------------------------------------------------------------------------------------- */

struct dots_args {
    struct mat x, codes;
    int64_t group;
};

static int run_dots(const struct backend *b, const void *args, const struct mat *out)
{
    const struct dots_args *a = args;
    return b->quant->group_dots(b, &a->x, &a->codes, a->group, out);
}

static void test_group_dots(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 13, 64, 300, 1000}, groups[] = {16, 32, 100, 128, 1000};
    struct outcome o = {"group_dots", 2e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(groups); i++) {
        const int64_t cols = widths[i % N_OF(widths)], group = groups[i / N_OF(widths)],
                      n = (cols + group - 1) / group;
        const struct dots_args a = {make_random(DTYPE_F32, 5, cols, 1), make_codes(5, cols, i % 2 ? 8 : 128),
                                    group};
        const struct mat out = make(DTYPE_F32, 5, n);
        double *expected = room((size_t)(5 * n), sizeof *expected), size_squared = 0;
        for (int64_t k = 0; k < 5 * n; k++)
            expected[k] = 0;
        for (int64_t r = 0; r < 5; r++)
            for (int64_t c = 0; c < cols; c++) {
                const double term = (double)at(&a.x, r, c) * element(&a.codes, r, c);
                expected[r * n + c / group] += term;
                size_squared += term * term;
            }
        run_everywhere(run_dots, &a, &out, "group_dots");
        check(&o, &out, expected, size_squared, "group_dots");
        free_matrices();
    }
    print_outcome(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_matmul, clean_up),
        cmocka_unit_test_teardown(test_dot, clean_up),
        cmocka_unit_test_teardown(test_zero, clean_up),
        cmocka_unit_test_teardown(test_hessian, clean_up),
        cmocka_unit_test_teardown(test_factorize, clean_up),
        cmocka_unit_test_teardown(test_factorize_refuses, clean_up),
        cmocka_unit_test_teardown(test_group_dots, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

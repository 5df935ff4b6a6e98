/* A device against the CPU: what calibration computes with. Products of FP32 matrices, Hessians and their factors, dot
 * products, zeros.
 *   test_cuda_hessian [DEVICE]      default: cuda:0 */
#include "tests/cuda/parity.h"

#include <math.h>

/* matmul: FP32 operands may be taken apart into pairs of BF16, 2⁻¹⁶ of either. Hessians: FP32 sums in another order. */
static const double matmul_bound = 0x1p-15, f32_bound = 2e-5, dot_bound = 1e-6;

/* --- matmul ----------------------------------------------------------------------------------------------------- */

struct matmul_args {
    struct twin x, m, out;
    float alpha;
    bool add;
};

static int run_matmul(const struct backend *b, enum side s, const void *args)
{
    const struct matmul_args *a = args;
    return b->core->matmul(b, a->alpha, &a->x.m[s], &a->m.m[s], a->add, &a->out.m[s]);
}

static struct twin random_codes(int64_t rows, int64_t cols, int64_t slack)
{
    struct mat m = {NULL, DTYPE_I8, rows, cols, cols + slack};
    m.data = room((size_t)(rows * m.stride), 1);
    for (int64_t i = 0; i < rows * m.stride; i++)
        ((int8_t *)m.data)[i] = (int8_t)(support_random(&random_state) % 256 - 128);
    return twin_of(&m);
}

/* Gaps of x, m and out; bases of rows that are aligned to 16 bytes, to 4 and less, or not at all. */
static const int64_t gaps[][3] = {{0, 0, 0}, {8, 8, 8}, {3, 0, 1}, {0, 5, 0}, {1, 3, 7}};

/* By the largest difference, beside what k products come to without cancellation. */
static void check_matmul(struct outcome *o, enum dtype dtype, enum dtype m_type, int64_t n, int64_t k,
                         int64_t cols)
{
    static size_t turn;
    const int64_t *gap = gaps[turn % N_OF(gaps)];
    const bool add = turn % 2;
    struct matmul_args a = {
        .x = dtype == DTYPE_I8 ? random_codes(n, k, gap[0]) : twin_random((int)dtype, n, k, gap[0], 1),
        .m = twin_random((int)m_type, k, cols, gap[1], 3),
        .out = add ? twin_random(DTYPE_F32, n, cols, gap[2], 1) : twin_make(DTYPE_F32, n, cols, gap[2]),
        .alpha = turn % 3 == 0   ? 1.0f
                 : turn % 3 == 1 ? -1.0f
                                 : 0.37f,
        .add = add};
    const double size = fabs((double)a.alpha) * sqrt((double)k) * 3 * (dtype == DTYPE_I8 ? 128 : 1) + add;
    struct outcome one = {o->op, o->bound * size, 0, 0};
    char text[160];
    snprintf(text, sizeof text, "%s %d × %d · %s %d, %.2f, gaps of %d, %d and %d%s", dtype_name(dtype), (int)n,
             (int)k, dtype_name(m_type), (int)cols, (double)a.alpha, (int)gap[0], (int)gap[1], (int)gap[2], add ? ", added" : "");
    parity_case(run_matmul, &a, &(struct result){&one, &a.out, true}, 1, text);
    o->cases++;
    o->worst = fmax(o->worst, one.worst / size);
    parity_free();
    turn++;
}

static const enum dtype x_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_I8};

static void test_matmul(void **state)
{
    (void)state;
    static const int64_t heights[] = {1, 3, 64, 333}, depths[] = {1, 7, 8, 65, 128, 640},
                         widths[] = {1, 5, 64, 257, 1152};
    struct outcome o = {"matmul", matmul_bound, 0, 0};
    for (size_t t = 0; t < N_OF(x_types); t++)
        for (size_t i = 0; i < N_OF(heights) * N_OF(depths) * N_OF(widths); i++)
            check_matmul(&o, x_types[t], DTYPE_F32, heights[i % 4], depths[i / 4 % 6], widths[i / 24]);
    parity_print(&o, "relative error");
}

/* So large that a device may take them in several turns, of columns of x or of its rows. */
static void test_large_matmul(void **state)
{
    (void)state;
    /* the largest difference of half a million elements, of sums that are longer */
    struct outcome o = {"matmul, large", 2 * matmul_bound, 0, 0};
    check_matmul(&o, DTYPE_F32, DTYPE_F32, 33, 5001, 5003);
    check_matmul(&o, DTYPE_BF16, DTYPE_F32, 20, 6400, 6400);
    check_matmul(&o, DTYPE_BF16, DTYPE_BF16, 513, 2048, 6400);
    check_matmul(&o, DTYPE_BF16, DTYPE_BF16, 20, 9001, 640);
    check_matmul(&o, DTYPE_I8, DTYPE_F32, 2560, 128, 10240);
    check_matmul(&o, DTYPE_F32, DTYPE_F32, 13501, 3000, 40);
    check_matmul(&o, DTYPE_F16, DTYPE_F32, 2, 140001, 17);
    parity_print(&o, "relative error");
}

/* Parts of a matrix in place: columns of x and of out, rows of m. */
static void test_matmul_of_views(void **state)
{
    (void)state;
    const struct twin x = twin_random(DTYPE_F32, 100, 700, 0, 1), m = twin_random(DTYPE_F32, 700, 300, 0, 1);
    const struct twin before = twin_random(DTYPE_F32, 100, 500, 0, 1);
    float *got[N_SIDES];
    for (enum side s = CPU; s < N_SIDES; s++) {
        const struct mat views[] = {mat_cols(&x.m[s], 129, 130), mat_rows(&m.m[s], 129, 130),
                                    mat_cols(&before.m[s], 77, 300)};
        assert_ok(side[s].core->matmul(&side[s], -1, &views[0], &views[1], true, &views[2]));
        got[s] = room(twin_bytes(&before), 1);
    }
    memcpy(got[CPU], before.m[CPU].data, twin_bytes(&before));
    twin_download(&before, got[DEVICE]);
    double error = 0, size = 0;
    for (int64_t i = 0; i < 100 * 500; i++) {
        const double d = (double)got[DEVICE][i] - (double)got[CPU][i];
        assert_true((i % 500 >= 77 && i % 500 < 377) || d == 0);
        error += d * d;
        size += pow((double)got[CPU][i], 2);
    }
    assert_true(sqrt(error / size) <= matmul_bound);
}

static void test_matmul_refuses(void **state)
{
    (void)state;
    const struct twin x = twin_make(DTYPE_I32, 4, 8, 0), m = twin_make(DTYPE_F32, 8, 8, 0),
                      out = twin_make(DTYPE_F32, 4, 8, 0);
    for (enum side s = CPU; s < N_SIDES; s++)
        assert_error(side[s].core->matmul(&side[s], 1, &x.m[s], &m.m[s], false, &out.m[s]), ERR_UNSUPPORTED,
                     "I32");
}

/* --- Hessians --------------------------------------------------------------------------------------------------- */

struct hessian_args {
    struct twin x, h;
    int64_t first; /* tokens of the first of up to three parts; they are added one after another */
};

static int run_hessian(const struct backend *b, enum side s, const void *args)
{
    const struct hessian_args *a = args;
    const int64_t n = a->x.m[s].rows, at[] = {0, a->first, a->first + (n - a->first) / 2, n};
    int rc = b->core->zero(b, &a->h.m[s]);
    for (int i = 0; !rc && i < 3; i++) {
        const struct mat part = mat_rows(&a->x.m[s], at[i], at[i + 1] - at[i]);
        rc = b->quant->hessian_add(b, &part, &a->h.m[s]);
    }
    return rc ? rc : b->quant->hessian_finish(b, &a->h.m[s]);
}

static void assert_symmetric(const struct twin *h)
{
    const int64_t n = h->initial.rows, stride = h->initial.stride;
    uint32_t *bits = room(twin_bytes(h), 1);
    twin_download(h, bits);
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < r; c++)
            if (bits[r * stride + c] != bits[c * stride + r])
                fail_msg("row %d column %d is not as its mirror image", (int)r, (int)c);
}

static void test_hessian(void **state)
{
    (void)state;
    static const struct {
        int64_t cols, tokens, first, x_gap, h_gap;
    } cases[] = {{1, 5, 1, 0, 0},         {17, 1, 1, 0, 0},     {17, 100, 33, 3, 2},
                 {128, 3000, 1000, 0, 0}, {128, 77, 1, 8, 8},   {640, 3000, 2999, 0, 4},
                 {640, 301, 150, 8, 0},   {1001, 500, 0, 0, 1}, {4096, 200, 100, 0, 0},
                 {4224, 300, 120, 0, 0},  {4224, 130, 7, 5, 3}, {4225, 64, 32, 0, 0}};
    struct outcome o = {"hessian_add and hessian_finish", f32_bound, 0, 0};
    for (size_t i = 0; i < N_OF(cases); i++) {
        struct hessian_args a = {.x = twin_random(ACT, cases[i].tokens, cases[i].cols, cases[i].x_gap, 2),
                                 .h = twin_make(DTYPE_F32, cases[i].cols, cases[i].cols, cases[i].h_gap),
                                 .first = cases[i].first};
        char text[80];
        snprintf(text, sizeof text, "%d tokens of %d", (int)cases[i].tokens, (int)cases[i].cols);
        parity_case(run_hessian, &a, &(struct result){&o, &a.h, false}, 1, text);
        assert_symmetric(&a.h);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

static void test_diagonal(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1, 17, 300, 4224};
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const struct twin h = twin_random(DTYPE_F32, sizes[i], sizes[i], (int64_t)i, 5);
        float *got = room((size_t)sizes[i], sizeof *got);
        for (enum side s = CPU; s < N_SIDES; s++) {
            memset(got, 0, (size_t)sizes[i] * sizeof *got);
            assert_ok(side[s].quant->diagonal(&side[s], &h.m[s], got));
            for (int64_t k = 0; k < sizes[i]; k++)
                assert_true(got[k] == at(&h.initial, k, k));
        }
        parity_free();
    }
}

/* --- factors ---------------------------------------------------------------------------------------------------- */

struct problem {
    struct twin h, order, work, factor;
    float added;
};

static struct mat random_order(int64_t n)
{
    struct mat m = {room((size_t)n, sizeof(int32_t)), DTYPE_I32, 1, n, n};
    int32_t *order = m.data;
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = (int64_t)(support_random(&random_state) % (uint64_t)(i + 1));
        order[i] = order[j];
        order[j] = (int32_t)i;
    }
    return m;
}

/* The Hessian of half as many tokens as columns, so that `added` alone makes it definite. */
static struct mat make_hessian(int64_t n, int64_t gap)
{
    const struct backend *b = &side[CPU];
    const struct mat x = make_random(DTYPE_F32, (n + 1) / 2, n, 1),
                     h = {room((size_t)(n * (n + gap)), sizeof(float)), DTYPE_F32, n, n, n + gap};
    poison(&h);
    assert_ok(b->core->zero(b, &h));
    assert_ok(b->quant->hessian_add(b, &x, &h));
    assert_ok(b->quant->hessian_finish(b, &h));
    return h;
}

static struct problem make_problem(const struct mat *h, int64_t gap, float added)
{
    const struct mat order = random_order(h->rows);
    return (struct problem){.h = twin_of(h),
                            .order = twin_of(&order),
                            .work = twin_make(DTYPE_F64, h->rows, h->rows, gap),
                            .factor = twin_make(DTYPE_F32, h->rows, h->rows, gap),
                            .added = added};
}

static int factorize(const struct problem *p, enum side s)
{
    int definite = -1;
    assert_ok(side[s].quant->factorize(&side[s], &p->h.m[s], &p->order.m[s], p->added, &p->work.m[s],
                                       &p->factor.m[s], &definite));
    return definite;
}

/* ‖M·D·Mᵀ − A‖ / ‖A‖ with A = P(H + added·I)Pᵀ and the D that gives A its diagonal, which must be positive. */
static double reconstruction_error(const struct problem *p, const struct mat *factor)
{
    const int64_t n = factor->rows;
    const int32_t *order = p->order.initial.data;
    double *d = room((size_t)n, sizeof *d), error = 0, size = 0;
    for (int64_t k = n - 1; k >= 0; k--) {
        d[k] = (double)at(&p->h.initial, order[k], order[k]) + (double)p->added;
        for (int64_t l = k + 1; l < n; l++)
            d[k] -= pow((double)at(factor, k, l), 2) * d[l];
        assert_true(d[k] > 0 && at(factor, k, k) == 1.0f);
        for (int64_t j = k; j < n; j++) {
            const double a = (double)at(&p->h.initial, order[k], order[j]) + (k == j ? (double)p->added : 0);
            double sum = 0;
            for (int64_t l = j; l < n; l++)
                sum += (double)at(factor, k, l) * d[l] * (double)at(factor, j, l);
            error += (k == j ? 1 : 2) * (sum - a) * (sum - a);
            size += (k == j ? 1 : 2) * a * a;
        }
    }
    return sqrt(error / size);
}

/* The part that counts against the CPU's; gaps are left alone. */
static double factor_difference(const struct mat *got, const struct mat *expected)
{
    double error = 0, size = 0;
    for (int64_t k = 0; k < got->rows; k++) {
        for (int64_t j = k; j < got->cols; j++) {
            const double e = (double)at(expected, k, j), g = (double)at(got, k, j);
            error += (g - e) * (g - e);
            size += e * e;
        }
        for (int64_t j = got->cols; j < got->stride; j++)
            assert_true(isnan(at(got, k, j)));
    }
    return sqrt(error / size);
}

static void test_factorize(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1, 2, 17, 32, 128, 300, 640, 1100};
    struct outcome o[] = {{"factorize, M·D·Mᵀ", 1e-6, 0, 0}, {"factorize, M", 1e-6, 0, 0}};
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const int64_t n = sizes[i], gap = i % 2 ? 3 : 0;
        const struct mat h = make_hessian(n, gap);
        const struct problem p = make_problem(&h, gap, 0.01f * (float)n);
        struct mat got = p.factor.initial, again = got;
        got.data = room(twin_bytes(&p.factor), 1);
        again.data = room(twin_bytes(&p.factor), 1);
        assert_int_equal(factorize(&p, CPU), 1);
        assert_int_equal(factorize(&p, DEVICE), 1);
        twin_download(&p.factor, got.data);
        twin_upload(&p.factor);
        assert_int_equal(factorize(&p, DEVICE), 1);
        twin_download(&p.factor, again.data);
        assert_memory_equal(got.data, again.data, twin_bytes(&p.factor));
        char text[40];
        snprintf(text, sizeof text, "%d columns", (int)n);
        parity_number(&o[0], reconstruction_error(&p, &got), 0, 1, text);
        parity_number(&o[1], factor_difference(&got, &p.factor.m[CPU]), 0, 1, text);
        parity_free();
    }
    parity_print(&o[0], "relative error");
    parity_print(&o[1], "relative L2 error");
}

static void set(const struct mat *h, int64_t row, int64_t col, float value)
{
    ((float *)h->data)[row * h->stride + col] = value;
    ((float *)h->data)[col * h->stride + row] = value;
}

static void assert_definite(const struct mat *h, float added, int expected)
{
    const struct problem p = make_problem(h, 0, added);
    assert_int_equal(factorize(&p, CPU), expected);
    assert_int_equal(factorize(&p, DEVICE), expected);
}

static void test_not_definite(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1, 40, 700};
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const int64_t n = sizes[i], row = n / 3, col = n / 2;
        const struct mat h = make_hessian(n, 0);
        const float added = 0.01f * (float)n, kept = at(&h, row, row), beside = at(&h, row, col);
        assert_definite(&h, added, 1);
        assert_definite(&h, -2 * added, 0);
        set(&h, row, row, -added * 2);
        assert_definite(&h, added, 0);
        set(&h, row, row, NAN);
        assert_definite(&h, added, 0);
        set(&h, row, row, INFINITY);
        assert_definite(&h, added, 0);
        set(&h, row, row, kept);
        assert_definite(&h, added, 1);
        set(&h, row, col, NAN);
        assert_definite(&h, added, 0);
        set(&h, row, col, beside);
        assert_ok(side[CPU].core->zero(&side[CPU], &h));
        assert_definite(&h, 1, 1);
        assert_definite(&h, 0, 0);
        parity_free();
    }
}

/* --- dot and zero ----------------------------------------------------------------------------------------------- */

static void test_dot(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 0}, {1, 1000, 0}, {77, 33, 3}, {300, 640, 0}, {1000, 2561, 5}};
    struct outcome o = {"dot", dot_bound, 0, 0};
    for (size_t i = 0; i < N_OF(shapes) * 9; i++) {
        const int64_t *shape = shapes[i / 9];
        const struct twin x = twin_random((int)x_types[i % 3], shape[0], shape[1], shape[2], 1),
                          y = twin_random((int)x_types[i / 3 % 3], shape[0], shape[1], 0, 1);
        double expected, got[2][2], *sum = parity_memory(DEVICE, sizeof got[0]);
        assert_ok(side[CPU].core->dot(&side[CPU], &x.m[CPU], &y.m[CPU], &expected));
        for (int round = 0; round < 2; round++) {
            got[round][0] = got[round][1] = -7;
            assert_ok(side[DEVICE].core->upload(&side[DEVICE], sum, got[round], sizeof got[0]));
            assert_ok(side[DEVICE].core->dot(&side[DEVICE], &x.m[DEVICE], &y.m[DEVICE], sum));
            assert_ok(side[DEVICE].core->download(&side[DEVICE], got[round], sum, sizeof got[0]));
            assert_true(got[round][1] == -7.0);
        }
        assert_memory_equal(got[0], got[1], sizeof got[0]);
        parity_number(&o, got[0][0], expected, (double)(shape[0] * shape[1]) / 3, "one pair of matrices");
        parity_free();
    }
    parity_print(&o, "error of the size of the factors");
}

static void test_zero(void **state)
{
    (void)state;
    static const enum dtype types[] = {DTYPE_I8, DTYPE_BF16, DTYPE_I32, DTYPE_F32, DTYPE_F64};
    static const int64_t shapes[][3] = {{1, 1, 3}, {5, 7, 0}, {100, 33, 1}, {300, 640, 24}, {1000, 1003, 0}};
    for (size_t i = 0; i < N_OF(types) * N_OF(shapes); i++) {
        const int64_t *shape = shapes[i % N_OF(shapes)];
        const struct twin t = twin_make((int)types[i / N_OF(shapes)], shape[0], shape[1], shape[2]);
        void *got = room(twin_bytes(&t), 1);
        for (enum side s = CPU; s < N_SIDES; s++)
            assert_ok(side[s].core->zero(&side[s], &t.m[s]));
        twin_download(&t, got);
        assert_memory_equal(got, t.m[CPU].data, twin_bytes(&t));
        parity_free();
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_matmul, parity_clean_up),
        cmocka_unit_test_teardown(test_large_matmul, parity_clean_up),
        cmocka_unit_test_teardown(test_matmul_of_views, parity_clean_up),
        cmocka_unit_test_teardown(test_matmul_refuses, parity_clean_up),
        cmocka_unit_test_teardown(test_hessian, parity_clean_up),
        cmocka_unit_test_teardown(test_diagonal, parity_clean_up),
        cmocka_unit_test_teardown(test_factorize, parity_clean_up),
        cmocka_unit_test_teardown(test_not_definite, parity_clean_up),
        cmocka_unit_test_teardown(test_dot, parity_clean_up),
        cmocka_unit_test_teardown(test_zero, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

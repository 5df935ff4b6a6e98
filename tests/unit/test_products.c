/* The products of the forward pass, plain and packed, against the plainest implementation in double that the description
 * in kernels/backend.h allows. Each case runs with one, two and three threads, which must give the same bytes. */
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

/* --- gemm and q_gemm -------------------------------------------------------------------------------------------- */

struct gemm_args {
    struct mat x;
    const struct mat *w; /* one of the two */
    const struct qmat *q;
};

static int run_gemm(const struct backend *b, const void *args, const struct mat *out)
{
    const struct gemm_args *a = args;
    return a->q ? b->core->q_gemm(b, &a->x, a->q, out) : b->core->gemm(b, &a->x, a->w, out);
}

/* w [n, k]: the weights as they are, or as the packed words say. */
static double *naive_weights(const struct mat *w, const struct qmat *q)
{
    const int64_t rows = w ? w->rows : q->packed.rows, cols = w ? w->cols : q->cols;
    double *out = room((size_t)(rows * cols), sizeof *out);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            if (w) {
                out[r * cols + c] = naive_element(w, r, c);
                continue;
            }
            const uint32_t word = ((const uint32_t *)q->packed.data)[r * q->packed.stride + c * q->bits / 32];
            const int code = (int)(word >> c * q->bits % 32 & ((1u << q->bits) - 1)) - (1 << (q->bits - 1));
            const int8_t *zeros = q->zeros.data;
            const int zero = zeros ? zeros[r * q->zeros.stride + c / q->group] : 0;
            out[r * cols + c] = naive_bf16((code - zero) * naive_element(&q->scales, r, c / q->group));
        }
    return out;
}

/* The chosen rows of x·wᵀ; *size_squared: the squares of the terms, summed. */
static void naive_product(const struct mat *x, const double *w, int64_t n, double *out, double *size_squared)
{
    *size_squared = 0;
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t c = 0; row_chosen(r, x->rows) && c < n; c++) {
            double sum = 0, squares = 0;
            for (int64_t k = 0; k < x->cols; k++) {
                const double term = (double)at(x, r, k) * w[c * x->cols + k];
                sum += term;
                squares += term * term;
            }
            out[r * n + c] = sum;
            *size_squared += squares;
        }
}

static void check_products(struct outcome *o, const struct mat *w, const struct qmat *q, const char *text)
{
    static const int64_t heights[] = {1, 2, 4, 5, 64, 300};
    const int64_t n = w ? w->rows : q->packed.rows, cols = w ? w->cols : q->cols;
    const double *weights = naive_weights(w, q);
    double *expected = room((size_t)(300 * n), sizeof *expected);
    struct gemm_args a = {make_random(DTYPE_F32, 300, cols, 1), w, q};
    struct mat out = make(DTYPE_F32, 300, n);
    for (size_t i = 0; i < N_OF(heights); i++) {
        char case_text[160];
        snprintf(case_text, sizeof case_text, "%d rows, w %d × %d, %s", (int)heights[i], (int)n, (int)cols,
                 text);
        double size_squared;
        a.x.rows = out.rows = heights[i];
        naive_product(&a.x, weights, n, expected, &size_squared);
        run_everywhere(run_gemm, &a, &out, case_text);
        check(o, &out, expected, size_squared, case_text);
    }
}

static const int64_t out_features[] = {1, 63, 64, 256, 300, 1000};
static const int64_t in_features[] = {16, 100, 128, 256, 640};
enum { N_SHAPES = N_OF(out_features) * N_OF(in_features) };

static void test_gemm(void **state)
{
    (void)state;
    struct outcome o = {"gemm", 2e-6, 0, 0};
    for (size_t i = 0; i <= N_SHAPES; i++)
        for (size_t t = 0; t < N_OF(float_types); t++) {
            /* the last shape's panels are narrower, to fit the scratch memory */
            const int64_t n = i < N_SHAPES ? out_features[i % N_OF(out_features)] : 300;
            const int64_t cols = i < N_SHAPES ? in_features[i / N_OF(out_features)] : 10240;
            const struct mat w = make_random(float_types[t], n, cols, 0.1);
            check_products(&o, &w, NULL, dtype_name(w.dtype));
            free_matrices();
        }
    print_outcome(&o);
}

static const struct q_kind q_kinds[] = {
    {4, 32, false}, {4, 64, false},  {4, 128, false}, {4, 256, false}, {4, 0, false},
    {4, 32, true},  {4, 64, true},   {4, 128, true},  {4, 256, true},  {4, 0, true},
    {8, 32, false}, {8, 128, false}, {8, 128, true},  {8, 0, false},
};

static void test_q_gemm(void **state)
{
    (void)state;
    struct outcome o = {"q_gemm", 2e-6, 0, 0};
    for (size_t i = 0; i <= N_SHAPES; i++)
        for (size_t k = 0; k < N_OF(q_kinds); k++) {
            const int64_t n = i < N_SHAPES ? out_features[i % N_OF(out_features)] : 300;
            const int64_t cols = i < N_SHAPES ? in_features[i / N_OF(out_features)] : 10240;
            /* the large shapes take their turns with the kinds */
            if (n * cols > 100000 && (i + k) % 5 != 0)
                continue;
            const struct qmat q = make_packed(&q_kinds[k], n, cols);
            char text[80];
            snprintf(text, sizeof text, "%d bits, group %d%s", q.bits, (int)q.group,
                     q_kinds[k].asymmetric ? ", asymmetric" : "");
            check_products(&o, NULL, &q, text);
            free_matrices();
        }
    print_outcome(&o);
}

static void test_unsupported(void **state)
{
    (void)state;
    const struct backend *b = &cpu[0];
    const struct mat x = make_random(DTYPE_F32, 5, 16, 1), out = make(DTYPE_F32, 5, 16);
    struct mat w = make_random(DTYPE_F32, 16, 16, 1);
    const int32_t ids[5] = {0};
    const struct norm_spec norm = {1e-6f, true};
    w.dtype = DTYPE_I8;
    assert_error(b->core->gemm(b, &x, &w, &out), ERR_UNSUPPORTED, "gemm: dtype I8");
    assert_error(b->core->embed(b, &w, ids, 1, &out), ERR_UNSUPPORTED, "embed: dtype I8");
    w.rows = 1;
    assert_error(b->core->rms_norm(b, &x, &w, &norm, &out), ERR_UNSUPPORTED, "rms_norm: dtype I8");
    assert_error(b->core->add_norm(b, &x, NULL, &out, &w, &norm, &x), ERR_UNSUPPORTED, "add_norm: dtype I8");
    assert_error(b->core->add_norm(b, &x, &w, &out, NULL, &norm, &x), ERR_UNSUPPORTED, "add_norm: dtype I8");
    const struct mat qkv = make_random(DTYPE_F32, 5, 48, 1), keys = make(DTYPE_F32, 5, 16),
                     rope = make(DTYPE_F32, 5, 16);
    const struct qkv_spec split = {{1, 1, 16}, {1, 0, 5}, norm, NULL, &w, &rope, false, false};
    assert_error(b->core->split_qkv(b, &split, &qkv, &x, &keys, &out), ERR_UNSUPPORTED,
                 "split_qkv: dtype I8");
    struct qmat q = make_packed(&(struct q_kind){4, 0, false}, 16, 16);
    q.bits = 2;
    assert_error(b->core->q_gemm(b, &x, &q, &out), ERR_UNSUPPORTED, "q_gemm: 2 bits, expected 4 or 8");
    free_matrices();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_gemm, clean_up),
        cmocka_unit_test_teardown(test_q_gemm, clean_up),
        cmocka_unit_test_teardown(test_unsupported, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

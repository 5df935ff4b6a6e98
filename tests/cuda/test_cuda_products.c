/* A device against the CPU: products with plain and packed weights.
 *   test_cuda_products [DEVICE]      default: cuda:0 */
#include "tests/cuda/parity.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

/* To F32: the same terms, added up in FP32 in another order. To activations: their rounding, 1.6e-3 for BF16. */
static const double f32_bound = 2e-5, act_bound = 5e-3;

/* --- gemm and q_gemm -------------------------------------------------------------------------------------------- */

struct gemm_args {
    struct twin x, w, out;
    const struct twin_q *q; /* NULL: w */
};

static int run_gemm(const struct backend *b, enum side s, const void *args)
{
    const struct gemm_args *a = args;
    return a->q ? b->core->q_gemm(b, &a->x.m[s], &a->q->m[s], &a->out.m[s])
                : b->core->gemm(b, &a->x.m[s], &a->w.m[s], &a->out.m[s]);
}

static const int64_t heights[] = {1, 2, 3, 8, 9, 17, 128, 300}, in_features[] = {256, 640, 2560, 1152};
static const int64_t slacks[][2] = {{0, 0}, {8, 8}, {0, 3}, {3, 0}, {3, 5}}; /* of x, of out */

/* All heights, to F32 and to activations; w or q. o[0]: to F32. */
static void check_products(struct outcome o[2], const struct twin *w, const struct twin_q *q,
                           const char *text)
{
    const int64_t n = w ? w->initial.rows : q->m[CPU].packed.rows,
                  cols = w ? w->initial.cols : q->m[CPU].cols;
    static size_t turn;
    for (size_t i = 0; i < N_OF(heights) * 2; i++) {
        const int64_t rows = heights[i / 2], *slack = slacks[turn++ % N_OF(slacks)];
        struct gemm_args a = {.x = twin_random(ACT, rows, cols, slack[0], 1),
                              .out = twin_make(i % 2 ? ACT : DTYPE_F32, rows, n, slack[1]),
                              .q = q};
        if (w)
            a.w = *w;
        char case_text[200];
        snprintf(case_text, sizeof case_text, "%d rows, w %d × %d, %s, gaps of %d and %d, to %s", (int)rows,
                 (int)n, (int)cols, text, (int)slack[0], (int)slack[1], i % 2 ? "act" : "F32");
        parity_case(run_gemm, &a, &(struct result){&o[i % 2], &a.out, false}, 1, case_text);
    }
}

/* Weights that BF16 can hold, in any type: exact on both sides. */
static void round_to_bf16(struct twin *w)
{
    for (int64_t i = 0; i < w->initial.rows * w->initial.cols; i++) {
        const int64_t r = i / w->initial.cols, c = i % w->initial.cols;
        twin_put(w, r, c, naive_bf16(naive_element(&w->initial, r, c)));
    }
    twin_upload(w);
}

static void test_gemm(void **state)
{
    (void)state;
    static const int64_t out_features[] = {64, 300, 1024};
    struct outcome o[2] = {{"gemm to F32", f32_bound, 0, 0}, {"gemm to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(in_features) * N_OF(out_features) * 3; i++) {
        struct twin w =
            twin_random(float_types[i % 3], out_features[i / 3 % 3], in_features[i / 9], i % 2 * 8, 0.1);
        round_to_bf16(&w);
        check_products(o, &w, NULL, dtype_name(w.initial.dtype));
        parity_free();
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* F16 and F32 weights with more bits than BF16: a device may multiply in BF16. */
static void test_gemm_of_longer_weights(void **state)
{
    (void)state;
    struct outcome o[2] = {{"gemm of F16 and F32 to F32", act_bound, 0, 0},
                           {"gemm of F16 and F32 to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < 4; i++) {
        const struct twin w = twin_random(float_types[1 + i % 2], 300, in_features[i], 3, 0.1);
        check_products(o, &w, NULL, dtype_name(w.initial.dtype));
        parity_free();
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* An embedding as the output head: more rows than any linear has. */
static void test_gemm_of_a_vocabulary(void **state)
{
    (void)state;
    struct outcome o = {"gemm, 65536 rows of w", f32_bound, 0, 0};
    for (size_t i = 0; i < 3; i++) {
        struct twin w = twin_random(float_types[i], 65536, 640, 0, 0.1);
        round_to_bf16(&w);
        for (int64_t rows = 1; rows <= 12; rows += 11) {
            struct gemm_args a = {
                .x = twin_random(ACT, rows, 640, 0, 1), .w = w, .out = twin_make(DTYPE_F32, rows, 65536, 0)};
            parity_case(run_gemm, &a, &(struct result){&o, &a.out, false}, 1, dtype_name(float_types[i]));
        }
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

static const struct q_kind q_kinds[] = {
    {4, 32, false}, {4, 64, false},  {4, 128, false}, {4, 256, false}, {4, 0, false},
    {4, 32, true},  {4, 64, true},   {4, 128, true},  {4, 0, true},    {8, 32, false},
    {8, 64, true},  {8, 128, false}, {8, 128, true},  {8, 0, false},   {8, 0, true},
};

static void test_q_gemm(void **state)
{
    (void)state;
    static const int64_t out_features[] = {64, 300, 1024, 257};
    struct outcome o[2] = {{"q_gemm to F32", f32_bound, 0, 0}, {"q_gemm to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(in_features) * N_OF(q_kinds); i++) {
        const struct q_kind *kind = &q_kinds[i % N_OF(q_kinds)];
        const struct qmat packed = make_packed(kind, out_features[i % 4], in_features[i / N_OF(q_kinds)]);
        const struct twin_q q = twin_q_of(&packed);
        char text[80];
        snprintf(text, sizeof text, "%d bits, group %d%s", kind->bits, (int)packed.group,
                 kind->asymmetric ? ", asymmetric" : "");
        check_products(o, NULL, &q, text);
        parity_free();
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* Widths that no group divides, and that are not whole words. */
static void test_q_gemm_of_odd_widths(void **state)
{
    (void)state;
    static const int64_t widths[] = {8, 100, 250, 1001};
    struct outcome o[2] = {{"q_gemm of odd widths to F32", f32_bound, 0, 0},
                           {"q_gemm of odd widths to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(widths) * N_OF(q_kinds); i++) {
        const struct q_kind *kind = &q_kinds[i % N_OF(q_kinds)];
        const struct qmat packed = make_packed(kind, 90, widths[i / N_OF(q_kinds)]);
        const struct twin_q q = twin_q_of(&packed);
        check_products(o, NULL, &q, "an odd width");
        parity_free();
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_gemm, parity_clean_up),
        cmocka_unit_test_teardown(test_gemm_of_longer_weights, parity_clean_up),
        cmocka_unit_test_teardown(test_gemm_of_a_vocabulary, parity_clean_up),
        cmocka_unit_test_teardown(test_q_gemm, parity_clean_up),
        cmocka_unit_test_teardown(test_q_gemm_of_odd_widths, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

/* A device against the CPU: products with plain and packed weights, and attention.
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

/* --- attention -------------------------------------------------------------------------------------------------- */

struct attention_args {
    struct attention_spec spec;
    struct twin q, keys, values, out;
};

static int run_attention(const struct backend *b, enum side s, const void *args)
{
    const struct attention_args *a = args;
    return b->core->attention(b, &a->spec, &a->q.m[s], &a->keys.m[s], &a->values.m[s], &a->out.m[s]);
}

/* Random rows up to the last position; what is still to come holds NaNs, which must not be read. */
static struct twin make_cache(const struct attention_spec *spec, int64_t positions, int64_t slack)
{
    const struct sequences *s = &spec->sequences;
    const int64_t cols = spec->heads.n_kv_heads * spec->heads.head_dim;
    struct twin t = twin_make(ACT, s->n * s->max_positions, cols, slack);
    for (int64_t r = 0; r < t.initial.rows; r++)
        for (int64_t c = 0; r % s->max_positions < positions && c < cols; c++)
            twin_put(&t, r, c, support_uniform(&random_state));
    twin_upload(&t);
    return t;
}

static void check_attention(struct outcome *o, const struct attention_spec *spec, int64_t rows, int64_t slack,
                            double amplitude)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t positions = s->first_position + rows, cols = h->n_heads * h->head_dim;
    struct attention_args a = {*spec, twin_random(ACT, s->n * rows, cols, slack, amplitude),
                               make_cache(spec, positions, slack), make_cache(spec, positions, slack + 8),
                               twin_make(ACT, s->n * rows, cols, slack)};
    char text[120];
    snprintf(text, sizeof text, "heads %d/%d of %d, window %d, %d × %d rows at %d", h->n_heads, h->n_kv_heads,
             h->head_dim, (int)spec->window, (int)s->n, (int)rows, (int)s->first_position);
    parity_case(run_attention, &a, &(struct result){o, &a.out, false}, 1, text);
    parity_free();
}

static const int dims[] = {32, 64, 80, 128, 256, 512}, head_counts[][2] = {{4, 1}, {4, 2}, {3, 3}, {8, 4}};

static void test_attention(void **state)
{
    (void)state;
    static const int64_t windows[] = {0, 1, 16, 512};
    static const struct {
        int64_t n, first, rows;
    } places[] = {{1, 0, 1},    {1, 0, 300}, {3, 0, 5},   {2, 37, 1},  {4, 600, 1},
                  {2, 100, 33}, {1, 511, 8}, {3, 20, 70}, {1, 250, 9}, {1, 63, 64},
                  {2, 0, 129},  {1, 700, 2}, {5, 1, 16},  {1, 30, 257}};
    struct outcome o = {"attention", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(places) * N_OF(dims) * 4; i++) {
        /* head counts and windows take their turns */
        const int dim = dims[i % 6];
        const size_t place = i / 24, turn = i / 6 % 4;
        const int *heads = head_counts[(turn + place) % 4];
        const int64_t first = places[place].first, rows = places[place].rows;
        const struct attention_spec spec = {{heads[0], heads[1], dim},
                                            {places[place].n, first, first + rows + (int64_t)(i % 2) * 5},
                                            1 / sqrtf((float)dim),
                                            windows[turn]};
        check_attention(&o, &spec, rows, (int64_t)(i % 3) * 8, 4);
    }
    parity_print(&o, "relative L2 error");
}

static void test_attention_every_length(void **state)
{
    (void)state;
    struct outcome o = {"attention, 1 … 300 new tokens", act_bound, 0, 0};
    for (int64_t rows = 1; rows <= 300; rows++) {
        const struct attention_spec spec = {
            {2, 1, dims[rows % 4]}, {1 + rows % 2, rows * 7 % 60, 400}, 0.125f, rows % 3 ? 0 : 40};
        check_attention(&o, &spec, rows, 0, 4);
    }
    parity_print(&o, "relative L2 error");
}

/* Long contexts, as decoding meets them, and scores among which one decides. */
static void test_attention_extremes(void **state)
{
    (void)state;
    struct outcome o = {"attention, long", act_bound, 0, 0},
                   peaks = {"attention, large scores", act_bound, 0, 0};
    for (int64_t rows = 1; rows <= 20; rows += 19)
        for (int64_t window = 0; window <= 1024; window += 1024) {
            const struct attention_spec spec = {{4, 1, 256}, {1, 5000, 5020}, 0.0625f, window};
            check_attention(&o, &spec, rows, 0, 4);
            const struct attention_spec sharp = {{4, 2, 64}, {2, 300, 320}, 1, window};
            check_attention(&peaks, &sharp, rows, 8, 30);
        }
    parity_print(&o, "relative L2 error");
    parity_print(&peaks, "relative L2 error");
}

/* The CPU takes any address; a device that does not has to say so. */
static void test_attention_alignment(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct attention_spec spec = {{1, 1, 64}, {1, 0, 4}, 0.125f, 0};
    struct outcome o = {"attention, odd strides", act_bound, 0, 0};
    struct attention_args a = {spec, twin_random(ACT, 4, 64, 3, 1), twin_random(ACT, 4, 64, 0, 1),
                               twin_random(ACT, 4, 64, 0, 1), twin_make(ACT, 4, 64, 0)};
    const int rc = run_attention(b, DEVICE, &a);
    if (rc == 0)
        parity_case(run_attention, &a, &(struct result){&o, &a.out, false}, 1, "odd strides");
    else
        assert_error(rc, ERR_UNSUPPORTED, "attention: queries");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_gemm, parity_clean_up),
        cmocka_unit_test_teardown(test_gemm_of_longer_weights, parity_clean_up),
        cmocka_unit_test_teardown(test_gemm_of_a_vocabulary, parity_clean_up),
        cmocka_unit_test_teardown(test_q_gemm, parity_clean_up),
        cmocka_unit_test_teardown(test_q_gemm_of_odd_widths, parity_clean_up),
        cmocka_unit_test_teardown(test_attention, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_every_length, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_alignment, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

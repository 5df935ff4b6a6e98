/* A device against the CPU: the operations of mixtures of experts, from one token to the sizes of Gemma 4's 26B (128
 * experts, 8 chosen, rows of 2816 and 704), and products, their gradients and Hessians of ever new numbers of rows, as experts have them.
 *   test_cuda_experts [DEVICE]      default: cuda:0 */
#include "tests/cuda/parity.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
/* Gaps between rows: whole pieces with and without them; and no alignment. */
static const int64_t slacks[] = {0, 16, 3};
/* Rounding to BF16 alone: 1.6e-3, of one element at most 3.9e-3. */
static const double act_bound = 5e-3;

/* Numbers in [0, limit) in no order, some of them more than once. */
static struct twin random_indices(int64_t rows, int64_t cols, int64_t slack, int64_t limit)
{
    const int64_t n = rows * (cols + slack);
    struct mat m = {room((size_t)n, sizeof(int32_t)), DTYPE_I32, rows, cols, cols + slack};
    for (int64_t i = 0; i < n; i++)
        ((int32_t *)m.data)[i] = (int32_t)(support_random(&random_state) % (uint64_t)limit);
    return twin_of(&m);
}

/* Values over and over: large matrices are made in no time. */
static struct twin quick_random(int dtype, int64_t rows, int64_t cols, int64_t slack)
{
    enum { N = 4099 };
    struct twin t = twin_make(dtype, rows, cols, slack);
    double values[N];
    for (int i = 0; i < N; i++)
        values[i] = 3 * support_uniform(&random_state);
    for (int s = 0; s < 2; s++) {
        const struct mat *m = s ? &t.initial : &t.m[CPU];
        for (int64_t i = 0; i < rows * cols; i++) {
            const int64_t at = i / cols * m->stride + i % cols;
            const double value = values[i % N];
            if (m->dtype == DTYPE_F32)
                ((float *)m->data)[at] = (float)(t.act ? naive_bf16(value) : value);
            else
                ((uint16_t *)m->data)[at] = naive_bits16(value, 8);
        }
    }
    twin_upload(&t);
    return t;
}

/* --- route ------------------------------------------------------------------------------------------------------ */

struct route_args {
    struct twin logits, factors, experts, weights;
    bool has_factors;
};

static int run_route(const struct backend *b, enum side s, const void *args)
{
    const struct route_args *a = args;
    return b->core->route(b, &a->logits.m[s], a->has_factors ? &a->factors.m[s] : NULL, &a->experts.m[s],
                          &a->weights.m[s]);
}

static struct route_args make_route(int64_t rows, const int64_t *size, int64_t slack, size_t factors)
{
    return (struct route_args){.logits = twin_random(DTYPE_F32, rows, size[0], slack, 8),
                               .factors = twin_random(float_types[factors % 3], 1, size[0], 0, 2),
                               .experts = twin_make(DTYPE_I32, rows, size[1], slack),
                               .weights = twin_make(DTYPE_F32, rows, size[1], slack),
                               .has_factors = factors < 3};
}

static void check_route(struct outcome o[2], struct route_args *a, const char *text)
{
    const struct result results[] = {{&o[0], &a->experts, true}, {&o[1], &a->weights, false}};
    parity_case(run_route, a, results, N_OF(results), text);
    parity_free();
}

/* Every second case has whole numbers for logits, most rows equals at the edge of choice. */
static void test_route(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{1, 1},   {8, 2},    {8, 8},    {31, 30},   {100, 7},   {128, 8},
                                       {129, 9}, {256, 33}, {300, 64}, {1000, 64}, {1024, 64}, {64, 64}},
                         heights[] = {1, 7, 70};
    struct outcome o[2] = {{"route: experts", 0, 0, 0}, {"route: weights", 1e-6, 0, 0}};
    for (size_t i = 0; i < N_OF(sizes) * N_OF(heights) * 2 * 4; i++) {
        const int64_t *size = sizes[i % 12], rows = heights[i / 12 % 3], slack = slacks[i % 3];
        const bool ties = i / 36 % 2;
        struct route_args a = make_route(rows, size, slack, i / 72);
        char text[100];
        snprintf(text, sizeof text, "%d × %d, %d chosen, slack %d, ties %d, factors %d", (int)rows,
                 (int)size[0], (int)size[1], (int)slack, ties, (int)(i / 72));
        for (int64_t e = 0; ties && e < rows * size[0]; e++)
            twin_put(&a.logits, e / size[0], e % size[0],
                     nearbyint((double)at(&a.logits.m[CPU], e / size[0], e % size[0]) / 4)); /* −0 too */
        twin_upload(&a.logits);
        check_route(o, &a, text);
    }
    struct route_args large = make_route(16384, (const int64_t[]){128, 8}, 0, 0);
    check_route(o, &large, "16384 tokens, 8 of 128 experts");
    parity_print(&o[0], "largest difference");
    parity_print(&o[1], "relative L2 error");
}

/* NaNs, infinities of either sign, rows of nothing else; huge and tiny logits. */
static void test_route_of_damaged_rows(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{20, 4}, {128, 8}, {200, 40}, {1024, 64}};
    static const double planted[] = {NAN, INFINITY, -INFINITY, 1e38, -1e38, 1e-40, -1e-40};
    struct outcome o[2] = {{"damaged rows: experts", 0, 0, 0}, {"damaged rows: weights", 1e-6, 0, 0}};
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const int64_t rows = 3 * N_OF(planted), n = sizes[i][0];
        struct route_args a = make_route(rows, sizes[i], 3, i);
        for (int64_t r = 0; r < rows; r++) /* in one place; in every other one; in all of them */
            for (int64_t c = r % 3 ? 0 : n / 2; c < (r % 3 ? n : n / 2 + 1); c += r % 3 == 1 ? 2 : 1)
                twin_put(&a.logits, r, c, planted[r / 3]);
        twin_upload(&a.logits);
        check_route(o, &a, "damaged");
    }
    parity_print(&o[0], "largest difference");
    parity_print(&o[1], "relative L2 error");
}

static void test_refusals(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    static const int64_t sizes[][2] = {{MAX_EXPERTS + 1, 8}, {128, MAX_CHOSEN + 1}};
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const struct route_args a = make_route(1, sizes[i], 0, 0);
        assert_int_equal(run_route(b, DEVICE, &a), ERR_UNSUPPORTED);
        assert_non_null(strstr(err_message(), "expected at most 64 of 1024"));
    }
}

/* --- gather_rows -------------------------------------------------------------------------------------------------- */

struct gather_args {
    struct twin x, rows, factors, out;
    bool by_rows, scaled;
};

static int run_gather(const struct backend *b, enum side s, const void *args)
{
    const struct gather_args *a = args;
    return b->core->gather_rows(b, &a->x.m[s], a->by_rows ? &a->rows.m[s] : NULL,
                                a->scaled ? &a->factors.m[s] : NULL, &a->out.m[s]);
}

/* types: of x and out. Kinds: by rows; in order; in order and in place. */
static void check_gather(struct outcome *o, int64_t n, int64_t cols, const int types[2], size_t kind)
{
    const int64_t slack = slacks[kind / 6 % 3], rows = kind % 3 ? n : n / 4 + 5;
    const bool in_place = kind % 3 == 2;
    if (in_place && types[0] != types[1])
        return;
    struct gather_args a = {.x = quick_random(types[0], rows, cols, slack),
                            .rows = random_indices(1, n, 0, rows),
                            .factors = twin_random(DTYPE_F32, 1, n, 0, 2),
                            .by_rows = kind % 3 == 0,
                            .scaled = kind / 3 % 2};
    a.out = in_place ? a.x : twin_make(types[1], n, cols, slacks[(kind / 6 + 1) % 3]);
    char text[120];
    snprintf(text, sizeof text, "%d × %d, from %s to %s, kind %d, slack %d%s", (int)n, (int)cols,
             types[0] == ACT ? "act" : "F32", types[1] == ACT ? "act" : "F32", (int)(kind % 3), (int)slack,
             a.scaled ? ", factors" : "");
    const bool rounded = types[1] == ACT && (a.scaled || types[0] != ACT);
    parity_case(run_gather, &a, &(struct result){&o[rounded], &a.out, false}, 1, text);
    parity_free();
}

static void test_gather_rows(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 101, 256, 264, 704, 2816}, heights[] = {1, 9, 70};
    static const int types[][2] = {{ACT, ACT}, {DTYPE_F32, DTYPE_F32}, {DTYPE_F32, ACT}, {ACT, DTYPE_F32}};
    struct outcome o[2] = {{"gather_rows", 0, 0, 0}, {"gather_rows, rounded", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * N_OF(types); i++)
        for (size_t kind = 0; kind < 18; kind++)
            check_gather(o, heights[i / 6 % 3], widths[i % 6], types[i / 18], kind);
    check_gather(o, 131072, 704, types[0], 0);
    check_gather(o, 16384, 2816, types[0], 3);
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* --- combine_rows ------------------------------------------------------------------------------------------------- */

struct combine_args {
    struct twin y, slots, weights, out;
    bool plain; /* without weights */
};

static int run_combine(const struct backend *b, enum side s, const void *args)
{
    const struct combine_args *a = args;
    return b->core->combine_rows(b, &a->y.m[s], &a->slots.m[s], a->plain ? NULL : &a->weights.m[s],
                                 &a->out.m[s]);
}

static void check_combine(struct outcome *o, int64_t n, int64_t cols, int64_t k, int64_t slack, bool plain)
{
    const int64_t rows = n * k < 20000 ? n * k : 20000;
    struct combine_args a = {.y = quick_random(ACT, rows, cols, slack),
                             .slots = random_indices(n, k, slack, rows),
                             .weights = twin_random(DTYPE_F32, n, k, slack, 1),
                             .out = twin_make(ACT, n, cols, slack),
                             .plain = plain};
    char text[100];
    snprintf(text, sizeof text, "%d × %d, %d chosen, slack %d%s", (int)n, (int)cols, (int)k, (int)slack,
             plain ? ", no weights" : "");
    parity_case(run_combine, &a, &(struct result){o, &a.out, false}, 1, text);
    parity_free();
}

static void test_combine_rows(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 101, 256, 264, 704, 2816}, heights[] = {1, 9, 70},
                         chosen[] = {1, 2, 5, 8, 64};
    struct outcome o = {"combine_rows", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * N_OF(chosen) * N_OF(slacks) * 2; i++)
        check_combine(&o, heights[i / 6 % 3], widths[i % 6], chosen[i / 18 % 5], slacks[i / 90 % 3],
                      i >= 270);
    check_combine(&o, 16384, 704, 8, 0, false);
    check_combine(&o, 4096, 2816, 8, 0, true);
    parity_print(&o, "relative L2 error");
}

/* A NaN in a row or a weight stays in the tokens that it belongs to. */
static void test_nan_stays(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    for (int where = 0; where < 2; where++) {
        struct combine_args a = {.y = quick_random(ACT, 6, 64, 0),
                                 .slots = twin_make(DTYPE_I32, 3, 2, 0),
                                 .weights = twin_random(DTYPE_F32, 3, 2, 0, 1),
                                 .out = twin_make(ACT, 3, 64, 0)};
        for (int i = 0; i < 6; i++)
            ((int32_t *)a.slots.initial.data)[i] = i;
        if (where)
            ((float *)a.weights.initial.data)[3] = NAN;
        else
            twin_put(&a.y, 3, 10, NAN);
        twin_upload(&a.slots);
        twin_upload(&a.weights);
        twin_upload(&a.y);
        assert_ok(run_combine(b, DEVICE, &a));
        void *out = room(twin_bytes(&a.out), 1);
        twin_download(&a.out, out);
        struct mat m = a.out.initial;
        m.data = out;
        for (int64_t i = 0; i < 3 * 64; i++)
            assert_int_equal(isnan(naive_element(&m, i / 64, i % 64)),
                             i / 64 == 1 && (where || i % 64 == 10));
        parity_free();
    }
}

/* --- route_backward ----------------------------------------------------------------------------------------------- */

struct route_backward_args {
    struct twin logits, factors, experts, slots, y, dout, dlogits;
    bool has_factors;
};

static int run_route_backward(const struct backend *b, enum side s, const void *args)
{
    const struct route_backward_args *a = args;
    struct route_tape tape = {
        .logits = a->logits.m[s], .experts = a->experts.m[s], .y = a->y.m[s], .slots = a->slots.m[s]};
    if (a->has_factors)
        tape.factors = a->factors.m[s];
    return b->train->route_backward(b, &tape, &a->dout.m[s], &a->dlogits.m[s]);
}

/* k different experts of n for each row. */
static struct twin random_choice(int64_t rows, int64_t n, int64_t k, int64_t slack)
{
    struct mat m = {room((size_t)(rows * (k + slack)), sizeof(int32_t)), DTYPE_I32, rows, k, k + slack};
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = (int64_t)(support_random(&random_state) % (uint64_t)(n - k + 1));
        for (int64_t i = 0; i < k; i++)
            ((int32_t *)m.data)[r * m.stride + i] = (int32_t)(first + i);
    }
    return twin_of(&m);
}

/* Of each token k rows, none twice: of equal results the gradient would be nothing but rounding. */
static struct twin random_slots(int64_t tokens, int64_t k, int64_t slack, int64_t rows)
{
    struct mat m = {room((size_t)(tokens * (k + slack)), sizeof(int32_t)), DTYPE_I32, tokens, k, k + slack};
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t first = (int64_t)(support_random(&random_state) % (uint64_t)rows);
        for (int64_t i = 0; i < k; i++)
            ((int32_t *)m.data)[t * m.stride + i] = (int32_t)((first + i) % rows);
    }
    return twin_of(&m);
}

/* in_place: into the logits */
static void check_route_backward(struct outcome *o, int64_t n, int64_t cols, const int64_t *size, size_t kind)
{
    const int64_t slack = slacks[kind % 3], rows = n * size[1] < 20000 ? n * size[1] : 20000;
    const size_t factors = kind / 3 % 4;
    const bool in_place = kind / 12;
    struct route_backward_args a = {.logits = twin_random(DTYPE_F32, n, size[0], slack, 4),
                                    .factors = twin_random(float_types[factors % 3], 1, size[0], 0, 2),
                                    .experts = random_choice(n, size[0], size[1], slack),
                                    .slots = random_slots(n, size[1], slack, rows),
                                    .y = quick_random(ACT, rows, cols, slack),
                                    .dout = quick_random(ACT, n, cols, slack),
                                    .has_factors = factors < 3};
    a.dlogits = in_place ? a.logits : twin_make(DTYPE_F32, n, size[0], slack);
    char text[120];
    snprintf(text, sizeof text, "%d × %d, %d of %d chosen, slack %d, factors %d%s", (int)n, (int)cols,
             (int)size[1], (int)size[0], (int)slack, (int)factors, in_place ? ", in place" : "");
    parity_case(run_route_backward, &a, &(struct result){o, &a.dlogits, false}, 1, text);
    parity_free();
}

static void test_route_backward(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{8, 2}, {8, 8}, {31, 30}, {128, 8}, {300, 33}, {1024, 64}},
                         widths[] = {1, 101, 264, 704}, heights[] = {1, 9, 70};
    struct outcome o = {"route_backward", 2e-5, 0, 0};
    for (size_t i = 0; i < N_OF(sizes) * N_OF(widths) * N_OF(heights) * 2; i++)
        for (size_t part = 0; part < 12; part++)
            check_route_backward(&o, heights[i / 24 % 3], widths[i % 4], sizes[i / 4 % 6],
                                 part + i / 72 * 12);
    check_route_backward(&o, 4096, 2816, (const int64_t[]){128, 8}, 0);
    parity_print(&o, "relative L2 error");
}

/* --- products of experts ------------------------------------------------------------------------------------------ */

struct product_args {
    struct twin x, w, out;  /* gradients: dy, w or x, the result */
    const struct twin_q *q; /* NULL: w */
};

static int run_product(const struct backend *b, enum side s, const void *args)
{
    const struct product_args *a = args;
    return a->q ? b->core->q_gemm(b, &a->x.m[s], &a->q->m[s], &a->out.m[s])
                : b->core->gemm(b, &a->x.m[s], &a->w.m[s], &a->out.m[s]);
}

static int run_hessian(const struct backend *b, enum side s, const void *args)
{
    const struct product_args *a = args;
    const int rc = b->quant->hessian_add(b, &a->x.m[s], &a->out.m[s]);
    return rc ? rc : b->quant->hessian_finish(b, &a->out.m[s]);
}

static int run_dgrad(const struct backend *b, enum side s, const void *args)
{
    const struct product_args *a = args;
    return b->train->gemm_dgrad(b, &a->x.m[s], &a->w.m[s], false, &a->out.m[s]);
}

static int run_wgrad(const struct backend *b, enum side s, const void *args)
{
    const struct product_args *a = args;
    return b->train->gemm_wgrad(b, &a->x.m[s], &a->w.m[s], true, &a->out.m[s]);
}

enum { SORTED = 6000, COLS = 704, OUTPUTS = 264 };

/* An expert's rows, which lie somewhere among those of all experts. */
static void check_expert(struct outcome o[5], const struct twin *sorted, const struct twin *w,
                         const struct twin_q *q, int64_t n)
{
    const int64_t first = (int64_t)(support_random(&random_state) % (uint64_t)(SORTED - n + 1));
    struct product_args a = {.x = twin_rows(sorted, first, n), .w = *w, .out = twin_make(ACT, n, OUTPUTS, 0)};
    char text[60];
    snprintf(text, sizeof text, "%d rows from %d on", (int)n, (int)first);
    parity_case(run_product, &a, &(struct result){&o[0], &a.out, false}, 1, text);
    a.q = q;
    parity_case(run_product, &a, &(struct result){&o[1], &a.out, false}, 1, text);
    a.out = twin_random(DTYPE_F32, COLS, COLS, 0, 1);
    parity_case(run_hessian, &a, &(struct result){&o[2], &a.out, false}, 1, text);
    const struct twin dy = twin_cols(&a.x, 0, OUTPUTS);
    a = (struct product_args){.x = dy, .w = *w, .out = twin_make(ACT, n, COLS, 0)};
    parity_case(run_dgrad, &a, &(struct result){&o[3], &a.out, false}, 1, text);
    a = (struct product_args){
        .x = dy, .w = twin_rows(sorted, first, n), .out = twin_random(DTYPE_F32, OUTPUTS, COLS, 0, 1)};
    parity_case(run_wgrad, &a, &(struct result){&o[4], &a.out, false}, 1, text);
}

static void test_products(void **state)
{
    (void)state;
    static const int64_t heights[] = {0,    1,    3,    5,    7,    9,    12,   16,   17,   18,
                                      19,   21,   31,   32,   33,   47,   63,   65,   100,  127,
                                      129,  200,  255,  257,  300,  415,  511,  513,  700,  830,
                                      1000, 1023, 1025, 1151, 1500, 1999, 2000, 4095, 4097, 5003};
    struct outcome o[] = {{"gemm of an expert's rows", act_bound, 0, 0},
                          {"q_gemm of an expert's rows", act_bound, 0, 0},
                          {"hessian_add of an expert's rows", 2e-5, 0, 0},
                          {"gemm_dgrad of an expert's rows", act_bound, 0, 0},
                          {"gemm_wgrad of an expert's rows", 2e-5, 0, 0}};
    for (size_t i = 0; i < N_OF(heights); i++) {
        const struct qmat packed = make_packed(&(struct q_kind){4, 64, false}, OUTPUTS, COLS);
        const struct twin sorted = quick_random(ACT, SORTED, COLS, 0),
                          w = quick_random(DTYPE_BF16, OUTPUTS, COLS, 0);
        const struct twin_q q = twin_q_of(&packed);
        check_expert(o, &sorted, &w, &q, heights[i]);
        parity_free();
    }
    for (size_t i = 0; i < N_OF(o); i++)
        parity_print(&o[i], "relative L2 error");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_route, parity_clean_up),
        cmocka_unit_test_teardown(test_route_of_damaged_rows, parity_clean_up),
        cmocka_unit_test_teardown(test_refusals, parity_clean_up),
        cmocka_unit_test_teardown(test_gather_rows, parity_clean_up),
        cmocka_unit_test_teardown(test_combine_rows, parity_clean_up),
        cmocka_unit_test_teardown(test_nan_stays, parity_clean_up),
        cmocka_unit_test_teardown(test_route_backward, parity_clean_up),
        cmocka_unit_test_teardown(test_products, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

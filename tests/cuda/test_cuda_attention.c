/* Attention on the device against the CPU's. A program of its own without a product by cuBLAS, so that compute-sanitizer
 * sees our kernels alone. */
#include "tests/cuda/parity.h"
#include "tests/unit/naive.h"

#include <math.h>

static const double act_bound = 5e-3; /* rounding to BF16 alone: 1.6e-3 */
static const double lse_bound = 1e-5; /* scores are FP32 sums */
/* tanh by approximate instructions: to 2^-21, which is 2.4e-5 of a score where the cap is 50 */
static const double capped_lse_bound = 3e-5;
/* Weights and what the loss changes by the scores are rounded to BF16, 1.6e-3 each, and so is the gradient; where one key
 * has nearly all the weight, scores of hundreds carry their FP32 error into differences of nearly equal numbers. */
static const double gradient_bound = 1e-2;

struct attention_args {
    struct attention_spec spec;
    struct twin q, keys, values, out;
    struct twin lse, dout, dq, dkeys, dvalues;
};

static int run_attention(const struct backend *b, enum side s, const void *args)
{
    const struct attention_args *a = args;
    return b->core->attention(b, &a->spec, &a->q.m[s], &a->keys.m[s], &a->values.m[s], &a->out.m[s], NULL);
}

static int run_attention_lse(const struct backend *b, enum side s, const void *args)
{
    const struct attention_args *a = args;
    return b->core->attention(b, &a->spec, &a->q.m[s], &a->keys.m[s], &a->values.m[s], &a->out.m[s],
                              &a->lse.m[s]);
}

static int run_backward(const struct backend *b, enum side s, const void *args)
{
    const struct attention_args *a = args;
    const struct attention_tape tape = {a->q.m[s], a->keys.m[s], a->values.m[s], a->out.m[s], a->lse.m[s]};
    return b->train->attention_backward(b, &a->spec, &tape, &a->dout.m[s], &a->dq.m[s], &a->dkeys.m[s],
                                        &a->dvalues.m[s]);
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

static void case_text(char text[120], const struct attention_spec *spec, int64_t rows)
{
    const struct sequences *s = &spec->sequences;
    snprintf(text, 120, "heads %d/%d of %d, window %d, %d × %d rows at %d of %d, cap %g", spec->heads.n_heads,
             spec->heads.n_kv_heads, spec->heads.head_dim, (int)spec->window, (int)s->n, (int)rows,
             (int)s->first_position, (int)s->max_positions, (double)spec->softcap);
}

static void check_attention(struct outcome *o, const struct attention_spec *spec, int64_t rows, int64_t slack,
                            double amplitude)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t positions = s->first_position + rows, cols = h->n_heads * h->head_dim;
    struct attention_args a = {.spec = *spec,
                               .q = twin_random(ACT, s->n * rows, cols, slack, amplitude),
                               .keys = make_cache(spec, positions, slack),
                               .values = make_cache(spec, positions, slack + 8),
                               .out = twin_make(ACT, s->n * rows, cols, slack)};
    char text[120];
    case_text(text, spec, rows);
    parity_case(run_attention, &a, &(struct result){o, &a.out, false}, 1, text);
    parity_free();
}

static const int dims[] = {32, 64, 80, 128, 256, 512}, head_counts[][2] = {{4, 1}, {4, 2}, {3, 3}, {8, 4}};

enum { MAX_CAPPED = 256 }; /* heads that a device need not go beyond with a soft cap */

/* A soft cap that bites hard, that bites, or that leaves scores nearly as they are, in turn; 0 where there is none. */
static float cap_of(size_t turn, bool capped)
{
    static const float caps[] = {0.7f, 5, 50};
    return capped ? caps[turn % 3] : 0;
}

static void attention_cases(struct outcome *o, bool capped)
{
    static const int64_t windows[] = {0, 1, 16, 512};
    static const struct {
        int64_t n, first, rows;
    } places[] = {{1, 0, 1},    {1, 0, 300}, {3, 0, 5},   {2, 37, 1},  {4, 600, 1},
                  {2, 100, 33}, {1, 511, 8}, {3, 20, 70}, {1, 250, 9}, {1, 63, 64},
                  {2, 0, 129},  {1, 700, 2}, {5, 1, 16},  {1, 30, 257}};
    for (size_t i = 0; i < N_OF(places) * N_OF(dims) * 4; i++) {
        /* head counts and windows take their turns */
        const int dim = dims[i % 6];
        const size_t place = i / 24, turn = i / 6 % 4;
        const int *heads = head_counts[(turn + place) % 4];
        const int64_t first = places[place].first, rows = places[place].rows;
        const struct attention_spec spec = {{heads[0], heads[1], dim},
                                            {places[place].n, first, first + rows + (int64_t)(i % 2) * 5},
                                            1 / sqrtf((float)dim),
                                            windows[turn],
                                            cap_of(i / 6, capped)};
        if (!capped || dim <= MAX_CAPPED)
            check_attention(o, &spec, rows, (int64_t)(i % 3) * 8, 4);
    }
}

static void test_attention(void **state)
{
    (void)state;
    struct outcome o = {"attention", act_bound, 0, 0}, caps = {"attention, soft caps", act_bound, 0, 0};
    attention_cases(&o, false);
    attention_cases(&caps, true);
    parity_print(&o, "relative L2 error");
    parity_print(&caps, "relative L2 error");
}

static void test_attention_every_length(void **state)
{
    (void)state;
    struct outcome o = {"attention, 1 … 300 new tokens, without and with a soft cap", act_bound, 0, 0};
    for (int64_t rows = 1; rows <= 300; rows++)
        for (int capped = 0; capped < 2; capped++) {
            const struct attention_spec spec = {{2, 1, dims[rows % 4]},
                                                {1 + rows % 2, rows * 7 % 60, 400},
                                                0.125f,
                                                rows % 3 ? 0 : 40,
                                                cap_of((size_t)rows / 4, capped)};
            check_attention(&o, &spec, rows, 0, 4);
        }
    parity_print(&o, "relative L2 error");
}

/* Long contexts, as decoding meets them, with the wide heads that few keys and values go round, and scores among which
 * one decides or that a cap makes nearly alike. */
static void test_attention_extremes(void **state)
{
    (void)state;
    struct outcome o = {"attention, long", act_bound, 0, 0},
                   peaks = {"attention, large scores", act_bound, 0, 0};
    for (int64_t rows = 1; rows <= 20; rows += 19)
        for (int64_t window = 0; window <= 1024; window += 1024) {
            const struct attention_spec spec = {{4, 1, 256}, {1, 5000, 5020}, 0.0625f, window, 0};
            check_attention(&o, &spec, rows, 0, 4);
            const struct attention_spec sharp = {{4, 2, 64}, {2, 300, 320}, 1, window, 0};
            check_attention(&peaks, &sharp, rows, 8, 30);
            for (int kv_heads = 1; kv_heads <= 2; kv_heads++) {
                const struct attention_spec wide = {{8, kv_heads, 512}, {1, 2000, 2020}, 0.05f, window, 0};
                check_attention(&o, &wide, rows, 0, 4);
                const struct attention_spec capped = {
                    {4, kv_heads, 256}, {1, 2000, 2020}, 0.0625f, window, 50};
                check_attention(&o, &capped, rows, 0, 60);
            }
        }
    parity_print(&o, "relative L2 error");
    parity_print(&peaks, "relative L2 error");
}

/* --- the softmax's sums, and the backward pass -------------------------------------------------------------------- */

static void lse_cases(struct outcome *outs, struct outcome *sums, bool capped)
{
    static const int64_t counts[] = {1, 3, 8, 9, 64, 130, 300}, windows[] = {0, 1, 16, 200};
    for (size_t i = 0; i < N_OF(counts) * N_OF(dims) * 2; i++) {
        const int dim = dims[i % 6];
        const size_t turn = i / 12;
        const int *heads = head_counts[(turn + i) % 4];
        const int64_t rows = counts[turn], first = (int64_t)(i % 5) * 30, slack = (int64_t)(i % 3) * 8;
        const struct attention_spec spec = {{heads[0], heads[1], dim},
                                            {1 + (int64_t)(i % 3), first, first + rows + 3},
                                            i % 7 ? 1 / sqrtf((float)dim) : 1,
                                            windows[(turn + i / 2) % 4],
                                            cap_of(i / 6, capped)};
        if (capped && dim > MAX_CAPPED)
            continue;
        struct attention_args a = {.spec = spec,
                                   .q = twin_random(ACT, spec.sequences.n * rows, heads[0] * dim, slack, 4),
                                   .keys = make_cache(&spec, first + rows, slack),
                                   .values = make_cache(&spec, first + rows, slack),
                                   .out = twin_make(ACT, spec.sequences.n * rows, heads[0] * dim, slack)};
        a.lse = twin_make(DTYPE_F32, spec.sequences.n * rows, heads[0], (int64_t)(i % 2));
        char text[120];
        case_text(text, &spec, rows);
        parity_case(run_attention_lse, &a,
                    (const struct result[]){{outs, &a.out, false}, {sums, &a.lse, false}}, 2, text);
        parity_free();
    }
}

/* With sums, few new tokens take the kernel of many. */
static void test_attention_lse(void **state)
{
    (void)state;
    for (int capped = 0; capped < 2; capped++) {
        struct outcome outs = {capped ? "attention with its sums, soft caps" : "attention with its sums",
                               act_bound, 0, 0},
                       sums = {capped ? "lse, soft caps" : "lse", capped ? capped_lse_bound : lse_bound, 0,
                               0};
        lse_cases(&outs, &sums, capped);
        parity_print(&outs, "relative L2 error");
        parity_print(&sums, "relative L2 error");
    }
}

/* Operands of a backward pass; out and lse are the CPU's, out rounded as the device has it, the same for both. */
static struct attention_args make_backward(const struct attention_spec *spec, int64_t rows, int64_t slack,
                                           double amplitude)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t cols = h->n_heads * h->head_dim, kv_cols = h->n_kv_heads * h->head_dim, n = s->n * rows;
    struct attention_args a = {.spec = *spec,
                               .q = twin_random(ACT, n, cols, slack, amplitude),
                               .keys = make_cache(spec, rows, slack),
                               .values = make_cache(spec, rows, slack + 8),
                               .out = twin_make(ACT, n, cols, slack)};
    a.lse = twin_make(DTYPE_F32, n, h->n_heads, slack / 8);
    a.dout = twin_random(ACT, n, cols, slack + 16, 1);
    a.dq = twin_make(ACT, n, cols, slack);
    a.dkeys = twin_make(ACT, s->n * s->max_positions, kv_cols, slack);
    a.dvalues = twin_make(ACT, s->n * s->max_positions, kv_cols, slack + 8);
    assert_ok(run_attention_lse(&side[CPU], CPU, &a));
    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = 0; c < cols; c++)
            twin_put(&a.out, r, c, naive_element(&a.out.m[CPU], r, c));
        for (int64_t c = 0; c < h->n_heads; c++)
            twin_put(&a.lse, r, c, naive_element(&a.lse.m[CPU], r, c));
    }
    twin_upload(&a.out);
    twin_upload(&a.lse);
    return a;
}

static void check_backward(struct outcome o[3], const struct attention_spec *spec, int64_t rows,
                           int64_t slack, double amplitude)
{
    struct attention_args a = make_backward(spec, rows, slack, amplitude);
    char text[120];
    case_text(text, spec, rows);
    const struct result results[] = {
        {&o[0], &a.dq, false}, {&o[1], &a.dkeys, false}, {&o[2], &a.dvalues, false}};
    parity_case(run_backward, &a, results, 3, text);
    parity_free();
}

static void start_outcomes(struct outcome o[3])
{
    static const char *const names[] = {"attention_backward, dq", "attention_backward, dkeys",
                                        "attention_backward, dvalues"};
    for (int i = 0; i < 3; i++)
        o[i] = (struct outcome){names[i], gradient_bound, 0, 0};
}

static void print_outcomes(const struct outcome o[3])
{
    for (int i = 0; i < 3; i++)
        parity_print(&o[i], "relative L2 error");
}

static void backward_cases(struct outcome o[3], bool capped)
{
    static const int64_t windows[] = {0, 16, 129, 200};
    static const struct {
        int64_t n, rows;
    } places[] = {{1, 2}, {3, 5}, {1, 64}, {2, 128}, {2, 129}, {1, 300}, {3, 33}, {1, 513}};
    for (size_t i = 0; i < N_OF(places) * N_OF(dims) * 4; i++) {
        /* head counts and windows take their turns */
        const int dim = dims[i % 6];
        const size_t place = i / 24, turn = i / 6 % 4;
        const int *heads = head_counts[(turn + place) % 4];
        const int64_t rows = places[place].rows;
        const struct attention_spec spec = {{heads[0], heads[1], dim},
                                            {places[place].n, 0, rows + (int64_t)(i % 2) * 5},
                                            1 / sqrtf((float)dim),
                                            windows[turn],
                                            cap_of(i / 6, capped)};
        if (!capped || dim <= MAX_CAPPED)
            check_backward(o, &spec, rows, (int64_t)(i % 3) * 8, 4);
    }
}

static void test_backward(void **state)
{
    (void)state;
    for (int capped = 0; capped < 2; capped++) {
        struct outcome o[3];
        start_outcomes(o);
        backward_cases(o, capped);
        print_outcomes(o);
    }
}

static void test_backward_every_length(void **state)
{
    (void)state;
    struct outcome o[3];
    start_outcomes(o);
    for (int64_t rows = 2; rows <= 270; rows++)
        for (int capped = 0; capped < 2; capped++) {
            const struct attention_spec spec = {{2, 1, dims[rows % 4]},
                                                {1 + rows % 2, 0, 280},
                                                0.125f,
                                                rows % 3 ? 0 : 40,
                                                cap_of((size_t)rows / 4, capped)};
            check_backward(o, &spec, rows, 0, 4);
        }
    print_outcomes(o);
}

/* Scores among which one decides, heads of odd sizes, windows at the edges of tiles, and more heads than the scratch
 * memory holds tiles for at a time. */
static void test_backward_extremes(void **state)
{
    (void)state;
    static const struct {
        struct attention_spec spec;
        int64_t rows;
        double amplitude;
    } cases[] = {
        {{{4, 2, 64}, {2, 0, 320}, 1, 0, 0}, 300, 30},
        {{{4, 2, 64}, {2, 0, 320}, 1, 64, 0}, 300, 30},
        {{{2, 1, 256}, {1, 0, 1100}, 0.0625f, 0, 0}, 1100, 4},
        {{{2, 1, 8}, {2, 0, 300}, 0.3f, 0, 0}, 300, 4},
        {{{2, 2, 264}, {1, 0, 200}, 0.06f, 0, 0}, 200, 4},
        {{{3, 1, 504}, {1, 0, 200}, 0.05f, 0, 0}, 200, 4},
        {{{2, 1, 64}, {1, 0, 600}, 0.125f, 128, 0}, 600, 4},
        {{{2, 1, 64}, {1, 0, 600}, 0.125f, 257, 0}, 600, 4},
        {{{2, 1, 64}, {1, 0, 600}, 0.125f, 258, 0}, 600, 4},
        {{{8, 8, 8}, {15, 0, 897}, 0.3f, 0, 0}, 897, 4},
        {{{8, 1, 512}, {1, 0, 300}, 0.05f, 0, 0}, 300, 4},
        {{{8, 2, 512}, {1, 0, 300}, 0.05f, 0, 0}, 300, 4},
        {{{8, 4, 256}, {1, 0, 600}, 0.0625f, 257, 50}, 600, 60},
    };
    struct outcome o[3];
    start_outcomes(o);
    for (size_t i = 0; i < N_OF(cases); i++)
        check_backward(o, &cases[i].spec, cases[i].rows, (int64_t)(i % 2) * 8, cases[i].amplitude);
    print_outcomes(o);
}

/* What a device cannot take it has to refuse. */
static void test_attention_refusals(void **state)
{
    (void)state;
    const struct attention_spec spec = {{1, 1, 512}, {1, 0, 4}, 0.125f, 0, 50};
    const struct attention_args a = {.spec = spec,
                                     .q = twin_random(ACT, 4, 512, 0, 1),
                                     .keys = twin_random(ACT, 4, 512, 0, 1),
                                     .values = twin_random(ACT, 4, 512, 0, 1),
                                     .out = twin_make(ACT, 4, 512, 0)};
    const int rc = run_attention(&side[DEVICE], DEVICE, &a);
    if (rc)
        assert_error(rc, ERR_UNSUPPORTED, "attention: a soft cap on heads of 512");
}

static void test_backward_refusals(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct attention_spec spec = {{1, 1, 64}, {1, 0, 4}, 0.125f, 0, 0};
    struct attention_args a = make_backward(&spec, 4, 0, 1);
    a.dkeys = twin_make(ACT, 4, 64, 3);
    int rc = run_backward(b, DEVICE, &a);
    if (rc)
        assert_error(rc, ERR_UNSUPPORTED, "attention_backward, gradients: keys");
    parity_free();
    const struct attention_spec large = {{8, 1, 8}, {1, 0, 4200}, 0.3f, 0, 0};
    a = make_backward(&large, 4200, 0, 1);
    rc = run_backward(b, DEVICE, &a);
    if (rc)
        assert_error(rc, ERR_UNSUPPORTED, "attention_backward: 4200 tokens");
}

/* The CPU takes any address; a device that does not has to say so. */
static void test_attention_alignment(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct attention_spec spec = {{1, 1, 64}, {1, 0, 4}, 0.125f, 0, 0};
    struct outcome o = {"attention, odd strides", act_bound, 0, 0};
    struct attention_args a = {.spec = spec,
                               .q = twin_random(ACT, 4, 64, 3, 1),
                               .keys = twin_random(ACT, 4, 64, 0, 1),
                               .values = twin_random(ACT, 4, 64, 0, 1),
                               .out = twin_make(ACT, 4, 64, 0)};
    const int rc = run_attention(b, DEVICE, &a);
    if (rc == 0)
        parity_case(run_attention, &a, &(struct result){&o, &a.out, false}, 1, "odd strides");
    else
        assert_error(rc, ERR_UNSUPPORTED, "attention: queries");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_attention, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_every_length, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_alignment, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_refusals, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_lse, parity_clean_up),
        cmocka_unit_test_teardown(test_backward, parity_clean_up),
        cmocka_unit_test_teardown(test_backward_every_length, parity_clean_up),
        cmocka_unit_test_teardown(test_backward_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_backward_refusals, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

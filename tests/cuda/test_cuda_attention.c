/* Attention on the device against the CPU's. A program of its own without a product by cuBLAS, so that compute-sanitizer
 * sees our kernels alone. */
#include "tests/cuda/parity.h"
#include "tests/unit/naive.h"

#include <math.h>

static const double act_bound = 5e-3; /* rounding to BF16 alone: 1.6e-3 */

struct attention_args {
    struct attention_spec spec;
    struct twin q, keys, values, out;
};

static int run_attention(const struct backend *b, enum side s, const void *args)
{
    const struct attention_args *a = args;
    return b->core->attention(b, &a->spec, &a->q.m[s], &a->keys.m[s], &a->values.m[s], &a->out.m[s], NULL);
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
        cmocka_unit_test_teardown(test_attention, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_every_length, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_attention_alignment, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

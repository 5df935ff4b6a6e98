/* Tokens drawn from logits: against the definition in double, how often each comes, and what is no distribution. */
#include "tests/unit/forward_support.h"
#include "tests/unit/naive_draw.h"

/* Against the definition, and the same with one, two and three threads. */
static void check_drawn(const struct mat *m, float temperature, uint64_t seed, int64_t step)
{
    int32_t drawn[N_BACKENDS][8];
    assert_true(m->rows <= 8);
    for (int i = 0; i < N_BACKENDS; i++)
        assert_ok(cpu[i].core->sample_rows(&cpu[i], m, temperature, seed, step, drawn[i]));
    for (int64_t r = 0; r < m->rows; r++) {
        const struct naive_drawing e = naive_draw((const float *)m->data + r * m->stride, m->cols,
                                                  (double)temperature, seed, (uint64_t)r, (uint64_t)step);
        assert_true(drawn[0][r] == drawn[1][r] && drawn[0][r] == drawn[2][r]);
        if (drawn[0][r] != e.token && !(e.margin < 1e-4 / fmin((double)temperature, 1)))
            fail_msg("row %d of %d: drew %d, expected %d, ahead by %g", (int)r, (int)m->cols, drawn[0][r],
                     e.token, e.margin);
    }
}

static void test_definition(void **state)
{
    (void)state;
    static const int64_t vocabularies[] = {1, 2, 17, 1100, 30000};
    static const float temperatures[] = {1, 0.3f, 2};
    static const double amplitudes[] = {0, 1, 15};
    for (size_t i = 0; i < N_OF(vocabularies) * 9; i++) {
        const struct mat m = make_random(DTYPE_F32, 5, vocabularies[i / 9], amplitudes[i % 3]);
        check_drawn(&m, temperatures[i / 3 % 3], i * 1000003, (int64_t)(i * 7));
        free_matrices();
    }
}

/* −∞ is a logit like any other: it is never drawn beside a finite one. */
static void test_masked(void **state)
{
    (void)state;
    int32_t drawn[1];
    const struct mat m = make(DTYPE_F32, 1, 40);
    for (int64_t c = 0; c < 40; c++)
        put(&m, 0, c, c == 33 ? -1e30 : -INFINITY);
    for (int64_t step = 0; step < 100; step++) {
        assert_ok(cpu[0].core->sample_rows(&cpu[0], &m, 1, 1, step, drawn));
        assert_int_equal(drawn[0], 33);
    }
}

enum { OUTCOMES = 16, DRAWS = 20000 };

/* χ² of the counts against softmax; with 15 degrees of freedom above 44.3 once in 10 000 times. */
static double chi_square(const double logits[OUTCOMES], double temperature, const int64_t counts[OUTCOMES])
{
    double total = 0, sum = 0;
    for (int i = 0; i < OUTCOMES; i++)
        total += exp(logits[i] / temperature);
    for (int i = 0; i < OUTCOMES; i++) {
        const double expected = DRAWS * exp(logits[i] / temperature) / total;
        assert_true(expected > 5);
        sum += ((double)counts[i] - expected) * ((double)counts[i] - expected) / expected;
    }
    return sum;
}

/* Draws that differ in the row, in the step, in the seed. */
static void test_frequencies(void **state)
{
    (void)state;
    static const float temperatures[] = {1, 0.6f, 3};
    double logits[OUTCOMES];
    int32_t *drawn = room(DRAWS, sizeof *drawn);
    for (int i = 0; i < OUTCOMES; i++)
        logits[i] = 2 * support_uniform(&random_state);
    for (int kind = 0; kind < 9; kind++) {
        const float temperature = temperatures[kind / 3];
        const int64_t rows = kind % 3 ? 1 : DRAWS;
        const struct mat m = make(DTYPE_F32, rows, OUTCOMES);
        int64_t counts[OUTCOMES] = {0};
        for (int64_t k = 0; k < rows * OUTCOMES; k++)
            put(&m, k / OUTCOMES, k % OUTCOMES, logits[k % OUTCOMES]);
        for (int64_t at = 0; at < DRAWS; at += rows)
            assert_ok(cpu[1].core->sample_rows(&cpu[1], &m, temperature,
                                               kind % 3 == 2 ? (uint64_t)at << 40 : 5, kind % 3 == 1 ? at : 9,
                                               drawn + at));
        for (int64_t i = 0; i < DRAWS; i++) {
            assert_in_range(drawn[i], 0, OUTCOMES - 1);
            counts[drawn[i]]++;
        }
        const double x = chi_square(logits, (double)temperature, counts);
        print_message("temperature %g, by %s: chi-square %.1f, at most 44.3 allowed\n", (double)temperature,
                      kind % 3 == 0   ? "row"
                      : kind % 3 == 1 ? "step"
                                      : "seed",
                      x);
        assert_true(x <= 44.3);
    }
}

/* Noise of few different values would favour the lower of 262 144 equal columns. */
static void test_large_vocabulary(void **state)
{
    (void)state;
    enum { VOCAB = 262144, STEPS = 400 };
    const struct mat m = make(DTYPE_F32, 1, VOCAB);
    double sum = 0;
    for (int64_t c = 0; c < VOCAB; c++)
        put(&m, 0, c, 3);
    for (int64_t step = 0; step < STEPS; step++) {
        int32_t drawn;
        assert_ok(cpu[0].core->sample_rows(&cpu[0], &m, 1, 3, step, &drawn));
        sum += ((double)drawn + 0.5) / VOCAB;
    }
    const double bound = 4 * sqrt(1.0 / 12 / STEPS);
    print_message("262144 equal logits: mean place %.4f, 0.5 ± %.4f allowed\n", sum / STEPS, bound);
    assert_true(fabs(sum / STEPS - 0.5) <= bound);
    check_drawn(&m, 1, 3, 12345);
}

static void test_greatest(void **state)
{
    (void)state;
    int32_t drawn[6];
    const struct mat m = make_random(DTYPE_F32, 6, 999, 4);
    for (int64_t r = 0; r < 6; r++)
        for (int64_t c = 100 + r; c < 999; c += 71) /* several greatest ones: the first counts */
            put(&m, r, c, 5);
    assert_ok(cpu[2].core->sample_rows(&cpu[2], &m, 0, 1, 2, drawn));
    for (int r = 0; r < 6; r++)
        assert_int_equal(drawn[r], 100 + r);
    for (int64_t k = 0; k < 6 * 999; k++)
        put(&m, k / 999, k % 999, k % 999 == k / 999 ? 90 : -90);
    assert_ok(cpu[2].core->sample_rows(&cpu[2], &m, 1, 1, 2, drawn));
    for (int r = 0; r < 6; r++)
        assert_int_equal(drawn[r], r);
    /* so cold that quotients overflow */
    assert_ok(cpu[2].core->sample_rows(&cpu[2], &m, 1e-38f, 1, 2, drawn));
    for (int r = 0; r < 6; r++)
        assert_int_equal(drawn[r], r);
}

static void test_not_finite(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY};
    int32_t drawn[3];
    for (size_t i = 0; i < 2 * 2 * 3; i++) {
        static const int64_t places[] = {0, 57, 99};
        const struct mat m = make_random(DTYPE_F32, 3, 100, 1);
        put(&m, 1, places[i / 4], (double)bad[i % 2]);
        put(&m, 2, 5, NAN);
        assert_error(cpu[1].core->sample_rows(&cpu[1], &m, (float)(i / 2 % 2), 1, 1, drawn), ERR_FORMAT,
                     "sample_rows: the logits of row 1 are not finite");
        free_matrices();
    }
    const struct mat m = make(DTYPE_F32, 1, 3);
    for (int64_t c = 0; c < 3; c++)
        put(&m, 0, c, -INFINITY);
    assert_error(cpu[0].core->sample_rows(&cpu[0], &m, 1, 1, 1, drawn), ERR_FORMAT, "row 0");
}

/* A matrix that is cut draws as the whole. */
static void test_cut_rows(void **state)
{
    (void)state;
    int32_t whole[7], parts[7];
    const struct mat m = make_random(DTYPE_F32, 7, 500, 2);
    assert_ok(cpu[1].core->sample_rows(&cpu[1], &m, 1, 77, 8, whole));
    for (int64_t first = 0; first < 7; first += 3) {
        const struct mat part = mat_rows(&m, first, first == 6 ? 1 : 3);
        assert_ok(cpu[1].core->sample_rows(&cpu[1], &part, 1, 77 + (uint64_t)first, 8, parts + first));
    }
    assert_memory_equal(whole, parts, sizeof whole);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_definition, clean_up),
        cmocka_unit_test_teardown(test_masked, clean_up),
        cmocka_unit_test_teardown(test_frequencies, clean_up),
        cmocka_unit_test_teardown(test_large_vocabulary, clean_up),
        cmocka_unit_test_teardown(test_greatest, clean_up),
        cmocka_unit_test_teardown(test_not_finite, clean_up),
        cmocka_unit_test_teardown(test_cut_rows, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

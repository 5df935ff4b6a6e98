/* Tokens drawn on the device against those drawn on the CPU and the definition in double. They may differ where two
 * columns are equal but for rounding, and nowhere else. */
#include "tests/cuda/parity.h"
#include "tests/unit/naive_draw.h"

enum { MAX_ROWS = 300 };

/* Twice on the device; returns how many tokens are other ones than the CPU's. */
static int check_drawn(const struct twin *t, float temperature, uint64_t seed, int64_t step)
{
    int32_t out[3][MAX_ROWS];
    int n_other = 0;
    const struct mat *m = &t->m[CPU];
    assert_true(m->rows <= MAX_ROWS);
    for (int round = 0; round < 3; round++) {
        const enum side s = round ? DEVICE : CPU;
        memset(out[round], 0xff, sizeof out[round]);
        assert_ok(side[s].core->sample_rows(&side[s], &t->m[s], temperature, seed, step, out[round]));
    }
    assert_memory_equal(out[1], out[2], sizeof out[1]);
    for (int64_t r = 0; r < m->rows; r++) {
        assert_in_range(out[1][r], 0, m->cols - 1);
        if (out[0][r] == out[1][r])
            continue;
        const struct naive_drawing e = naive_draw((const float *)m->data + r * m->stride, m->cols,
                                                  (double)temperature, seed, (uint64_t)r, (uint64_t)step);
        n_other++;
        if (!(temperature > 0 && e.margin < 1e-4 / fmin((double)temperature, 1)))
            fail_msg("row %d of %d: drew %d, the CPU %d, expected %d, ahead by %g", (int)r, (int)m->cols,
                     out[1][r], out[0][r], e.token, e.margin);
    }
    return n_other;
}

static void test_random(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{7, 1},     {7, 2},           {MAX_ROWS, 17}, {40, 1023},
                                        {40, 1025}, {MAX_ROWS, 5000}, {5, 262144}};
    static const float temperatures[] = {1, 0.3f, 0, 2};
    static const double amplitudes[] = {0, 1, 15};
    int tokens = 0, n_other = 0;
    for (size_t i = 0; i < N_OF(shapes) * N_OF(amplitudes); i++) {
        const int64_t *shape = shapes[i / 3];
        const struct twin t = twin_random(DTYPE_F32, shape[0], shape[1], (int64_t)(i % 4), amplitudes[i % 3]);
        for (size_t k = 0; k < N_OF(temperatures); k++) {
            n_other += check_drawn(&t, temperatures[k], i * 1000003 + k, (int64_t)(i * 7));
            tokens += (int)shape[0];
        }
        parity_free();
    }
    print_message("sample_rows: %d tokens, %d other ones than the CPU's, at most %d allowed\n", tokens,
                  n_other, tokens / 1000);
    assert_true(n_other <= tokens / 1000);
}

static void test_ties(void **state)
{
    (void)state;
    struct twin t = twin_make(DTYPE_F32, 40, 5000, 0);
    int32_t out[40];
    for (int64_t r = 0; r < 40; r++)
        for (int64_t c = 0; c < 5000; c++) /* several greatest ones, from column 120·r on */
            twin_put(&t, r, c, c >= 120 * r && (c - 120 * r) % 37 == 0 ? 5.0 : (double)(c % 4));
    twin_upload(&t);
    assert_ok(side[DEVICE].core->sample_rows(&side[DEVICE], &t.m[DEVICE], 0, 1, 2, out));
    for (int r = 0; r < 40; r++)
        assert_int_equal(out[r], 120 * r);
    assert_int_equal(check_drawn(&t, 1e-38f, 1, 2) + check_drawn(&t, 0, 1, 2), 0);
    parity_free();
}

/* −∞ is never drawn beside a finite logit, however low. */
static void test_masked(void **state)
{
    (void)state;
    struct twin t = twin_make(DTYPE_F32, 40, 3000, 0);
    int32_t out[40];
    for (int64_t r = 0; r < 40; r++)
        for (int64_t c = 0; c < 3000; c++)
            twin_put(&t, r, c, c == 70 * r ? -1e30 : -INFINITY);
    twin_upload(&t);
    assert_ok(side[DEVICE].core->sample_rows(&side[DEVICE], &t.m[DEVICE], 1, 1, 2, out));
    for (int r = 0; r < 40; r++)
        assert_int_equal(out[r], 70 * r);
    parity_free();
}

static void test_not_finite(void **state)
{
    (void)state;
    static const int64_t places[] = {0, 1, 33, 4999};
    static const double bad[] = {NAN, INFINITY};
    int32_t out[5];
    for (size_t i = 0; i < N_OF(places) * 4; i++) {
        struct twin t = twin_random(DTYPE_F32, 5, 5000, 0, 1);
        twin_put(&t, 3, places[i / 4], bad[i % 2]);
        twin_put(&t, 4, 9, NAN);
        twin_upload(&t);
        for (int s = 0; s < N_SIDES; s++)
            assert_error(side[s].core->sample_rows(&side[s], &t.m[s], (float)(i / 2 % 2), 1, 2, out),
                         ERR_FORMAT, "sample_rows: the logits of row 3 are not finite");
        parity_free();
    }
    struct twin t = twin_make(DTYPE_F32, 1, 40, 0);
    for (int64_t c = 0; c < 40; c++)
        twin_put(&t, 0, c, -INFINITY);
    twin_upload(&t);
    for (int s = 0; s < N_SIDES; s++)
        assert_error(side[s].core->sample_rows(&side[s], &t.m[s], 1, 1, 2, out), ERR_FORMAT, "row 0");
    parity_free();
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_random, parity_clean_up),
        cmocka_unit_test_teardown(test_ties, parity_clean_up),
        cmocka_unit_test_teardown(test_masked, parity_clean_up),
        cmocka_unit_test_teardown(test_not_finite, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

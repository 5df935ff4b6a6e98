/* A batch of sequences runs as each of them would alone, fed in pieces of any length; what a forward pass takes from
 * the device, and what it refuses. The model is made up (tiny_gemma.h), once as it is and once cut to 4 bits. */
#include "base/file.h"
#include "kernels/budget.h"
#include "runtime/forward.h"
#include "tests/unit/cutting.h"
#include "tests/unit/support.h"

#include <math.h>

enum { SEQUENCES = 3, LENGTH = 40, POSITIONS = 50, ROWS = 21 };

struct loaded {
    struct backend backend;
    struct model model;
    struct weights weights;
};

static void load(struct loaded *l, const char *folder)
{
    assert_ok(backend_open(&l->backend, "cpu", 2));
    assert_ok(model_open(&l->model, folder));
    assert_ok(model_bind(&l->model, NULL, NULL));
    assert_ok(weights_load(&l->weights, &l->model, &l->backend));
}

static void unload(struct loaded *l)
{
    weights_free(&l->weights);
    model_close(&l->model);
    backend_close(&l->backend);
}

static const char *plain(void)
{
    return cutting_model("plain", &tiny_gemma_plain);
}

static const char *cut(void)
{
    const struct cut_options o = cutting_options(plain(), support_path("cut"));
    if (!file_exists(o.out))
        assert_ok(cutting_run(&o, &cutting_silent));
    return o.out;
}

static void make_ids(int32_t ids[SEQUENCES][LENGTH], int64_t vocab)
{
    uint64_t seed = 5;
    for (int s = 0; s < SEQUENCES; s++)
        for (int i = 0; i < LENGTH; i++)
            ids[s][i] = (int32_t)(support_random(&seed) % (uint64_t)vocab);
}

/* The hidden states of all tokens of n sequences, fed in pieces that take turns: out [n][LENGTH][hidden]. */
static void run_pieces(struct forward *f, int32_t (*ids)[LENGTH], int64_t n, const int64_t *pieces,
                       float *out)
{
    forward_begin(f, n);
    assert_int_equal(forward_position(f), 0);
    for (int64_t at = 0, k = 0; at < LENGTH; at += pieces[k++ % 4]) {
        const int64_t length = pieces[k % 4] < LENGTH - at ? pieces[k % 4] : LENGTH - at;
        int32_t piece[SEQUENCES * LENGTH];
        struct mat hidden;
        for (int64_t s = 0; s < n; s++)
            memcpy(piece + s * length, ids[s] + at, (size_t)length * sizeof *piece);
        assert_ok(forward_run(f, piece, length, &hidden));
        assert_int_equal(hidden.rows, n * length);
        assert_int_equal(forward_position(f), at + length);
        for (int64_t r = 0; r < hidden.rows; r++)
            memcpy(out + (r / length * LENGTH + at + r % length) * hidden.cols,
                   (const float *)hidden.data + r * hidden.stride, (size_t)hidden.cols * sizeof *out);
    }
}

static double difference(const float *a, const float *b, int64_t n)
{
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    assert_true(isfinite(error) && size > 0);
    return sqrt(error / size);
}

static double worst_difference(const float *a, const float *b, int64_t n_sequences, int64_t each,
                               double worst)
{
    for (int64_t s = 0; s < n_sequences; s++) {
        const double d = difference(a + s * each, b + s * each, each);
        worst = d > worst ? d : worst;
    }
    return worst;
}

/* Against each sequence alone, in the same pieces and in one: the CPU multiplies few rows in another way than many. */
static void check_batch(const char *name, const char *folder, double bound)
{
    static const int64_t pieces[][4] = {{ROWS, ROWS, ROWS, ROWS}, {1, 1, 1, 1}, {7, 1, 13, 2}};
    static const int64_t whole[4] = {LENGTH, LENGTH, LENGTH, LENGTH};
    static float alone[SEQUENCES * LENGTH * 256], same[SEQUENCES * LENGTH * 256],
        batch[SEQUENCES * LENGTH * 256];
    int32_t ids[SEQUENCES][LENGTH];
    struct loaded l;
    struct forward *one, *many;
    load(&l, folder);
    const int64_t each = LENGTH * l.model.gemma.hidden_size;
    make_ids(ids, l.model.gemma.vocab_size);
    assert_ok(forward_open(&one, &l.weights, &(struct forward_size){1, LENGTH, LENGTH}));
    assert_ok(forward_open(&many, &l.weights, &(struct forward_size){SEQUENCES, POSITIONS, ROWS}));
    for (int s = 0; s < SEQUENCES; s++)
        run_pieces(one, ids + s, 1, whole, alone + s * each);
    double same_worst = 0, worst = 0;
    for (size_t p = 0; p < N_OF(pieces); p++) {
        for (int s = 0; s < SEQUENCES; s++)
            run_pieces(one, ids + s, 1, pieces[p], same + s * each);
        for (int64_t n = SEQUENCES; n >= 1; n--) {
            run_pieces(many, ids, n, pieces[p], batch);
            same_worst = worst_difference(batch, same, n, each, same_worst);
            worst = worst_difference(batch, alone, n, each, worst);
        }
    }
    print_message(
        "%s: a batch against each alone: relative L2 error %.2e, at most %.1e allowed; in other pieces: "
        "%.2e, at most %.1e allowed\n",
        name, same_worst, bound, worst, 3 * bound);
    assert_true(same_worst <= bound && worst <= 3 * bound);
    forward_close(one);
    forward_close(many);
    unload(&l);
}

static void test_batch(void **state)
{
    (void)state;
    check_batch("bf16", plain(), 1e-6);
    check_batch("cut", cut(), 1e-6);
    for (int i = 0; i < TINY_FAMILIES; i++)
        /* nothing divides Gemma 4's scores: they are large, and so are their errors */
        check_batch(tiny_family_names[i], cutting_model(tiny_family_names[i], &tiny_families[i]),
                    i < TINY_GEMMA4_SHARING ? 1e-6 : 5e-6);
}

/* --- what is told, taken and refused ---------------------------------------------------------------------------- */

struct seen {
    int layers;
    int64_t rows;
    int stop_at;
};

static int observe(void *ctx, int layer, const struct mat *x)
{
    struct seen *s = ctx;
    assert_int_equal(layer, s->layers++);
    assert_int_equal(x->rows, s->rows);
    assert_int_equal(x->cols, tiny_gemma_plain.hidden);
    return layer == s->stop_at ? err_set(ERR_USAGE, "that is enough") : 0;
}

static void test_observer(void **state)
{
    (void)state;
    struct loaded l;
    struct forward *f;
    struct mat hidden;
    const int32_t ids[2 * 3] = {1, 2, 3, 4, 5, 6};
    struct seen seen = {0, 6, -1};
    load(&l, plain());
    assert_ok(forward_open(&f, &l.weights, &(struct forward_size){2, 10, 4}));
    forward_observe(f, observe, &seen);
    assert_ok(forward_run(f, ids, 3, &hidden)); /* before any forward_begin: as many as there is room for */
    assert_int_equal(seen.layers, tiny_gemma_plain.layers);
    seen = (struct seen){0, 6, 0};
    forward_begin(f, 2);
    assert_error(forward_run(f, ids, 3, &hidden), ERR_USAGE, "that is enough");
    assert_int_equal(seen.layers, 1);
    assert_int_equal(forward_position(f), 0);
    forward_observe(f, NULL, NULL);
    assert_ok(forward_run(f, ids, 3, &hidden));
    forward_close(f);
    unload(&l);
}

static void test_too_long(void **state)
{
    (void)state;
    struct loaded l;
    struct forward *f;
    struct mat hidden;
    const int32_t ids[8] = {0};
    load(&l, plain());
    assert_ok(forward_open(&f, &l.weights, &(struct forward_size){2, 10, 4}));
    assert_ok(forward_run(f, ids, 4, &hidden));
    assert_ok(forward_run(f, ids, 4, &hidden));
    assert_error(forward_run(f, ids, 3, &hidden), ERR_USAGE,
                 "the sequence has 11 tokens, expected at most 10");
    assert_ok(forward_run(f, ids, 2, &hidden));
    assert_error(forward_run(f, ids, 1, &hidden), ERR_USAGE, "11 tokens");
    forward_begin(f, 1);
    assert_ok(forward_run(f, ids, 4, &hidden));
    assert_int_equal(hidden.rows, 4);
    forward_close(f);
    unload(&l);
}

static int lift_budget(void **state)
{
    (void)state;
    budget_set(0);
    return 0;
}

/* What is announced is what is taken; what does not fit is refused by name and leaves nothing behind. */
static void check_budget(const char *folder)
{
    static const struct forward_size sizes[] = {{1, 10, 1}, {3, 100, 7}, {1, 1000, 1000}};
    struct loaded l;
    struct forward *f;
    budget_set(0);
    load(&l, folder);
    assert_int_equal(budget_taken(), weights_bytes(&l.model));
    assert_int_equal(l.weights.bytes, weights_bytes(&l.model));
    for (size_t i = 0; i < N_OF(sizes); i++) {
        const uint64_t bytes = forward_bytes(&l.weights.config, &l.backend, &sizes[i]),
                       before = budget_taken();
        assert_ok(forward_open(&f, &l.weights, &sizes[i]));
        assert_int_equal(budget_taken(), before + bytes);
        forward_close(f);
        budget_set(before + bytes - 1);
        assert_error(forward_open(&f, &l.weights, &sizes[i]), ERR_MEMORY, "activations and KV cache");
        assert_null(f);
        assert_int_equal(budget_taken(), before);
        budget_set(0);
    }
    weights_free(&l.weights);
    assert_int_equal(budget_taken(), 0);
    budget_set(weights_bytes(&l.model) - 1);
    assert_error(weights_load(&l.weights, &l.model, &l.backend), ERR_MEMORY, "do not fit the memory budget");
    assert_int_equal(budget_taken(), 0);
    budget_set(weights_bytes(&l.model));
    assert_ok(weights_load(&l.weights, &l.model, &l.backend));
    unload(&l);
    assert_int_equal(budget_taken(), 0);
}

static void test_budget(void **state)
{
    (void)state;
    check_budget(cut());
    for (int i = 0; i < TINY_FAMILIES; i++)
        check_budget(cutting_model(tiny_family_names[i], &tiny_families[i]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batch),
        cmocka_unit_test(test_observer),
        cmocka_unit_test(test_too_long),
        cmocka_unit_test_teardown(test_budget, lift_budget),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

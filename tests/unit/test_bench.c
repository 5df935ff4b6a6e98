/* What `gemcut bench` builds on: the shapes in the program, made-up numbers and checkpoints, times. */
#include "tests/unit/support.h"

#include "base/file.h"
#include "base/half.h"
#include "cli/bench.h"
#include "cli/bench_case.h"
#include "formats/hf_config.h"
#include "runtime/model.h"

#include <math.h>

/* --- shapes --------------------------------------------------------------------------------------------------------- */

static const struct bench_shape *shape_named(const char *name)
{
    for (int i = 0; bench_shape_names[i]; i++)
        if (!strcmp(bench_shape_names[i], name))
            return bench_shape(i);
    fail_msg("no shape '%s'", name);
    return NULL;
}

/* Numbers from the models' own listings, not from our files. */
static void sizes_of_real_models(void **state)
{
    static const struct {
        const char *name;
        size_t n;
        uint64_t bytes;
    } models[] = {{"gemma-3-270m", 236, 536196352},
                  {"gemma-3-1b", 340, 1999771904},
                  {"gemma-3-4b", 883, 8600158944},
                  {"gemma-3-12b", 1065, 24374650080},
                  {"gemma-3-27b", 1247, 54864813280}};
    (void)state;
    for (size_t i = 0; i < N_OF(models); i++) {
        struct bench_tensors t;
        assert_ok(bench_shape_expand(shape_named(models[i].name), &t));
        assert_int_equal(t.n, models[i].n);
        assert_int_equal(t.bytes, models[i].bytes);
        bench_tensors_free(&t);
    }
}

static bool has_tensor(const struct bench_tensors *t, const struct gemma_tensor *expected)
{
    for (size_t i = 0; i < t->n; i++)
        if (!strcmp(t->list[i].name, expected->name))
            return t->list[i].n_dims == expected->n_dims && t->list[i].dims[0] == expected->shape[0] &&
                   (expected->n_dims == 1 || t->list[i].dims[1] == expected->shape[1]);
    return false;
}

/* config.json and tensors must speak of the same model. */
static void configs_describe_the_tensors(void **state)
{
    (void)state;
    for (int i = 0; bench_shape_names[i]; i++) {
        const struct bench_shape *s = bench_shape(i);
        struct hf_config config;
        struct gemma_config gemma;
        struct gemma_tensors expected;
        struct bench_tensors t;
        assert_ok(hf_config_parse(&config, s->config, (size_t)(s->config_end - s->config), s->name));
        assert_ok(gemma_config_read(&gemma, &config));
        assert_ok(gemma_tensors(&expected, &gemma, gemma.family->prefixes[0]));
        assert_ok(bench_shape_expand(s, &t));
        for (size_t k = 0; k < expected.n; k++)
            if (!has_tensor(&t, &expected.list[k]))
                fail_msg("%s: %s is missing or of another shape", s->name, expected.list[k].name);
        bench_tensors_free(&t);
        gemma_tensors_free(&expected);
        gemma_config_free(&gemma);
        hf_config_close(&config);
    }
}

static void add_line(struct bench_tensors *t, const char *line)
{
    assert_ok(bench_tensors_add_line(t, line, strlen(line)));
}

static void lines_expand(void **state)
{
    struct bench_tensors t = {0};
    (void)state;
    add_line(&t, "a.{0..1}.b{3,5..6}.w BF16 2x3");
    add_line(&t, "scale F32 scalar");
    static const char *const names[] = {"a.0.b3.w", "a.0.b5.w", "a.0.b6.w", "a.1.b3.w",
                                        "a.1.b5.w", "a.1.b6.w", "scale"};
    assert_int_equal(t.n, N_OF(names));
    for (size_t i = 0; i < t.n; i++)
        assert_string_equal(t.list[i].name, names[i]);
    assert_int_equal(t.list[5].dims[1], 3);
    assert_int_equal(t.list[6].n_dims, 0);
    assert_int_equal(t.list[6].dtype, DTYPE_F32);
    assert_int_equal(t.bytes, 6 * 12 + 4);
    bench_tensors_free(&t);
}

static void bad_lines_are_refused(void **state)
{
    static const char *const lines[] = {
        "",
        "a",
        "a BF16",
        "a BF17 3",
        "a BF16 3y4",
        "a BF16 3x",
        " BF16 3",
        "a{0..3 BF16 3",
        "a{3..1} BF16 3",
        "a{x} BF16 3",
        "a{} BF16 3",
        "a{1,} BF16 3",
        "a BF16 1x1x1x1x1x1x1x1x1",
        "a{0..99999999} BF16 3",
    };
    (void)state;
    for (size_t i = 0; i < N_OF(lines); i++) {
        struct bench_tensors t = {0};
        if (bench_tensors_add_line(&t, lines[i], strlen(lines[i])) != ERR_FORMAT)
            fail_msg("line '%s' was taken", lines[i]);
        bench_tensors_free(&t);
    }
}

/* --- numbers -------------------------------------------------------------------------------------------------------- */

static void numbers_are_normal(void **state)
{
    enum { N = 1 << 18 };
    struct bench_values *v = malloc(sizeof *v);
    uint16_t *x = malloc(N * sizeof *x);
    double sum = 0, squares = 0, beyond = 0;
    (void)state;
    bench_values_normal(v, 0.5, 0.02);
    bench_fill(v, 7, 0, N, x);
    for (size_t i = 0; i < N; i++) {
        const double d = (double)half_from_bf16(x[i]) - 0.5;
        sum += d / N;
        squares += d * d / N;
        beyond += fabs(d) > 0.04 ? 1.0 / N : 0;
    }
    print_message("    mean %.5f, sigma %.5f, beyond 2 sigma %.4f (normal: 0.0455)\n", sum, sqrt(squares),
                  beyond);
    assert_true(fabs(sum) < 2e-4 && fabs(sqrt(squares) - 0.02) < 2e-4 && fabs(beyond - 0.0455) < 0.01);
    free(x);
    free(v);
}

static void pieces_are_the_whole(void **state)
{
    enum { N = 1003 };
    static struct bench_values v;
    uint16_t whole[N], piece[N];
    (void)state;
    bench_values_normal(&v, 0, 1);
    bench_fill(&v, 3, 0, N, whole);
    for (size_t first = 0; first < N; first += 100) {
        const size_t n = N - first < 100 ? N - first : 100;
        bench_fill(&v, 3, first, n, piece);
        assert_memory_equal(piece, whole + first, n * sizeof *piece);
    }
    bench_fill(&v, 4, 0, N, piece);
    assert_memory_not_equal(piece, whole, sizeof whole);
}

static void medians(void **state)
{
    double odd[] = {3, 1, 2}, even[] = {4, 1, 3, 2};
    (void)state;
    assert_true(bench_median(odd, 3) == 2 && odd[0] == 1);
    assert_true(bench_median(even, 4) == 2.5);
}

static void attention_pairs(void **state)
{
    (void)state;
    assert_true(bench_attention_pairs(0, 4, 0) == 1 + 2 + 3 + 4);
    assert_true(bench_attention_pairs(0, 4, 2) == 1 + 2 + 2 + 2);
    assert_true(bench_attention_pairs(10, 1, 0) == 11 && bench_attention_pairs(10, 1, 4) == 4);
}

/* --- checkpoints ---------------------------------------------------------------------------------------------------- */

static void make(const char *folder, uint64_t seed, int n_threads)
{
    struct parallel *pool;
    assert_ok(file_make_folder(folder));
    assert_ok(parallel_open(&pool, n_threads));
    assert_ok(bench_make_checkpoint(folder, shape_named("gemma3-tiny"), seed, pool));
    parallel_close(pool);
}

static void checkpoints_are_models(void **state)
{
    struct model m;
    (void)state;
    make(support_path("one"), 0, 1);
    assert_ok(model_open_unquantized(&m, support_path("one")));
    assert_ok(model_bind(&m, NULL, NULL));
    model_close(&m);
}

/* Any number of threads makes the same bytes; another seed makes others. */
static void checkpoints_are_reproducible(void **state)
{
    size_t n, n2, n3;
    (void)state;
    make(support_path("three"), 0, 3);
    make(support_path("other"), 1, 3);
    char *a = support_read(support_path("one/model.safetensors"), &n);
    char *b = support_read(support_path("three/model.safetensors"), &n2);
    char *c = support_read(support_path("other/model.safetensors"), &n3);
    assert_int_equal(n, n2);
    assert_int_equal(n, n3);
    assert_memory_equal(a, b, n);
    assert_memory_not_equal(a, c, n);
    free(a);
    free(b);
    free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_of_real_models),
        cmocka_unit_test(configs_describe_the_tensors),
        cmocka_unit_test(lines_expand),
        cmocka_unit_test(bad_lines_are_refused),
        cmocka_unit_test(numbers_are_normal),
        cmocka_unit_test(pieces_are_the_whole),
        cmocka_unit_test(medians),
        cmocka_unit_test(attention_pairs),
        cmocka_unit_test(checkpoints_are_models),
        cmocka_unit_test(checkpoints_are_reproducible),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

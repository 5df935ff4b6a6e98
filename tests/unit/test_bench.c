/* What `gemcut bench` builds on: the shapes in the program, made-up numbers and checkpoints, times. */
#include "tests/unit/support.h"

#include "base/file.h"
#include "base/half.h"
#include "cli/bench.h"
#include "cli/bench_case.h"
#include "cli/bench_profile.h"
#include "cli/bench_work.h"
#include "formats/hf_config.h"
#include "cli/recipe_args.h"
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
    } models[] = {{"gemma-2b", 164, 5012344832},      {"gemma-7b", 254, 17075361792},
                  {"gemma-2-2b", 288, 5228683776},    {"gemma-2-9b", 464, 18483411968},
                  {"gemma-2-27b", 508, 54454256640},  {"gemma-3-270m", 236, 536196352},
                  {"gemma-3-1b", 340, 1999771904},    {"gemma-3-4b", 883, 8600158944},
                  {"gemma-3-12b", 1065, 24374650080}, {"gemma-3-27b", 1247, 54864813280},
                  {"gemma-4-E2B", 2011, 10246357958}, {"gemma-4-E4B", 2130, 15992314836},
                  {"gemma-4-12B", 677, 23919460448},  {"gemma-4-26B-A4B", 1013, 51611872412},
                  {"gemma-4-31B", 1188, 62546177752}};
    (void)state;
    for (size_t i = 0; i < N_OF(models); i++) {
        struct bench_tensors t;
        assert_ok(bench_shape_expand(shape_named(models[i].name), &t));
        assert_int_equal(t.n, models[i].n);
        assert_int_equal(t.bytes, models[i].bytes);
        bench_tensors_free(&t);
    }
}

static bool has_dims(const struct bench_tensors *t, const char *name, int n_dims, const int64_t *dims)
{
    for (size_t i = 0; i < t->n; i++)
        if (!strcmp(t->list[i].name, name))
            return t->list[i].n_dims == n_dims &&
                   !memcmp(t->list[i].dims, dims, (size_t)n_dims * sizeof *dims);
    return false;
}

/* Releases hold a linear of all experts in one tensor, gate above up. */
static bool has_expert(const struct bench_tensors *t, const struct gemma_tensor *expected, int64_t n_experts)
{
    const bool down = expected->role == GEMMA_DOWN;
    const int64_t dims[3] = {n_experts, down ? expected->shape[0] : 2 * expected->shape[0],
                             expected->shape[1]};
    const char *experts = strstr(expected->name, ".experts.");
    char name[160];
    assert_non_null(experts);
    snprintf(name, sizeof name, "%.*s.experts.%s", (int)(experts - expected->name), expected->name,
             down ? "down_proj" : "gate_up_proj");
    return has_dims(t, name, 3, dims);
}

/* config.json and tensors must speak of the same model, as far as its family is known to the runtime. */
static void configs_describe_the_tensors(void **state)
{
    (void)state;
    int n_known = 0;
    for (int i = 0; bench_shape_names[i]; i++) {
        const struct bench_shape *s = bench_shape(i);
        struct hf_config config;
        struct gemma_config gemma;
        struct gemma_tensors expected;
        struct bench_tensors t;
        assert_ok(hf_config_parse(&config, s->config, (size_t)(s->config_end - s->config), s->name));
        const int rc = gemma_config_read(&gemma, &config);
        if (rc == ERR_UNSUPPORTED) {
            assert_non_null(strstr(err_message(), config.model_type));
            hf_config_close(&config);
            continue;
        }
        assert_ok(rc);
        n_known++;
        assert_ok(gemma_tensors(&expected, &gemma, gemma.family->prefixes[0]));
        assert_ok(bench_shape_expand(s, &t));
        for (size_t k = 0; k < expected.n; k++)
            if (expected.list[k].expert >= 0
                    ? !has_expert(&t, &expected.list[k], gemma.n_experts)
                    : !has_dims(&t, expected.list[k].name, expected.list[k].n_dims, expected.list[k].shape))
                fail_msg("%s: %s is missing or of another shape", s->name, expected.list[k].name);
        bench_tensors_free(&t);
        gemma_tensors_free(&expected);
        gemma_config_free(&gemma);
        hf_config_close(&config);
    }
    print_message("%d shapes are of families that the runtime knows, at least 15 expected\n", n_known);
    assert_true(n_known >= 15);
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

/* --- calibrated runs ------------------------------------------------------------------------------------------------ */

/* gemma3-tiny: hidden 256, intermediate 768, 6 layers, 4 query and 2 key heads of 64, the last layer global, window 128,
 * 2048 tokens: q/k/v is [512, 256], o [256, 256], gate/up [1536, 256], down [256, 768]. */
static void count(double out[N_WORK], const struct recipe_args *args, const char *group, int64_t length,
                  bool keep_inner)
{
    struct model m;
    struct recipe recipe = {.ragged = RAGGED_SMALLER};
    struct recipe_plan plan;
    const struct bench_pass pass = {3, length, keep_inner, 0};
    assert_ok(recipe_args_apply(args, &recipe));
    assert_ok(recipe_parse_scheme("w4a16", &recipe.scheme));
    assert_ok(recipe_parse_group(group, &recipe.scheme.group));
    assert_ok(model_open_unquantized(&m, support_path("one")));
    assert_ok(model_bind(&m, NULL, NULL));
    assert_ok(recipe_resolve(&plan, &recipe, &m.tensors));
    bench_work_count(out, &m, &plan, &recipe, &pass);
    recipe_plan_free(&plan);
    model_close(&m);
}

static const double qkv = 512 * 256, o = 256 * 256, gate_up = 1536 * 256, down = 256 * 768;

static void work_of_gptq(void **state)
{
    const struct recipe_args args = {"gptq", "auto", .damping = 0.01, .passes = 3, .tune = TUNE_ARGS_NONE};
    const double weights = qkv + o + gate_up + down, tokens = 3 * 200, k2 = 256 * 256, wide2 = 768 * 768,
                 products = (512 + 256 + 1536) * k2 + 256 * wide2; /* Σ N·K² of a layer */
    /* tokens 1 … 128 see as many keys, 72 more see 128 where there is a window */
    const double windowed = 128 * 129 / 2 + 72 * 128, global = 200 * 201 / 2;
    double w[N_WORK];
    (void)state;
    count(w, &args, "128", 200, true);
    assert_true(w[WORK_FORWARD] == 2 * tokens * (6 * weights - down) + 4 * 256 * 3 * (5 * windowed + global));
    assert_true(w[WORK_HESSIAN] == 6 * (tokens * (3 * k2 + wide2) + 2 * tokens * (o + down)));
    assert_true(fabs(w[WORK_FACTOR] / (6 * (3 * k2 * 256 + wide2 * 768) / 3) - 1) < 1e-12);
    assert_true(w[WORK_SEARCH] == 6 * weights * 2 * (61 + 13));
    assert_true(w[WORK_MEASURE] == 6 * 3 * 2 * products);
    assert_true(w[WORK_SWEEP] == 6 * products);
    assert_true(w[WORK_REFIT] == 0);
    assert_true(w[WORK_DESCEND] == 6 * (2 + 2 + 2 + 2) * products);
    assert_true(w[WORK_DELIVER] == 6 * weights * (0.5 + 2.0 / 128));
    assert_true(w[WORK_LOAD] >= 2 * (6 * weights + 2048 * 256) &&
                w[WORK_LOAD] < 2.02 * (6 * weights + 2048 * 256));
    /* gate and up of five layers once more */
    const double kept = w[WORK_FORWARD];
    count(w, &args, "128", 200, false);
    assert_true(w[WORK_FORWARD] == kept + 2 * tokens * 5 * gate_up);
    /* long groups */
    count(w, &args, "256", 200, true);
    assert_true(w[WORK_SEARCH] == 6 * weights * 2 * 61);
    assert_true(w[WORK_REFIT] == 6 * 4 * products && w[WORK_DESCEND] == 6 * 3 * (2 + 1) * products);
}

/* Scales under a Hessian without a sweep; one scale a row. */
static void work_of_searched_scales(void **state)
{
    const struct recipe_args args = {"rtn", "weighted", .damping = 0.01, .passes = -1,
                                     .tune = TUNE_ARGS_NONE};
    double w[N_WORK];
    (void)state;
    count(w, &args, "channel", 64, true);
    assert_true(w[WORK_FACTOR] == 0 && w[WORK_SWEEP] == 0 && w[WORK_REFIT] == 0 && w[WORK_DESCEND] == 0);
    assert_true(w[WORK_SEARCH] == 6 * (qkv + o + gate_up + down) * 2 * 61);
    assert_true(w[WORK_MEASURE] > 0);
    assert_true(w[WORK_DELIVER] == 6 * ((qkv + o + gate_up + down) / 2 + 2 * (512 + 256 + 1536 + 256)));
}

/* Five iterations of two of the three samples. */
static const struct recipe_args tuning = {"autoround", "auto", .damping = 0.01, .passes = -1,
                                          .tune = {.iterations = 5, .batch = 2, .init = -1}};

static void work_of_tuning(void **state)
{
    const double weights = qkv + o + gate_up + down, tokens = 3 * 200, step = 2 * 200,
                 windowed = 128 * 129 / 2 + 72 * 128, global = 200 * 201 / 2;
    struct recipe_args args = tuning;
    double w[N_WORK], gptq[N_WORK];
    (void)state;
    count(w, &args, "128", 200, true);
    /* the reference, the inputs but of the last block, and GPTQ's pass, which ends before down */
    assert_true(w[WORK_FORWARD] == 2 * tokens * ((6 + 5) * weights + 6 * (weights - down)) +
                                       4 * 256 * 3 * (5 * 3 * windowed + 2 * global));
    /* forward five times and once to judge; by the weights and by all inputs but q/k/v's five times */
    const double once = 4 * 256 * 2 * (5 * windowed + global);
    assert_true(w[WORK_TUNE] ==
                6 * 2 * step * (6 * weights + 5 * weights + 5 * (weights - qkv)) + once * (6 + 5 * 2.5));
    /* what comes of Hessians is as without a tuning */
    count(gptq, &(struct recipe_args){"gptq", "auto", .damping = 0.01, .passes = 4, .tune = TUNE_ARGS_NONE},
          "128", 200, true);
    for (int i = WORK_HESSIAN; i <= WORK_DESCEND; i++)
        assert_true(w[i] == gptq[i]);
    assert_true(gptq[WORK_TUNE] == 0 && w[WORK_DELIVER] == gptq[WORK_DELIVER]);
    /* whether inputs of down are kept or not, and no more samples than there are */
    args.tune.batch = 8;
    count(gptq, &args, "128", 200, false);
    assert_true(gptq[WORK_FORWARD] == w[WORK_FORWARD] &&
                fabs(gptq[WORK_TUNE] / (w[WORK_TUNE] * 1.5) - 1) < 1e-12);
}

/* From the range, and every iterate judged by its own mini-batch. */
static void work_of_compatible_tuning(void **state)
{
    const double weights = qkv + o + gate_up + down, tokens = 3 * 64, step = 2 * 64, pairs = 64 * 65 / 2;
    struct recipe_args args = tuning;
    double w[N_WORK];
    (void)state;
    args.tune.compat = true;
    count(w, &args, "128", 64, true);
    assert_true(w[WORK_FORWARD] == (6 + 5) * (2 * tokens * weights + 4 * 256 * 3 * pairs));
    assert_true(w[WORK_TUNE] == 6 * 5 * (2 * step * (3 * weights - qkv) + (4 + 10) * 256 * 2 * pairs));
    for (int i = WORK_HESSIAN; i <= WORK_DESCEND; i++)
        assert_true(w[i] == 0);
    assert_true(w[WORK_DELIVER] == 6 * weights * (0.5 + 2.0 / 128));
}

/* --- operations under watch ----------------------------------------------------------------------------------------- */

enum { TOKENS = 3, WIDTH = 32 };

static struct mat f32(float *data, int64_t rows, int64_t cols)
{
    return (struct mat){data, DTYPE_F32, rows, cols, cols};
}

static struct linear_set whole(int64_t rows)
{
    return (struct linear_set){.n = 1, .fused = true, .whole = {.weight = f32(NULL, rows, WIDTH)}};
}

/* A step of some weight of that many rows: what ends an iteration. */
static void step(const struct backend *b, int64_t rows, bool with_gradient)
{
    enum { ROWS = 12 };
    static float w[ROWS * WIDTH], v[ROWS * WIDTH], gradient[ROWS * WIDTH], restored[ROWS * WIDTH], high[ROWS];
    static uint16_t scales[ROWS], kept_scales[ROWS];
    static int8_t codes[ROWS * WIDTH];
    struct qmat q = {.scales = {scales, DTYPE_BF16, rows, 1, 1}, .bits = 4, .group = WIDTH, .cols = WIDTH};
    struct qmat kept = q;
    kept.scales.data = kept_scales;
    const struct mat weight = f32(w, rows, WIDTH), shift = f32(v, rows, WIDTH),
                     by = f32(gradient, rows, WIDTH), out = f32(restored, rows, WIDTH),
                     factors = f32(high, rows, 1), start = {kept_scales, DTYPE_BF16, rows, 1, 1},
                     best = {codes, DTYPE_I8, rows, WIDTH, WIDTH};
    assert_true(rows <= ROWS);
    for (int i = 0; i < ROWS; i++)
        kept_scales[i] = half_to_bf16(0.5f);
    const struct tuning t = {.w = &weight,
                             .v = &shift,
                             .start = &start,
                             .high = &factors,
                             .lowest = 0.5f,
                             .highest = 1.5f,
                             .distance = 0.45f,
                             .q = &q,
                             .restored = &out,
                             .codes = &best,
                             .kept = &kept};
    const struct tune_rates rates = {0.01f, 0.01f};
    assert_ok(b->train->tune_step(b, &t, with_gradient ? &by : NULL, &rates, NULL));
}

static void operations_are_counted(void **state)
{
    enum { FLOAT = sizeof(float) };
    const struct block block = {.qkv = whole(4), .o = whole(3), .gate_up = whole(2), .down = whole(1)};
    float x[TOKENS * WIDTH], w[4 * WIDTH], y[TOKENS * 4], expected[TOKENS * 4], copy[8];
    const struct mat in = f32(x, TOKENS, WIDTH), weight = f32(w, 4, WIDTH), out = f32(y, TOKENS, 4),
                     wanted = f32(expected, TOKENS, 4);
    struct profile_iteration iterations[2] = {{{{0}}}};
    struct profile_log log = {.apart = true, .iterations = iterations, .n = 2};
    struct bench_profile p;
    struct backend cpu;
    (void)state;
    for (int i = 0; i < 4 * WIDTH; i++)
        w[i] = (float)(i % 7) - 3;
    for (int i = 0; i < TOKENS * WIDTH; i++)
        x[i] = (float)(i % 5) - 2;
    assert_ok(backend_open(&cpu, "cpu", 1));
    bench_profile_begin(&p, &cpu, &log, &block);
    const struct backend *b = &p.backend;
    step(b, 4, false); /* of the beginning: no end of an iteration */
    for (int i = 0; i < 3; i++) {
        assert_ok(b->core->gemm(b, &in, &weight, &out));
        step(b, 4, true);
        step(b, 3, true);
    }
    assert_ok(b->core->copy(b, copy, x, sizeof copy)); /* behind the last iteration */
    assert_ok(cpu.core->gemm(&cpu, &in, &weight, &wanted));
    assert_memory_equal(y, expected, sizeof y);
    assert_true(log.at == 3 && log.begin > 0 && log.end >= log.begin);
    const struct profile_op *first = iterations[0].ops, *second = iterations[1].ops;
    assert_true(first[ROW_STEP + FUSED_QKV].calls == 2 && second[ROW_STEP + FUSED_QKV].calls == 1);
    assert_true(second[ROW_FORWARD + FUSED_QKV].calls == 1 && second[ROW_FORWARD + FUSED_QKV].seconds > 0);
    assert_true(second[ROW_FORWARD + FUSED_QKV].amount == 2 * 4 * WIDTH * TOKENS);
    /* itself, v twice, its gradient and what is restored */
    assert_true(second[ROW_STEP + FUSED_O].amount == 5 * 3 * WIDTH * FLOAT);
    assert_true(first[ROW_COPIES].calls == 0 && second[ROW_COPIES].calls == 0);
    for (int row = 0; row < N_ROWS; row++)
        assert_non_null(profile_row_name(row));
    backend_close(&cpu);
}

/* Products of one expert and steps of all of them are their sets', the router's are its own. */
static void experts_are_counted(void **state)
{
    struct expert experts[2] = {{.gate_up = whole(6), .down = whole(5)},
                                {.gate_up = whole(6), .down = whole(5)}};
    const struct block block = {.qkv = whole(4),
                                .o = whole(3),
                                .gate_up = whole(2),
                                .down = whole(1),
                                .n_experts = 2,
                                .experts = experts,
                                .router = {NULL, DTYPE_F32, 7, WIDTH, WIDTH}};
    static float w[7 * WIDTH], x[TOKENS * WIDTH], y[TOKENS * 7];
    static int32_t chosen[TOKENS];
    const struct mat in = f32(x, TOKENS, WIDTH), logits = f32(y, TOKENS, 7), weights = f32(y, TOKENS, 1),
                     experts_of = {chosen, DTYPE_I32, TOKENS, 1, 1};
    struct profile_iteration iterations[1] = {{{{0}}}};
    struct profile_log log = {.apart = true, .iterations = iterations, .n = 1};
    struct bench_profile p;
    struct backend cpu;
    (void)state;
    assert_ok(backend_open(&cpu, "cpu", 1));
    bench_profile_begin(&p, &cpu, &log, &block);
    const struct backend *b = &p.backend;
    for (int rows = 5; rows <= 7; rows++) {
        const struct mat weight = f32(w, rows, WIDTH), out = f32(y, TOKENS, rows);
        assert_ok(b->core->gemm(b, &in, &weight, &out));
    }
    assert_ok(b->core->route(b, &logits, NULL, &experts_of, &weights));
    step(b, 12, true);
    step(b, 10, true);
    const struct profile_op *ops = iterations[0].ops;
    assert_true(ops[ROW_FORWARD + SET_EXPERTS_GATE_UP].calls == 1 &&
                ops[ROW_STEP + SET_EXPERTS_GATE_UP].calls == 1);
    assert_true(ops[ROW_FORWARD + SET_EXPERTS_DOWN].calls == 1 &&
                ops[ROW_STEP + SET_EXPERTS_DOWN].calls == 1);
    assert_true(ops[ROW_FORWARD + SET_EXPERTS_DOWN].amount == 2 * 5 * WIDTH * TOKENS);
    assert_true(ops[ROW_ROUTER].calls == 1 && ops[ROW_ROUTES].calls == 1);
    backend_close(&cpu);
}

static void random_ids(void **state)
{
    struct bench q = {.shape = shape_named("gemma3-tiny"), .recipe.calib = {.samples = 3, .length = 20}};
    struct dataset d, other;
    int different = 0;
    (void)state;
    assert_ok(bench_ids(&q, &d));
    q.seed = 1;
    assert_ok(bench_ids(&q, &other));
    assert_true(d.samples == 3 && d.length == 20);
    for (int i = 0; i < 60; i++) {
        assert_true(d.ids[i] >= 0 && d.ids[i] < 2048);
        assert_true(i % 20 || (d.ids[i] == 2 && other.ids[i] == 2));
        different += d.ids[i] != other.ids[i];
    }
    assert_true(different > 50);
    dataset_free(&d);
    dataset_free(&other);
}

static void lengths_fit_the_context(void **state)
{
    int64_t length = 0;
    (void)state;
    assert_ok(bench_settle_length(shape_named("gemma3-tiny"), &length));
    assert_int_equal(length, 2048); /* its whole context */
    length = 0;
    assert_ok(bench_settle_length(shape_named("gemma-3-4b"), &length));
    assert_int_equal(length, 2048);
    length = 2049;
    assert_ok(bench_settle_length(shape_named("gemma-3-4b"), &length));
    assert_int_equal(length, 2049);
    assert_int_equal(bench_settle_length(shape_named("gemma3-tiny"), &length), ERR_USAGE);
}

/* What options come to, for quantize and bench alike. */
static void methods_and_scales(void **state)
{
    static const struct {
        const char *method, *scales, *text;
        bool calibrated;
        enum scale_rule rule;
        int passes;
    } cases[] = {
        {"rtn", "auto", NULL, false, SCALE_RANGE, 0},       {"rtn", "mse", NULL, false, SCALE_MSE, 0},
        {"rtn", "weighted", NULL, true, SCALE_WEIGHTED, 0}, {"rtn", "auto", "a.txt", true, SCALE_BLOCK, 0},
        {"gptq", "auto", NULL, true, SCALE_BLOCK, 4},       {"gptq", "range", NULL, true, SCALE_RANGE, 4}};
    (void)state;
    for (size_t i = 0; i < N_OF(cases); i++) {
        const struct recipe_args args = {cases[i].method, cases[i].scales,
                                         .passes = cases[i].passes ? cases[i].passes : -1,
                                         .calib.text = cases[i].text, .tune = TUNE_ARGS_NONE};
        struct recipe r = {0};
        assert_ok(recipe_args_apply(&args, &r));
        assert_string_equal(r.method, cases[i].method);
        assert_true(r.calibrated == cases[i].calibrated && r.scales.rule == cases[i].rule &&
                    r.passes == cases[i].passes);
        if (r.calibrated)
            assert_string_equal(r.calib.text, cases[i].text ? cases[i].text : DOCUMENTS_BUILTIN);
    }
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
        cmocka_unit_test(work_of_gptq),
        cmocka_unit_test(work_of_searched_scales),
        cmocka_unit_test(work_of_tuning),
        cmocka_unit_test(work_of_compatible_tuning),
        cmocka_unit_test(operations_are_counted),
        cmocka_unit_test(experts_are_counted),
        cmocka_unit_test(random_ids),
        cmocka_unit_test(lengths_fit_the_context),
        cmocka_unit_test(methods_and_scales),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

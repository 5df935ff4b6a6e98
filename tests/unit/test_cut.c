/* A whole cut of a made-up Gemma 3 (tiny_gemma.h): every tensor of the result against the naive grid, the same
 * bytes with any number of threads, and what lies beside the weights. */
#include "base/file.h"
#include "formats/record.h"
#include "tests/unit/cutting.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>

/* --- every tensor of a cut ------------------------------------------------------------------------------------ */

static void *load(const struct checkpoint *ck, const char *name, enum dtype dtype, int64_t rows, int64_t cols)
{
    const struct tensor *t = checkpoint_tensor(ck, name);
    if (!t)
        fail_msg("%s is missing", name);
    assert_int_equal(t->dtype, dtype);
    assert_int_equal(tensor_rows(t), rows);
    assert_int_equal(tensor_cols(t), cols);
    void *data = malloc((size_t)t->bytes + 1);
    assert_non_null(data);
    assert_ok(checkpoint_read(ck, t, 0, (size_t)t->bytes, data));
    return data;
}

static void *load_part(const struct checkpoint *ck, const char *module, const char *suffix, enum dtype dtype,
                       int64_t rows, int64_t cols)
{
    char name[512];
    snprintf(name, sizeof name, "%s%s", module, suffix);
    return load(ck, name, dtype, rows, cols);
}

/* Zero points are packed along the rows. */
static void check_zeros(const struct checkpoint *out, const char *module, const int *zeros, int64_t rows,
                        int64_t groups, int bits)
{
    const int64_t words = (rows * bits + 31) / 32;
    uint32_t *got = load_part(out, module, ".weight_zero_point", DTYPE_I32, words, groups);
    int *column = malloc((size_t)rows * sizeof *column);
    uint32_t *packed = malloc((size_t)words * sizeof *packed);
    assert_true(column && packed);
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t r = 0; r < rows; r++)
            column[r] = zeros[r * groups + g];
        naive_pack(column, rows, bits, packed);
        for (int64_t w = 0; w < words; w++)
            assert_int_equal(got[w * groups + g], packed[w]);
    }
    free(got);
    free(column);
    free(packed);
}

/* weights: of the source, with NaNs taken as 0 */
static void check_linear(const struct checkpoint *out, const char *module, const struct mat *weights,
                         const struct naive_grid *grid)
{
    const int64_t rows = weights->rows, cols = weights->cols, group = grid->group ? grid->group : cols;
    const int64_t groups = (cols + group - 1) / group, words = (cols * grid->bits + 31) / 32;
    uint32_t *packed = load_part(out, module, ".weight_packed", DTYPE_I32, rows, words);
    uint16_t *scales = load_part(out, module, ".weight_scale", DTYPE_BF16, rows, groups);
    int64_t *shape = load_part(out, module, ".weight_shape", DTYPE_I64, 1, 2);
    int *zeros = calloc((size_t)(rows * groups), sizeof *zeros),
        *codes = malloc((size_t)cols * sizeof *codes);
    double *w = malloc((size_t)cols * sizeof *w);
    uint32_t *expected = malloc((size_t)words * sizeof *expected);
    assert_true(zeros && codes && w && expected && shape[0] == rows && shape[1] == cols);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            w[c] = naive_element(weights, r, c);
            w[c] = isfinite(w[c]) ? w[c] : 0;
        }
        for (int64_t c = 0; c < cols; c++) {
            const int64_t g = c / group, n = cols - g * group < group ? cols - g * group : group;
            double scale = naive_value16(scales[r * groups + g], 8), right;
            if (c % group == 0) {
                naive_scale(w + c, n, grid, &right, &zeros[r * groups + g]);
                if (!(scale == right))
                    fail_msg("%s: row %d group %d: scale %g, expected %g", module, (int)r, (int)g, scale,
                             right);
            }
            codes[c] = naive_code(w[c], scale, zeros[r * groups + g], grid->bits);
        }
        naive_pack(codes, cols, grid->bits, expected);
        if (memcmp(expected, packed + r * words, (size_t)words * sizeof *expected))
            fail_msg("%s: the codes of row %d are wrong", module, (int)r);
    }
    if (!grid->symmetric)
        check_zeros(out, module, zeros, rows, groups, grid->bits);
    free(packed);
    free(scales);
    free(shape);
    free(zeros);
    free(codes);
    free(w);
    free(expected);
}

static bool is_projection(const char *name)
{
    return strstr(name, "_proj.weight") != NULL;
}

/* Linears against the naive grid, everything else byte for byte, nothing more than that; the record's hashes. */
static void check_cut(const char *source, const char *out, const struct naive_grid *grid)
{
    struct checkpoint a, b;
    struct record record;
    struct parallel *pool;
    struct hash128 hashes[256];
    bool found;
    size_t n = 0;
    assert_ok(checkpoint_open(&a, source));
    assert_ok(checkpoint_open(&b, out));
    for (size_t i = 0; i < a.n_tensors; i++) {
        const struct tensor *t = &a.tensors[i];
        const int64_t rows = tensor_rows(t), cols = tensor_cols(t);
        void *data = load(&a, t->name, t->dtype, rows, cols);
        if (is_projection(t->name)) {
            char module[256];
            snprintf(module, sizeof module, "%.*s", (int)(strlen(t->name) - strlen(".weight")), t->name);
            check_linear(&b, module, &(struct mat){data, t->dtype, rows, cols, cols}, grid);
            assert_null(checkpoint_tensor(&b, t->name));
            n += grid->symmetric ? 3 : 4;
        } else {
            void *copy = load(&b, t->name, t->dtype, rows, cols);
            assert_memory_equal(data, copy, (size_t)t->bytes);
            free(copy);
            n++;
        }
        free(data);
    }
    assert_int_equal(b.n_tensors, n);
    assert_ok(record_open(&record, out, &found));
    assert_true(found && record.tensors.n == n && n <= N_OF(hashes));
    assert_ok(parallel_open(&pool, 1));
    assert_ok(checkpoint_hash_all(&b, pool, hashes, NULL, NULL));
    for (size_t i = 0; i < n; i++)
        assert_true(hash_equal(hashes[i], *record_find(&record.tensors, b.tensors[i].name)));
    parallel_close(pool);
    record_close(&record);
    checkpoint_close(&a);
    checkpoint_close(&b);
}

static const struct {
    const char *name;
    enum dtype dtype;
    struct quant_scheme scheme;
    struct scale_spec spec;
} variants[] = {
    {"w4-range", DTYPE_BF16, {4, true, 128}, {SCALE_RANGE, false}},
    {"w4-positive-g32", DTYPE_BF16, {4, true, 32}, {SCALE_RANGE, true}},
    {"w4-absmax-g64", DTYPE_BF16, {4, true, 64}, {SCALE_ABSMAX, false}},
    {"w4-asym", DTYPE_BF16, {4, false, 128}, {SCALE_RANGE, false}},
    {"w8-channel", DTYPE_BF16, {8, true, 0}, {SCALE_RANGE, false}},
    {"w8-g256", DTYPE_BF16, {8, true, 256}, {SCALE_ABSMAX, true}},
    {"f16", DTYPE_F16, {4, true, 128}, {SCALE_RANGE, false}},
    {"f16-asym-channel", DTYPE_F16, {4, false, 0}, {SCALE_RANGE, false}},
    {"f32", DTYPE_F32, {4, true, 128}, {SCALE_RANGE, false}},
};

static void test_variants(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(variants); i++) {
        struct tiny_gemma g = tiny_gemma_plain;
        g.dtype = variants[i].dtype;
        const char *source = cutting_model(dtype_name(g.dtype), &g),
                   *out = support_path("out-%s", variants[i].name);
        struct cut_options o = cutting_options(source, out);
        o.recipe.scheme = variants[i].scheme;
        o.recipe.scales = variants[i].spec;
        assert_ok(cutting_run(&o, &cutting_silent));
        const struct naive_grid grid = {variants[i].spec.rule, variants[i].spec.positive_only,
                                        variants[i].scheme.symmetric, variants[i].scheme.bits,
                                        variants[i].scheme.group};
        check_cut(source, out, &grid);
    }
}

/* 96 columns: groups of 128 become groups of 32 there; and one scale a row where nothing divides. */
static void test_ragged_width(void **state)
{
    (void)state;
    const struct tiny_gemma g = {.hidden = 96,
                                 .ffn = 160,
                                 .vocab = 70,
                                 .layers = 1,
                                 .heads = 3,
                                 .kv_heads = 1,
                                 .head_dim = 32,
                                 .dtype = DTYPE_BF16};
    const struct tiny_gemma odd = {.hidden = 100,
                                   .ffn = 52,
                                   .vocab = 70,
                                   .layers = 1,
                                   .heads = 3,
                                   .kv_heads = 1,
                                   .head_dim = 20,
                                   .dtype = DTYPE_BF16};
    struct cut_options o = cutting_options(cutting_model("ragged", &g), support_path("out-ragged"));
    assert_ok(cutting_run(&o, &cutting_silent));
    check_cut(o.model, o.out, &(struct naive_grid){SCALE_RANGE, false, true, 4, 32});
    o = cutting_options(o.model, support_path("out-ragged-error"));
    o.recipe.ragged = RAGGED_ERROR;
    assert_error(cutting_run(&o, &cutting_silent), ERR_UNSUPPORTED,
                 "has 96 columns, which groups of 128 do not divide");
    o = cutting_options(cutting_model("odd", &odd), support_path("out-odd"));
    assert_error(cutting_run(&o, &cutting_silent), ERR_USAGE, "quantizes nothing");
    cutting_check_absent(o.out);
    o.recipe.scheme = (struct quant_scheme){4, false, 0};
    assert_ok(cutting_run(&o, &cutting_silent));
    check_cut(o.model, o.out, &(struct naive_grid){SCALE_RANGE, false, false, 4, 0});
}

/* --- the same bytes ------------------------------------------------------------------------------------------- */

static void test_threads(void **state)
{
    (void)state;
    struct tiny_gemma g = tiny_gemma_plain;
    g.shard_bytes = 3 << 20;
    const char *source = cutting_model("sharded", &g), *first = support_path("out-1");
    for (int threads = 1; threads <= 3; threads++) {
        const char *out = support_path("out-%d", threads);
        struct cut_options o = cutting_options(source, out);
        o.n_workers = threads;
        o.recipe.scheme = (struct quant_scheme){4, false, 32};
        o.recipe.scales.rule = SCALE_MSE;
        o.shard_bytes = 1 << 20;
        assert_ok(cutting_run(&o, &cutting_silent));
        assert_true(file_exists(support_path("out-%d/model.safetensors.index.json", threads)));
        cutting_check_same(first, out);
    }
}

/* What lies beside the weights: copied, left behind, and config.json edited in two places. */
static void test_beside(void **state)
{
    (void)state;
    struct cut_options o =
        cutting_options(cutting_model("BF16", &tiny_gemma_plain), support_path("out-beside"));
    struct file_list list;
    struct hf_config source, copy;
    assert_ok(cutting_run(&o, &cutting_silent));
    assert_ok(file_list(&list, o.out));
    static const char *const expected[] = {"LICENSE",       "chat_template.jinja",    "config.json",
                                           "gemcut.json",   "generation_config.json", "model.safetensors",
                                           "tokenizer.json"};
    assert_int_equal(list.n, N_OF(expected));
    for (size_t i = 0; i < list.n; i++)
        assert_string_equal(list.names[i], expected[i]);
    file_list_free(&list);
    size_t n;
    char *tokenizer = support_read(support_path("out-beside/tokenizer.json"), &n);
    assert_string_equal(tokenizer, "tokenizer.json");
    free(tokenizer);
    assert_ok(hf_config_open(&source, o.model));
    assert_ok(hf_config_open(&copy, o.out));
    assert_true(json_exists(copy.quantization));
    const size_t common = strlen(strchr(source.text, '\n'));
    assert_string_equal(copy.text + copy.text_len - common, source.text + source.text_len - common);
    hf_config_close(&source);
    hf_config_close(&copy);
    assert_error(
        cut_open(&(struct cut *){NULL}, &(struct cut_options){.model = o.out, .out = "x", .device = "cpu"}),
        ERR_UNSUPPORTED, "is already quantized (compressed-tensors)");
}

static void test_f32_config_says_bfloat16(void **state)
{
    (void)state;
    struct tiny_gemma g = tiny_gemma_plain;
    g.dtype = DTYPE_F32;
    struct cut_options o = cutting_options(cutting_model("F32", &g), support_path("out-f32-config"));
    struct hf_config cfg;
    assert_ok(cutting_run(&o, &cutting_silent));
    assert_ok(hf_config_open(&cfg, o.out));
    assert_string_equal(cfg.dtype, "bfloat16");
    hf_config_close(&cfg);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_variants),
        cmocka_unit_test(test_ragged_width),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_beside),
        cmocka_unit_test(test_f32_config_says_bfloat16),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

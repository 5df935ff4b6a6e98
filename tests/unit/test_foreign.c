/* Cuts as others write them are read, loaded and converted to the same weights; and what cannot be read is refused. */
#include "base/file.h"
#include "runtime/packed.h"
#include "runtime/weights.h"
#include "tests/unit/cutting.h"
#include "tests/unit/foreign.h"
#include "tests/unit/support.h"

static const struct tiny_gemma small = {.hidden = 64,
                                        .ffn = 96,
                                        .vocab = 64,
                                        .layers = 1,
                                        .heads = 2,
                                        .kv_heads = 1,
                                        .head_dim = 32,
                                        .dtype = DTYPE_BF16};

/* A cut of ours, by rows: "w4", "asym", "w8" or "channel". */
static const char *our_cut(const char *name, struct quant_scheme s)
{
    const char *out = support_path("cut-%s", name);
    struct cut_options o = cutting_options(cutting_model("small", &small), out);
    o.recipe.scheme = s;
    if (!file_exists(out))
        assert_ok(cutting_run(&o, &cutting_silent));
    return out;
}

static void open_bound(struct model *m, const char *folder)
{
    assert_ok(model_open(m, folder));
    assert_ok(model_bind(m, NULL, NULL));
}

/* --- weights ---------------------------------------------------------------------------------------------------- */

/* Every weight of the cut in `folder`, read in runs of rows. */
static void check_read(const struct foreign *f, const struct model *ours, const char *folder, bool direct)
{
    struct model m;
    open_bound(&m, folder);
    assert_int_equal(m.n_linears, ours->n_linears);
    for (size_t i = 0; i < m.n_linears; i++) {
        const struct model_linear *l = &m.linears[i];
        const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1], run = 24;
        uint16_t *w = malloc((size_t)(run * cols) * sizeof *w);
        assert_non_null(w);
        assert_int_equal(l->direct, direct);
        for (int64_t r = 0; r < rows; r += run) {
            const int64_t n = rows - r < run ? rows - r : run;
            assert_ok(packed_read_weights(&m, l, r, n, w));
            for (int64_t k = 0; k < n * cols; k++) {
                const uint16_t expected = foreign_weight(f, ours, &ours->linears[i], r + k / cols, k % cols);
                if (w[k] != expected && (w[k] | expected) != 0x8000) /* zeros of either sign */
                    fail_msg("%s: row %d column %d is %04x, expected %04x", l->spec->name,
                             (int)(r + k / cols), (int)(k % cols), w[k], expected);
            }
        }
        free(w);
    }
    model_close(&m);
}

/* A linear as it was loaded. */
static void check_loaded_linear(const struct backend *b, const struct model *m, const struct model_linear *l,
                                const struct linear *loaded)
{
    const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1];
    const size_t bytes = (size_t)(rows * cols) * sizeof(uint16_t);
    uint16_t *expected = malloc(bytes), *got = malloc(bytes);
    assert_true(expected && got);
    assert_ok(packed_read_weights(m, l, 0, rows, expected));
    assert_int_equal(loaded->quantized, l->direct);
    const struct mat out = {got, DTYPE_BF16, rows, cols, cols};
    if (loaded->quantized)
        assert_ok(b->quant->dequantize(b, &loaded->packed, &out));
    else
        memcpy(got, loaded->weight.data, bytes);
    for (int64_t i = 0; i < rows * cols; i++)
        if (got[i] != expected[i] && (got[i] | expected[i]) != 0x8000)
            fail_msg("%s: weight %d is %04x, expected %04x", l->spec->name, (int)i, got[i], expected[i]);
    free(expected);
    free(got);
}

static void check_loaded(const char *folder)
{
    struct model m;
    struct backend b;
    struct weights w;
    open_bound(&m, folder);
    assert_ok(backend_open(&b, "cpu", 2));
    assert_ok(weights_load(&w, &m, &b));
    assert_int_equal(w.bytes, weights_bytes(&m));
    const struct linear_set *const sets[] = {&w.blocks[0].qkv, &w.blocks[0].o, &w.blocks[0].gate_up,
                                             &w.blocks[0].down};
    for (size_t s = 0, i = 0; s < N_OF(sets); s++)
        for (int k = 0; k < sets[s]->n; k++)
            check_loaded_linear(&b, &m, &m.linears[i++], &sets[s]->parts[k]);
    weights_free(&w);
    backend_close(&b);
    model_close(&m);
}

/* --- converting ------------------------------------------------------------------------------------------------- */

static void check_same_file(const char *a, const char *b, const char *name)
{
    size_t n, m;
    char *p = file_join(a, name), *q = file_join(b, name);
    char *s = support_read(p, &n), *t = support_read(q, &m);
    if (n != m || memcmp(s, t, n))
        fail_msg("%s and %s differ", p, q);
    free(p);
    free(q);
    free(s);
    free(t);
}

/* --- the forms -------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    struct quant_scheme scheme;
    struct foreign form;
    bool direct;
} forms[] = {
    {"auto_gptq", {4, true, 32}, {QUANT_AUTO_ROUND, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, .g_idx = false}, true},
    {"auto_gptq f16",
     {4, true, 32},
     {QUANT_AUTO_ROUND, QUANT_TRANSPOSED, 1, DTYPE_F16, 0x1.014p0f, .g_idx = false},
     false},
    {"auto_gptq w8",
     {8, true, 0},
     {QUANT_AUTO_ROUND, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, .g_idx = false},
     true},
    {"auto_gptq asym",
     {4, false, 32},
     {QUANT_AUTO_ROUND, QUANT_TRANSPOSED, 0, DTYPE_F16, 1, .g_idx = false},
     true},
    {"auto_awq", {4, false, 32}, {QUANT_AUTO_ROUND, QUANT_AWQ, 0, DTYPE_F16, 1, .g_idx = false}, true},
    {"auto_awq f16",
     {4, false, 0},
     {QUANT_AUTO_ROUND, QUANT_AWQ, 0, DTYPE_F16, 0x1.014p0f, .g_idx = false},
     false},
    {"auto_awq sym", {4, true, 32}, {QUANT_AUTO_ROUND, QUANT_AWQ, 0, DTYPE_F16, 1, .g_idx = false}, true},
    {"gptq", {4, true, 32}, {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, .g_idx = true}, true},
    {"gptq bf16", {4, true, 0}, {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_BF16, 1, .g_idx = true}, true},
    {"gptq f32",
     {4, true, 32},
     {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_F32, 0x1.014p0f, .g_idx = true},
     false},
    {"gptq w8", {8, true, 32}, {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, .g_idx = true}, true},
    {"gptq_v2", {4, true, 32}, {QUANT_GPTQ, QUANT_TRANSPOSED, 0, DTYPE_F16, 1, .g_idx = true}, true},
    {"gptq_v2 asym",
     {4, false, 32},
     {QUANT_GPTQ, QUANT_TRANSPOSED, 0, DTYPE_F16, 0x1.014p0f, .g_idx = true},
     false},
    {"ct f16",
     {4, true, 32},
     {QUANT_COMPRESSED_TENSORS, QUANT_BY_ROWS, 0, DTYPE_F16, 0x1.014p0f, .g_idx = false},
     false},
    {"ct f16 asym",
     {4, false, 32},
     {QUANT_COMPRESSED_TENSORS, QUANT_BY_ROWS, 0, DTYPE_F16, 1, .g_idx = false},
     true},
    {"ct g_idx",
     {8, true, 32},
     {QUANT_COMPRESSED_TENSORS, QUANT_BY_ROWS, 0, DTYPE_BF16, 1, .g_idx = true},
     true},
};

static const char *scheme_name(struct quant_scheme s)
{
    static char name[32];
    snprintf(name, sizeof name, "%d-%d-%d", s.bits, s.symmetric, (int)s.group);
    return name;
}

static void test_forms(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(forms); i++) {
        const char *cut = our_cut(scheme_name(forms[i].scheme), forms[i].scheme);
        const char *folder = support_path("form-%d", (int)i), *back = support_path("form-%d-back", (int)i);
        struct model ours;
        open_bound(&ours, cut);
        foreign_write(&forms[i].form, &ours, folder);
        print_message("%s\n", forms[i].name);
        check_read(&forms[i].form, &ours, folder, forms[i].direct);
        check_loaded(folder);
        model_close(&ours);
        if (forms[i].direct) { /* and it is ours again */
            assert_ok(cutting_convert(folder, back, QUANT_COMPRESSED_TENSORS));
            check_same_file(cut, back, "model.safetensors");
        } else {
            assert_error(cutting_convert(folder, back, QUANT_COMPRESSED_TENSORS), ERR_UNSUPPORTED,
                         "which BF16 does not have exactly; compressed-tensors stores scales in BF16");
            cutting_check_absent(back);
        }
    }
}

/* What lies in scales that F16 has and BF16 has not survives between the formats that have F16. */
static void test_f16_scales(void **state)
{
    (void)state;
    const struct foreign form = {QUANT_AUTO_ROUND, QUANT_TRANSPOSED, 1,
                                 DTYPE_F16,        0x1.014p0f,       .g_idx = false};
    const struct quant_scheme s = {4, true, 32};
    const char *cut = our_cut(scheme_name(s), s);
    const char *folder = support_path("f16"), *gptq = support_path("f16-gptq"),
               *back = support_path("f16-back");
    struct model ours;
    open_bound(&ours, cut);
    foreign_write(&form, &ours, folder);
    assert_ok(cutting_convert(folder, gptq, QUANT_GPTQ));
    check_read(&form, &ours, gptq, false);
    assert_ok(cutting_convert(gptq, back, QUANT_AUTO_ROUND));
    check_same_file(folder, back, "model.safetensors");
    model_close(&ours);
}

/* --- refusals --------------------------------------------------------------------------------------------------- */

#define DOWN "model.layers.0.mlp.down_proj"

static void test_spoiled(void **state)
{
    (void)state;
    static const struct {
        struct quant_scheme scheme;
        struct foreign form;
        const char *message;
    } cases[] = {
        {{4, true, 32},
         {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, true, DOWN, .swap_g_idx = true},
         "'" DOWN ".g_idx' puts column 2 into group 1, expected 0"},
        {{4, true, 32},
         {QUANT_COMPRESSED_TENSORS, QUANT_BY_ROWS, 0, DTYPE_BF16, 1, true, DOWN, .swap_g_idx = true},
         "'" DOWN ".weight_g_idx' puts column 2 into group 1, expected 0"},
        {{4, true, 32},
         {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, false, DOWN, .nan_scale = true},
         "'" DOWN ".scales' has a NaN or infinite scale at row 3, group 1"},
        {{4, true, 32},
         {QUANT_COMPRESSED_TENSORS, QUANT_BY_ROWS, 0, DTYPE_F32, 1, false, DOWN, .nan_scale = true},
         "'" DOWN ".weight_scale' has a NaN or infinite scale at row 3, group 1"},
        {{4, true, 32},
         {QUANT_GPTQ, QUANT_TRANSPOSED, 0, DTYPE_F16, 1, false, DOWN, .odd_zero = true},
         "'" DOWN
         ".qzeros' has zero point 15 at row 5, group 1, expected 8, as config.json calls it symmetric"},
        {{4, true, 32},
         {QUANT_AUTO_ROUND, QUANT_AWQ, 0, DTYPE_F16, 1, false, DOWN, .odd_zero = true},
         "'" DOWN ".qzeros' has zero point 15 at row 5, group 1, expected 8"},
        {{4, true, 32},
         {QUANT_AUTO_ROUND, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, false, DOWN, .odd_zero = true},
         "'" DOWN ".qzeros' has zero point 16 at row 5, group 1, expected at most 15"},
        {{4, true, 32},
         {QUANT_GPTQ, QUANT_TRANSPOSED, 1, DTYPE_F16, 1, false, DOWN, .no_zeros = true},
         "'" DOWN ".qzeros' is missing, expected I32 [3, 8]"},
    };
    for (size_t i = 0; i < N_OF(cases); i++) {
        struct model ours, m;
        const char *folder = support_path("spoiled-%d", (int)i);
        open_bound(&ours, our_cut(scheme_name(cases[i].scheme), cases[i].scheme));
        foreign_write(&cases[i].form, &ours, folder);
        assert_ok(model_open(&m, folder));
        assert_error(model_bind(&m, NULL, NULL), ERR_FORMAT, cases[i].message);
        model_close(&m);
        model_close(&ours);
    }
}

static void test_not_converted(void **state)
{
    (void)state;
    const struct quant_scheme w4 = {4, true, 32}, asymmetric = {4, false, 32};
    const char *out = support_path("refused");
    assert_error(cutting_convert(cutting_model("small", &small), out, QUANT_GPTQ), ERR_UNSUPPORTED,
                 "is not quantized, expected a cut");
    assert_error(cutting_convert(our_cut(scheme_name(asymmetric), asymmetric), out, QUANT_GPTQ), ERR_USAGE,
                 "is to have zero points, which readers of gptq get wrong");
    assert_error(cutting_convert(support_path("nowhere"), out, QUANT_GPTQ), ERR_IO, "nowhere");
    cutting_check_absent(out);
    const char *cut = our_cut(scheme_name(w4), w4);
    assert_ok(cutting_convert(cut, out, QUANT_GPTQ));
    assert_error(cutting_convert(cut, out, QUANT_GPTQ), ERR_IO, "exists (--overwrite");
}

/* --- our own formats -------------------------------------------------------------------------------------------- */

/* What quantize writes in a format is what convert makes of another, whatever the recipe and the number of threads. */
static void check_formats(const char *name, const struct recipe *recipe, const char *model)
{
    const char *outs[N_QUANT_FORMATS];
    for (int f = 0; f < N_QUANT_FORMATS; f++) {
        struct cut_options o = cutting_options(model, outs[f] = support_path("%s-%d", name, f));
        o.recipe = *recipe;
        o.recipe.format = (enum quant_format)f;
        o.n_workers = 1 + f;
        assert_ok(cutting_run(&o, &cutting_silent));
    }
    for (int f = 0; f < N_QUANT_FORMATS; f++)
        for (int t = 0; t < N_QUANT_FORMATS; t++) {
            const char *to = support_path("%s-%d-%d", name, f, t);
            assert_ok(cutting_convert(outs[f], to, (enum quant_format)t));
            check_same_file(outs[t], to, "model.safetensors");
            check_same_file(outs[t], to, "config.json");
        }
}

static void test_our_formats(void **state)
{
    (void)state;
    struct recipe_override override = {.glob = "*.o_proj", .scheme = {8, true, 32}};
    const char *const ignore[] = {"*.down_proj"};
    const struct recipe plain = {.method = "rtn", .scheme = {4, true, 128}},
                        mixed = {.method = "rtn",
                                 .scheme = {4, true, 64},
                                 .ignore = ignore,
                                 .n_ignore = 1,
                                 .overrides = &override,
                                 .n_overrides = 1},
                        wide = {.method = "rtn", .scheme = {8, true, 0}};
    const char *model = cutting_model("plain", &tiny_gemma_plain); /* linears of several tasks */
    check_formats("plain", &plain, model);
    check_formats("mixed", &mixed, model);
    check_formats("wide", &wide, cutting_model("small", &small));
}

/* A scale that F16 does not have ends the cut, and nothing is left. */
static void test_tiny_scale(void **state)
{
    (void)state;
    struct tiny_gemma g = small;
    g.bad_tensor = DOWN ".weight";
    const char *out = support_path("tiny-scale");
    struct cut_options o = cutting_options(NULL, out);
    o.recipe.scheme = (struct quant_scheme){4, true, 32};
    o.recipe.format = QUANT_GPTQ;
    g.bad_index = 40; /* row 0, group 1 */
    g.bad_value = 1e6f;
    o.model = cutting_model("huge-weight", &g);
    assert_error(cutting_run(&o, &cutting_silent), ERR_UNSUPPORTED,
                 "tensor '" DOWN
                 ".weight': the scale of row 0, group 1 is -124928, which F16 does not have exactly; "
                 "gptq stores scales in F16");
    cutting_check_absent(out);
    o.recipe.format = QUANT_COMPRESSED_TENSORS;
    assert_ok(cutting_run(&o, &cutting_silent));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),       cmocka_unit_test(test_f16_scales),
        cmocka_unit_test(test_spoiled),     cmocka_unit_test(test_not_converted),
        cmocka_unit_test(test_our_formats), cmocka_unit_test(test_tiny_scale),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

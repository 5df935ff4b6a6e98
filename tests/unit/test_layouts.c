/* The layouts of AutoRound, GPTQModel and AutoAWQ by hand, and to and from ours; their descriptions in config.json. */
#include "formats/quant_layout.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>

/* --- words ------------------------------------------------------------------------------------------------------ */

static void test_transpose(void **state)
{
    (void)state;
    const uint32_t from[6] = {1, 2, 3, 4, 5, 6}; /* [2, 3] */
    uint32_t to[3 * 4] = {0};
    layout_transpose(from, 2, 3, to + 1, 4); /* into columns 1 and 2 of [3, 4] */
    const uint32_t expected[12] = {0, 1, 4, 0, 0, 2, 5, 0, 0, 3, 6, 0};
    assert_memory_equal(to, expected, sizeof to);
    enum { ROWS = 37, COLS = 50 };
    static uint32_t a[ROWS * COLS], b[ROWS * COLS], c[ROWS * COLS];
    for (uint32_t i = 0; i < ROWS * COLS; i++)
        a[i] = i;
    layout_transpose(a, ROWS, COLS, b, ROWS);
    assert_int_equal(b[49 * ROWS + 36], 36 * COLS + 49);
    layout_transpose(b, COLS, ROWS, c, COLS);
    assert_memory_equal(a, c, sizeof a);
}

static void test_zeros_by_hand(void **state)
{
    (void)state;
    const struct quant_scheme four = {4, true, 32}, eight = {8, true, 32}, asymmetric = {4, false, 32};
    uint32_t words[4];
    layout_pack_zeros(four, NULL, 16, 2, 1, words); /* [2 groups, 2 words], 8 stored as 7 */
    for (int i = 0; i < 4; i++)
        assert_int_equal(words[i], 0x77777777);
    layout_pack_zeros(eight, NULL, 8, 2, 0, words); /* GPTQ's second version: 128 as it is */
    for (int i = 0; i < 4; i++)
        assert_int_equal(words[i], 0x80808080);
    const int8_t zeros[16] = {-7, 0, -6, 0, -5, 0, -4, 0, -3, 0, -2, 0, -1, 7, 0, 0}; /* [8 rows, 2 groups] */
    int8_t back[16];
    layout_pack_zeros(asymmetric, zeros, 8, 2, 1, words);
    assert_int_equal(words[0], 0x76543210);
    assert_int_equal(words[1], 0x7e777777);
    assert_int_equal(layout_unpack_zeros(asymmetric, words, 8, 2, 1, back), -1);
    assert_memory_equal(back, zeros, sizeof zeros);
    words[1] = 0x7f777777; /* 15 + 1 has no place in four bits */
    assert_int_equal(layout_unpack_zeros(asymmetric, words, 8, 2, 1, back), 6 * 2 + 1);
    assert_int_equal(layout_unpack_zeros(asymmetric, words, 8, 2, 0, back), -1);
    assert_int_equal(back[6 * 2 + 1], 7);
}

/* Nibbles 0 … 7 of a word belong to rows 0, 2, 4, 6, 1, 3, 5, 7. */
static void test_awq_by_hand(void **state)
{
    (void)state;
    const int row_of[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    uint32_t from[10 * 2] = {0}, packed[16 * 2]; /* 10 columns, 16 rows */
    from[9 * 2 + 1] = 0x76543210;                /* column 9, rows 8 … 15 */
    layout_unpack_awq(from, 10, 2, packed, 2);
    for (int r = 0; r < 16; r++)
        assert_int_equal(packed[r * 2], 0);
    for (uint32_t i = 0; i < 8; i++)
        assert_int_equal(packed[(8 + row_of[i]) * 2 + 1], i << 4);
    int8_t zeros[8 * 2];
    const uint32_t words[2] = {0xfedcba98, 0x88888888}; /* 2 groups of 8 rows */
    layout_unpack_awq_zeros(words, 8, 2, zeros);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(zeros[row_of[i] * 2], i);
        assert_int_equal(zeros[row_of[i] * 2 + 1], 0);
    }
}

/* --- scales and weights ----------------------------------------------------------------------------------------- */

static void test_scales(void **state)
{
    (void)state;
    static const struct {
        float value;
        bool bf16, f16;
    } cases[] = {
        {1, true, true},
        {-0.0078125f, true, true},
        {0x1.02p-1f, true, true},
        {0x1.01p-1f, false, true},   /* eight bits behind the point */
        {0x1.004p-1f, false, true},  /* ten */
        {0x1.002p-1f, false, false}, /* eleven */
        {0x1p-20f, true, true},      /* a subnormal that F16 has */
        {0x1.5p-24f, true, false},   /* and one that it has not */
        {0x1p-30f, true, false},
        {65504, false, true},
        {65536, true, false},
        {NAN, false, false},
    };
    for (size_t i = 0; i < N_OF(cases); i++) {
        const float two[2] = {1, cases[i].value};
        assert_int_equal(layout_write_scales(two, 2, 1, false, DTYPE_BF16, NULL), cases[i].bf16 ? -1 : 1);
        assert_int_equal(layout_write_scales(two, 1, 2, true, DTYPE_F16, NULL), cases[i].f16 ? -1 : 1);
    }
    const float scales[6] = {1, 2, 3, -4, 5, 6}; /* [2 rows, 3 groups] */
    uint16_t out[6];
    float back[6];
    assert_int_equal(layout_write_scales(scales, 2, 3, true, DTYPE_F16, out), -1);
    const uint16_t expected[6] = {0x3c00, 0xc400, 0x4000, 0x4500, 0x4200, 0x4600};
    assert_memory_equal(out, expected, sizeof out);
    layout_read_scales(out, DTYPE_F16, 2, 3, true, back);
    assert_memory_equal(back, scales, sizeof back);
    layout_read_scales(scales, DTYPE_F32, 2, 3, false, back);
    assert_memory_equal(back, scales, sizeof back);
}

/* Against products in double; the scales have 11 bits, so these are exact in FP32 too. */
static void test_dequantize(void **state)
{
    (void)state;
    enum { ROWS = 3, COLS = 40 };
    static const struct quant_scheme schemes[] = {
        {4, true, 16}, {4, false, 0}, {8, false, 24}, {8, true, 40}};
    uint64_t seed = 5;
    for (size_t k = 0; k < N_OF(schemes); k++) {
        const struct quant_scheme s = schemes[k];
        const int64_t words = quant_packed_cols(s, COLS), groups = quant_groups(s, COLS),
                      group = s.group ? s.group : COLS;
        uint32_t packed[ROWS * 10];
        float scales[ROWS * 3];
        int8_t zeros[ROWS * 3];
        uint16_t out[ROWS * COLS];
        for (int64_t i = 0; i < ROWS * words; i++)
            packed[i] = (uint32_t)support_random(&seed);
        for (int64_t i = 0; i < ROWS * groups; i++) {
            scales[i] = (float)(1 + (int)(support_random(&seed) % 2047)) * (i % 2 ? -0x1p-12f : 0x1p-12f);
            zeros[i] = (int8_t)((int)(support_random(&seed) % 16) - 8);
        }
        layout_dequantize(s, packed, scales, s.symmetric ? NULL : zeros, ROWS, COLS, out);
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t c = 0; c < COLS; c++) {
                const int per_word = 32 / s.bits;
                const int code =
                    (int)(packed[r * words + c / per_word] >> c % per_word * s.bits & ((1u << s.bits) - 1));
                const int64_t g = r * groups + c / group;
                const int zero = (1 << (s.bits - 1)) + (s.symmetric ? 0 : zeros[g]);
                /* the sign of a zero says nothing */
                const uint16_t expected = naive_bits16((code - zero) * (double)scales[g], 8);
                assert_int_equal(code == zero ? out[r * COLS + c] & 0x7fff : out[r * COLS + c],
                                 code == zero ? 0 : expected);
            }
    }
}

/* --- descriptions ----------------------------------------------------------------------------------------------- */

static int read_text(struct quant_config *q, struct json_doc **doc, const char *text)
{
    assert_ok(json_parse(doc, text, strlen(text), "q"));
    return quant_config_read(q, json_root(*doc));
}

static void check_match(const struct quant_config *q, const char *module, int expected, struct quant_scheme s)
{
    struct quant_scheme found = {0};
    const int rc = quant_config_match(q, module, &found);
    if (rc != expected ||
        (rc == 1 && (found.bits != s.bits || found.symmetric != s.symmetric || found.group != s.group)))
        fail_msg("'%s': %d, %d bits, group %d", module, rc, found.bits, (int)found.group);
}

/* What is written of a description that was read is read as the same. */
static void check_again(const struct quant_config *q)
{
    struct text first = {.indent = 2}, second = {.indent = 2};
    struct quant_config back;
    struct json_doc *doc;
    quant_config_write(q, &first);
    assert_ok(text_finish(&first));
    assert_ok(read_text(&back, &doc, first.data));
    quant_config_write(&back, &second);
    assert_ok(text_finish(&second));
    assert_string_equal(first.data, second.data);
    quant_config_free(&back);
    json_free(doc);
    text_free(&first);
    text_free(&second);
}

static void test_auto_round_config(void **state)
{
    (void)state;
    struct quant_config q;
    struct json_doc *doc;
    const struct quant_scheme w4 = {4, true, 128}, w8 = {8, true, 0}, none = {0};
    assert_ok(
        read_text(&q, &doc,
                  "{\"quant_method\": \"auto-round\", \"bits\": 4, \"group_size\": 128, \"sym\": true, "
                  "\"data_type\": \"int\", \"packing_format\": \"auto_round:auto_gptq\", "
                  "\"block_name_to_quantize\": \"model.vision_tower.layers,model.language_model.layers\", "
                  "\"extra_config\": {"
                  "\"model.language_model.layers.0.mlp.up_proj\": {\"bits\": 16, \"data_type\": \"float\"}, "
                  "\"model.language_model.layers.1.mlp.up_proj\": {\"bits\": 8, \"group_size\": -1}, "
                  "\"layers\\\\.[2-3]\\\\.mlp\": {\"bits\": 16}}}"));
    assert_true(q.format == QUANT_AUTO_ROUND && q.layout == QUANT_TRANSPOSED && q.zero_bias == 1);
    assert_string_equal(q.block, "model.language_model.layers");
    /* on disk a model may have its levels in another order than in memory */
    check_match(&q, "language_model.model.layers.0.mlp.up_proj", 0, none);
    check_match(&q, "language_model.model.layers.1.mlp.up_proj", 1, w8);
    check_match(&q, "language_model.model.layers.2.mlp.up_proj", 0, none);
    check_match(&q, "language_model.model.layers.12.mlp.up_proj", 1, w4);
    check_match(&q, "model.layers.0.mlp.down_proj", 1, w4);
    check_again(&q);
    quant_config_free(&q);
    json_free(doc);
}

static void test_gptq_config(void **state)
{
    (void)state;
    struct quant_config q;
    struct json_doc *doc;
    const struct quant_scheme w4 = {4, false, 32}, w8 = {8, false, 64}, none = {0};
    assert_ok(read_text(
        &q, &doc,
        "{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 32, \"sym\": false, "
        "\"desc_act\": false, \"checkpoint_format\": \"gptq_v2\", \"lm_head\": false, "
        "\"modules_in_block_to_quantize\": [[\"mlp.up_proj\", \"mlp.gate_proj\"], \"mlp.down_proj\"], "
        "\"dynamic\": {\"-:.*layers\\\\.0\\\\..*\": {}, \"+:.*down\": {\"bits\": 8, \"group_size\": 64}}}"));
    assert_true(q.format == QUANT_GPTQ && q.layout == QUANT_TRANSPOSED && q.zero_bias == 0);
    check_match(&q, "model.layers.0.mlp.up_proj", 0, none);
    check_match(&q, "model.layers.1.mlp.up_proj", 1, w4);
    check_match(&q, "model.layers.1.mlp.down_proj", 1, w8);
    check_match(&q, "model.layers.1.self_attn.q_proj", 0, none); /* not in the list */
    check_again(&q);
    quant_config_free(&q);
    json_free(doc);
}

#define AUTO_ROUND(more) "{\"quant_method\": \"auto-round\", \"bits\": 4, \"group_size\": 128, " more "}"
#define GPTQ(more)       "{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 128, " more "}"

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {AUTO_ROUND("\"packing_format\": \"auto_round:fp8\""),
         "is 'auto_round:fp8', expected auto_round:auto_gptq"},
        {AUTO_ROUND("\"data_type\": \"mx_fp\""), "is mx_fp4, expected int4 or int8"},
        {AUTO_ROUND("\"act_bits\": 8"), "activations are quantized"},
        {AUTO_ROUND("\"block_name_to_quantize\": \"model.vision_tower.layers\""),
         "does not name the decoder blocks"},
        {AUTO_ROUND("\"block_name_to_quantize\": [[]]"), "is not a string"},
        {AUTO_ROUND("\"extra_config\": []"), "'extra_config' is not an object"},
        {AUTO_ROUND("\"extra_config\": {\"a.b\": 4}"), "'extra_config.a.b' is not an object"},
        {AUTO_ROUND("\"extra_config\": {\"a.b\": {\"bits\": 3}}"), "is int3"},
        {AUTO_ROUND(
             "\"packing_format\": \"auto_round:auto_awq\", \"extra_config\": {\"a.b\": {\"bits\": 8}}"),
         "has 8 bits in AWQ's packing"},
        {"{\"quant_method\": \"auto-round\", \"bits\": 4}", "has no member 'group_size'"},
        {"{\"quant_method\": \"auto-round\", \"group_size\": 4}", "has no member 'bits'"},
        {"{\"quant_method\": \"gptq\", \"bits\": 2, \"group_size\": 128}", "is int2, expected int4 or int8"},
        {"{\"quant_method\": \"gptq\", \"bits\": 16, \"group_size\": 128}", "is 16 or more"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 0}", "has group_size 0"},
        {GPTQ("\"checkpoint_format\": \"marlin\""),
         "has checkpoint_format 'marlin', expected gptq or gptq_v2"},
        {GPTQ("\"pack_dtype\": \"int64\""), "is 'int64', expected int32"},
        {GPTQ("\"dynamic\": []"), "'dynamic' is not an object"},
        {GPTQ("\"modules_in_block_to_quantize\": 3"), "is not a list"},
        {GPTQ("\"modules_in_block_to_quantize\": [[3]]"), "is not a string"},
    };
    for (size_t i = 0; i < N_OF(cases); i++) {
        struct quant_config q;
        struct json_doc *doc;
        assert_error(read_text(&q, &doc, cases[i].text), ERR_FORMAT, cases[i].message);
        json_free(doc);
    }
}

/* What a format has no place for. */
static void test_format_check(void **state)
{
    (void)state;
    const int64_t shape[2] = {64, 192}, odd[2] = {64, 144}, narrow[2] = {48, 192};
    const struct quant_scheme w4 = {4, true, 64}, asymmetric = {4, false, 64}, ragged = {4, true, 128},
                              channel = {8, true, 0};
    for (int f = 0; f < N_QUANT_FORMATS; f++) {
        const bool by_rows = f == QUANT_COMPRESSED_TENSORS;
        assert_ok(quant_format_check((enum quant_format)f, w4, "t", shape));
        assert_ok(quant_format_check((enum quant_format)f, channel, "t", shape));
        assert_error(quant_format_check((enum quant_format)f, ragged, "t", shape), ERR_UNSUPPORTED,
                     "has 192 columns, which groups of 128 do not divide");
        if (by_rows) {
            assert_ok(quant_format_check((enum quant_format)f, asymmetric, "t", shape));
            assert_ok(quant_format_check((enum quant_format)f, channel, "t", odd));
            continue;
        }
        assert_error(quant_format_check((enum quant_format)f, asymmetric, "t", shape), ERR_USAGE,
                     "is to have zero points");
        assert_error(quant_format_check((enum quant_format)f, channel, "t", odd), ERR_UNSUPPORTED,
                     "is 64 × 144");
        assert_error(quant_format_check((enum quant_format)f, channel, "t", narrow), ERR_UNSUPPORTED,
                     "is 48 × 192");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transpose),    cmocka_unit_test(test_zeros_by_hand),
        cmocka_unit_test(test_awq_by_hand),  cmocka_unit_test(test_scales),
        cmocka_unit_test(test_dequantize),   cmocka_unit_test(test_auto_round_config),
        cmocka_unit_test(test_gptq_config),  cmocka_unit_test(test_refused),
        cmocka_unit_test(test_format_check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

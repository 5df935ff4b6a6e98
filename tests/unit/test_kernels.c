/* The CPU's quantization kernels: exact cases by hand, the naive grid of naive.h over every kind of shape, and
 * vectors that compressed-tensors computed (tests/data/ct_vectors.json). */
#include "base/half.h"
#include "base/json.h"
#include "tests/unit/kernel_cases.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>

static struct backend cpu;

static int open_backend(void **state)
{
    (void)state;
    return backend_open(&cpu, "cpu", 1);
}

static int close_backend(void **state)
{
    (void)state;
    backend_close(&cpu);
    return 0;
}

/* --- exact cases ---------------------------------------------------------------------------------------------- */

struct exact {
    float w[4];
    enum scale_rule rule;
    bool positive_only, symmetric;
    float scale;
    int zero;
    uint32_t word; /* code + 8 of column 0 in the lowest nibble */
    float restored[4];
};

static const struct exact exact_cases[] = {
    /* the larger side maps to −8 */
    {{-8, -1, 2, 7}, SCALE_RANGE, false, true, 1, 0, 0xfa70, {-8, -1, 2, 7}},
    {{8, 1, -2, -7}, SCALE_RANGE, false, true, -1, 0, 0xfa70, {8, 1, -2, -7}},
    /* 0.5, 1.5, 2.5 steps go to the even code: 0, 2, 2 */
    {{-4, 0.25f, 0.75f, 1.25f}, SCALE_RANGE, false, true, 0.5f, 0, 0xaa80, {-4, 0, 1, 1}},
    {{-4, -0.25f, -0.75f, -1.25f}, SCALE_RANGE, false, true, 0.5f, 0, 0x6680, {-4, 0, -1, -1}},
    /* a tie of both sides takes the negative one */
    {{-8, 8, 0, 4}, SCALE_RANGE, false, true, 1, 0, 0xc8f0, {-8, 7, 0, 4}},
    {{0, 0, 0, 0}, SCALE_RANGE, false, true, 0.0078125f, 0, 0x8888, {0, 0, 0, 0}},
    /* absmax: 7.5 is clamped to 7, −7.5 goes to −8 */
    {{7.5f, -7.5f, 0.5f, 1.5f}, SCALE_ABSMAX, false, true, 1, 0, 0xa80f, {7, -8, 0, 2}},
    /* positive scales: hi / 7.5 outweighs lo / −8 */
    {{7.5f, -4, 0.5f, 1.5f}, SCALE_RANGE, true, true, 1, 0, 0xa84f, {7, -4, 0, 2}},
    {{-8, 7, 0.5f, 1.5f}, SCALE_RANGE, true, true, 1, 0, 0xa8f0, {-8, 7, 0, 2}},
    /* the scale is rounded to BF16 before the weights: 1/7.5 = 0.13333… → 0x3e09 = 0.1337890625 */
    {{1, 0.4f, -0.4f, 0.2f},
     SCALE_ABSMAX,
     false,
     true,
     0.1337890625f,
     0,
     0x95bf,
     {0.9375f, 0.40234375f, -0.40234375f, 0.1337890625f}},
    {{0, 5, 10, 15}, SCALE_RANGE, false, false, 1, -8, 0xfa50, {0, 5, 10, 15}},
    {{-3, 0, 4.5f, 12}, SCALE_RANGE, false, false, 1, -5, 0xf830, {-3, 0, 5, 12}},
    {{0, 0, 0, 0}, SCALE_RANGE, false, false, 0.0078125f, -8, 0, {0, 0, 0, 0}},
};

static void test_exact(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(exact_cases); i++) {
        const struct exact *e = &exact_cases[i];
        float weights[4], restored[4];
        uint32_t word = 0x5a5a5a5a;
        uint16_t scale;
        int8_t zero = 0;
        memcpy(weights, e->w, sizeof weights);
        const struct mat w = {weights, DTYPE_F32, 1, 4, 4}, out = {restored, DTYPE_F32, 1, 4, 4};
        struct qmat q = {.packed = {&word, DTYPE_I32, 1, 1, 1},
                         .scales = {&scale, DTYPE_BF16, 1, 1, 1},
                         .zeros = {e->symmetric ? NULL : &zero, DTYPE_I8, 1, 1, 1},
                         .bits = 4,
                         .group = 4,
                         .cols = 4};
        assert_ok(cpu.quant->find_scales(&cpu, &w, &(struct scale_spec){e->rule, e->positive_only}, &q));
        assert_ok(cpu.quant->quantize(&cpu, &w, &q));
        assert_ok(cpu.quant->dequantize(&cpu, &q, &out));
        if (half_from_bf16(scale) != e->scale || zero != e->zero || word != e->word)
            fail_msg("case %zu: scale %g zero %d word %08x, expected %g %d %08x", i,
                     (double)half_from_bf16(scale), zero, word, (double)e->scale, e->zero, e->word);
        for (int k = 0; k < 4; k++)
            if (!(restored[k] == e->restored[k]))
                fail_msg("case %zu: column %d gives %.9g, expected %.9g", i, k, (double)restored[k],
                         (double)e->restored[k]);
    }
}

/* --- against the naive grid ----------------------------------------------------------------------------------- */

static void load_group(const struct kernel_data *d, int64_t row, int64_t col, int64_t n, double *w)
{
    for (int64_t k = 0; k < n; k++)
        w[k] = naive_element(&d->weights, row, col + k);
}

static double scale_of(const struct kernel_data *d, int64_t row, int64_t g)
{
    return naive_value16(((const uint16_t *)d->q.scales.data)[row * d->q.scales.stride + g], 8);
}

static int zero_of(const struct kernel_data *d, int64_t row, int64_t g)
{
    return d->q.zeros.data ? ((const int8_t *)d->q.zeros.data)[row * d->q.zeros.stride + g] : 0;
}

/* The least error among the clipped extremes that docs/algorithms.md lists for mse, first pass. */
static double least_candidate(const double *w, int64_t n, const struct kernel_case *c)
{
    double low = 0, high = 0, least = INFINITY;
    for (int64_t i = 0; i < n; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    const double bottom = -ldexp(1, c->bits - 1), extreme = high > -low ? high : low;
    const struct naive_grid range = {SCALE_RANGE, c->spec.positive_only, c->symmetric, c->bits, n};
    for (int i = 0; i < 12; i++) {
        const double shrink = 1 - 0.03 * i, ends[2] = {low * shrink, high * shrink};
        double scale;
        int zero;
        naive_scale(ends, 2, &range, &scale, &zero);
        const double error = naive_error(w, n, scale, zero, c->bits);
        least = error < least ? error : least;
        if (!c->symmetric || c->spec.positive_only || extreme == 0)
            continue;
        scale = naive_bf16(extreme * shrink / (-bottom - 1));
        const double other = naive_error(w, n, scale, 0, c->bits);
        least = other < least ? other : least;
    }
    return least;
}

static void check_group(const struct kernel_case *c, const struct kernel_data *d, int64_t row, int64_t g)
{
    const int64_t col = g * d->q.group, n = d->q.group < c->cols - col ? d->q.group : c->cols - col;
    double w[8192], scale;
    int zero;
    load_group(d, row, col, n, w);
    const double got = scale_of(d, row, g);
    if (!(isfinite(got) && fabs(got) >= 0x1p-126))
        fail_msg("%s: row %d group %d: scale %g", kernel_case_text(c), (int)row, (int)g, got);
    if (c->spec.positive_only && !(got > 0))
        fail_msg("%s: row %d group %d: scale %g is not positive", kernel_case_text(c), (int)row, (int)g, got);
    if (c->spec.rule != SCALE_MSE) {
        const struct naive_grid grid = {c->spec.rule, c->spec.positive_only, c->symmetric, c->bits,
                                        d->q.group};
        naive_scale(w, n, &grid, &scale, &zero);
        if (!(got == scale) || zero_of(d, row, g) != zero)
            fail_msg("%s: row %d group %d: scale %.9g zero %d, expected %.9g %d", kernel_case_text(c),
                     (int)row, (int)g, got, zero_of(d, row, g), scale, zero);
        return;
    }
    /* subnormal and huge squares leave FP32, in which candidates are ranked */
    const double error = naive_error(w, n, got, zero_of(d, row, g), c->bits),
                 least = least_candidate(w, n, c);
    if (least > 1e-30 && least < 1e30 && !(error <= least * (1 + 1e-4)))
        fail_msg("%s: row %d group %d: error %.9g, a candidate has %.9g", kernel_case_text(c), (int)row,
                 (int)g, error, least);
    const struct naive_grid range = {SCALE_RANGE, c->spec.positive_only, c->symmetric, c->bits, d->q.group};
    naive_scale(w, n, &range, &scale, &zero);
    const double plain = naive_error(w, n, scale, zero, c->bits);
    if (!(error <= plain * (1 + 1e-5)))
        fail_msg("%s: row %d group %d: mse error %.9g, range has %.9g", kernel_case_text(c), (int)row, (int)g,
                 error, plain);
}

/* Codes and restored weights of one row, under the scales that the kernel found. */
static void check_row(const struct kernel_case *c, const struct kernel_data *d, int64_t row)
{
    int codes[8192];
    uint32_t words[8192];
    for (int64_t k = 0; k < c->cols; k++) {
        const double s = scale_of(d, row, k / d->q.group);
        const int zero = zero_of(d, row, k / d->q.group);
        codes[k] = naive_code(naive_element(&d->weights, row, k), s, zero, c->bits);
        const double restored = naive_bf16((codes[k] - zero) * s), got = naive_element(&d->restored, row, k);
        if (!(got == restored))
            fail_msg("%s: row %d column %d: %.9g, expected %.9g", kernel_case_text(c), (int)row, (int)k, got,
                     restored);
    }
    naive_pack(codes, c->cols, c->bits, words);
    const uint32_t *got = (const uint32_t *)d->q.packed.data + row * d->q.packed.stride;
    for (int64_t i = 0; i < d->q.packed.cols; i++)
        if (got[i] != words[i])
            fail_msg("%s: row %d word %d: %08x, expected %08x", kernel_case_text(c), (int)row, (int)i, got[i],
                     words[i]);
}

static void check_untouched(const struct kernel_case *c, const struct mat *m)
{
    const size_t size = dtype_bytes(m->dtype);
    for (int64_t r = 0; m->data && r < m->rows; r++)
        for (size_t i = 0; i < (size_t)(m->stride - m->cols) * size; i++)
            if (((const uint8_t *)m->data)[(size_t)(r * m->stride + m->cols) * size + i] != 0x5a)
                fail_msg("%s: row %d was written beyond its end", kernel_case_text(c), (int)r);
}

static void test_against_naive(void **state)
{
    (void)state;
    struct kernel_case c;
    for (size_t i = 0; kernel_case(i, &c); i++) {
        struct kernel_data d;
        kernel_data_make(&d, &c);
        assert_ok(cpu.quant->find_scales(&cpu, &d.weights, &c.spec, &d.q));
        assert_ok(cpu.quant->quantize(&cpu, &d.weights, &d.q));
        assert_ok(cpu.quant->dequantize(&cpu, &d.q, &d.restored));
        for (int64_t r = 0; r < c.rows; r++) {
            for (int64_t g = 0; g < d.q.scales.cols; g++)
                check_group(&c, &d, r, g);
            check_row(&c, &d, r);
        }
        check_untouched(&c, &d.weights);
        check_untouched(&c, &d.q.packed);
        check_untouched(&c, &d.q.scales);
        check_untouched(&c, &d.q.zeros);
        check_untouched(&c, &d.restored);
        kernel_data_free(&d);
    }
}

/* Any words are the codes of the weights that they stand for: quantize undoes dequantize. */
static void test_pack_undoes_unpack(void **state)
{
    (void)state;
    uint64_t seed = 7;
    for (int bits = 4; bits <= 8; bits += 4)
        for (int64_t cols = 1; cols < 300; cols += 7) {
            uint32_t words[300], again[300];
            uint16_t scales[16];
            float w[300];
            const int64_t n_words = (cols * bits + 31) / 32, groups = (cols + 31) / 32;
            struct qmat q = {.packed = {words, DTYPE_I32, 1, n_words, n_words},
                             .scales = {scales, DTYPE_BF16, 1, groups, groups},
                             .bits = bits,
                             .group = 32,
                             .cols = cols};
            const struct mat m = {w, DTYPE_F32, 1, cols, cols};
            for (int64_t i = 0; i < n_words; i++)
                words[i] = (uint32_t)support_random(&seed);
            const int64_t used = cols * bits % 32;
            if (used)
                words[n_words - 1] &= (1u << used) - 1;
            for (int64_t g = 0; g < groups; g++)
                scales[g] = naive_bits16(support_uniform(&seed), 8);
            assert_ok(cpu.quant->dequantize(&cpu, &q, &m));
            q.packed.data = again;
            assert_ok(cpu.quant->quantize(&cpu, &m, &q));
            assert_memory_equal(words, again, (size_t)n_words * 4);
        }
}

/* --- core operations ------------------------------------------------------------------------------------------ */

static void test_nonfinite(void **state)
{
    (void)state;
    static const uint16_t bf16_bad[] = {0x7f80, 0xff80, 0x7fc0, 0xffff},
                          f16_bad[] = {0x7c00, 0xfc00, 0x7e01, 0xfdff};
    static const int64_t places[] = {0, 5, 4095, 4096, 4500};
    uint16_t w[2 * 5000];
    for (int f16 = 0; f16 < 2; f16++)
        for (size_t bad = 0; bad < 4; bad++)
            for (size_t p = 0; p < N_OF(places); p++) {
                for (size_t i = 0; i < N_OF(w); i++)
                    w[i] = f16 ? 0x7bff : 0x7f7f; /* the greatest finite value */
                const struct mat m = {w, f16 ? DTYPE_F16 : DTYPE_BF16, 2, 4501, 5000};
                int64_t index, count;
                assert_ok(cpu.core->find_nonfinite(&cpu, &m, &index));
                assert_int_equal(index, -1);
                w[5000 + places[p]] = f16 ? f16_bad[bad] : bf16_bad[bad];
                w[4999] = 0x7fff; /* between the rows: not looked at */
                assert_ok(cpu.core->find_nonfinite(&cpu, &m, &index));
                assert_int_equal(index, 4501 + places[p]);
                assert_ok(cpu.core->zero_nonfinite(&cpu, &m, &count));
                assert_int_equal(count, 1);
                assert_int_equal(w[5000 + places[p]], 0);
                assert_int_equal(w[4999], 0x7fff);
            }
}

static void test_nonfinite_f32(void **state)
{
    (void)state;
    float w[40];
    for (size_t i = 0; i < N_OF(w); i++)
        w[i] = 3.4e38f;
    const struct mat m = {w, DTYPE_F32, 4, 10, 10};
    int64_t index, count;
    assert_ok(cpu.core->find_nonfinite(&cpu, &m, &index));
    assert_int_equal(index, -1);
    w[13] = -INFINITY;
    w[14] = NAN;
    w[39] = NAN;
    assert_ok(cpu.core->find_nonfinite(&cpu, &m, &index));
    assert_int_equal(index, 13);
    assert_ok(cpu.core->zero_nonfinite(&cpu, &m, &count));
    assert_int_equal(count, 3);
    assert_true(w[13] == 0 && w[14] == 0 && w[39] == 0 && w[12] == 3.4e38f);
}

/* Σ (a − b)² and Σ a² of columns [col, col + n) of a row, in double. */
static void naive_squares(const struct kernel_data *d, int64_t row, int64_t col, int64_t n, double out[2])
{
    out[0] = out[1] = 0;
    for (int64_t k = col; k < col + n; k++) {
        const double a = naive_element(&d->weights, row, k), b = naive_element(&d->restored, row, k);
        out[0] += (a - b) * (a - b);
        out[1] += a * a;
    }
}

/* FP32 lanes over at most 4096 / 16 terms each; what overflows FP32 may be infinite. */
static void check_squares(const double got[2], const double expected[2])
{
    for (int i = 0; i < 2; i++)
        if (!(fabs(got[i] - expected[i]) <= 2e-5 * expected[i] + 1e-30) && expected[i] < 1e38)
            fail_msg("sum %d is %.9g, expected %.9g", i, got[i], expected[i]);
}

static void make_restored(struct kernel_data *d, const struct kernel_case *c)
{
    kernel_data_make(d, c);
    assert_ok(cpu.quant->find_scales(&cpu, &d->weights, &c->spec, &d->q));
    assert_ok(cpu.quant->quantize(&cpu, &d->weights, &d->q));
    assert_ok(cpu.quant->dequantize(&cpu, &d->q, &d->restored));
}

static void test_squared_error(void **state)
{
    (void)state;
    struct kernel_case c = {.dtype = DTYPE_F32, .rows = 2, .bits = 4, .symmetric = true};
    static const int64_t widths[] = {1, 13, 100, 4096, 4100, 20000};
    for (size_t i = 0; i < N_OF(widths); i++) {
        struct kernel_data d;
        c.cols = widths[i];
        make_restored(&d, &c);
        double sums[2], expected[2] = {0}, row[2];
        assert_ok(cpu.core->squared_error(&cpu, &d.weights, &d.restored, sums));
        for (int64_t r = 0; r < c.rows; r++) {
            naive_squares(&d, r, 0, c.cols, row);
            expected[0] += row[0];
            expected[1] += row[1];
        }
        check_squares(sums, expected);
        kernel_data_free(&d);
    }
}

/* Groups that do and do not divide the width; pairs of different types; nothing beyond the last sum is written. */
static void test_group_squared_error(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 13, 100, 256, 4100, 10000},
                         groups[] = {1, 16, 24, 32, 100, 128, 5000, 20000};
    static const enum dtype dtypes[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
    for (size_t i = 0; i < N_OF(widths) * N_OF(groups) * N_OF(dtypes); i++) {
        const struct kernel_case c = {.dtype = dtypes[i % 3],
                                      .rows = 9,
                                      .cols = widths[i / 3 % N_OF(widths)],
                                      .bits = 4,
                                      .symmetric = true};
        const int64_t group = groups[i / 3 / N_OF(widths)], n = (c.cols + group - 1) / group;
        struct kernel_data d;
        make_restored(&d, &c);
        double *sums = malloc((size_t)(c.rows * n * 2 + 1) * sizeof *sums), expected[2];
        assert_non_null(sums);
        sums[c.rows * n * 2] = -1;
        assert_ok(cpu.core->group_squared_error(&cpu, &d.weights, &d.restored, group, sums));
        for (int64_t g = 0; g < c.rows * n; g++) {
            const int64_t col = g % n * group, width = c.cols - col < group ? c.cols - col : group;
            naive_squares(&d, g / n, col, width, expected);
            check_squares(sums + g * 2, expected);
        }
        assert_true(sums[c.rows * n * 2] == -1);
        free(sums);
        kernel_data_free(&d);
    }
}

static void test_refusals(void **state)
{
    (void)state;
    int32_t ints[4] = {0};
    uint16_t scale = 0x3f80;
    uint32_t word;
    float w[4] = {0};
    const struct mat bad = {ints, DTYPE_I32, 1, 4, 4}, good = {w, DTYPE_F32, 1, 4, 4};
    struct qmat q = {.packed = {&word, DTYPE_I32, 1, 1, 1},
                     .scales = {&scale, DTYPE_BF16, 1, 1, 1},
                     .bits = 4,
                     .group = 4,
                     .cols = 4};
    int64_t index;
    struct backend none;
    assert_error(cpu.quant->quantize(&cpu, &bad, &q), ERR_UNSUPPORTED, "quantize: dtype I32");
    assert_error(cpu.quant->dequantize(&cpu, &q, &bad), ERR_UNSUPPORTED, "dequantize: to I32");
    assert_error(cpu.core->find_nonfinite(&cpu, &bad, &index), ERR_UNSUPPORTED, "find_nonfinite: dtype I32");
    assert_error(cpu.core->zero_nonfinite(&cpu, &bad, &index), ERR_UNSUPPORTED, "zero_nonfinite: dtype I32");
    double sums[2];
    assert_error(cpu.core->squared_error(&cpu, &good, &bad, sums), ERR_UNSUPPORTED,
                 "squared_error: dtype I32");
    assert_error(cpu.core->group_squared_error(&cpu, &bad, &good, 4, sums), ERR_UNSUPPORTED,
                 "squared_error: dtype I32");
    q.group = 3;
    q.scales.cols = 2;
    assert_error(cpu.quant->quantize(&cpu, &good, &q), ERR_UNSUPPORTED, "groups of 3 columns");
    q.group = 4;
    q.scales.cols = 1;
    q.bits = 3;
    assert_error(cpu.quant->quantize(&cpu, &good, &q), ERR_UNSUPPORTED, "3 bits");
    assert_error(backend_open(&none, "abacus", 1), ERR_UNSUPPORTED, "abacus");
}

/* --- vectors of compressed-tensors ---------------------------------------------------------------------------- */

static size_t numbers(struct json list, double *out, size_t max)
{
    size_t n = 0;
    for (struct json e = json_first(list); e.node; e = json_next(e)) {
        assert_true(n < max);
        assert_ok(json_as_double(e, &out[n++]));
    }
    return n;
}

static int64_t integer(struct json obj, const char *key)
{
    int64_t v;
    assert_ok(json_get_int(obj, key, 0, 1 << 20, &v));
    return v;
}

/* Integers as weights under a scale of 1 are their own codes. */
static void check_ct_pack(struct json v)
{
    const int64_t rows = integer(v, "rows"), cols = integer(v, "cols");
    const int bits = (int)integer(v, "bits");
    double values[4096], words[4096];
    float w[4096];
    uint32_t packed[4096], column[4096];
    uint16_t scales[64];
    int codes[4096];
    assert_int_equal(numbers(json_member(v, "values"), values, N_OF(values)), rows * cols);
    const size_t n = numbers(json_member(v, "packed"), words, N_OF(words));
    const int64_t per_row = (cols * bits + 31) / 32, per_column = (rows * bits + 31) / 32;
    const bool along_rows = json_exists(json_member(v, "dim0"));
    assert_int_equal(n, along_rows ? per_column * cols : rows * per_row);
    for (int64_t i = 0; i < rows * cols; i++)
        w[i] = (float)values[i];
    for (int64_t i = 0; i < rows; i++)
        scales[i] = 0x3f80;
    const struct mat m = {w, DTYPE_F32, rows, cols, cols};
    struct qmat q = {.packed = {packed, DTYPE_I32, rows, per_row, per_row},
                     .scales = {scales, DTYPE_BF16, rows, 1, 1},
                     .bits = bits,
                     .group = cols,
                     .cols = cols};
    if (!along_rows) {
        assert_ok(cpu.quant->quantize(&cpu, &m, &q));
    } else { /* zero points: test_cut holds the writer against naive_pack */
        for (int64_t c = 0; c < cols; c++) {
            for (int64_t r = 0; r < rows; r++)
                codes[r] = (int)values[r * cols + c];
            naive_pack(codes, rows, bits, column);
            for (int64_t r = 0; r < per_column; r++)
                packed[r * cols + c] = column[r];
        }
    }
    for (size_t i = 0; i < n; i++)
        assert_int_equal(packed[i], (uint32_t)(int32_t)words[i]);
}

/* Scales and codes that compressed-tensors gives to BF16 weights: `absmax`, and asymmetric. */
static void check_ct_grid(struct json v)
{
    const int64_t rows = integer(v, "rows"), cols = integer(v, "cols"), group = integer(v, "group");
    const int bits = (int)integer(v, "bits");
    const int64_t groups = cols / group, per_row = cols * bits / 32;
    double bits_of_w[4096], scale_bits[256], zeros[256], words[4096];
    uint16_t w[4096], scales[256];
    uint32_t packed[4096];
    int8_t zero[256];
    const bool symmetric = !json_exists(json_member(v, "zeros"));
    assert_int_equal(numbers(json_member(v, "weights"), bits_of_w, N_OF(bits_of_w)), rows * cols);
    assert_int_equal(numbers(json_member(v, "scales"), scale_bits, N_OF(scale_bits)), rows * groups);
    assert_int_equal(numbers(json_member(v, "packed"), words, N_OF(words)), rows * per_row);
    if (!symmetric)
        assert_int_equal(numbers(json_member(v, "zeros"), zeros, N_OF(zeros)), rows * groups);
    for (int64_t i = 0; i < rows * cols; i++)
        w[i] = (uint16_t)bits_of_w[i];
    const struct mat m = {w, DTYPE_BF16, rows, cols, cols};
    struct qmat q = {.packed = {packed, DTYPE_I32, rows, per_row, per_row},
                     .scales = {scales, DTYPE_BF16, rows, groups, groups},
                     .zeros = {symmetric ? NULL : zero, DTYPE_I8, rows, groups, groups},
                     .bits = bits,
                     .group = group,
                     .cols = cols};
    assert_ok(cpu.quant->find_scales(&cpu, &m, &(struct scale_spec){SCALE_ABSMAX, false}, &q));
    assert_ok(cpu.quant->quantize(&cpu, &m, &q));
    for (int64_t i = 0; i < rows * groups; i++) {
        assert_int_equal(scales[i], (uint16_t)scale_bits[i]);
        if (!symmetric)
            assert_int_equal(zero[i], (int)zeros[i]);
    }
    for (int64_t i = 0; i < rows * per_row; i++)
        assert_int_equal(packed[i], (uint32_t)(int32_t)words[i]);
}

static void test_compressed_tensors(void **state)
{
    (void)state;
    struct json_doc *doc;
    struct json list;
    assert_ok(json_load(&doc, GEMCUT_SOURCE_DIR "/tests/data/ct_vectors.json", 1 << 20));
    assert_ok(json_get_array(json_root(doc), "pack", &list));
    assert_true(json_count(list) >= 6);
    for (struct json v = json_first(list); v.node; v = json_next(v))
        check_ct_pack(v);
    assert_ok(json_get_array(json_root(doc), "grid", &list));
    assert_true(json_count(list) >= 3);
    for (struct json v = json_first(list); v.node; v = json_next(v))
        check_ct_grid(v);
    json_free(doc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_against_naive),
        cmocka_unit_test(test_pack_undoes_unpack),
        cmocka_unit_test(test_nonfinite),
        cmocka_unit_test(test_nonfinite_f32),
        cmocka_unit_test(test_squared_error),
        cmocka_unit_test(test_group_squared_error),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_compressed_tensors),
    };
    return cmocka_run_group_tests(tests, open_backend, close_backend);
}

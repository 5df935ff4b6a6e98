/* The operations that place codes, against the description in kernels/backend.h in double: an operation's own code decides
 * only where the target lies as good as halfway between two. Each case runs with one, two and three threads, which must
 * give the same bytes. */
#include "tests/unit/kernel_cases.h"
#include "tests/unit/naive.h"
#include "base/half.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

static const double closest_tie = 1e-5; /* steps */

/* --- round_codes and pack_codes --------------------------------------------------------------------------------- */

static int run_round(const struct backend *b, const void *args)
{
    return b->quant->round_codes(b, args);
}

struct pack_args {
    const struct mat *codes;
    const struct qmat *q;
};

static int run_pack(const struct backend *b, const void *args)
{
    const struct pack_args *a = args;
    return b->quant->pack_codes(b, a->codes, a->q);
}

/* The very words that quantize writes. */
static void check_like_quantize(const struct kernel_case *c)
{
    struct kernel_data d;
    kernel_data_make(&d, c);
    assert_ok(cpu[0].quant->find_scales(&cpu[0], &d.weights, &c->spec, &d.q));
    assert_ok(cpu[0].quant->quantize(&cpu[0], &d.weights, &d.q));
    struct qmat q = d.q;
    q.packed = make(DTYPE_I32, c->rows, d.q.packed.cols);
    const struct mat codes = make(DTYPE_I8, c->rows, c->cols);
    const struct rounding r = {&d.weights, &q, &codes};
    const struct pack_args pack = {&codes, &q};
    const struct mat *const out_codes = &codes, *const out_packed = &q.packed;
    run_alike(run_round, &r, &out_codes, 1, kernel_case_text(c));
    run_alike(run_pack, &pack, &out_packed, 1, kernel_case_text(c));
    for (int64_t row = 0; row < c->rows; row++)
        if (memcmp((const uint32_t *)q.packed.data + row * q.packed.stride,
                   (const uint32_t *)d.q.packed.data + row * d.q.packed.stride, (size_t)q.packed.cols * 4))
            fail_msg("%s: row %d is not as quantize writes it", kernel_case_text(c), (int)row);
    check_gaps(&codes, kernel_case_text(c));
    check_gaps(&q.packed, kernel_case_text(c));
    kernel_data_free(&d);
    free_matrices();
}

static void test_round_and_pack(void **state)
{
    (void)state;
    struct kernel_case c;
    size_t n = 0;
    for (size_t i = 0; kernel_case(i, &c); i++) {
        /* q − zero of 8 bits has no room in a byte, and there is no such scheme */
        if ((c.bits == 8 && !c.symmetric) || c.spec.rule != SCALE_RANGE)
            continue;
        check_like_quantize(&c);
        n++;
    }
    print_message("round_codes, pack_codes: %zu cases, bit for bit as quantize\n", n);
}

/* Every code there is, in any place of a word. */
static void test_pack_every_code(void **state)
{
    (void)state;
    for (int bits = 4; bits <= 8; bits += 4)
        for (int64_t cols = 1; cols < 70; cols++) {
            const int half = 1 << (bits - 1);
            const struct qmat q = make_qmat(&(struct q_kind){bits, 32, false}, 2, cols);
            const struct mat codes = make(DTYPE_I8, 2, cols);
            int expected[70];
            uint32_t words[70];
            const struct pack_args pack = {&codes, &q};
            const struct mat *const out = &q.packed;
            for (int row = 0; row < 2; row++)
                for (int64_t c = 0; c < cols; c++)
                    ((int8_t *)codes.data)[row * codes.stride + c] =
                        (int8_t)((row * 37 + c * 11 + cols) % (2 * half) - half);
            run_alike(run_pack, &pack, &out, 1, "pack_codes");
            for (int row = 0; row < 2; row++) {
                for (int64_t c = 0; c < cols; c++)
                    expected[c] = ((const int8_t *)codes.data)[row * codes.stride + c];
                naive_pack(expected, cols, bits, words);
                assert_memory_equal((const uint32_t *)q.packed.data + row * q.packed.stride, words,
                                    (size_t)q.packed.cols * 4);
            }
            check_gaps(&q.packed, "pack_codes");
            free_matrices();
        }
}

/* --- residual --------------------------------------------------------------------------------------------------- */

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
static const struct q_kind kinds[] = {
    {4, 32, false}, {4, 128, true}, {4, 0, false}, {8, 64, false}, {8, 0, false}};

static const char *kind_text(const struct placed *p)
{
    static char text[120];
    snprintf(text, sizeof text, "%s %d × %d, %d bits%s, group %d", dtype_name(p->w.dtype), (int)p->w.rows,
             (int)p->w.cols, p->q.bits, p->q.zeros.data ? " asymmetric" : "", (int)p->q.group);
    return text;
}

struct residual_args {
    const struct rounding *r;
    const struct mat *out;
};

static int run_residual(const struct backend *b, const void *args)
{
    const struct residual_args *a = args;
    return b->quant->residual(b, a->r, a->out);
}

static void test_residual(void **state)
{
    (void)state;
    for (size_t t = 0; t < N_OF(float_types) * N_OF(kinds); t++) {
        struct placed p;
        make_placed(&p, float_types[t % N_OF(float_types)], &kinds[t / N_OF(float_types)], 7, 300);
        const struct mat out = make(DTYPE_F32, 7, 300), *const outs = &out;
        const struct residual_args args = {&p.r, &out};
        run_alike(run_residual, &args, &outs, 1, kind_text(&p));
        for (int64_t r = 0; r < 7; r++)
            for (int64_t c = 0; c < 300; c++)
                if (!(at(&out, r, c) == (float)(naive_element(&p.w, r, c) - restored_at(&p.r, r, c))))
                    fail_msg("%s: row %d column %d: %g", kind_text(&p), (int)r, (int)c,
                             (double)at(&out, r, c));
        check_gaps(&out, kind_text(&p));
        free_matrices();
    }
}

/* Scales as they are found clip nothing or next to it, so every other one is made smaller. */
static void test_count_clipped(void **state)
{
    (void)state;
    int64_t most = 0;
    for (size_t t = 0; t < N_OF(float_types) * N_OF(kinds); t++) {
        struct placed p;
        make_placed(&p, float_types[t % N_OF(float_types)], &kinds[t / N_OF(float_types)], 7, 300);
        uint16_t *scales = p.q.scales.data;
        for (int64_t r = 0; r < 7; r += 2)
            for (int64_t g = 0; g < p.q.scales.cols; g++)
                scales[r * p.q.scales.stride + g] =
                    half_to_bf16(half_from_bf16(scales[r * p.q.scales.stride + g]) * 0.6f);
        const int half = 1 << (p.q.bits - 1);
        int64_t expected = 0, count = -1;
        for (int64_t r = 0; r < 7; r++)
            for (int64_t c = 0; c < 300; c++) {
                const double t_c = naive_element(&p.w, r, c) / scale_at(&p.q, r, c) + zero_at(&p.q, r, c);
                expected += t_c < -half - 0.5 || t_c > half - 0.5;
            }
        assert_ok(cpu[0].quant->count_clipped(&cpu[0], &p.r, &count));
        assert_int_equal(count, expected);
        most = expected > most ? expected : most;
        free_matrices();
    }
    assert_true(most > 50);
}

/* --- sweep_block ------------------------------------------------------------------------------------------------ */

struct tally {
    size_t codes, ties;
};

/* True where `got` is the nearest code of t steps, ties to either side. */
static bool is_nearest(double t, int got, const struct qmat *q, int zero, struct tally *tally)
{
    const double half = ldexp(1, q->bits - 1);
    const int code = (int)nearbyint(fmin(fmax(t, -half - zero), half - 1 - zero));
    tally->codes++;
    if (got == code)
        return true;
    tally->ties++;
    return abs(got - code) == 1 && fabs(fabs(t - code) - 0.5) < closest_tie * fmax(1, fabs(t));
}

struct sweep_args {
    const struct rounding *r;
    const struct mat *order, *factor, *feedback, *errors;
    int64_t first;
};

static int run_sweep(const struct backend *b, const void *args)
{
    const struct sweep_args *a = args;
    return b->quant->sweep_block(b, a->r, a->order, a->factor, a->feedback, a->first, a->errors);
}

static void check_sweep_row(const struct placed *p, const struct sweep_args *a, int64_t row,
                            struct tally *tally)
{
    const int64_t n = a->errors->cols;
    double target[SWEEP_COLUMNS];
    for (int64_t k = 0; k < n; k++)
        target[k] = (double)at(a->feedback, row, a->first + k);
    for (int64_t k = 0; k < n; k++) {
        const int64_t col = ((const int32_t *)a->order->data)[a->first + k];
        const double w = naive_element(&p->w, row, col), t = (w + target[k]) / scale_at(&p->q, row, col),
                     e = (float)(w - restored_at(&p->r, row, col));
        if (!is_nearest(t, code_at(&p->r, row, col), &p->q, zero_at(&p->q, row, col), tally))
            fail_msg("sweep_block: %s: row %d column %d: code %d for a target of %.6f steps", kind_text(p),
                     (int)row, (int)col, code_at(&p->r, row, col), t);
        if (!((double)at(a->errors, row, k) == e))
            fail_msg("sweep_block: %s: row %d column %d: error %.9g, expected %.9g", kind_text(p), (int)row,
                     (int)col, (double)at(a->errors, row, k), e);
        for (int64_t later = k + 1; later < n; later++)
            target[later] += e * (double)at(a->factor, a->first + k, a->first + later);
    }
}

static struct mat make_order(int64_t cols)
{
    const struct mat order = make(DTYPE_I32, 1, cols);
    int32_t *place = order.data;
    for (int64_t i = 0; i < cols; i++) {
        const int64_t j = (int64_t)(support_random(&random_state) % (uint64_t)(i + 1));
        place[i] = place[j];
        place[j] = (int32_t)i;
    }
    return order;
}

/* Places [first, first + n); outside of them the codes stay, and of the factor and the feedback everything that must not be
 * read is NaN. */
static void check_sweep(const struct placed *p, int64_t first, int64_t n, struct tally *tally)
{
    const int64_t rows = p->w.rows, cols = p->w.cols;
    const struct mat order = make_order(cols), factor = make(DTYPE_F32, cols, cols),
                     feedback = make(DTYPE_F32, rows, cols), errors = make(DTYPE_F32, rows, n);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i + 1; j < n; j++)
            put(&factor, first + i, first + j, 0.5 * support_uniform(&random_state));
        for (int64_t r = 0; r < rows; r++)
            put(&feedback, r, first + i, 0.01 * support_uniform(&random_state));
    }
    memset(p->codes.data, 99, (size_t)(rows * p->codes.stride));
    const struct sweep_args args = {&p->r, &order, &factor, &feedback, &errors, first};
    const struct mat *const outs[] = {&errors, &p->codes, &feedback};
    const struct mat before = make(DTYPE_F32, rows, cols);
    copy(&feedback, &before);
    run_alike(run_sweep, &args, outs, N_OF(outs), kind_text(p));
    for (int64_t r = 0; r < rows; r++) {
        check_sweep_row(p, &args, r, tally);
        for (int64_t j = 0; j < cols; j++)
            if ((j < first || j >= first + n) && code_at(&p->r, r, ((const int32_t *)order.data)[j]) != 99)
                fail_msg("sweep_block: %s: place %d was written", kind_text(p), (int)j);
    }
    assert_memory_equal(before.data, feedback.data, (size_t)(rows * before.stride) * sizeof(float));
    check_gaps(&errors, "sweep_block");
}

static const int64_t blocks[][2] = {{0, 128}, {128, 128}, {256, 44}, {17, 1}, {299, 1}, {100, 77}};

static void test_sweep_block(void **state)
{
    (void)state;
    struct tally tally = {0};
    for (size_t t = 0; t < N_OF(float_types) * N_OF(kinds); t++)
        for (size_t i = 0; i < N_OF(blocks); i++) {
            struct placed p;
            make_placed(&p, float_types[t % N_OF(float_types)], &kinds[t / N_OF(float_types)], 9, 300);
            check_sweep(&p, blocks[i][0], blocks[i][1], &tally);
            free_matrices();
        }
    print_message("sweep_block: %zu codes, %zu of them on the other side of a tie (within %.0e steps)\n",
                  tally.codes, tally.ties, closest_tie);
    assert_true(tally.ties * 1000 <= tally.codes);
}

/* --- descend_block ---------------------------------------------------------------------------------------------- */

struct descend_args {
    const struct rounding *r;
    const struct mat *h, *gradient, *feedback, *changes;
    int64_t first;
};

static int run_descend(const struct backend *b, const void *args)
{
    const struct descend_args *a = args;
    return b->quant->descend_block(b, a->r, a->h, a->gradient, a->feedback, a->first, a->changes);
}

/* A row's codes and scales before. */
struct before {
    const int8_t *codes;
    const uint16_t *scales;
};

/* The scale of a group that the block holds, columns [from, to) of it: the least of the parabola, rounded, or what it was.
 * Takes its change off g. */
static void check_fit(const struct placed *p, const struct descend_args *a, const struct before *was,
                      int64_t row, int64_t from, int64_t to, double *g)
{
    const int64_t n = a->changes->cols;
    double ch[SWEEP_COLUMNS] = {0}, gain = 0, curvature = 0;
    for (int64_t k = from; k < to; k++) {
        const double c = was->codes[a->first + k];
        gain += g[k] * c;
        for (int64_t i = 0; i < n; i++)
            ch[i] += c * (double)at(a->h, a->first + k, a->first + i);
    }
    for (int64_t k = from; k < to; k++)
        curvature += ch[k] * was->codes[a->first + k];
    const double old = (double)half_from_bf16(was->scales[(a->first + from) / p->q.group]),
                 got = scale_at(&p->q, row, a->first + from), wish = old + gain / curvature, d = got - old;
    /* half a unit of BF16's last place, and a little for single precision */
    const bool rounded = fabs(got - wish) <= 0.00391 * fabs(wish) && d * (d * curvature - 2 * gain) < 0;
    if (got != old ? !rounded : fabs(wish - old) > 0.0079 * fabs(old) && wish * old > 0)
        fail_msg("descend_block: %s: row %d column %d: scale %.9g, before %.9g, wished %.9g", kind_text(p),
                 (int)row, (int)(a->first + from), got, old, wish);
    for (int64_t i = 0; i < n; i++)
        g[i] -= d * ch[i];
}

static void check_descend_row(const struct placed *p, const struct descend_args *a, const struct before *was,
                              int64_t row, struct tally *tally)
{
    const int64_t n = a->changes->cols, group = p->q.group;
    double g[SWEEP_COLUMNS];
    for (int64_t k = 0; k < n; k++)
        g[k] = (double)at(a->gradient, row, a->first + k) + (double)at(a->feedback, row, k);
    for (int64_t k = 0; k < n; k++) {
        const int64_t col = a->first + k, end = col + group < p->w.cols ? col + group : p->w.cols;
        if (col % group == 0 && end <= a->first + n)
            check_fit(p, a, was, row, k, end - a->first, g);
        const double h = (double)at(a->h, col, col), s = scale_at(&p->q, row, col),
                     before = (double)half_from_bf16(was->scales[col / group]);
        const int old = was->codes[col], got = code_at(&p->r, row, col);
        const double change = naive_bf16(got * s) - naive_bf16(old * s), wish = old + g[k] / (h * s),
                     whole = naive_bf16(got * s) - naive_bf16(old * before);
        if (h == 0 ? got != old : !is_nearest(wish, got, &p->q, zero_at(&p->q, row, col), tally))
            fail_msg("descend_block: %s: row %d column %d: code %d, before %d, wished %.6f", kind_text(p),
                     (int)row, (int)col, got, old, wish);
        if (!(fabs(naive_element(a->changes, row, k) - whole) <= 0.00391 * fabs(whole) + 1e-6 * fabs(s)))
            fail_msg("descend_block: %s: row %d column %d: change %.9g, expected %.9g", kind_text(p),
                     (int)row, (int)col, naive_element(a->changes, row, k), whole);
        for (int64_t later = k + 1; later < n; later++)
            g[later] -= change * (double)at(a->h, col, a->first + later);
    }
}

/* (w − ŵ)·H of a row in double; -> (w − ŵ)·H·(w − ŵ)ᵀ */
static double row_error(const struct placed *p, const double *h, int64_t row, double *gradient)
{
    const int64_t cols = p->w.cols;
    double e[512], sum = 0;
    for (int64_t c = 0; c < cols; c++) {
        e[c] = naive_element(&p->w, row, c) - restored_at(&p->r, row, c);
        gradient[c] = 0;
    }
    for (int64_t i = 0; i < cols; i++)
        for (int64_t j = 0; j < cols; j++)
            gradient[j] += e[i] * h[i * cols + j];
    for (int64_t c = 0; c < cols; c++)
        sum += e[c] * gradient[c];
    return sum;
}

struct descent {
    double worst; /* rise of a row's error, as a share of it */
    double fell;  /* mean share of the error that was left */
    size_t rows;
    struct tally tally;
};

/* Codes that are the nearest, some of them moved by one; a few dead columns; gradient and feedback that add up to the true
 * gradient. */
static void check_descend(struct placed *p, const struct mat *h, int64_t first, int64_t n, struct descent *d)
{
    const int64_t rows = p->w.rows, cols = p->w.cols;
    const struct mat gradient = make(DTYPE_F32, rows, cols), feedback = make(DTYPE_F32, rows, n),
                     changes = make(DTYPE_BF16, rows, n), before = make(DTYPE_I8, rows, cols),
                     scales = make(DTYPE_BF16, rows, p->q.scales.cols);
    const double *weight = naive_rows(h);
    double *g = room((size_t)cols, sizeof *g), *errors = room((size_t)rows, sizeof *errors);
    for (int64_t r = 0; r < rows; r++) {
        errors[r] = row_error(p, weight, r, g);
        for (int64_t c = 0; c < cols; c++)
            put(&gradient, r, c, c < first || c >= first + n ? (double)NAN : g[c] * 0.75);
        for (int64_t k = 0; k < n; k++)
            put(&feedback, r, k, g[first + k] - (double)at(&gradient, r, first + k));
    }
    memcpy(before.data, p->codes.data, (size_t)(rows * before.stride));
    memcpy(scales.data, p->q.scales.data, (size_t)(rows * scales.stride) * sizeof(uint16_t));
    const struct descend_args args = {&p->r, h, &gradient, &feedback, &changes, first};
    const struct mat *const outs[] = {&changes, &p->codes, &p->q.scales, &feedback, &gradient};
    run_alike(run_descend, &args, outs, N_OF(outs), kind_text(p));
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *old = (const int8_t *)before.data + r * before.stride;
        check_descend_row(p, &args, &(struct before){old, (const uint16_t *)scales.data + r * scales.stride},
                          r, &d->tally);
        for (int64_t c = 0; c < cols; c++)
            if ((c < first || c >= first + n) && code_at(&p->r, r, c) != old[c])
                fail_msg("descend_block: %s: column %d was written", kind_text(p), (int)c);
        const double left = row_error(p, weight, r, g) / errors[r];
        d->worst = fmax(d->worst, left - 1);
        d->fell += left;
        d->rows++;
    }
    check_gaps(&changes, "descend_block");
    check_gaps(&p->codes, "descend_block");
}

static void move_some_codes(struct placed *p)
{
    for (int64_t r = 0; r < p->w.rows; r++)
        for (int64_t c = (int64_t)(support_random(&random_state) % 5); c < p->w.cols; c += 5) {
            int8_t *code = (int8_t *)p->codes.data + r * p->codes.stride + c;
            const int half = 1 << (p->q.bits - 1), zero = zero_at(&p->q, r, c);
            *code = (int8_t)(*code + zero < half - 1 ? *code + 1 : *code - 1);
        }
}

/* Scales that are powers of two, with which code·scale is exact in BF16. */
static void make_scales_exact(struct placed *p)
{
    for (int64_t r = 0; r < p->w.rows; r++)
        for (int64_t g = 0; g < p->q.scales.cols; g++) {
            int exponent;
            const double fraction = frexp(naive_element(&p->q.scales, r, g), &exponent);
            put(&p->q.scales, r, g, copysign(ldexp(1, exponent), fraction));
        }
}

static void run_descents(bool exact, struct descent *d)
{
    struct mat h;
    for (size_t t = 0; t < N_OF(float_types) * N_OF(kinds); t++)
        for (size_t i = 0; i < N_OF(blocks); i++) {
            struct placed p;
            const struct mat x = make_inputs(600, 300);
            for (int64_t row = 0; row < 600; row++)
                for (int64_t c = 3; c < 300; c += 50)
                    put(&x, row, c, 0);
            h = make_hessian(&x);
            make_placed(&p, float_types[t % N_OF(float_types)], &kinds[t / N_OF(float_types)], 6, 300);
            if (exact)
                make_scales_exact(&p);
            move_some_codes(&p);
            check_descend(&p, &h, blocks[i][0], blocks[i][1], d);
            free_matrices();
        }
}

static void test_descend_block(void **state)
{
    (void)state;
    struct descent exact = {0}, rounded = {0};
    run_descents(true, &exact);
    run_descents(false, &rounded);
    print_message(
        "descend_block: %zu codes, %zu of them on the other side of a tie; a row's error rises by %.1e at most "
        "where ŵ is exact (1e-6 allowed), by %.1e where it is rounded; %.2f and %.2f of it are left\n",
        exact.tally.codes + rounded.tally.codes, exact.tally.ties + rounded.tally.ties, exact.worst,
        rounded.worst, exact.fell / (double)exact.rows, rounded.fell / (double)rounded.rows);
    assert_true(exact.worst <= 1e-6);
    assert_true(rounded.worst <= 1e-3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_round_and_pack, clean_up),
        cmocka_unit_test_teardown(test_pack_every_code, clean_up),
        cmocka_unit_test_teardown(test_residual, clean_up),
        cmocka_unit_test_teardown(test_count_clipped, clean_up),
        cmocka_unit_test_teardown(test_sweep_block, clean_up),
        cmocka_unit_test_teardown(test_descend_block, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

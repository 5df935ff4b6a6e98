/* A device against the CPU: AutoRound's step. What a weight decides alone (its v, its code) is exact; where the sign of a
 * group's sum decides, the two may differ next to 0, because they add up in another order.
 *   test_cuda_tune [DEVICE]      default: cuda:0 */
#include "base/half.h"
#include "tests/cuda/parity.h"

#include <math.h>

enum { N_STEPS = 5 };

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

struct shape {
    int64_t rows, cols, group; /* group 0: a whole row */
    int64_t slack;             /* of all matrices of weights */
};

static const struct shape shapes[] = {
    {1, 1, 0, 0},      {3, 13, 0, 0},     {5, 100, 32, 0},   {7, 100, 32, 3},   {33, 256, 64, 0},
    {64, 640, 128, 0}, {37, 200, 128, 8}, {9, 700, 256, 0},  {9, 700, 256, 4},  {70, 384, 128, 1},
    {5, 520, 0, 0},    {6, 2560, 0, 0},   {6, 1001, 0, 0},   {17, 130, 48, 0},  {17, 132, 48, 0},
    {41, 96, 16, 0},   {12, 60, 0, 4},    {130, 640, 32, 0}, {5, 5376, 128, 0}, {3, 100, 10, 0}};

/* Everything of one tuning. */
struct subject {
    struct shape shape;
    int64_t group, groups; /* columns of a group, groups of a row */
    int bits;
    bool symmetric, started;
    struct twin w, v, start, low, high, scales, zeros, restored, codes, kept_scales, kept_zeros, gradient;
    struct tune_rates rates;
    int32_t *keep[N_SIDES];
};

/* What a step may write. */
enum { N_WRITTEN = 9 };
static void written(struct subject *s, struct twin *out[N_WRITTEN])
{
    struct twin *const all[N_WRITTEN] = {&s->v,    &s->codes,  &s->kept_scales, &s->kept_zeros, &s->low,
                                         &s->high, &s->scales, &s->zeros,       &s->restored};
    memcpy(out, all, sizeof all);
}

static const char *text_of(const struct subject *s)
{
    static char text[160];
    snprintf(text, sizeof text, "%s %d × %d to %s, %d bits%s%s, group %d, gaps of %d",
             dtype_name(s->w.initial.dtype), (int)s->shape.rows, (int)s->shape.cols,
             dtype_name(s->restored.initial.dtype), s->bits, s->symmetric ? "" : " asymmetric",
             s->started ? ", from scales" : "", (int)s->group, (int)s->shape.slack);
    return text;
}

static struct twin none(enum dtype dtype, int64_t rows, int64_t cols)
{
    return twin_of(&(struct mat){NULL, dtype, rows, cols, cols});
}

/* The device begins with what the CPU has now. */
static void level(struct twin *t)
{
    if (!t->initial.data)
        return;
    memcpy(t->initial.data, t->m[CPU].data, twin_bytes(t));
    twin_upload(t);
}

/* Weights with outliers, a group of zeros, one whose sides are equal; scales of either sign, some of them too small. */
static void fill_weight(struct subject *s)
{
    const struct shape *h = &s->shape;
    for (int64_t r = 0; r < h->rows; r++) {
        twin_put(&s->w, r, r * 7 % h->cols, r % 2 ? 0.3 : -0.25);
        for (int64_t c = 0; c < h->cols; c++)
            if (r == 2)
                twin_put(&s->w, r, c, 0);
            else if (r == 4)
                twin_put(&s->w, r, c, c % 2 ? 0.0625 : -0.0625);
    }
    twin_upload(&s->w);
    if (!s->started)
        return;
    for (int64_t r = 0; r < h->rows; r++)
        for (int64_t g = 0; g < s->groups; g++)
            twin_put(&s->start, r, g, naive_bf16((r + g) % 3 ? -0.013 : (r + g) % 5 ? 0.02 : 0.005));
    twin_upload(&s->start);
    if (s->symmetric)
        return;
    int8_t *zeros[] = {s->zeros.m[CPU].data, s->zeros.initial.data};
    for (int64_t r = 0; r < h->rows; r++)
        for (int64_t g = 0; g < s->groups; g++)
            for (int k = 0; k < 2; k++)
                zeros[k][r * s->zeros.initial.stride + g] = (int8_t)((r + 3 * g) % 7 - 3);
    twin_upload(&s->zeros);
}

static struct subject make_subject(const struct shape *h, size_t kind)
{
    struct subject s = {.shape = *h,
                        .group = h->group ? h->group : h->cols,
                        .bits = kind % 2 ? 8 : 4,
                        .symmetric = kind / 2 % 2,
                        .started = kind / 4 % 2,
                        .rates = {0.07f, 0.011f}};
    const int64_t rows = h->rows, cols = h->cols, n = (cols + s.group - 1) / s.group, slack = h->slack;
    s.groups = n;
    s.w = twin_random(float_types[kind / 8 % 3], rows, cols, slack, 0.1);
    s.v = twin_make(DTYPE_F32, rows, cols, slack);
    s.start = s.started ? twin_make(DTYPE_BF16, rows, n, 1) : none(DTYPE_BF16, rows, n);
    s.low = s.started ? none(DTYPE_F32, rows, n) : twin_make(DTYPE_F32, rows, n, 2);
    s.high = twin_make(DTYPE_F32, rows, n, 1);
    s.scales = twin_make(DTYPE_BF16, rows, n, 3);
    s.kept_scales = twin_make(DTYPE_BF16, rows, n, 1);
    s.zeros = s.symmetric ? none(DTYPE_I8, rows, n) : twin_make(DTYPE_I8, rows, n, 2);
    s.kept_zeros = s.symmetric ? none(DTYPE_I8, rows, n) : twin_make(DTYPE_I8, rows, n, 1);
    s.restored = twin_make(kind / 24 % 2 ? DTYPE_F32 : DTYPE_BF16, rows, cols, slack);
    s.codes = twin_make(DTYPE_I8, rows, cols, slack);
    s.gradient = twin_make(DTYPE_F32, rows, cols, slack);
    for (int on = 0; on < N_SIDES; on++)
        s.keep[on] = parity_memory((enum side)on, sizeof(int32_t));
    fill_weight(&s);
    return s;
}

/* --- running it ------------------------------------------------------------------------------------------------- */

static struct qmat grid_of(const struct subject *s, const struct twin *scales, const struct twin *zeros,
                           enum side on)
{
    const int64_t words = (s->shape.cols * s->bits + 31) / 32;
    return (struct qmat){.packed = {NULL, DTYPE_I32, s->shape.rows, words, words},
                         .scales = scales->m[on],
                         .zeros = zeros->m[on],
                         .bits = s->bits,
                         .group = s->group,
                         .cols = s->shape.cols};
}

/* codes: to begin from. gradient: with one. keep: −1 without, 0 or 1. */
struct call {
    const struct twin *codes;
    bool begin, gradient;
    int keep;
};

static void run(const struct subject *s, const struct call *c, enum side on)
{
    const struct backend *b = &side[on];
    const struct qmat q = grid_of(s, &s->scales, &s->zeros, on),
                      kept = grid_of(s, &s->kept_scales, &s->kept_zeros, on);
    const struct tuning t = {.w = &s->w.m[on],
                             .v = &s->v.m[on],
                             .start = s->started ? &s->start.m[on] : NULL,
                             .low = s->started ? NULL : &s->low.m[on],
                             .high = &s->high.m[on],
                             .lowest = 0.9f,
                             .highest = 1.02f,
                             .distance = 0.45f,
                             .q = &q,
                             .restored = &s->restored.m[on],
                             .codes = &s->codes.m[on],
                             .kept = &kept};
    if (c->begin) {
        assert_ok(b->train->tune_begin(b, &t, c->codes ? &c->codes->m[on] : NULL));
        return;
    }
    const int32_t keep = c->keep;
    assert_ok(b->core->upload(b, s->keep[on], &keep, sizeof keep));
    assert_ok(b->train->tune_step(b, &t, c->gradient ? &s->gradient.m[on] : NULL, &s->rates,
                                  c->keep < 0 ? NULL : s->keep[on]));
}

/* How many groups' factors are not the CPU's. */
struct agreement {
    size_t groups, differ;
};

/* −0 is 0: which of the two a clamp at 0 gives is nobody's choice. */
static bool same_element(const struct twin *t, const unsigned char *got, int64_t row, int64_t col)
{
    struct mat m = t->initial;
    m.data = (void *)got;
    const size_t size = dtype_bytes(m.dtype), at = (size_t)(row * m.stride + col) * size;
    return !memcmp(got + at, (const unsigned char *)t->m[CPU].data + at, size) ||
           (m.dtype != DTYPE_I8 && naive_element(&m, row, col) == naive_element(&t->m[CPU], row, col));
}

static float factor_at(const struct twin *t, const unsigned char *got, int64_t row, int64_t col)
{
    float x;
    memcpy(&x, got + (size_t)(row * t->initial.stride + col) * sizeof x, sizeof x);
    return x;
}

/* A factor that went the other way: not further than two steps. */
static bool factor_near(const struct subject *s, const struct twin *t, const unsigned char *got, int64_t row,
                        int64_t g)
{
    const float expected = ((const float *)t->m[CPU].data)[row * t->initial.stride + g];
    return fabsf(factor_at(t, got, row, g) - expected) <= 2.001f * s->rates.range;
}

/* got: by written(). Where a group's factors agree all must be equal; elsewhere what does not follow from them. */
static void compare(struct subject *s, unsigned char *const got[N_WRITTEN], const char *what,
                    struct agreement *a)
{
    static const char *const names[N_WRITTEN] = {"v",    "codes",  "kept scales", "kept zeros", "low",
                                                 "high", "scales", "zeros",       "restored"};
    enum { FREE = 4 }; /* the first that follows from factors */
    struct twin *all[N_WRITTEN];
    written(s, all);
    for (int64_t r = 0; r < s->shape.rows; r++)
        for (int64_t g = 0; g < s->groups; g++) {
            bool differs = false;
            for (int i = 4; i < 6; i++)
                if (all[i]->initial.data && !same_element(all[i], got[i], r, g)) {
                    differs = true;
                    if (!factor_near(s, all[i], got[i], r, g))
                        fail_msg("%s: %s: %s of row %d group %d is %g", text_of(s), what, names[i], (int)r,
                                 (int)g, (double)factor_at(all[i], got[i], r, g));
                }
            a->groups++;
            a->differ += differs;
            for (int i = 0; i < (differs ? FREE : N_WRITTEN); i++) {
                const bool by_group = i >= 2 && i < N_WRITTEN - 1;
                const int64_t first = by_group ? g : g * s->group;
                const int64_t end = by_group                           ? g + 1
                                    : first + s->group < s->shape.cols ? first + s->group
                                                                       : s->shape.cols;
                for (int64_t c = first; all[i]->initial.data && c < end; c++)
                    if (!same_element(all[i], got[i], r, c))
                        fail_msg("%s: %s: %s differ in row %d column %d", text_of(s), what, names[i], (int)r,
                                 (int)c);
            }
        }
}

/* What lies between rows is not touched. */
static void check_gaps(const struct subject *s, const struct twin *t, const unsigned char *got)
{
    const struct mat *m = &t->initial;
    const size_t size = dtype_bytes(m->dtype);
    for (int64_t r = 0; r < m->rows; r++)
        for (size_t i = (size_t)(r * m->stride + m->cols) * size; i < (size_t)((r + 1) * m->stride) * size;
             i++)
            if (got[i] != 0xff)
                fail_msg("%s: a gap behind row %d was written", text_of(s), (int)r);
}

/* Once on the CPU, twice on the device, all from the same state; then the device has the CPU's. */
static void check_call(struct subject *s, const struct call *c, const char *what, struct agreement *a)
{
    struct twin *all[N_WRITTEN];
    unsigned char *got[2][N_WRITTEN];
    written(s, all);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; round && i < N_WRITTEN; i++)
            if (all[i]->initial.data)
                twin_upload(all[i]);
        run(s, c, DEVICE);
        for (int i = 0; i < N_WRITTEN; i++) {
            got[round][i] = malloc(twin_bytes(all[i]) + 1);
            assert_non_null(got[round][i]);
            if (all[i]->initial.data)
                twin_download(all[i], got[round][i]);
        }
    }
    run(s, c, CPU);
    for (int i = 0; i < N_WRITTEN; i++) {
        if (all[i]->initial.data && memcmp(got[0][i], got[1][i], twin_bytes(all[i])))
            fail_msg("%s: %s: a second time it gives other bytes", text_of(s), what);
        if (all[i]->initial.data)
            check_gaps(s, all[i], got[0][i]);
    }
    compare(s, got[0], what, a);
    for (int i = 0; i < N_WRITTEN; i++) {
        level(all[i]);
        free(got[0][i]);
        free(got[1][i]);
    }
}

/* Gradients of every size, some of them 0. */
static void draw_gradient(struct subject *s)
{
    for (int64_t r = 0; r < s->shape.rows; r++)
        for (int64_t c = 0; c < s->shape.cols; c++)
            twin_put(&s->gradient, r, c,
                     (r + c) % 11 ? support_uniform(&random_state) * pow(10, (double)(c % 5) - 3) : 0);
    twin_upload(&s->gradient);
}

/* --- tests ------------------------------------------------------------------------------------------------------ */

static void run_steps(struct subject *s, struct agreement *a)
{
    static const char *const texts[N_STEPS] = {"step 1", "step 2", "step 3", "step 4", "step 5"};
    check_call(s, &(struct call){.keep = -1}, "the first iterate", a);
    for (int i = 0; i < N_STEPS; i++) {
        draw_gradient(s);
        check_call(s, &(struct call){.gradient = true, .keep = i % 3 - 1}, texts[i], a);
    }
    check_call(s, &(struct call){.keep = 1}, "the last iterate", a);
}

static void finish(const char *text, const struct agreement *a)
{
    print_message("%s: factors of %zu of %zu groups differ\n", text, a->differ, a->groups);
    assert_true(a->groups > 0 && (double)a->differ <= 1e-3 * (double)a->groups);
}

static void test_steps(void **state)
{
    (void)state;
    struct agreement a = {0, 0};
    for (size_t i = 0; i < N_OF(shapes) * 16; i++) {
        struct subject s = make_subject(&shapes[i / 16], i % 16 + 16 * (i / 16 % 3));
        check_call(&s, &(struct call){.begin = true}, "the start", &a);
        run_steps(&s, &a);
        parity_free();
    }
    finish("tune_step", &a);
}

/* Codes that are not always the nearest, at times far from it and at the ends. */
static void test_steps_from_codes(void **state)
{
    (void)state;
    struct agreement a = {0, 0};
    for (size_t i = 0; i < N_OF(shapes) * 4; i++) {
        struct subject s = make_subject(&shapes[i / 4], 4 + i % 4 + 8 * (i / 4 % 6));
        struct twin codes = twin_make(DTYPE_I8, s.shape.rows, s.shape.cols, s.shape.slack);
        const int half = 1 << (s.bits - 1);
        for (int64_t r = 0; r < s.shape.rows; r++)
            for (int64_t c = 0; c < s.shape.cols; c++) {
                const int64_t g = c / s.group;
                const int zero =
                    s.symmetric ? 0 : ((int8_t *)s.zeros.m[CPU].data)[r * s.zeros.initial.stride + g];
                const double t = naive_element(&s.w.initial, r, c) / naive_element(&s.start.initial, r, g);
                double code = rint(t) + ((r + c) % 5 ? 0 : (double)((r * 3 + c) % 7 - 3));
                code = fmin(fmax(code, -half - zero), half - 1 - zero);
                const int64_t at = r * codes.initial.stride + c;
                ((int8_t *)codes.m[CPU].data)[at] = ((int8_t *)codes.initial.data)[at] = (int8_t)code;
            }
        twin_upload(&codes);
        check_call(&s, &(struct call){.begin = true, .codes = &codes}, "the start", &a);
        run_steps(&s, &a);
        parity_free();
    }
    finish("tune_step from codes", &a);
}

/* The first iterate has the given codes. */
static void test_start_has_its_codes(void **state)
{
    (void)state;
    struct agreement a = {0, 0};
    struct subject s = make_subject(&(struct shape){64, 640, 128, 0}, 6);
    struct twin codes = twin_make(DTYPE_I8, 64, 640, 0);
    for (int64_t i = 0; i < 64 * 640; i++)
        ((int8_t *)codes.m[CPU].data)[i] = ((int8_t *)codes.initial.data)[i] = (int8_t)(i * 7 % 16 - 8);
    twin_upload(&codes);
    check_call(&s, &(struct call){.begin = true, .codes = &codes}, "the start", &a);
    check_call(&s, &(struct call){.keep = -1}, "the first iterate", &a);
    run(&s, &(struct call){.keep = 1}, DEVICE);
    int8_t *got = room(twin_bytes(&s.codes), 1);
    twin_download(&s.codes, got);
    assert_memory_equal(got, codes.initial.data, 64 * 640);
    finish("tune_begin", &a);
}

/* A NaN in the gradient moves nothing, and no NaN gets into v or the factors. */
static void test_nan_in_gradient(void **state)
{
    (void)state;
    struct agreement a = {0, 0};
    for (size_t kind = 0; kind < 8; kind++) {
        struct subject s = make_subject(&(struct shape){9, 256, 64, 0}, kind);
        check_call(&s, &(struct call){.begin = true}, "the start", &a);
        check_call(&s, &(struct call){.keep = -1}, "the first iterate", &a);
        draw_gradient(&s);
        for (int64_t r = 0; r < 9; r++)
            twin_put(&s.gradient, r, 17 * r, r % 3 ? NAN : INFINITY);
        twin_upload(&s.gradient);
        check_call(&s, &(struct call){.gradient = true, .keep = -1}, "a step", &a);
        for (int64_t r = 0; r < 9; r++) {
            for (int64_t c = 0; c < 256; c++)
                assert_true(isfinite(naive_element(&s.v.m[CPU], r, c)));
            for (int64_t g = 0; g < 4; g++)
                assert_true(isfinite(naive_element(&s.high.m[CPU], r, g)));
        }
        parity_free();
    }
    finish("tune_step with NaNs", &a);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_steps, parity_clean_up),
        cmocka_unit_test_teardown(test_steps_from_codes, parity_clean_up),
        cmocka_unit_test_teardown(test_start_has_its_codes, parity_clean_up),
        cmocka_unit_test_teardown(test_nan_in_gradient, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

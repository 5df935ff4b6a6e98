/* The start and the step of a tuning against the description in kernels/backend.h, an element at a time. What is defined
 * in FP32 is equal to the bit: v, codes, scales, zero points, restored weights. The factors of a group's range move by
 * signs of sums, whose order is free: where a sum is as good as 0, any sign will do. */
#include "tests/unit/naive.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

enum { ROWS = 9 };

/* --- a tuning with its memory ------------------------------------------------------------------------------------- */

struct kind {
    struct q_kind grid;
    int64_t cols;
    enum dtype weight, restored;
    bool with_start;
    double shrink; /* start: the found scales times it; below 1 weights are clipped */
    bool ends_clip;
};

struct tuned {
    struct mat w, v, start, low, high, restored, codes;
    struct qmat q, kept;
    struct tuning t; /* of the above */
};

/* Random weights; but of the first group of rows 0 to 3 all are 0, the two ends equal, none below 0, none above. */
static struct mat make_weight(const struct kind *k)
{
    const struct mat w = make_random(k->weight, ROWS, k->cols, 0.1);
    const int64_t end = k->grid.group ? k->grid.group : k->cols;
    put(&w, 1, 0, 0.125);
    put(&w, 1, end - 1, -0.125);
    for (int64_t c = 0; c < end; c++) {
        put(&w, 0, c, 0);
        put(&w, 2, c, fabs(naive_element(&w, 2, c)));
        put(&w, 3, c, -fabs(naive_element(&w, 3, c)));
    }
    return w;
}

static void make_tuned(struct tuned *u, const struct kind *k)
{
    *u = (struct tuned){.w = make_weight(k),
                        .v = make(DTYPE_F32, ROWS, k->cols),
                        .restored = make(k->restored, ROWS, k->cols),
                        .codes = make(DTYPE_I8, ROWS, k->cols),
                        .q = make_qmat(&k->grid, ROWS, k->cols),
                        .kept = make_qmat(&k->grid, ROWS, k->cols)};
    const int64_t groups = u->q.scales.cols;
    u->low = make(DTYPE_F32, ROWS, groups);
    u->high = make(DTYPE_F32, ROWS, groups);
    u->start = make(DTYPE_BF16, ROWS, groups);
    u->t = (struct tuning){.w = &u->w,
                           .v = &u->v,
                           .start = k->with_start ? &u->start : NULL,
                           .low = k->with_start ? NULL : &u->low,
                           .high = &u->high,
                           .lowest = 0.7f,
                           .highest = 1.1f,
                           .distance = k->shrink < 1 ? 0.3f : 0.45f,
                           .ends_clip = k->ends_clip,
                           .q = &u->q,
                           .restored = &u->restored,
                           .codes = &u->codes,
                           .kept = &u->kept};
    if (!k->with_start)
        return;
    struct qmat found = u->q;
    found.scales = u->start;
    assert_ok(cpu[0].quant->find_scales(&cpu[0], &u->w, &(struct scale_spec){SCALE_RANGE, false}, &found));
    for (int64_t i = 0; k->shrink < 1 && i < ROWS * groups; i++)
        put(&u->start, i / groups, i % groups, k->shrink * naive_element(&u->start, i / groups, i % groups));
}

/* What tune_begin and tune_step write. */
enum { N_OUTS = 9 };

static void outs_of(const struct tuned *u, const struct mat *outs[N_OUTS])
{
    const struct mat *const all[N_OUTS] = {&u->v,        &u->low,         &u->high,
                                           &u->q.scales, &u->q.zeros,     &u->restored,
                                           &u->codes,    &u->kept.scales, &u->kept.zeros};
    memcpy(outs, all, sizeof all);
}

static struct mat clone(const struct mat *m)
{
    struct mat out = *m;
    const size_t bytes = (size_t)(m->rows * m->stride) * dtype_bytes(m->dtype);
    if (m->data)
        memcpy(out.data = room(bytes, 1), m->data, bytes);
    return out;
}

/* The state as it is now, in memory of its own. */
static struct tuned clone_all(const struct tuned *u)
{
    struct tuned out = *u;
    out.v = clone(&u->v);
    out.low = clone(&u->low);
    out.high = clone(&u->high);
    out.q.scales = clone(&u->q.scales);
    out.q.zeros = clone(&u->q.zeros);
    out.codes = clone(&u->codes);
    out.kept.scales = clone(&u->kept.scales);
    out.kept.zeros = clone(&u->kept.zeros);
    return out;
}

struct step_args {
    const struct tuning *t;
    const struct mat *codes;    /* of tune_begin */
    const struct mat *gradient; /* of tune_step, as all that follows */
    struct tune_rates rates;
    const int32_t *keep;
};

static int run_begin(const struct backend *b, const void *args)
{
    const struct step_args *a = args;
    return b->train->tune_begin(b, a->t, a->codes);
}

static int run_step(const struct backend *b, const void *args)
{
    const struct step_args *a = args;
    return b->train->tune_step(b, a->t, a->gradient, &a->rates, a->keep);
}

static void run_all(const struct tuned *u, op_fn run, const struct step_args *a, const char *text)
{
    const struct mat *outs[N_OUTS];
    outs_of(u, outs);
    run_alike(run, a, outs, N_OUTS, text);
    for (int i = 0; i < N_OUTS; i++)
        check_gaps(outs[i], text);
}

static int int_at(const struct mat *m, int64_t row, int64_t col)
{
    return ((const int8_t *)m->data)[row * m->stride + col];
}

/* --- the step, once more ------------------------------------------------------------------------------------------- */

/* What the checks saw, lest they check nothing. */
static struct {
    size_t steps, weights, clipped, factors, near_zero;
} seen;

/* One group of a row as it was before a step. */
struct group {
    int64_t row, index, first, end;
    double scale;
    int zero, least, most; /* codes, the zero point taken off */
    double wmin, wmax;     /* 0 included */
};

static struct group group_of(const struct tuned *u, int64_t row, int64_t index)
{
    const struct qmat *q = &u->q;
    struct group g = {.row = row, .index = index, .first = index * q->group};
    g.end = g.first + q->group < q->cols ? g.first + q->group : q->cols;
    g.scale = naive_element(&q->scales, row, index);
    g.zero = zero_at(q, row, g.first);
    g.least = -(1 << (q->bits - 1)) - g.zero;
    g.most = (1 << (q->bits - 1)) - 1 - g.zero;
    for (int64_t c = g.first; c < g.end; c++) {
        g.wmin = fmin(g.wmin, naive_element(&u->w, row, c));
        g.wmax = fmax(g.wmax, naive_element(&u->w, row, c));
    }
    return g;
}

struct spot {
    double steps, code; /* w / scale, and its code */
    bool in_range;
};

static struct spot spot_of(const struct tuned *u, const struct group *g, int64_t col)
{
    struct spot s = {.steps = (double)(float)(naive_element(&u->w, g->row, col) / g->scale)};
    const double r = nearbyint((double)(float)(s.steps + (double)at(&u->v, g->row, col)));
    s.in_range = u->t.ends_clip ? r > g->least && r < g->most : r >= g->least && r <= g->most;
    s.code = r < g->least ? g->least : r > g->most ? g->most : r;
    return s;
}

static double sign(double x)
{
    return x > 0 ? 1 : x < 0 ? -1 : 0;
}

/* A derivative and the size of the terms that it is a sum of. */
struct sum {
    double value, size;
};

static struct sum times(struct sum a, double factor)
{
    return (struct sum){a.value * factor, a.size * fabs(factor)};
}

static struct sum plus(struct sum a, struct sum b)
{
    return (struct sum){a.value + b.value, a.size + b.size};
}

/* Of the loss by the scale, and by the zero point where there is one; checks v on the way. */
static void check_v(const struct tuned *before, const struct tuned *after, const struct group *g,
                    const struct step_args *a, struct sum by[2], const char *text)
{
    by[0] = by[1] = (struct sum){0, 0};
    for (int64_t c = g->first; c < g->end; c++) {
        const struct spot s = spot_of(before, g, c);
        const double gradient = (double)at(a->gradient, g->row, c);
        const float old = at(&before->v, g->row, c);
        const float v = s.in_range ? old - a->rates.v * (float)sign(gradient * g->scale) : old;
        if (at(&after->v, g->row, c) != v)
            fail_msg("%s: row %d column %d: v %.9g, expected %.9g", text, (int)g->row, (int)c,
                     (double)at(&after->v, g->row, c), (double)v);
        const struct sum term = {gradient, fabs(gradient)};
        by[0] = plus(by[0], times(term, s.in_range ? s.code - s.steps : s.code));
        by[1] = plus(by[1], times(term, s.in_range ? 0 : -g->scale));
        seen.weights++;
        seen.clipped += !s.in_range;
    }
}

static void check_factor(const struct mat *before, const struct mat *after, const struct group *g,
                         struct sum slope, const struct step_args *a, const char *text)
{
    const float old = at(before, g->row, g->index), got = at(after, g->row, g->index);
    const bool near_zero = fabs(slope.value) < 1e-5 * slope.size;
    bool good = false;
    for (int s = -1; s <= 1; s++) {
        float moved = old - a->rates.range * (float)s;
        moved = moved < a->t->lowest ? a->t->lowest : moved > a->t->highest ? a->t->highest : moved;
        good = good || (got == moved && (near_zero || s == (int)sign(slope.value)));
    }
    if (!good)
        fail_msg("%s: row %d group %d: factor %.9g from %.9g by %g of %g", text, (int)g->row, (int)g->index,
                 (double)got, (double)old, slope.value, slope.size);
    seen.factors++;
    seen.near_zero += near_zero;
}

static void check_factors(const struct tuned *before, const struct tuned *after, const struct group *g,
                          const struct step_args *a, const struct sum by[2], const char *text)
{
    struct sum dlow = {0, 0}, dhigh = {0, 0};
    const double low = (double)at(&before->low, g->row, g->index),
                 high = (double)at(&before->high, g->row, g->index);
    if (before->t.start) {
        dhigh = times(by[0], naive_element(&before->start, g->row, g->index));
    } else if (before->q.zeros.data) {
        /* scale = (wmax·high − wmin·low)/steps, zero = lowest code − wmin·low/scale */
        const double steps = g->most - g->least;
        const struct sum by_scale = plus(by[0], times(by[1], g->wmin * low / (g->scale * g->scale)));
        dlow = plus(times(by_scale, -g->wmin / steps), times(by[1], -g->wmin / g->scale));
        dhigh = times(by_scale, g->wmax / steps);
    } else {
        /* scale = −max(side, side)/2^(bits−1) or its negative where the lower side is the larger one */
        const float lower = (float)(-g->wmin * low), upper = (float)(g->wmax * high);
        if (lower >= upper)
            dlow = times(by[0], lower > upper ? -g->wmin : g->wmin);
        if (upper >= lower)
            dhigh = times(by[0], -g->wmax);
    }
    check_factor(&before->high, &after->high, g, dhigh, a, text);
    if (!before->t.start)
        check_factor(&before->low, &after->low, g, dlow, a, text);
}

/* The scale and zero point that follow from the factors as they are now. */
static double expected_scale(const struct tuned *u, const struct group *g, int *zero)
{
    const double half = 1 << (u->q.bits - 1), high_factor = (double)at(&u->high, g->row, g->index);
    *zero = g->zero;
    if (u->t.start)
        return naive_storable((float)(naive_element(&u->start, g->row, g->index) * high_factor));
    const double low = (double)(float)(g->wmin * (double)at(&u->low, g->row, g->index)),
                 high = (double)(float)(g->wmax * high_factor);
    *zero = 0;
    if (!u->q.zeros.data)
        return naive_storable(-low > high ? -low / half : -high / half);
    const double scale = naive_storable((float)((double)(float)(high - low) / (2 * half - 1))),
                 z = nearbyint((float)(-half - (double)(float)(low / scale)));
    *zero = (int)(z < -half ? -half : z > half - 1 ? half - 1 : z);
    return scale;
}

static void check_iterate(const struct tuned *after, const struct group *before, const char *text)
{
    const struct group g = group_of(after, before->row, before->index);
    int zero;
    const double scale = expected_scale(after, before, &zero);
    if (g.scale != scale || g.zero != zero)
        fail_msg("%s: row %d group %d: scale %g zero %d, expected %g and %d", text, (int)g.row, (int)g.index,
                 g.scale, g.zero, scale, zero);
    for (int64_t c = g.first; c < g.end; c++) {
        const double got = naive_element(&after->restored, g.row, c),
                     expected = naive_bf16(spot_of(after, &g, c).code * scale);
        if (got != expected)
            fail_msg("%s: row %d column %d: restored %g, expected %g", text, (int)g.row, (int)c, got,
                     expected);
    }
}

/* Kept is the iterate before the step; or what was kept stays. */
static void check_kept(const struct tuned *before, const struct tuned *after, const struct group *g,
                       bool keep, const char *text)
{
    for (int64_t c = g->first; c < g->end; c++) {
        const int expected = keep ? (int)spot_of(before, g, c).code : int_at(&before->codes, g->row, c);
        if (int_at(&after->codes, g->row, c) != expected)
            fail_msg("%s: row %d column %d: code %d, expected %d", text, (int)g->row, (int)c,
                     int_at(&after->codes, g->row, c), expected);
    }
    const struct qmat *q = keep ? &before->q : &before->kept;
    assert_memory_equal((uint16_t *)after->kept.scales.data + g->row * after->kept.scales.stride + g->index,
                        (uint16_t *)q->scales.data + g->row * q->scales.stride + g->index, 2);
    if (q->zeros.data)
        assert_int_equal(int_at(&after->kept.zeros, g->row, g->index), int_at(&q->zeros, g->row, g->index));
}

static void step_and_check(const struct tuned *u, const struct step_args *a, const char *text)
{
    const struct tuned before = clone_all(u);
    run_all(u, run_step, a, text);
    for (int64_t i = 0; i < ROWS * u->q.scales.cols; i++) {
        const struct group g = group_of(&before, i / u->q.scales.cols, i % u->q.scales.cols);
        struct sum by[2];
        check_kept(&before, u, &g, a->keep && *a->keep, text);
        if (a->gradient) {
            check_v(&before, u, &g, a, by, text);
            check_factors(&before, u, &g, a, by, text);
        } else {
            assert_memory_equal(u->v.data, before.v.data, (size_t)(ROWS * u->v.stride) * sizeof(float));
            assert_memory_equal(u->high.data, before.high.data,
                                (size_t)(ROWS * u->high.stride) * sizeof(float));
        }
        check_iterate(u, &g, text);
    }
    seen.steps++;
}

/* --- cases --------------------------------------------------------------------------------------------------------- */

enum { N_KINDS = 3 * 6 * 3, N_WITHOUT_START = 3 * 6 };

static struct kind kind_of(size_t i, char text[120])
{
    static const struct {
        int64_t group, cols;
    } groups[] = {{32, 96}, {128, 256}, {256, 512}, {0, 300}, {128, 300}, {32, 37}};
    static const enum dtype types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
    /* codes, zero point taken off, of 8 bits asymmetric would not fit their bytes; no scheme has it */
    const size_t form = i % 3, group = i / 3 % N_OF(groups), start = i / N_WITHOUT_START;
    const struct kind k = {{form == 1 ? 8 : 4, groups[group].group, form == 2},
                           groups[group].cols,
                           types[(i + i / 3) % 3],
                           i / 2 % 2 ? DTYPE_F32 : DTYPE_BF16,
                           start > 0,
                           start == 2 ? 0.45 : 1,
                           false};
    snprintf(text, 120, "%d bits, groups of %d in %d, %s, %s, start %d, shrink %g", k.grid.bits,
             (int)k.grid.group, (int)k.cols, k.grid.asymmetric ? "asymmetric" : "symmetric",
             dtype_name(k.weight), k.with_start, k.shrink);
    return k;
}

/* Gradients of any size; every seventh is 0, and so is all of a row. Of another one is NaN. */
static struct mat make_gradient(int64_t cols, bool with_nan)
{
    const struct mat g = make_random(DTYPE_F32, ROWS, cols, 1e-3);
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t c = 0; c < cols; c++)
            if ((r + c) % 7 == 0 || r == 5)
                put(&g, r, c, 0);
    if (with_nan)
        put(&g, 6, cols / 2, NAN);
    return g;
}

static void test_step(void **state)
{
    (void)state;
    static const int32_t keeps[] = {0, 1, 1, 0, 1};
    memset(&seen, 0, sizeof seen);
    for (size_t i = 0; i < N_KINDS * 2; i++) {
        struct tuned u;
        char text[120];
        struct kind k = kind_of(i / 2, text);
        k.ends_clip = i % 2;
        make_tuned(&u, &k);
        struct step_args a = {.t = &u.t, .rates = {0.11f, 0.07f}};
        run_all(&u, run_begin, &a, text);
        step_and_check(&u, &a, text); /* the first iterate */
        for (size_t s = 0; s < N_OF(keeps); s++) {
            const struct mat gradient = make_gradient(k.cols, s == 2);
            a.gradient = s == 3 ? NULL : &gradient;
            a.keep = s == 0 ? NULL : &keeps[s];
            step_and_check(&u, &a, text);
        }
        free_matrices();
    }
    print_message("tune_step: %zu steps equal to the bit, %zu weights of which %zu clipped, %zu factors; "
                  "%zu derivatives near 0, at most %zu allowed\n",
                  seen.steps, seen.weights, seen.clipped, seen.factors, seen.near_zero, seen.factors / 100);
    assert_true(seen.clipped > seen.weights / 100 && seen.near_zero <= seen.factors / 100);
}

/* --- the start ----------------------------------------------------------------------------------------------------- */

static void check_ones(const struct tuned *u)
{
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t g = 0; g < u->q.scales.cols; g++)
            assert_true(at(&u->high, r, g) == 1 && (u->t.start || at(&u->low, r, g) == 1));
}

/* Without codes nothing is moved: the first iterate is what rounding to nearest gives. It adds a zero point before it
 * rounds, so that of weights halfway between two codes either will do there. */
static void test_first_iterate(void **state)
{
    (void)state;
    size_t weights = 0, halfway = 0;
    for (size_t i = 0; i < N_KINDS; i++) {
        static const int32_t keep = 1;
        struct tuned u;
        char text[120];
        const struct kind k = kind_of(i, text);
        make_tuned(&u, &k);
        struct step_args a = {.t = &u.t};
        run_all(&u, run_begin, &a, text);
        check_ones(&u);
        run_all(&u, run_step, &a, text);
        a.keep = &keep;
        run_all(&u, run_step, &a, text);
        if (k.with_start)
            assert_memory_equal(u.q.scales.data, u.start.data, (size_t)(ROWS * u.start.stride) * 2);
        for (int64_t j = 0; j < ROWS * k.cols; j++) {
            const int64_t row = j / k.cols, col = j % k.cols;
            const double w = naive_element(&u.w, row, col), scale = scale_at(&u.q, row, col);
            const int zero = zero_at(&u.q, row, col), code = naive_code(w, scale, zero, k.grid.bits) - zero;
            const double beyond = fabs(w / scale - floor(w / scale) - 0.5);
            const bool either = zero && beyond < 1e-5;
            assert_true(at(&u.v, row, col) == 0);
            if (int_at(&u.codes, row, col) != code &&
                !(either && abs(int_at(&u.codes, row, col) - code) == 1))
                fail_msg("%s: row %d column %d: code %d, expected %d", text, (int)row, (int)col,
                         int_at(&u.codes, row, col), code);
            weights++;
            halfway += either;
        }
        free_matrices();
    }
    print_message("first iterates: %zu weights, %zu of them halfway with a zero point\n", weights, halfway);
}

/* v for a code: 0 where it is the nearest, else what brings w / start so close to it, on the weight's side. */
static float expected_v(const struct tuned *u, int64_t row, int64_t col, int code)
{
    const int half = 1 << (u->q.bits - 1), zero = zero_at(&u->q, row, col);
    const double scale = naive_element(&u->start, row, col / u->q.group),
                 steps = (float)(naive_element(&u->w, row, col) / scale),
                 nearest = fmin(fmax(nearbyint(steps), -half - zero), half - 1 - zero);
    return code == nearest ? 0
                           : (float)code + (code < nearest ? u->t.distance : -u->t.distance) - (float)steps;
}

/* Any codes, every third the nearest, come back as they were. */
static void test_codes_come_back(void **state)
{
    (void)state;
    for (size_t i = N_WITHOUT_START; i < N_KINDS; i++) {
        static const int32_t keep = 1;
        struct tuned u;
        char text[120];
        const struct kind k = kind_of(i, text);
        make_tuned(&u, &k);
        const struct mat codes = make(DTYPE_I8, ROWS, k.cols);
        for (int64_t j = 0; j < ROWS * k.cols; j++) {
            const int64_t row = j / k.cols, col = j % k.cols;
            const int zero = zero_at(&u.q, row, col), half = 1 << (k.grid.bits - 1);
            const int any = (int)(support_random(&random_state) % (uint64_t)(2 * half)) - half;
            const double w = naive_element(&u.w, row, col),
                         scale = naive_element(&u.start, row, col / u.q.group);
            ((int8_t *)codes.data)[row * codes.stride + col] =
                (int8_t)((j % 3 ? any : naive_code(w, scale, zero, k.grid.bits)) - zero);
        }
        struct step_args a = {.t = &u.t, .codes = &codes};
        run_all(&u, run_begin, &a, text);
        check_ones(&u);
        for (int64_t j = 0; j < ROWS * k.cols; j++) {
            const int64_t row = j / k.cols, col = j % k.cols;
            const float v = expected_v(&u, row, col, int_at(&codes, row, col));
            if (at(&u.v, row, col) != v)
                fail_msg("%s: row %d column %d: v %.9g, expected %.9g", text, (int)row, (int)col,
                         (double)at(&u.v, row, col), (double)v);
        }
        run_all(&u, run_step, &a, text);
        a.keep = &keep;
        run_all(&u, run_step, &a, text);
        assert_memory_equal(u.codes.data, codes.data, (size_t)(ROWS * codes.stride));
        free_matrices();
    }
}

/* --- a small problem ------------------------------------------------------------------------------------------------ */

enum { TOKENS = 96, COLS = 128, STEPS = 200 };

/* Σ ((w − ŵ)·x)² of the codes that were kept, in double. */
static double loss_of_kept(const struct tuned *u, const struct mat *x)
{
    double sum = 0;
    for (int64_t t = 0; t < x->rows; t++)
        for (int64_t r = 0; r < ROWS; r++) {
            double error = 0;
            for (int64_t c = 0; c < COLS; c++)
                error +=
                    (double)at(x, t, c) * (naive_element(&u->w, r, c) -
                                           naive_bf16(int_at(&u->codes, r, c) * scale_at(&u->kept, r, c)));
            sum += error * error;
        }
    return sum;
}

/* Steps by the gradients of (w − ŵ)·x, with everything that a block's tuning is made of. */
static void tune(const struct kind *k, const char *text)
{
    const struct backend *b = &cpu[1];
    struct tuned u;
    make_tuned(&u, k);
    const struct mat x = make_inputs(TOKENS, COLS), target = make(DTYPE_F32, TOKENS, ROWS),
                     y = make(DTYPE_F32, TOKENS, ROWS), gradient = make(DTYPE_F32, ROWS, COLS);
    double best = INFINITY, first = 0;
    int32_t improved = 0;
    assert_ok(b->core->gemm(b, &x, &u.w, &target));
    assert_ok(b->train->tune_begin(b, &u.t, NULL));
    assert_ok(b->train->tune_step(b, &u.t, NULL, NULL, NULL));
    for (int i = 0; i < STEPS; i++) {
        const float rate = 0.01f * (float)(STEPS - i) / STEPS;
        double loss = 0;
        assert_ok(b->core->gemm(b, &x, &u.restored, &y));
        assert_ok(b->train->error_backward(b, &y, &target, 2, &loss, &y));
        assert_ok(b->train->keep_best(b, &loss, &best, &improved));
        assert_ok(b->train->gemm_wgrad(b, &y, &x, false, &gradient));
        assert_ok(b->train->tune_step(b, &u.t, &gradient, &(struct tune_rates){rate, rate}, &improved));
        first = i ? first : loss;
    }
    const double kept = loss_of_kept(&u, &x);
    print_message("%s: error %.4g after %d steps, %.4g before; of what was kept %.4g\n", text, best, STEPS,
                  first, kept);
    assert_true(best < 0.9 * first && fabs(kept - best) < 1e-4 * best);
    free_matrices();
}

static void test_small_problem(void **state)
{
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        const enum dtype restored = i % 2 ? DTYPE_F32 : DTYPE_BF16;
        const struct kind k = {{4, 32, i % 2 == 1}, COLS, DTYPE_BF16, restored, i / 2 == 1, 1, false};
        tune(&k, i == 0   ? "symmetric"
                 : i == 1 ? "asymmetric"
                 : i == 2 ? "symmetric, with start"
                          : "asymmetric, with start");
    }
}

static void test_refused(void **state)
{
    (void)state;
    struct tuned u;
    make_tuned(&u, &(struct kind){{4, 32, false}, 64, DTYPE_BF16, DTYPE_BF16, false, 1, false});
    u.q.bits = 3;
    assert_error(cpu[0].train->tune_begin(&cpu[0], &u.t, NULL), ERR_UNSUPPORTED, "tune_begin: 3 bits");
    assert_error(cpu[0].train->tune_step(&cpu[0], &u.t, NULL, NULL, NULL), ERR_UNSUPPORTED,
                 "tune_step: 3 bits");
    u.q.bits = 4;
    u.w.dtype = DTYPE_I32;
    assert_error(cpu[0].train->tune_step(&cpu[0], &u.t, NULL, NULL, NULL), ERR_UNSUPPORTED, "tune_step");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_step, clean_up),
        cmocka_unit_test_teardown(test_first_iterate, clean_up),
        cmocka_unit_test_teardown(test_codes_come_back, clean_up),
        cmocka_unit_test_teardown(test_small_problem, clean_up),
        cmocka_unit_test_teardown(test_refused, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

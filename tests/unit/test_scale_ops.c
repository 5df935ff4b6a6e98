/* Scales under a Hessian, searched and in closed form, against a search and a solution in double. Each case runs with one,
 * two and three threads, which must give the same bytes. */
#include "tests/unit/naive.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

/* --- search_scales ---------------------------------------------------------------------------------------------- */

enum { MAX_CANDIDATES = 61, NEIGHBOURS = 6, MAX_GROUP = 512 };

struct grid {
    double scale;
    int zero;
};

struct search {
    double w[MAX_GROUP], weight[MAX_GROUP];
    const struct mat *h;
    int64_t col, n;
    const struct qmat *q;
    double low, high;
};

/* BF16, never zero and never subnormal. */
static double storable(double s)
{
    const double rounded = naive_bf16(s);
    return s == 0 ? 0.0078125 : fabs(rounded) < 0x1p-126 ? copysign(0x1p-126, s) : rounded;
}

/* Symmetric: the extreme over 5, 5.1 … 11 of eight steps (of 128 with 8 bits), either sign; asymmetric: both ends times 1,
 * 0.99 … 0.56. What is FP32 in the operation is rounded to it. */
static struct grid candidate(const struct search *s, int sign, int i)
{
    const double steps = ldexp(1, s->q->bits);
    if (!s->q->zeros.data) {
        const float ratio = (5 + 0.1f * (float)i) * (float)(steps / 16);
        return (struct grid){storable((float)(sign * fmax(-s->low, s->high) / (double)ratio)), 0};
    }
    const float shrink = 1 - 0.01f * (float)i, width = (float)(s->high - s->low) * shrink;
    const double scale = storable((float)((double)width / (steps - 1)));
    const double zero =
        nearbyint((float)(-steps / 2 - (double)(float)((double)((float)s->low * shrink) / scale)));
    return (struct grid){scale, (int)fmin(fmax(zero, -steps / 2), steps / 2 - 1)};
}

/* eHeᵀ, or Σ weight·e²; the search takes codes by a reciprocal. */
static double grid_error(const struct search *s, struct grid g, bool block)
{
    const double half = ldexp(1, s->q->bits - 1);
    const float inverse = (float)(1 / g.scale);
    double e[MAX_GROUP], sum = 0;
    for (int64_t i = 0; i < s->n; i++) {
        const double t = (float)s->w[i] * inverse;
        e[i] = nearbyint(fmin(fmax(t, -half - g.zero), half - 1 - g.zero)) * g.scale - s->w[i];
    }
    for (int64_t i = 0; i < s->n; i++) {
        double row = e[i] * s->weight[i];
        if (block) {
            row = 0;
            for (int64_t j = 0; j < s->n; j++)
                row += e[j] * (double)at(s->h, s->col + i, s->col + j);
        }
        sum += e[i] * row;
    }
    return sum;
}

static void load_search(struct search *s, const struct mat *w, int64_t row)
{
    double mean = 0;
    s->low = s->high = 0;
    for (int64_t i = 0; i < s->n; i++)
        mean += (double)at(s->h, s->col + i, s->col + i) / (double)s->n;
    for (int64_t i = 0; i < s->n; i++) {
        s->w[i] = naive_element(w, row, s->col + i);
        s->low = fmin(s->low, s->w[i]);
        s->high = fmax(s->high, s->w[i]);
        s->weight[i] = mean > 0 ? (double)at(s->h, s->col + i, s->col + i) + 1e-6 * mean : 1;
    }
}

struct search_result {
    double bound, best; /* what the search may come to at most; the least there is among candidates */
    bool known;         /* what it came to is a candidate */
};

/* For every sign the candidate of least diagonal error; with block, the one of least block error around those. Candidates
 * that are as good as the best to FP32 may have been taken for it. */
static struct search_result brute_force(const struct search *s, bool block, bool positive_only,
                                        struct grid got)
{
    const bool symmetric = !s->q->zeros.data;
    const int n = symmetric ? 61 : 45, n_signs = symmetric && !positive_only ? 2 : 1;
    struct search_result r = {.bound = INFINITY, .best = INFINITY};
    for (int sign = 0; sign < n_signs; sign++) {
        double plain[MAX_CANDIDATES], by_block[MAX_CANDIDATES], least = INFINITY, bound = 0;
        for (int i = 0; i < n; i++) {
            const struct grid g = candidate(s, sign ? -1 : 1, i);
            plain[i] = grid_error(s, g, false);
            by_block[i] = block ? grid_error(s, g, true) : plain[i];
            least = fmin(least, plain[i]);
            r.best = fmin(r.best, by_block[i]);
            r.known |= g.scale == got.scale && g.zero == got.zero;
        }
        for (int i = 0; i < n; i++) {
            if (!(plain[i] <= least * (1 + 1e-5)))
                continue;
            double around = by_block[i];
            for (int k = i - NEIGHBOURS; block && k <= i + NEIGHBOURS; k++)
                around = k < 0 || k >= n ? around : fmin(around, by_block[k]);
            bound = fmax(bound, around);
        }
        r.bound = fmin(r.bound, bound);
    }
    return r;
}

struct search_args {
    const struct mat *w, *h;
    struct search_spec spec;
    const struct qmat *q;
};

static int run_search(const struct backend *b, const void *args)
{
    const struct search_args *a = args;
    return b->quant->search_scales(b, a->w, a->h, &a->spec, a->q);
}

/* Rows of several kinds: both signs, one sign, zeros, an outlier, one group of zeros. */
static struct mat make_weights(enum dtype dtype, int64_t rows, int64_t cols)
{
    const struct mat w = make_random(dtype, rows, cols, 0.1);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const double v = naive_element(&w, r, c);
            const double kinds[] = {
                v, fabs(v), -fabs(v), 0, c % 29 == 7 ? 10 * v : v, c >= 32 && c < 64 ? 0 : v};
            put(&w, r, c, kinds[r % (int64_t)N_OF(kinds)]);
        }
    return w;
}

/* Columns that were never fed: some, and the whole of [64, 128). */
static struct mat make_holed_hessian(int64_t cols)
{
    const struct mat x = make_inputs(cols + 50, cols);
    for (int64_t t = 0; t < x.rows; t++)
        for (int64_t c = 0; c < cols; c++)
            if (c % 23 == 5 || (c >= 64 && c < 128))
                put(&x, t, c, 0);
    return make_hessian(&x);
}

static void check_search(struct outcome *o, const struct search_args *a, int64_t row, int64_t group)
{
    struct search s = {.h = a->h, .col = group * a->q->group, .q = a->q};
    s.n = a->w->cols - s.col < a->q->group ? a->w->cols - s.col : a->q->group;
    load_search(&s, a->w, row);
    const struct grid got = {scale_at(a->q, row, s.col), zero_at(a->q, row, s.col)};
    double fed = 0;
    for (int64_t i = 0; i < s.n; i++)
        fed += (double)at(a->h, s.col + i, s.col + i);
    const bool block = a->spec.block && s.n <= 128 && fed > 0;
    const struct search_result r = brute_force(&s, block, a->spec.positive_only, got);
    const double error = grid_error(&s, got, block);
    const char *kind = block ? "block" : "diagonal";
    if (!r.known || (a->spec.positive_only && !(got.scale > 0)))
        fail_msg("search_scales, %s: row %d group %d: scale %.9g, zero %d is no candidate", kind, (int)row,
                 (int)group, got.scale, got.zero);
    if (!(error <= r.bound * (1 + 1e-4) + 1e-30))
        fail_msg("search_scales, %s, group %d, %d bits: row %d group %d: error %.9g, %.9g is near the best",
                 kind, (int)a->q->group, a->q->bits, (int)row, (int)group, error, r.bound);
    if (s.low == 0 && s.high == 0)
        assert_true(got.scale == 0.0078125);
    else if (r.best > 0) /* what the search around the diagonal's best leaves to be had */
        o->worst += error / r.best - 1;
    o->cases++;
}

static void test_search_scales(void **state)
{
    (void)state;
    static const struct q_kind kinds[] = {{4, 32, false}, {4, 128, false}, {4, 0, false}, {8, 64, false},
                                          {4, 32, true},  {4, 128, true},  {4, 0, true}};
    /* worst: the sum of what each group's error is above that of the best candidate */
    struct outcome by[2] = {{"diagonal", 0, 0, 0}, {"block", 0, 0, 0}};
    const int64_t rows = 12, cols = 300;
    for (size_t k = 0; k < N_OF(kinds); k++)
        for (int variant = 0; variant < 12; variant++) {
            const bool block = variant % 2, positive = variant / 2 % 2;
            const struct mat w = make_weights(float_types[variant / 4], rows, cols),
                             h = make_holed_hessian(cols);
            const struct qmat q = make_qmat(&kinds[k], rows, cols);
            const struct search_args a = {&w, &h, {block, positive}, &q};
            const struct mat *const outs[] = {&q.scales, &q.zeros};
            run_alike(run_search, &a, outs, N_OF(outs), "search_scales");
            for (int64_t r = 0; r < rows; r++)
                for (int64_t g = 0; g < q.scales.cols; g++)
                    check_search(&by[block], &a, r, g);
            check_gaps(&q.scales, "search_scales");
            check_gaps(&q.zeros, "search_scales");
            free_matrices();
        }
    for (int i = 0; i < 2; i++)
        print_message(
            "search_scales by %s: %zu groups as the description says; on average %.1e above the best of all "
            "candidates\n",
            by[i].op, by[i].cases, by[i].worst / (double)by[i].cases);
}

/* --- solve_scales ----------------------------------------------------------------------------------------------- */

struct solve_args {
    const struct mat *a, *rhs;
    bool positive_only;
    const struct qmat *q;
    int64_t *n_kept;
};

static int run_solve(const struct backend *b, const void *args)
{
    const struct solve_args *a = args;
    *a->n_kept = -1;
    return b->quant->solve_scales(b, a->a, a->rhs, a->positive_only, a->q, a->n_kept);
}

/* Gauss's elimination of (A + ridge)·s = b; a: the upper triangle of [n, n]. */
static void naive_solve(const struct mat *a, const struct mat *rhs, int64_t row, double *s)
{
    const int64_t n = rhs->cols;
    double m[16][17], mean = 0;
    for (int64_t i = 0; i < n; i++)
        mean += (double)at(a, row, i * n + i) / (double)n;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++)
            m[i][j] = (double)at(a, row, i < j ? i * n + j : j * n + i);
        m[i][i] += 1e-6 * mean + 1e-12;
        m[i][n] = (double)at(rhs, row, i);
    }
    for (int64_t k = 0; k < n; k++)
        for (int64_t i = 0; i < n; i++) {
            const double f = m[i][k] / m[k][k];
            for (int64_t j = k; i != k && j <= n; j++)
                m[i][j] -= f * m[k][j];
        }
    for (int64_t i = 0; i < n; i++)
        s[i] = m[i][n] / m[i][i];
}

static double objective(const struct mat *a, const struct mat *rhs, int64_t row, const double *s)
{
    double sum = 0;
    for (int64_t i = 0; i < rhs->cols; i++) {
        sum -= 2 * s[i] * (double)at(rhs, row, i);
        for (int64_t j = 0; j < rhs->cols; j++)
            sum += s[i] * s[j] * (double)at(a, row, i < j ? i * rhs->cols + j : j * rhs->cols + i);
    }
    return sum;
}

/* Normal equations of random codes and inputs; truth: the scales that the targets were made with, so that the solution is
 * near them. Codes of group g of row r are all zero where (r + g) % 7 == 6; of a row of kind 3 all of them. */
static void make_normal(const struct qmat *q, struct mat *a, struct mat *rhs)
{
    const int64_t rows = q->scales.rows, n = q->scales.cols;
    *a = make(DTYPE_F32, rows, n * n);
    *rhs = make(DTYPE_F32, rows, n);
    for (int64_t r = 0; r < rows; r++) {
        enum { TERMS = 40 };
        double b[16] = {0}, sums[16][16] = {{0}};
        for (int t = 0; t < TERMS; t++) {
            double c[16], target = 0.05 * support_uniform(&random_state);
            for (int64_t g = 0; g < n; g++) {
                const bool empty = (r + g) % 7 == 6 || r % 5 == 3;
                c[g] = empty ? 0 : 8 * support_uniform(&random_state);
                /* truth: a bit off the scale, of the other sign in rows of kind 4 */
                target += c[g] * naive_element(&q->scales, r, g) * (r % 5 == 4 && g == 0 ? -0.9 : 1.1);
            }
            for (int64_t g = 0; g < n; g++) {
                b[g] += target * c[g];
                for (int64_t k = g; k < n; k++)
                    sums[g][k] += c[g] * c[k];
            }
        }
        for (int64_t g = 0; g < n; g++) {
            put(rhs, r, g, b[g]);
            for (int64_t k = g; k < n; k++)
                put(a, r, g * n + k, sums[g][k]);
        }
    }
}

/* -> whether the row got new scales, after asking that it is right about it */
static bool check_solution(const struct solve_args *s, const double *before, int64_t row, double *worst)
{
    const int64_t n = s->rhs->cols;
    double exact[16], stored[16], got[16];
    bool changed = false, usable = true;
    naive_solve(s->a, s->rhs, row, exact);
    for (int64_t g = 0; g < n; g++) {
        got[g] = naive_element(&s->q->scales, row, g);
        changed |= got[g] != before[g];
        stored[g] = at(s->a, row, g * n + g) > 0 ? storable(exact[g]) : before[g];
        usable = usable && (stored[g] > 0 || !s->positive_only);
    }
    const double f_before = objective(s->a, s->rhs, row, before), f_got = objective(s->a, s->rhs, row, got),
                 f_exact = objective(s->a, s->rhs, row, stored);
    if (!(f_got <= f_before))
        fail_msg("solve_scales: row %d: f rises from %.9g to %.9g", (int)row, f_before, f_got);
    if (changed != (usable && f_exact < f_before))
        fail_msg("solve_scales: row %d of %d groups: %s, f %.9g before, %.9g exact%s", (int)row, (int)n,
                 changed ? "changed" : "kept", f_before, f_exact, usable ? "" : ", not usable");
    for (int64_t g = 0; changed && g < n; g++) {
        const double off =
            fabs(got[g] - (at(s->a, row, g * n + g) > 0 ? exact[g] : before[g])) / fabs(got[g]);
        *worst = fmax(*worst, off);
        if (!(off <= 0x1p-8))
            fail_msg("solve_scales: row %d group %d: %.9g, expected %.9g", (int)row, (int)g, got[g],
                     exact[g]);
    }
    return changed;
}

static void test_solve_scales(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 2, 5, 16};
    double worst = 0;
    int64_t changed_rows = 0, rows_seen = 0;
    for (size_t i = 0; i < 2 * N_OF(widths); i++) {
        const int64_t n = widths[i / 2], rows = 20;
        const struct qmat q = make_packed(&(struct q_kind){4, 32, false}, rows, 32 * n);
        for (int64_t r = 0; i % 2 && r < rows; r++)
            for (int64_t g = 0; g < n; g++)
                put(&q.scales, r, g, fabs(naive_element(&q.scales, r, g)));
        struct mat a, rhs;
        make_normal(&q, &a, &rhs);
        const double *before = naive_rows(&q.scales);
        int64_t n_kept, expected = 0;
        const struct mat *const outs = &q.scales;
        const struct solve_args s = {&a, &rhs, i % 2, &q, &n_kept};
        const struct mat overwritten = make(DTYPE_F32, rows, n * n);
        copy(&a, &overwritten);
        run_alike(run_solve, &s, &outs, 1, "solve_scales");
        for (int64_t r = 0; r < rows; r++)
            expected += check_solution(&s, before + r * n, r, &worst);
        assert_int_equal(n_kept, expected);
        check_gaps(&q.scales, "solve_scales");
        changed_rows += n_kept;
        rows_seen += rows;
        copy(&overwritten, &a); /* what is best already stays */
        assert_ok(run_solve(&cpu[0], &s));
        assert_int_equal(n_kept, 0);
        free_matrices();
    }
    print_message(
        "solve_scales: %d of %d rows got new scales, at most %.1e from the double solution (3.9e-3: BF16)\n",
        (int)changed_rows, (int)rows_seen, worst);
}

/* Equations without a usable solution leave a row as it is. */
static void test_solve_hopeless(void **state)
{
    (void)state;
    static const double bad[] = {NAN, INFINITY, -1e6};
    for (size_t i = 0; i < N_OF(bad); i++)
        for (int where = 0; where < 2; where++) {
            const struct qmat q = make_packed(&(struct q_kind){4, 32, false}, 4, 96);
            struct mat a, rhs;
            make_normal(&q, &a, &rhs);
            const double *before = naive_rows(&q.scales);
            if (where && isfinite(bad[i]))
                continue;
            put(where ? &rhs : &a, 1, 0, bad[i]);
            int64_t n_kept;
            const struct solve_args s = {&a, &rhs, false, &q, &n_kept};
            assert_ok(run_solve(&cpu[0], &s));
            for (int64_t g = 0; g < 3; g++)
                if (!(naive_element(&q.scales, 1, g) == before[3 + g]))
                    fail_msg("solve_scales: %g: group %d went from %g to %g", bad[i], (int)g, before[3 + g],
                             naive_element(&q.scales, 1, g));
            free_matrices();
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_search_scales, clean_up),
        cmocka_unit_test_teardown(test_solve_scales, clean_up),
        cmocka_unit_test_teardown(test_solve_hopeless, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

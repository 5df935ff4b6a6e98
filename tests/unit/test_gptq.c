/* GPTQ against the paper's own formulation in double (Frantar et al. 2022, algorithm 1: the Cholesky factor of the
 * damped Hessian's inverse, column by column), and what must hold of any result: errors that are what the inputs say,
 * refinement that does not make them worse, bad Hessians that are survived or named, the same bytes every time. */
#include "quantize/gptq.h"
#include "tests/unit/naive.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

/* --- problems --------------------------------------------------------------------------------------------------- */

struct shape {
    int64_t rows, cols, group; /* group 0: a whole row */
    enum dtype dtype;
    int bits;
    bool asymmetric, natural;
    enum scale_rule scales;
};

struct problem {
    const struct shape *shape;
    struct mat x, h, w;
};

static const char *shape_text(const struct shape *s)
{
    static char text[160];
    static const char *const rules[] = {"range", "absmax", "mse", "weighted", "block"};
    snprintf(text, sizeof text, "%s %d × %d, %d bits%s, group %d, %s scales, %s order", dtype_name(s->dtype),
             (int)s->rows, (int)s->cols, s->bits, s->asymmetric ? " asymmetric" : "", (int)s->group,
             rules[s->scales], s->natural ? "natural" : "activation");
    return text;
}

static struct problem make_problem(const struct shape *s, int64_t tokens)
{
    struct problem p = {.shape = s, .x = make_inputs(tokens, s->cols)};
    p.h = make_hessian(&p.x);
    p.w = make_random(s->dtype, s->rows, s->cols, 0.1);
    return p;
}

static int64_t group_of(const struct shape *s)
{
    return s->group ? s->group : s->cols;
}

static struct qmat make_result(const struct shape *s)
{
    return make_qmat(&(struct q_kind){s->bits, s->group, s->asymmetric}, s->rows, s->cols);
}

static struct gptq_options options_of(const struct shape *s, int passes)
{
    return (struct gptq_options){.sweep = true,
                                 .natural_order = s->natural,
                                 .damping = 0.01,
                                 
                                 .passes = passes,
                                 .search = {.block = s->scales == SCALE_BLOCK},
                                 .scales = s->scales};
}

static struct mat copy_of(const struct mat *m)
{
    const struct mat copy = make_random(DTYPE_F32, m->rows, m->cols, 1);
    for (int64_t r = 0; r < m->rows; r++)
        memcpy((float *)copy.data + r * copy.stride, (const float *)m->data + r * m->stride,
               (size_t)m->cols * sizeof(float));
    return copy;
}

static int try(const struct backend *b, const struct problem *p, const struct gptq_options *o,
               const struct qmat *q, struct gptq_stats *stats)
{
    const struct gptq_size size = {p->w.rows, p->w.cols, q->group};
    struct gptq *g;
    assert_ok(gptq_open(&g, b, o, &size, 1, &(struct work_clock){0}));
    const struct mat h = copy_of(&p->h); /* which is damped in place */
    int rc = gptq_prepare(g, &h);
    if (!rc)
        rc = gptq_quantize(g, &p->w, q, &(struct gptq_parts){1, {p->w.rows}}, NULL, stats);
    gptq_close(g);
    return rc;
}

static struct gptq_stats solve(const struct problem *p, const struct gptq_options *o, const struct qmat *q)
{
    struct gptq_stats stats;
    assert_ok(try(&cpu[0], p, o, q, &stats));
    return stats;
}

/* --- reading a result ------------------------------------------------------------------------------------------- */

static double value_at(const struct qmat *q, int64_t row, int64_t col)
{
    return naive_bf16((packed_at(q, row, col) - zero_at(q, row, col)) * scale_at(q, row, col));
}

static void check_nearest(const struct problem *p, const struct qmat *q, int64_t col)
{
    for (int64_t r = 0; r < p->w.rows; r++) {
        const int expected =
            naive_code(naive_element(&p->w, r, col), scale_at(q, r, col), zero_at(q, r, col), q->bits);
        if (packed_at(q, r, col) != expected)
            fail_msg("%s: row %d column %d: code %d, the nearest is %d", shape_text(p->shape), (int)r,
                     (int)col, packed_at(q, r, col), expected);
    }
}

/* --- the paper's algorithm in double ---------------------------------------------------------------------------- */

/* a [n, n] = L·Lᵀ; L takes the place of its lower triangle. */
static void cholesky(double *a, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c <= r; c++) {
            double sum = a[r * n + c];
            for (int64_t k = 0; k < c; k++)
                sum -= a[r * n + k] * a[c * n + k];
            assert_true(r != c || sum > 0);
            a[r * n + c] = r == c ? sqrt(sum) : sum / a[c * n + c];
        }
}

/* U [n, n], upper triangular, of (P·H·Pᵀ + added·I)⁻¹ = UᵀU */
static double *inverse_factor(const struct mat *h, const int64_t *order, double added)
{
    const int64_t n = h->rows;
    double *l = room((size_t)(n * n), sizeof *l), *inverse = room((size_t)(n * n), sizeof *inverse),
           *out = room((size_t)(n * n), sizeof *out);
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < n; c++)
            l[r * n + c] = (double)at(h, order[r], order[c]) + (r == c ? added : 0);
    cholesky(l, n);
    for (int64_t i = 0; i < n * n; i++)
        inverse[i] = out[i] = 0;
    for (int64_t r = 0; r < n; r++) { /* row r of L⁻¹ */
        double *row = inverse + r * n;
        row[r] = 1;
        for (int64_t k = 0; k < r; k++)
            for (int64_t c = 0; c <= k; c++)
                row[c] -= l[r * n + k] * inverse[k * n + c];
        for (int64_t c = 0; c <= r; c++)
            row[c] /= l[r * n + r];
    }
    for (int64_t k = 0; k < n; k++) /* L⁻ᵀ·L⁻¹, its lower triangle */
        for (int64_t r = 0; r <= k; r++)
            for (int64_t c = 0; c <= r; c++)
                out[r * n + c] += inverse[k * n + r] * inverse[k * n + c];
    cholesky(out, n);
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < n; c++)
            l[r * n + c] = r <= c ? out[c * n + r] : 0;
    return l;
}

/* Columns in descending order of the diagonal, equal ones as they stand. */
static int64_t *naive_order(const struct mat *h, bool natural)
{
    int64_t *order = room((size_t)h->cols, sizeof *order);
    for (int64_t i = 0; i < h->cols; i++) {
        int64_t place = i;
        for (; !natural && place > 0 && at(h, order[place - 1], order[place - 1]) < at(h, i, i); place--)
            order[place] = order[place - 1];
        order[place] = i;
    }
    return order;
}

static double mean_diagonal(const struct mat *h)
{
    double sum = 0;
    for (int64_t i = 0; i < h->rows; i++)
        sum += (double)at(h, i, i);
    return sum / (double)h->rows;
}

struct agreement {
    size_t codes, ties; /* ties: codes on the other side of one */
    double farthest;    /* of them from the tie, in steps */
};

/* Row `row` of the weight through the algorithm, beside the codes in q. Where the target lies as good as halfway between
 * two codes either is right, and the algorithm goes on from q's. */
static void compare_row(const struct problem *p, const struct qmat *q, const double *u, const int64_t *order,
                        int64_t row, struct agreement *a)
{
    static const double closest = 1e-4;
    const int64_t n = p->w.cols;
    double *w = room((size_t)n, sizeof *w);
    for (int64_t j = 0; j < n; j++)
        w[j] = naive_element(&p->w, row, order[j]);
    for (int64_t j = 0; j < n; j++) {
        const int64_t col = order[j];
        const double s = scale_at(q, row, col), half = ldexp(1, q->bits - 1), t = w[j] / s;
        const int zero = zero_at(q, row, col), got = packed_at(q, row, col) - zero;
        int code = (int)nearbyint(fmin(fmax(t, -half - zero), half - 1 - zero));
        const double from_tie = fabs(fabs(t - code) - 0.5);
        if (got != code) {
            if (abs(got - code) != 1 || !(from_tie < closest))
                fail_msg("%s: row %d column %d, place %d: code %d, expected %d for a target of %.6f steps",
                         shape_text(p->shape), (int)row, (int)col, (int)j, got, code, t);
            a->ties++;
            a->farthest = fmax(a->farthest, from_tie);
            code = got;
        }
        const double error = (w[j] - naive_bf16(code * s)) / u[j * n + j];
        for (int64_t k = j + 1; k < n; k++)
            w[k] -= error * u[j * n + k];
        a->codes++;
    }
}

static void compare_with_paper(const struct shape *s, struct agreement *a)
{
    const struct problem p = make_problem(s, s->cols + s->cols / 2 + 8);
    const struct qmat q = make_result(s);
    const struct gptq_options o = options_of(s, 0);
    const struct gptq_stats stats = solve(&p, &o, &q);
    if (!(stats.damping == o.damping) || stats.n_dead != 0)
        fail_msg("%s: damping %g, %d dead columns", shape_text(s), stats.damping, (int)stats.n_dead);
    const int64_t *order = naive_order(&p.h, s->natural);
    const double *u = inverse_factor(&p.h, order, o.damping * mean_diagonal(&p.h));
    for (int64_t r = 0; r < s->rows; r++)
        compare_row(&p, &q, u, order, r, a);
    free_matrices();
}

static const struct shape paper_shapes[] = {
    {1, 16, 0, DTYPE_F32, 4, false, true, SCALE_RANGE},
    {5, 100, 32, DTYPE_BF16, 4, false, true, SCALE_RANGE},
    {17, 128, 128, DTYPE_BF16, 4, false, false, SCALE_RANGE},
    {3, 129, 128, DTYPE_F16, 4, true, false, SCALE_RANGE},
    {33, 300, 0, DTYPE_BF16, 4, true, true, SCALE_RANGE},
    {16, 300, 32, DTYPE_F32, 8, false, false, SCALE_RANGE},
    {7, 512, 128, DTYPE_BF16, 4, false, false, SCALE_WEIGHTED},
    {1, 513, 64, DTYPE_BF16, 4, true, false, SCALE_BLOCK},
    {19, 640, 128, DTYPE_BF16, 4, false, false, SCALE_BLOCK},
    {19, 640, 128, DTYPE_BF16, 4, false, true, SCALE_BLOCK},
    {8, 700, 32, DTYPE_F16, 8, false, true, SCALE_MSE},
    {8, 700, 0, DTYPE_F32, 4, false, false, SCALE_ABSMAX},
    {9, 1152, 128, DTYPE_BF16, 4, true, false, SCALE_RANGE},
};

static void test_paper(void **state)
{
    (void)state;
    struct agreement a = {0};
    for (size_t i = 0; i < N_OF(paper_shapes); i++)
        compare_with_paper(&paper_shapes[i], &a);
    print_message(
        "gptq: %zu cases, %zu codes, %zu on the other side of a tie, at most %.1e steps from it (1e-4 allowed)\n",
        N_OF(paper_shapes), a.codes, a.ties, a.farthest);
    assert_true(a.ties * 1000 <= a.codes);
}

/* --- properties ------------------------------------------------------------------------------------------------- */

static const struct shape property_shapes[] = {
    {16, 130, 32, DTYPE_BF16, 4, false, false, SCALE_BLOCK},
    {7, 300, 0, DTYPE_F32, 4, true, true, SCALE_RANGE},
    {24, 640, 128, DTYPE_BF16, 4, false, false, SCALE_BLOCK},
    {12, 640, 128, DTYPE_F16, 4, true, false, SCALE_WEIGHTED},
    {5, 700, 128, DTYPE_BF16, 4, false, true, SCALE_BLOCK},
    {12, 300, 64, DTYPE_BF16, 8, false, false, SCALE_BLOCK},
};

/* Neither the scales of least squares nor a coordinate's best code know of the rounding of ŵ to BF16, so that near the
 * optimum a step may cost what it amounts to. With 8 bits it is up to half a step. */
static double slack_of(const struct shape *s)
{
    return s->bits == 4 ? 1.001 : 1.05;
}

/* *worst: the most that a step raised the error, as a share of it. */
static void check_descent(const struct shape *s, const char *what, const double *errors, int n, double *worst)
{
    for (int i = 1; i < n; i++) {
        if (!(errors[i] <= errors[i - 1] * slack_of(s)))
            fail_msg("%s: %d %s instead of %d raise the error from %.9g to %.9g", shape_text(s), i, what,
                     i - 1, errors[i - 1], errors[i]);
        *worst = fmax(*worst, errors[i] / errors[i - 1] - 1);
    }
}

static void test_properties(void **state)
{
    (void)state;
    enum { N = 6 };
    double worst[9] = {0}; /* by bits */
    for (size_t i = 0; i < N_OF(property_shapes); i++) {
        const struct shape *s = &property_shapes[i];
        const struct problem p = make_problem(s, 2 * s->cols);
        const struct qmat q = make_result(s);
        double by_passes[N];
        for (int n = 0; n < N; n++) {
            struct gptq_options o = options_of(s, n);
            o.damping = 1e-6; /* what is told leaves out its part */
            const struct gptq_stats stats = solve(&p, &o, &q);
            if (!(stats.error > 0 && stats.error < stats.nearest_error))
                fail_msg("%s, %d passes: error %.6g, nearest %.6g", shape_text(s), n, stats.error,
                         stats.nearest_error);
            by_passes[n] = stats.error;
        }
        check_descent(s, "passes", by_passes, N, &worst[s->bits]);
        free_matrices();
    }
    print_message(
        "gptq: the worst step of refinement raises the error by %.1e with 4 bits (1e-3 allowed), %.1e with 8 (1e-2)\n",
        worst[4], worst[8]);
}

/* --- statistics ------------------------------------------------------------------------------------------------- */

struct measured {
    double error, weight_error; /* as in gptq_stats */
};

/* Σ|(W − Ŵ)x|² / Σ|Wx|² over the inputs themselves. */
static struct measured measure(const struct problem *p, const struct qmat *q)
{
    const int64_t cols = p->w.cols;
    double output = 0, output_error = 0, weight = 0, weight_error = 0;
    double *e = room((size_t)cols, sizeof *e), *w = room((size_t)cols, sizeof *w);
    const double *x = naive_rows(&p->x);
    for (int64_t r = 0; r < p->w.rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            w[c] = naive_element(&p->w, r, c);
            e[c] = w[c] - value_at(q, r, c);
            weight += w[c] * w[c];
            weight_error += e[c] * e[c];
        }
        for (int64_t t = 0; t < p->x.rows; t++) {
            double y = 0, d = 0;
            for (int64_t c = 0; c < cols; c++) {
                y += w[c] * x[t * cols + c];
                d += e[c] * x[t * cols + c];
            }
            output += y * y;
            output_error += d * d;
        }
    }
    return (struct measured){output_error / output, weight_error / weight};
}

static void test_statistics(void **state)
{
    (void)state;
    struct outcome output = {"output error", 1e-4, 0, 0}, nearest = {"error of nearest codes", 1e-4, 0, 0},
                   weight = {"weight error", 1e-5, 0, 0};
    for (size_t i = 0; i < N_OF(property_shapes); i++) {
        const struct shape *s = &property_shapes[i];
        const struct problem p = make_problem(s, 2 * s->cols);
        const struct qmat q = make_result(s);
        for (int rounds = -1; rounds < 3; rounds++) {
            struct gptq_options o = options_of(s, rounds < 0 ? 0 : rounds);
            o.sweep = rounds >= 0;
            const struct gptq_stats stats = solve(&p, &o, &q);
            const struct measured m = measure(&p, &q);
            compare_figure(&output, stats.error, m.error, m.error, shape_text(s));
            compare_figure(&weight, stats.weight_error, m.weight_error, m.weight_error, shape_text(s));
            if (!o.sweep) /* nearest codes are what is written then */
                compare_figure(&nearest, stats.nearest_error, m.error, m.error, shape_text(s));
        }
        free_matrices();
    }
    print_outcome(&output);
    print_outcome(&nearest);
    print_outcome(&weight);
}

/* --- bad data --------------------------------------------------------------------------------------------------- */

static const struct shape plain = {6, 200, 32, DTYPE_BF16, 4, false, false, SCALE_BLOCK};

static void test_dead_columns(void **state)
{
    (void)state;
    static const int64_t dead[] = {0, 5, 31, 32, 77, 100, 101, 199};
    for (int natural = 0; natural < 2; natural++)
        for (int rounds = 0; rounds < 3; rounds++) {
            struct shape s = plain;
            s.natural = natural;
            struct problem p = make_problem(&s, 400);
            for (size_t i = 0; i < N_OF(dead) + 32; i++) /* and the whole group [128, 160) */
                for (int64_t t = 0; t < p.x.rows; t++)
                    put(&p.x, t, i < N_OF(dead) ? dead[i] : 128 + (int64_t)(i - N_OF(dead)), 0);
            p.h = make_hessian(&p.x);
            const struct qmat q = make_result(&s);
            const struct gptq_options o = options_of(&s, rounds);
            const struct gptq_stats stats = solve(&p, &o, &q);
            assert_int_equal(stats.n_dead, N_OF(dead) + 32);
            assert_true(stats.error < stats.nearest_error && stats.weight_error < 0.05);
            for (size_t i = 0; !rounds && i < N_OF(dead); i++)
                check_nearest(&p, &q, dead[i]);
            for (int64_t c = 128; c < 160; c++) /* no column of it says anything about its scale */
                check_nearest(&p, &q, c);
            free_matrices();
        }
}

static void test_no_inputs(void **state)
{
    (void)state;
    for (int rounds = 0; rounds < 3; rounds++) {
        struct problem p = make_problem(&plain, 4);
        assert_ok(cpu[0].core->zero(&cpu[0], &p.h));
        const struct qmat q = make_result(&plain);
        const struct gptq_options o = options_of(&plain, rounds);
        const struct gptq_stats stats = solve(&p, &o, &q);
        assert_int_equal(stats.n_dead, plain.cols);
        assert_true(stats.error == 0 && stats.nearest_error == 0 && stats.weight_error < 0.05);
        for (int64_t c = 0; !rounds && c < plain.cols; c++) /* later scales are fitted to the codes */
            check_nearest(&p, &q, c);
        free_matrices();
    }
}

static void set_pair(const struct mat *h, int64_t i, int64_t j, double value)
{
    put(h, i, j, value);
    put(h, j, i, value);
}

static void test_not_finite(void **state)
{
    (void)state;
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < N_OF(bad); i++)
        for (int sweep = 0; sweep < 2; sweep++) {
            struct problem p = make_problem(&plain, 400);
            const struct qmat q = make_result(&plain);
            struct gptq_options o = options_of(&plain, 2);
            struct gptq_stats stats;
            o.sweep = sweep;
            for (int64_t k = 0; k < plain.cols;
                 k++) /* what one input that is not finite does to the Hessian */
                set_pair(&p.h, k, 17, bad[i]);
            assert_error(try(&cpu[0], &p, &o, &q, &stats), ERR_FORMAT, "not finite");
            set_pair(&p.h, 17, 17, 1); /* which no inputs give */
            if (sweep)
                assert_error(try(&cpu[0], &p, &o, &q, &stats), ERR_FORMAT, "not positive definite");
            free_matrices();
        }
}

static void test_rank_deficient(void **state)
{
    (void)state;
    static const int64_t tokens[] = {1, 7, 150};
    for (size_t i = 0; i < 2 * N_OF(tokens); i++) {
        const struct problem p = make_problem(&plain, tokens[i / 2]);
        const struct qmat q = make_result(&plain);
        const struct gptq_options o = options_of(&plain, i % 2 ? 2 : 0);
        const struct gptq_stats stats = solve(&p, &o, &q);
        assert_true(stats.damping == o.damping && stats.n_dead == 0);
        /* the damping keeps the sweep near the weights; refinement knows none */
        if (!(stats.error < 0.5 * stats.nearest_error && (o.passes || stats.weight_error < 0.05)))
            fail_msg("%d tokens, %d rounds: error %g, nearest %g, of the weights %g", (int)tokens[i / 2],
                     o.passes, stats.error, stats.nearest_error, stats.weight_error);
        free_matrices();
    }
}

/* Pairs of columns with [[1, a], [a, 1]]: eigenvalues 1 − a and 1 + a, mean diagonal 1. */
static struct problem make_pairs(double a)
{
    struct problem p = make_problem(&plain, 4);
    assert_ok(cpu[0].core->zero(&cpu[0], &p.h));
    for (int64_t c = 0; c < plain.cols; c++)
        put(&p.h, c, c, 1);
    for (int64_t c = 0; c < plain.cols; c += 2)
        set_pair(&p.h, c, c + 1, a);
    return p;
}

static void test_indefinite(void **state)
{
    (void)state;
    static const struct {
        double a, damping; /* 0: none helps */
    } cases[] = {{0.5, 0.01}, {1.005, 0.01}, {1.02, 0.04}, {1.1, 0.16}, {1.5, 0.64}, {3, 0}};
    for (size_t i = 0; i < N_OF(cases); i++) {
        const struct problem p = make_pairs(cases[i].a);
        const struct qmat q = make_result(&plain);
        const struct gptq_options o = options_of(&plain, 0);
        struct gptq_stats stats;
        const int rc = try(&cpu[0], &p, &o, &q, &stats);
        if (cases[i].damping > 0) {
            assert_ok(rc);
            if (!(fabs(stats.damping - cases[i].damping) < 1e-12))
                fail_msg("a = %g: damping %g, expected %g", cases[i].a, stats.damping, cases[i].damping);
        } else {
            assert_error(rc, ERR_FORMAT, "not positive definite");
        }
        free_matrices();
    }
}

/* --- use -------------------------------------------------------------------------------------------------------- */

static bool same(const struct mat *a, const struct mat *b)
{
    return a->data == b->data ||
           !memcmp(a->data, b->data, (size_t)(a->rows * a->stride) * dtype_bytes(a->dtype));
}

static bool same_result(const struct qmat *a, const struct qmat *b)
{
    return same(&a->packed, &b->packed) && same(&a->scales, &b->scales) && same(&a->zeros, &b->zeros);
}

static void test_same_bytes(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(property_shapes); i++) {
        const struct shape *s = &property_shapes[i];
        const struct problem p = make_problem(s, s->cols);
        const struct gptq_options o = options_of(s, 2);
        const struct qmat first = make_result(s);
        const struct gptq_stats stats = solve(&p, &o, &first);
        for (int k = 0; k < N_BACKENDS; k++) {
            const struct qmat q = make_result(s);
            struct gptq_stats again;
            assert_ok(try(&cpu[k], &p, &o, &q, &again));
            if (!same_result(&q, &first) || memcmp(&again, &stats, sizeof stats))
                fail_msg("%s: %d threads give another result", shape_text(s), k + 1);
        }
        free_matrices();
    }
}

/* One handle for sets of several sizes, and several weights for one Hessian, in turn. */
static void test_several_weights(void **state)
{
    (void)state;
    static const struct shape shapes[] = {
        {40, 130, 32, DTYPE_BF16, 4, false, false, SCALE_BLOCK},
        {9, 640, 128, DTYPE_F32, 4, true, false, SCALE_WEIGHTED},
        {3, 300, 0, DTYPE_BF16, 4, false, false, SCALE_BLOCK},
    };
    struct gptq_size sizes[N_OF(shapes)];
    for (size_t i = 0; i < N_OF(shapes); i++)
        sizes[i] = (struct gptq_size){shapes[i].rows, shapes[i].cols, group_of(&shapes[i])};
    const struct gptq_options o = options_of(&shapes[0], 1);
    struct gptq *g;
    assert_ok(gptq_open(&g, &cpu[0], &o, sizes, N_OF(sizes), &(struct work_clock){0}));
    for (size_t i = 0; i < N_OF(shapes); i++) {
        const struct shape *s = &shapes[i];
        struct problem p = make_problem(s, s->cols);
        const struct mat h = copy_of(&p.h);
        assert_ok(gptq_prepare(g, &h));
        for (int k = 0; k < 3; k++) {
            p.w = make_random(s->dtype, s->rows - k, s->cols, 0.1);
            struct shape own = *s;
            own.rows = p.w.rows;
            const struct qmat q = make_result(&own), alone = make_result(&own);
            struct gptq_stats stats;
            assert_ok(gptq_quantize(g, &p.w, &q, &(struct gptq_parts){1, {p.w.rows}}, NULL, &stats));
            solve(&p, &o, &alone);
            if (!same_result(&q, &alone))
                fail_msg("%s: weight %d is another one after those before it", shape_text(s), k);
        }
        free_matrices();
    }
    gptq_close(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_paper, clean_up),
        cmocka_unit_test_teardown(test_properties, clean_up),
        cmocka_unit_test_teardown(test_statistics, clean_up),
        cmocka_unit_test_teardown(test_dead_columns, clean_up),
        cmocka_unit_test_teardown(test_no_inputs, clean_up),
        cmocka_unit_test_teardown(test_not_finite, clean_up),
        cmocka_unit_test_teardown(test_rank_deficient, clean_up),
        cmocka_unit_test_teardown(test_indefinite, clean_up),
        cmocka_unit_test_teardown(test_same_bytes, clean_up),
        cmocka_unit_test_teardown(test_several_weights, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

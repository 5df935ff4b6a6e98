/* Attention's logarithms of sums, and its gradients against formulas in double and against differences of a forward pass
 * in double. Each case runs with one, two and three threads, which must give the same bytes. */
#include "tests/unit/naive.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

/* --- in double --------------------------------------------------------------------------------------------------- */

/* Everything of one case in double, without gaps: queries and results [tokens, n_heads·d], keys and values [cache rows,
 * n_kv_heads·d]. */
struct plain {
    const struct attention_spec *spec;
    int64_t n_new; /* tokens of a sequence */
    double *q, *keys, *values, *dout;
    int64_t first_row, end_row; /* tokens that `loss` counts */
};

/* A query and its keys [from, to) as rows of the cache; p has room for a probability of each key. */
struct query {
    int64_t row, from, to;
    int head, kv_head;
    double *p, lse;
};

static double *row_of(const struct plain *a, double *m, int64_t row, int head, bool cache)
{
    const struct heads *h = &a->spec->heads;
    return m + (row * (cache ? h->n_kv_heads : h->n_heads) + head) * h->head_dim;
}

static double dot(const double *x, const double *y, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

static struct query query_of(const struct plain *a, int64_t row, int head, double *p)
{
    const struct attention_spec *s = a->spec;
    const int64_t position = s->sequences.first_position + row % a->n_new,
                  slot = row / a->n_new * s->sequences.max_positions;
    struct query q = {.row = row,
                      .from = slot + (s->window && position >= s->window ? position - s->window + 1 : 0),
                      .to = slot + position + 1,
                      .head = head,
                      .kv_head = head / (s->heads.n_heads / s->heads.n_kv_heads),
                      .p = p};
    double highest = -INFINITY, total = 0;
    for (int64_t k = q.from; k < q.to; k++) {
        p[k - q.from] = (double)s->scale * dot(row_of(a, a->q, row, head, false),
                                               row_of(a, a->keys, k, q.kv_head, true), s->heads.head_dim);
        if (s->softcap > 0)
            p[k - q.from] = (double)s->softcap * tanh(p[k - q.from] / (double)s->softcap);
        highest = fmax(highest, p[k - q.from]);
    }
    for (int64_t k = 0; k < q.to - q.from; k++)
        total += exp(p[k] - highest);
    q.lse = highest + log(total);
    for (int64_t k = 0; k < q.to - q.from; k++)
        p[k] = exp(p[k] - q.lse);
    return q;
}

/* Σ dout⊙attention over the tokens [first_row, end_row) */
static double loss(const void *ctx)
{
    const struct plain *a = ctx;
    double p[64], sum = 0;
    for (int64_t r = a->first_row; r < a->end_row; r++)
        for (int h = 0; h < a->spec->heads.n_heads; h++) {
            const struct query q = query_of(a, r, h, p);
            for (int64_t k = q.from; k < q.to; k++)
                sum +=
                    q.p[k - q.from] * dot(row_of(a, a->dout, r, h, false),
                                          row_of(a, a->values, k, q.kv_head, true), a->spec->heads.head_dim);
        }
    return sum;
}

struct gradients {
    double *q, *keys, *values;
};

/* With dpₖ = dout·vₖ the gradient by a score is pₖ·(dpₖ − Σ p·dp). */
static void query_gradient(const struct plain *a, const struct query *q, const struct gradients *g)
{
    const int64_t d = a->spec->heads.head_dim;
    const double *dout = row_of(a, a->dout, q->row, q->head, false),
                 *query = row_of(a, a->q, q->row, q->head, false);
    double mean = 0;
    for (int64_t k = q->from; k < q->to; k++)
        mean += q->p[k - q->from] * dot(dout, row_of(a, a->values, k, q->kv_head, true), d);
    for (int64_t k = q->from; k < q->to; k++) {
        const double p = q->p[k - q->from],
                     /* the capped score, and what is left of a change by its cap */
            t = a->spec->softcap > 0 ? (log(p) + q->lse) / (double)a->spec->softcap : 0,
                     slope = (double)a->spec->scale * p * (1 - t * t) *
                             (dot(dout, row_of(a, a->values, k, q->kv_head, true), d) - mean);
        const double *key = row_of(a, a->keys, k, q->kv_head, true);
        double *dq = row_of(a, g->q, q->row, q->head, false), *dk = row_of(a, g->keys, k, q->kv_head, true),
               *dv = row_of(a, g->values, k, q->kv_head, true);
        for (int64_t i = 0; i < d; i++) {
            dq[i] += slope * key[i];
            dk[i] += slope * query[i];
            dv[i] += p * dout[i];
        }
    }
}

/* --- cases -------------------------------------------------------------------------------------------------------- */

struct attention_case {
    struct attention_spec spec;
    struct attention_tape tape;
    struct mat dout, dq, dkeys, dvalues;
};

static int run_forward(const struct backend *b, const void *args)
{
    const struct attention_case *c = args;
    return b->core->attention(b, &c->spec, &c->tape.q, &c->tape.keys, &c->tape.values, &c->tape.out,
                              &c->tape.lse);
}

static int run_backward(const struct backend *b, const void *args)
{
    const struct attention_case *c = args;
    return b->train->attention_backward(b, &c->spec, &c->tape, &c->dout, &c->dq, &c->dkeys, &c->dvalues);
}

/* A cache has two rows more than its sequences; what is not theirs are NaNs. */
static struct mat make_cache(const struct attention_spec *spec, int64_t positions)
{
    const struct sequences *s = &spec->sequences;
    const struct mat m =
        make_random(DTYPE_F32, s->n * s->max_positions + 2, spec->heads.n_kv_heads * spec->heads.head_dim, 1);
    for (int64_t r = 0; r < m.rows; r++)
        for (int64_t c = 0; c < m.cols; c++)
            if (r >= s->n * s->max_positions || r % s->max_positions >= positions)
                put(&m, r, c, NAN);
    return m;
}

static struct attention_case make_case(const struct attention_spec *spec, int64_t rows, double amplitude)
{
    const int64_t tokens = spec->sequences.n * rows, cols = spec->heads.n_heads * spec->heads.head_dim,
                  positions = spec->sequences.first_position + rows;
    struct attention_case c = {.spec = *spec,
                               .tape = {.q = make_random(DTYPE_F32, tokens, cols, amplitude),
                                        .keys = make_cache(spec, positions),
                                        .values = make_cache(spec, positions),
                                        .out = make(DTYPE_F32, tokens, cols),
                                        .lse = make(DTYPE_F32, tokens, spec->heads.n_heads)},
                               .dout = make_random(DTYPE_F32, tokens, cols, 1),
                               .dq = make(DTYPE_F32, tokens, cols)};
    c.dkeys = make(DTYPE_F32, c.tape.keys.rows, c.tape.keys.cols);
    c.dvalues = make(DTYPE_F32, c.tape.keys.rows, c.tape.keys.cols);
    return c;
}

static struct plain plain_of(const struct attention_case *c)
{
    return (struct plain){.spec = &c->spec,
                          .n_new = c->tape.q.rows / c->spec.sequences.n,
                          .q = naive_rows(&c->tape.q),
                          .keys = naive_rows(&c->tape.keys),
                          .values = naive_rows(&c->tape.values),
                          .dout = naive_rows(&c->dout)};
}

static const char *name_of(const struct attention_spec *s, int64_t rows)
{
    static char text[120];
    snprintf(text, sizeof text, "heads %d/%d of %d, window %d, cap %g, %d × %d rows at %d", s->heads.n_heads,
             s->heads.n_kv_heads, s->heads.head_dim, (int)s->window, (double)s->softcap, (int)s->sequences.n,
             (int)rows, (int)s->sequences.first_position);
    return text;
}

/* --- lse ---------------------------------------------------------------------------------------------------------- */

static void check_lse(struct outcome *o, const struct attention_spec *spec, int64_t rows, double amplitude)
{
    const struct attention_case c = make_case(spec, rows, amplitude);
    const struct plain a = plain_of(&c);
    const struct mat *const outs[] = {&c.tape.out, &c.tape.lse};
    const int n_heads = spec->heads.n_heads;
    const struct mat alone = make(DTYPE_F32, c.tape.out.rows, c.tape.out.cols);
    double *expected = room((size_t)(c.tape.lse.rows * n_heads), sizeof *expected),
           *p = room((size_t)(spec->sequences.first_position + rows), sizeof *p);
    for (int64_t r = 0; r < c.tape.lse.rows; r++)
        for (int h = 0; h < n_heads; h++)
            expected[r * n_heads + h] = query_of(&a, r, h, p).lse;
    run_alike(run_forward, &c, outs, 2, name_of(spec, rows));
    check(o, &c.tape.lse, expected, (double)(c.tape.lse.rows * n_heads), name_of(spec, rows));
    /* asking for it changes nothing else */
    assert_ok(cpu[0].core->attention(&cpu[0], spec, &c.tape.q, &c.tape.keys, &c.tape.values, &alone, NULL));
    assert_memory_equal(alone.data, c.tape.out.data, (size_t)(alone.rows * alone.stride) * sizeof(float));
    free_matrices();
}

static void test_lse(void **state)
{
    (void)state;
    static const int heads[][2] = {{4, 1}, {4, 2}, {3, 3}};
    static const int64_t windows[] = {0, 1, 8, 512};
    static const struct {
        int64_t n, first, rows;
    } places[] = {{1, 0, 1}, {1, 0, 130}, {1, 37, 1}, {1, 100, 70}, {3, 0, 33}, {3, 20, 70}};
    struct outcome o = {"lse", 1e-6, 0, 0};
    for (size_t i = 0; i < 3 * 4 * N_OF(places); i++) {
        const int64_t n = places[i / 12].n, first = places[i / 12].first, rows = places[i / 12].rows;
        const struct attention_spec spec = {{heads[i % 3][0], heads[i % 3][1], 32},
                                            {n, first, first + rows + (int64_t)(i % 2) * 5},
                                            1 / sqrtf(32),
                                            windows[i / 3 % 4],
                                            i % 4 == 1 ? 3 : 0};
        check_lse(&o, &spec, rows, i % 5 ? 4 : 400);
    }
    print_outcome(&o);
}

/* --- gradients ---------------------------------------------------------------------------------------------------- */

/* Rows beyond a sequence's tokens must be as `make` left them; then they count as zeros, as in `expected`. */
static void check_untouched(const struct attention_case *c, const struct mat *m, const char *text)
{
    const struct sequences *s = &c->spec.sequences;
    for (int64_t r = 0; r < m->rows; r++)
        for (int64_t i = 0; i < m->cols; i++) {
            uint32_t bits;
            const float x = at(m, r, i);
            memcpy(&bits, &x, sizeof bits);
            if (r < s->n * s->max_positions && r % s->max_positions < c->tape.q.rows / s->n)
                continue;
            if (bits != UINT32_MAX)
                fail_msg("%s: row %d of the cache was written", text, (int)r);
            put(m, r, i, 0);
        }
}

static void by_formula(const struct plain *a, const struct attention_case *c, const struct gradients *g)
{
    double *p = room((size_t)a->n_new, sizeof *p);
    for (int64_t r = 0; r < c->tape.q.rows; r++)
        for (int h = 0; h < c->spec.heads.n_heads; h++) {
            const struct query q = query_of(a, r, h, p);
            query_gradient(a, &q, g);
        }
}

/* One sequence at a time, for the others do not depend on it. */
static void by_differences(struct plain *a, const struct attention_case *c, const struct gradients *g)
{
    const struct sequences *s = &c->spec.sequences;
    for (int64_t r = 0; r < s->n * a->n_new; r++) {
        const int64_t slot = r / a->n_new * s->max_positions + r % a->n_new, q_cols = c->dq.cols,
                      kv_cols = c->dkeys.cols;
        a->first_row = r / a->n_new * a->n_new;
        a->end_row = a->first_row + a->n_new;
        for (int64_t i = r * q_cols; i < (r + 1) * q_cols; i++)
            g->q[i] = naive_slope(loss, a, &a->q[i], 1e-4);
        for (int64_t i = slot * kv_cols; i < (slot + 1) * kv_cols; i++) {
            g->keys[i] = naive_slope(loss, a, &a->keys[i], 1e-4);
            g->values[i] = naive_slope(loss, a, &a->values[i], 1e-4);
        }
    }
}

static void check_backward(struct outcome *o, const struct attention_spec *spec, int64_t rows,
                           double amplitude, bool differences)
{
    const struct attention_case c = make_case(spec, rows, amplitude);
    const char *text = name_of(spec, rows);
    struct plain a = plain_of(&c);
    const struct gradients g = {zeros(c.dq.rows * c.dq.cols), zeros(c.dkeys.rows * c.dkeys.cols),
                                zeros(c.dvalues.rows * c.dvalues.cols)};
    const struct mat *const outs[] = {&c.dq, &c.dkeys, &c.dvalues};
    if (differences)
        by_differences(&a, &c, &g);
    else
        by_formula(&a, &c, &g);
    double size = 0; /* a query with one key has no gradient, but a difference of two numbers of this size */
    for (int64_t i = 0; (rows == 1 || spec->window == 1) && i < c.dq.rows * c.dq.cols; i++)
        size += pow(a.dout[i] * (double)spec->scale, 2) * (double)spec->heads.head_dim;
    assert_ok(run_forward(&cpu[0], &c));
    run_alike(run_backward, &c, outs, 3, text);
    check_untouched(&c, &c.dkeys, text);
    check_untouched(&c, &c.dvalues, text);
    check(o, &c.dq, g.q, size, text);
    check(o, &c.dkeys, g.keys, size, text);
    check(o, &c.dvalues, g.values, 0, text);
    free_matrices();
}

static void test_backward(void **state)
{
    (void)state;
    static const int heads[][2] = {{4, 1}, {4, 2}, {3, 3}}, dims[] = {2, 32, 256};
    static const int64_t windows[] = {0, 1, 8, 100};
    static const int64_t places[][2] = {{1, 1}, {1, 5}, {1, 64}, {1, 130}, {3, 1}, {3, 70}};
    struct outcome o = {"attention_backward", 5e-6, 0, 0};
    for (size_t i = 0; i < 3 * 3 * 4 * N_OF(places); i++) {
        const int dim = dims[i / 3 % 3];
        const int64_t n = places[i / 36][0], rows = places[i / 36][1];
        const struct attention_spec spec = {{heads[i % 3][0], heads[i % 3][1], dim},
                                            {n, 0, rows + (int64_t)(i % 2) * 5},
                                            1 / sqrtf((float)dim),
                                            windows[i / 9 % 4],
                                            i % 4 == 1 ? 3 : 0};
        check_backward(&o, &spec, rows, 4, false);
    }
    print_outcome(&o);
}

/* So many positions that fewer than 64 queries' scores fit the scratch memory. */
static void test_backward_of_many(void **state)
{
    (void)state;
    struct outcome o = {"attention_backward, 16400 positions", 5e-6, 0, 0};
    check_backward(&o, &(struct attention_spec){{1, 1, 2}, {1, 0, 16401}, 0.7f, 16390, 0}, 16400, 4, false);
    print_outcome(&o);
}

static void test_backward_differences(void **state)
{
    (void)state;
    static const int heads[][2] = {{4, 2}, {3, 3}, {3, 1}};
    static const int64_t windows[] = {0, 1, 3};
    struct outcome o = {"attention_backward, differences", 5e-6, 0, 0};
    for (size_t i = 0; i < 3 * 3 * 2; i++) {
        const int64_t rows = i / 9 ? 9 : 7;
        const struct attention_spec spec = {{heads[i % 3][0], heads[i % 3][1], 6},
                                            {i / 9 ? 2 : 1, 0, rows + (int64_t)(i % 2)},
                                            0.4f,
                                            windows[i / 3 % 3],
                                            (float)(i % 3 == 1 ? 2 : 0)};
        check_backward(&o, &spec, rows, 2, true);
    }
    print_outcome(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_lse, clean_up),
        cmocka_unit_test_teardown(test_backward, clean_up),
        cmocka_unit_test_teardown(test_backward_of_many, clean_up),
        cmocka_unit_test_teardown(test_backward_differences, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

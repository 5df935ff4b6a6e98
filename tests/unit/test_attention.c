/* Rotary positions, the split of queries, keys and values, and attention, against the plainest implementation in double
 * that the description in kernels/backend.h allows. Each case runs with one, two and three threads, which must give the
 * same bytes. */
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

#include <math.h>

/* --- rotary positions ------------------------------------------------------------------------------------------- */

struct table_args {
    const float *inv_freq;
    int64_t first_position;
};

static int run_table(const struct backend *b, const void *args, const struct mat *out)
{
    const struct table_args *a = args;
    return b->core->rope_table(b, a->inv_freq, a->first_position, out);
}

/* Angles are FP32 products, as in the models' own code; what is taken of them is not. */
static void test_rope_table(void **state)
{
    (void)state;
    static const int dims[] = {2, 32, 64, 256};
    static const int64_t heights[] = {1, 3, 33, 100}, firsts[] = {0, 5, 8000, 131000};
    struct outcome o = {"rope_table", 1e-7, 0, 0};
    for (size_t i = 0; i < N_OF(dims) * N_OF(heights) * N_OF(firsts); i++) {
        const int64_t half = dims[i % 4] / 2, rows = heights[i / 4 % 4];
        const struct mat table = make(DTYPE_F32, rows, 2 * half);
        double *expected = room((size_t)(rows * 2 * half), sizeof *expected);
        float inv_freq[128];
        for (int64_t k = 0; k < half; k++)
            inv_freq[k] = (float)pow(10000, -(double)k / (double)half);
        const struct table_args a = {inv_freq, firsts[i / 16]};
        for (int64_t k = 0; k < rows * half; k++) {
            const int64_t r = k / half, c = k % half;
            const float angle = (float)(a.first_position + r) * inv_freq[c];
            expected[r * 2 * half + c] = cos((double)angle);
            expected[r * 2 * half + half + c] = sin((double)angle);
        }
        run_everywhere(run_table, &a, &table, "rope_table");
        check(&o, &table, expected, 0, "rope_table");
        free_matrices();
    }
    print_outcome(&o);
}

/* --- queries, keys and values ------------------------------------------------------------------------------------- */

/* Queries, keys and values are views of one piece of memory, so that whatever is written between and beyond them is
 * seen. The cache has two rows more than it needs. */
struct split_case {
    struct qkv_spec spec;
    struct mat qkv;
    bool queries_alone;
};

enum { QUERIES, KEYS, VALUES, N_VIEWS };

static int64_t split_views(const struct split_case *c, float *base, struct mat view[N_VIEWS])
{
    const struct heads *h = &c->spec.heads;
    const int64_t kv = h->n_kv_heads * h->head_dim, q = h->n_heads * h->head_dim;
    const int64_t slots = c->spec.sequences.n * c->spec.sequences.max_positions + 2;
    view[QUERIES] = (struct mat){base, DTYPE_F32, c->qkv.rows, q, q + SLACK};
    int64_t used = c->qkv.rows * (q + SLACK);
    for (int i = KEYS; i < N_VIEWS; i++) {
        view[i] = (struct mat){base ? base + used : NULL, DTYPE_F32, slots, kv, kv + i};
        used += slots * (kv + i);
    }
    return used;
}

static int run_split(const struct backend *b, const void *args, const struct mat *out)
{
    const struct split_case *c = args;
    struct mat view[N_VIEWS];
    split_views(c, out->data, view);
    return b->core->split_qkv(b, &c->spec, &c->qkv, &view[QUERIES], c->queries_alone ? NULL : &view[KEYS],
                              c->queries_alone ? NULL : &view[VALUES]);
}

/* One head of token r, normed and turned. */
static void naive_head(const struct split_case *c, int64_t r, int64_t col, const struct mat *norm,
                       double *out)
{
    const int64_t d = c->spec.heads.head_dim, token = r % (c->qkv.rows / c->spec.sequences.n);
    double x[512] = {0};
    for (int64_t i = 0; i < d; i++)
        x[i] = (double)at(&c->qkv, r, col + i);
    if (norm)
        naive_norm_row(x, d, norm, &c->spec.norm, x);
    for (int64_t i = 0; i < d; i++) {
        const double cosine = (double)at(c->spec.rope, token, i % (d / 2)),
                     sine = (double)at(c->spec.rope, token, d / 2 + i % (d / 2));
        out[i] = x[i] * cosine + (i < d / 2 ? -x[i + d / 2] : x[i - d / 2]) * sine;
    }
}

/* What is not to be written stays NAN. */
static double *naive_split(const struct split_case *c, int64_t used)
{
    const struct heads *h = &c->spec.heads;
    const struct sequences *s = &c->spec.sequences;
    const int64_t d = h->head_dim, n_new = c->qkv.rows / s->n;
    double *out = room((size_t)used, sizeof *out);
    struct mat view[N_VIEWS];
    split_views(c, NULL, view);
    double *const q = out, *const keys = q + view[QUERIES].rows * view[QUERIES].stride,
                  *const values = keys + view[KEYS].rows * view[KEYS].stride;
    for (int64_t i = 0; i < used; i++)
        out[i] = NAN;
    for (int64_t r = 0; r < c->qkv.rows; r++) {
        const int64_t slot = r / n_new * s->max_positions + s->first_position + r % n_new;
        for (int64_t i = 0; i < h->n_heads; i++)
            naive_head(c, r, i * d, c->spec.q_norm, q + r * view[QUERIES].stride + i * d);
        for (int64_t i = 0; !c->queries_alone && i < h->n_kv_heads; i++) {
            double *v = values + slot * view[VALUES].stride + i * d;
            naive_head(c, r, (h->n_heads + i) * d, c->spec.k_norm, keys + slot * view[KEYS].stride + i * d);
            for (int64_t k = 0; k < d; k++)
                v[k] =
                    (double)at(&c->qkv, r, (h->n_heads + (c->spec.k_is_v ? 0 : h->n_kv_heads) + i) * d + k);
            if (c->spec.values_normed)
                naive_norm_row(v, d, NULL, &c->spec.norm, v);
        }
    }
    return out;
}

static void check_split(struct outcome *o, const struct split_case *c, const char *text)
{
    struct mat view[N_VIEWS];
    const int64_t used = split_views(c, NULL, view);
    const struct mat out = {room((size_t)used, sizeof(float)), DTYPE_F32, 1, used, used};
    const double *expected = naive_split(c, used);
    double error = 0, size = 0;
    run_everywhere(run_split, c, &out, text);
    for (int64_t i = 0; i < used; i++) {
        const float got = ((const float *)out.data)[i];
        uint32_t bits;
        memcpy(&bits, &got, sizeof bits);
        if (isnan(expected[i]) ? bits != UINT32_MAX : !isfinite(got))
            fail_msg("%s: element %d is %g, expected %g", text, (int)i, (double)got, expected[i]);
        if (isnan(expected[i]))
            continue;
        error += ((double)got - expected[i]) * ((double)got - expected[i]);
        size += expected[i] * expected[i];
    }
    const double relative = sqrt(error / size);
    if (!(relative <= o->bound))
        fail_msg("%s: relative L2 error %.3e, at most %.1e allowed", text, relative, o->bound);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

static void test_split_qkv(void **state)
{
    (void)state;
    static const int heads[][2] = {{1, 1}, {4, 1}, {4, 2}, {3, 3}}, dims[] = {2, 32, 64, 256};
    static const int64_t n_sequences[] = {1, 3}, lengths[] = {1, 5, 33}, firsts[] = {0, 7};
    struct outcome o = {"split_qkv", 5e-7, 0, 0};
    for (size_t i = 0; i < 4 * 4 * 2 * 3 * 2 * 4; i++) {
        const size_t norms = i / 192;
        const bool alone = i % 7 == 6, k_is_v = i % 7 == 5;
        const int d = dims[i / 4 % 4], n_heads = heads[i % 4][0], n_kv = heads[i % 4][1];
        const int64_t n = n_sequences[i / 16 % 2], length = lengths[i / 32 % 3], first = firsts[i / 96 % 2];
        const struct mat q_norm = make_random(i % 3 ? DTYPE_BF16 : DTYPE_F16, 1, d, 1),
                         k_norm = make_random(DTYPE_F32, 1, d, 1),
                         rope = make_random(DTYPE_F32, length + (int64_t)(i % 2), d, 1);
        const struct split_case c = {{{n_heads, n_kv, d},
                                      {n, first, first + length + (int64_t)(i % 3) * 4},
                                      {1e-6f, i % 2 == 0},
                                      norms & 1 ? &q_norm : NULL,
                                      norms & 2 ? &k_norm : NULL,
                                      &rope,
                                      k_is_v,
                                      i % 7 == 4 || i % 14 == 5},
                                     make_random(DTYPE_F32, n * length,
                                                 (n_heads + (alone    ? 0
                                                             : k_is_v ? 1
                                                                      : 2) *
                                                                n_kv) *
                                                     d,
                                                 3),
                                     alone};
        char text[120];
        snprintf(text, sizeof text, "split_qkv: heads %d/%d of %d, %d × %d tokens at %d, norms %d", n_heads,
                 n_kv, d, (int)n, (int)length, (int)first, (int)norms);
        check_split(&o, &c, text);
        free_matrices();
    }
    print_outcome(&o);
}

/* --- attention -------------------------------------------------------------------------------------------------- */

struct attention_args {
    struct attention_spec spec;
    struct mat q, keys, values;
};

static int run_attention(const struct backend *b, const void *args, const struct mat *out)
{
    const struct attention_args *a = args;
    return b->core->attention(b, &a->spec, &a->q, &a->keys, &a->values, out, NULL);
}

/* q_row: of the activations; key_row: of the cache */
static double score(const struct attention_args *a, int64_t q_row, int head, int kv_head, int64_t key_row)
{
    const int d = a->spec.heads.head_dim;
    double sum = 0;
    for (int i = 0; i < d; i++)
        sum += (double)at(&a->q, q_row, head * d + i) * (double)at(&a->keys, key_row, kv_head * d + i);
    const double cap = (double)a->spec.softcap;
    sum *= (double)a->spec.scale;
    return cap > 0 ? cap * tanh(sum / cap) : sum;
}

/* out [head_dim]; p: room for a probability of each key */
static void naive_attention(const struct attention_args *a, int64_t row, int head, double *p, double *out)
{
    const struct attention_spec *s = &a->spec;
    const struct heads *h = &s->heads;
    const int kv_head = head / (h->n_heads / h->n_kv_heads);
    const int64_t n_new = a->q.rows / s->sequences.n, slot = row / n_new * s->sequences.max_positions;
    const int64_t position = s->sequences.first_position + row % n_new;
    const int64_t from = s->window && position >= s->window ? position - s->window + 1 : 0;
    double highest = -INFINITY, total = 0;
    for (int64_t k = from; k <= position; k++) {
        p[k] = score(a, row, head, kv_head, slot + k);
        highest = p[k] > highest ? p[k] : highest;
    }
    for (int64_t k = from; k <= position; k++)
        total += p[k] = exp(p[k] - highest);
    for (int i = 0; i < h->head_dim; i++)
        out[i] = 0;
    for (int64_t k = from; k <= position; k++)
        for (int i = 0; i < h->head_dim; i++)
            out[i] += p[k] / total * (double)at(&a->values, slot + k, kv_head * h->head_dim + i);
}

/* A cache of random rows, but NaNs at the positions that are still to come. */
static struct mat make_cache(const struct attention_spec *spec, int64_t positions)
{
    const struct sequences *s = &spec->sequences;
    const struct mat m =
        make_random(DTYPE_F32, s->n * s->max_positions, spec->heads.n_kv_heads * spec->heads.head_dim, 1);
    for (int64_t r = 0; r < m.rows; r++)
        for (int64_t c = 0; r % s->max_positions >= positions && c < m.cols; c++)
            put(&m, r, c, NAN);
    return m;
}

/* rows: new tokens of each sequence */
static void check_attention(struct outcome *o, const struct attention_spec *spec, int64_t rows,
                            double amplitude)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    const int64_t positions = s->first_position + rows;
    struct attention_args a = {*spec,
                               make_random(DTYPE_F32, s->n * rows, h->n_heads * h->head_dim, amplitude),
                               make_cache(spec, positions), make_cache(spec, positions)};
    const struct mat out = make(DTYPE_F32, s->n * rows, a.q.cols);
    double *expected = room((size_t)(out.rows * out.cols), sizeof *expected),
           *p = room((size_t)positions, sizeof *p);
    for (int64_t r = 0; r < out.rows; r++)
        for (int i = 0; row_chosen(r, out.rows) && i < h->n_heads; i++)
            naive_attention(&a, r, i, p, expected + r * out.cols + i * h->head_dim);
    char text[120];
    snprintf(text, sizeof text, "heads %d/%d of %d, window %d, cap %g, %d × %d rows at %d", h->n_heads,
             h->n_kv_heads, h->head_dim, (int)spec->window, (double)spec->softcap, (int)s->n, (int)rows,
             (int)s->first_position);
    run_everywhere(run_attention, &a, &out, text);
    check(o, &out, expected, 0, text);
    free_matrices();
}

static void test_attention(void **state)
{
    (void)state;
    static const int heads[][2] = {{4, 1}, {4, 2}, {8, 8}}, dims[] = {32, 64, 256};
    static const int64_t windows[] = {0, 1, 8, 512};
    static const struct {
        int64_t n, first, rows;
    } places[] = {{1, 0, 1},     {1, 0, 5},   {1, 0, 130},  {1, 37, 1}, {1, 600, 1}, {1, 600, 7},
                  {1, 100, 150}, {1, 511, 2}, {1, 500, 70}, {3, 0, 1},  {5, 37, 1},  {3, 20, 70}};
    struct outcome o = {"attention", 3e-6, 0, 0};
    for (size_t i = 0; i < 3 * 3 * 4 * N_OF(places); i++) {
        const int dim = dims[i / 3 % 3];
        const int64_t n = places[i / 36].n, first = places[i / 36].first, rows = places[i / 36].rows;
        const struct attention_spec spec = {{heads[i % 3][0], heads[i % 3][1], dim},
                                            {n, first, first + rows + (int64_t)(i % 2) * 5},
                                            1 / sqrtf((float)dim),
                                            windows[i / 9 % 4],
                                            (float)(i % 5 == 0   ? 50
                                                    : i % 5 == 1 ? 3
                                                                 : 0)};
        check_attention(&o, &spec, rows, 4);
    }
    /* so many positions that fewer than 64 queries' scores fit the scratch memory */
    for (int64_t window = 0; window <= 512; window += 512) {
        const struct attention_spec spec = {{2, 1, 16}, {1, 40000, 40075}, 0.25f, window, 0};
        check_attention(&o, &spec, 70, 4);
    }
    print_outcome(&o);
    /* scores of thousands: their own FP32 error is what decides between close ones */
    struct outcome extreme = {"attention, scores of thousands", 2e-3, 0, 0};
    check_attention(&extreme, &(struct attention_spec){{4, 2, 64}, {1, 30, 100}, 1, 0, 0}, 70, 1000);
    print_outcome(&extreme);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_rope_table, clean_up),
        cmocka_unit_test_teardown(test_split_qkv, clean_up),
        cmocka_unit_test_teardown(test_attention, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

/* Every operation of the forward pass against the plainest implementation in double that its description in
 * kernels/backend.h allows. Each case runs with one, two and three threads, which must give the same bytes. Rows
 * are longer than the width and end in NaNs: reading them spoils the result, writing them is seen. */
#include "kernels/backend.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>

enum { N_BACKENDS = 3, SLACK = 3 };

static struct backend cpu[N_BACKENDS]; /* with 1, 2, 3 threads */

static int open_backends(void **state)
{
    (void)state;
    int rc = 0;
    for (int i = 0; !rc && i < N_BACKENDS; i++)
        rc = backend_open(&cpu[i], "cpu", i + 1);
    return rc;
}

static int close_backends(void **state)
{
    (void)state;
    for (int i = 0; i < N_BACKENDS; i++)
        backend_close(&cpu[i]);
    return 0;
}

/* --- matrices --------------------------------------------------------------------------------------------------- */

static void *owned[32];
static size_t n_owned;

static void *room(size_t n, size_t size)
{
    void *p = malloc(n * size + 1);
    assert_non_null(p);
    assert_true(n_owned < N_OF(owned));
    return owned[n_owned++] = p;
}

static void free_matrices(void)
{
    while (n_owned)
        free(owned[--n_owned]);
}

/* All bits set: NaN in every float type. */
static void poison(const struct mat *m)
{
    memset(m->data, 0xff, (size_t)(m->rows * m->stride) * dtype_bytes(m->dtype));
}

static struct mat make(enum dtype dtype, int64_t rows, int64_t cols)
{
    struct mat m = {NULL, dtype, rows, cols, cols + SLACK};
    m.data = room((size_t)(rows * m.stride), dtype_bytes(dtype));
    poison(&m);
    return m;
}

static void put(const struct mat *m, int64_t row, int64_t col, double value)
{
    const int64_t at = row * m->stride + col;
    if (m->dtype == DTYPE_F32)
        ((float *)m->data)[at] = (float)value;
    else
        ((uint16_t *)m->data)[at] = naive_bits16(value, m->dtype == DTYPE_F16 ? 5 : 8);
}

static uint64_t random_state = 1; /* every test starts from the same */

static struct mat make_random(enum dtype dtype, int64_t rows, int64_t cols, double amplitude)
{
    struct mat m = make(dtype, rows, cols);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            put(&m, r, c, amplitude * support_uniform(&random_state));
    return m;
}

static float at(const struct mat *m, int64_t row, int64_t col)
{
    return ((const float *)m->data)[row * m->stride + col];
}

static void copy(const struct mat *from, const struct mat *to)
{
    for (int64_t r = 0; r < from->rows; r++)
        memcpy((float *)to->data + r * to->stride, (const float *)from->data + r * from->stride,
               (size_t)from->cols * sizeof(float));
}

/* --- comparing -------------------------------------------------------------------------------------------------- */

/* Rows that are compared where a naive result for all of them would take too long: the first, those around the
 * ends of the runs that kernels work in, and a sample. Of the others it is asked that they are finite. */
static bool row_chosen(int64_t row, int64_t rows)
{
    const int64_t place = row % 64;
    return rows <= 16 || row < 5 || row == rows - 1 || place == 0 || place == 63 || row % 37 == 0;
}

/* What an operation's cases amount to: the worst relative L2 error of any, beside what is allowed. */
struct outcome {
    const char *op;
    double bound, worst;
    size_t cases;
};

static void print_outcome(const struct outcome *o)
{
    print_message("%s: %zu cases, relative L2 error %.2e, at most %.1e allowed\n", o->op, o->cases, o->worst,
                  o->bound);
    assert_true(o->cases > 0);
}

/* `expected` has rows·cols elements, of which the chosen rows are set. `size`²: what Σ expected² would be without
 * cancellation, for sums that may come out near zero; 0 where there is no such thing. */
static void check(struct outcome *o, const struct mat *out, const double *expected, double size_squared,
                  const char *text)
{
    double error = 0, size = 0;
    for (int64_t r = 0; r < out->rows; r++) {
        for (int64_t c = 0; c < out->cols; c++) {
            const double got = (double)at(out, r, c);
            if (!isfinite(got))
                fail_msg("%s: %s: row %d column %d is %g", o->op, text, (int)r, (int)c, got);
            if (!row_chosen(r, out->rows))
                continue;
            const double e = expected[r * out->cols + c];
            error += (got - e) * (got - e);
            size += e * e;
        }
        for (int64_t c = out->cols; c < out->stride; c++) {
            uint32_t bits;
            memcpy(&bits, (const float *)out->data + r * out->stride + c, sizeof bits);
            if (bits != UINT32_MAX)
                fail_msg("%s: %s: row %d was written beyond its end", o->op, text, (int)r);
        }
    }
    size = size > size_squared ? size : size_squared;
    const double relative = error > 0 ? sqrt(error / size) : 0;
    if (!(error >= 0 && relative <= o->bound))
        fail_msg("%s: %s: relative L2 error %.3e, at most %.1e allowed", o->op, text, relative, o->bound);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

/* One case of an operation; in-place operations copy their operand to `out` first. */
typedef int (*case_fn)(const struct backend *b, const void *args, const struct mat *out);

static void run_everywhere(case_fn run, const void *args, const struct mat *out, const char *text)
{
    const size_t n = (size_t)(out->rows * out->stride) * sizeof(float);
    void *first = malloc(n);
    assert_non_null(first);
    for (int i = 0; i < N_BACKENDS; i++) {
        poison(out);
        assert_ok(run(&cpu[i], args, out));
        if (i == 0)
            memcpy(first, out->data, n);
        else if (memcmp(first, out->data, n))
            fail_msg("%s: %d threads give other bytes than one", text, i + 1);
    }
    free(first);
}

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

/* --- embed ------------------------------------------------------------------------------------------------------ */

struct embed_args {
    const struct mat *table;
    const int32_t *ids;
    float scale;
};

static int run_embed(const struct backend *b, const void *args, const struct mat *out)
{
    const struct embed_args *a = args;
    return b->core->embed(b, a->table, a->ids, a->scale, out);
}

static void test_embed(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 100, 256, 300, 640};
    const int32_t ids[] = {0, 49, 7, 7, 31, 0, 48};
    struct outcome o = {"embed", 1e-7, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(float_types); i++) {
        const int64_t cols = widths[i / N_OF(float_types)];
        const struct mat table = make_random(float_types[i % N_OF(float_types)], 50, cols, 0.1);
        const struct mat out = make(DTYPE_F32, N_OF(ids), cols);
        const struct embed_args a = {&table, ids, i % 2 ? 1 : sqrtf((float)cols)};
        double *expected = room(N_OF(ids) * (size_t)cols, sizeof *expected);
        for (size_t r = 0; r < N_OF(ids); r++)
            for (int64_t c = 0; c < cols; c++)
                expected[r * (size_t)cols + (size_t)c] = naive_element(&table, ids[r], c) * (double)a.scale;
        run_everywhere(run_embed, &a, &out, "embed");
        check(&o, &out, expected, 0, dtype_name(table.dtype));
        free_matrices();
    }
    print_outcome(&o);
}

/* --- rms_norm --------------------------------------------------------------------------------------------------- */

enum alias { APART, OUT_IS_X, OUT_IS_RESIDUAL };

struct norm_args {
    const struct mat *x, *w, *residual;
    struct norm_spec spec;
    enum alias alias;
};

static int run_norm(const struct backend *b, const void *args, const struct mat *out)
{
    const struct norm_args *a = args;
    if (a->alias != APART)
        copy(a->alias == OUT_IS_X ? a->x : a->residual, out);
    return b->core->rms_norm(b, a->alias == OUT_IS_X ? out : a->x, a->w, &a->spec,
                             a->alias == OUT_IS_RESIDUAL ? out : a->residual, out);
}

static double *naive_norm(const struct norm_args *a)
{
    const int64_t rows = a->x->rows, cols = a->x->cols;
    double *expected = room((size_t)(rows * cols), sizeof *expected);
    for (int64_t r = 0; r < rows; r++) {
        double squares = 0;
        for (int64_t c = 0; c < cols; c++)
            squares += (double)at(a->x, r, c) * (double)at(a->x, r, c);
        const double root = sqrt(squares / (double)cols + (double)a->spec.eps);
        for (int64_t c = 0; c < cols; c++) {
            const double weight = !a->w ? 1 : naive_element(a->w, 0, c) + (a->spec.unit_offset ? 1 : 0);
            expected[r * cols + c] =
                (double)at(a->x, r, c) / root * weight + (a->residual ? (double)at(a->residual, r, c) : 0);
        }
    }
    return expected;
}

/* Rows from tiny, where eps decides, to huge; the last one is zero. */
static struct mat norm_input(int64_t rows, int64_t cols)
{
    const struct mat x = make_random(DTYPE_F32, rows, cols, 1);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            put(&x, r, c, (double)at(&x, r, c) * (r == rows - 1 && r ? 0 : pow(10, (double)(r % 9) - 5)));
    return x;
}

static void test_rms_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 100, 256, 257, 640, 1000}, heights[] = {1, 33, 100};
    struct outcome o = {"rms_norm", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 4 * 2 * 4; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = heights[i / N_OF(widths) % N_OF(heights)];
        const size_t rest = i / N_OF(widths) / N_OF(heights), weight = rest % 4, kind = rest / 8;
        const struct mat x = norm_input(rows, cols), out = make(DTYPE_F32, rows, cols);
        const struct mat w = make_random(float_types[weight % 3], 1, cols, 2);
        const struct mat residual = make_random(DTYPE_F32, rows, cols, 3);
        /* kinds: plain, out = x, with a residual, out = residual */
        const struct norm_args a = {&x,
                                    weight < 3 ? &w : NULL,
                                    kind >= 2 ? &residual : NULL,
                                    {1e-6f, rest / 4 % 2 == 1},
                                    kind == 1   ? OUT_IS_X
                                    : kind == 3 ? OUT_IS_RESIDUAL
                                                : APART};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, weight %d, offset %d, kind %d", (int)rows, (int)cols,
                 (int)weight, a.spec.unit_offset, (int)kind);
        run_everywhere(run_norm, &a, &out, text);
        check(&o, &out, naive_norm(&a), 0, text);
        free_matrices();
    }
    print_outcome(&o);
}

/* The heads of q and k are rows of a view, normed in place. */
static void test_rms_norm_of_heads(void **state)
{
    (void)state;
    enum { ROWS = 40, HEADS = 4, DIM = 32 };
    struct outcome o = {"rms_norm of heads", 1e-6, 0, 0};
    struct mat x = make_random(DTYPE_F32, 1, ROWS * HEADS * DIM, 2),
               out = make(DTYPE_F32, 1, ROWS * HEADS * DIM);
    const struct mat w = make_random(DTYPE_BF16, 1, DIM, 1);
    x.rows = out.rows = ROWS * HEADS;
    x.cols = x.stride = out.cols = out.stride = DIM;
    const struct norm_args a = {&x, &w, NULL, {1e-6f, true}, OUT_IS_X};
    run_everywhere(run_norm, &a, &out, "heads");
    check(&o, &out, naive_norm(&a), 0, "heads");
    assert_true(isnan(((float *)out.data)[ROWS * HEADS * DIM]));
    free_matrices();
    print_outcome(&o);
}

/* --- gemm and q_gemm -------------------------------------------------------------------------------------------- */

struct gemm_args {
    struct mat x;
    const struct mat *w; /* one of the two */
    const struct qmat *q;
};

static int run_gemm(const struct backend *b, const void *args, const struct mat *out)
{
    const struct gemm_args *a = args;
    return a->q ? b->core->q_gemm(b, &a->x, a->q, out) : b->core->gemm(b, &a->x, a->w, out);
}

/* w [n, k]: the weights as they are, or as the packed words say. */
static double *naive_weights(const struct mat *w, const struct qmat *q)
{
    const int64_t rows = w ? w->rows : q->packed.rows, cols = w ? w->cols : q->cols;
    double *out = room((size_t)(rows * cols), sizeof *out);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            if (w) {
                out[r * cols + c] = naive_element(w, r, c);
                continue;
            }
            const uint32_t word = ((const uint32_t *)q->packed.data)[r * q->packed.stride + c * q->bits / 32];
            const int code = (int)(word >> c * q->bits % 32 & ((1u << q->bits) - 1)) - (1 << (q->bits - 1));
            const int8_t *zeros = q->zeros.data;
            const int zero = zeros ? zeros[r * q->zeros.stride + c / q->group] : 0;
            out[r * cols + c] = naive_bf16((code - zero) * naive_element(&q->scales, r, c / q->group));
        }
    return out;
}

/* The chosen rows of x·wᵀ; *size_squared: the squares of the terms, summed. */
static void naive_product(const struct mat *x, const double *w, int64_t n, double *out, double *size_squared)
{
    *size_squared = 0;
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t c = 0; row_chosen(r, x->rows) && c < n; c++) {
            double sum = 0, squares = 0;
            for (int64_t k = 0; k < x->cols; k++) {
                const double term = (double)at(x, r, k) * w[c * x->cols + k];
                sum += term;
                squares += term * term;
            }
            out[r * n + c] = sum;
            *size_squared += squares;
        }
}

static void check_products(struct outcome *o, const struct mat *w, const struct qmat *q, const char *text)
{
    static const int64_t heights[] = {1, 2, 4, 5, 64, 300};
    const int64_t n = w ? w->rows : q->packed.rows, cols = w ? w->cols : q->cols;
    const double *weights = naive_weights(w, q);
    double *expected = room((size_t)(300 * n), sizeof *expected);
    struct gemm_args a = {make_random(DTYPE_F32, 300, cols, 1), w, q};
    struct mat out = make(DTYPE_F32, 300, n);
    for (size_t i = 0; i < N_OF(heights); i++) {
        char case_text[160];
        snprintf(case_text, sizeof case_text, "%d rows, w %d × %d, %s", (int)heights[i], (int)n, (int)cols,
                 text);
        double size_squared;
        a.x.rows = out.rows = heights[i];
        naive_product(&a.x, weights, n, expected, &size_squared);
        run_everywhere(run_gemm, &a, &out, case_text);
        check(o, &out, expected, size_squared, case_text);
    }
}

static const int64_t out_features[] = {1, 63, 64, 256, 300, 1000};
static const int64_t in_features[] = {16, 100, 128, 256, 640};
enum { N_SHAPES = N_OF(out_features) * N_OF(in_features) };

static void test_gemm(void **state)
{
    (void)state;
    struct outcome o = {"gemm", 2e-6, 0, 0};
    for (size_t i = 0; i <= N_SHAPES; i++)
        for (size_t t = 0; t < N_OF(float_types); t++) {
            /* the last shape's panels are narrower, to fit the scratch memory */
            const int64_t n = i < N_SHAPES ? out_features[i % N_OF(out_features)] : 300;
            const int64_t cols = i < N_SHAPES ? in_features[i / N_OF(out_features)] : 10240;
            const struct mat w = make_random(float_types[t], n, cols, 0.1);
            check_products(&o, &w, NULL, dtype_name(w.dtype));
            free_matrices();
        }
    print_outcome(&o);
}

struct q_kind {
    int bits;
    int64_t group; /* 0: a whole row */
    bool asymmetric;
};

static const struct q_kind q_kinds[] = {
    {4, 32, false}, {4, 64, false},  {4, 128, false}, {4, 256, false}, {4, 0, false},
    {4, 32, true},  {4, 64, true},   {4, 128, true},  {4, 256, true},  {4, 0, true},
    {8, 32, false}, {8, 128, false}, {8, 128, true},  {8, 0, false},
};

/* Any words, scales of either sign, any zero points of the code's range. */
static struct qmat make_packed(const struct q_kind *kind, int64_t n, int64_t cols)
{
    static uint64_t seed = 2;
    const int64_t group = kind->group ? kind->group : cols, groups = (cols + group - 1) / group;
    const int64_t words = (cols * kind->bits + 31) / 32, used = cols * kind->bits % 32;
    struct qmat q = {.packed = {NULL, DTYPE_I32, n, words, words + SLACK},
                     .scales = make(DTYPE_BF16, n, groups),
                     .zeros = {NULL, DTYPE_I8, n, groups, groups + SLACK},
                     .bits = kind->bits,
                     .group = group,
                     .cols = cols};
    uint32_t *packed = q.packed.data = room((size_t)(n * q.packed.stride), sizeof *packed);
    int8_t *zeros = room((size_t)(n * q.zeros.stride), 1);
    if (kind->asymmetric)
        q.zeros.data = zeros;
    for (int64_t i = 0; i < n * q.packed.stride; i++)
        packed[i] = (uint32_t)support_random(&seed);
    for (int64_t r = 0; used && r < n; r++)
        packed[r * q.packed.stride + words - 1] &= (1u << used) - 1;
    for (int64_t i = 0; i < n * q.zeros.stride; i++)
        zeros[i] = (int8_t)((int)(support_random(&seed) % (1u << kind->bits)) - (1 << (kind->bits - 1)));
    for (int64_t r = 0; r < n; r++)
        for (int64_t g = 0; g < groups; g++) {
            const double u = support_uniform(&seed);
            put(&q.scales, r, g, copysign(0.01 + 0.1 * fabs(u), u));
        }
    return q;
}

static void test_q_gemm(void **state)
{
    (void)state;
    struct outcome o = {"q_gemm", 2e-6, 0, 0};
    for (size_t i = 0; i <= N_SHAPES; i++)
        for (size_t k = 0; k < N_OF(q_kinds); k++) {
            const int64_t n = i < N_SHAPES ? out_features[i % N_OF(out_features)] : 300;
            const int64_t cols = i < N_SHAPES ? in_features[i / N_OF(out_features)] : 10240;
            /* the large shapes take their turns with the kinds */
            if (n * cols > 100000 && (i + k) % 5 != 0)
                continue;
            const struct qmat q = make_packed(&q_kinds[k], n, cols);
            char text[80];
            snprintf(text, sizeof text, "%d bits, group %d%s", q.bits, (int)q.group,
                     q_kinds[k].asymmetric ? ", asymmetric" : "");
            check_products(&o, NULL, &q, text);
            free_matrices();
        }
    print_outcome(&o);
}

/* --- rotary positions ------------------------------------------------------------------------------------------- */

struct rope_args {
    const struct mat *x, *table;
    const float *inv_freq;
    int64_t first_position;
    int head_dim;
};

static int run_table(const struct backend *b, const void *args, const struct mat *out)
{
    const struct rope_args *a = args;
    return b->core->rope_table(b, a->inv_freq, a->first_position, out);
}

static int run_rope(const struct backend *b, const void *args, const struct mat *out)
{
    const struct rope_args *a = args;
    copy(a->x, out);
    return b->core->rope(b, out, a->head_dim, a->table);
}

/* Angles are FP32 products, as in the models' own code; what is taken of them is not. */
static void check_table(struct outcome *o, const struct rope_args *a)
{
    const int64_t half = a->table->cols / 2, rows = a->table->rows;
    double *expected = room((size_t)(rows * 2 * half), sizeof *expected);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)(a->first_position + r) * a->inv_freq[i];
            expected[r * 2 * half + i] = cos((double)angle);
            expected[r * 2 * half + half + i] = sin((double)angle);
        }
    run_everywhere(run_table, a, a->table, "rope_table");
    check(o, a->table, expected, 0, "rope_table");
}

static void check_rope(struct outcome *o, const struct rope_args *a)
{
    const int64_t half = a->head_dim / 2, rows = a->x->rows, cols = a->x->cols;
    const struct mat out = make(DTYPE_F32, rows, cols);
    double *expected = room((size_t)(rows * cols), sizeof *expected);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const int64_t i = c % (2 * half);
            const double x = (double)at(a->x, r, c),
                         other = (double)at(a->x, r, i < half ? c + half : c - half);
            const double cosine = (double)at(a->table, r, i % half),
                         sine = (double)at(a->table, r, half + i % half);
            expected[r * cols + c] = x * cosine + (i < half ? -other : other) * sine;
        }
    run_everywhere(run_rope, a, &out, "rope");
    check(o, &out, expected, 0, "rope");
}

static void test_rope(void **state)
{
    (void)state;
    static const int dims[] = {2, 32, 64, 256};
    static const int64_t heights[] = {1, 3, 33, 100}, heads[] = {1, 4}, firsts[] = {0, 5, 8000, 131000};
    struct outcome table_outcome = {"rope_table", 1e-7, 0, 0}, rope_outcome = {"rope", 2e-7, 0, 0};
    for (size_t i = 0; i < N_OF(dims) * N_OF(heights) * N_OF(heads) * N_OF(firsts); i++) {
        const int dim = dims[i % 4];
        const int64_t rows = heights[i / 4 % 4];
        float inv_freq[128];
        for (int k = 0; k < dim / 2; k++)
            inv_freq[k] = (float)pow(10000, -2.0 * k / dim);
        const struct mat x = make_random(DTYPE_F32, rows, dim * heads[i / 64], 3);
        const struct mat table = make(DTYPE_F32, rows + (int64_t)(i % 3), dim); /* may have rows to spare */
        const struct rope_args a = {&x, &table, inv_freq, firsts[i / 16 % 4], dim};
        check_table(&table_outcome, &a);
        check_rope(&rope_outcome, &a);
        free_matrices();
    }
    print_outcome(&table_outcome);
    print_outcome(&rope_outcome);
}

/* --- attention -------------------------------------------------------------------------------------------------- */

struct attention_args {
    struct attention_spec spec;
    struct mat q, keys, values;
};

static int run_attention(const struct backend *b, const void *args, const struct mat *out)
{
    const struct attention_args *a = args;
    return b->core->attention(b, &a->spec, &a->q, &a->keys, &a->values, out);
}

static double score(const struct attention_args *a, int64_t row, int head, int kv_head, int64_t key)
{
    double sum = 0;
    for (int i = 0; i < a->spec.head_dim; i++)
        sum += (double)at(&a->q, row, head * a->spec.head_dim + i) *
               (double)at(&a->keys, key, kv_head * a->spec.head_dim + i);
    return sum * (double)a->spec.scale;
}

/* out [head_dim]; p: room for a probability of each key */
static void naive_attention(const struct attention_args *a, int64_t row, int head, double *p, double *out)
{
    const struct attention_spec *s = &a->spec;
    const int kv_head = head / (s->n_heads / s->n_kv_heads);
    const int64_t position = s->first_position + row;
    const int64_t from = s->window && position >= s->window ? position - s->window + 1 : 0;
    double highest = -INFINITY, total = 0;
    for (int64_t k = from; k <= position; k++) {
        p[k] = score(a, row, head, kv_head, k);
        highest = p[k] > highest ? p[k] : highest;
    }
    for (int64_t k = from; k <= position; k++)
        total += p[k] = exp(p[k] - highest);
    for (int i = 0; i < s->head_dim; i++)
        out[i] = 0;
    for (int64_t k = from; k <= position; k++)
        for (int i = 0; i < s->head_dim; i++)
            out[i] += p[k] / total * (double)at(&a->values, k, kv_head * s->head_dim + i);
}

/* The cache goes on beyond the last position, with NaNs. */
static void check_attention(struct outcome *o, const struct attention_spec *spec, int64_t rows,
                            double amplitude)
{
    const int64_t positions = spec->first_position + rows, kv = spec->n_kv_heads * spec->head_dim;
    struct attention_args a = {*spec, make_random(DTYPE_F32, rows, spec->n_heads * spec->head_dim, amplitude),
                               make_random(DTYPE_F32, positions + 5, kv, 1),
                               make_random(DTYPE_F32, positions + 5, kv, 1)};
    for (int64_t i = 0; i < 5 * a.keys.stride; i++)
        ((float *)a.keys.data)[positions * a.keys.stride + i] =
            ((float *)a.values.data)[positions * a.values.stride + i] = NAN;
    const struct mat out = make(DTYPE_F32, rows, a.q.cols);
    double *expected = room((size_t)(rows * out.cols), sizeof *expected),
           *p = room((size_t)positions, sizeof *p);
    for (int64_t r = 0; r < rows; r++)
        for (int h = 0; row_chosen(r, rows) && h < spec->n_heads; h++)
            naive_attention(&a, r, h, p, expected + r * out.cols + h * spec->head_dim);
    char text[120];
    snprintf(text, sizeof text, "heads %d/%d of %d, window %d, %d rows at %d", spec->n_heads,
             spec->n_kv_heads, spec->head_dim, (int)spec->window, (int)rows, (int)spec->first_position);
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
        int64_t first, rows;
    } places[] = {{0, 1}, {0, 5}, {0, 130}, {37, 1}, {600, 1}, {600, 7}, {100, 150}, {511, 2}, {500, 70}};
    struct outcome o = {"attention", 3e-6, 0, 0};
    for (size_t i = 0; i < 3 * 3 * 4 * N_OF(places); i++) {
        const int dim = dims[i / 3 % 3];
        const struct attention_spec spec = {heads[i % 3][0],       heads[i % 3][1],    dim,
                                            1 / sqrtf((float)dim), windows[i / 9 % 4], places[i / 36].first};
        check_attention(&o, &spec, places[i / 36].rows, 4);
    }
    /* so many positions that fewer than 64 queries' scores fit the scratch memory */
    for (int64_t window = 0; window <= 512; window += 512)
        check_attention(&o, &(struct attention_spec){2, 1, 16, 0.25f, window, 40000}, 70, 4);
    print_outcome(&o);
    /* scores of thousands: their own FP32 error is what decides between close ones */
    struct outcome extreme = {"attention, scores of thousands", 2e-3, 0, 0};
    check_attention(&extreme, &(struct attention_spec){4, 2, 64, 1, 0, 30}, 70, 1000);
    print_outcome(&extreme);
}

/* --- activations ------------------------------------------------------------------------------------------------ */

struct geglu_args {
    const struct mat *gate, *up;
    bool in_place;
};

static int run_geglu(const struct backend *b, const void *args, const struct mat *out)
{
    const struct geglu_args *a = args;
    if (a->in_place)
        copy(a->gate, out);
    return b->core->geglu(b, a->in_place ? out : a->gate, a->up, out);
}

static void check_geglu(struct outcome *o, const struct geglu_args *a, const char *text)
{
    const int64_t rows = a->gate->rows, cols = a->gate->cols;
    const struct mat out = make(DTYPE_F32, rows, cols);
    double *expected = room((size_t)(rows * cols), sizeof *expected), size_squared = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const double z = (double)at(a->gate, r, c), up = (double)at(a->up, r, c);
            size_squared += 0.25 * z * z * up * up; /* 1 + tanh cancels for negative gates */
            expected[r * cols + c] =
                0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z))) * up;
        }
    run_everywhere(run_geglu, a, &out, text);
    check(o, &out, expected, size_squared, text);
}

static void test_geglu(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 17, 33, 100, 1001}, heights[] = {1, 40, 70};
    static const double extremes[] = {0, -0.0, 1e-30, -1e-30, 50, -50, 1e4, -1e4, 1e20, -1e20};
    struct outcome o = {"geglu", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 2; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = heights[i / N_OF(widths) % N_OF(heights)];
        const struct mat gate = make_random(DTYPE_F32, rows, cols, 8),
                         up = make_random(DTYPE_F32, rows, cols, 2);
        char text[60];
        snprintf(text, sizeof text, "%d × %d", (int)rows, (int)cols);
        check_geglu(&o, &(struct geglu_args){&gate, &up, i / N_OF(widths) / N_OF(heights) == 1}, text);
        free_matrices();
    }
    for (size_t i = 0; i < N_OF(extremes); i++) {
        const struct mat gate = make(DTYPE_F32, 1, 19), up = make_random(DTYPE_F32, 1, 19, 2);
        for (int64_t c = 0; c < 19; c++)
            put(&gate, 0, c, extremes[i]);
        check_geglu(&o, &(struct geglu_args){&gate, &up, false}, "extreme gates");
        free_matrices();
    }
    print_outcome(&o);
}

struct softcap_args {
    const struct mat *x;
    float cap;
};

static int run_softcap(const struct backend *b, const void *args, const struct mat *out)
{
    const struct softcap_args *a = args;
    copy(a->x, out);
    return b->core->softcap(b, out, a->cap);
}

static void test_softcap(void **state)
{
    (void)state;
    static const double amplitudes[] = {1e-3, 1, 50, 1e4};
    struct outcome o = {"softcap", 2e-7, 0, 0};
    for (size_t i = 0; i < N_OF(amplitudes) * 2; i++) {
        const struct mat x = make_random(DTYPE_F32, 3, 101, amplitudes[i / 2]), out = make(DTYPE_F32, 3, 101);
        const struct softcap_args a = {&x, i % 2 ? 30 : 50};
        double expected[3 * 101];
        for (int64_t k = 0; k < 3 * 101; k++)
            expected[k] = (double)a.cap * tanh((double)at(&x, k / 101, k % 101) / (double)a.cap);
        run_everywhere(run_softcap, &a, &out, "softcap");
        check(&o, &out, expected, 0, "softcap");
        free_matrices();
    }
    print_outcome(&o);
}

/* --- compare_rows ----------------------------------------------------------------------------------------------- */

struct naive_row {
    double nll_a, nll_b, kl;
    double moved; /* Σ p_a·|log p_a − log p_b|: what the divergence is a difference of */
};

static double naive_log_sum(const struct mat *m, int64_t row)
{
    double highest = -INFINITY, total = 0;
    for (int64_t c = 0; c < m->cols; c++)
        highest = fmax(highest, (double)at(m, row, c));
    for (int64_t c = 0; c < m->cols; c++)
        total += exp((double)at(m, row, c) - highest);
    return highest + log(total);
}

static struct naive_row naive_compare(const struct mat *a, const struct mat *b, int64_t row, int32_t target)
{
    const double sum_a = naive_log_sum(a, row), sum_b = naive_log_sum(b, row);
    struct naive_row out = {sum_a - (double)at(a, row, target), sum_b - (double)at(b, row, target), 0, 0};
    for (int64_t c = 0; c < a->cols; c++) {
        const double log_a = (double)at(a, row, c) - sum_a, log_b = (double)at(b, row, c) - sum_b;
        out.kl += exp(log_a) * (log_a - log_b);
        out.moved += exp(log_a) * fabs(log_a - log_b);
    }
    return out;
}

static int32_t naive_top(const struct mat *m, int64_t row)
{
    int32_t top = 0;
    for (int32_t c = 0; c < m->cols; c++)
        if (at(m, row, c) > at(m, row, top))
            top = c;
    return top;
}

static void close_to(struct outcome *o, double got, double expected, double size, const char *what)
{
    const double relative = fabs(got - expected) / size;
    if (!(relative <= o->bound))
        fail_msg("%s: %s is %.9g, expected %.9g", o->op, what, got, expected);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

enum { COMPARED = 7 };

static void check_compared(struct outcome *o, const struct mat *a, const struct mat *b)
{
    int32_t targets[COMPARED];
    struct row_comparison rows[N_BACKENDS][COMPARED], alone[COMPARED];
    for (int r = 0; r < COMPARED; r++)
        targets[r] = (int32_t)(a->cols - 1 - r * (a->cols - 1) / (COMPARED - 1));
    memset(rows, 0xff, sizeof rows);
    for (int i = 0; i < N_BACKENDS; i++)
        assert_ok(cpu[i].core->compare_rows(&cpu[i], a, b, targets, rows[i]));
    assert_memory_equal(rows[0], rows[1], sizeof rows[0]);
    assert_memory_equal(rows[0], rows[2], sizeof rows[0]);
    assert_ok(cpu[1].core->compare_rows(&cpu[1], a, NULL, targets, alone));
    for (int r = 0; r < COMPARED; r++) {
        const struct row_comparison *got = &rows[0][r];
        const struct naive_row e = naive_compare(a, b, r, targets[r]);
        close_to(o, (double)got->nll_a, e.nll_a, 1 + e.nll_a, "nll_a");
        close_to(o, (double)got->nll_b, e.nll_b, 1 + e.nll_b, "nll_b");
        /* some 10^-7 nats come from the FP32 exponentials in both log-sums; the rest from shifting by a log-sum that
           near 80 is known to 2^-18, which scales every probability */
        close_to(o, (double)got->kl, e.kl, 0.1 + 10 * e.moved, "kl");
        assert_int_equal(got->top_a, naive_top(a, r));
        assert_int_equal(got->top_b, naive_top(b, r));
        assert_memory_equal(&alone[r].nll_a, &got->nll_a, sizeof got->nll_a);
        assert_int_equal(alone[r].top_a, got->top_a);
    }
}

static void test_compare_rows(void **state)
{
    (void)state;
    static const int64_t vocabularies[] = {1, 17, 2048, 5000};
    static const double noises[] = {1e-3, 0.1, 3};
    struct outcome o = {"compare_rows", 2e-6, 0, 0};
    for (size_t i = 0; i < N_OF(vocabularies) * N_OF(noises); i++) {
        const int64_t n = vocabularies[i % 4];
        const struct mat a = make_random(DTYPE_F32, COMPARED, n, 12),
                         b = make_random(DTYPE_F32, COMPARED, n, 1);
        for (int64_t r = 0; r < COMPARED; r++)
            for (int64_t c = 0; c < n; c++)
                put(&b, r, c, (double)at(&a, r, c) + noises[i / 4] * (double)at(&b, r, c));
        check_compared(&o, &a, &b);
        free_matrices();
    }
    print_outcome(&o);
}

static void test_compare_extremes(void **state)
{
    (void)state;
    struct outcome o = {"compare_rows, logits of ±80", 1e-6, 0, 0};
    for (int64_t n = 17; n <= 5000; n += 4983)
        for (int kind = 0; kind < 4; kind++) {
            const struct mat a = make(DTYPE_F32, COMPARED, n), b = make(DTYPE_F32, COMPARED, n);
            for (int64_t r = 0; r < COMPARED; r++)
                for (int64_t c = 0; c < n; c++) {
                    /* one peak each, in different places; half and half, opposite; all equal; the same peak */
                    const bool in_a[] = {c == r, (c + r) % 2 == 0, true, c == 3};
                    const bool in_b[] = {c == n - 1 - r, (c + r) % 2 == 1, false, c == 3};
                    put(&a, r, c, in_a[kind] ? 80 : -80);
                    put(&b, r, c, in_b[kind] ? 80 : -80);
                }
            check_compared(&o, &a, &b);
            free_matrices();
        }
    print_outcome(&o);
}

static void test_compare_equal(void **state)
{
    (void)state;
    const int32_t targets[COMPARED] = {0};
    struct row_comparison rows[COMPARED];
    const struct mat a = make_random(DTYPE_F32, COMPARED, 5000, 30), b = make(DTYPE_F32, COMPARED, 5000);
    copy(&a, &b);
    assert_ok(cpu[2].core->compare_rows(&cpu[2], &a, &b, targets, rows));
    for (int r = 0; r < COMPARED; r++)
        assert_true(rows[r].kl == 0 && rows[r].nll_a == rows[r].nll_b && rows[r].top_a == rows[r].top_b);
    /* of equal logits the first counts */
    for (int64_t c = 100; c < 5000; c += 700)
        put(&a, 0, c, 31);
    assert_ok(cpu[2].core->compare_rows(&cpu[2], &a, NULL, targets, rows));
    assert_int_equal(rows[0].top_a, 100);
    free_matrices();
}

/* --- what must not pass unseen ---------------------------------------------------------------------------------- */

/* A model that has gone wrong shows in its numbers: no operation turns a NaN into something finite. */
static void test_nan_stays(void **state)
{
    (void)state;
    const struct backend *b = &cpu[1];
    const struct mat a = make_random(DTYPE_F32, 1, 64, 1), x = make_random(DTYPE_F32, 1, 64, 1);
    const struct mat out = make_random(DTYPE_F32, 1, 64, 1);
    const int32_t target = 0;
    struct row_comparison row;
    put(&a, 0, 33, NAN);
    assert_ok(b->core->compare_rows(b, &a, NULL, &target, &row));
    assert_true(isnan(row.nll_a));
    assert_ok(b->core->compare_rows(b, &x, &a, &target, &row));
    assert_true(isnan(row.nll_b) && isnan(row.kl));
    assert_ok(b->core->geglu(b, &a, &x, &out));
    assert_true(isnan(at(&out, 0, 33)) && isfinite(at(&out, 0, 32)));
    const struct mat keys = make_random(DTYPE_F32, 40, 64, 1);
    assert_ok(b->core->attention(b, &(struct attention_spec){1, 1, 64, 1, 0, 39}, &a, &keys, &keys, &out));
    for (int64_t c = 0; c < 64; c++)
        assert_true(isnan(at(&out, 0, c)));
    free_matrices();
}

static void test_unsupported(void **state)
{
    (void)state;
    const struct backend *b = &cpu[0];
    const struct mat x = make_random(DTYPE_F32, 5, 16, 1), out = make(DTYPE_F32, 5, 16);
    struct mat w = make_random(DTYPE_F32, 16, 16, 1);
    const int32_t ids[5] = {0};
    w.dtype = DTYPE_I8;
    assert_error(b->core->gemm(b, &x, &w, &out), ERR_UNSUPPORTED, "gemm: dtype I8");
    assert_error(b->core->embed(b, &w, ids, 1, &out), ERR_UNSUPPORTED, "embed: dtype I8");
    w.rows = 1;
    assert_error(b->core->rms_norm(b, &x, &w, &(struct norm_spec){1e-6f, true}, NULL, &out), ERR_UNSUPPORTED,
                 "rms_norm: dtype I8");
    struct qmat q = make_packed(&(struct q_kind){4, 0, false}, 16, 16);
    q.bits = 2;
    assert_error(b->core->q_gemm(b, &x, &q, &out), ERR_UNSUPPORTED, "q_gemm: 2 bits, expected 4 or 8");
    free_matrices();
}

/* A test that failed has not come to it, and must not change the numbers of the next. */
static int clean_up(void **state)
{
    (void)state;
    random_state = 1;
    free_matrices();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_embed, clean_up),
        cmocka_unit_test_teardown(test_rms_norm, clean_up),
        cmocka_unit_test_teardown(test_rms_norm_of_heads, clean_up),
        cmocka_unit_test_teardown(test_gemm, clean_up),
        cmocka_unit_test_teardown(test_q_gemm, clean_up),
        cmocka_unit_test_teardown(test_rope, clean_up),
        cmocka_unit_test_teardown(test_attention, clean_up),
        cmocka_unit_test_teardown(test_geglu, clean_up),
        cmocka_unit_test_teardown(test_softcap, clean_up),
        cmocka_unit_test_teardown(test_compare_rows, clean_up),
        cmocka_unit_test_teardown(test_compare_extremes, clean_up),
        cmocka_unit_test_teardown(test_compare_equal, clean_up),
        cmocka_unit_test_teardown(test_nan_stays, clean_up),
        cmocka_unit_test_teardown(test_unsupported, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

/* Gradients of the forward pass's operations but for attention's, against formulas in double and against differences of
 * a forward pass in double; the loss of a block. Each case runs with one, two and three threads, which must give the same
 * bytes. */
#include "tests/unit/naive.h"
#include "tests/unit/rounding_support.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
static const double STEP = 1e-4; /* of differences, for operands of about 1 */

/* --- products --------------------------------------------------------------------------------------------------- */

struct product_args {
    const struct mat *dy, *other, *out; /* other: the weight, or x */
    bool add;
};

static int run_dgrad(const struct backend *b, const void *args)
{
    const struct product_args *a = args;
    return b->train->gemm_dgrad(b, a->dy, a->other, a->add, a->out);
}

static int run_wgrad(const struct backend *b, const void *args)
{
    const struct product_args *a = args;
    return b->train->gemm_wgrad(b, a->dy, a->other, a->add, a->out);
}

/* out[i, c] += Σ_k dy[i, k]·other[k, c], or dy[k, i] for gradients by the weight */
static double *naive_product(const struct product_args *a, bool by_weight)
{
    const int64_t depth = a->other->rows, cols = a->other->cols;
    double *out = a->add ? naive_rows(a->out) : zeros(a->out->rows * cols);
    const double *dy = naive_rows(a->dy), *other = naive_rows(a->other);
    for (int64_t i = 0; i < a->out->rows; i++)
        for (int64_t k = 0; k < depth; k++) {
            const double f = by_weight ? dy[k * a->dy->cols + i] : dy[i * depth + k];
            for (int64_t c = 0; c < cols; c++)
                out[i * cols + c] += f * other[k * cols + c];
        }
    return out;
}

static void check_product(struct outcome *o, const struct product_args *a, bool by_weight, const char *text)
{
    const double *expected = naive_product(a, by_weight);
    const struct mat *const outs[] = {a->out};
    run_alike(by_weight ? run_wgrad : run_dgrad, a, outs, 1, text);
    check(o, a->out, expected, 0, text);
}

/* Single rows and columns, odd ones, and more than a task takes of each: 256 rows, 512 columns, 2048 terms. */
static const int64_t products[][3] = {
    {1, 1, 1},   {1, 37, 19},    {5, 1, 1},     {33, 64, 48},
    {70, 17, 1}, {258, 40, 515}, {2, 2100, 40}, {3, 300, 530},
};

static void test_products(void **state)
{
    (void)state;
    struct outcome by_input = {"gemm_dgrad", 2e-6, 0, 0}, by_weight = {"gemm_wgrad", 2e-6, 0, 0};
    for (size_t i = 0; i < N_OF(products) * N_OF(float_types) * 2; i++) {
        const int64_t *p = products[i % N_OF(products)];
        const size_t rest = i / N_OF(products);
        const bool add = rest % 2;
        const struct mat dy = make_random(DTYPE_F32, p[0], p[1], 1),
                         w = make_random(float_types[rest / 2], p[1], p[2], 1),
                         x = make_random(DTYPE_F32, p[0], p[2], 1),
                         dx = add ? make_random(DTYPE_F32, p[0], p[2], 3) : make(DTYPE_F32, p[0], p[2]),
                         dw = add ? make_random(DTYPE_F32, p[1], p[2], 3) : make(DTYPE_F32, p[1], p[2]);
        char text[100];
        snprintf(text, sizeof text, "%d tokens, %d × %d, add %d, %s", (int)p[0], (int)p[1], (int)p[2], add,
                 dtype_name(w.dtype));
        check_product(&by_input, &(struct product_args){&dy, &w, &dx, add}, false, text);
        if (w.dtype == DTYPE_F32)
            check_product(&by_weight, &(struct product_args){&dy, &x, &dw, add}, true, text);
        free_matrices();
    }
    print_outcome(&by_input);
    print_outcome(&by_weight);
}

/* Columns of a wider matrix, as the linears of a fused set have theirs. */
static void test_products_of_views(void **state)
{
    (void)state;
    struct outcome o = {"products of views", 2e-6, 0, 0};
    const struct mat wide = make_random(DTYPE_F32, 9, 100, 1), w = make_random(DTYPE_BF16, 41, 30, 1),
                     x = make_random(DTYPE_F32, 9, 30, 1), dx = make_random(DTYPE_F32, 9, 30, 1),
                     all = make(DTYPE_F32, 50, 30);
    const struct mat dy = mat_cols(&wide, 23, 41), dw = mat_rows(&all, 4, 41);
    check_product(&o, &(struct product_args){&dy, &w, &dx, true}, false, "by the input");
    check_product(&o, &(struct product_args){&dy, &x, &dw, false}, true, "by the weight");
    for (int64_t r = 0; r < all.rows; r++)
        assert_int_equal(isnan(at(&all, r, 0)), r < 4 || r >= 45);
    print_outcome(&o);
}

/* No tokens: nothing is added, and without add the gradient is 0. */
static void test_no_tokens(void **state)
{
    (void)state;
    struct outcome o = {"gemm_wgrad of no tokens", 0, 0, 0};
    const struct mat dy = make(DTYPE_F32, 0, 7), x = make(DTYPE_F32, 0, 19),
                     gains = make_random(DTYPE_F32, 7, 19, 1), set = make(DTYPE_F32, 7, 19);
    check_product(&o, &(struct product_args){&dy, &x, &gains, true}, true, "add");
    check_product(&o, &(struct product_args){&dy, &x, &set, false}, true, "set");
    print_outcome(&o);
}

/* --- RMSNorm ---------------------------------------------------------------------------------------------------- */

struct norm_args {
    const struct mat *x, *w, *dy, *add, *out;
    struct norm_spec spec;
};

static int run_norm(const struct backend *b, const void *args)
{
    const struct norm_args *a = args;
    return b->train->rms_norm_backward(b, a->x, a->w, &a->spec, a->dy, a->add, a->out);
}

/* One row of n: the gradient by x of Σ dy·y with y = x·w/ρ, ρ² = mean(x²) + eps. */
struct norm_row {
    double *x;
    const double *dy;
    int64_t n;
    const struct mat *w;
    const struct norm_spec *spec;
};

static double weight_of(const struct norm_row *r, int64_t c)
{
    return r->w ? naive_element(r->w, 0, c) + (r->spec->unit_offset ? 1 : 0) : 1;
}

/* dxⱼ = dyⱼ·wⱼ/ρ − xⱼ/(n·ρ³)·Σ dy·w·x. Returns Σ (dy·w/ρ)²: the two may cancel. */
static double norm_by_formula(const struct norm_row *r, double *dx)
{
    double squares = 0, dots = 0, size = 0;
    for (int64_t c = 0; c < r->n; c++) {
        squares += r->x[c] * r->x[c];
        dots += r->dy[c] * weight_of(r, c) * r->x[c];
    }
    const double root = sqrt(squares / (double)r->n + (double)r->spec->eps);
    for (int64_t c = 0; c < r->n; c++) {
        const double direct = r->dy[c] * weight_of(r, c) / root;
        dx[c] = direct - r->x[c] * dots / ((double)r->n * root * root * root);
        size += direct * direct;
    }
    return size;
}

static double norm_loss(const void *ctx)
{
    const struct norm_row *r = ctx;
    double y[1024], sum = 0;
    naive_norm_row(r->x, r->n, r->w, r->spec, y);
    for (int64_t c = 0; c < r->n; c++)
        sum += r->dy[c] * y[c];
    return sum;
}

static double norm_by_differences(const struct norm_row *r, double *dx)
{
    for (int64_t c = 0; c < r->n; c++)
        dx[c] = naive_slope(norm_loss, r, &r->x[c], STEP);
    return 0;
}

static void check_norm(struct outcome *o, const struct norm_args *a, bool by_differences, const char *text)
{
    const int64_t rows = a->x->rows, cols = a->x->cols;
    double *x = naive_rows(a->x), *dy = naive_rows(a->dy), *dx = zeros(rows * cols), size = 0;
    const double *add = a->add ? naive_rows(a->add) : zeros(rows * cols);
    for (int64_t r = 0; r < rows; r++) {
        const struct norm_row row = {x + r * cols, dy + r * cols, cols, a->w, &a->spec};
        size += (by_differences ? norm_by_differences : norm_by_formula)(&row, dx + r * cols);
    }
    for (int64_t i = 0; i < rows * cols; i++) {
        dx[i] += add[i];
        size += add[i] * add[i];
    }
    const struct mat *const outs[] = {a->out};
    run_alike(run_norm, a, outs, 1, text);
    check(o, a->out, dx, size, text);
}

/* Rows from tiny, where eps decides, to huge; the last one is zero. Their gradients by y are so scaled that those by x
 * are of one size. */
static void norm_operands(int64_t rows, int64_t cols, struct mat *x, struct mat *dy)
{
    *x = make_random(DTYPE_F32, rows, cols, 1);
    *dy = make_random(DTYPE_F32, rows, cols, 1);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const double size = r == rows - 1 && r ? 0 : pow(10, (double)(r % 9) - 5);
            put(x, r, c, (double)at(x, r, c) * size);
            put(dy, r, c, (double)at(dy, r, c) * (size > 1e-3 ? size : 1e-3));
        }
}

static void test_rms_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 100, 256, 257, 640, 1000}, heights[] = {1, 33, 100};
    struct outcome o = {"rms_norm_backward", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 4 * 2 * 4; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = heights[i / N_OF(widths) % N_OF(heights)];
        const size_t rest = i / N_OF(widths) / N_OF(heights), weight = rest % 4, place = rest / 8;
        struct mat x, dy;
        norm_operands(rows, cols, &x, &dy);
        const struct mat w = make_random(float_types[weight % 3], 1, cols, 2),
                         add = make_random(DTYPE_F32, rows, cols, 1), out = make(DTYPE_F32, rows, cols);
        const struct norm_args a = {&x,
                                    weight < 3 ? &w : NULL,
                                    &dy,
                                    place >= 2 ? &add : NULL,
                                    place == 0   ? &out
                                    : place == 3 ? &add
                                                 : &dy,
                                    {1e-6f, rest / 4 % 2 == 1}};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, weight %d, offset %d, place %d", (int)rows, (int)cols,
                 (int)weight, a.spec.unit_offset, (int)place);
        check_norm(&o, &a, false, text);
        free_matrices();
    }
    print_outcome(&o);
}

static void test_rms_norm_differences(void **state)
{
    (void)state;
    static const int64_t widths[] = {2, 17, 300};
    static const float epsilons[] = {1e-6f, 0.1f};
    struct outcome o = {"rms_norm_backward, differences", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(epsilons) * 4; i++) {
        const int64_t cols = widths[i % N_OF(widths)], rows = 3;
        const size_t rest = i / N_OF(widths) / N_OF(epsilons);
        const struct mat x = make_random(DTYPE_F32, rows, cols, 2),
                         dy = make_random(DTYPE_F32, rows, cols, 1), w = make_random(DTYPE_F32, 1, cols, 1),
                         out = make(DTYPE_F32, rows, cols);
        const struct norm_args a = {&x,   rest % 2 ? &w : NULL,
                                    &dy,  NULL,
                                    &out, {epsilons[i / N_OF(widths) % N_OF(epsilons)], rest / 2 == 1}};
        check_norm(&o, &a, true, "differences");
        free_matrices();
    }
    print_outcome(&o);
}

/* --- queries and keys ------------------------------------------------------------------------------------------- */

struct split_args {
    struct qkv_spec spec;
    const struct mat *qkv, *dq, *dkeys, *dvalues, *dqkv;
};

static int run_split(const struct backend *b, const void *args)
{
    const struct split_args *a = args;
    return b->train->split_qkv_backward(b, &a->spec, a->qkv, a->dq, a->dkeys, a->dvalues, a->dqkv);
}

/* One head, normed and turned: the loss is Σ dy·turned. */
struct head_case {
    struct norm_row row;   /* its x; row.dy is by the normed head */
    const double *dturned; /* by the turned one */
    const struct mat *rope;
    int64_t token;
    bool normed;
};

static double turn_of(const struct head_case *h, int64_t i, bool sine)
{
    const int64_t half = h->row.n / 2;
    return (double)at(h->rope, h->token, i % half + (sine ? half : 0));
}

static double head_loss(const void *ctx)
{
    const struct head_case *h = ctx;
    const int64_t d = h->row.n;
    double y[1024], sum = 0;
    if (h->normed)
        naive_norm_row(h->row.x, d, h->row.w, h->row.spec, y);
    else
        memcpy(y, h->row.x, (size_t)d * sizeof *y);
    for (int64_t i = 0; i < d; i++) {
        const double other = i < d / 2 ? -y[i + d / 2] : y[i - d / 2];
        sum += h->dturned[i] * (y[i] * turn_of(h, i, false) + other * turn_of(h, i, true));
    }
    return sum;
}

/* Element i goes into the turned element i by the cosine, and into its partner by the sine: minus in the first half. */
static void head_by_formula(const struct head_case *h, double *dx)
{
    const int64_t d = h->row.n;
    double by_normed[1024];
    for (int64_t i = 0; i < d; i++)
        by_normed[i] = h->dturned[i] * turn_of(h, i, false) +
                       (i < d / 2 ? h->dturned[i + d / 2] : -h->dturned[i - d / 2]) * turn_of(h, i, true);
    struct norm_row row = h->row;
    row.dy = by_normed;
    if (h->normed)
        norm_by_formula(&row, dx);
    else
        memcpy(dx, by_normed, (size_t)d * sizeof *dx);
}

/* Heads of one kind in one row of qkv: x, dx at their first column, dturned likewise. */
static void naive_heads(const struct split_args *a, int64_t row, const struct mat *norm, int n, double *x,
                        const double *dturned, double *dx, bool by_differences)
{
    const int64_t d = a->spec.heads.head_dim;
    for (int k = 0; k < n; k++, x += d, dturned += d, dx += d) {
        const struct head_case h = {{x, NULL, d, norm, &a->spec.norm},
                                    dturned,
                                    a->spec.rope,
                                    row % (a->qkv->rows / a->spec.sequences.n),
                                    norm != NULL};
        if (!by_differences)
            head_by_formula(&h, dx);
        for (int64_t i = 0; by_differences && i < d; i++)
            dx[i] = naive_slope(head_loss, &h, &x[i], STEP);
    }
}

static void check_split(struct outcome *o, const struct split_args *a, bool by_differences, const char *text)
{
    const struct heads *h = &a->spec.heads;
    const struct sequences *s = &a->spec.sequences;
    const int64_t cols = a->qkv->cols, q_cols = a->dq->cols, kv_cols = a->dkeys->cols,
                  length = a->qkv->rows / s->n;
    double *x = naive_rows(a->qkv), *dx = zeros(a->qkv->rows * cols);
    const double *dq = naive_rows(a->dq), *dkeys = naive_rows(a->dkeys), *dvalues = naive_rows(a->dvalues);
    for (int64_t r = 0; r < a->qkv->rows; r++) {
        const int64_t slot = r / length * s->max_positions + s->first_position + r % length;
        double *to = dx + r * cols, *from = x + r * cols;
        naive_heads(a, r, a->spec.q_norm, h->n_heads, from, dq + r * q_cols, to, by_differences);
        naive_heads(a, r, a->spec.k_norm, h->n_kv_heads, from + q_cols, dkeys + slot * kv_cols, to + q_cols,
                    by_differences);
        memcpy(to + q_cols + kv_cols, dvalues + slot * kv_cols, (size_t)kv_cols * sizeof *to);
    }
    const struct mat *const outs[] = {a->dqkv};
    run_alike(run_split, a, outs, 1, text);
    check(o, a->dqkv, dx, 0, text);
}

/* What stands in the cache's rows of other tokens are NaNs. */
static struct mat make_cache(const struct sequences *s, int64_t length, int64_t cols)
{
    const struct mat m = make_random(DTYPE_F32, s->n * s->max_positions + 2, cols, 1);
    for (int64_t r = 0; r < m.rows; r++) {
        const int64_t token = r % s->max_positions - s->first_position;
        for (int64_t c = 0; c < cols; c++)
            if (r >= s->n * s->max_positions || token < 0 || token >= length)
                put(&m, r, c, NAN);
    }
    return m;
}

static void split_case(struct outcome *o, size_t i, int64_t d, bool by_differences)
{
    static const int heads[][2] = {{1, 1}, {4, 1}, {4, 2}, {3, 3}};
    static const int64_t lengths[] = {1, 5, 33};
    const int n_heads = heads[i % 4][0], n_kv = heads[i % 4][1];
    const int64_t n = i / 4 % 2 ? 3 : 1, length = lengths[i / 8 % 3], first = i / 24 % 2 ? 7 : 0;
    const size_t norms = i / 48 % 4;
    const struct sequences s = {n, first, first + length + (int64_t)(i % 3) * 4};
    const struct mat q_norm = make_random(i % 3 ? DTYPE_BF16 : DTYPE_F16, 1, d, 1),
                     k_norm = make_random(DTYPE_F32, 1, d, 1),
                     rope = make_random(DTYPE_F32, length + (int64_t)(i % 2), d, 1),
                     qkv = make_random(DTYPE_F32, n * length, (n_heads + 2 * n_kv) * d, 3),
                     dq = make_random(DTYPE_F32, n * length, n_heads * d, 1),
                     dkeys = make_cache(&s, length, n_kv * d), dvalues = make_cache(&s, length, n_kv * d),
                     dqkv = make(DTYPE_F32, qkv.rows, qkv.cols);
    const struct split_args a = {{{n_heads, n_kv, (int)d},
                                  s,
                                  {1e-6f, i % 2 == 0},
                                  norms & 1 ? &q_norm : NULL,
                                  norms & 2 ? &k_norm : NULL,
                                  &rope,
                                  false,
                                  false},
                                 &qkv,
                                 &dq,
                                 &dkeys,
                                 &dvalues,
                                 i % 5 ? &dqkv : &qkv};
    char text[120];
    snprintf(text, sizeof text, "heads %d/%d of %d, %d × %d tokens at %d, norms %d", n_heads, n_kv, (int)d,
             (int)n, (int)length, (int)first, (int)norms);
    check_split(o, &a, by_differences, text);
    free_matrices();
}

static void test_split_qkv(void **state)
{
    (void)state;
    static const int64_t dims[] = {2, 32, 64, 256};
    struct outcome o = {"split_qkv_backward", 1e-6, 0, 0},
                   differences = {"split_qkv_backward, differences", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(dims) * 192; i++)
        split_case(&o, i, dims[i / 192], false);
    for (size_t i = 0; i < 192; i++)
        split_case(&differences, i, 16, true);
    print_outcome(&o);
    print_outcome(&differences);
}

/* --- the gated activation --------------------------------------------------------------------------------------- */

struct geglu_args {
    const struct mat *gate, *up, *dy, *dgate, *dup;
};

static int run_geglu(const struct backend *b, const void *args)
{
    const struct geglu_args *a = args;
    return b->train->geglu_backward(b, a->gate, a->up, a->dy, a->dgate, a->dup);
}

static double gelu(const void *ctx)
{
    const double z = *(const double *)ctx;
    return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
}

static double gelu_slope(double z)
{
    const double k = sqrt(2 / acos(-1)), t = tanh(k * (z + 0.044715 * z * z * z));
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z);
}

static void check_geglu(struct outcome *o, const struct geglu_args *a, bool by_differences, const char *text)
{
    const int64_t cols = a->dy->cols, n = a->dy->rows * cols;
    double *dgate = zeros(n), *dup = zeros(n), *z = naive_rows(a->gate), gate_size = 0, up_size = 0;
    const double *up = naive_rows(a->up), *dy = naive_rows(a->dy);
    for (int64_t i = 0; i < n; i++) {
        dgate[i] =
            dy[i] * up[i] * (by_differences ? naive_slope(gelu, &z[i], &z[i], STEP) : gelu_slope(z[i]));
        dup[i] = dy[i] * gelu(&z[i]);
        gate_size += pow(dy[i] * up[i], 2) / 4; /* 1 + tanh cancels for negative gates */
        up_size += pow(dy[i] * z[i], 2) / 4;
    }
    const struct mat *const outs[] = {a->dgate, a->dup};
    run_alike(run_geglu, a, outs, 2, text);
    check(o, a->dgate, dgate, gate_size, text);
    check(o, a->dup, dup, up_size, text);
}

/* Gate and up are halves of one matrix, as a block has them; in place or not. */
static void geglu_case(struct outcome *o, int64_t rows, int64_t cols, bool in_place, bool by_differences)
{
    const struct mat both = make_random(DTYPE_F32, rows, 2 * cols, 6),
                     dy = make_random(DTYPE_F32, rows, cols, 2), gate = make(DTYPE_F32, rows, cols),
                     up = make(DTYPE_F32, rows, cols), dgate = make(DTYPE_F32, rows, cols),
                     dup = make(DTYPE_F32, rows, cols);
    const struct mat halves[] = {mat_cols(&both, 0, cols), mat_cols(&both, cols, cols)};
    char text[60];
    snprintf(text, sizeof text, "%d × %d, in place %d", (int)rows, (int)cols, in_place);
    copy(&halves[0], &gate);
    copy(&halves[1], &up);
    const struct geglu_args a = {in_place ? &gate : &halves[0], in_place ? &up : &halves[1], &dy,
                                 in_place ? &gate : &dgate, in_place ? &up : &dup};
    check_geglu(o, &a, by_differences, text);
    free_matrices();
}

static void test_geglu(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 17, 33, 100, 1001}, heights[] = {1, 40, 70};
    static const double extremes[] = {0, -0.0, 1e-30, -1e-30, 9, -9, 50, -50, 1e4, -1e4, 1e20, -1e20};
    /* 1 − t² of an FP32 t near −1, times z·u' of about 10 */
    struct outcome o = {"geglu_backward", 5e-6, 0, 0},
                   differences = {"geglu_backward, differences", 5e-6, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 2; i++)
        geglu_case(&o, heights[i / N_OF(widths) % N_OF(heights)], widths[i % N_OF(widths)],
                   i / N_OF(widths) / N_OF(heights) == 1, false);
    for (size_t i = 0; i < N_OF(extremes); i++) {
        const struct mat gate = make(DTYPE_F32, 1, 19), up = make_random(DTYPE_F32, 1, 19, 2),
                         dy = make_random(DTYPE_F32, 1, 19, 2), dgate = make(DTYPE_F32, 1, 19),
                         dup = make(DTYPE_F32, 1, 19);
        for (int64_t c = 0; c < 19; c++)
            put(&gate, 0, c, extremes[i]);
        check_geglu(&o, &(struct geglu_args){&gate, &up, &dy, &dgate, &dup}, false, "extreme gates");
        free_matrices();
    }
    geglu_case(&differences, 5, 131, false, true);
    print_outcome(&o);
    print_outcome(&differences);
}

/* --- the loss of a block ---------------------------------------------------------------------------------------- */

static void error_case(struct outcome *sums, struct outcome *o, int64_t rows, int64_t cols, int place)
{
    const struct mat y = make_random(DTYPE_F32, rows, cols, 2),
                     target = make_random(DTYPE_F32, rows, cols, 2), out = make(DTYPE_F32, rows, cols);
    const struct mat *dy = place == 0 ? NULL : place == 1 ? &out : &y;
    const float factor = 0.37f;
    double *expected = naive_rows(&y), sum = 1.5, got[N_BACKENDS];
    const double *t = naive_rows(&target);
    for (int64_t i = 0; i < rows * cols; i++) {
        sum += pow(expected[i] - t[i], 2);
        expected[i] = (double)factor * (expected[i] - t[i]);
    }
    for (int k = 0; k < N_BACKENDS; k++) {
        const struct mat again = make(DTYPE_F32, rows, cols);
        copy(&y, &again);
        got[k] = 1.5; /* what earlier batches left */
        assert_ok(cpu[k].train->error_backward(&cpu[k], &again, &target, factor, &got[k],
                                               place == 2 ? &again : dy));
        compare_figure(sums, got[k], sum, sum, "sum");
        assert_memory_equal(&got[k], &got[0], sizeof got[0]);
        if (dy)
            check(o, place == 2 ? &again : dy, expected, 0, "dy");
    }
    free_matrices();
}

static void test_error(void **state)
{
    (void)state;
    struct outcome sums = {"error_backward: sum", 1e-7, 0, 0}, o = {"error_backward: dy", 1e-6, 0, 0};
    for (int place = 0; place < 3; place++) {
        error_case(&sums, &o, 1, 1, place);
        error_case(&sums, &o, 33, 101, place);
        error_case(&sums, &o, 300, 640, place);
    }
    print_outcome(&sums);
    print_outcome(&o);
}

static void test_keep_best(void **state)
{
    (void)state;
    static const struct {
        double loss, best, after;
        int32_t improved;
    } cases[] = {{1, INFINITY, 1, 1}, {1, 1, 1, 0},   {0.5, 1, 0.5, 1},
                 {2, 1, 1, 0},        {NAN, 1, 1, 0}, {NAN, INFINITY, INFINITY, 0}};
    for (size_t i = 0; i < N_OF(cases); i++) {
        double best = cases[i].best;
        int32_t improved = 7;
        assert_ok(cpu[0].train->keep_best(&cpu[0], &cases[i].loss, &best, &improved));
        assert_true(best == cases[i].after && improved == cases[i].improved);
    }
}

/* A NaN in what is read must be seen in what is written. */
static void test_nan_stays(void **state)
{
    (void)state;
    const struct backend *b = &cpu[1];
    const struct norm_spec spec = {1e-6f, true};
    const struct mat x = make_random(DTYPE_F32, 3, 40, 1), dy = make_random(DTYPE_F32, 3, 40, 1),
                     w = make_random(DTYPE_BF16, 40, 40, 1), out = make(DTYPE_F32, 3, 40),
                     dup = make(DTYPE_F32, 3, 40);
    double sum = 0;
    put(&dy, 1, 35, NAN);
    assert_ok(b->train->rms_norm_backward(b, &x, NULL, &spec, &dy, NULL, &out));
    assert_true(isnan(at(&out, 1, 35)) && isnan(at(&out, 1, 0)) && isfinite(at(&out, 0, 35)));
    assert_ok(b->train->gemm_dgrad(b, &dy, &w, false, &out));
    assert_true(isnan(at(&out, 1, 0)) && isfinite(at(&out, 2, 0)));
    put(&x, 0, 3, NAN);
    assert_ok(b->train->geglu_backward(b, &x, &x, &dy, &out, &dup));
    assert_true(isnan(at(&out, 0, 3)) && isnan(at(&dup, 0, 3)) && isnan(at(&out, 1, 35)));
    assert_true(isfinite(at(&out, 2, 3)));
    assert_ok(b->train->error_backward(b, &x, &dy, 1, &sum, &out));
    assert_true(isnan(sum) && isnan(at(&out, 0, 3)) && isnan(at(&out, 1, 35)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_products, clean_up),
        cmocka_unit_test_teardown(test_products_of_views, clean_up),
        cmocka_unit_test_teardown(test_no_tokens, clean_up),
        cmocka_unit_test_teardown(test_rms_norm, clean_up),
        cmocka_unit_test_teardown(test_rms_norm_differences, clean_up),
        cmocka_unit_test_teardown(test_split_qkv, clean_up),
        cmocka_unit_test_teardown(test_geglu, clean_up),
        cmocka_unit_test_teardown(test_error, clean_up),
        cmocka_unit_test_teardown(test_keep_best, clean_up),
        cmocka_unit_test_teardown(test_nan_stays, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

/* Rotary positions and attention, against the plainest implementation in double that the
 * description in kernels/backend.h allows. Each case runs with one, two and three threads, which must give the same bytes. */
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

#include <math.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_rope, clean_up),
        cmocka_unit_test_teardown(test_attention, clean_up),
    };
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}

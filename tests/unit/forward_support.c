#include "tests/unit/forward_support.h"

#include "tests/unit/naive.h"

#include <math.h>

struct backend cpu[N_BACKENDS];

int open_backends(void **state)
{
    (void)state;
    int rc = 0;
    for (int i = 0; !rc && i < N_BACKENDS; i++)
        rc = backend_open(&cpu[i], "cpu", i + 1);
    return rc;
}

int close_backends(void **state)
{
    (void)state;
    for (int i = 0; i < N_BACKENDS; i++)
        backend_close(&cpu[i]);
    return 0;
}

/* --- matrices --------------------------------------------------------------------------------------------------- */

static void *owned[1024];
static size_t n_owned;

void *room(size_t n, size_t size)
{
    void *p = malloc(n * size + 1);
    assert_non_null(p);
    assert_true(n_owned < N_OF(owned));
    return owned[n_owned++] = p;
}

double *zeros(int64_t n)
{
    double *out = room((size_t)n, sizeof *out);
    for (int64_t i = 0; i < n; i++)
        out[i] = 0;
    return out;
}

void free_matrices(void)
{
    while (n_owned)
        free(owned[--n_owned]);
}

/* All bits set: NaN in every float type. */
void poison(const struct mat *m)
{
    memset(m->data, 0xff, (size_t)(m->rows * m->stride) * dtype_bytes(m->dtype));
}

struct mat make(enum dtype dtype, int64_t rows, int64_t cols)
{
    struct mat m = {NULL, dtype, rows, cols, cols + SLACK};
    m.data = room((size_t)(rows * m.stride), dtype_bytes(dtype));
    poison(&m);
    return m;
}

void put(const struct mat *m, int64_t row, int64_t col, double value)
{
    const int64_t at = row * m->stride + col;
    if (m->dtype == DTYPE_F32)
        ((float *)m->data)[at] = (float)value;
    else
        ((uint16_t *)m->data)[at] = naive_bits16(value, m->dtype == DTYPE_F16 ? 5 : 8);
}

uint64_t random_state = 1;

struct mat make_random(enum dtype dtype, int64_t rows, int64_t cols, double amplitude)
{
    struct mat m = make(dtype, rows, cols);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            put(&m, r, c, amplitude * support_uniform(&random_state));
    return m;
}

float at(const struct mat *m, int64_t row, int64_t col)
{
    return ((const float *)m->data)[row * m->stride + col];
}

void copy(const struct mat *from, const struct mat *to)
{
    for (int64_t r = 0; r < from->rows; r++)
        memcpy((float *)to->data + r * to->stride, (const float *)from->data + r * from->stride,
               (size_t)from->cols * sizeof(float));
}

struct qmat make_packed(const struct q_kind *kind, int64_t n, int64_t cols)
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

/* --- comparing -------------------------------------------------------------------------------------------------- */

/* Rows that are compared where a naive result for all of them would take too long: the first, those around the
 * ends of the runs that kernels work in, and a sample. Of the others it is asked that they are finite. */
bool row_chosen(int64_t row, int64_t rows)
{
    const int64_t place = row % 64;
    return rows <= 16 || row < 5 || row == rows - 1 || place == 0 || place == 63 || row % 37 == 0;
}

void print_outcome(const struct outcome *o)
{
    print_message("%s: %zu cases, relative L2 error %.2e, at most %.1e allowed\n", o->op, o->cases, o->worst,
                  o->bound);
    assert_true(o->cases > 0);
}

/* `expected` has rows·cols elements, of which the chosen rows are set. `size`²: what Σ expected² would be without
 * cancellation, for sums that may come out near zero; 0 where there is no such thing. */
void check(struct outcome *o, const struct mat *out, const double *expected, double size_squared,
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

void run_everywhere(case_fn run, const void *args, const struct mat *out, const char *text)
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

void naive_norm_row(const double *x, int64_t n, const struct mat *w, const struct norm_spec *spec,
                    double *out)
{
    double squares = 0;
    for (int64_t c = 0; c < n; c++)
        squares += x[c] * x[c];
    const double root = sqrt(squares / (double)n + (double)spec->eps);
    for (int64_t c = 0; c < n; c++)
        out[c] = x[c] / root * (w ? naive_element(w, 0, c) + (spec->unit_offset ? 1 : 0) : 1);
}

double *naive_rows(const struct mat *m)
{
    double *out = room((size_t)(m->rows * m->cols), sizeof *out);
    for (int64_t i = 0; i < m->rows * m->cols; i++)
        out[i] = naive_element(m, i / m->cols, i % m->cols);
    return out;
}

/* A test that failed has not come to it, and must not change the numbers of the next. */
int clean_up(void **state)
{
    (void)state;
    random_state = 1;
    free_matrices();
    return 0;
}

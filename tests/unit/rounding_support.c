#include "tests/unit/rounding_support.h"

#include "tests/unit/naive.h"

#include <math.h>

struct mat make_inputs(int64_t tokens, int64_t cols)
{
    enum { LATENT = 4 };
    const struct mat x = make(DTYPE_F32, tokens, cols), mix = make_random(DTYPE_F32, LATENT, cols, 1),
                     size = make_random(DTYPE_F32, 1, cols, 1.5);
    for (int64_t t = 0; t < tokens; t++) {
        double latent[LATENT];
        for (int k = 0; k < LATENT; k++)
            latent[k] = support_uniform(&random_state);
        for (int64_t c = 0; c < cols; c++) {
            double sum = support_uniform(&random_state);
            for (int k = 0; k < LATENT; k++)
                sum += latent[k] * (double)at(&mix, k, c);
            put(&x, t, c, sum * exp((double)at(&size, 0, c)));
        }
    }
    return x;
}

struct mat make_hessian(const struct mat *x)
{
    const int64_t n = x->cols;
    const struct mat h = make(DTYPE_F32, n, n);
    const double *inputs = naive_rows(x);
    double *sums = room((size_t)(n * n), sizeof *sums);
    for (int64_t i = 0; i < n * n; i++)
        sums[i] = 0;
    for (int64_t t = 0; t < x->rows; t++)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j++)
                sums[i * n + j] += inputs[t * n + i] * inputs[t * n + j];
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            put(&h, i, j, sums[i > j ? i * n + j : j * n + i]);
    return h;
}

struct qmat make_qmat(const struct q_kind *kind, int64_t rows, int64_t cols)
{
    const int64_t group = kind->group ? kind->group : cols, groups = (cols + group - 1) / group;
    struct qmat q = {.packed = make(DTYPE_I32, rows, (cols * kind->bits + 31) / 32),
                     .scales = make(DTYPE_BF16, rows, groups),
                     .bits = kind->bits,
                     .group = group,
                     .cols = cols};
    if (kind->asymmetric)
        q.zeros = make(DTYPE_I8, rows, groups);
    return q;
}

double scale_at(const struct qmat *q, int64_t row, int64_t col)
{
    return naive_element(&q->scales, row, col / q->group);
}

int zero_at(const struct qmat *q, int64_t row, int64_t col)
{
    return q->zeros.data ? ((const int8_t *)q->zeros.data)[row * q->zeros.stride + col / q->group] : 0;
}

int packed_at(const struct qmat *q, int64_t row, int64_t col)
{
    const uint32_t word = ((const uint32_t *)q->packed.data)[row * q->packed.stride + col * q->bits / 32];
    return (int)(word >> col * q->bits % 32 & ((1u << q->bits) - 1)) - (1 << (q->bits - 1));
}

void make_placed(struct placed *p, enum dtype dtype, const struct q_kind *kind, int64_t rows, int64_t cols)
{
    p->w = make_random(dtype, rows, cols, 0.1);
    p->codes = make(DTYPE_I8, rows, cols);
    p->q = make_qmat(kind, rows, cols);
    p->r = (struct rounding){&p->w, &p->q, &p->codes};
    assert_ok(cpu[0].quant->find_scales(&cpu[0], &p->w, &(struct scale_spec){SCALE_RANGE, false}, &p->q));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const int zero = zero_at(&p->q, r, c),
                      code = naive_code(naive_element(&p->w, r, c), scale_at(&p->q, r, c), zero, kind->bits);
            ((int8_t *)p->codes.data)[r * p->codes.stride + c] = (int8_t)(code - zero);
        }
}

int code_at(const struct rounding *r, int64_t row, int64_t col)
{
    return ((const int8_t *)r->codes->data)[row * r->codes->stride + col];
}

double restored_at(const struct rounding *r, int64_t row, int64_t col)
{
    return naive_bf16(code_at(r, row, col) * scale_at(r->q, row, col));
}

static size_t bytes_of(const struct mat *m)
{
    return m->data ? (size_t)(m->rows * m->stride) * dtype_bytes(m->dtype) : 0;
}

static void copy_all(const struct mat *const *outs, size_t n, char *bytes, bool back)
{
    for (size_t i = 0; i < n; i++) {
        const size_t size = bytes_of(outs[i]);
        if (size)
            memcpy(back ? outs[i]->data : bytes, back ? bytes : outs[i]->data, size);
        bytes += size;
    }
}

void run_alike(op_fn run, const void *args, const struct mat *const *outs, size_t n, const char *text)
{
    size_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += bytes_of(outs[i]);
    char *before = malloc(total + 1), *first = malloc(total + 1), *now = malloc(total + 1);
    assert_true(before && first && now);
    copy_all(outs, n, before, false);
    for (int k = 0; k < N_BACKENDS; k++) {
        copy_all(outs, n, before, true);
        assert_ok(run(&cpu[k], args));
        copy_all(outs, n, k ? now : first, false);
        if (k && memcmp(first, now, total))
            fail_msg("%s: %d threads give other bytes than one", text, k + 1);
    }
    free(before);
    free(first);
    free(now);
}

void check_gaps(const struct mat *m, const char *text)
{
    const size_t size = dtype_bytes(m->dtype);
    for (int64_t r = 0; m->data && r < m->rows; r++)
        for (size_t i = (size_t)(r * m->stride + m->cols) * size; i < (size_t)((r + 1) * m->stride) * size;
             i++)
            if (((const uint8_t *)m->data)[i] != 0xff)
                fail_msg("%s: row %d was written beyond its end", text, (int)r);
}

void compare_figure(struct outcome *o, double got, double expected, double size, const char *text)
{
    const double relative = got == expected ? 0 : fabs(got - expected) / size;
    if (!(relative <= o->bound))
        fail_msg("%s: %s: %.9g, expected %.9g", o->op, text, got, expected);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

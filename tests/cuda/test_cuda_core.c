/* A device against the CPU: memory, values that are not finite, squared errors, quantization to the last bit, the
 * comparison of logits, and what is refused.
 *   test_cuda_core [DEVICE]      default: cuda:0 */
#include "kernels/budget.h"
#include "tests/cuda/parity.h"
#include "tests/unit/kernel_cases.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};

/* --- memory ----------------------------------------------------------------------------------------------------- */

enum { BYTES = 1000003 };

static void fill(unsigned char *p, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (unsigned char)support_random(&seed);
}

static void test_copies(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    unsigned char *from = room(BYTES, 1), *back = room(BYTES, 1), *on_device = parity_memory(DEVICE, BYTES);
    fill(from, BYTES, 1);
    assert_ok(b->core->upload(b, on_device, from, BYTES));
    memset(from, 0, BYTES); /* it no longer needs the host's */
    assert_ok(b->core->download(b, back, on_device, BYTES));
    fill(from, BYTES, 1);
    assert_memory_equal(from, back, BYTES);
    assert_ok(b->core->upload(b, on_device + 17, from, 1000));
    assert_ok(b->core->download(b, back, on_device + 17, 1000));
    assert_memory_equal(from, back, 1000);
    assert_ok(b->core->wait(b));
}

static void test_staging(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const uint64_t before = budget_taken();
    struct staged_buf s;
    unsigned char *expected = room(BYTES, 1), *back = room(BYTES, 1);
    assert_ok(b->core->acquire_staging(b, BYTES, "a test", &s));
    assert_true(s.host && s.device && s.bytes == BYTES && budget_taken() >= before + BYTES);
    assert_true(b->host_memory == (s.host == s.device));
    fill(s.host, BYTES, 2);
    memcpy(expected, s.host, BYTES);
    assert_ok(b->core->stage_in(b, &s, 0, BYTES));
    assert_ok(b->core->wait(b));
    assert_ok(b->core->download(b, back, s.device, BYTES));
    assert_memory_equal(back, expected, BYTES);
    fill((unsigned char *)s.host + 4096, 5000, 3);
    memcpy(expected + 4096, (char *)s.host + 4096, 5000);
    assert_ok(b->core->stage_in(b, &s, 4096, 5000));
    assert_ok(b->core->wait(b));
    memset((char *)s.host + 4000, 0, b->host_memory ? 0 : 6000);
    assert_ok(b->core->stage_out(b, &s, 4000, 6000));
    assert_memory_equal(s.host, expected, BYTES);
    assert_ok(b->core->stage_out(b, &s, BYTES, 0));
    b->core->release_staging(b, &s);
    assert_true(!s.host && !s.device && !s.bytes);
    assert_int_equal(budget_taken(), before);
}

static void test_absurd_size(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const uint64_t before = budget_taken();
    struct buf buf;
    struct staged_buf s;
    assert_error(b->core->acquire(b, (size_t)1 << 50, "castles in the air", &buf), ERR_MEMORY,
                 "castles in the air");
    assert_null(buf.ptr);
    assert_error(b->core->acquire_staging(b, (size_t)1 << 50, "more castles", &s), ERR_MEMORY,
                 "more castles");
    assert_true(!s.host && !s.device);
    b->core->release(b, &buf);
    b->core->release_staging(b, &s);
    budget_set(before + BYTES);
    assert_error(b->core->acquire(b, BYTES + 1, "what is left", &buf), ERR_MEMORY,
                 "for what is left do not fit");
    assert_ok(b->core->acquire(b, BYTES, "what is left", &buf));
    b->core->release(b, &buf);
    budget_set(0);
    assert_int_equal(budget_taken(), before);
}

static void test_memory(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    struct device_memory m;
    assert_ok(b->core->memory(b, &m));
    assert_true(m.total >= 64 << 20 && m.free > 0 && m.free <= m.total);
}

/* A second handle on the device gives the same bytes. */
static void test_beside(void **state)
{
    (void)state;
    struct backend other;
    assert_ok(backend_open_beside(&other, &side[DEVICE]));
    assert_string_equal(other.name, side[DEVICE].name);
    assert_int_equal(other.activation, side[DEVICE].activation);
    assert_int_equal(other.ordinal, side[DEVICE].ordinal);
    const struct twin w = twin_random(DTYPE_BF16, 300, 256, 0, 0.1), x = twin_random(ACT, 20, 256, 0, 1),
                      a = twin_make(DTYPE_F32, 20, 300, 0), b = twin_make(DTYPE_F32, 20, 300, 0);
    assert_ok(side[DEVICE].core->gemm(&side[DEVICE], &x.m[DEVICE], &w.m[DEVICE], &a.m[DEVICE]));
    assert_ok(other.core->gemm(&other, &x.m[DEVICE], &w.m[DEVICE], &b.m[DEVICE]));
    assert_ok(other.core->wait(&other));
    void *first = room(twin_bytes(&a), 1), *second = room(twin_bytes(&a), 1);
    twin_download(&a, first);
    twin_download(&b, second);
    assert_memory_equal(first, second, twin_bytes(&a));
    backend_close(&other);
}

/* --- values that are not finite --------------------------------------------------------------------------------- */

/* A result of a few numbers. */
static void fetch(void *out, const void *from, size_t bytes)
{
    assert_ok(side[DEVICE].core->download(&side[DEVICE], out, from, bytes));
}

static int64_t find(const struct twin *w)
{
    int64_t got, again, expected, *result = parity_memory(DEVICE, sizeof *result);
    assert_ok(side[CPU].core->find_nonfinite(&side[CPU], &w->m[CPU], &expected));
    assert_ok(side[DEVICE].core->find_nonfinite(&side[DEVICE], &w->m[DEVICE], result));
    fetch(&got, result, sizeof got);
    assert_ok(side[DEVICE].core->find_nonfinite(&side[DEVICE], &w->m[DEVICE], result));
    fetch(&again, result, sizeof again);
    assert_int_equal(got, expected);
    assert_int_equal(again, expected);
    return expected;
}

static int run_zero(const struct backend *b, enum side s, const void *args)
{
    const struct twin *const *a = args; /* the matrix and the count */
    return b->core->zero_nonfinite(b, &a[0]->m[s], a[1]->m[s].data);
}

static void check_nonfinite(struct outcome *o, enum dtype dtype, int64_t rows, int64_t cols, int64_t slack)
{
    struct twin w = twin_random(dtype, rows, cols, slack, 1), count = twin_make(DTYPE_I64, 1, 1, 0);
    char text[100];
    snprintf(text, sizeof text, "%s %d × %d, slack %d", dtype_name(dtype), (int)rows, (int)cols, (int)slack);
    assert_int_equal(find(&w), -1);
    uint64_t seed = (uint64_t)(rows * cols);
    int64_t first = rows * cols, n = 0;
    for (int i = 0; i < 5; i++) {
        const int64_t at = (int64_t)(support_random(&seed) % (uint64_t)(rows * cols));
        if (isfinite(naive_element(&w.initial, at / cols, at % cols)))
            n++;
        first = at < first ? at : first;
        twin_put(&w, at / cols, at % cols, i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY);
        twin_upload(&w);
        assert_int_equal(find(&w), first);
    }
    const struct twin *args[] = {&w, &count};
    /* both are compared with the CPU's bit for bit: as numbers here, and as bytes below */
    parity_case(run_zero, args, &(struct result){o, &w, false}, 1, text);
    int64_t got;
    fetch(&got, count.m[DEVICE].data, sizeof got);
    assert_int_equal(got, n);
    assert_int_equal(*(int64_t *)count.m[CPU].data, n);
    void *bytes = room(twin_bytes(&w), 1);
    twin_download(&w, bytes);
    assert_memory_equal(bytes, w.m[CPU].data, twin_bytes(&w));
    parity_free();
}

static void test_nonfinite(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{1, 1},     {1, 8},     {3, 100},   {2, 4501},
                                        {64, 2560}, {300, 640}, {1, 100003}};
    static const int64_t slacks[] = {0, 3, 8};
    struct outcome o = {"find_nonfinite, zero_nonfinite", 0, 0, 0};
    for (size_t i = 0; i < N_OF(shapes) * 3 * 3; i++)
        check_nonfinite(&o, float_types[i % 3], shapes[i / 9][0], shapes[i / 9][1], slacks[i / 3 % 3]);
    parity_print(&o, "difference");
}

/* --- squared errors --------------------------------------------------------------------------------------------- */

struct pair {
    struct twin x, y;
};

static struct pair make_pair(size_t kind, int64_t rows, int64_t cols, int64_t slack)
{
    const enum dtype y_type = kind / 3 % 2 ? DTYPE_F32 : DTYPE_BF16;
    struct pair p = {twin_random(float_types[kind % 3], rows, cols, slack, 0.1),
                     twin_make(y_type, rows, cols, slack)};
    for (int64_t i = 0; i < rows * cols; i++) {
        const double noise = 0.005 * support_uniform(&random_state);
        twin_put(&p.y, i / cols, i % cols, naive_element(&p.x.initial, i / cols, i % cols) + noise);
    }
    twin_upload(&p.y);
    return p;
}

/* Twice the same, and near the CPU's. */
static void check_sums(struct outcome *o, const struct pair *p, int64_t group, const char *text)
{
    const int64_t groups = group ? (p->x.initial.cols + group - 1) / group : 1;
    const size_t n = (size_t)(group ? p->x.initial.rows * groups : 1) * 2, bytes = n * sizeof(double);
    double *expected = room(n, sizeof *expected),
           *got[2] = {room(n, sizeof(double)), room(n, sizeof(double))};
    double *result = parity_memory(DEVICE, bytes);
    for (int round = 0; round < 3; round++) {
        const enum side s = round ? DEVICE : CPU;
        double *out = s == CPU ? expected : result;
        const struct backend *b = &side[s];
        assert_ok(group ? b->core->group_squared_error(b, &p->x.m[s], &p->y.m[s], group, out)
                        : b->core->squared_error(b, &p->x.m[s], &p->y.m[s], out));
        if (round)
            fetch(got[round - 1], result, bytes);
    }
    assert_memory_equal(got[0], got[1], bytes);
    for (size_t i = 0; i < n; i++)
        parity_number(o, got[0][i], expected[i], expected[i] + 1e-300, text);
}

static void test_squared_error(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{1, 1}, {3, 100}, {9, 4100}, {64, 2560}, {300, 640}, {2, 20000}};
    static const int64_t groups[] = {0, 32, 64, 100, 128, 50000}, slacks[] = {0, 3, 8};
    /* the CPU adds squares up in FP32 over runs of at most 256 */
    struct outcome o = {"squared_error, group_squared_error", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(shapes) * 6; i++) {
        const int64_t *shape = shapes[i % N_OF(shapes)];
        const struct pair p = make_pair(i / N_OF(shapes), shape[0], shape[1], slacks[i % 3]);
        for (size_t g = 0; g < N_OF(groups); g++) {
            char text[100];
            snprintf(text, sizeof text, "%s and %s, %d × %d, group %d", dtype_name(p.x.initial.dtype),
                     dtype_name(p.y.initial.dtype), (int)shape[0], (int)shape[1], (int)groups[g]);
            check_sums(&o, &p, groups[g], text);
        }
        parity_free();
    }
    parity_print(&o, "relative error");
}

/* --- quantization ----------------------------------------------------------------------------------------------- */

static void check_bytes(const struct twin *t, const struct kernel_case *c, const char *what, int round)
{
    if (!t->initial.data)
        return;
    unsigned char *got = room(twin_bytes(t), 1);
    const unsigned char *expected = t->m[CPU].data;
    twin_download(t, got);
    for (size_t i = 0; i < twin_bytes(t); i++)
        if (got[i] != expected[i])
            fail_msg("%s: %s differ at byte %zu: %02x, expected %02x (round %d)", kernel_case_text(c), what,
                     i, got[i], expected[i], round);
}

/* Everything that the three operations give, the gaps between rows too. */
static void check_quantization(const struct kernel_case *c)
{
    struct kernel_data d;
    kernel_data_make(&d, c);
    const struct twin w = twin_of(&d.weights), packed = twin_of(&d.q.packed), scales = twin_of(&d.q.scales),
                      zeros = twin_of(&d.q.zeros), restored = twin_of(&d.restored),
                      floats = twin_make(DTYPE_F32, c->rows, c->cols, 3);
    kernel_data_free(&d);
    const struct twin *written[] = {&packed, &scales, &zeros, &restored, &floats};
    static const char *const names[] = {"codes", "scales", "zero points", "restored weights",
                                        "restored floats"};
    const int64_t group = c->group ? c->group : c->cols;
    for (int round = 0; round < 3; round++) {
        const enum side s = round ? DEVICE : CPU;
        const struct backend *b = &side[s];
        struct qmat q = {packed.m[s], scales.m[s], zeros.m[s], c->bits, group, c->cols};
        for (size_t i = 0; s == DEVICE && i < N_OF(written); i++)
            if (written[i]->initial.data)
                twin_upload(written[i]);
        assert_ok(b->quant->find_scales(b, &w.m[s], &c->spec, &q));
        assert_ok(b->quant->quantize(b, &w.m[s], &q));
        assert_ok(b->quant->dequantize(b, &q, &restored.m[s]));
        assert_ok(b->quant->dequantize(b, &q, &floats.m[s]));
        for (size_t i = 0; s == DEVICE && i < N_OF(written); i++)
            check_bytes(written[i], c, names[i], round);
    }
    check_bytes(&w, c, "weights", 2);
    parity_free();
}

static void test_quantization(void **state)
{
    (void)state;
    struct kernel_case c;
    size_t n = 0;
    for (; kernel_case(n, &c); n++)
        check_quantization(&c);
    print_message("find_scales, quantize, dequantize: %zu matrices, the same bytes\n", n);
    assert_true(n > 0);
}

/* Real sizes: many rows, and a row of a down projection as one group. */
static void test_quantization_of_large(void **state)
{
    (void)state;
    static const struct kernel_case cases[] = {
        {.dtype = DTYPE_BF16, .rows = 700, .cols = 2560, .group = 32, .bits = 4, .symmetric = true},
        {.dtype = DTYPE_BF16, .rows = 300, .cols = 2560, .group = 128, .bits = 4, .symmetric = false},
        {.dtype = DTYPE_BF16, .rows = 100, .cols = 10240, .bits = 4, .symmetric = true},
        {.dtype = DTYPE_F32, .rows = 100, .cols = 10240, .group = 64, .bits = 8, .symmetric = true},
        {.dtype = DTYPE_F16, .rows = 100, .cols = 6912, .bits = 8, .symmetric = false}};
    for (size_t i = 0; i < N_OF(cases) * 3; i++) {
        struct kernel_case c = cases[i / 3];
        c.spec.rule = (enum scale_rule)(i % 3);
        check_quantization(&c);
    }
}

/* --- compare_rows ----------------------------------------------------------------------------------------------- */

enum { COMPARED = 7 };

static void check_row(struct outcome *o, const struct row_comparison *got, const struct row_comparison *e,
                      const char *text)
{
    /* 10^-5 relative and 10^-6 absolute */
    parity_number(o, (double)got->nll_a, (double)e->nll_a, 0.1 + fabs((double)e->nll_a), text);
    parity_number(o, (double)got->nll_b, (double)e->nll_b, 0.1 + fabs((double)e->nll_b), text);
    parity_number(o, (double)got->kl, (double)e->kl, 0.1 + fabs((double)e->kl), text);
    if (got->top_a != e->top_a || got->top_b != e->top_b)
        fail_msg("%s: top %d and %d, expected %d and %d", text, got->top_a, got->top_b, e->top_a, e->top_b);
}

/* b NULL: a alone. */
static void check_compared(struct outcome *o, const struct twin *a, const struct twin *b, const char *text)
{
    const int64_t rows = a->initial.rows, cols = a->initial.cols;
    int32_t targets[COMPARED];
    struct row_comparison out[3][COMPARED];
    for (int64_t r = 0; r < rows; r++)
        targets[r] = (int32_t)(cols - 1 - r * (cols - 1) / (COMPARED - 1));
    memset(out, 0, sizeof out);
    for (int round = 0; round < 3; round++) {
        const enum side s = round ? DEVICE : CPU;
        assert_ok(side[s].core->compare_rows(&side[s], &a->m[s], b ? &b->m[s] : NULL, targets, out[round]));
    }
    assert_memory_equal(out[1], out[2], (size_t)rows * sizeof *out[1]);
    for (int64_t r = 0; r < rows; r++)
        check_row(o, &out[1][r], &out[0][r], text);
}

static void test_compare_rows(void **state)
{
    (void)state;
    static const int64_t vocabularies[] = {1, 17, 2048, 5000, 262144};
    static const double noises[] = {0, 1e-3, 0.1, 3};
    struct outcome o = {"compare_rows", 1e-5, 0, 0};
    for (size_t i = 0; i < N_OF(vocabularies) * N_OF(noises); i++) {
        const int64_t n = vocabularies[i % 5], rows = n > 10000 ? 3 : COMPARED;
        const struct twin a = twin_random(DTYPE_F32, rows, n, (int64_t)(i % 3), 12);
        struct twin b = twin_make(DTYPE_F32, rows, n, 3);
        char text[100];
        snprintf(text, sizeof text, "%d × %d, noise %g", (int)rows, (int)n, noises[i / 5]);
        for (int64_t k = 0; k < rows * n; k++)
            twin_put(&b, k / n, k % n,
                     naive_element(&a.initial, k / n, k % n) +
                         noises[i / 5] * support_uniform(&random_state));
        twin_upload(&b);
        check_compared(&o, &a, &b, text);
        check_compared(&o, &a, NULL, text);
        parity_free();
    }
    parity_print(&o, "error");
}

static void test_compare_extremes(void **state)
{
    (void)state;
    struct outcome o = {"compare_rows, logits of ±80", 1e-5, 0, 0};
    for (int64_t n = 17; n <= 5000; n += 4983)
        for (int kind = 0; kind < 4; kind++) {
            struct twin a = twin_make(DTYPE_F32, COMPARED, n, 0), b = twin_make(DTYPE_F32, COMPARED, n, 0);
            for (int64_t r = 0; r < COMPARED; r++)
                for (int64_t c = 0; c < n; c++) {
                    /* one peak each, in different places; half and half, opposite; all equal; the same peak */
                    const bool in_a[] = {c == r, (c + r) % 2 == 0, true, c == 3};
                    const bool in_b[] = {c == n - 1 - r, (c + r) % 2 == 1, false, c == 3};
                    twin_put(&a, r, c, in_a[kind] ? 80 : -80);
                    twin_put(&b, r, c, in_b[kind] ? 80 : -80);
                }
            twin_upload(&a);
            twin_upload(&b);
            check_compared(&o, &a, &b, "±80");
            parity_free();
        }
    parity_print(&o, "error");
}

static void test_compare_nan(void **state)
{
    (void)state;
    static const int64_t places[] = {0, 1, 33, 4999};
    struct outcome o = {"compare_rows with a NaN", 1e-5, 0, 0};
    for (size_t i = 0; i < N_OF(places) * 2; i++) {
        struct twin a = twin_random(DTYPE_F32, 2, 5000, 0, 1);
        const struct twin b = twin_random(DTYPE_F32, 2, 5000, 0, 1);
        struct row_comparison row[2];
        twin_put(&a, 1, places[i / 2], i % 2 ? NAN : INFINITY);
        twin_upload(&a);
        check_compared(&o, &a, &b, "a NaN in a");
        check_compared(&o, &b, &a, "a NaN in b");
        assert_ok(
            side[DEVICE].core->compare_rows(&side[DEVICE], &a.m[DEVICE], NULL, (const int32_t[]){0, 2}, row));
        assert_true(isfinite(row[0].nll_a) && !isfinite(row[1].nll_a));
        parity_free();
    }
    parity_print(&o, "error");
}

/* --- what is refused -------------------------------------------------------------------------------------------- */

struct refused_args {
    int which;
    struct twin bad, bad_row, w, act, out, wide, norm_out, ids;
    struct twin_q q;
};

enum { N_CORE_REFUSALS = 11, N_REFUSALS = 20 };

static int refused_core(const struct backend *b, enum side s, const struct refused_args *a)
{
    static const int32_t zero[16];
    const struct norm_spec norm = {1e-6f, true};
    const struct mat *bad = &a->bad.m[s], *row = &a->bad_row.m[s], *w = &a->w.m[s], *act = &a->act.m[s],
                     *x = &a->out.m[s], *out = &a->norm_out.m[s], *wide = &a->wide.m[s];
    const struct qkv_spec split = {
        {1, 1, 16}, {1, 0, 16}, norm, a->which == 9 ? row : NULL, a->which == 10 ? row : NULL,
        x,          false,      false};
    void *result = a->ids.m[s].data;
    switch (a->which) {
    case 0:
        return b->core->find_nonfinite(b, bad, result);
    case 1:
        return b->core->zero_nonfinite(b, bad, result);
    case 2:
        return b->core->squared_error(b, bad, w, result);
    case 3:
        return b->core->squared_error(b, w, bad, result);
    case 4:
        return b->core->group_squared_error(b, bad, w, 16, result);
    case 5:
        return b->core->embed(b, bad, zero, 1, x);
    case 6:
        return b->core->rms_norm(b, x, row, &norm, x);
    case 7:
        return b->core->add_norm(b, act, row, x, NULL, &norm, out);
    case 8:
        return b->core->gemm(b, act, bad, x);
    default:
        return b->core->split_qkv(b, &split, wide, act, out, out);
    }
}

static int refused_quant(const struct backend *b, enum side s, const struct refused_args *a)
{
    const struct mat *bad = &a->bad.m[s], *w = &a->w.m[s], *act = &a->act.m[s], *out = &a->out.m[s];
    struct qmat q = a->q.m[s], groups = q, bits = q;
    const struct scale_spec spec = {SCALE_RANGE, false};
    groups.group = 3;
    groups.scales.cols = 6;
    bits.bits = 3;
    switch (a->which) {
    case 11:
        return b->core->q_gemm(b, act, &bits, out);
    case 12:
        return b->quant->find_scales(b, bad, &spec, &q);
    case 13:
        return b->quant->find_scales(b, w, &spec, &groups);
    case 14:
        return b->quant->find_scales(b, w, &spec, &bits);
    case 15:
        return b->quant->quantize(b, bad, &q);
    case 16:
        return b->quant->quantize(b, w, &groups);
    case 17:
        return b->quant->quantize(b, w, &bits);
    case 18:
        return b->quant->dequantize(b, &q, bad);
    default:
        return b->quant->dequantize(b, &bits, out);
    }
}

/* The same code and the same words as the CPU; nothing is written. */
static void test_refusals(void **state)
{
    (void)state;
    const struct qmat packed = make_packed(&(struct q_kind){4, 16, false}, 16, 16);
    struct refused_args a = {0,
                             twin_make(DTYPE_I32, 16, 16, 0),
                             twin_make(DTYPE_I8, 1, 16, 0),
                             twin_random(DTYPE_BF16, 16, 16, 0, 1),
                             twin_random(ACT, 16, 16, 0, 1),
                             twin_make(DTYPE_F32, 16, 16, 0),
                             twin_random(ACT, 16, 48, 0, 1),
                             twin_make(ACT, 16, 16, 0),
                             twin_make(DTYPE_I64, 64, 1, 0),
                             twin_q_of(&packed)};
    char expected[512];
    for (; a.which < N_REFUSALS; a.which++)
        for (int s = 0; s < N_SIDES; s++) {
            const int rc =
                a.which < N_CORE_REFUSALS ? refused_core(&side[s], s, &a) : refused_quant(&side[s], s, &a);
            if (rc != ERR_UNSUPPORTED)
                fail_msg("refusal %d: %s returns %d", a.which, side[s].name, rc);
            if (s == CPU)
                snprintf(expected, sizeof expected, "%s", err_message());
            assert_string_equal(err_message(), expected);
        }
    assert_ok(side[DEVICE].core->wait(&side[DEVICE]));
    unsigned char *got = room(twin_bytes(&a.out), 1);
    twin_download(&a.out, got);
    assert_memory_equal(got, a.out.initial.data, twin_bytes(&a.out));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_copies, parity_clean_up),
        cmocka_unit_test_teardown(test_staging, parity_clean_up),
        cmocka_unit_test_teardown(test_absurd_size, parity_clean_up),
        cmocka_unit_test_teardown(test_memory, parity_clean_up),
        cmocka_unit_test_teardown(test_beside, parity_clean_up),
        cmocka_unit_test_teardown(test_nonfinite, parity_clean_up),
        cmocka_unit_test_teardown(test_squared_error, parity_clean_up),
        cmocka_unit_test_teardown(test_quantization, parity_clean_up),
        cmocka_unit_test_teardown(test_quantization_of_large, parity_clean_up),
        cmocka_unit_test_teardown(test_compare_rows, parity_clean_up),
        cmocka_unit_test_teardown(test_compare_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_compare_nan, parity_clean_up),
        cmocka_unit_test_teardown(test_refusals, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

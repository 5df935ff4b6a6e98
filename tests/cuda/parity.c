#include "tests/cuda/parity.h"

#include <math.h>
#include <unistd.h>

struct backend side[N_SIDES];

static const char *device = "cuda:0";

/* --- opening ---------------------------------------------------------------------------------------------------- */

enum { ARENA_BYTES = 768 << 20, ALIGNMENT = 256, SKIPPED = 77 };

static struct buf arena;
static size_t arena_used;

static int open_sides(void)
{
    char name[DEVICE_TEXT_BYTES], title[DEVICE_TEXT_BYTES];
    int rc = backend_resolve(device, name, title);
    if (!rc)
        rc = backend_open(&side[CPU], "cpu", 0);
    if (!rc)
        rc = backend_open(&side[DEVICE], device, 0);
    if (!rc)
        rc = side[DEVICE].core->acquire(&side[DEVICE], ARENA_BYTES, "tests", &arena);
    if (rc < 0)
        fprintf(stderr, "%s cannot be opened: %s\n", device, err_message());
    else
        printf("%s: %s\n", name, title);
    return rc;
}

static void close_sides(void)
{
    side[DEVICE].core->release(&side[DEVICE], &arena);
    backend_close(&side[DEVICE]);
    backend_close(&side[CPU]);
}

int parity_run(int argc, char **argv, const struct CMUnitTest *tests, size_t n, CMFixtureFunction setup,
               CMFixtureFunction teardown)
{
    device = argc > 1 ? argv[1] : device;
    if (!strncmp(device, "cuda", 4) && access("/dev/nvidiactl", F_OK)) {
        printf("not run: this machine has no GPU (no /dev/nvidiactl)\n");
        return SKIPPED;
    }
    if (open_sides() < 0)
        return 1;
    const int failed = _cmocka_run_group_tests(device, tests, n, setup, teardown);
    close_sides();
    return failed ? 1 : 0;
}

int parity_main(int argc, char **argv, const struct CMUnitTest *tests, size_t n)
{
    return parity_run(argc, argv, tests, n, NULL, NULL);
}

void parity_free(void)
{
    assert_ok(side[DEVICE].core->wait(&side[DEVICE]));
    free_matrices();
    arena_used = 0;
}

int parity_clean_up(void **state)
{
    parity_free();
    return clean_up(state);
}

/* --- matrices --------------------------------------------------------------------------------------------------- */

void *parity_memory(enum side s, size_t bytes)
{
    if (s == CPU)
        return room(bytes, 1);
    void *p = (char *)arena.ptr + arena_used;
    arena_used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    assert_true(arena_used <= ARENA_BYTES);
    return p;
}

size_t twin_bytes(const struct twin *t)
{
    return (size_t)(t->initial.rows * t->initial.stride) * dtype_bytes(t->initial.dtype);
}

void twin_upload(const struct twin *t)
{
    assert_ok(side[DEVICE].core->upload(&side[DEVICE], t->m[DEVICE].data, t->initial.data, twin_bytes(t)));
}

void twin_download(const struct twin *t, void *out)
{
    assert_ok(side[DEVICE].core->download(&side[DEVICE], out, t->m[DEVICE].data, twin_bytes(t)));
}

static struct twin make_twin(int dtype, int64_t rows, int64_t cols, int64_t stride)
{
    const bool act = dtype == ACT;
    const enum dtype types[N_SIDES] = {act ? DTYPE_F32 : (enum dtype)dtype,
                                       act ? side[DEVICE].activation : (enum dtype)dtype};
    struct twin t = {.initial = {NULL, types[DEVICE], rows, cols, stride}, .act = act};
    for (int s = 0; s < N_SIDES; s++) {
        t.m[s] = (struct mat){NULL, types[s], rows, cols, stride};
        t.m[s].data = parity_memory(s, (size_t)(rows * stride) * dtype_bytes(types[s]));
    }
    t.initial.data = room((size_t)(rows * stride), dtype_bytes(types[DEVICE]));
    poison(&t.m[CPU]);
    poison(&t.initial);
    return t;
}

struct twin twin_make(int dtype, int64_t rows, int64_t cols, int64_t slack)
{
    const struct twin t = make_twin(dtype, rows, cols, cols + slack);
    twin_upload(&t);
    return t;
}

void twin_put(struct twin *t, int64_t row, int64_t col, double value)
{
    put(&t->m[CPU], row, col, t->act ? naive_bf16(value) : value);
    put(&t->initial, row, col, t->act ? naive_bf16(value) : value);
}

struct twin twin_random(int dtype, int64_t rows, int64_t cols, int64_t slack, double amplitude)
{
    struct twin t = make_twin(dtype, rows, cols, cols + slack);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            twin_put(&t, r, c, amplitude * support_uniform(&random_state));
    twin_upload(&t);
    return t;
}

struct twin twin_of(const struct mat *m)
{
    if (!m->data)
        return (struct twin){.m = {*m, *m}, .initial = *m};
    const struct twin t = make_twin((int)m->dtype, m->rows, m->cols, m->stride);
    memcpy(t.m[CPU].data, m->data, twin_bytes(&t));
    memcpy(t.initial.data, m->data, twin_bytes(&t));
    twin_upload(&t);
    return t;
}

struct twin twin_rows(const struct twin *t, int64_t first, int64_t n)
{
    return (struct twin){{mat_rows(&t->m[CPU], first, n), mat_rows(&t->m[DEVICE], first, n)},
                         mat_rows(&t->initial, first, n),
                         t->act};
}

struct twin twin_cols(const struct twin *t, int64_t first, int64_t n)
{
    return (struct twin){{mat_cols(&t->m[CPU], first, n), mat_cols(&t->m[DEVICE], first, n)},
                         mat_cols(&t->initial, first, n),
                         t->act};
}

struct twin_q twin_q_of(const struct qmat *q)
{
    const struct twin packed = twin_of(&q->packed), scales = twin_of(&q->scales), zeros = twin_of(&q->zeros);
    struct twin_q out;
    for (int s = 0; s < N_SIDES; s++)
        out.m[s] = (struct qmat){packed.m[s], scales.m[s], zeros.m[s], q->bits, q->group, q->cols};
    return out;
}

/* --- comparing -------------------------------------------------------------------------------------------------- */

static bool all_ones(const struct mat *m, int64_t at)
{
    const size_t size = dtype_bytes(m->dtype);
    const unsigned char *p = (const unsigned char *)m->data + (size_t)at * size;
    for (size_t i = 0; i < size; i++)
        if (p[i] != 0xff)
            return false;
    return true;
}

static void keep_worst(struct outcome *o, double error, const char *text)
{
    if (!(error <= o->bound))
        fail_msg("%s: %s: error %.3e, at most %.1e allowed", o->op, text, error, o->bound);
    o->worst = error > o->worst ? error : o->worst;
}

void parity_number(struct outcome *o, double got, double expected, double size, const char *text)
{
    o->cases++;
    if (isnan(expected) && isnan(got))
        return;
    if (!isfinite(expected) || !isfinite(got))
        fail_msg("%s: %s: %g, expected %g", o->op, text, got, expected);
    keep_worst(o, fabs(got - expected) / size, text);
}

static void compare(const struct result *x, const void *data, const char *text)
{
    const struct mat *expected = &x->t->m[CPU];
    const struct mat got = {(void *)data, x->t->initial.dtype, expected->rows, expected->cols,
                            expected->stride};
    double error = 0, size = 0, largest = 0;
    for (int64_t i = 0; i < got.rows * got.stride; i++) {
        const int64_t r = i / got.stride, c = i % got.stride;
        const bool unwritten = all_ones(expected, i);
        if (unwritten != all_ones(&got, i))
            fail_msg("%s: %s: row %d column %d %s", x->o->op, text, (int)r, (int)c,
                     unwritten ? "was written" : "was not written");
        if (unwritten || c >= got.cols)
            continue;
        const double e = naive_element(expected, r, c), g = naive_element(&got, r, c);
        if (isnan(e) != isnan(g) || isinf(e) != isinf(g))
            fail_msg("%s: %s: row %d column %d is %g, expected %g", x->o->op, text, (int)r, (int)c, g, e);
        if (!isfinite(e))
            continue;
        error += (g - e) * (g - e);
        size += e * e;
        largest = fabs(g - e) > largest ? fabs(g - e) : largest;
    }
    x->o->cases++;
    keep_worst(x->o, x->absolute ? largest : error > 0 ? sqrt(error / size) : 0, text);
}

void parity_case(op_fn run, const void *args, const struct result *results, size_t n, const char *text)
{
    void *first[8], *second[8];
    assert_true(n <= N_OF(first));
    assert_ok(run(&side[CPU], CPU, args));
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < n; i++)
            twin_upload(results[i].t);
        assert_ok(run(&side[DEVICE], DEVICE, args));
        for (size_t i = 0; i < n; i++) {
            void **to = round ? &second[i] : &first[i];
            *to = malloc(twin_bytes(results[i].t) + 1);
            assert_non_null(*to);
            twin_download(results[i].t, *to);
        }
    }
    for (size_t i = 0; i < n; i++) {
        if (memcmp(first[i], second[i], twin_bytes(results[i].t)))
            fail_msg("%s: %s: a second time it gives other bytes", results[i].o->op, text);
        compare(&results[i], first[i], text);
        free(first[i]);
        free(second[i]);
    }
}

void parity_print(const struct outcome *o, const char *measure)
{
    print_message("%s: %zu cases, %s %.2e, at most %.1e allowed\n", o->op, o->cases, measure, o->worst,
                  o->bound);
    assert_true(o->cases > 0);
}

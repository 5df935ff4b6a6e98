/* The same bytes from every instruction set. The program picks SSE2, AVX2 or AVX-512 code when it starts; here
 * kernels/cpu/core.c and quant.c are compiled once for each (tests/CMakeLists.txt) and held against what the
 * program would pick. What this machine cannot run is named. */
#include "tests/unit/kernel_cases.h"
#include "tests/unit/support.h"

struct variant {
    const char *name;
    const struct quant_ops *quant;
    int (*squared_error)(const struct backend *b, const struct mat *x, const struct mat *y, double sums[2]);
    int (*group_squared_error)(const struct backend *b, const struct mat *x, const struct mat *y,
                               int64_t group, double *sums);
    int (*find_nonfinite)(const struct backend *b, const struct mat *w, int64_t *index);
};

#define DECLARE(suffix)                                                                                      \
    extern const struct quant_ops cpu_quant_ops_##suffix;                                                    \
    int cpu_squared_error_##suffix(const struct backend *b, const struct mat *x, const struct mat *y,        \
                                   double sums[2]);                                                          \
    int cpu_group_squared_error_##suffix(const struct backend *b, const struct mat *x, const struct mat *y,  \
                                         int64_t group, double *sums);                                       \
    int cpu_find_nonfinite_##suffix(const struct backend *b, const struct mat *w, int64_t *index);
DECLARE(v1)
DECLARE(v3)
DECLARE(v4)

#define VARIANT(text, suffix)                                                                                \
    {                                                                                                        \
        text, &cpu_quant_ops_##suffix, cpu_squared_error_##suffix, cpu_group_squared_error_##suffix,         \
            cpu_find_nonfinite_##suffix                                                                      \
    }
static const struct variant variants[] = {
    VARIANT("x86-64 (SSE2)", v1),
    VARIANT("x86-64-v3 (AVX2)", v3),
    VARIANT("x86-64-v4 (AVX-512)", v4),
};

static int usable_variants(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return 1;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")
               ? 3
               : 2;
}

enum { MAX_SUMS = 2 + 2 * 9 * 129 }; /* of the whole, then of 9 rows of 4100 columns by 32 */

static void run(const struct variant *v, const struct kernel_case *c, struct kernel_data *d,
                double error[MAX_SUMS], int64_t *index)
{
    kernel_data_make(d, c);
    memset(error, 0, MAX_SUMS * sizeof *error);
    assert_true(2 + 2 * d->q.scales.rows * d->q.scales.cols <= MAX_SUMS);
    assert_ok(v->find_nonfinite(NULL, &d->weights, index));
    assert_ok(v->quant->find_scales(NULL, &d->weights, &c->spec, &d->q));
    assert_ok(v->quant->quantize(NULL, &d->weights, &d->q));
    assert_ok(v->quant->dequantize(NULL, &d->q, &d->restored));
    assert_ok(v->squared_error(NULL, &d->weights, &d->restored, error));
    assert_ok(v->group_squared_error(NULL, &d->weights, &d->restored, d->q.group, error + 2));
}

static bool same_memory(const struct mat *a, const struct mat *b)
{
    if (!a->data || !b->data)
        return a->data == b->data;
    return !memcmp(a->data, b->data, (size_t)(a->rows * a->stride) * dtype_bytes(a->dtype));
}

static void compare(const struct variant *v, const struct variant *expected, const struct kernel_case *c)
{
    struct kernel_data a, b;
    double error_a[MAX_SUMS], error_b[MAX_SUMS];
    int64_t index_a, index_b;
    run(v, c, &a, error_a, &index_a);
    run(expected, c, &b, error_b, &index_b);
    if (!same_memory(&a.q.scales, &b.q.scales) || !same_memory(&a.q.zeros, &b.q.zeros) ||
        !same_memory(&a.q.packed, &b.q.packed) || !same_memory(&a.restored, &b.restored) ||
        memcmp(error_a, error_b, sizeof error_a) || index_a != index_b)
        fail_msg("%s differs from %s: %s", v->name, expected->name, kernel_case_text(c));
    kernel_data_free(&a);
    kernel_data_free(&b);
}

static void test_same_bytes(void **state)
{
    (void)state;
    struct backend cpu;
    assert_ok(backend_open(&cpu, "cpu", 1));
    const struct variant chosen = {"the program's choice", cpu.quant, cpu.core->squared_error,
                                   cpu.core->group_squared_error, cpu.core->find_nonfinite};
    const int n = usable_variants();
    struct kernel_case c;
    size_t n_cases = 0;
    for (; kernel_case(n_cases, &c); n_cases++)
        for (int v = 0; v < n; v++)
            compare(&variants[v], &chosen, &c);
    for (int v = 0; v < (int)N_OF(variants); v++)
        print_message("%s: %s\n", variants[v].name, v < n ? "same bytes" : "not run: not this machine's");
    print_message("%zu matrices\n", n_cases);
    backend_close(&cpu);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_bytes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Opening devices by name, memory that host and device share, and the budget that all of it counts against. */
#include "kernels/backend.h"
#include "kernels/budget.h"
#include "tests/unit/support.h"

/* --- names ------------------------------------------------------------------------------------------------------ */

static const char *const unknown[] = {"",        "abacus",  "CPU",       "cpu:0",  "cuda:", "cuda:x",
                                      "cuda:0x", "cuda:-1", "cuda:1024", "auto:0", "cuda0"};

static void test_unknown_devices(void **state)
{
    (void)state;
    char name[DEVICE_TEXT_BYTES], title[DEVICE_TEXT_BYTES];
    struct backend b;
    for (size_t i = 0; i < N_OF(unknown); i++) {
        char text[100];
        snprintf(text, sizeof text, "device '%s' is not known; expected auto, cpu or cuda:N", unknown[i]);
        assert_error(backend_resolve(unknown[i], name, title), ERR_UNSUPPORTED, text);
        assert_error(backend_open(&b, unknown[i], 1), ERR_UNSUPPORTED, text);
        assert_null(b.state);
        backend_close(&b); /* of what did not open */
    }
}

/* A device that no machine of ours has. */
static void test_absent_device(void **state)
{
    (void)state;
    char name[DEVICE_TEXT_BYTES], title[DEVICE_TEXT_BYTES];
    struct backend b;
    assert_error(backend_resolve("cuda:99", name, title), ERR_UNSUPPORTED, "cuda:99");
    assert_error(backend_open(&b, "cuda:99", 1), ERR_UNSUPPORTED, "cuda:99");
    assert_null(b.state);
}

static void test_resolve(void **state)
{
    (void)state;
    char name[DEVICE_TEXT_BYTES], title[DEVICE_TEXT_BYTES], other[DEVICE_TEXT_BYTES];
    assert_ok(backend_resolve("cpu", name, title));
    assert_string_equal(name, "cpu");
    assert_true(*title && !strchr(title, '\n'));
    const bool has_cuda = backend_resolve("cuda", name, title) >= 0;
    if (has_cuda)
        assert_true(!strcmp(name, "cuda:0") && *title);
    assert_ok(backend_resolve("auto", other, title));
    assert_string_equal(other, has_cuda ? "cuda:0" : "cpu");
    assert_true(*title);
}

/* Two handles side by side; the second has one thread. */
static void test_beside(void **state)
{
    (void)state;
    struct backend a, b;
    assert_ok(backend_open(&a, "cpu", 2));
    assert_ok(backend_open_beside(&b, &a));
    assert_string_equal(b.name, "cpu");
    assert_true(b.core == a.core && b.quant == a.quant && b.state && b.state != a.state);
    assert_true(b.host_memory && b.activation == DTYPE_F32 && b.batch_tokens == 1);
    assert_true(b.block_bytes > 0 && b.logit_bytes > 0);
    backend_close(&a);
    float x[4] = {1, -1, 50, 0};
    assert_ok(b.core->softcap(&b, &(struct mat){x, DTYPE_F32, 1, 4, 4}, 30));
    assert_true(x[2] < 30 && x[3] == 0);
    backend_close(&b);
    assert_null(b.state);
    backend_close(&b); /* once more does nothing */
}

/* --- views ------------------------------------------------------------------------------------------------------ */

static void test_views(void **state)
{
    (void)state;
    float f[40];
    uint16_t h[40];
    const struct mat m = {f, DTYPE_F32, 5, 6, 8}, n = {h, DTYPE_BF16, 4, 9, 10};
    const struct mat rows = mat_rows(&m, 2, 3), cols = mat_cols(&n, 4, 5);
    assert_true(rows.data == f + 16 && rows.rows == 3 && rows.cols == 6 && rows.stride == 8);
    assert_true(cols.data == h + 4 && cols.rows == 4 && cols.cols == 5 && cols.stride == 10);
    const struct mat both = mat_cols(&rows, 1, 2);
    assert_true(both.data == f + 17 && both.rows == 3 && both.cols == 2 && both.dtype == DTYPE_F32);
    const struct mat last = mat_rows(&n, 4, 0);
    assert_true(last.data == h + 40 && last.rows == 0);
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

static void test_staging(void **state)
{
    (void)state;
    enum { BYTES = 10000 };
    struct backend b;
    struct staged_buf s;
    unsigned char back[BYTES];
    assert_ok(backend_open(&b, "cpu", 1));
    const uint64_t before = budget_taken();
    assert_ok(b.core->acquire_staging(&b, BYTES, "a test", &s));
    assert_true(s.host && s.device == s.host && s.bytes == BYTES);
    assert_int_equal(budget_taken(), before + BYTES);
    for (int i = 0; i < BYTES; i++)
        ((unsigned char *)s.host)[i] = (unsigned char)(i * 7);
    assert_ok(b.core->stage_in(&b, &s, 0, BYTES));
    assert_ok(b.core->wait(&b));
    assert_ok(b.core->download(&b, back, s.device, BYTES));
    assert_memory_equal(back, s.host, BYTES);
    memset(back, 0x5a, 100);
    assert_ok(b.core->upload(&b, (char *)s.device + 50, back, 100));
    assert_ok(b.core->stage_out(&b, &s, 50, 100));
    for (int i = 0; i < BYTES; i++)
        assert_int_equal(((unsigned char *)s.host)[i], i >= 50 && i < 150 ? 0x5a : (unsigned char)(i * 7));
    assert_ok(b.core->stage_out(&b, &s, BYTES, 0));
    b.core->release_staging(&b, &s);
    assert_true(!s.host && !s.device && !s.bytes);
    assert_int_equal(budget_taken(), before);
    b.core->release_staging(&b, &s); /* of nothing */
    backend_close(&b);
}

static void test_memory(void **state)
{
    (void)state;
    struct backend b;
    struct device_memory m;
    assert_ok(backend_open(&b, "cpu", 1));
    assert_ok(b.core->memory(&b, &m));
    assert_true(m.total >= 64 << 20 && m.free > 0 && m.free <= m.total);
    backend_close(&b);
}

/* What the system refuses is named, and does not count. */
static void test_absurd_size(void **state)
{
    (void)state;
    struct backend b;
    struct buf buf;
    struct staged_buf s;
    assert_ok(backend_open(&b, "cpu", 1));
    const uint64_t before = budget_taken();
    assert_error(b.core->acquire(&b, (size_t)1 << 60, "castles in the air", &buf), ERR_MEMORY,
                 "castles in the air");
    assert_null(buf.ptr);
    assert_error(b.core->acquire(&b, SIZE_MAX, "castles in the air", &buf), ERR_MEMORY, "castles in the air");
    assert_error(b.core->acquire_staging(&b, (size_t)1 << 60, "more castles", &s), ERR_MEMORY,
                 "more castles");
    assert_true(!s.host && !s.device);
    b.core->release(&b, &buf);
    b.core->release_staging(&b, &s);
    assert_int_equal(budget_taken(), before);
    backend_close(&b);
}

/* --- the budget --------------------------------------------------------------------------------------------------- */

enum { MIB = 1 << 20 };
static const size_t gib = (size_t)1 << 30;

static int lift_budget(void **state)
{
    (void)state;
    budget_set(0);
    return 0;
}

static void test_budget_counts(void **state)
{
    (void)state;
    assert_int_equal(budget_limit(), 0);
    assert_int_equal(budget_taken(), 0);
    assert_ok(budget_take("cuda:0", 100 * gib, "a test"));
    budget_give(100 * gib);
    budget_set(2 * gib);
    assert_int_equal(budget_limit(), 2 * gib);
    assert_ok(budget_take("cuda:0", gib / 2, "weights"));
    assert_ok(budget_take("cuda:1", gib, "weights")); /* all devices together */
    assert_error(
        budget_take("cuda:1", gib / 2 + 1, "activations"), ERR_MEMORY,
        "cuda:1: 512.0 MiB for activations do not fit the memory budget of 2.00 GiB, of which 1.50 GiB are "
        "taken");
    assert_error(budget_take("cuda:1", SIZE_MAX, "activations"), ERR_MEMORY, "for activations do not fit");
    assert_int_equal(budget_taken(), gib + gib / 2);
    assert_ok(budget_take("cuda:1", gib / 2, "activations")); /* to the last byte */
    assert_error(budget_take("cpu", 1, "a byte"), ERR_MEMORY, "for a byte do not fit");
    assert_ok(budget_take("cpu", 0, "nothing"));
    budget_give(2 * gib);
    assert_int_equal(budget_taken(), 0);
    budget_set(0);
}

/* A backend's memory counts, and is given back: what is refused, too. */
static void test_budget_of_a_backend(void **state)
{
    (void)state;
    struct backend b;
    struct buf first, second;
    struct staged_buf staged;
    budget_set(8 * MIB);
    assert_ok(backend_open(&b, "cpu", 1));
    const uint64_t before = budget_taken();
    assert_ok(b.core->acquire(&b, 5 * MIB, "the first", &first));
    assert_int_equal(budget_taken(), before + 5 * MIB);
    assert_error(b.core->acquire(&b, 4 * MIB, "the second", &second), ERR_MEMORY,
                 "for the second do not fit");
    assert_true(!second.ptr && !second.bytes);
    assert_error(b.core->acquire_staging(&b, 4 * MIB, "the third", &staged), ERR_MEMORY,
                 "for the third do not fit the memory budget");
    assert_true(!staged.host && !staged.device && !staged.bytes);
    b.core->release(&b, &second);
    b.core->release_staging(&b, &staged);
    assert_int_equal(budget_taken(), before + 5 * MIB);
    b.core->release(&b, &first);
    assert_null(first.ptr);
    assert_int_equal(budget_taken(), before);
    assert_ok(b.core->acquire(&b, 4 * MIB, "the second", &second));
    b.core->release(&b, &second);
    backend_close(&b);
    assert_int_equal(budget_taken(), 0);
    budget_set(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unknown_devices),
        cmocka_unit_test(test_absent_device),
        cmocka_unit_test(test_resolve),
        cmocka_unit_test(test_beside),
        cmocka_unit_test(test_views),
        cmocka_unit_test(test_staging),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_absurd_size),
        cmocka_unit_test_teardown(test_budget_counts, lift_budget),
        cmocka_unit_test_teardown(test_budget_of_a_backend, lift_budget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

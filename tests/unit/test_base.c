/* The base layer: 16-bit floats against arithmetic on every bit pattern, JSON in and out, files, memory, names,
 * hashes, threads, errors. */
#include "base/dtype.h"
#include "base/file.h"
#include "base/half.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/parallel.h"
#include "base/text.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- half ----------------------------------------------------------------------------------------------------- */

static void test_every_half(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        const float b = half_from_bf16((uint16_t)h), f = half_from_f16((uint16_t)h);
        const double slow_b = naive_value16((uint16_t)h, 8), slow_f = naive_value16((uint16_t)h, 5);
        if (isnan(slow_b)) {
            assert_true(isnan(b) && isnan(half_from_bf16(half_to_bf16(b))));
        } else {
            assert_true((double)b == slow_b && !signbit(b) == !signbit(slow_b));
            assert_int_equal(half_to_bf16(b), h);
        }
        if (isnan(slow_f)) {
            assert_true(isnan(f) && isnan(half_from_f16(half_to_f16(f))));
        } else {
            assert_true((double)f == slow_f && !signbit(f) == !signbit(slow_f));
            assert_int_equal(half_to_f16(f), h);
        }
    }
}

/* Rounding of values between and beyond the 16-bit ones: every midpoint, its neighbours, and random bits. */
static void check_rounding(float x)
{
    assert_int_equal(half_to_bf16(x), naive_bits16(x, 8));
    assert_int_equal(half_to_f16(x), naive_bits16(x, 5));
    assert_true(half_round_bf16(x) == (float)naive_bf16(x));
}

static void test_rounding(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        const float near_bf16 = half_float(h << 16 | 0x8000), f16 = half_from_f16((uint16_t)h);
        const float up = half_from_f16((uint16_t)(h + 1)), near_f16 = (f16 + up) / 2;
        if (isfinite(near_bf16)) {
            check_rounding(near_bf16);
            check_rounding(nextafterf(near_bf16, 0));
            check_rounding(nextafterf(near_bf16, INFINITY));
        }
        if (isfinite(near_f16)) {
            check_rounding(near_f16);
            check_rounding(nextafterf(near_f16, -INFINITY));
            check_rounding(nextafterf(near_f16, INFINITY));
        }
    }
    uint64_t seed = 3;
    for (int i = 0; i < 1000000; i++) {
        const float x = half_float((uint32_t)support_random(&seed));
        if (isfinite(x))
            check_rounding(x);
    }
    static const float edges[] = {65504,         65519.996f,      65520,          65536,        0x1p-24f,
                                  0x1p-25f,      0x1.000002p-25f, 0x1p-14f,       0x1.ffcp-15f, 0x1.fffp-15f,
                                  3.3895314e38f, 3.3961775e38f,   0x1.fffffep127f};
    for (size_t i = 0; i < N_OF(edges); i++) {
        check_rounding(edges[i]);
        check_rounding(-edges[i]);
    }
    /* by hand: ties go to the even neighbour */
    assert_int_equal(half_to_bf16(half_float(0x3f808000)), 0x3f80);
    assert_int_equal(half_to_bf16(half_float(0x3f818000)), 0x3f82);
    assert_int_equal(half_to_bf16(half_float(0x3f808001)), 0x3f81);
    assert_int_equal(half_to_bf16(INFINITY), 0x7f80);
    assert_int_equal(half_to_bf16(-INFINITY), 0xff80);
    assert_true(isnan(half_round_bf16(half_float(0x7f800001)))); /* a NaN whose payload is in the lost bits */
}

static void test_dtypes(void **state)
{
    (void)state;
    for (int t = 0; t < N_DTYPES; t++)
        assert_int_equal(dtype_parse(dtype_name((enum dtype)t)), t);
    assert_int_equal(dtype_parse("bf16"), -1);
    assert_int_equal(dtype_bytes(DTYPE_BF16), 2);
    assert_int_equal(dtype_bytes(DTYPE_I64), 8);
}

/* --- JSON ----------------------------------------------------------------------------------------------------- */

static const char *const not_json[] = {
    "",    " ",   "{",         "{} x",           "{}{}",   "{\"a\":1", "[1,]x",
    "nul", "\"a", "{\"a\" 1}", "\xef\xbb\xbf{}", "\x01{}", "{\x01}",   "\v{}",
};

static void test_not_json(void **state)
{
    (void)state;
    struct json_doc *doc;
    for (size_t i = 0; i < N_OF(not_json); i++) {
        const int rc = json_parse(&doc, not_json[i], strlen(not_json[i]), "a.json");
        if (rc != ERR_FORMAT)
            fail_msg("text %zu was taken for JSON", i);
        assert_non_null(strstr(err_message(), "a.json: not JSON"));
    }
    assert_error(json_parse(&doc, "{\0}", 3, "a.json"), ERR_FORMAT, "byte 0x00 at offset 1");
}

static void test_json_values(void **state)
{
    (void)state;
    static const char text[] = "{\"a\": {\"b\": [1, 2.5, \"x\", null, true]}, \"big\": 9007199254740991, "
                               "\"neg\": -3, \"n\": null, \"f\": 1e400}\n";
    struct json_doc *doc;
    struct json list, a;
    int64_t i;
    double d;
    bool b;
    const char *s;
    assert_ok(json_parse(&doc, text, strlen(text), "t.json"));
    const struct json root = json_root(doc);
    assert_ok(json_get_object(root, "a", &a));
    assert_ok(json_get_array(a, "b", &list));
    assert_int_equal(json_count(list), 5);
    const struct json first = json_first(list), second = json_next(first);
    assert_ok(json_as_int(first, 0, 1, &i));
    assert_int_equal(i, 1);
    assert_error(json_as_int(first, 2, 9, &i), ERR_FORMAT, "t.json: 'a.b[0]' is 1, expected 2 … 9");
    assert_error(json_as_int(second, 0, 9, &i), ERR_FORMAT, "'a.b[1]' is 2.5, expected an integer");
    assert_ok(json_as_double(second, &d));
    assert_true(d == 2.5);
    assert_error(json_as_string(second, &s), ERR_FORMAT, "'a.b[1]' is not a string");
    assert_ok(json_get_int(root, "big", 0, INT64_MAX, &i));
    assert_true(i == 9007199254740991);
    assert_error(json_get_int(root, "neg", 0, 9, &i), ERR_FORMAT, "'neg' is -3");
    assert_error(json_get_int(root, "n", 0, 9, &i), ERR_FORMAT, "has no member 'n'");
    assert_error(json_get_int(root, "f", 0, 9, &i), ERR_FORMAT, "'f'");
    assert_error(json_get_double(root, "f", &d), ERR_FORMAT, "'f' is not a finite number");
    assert_error(json_get_object(root, "big", &a), ERR_FORMAT, "'big' is not an object");
    assert_ok(json_opt_int(root, "n", 0, 9, 7, &i));
    assert_int_equal(i, 7);
    assert_ok(json_opt_bool(root, "absent", true, &b));
    assert_true(b);
    assert_error(json_opt_bool(root, "neg", true, &b), ERR_FORMAT, "'neg' is not true or false");
    assert_ok(json_opt_string(root, "absent", "fallback", &s));
    assert_string_equal(s, "fallback");
    json_free(doc);
}

static void write_json(struct text *t)
{
    json_begin_object(t);
    json_kv_string(t, "s", "a\"b\\c\n\t\x01ü");
    json_kv_int(t, "i", INT64_MIN);
    json_kv_uint(t, "u", UINT64_MAX);
    json_kv_double(t, "d", 0.1);
    json_kv_double(t, "nan", NAN);
    json_kv_bool(t, "t", true);
    json_kv_string(t, "null", NULL);
    json_put_key(t, "empty");
    json_begin_array(t);
    json_end_array(t);
    json_put_key(t, "list");
    json_begin_array(t);
    json_put_int(t, 1);
    json_begin_object(t);
    json_end_object(t);
    json_end_array(t);
    json_end_object(t);
}

static void test_json_written(void **state)
{
    (void)state;
    struct text t = {0}, indented = {.indent = 2};
    write_json(&t);
    assert_ok(text_finish(&t));
    assert_string_equal(t.data, "{\"s\": \"a\\\"b\\\\c\\n\\u0009\\u0001ü\", \"i\": -9223372036854775808, "
                                "\"u\": 18446744073709551615, \"d\": 0.1, \"nan\": null, \"t\": true, "
                                "\"null\": null, \"empty\": [], \"list\": [1, {}]}");
    write_json(&indented);
    assert_ok(text_finish(&indented));
    assert_non_null(strstr(indented.data, "\n  \"empty\": [],\n  \"list\": [\n    1,\n    {}\n  ]\n}"));
    struct json_doc *doc;
    const char *s;
    assert_ok(json_parse(&doc, indented.data, indented.len, "written"));
    assert_ok(json_get_string(json_root(doc), "s", &s));
    assert_string_equal(s, "a\"b\\c\n\t\x01ü");
    json_free(doc);
    text_free(&t);
    text_free(&indented);
}

static void test_doubles_read_back(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (int i = 0; i < 20000; i++) {
        double v, back;
        const uint64_t bits = support_random(&seed);
        memcpy(&v, &bits, sizeof v);
        if (!isfinite(v))
            continue;
        struct text t = {0};
        json_put_double(&t, v);
        assert_ok(text_finish(&t));
        back = strtod(t.data, NULL);
        assert_memory_equal(&v, &back, sizeof v);
        text_free(&t);
    }
}

/* --- files ---------------------------------------------------------------------------------------------------- */

static void test_files(void **state)
{
    (void)state;
    const char *path = support_path("file"), *copy = support_path("copy");
    char *text;
    size_t n;
    assert_ok(file_write_atomic(path, "abc\0d", 5));
    assert_ok(file_read(path, 5, &text, &n));
    assert_int_equal(n, 5);
    assert_memory_equal(text, "abc\0d", 6);
    free(text);
    assert_error(file_read(path, 4, &text, &n), ERR_FORMAT, "is 5 bytes, expected at most 4");
    assert_error(file_read(support_path("none"), 4, &text, &n), ERR_IO, "none: No such file");
    assert_error(file_read(support_folder(), 4, &text, &n), ERR_IO, "is a folder");
    assert_int_equal(mkfifo(support_path("fifo"), 0600), 0);
    assert_error(file_read(support_path("fifo"), 4, &text, &n), ERR_IO, "is a special file");
    assert_ok(file_write_atomic(path, "xy", 2)); /* replaces */
    assert_ok(file_copy(path, copy));
    assert_ok(file_read(copy, 100, &text, &n));
    assert_string_equal(text, "xy");
    free(text);
    assert_ok(file_write_atomic(path, "", 0));
    struct file_map map;
    assert_ok(file_map_open(&map, path));
    assert_int_equal(map.bytes, 0);
    file_map_close(&map);
    uint64_t bytes;
    const int fd = file_open_read(copy, &bytes);
    char buf[8];
    assert_true(fd >= 0 && bytes == 2);
    assert_ok(file_pread(fd, buf, 1, 1, copy));
    assert_int_equal(buf[0], 'y');
    assert_error(file_pread(fd, buf, 3, 0, copy), ERR_IO, "the file shrank");
    close(fd);
}

static void test_folders(void **state)
{
    (void)state;
    struct file_list list;
    const char *folder = support_path("folder"), *moved = support_path("moved");
    assert_ok(file_remove_folder(folder)); /* a missing one is no error */
    assert_ok(file_make_folder(folder));
    assert_error(file_make_folder(folder), ERR_IO, "cannot create the folder");
    support_write(support_path("folder/b"), "", 0);
    support_write(support_path("folder/a"), "", 0);
    assert_int_equal(mkdir(support_path("folder/sub"), 0700), 0);
    assert_int_equal(symlink("nowhere", support_path("folder/dangling")), 0);
    assert_true(file_exists(support_path("folder/dangling")));
    assert_ok(file_list(&list, folder));
    assert_int_equal(list.n, 2);
    assert_string_equal(list.names[0], "a");
    assert_string_equal(list.names[1], "b");
    file_list_free(&list);
    assert_error(file_remove_folder(folder), ERR_IO, "cannot remove"); /* never into subfolders */
    assert_true(file_is_folder(support_path("folder/sub")));
    assert_int_equal(rmdir(support_path("folder/sub")), 0);
    assert_ok(file_rename(folder, moved));
    assert_ok(file_remove_folder(moved));
    assert_false(file_exists(moved));
    char *joined = file_join("a/", "b");
    assert_string_equal(joined, "a/b");
    free(joined);
    assert_string_equal(file_base("x/y/z"), "z");
    assert_string_equal(file_base("z"), "z");
}

/* --- memory, names, hashes ------------------------------------------------------------------------------------ */

static void test_memory(void **state)
{
    (void)state;
    int *array = NULL;
    size_t capacity = 0;
    uint64_t product;
    assert_null(mem_alloc(SIZE_MAX / 2, 4, "too much"));
    assert_non_null(strstr(err_message(), "too much"));
    assert_null(mem_alloc_aligned(SIZE_MAX - 5, "too much"));
    assert_error(mem_grow(&array, &capacity, SIZE_MAX / 2, 4, "a list"), ERR_MEMORY, "a list");
    assert_ok(mem_grow(&array, &capacity, 17, sizeof *array, "a list"));
    assert_true(capacity >= 17);
    free(array);
    void *p = mem_alloc_aligned(1, "a byte");
    assert_true(p && (uintptr_t)p % 64 == 0);
    free(p);
    assert_false(mem_mul_u64(UINT64_MAX, 2, &product));
    assert_false(mem_add_u64(UINT64_MAX, 1, &product));
    assert_true(mem_mul_u64(UINT32_MAX, UINT32_MAX, &product) && product == 0xfffffffe00000001);
}

static void test_names(void **state)
{
    (void)state;
    enum { N = 5000 };
    static char names[N][16];
    struct name_table t;
    size_t at;
    assert_ok(name_table_init(&t, 1)); /* grows */
    for (size_t i = 0; i < N; i++) {
        snprintf(names[i], sizeof names[i], "n%zu", i * 7919 % N);
        assert_int_equal(name_table_add(&t, names[i], i), 0);
    }
    assert_int_equal(name_table_add(&t, "n17", 99), 1);
    for (size_t i = 0; i < N; i++)
        assert_true(name_table_find(&t, names[i], &at) && at == i);
    assert_false(name_table_find(&t, "n", &at));
    name_table_free(&t);
    assert_false(name_table_find(&t, "n1", &at));
}

static void test_hash(void **state)
{
    (void)state;
    char hex[HASH_HEX_BYTES];
    struct hash128 h = hash_bytes("", 0), back;
    hash_to_hex(h, hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f"); /* published XXH3-128 of nothing */
    assert_int_equal(hash_from_hex(hex, &back), 0);
    assert_true(hash_equal(h, back));
    assert_int_equal(hash_from_hex("99AA06d3014798d86001c324468d497f", &back), -1);
    assert_int_equal(hash_from_hex("99", &back), -1);
    assert_false(hash_equal(h, hash_bytes("a", 1)));
}

/* --- threads and errors --------------------------------------------------------------------------------------- */

enum { N_TASKS = 10000 };

struct loop {
    unsigned char done[N_TASKS];
    size_t fails_from;
    int workers;
};

static int loop_task(void *ctx, size_t index, int worker)
{
    struct loop *l = ctx;
    if (worker < 0 || worker >= l->workers)
        return err_set(ERR_IO, "worker %d", worker);
    l->done[index]++;
    return index >= l->fails_from ? err_set(ERR_FORMAT, "task %zu", index) : 0;
}

static void test_parallel(void **state)
{
    (void)state;
    for (int workers = 1; workers <= 5; workers++) {
        struct parallel *pool;
        static struct loop l;
        assert_ok(parallel_open(&pool, workers));
        assert_int_equal(parallel_workers(pool), workers);
        for (int round = 0; round < 3; round++) {
            l = (struct loop){.fails_from = SIZE_MAX, .workers = workers};
            assert_ok(parallel_for(pool, N_TASKS, loop_task, &l));
            for (size_t i = 0; i < N_TASKS; i++)
                assert_int_equal(l.done[i], 1);
            /* indices start in ascending order, so 5000 has started before any later one can fail */
            l = (struct loop){.fails_from = 5000, .workers = workers};
            assert_error(parallel_for(pool, N_TASKS, loop_task, &l), ERR_FORMAT, "task 5000");
            assert_int_equal(l.done[N_TASKS - 1], 0);
            assert_ok(parallel_for(pool, 0, loop_task, &l));
        }
        parallel_close(pool);
    }
}

static void take_warning(void *ctx, const char *message)
{
    snprintf(ctx, 100, "%s", message);
}

static void test_errors(void **state)
{
    (void)state;
    assert_int_equal(err_set(ERR_FORMAT, "a %s\n%c", "b\x1b", 'c'), ERR_FORMAT);
    assert_string_equal(err_message(), "a b??c");
    assert_int_equal(err_context(ERR_IO, "in %d", 3), ERR_IO);
    assert_string_equal(err_message(), "in 3: a b??c");
    assert_int_equal(err_set(ERR_IO, "%s again", err_message()), ERR_IO);
    assert_string_equal(err_message(), "in 3: a b??c again");
    assert_string_equal(err_name(ERR_UNSUPPORTED), "unsupported");
    char seen[100] = "";
    log_warn("dropped");
    log_set_sink(take_warning, seen);
    log_warn("number %d", 5);
    log_set_sink(NULL, NULL);
    assert_string_equal(seen, "number 5");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_half),
        cmocka_unit_test(test_rounding),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_not_json),
        cmocka_unit_test(test_json_values),
        cmocka_unit_test(test_json_written),
        cmocka_unit_test(test_doubles_read_back),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_hash),
        cmocka_unit_test(test_parallel),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

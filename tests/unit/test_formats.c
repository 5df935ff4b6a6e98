/* Files of a checkpoint: safetensors read and written, the folder with its index, the record. */
#include "base/file.h"
#include "formats/checkpoint.h"
#include "formats/record.h"
#include "formats/writer.h"
#include "tests/unit/support.h"

/* --- one safetensors file ------------------------------------------------------------------------------------- */

static void put_safetensors(const char *path, const char *header, size_t data_bytes)
{
    const size_t n = strlen(header);
    char *file = calloc(1, 8 + n + data_bytes + 1);
    assert_non_null(file);
    for (int i = 0; i < 8; i++)
        file[i] = (char)(n >> 8 * i);
    memcpy(file + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++)
        file[8 + n + i] = (char)i;
    support_write(path, file, 8 + n + data_bytes);
    free(file);
}

#define ENTRY(dtype, shape, offsets)                                                                         \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static const struct {
    const char *header;
    size_t data_bytes;
    const char *message;
} bad_headers[] = {
    {"", 0, "the header is not a JSON object"},
    {" {}", 0, "the header is not a JSON object"},
    {"[]", 0, "the header is not a JSON object"},
    {"{\"a\":1", 0, "not JSON"},
    {"{}", 5, "the last 5 bytes belong to no tensor"},
    {"{\"a\":" ENTRY("F16", "[2,2]", "[0,8]") "}", 7, "'a' lies at bytes 0 … 8 of the data, which has 7"},
    {"{\"a\":" ENTRY("F16", "[2,2]", "[0,8]") "}", 9, "the last 1 bytes"},
    {"{\"a\":" ENTRY("F16", "[2,2]", "[0,6]") "}", 6, "'a' has 6 bytes, which is not F16 [2, 2]"},
    {"{\"a\":" ENTRY("F17", "[2,2]", "[0,8]") "}", 8, "unknown dtype 'F17'"},
    {"{\"a\":" ENTRY("F16", "[2,2]", "[8,0]") "}", 8, "'a' lies at bytes 8 … 0"},
    {"{\"a\":" ENTRY("F16", "[2,2]", "[0]") "}", 8, "data_offsets is not a pair"},
    {"{\"a\":" ENTRY("F16", "[2,-2]", "[0,8]") "}", 8, "'a.shape[1]' is -2"},
    {"{\"a\":" ENTRY("F16", "[2,2.5]", "[0,8]") "}", 8, "expected an integer"},
    {"{\"a\":" ENTRY("F16", "4", "[0,8]") "}", 8, "is not an array"},
    {"{\"a\":7}", 8, "'a' is not an object"},
    {"{\"a\":" ENTRY("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]") "}", 1, "more than 8 dimensions"},
    /* 2^32 · 2^32 wraps to 0 */
    {"{\"a\":" ENTRY("U8", "[4294967296,4294967296]", "[0,0]") "}", 0, "which is not U8"},
    {"{\"a\":" ENTRY("U8", "[4]", "[0,4]") ",\"b\":" ENTRY("U8", "[4]", "[2,6]") "}", 6,
     "'a' and 'b' overlap"},
    {"{\"a\":" ENTRY("U8", "[4]", "[0,4]") ",\"b\":" ENTRY("U8", "[2]", "[5,7]") "}", 7,
     "1 bytes before tensor 'b' belong to no tensor"},
    {"{\"a\":" ENTRY("U8", "[1]", "[0,1]") ",\"a\":" ENTRY("U8", "[1]", "[1,2]") "}", 2, "appears twice"},
};

static void test_bad_headers(void **state)
{
    (void)state;
    const char *path = support_path("bad.safetensors");
    struct safetensors st;
    for (size_t i = 0; i < N_OF(bad_headers); i++) {
        put_safetensors(path, bad_headers[i].header, bad_headers[i].data_bytes);
        assert_error(safetensors_open(&st, path), ERR_FORMAT, bad_headers[i].message);
        assert_non_null(strstr(err_message(), path));
    }
    support_write(path, "\3\0\0", 3);
    assert_error(safetensors_open(&st, path), ERR_FORMAT, "too short");
    support_write(path, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    assert_error(safetensors_open(&st, path), ERR_FORMAT, "claims a header of 18446744073709551615");
    support_write(path, "\x20\0\0\0\0\0\0\0{}", 10);
    assert_error(safetensors_open(&st, path), ERR_FORMAT, "is truncated");
}

static void test_good_header(void **state)
{
    (void)state;
    const char *path = support_path("good.safetensors");
    struct safetensors st;
    put_safetensors(
        path,
        "{\"__metadata__\":{\"format\":\"pt\"},\"b\":" ENTRY("BF16", "[2,3]", "[4,16]") ",\"scalar\":" ENTRY(
            "F32", "[]", "[0,4]") ",\"empty\":" ENTRY("I64", "[0,5]", "[4,4]") "}   ",
        16);
    assert_ok(safetensors_open(&st, path));
    assert_int_equal(st.n_tensors, 3);
    const struct tensor *scalar = &st.tensors[0], *empty = &st.tensors[1], *b = &st.tensors[2];
    assert_string_equal(scalar->name, "scalar");
    assert_int_equal(tensor_rows(scalar), 1);
    assert_int_equal(tensor_cols(scalar), 1);
    assert_string_equal(empty->name, "empty");
    assert_int_equal(empty->bytes, 0);
    assert_int_equal(b->dtype, DTYPE_BF16);
    assert_int_equal(b->bytes, 12);
    assert_int_equal(tensor_rows(b), 2);
    char text[TENSOR_TEXT_BYTES], data[12];
    assert_string_equal(tensor_text(b->dtype, b->n_dims, b->shape, text), "BF16 [2, 3]");
    assert_ok(file_pread(st.fd, data, 12, b->offset, path));
    for (int i = 0; i < 12; i++)
        assert_int_equal(data[i], 4 + i);
    safetensors_close(&st);
    put_safetensors(path, "{}", 0);
    assert_ok(safetensors_open(&st, path));
    assert_int_equal(st.n_tensors, 0);
    safetensors_close(&st);
}

static void test_pieces(void **state)
{
    (void)state;
    assert_int_equal(tensor_piece_rows(2048, DTYPE_BF16), 64);
    assert_int_equal(tensor_piece_rows(640, DTYPE_BF16), 128);
    assert_int_equal(tensor_piece_rows(1 << 20, DTYPE_F32), 1); /* one row is longer than a piece */
    assert_true(tensor_piece_rows(0, DTYPE_F32) >= 1);
    assert_int_equal(tensor_piece_rows(INT64_MAX, DTYPE_F32), 1);
}

/* --- writing and reading back --------------------------------------------------------------------------------- */

static const struct {
    const char *name, *module;
    enum dtype dtype;
    int n_dims;
    int64_t shape[3];
} written[] = {
    {"e.weight", "e.weight", DTYPE_BF16, 2, {50, 7}}, {"l.0.packed", "l.0", DTYPE_I32, 2, {9, 2}},
    {"l.0.scale", "l.0", DTYPE_BF16, 2, {9, 1}},      {"l.0.shape", "l.0", DTYPE_I64, 1, {2}},
    {"l.1.packed", "l.1", DTYPE_I32, 2, {9, 2}},      {"l.1.scale", "l.1", DTYPE_BF16, 2, {9, 1}},
    {"l.1.shape", "l.1", DTYPE_I64, 1, {2}},          {"odd", "odd", DTYPE_U8, 1, {3}},
    {"none", "none", DTYPE_F16, 3, {4, 0, 2}},        {"scalar \"quoted\" ü", "s", DTYPE_F32, 0, {0}},
};

static uint8_t expected_byte(size_t tensor, size_t at)
{
    return (uint8_t)(tensor * 37 + at * 11 + at / 256);
}

/* *n_files gets the number of files. Every tensor is put in two halves, the second first. */
static void write_checkpoint(const char *folder, uint64_t shard_bytes, size_t *n_files)
{
    struct writer *w;
    size_t ids[N_OF(written)];
    assert_ok(file_make_folder(folder));
    assert_ok(writer_open(&w, folder, shard_bytes));
    for (size_t i = 0; i < N_OF(written); i++)
        assert_ok(writer_add(w, written[i].name, written[i].module, written[i].dtype, written[i].n_dims,
                             written[i].shape, &ids[i]));
    assert_ok(writer_begin(w, false));
    for (size_t i = 0; i < N_OF(written); i++) {
        uint8_t data[1024];
        uint64_t n = dtype_bytes(written[i].dtype);
        for (int d = 0; d < written[i].n_dims; d++)
            n *= (uint64_t)written[i].shape[d];
        for (size_t k = 0; k < n; k++)
            data[k] = expected_byte(i, k);
        const size_t half = (size_t)n / 2;
        assert_ok(writer_put(w, ids[i], half, data + half, (size_t)n - half));
        assert_ok(writer_put(w, ids[i], 0, data, half));
    }
    assert_ok(writer_index(w));
    assert_ok(writer_finish(w));
    *n_files = writer_n_files(w);
    writer_close(w);
}

static void check_checkpoint(const char *folder, size_t n_files)
{
    struct checkpoint ck;
    assert_ok(checkpoint_open(&ck, folder));
    assert_int_equal(ck.n_tensors, N_OF(written));
    assert_int_equal(ck.n_files, n_files);
    for (size_t i = 0; i < N_OF(written); i++) {
        const struct tensor *t = checkpoint_tensor(&ck, written[i].name);
        assert_non_null(t);
        assert_int_equal(t->dtype, written[i].dtype);
        assert_int_equal(t->n_dims, written[i].n_dims);
        for (int d = 0; d < t->n_dims; d++)
            assert_int_equal(t->shape[d], written[i].shape[d]);
        assert_int_equal(t->offset % dtype_bytes(t->dtype), 0); /* naturally aligned */
        uint8_t data[1024];
        assert_ok(checkpoint_read(&ck, t, 0, (size_t)t->bytes, data));
        for (size_t k = 0; k < t->bytes; k++)
            assert_int_equal(data[k], expected_byte(i, k));
        /* the tensors of a module share a file */
        if (i > 0 && !strcmp(written[i].module, written[i - 1].module))
            assert_int_equal(t->file, checkpoint_tensor(&ck, written[i - 1].name)->file);
    }
    assert_null(checkpoint_tensor(&ck, "l.0"));
    checkpoint_close(&ck);
}

static void test_round_trip(void **state)
{
    (void)state;
    static const uint64_t limits[] = {1 << 20, 800, 110, 1};
    size_t n[N_OF(limits)];
    for (size_t i = 0; i < N_OF(limits); i++) {
        const char *folder = support_path("written-%zu", i);
        write_checkpoint(folder, limits[i], &n[i]);
        check_checkpoint(folder, n[i]);
        assert_true(file_exists(support_path("written-%zu/model.safetensors.index.json", i)) == (n[i] > 1));
    }
    assert_int_equal(n[0], 1);
    assert_true(n[1] == 2 && n[2] == 4 && n[3] >= 5);
}

/* The same hashes with any number of threads, and equal to a plain walk over the pieces. */
static void test_hashes(void **state)
{
    (void)state;
    struct checkpoint ck;
    struct writer *w;
    size_t id, small, n_files;
    const int64_t shape[2] = {3000, 1000};
    const char *folder = support_path("hashed");
    assert_ok(file_make_folder(folder));
    assert_ok(writer_open(&w, folder, UINT64_MAX));
    assert_ok(writer_add(w, "large", "large", DTYPE_BF16, 2, shape, &id));
    /* smaller than all others, with the largest piece: buffers are for the largest need, not for the last one */
    assert_ok(writer_add(w, "small", "small", DTYPE_U8, 1, (int64_t[]){3}, &small));
    assert_ok(writer_begin(w, false));
    uint16_t *data = malloc(6000000);
    assert_non_null(data);
    for (size_t i = 0; i < 3000000; i++)
        data[i] = (uint16_t)(i * 40503);
    assert_ok(writer_put(w, id, 0, data, 6000000));
    assert_ok(writer_put(w, small, 0, "abc", 3));
    assert_ok(writer_finish(w));
    n_files = writer_n_files(w);
    writer_close(w);
    assert_int_equal(n_files, 1);
    assert_ok(checkpoint_open(&ck, folder));
    struct hash128 pieces[64], hashes[2], abc = hash_bytes("abc", 3);
    size_t n = 0;
    for (size_t row = 0; row < 3000;
         row += 128) /* 128 rows of 2000 bytes: the greatest power of two in 256 KiB */
        pieces[n++] = hash_bytes(data + row * 1000, (3000 - row < 128 ? 3000 - row : 128) * 2000);
    for (int threads = 1; threads <= 3; threads++) {
        struct parallel *pool;
        assert_ok(parallel_open(&pool, threads));
        assert_ok(checkpoint_hash_all(&ck, pool, hashes, NULL, NULL));
        for (size_t i = 0; i < 2; i++) {
            const struct tensor *t = &ck.tensors[i];
            struct hash128 expected;
            assert_ok(
                tensor_hash_combine(i ? &abc : pieces, i ? 1 : n, t->dtype, t->n_dims, t->shape, &expected));
            assert_true(hash_equal(hashes[i], expected));
        }
        parallel_close(pool);
    }
    checkpoint_close(&ck);
    free(data);
}

/* --- the folder and its index --------------------------------------------------------------------------------- */

static void put_index(const char *folder, const char *text)
{
    char *path = file_join(folder, "model.safetensors.index.json");
    support_write(path, text, strlen(text));
    free(path);
}

static void test_index(void **state)
{
    (void)state;
    const char *folder = support_path("indexed"), *one = "{\"a\":" ENTRY("U8", "[1]", "[0,1]") "}";
    struct checkpoint ck;
    assert_ok(file_make_folder(folder));
    assert_error(checkpoint_open(&ck, folder), ERR_IO, "has no *.safetensors file");
    put_safetensors(support_path("indexed/x.safetensors"), one, 1);
    assert_ok(checkpoint_open(&ck, folder)); /* the only one there is */
    checkpoint_close(&ck);
    put_safetensors(support_path("indexed/y.safetensors"), "{\"b\":" ENTRY("U8", "[1]", "[0,1]") "}", 1);
    assert_error(checkpoint_open(&ck, folder), ERR_FORMAT, "has 2 *.safetensors files but no");
    static const struct {
        const char *index;
        int code;
        const char *message;
    } bad[] = {
        {"{}", ERR_FORMAT, "has no member 'weight_map'"},
        {"{\"weight_map\":[]}", ERR_FORMAT, "is not an object"},
        {"{\"weight_map\":{\"a\":3}}", ERR_FORMAT, "is not a string"},
        {"{\"weight_map\":{\"a\":\"../x.safetensors\"}}", ERR_FORMAT,
         "expected a file name without a folder"},
        {"{\"weight_map\":{\"a\":\"\"}}", ERR_FORMAT, "expected a file name without a folder"},
        {"{\"weight_map\":{\"a\":\"z.safetensors\"}}", ERR_IO, "z.safetensors: No such file"},
        {"{\"weight_map\":{\"a\":\"..\"}}", ERR_IO, "is a folder"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"c\":\"x.safetensors\"}}", ERR_FORMAT, "names 2 tensors"},
        {"{\"weight_map\":{\"c\":\"x.safetensors\"}}", ERR_FORMAT, "'c' is not in x.safetensors"},
        {"{\"weight_map\":{\"a\":\"y.safetensors\",\"b\":\"x.safetensors\"}}", ERR_FORMAT,
         "'a' is not in y.safetensors"},
    };
    for (size_t i = 0; i < N_OF(bad); i++) {
        put_index(folder, bad[i].index);
        assert_error(checkpoint_open(&ck, folder), bad[i].code, bad[i].message);
    }
    put_index(folder, "{\"weight_map\":{\"b\":\"y.safetensors\",\"a\":\"x.safetensors\"}}");
    assert_ok(checkpoint_open(&ck, folder));
    assert_int_equal(ck.n_tensors, 2);
    assert_string_equal(file_base(checkpoint_path(&ck, checkpoint_tensor(&ck, "a"))), "x.safetensors");
    checkpoint_close(&ck);
    put_safetensors(support_path("indexed/y.safetensors"), one, 1);
    put_index(folder, "{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y.safetensors\"}}");
    assert_error(checkpoint_open(&ck, folder), ERR_FORMAT, "'a' is in another file as well");
}

static void test_find(void **state)
{
    (void)state;
    char *folder;
    const char *hub = support_path("hub"), *snapshot = support_path("hub/models--o--n/snapshots/abc");
    assert_ok(checkpoint_find(&folder, support_folder()));
    assert_string_equal(folder, support_folder());
    free(folder);
    support_write(support_path("plain"), "", 0);
    assert_error(checkpoint_find(&folder, support_path("plain")), ERR_IO, "is not a folder");
    assert_int_equal(setenv("HF_HUB_CACHE", hub, 1), 0);
    assert_error(checkpoint_find(&folder, "o/n"), ERR_IO, "no such model in the Hugging Face cache");
    assert_ok(file_make_folder(hub));
    assert_ok(file_make_folder(support_path("hub/models--o--n")));
    assert_ok(file_make_folder(support_path("hub/models--o--n/refs")));
    support_write(support_path("hub/models--o--n/refs/main"), "abc\n", 4);
    assert_error(checkpoint_find(&folder, "o/n"), ERR_IO, "the snapshot of o/n is missing");
    assert_ok(file_make_folder(support_path("hub/models--o--n/snapshots")));
    assert_ok(file_make_folder(snapshot));
    assert_ok(checkpoint_find(&folder, "o/n"));
    assert_string_equal(folder, snapshot);
    free(folder);
    support_write(support_path("hub/models--o--n/refs/main"), "../x", 4);
    assert_error(checkpoint_find(&folder, "o/n"), ERR_IO, "no such model");
    assert_int_equal(unsetenv("HF_HUB_CACHE"), 0);
}

/* --- the record ----------------------------------------------------------------------------------------------- */

#define HASH_A "\"99aa06d3014798d86001c324468d497f\""
#define RECORD(schema, tensors)                                                                              \
    "{\"schema\": \"" schema "\", \"version\": \"0.1\", \"recipe\": {\"method\": \"rtn\"}, \"linears\": "    \
    "{\"l\": {\"source\": " HASH_A "}}, \"tensors\": " tensors ", \"files\": {\"config.json\": " HASH_A "}}"

static void test_record(void **state)
{
    (void)state;
    struct record r;
    struct hash128 h;
    bool found;
    const char *path = support_path(RECORD_NAME);
    static const char good[] = RECORD("gemcut.cut/1", "{\"l.weight_packed\": " HASH_A "}");
    assert_ok(record_open(&r, support_folder(), &found));
    assert_false(found);
    record_close(&r);
    support_write(path, good, strlen(good));
    assert_ok(record_open(&r, support_folder(), &found));
    assert_true(found && r.tensors.n == 1 && r.sources.n == 1 && r.files.n == 1);
    assert_string_equal(r.version, "0.1");
    assert_true(hash_equal(*record_find(&r.tensors, "l.weight_packed"), hash_bytes("", 0)));
    assert_true(hash_equal(*record_find(&r.sources, "l"), hash_bytes("", 0)));
    assert_null(record_find(&r.files, "l"));
    record_close(&r);
    static const struct {
        const char *text, *message;
    } bad[] = {
        {RECORD("gemcut.cut/2", "{}"), "is 'gemcut.cut/2', expected 'gemcut.cut/1'"},
        {RECORD("gemcut.cut/1", "[]"), "is not an object"},
        {RECORD("gemcut.cut/1", "{\"a\": \"99\"}"), "'tensors.a' is not a hash of 32 hexadecimal digits"},
        {RECORD("gemcut.cut/1", "{\"a\": " HASH_A ", \"a\": " HASH_A "}"), "appears twice"},
        {"{}", "has no member 'schema'"},
        {"[", "not JSON"},
    };
    for (size_t i = 0; i < N_OF(bad); i++) {
        support_write(path, bad[i].text, strlen(bad[i].text));
        assert_error(record_open(&r, support_folder(), &found), ERR_FORMAT, bad[i].message);
        assert_false(found);
    }
    support_write(support_path("empty-file"), "", 0);
    assert_ok(record_hash_file(support_path("empty-file"), &h));
    assert_true(hash_equal(h, hash_bytes("", 0)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_headers), cmocka_unit_test(test_good_header), cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_round_trip),  cmocka_unit_test(test_hashes),      cmocka_unit_test(test_index),
        cmocka_unit_test(test_find),        cmocka_unit_test(test_record),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

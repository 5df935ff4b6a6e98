/* Documents from files, and the matrix of ids made of them. Expected ids are those that Hugging Face tokenizers gives
 * for data/model/gemma3-tiny, conversations those of Gemma 3's jinja template, orders those of a PCG32 in Python. */
#include "calib/builtin.h"
#include "calib/dataset.h"
#include "calib/text.h"
#include "tests/unit/support.h"

#include <sys/stat.h>
#include <zstd.h>

static int parse(struct documents *d, const char *text, const char *name)
{
    return documents_parse(d, text, strlen(text), name, CHAT_GEMMA3, DOCUMENTS_MAX_BYTES);
}

static void check_document(const struct documents *d, size_t i, const char *text, size_t line, bool is_chat)
{
    assert_true(i < d->n);
    assert_string_equal(d->list[i].text, text);
    assert_int_equal(d->list[i].len, strlen(text));
    assert_int_equal(d->list[i].line, line);
    assert_int_equal(d->list[i].is_chat, is_chat);
}

/* data as `frames` zstd frames of equal parts, fresh memory. */
static char *compress(const char *data, size_t len, size_t frames, size_t *n)
{
    const size_t room = ZSTD_compressBound(len) + frames * 64;
    char *out = malloc(room);
    assert_non_null(out);
    *n = 0;
    for (size_t i = 0; i < frames; i++) {
        const size_t from = len * i / frames, to = len * (i + 1) / frames;
        const size_t got = ZSTD_compress(out + *n, room - *n, data + from, to - from, 3);
        assert_false(ZSTD_isError(got));
        *n += got;
    }
    return out;
}

/* --- files ---------------------------------------------------------------------------------------------------- */

static void test_txt(void **state)
{
    (void)state;
    struct documents d;
    assert_ok(parse(&d, "one\n\n{\"text\": 1}\r\n", "x.txt"));
    assert_int_equal(d.n, 1);
    check_document(&d, 0, "one\n\n{\"text\": 1}\r\n", 1, false);
    documents_free(&d);
    assert_ok(parse(&d, "", "x.txt"));
    check_document(&d, 0, "", 1, false);
    documents_free(&d);
    assert_ok(parse(&d, "\xef\xbb\xbfmarked", "x.txt"));
    check_document(&d, 0, "marked", 1, false);
    documents_free(&d);
    assert_ok(documents_parse(&d, "a\0b", 3, "x.txt", CHAT_GEMMA3, DOCUMENTS_MAX_BYTES));
    assert_int_equal(d.list[0].len, 3);
    assert_memory_equal(d.list[0].text, "a\0b", 4);
    documents_free(&d);
    assert_error(parse(&d, "fine\nna\xefve\n", "x.txt"), ERR_FORMAT,
                 "x.txt: line 2: byte 0xef at offset 2 of the line is not UTF-8");
    assert_int_equal(d.n, 0);
    assert_null(d.list);
}

static void test_names(void **state)
{
    (void)state;
    struct documents d;
    static const char *const bad[] = {"x", "x.json", "x.zst", "x.txt.gz", "xjsonl", "x.md"};
    for (size_t i = 0; i < N_OF(bad); i++)
        assert_error(parse(&d, "", bad[i]), ERR_USAGE, "ends in .txt, .jsonl, .txt.zst or .jsonl.zst");
    const char *path = support_path("c.jsonl");
    support_write(path, "{\"text\":\"a\"}\n", 13);
    assert_ok(documents_read(&d, path, CHAT_GEMMA3));
    check_document(&d, 0, "a", 1, false);
    documents_free(&d);
    assert_error(documents_read(&d, support_path("none.txt"), CHAT_GEMMA3), ERR_IO, "No such");
    path = support_path("folder.txt");
    assert_int_equal(mkdir(path, 0777), 0);
    assert_error(documents_read(&d, path, CHAT_GEMMA3), ERR_IO, "is a folder");
    path = support_path("empty.jsonl");
    support_write(path, "", 0);
    assert_ok(documents_read(&d, path, CHAT_GEMMA3));
    assert_int_equal(d.n, 0);
    documents_free(&d);
}

/* The mixture that ships with gemcut: many documents of moderate size, conversations among them, in every stretch of
 * the file, and nothing of the text that models are judged on. */
static void test_builtin(void **state)
{
    (void)state;
    struct documents d;
    assert_ok(documents_read(&d, "builtin", CHAT_GEMMA3));
    assert_true(d.n >= 1000);
    size_t bytes = 0, chats = 0, foreign = 0, len;
    for (size_t i = 0; i < d.n; i++) {
        assert_in_range(d.list[i].len, 100, 20000);
        bytes += d.list[i].len;
        chats += d.list[i].is_chat;
        foreign += (uint8_t)d.list[i].text[0] >= 0xc3; /* begins with a letter beyond ASCII */
        if ((i + 1) % 200 == 0) {
            assert_in_range(chats, 5, 40);
            assert_in_range(foreign, 20, 100);
            chats = foreign = 0;
        }
    }
    assert_in_range(bytes, 4500000, 6000000);
    const char *prose = builtin_prose(&len);
    for (size_t at = 0; at + 80 <= len; at += 2000)
        for (size_t i = 0; i < d.n; i++)
            assert_null(memmem(d.list[i].text, d.list[i].len, prose + at, 80));
    documents_free(&d);
}

static void test_jsonl(void **state)
{
    (void)state;
    struct documents d;
    assert_ok(parse(&d,
                    "\xef\xbb\xbf{\"text\": \"a\\nb \\ud83d\\ude00\", \"url\": null}\r\n"
                    "\n"
                    " \t\r\n"
                    "{\"text\": \"\"}\n"
                    "{\"messages\": null, \"text\": \"\\\\u0000\"}\n"
                    "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}], \"text\": null}\n"
                    "{\"messages\": 3, \"text\": \"text comes first\"}",
                    "x.jsonl"));
    assert_int_equal(d.n, 5);
    check_document(&d, 0, "a\nb 😀", 1, false);
    check_document(&d, 1, "", 4, false);
    check_document(&d, 2, "\\u0000", 5, false);
    check_document(&d, 3, "<bos><start_of_turn>user\nHi<end_of_turn>\n", 6, true);
    check_document(&d, 4, "text comes first", 7, false);
    documents_free(&d);
}

struct bad_line {
    const char *line;
    int rc;
    const char *message;
};

#define MESSAGES(list) "{\"messages\": " list "}"

static const struct bad_line bad_lines[] = {
    {"{\"text\": \"a\"", ERR_FORMAT, "not JSON: unexpected text at byte"},
    {"{\"text\": \"a\"} x", ERR_FORMAT, "not JSON: unexpected text at byte 14 of 15"},
    {"{\"text\": \"\\ud800\"}", ERR_FORMAT, "not JSON"},
    {"{\"text\": \"\xc3\"}", ERR_FORMAT, "byte 0xc3 at offset 10 of the line is not UTF-8"},
    {"{\"text\": \"\x01\"}", ERR_FORMAT, "byte 0x01 at offset 10"},
    {"{\"text\": \"a\\u0000\"}", ERR_UNSUPPORTED, "a string holds \\u0000"},
    {"{\"text\": \"\\\\\\u0000\"}", ERR_UNSUPPORTED, "a string holds \\u0000"},
    {"[\"a\"]", ERR_FORMAT, "'the top level' is not an object"},
    {"{\"content\": \"a\"}", ERR_FORMAT, "'the top level' has neither 'text' nor 'messages'"},
    {"{\"text\": null}", ERR_FORMAT, "has neither 'text' nor 'messages'"},
    {"{\"text\": [\"a\"]}", ERR_FORMAT, "'text' is not a string"},
    {MESSAGES("\"a\""), ERR_FORMAT, "'messages' is not an array"},
    {MESSAGES("[]"), ERR_FORMAT, "a conversation without messages"},
    {MESSAGES("[\"a\"]"), ERR_FORMAT, "'messages[0]' is not an object"},
    {MESSAGES("[{\"content\": \"a\"}]"), ERR_FORMAT, "'messages[0]' has no member 'role'"},
    {MESSAGES("[{\"role\": \"user\"}]"), ERR_FORMAT, "'messages[0]' has no member 'content'"},
    {MESSAGES("[{\"role\": \"user\", \"content\": 1}]"), ERR_FORMAT,
     "'messages[0].content' is neither a string nor an array of parts"},
    {MESSAGES("[{\"role\": \"assistant\", \"content\": \"a\"}]"), ERR_FORMAT, "roles must alternate"},
    {MESSAGES("[{\"role\": \"user\", \"content\": [{\"type\": \"image\"}]}]"), ERR_FORMAT,
     "'messages[0].content[0]' is of the type \"image\", expected \"text\""},
    {MESSAGES("[{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]"), ERR_FORMAT,
     "'messages[0].content[0]' has no member 'text'"},
    {MESSAGES("[{\"role\": \"system\", \"content\": []}]"), ERR_FORMAT,
     "'messages[0].content' has 0 parts, expected 1 in a system message"},
};

static void test_bad_lines(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(bad_lines); i++) {
        const struct bad_line *b = &bad_lines[i];
        struct text file = {0};
        struct documents d;
        text_printf(&file, "{\"text\": \"fine\"}\n\n%s\n{\"text\": \"fine\"}\n", b->line);
        assert_error(parse(&d, file.data, "x.jsonl"), b->rc, b->message);
        if (strncmp(err_message(), "x.jsonl: line 3: ", 17))
            fail_msg("%s: %s", b->line, err_message());
        assert_int_equal(d.n, 0);
        text_free(&file);
    }
}

static void test_chat(void **state)
{
    (void)state;
    struct documents d;
    static const char file[] =
        "{\"messages\":[{\"role\":\"user\",\"content\":\" Hi \\n\"},{\"role\":\"assistant\",\"content\":\"Yes.\"}]}\n"
        "{\"messages\":[{\"role\":\"system\",\"content\":\" Be brief. \"},{\"role\":\"user\",\"content\":["
        "{\"type\":\"text\",\"text\":\" Hi \"},{\"type\":\"text\",\"text\":\"\\u00a0there\\n\"}]},"
        "{\"role\":\"assistant\",\"content\":\"Yes.\\n\"}]}\n"
        "{\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\" Be \"}]},"
        "{\"role\":\"user\",\"content\":[]}]}\n";
    assert_ok(parse(&d, file, "x.jsonl"));
    check_document(&d, 0,
                   "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n", 1,
                   true);
    check_document(&d, 1,
                   "<bos><start_of_turn>user\n Be brief. \n\nHithere<end_of_turn>\n<start_of_turn>model\nYes."
                   "<end_of_turn>\n",
                   2, true);
    check_document(&d, 2, "<bos><start_of_turn>user\n Be \n\n<end_of_turn>\n", 3, true);
    documents_free(&d);
    assert_error(documents_parse(&d, file, strlen(file), "x.jsonl", CHAT_GEMMA2, DOCUMENTS_MAX_BYTES),
                 ERR_FORMAT, "x.jsonl: line 2: message 1 has the role \"system\"");
}

/* --- zstd ----------------------------------------------------------------------------------------------------- */

/* Lines of many lengths, together longer than a buffer of libzstd. */
static struct text many_lines(size_t n)
{
    struct text t = {0};
    for (size_t i = 0; i < n; i++) {
        text_printf(&t, "{\"text\": \"%zu:", i);
        for (size_t k = 0; k < i * 37 % 900; k++)
            text_printf(&t, "%c", (int)('a' + (i + k * k) % 26));
        text_add(&t, "é\"}\n");
    }
    assert_ok(text_finish(&t));
    return t;
}

static void test_zst(void **state)
{
    (void)state;
    struct text plain = many_lines(2000);
    struct documents expected, d;
    assert_ok(parse(&expected, plain.data, "x.jsonl"));
    assert_int_equal(expected.n, 2000);
    static const size_t frames[] = {1, 3, 100};
    for (size_t f = 0; f < N_OF(frames); f++) {
        size_t n;
        char *packed = compress(plain.data, plain.len, frames[f], &n);
        const char *path = support_path("%zu.jsonl.zst", frames[f]);
        support_write(path, packed, n);
        assert_ok(documents_read(&d, path, CHAT_GEMMA3));
        assert_int_equal(d.n, expected.n);
        for (size_t i = 0; i < d.n; i++)
            check_document(&d, i, expected.list[i].text, i + 1, false);
        documents_free(&d);
        assert_ok(documents_parse(&d, packed, n, "x.txt.zst", CHAT_GEMMA3, plain.len));
        assert_int_equal(d.n, 1);
        check_document(&d, 0, plain.data, 1, false);
        documents_free(&d);
        assert_error(documents_parse(&d, packed, n, "x.txt.zst", CHAT_GEMMA3, plain.len - 1), ERR_FORMAT,
                     "x.txt.zst: has more than");
        free(packed);
    }
    documents_free(&expected);
    text_free(&plain);
}

/* One frame whose last block arrives when the buffer is nearly full, so that its end comes out in another round. */
static void test_zst_blocks(void **state)
{
    (void)state;
    enum { FIRST = 100000, SECOND = 131072, TOTAL = FIRST + SECOND };
    char *plain = malloc(TOTAL + 1), *packed = malloc(TOTAL);
    ZSTD_CCtx *z = ZSTD_createCCtx();
    assert_true(plain && packed && z);
    for (size_t i = 0; i < TOTAL; i++)
        plain[i] = (char)('a' + i * i % 101 % 26);
    plain[TOTAL] = '\0';
    ZSTD_outBuffer out = {packed, TOTAL, 0};
    ZSTD_inBuffer first = {plain, FIRST, 0}, second = {plain + FIRST, SECOND, 0};
    assert_int_equal(ZSTD_compressStream2(z, &out, &first, ZSTD_e_flush), 0);
    assert_int_equal(ZSTD_compressStream2(z, &out, &second, ZSTD_e_end), 0);
    struct documents d;
    assert_ok(documents_parse(&d, packed, out.pos, "x.txt.zst", CHAT_GEMMA3, DOCUMENTS_MAX_BYTES));
    check_document(&d, 0, plain, 1, false);
    documents_free(&d);
    ZSTD_freeCCtx(z);
    free(packed);
    free(plain);
}

static void test_damaged_zst(void **state)
{
    (void)state;
    struct text plain = many_lines(400);
    size_t n;
    char *packed = compress(plain.data, plain.len, 1, &n);
    struct documents d;
    for (size_t len = 0; len < n; len += len < 40 || n - len < 40 ? 1 : 97) {
        assert_error(documents_parse(&d, packed, len, "x.txt.zst", CHAT_GEMMA3, DOCUMENTS_MAX_BYTES),
                     ERR_FORMAT, "x.txt.zst: is cut short");
        assert_int_equal(d.n, 0);
    }
    assert_error(parse(&d, "{\"text\": \"not compressed\"}\n", "x.jsonl.zst"), ERR_FORMAT,
                 "not zstd, or damaged");
    char *longer = malloc(n + 4);
    assert_non_null(longer);
    memcpy(longer, packed, n);
    memcpy(longer + n, "more", 4);
    assert_error(documents_parse(&d, longer, n + 4, "x.txt.zst", CHAT_GEMMA3, DOCUMENTS_MAX_BYTES),
                 ERR_FORMAT, "not zstd, or damaged");
    free(longer);
    free(packed);
    /* a frame that asks for a window of 256 MiB */
    static const uint8_t wide[] = {0x28, 0xb5, 0x2f, 0xfd, 0x00, 18 << 3, 0x01, 0x00, 0x00};
    assert_error(documents_parse(&d, wide, sizeof wide, "x.txt.zst", CHAT_GEMMA3, DOCUMENTS_MAX_BYTES),
                 ERR_FORMAT, "too much memory");
    text_free(&plain);
}

/* --- datasets ------------------------------------------------------------------------------------------------- */

enum { VOCABULARY = 2048 };

static struct tokenizer *open_tiny(void)
{
    struct tokenizer *t;
    assert_ok(tokenizer_open(&t, GEMCUT_SOURCE_DIR "/data/model/gemma3-tiny/tokenizer.json"));
    return t;
}

static int make(struct dataset *out, const char *jsonl, const struct dataset_options *o, int64_t n_tokens_max)
{
    struct tokenizer *t = open_tiny();
    struct documents d;
    assert_ok(parse(&d, jsonl, "x.jsonl"));
    const int rc = dataset_make(out, t, &d, o, n_tokens_max, "x.jsonl");
    if (rc < 0) {
        assert_null(out->ids);
        assert_null(out->used);
    }
    documents_free(&d);
    tokenizer_close(t);
    return rc;
}

/* One of a single token, an empty one, and one that is longer than two samples. */
static const char four[] =
    "{\"text\": \"a\"}\n{\"text\": \"Call me Ishmael.\"}\n{\"text\": \"\"}\n{\"text\": \"<bos>b\"}\n";
static const int32_t four_ids[] = {2, 328, 2, 299, 609, 664, 517, 986, 340, 328, 641, 278, 2, 329};

static void test_packing(void **state)
{
    (void)state;
    static const struct {
        int64_t samples, length;
        size_t n_used;
    } cases[] = {{7, 2, 3}, {1, 14, 3}, {3, 4, 2}, {14, 1, 3}, {1, 13, 3}, {1, 3, 2}, {1, 2, 1}, {1, 1, 1}};
    static const size_t documents[] = {0, 1, 3}, tokens[] = {2, 10, 2};
    for (size_t i = 0; i < N_OF(cases); i++) {
        const struct dataset_options o = {.samples = cases[i].samples, .length = cases[i].length, .seed = i};
        struct dataset d;
        assert_ok(make(&d, four, &o, VOCABULARY));
        assert_int_equal(d.samples, o.samples);
        assert_int_equal(d.length, o.length);
        assert_memory_equal(d.ids, four_ids, (size_t)(o.samples * o.length) * sizeof *d.ids);
        assert_int_equal(d.n_used, cases[i].n_used);
        for (size_t u = 0; u < d.n_used; u++) {
            assert_int_equal(d.used[u].document, documents[u]);
            assert_int_equal(d.used[u].n_tokens, tokens[u]);
        }
        dataset_free(&d);
    }
}

static void test_too_little(void **state)
{
    (void)state;
    struct dataset d;
    struct dataset_options o = {.samples = 5, .length = 3};
    assert_error(make(&d, four, &o, VOCABULARY), ERR_USAGE,
                 "x.jsonl: has 14 tokens in 3 documents, but 5 samples of 3 need 15");
    o.shuffle = true;
    assert_error(make(&d, four, &o, VOCABULARY), ERR_USAGE, "has 14 tokens in 3 documents");
    assert_error(make(&d, "{\"text\": \"a\"}\n", &o, VOCABULARY), ERR_USAGE, "has 2 tokens in 1 document,");
    assert_error(make(&d, "\n", &o, VOCABULARY), ERR_USAGE, "has 0 tokens in 0 documents");
    o = (struct dataset_options){.samples = INT64_MAX, .length = INT64_MAX};
    assert_error(make(&d, four, &o, VOCABULARY), ERR_USAGE, "more than memory can hold");
    o = (struct dataset_options){.samples = 1, .length = (int64_t)1 << 40};
    assert_error(make(&d, four, &o, VOCABULARY), ERR_USAGE, "has 14 tokens");
}

static void test_vocabulary(void **state)
{
    (void)state;
    const struct dataset_options o = {.samples = 1, .length = 12};
    struct dataset d;
    assert_ok(make(&d, four, &o, 987));
    dataset_free(&d);
    assert_error(make(&d, four, &o, 986), ERR_FORMAT,
                 "x.jsonl: line 2: has the token 986, the model's vocabulary ends at 986");
    /* what is not needed is not looked at */
    const struct dataset_options less = {.samples = 1, .length = 2};
    assert_ok(make(&d, four, &less, 986));
    dataset_free(&d);
}

static void test_chat_ids(void **state)
{
    (void)state;
    static const int32_t expected[] = {2, 5,   614, 473, 264, 304, 336, 6, 264,
                                       5, 340, 564, 641, 264, 321, 894, 6, 264};
    static const char file[] =
        MESSAGES("[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"assistant\",\"content\":\"Yes.\"}]");
    const struct dataset_options o = {.samples = 1, .length = N_OF(expected)};
    struct dataset d;
    assert_ok(make(&d, file, &o, VOCABULARY));
    assert_memory_equal(d.ids, expected, sizeof expected);
    dataset_free(&d);
}

/* Letters a … h are the ids 328 … 335, so a document of one names itself. */
static void test_shuffle(void **state)
{
    (void)state;
    static const char eight[] = "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"text\":\"c\"}\n{\"text\":\"d\"}\n"
                                "{\"text\":\"e\"}\n{\"text\":\"f\"}\n{\"text\":\"g\"}\n{\"text\":\"h\"}\n";
    static const struct {
        uint64_t seed;
        size_t order[8];
    } cases[] = {
        {0, {7, 4, 5, 6, 0, 3, 2, 1}}, {1, {2, 3, 0, 5, 1, 6, 4, 7}}, {INT64_MAX, {1, 4, 6, 7, 3, 2, 5, 0}}};
    for (size_t i = 0; i < N_OF(cases); i++)
        for (int64_t samples = 1; samples <= 8; samples++) {
            const struct dataset_options o = {
                .samples = samples, .length = 2, .seed = cases[i].seed, .shuffle = true};
            struct dataset d;
            assert_ok(make(&d, eight, &o, VOCABULARY));
            assert_int_equal(d.n_used, samples);
            for (size_t k = 0; k < d.n_used; k++) {
                assert_int_equal(d.used[k].document, cases[i].order[k]);
                assert_int_equal(d.ids[2 * k], 2);
                assert_int_equal(d.ids[2 * k + 1], 328 + (int32_t)cases[i].order[k]);
            }
            dataset_free(&d);
        }
}

static void test_no_chat_format(void **state)
{
    (void)state;
    struct text file = {0};
    text_add(
        &file,
        "{\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"▁\"}, "
        "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": "
        "\"▁\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]}, \"added_tokens\": "
        "[{\"id\": 0, \"content\": \"<bos>\", \"special\": true}], \"model\": {\"type\": \"BPE\", "
        "\"byte_fallback\": true, \"merges\": [], \"vocab\": {\"<bos>\": 0, \"▁\": 257");
    for (int byte = 0; byte < 256; byte++)
        text_printf(&file, ", \"<0x%02X>\": %d", byte, byte + 1);
    text_add(&file, "}}}");
    struct tokenizer *t = NULL;
    struct documents d;
    struct dataset set;
    const struct dataset_options o = {.samples = 1, .length = 2};
    assert_ok(tokenizer_parse(&t, file.data, file.len, "small.json"));
    assert_ok(parse(&d, "\n" MESSAGES("[{\"role\": \"user\", \"content\": \"Hi\"}]"), "x.jsonl"));
    assert_error(dataset_make(&set, t, &d, &o, 258, "x.jsonl"), ERR_UNSUPPORTED,
                 "x.jsonl: line 2: is a conversation, but");
    documents_free(&d);
    tokenizer_close(t);
    text_free(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_txt),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_builtin),
        cmocka_unit_test(test_jsonl),
        cmocka_unit_test(test_bad_lines),
        cmocka_unit_test(test_chat),
        cmocka_unit_test(test_zst),
        cmocka_unit_test(test_zst_blocks),
        cmocka_unit_test(test_damaged_zst),
        cmocka_unit_test(test_packing),
        cmocka_unit_test(test_too_little),
        cmocka_unit_test(test_vocabulary),
        cmocka_unit_test(test_chat_ids),
        cmocka_unit_test(test_shuffle),
        cmocka_unit_test(test_no_chat_format),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

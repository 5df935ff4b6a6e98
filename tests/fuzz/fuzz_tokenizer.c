/* tokenizer.json from anywhere, and any text through a tokenizer. The first byte picks:
 *   0  the rest up to a NUL is a tokenizer.json, what follows is text for it
 *   1  a good file with a patch: offset (2 bytes), bytes to leave out (1), bytes to put in up to a NUL; then text
 *   2  the rest is text for the good file, and ids to decode
 * A text that is encoded must come back when it is valid UTF-8 without U+2581. */
#include "base/err.h"
#include "formats/tokenizer.h"
#include "formats/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char file_begin[] =
    "{\"added_tokens\": [{\"id\": 0, \"content\": \"<eos>\", \"special\": true}, {\"id\": 1, \"content\": \"<bos>\", "
    "\"special\": true}, {\"id\": 600, \"content\": \"\\n\\n\"}, {\"id\": 601, \"content\": \"▁▁\"}, {\"id\": 602, "
    "\"content\": \"<b\"}], \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": "
    "\"▁\"}, \"pre_tokenizer\": null, \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", "
    "\"pattern\": {\"String\": \"▁\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]}, "
    "\"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"merges\": [[\"a\", \"b\"], [\"▁\", \"a\"], \"b a\", [\"a\", "
    "\"a\"], [\"▁\", \"▁\"], [\"aa\", \"aa\"], [\"ab\", \"▁a\"], [\"é\", \"é\"], [\"é\", \"a\"], [\"éé\", \"▁\"]], "
    "\"vocab\": {\"<eos>\": 0, \"<bos>\": 1, \"▁\": 2, \"a\": 3, \"b\": 4, \"é\": 5, \"ab\": 6, \"▁a\": 7, \"ba\": 8, "
    "\"aa\": 9, \"▁▁\": 601, \"aaaa\": 11, \"ab▁a\": 12, \"éé\": 13, \"éa\": 14, \"éé▁\": 15, \"<\": 16";

/* The good file; NUL-terminated, kept for all runs. */
static const struct text *good_file(void)
{
    static struct text file;
    if (!file.len) {
        text_add(&file, file_begin);
        for (int byte = 0; byte < 256; byte++)
            text_printf(&file, ", \"<0x%02X>\": %d", byte, 100 + byte);
        text_add(&file, "}}}");
        CHECK(text_finish(&file) == 0);
    }
    return &file;
}

/* "<0x": a file may list a byte token among its added ones, and then that text becomes the byte. */
static bool comes_back(const uint8_t *s, size_t n)
{
    return utf8_valid(s, n) && !memmem(s, n, "\xe2\x96\x81", 3) && !memmem(s, n, "<0x", 3);
}

/* Encodes and decodes; the round trip holds for every file that opens. */
static void try_text(const struct tokenizer *t, const uint8_t *s, size_t n)
{
    struct token_list ids = {0}, with_bos = {0};
    struct text back = {0};
    CHECK(tokenizer_encode(t, (const char *)s, n, false, &ids) == 0);
    CHECK(tokenizer_encode(t, (const char *)s, n, true, &with_bos) == 0);
    CHECK(with_bos.n && with_bos.ids[0] == tokenizer_bos(t));
    CHECK(with_bos.n == ids.n + 1 || (with_bos.n == ids.n && ids.ids[0] == tokenizer_bos(t)));
    CHECK(!ids.n || !memcmp(with_bos.ids + with_bos.n - ids.n, ids.ids, ids.n * sizeof *ids.ids));
    for (size_t i = 0; i < ids.n; i++)
        CHECK(tokenizer_token_name(t, ids.ids[i]));
    CHECK(tokenizer_decode(t, ids.ids, ids.n, true, &back) == 0);
    text_free(&back);
    CHECK(tokenizer_decode(t, ids.ids, ids.n, false, &back) == 0);
    CHECK(utf8_valid((const uint8_t *)back.data, back.len));
    if (comes_back(s, n))
        CHECK(back.len == n && (!n || !memcmp(back.data, s, n)));
    token_list_free(&ids);
    token_list_free(&with_bos);
    text_free(&back);
}

static void try_ids(const struct tokenizer *t, const uint8_t *s, size_t n)
{
    struct token_stream stream;
    struct text out = {0};
    token_stream_init(&stream, t, n % 2);
    for (size_t i = 0; i + 1 < n; i += 2) {
        const size_t before = out.len;
        CHECK(token_stream_add(&stream, (s[i] | s[i + 1] << 8) % 700 - 20, &out) == 0);
        CHECK(out.len == before || utf8_valid((const uint8_t *)out.data + before, out.len - before));
    }
    CHECK(token_stream_finish(&stream, &out) == 0);
    token_stream_free(&stream);
    text_free(&out);
}

static void try_file(const char *json, size_t len, const uint8_t *text, size_t n)
{
    static const char *const always[] = {"", "ab  aaaaa\n\n\nab <bos><b", "\xff\xc3\xa9\xc3 \xe2\x96\x81"};
    struct tokenizer *t;
    const int rc = tokenizer_parse(&t, json, len, "fuzz");
    CHECK((rc == 0) == (t != NULL));
    if (rc < 0) {
        CHECK(*err_message());
        return;
    }
    try_text(t, text, n);
    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        try_text(t, (const uint8_t *)always[i], strlen(always[i]));
    tokenizer_close(t);
}

static void try_patch(const uint8_t *data, size_t size)
{
    const struct text *good = good_file();
    if (size < 3)
        return;
    const size_t at = (data[0] | (size_t)data[1] << 8) % good->len;
    const size_t gone = data[2] < good->len - at ? data[2] : good->len - at;
    const uint8_t *put = data + 3, *end = memchr(put, '\0', size - 3);
    const size_t n_put = end ? (size_t)(end - put) : size - 3;
    struct text file = {0};
    text_append(&file, good->data, at);
    text_append(&file, (const char *)put, n_put);
    text_append(&file, good->data + at + gone, good->len - at - gone);
    CHECK(text_finish(&file) == 0);
    try_file(file.data, file.len, put + n_put, size - 3 - n_put);
    text_free(&file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct tokenizer *good;
    if (!good)
        CHECK(tokenizer_parse(&good, good_file()->data, good_file()->len, "good file") == 0);
    if (!size)
        return 0;
    const uint8_t *rest = data + 1;
    size--;
    switch (data[0] % 3) {
    case 0: {
        const uint8_t *end = memchr(rest, '\0', size);
        const size_t len = end ? (size_t)(end - rest) : size;
        try_file((const char *)rest, len, rest + len, size - len);
        break;
    }
    case 1:
        try_patch(rest, size);
        break;
    default:
        try_text(good, rest, size);
        try_ids(good, rest, size);
    }
    return 0;
}

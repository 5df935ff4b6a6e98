/* The tokenizer on small vocabularies worked out by hand, against a naive merge loop on random ones, and on the
 * tiny model's file with the ids that Hugging Face tokenizers gives. */
#include "base/err.h"
#include "base/json.h"
#include "formats/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
    FIRST_BYTE =
        5, /* ids of the small files: 0 … 4 control tokens, then 256 bytes, "▁" and the pieces given */
    META = FIRST_BYTE + 256,
    FIRST_PIECE = META + 1,
};

struct small_file {
    const char *const *pieces;      /* up to NULL; ids from FIRST_PIECE */
    const char *const (*merges)[2]; /* up to {NULL} */
    const char *const *added;       /* beside the control tokens, not special; ids after the pieces */
    bool merges_as_strings;
};

static const char *const control[] = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"};

static void put_added(struct text *t, int id, const char *content, bool special)
{
    json_begin_object(t);
    json_kv_int(t, "id", id);
    json_kv_string(t, "content", content);
    json_kv_bool(t, "normalized", false);
    json_kv_bool(t, "special", special);
    json_end_object(t);
}

static int put_vocab(struct text *t, const struct small_file *f)
{
    int id = 0;
    json_put_key(t, "vocab");
    json_begin_object(t);
    for (; id < FIRST_BYTE; id++)
        json_kv_int(t, control[id], id);
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", byte);
        json_kv_int(t, name, id++);
    }
    json_kv_int(t, "▁", id++);
    for (const char *const *p = f->pieces; p && *p; p++)
        json_kv_int(t, *p, id++);
    json_end_object(t);
    return id;
}

static void put_merges(struct text *t, const struct small_file *f)
{
    json_put_key(t, "merges");
    json_begin_array(t);
    for (const char *const(*m)[2] = f->merges; m && (*m)[0]; m++) {
        if (f->merges_as_strings) {
            char line[64];
            snprintf(line, sizeof line, "%s %s", (*m)[0], (*m)[1]);
            json_put_string(t, line);
            continue;
        }
        json_begin_array(t);
        json_put_string(t, (*m)[0]);
        json_put_string(t, (*m)[1]);
        json_end_array(t);
    }
    json_end_array(t);
}

static char *make_json(const struct small_file *f)
{
    struct text t = {0};
    text_add(&t, "{\"model\": ");
    json_begin_object(&t);
    json_kv_string(&t, "type", "BPE");
    json_kv_bool(&t, "byte_fallback", true);
    int id = put_vocab(&t, f);
    put_merges(&t, f);
    json_end_object(&t);
    text_add(&t, ", \"added_tokens\": ");
    json_begin_array(&t);
    for (int i = 0; i < FIRST_BYTE; i++)
        put_added(&t, i, control[i], true);
    for (const char *const *p = f->added; p && *p; p++)
        put_added(&t, id++, *p, false);
    json_end_array(&t);
    text_add(
        &t,
        ", \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"▁\"}"
        ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \" \"}, \"invert\": false}"
        ", \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": "
        "{\"String\": \"▁\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]}}");
    assert_int_equal(text_finish(&t), 0);
    return t.data;
}

static struct tokenizer *open_small(const struct small_file *f)
{
    char *json = make_json(f);
    struct tokenizer *t;
    if (tokenizer_parse(&t, json, strlen(json), "small.json") < 0)
        fail_msg("%s", err_message());
    free(json);
    return t;
}

static void check_ids(const struct tokenizer *t, const char *text, size_t len, bool bos, const int32_t *ids,
                      size_t n)
{
    struct token_list list = {0};
    assert_int_equal(tokenizer_encode(t, text, len, bos, &list), 0);
    assert_int_equal(list.n, n);
    if (n)
        assert_memory_equal(list.ids, ids, n * sizeof *ids);
    token_list_free(&list);
}

#define IDS(...)                    (const int32_t[]){__VA_ARGS__}, sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)
#define CHECK_IDS(t, text, ...)     check_ids(t, text, sizeof(text) - 1, false, IDS(__VA_ARGS__))
#define CHECK_BOS_IDS(t, text, ...) check_ids(t, text, sizeof(text) - 1, true, IDS(__VA_ARGS__))

static void check_text(const struct tokenizer *t, bool skip_special, const char *expected, const int32_t *ids,
                       size_t n)
{
    struct text whole = {0}, parts = {0};
    assert_int_equal(tokenizer_decode(t, ids, n, skip_special, &whole), 0);
    assert_string_equal(whole.data, expected);
    struct token_stream s;
    token_stream_init(&s, t, skip_special);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(token_stream_add(&s, ids[i], &parts), 0);
    assert_int_equal(token_stream_finish(&s, &parts), 0);
    assert_string_equal(parts.data, expected);
    token_stream_free(&s);
    text_free(&whole);
    text_free(&parts);
}

enum { A = FIRST_PIECE, B, C, D, AA, AB, BC, CD, META_A, ABCD };

static const char *const letters[] = {"a", "b", "c", "d", "aa", "ab", "bc", "cd", "▁a", "abcd", NULL};
static const char *const letter_merges[][2] = {{"b", "c"}, {"▁", "a"},   {"a", "a"}, {"a", "b"},
                                               {"c", "d"}, {"ab", "cd"}, {NULL}};

static void test_merges(void **state)
{
    (void)state;
    for (int as_strings = 0; as_strings < 2; as_strings++) {
        struct tokenizer *t = open_small(&(struct small_file){
            .pieces = letters, .merges = letter_merges, .merges_as_strings = as_strings});
        CHECK_IDS(t, "a", A);
        CHECK_IDS(t, "ab", AB);
        CHECK_IDS(t, "abc", A, BC);     /* b c before a b */
        CHECK_IDS(t, "abcd", A, BC, D); /* ab and cd never form */
        CHECK_IDS(t, "aaa", AA, A);     /* of equals the leftmost */
        CHECK_IDS(t, " a", META_A);
        CHECK_IDS(t, " aa", META_A, A); /* ▁ a before a a */
        CHECK_IDS(t, "▁a", META_A);
        check_ids(t, "", 0, false, NULL, 0);
        tokenizer_close(t);
    }
}

/* A merge whose pair only arises later than pairs of higher rank; the later of two equal merges counts. */
static void test_rank_order(void **state)
{
    (void)state;
    static const char *const pieces[] = {"x", "y", "z", "xy", "yz", "xyz", NULL};
    static const char *const merges[][2] = {{"xy", "z"}, {"x", "y"}, {"y", "z"}, {NULL}};
    static const char *const twice[][2] = {{"x", "y"}, {"y", "z"}, {"x", "y"}, {NULL}};
    enum { X = FIRST_PIECE, Y, Z, XY, YZ, XYZ };
    struct tokenizer *t = open_small(&(struct small_file){.pieces = pieces, .merges = merges});
    CHECK_IDS(t, "xyz", XYZ);
    CHECK_IDS(t, "yxyzz", Y, XYZ, Z);
    tokenizer_close(t);
    t = open_small(&(struct small_file){.pieces = pieces, .merges = twice});
    CHECK_IDS(t, "xyz", X, YZ);
    CHECK_IDS(t, "xy", XY);
    tokenizer_close(t);
}

static void test_added_tokens(void **state)
{
    (void)state;
    static const char *const added[] = {"<a>", "<a><b>", "\n", "\n\n\n", "a▁", NULL};
    enum { TAG = ABCD + 1, TAGS, LINE, LINES, A_META };
    struct tokenizer *t =
        open_small(&(struct small_file){.pieces = letters, .merges = letter_merges, .added = added});
    CHECK_IDS(t, "<a><b>", TAGS); /* the longest */
    CHECK_IDS(t, "<a><a><b>a", TAG, TAGS, A);
    CHECK_IDS(t, "<a><b", TAG, FIRST_BYTE + '<', B);
    CHECK_IDS(t, "\n\n\n\n\n", LINES, LINE, LINE);
    CHECK_IDS(t, "a\nb", A, LINE, B);                               /* no merge across */
    CHECK_IDS(t, "a a", A, META_A);                                 /* raw text has no U+2581 here */
    CHECK_IDS(t, "a▁a", A_META, A);                                 /* but here */
    CHECK_IDS(t, "<<bos>>", FIRST_BYTE + '<', 2, FIRST_BYTE + '>'); /* control tokens match in text */
    check_text(t, false, "<a><b>a \n\n\n<bos>", IDS(TAGS, A_META, LINES, 2));
    check_text(t, true, "<a><b>a \n\n\n", IDS(TAGS, A_META, LINES, 2));
    assert_int_equal(tokenizer_token_id(t, "<a><b>"), TAGS);
    assert_int_equal(tokenizer_token_id(t, "<a><"), -1);
    assert_string_equal(tokenizer_token_name(t, A_META), "a▁");
    assert_null(tokenizer_token_name(t, A_META + 1));
    assert_null(tokenizer_token_name(t, -1));
    assert_true(tokenizer_is_special(t, 2));
    assert_false(tokenizer_is_special(t, TAG));
    assert_false(tokenizer_is_special(t, -1));
    assert_int_equal(tokenizer_n_tokens(t), A_META + 1);
    assert_int_equal(tokenizer_eos(t), 1);
    tokenizer_close(t);
}

static void test_bos(void **state)
{
    (void)state;
    struct tokenizer *t = open_small(&(struct small_file){.pieces = letters, .merges = letter_merges});
    assert_int_equal(tokenizer_bos(t), 2);
    CHECK_BOS_IDS(t, "a", 2, A);
    CHECK_BOS_IDS(t, "", 2);
    CHECK_BOS_IDS(t, "<bos>", 2);
    CHECK_BOS_IDS(t, "<bos>a", 2, A);
    CHECK_BOS_IDS(t, " <bos>", 2, META, 2);
    CHECK_IDS(t, "<bos>a", 2, A);
    struct token_list list = {0}; /* appended, not replaced */
    assert_int_equal(tokenizer_encode(t, "ab", 2, true, &list), 0);
    assert_int_equal(tokenizer_encode(t, "<bos>bc", 7, true, &list), 0);
    assert_int_equal(list.n, 4);
    assert_memory_equal(list.ids, ((const int32_t[]){2, AB, 2, BC}), 4 * sizeof(int32_t));
    token_list_free(&list);
    tokenizer_close(t);
}

#define BYTE(b) (FIRST_BYTE + (b))

static void test_bytes(void **state)
{
    (void)state;
    struct tokenizer *t = open_small(&(struct small_file){.pieces = letters, .merges = letter_merges});
    CHECK_IDS(t, "aéa", A, BYTE(0xc3), BYTE(0xa9), A);
    CHECK_IDS(t, "\xf0\x9f\x98\x80", BYTE(0xf0), BYTE(0x9f), BYTE(0x98), BYTE(0x80));
    CHECK_IDS(t, "a\0b", A, BYTE(0), B);
    CHECK_IDS(t, "<0x41>", BYTE('<'), BYTE('0'), BYTE('x'), BYTE('4'), BYTE('1'), BYTE('>'));
    /* not UTF-8: each such byte alone, what stands beside it is as ever */
    CHECK_IDS(t,
              "ab\xff"
              "ab",
              AB, BYTE(0xff), AB);
    CHECK_IDS(t, "\xe2\x96 a", BYTE(0xe2), BYTE(0x96), META_A);
    CHECK_IDS(t, "\xe2\xe2\x96\x81", BYTE(0xe2), META);
    CHECK_IDS(t, "\xc1\x81", BYTE(0xc1), BYTE(0x81));                                 /* overlong */
    CHECK_IDS(t, "\xe0\x81\x81", BYTE(0xe0), BYTE(0x81), BYTE(0x81));                 /* overlong */
    CHECK_IDS(t, "\xed\xa0\x80", BYTE(0xed), BYTE(0xa0), BYTE(0x80));                 /* a surrogate */
    CHECK_IDS(t, "\xf4\x90\x80\x80", BYTE(0xf4), BYTE(0x90), BYTE(0x80), BYTE(0x80)); /* beyond U+10FFFF */
    tokenizer_close(t);
}

static void test_decoding(void **state)
{
    (void)state;
    struct tokenizer *t = open_small(&(struct small_file){.pieces = letters, .merges = letter_merges});
    check_text(t, false, "", NULL, 0);
    check_text(t, false, " a bcé", IDS(META_A, META, BC, BYTE(0xc3), BYTE(0xa9)));
    check_text(t, false,
               "a\xef\xbf\xbd"
               "b",
               IDS(A, BYTE(0xc3), B));
    /* a run is valid as a whole or not at all */
    check_text(t, false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", IDS(BYTE(0xc3), BYTE(0xa9), BYTE(0xff)));
    check_text(t, false, "éb\xef\xbf\xbd", IDS(BYTE(0xc3), BYTE(0xa9), B, BYTE(0xff)));
    /* special tokens end a run when they are shown, and are not there when they are not */
    check_text(t, false, "\xef\xbf\xbd<eos>\xef\xbf\xbd", IDS(BYTE(0xc3), 1, BYTE(0xa9)));
    check_text(t, true, "é", IDS(BYTE(0xc3), 1, BYTE(0xa9)));
    /* neither are ids that nothing uses */
    check_text(t, false, "éa", IDS(BYTE(0xc3), 9999, BYTE(0xa9), -1, INT32_MIN, INT32_MAX, A));
    tokenizer_close(t);
}

/* What a reader sees while tokens come in. */
static void test_stream(void **state)
{
    (void)state;
    static const int32_t ids[] = {META_A, BYTE(0xc3), BYTE(0xa9), B, BYTE(0xe2)};
    static const char *const seen[] = {" a", " a", " a", " aéb", " aéb"};
    struct tokenizer *t = open_small(&(struct small_file){.pieces = letters, .merges = letter_merges});
    struct token_stream s;
    struct text out = {0};
    token_stream_init(&s, t, true);
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        assert_int_equal(token_stream_add(&s, ids[i], &out), 0);
        assert_string_equal(out.data, seen[i]);
    }
    assert_int_equal(token_stream_finish(&s, &out), 0);
    assert_string_equal(out.data, " aéb\xef\xbf\xbd");
    token_stream_free(&s);
    text_free(&out);
    tokenizer_close(t);
}

static uint32_t next_random(uint64_t *state, uint32_t bound)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((*state >> 33) % bound);
}

/* The definition: of all neighbours that have a merge the lowest rank, of those the leftmost; nothing is cut. */
static size_t merge_naively(const struct tokenizer *t, const char *const (*merges)[2], int32_t *ids, size_t n)
{
    for (;;) {
        size_t best_rank = SIZE_MAX, best = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (size_t rank = 0; merges[rank][0] && rank < best_rank; rank++)
                if (ids[i] == tokenizer_token_id(t, merges[rank][0]) &&
                    ids[i + 1] == tokenizer_token_id(t, merges[rank][1])) {
                    best_rank = rank;
                    best = i;
                }
        if (best_rank == SIZE_MAX)
            return n;
        char joined[64];
        snprintf(joined, sizeof joined, "%s%s", merges[best_rank][0], merges[best_rank][1]);
        ids[best] = tokenizer_token_id(t, joined);
        memmove(ids + best + 1, ids + best + 2, (n - best - 2) * sizeof *ids);
        n--;
    }
}

enum { N_CHARS = 6, N_MERGES = 14, MAX_CHARS = 300 };

struct random_vocabulary {
    char names[N_CHARS + N_MERGES][40];
    const char *pieces[N_CHARS + N_MERGES + 1];
    const char *merges[N_MERGES + 1][2];
};

/* Merges of earlier pieces in random order, so that ranks do not follow the order of making. */
static void make_vocabulary(struct random_vocabulary *v, uint64_t *rng)
{
    static const char *const chars[N_CHARS] = {"▁", "a", "b", "é", "語", "😀"};
    size_t n = N_CHARS, n_merges = 0;
    for (size_t i = 0; i < N_CHARS; i++)
        strcpy(v->names[i], chars[i]);
    while (n_merges < N_MERGES) {
        const char *a = v->names[next_random(rng, (uint32_t)n)], *b = v->names[next_random(rng, (uint32_t)n)];
        char joined[80];
        snprintf(joined, sizeof joined, "%s%s", a, b);
        bool known = strlen(joined) >= sizeof v->names[0];
        for (size_t i = 0; i < n; i++)
            known = known || !strcmp(v->names[i], joined);
        if (known)
            continue;
        strcpy(v->names[n++], joined);
        const size_t at = next_random(rng, (uint32_t)n_merges + 1);
        memmove(v->merges + at + 1, v->merges + at, (n_merges - at) * sizeof *v->merges);
        v->merges[at][0] = a;
        v->merges[at][1] = b;
        n_merges++;
    }
    v->merges[n_merges][0] = NULL;
    for (size_t i = 1; i < n; i++) /* "▁" is in every file */
        v->pieces[i - 1] = v->names[i];
    v->pieces[n - 1] = NULL;
}

static void test_random_vocabularies(void **state)
{
    (void)state;
    uint64_t rng = 1;
    for (int round = 0; round < 60; round++) {
        struct random_vocabulary v;
        make_vocabulary(&v, &rng);
        struct tokenizer *t =
            open_small(&(struct small_file){.pieces = v.pieces, .merges = (const char *const(*)[2])v.merges});
        for (int k = 0; k < 12; k++) {
            struct text text = {0};
            int32_t ids[MAX_CHARS];
            const size_t n = next_random(&rng, k < 8 ? 40 : MAX_CHARS);
            const uint32_t n_kinds = 1 + next_random(&rng, N_CHARS); /* few kinds: long pieces */
            for (size_t i = 0; i < n; i++) {
                const char *c = v.names[next_random(&rng, n_kinds)];
                text_add(&text, strcmp(c, "▁") || k % 2 ? c : " ");
                ids[i] = tokenizer_token_id(t, c);
            }
            assert_int_equal(text_finish(&text), 0);
            const size_t n_left = merge_naively(t, (const char *const(*)[2])v.merges, ids, n);
            check_ids(t, text.data, text.len, false, ids, n_left);
            text_free(&text);
        }
        tokenizer_close(t);
    }
}

static void append_utf8(struct text *t, uint32_t cp)
{
    const char s[4] = {(char)(cp < 0x80      ? cp
                              : cp < 0x800   ? 0xc0 | cp >> 6
                              : cp < 0x10000 ? 0xe0 | cp >> 12
                                             : 0xf0 | cp >> 18),
                       (char)(0x80 | (cp >> (cp < 0x800     ? 0
                                             : cp < 0x10000 ? 6
                                                            : 12) &
                                      63)),
                       (char)(0x80 | (cp >> (cp < 0x10000 ? 0 : 6) & 63)), (char)(0x80 | (cp & 63))};
    text_append(t, s, cp < 0x80 ? 1 : cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4);
}

static struct tokenizer *open_tiny(void)
{
    struct tokenizer *t;
    if (tokenizer_open(&t, GEMCUT_SOURCE_DIR "/data/model/gemma3-tiny/tokenizer.json") < 0)
        fail_msg("%s", err_message());
    return t;
}

static void test_round_trip(void **state)
{
    (void)state;
    static const uint32_t bounds[] = {0x80, 0x80, 0x80, 0x250, 0x3000, 0x10000, 0x110000};
    static const char *const words[] = {" the",   "  ",  "\n\n", "<bos>", "<start_of_turn>",
                                        "<0x41>", "ing", "ther"};
    struct tokenizer *t = open_tiny();
    uint64_t rng = 7;
    for (int round = 0; round < 3000; round++) {
        struct text text = {0}, back = {0};
        struct token_list list = {0};
        for (uint32_t n = next_random(&rng, round % 50 ? 40 : 3000); n > 0; n--) {
            const uint32_t cp = next_random(&rng, bounds[next_random(&rng, 7)]);
            if (next_random(&rng, 3) == 0)
                text_add(&text, words[next_random(&rng, 8)]);
            else if (cp != 0x2581 && (cp < 0xd800 || cp > 0xdfff))
                append_utf8(&text, cp);
        }
        assert_int_equal(text_finish(&text), 0);
        assert_int_equal(tokenizer_encode(t, text.data, text.len, false, &list), 0);
        assert_int_equal(tokenizer_decode(t, list.ids, list.n, false, &back), 0);
        assert_int_equal(back.len, text.len);
        assert_memory_equal(back.data, text.data, text.len);
        token_list_free(&list);
        text_free(&text);
        text_free(&back);
    }
    tokenizer_close(t);
}

static void test_tiny_golden(void **state)
{
    (void)state;
    struct tokenizer *t = open_tiny();
    struct json_doc *doc;
    assert_int_equal(json_load(&doc, GEMCUT_SOURCE_DIR "/tests/data/gemma3_tiny_golden.json", 1 << 20), 0);
    assert_int_equal(json_count(json_root(doc)), 9);
    for (struct json v = json_first(json_root(doc)); v.node; v = json_next(v)) {
        int32_t expected[256];
        size_t n = 0;
        for (struct json id = json_first(v); id.node; id = json_next(id)) {
            int64_t value;
            assert_true(n < 256 && json_as_int(id, 0, 4096, &value) == 0);
            expected[n++] = (int32_t)value;
        }
        check_ids(t, json_key(v), strlen(json_key(v)), true, expected, n);
    }
    json_free(doc);
    tokenizer_close(t);
}

/* A text of one byte, long enough that quadratic time would be noticed; every id is `id`. */
static void check_long_run(const struct tokenizer *t, int byte, size_t n_ids, int32_t id)
{
    static char text[1 << 20];
    struct token_list list = {0};
    memset(text, byte, sizeof text);
    assert_int_equal(tokenizer_encode(t, text, sizeof text, false, &list), 0);
    assert_int_equal(list.n, n_ids);
    for (size_t i = 0; i < list.n; i++)
        assert_int_equal(list.ids[i], id);
    token_list_free(&list);
}

static void test_long_runs(void **state)
{
    (void)state;
    struct tokenizer *t = open_small(&(struct small_file){.pieces = letters, .merges = letter_merges});
    check_long_run(t, 'a', 1 << 19, AA);
    check_long_run(t, ' ', 1 << 20, META);
    check_long_run(t, 0xff, 1 << 20, BYTE(0xff));
    tokenizer_close(t);
}

struct bad_file {
    const char *from, *to; /* in the small file */
    int rc;
    const char *message;
};

static const struct bad_file bad_files[] = {
    {"{\"model\"", "", ERR_FORMAT, "not JSON"},
    {"\"BPE\"", "\"Unigram\"", ERR_UNSUPPORTED, "'model.type' is \"Unigram\", only \"BPE\" is supported"},
    {"\"BPE\"", "\"BPE\", \"dropout\": 0.1", ERR_UNSUPPORTED, "'model.dropout' is 0.1, only 0 is supported"},
    {"\"BPE\"", "\"BPE\", \"ignore_merges\": true", ERR_UNSUPPORTED, "'ignore_merges' true, only"},
    {"\"BPE\"", "\"BPE\", \"end_of_word_suffix\": \"</w>\"", ERR_UNSUPPORTED, "_suffix' is \"</w>\""},
    {"\"byte_fallback\": true", "\"byte_fallback\": false", ERR_UNSUPPORTED, "'byte_fallback' false"},
    {"\"type\": \"Replace\"", "\"type\": \"NFKC\"", ERR_UNSUPPORTED, "'normalizer.type' is \"NFKC\""},
    {"\"String\": \" \"}, \"content\"", "\"Regex\": \" \"}, \"content\"", ERR_FORMAT,
     "'normalizer.pattern' has no member 'String'"},
    {"\"content\": \"▁\"}", "\"content\": \"_\"}", ERR_UNSUPPORTED, "'normalizer.content' is \"_\""},
    {"\"Split\"", "\"Whitespace\"", ERR_UNSUPPORTED, "'pre_tokenizer.type' is \"Whitespace\""},
    {"\"invert\": false", "\"invert\": true", ERR_UNSUPPORTED, "'pre_tokenizer' has 'invert' true"},
    {"\"Fuse\"", "\"Strip\"", ERR_UNSUPPORTED, "'decoder.decoders[2].type' is \"Strip\""},
    {", {\"type\": \"Fuse\"}", "", ERR_UNSUPPORTED, "has 2 steps"},
    {"\"<bos>\"", "\"<s>\"", ERR_FORMAT, "gives id 2 to \"<bos>\", but \"<s>\" has it"},
    {"\"<0x7F>\"", "\"<0x7G>\"", ERR_FORMAT, "has no \"<0x7F>\""},
    {"\"▁\":", "\"_\":", ERR_FORMAT, "has no \"▁\""},
    {"\"a\": 262", "\"a\": 261", ERR_FORMAT, "gives id 261 to \"a\", but \"▁\" has it"},
    {"\"a\": 262", "\"a\": 2.5", ERR_FORMAT, "is 2.5, expected an integer"},
    {"\"a\": 262", "\"a\": 99999999", ERR_FORMAT, "is 99999999, expected 0"},
    {"\"aa\": 266", "\"a\": 266", ERR_FORMAT, "has \"a\" twice"},
    {"\"d\": 265", "\"\\u0000\": 265", ERR_UNSUPPORTED, "a string holds \\u0000"},
    {"\"d\": 265", "\"\\ud800\": 265", ERR_FORMAT, "not JSON"},
    {"\"d\": 265", "\"\xff\": 265", ERR_FORMAT, "is not valid UTF-8 (id 265)"},
    {"[\"b\", \"c\"]", "[\"b\"]", ERR_FORMAT, "'model.merges[0]' is not a merge"},
    {"[\"b\", \"c\"]", "\"bc\"", ERR_FORMAT, "'model.merges[0]' is not a merge: \"bc\""},
    {"[\"b\", \"c\"]", "\"b c d\"", ERR_FORMAT, "is not a merge: \"b c d\""},
    {"[\"b\", \"c\"]", "[\"b\", 1]", ERR_FORMAT, "'model.merges[0][1]' is not a string"},
    {"[\"b\", \"c\"]", "[\"\", \"c\"]", ERR_FORMAT, "joins \"\" and \"c\", expected pieces"},
    {"[\"b\", \"c\"]", "[\"b\", \"q\"]", ERR_FORMAT, "joins \"b\" and \"q\", expected pieces"},
    {"[\"b\", \"c\"]", "[\"b\", \"a\"]", ERR_FORMAT, "joins to \"ba\", which is not in the vocabulary"},
    {"}, \"merges\": [[\"b\", \"c\"]", ", \"<0x41>a\": 300}, \"merges\": [[\"<0x41>\", \"a\"]",
     ERR_UNSUPPORTED, "merges of byte tokens are not supported"},
    {"\"content\": \"<eos>\"", "\"content\": \"\"", ERR_FORMAT, "has a content of 0 bytes"},
    {"\"id\": 1,", "\"id\": 0,", ERR_FORMAT, "gives id 0 to \"<eos>\", which is 1 in the vocabulary"},
    {"\"normalized\": false", "\"normalized\": true", ERR_UNSUPPORTED, "has 'normalized' true"},
    {"\"normalized\": false", "\"lstrip\": true", ERR_UNSUPPORTED, "has 'lstrip' true"},
    {"\"vocab\": {", "\"vocab\": [], \"x\": {", ERR_FORMAT, "'model.vocab' is not an object"},
    {"\"merges\": [", "\"merges\": {}, \"x\": [", ERR_FORMAT, "'model.merges' is not an array"},
};

static char *replaced(const char *s, const char *from, const char *to)
{
    const char *at = strstr(s, from);
    assert_non_null(at);
    struct text t = {0};
    text_append(&t, s, (size_t)(at - s));
    text_add(&t, to);
    text_add(&t, at + strlen(from));
    assert_int_equal(text_finish(&t), 0);
    return t.data;
}

static void test_bad_files(void **state)
{
    (void)state;
    char *good = make_json(&(struct small_file){.pieces = letters, .merges = letter_merges});
    for (size_t i = 0; i < sizeof bad_files / sizeof *bad_files; i++) {
        const struct bad_file *f = &bad_files[i];
        char *bad = replaced(good, f->from, f->to);
        struct tokenizer *t;
        const int rc = tokenizer_parse(&t, bad, strlen(bad), "bad.json");
        assert_null(t);
        if (rc != f->rc || strncmp(err_message(), "bad.json: ", 10) || !strstr(err_message(), f->message))
            fail_msg("%s → %s: %d %s", f->from, f->to, rc, err_message());
        free(bad);
    }
    /* an escaped backslash before u0000 is no NUL */
    char *fine = replaced(good, "\"d\": 265", "\"d\": 265, \"\\\\u0000\": 300");
    struct tokenizer *t;
    assert_int_equal(tokenizer_parse(&t, fine, strlen(fine), "fine.json"), 0);
    assert_int_equal(tokenizer_token_id(t, "\\u0000"), 300);
    tokenizer_close(t);
    free(fine);
    /* every beginning of a file is an error, not a crash */
    for (size_t len = 0; len < strlen(good); len += 7) {
        assert_true(tokenizer_parse(&t, good, len, "cut.json") < 0);
        assert_null(t);
    }
    free(good);
    assert_int_equal(tokenizer_open(&t, GEMCUT_SOURCE_DIR "/no/such/file"), ERR_IO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merges),       cmocka_unit_test(test_rank_order),
        cmocka_unit_test(test_added_tokens), cmocka_unit_test(test_bos),
        cmocka_unit_test(test_bytes),        cmocka_unit_test(test_decoding),
        cmocka_unit_test(test_stream),       cmocka_unit_test(test_random_vocabularies),
        cmocka_unit_test(test_round_trip),   cmocka_unit_test(test_tiny_golden),
        cmocka_unit_test(test_long_runs),    cmocka_unit_test(test_bad_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

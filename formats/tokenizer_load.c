/* tokenizer.json → struct tokenizer. */
#include "base/err.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/tokenizer_impl.h"
#include "formats/utf8.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_FILE_BYTES = 1 << 28,  /* Gemma 3's is 33 MB */
    MAX_ID = (1 << 22) - 1,    /* Gemma 3's largest is 262144; bounds the table of tokens */
    MAX_TOKEN_BYTES = 1 << 10, /* of one piece; Gemma 3's longest has 93 */
    MAX_ADDED_BYTES = 1 << 8,  /* of one added token: every place of a text may look that far ahead */
};

/* What the loading functions share. */
struct loader {
    struct tokenizer *t;
    const char *file;
};

static int expect_string(const struct loader *l, struct json obj, const char *key, const char *expected)
{
    const char *got;
    const int rc = json_get_string(obj, key, &got);
    if (rc < 0 || !strcmp(got, expected))
        return rc;
    return err_set(ERR_UNSUPPORTED, "%s: '%s' is \"%.64s\", only \"%s\" is supported", l->file,
                   json_path(json_member(obj, key)), got, expected);
}

static int expect_bool(const struct loader *l, struct json obj, const char *key, bool expected)
{
    bool got;
    const int rc = json_opt_bool(obj, key, false, &got);
    if (rc < 0 || got == expected)
        return rc;
    return err_set(ERR_UNSUPPORTED, "%s: '%s' has '%s' %s, only %s is supported", l->file, json_path(obj),
                   key, got ? "true" : "false", expected ? "true" : "false");
}

static int expect_replace(const struct loader *l, struct json v, const char *from, const char *to)
{
    struct json pattern;
    int rc = expect_string(l, v, "type", "Replace");
    if (rc == 0)
        rc = json_get_object(v, "pattern", &pattern);
    if (rc == 0)
        rc = expect_string(l, pattern, "String", from);
    return rc < 0 ? rc : expect_string(l, v, "content", to);
}

static int check_decoder(const struct loader *l, struct json decoder)
{
    struct json steps;
    int rc = expect_string(l, decoder, "type", "Sequence");
    if (rc == 0)
        rc = json_get_array(decoder, "decoders", &steps);
    if (rc < 0)
        return rc;
    if (json_count(steps) != 3)
        return err_set(ERR_UNSUPPORTED,
                       "%s: '%s' has %zu steps, only Replace, ByteFallback, Fuse is supported", l->file,
                       json_path(steps), json_count(steps));
    const struct json first = json_first(steps), second = json_next(first);
    rc = expect_replace(l, first, METASPACE, " ");
    if (rc == 0)
        rc = expect_string(l, second, "type", "ByteFallback");
    return rc < 0 ? rc : expect_string(l, json_next(second), "type", "Fuse");
}

/* Absent, or a split at spaces, of which normalized text has none. */
static int check_pre_tokenizer(const struct loader *l, struct json v)
{
    struct json pattern;
    if (!json_exists(v))
        return 0;
    int rc = expect_string(l, v, "type", "Split");
    if (rc == 0)
        rc = json_get_object(v, "pattern", &pattern);
    if (rc == 0)
        rc = expect_string(l, pattern, "String", " ");
    return rc < 0 ? rc : expect_bool(l, v, "invert", false);
}

static int check_model(const struct loader *l, struct json model)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const char *affix = "";
    double dropout = 0;
    int rc = expect_string(l, model, "type", "BPE");
    if (rc == 0)
        rc = expect_bool(l, model, "byte_fallback", true);
    if (rc == 0)
        rc = expect_bool(l, model, "ignore_merges", false);
    if (rc == 0)
        rc = json_opt_double(model, "dropout", 0, &dropout);
    if (rc == 0 && dropout != 0)
        return err_set(ERR_UNSUPPORTED, "%s: 'model.dropout' is %g, only 0 is supported", l->file, dropout);
    for (size_t i = 0; rc == 0 && i < sizeof affixes / sizeof *affixes; i++) {
        rc = json_opt_string(model, affixes[i], "", &affix);
        if (rc == 0 && *affix)
            return err_set(ERR_UNSUPPORTED, "%s: 'model.%s' is \"%.64s\", only none is supported", l->file,
                           affixes[i], affix);
    }
    return rc;
}

static int check_pipeline(const struct loader *l, struct json root)
{
    struct json v;
    int rc = json_get_object(root, "model", &v);
    if (rc == 0)
        rc = check_model(l, v);
    if (rc == 0)
        rc = json_get_object(root, "normalizer", &v);
    if (rc == 0)
        rc = expect_replace(l, v, " ", METASPACE);
    if (rc == 0)
        rc = check_pre_tokenizer(l, json_member(root, "pre_tokenizer"));
    if (rc == 0)
        rc = json_get_object(root, "decoder", &v);
    return rc < 0 ? rc : check_decoder(l, v);
}

/* The byte of "<0xXX>", or -1. */
static int byte_of_name(const char *name, size_t len)
{
    if (len != 6 || memcmp(name, "<0x", 3) || name[5] != '>')
        return -1;
    const char hex[3] = {name[3], name[4], '\0'};
    if (strspn(hex, "0123456789abcdefABCDEF") != 2)
        return -1;
    return (int)strtol(hex, NULL, 16);
}

static int add_token(const struct loader *l, struct json at, const char *name, int32_t id)
{
    struct tokenizer *t = l->t;
    const size_t len = strlen(name);
    if (len > MAX_TOKEN_BYTES)
        return json_error(at, "has a piece of %zu bytes, expected at most %d", len, MAX_TOKEN_BYTES);
    if (!utf8_valid((const uint8_t *)name, len))
        return json_error(at, "has a piece that is not valid UTF-8 (id %d)", id);
    if (t->tokens[id].name)
        return json_error(at, "gives id %d to \"%.64s\", but \"%.64s\" has it", id, name, t->tokens[id].name);
    CHECK(t->pool_len + len < t->pool_bytes);
    char *copy = memcpy(t->pool + t->pool_len, name, len + 1);
    const int rc = name_table_add(&t->names, copy, (size_t)id);
    if (rc == 1)
        return json_error(at, "has \"%.64s\" twice", name);
    if (rc < 0)
        return rc;
    t->pool_len += len + 1;
    t->tokens[id] = (struct token){.name = copy,
                                   .len = (uint16_t)len,
                                   .byte = (int16_t)byte_of_name(copy, len),
                                   .has_metaspace = strstr(copy, METASPACE) != NULL};
    return 0;
}

/* Largest id and bytes of all names, so that everything is allocated once. */
static int measure(const struct loader *l, struct json vocab, struct json added)
{
    int64_t id, max_id = 0;
    const char *name;
    for (struct json v = json_first(vocab); v.node; v = json_next(v)) {
        const int rc = json_as_int(v, 0, MAX_ID, &id);
        if (rc < 0)
            return rc;
        max_id = id > max_id ? id : max_id;
        l->t->pool_bytes += strlen(json_key(v)) + 1;
    }
    for (struct json v = json_first(added); v.node; v = json_next(v)) {
        int rc = json_get_int(v, "id", 0, MAX_ID, &id);
        if (rc == 0)
            rc = json_get_string(v, "content", &name);
        if (rc < 0)
            return rc;
        max_id = id > max_id ? id : max_id;
        l->t->pool_bytes += strlen(name) + 1;
    }
    l->t->n_tokens = (size_t)max_id + 1;
    return 0;
}

static int load_vocab(const struct loader *l, struct json vocab)
{
    struct tokenizer *t = l->t;
    for (struct json v = json_first(vocab); v.node; v = json_next(v)) {
        int64_t id;
        int rc = json_as_int(v, 0, MAX_ID, &id);
        if (rc == 0)
            rc = add_token(l, vocab, json_key(v), (int32_t)id);
        if (rc < 0)
            return rc;
        const struct token *token = &t->tokens[id];
        uint32_t cp;
        if (token->len && utf8_decode((const uint8_t *)token->name, token->len, &cp) == token->len)
            bpe_set_char(t->bpe, cp, (int32_t)id);
    }
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", byte);
        const int32_t id = tokenizer_token_id(t, name);
        if (id < 0)
            return json_error(vocab, "has no \"%s\"", name);
        bpe_set_byte(t->bpe, (uint8_t)byte, id);
    }
    if (tokenizer_token_id(t, METASPACE) < 0)
        return json_error(vocab, "has no \"%s\" (U+2581)", METASPACE);
    return 0;
}

/* The two sides of a merge, ["a", "b"] or "a b", into buf, each NUL-terminated. */
static int merge_sides(struct json v, char buf[2 * MAX_TOKEN_BYTES + 2], const char **left,
                       const char **right)
{
    if (json_is_array(v) && json_count(v) == 2) {
        const int rc = json_as_string(json_first(v), left);
        return rc < 0 ? rc : json_as_string(json_next(json_first(v)), right);
    }
    const char *s = NULL;
    if (!json_is_string(v) || json_as_string(v, &s) < 0)
        return json_error(v, "is not a merge: neither two strings nor \"left right\"");
    const char *space = strchr(s, ' ');
    if (!space || strchr(space + 1, ' ') || strlen(s) > 2 * MAX_TOKEN_BYTES + 1)
        return json_error(v, "is not a merge: \"%.64s\", expected two pieces and one space", s);
    strcpy(buf, s);
    buf[space - s] = '\0';
    *left = buf;
    *right = buf + (space - s) + 1;
    return 0;
}

static int load_merge(const struct loader *l, struct json v)
{
    const struct tokenizer *t = l->t;
    char sides[2 * MAX_TOKEN_BYTES + 2], joined[2 * MAX_TOKEN_BYTES + 1];
    const char *left, *right;
    const int rc = merge_sides(v, sides, &left, &right);
    if (rc < 0)
        return rc;
    struct bpe_merge m = {.left = tokenizer_token_id(t, left), .right = tokenizer_token_id(t, right)};
    if (!*left || !*right || m.left < 0 || m.right < 0)
        return json_error(v, "joins \"%.64s\" and \"%.64s\", expected pieces of the vocabulary", left, right);
    const struct token *a = &t->tokens[m.left], *b = &t->tokens[m.right];
    memcpy(joined, a->name, a->len);
    memcpy(joined + a->len, b->name, b->len + 1);
    m.result = tokenizer_token_id(t, joined);
    if (m.result < 0)
        return json_error(v, "joins to \"%.64s\", which is not in the vocabulary", joined);
    if (a->byte >= 0 || b->byte >= 0 || t->tokens[m.result].byte >= 0)
        return err_set(ERR_UNSUPPORTED,
                       "%s: '%s' joins \"%.64s\" and \"%.64s\": merges of byte tokens are not supported",
                       l->file, json_path(v), left, right);
    size_t last = a->len - 1;
    while ((a->name[last] & 0xc0) == 0x80)
        last--;
    utf8_decode((const uint8_t *)a->name + last, a->len - last, &m.left_end);
    utf8_decode((const uint8_t *)b->name, b->len, &m.right_begin);
    bpe_add_merge(t->bpe, &m);
    return 0;
}

static uint32_t add_node(struct tokenizer *t, uint8_t byte)
{
    if (!t->n_added)
        t->n_added = 1;
    if (mem_grow(&t->added, &t->added_capacity, t->n_added + 1, sizeof *t->added, "added tokens") < 0)
        return 0;
    t->added[t->n_added] = (struct added_node){.id = -1, .byte = byte};
    return (uint32_t)t->n_added++;
}

/* Enters an added token into the tree. */
static int plant(struct tokenizer *t, const char *name, size_t len, int32_t id)
{
    const uint8_t *s = (const uint8_t *)name;
    uint32_t *first = &t->added_first[s[0]];
    if (!*first && !(*first = add_node(t, s[0])))
        return ERR_MEMORY;
    uint32_t node = *first;
    for (size_t i = 1; i < len; i++) {
        uint32_t child = tokenizer_added_child(t, node, s[i]);
        if (!child) {
            child = add_node(t, s[i]);
            if (!child)
                return ERR_MEMORY;
            t->added[child].sibling = t->added[node].child;
            t->added[node].child = child;
        }
        node = child;
    }
    t->added[node].id = id;
    return 0;
}

static int load_added(const struct loader *l, struct json v)
{
    static const char *const unsupported[] = {"single_word", "lstrip", "rstrip", "normalized"};
    struct tokenizer *t = l->t;
    int64_t id;
    const char *name;
    bool special;
    int rc = json_get_int(v, "id", 0, MAX_ID, &id);
    if (rc == 0)
        rc = json_get_string(v, "content", &name);
    if (rc == 0)
        rc = json_opt_bool(v, "special", false, &special);
    for (size_t i = 0; rc == 0 && i < sizeof unsupported / sizeof *unsupported; i++)
        rc = expect_bool(l, v, unsupported[i], false);
    if (rc < 0)
        return rc;
    const size_t len = strlen(name);
    if (!len || len > MAX_ADDED_BYTES)
        return json_error(v, "has a content of %zu bytes, expected 1 … %d", len, MAX_ADDED_BYTES);
    const int32_t known = tokenizer_token_id(t, name);
    if (known < 0)
        rc = add_token(l, v, name, (int32_t)id);
    else if (known != id)
        return json_error(v, "gives id %d to \"%.64s\", which is %d in the vocabulary", (int)id, name, known);
    if (rc < 0)
        return rc;
    t->tokens[id].special = special;
    return plant(t, name, len, (int32_t)id);
}

static int load(const struct loader *l, struct json root)
{
    struct tokenizer *t = l->t;
    struct json model, vocab, merges;
    const struct json added = json_member(root, "added_tokens");
    int rc = check_pipeline(l, root);
    if (rc == 0)
        rc = json_get_object(root, "model", &model);
    if (rc == 0)
        rc = json_get_object(model, "vocab", &vocab);
    if (rc == 0)
        rc = json_get_array(model, "merges", &merges);
    if (rc == 0)
        rc = measure(l, vocab, added);
    if (rc == 0)
        rc = bpe_open(&t->bpe, json_count(merges));
    if (rc == 0)
        rc = name_table_init(&t->names, t->n_tokens);
    if (rc < 0)
        return rc;
    t->pool = mem_alloc(t->pool_bytes, 1, "token names");
    t->tokens = mem_alloc(t->n_tokens, sizeof *t->tokens, "tokens");
    if (!t->pool || !t->tokens)
        return ERR_MEMORY;
    rc = load_vocab(l, vocab);
    for (struct json v = json_first(merges); rc == 0 && v.node; v = json_next(v))
        rc = load_merge(l, v);
    for (struct json v = json_first(added); rc == 0 && v.node; v = json_next(v))
        rc = load_added(l, v);
    if (rc < 0)
        return rc;
    t->bos = tokenizer_token_id(t, "<bos>");
    t->eos = tokenizer_token_id(t, "<eos>");
    return t->bos < 0 ? err_set(ERR_FORMAT, "%s: no token \"<bos>\"", l->file) : 0;
}

/* cJSON would end the string there. */
static bool has_nul_escape(const char *text, size_t len)
{
    static const char escape[] = "\\u0000";
    const char *end = text + len, *at = text;
    while ((at = memmem(at, (size_t)(end - at), escape, sizeof escape - 1))) {
        size_t n_backslashes = 1;
        while (at - n_backslashes >= text && at[-(ptrdiff_t)n_backslashes] == '\\')
            n_backslashes++;
        if (n_backslashes % 2)
            return true;
        at++;
    }
    return false;
}

int tokenizer_parse(struct tokenizer **out, const char *text, size_t len, const char *name)
{
    *out = NULL;
    if (has_nul_escape(text, len))
        return err_set(ERR_UNSUPPORTED, "%s: a string holds \\u0000, which is not supported", name);
    struct json_doc *doc;
    int rc = json_parse(&doc, text, len, name);
    if (rc < 0)
        return rc;
    struct tokenizer *t = mem_alloc(1, sizeof *t, "a tokenizer");
    const struct loader l = {.t = t, .file = name};
    rc = t ? load(&l, json_root(doc)) : ERR_MEMORY;
    json_free(doc);
#ifdef __GLIBC__
    malloc_trim(0); /* the document took 180 MB in small pieces, which glibc would keep */
#endif
    if (rc < 0)
        tokenizer_close(t);
    else
        *out = t;
    return rc;
}

int tokenizer_open(struct tokenizer **out, const char *path)
{
    *out = NULL;
    char *text;
    size_t len;
    int rc = file_read(path, MAX_FILE_BYTES, &text, &len);
    if (rc < 0)
        return rc;
    rc = tokenizer_parse(out, text, len, path);
    free(text);
    return rc;
}

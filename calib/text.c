#include "calib/text.h"

#include "base/err.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "calib/builtin.h"
#include "formats/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

static const size_t max_document_bytes = (size_t)1 << 30;

/* A file on its way in: pieces of its text are pushed in order, whole documents come out. */
struct reader {
    struct documents *out;
    size_t capacity; /* of out->list */
    enum chat_format chat;
    bool by_line;
    size_t line;      /* lines that are complete */
    struct text rest; /* what was pushed and is not yet a line; without lines, everything */
    uint64_t pushed, max_bytes;
};

/* Takes over `text`, also on failure. */
static int add_document(struct reader *r, struct document document)
{
    if (mem_grow(&r->out->list, &r->capacity, r->out->n + 1, sizeof document, "documents") < 0) {
        free(document.text);
        return ERR_MEMORY;
    }
    r->out->list[r->out->n++] = document;
    return 0;
}

/* ERR_FORMAT that says where, when s[0..n) is not UTF-8; first_line: the number of its first line. */
static int check_utf8(const char *s, size_t n, size_t first_line)
{
    uint32_t cp;
    size_t at = 0, line = first_line, line_start = 0;
    for (size_t len; at < n; at += len) {
        len = utf8_decode((const uint8_t *)s + at, n - at, &cp);
        if (!len)
            return err_set(ERR_FORMAT, "line %zu: byte 0x%02x at offset %zu of the line is not UTF-8", line,
                           (uint8_t)s[at], at - line_start);
        if (cp == '\n') {
            line++;
            line_start = at + 1;
        }
    }
    return 0;
}

/* The bytes of a byte order mark at the start of s[0..n). */
static size_t mark_bytes(const char *s, size_t n)
{
    return n >= 3 && !memcmp(s, "\xef\xbb\xbf", 3) ? 3 : 0;
}

/* --- conversations -------------------------------------------------------------------------------------------- */

struct conversation {
    struct chat_message *messages; /* [n]; strings belong to the JSON document or to `joined` */
    struct text *joined;           /* [n]; contents that were given in parts */
    size_t n;
};

static void conversation_free(struct conversation *c)
{
    for (size_t i = 0; c->joined && i < c->n; i++)
        text_free(&c->joined[i]);
    free(c->joined);
    free(c->messages);
}

/* [{"type": "text", "text": …}, …] as one string. A system message is left to the template, and up to Gemma 3 those
 * look at its first part alone: there must be no second. */
static int join_parts(struct text *out, enum chat_format chat, const char *role, struct json parts)
{
    const bool is_system = !strcmp(role, "system");
    if (is_system && json_count(parts) != 1)
        return json_error(parts, "has %zu parts, expected 1 in a system message", json_count(parts));
    int rc = 0;
    text_add(out, "");
    for (struct json p = json_first(parts); !rc && p.node; p = json_next(p)) {
        const char *type, *text;
        rc = json_get_string(p, "type", &type);
        if (!rc && strcmp(type, "text"))
            rc = json_error(p, "is of the type \"%.32s\", expected \"text\"", type);
        if (!rc)
            rc = json_get_string(p, "text", &text);
        if (!rc && is_system)
            text_add(out, text);
        else if (!rc)
            chat_template_part(chat, role, text, out);
    }
    return rc ? rc : text_finish(out);
}

static int read_message(struct conversation *c, size_t i, enum chat_format chat, struct json message)
{
    struct chat_message *m = &c->messages[i];
    int rc = json_get_string(message, "role", &m->role);
    if (rc < 0)
        return rc;
    const struct json content = json_member(message, "content");
    if (!json_exists(content))
        return json_error(message, "has no member 'content'");
    if (json_is_string(content))
        return json_as_string(content, &m->content);
    if (!json_is_array(content))
        return json_error(content, "is neither a string nor an array of parts");
    rc = join_parts(&c->joined[i], chat, m->role, content);
    m->content = c->joined[i].data;
    return rc;
}

static int render(struct text *out, enum chat_format chat, struct json messages, size_t line)
{
    struct conversation c = {.n = json_count(messages)};
    c.messages = mem_alloc(c.n, sizeof *c.messages, "chat messages");
    c.joined = mem_alloc(c.n, sizeof *c.joined, "chat messages");
    int rc = c.messages && c.joined ? 0 : ERR_MEMORY;
    size_t i = 0;
    for (struct json m = json_first(messages); !rc && m.node; m = json_next(m))
        rc = read_message(&c, i++, chat, m);
    if (!rc)
        rc = chat_template_render(chat, c.messages, c.n, false, out);
    conversation_free(&c);
    /* a refusal by the template: the file is wrong, not the request */
    return rc == ERR_USAGE ? err_context(ERR_FORMAT, "line %zu", line) : rc;
}

/* --- lines ---------------------------------------------------------------------------------------------------- */

/* cJSON would end the string there. */
static bool has_nul_escape(const char *s, size_t n)
{
    static const char escape[] = "\\u0000";
    const char *const end = s + n;
    for (const char *at = s; (at = memmem(at, (size_t)(end - at), escape, sizeof escape - 1)); at++) {
        const char *first = at;
        while (first > s && first[-1] == '\\')
            first--;
        if ((at - first) % 2 == 0)
            return true;
    }
    return false;
}

static int read_object(struct reader *r, struct json root)
{
    if (!json_is_object(root))
        return json_error(root, "is not an object");
    const struct json text = json_member(root, "text"), messages = json_member(root, "messages");
    struct document d = {.line = r->line};
    if (json_exists(text)) {
        const char *s;
        const int rc = json_as_string(text, &s);
        if (rc < 0)
            return rc;
        d.len = strlen(s);
        d.text = mem_strndup(s, d.len);
        return d.text ? add_document(r, d) : ERR_MEMORY;
    }
    if (!json_exists(messages))
        return json_error(root, "has neither 'text' nor 'messages'");
    if (!json_is_array(messages))
        return json_error(messages, "is not an array");
    struct text rendered = {0};
    const int rc = render(&rendered, r->chat, messages, r->line);
    if (rc < 0) {
        text_free(&rendered);
        return rc;
    }
    d.text = rendered.data;
    d.len = rendered.len;
    d.is_chat = true;
    return add_document(r, d);
}

static int add_line(struct reader *r, const char *s, size_t n)
{
    r->line++;
    const size_t mark = r->line == 1 ? mark_bytes(s, n) : 0;
    s += mark;
    n -= mark;
    size_t blank = 0;
    while (blank < n && (s[blank] == ' ' || s[blank] == '\t' || s[blank] == '\r'))
        blank++;
    if (blank == n)
        return 0;
    if (err_interrupt_requested())
        return err_interrupted();
    int rc = check_utf8(s, n, r->line);
    if (rc < 0)
        return rc;
    if (has_nul_escape(s, n))
        return err_set(ERR_UNSUPPORTED, "line %zu: a string holds \\u0000, which is not supported", r->line);
    char name[32];
    snprintf(name, sizeof name, "line %zu", r->line);
    struct json_doc *doc;
    rc = json_parse(&doc, s, n, name);
    if (!rc)
        rc = read_object(r, json_root(doc));
    json_free(doc);
    return rc;
}

/* --- bytes ---------------------------------------------------------------------------------------------------- */

static int keep(struct reader *r, const char *s, size_t n)
{
    if (n > max_document_bytes - r->rest.len)
        return err_set(ERR_FORMAT, "line %zu: a %s has more than %zu bytes", r->line + 1,
                       r->by_line ? "line" : "document", max_document_bytes);
    text_append(&r->rest, s, n);
    return text_finish(&r->rest);
}

static int push(struct reader *r, const char *s, size_t n)
{
    r->pushed += n;
    if (r->pushed > r->max_bytes)
        return err_set(ERR_FORMAT, "has more than %llu bytes of text", (unsigned long long)r->max_bytes);
    int rc = 0;
    const char *end = NULL;
    for (; !rc && r->by_line && (end = memchr(s, '\n', n)); n -= (size_t)(end + 1 - s), s = end + 1) {
        const size_t len = (size_t)(end - s);
        if (!r->rest.len && len <= max_document_bytes) {
            rc = add_line(r, s, len);
            continue;
        }
        rc = keep(r, s, len);
        if (!rc)
            rc = add_line(r, r->rest.data, r->rest.len);
        r->rest.len = 0;
    }
    return rc || !n ? rc : keep(r, s, n);
}

/* After the last piece. */
static int finish(struct reader *r)
{
    if (r->by_line)
        return r->rest.len ? add_line(r, r->rest.data, r->rest.len) : 0;
    text_add(&r->rest, "");
    if (text_finish(&r->rest) < 0)
        return ERR_MEMORY;
    char *text = r->rest.data;
    const size_t mark = mark_bytes(text, r->rest.len), n = r->rest.len - mark;
    const int rc = check_utf8(text + mark, n, 1);
    if (rc < 0)
        return rc;
    memmove(text, text + mark, n + 1);
    r->rest = (struct text){0};
    return add_document(r, (struct document){.text = text, .len = n, .line = 1});
}

/* Frames one after another, as `zstd -d` reads them. The window is at most 128 MiB, libzstd's own limit. */
static int push_compressed(struct reader *r, const void *data, size_t len)
{
    const size_t room = ZSTD_DStreamOutSize();
    ZSTD_DCtx *z = ZSTD_createDCtx();
    char *buffer = mem_alloc(room, 1, "decompressed text");
    int rc = z && buffer ? 0 : err_set(ERR_MEMORY, "no memory to decompress");
    ZSTD_inBuffer in = {data, len, 0};
    size_t left = 1;                  /* 0 at the end of a frame */
    while (!rc && in.pos < in.size) { /* the last byte of a frame is taken when all of its text is out */
        ZSTD_outBuffer piece = {buffer, room, 0};
        left = ZSTD_decompressStream(z, &piece, &in);
        if (ZSTD_isError(left))
            rc = err_set(ERR_FORMAT, "not zstd, or damaged, near byte %zu of %zu: %s", in.pos, len,
                         ZSTD_getErrorName(left));
        else if (err_interrupt_requested())
            rc = err_interrupted();
        else
            rc = push(r, buffer, piece.pos);
    }
    if (!rc && left)
        rc = err_set(ERR_FORMAT, "is cut short: %zu bytes end inside a zstd frame", len);
    free(buffer);
    ZSTD_freeDCtx(z);
    return rc;
}

int documents_parse(struct documents *out, const void *data, size_t len, const char *name,
                    enum chat_format chat, uint64_t max_bytes)
{
    *out = (struct documents){.chat = chat};
    const bool compressed = text_ends_with(name, ".zst");
    const bool by_line = text_ends_with(name, ".jsonl") || text_ends_with(name, ".jsonl.zst");
    if (!by_line && !text_ends_with(name, ".txt") && !text_ends_with(name, ".txt.zst"))
        return err_set(ERR_USAGE, "%s: expected a file that ends in .txt, .jsonl, .txt.zst or .jsonl.zst",
                       name);
    struct reader r = {.out = out, .chat = chat, .by_line = by_line, .max_bytes = max_bytes};
    int rc = compressed ? push_compressed(&r, data, len) : len ? push(&r, data, len) : 0;
    if (!rc)
        rc = finish(&r);
    text_free(&r.rest);
    if (rc < 0) {
        documents_free(out);
        return rc == ERR_INTERRUPTED ? rc : err_context(rc, "%s", name);
    }
    return 0;
}

int documents_read(struct documents *out, const char *path, enum chat_format chat)
{
    *out = (struct documents){0};
    if (!strcmp(path, DOCUMENTS_BUILTIN)) {
        size_t len;
        const void *mixture = builtin_calibration(&len);
        return documents_parse(out, mixture, len, DOCUMENTS_BUILTIN ".jsonl.zst", chat, DOCUMENTS_MAX_BYTES);
    }
    struct file_map map;
    int rc = file_map_open(&map, path);
    if (rc < 0)
        return rc;
    rc = documents_parse(out, map.data, map.bytes, path, chat, DOCUMENTS_MAX_BYTES);
    file_map_close(&map);
    return rc;
}

void documents_free(struct documents *d)
{
    for (size_t i = 0; i < d->n; i++)
        free(d->list[i].text);
    free(d->list);
    *d = (struct documents){0};
}

#include "base/text.h"

#include "base/err.h"
#include "base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void text_append(struct text *t, const char *s, size_t n)
{
    if (t->failed || mem_grow(&t->data, &t->capacity, t->len + n + 1, 1, "text") < 0) {
        t->failed = true;
        return;
    }
    if (n)
        memcpy(t->data + t->len, s, n);
    t->len += n;
    t->data[t->len] = '\0';
}

void text_add(struct text *t, const char *s)
{
    text_append(t, s, strlen(s));
}

void text_printf(struct text *t, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    const int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (n < 0 || t->failed || mem_grow(&t->data, &t->capacity, t->len + (size_t)n + 1, 1, "text") < 0) {
        t->failed = true;
        return;
    }
    va_start(args, fmt);
    vsnprintf(t->data + t->len, (size_t)n + 1, fmt, args);
    va_end(args);
    t->len += (size_t)n;
}

void text_free(struct text *t)
{
    free(t->data);
    *t = (struct text){0};
}

bool text_ends_with(const char *s, const char *suffix)
{
    const size_t n = strlen(s), m = strlen(suffix);
    return n >= m && !strcmp(s + n - m, suffix);
}

int text_finish(struct text *t)
{
    if (!t->failed)
        text_append(t, "", 0); /* an empty text is still a string */
    return t->failed ? err_set(ERR_MEMORY, "out of memory for %zu bytes of text", t->len) : 0;
}

static void new_line(struct text *t)
{
    if (!t->indent)
        return;
    text_add(t, "\n");
    for (int i = 0; i < t->depth * t->indent; i++)
        text_append(t, " ", 1);
}

/* What stands before a value or key: nothing after a key, else a comma where needed and the line break. */
static void separate(struct text *t)
{
    if (t->after_key) {
        t->after_key = false;
        return;
    }
    if (t->depth == 0)
        return;
    const uint64_t bit = 1ull << t->depth;
    if (t->has_member & bit)
        text_add(t, t->indent ? "," : ", ");
    t->has_member |= bit;
    new_line(t);
}

static void begin(struct text *t, const char *bracket)
{
    separate(t);
    text_add(t, bracket);
    t->depth++;
    CHECK(t->depth < 64);
    t->has_member &= ~(1ull << t->depth);
}

static void end(struct text *t, const char *bracket)
{
    CHECK(t->depth > 0 && !t->after_key);
    const bool had = t->has_member >> t->depth & 1;
    t->depth--;
    if (had)
        new_line(t);
    text_add(t, bracket);
}

void json_begin_object(struct text *t)
{
    begin(t, "{");
}

void json_end_object(struct text *t)
{
    end(t, "}");
}

void json_begin_array(struct text *t)
{
    begin(t, "[");
}

void json_end_array(struct text *t)
{
    end(t, "]");
}

static void quoted(struct text *t, const char *s)
{
    text_add(t, "\"");
    const char *run = s;
    for (; *s; s++) {
        const unsigned char c = (unsigned char)*s;
        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        text_append(t, run, (size_t)(s - run));
        run = s + 1;
        if (c == '\n')
            text_add(t, "\\n");
        else if (c == '"' || c == '\\')
            text_printf(t, "\\%c", c);
        else
            text_printf(t, "\\u%04x", c);
    }
    text_append(t, run, (size_t)(s - run));
    text_add(t, "\"");
}

void json_put_key(struct text *t, const char *key)
{
    separate(t);
    quoted(t, key);
    text_add(t, ": ");
    t->after_key = true;
}

void json_put_string(struct text *t, const char *s)
{
    separate(t);
    if (s)
        quoted(t, s);
    else
        text_add(t, "null");
}

void json_put_int(struct text *t, int64_t v)
{
    separate(t);
    text_printf(t, "%" PRId64, v);
}

void json_put_uint(struct text *t, uint64_t v)
{
    separate(t);
    text_printf(t, "%" PRIu64, v);
}

void json_put_double(struct text *t, double v)
{
    separate(t);
    if (!isfinite(v)) {
        text_add(t, "null");
        return;
    }
    char s[40];
    int digits = 6;
    do {
        snprintf(s, sizeof s, "%.*g", digits, v);
    } while (strtod(s, NULL) != v && ++digits <= 17);
    text_add(t, s);
}

void json_put_bool(struct text *t, bool v)
{
    separate(t);
    text_add(t, v ? "true" : "false");
}

void json_put_null(struct text *t)
{
    separate(t);
    text_add(t, "null");
}

void json_put_raw(struct text *t, const char *json, size_t n)
{
    separate(t);
    text_append(t, json, n);
}

void json_kv_string(struct text *t, const char *key, const char *s)
{
    json_put_key(t, key);
    json_put_string(t, s);
}

void json_kv_int(struct text *t, const char *key, int64_t v)
{
    json_put_key(t, key);
    json_put_int(t, v);
}

void json_kv_uint(struct text *t, const char *key, uint64_t v)
{
    json_put_key(t, key);
    json_put_uint(t, v);
}

void json_kv_double(struct text *t, const char *key, double v)
{
    json_put_key(t, key);
    json_put_double(t, v);
}

void json_kv_bool(struct text *t, const char *key, bool v)
{
    json_put_key(t, key);
    json_put_bool(t, v);
}

const char *text_bytes(uint64_t bytes, char out[32])
{
    if (bytes < 1u << 10)
        snprintf(out, 32, "%u bytes", (unsigned)bytes);
    else if (bytes < 1u << 20)
        snprintf(out, 32, "%.1f KiB", (double)bytes / 0x1p10);
    else if (bytes < 1u << 30)
        snprintf(out, 32, "%.1f MiB", (double)bytes / 0x1p20);
    else
        snprintf(out, 32, "%.2f GiB", (double)bytes / 0x1p30);
    return out;
}

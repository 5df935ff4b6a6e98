/* A growing piece of text, and a JSON emitter on top of it. Allocation failures are sticky: appending to a
 * failed text does nothing, and text_finish() reports it once. */
#ifndef GEMCUT_BASE_TEXT_H
#define GEMCUT_BASE_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct text {
    char *data; /* NUL-terminated once something was appended */
    size_t len, capacity;
    bool failed;
    /* JSON state: one bit a level, set when the level already has a member */
    uint64_t has_member;
    int depth, indent; /* indent: spaces a level, 0 = one line */
    bool after_key;
};

void text_append(struct text *t, const char *s, size_t n);
void text_add(struct text *t, const char *s);
void text_printf(struct text *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void text_free(struct text *t);

/* Whether s ends with suffix; equal strings do. */
bool text_ends_with(const char *s, const char *suffix);

/* 0, or ERR_MEMORY when any append failed. The caller then owns t->data until text_free. */
int text_finish(struct text *t);

/* JSON. Keys are given before values inside objects; commas, indentation and escapes are written here. Numbers
 * are exact: integers in full, doubles in the shortest form that reads back equal, non-finite ones as null. */
void json_begin_object(struct text *t);
void json_end_object(struct text *t);
void json_begin_array(struct text *t);
void json_end_array(struct text *t);
void json_put_key(struct text *t, const char *key);
void json_put_string(struct text *t, const char *s); /* NULL → null */
void json_put_int(struct text *t, int64_t v);
void json_put_uint(struct text *t, uint64_t v);
void json_put_double(struct text *t, double v);
void json_put_bool(struct text *t, bool v);
void json_put_null(struct text *t);
void json_put_raw(struct text *t, const char *json, size_t n); /* a value that is JSON already */

/* key and value at once */
void json_kv_string(struct text *t, const char *key, const char *s);
void json_kv_int(struct text *t, const char *key, int64_t v);
void json_kv_uint(struct text *t, const char *key, uint64_t v);
void json_kv_double(struct text *t, const char *key, double v);
void json_kv_bool(struct text *t, const char *key, bool v);

/* A number of bytes for a message: "12 bytes", "3.5 MiB", "20.00 GiB". Returns out. */
const char *text_bytes(uint64_t bytes, char out[32]);

#endif

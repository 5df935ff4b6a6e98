/* Reading JSON: typed getters over cJSON that say which member of which file is wrong. json.c alone includes
 * cJSON.h. Values are small handles into a document and live as long as it does. Keyed look-ups walk the
 * siblings: for large objects iterate with json_first/json_next instead. Writing JSON: base/text.h. */
#ifndef GEMCUT_BASE_JSON_H
#define GEMCUT_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cJSON;
struct json_doc;

struct json {
    const struct json_doc *doc;
    const struct cJSON *node; /* NULL: absent */
};

/* Parses text[0..len). `name` is what error messages call the document. Trailing non-space is an error. */
int json_parse(struct json_doc **out, const char *text, size_t len, const char *name);

/* Reads and parses a file of at most max_bytes. */
int json_load(struct json_doc **out, const char *path, size_t max_bytes);

void json_free(struct json_doc *doc);
struct json json_root(const struct json_doc *doc);

/* Where `v` stands, for messages, e.g. "text_config.layer_types[3]". Valid until the next call on this thread. */
const char *json_path(struct json v);

/* Records "NAME: 'PATH' WHAT" as ERR_FORMAT. */
int json_error(struct json v, const char *what, ...) __attribute__((format(printf, 2, 3)));

bool json_exists(struct json v); /* present and not null */
bool json_is_object(struct json v);
bool json_is_array(struct json v);
bool json_is_string(struct json v);
bool json_is_number(struct json v);
bool json_is_bool(struct json v);

/* Member `key` of an object; absent when obj is not an object or has no such member. */
struct json json_member(struct json obj, const char *key);

/* Iteration over the members of an object or array in file order; absent at the end. */
struct json json_first(struct json container);
struct json json_next(struct json v);
const char *json_key(struct json v); /* "" in arrays */
size_t json_count(struct json container);

/* Values of a node itself. Bounds are inclusive. Integers must be exactly representable. */
int json_as_int(struct json v, int64_t min, int64_t max, int64_t *out);
int json_as_double(struct json v, double *out);
int json_as_bool(struct json v, bool *out);
int json_as_string(struct json v, const char **out);

/* Required members. */
int json_get_int(struct json obj, const char *key, int64_t min, int64_t max, int64_t *out);
int json_get_double(struct json obj, const char *key, double *out);
int json_get_string(struct json obj, const char *key, const char **out);
int json_get_object(struct json obj, const char *key, struct json *out);
int json_get_array(struct json obj, const char *key, struct json *out);

/* Optional members: `fallback` when absent or null, an error when of the wrong type. */
int json_opt_int(struct json obj, const char *key, int64_t min, int64_t max, int64_t fallback, int64_t *out);
int json_opt_double(struct json obj, const char *key, double fallback, double *out);
int json_opt_bool(struct json obj, const char *key, bool fallback, bool *out);
int json_opt_string(struct json obj, const char *key, const char *fallback, const char **out);

/* Just past the string (from its opening quote) or the value that begins at s, in text that has been parsed: for those who
 * copy text as it stands. */
const char *json_skip_string(const char *s);
const char *json_skip_value(const char *s);

#endif

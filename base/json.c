#include "base/json.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct json_doc {
    char *name;
    cJSON *root;
};

/* Where a byte stands that no JSON text has, or len. cJSON skips a byte order mark and every control byte as if
 * it were space, and takes a NUL for the end of the text. */
static size_t find_foreign(const char *text, size_t len)
{
    if (len >= 3 && !memcmp(text, "\xef\xbb\xbf", 3))
        return 0;
    size_t i = 0;
    while (i < len &&
           ((unsigned char)text[i] >= 0x20 || text[i] == '\t' || text[i] == '\n' || text[i] == '\r'))
        i++;
    return i;
}

int json_parse(struct json_doc **out, const char *text, size_t len, const char *name)
{
    *out = NULL;
    const size_t foreign = find_foreign(text, len);
    if (foreign < len)
        return err_set(ERR_FORMAT, "%s: not JSON: byte 0x%02x at offset %zu", name,
                       (unsigned char)text[foreign], foreign);
    const char *end = NULL;
    cJSON *root = cJSON_ParseWithLengthOpts(text, len, &end, 0);
    size_t at = end ? (size_t)(end - text) : 0;
    if (root)
        while (at < len && strchr(" \t\r\n", text[at]))
            at++;
    if (!root || at < len) {
        cJSON_Delete(root);
        return err_set(ERR_FORMAT, "%s: not JSON: unexpected text at byte %zu of %zu", name, at, len);
    }
    struct json_doc *doc = mem_alloc(1, sizeof *doc, "a JSON document");
    char *copy = mem_strdup(name);
    if (!doc || !copy) {
        free(doc);
        free(copy);
        cJSON_Delete(root);
        return ERR_MEMORY;
    }
    *doc = (struct json_doc){.name = copy, .root = root};
    *out = doc;
    return 0;
}

int json_load(struct json_doc **out, const char *path, size_t max_bytes)
{
    *out = NULL;
    char *text;
    size_t len;
    int rc = file_read(path, max_bytes, &text, &len);
    if (rc < 0)
        return rc;
    rc = json_parse(out, text, len, path);
    free(text);
    return rc;
}

void json_free(struct json_doc *doc)
{
    if (!doc)
        return;
    cJSON_Delete(doc->root);
    free(doc->name);
    free(doc);
}

struct json json_root(const struct json_doc *doc)
{
    return (struct json){doc, doc->root};
}

/* Writes the path from `at` to `target` into buf; false when target is not below. cJSON keeps no parents, so
 * errors pay for a search. */
static bool find_path(const cJSON *at, const cJSON *target, char *buf, size_t len, size_t size)
{
    if (at == target)
        return true;
    size_t index = 0;
    for (const cJSON *c = at->child; c; c = c->next, index++) {
        int n = cJSON_IsArray(at) ? snprintf(buf + len, size - len, "[%zu]", index)
                                  : snprintf(buf + len, size - len, "%s%s", len ? "." : "", c->string);
        if (n < 0)
            return false;
        const size_t next = len + (size_t)n < size ? len + (size_t)n : size - 1;
        if (find_path(c, target, buf, next, size))
            return true;
    }
    buf[len] = '\0';
    return false;
}

const char *json_path(struct json v)
{
    static _Thread_local char path[512];
    path[0] = '\0';
    if (v.node)
        find_path(v.doc->root, v.node, path, 0, sizeof path);
    return path[0] ? path : "the top level";
}

int json_error(struct json v, const char *what, ...)
{
    char text[512];
    va_list args;
    va_start(args, what);
    vsnprintf(text, sizeof text, what, args);
    va_end(args);
    return err_set(ERR_FORMAT, "%s: '%s' %s", v.doc->name, json_path(v), text);
}

bool json_exists(struct json v)
{
    return v.node && !cJSON_IsNull(v.node);
}

bool json_is_object(struct json v)
{
    return v.node && cJSON_IsObject(v.node);
}

bool json_is_array(struct json v)
{
    return v.node && cJSON_IsArray(v.node);
}

bool json_is_string(struct json v)
{
    return v.node && cJSON_IsString(v.node);
}

bool json_is_number(struct json v)
{
    return v.node && cJSON_IsNumber(v.node);
}

bool json_is_bool(struct json v)
{
    return v.node && cJSON_IsBool(v.node);
}

struct json json_member(struct json obj, const char *key)
{
    return (struct json){obj.doc, obj.node && cJSON_IsObject(obj.node)
                                      ? cJSON_GetObjectItemCaseSensitive(obj.node, key)
                                      : NULL};
}

struct json json_first(struct json container)
{
    return (struct json){container.doc, container.node ? container.node->child : NULL};
}

struct json json_next(struct json v)
{
    return (struct json){v.doc, v.node->next};
}

const char *json_key(struct json v)
{
    return v.node && v.node->string ? v.node->string : "";
}

size_t json_count(struct json container)
{
    return container.node ? (size_t)cJSON_GetArraySize(container.node) : 0;
}

int json_as_int(struct json v, int64_t min, int64_t max, int64_t *out)
{
    /* 2^53 − 1: beyond it a double no longer tells neighbours apart */
    const double exact = 9007199254740991.0;
    if (!json_is_number(v))
        return json_error(v, "is not a number");
    const double d = v.node->valuedouble;
    if (!(d >= -exact && d <= exact) || d != floor(d))
        return json_error(v, "is %.17g, expected an integer", d);
    const int64_t i = (int64_t)d;
    if (i < min || i > max)
        return json_error(v, "is %" PRId64 ", expected %" PRId64 " … %" PRId64, i, min, max);
    *out = i;
    return 0;
}

int json_as_double(struct json v, double *out)
{
    if (!json_is_number(v) || !isfinite(v.node->valuedouble))
        return json_error(v, "is not a finite number");
    *out = v.node->valuedouble;
    return 0;
}

int json_as_bool(struct json v, bool *out)
{
    if (!json_is_bool(v))
        return json_error(v, "is not true or false");
    *out = cJSON_IsTrue(v.node);
    return 0;
}

int json_as_string(struct json v, const char **out)
{
    if (!json_is_string(v))
        return json_error(v, "is not a string");
    *out = v.node->valuestring;
    return 0;
}

static int required(struct json obj, const char *key, struct json *out)
{
    if (!json_is_object(obj))
        return json_error(obj, "is not an object");
    *out = json_member(obj, key);
    if (!json_exists(*out))
        return json_error(obj, "has no member '%s'", key);
    return 0;
}

int json_get_int(struct json obj, const char *key, int64_t min, int64_t max, int64_t *out)
{
    struct json v;
    const int rc = required(obj, key, &v);
    return rc < 0 ? rc : json_as_int(v, min, max, out);
}

int json_get_double(struct json obj, const char *key, double *out)
{
    struct json v;
    const int rc = required(obj, key, &v);
    return rc < 0 ? rc : json_as_double(v, out);
}

int json_get_string(struct json obj, const char *key, const char **out)
{
    struct json v;
    const int rc = required(obj, key, &v);
    return rc < 0 ? rc : json_as_string(v, out);
}

int json_get_object(struct json obj, const char *key, struct json *out)
{
    const int rc = required(obj, key, out);
    if (rc < 0)
        return rc;
    return json_is_object(*out) ? 0 : json_error(*out, "is not an object");
}

int json_get_array(struct json obj, const char *key, struct json *out)
{
    const int rc = required(obj, key, out);
    if (rc < 0)
        return rc;
    return json_is_array(*out) ? 0 : json_error(*out, "is not an array");
}

int json_opt_int(struct json obj, const char *key, int64_t min, int64_t max, int64_t fallback, int64_t *out)
{
    const struct json v = json_member(obj, key);
    *out = fallback;
    return json_exists(v) ? json_as_int(v, min, max, out) : 0;
}

int json_opt_double(struct json obj, const char *key, double fallback, double *out)
{
    const struct json v = json_member(obj, key);
    *out = fallback;
    return json_exists(v) ? json_as_double(v, out) : 0;
}

int json_opt_bool(struct json obj, const char *key, bool fallback, bool *out)
{
    const struct json v = json_member(obj, key);
    *out = fallback;
    return json_exists(v) ? json_as_bool(v, out) : 0;
}

int json_opt_string(struct json obj, const char *key, const char *fallback, const char **out)
{
    const struct json v = json_member(obj, key);
    *out = fallback;
    return json_exists(v) ? json_as_string(v, out) : 0;
}

/* --- text ----------------------------------------------------------------------------------------------------- */

const char *json_skip_string(const char *s)
{
    for (s++; *s != '"'; s++)
        if (*s == '\\')
            s++;
    return s + 1;
}

const char *json_skip_value(const char *s)
{
    int depth = 0;
    if (*s == '"')
        return json_skip_string(s);
    if (*s != '{' && *s != '[')
        return s + strcspn(s, ",}] \t\r\n");
    do {
        if (*s == '"') {
            s = json_skip_string(s);
            continue;
        }
        depth += (*s == '{' || *s == '[') - (*s == '}' || *s == ']');
        s++;
    } while (depth > 0);
    return s;
}

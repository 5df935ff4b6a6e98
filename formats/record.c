#include "formats/record.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static const size_t max_record_bytes = 256u << 20;

static int read_hash(struct json v, struct hash128 *out)
{
    const char *hex;
    const int rc = json_as_string(v, &hex);
    if (rc < 0)
        return rc;
    return hash_from_hex(hex, out) < 0 ? json_error(v, "is not a hash of 32 hexadecimal digits") : 0;
}

/* Reads an object of hashes, or (member != NULL) of objects that have a hash under that key. */
static int read_map(struct json root, const char *key, const char *member, struct record_map *map)
{
    struct json object;
    int rc = json_get_object(root, key, &object);
    if (rc < 0)
        return rc;
    const size_t n = json_count(object);
    map->entries = mem_alloc(n, sizeof *map->entries, RECORD_NAME);
    if (!map->entries || name_table_init(&map->by_name, n) < 0)
        return ERR_MEMORY;
    for (struct json e = json_first(object); e.node; e = json_next(e)) {
        struct record_entry *entry = &map->entries[map->n];
        entry->name = json_key(e);
        rc = read_hash(member ? json_member(e, member) : e, &entry->hash);
        if (!rc)
            rc = name_table_add(&map->by_name, entry->name, map->n++);
        if (rc == 1)
            rc = json_error(e, "appears twice");
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int read_record(struct record *r)
{
    const struct json root = json_root(r->doc);
    const char *schema;
    int rc = json_get_string(root, "schema", &schema);
    if (!rc && strcmp(schema, RECORD_SCHEMA))
        rc = json_error(json_member(root, "schema"), "is '%s', expected '%s'", schema, RECORD_SCHEMA);
    if (!rc)
        rc = json_get_string(root, "version", &r->version);
    if (!rc)
        rc = json_get_object(root, "recipe", &r->recipe);
    if (!rc)
        rc = read_map(root, "tensors", NULL, &r->tensors);
    if (!rc)
        rc = read_map(root, "linears", "source", &r->sources);
    if (!rc)
        rc = read_map(root, "files", NULL, &r->files);
    return rc;
}

int record_open(struct record *r, const char *folder, bool *found)
{
    *r = (struct record){0};
    *found = false;
    char *path = file_join(folder, RECORD_NAME);
    if (!path)
        return ERR_MEMORY;
    int rc = 0;
    if (file_exists(path)) {
        rc = json_load(&r->doc, path, max_record_bytes);
        if (!rc)
            rc = read_record(r);
        *found = !rc;
    }
    free(path);
    if (rc < 0)
        record_close(r);
    return rc;
}

static void free_map(struct record_map *map)
{
    name_table_free(&map->by_name);
    free(map->entries);
}

void record_close(struct record *r)
{
    free_map(&r->tensors);
    free_map(&r->sources);
    free_map(&r->files);
    json_free(r->doc);
    *r = (struct record){0};
}

static bool is_origin(const char *key)
{
    static const char *const others[] = {"converted", "tensors", "files"};
    bool origin = true;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        origin &= strcmp(key, others[i]) != 0;
    return origin;
}

/* The members of the text and of the document are the same ones, in the same order. */
static void copy_members(const char *text, struct json root, struct text *out)
{
    const char *s = text + strspn(text, " \t\r\n") + 1;
    for (struct json m = json_first(root); m.node; m = json_next(m)) {
        const char *colon = json_skip_string(s + strspn(s, ", \t\r\n"));
        const char *value = colon + strspn(colon, ": \t\r\n");
        s = json_skip_value(value);
        if (!is_origin(json_key(m)))
            continue;
        json_put_key(out, json_key(m));
        json_put_raw(out, value, (size_t)(s - value));
    }
}

int record_copy_origin(const char *folder, struct text *out)
{
    char *path = file_join(folder, RECORD_NAME), *text = NULL;
    struct json_doc *doc = NULL;
    size_t len;
    int rc = path ? file_read(path, max_record_bytes, &text, &len) : ERR_MEMORY;
    if (!rc)
        rc = json_parse(&doc, text, len, path);
    if (!rc && !json_is_object(json_root(doc)))
        rc = err_set(ERR_FORMAT, "%s: is not an object", path);
    if (!rc)
        copy_members(text, json_root(doc), out);
    json_free(doc);
    free(text);
    free(path);
    return rc;
}

const struct hash128 *record_find(const struct record_map *map, const char *name)
{
    size_t i;
    return name_table_find(&map->by_name, name, &i) ? &map->entries[i].hash : NULL;
}

int record_hash_file(const char *path, struct hash128 *out)
{
    struct file_map map;
    const int rc = file_map_open(&map, path);
    if (rc < 0)
        return rc;
    *out = hash_bytes(map.data ? map.data : "", map.bytes);
    file_map_close(&map);
    return 0;
}

/* gemcut.json, the record that a cut carries beside config.json: what was asked for, what it was made from, and
 * a hash of everything that was written. It holds nothing of the run itself (no times, host, paths, threads), so
 * that the same request gives the same bytes. */
#ifndef GEMCUT_FORMATS_RECORD_H
#define GEMCUT_FORMATS_RECORD_H

#include "base/hash.h"
#include "base/json.h"
#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>

#define RECORD_NAME   "gemcut.json"
#define RECORD_SCHEMA "gemcut.cut/1"

/* name → hash */
struct record_entry {
    const char *name;
    struct hash128 hash;
};

struct record_map {
    struct record_entry *entries;
    size_t n;
    struct name_table by_name;
};

/* A record as it was read. */
struct record {
    struct json_doc *doc;
    const char *version;
    struct json recipe;        /* object */
    struct record_map tensors; /* every tensor of the checkpoint */
    struct record_map sources; /* module of each quantized linear → its source weight */
    struct record_map files;   /* config.json, tokenizer.json and the other files beside */
};

/* Reads folder/gemcut.json. When there is none: 0 and *found = false. */
int record_open(struct record *out, const char *folder, bool *found);
void record_close(struct record *r);

/* Appends to the object that is being written in *out what folder/gemcut.json says of how its codes came about: every
 * member but "converted", "tensors" and "files", as it stands. */
int record_copy_origin(const char *folder, struct text *out);

/* NULL when the name is not recorded. */
const struct hash128 *record_find(const struct record_map *map, const char *name);

/* The hash of a whole file, as record.files holds it. */
int record_hash_file(const char *path, struct hash128 *out);

#endif

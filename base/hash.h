/* Hashes and name tables. Content hashes are XXH3-128 (libxxhash): fast enough to run over every byte; they
 * guard against damage and mix-ups, not against an adversary. */
#ifndef GEMCUT_BASE_HASH_H
#define GEMCUT_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct hash128 {
    uint8_t bytes[16]; /* canonical (big-endian) form */
};

struct hash128 hash_bytes(const void *data, size_t n);
bool hash_equal(struct hash128 a, struct hash128 b);

enum { HASH_HEX_BYTES = 33 };
void hash_to_hex(struct hash128 h, char hex[HASH_HEX_BYTES]);
int hash_from_hex(const char *hex, struct hash128 *out); /* 0, or -1 when it is not 32 hex digits */

/* Names → indices. The table keeps pointers to the names, which must outlive it. */
struct name_table {
    const char **names;
    size_t *values;
    size_t n, slots; /* slots: a power of two */
};

int name_table_init(struct name_table *t, size_t n_expected);
void name_table_free(struct name_table *t);

/* 0 when added; 1 when the name was there already (nothing changes); ERR_MEMORY. */
int name_table_add(struct name_table *t, const char *name, size_t value);

/* True and *value when the name is in the table. */
bool name_table_find(const struct name_table *t, const char *name, size_t *value);

#endif

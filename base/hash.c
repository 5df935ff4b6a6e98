#include "base/hash.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

struct hash128 hash_bytes(const void *data, size_t n)
{
    XXH128_canonical_t c;
    XXH128_canonicalFromHash(&c, XXH3_128bits(data, n));
    struct hash128 h;
    memcpy(h.bytes, c.digest, sizeof h.bytes);
    return h;
}

bool hash_equal(struct hash128 a, struct hash128 b)
{
    return !memcmp(a.bytes, b.bytes, sizeof a.bytes);
}

void hash_to_hex(struct hash128 h, char hex[HASH_HEX_BYTES])
{
    for (size_t i = 0; i < sizeof h.bytes; i++) {
        hex[2 * i] = "0123456789abcdef"[h.bytes[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[h.bytes[i] & 15];
    }
    hex[32] = '\0';
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int hash_from_hex(const char *hex, struct hash128 *out)
{
    if (strlen(hex) != 32)
        return -1;
    for (int i = 0; i < 16; i++) {
        const int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);
        if (high < 0 || low < 0)
            return -1;
        out->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return 0;
}

int name_table_init(struct name_table *t, size_t n_expected)
{
    *t = (struct name_table){.slots = 16};
    while (t->slots < 2 * n_expected)
        t->slots *= 2;
    t->names = mem_alloc(t->slots, sizeof *t->names, "a name table");
    t->values = mem_alloc(t->slots, sizeof *t->values, "a name table");
    if (t->names && t->values)
        return 0;
    name_table_free(t);
    return ERR_MEMORY;
}

void name_table_free(struct name_table *t)
{
    free(t->names);
    free(t->values);
    *t = (struct name_table){0};
}

/* The slot that holds the name, or the empty one where it belongs. */
static size_t find_slot(const struct name_table *t, const char *name)
{
    size_t i = (size_t)XXH3_64bits(name, strlen(name)) & (t->slots - 1);
    while (t->names[i] && strcmp(t->names[i], name))
        i = (i + 1) & (t->slots - 1);
    return i;
}

static int grow(struct name_table *t)
{
    struct name_table bigger;
    const int rc = name_table_init(&bigger, t->slots);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < t->slots; i++) {
        if (!t->names[i])
            continue;
        const size_t at = find_slot(&bigger, t->names[i]);
        bigger.names[at] = t->names[i];
        bigger.values[at] = t->values[i];
    }
    bigger.n = t->n;
    name_table_free(t);
    *t = bigger;
    return 0;
}

int name_table_add(struct name_table *t, const char *name, size_t value)
{
    if (2 * (t->n + 1) > t->slots) {
        const int rc = grow(t);
        if (rc < 0)
            return rc;
    }
    const size_t at = find_slot(t, name);
    if (t->names[at])
        return 1;
    t->names[at] = name;
    t->values[at] = value;
    t->n++;
    return 0;
}

bool name_table_find(const struct name_table *t, const char *name, size_t *value)
{
    if (!t->slots)
        return false;
    const size_t at = find_slot(t, name);
    if (!t->names[at])
        return false;
    *value = t->values[at];
    return true;
}

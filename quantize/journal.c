#include "quantize/journal.h"

#include "base/err.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/text.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char schema[] = "gemcut.journal/1";
static const size_t max_bytes = 256u << 20;
static const int64_t max_count = (int64_t)1 << 53; /* that JSON numbers hold exactly */

struct line {
    char *name;
    struct journal_entry entry;
};

struct journal {
    char *path;
    int fd;
    uint64_t at; /* where the next line begins */
    struct line *lines;
    size_t n, capacity;
};

/* --- writing ---------------------------------------------------------------------------------------------------- */

static void put_hash(struct text *t, const char *key, struct hash128 hash)
{
    char hex[HASH_HEX_BYTES];
    hash_to_hex(hash, hex);
    json_kv_string(t, key, hex);
}

static int append(struct journal *j, struct text *line)
{
    text_add(line, "\n");
    int rc = text_finish(line);
    if (!rc)
        rc = file_pwrite(j->fd, line->data, line->len, j->at, j->path);
    if (!rc)
        j->at += line->len;
    text_free(line);
    return rc;
}

static void write_key(struct text *t, const struct journal_key *key)
{
    json_begin_object(t);
    json_kv_string(t, "schema", schema);
    json_kv_string(t, "version", key->version);
    json_kv_string(t, "backend", key->backend);
    json_kv_string(t, "recipe", key->recipe);
    put_hash(t, "source", key->source);
    put_hash(t, "ids", key->ids);
    json_end_object(t);
}

static int remember(struct journal *j, const char *name, const struct journal_entry *entry)
{
    const int rc = mem_grow(&j->lines, &j->capacity, j->n + 1, sizeof *j->lines, "the journal");
    if (rc < 0)
        return rc;
    j->lines[j->n] = (struct line){mem_strdup(name), *entry};
    return j->lines[j->n].name ? (j->n++, 0) : ERR_MEMORY;
}

int journal_add(struct journal *j, const char *name, const struct journal_entry *e)
{
    struct text t = {0};
    json_begin_object(&t);
    json_kv_string(&t, "linear", name);
    put_hash(&t, "source", e->source);
    put_hash(&t, "packed", e->packed);
    put_hash(&t, "scales", e->scales);
    put_hash(&t, "zeros", e->zeros);
    json_kv_double(&t, "nearest_error", e->stats.nearest_error);
    json_kv_double(&t, "error", e->stats.error);
    json_kv_double(&t, "weight_error", e->stats.weight_error);
    json_kv_double(&t, "damping", e->stats.damping);
    json_kv_double(&t, "clipped", e->stats.clipped);
    json_kv_int(&t, "dead", e->stats.n_dead);
    json_kv_int(&t, "tokens", e->stats.n_tokens);
    json_kv_double(&t, "loss_first", e->tuned.first);
    json_kv_double(&t, "loss_last", e->tuned.last);
    json_kv_int(&t, "loss_kept", e->tuned.kept);
    json_kv_int(&t, "nonfinite", e->n_nonfinite);
    json_end_object(&t);
    const int rc = remember(j, name, e);
    if (rc < 0)
        text_free(&t);
    return rc ? rc : append(j, &t);
}

/* --- reading ---------------------------------------------------------------------------------------------------- */

static int get_hash(struct json object, const char *key, struct hash128 *out)
{
    const char *hex;
    const int rc = json_get_string(object, key, &hex);
    if (rc < 0)
        return rc;
    return hash_from_hex(hex, out) < 0 ? json_error(json_member(object, key), "is not a hash") : 0;
}

static int read_entry(struct journal *j, struct json o)
{
    const char *name;
    struct journal_entry e = {0};
    struct gptq_stats *s = &e.stats;
    const struct {
        const char *key;
        double *to;
    } numbers[] = {{"nearest_error", &s->nearest_error},
                   {"error", &s->error},
                   {"weight_error", &s->weight_error},
                   {"damping", &s->damping},
                   {"clipped", &s->clipped},
                   {"loss_first", &e.tuned.first},
                   {"loss_last", &e.tuned.last}};
    int rc = json_get_string(o, "linear", &name);
    if (!rc)
        rc = get_hash(o, "source", &e.source);
    if (!rc)
        rc = get_hash(o, "packed", &e.packed);
    if (!rc)
        rc = get_hash(o, "scales", &e.scales);
    if (!rc)
        rc = get_hash(o, "zeros", &e.zeros);
    for (size_t i = 0; !rc && i < sizeof numbers / sizeof *numbers; i++)
        rc = json_get_double(o, numbers[i].key, numbers[i].to);
    if (!rc)
        rc = json_get_int(o, "dead", 0, max_count, &s->n_dead);
    if (!rc)
        rc = json_get_int(o, "tokens", 0, max_count, &s->n_tokens);
    if (!rc)
        rc = json_get_int(o, "loss_kept", 0, max_count, &e.tuned.kept);
    if (!rc)
        rc = json_get_int(o, "nonfinite", 0, max_count, &e.n_nonfinite);
    return rc ? rc : remember(j, name, &e);
}

static int differs(const struct journal *j, const char *what, const char *flag)
{
    return err_set(
        ERR_USAGE,
        "%s: the run that is to be resumed had another %s; %s, or leave out --resume to begin anew", j->path,
        what, flag);
}

static int check_key(const struct journal *j, struct json o, const struct journal_key *key)
{
    const char *name, *version, *backend, *recipe;
    struct hash128 source, ids;
    int rc = json_get_string(o, "schema", &name);
    if (!rc && strcmp(name, schema))
        rc = json_error(json_member(o, "schema"), "is '%s', expected '%s'", name, schema);
    if (!rc)
        rc = json_get_string(o, "version", &version);
    if (!rc)
        rc = json_get_string(o, "backend", &backend);
    if (!rc)
        rc = json_get_string(o, "recipe", &recipe);
    if (!rc)
        rc = get_hash(o, "source", &source);
    if (!rc)
        rc = get_hash(o, "ids", &ids);
    if (rc < 0)
        return rc;
    if (strcmp(version, key->version))
        return differs(j, "version of gemcut", "take that one");
    if (strcmp(backend, key->backend))
        return differs(j, "device", "name it with --device");
    if (!hash_equal(source, key->source))
        return differs(j, "model", "give that one");
    if (!hash_equal(ids, key->ids))
        return differs(j, "calibration text", "give the same text, samples, length, order and seed");
    return strcmp(recipe, key->recipe) ? differs(j, "recipe", "give the same flags") : 0;
}

/* Lines up to the first that is no whole object; text is NUL-terminated and overwritten. */
static int read_lines(struct journal *j, char *text, const struct journal_key *key)
{
    int rc = 0;
    bool first = true;
    for (char *line = text, *end; !rc && (end = strchr(line, '\n')); line = end + 1, first = false) {
        struct json_doc *doc;
        if (json_parse(&doc, line, (size_t)(end - line), j->path) < 0)
            return first ? ERR_FORMAT : 0;
        rc = first ? check_key(j, json_root(doc), key) : read_entry(j, json_root(doc));
        json_free(doc);
        if (rc == ERR_FORMAT && !first)
            return 0;
        if (!rc)
            j->at = (uint64_t)(end + 1 - text);
    }
    return rc;
}

static int read_all(struct journal *j, const struct journal_key *key)
{
    char *text;
    size_t len;
    int rc = file_read(j->path, max_bytes, &text, &len);
    if (rc < 0)
        return rc;
    rc = read_lines(j, text, key);
    free(text);
    return rc;
}

int journal_open(struct journal **out, const char *path, const struct journal_key *key, bool resume)
{
    *out = NULL;
    struct journal *j = mem_alloc(1, sizeof *j, "the journal");
    if (!j)
        return ERR_MEMORY;
    *j = (struct journal){.path = mem_strdup(path), .fd = -1};
    int rc = j->path ? 0 : ERR_MEMORY;
    if (!rc && resume && file_exists(path))
        rc = read_all(j, key);
    if (!rc && (j->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666)) < 0)
        rc = err_errno("%s", path);
    if (!rc && ftruncate(j->fd, (off_t)j->at) < 0)
        rc = err_errno("%s", path);
    if (!rc && !j->at) {
        struct text t = {0};
        write_key(&t, key);
        rc = append(j, &t);
    }
    if (rc < 0)
        journal_close(j);
    else
        *out = j;
    return rc;
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    if (j->fd >= 0)
        close(j->fd);
    for (size_t i = 0; i < j->n; i++)
        free(j->lines[i].name);
    free(j->lines);
    free(j->path);
    free(j);
}

const struct journal_entry *journal_find(const struct journal *j, const char *name)
{
    for (size_t i = 0; i < j->n; i++)
        if (!strcmp(j->lines[i].name, name))
            return &j->lines[i].entry;
    return NULL;
}

size_t journal_entries(const struct journal *j)
{
    return j->n;
}

#include "formats/safetensors.h"

#include "base/err.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The reference reader's limit. */
static const uint64_t max_header_bytes = 100000000;

static int tensor_error(const struct safetensors *st, const struct tensor *t, const char *what)
{
    return err_set(ERR_FORMAT, "%s: tensor '%s': %s", st->path, t->name, what);
}

/* shape × dtype in bytes; false on overflow. */
static bool shape_bytes(const struct tensor *t, uint64_t *bytes)
{
    uint64_t n = dtype_bytes(t->dtype);
    for (int d = 0; d < t->n_dims; d++)
        if (!mem_mul_u64(n, (uint64_t)t->shape[d], &n))
            return false;
    *bytes = n;
    return true;
}

static int parse_shape(const struct safetensors *st, struct json entry, struct tensor *t)
{
    struct json shape;
    int rc = json_get_array(entry, "shape", &shape);
    if (rc < 0)
        return rc;
    for (struct json d = json_first(shape); d.node; d = json_next(d)) {
        if (t->n_dims == TENSOR_MAX_DIMS)
            return tensor_error(st, t, "has more than 8 dimensions");
        rc = json_as_int(d, 0, INT64_MAX, &t->shape[t->n_dims]);
        if (rc < 0)
            return rc;
        t->n_dims++;
    }
    return 0;
}

static int parse_entry(const struct safetensors *st, struct json entry, uint64_t data_start,
                       uint64_t data_bytes, struct tensor *t)
{
    if (!(t->name = mem_strdup(json_key(entry))))
        return ERR_MEMORY;
    const char *dtype;
    struct json offsets;
    int rc = json_get_string(entry, "dtype", &dtype);
    if (!rc)
        rc = json_get_array(entry, "data_offsets", &offsets);
    if (rc < 0)
        return rc;
    const int parsed = dtype_parse(dtype);
    if (parsed < 0)
        return err_set(ERR_FORMAT, "%s: tensor '%s' has unknown dtype '%s'", st->path, t->name, dtype);
    t->dtype = (enum dtype)parsed;
    if ((rc = parse_shape(st, entry, t)) < 0)
        return rc;
    int64_t begin, end;
    if (json_count(offsets) != 2)
        return tensor_error(st, t, "data_offsets is not a pair");
    struct json first = json_first(offsets);
    if ((rc = json_as_int(first, 0, INT64_MAX, &begin)) < 0 ||
        (rc = json_as_int(json_next(first), 0, INT64_MAX, &end)) < 0)
        return rc;
    char text[TENSOR_TEXT_BYTES];
    uint64_t bytes;
    if (begin > end || (uint64_t)end > data_bytes)
        return err_set(ERR_FORMAT,
                       "%s: tensor '%s' lies at bytes %" PRId64 " … %" PRId64
                       " of the data, which has %" PRIu64,
                       st->path, t->name, begin, end, data_bytes);
    if (!shape_bytes(t, &bytes) || bytes != (uint64_t)(end - begin))
        return err_set(ERR_FORMAT, "%s: tensor '%s' has %" PRId64 " bytes, which is not %s", st->path,
                       t->name, end - begin, tensor_text(t->dtype, t->n_dims, t->shape, text));
    t->offset = data_start + (uint64_t)begin;
    t->bytes = bytes;
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) /* empty tensors first, so that the next one begins where they "end" */
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int check_coverage(const struct safetensors *st, uint64_t data_start, uint64_t data_bytes)
{
    uint64_t at = data_start;
    for (size_t i = 0; i < st->n_tensors; i++) {
        const struct tensor *t = &st->tensors[i];
        if (t->offset < at)
            return err_set(ERR_FORMAT, "%s: tensors '%s' and '%s' overlap", st->path, st->tensors[i - 1].name,
                           t->name);
        if (t->offset > at)
            return err_set(ERR_FORMAT, "%s: %" PRIu64 " bytes before tensor '%s' belong to no tensor",
                           st->path, t->offset - at, t->name);
        at += t->bytes;
    }
    if (at != data_start + data_bytes)
        return err_set(ERR_FORMAT, "%s: the last %" PRIu64 " bytes belong to no tensor", st->path,
                       data_start + data_bytes - at);
    return 0;
}

static int check_names(const struct safetensors *st)
{
    struct name_table names;
    int rc = name_table_init(&names, st->n_tensors);
    for (size_t i = 0; !rc && i < st->n_tensors; i++) {
        rc = name_table_add(&names, st->tensors[i].name, i);
        if (rc == 1)
            rc = tensor_error(st, &st->tensors[i], "appears twice in the header");
    }
    name_table_free(&names);
    return rc;
}

static int parse_entries(struct safetensors *st, struct json root, uint64_t data_start, uint64_t data_bytes)
{
    st->tensors = mem_alloc(json_count(root), sizeof *st->tensors, "the tensor list");
    if (!st->tensors)
        return ERR_MEMORY;
    for (struct json e = json_first(root); e.node; e = json_next(e)) {
        if (!strcmp(json_key(e), "__metadata__"))
            continue;
        const int rc = parse_entry(st, e, data_start, data_bytes, &st->tensors[st->n_tensors++]);
        if (rc < 0)
            return rc;
    }
    if (st->n_tensors)
        qsort(st->tensors, st->n_tensors, sizeof *st->tensors, by_offset);
    const int rc = check_names(st);
    return rc < 0 ? rc : check_coverage(st, data_start, data_bytes);
}

int safetensors_parse(struct safetensors *st, const char *header, size_t header_bytes, uint64_t data_start,
                      uint64_t data_bytes)
{
    /* the reference demands that the header begins with the brace itself */
    if (!header_bytes || header[0] != '{')
        return err_set(ERR_FORMAT, "%s: the header is not a JSON object", st->path);
    struct json_doc *doc;
    int rc = json_parse(&doc, header, header_bytes, st->path);
    if (rc < 0)
        return rc;
    rc = json_is_object(json_root(doc))
             ? parse_entries(st, json_root(doc), data_start, data_bytes)
             : err_set(ERR_FORMAT, "%s: the header is not a JSON object", st->path);
    json_free(doc);
    return rc;
}

static int read_header(struct safetensors *st, uint64_t file_bytes)
{
    uint8_t prefix[8];
    if (file_bytes < sizeof prefix)
        return err_set(ERR_FORMAT, "%s: is %" PRIu64 " bytes, too short for a safetensors file", st->path,
                       file_bytes);
    int rc = file_pread(st->fd, prefix, sizeof prefix, 0, st->path);
    if (rc < 0)
        return rc;
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--)
        n = n << 8 | prefix[i];
    if (n > max_header_bytes)
        return err_set(ERR_FORMAT,
                       "%s: claims a header of %" PRIu64 " bytes, expected at most %" PRIu64
                       " (not a safetensors file?)",
                       st->path, n, max_header_bytes);
    if (n > file_bytes - sizeof prefix)
        return err_set(ERR_FORMAT,
                       "%s: is truncated: the header alone needs %" PRIu64 " bytes, the file has %" PRIu64,
                       st->path, n + sizeof prefix, file_bytes);
    char *header = mem_alloc((size_t)n + 1, 1, "a safetensors header");
    if (!header)
        return ERR_MEMORY;
    rc = file_pread(st->fd, header, (size_t)n, sizeof prefix, st->path);
    if (!rc)
        rc = safetensors_parse(st, header, (size_t)n, n + sizeof prefix, file_bytes - sizeof prefix - n);
    free(header);
    return rc;
}

int safetensors_open(struct safetensors *st, const char *path)
{
    *st = (struct safetensors){.fd = -1};
    uint64_t bytes;
    if (!(st->path = mem_strdup(path)))
        return ERR_MEMORY;
    st->fd = file_open_read(path, &bytes);
    const int rc = st->fd < 0 ? st->fd : read_header(st, bytes);
    if (rc < 0)
        safetensors_close(st);
    return rc;
}

void safetensors_close(struct safetensors *st)
{
    for (size_t i = 0; i < st->n_tensors; i++)
        free(st->tensors[i].name);
    free(st->tensors);
    free(st->path);
    if (st->fd >= 0)
        close(st->fd);
    *st = (struct safetensors){.fd = -1};
}

int64_t tensor_rows(const struct tensor *t)
{
    int64_t rows = 1;
    for (int d = 0; d + 1 < t->n_dims; d++)
        rows *= t->shape[d];
    return rows;
}

int64_t tensor_cols(const struct tensor *t)
{
    return t->n_dims ? t->shape[t->n_dims - 1] : 1;
}

const char *tensor_text(enum dtype dtype, int n_dims, const int64_t *shape, char buf[TENSOR_TEXT_BYTES])
{
    size_t len = (size_t)snprintf(buf, TENSOR_TEXT_BYTES, "%s [", dtype_name(dtype));
    for (int d = 0; d < n_dims && len < TENSOR_TEXT_BYTES; d++)
        len += (size_t)snprintf(buf + len, TENSOR_TEXT_BYTES - len, "%s%" PRId64, d ? ", " : "", shape[d]);
    if (len < TENSOR_TEXT_BYTES)
        snprintf(buf + len, TENSOR_TEXT_BYTES - len, "]");
    return buf;
}

int64_t tensor_piece_rows(int64_t cols, enum dtype dtype)
{
    const uint64_t piece_bytes = 256 << 10; /* stays in a core's second-level cache while it is used */
    uint64_t rows = 1, row_bytes;
    if (!mem_mul_u64((uint64_t)cols, dtype_bytes(dtype), &row_bytes))
        return 1;
    while (rows * 2 * row_bytes <= piece_bytes && rows < piece_bytes)
        rows *= 2;
    return (int64_t)rows;
}

int tensor_hash_combine(const struct hash128 *pieces, size_t n, enum dtype dtype, int n_dims,
                        const int64_t *shape, struct hash128 *out)
{
    char kind[TENSOR_TEXT_BYTES];
    tensor_text(dtype, n_dims, shape, kind);
    const size_t bytes = n * sizeof *pieces, kind_bytes = strlen(kind);
    char *all = mem_alloc(bytes + kind_bytes, 1, "tensor hashes");
    if (!all)
        return ERR_MEMORY;
    if (n)
        memcpy(all, pieces, bytes);
    memcpy(all + bytes, kind, kind_bytes);
    *out = hash_bytes(all, bytes + kind_bytes);
    free(all);
    return 0;
}

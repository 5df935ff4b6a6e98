#include "formats/writer.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/text.h"
#include "base/tmpfs_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { EARLY_FLUSH_BYTES = 64 << 10 };

struct entry {
    char *name, *module;
    enum dtype dtype;
    int n_dims;
    int64_t shape[8];
    uint64_t bytes, offset; /* offset: in its file's data */
    size_t shard;
};

struct shard {
    char *path;
    int fd;
    struct tmpfs_file *mapped;         /* of a file in memory */
    uint64_t header_bytes, data_bytes; /* header_bytes: the 8 of its length included */
};

struct writer {
    char *folder;
    uint64_t shard_bytes, total_bytes;
    struct entry *entries;
    size_t n_entries, capacity;
    struct shard *shards;
    size_t n_shards;
};

int writer_open(struct writer **out, const char *folder, uint64_t shard_bytes)
{
    *out = NULL;
    struct writer *w = mem_alloc(1, sizeof *w, "a checkpoint writer");
    if (!w)
        return ERR_MEMORY;
    w->shard_bytes = shard_bytes;
    if (!(w->folder = mem_strdup(folder))) {
        free(w);
        return ERR_MEMORY;
    }
    *out = w;
    return 0;
}

void writer_close(struct writer *w)
{
    if (!w)
        return;
    for (size_t i = 0; i < w->n_entries; i++) {
        free(w->entries[i].name);
        free(w->entries[i].module);
    }
    for (size_t i = 0; i < w->n_shards; i++) {
        free(w->shards[i].path);
        tmpfs_file_close(w->shards[i].mapped);
        if (w->shards[i].fd >= 0)
            close(w->shards[i].fd);
    }
    free(w->entries);
    free(w->shards);
    free(w->folder);
    free(w);
}

int writer_add(struct writer *w, const char *name, const char *module, enum dtype dtype, int n_dims,
               const int64_t *shape, size_t *id)
{
    CHECK(!w->shards && n_dims >= 0 && n_dims <= 8);
    int rc = mem_grow(&w->entries, &w->capacity, w->n_entries + 1, sizeof *w->entries, "the tensor list");
    if (rc < 0)
        return rc;
    struct entry *e = &w->entries[w->n_entries];
    *e = (struct entry){.name = mem_strdup(name),
                        .module = mem_strdup(module),
                        .dtype = dtype,
                        .n_dims = n_dims,
                        .bytes = dtype_bytes(dtype)};
    *id = w->n_entries++;
    if (!e->name || !e->module)
        return ERR_MEMORY;
    for (int d = 0; d < n_dims; d++) {
        e->shape[d] = shape[d];
        if (!mem_mul_u64(e->bytes, (uint64_t)shape[d], &e->bytes))
            return err_set(ERR_FORMAT, "tensor '%s' is too large to write", name);
    }
    w->total_bytes += e->bytes;
    return 0;
}

/* Fills shards in order of announcement, a module at a time. */
static size_t assign_shards(struct writer *w)
{
    size_t shard = 0;
    uint64_t used = 0;
    for (size_t i = 0, end; i < w->n_entries; i = end) {
        uint64_t bytes = 0;
        for (end = i; end < w->n_entries && !strcmp(w->entries[end].module, w->entries[i].module); end++)
            bytes += w->entries[end].bytes;
        if (used > 0 && used + bytes > w->shard_bytes) {
            shard++;
            used = 0;
        }
        used += bytes;
        for (size_t k = i; k < end; k++)
            w->entries[k].shard = shard;
    }
    return shard + 1;
}

static int by_alignment(const void *a, const void *b)
{
    const struct entry *x = *(struct entry *const *)a, *y = *(struct entry *const *)b;
    const size_t dx = dtype_bytes(x->dtype), dy = dtype_bytes(y->dtype);
    if (dx != dy)
        return dx > dy ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* Places the shard's tensors and renders its header, padded to 8 bytes. */
static int layout_shard(struct writer *w, size_t shard, struct text *header)
{
    struct entry **order = mem_alloc(w->n_entries, sizeof *order, "the tensor order");
    if (!order)
        return ERR_MEMORY;
    size_t n = 0;
    for (size_t i = 0; i < w->n_entries; i++)
        if (w->entries[i].shard == shard)
            order[n++] = &w->entries[i];
    if (n)
        qsort(order, n, sizeof *order, by_alignment);
    uint64_t at = 0;
    json_begin_object(header);
    json_put_key(header, "__metadata__");
    json_begin_object(header);
    json_kv_string(header, "format", "pt"); /* transformers 4.x refuses files without it */
    json_end_object(header);
    for (size_t i = 0; i < n; i++) {
        struct entry *e = order[i];
        e->offset = at;
        at += e->bytes;
        json_put_key(header, e->name);
        json_begin_object(header);
        json_kv_string(header, "dtype", dtype_name(e->dtype));
        json_put_key(header, "shape");
        json_begin_array(header);
        for (int d = 0; d < e->n_dims; d++)
            json_put_int(header, e->shape[d]);
        json_end_array(header);
        json_put_key(header, "data_offsets");
        json_begin_array(header);
        json_put_uint(header, e->offset);
        json_put_uint(header, at);
        json_end_array(header);
        json_end_object(header);
    }
    json_end_object(header);
    while ((header->len + 8) % 8 && !header->failed)
        text_add(header, " ");
    w->shards[shard].data_bytes = at;
    free(order);
    return text_finish(header);
}

/* Takes the place of a file in memory. */
static int map_shard(struct shard *s, uint64_t bytes)
{
    if (ftruncate(s->fd, (off_t)bytes) < 0)
        return err_errno("%s: reserving %llu bytes", s->path, (unsigned long long)bytes);
    const int rc = tmpfs_file_open(&s->mapped, s->fd, bytes);
    return rc < 0 ? err_context(rc, "%s", s->path) : 0;
}

/* Whether all that was announced fits the file system, where it says how large it is (a tmpfs may have no limit). */
static int check_space(const struct writer *w)
{
    struct statvfs fs;
    if (statvfs(w->folder, &fs) < 0)
        return err_errno("%s", w->folder);
    if (fs.f_blocks == 0 || w->total_bytes <= (uint64_t)fs.f_bavail * fs.f_frsize)
        return 0;
    errno = ENOSPC;
    return err_errno("%s: reserving %llu bytes for model.safetensors", w->folder,
                     (unsigned long long)w->total_bytes);
}

/* Reserves the blocks; a file system that cannot (EOPNOTSUPP is emulated by the C library) fails later. */
static int reserve_shard(struct shard *s, uint64_t bytes)
{
    const int code = posix_fallocate(s->fd, 0, (off_t)bytes);
    if (!code)
        return 0;
    errno = code;
    return err_errno("%s: reserving %llu bytes", s->path, (unsigned long long)bytes);
}

static int put_bytes(const struct shard *s, const void *data, size_t n, uint64_t at)
{
    if (!s->mapped)
        return file_pwrite(s->fd, data, n, at, s->path);
    const int rc = tmpfs_file_put(s->mapped, data, n, at);
    return rc < 0 ? err_context(rc, "%s", s->path) : 0;
}

static int create_shard(struct shard *s, const struct text *header, bool keep)
{
    s->fd = open(s->path, O_RDWR | O_CREAT | O_CLOEXEC | (keep ? O_NOFOLLOW : O_EXCL), 0666);
    if (s->fd < 0)
        return err_errno("%s", s->path);
    s->header_bytes = 8 + header->len;
    const uint64_t bytes = s->header_bytes + s->data_bytes;
    if (keep && ftruncate(s->fd, (off_t)bytes) < 0)
        return err_errno("%s: reserving %llu bytes", s->path, (unsigned long long)bytes);
    int rc = tmpfs_file_is(s->fd) ? map_shard(s, bytes) : reserve_shard(s, bytes);
    if (rc < 0)
        return rc;
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++)
        prefix[i] = (uint8_t)((uint64_t)header->len >> 8 * i);
    rc = put_bytes(s, prefix, sizeof prefix, 0);
    return rc < 0 ? rc : put_bytes(s, header->data, header->len, sizeof prefix);
}

int writer_begin(struct writer *w, bool keep)
{
    CHECK(!w->shards);
    const size_t n = assign_shards(w);
    w->shards = mem_alloc(n, sizeof *w->shards, "the shard list");
    if (!w->shards)
        return ERR_MEMORY;
    w->n_shards = n;
    for (size_t s = 0; s < n; s++)
        w->shards[s].fd = -1;
    const int fits = keep ? 0 : check_space(w); /* what is kept has its space */
    if (fits < 0)
        return fits;
    for (size_t s = 0; s < n; s++) {
        w->shards[s].path = n == 1 ? file_join(w->folder, "model.safetensors")
                                   : mem_printf("%s/model-%05zu-of-%05zu.safetensors", w->folder, s + 1, n);
        if (!w->shards[s].path)
            return ERR_MEMORY;
        struct text header = {0};
        int rc = layout_shard(w, s, &header);
        if (!rc)
            rc = create_shard(&w->shards[s], &header, keep);
        text_free(&header);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int writer_put(const struct writer *w, size_t id, uint64_t offset, const void *data, size_t n)
{
    CHECK(id < w->n_entries);
    const struct entry *e = &w->entries[id];
    const struct shard *s = &w->shards[e->shard];
    CHECK(offset <= e->bytes && n <= e->bytes - offset);
    const uint64_t at = s->header_bytes + e->offset + offset;
    const int rc = put_bytes(s, data, n, at);
    /* Starts the disk now, so that little is left for the flush at the end. Advice only: its failure is no news. */
    if (!rc && !s->mapped && n >= EARLY_FLUSH_BYTES)
        sync_file_range(s->fd, (off_t)at, (off_t)n, SYNC_FILE_RANGE_WRITE);
    return rc;
}

int writer_get(const struct writer *w, size_t id, uint64_t offset, void *data, size_t n)
{
    CHECK(id < w->n_entries);
    const struct entry *e = &w->entries[id];
    const struct shard *s = &w->shards[e->shard];
    CHECK(offset <= e->bytes && n <= e->bytes - offset);
    return file_pread(s->fd, data, n, s->header_bytes + e->offset + offset, s->path);
}

int writer_index(const struct writer *w)
{
    if (w->n_shards == 1)
        return 0;
    struct text t = {.indent = 2};
    json_begin_object(&t);
    json_put_key(&t, "metadata"); /* readers fail without this key */
    json_begin_object(&t);
    json_kv_uint(&t, "total_size", w->total_bytes);
    json_end_object(&t);
    json_put_key(&t, "weight_map");
    json_begin_object(&t);
    for (size_t i = 0; i < w->n_entries; i++)
        json_kv_string(&t, w->entries[i].name, file_base(w->shards[w->entries[i].shard].path));
    json_end_object(&t);
    json_end_object(&t);
    text_add(&t, "\n");
    char *path = file_join(w->folder, "model.safetensors.index.json");
    int rc = path ? text_finish(&t) : ERR_MEMORY;
    if (!rc)
        rc = file_write_atomic(path, t.data, t.len);
    free(path);
    text_free(&t);
    return rc;
}

int writer_finish(struct writer *w)
{
    for (size_t i = 0; i < w->n_shards; i++) {
        struct shard *s = &w->shards[i];
        tmpfs_file_close(s->mapped);
        s->mapped = NULL;
        const int failed = fsync(s->fd) < 0;
        if (failed)
            return err_errno("%s: flushing", s->path);
        const int fd = s->fd;
        s->fd = -1;
        if (close(fd) < 0)
            return err_errno("%s: closing", s->path);
    }
    return 0;
}

uint64_t writer_bytes(const struct writer *w)
{
    return w->total_bytes;
}

size_t writer_n_files(const struct writer *w)
{
    return w->n_shards;
}

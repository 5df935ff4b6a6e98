#include "base/file.h"

#include "base/err.h"
#include "base/mem.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int file_open_read(const char *path, uint64_t *bytes)
{
    /* O_NONBLOCK: opening a FIFO must fail below, not wait for a writer */
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return err_errno("%s", path);
    struct stat st;
    if (fstat(fd, &st) < 0) {
        err_errno("%s", path);
        close(fd);
        return ERR_IO;
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return err_set(ERR_IO, "%s: is %s, expected a regular file", path,
                       S_ISDIR(st.st_mode) ? "a folder" : "a special file");
    }
    *bytes = (uint64_t)st.st_size;
    return fd;
}

int file_map_open(struct file_map *out, const char *path)
{
    *out = (struct file_map){0};
    uint64_t bytes;
    const int fd = file_open_read(path, &bytes);
    if (fd < 0)
        return fd;
    int rc = 0;
    if (bytes) {
        void *p = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED)
            rc = err_errno("%s: cannot map %llu bytes", path, (unsigned long long)bytes);
        else
            *out = (struct file_map){p, bytes};
    }
    close(fd);
    return rc;
}

void file_map_close(struct file_map *map)
{
    if (map->data)
        munmap((void *)(uintptr_t)map->data, map->bytes);
    *map = (struct file_map){0};
}

int file_pread(int fd, void *buf, size_t n, uint64_t offset, const char *path)
{
    for (size_t done = 0; done < n;) {
        const ssize_t got = pread(fd, (char *)buf + done, n - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return err_errno("%s: reading %zu bytes at offset %llu", path, n, (unsigned long long)offset);
        if (got == 0)
            return err_set(ERR_IO, "%s: ends at byte %llu, expected %llu: the file shrank while it was read",
                           path, (unsigned long long)(offset + done), (unsigned long long)(offset + n));
        done += (size_t)got;
    }
    return 0;
}

int file_pwrite(int fd, const void *buf, size_t n, uint64_t offset, const char *path)
{
    for (size_t done = 0; done < n;) {
        const ssize_t put = pwrite(fd, (const char *)buf + done, n - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return err_errno("%s: writing %zu bytes at offset %llu", path, n, (unsigned long long)offset);
        done += (size_t)put;
    }
    return 0;
}

int file_read(const char *path, size_t max_bytes, char **text, size_t *len)
{
    *text = NULL;
    *len = 0;
    uint64_t bytes;
    const int fd = file_open_read(path, &bytes);
    if (fd < 0)
        return fd;
    int rc = 0;
    if (bytes > max_bytes)
        rc = err_set(ERR_FORMAT, "%s: is %llu bytes, expected at most %zu", path, (unsigned long long)bytes,
                     max_bytes);
    char *buf = NULL;
    if (!rc && !(buf = mem_alloc((size_t)bytes + 1, 1, path)))
        rc = ERR_MEMORY;
    if (!rc)
        rc = file_pread(fd, buf, (size_t)bytes, 0, path);
    close(fd);
    if (rc < 0) {
        free(buf);
        return rc;
    }
    *text = buf;
    *len = (size_t)bytes;
    return 0;
}

/* Creates `path` with the content and syncs it; removes it again on failure. */
static int write_new(const char *path, const void *data, size_t n)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return err_errno("%s", path);
    int rc = file_pwrite(fd, data, n, 0, path);
    if (!rc && fsync(fd) < 0)
        rc = err_errno("%s: flushing", path);
    if (close(fd) < 0 && !rc)
        rc = err_errno("%s: closing", path);
    if (rc < 0)
        unlink(path);
    return rc;
}

int file_write_atomic(const char *path, const void *data, size_t n)
{
    char *temporary = mem_printf("%s.%ld.tmp", path, (long)getpid());
    if (!temporary)
        return ERR_MEMORY;
    int rc = write_new(temporary, data, n);
    if (!rc && rename(temporary, path) < 0) {
        rc = err_errno("%s", path);
        unlink(temporary);
    }
    free(temporary);
    return rc;
}

int file_copy(const char *from, const char *to)
{
    struct file_map map;
    int rc = file_map_open(&map, from);
    if (rc < 0)
        return rc;
    rc = write_new(to, map.data ? map.data : "", map.bytes);
    file_map_close(&map);
    return rc;
}

bool file_exists(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0;
}

bool file_is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int file_make_folder(const char *path)
{
    return mkdir(path, 0777) < 0 ? err_errno("%s: cannot create the folder", path) : 0;
}

int file_remove_folder(const char *path)
{
    DIR *dir = opendir(path);
    if (!dir)
        return errno == ENOENT ? 0 : err_errno("%s", path);
    int rc = 0;
    for (struct dirent *e; !rc && (e = readdir(dir));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (unlinkat(dirfd(dir), e->d_name, 0) < 0)
            rc = err_errno("%s/%s: cannot remove", path, e->d_name);
    }
    closedir(dir);
    if (!rc && rmdir(path) < 0)
        rc = err_errno("%s: cannot remove", path);
    return rc;
}

int file_sync(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_errno("%s", path);
    const int rc = fsync(fd) < 0 ? err_errno("%s: flushing", path) : 0;
    close(fd);
    return rc;
}

int file_rename(const char *from, const char *to)
{
    if (rename(from, to) < 0)
        return err_errno("%s: cannot rename to %s", from, to);
    char *parent = mem_strdup(to);
    if (!parent)
        return ERR_MEMORY;
    char *slash = strrchr(parent, '/');
    const char *folder = slash == parent ? "/" : slash ? (*slash = '\0', parent) : ".";
    const int rc = file_sync(folder);
    free(parent);
    return rc;
}

char *file_join(const char *folder, const char *name)
{
    const size_t n = strlen(folder);
    return mem_printf("%s%s%s", folder, n && folder[n - 1] == '/' ? "" : "/", name);
}

const char *file_base(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int file_list(struct file_list *out, const char *folder)
{
    *out = (struct file_list){0};
    DIR *dir = opendir(folder);
    if (!dir)
        return err_errno("%s", folder);
    int rc = 0;
    size_t capacity = 0;
    for (struct dirent *e; !rc && (e = readdir(dir));) {
        struct stat st;
        if (fstatat(dirfd(dir), e->d_name, &st, 0) < 0 || !S_ISREG(st.st_mode))
            continue;
        rc = mem_grow(&out->names, &capacity, out->n + 1, sizeof *out->names, folder);
        if (!rc && !(out->names[out->n] = mem_strdup(e->d_name)))
            rc = ERR_MEMORY;
        if (!rc)
            out->n++;
    }
    closedir(dir);
    if (rc < 0) {
        file_list_free(out);
        return rc;
    }
    if (out->n)
        qsort(out->names, out->n, sizeof *out->names, by_name);
    return 0;
}

void file_list_free(struct file_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        free(list->names[i]);
    free(list->names);
    *list = (struct file_list){0};
}

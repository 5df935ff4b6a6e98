/* Files and folders. Reads and writes are complete or an error that names the path; nothing is retried silently
 * except after signals. Files that must appear whole are written beside their place and renamed. */
#ifndef GEMCUT_BASE_FILE_H
#define GEMCUT_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A read-only mapping of a whole file. Meant for data that is read once and at once; tensor data is read with
 * file_pread, so that a file truncated under us is an error and not a bus error. */
struct file_map {
    const char *data; /* [bytes]; NULL for an empty file */
    size_t bytes;
};

int file_map_open(struct file_map *out, const char *path);
void file_map_close(struct file_map *map);

/* Whole content, NUL-terminated, of a regular file of at most max_bytes; *text is released with free(). */
int file_read(const char *path, size_t max_bytes, char **text, size_t *len);

/* Opens for reading; *bytes gets the size. A descriptor or a negative error. Folders are refused. */
int file_open_read(const char *path, uint64_t *bytes);

/* All n bytes at `offset`, or an error that names `path`. Safe to call from many threads. */
int file_pread(int fd, void *buf, size_t n, uint64_t offset, const char *path);
int file_pwrite(int fd, const void *buf, size_t n, uint64_t offset, const char *path);

/* Writes `path` whole or not at all: a sibling is written, synced and renamed over it. */
int file_write_atomic(const char *path, const void *data, size_t n);

/* Copies a regular file's bytes to a new file. */
int file_copy(const char *from, const char *to);

bool file_exists(const char *path); /* anything, dangling links included */
bool file_is_folder(const char *path);

/* Creates one folder; its parent must exist. */
int file_make_folder(const char *path);

/* Removes a folder that holds only files, not recursively into subfolders; a missing folder is no error. */
int file_remove_folder(const char *path);

/* Flushes a file or folder to the disk. */
int file_sync(const char *path);

/* Renames within one file system and flushes the parent folder. */
int file_rename(const char *from, const char *to);

/* "folder/name" in fresh memory; NULL (recorded) when out of memory. */
char *file_join(const char *folder, const char *name);

/* The last component of a path. */
const char *file_base(const char *path);

/* Names of the regular files in a folder, sorted; released with file_list_free. */
struct file_list {
    char **names;
    size_t n;
};
int file_list(struct file_list *out, const char *folder);
void file_list_free(struct file_list *list);

#endif

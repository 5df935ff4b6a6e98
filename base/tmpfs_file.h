/* Writing a file that lies in memory (tmpfs) from many threads. By pwrite they wait for each other: 16 of them reached
 * 1.9 GB/s, 18 GB/s through a mapping. (On a disk a mapping is the slower way.) The file's pages are reserved from the
 * front by a thread of its own, so that nobody waits for all of them; who writes beyond that point takes them himself: a
 * full tmpfs is an error. (Only where another program takes the last pages in the moment between taking and writing would
 * it be a signal, on kernels before 5.14.) */
#ifndef GEMCUT_BASE_TMPFS_FILE_H
#define GEMCUT_BASE_TMPFS_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tmpfs_file;

bool tmpfs_file_is(int fd);

/* fd: open for reading and writing, and of that size already; it must outlive the mapping. */
int tmpfs_file_open(struct tmpfs_file **out, int fd, uint64_t bytes);

/* n bytes at `at`, inside the file; from any thread, for disjoint ranges. */
int tmpfs_file_put(struct tmpfs_file *f, const void *data, size_t n, uint64_t at);

/* Ends the mapping; the file stays. NULL is allowed. */
void tmpfs_file_close(struct tmpfs_file *f);

#endif

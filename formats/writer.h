/* Writing a checkpoint as a stream: every tensor is announced first, then the files get their final size and
 * their headers, then any thread may put any byte range of any tensor in its place. Nothing is buffered here.
 * Shards hold at most shard_bytes of data each (one tensor may be larger); tensors announced under the same
 * module name stay together. Within a file tensors are ordered by alignment, then name, as the reference
 * writer does, so that every tensor is naturally aligned. */
#ifndef GEMCUT_FORMATS_WRITER_H
#define GEMCUT_FORMATS_WRITER_H

#include "base/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct writer;

/* `folder` must exist and be empty of *.safetensors files. */
int writer_open(struct writer **out, const char *folder, uint64_t shard_bytes);

/* Announces a tensor; *id is its handle. `module` is what keeps tensors in one shard, e.g. the linear's name. */
int writer_add(struct writer *w, const char *name, const char *module, enum dtype dtype, int n_dims,
               const int64_t *shape, size_t *id);

/* Lays out and creates the files, reserving their full size, so that a full disk shows before the work. keep: files of
 * an earlier run with the same announcements keep what was put into them. */
int writer_begin(struct writer *w, bool keep);

/* n bytes of tensor `id` from byte `offset` on. Safe to call from many threads for disjoint ranges. */
int writer_put(const struct writer *w, size_t id, uint64_t offset, const void *data, size_t n);

/* Reads back what has been put. */
int writer_get(const struct writer *w, size_t id, uint64_t offset, void *data, size_t n);

/* Writes model.safetensors.index.json when there are several files. The folder can then be opened and read. */
int writer_index(const struct writer *w);

/* Flushes the files to the disk and closes them. */
int writer_finish(struct writer *w);

/* Closes without finishing; the caller removes the folder. NULL is allowed. */
void writer_close(struct writer *w);

/* All tensor bytes announced so far, and the number of files (after writer_begin). */
uint64_t writer_bytes(const struct writer *w);
size_t writer_n_files(const struct writer *w);

#endif

/* A model folder: config.json and its safetensors files, one or many, opened together and addressed by tensor
 * name. What lies in the folder is checked against the index before anything is read. */
#ifndef GEMCUT_FORMATS_CHECKPOINT_H
#define GEMCUT_FORMATS_CHECKPOINT_H

#include "base/parallel.h"
#include "formats/safetensors.h"

#include <stddef.h>
#include <stdint.h>

struct checkpoint {
    char *folder;
    size_t n_files;
    struct safetensors *files; /* their tensors have moved to `tensors` */
    size_t n_tensors;
    struct tensor *tensors; /* by file, then by offset: the order in which reading is sequential */
    struct name_table by_name;
};

/* Where MODEL is: a folder, or for "org/name" the snapshot in the Hugging Face cache ($HF_HUB_CACHE,
 * $HF_HOME/hub, ~/.cache/huggingface/hub). Fresh memory in *folder. Nothing is ever downloaded. */
int checkpoint_find(char **folder, const char *model);

/* Opens every safetensors file of the folder: those that model.safetensors.index.json names, or
 * model.safetensors, or the only *.safetensors there is. */
int checkpoint_open(struct checkpoint *out, const char *folder);
void checkpoint_close(struct checkpoint *ck);

/* NULL when there is no such tensor. */
const struct tensor *checkpoint_tensor(const struct checkpoint *ck, const char *name);

/* n bytes of a tensor's data from byte `offset` on. Safe to call from many threads. */
int checkpoint_read(const struct checkpoint *ck, const struct tensor *t, uint64_t offset, size_t n,
                    void *buf);

/* The file that holds a tensor, for messages. */
const char *checkpoint_path(const struct checkpoint *ck, const struct tensor *t);

/* Reads every tensor and hashes it as safetensors.h defines; hashes[i] belongs to ck->tensors[i]. on_bytes (may be
 * NULL) is told from any thread how many bytes have been read since the last call. */
int checkpoint_hash_all(const struct checkpoint *ck, struct parallel *pool, struct hash128 *hashes,
                        void (*on_bytes)(void *ctx, uint64_t bytes), void *ctx);

#endif

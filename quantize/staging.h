/* Where a result is built before it takes its name: the folder OUT.partial beside OUT. It is locked while in use;
 * what a killed run left is recognized by its marker file and replaced. Nothing that gemcut did not write is ever
 * removed. */
#ifndef GEMCUT_QUANTIZE_STAGING_H
#define GEMCUT_QUANTIZE_STAGING_H

#include "base/file.h"

struct staging {
    char *out;     /* OUT without trailing slashes */
    char *partial; /* OUT.partial */
    char *marker;  /* its marker and lock file */
    int lock;      /* descriptor; -1 when not begun */
    bool replaces; /* OUT exists and is to be replaced */
};

int staging_init(struct staging *w, const char *out);
void staging_free(struct staging *w);

/* Creates OUT.partial. Refused when OUT exists, unless `overwrite` and gemcut wrote it. keep: what a run before has left
 * there stays. */
int staging_begin(struct staging *w, bool overwrite, bool keep);

/* Writes one file into OUT.partial, and copies what a model needs besides weights and config.json: tokenizer,
 * chat template, generation settings, licence, cards. */
int staging_write(const struct staging *w, const char *name, const void *data, size_t n);
int staging_copy_side_files(const struct staging *w, const char *model_folder);

/* The files of OUT.partial other than weights, index, record and hidden ones, sorted. */
int staging_files(const struct staging *w, struct file_list *out);

/* OUT.partial becomes OUT. */
int staging_commit(struct staging *w);

/* Removes a file of OUT.partial, if it is there. */
int staging_remove(const struct staging *w, const char *name);

/* Removes OUT.partial; keeps the error that is recorded. */
void staging_abandon(struct staging *w);

#endif

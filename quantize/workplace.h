/* Where a result is built before it takes its name: the folder OUT.partial beside OUT. It is locked while in use;
 * what a killed run left is recognized by its marker file and replaced. Nothing that gemcut did not write is ever
 * removed. */
#ifndef GEMCUT_QUANTIZE_WORKPLACE_H
#define GEMCUT_QUANTIZE_WORKPLACE_H

#include "base/file.h"

struct workplace {
    char *out;     /* OUT without trailing slashes */
    char *partial; /* OUT.partial */
    char *marker;  /* its marker and lock file */
    int lock;      /* descriptor; -1 when not begun */
    bool replaces; /* OUT exists and is to be replaced */
};

int workplace_init(struct workplace *w, const char *out);
void workplace_free(struct workplace *w);

/* Creates OUT.partial. Refused when OUT exists, unless `overwrite` and gemcut wrote it. */
int workplace_begin(struct workplace *w, bool overwrite);

/* Writes one file into OUT.partial, and copies what a model needs besides weights and config.json: tokenizer,
 * chat template, generation settings, licence, cards. */
int workplace_write(const struct workplace *w, const char *name, const void *data, size_t n);
int workplace_copy_side_files(const struct workplace *w, const char *model_folder);

/* The files of OUT.partial other than weights, index and marker, sorted. */
int workplace_files(const struct workplace *w, struct file_list *out);

/* OUT.partial becomes OUT. */
int workplace_commit(struct workplace *w);

/* Removes OUT.partial; keeps the error that is recorded. */
void workplace_abandon(struct workplace *w);

#endif

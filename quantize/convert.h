/* A cut in another format: the same codes, scales and zero points, packed anew; every other tensor and file as it is.
 * Built in OUT.partial, read back and renamed, as quantize/cut.h says. */
#ifndef GEMCUT_QUANTIZE_CONVERT_H
#define GEMCUT_QUANTIZE_CONVERT_H

#include "runtime/model.h"

struct convert_options {
    const char *model; /* a cut of any format that can be read */
    const char *out;
    const char *version; /* of the program, for the record */
    enum quant_format format;
    uint64_t shard_bytes;
    int n_workers; /* 0: one for each processor */
    bool overwrite;
};

/* All may be NULL; called from any thread, one at a time. */
struct convert_events {
    void (*on_check)(void *ctx, uint64_t total); /* everything is written; so many bytes will be read back */
    void (*on_bytes)(void *ctx, uint64_t bytes); /* of the source, then of the result */
    void *ctx;
};

struct convert; /* an opened and planned job */

/* Opens the cut and checks that the format has a place for all it holds; touches nothing on disk. */
int convert_open(struct convert **out, const struct convert_options *options);
void convert_close(struct convert *c);

struct convert_totals {
    uint64_t source_bytes, output_bytes;
    size_t n_linears; /* that are packed anew */
};
struct convert_totals convert_totals(const struct convert *c);
const struct model *convert_source(const struct convert *c);

/* A scale that the format's type does not have exactly is found here, and nothing is left then. */
int convert_run(struct convert *c, const struct convert_events *events);

#endif

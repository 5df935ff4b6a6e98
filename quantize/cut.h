/* The whole job: from a model folder to a cut folder. The result is built in OUT.partial, read back and compared
 * with what was meant to be written, and only then takes the name OUT; a failure or an interrupt leaves neither. */
#ifndef GEMCUT_QUANTIZE_CUT_H
#define GEMCUT_QUANTIZE_CUT_H

#include "quantize/calibrate.h"
#include "quantize/pipeline.h"
#include "runtime/model.h"

struct cut_options {
    const char *model; /* folder or cached "org/name" */
    const char *out;
    const char *device;  /* "cpu", "auto" */
    const char *version; /* of the program, for the record */
    struct recipe recipe;
    const struct dataset *data; /* ids to calibrate with in place of recipe.calib's text; NULL: read that */
    bool count_time;            /* of the kinds of work of a calibrated method */
    uint64_t shard_bytes;
    int n_workers; /* 0: one for each processor */
    bool
        resume; /* go on with what a run of a calibrated method has left in OUT.partial, if there is something */
    bool overwrite;  /* an existing OUT is replaced, if gemcut wrote it */
    bool skip_check; /* do not read the result back */
};

enum cut_stage {
    CUT_QUANTIZE, /* total: bytes of the source; of a calibrated method, everything that it leaves as it is */
    CUT_CALIBRATE, /* total: linears */
    CUT_CHECK      /* total: bytes of the result */
};

/* All may be NULL; called from any thread, one at a time. */
struct cut_events {
    void (*on_stage)(void *ctx, enum cut_stage stage, uint64_t total);
    void (*on_bytes)(void *ctx, uint64_t bytes);
    /* A linear is done. Its stats are filled where the method is calibrated. */
    void (*on_linear)(void *ctx, const struct cut_linear *linear);
    /* A block has been tuned; its linears follow. */
    void (*on_block)(void *ctx, const struct calibrated_block *block);
    void *ctx;
};

struct cut; /* an opened and planned job */

/* Opens the model, checks it and plans; touches nothing on disk. */
int cut_open(struct cut **out, const struct cut_options *options);
void cut_close(struct cut *cut);

/* What the plan comes to. */
struct cut_totals {
    uint64_t source_bytes, output_bytes, memory_bytes;
    size_t n_tensors, n_linears, n_kept; /* kept: linears that stay in 16 bits */
    int64_t n_parameters, n_quantized;   /* elements of all tensors; of quantized linears */
    int n_workers;
    struct calibrate_plan calibration; /* zeros, unless calibrated; its memory is counted by itself */
};
struct cut_totals cut_totals(const struct cut *cut);
const struct model *cut_source(const struct cut *cut);
const struct recipe_plan *cut_plan(const struct cut *cut);

/* Seconds that cut_run will take, from a short measurement of this machine's kernels; storage is assumed to keep
 * up with 2 GB/s. */
int cut_estimate(const struct cut *cut, double *seconds);

int cut_run(struct cut *cut, const struct cut_events *events);

/* Some linear of that layer, with what its block has in common; NULL where none is quantized. */
const struct cut_linear *cut_block(const struct cut *cut, int layer);

/* What is known of a quantized linear, as members of a JSON object that is open. */
void cut_write_stats(const struct recipe *r, const struct cut_linear *l, struct text *out);

/* After cut_run. */
const struct cut_linear *cut_linears(const struct cut *cut, size_t *n);
const double *cut_seconds(const struct cut *cut);      /* [N_WORK]; zeros unless they were counted */
const struct dataset *cut_data(const struct cut *cut); /* what was calibrated with */
size_t cut_recalled(const struct cut *cut);            /* linears that a resumed run had finished */

#endif

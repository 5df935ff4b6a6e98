/* The stream from a source checkpoint to a writer. Every tensor is cut into runs of rows; a worker reads a run,
 * quantizes or passes it on, hashes it and writes it in its place. Memory is bounded by a run of rows for each
 * worker and the scales of the few tensors under way. What is cut where follows from the shapes alone, so the
 * result does not depend on the number of workers.
 *
 * With a recipe that is calibrated, the run passes on what is not quantized and hashes the weights that are; their codes
 * come from elsewhere (quantize/calibrate.h), by pipeline_deliver. */
#ifndef GEMCUT_QUANTIZE_PIPELINE_H
#define GEMCUT_QUANTIZE_PIPELINE_H

#include "base/hash.h"
#include "base/parallel.h"
#include "formats/checkpoint.h"
#include "formats/writer.h"
#include "quantize/calibrate.h"
#include "quantize/journal.h"
#include "quantize/linear_out.h"
#include "quantize/recipe.h"

/* One quantized linear, for the record. */
struct cut_linear {
    const struct linear_plan *plan;
    struct hash128 source_hash; /* of the weight that was quantized */
    double error;               /* ‖W − Ŵ‖ / ‖W‖; 0 for an all-zero weight */
    int64_t n_nonfinite;        /* values that were taken as 0 (allow_nonfinite) */
    struct gptq_stats stats;    /* when the recipe is calibrated */
    struct tune_stats tuned;    /* of its block, when that has been tuned */
};

struct pipeline;

/* What is told while it runs, from any thread but one at a time. */
struct pipeline_events {
    void (*on_bytes)(void *ctx, uint64_t source_bytes);            /* read since the last call */
    void (*on_linear)(void *ctx, const struct cut_linear *linear); /* a linear is done */
    void *ctx;
};

/* Matches the source's tensors with the plan and announces the output to the writer. b: the device that will run it. */
int pipeline_open(struct pipeline **out, const struct checkpoint *source, const struct gemma_tensors *tensors,
                  const struct recipe_plan *plan, const struct recipe *recipe, struct writer *writer,
                  const struct backend *b);
void pipeline_close(struct pipeline *p);

/* Bytes to read, and the most that the run will hold in memory with that many workers. */
uint64_t pipeline_source_bytes(const struct pipeline *p);
uint64_t pipeline_worker_bytes(const struct pipeline *p); /* of them, taken from the backend by one worker */
uint64_t pipeline_memory_bytes(const struct pipeline *p, int n_workers);

/* One block of made-up weights through the kernels that a recipe without calibration will use. */
int pipeline_measure(const struct backend *b, const struct recipe *r, double *seconds_per_weight);

/* Runs everything; the writer has begun. Each worker opens a handle of its own beside b. */
int pipeline_run(struct pipeline *p, struct parallel *pool, const struct backend *b,
                 const struct pipeline_events *events);

/* The result of a linear of a calibrated recipe: q on the host, rows without gaps. Once for each, in any order, after
 * pipeline_run; from one thread. *entry: what to note of it. */
int pipeline_deliver(struct pipeline *p, const struct calibrated_linear *linear, struct journal_entry *entry);

/* The same for a result that an earlier run has written, which is read into q: 1; or 0 where the weight is another now,
 * or the files do not hold what was noted. */
int pipeline_recall(struct pipeline *p, const struct linear_plan *linear, const struct qmat *q,
                    const struct journal_entry *entry);

/* Results, after pipeline_run in the order of the source. */
const struct written_tensor *pipeline_tensors(const struct pipeline *p, size_t *n);
const struct cut_linear *pipeline_linears(const struct pipeline *p, size_t *n);

#endif

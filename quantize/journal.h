/* What a calibrated run has finished, beside its unfinished result, so that a later run can go on from there: a first
 * line that says what was asked for, then a line for each linear with the hashes of what was written for it. The codes
 * themselves lie in the weight files already; the activations are made again from them. A line that was not finished,
 * and whatever stands behind it, does not count. */
#ifndef GEMCUT_QUANTIZE_JOURNAL_H
#define GEMCUT_QUANTIZE_JOURNAL_H

#include "base/hash.h"
#include "quantize/gptq.h"
#include "quantize/tuning.h"

#include <stdbool.h>

#define JOURNAL_NAME ".gemcut-journal"

/* What must be the same for a run to go on. */
struct journal_key {
    const char *version, *backend, *recipe; /* recipe: as JSON */
    struct hash128 source;                  /* of the model's config.json */
    struct hash128 ids;                     /* of the calibration's tokens */
};

struct journal_entry {
    struct hash128 source;                /* of the weight */
    struct hash128 packed, scales, zeros; /* of what was written; zeros: where there are zero points */
    struct gptq_stats stats;
    struct tune_stats tuned;
    int64_t n_nonfinite;
};

struct journal;

/* Begins a journal, or with `resume` goes on with the one that is there, if there is one: another key is then an error
 * that says what differs. */
int journal_open(struct journal **out, const char *path, const struct journal_key *key, bool resume);
void journal_close(struct journal *j);

/* NULL: not finished. */
const struct journal_entry *journal_find(const struct journal *j, const char *name);
size_t journal_entries(const struct journal *j);

/* Appends to the file at once. */
int journal_add(struct journal *j, const char *name, const struct journal_entry *entry);

#endif

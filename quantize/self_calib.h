/* Calibration samples that the model writes itself: it is calibrated on its own distribution, and no text is needed.
 * Each sample begins with <bos>, half of them go on with the beginning of a user's turn where the tokenizer has turns,
 * and everything after that is drawn from the model. After <eos> follows <bos>, a new document in the same sample;
 * the end of a turn ends nothing, for the answer comes after it.
 *
 * A cache of what was written: one file for a model, backend and options, which holds ids and their hash. */
#ifndef GEMCUT_QUANTIZE_SELF_CALIB_H
#define GEMCUT_QUANTIZE_SELF_CALIB_H

#include "base/hash.h"
#include "calib/dataset.h"
#include "runtime/forward.h"

struct self_options {
    int64_t samples, length; /* both ≥ 1 */
    uint64_t seed;
    float temperature; /* 1: the model's own distribution; 0: always the most likely token */
    double turns;      /* share of samples that begin as a user's turn, in [0, 1] */
    int64_t at_a_time; /* samples that are written side by side; 0 = as many as memory allows */
};

/* Temperature 1, half of the samples as turns. */
struct self_options self_options_default(int64_t samples, int64_t length, uint64_t seed);

/* Told how many tokens were written since the last call. */
typedef void (*self_progress)(void *ctx, int64_t n_tokens);

/* Which tokens a sample gets depends on its place and the seed, but for rounding not on at_a_time. on_tokens may be
 * NULL. `used` stays empty: there are no documents of anybody. */
int self_calib_make(struct dataset *out, const struct weights *w, const struct tokenizer *t,
                    const struct self_options *o, self_progress on_tokens, void *ctx);

/* Samples that self_calib_make writes side by side: as many as the backend wants logits of and has free memory for,
 * shared out evenly. At least 1. */
int64_t self_calib_at_a_time(const struct weights *w, const struct self_options *o);

/* --- cache -------------------------------------------------------------------------------------------------------- */

/* path: gemcut/self-KEY.ids in $XDG_CACHE_HOME or ~/.cache; NULL where neither is set: then nothing is kept. */
struct self_cache {
    char *path;
    struct hash128 key;
};

/* The key is a hash of the method's version, the options that matter, config.json, the backend, what the tokenizer
 * calls its control tokens, and of each tensor its name, dtype, shape and a few pieces of its bytes: another training
 * changes all of them, while a single byte changed by hand would not be seen. */
int self_calib_path(struct self_cache *out, const struct model *m, const struct tokenizer *t,
                    const struct self_options *o, const char *backend);
void self_cache_free(struct self_cache *c);

/* 1 and the samples; 0 where there is no such file or, with a warning, a damaged or foreign one; or a negative error.
 * Ids are in [0, n_tokens_max). */
int self_calib_load(struct dataset *out, const struct self_cache *c, const struct self_options *o,
                    int64_t n_tokens_max);

/* A file that cannot be written is a warning. */
void self_calib_save(const struct dataset *d, const struct self_cache *c);

#endif

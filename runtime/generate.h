/* Writing text: choosing the next token from logits, and the loop around it. */
#ifndef GEMCUT_RUNTIME_GENERATE_H
#define GEMCUT_RUNTIME_GENERATE_H

#include "base/rng.h"
#include "runtime/forward.h"

#include <stdbool.h>

struct sampling {
    double temperature; /* 0 = the most likely token */
    int64_t top_k;      /* 0 = all */
    double top_p;       /* 1 = all */
    uint64_t seed;
};

/* The next token from logits [n] (overwritten). `order` is scratch of n ids. Ties go to the lower id. */
int32_t sample_token(float *logits, int32_t n, const struct sampling *s, struct rng *rng, int32_t *order);

/* Ids that end a text. */
struct stop_ids {
    int32_t ids[16];
    size_t n;
};

/* What generation_config.json, or else config.json, calls eos_token_id: a number or a list of them. */
int generate_stop_ids(struct stop_ids *out, const struct model *m);

enum generate_end { GENERATE_STOP_ID, GENERATE_LENGTH, GENERATE_CONTEXT };

/* Told every token as it is chosen; a stop id is not told. A negative return ends the loop. */
typedef int (*generate_callback)(void *ctx, int32_t id, float log_probability);

struct generate_result {
    enum generate_end end;
    int64_t n_prompt, n_new;
    double prefill_seconds, decode_seconds;
};

/* Tokens that generate_run feeds at a time: max_rows of a forward pass of that many positions. */
int64_t generate_rows(int64_t positions);

/* Continues the prompt (at least one token) by at most max_new tokens. */
int generate_run(struct forward *f, const struct weights *w, const int32_t *prompt, int64_t n_prompt,
                 int64_t max_new, const struct sampling *s, const struct stop_ids *stop,
                 generate_callback on_token, void *ctx, struct generate_result *result);

#endif

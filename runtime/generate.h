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

/* How a model's makers want it to be run. */
struct generate_defaults {
    struct stop_ids stop;
    struct sampling sampling; /* its seed is 0 */
};

/* generation_config.json: "eos_token_id", a number or a list of them, which config.json may say instead, and which is 1
 * where neither does; "temperature", "top_k" and "top_p", where they are not said 1, 64 and 0.95, which Gemma 3 and 4
 * ship; "do_sample": false is temperature 0. */
int generate_defaults_read(struct generate_defaults *out, const struct model *m);

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

/* A model set up to run: weights on a device, tokenizer, and what is measured or written with them. */
#ifndef GEMCUT_REPORT_RUN_H
#define GEMCUT_REPORT_RUN_H

#include "formats/tokenizer.h"
#include "report/behaviour.h"
#include "runtime/generate.h"

/* A bound model with its tokenizer and its weights. The model must stay open. */
struct runnable {
    const struct model *model;
    struct weights weights;
    struct tokenizer *tokenizer;
};

/* The tokenizer alone; runnable_load brings the weights to the device. */
int runnable_open(struct runnable *out, const struct model *m);
int runnable_load(struct runnable *r, const struct backend *b);
void runnable_close(struct runnable *r);

struct run_need;

/* A model opened by name, on a device of its own. */
struct session {
    struct backend backend;
    struct model model;
    struct runnable runnable;
};

/* Release with session_close whatever it returns. n_threads: as backend_open takes it. session_load follows, when it is
 * known what is to be run; need: as run_plan takes and leaves it, the model is filled in. */
int session_open(struct session *out, const char *name, const char *device, int n_threads);
int session_load(struct session *s, struct run_need *need);
void session_close(struct session *s);

/* How much of the device's memory running n_models (bound, not loaded) takes, with n_sequences of `positions` tokens at
 * a time, each fed at most `rows` of them, and their logits. */
struct run_need {
    const struct model *const *models;
    int n_models;
    int64_t n_sequences, positions, rows;
    int64_t logit_rows; /* 0: as many as behaviour_logit_rows says */
};

/* Lowers need->n_sequences from what is asked until everything fits the device and --memory; when one does not fit
 * either, ERR_MEMORY says what is needed for what, and what there is. */
int run_plan(const struct backend *b, struct run_need *need);

/* Windows of that length that are worth running together on this device, at most n. */
int64_t run_batch(const struct backend *b, int64_t length, int64_t n);

/* Windows of text for a model: the file at `path`, or with NULL the text that ships with gemcut. */
int run_windows_of(struct windows *out, const struct runnable *r, const char *path, int64_t length,
                   int64_t n);

/* Refuses a prompt that the model cannot be given: longer than its context, with ids that its embedding does not
 * have, or with those that stand for a picture or a sound. */
int run_check_prompt(const struct runnable *r, const struct token_list *ids);

/* The prompt continued by n tokens, most likely first, as text in fresh memory. */
int run_continuation(char **out, const struct runnable *r, const char *prompt, int64_t n);

#endif

/* A model set up to run: weights on a device, tokenizer, and what is measured or written with them. */
#ifndef GEMCUT_REPORT_RUN_H
#define GEMCUT_REPORT_RUN_H

#include "formats/tokenizer.h"
#include "report/behaviour.h"
#include "runtime/generate.h"

/* A bound model's weights, loaded, with its tokenizer. The model must stay open. */
struct runnable {
    const struct model *model;
    struct weights weights;
    struct tokenizer *tokenizer;
};

int runnable_open(struct runnable *out, const struct model *m, const struct backend *b);
void runnable_close(struct runnable *r);

/* A model opened by name, on a device of its own. */
struct session {
    struct backend backend;
    struct model model;
    struct runnable runnable;
};

/* Release with session_close whatever it returns. n_threads: as backend_open takes it. */
int session_open(struct session *out, const char *name, const char *device, int n_threads);
void session_close(struct session *s);

/* Windows of text for a model: the file at `path`, or with NULL the text that ships with gemcut. */
int run_windows_of(struct windows *out, const struct runnable *r, const char *path, int64_t length,
                   int64_t n);

/* Refuses a prompt that the model cannot be given: longer than its context, with ids that its embedding does not
 * have, or with those that stand for a picture. */
int run_check_prompt(const struct runnable *r, const struct token_list *ids);

/* The prompt continued by n tokens, most likely first, as text in fresh memory. */
int run_continuation(char **out, const struct runnable *r, const char *prompt, int64_t n);

#endif

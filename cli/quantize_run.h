/* What `gemcut quantize` shows: the plan, how far it is, and what came of it. */
#ifndef GEMCUT_CLI_QUANTIZE_RUN_H
#define GEMCUT_CLI_QUANTIZE_RUN_H

#include "quantize/cut.h"

struct quantize_job {
    const struct recipe *recipe;
    const char *out, *device;
    const char *report; /* a file, or NULL */
    bool dry_run, no_verify;
};

/* Runs a planned cut, or with dry_run describes what it would do. */
int quantize_run(struct cut *cut, const struct quantize_job *job);

#endif

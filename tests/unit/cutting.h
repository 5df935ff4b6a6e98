/* Cutting a made-up model, for the tests of whole cuts. */
#ifndef GEMCUT_TESTS_UNIT_CUTTING_H
#define GEMCUT_TESTS_UNIT_CUTTING_H

#include "quantize/convert.h"
#include "quantize/cut.h"
#include "tests/unit/tiny_gemma.h"

/* w4a16, groups of 128, range, one shard, two threads. */
struct cut_options cutting_options(const char *model, const char *out);

/* Opens, runs and closes; on_* may be NULL. A success has a small weight error for each linear. */
int cutting_run(const struct cut_options *options, const struct cut_events *events);
extern const struct cut_events cutting_silent;

/* The same of a conversion, into one shard by two threads. */
int cutting_convert(const char *from, const char *to, enum quant_format format);

/* Runs in a child process that is killed on its way, by the events below. */
void cutting_run_killed(const struct cut_options *options, const struct cut_events *events);

/* on_linear: at the *(int *)ctx-th linear; on_stage: when the result is read back. */
void cutting_kill_here(void *ctx, const struct cut_linear *linear);
void cutting_kill_at_check(void *ctx, enum cut_stage stage, uint64_t total);

/* The model's folder under the test's; written at the first call with that name. */
const char *cutting_model(const char *name, const struct tiny_gemma *g);

/* A file of both folders has the same bytes. */
void cutting_check_same_file(const char *a, const char *b, const char *name);

/* Both folders have the same files with the same bytes. */
void cutting_check_same(const char *a, const char *b);

/* "OUT.partial" in the storage of support_path. */
const char *cutting_partial(const char *out);

/* Neither OUT nor OUT.partial is there. */
void cutting_check_absent(const char *out);

#endif

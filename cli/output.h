/* What the program says. stdout carries the result: text for people, or with --json exactly one document, errors
 * included. stderr carries complaints and notes. One process has one output, so its state is global; it is set
 * before threads start, and every function that writes to stderr may be called from any thread. */
#ifndef GEMCUT_CLI_OUTPUT_H
#define GEMCUT_CLI_OUTPUT_H

#include "base/text.h"
#include "cli/opt.h"

#include <stdbool.h>
#include <stdint.h>

enum exit_code {
    EXIT_DONE = 0,
    EXIT_NO = 1,     /* ran, and the answer is no */
    EXIT_USAGE = 2,  /* the request is wrong */
    EXIT_FAILED = 3, /* could not */
};

/* The options that every command has, a member of its argument struct. */
struct output_options {
    bool json, quiet, verbose;
    bool fake_terminal; /* draw progress as on a terminal of 100 columns, for tests */
};

/* The rows of the option table for member `m` of struct `s`, last in a command's table. */
#define OUTPUT_OPTS(s, m)                                                                                    \
    {OPT_SECTION("General")},                                                                                \
        {.name = "json", OPT_TO_FLAG(s, m.json), .help = "one JSON document on stdout, for errors too"},     \
        {.name = "quiet", .letter = 'q', OPT_TO_FLAG(s, m.quiet), .help = "print nothing but errors"},       \
        {.name = "verbose", .letter = 'v', OPT_TO_FLAG(s, m.verbose), .help = "print more on stderr"},       \
    {                                                                                                        \
        .name = "fake-terminal", OPT_TO_FLAG(s, m.fake_terminal), .hidden = true, .help = ""                 \
    }

/* Names the command under way ("quantize"; NULL: none) and whether an error before its options are read is to be
 * JSON. The string is kept. */
void output_start(const char *command, bool json);

/* Takes over the parsed options. ERR_USAGE when they contradict each other. */
int output_configure(const struct output_options *options);

bool output_json(void);
bool output_verbose(void);

/* The result as text for people; frees t. With -q nothing is printed, with --json this must not be called. */
int output_print(struct text *t);

/* What was asked for in so many words, help or a version: printed whatever the level; frees t. */
int output_print_always(struct text *t);

/* The result as JSON: the common head on a zeroed text; then the command's members; then the end, which prints
 * and frees t. device and seed are left out when NULL. */
void output_json_begin(struct text *t, const char *device, const int64_t *seed);
int output_json_end(struct text *t);

/* A line on stderr: not with -q; only with -v. Control bytes are replaced. */
void output_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void output_detail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* The log sink: "gemcut: warning: …" on stderr, not with -q. */
void output_warning(void *ctx, const char *message);

/* Ends the program's output: reports the recorded error when rc is negative, flushes stdout and reports when that
 * fails. rc: 0, 1 for "no", or an enum err. */
enum exit_code output_finish(int rc);

#endif

#include "cli/output.h"

#include "base/err.h"
#include "cli/human.h"
#include "cli/progress.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *command;
    bool json, quiet, verbose;
    bool document_written; /* with --json there is only one */
    int write_errno;       /* why stdout failed first */
} state;

void output_start(const char *command, bool json)
{
    state.command = command;
    state.json = json;
}

int output_configure(const struct output_options *options)
{
    state.json = options->json;
    if (options->quiet && options->verbose)
        return err_set(ERR_USAGE, "options '--quiet' and '--verbose' exclude each other");
    state.quiet = options->quiet;
    state.verbose = options->verbose;
    progress_setup(options->quiet, options->fake_terminal);
    return 0;
}

bool output_json(void)
{
    return state.json;
}

bool output_verbose(void)
{
    return state.verbose;
}

/* ---- stdout ---- */

/* A failure is remembered and reported by output_finish: a result that is lost must not look like success. */
static int write_stdout(struct text *t)
{
    const int rc = text_finish(t);
    if (rc == 0 && fwrite(t->data, 1, t->len, stdout) < t->len && !state.write_errno)
        state.write_errno = errno ? errno : EIO;
    text_free(t);
    return rc;
}

int output_print_always(struct text *t)
{
    progress_end();
    return write_stdout(t);
}

int output_print(struct text *t)
{
    CHECK(!state.json);
    if (!state.quiet)
        return output_print_always(t);
    text_free(t);
    return 0;
}

void output_json_begin(struct text *t, const char *device, const int64_t *seed)
{
    char schema[64];
    snprintf(schema, sizeof schema, "gemcut.%s/1", state.command ? state.command : "error");
    t->indent = 2;
    json_begin_object(t);
    json_kv_string(t, "schema", schema);
    json_kv_string(t, "version", GEMCUT_VERSION);
    if (device)
        json_kv_string(t, "device", device);
    if (seed)
        json_kv_int(t, "seed", *seed);
}

int output_json_end(struct text *t)
{
    CHECK(!state.document_written);
    json_end_object(t);
    CHECK(t->failed || t->depth == 0);
    text_add(t, "\n");
    state.document_written = !t->failed;
    return output_print_always(t);
}

/* ---- stderr ---- */

static void print_line(const char *prefix, const char *fmt, va_list args)
{
    char text[4096];
    const int n = snprintf(text, sizeof text, "%s", prefix);
    vsnprintf(text + n, sizeof text - (size_t)n, fmt, args);
    human_clean(text);
    progress_print_line(text);
}

void output_note(const char *fmt, ...)
{
    if (state.quiet)
        return;
    va_list args;
    va_start(args, fmt);
    print_line("", fmt, args);
    va_end(args);
}

void output_detail(const char *fmt, ...)
{
    if (!state.verbose)
        return;
    va_list args;
    va_start(args, fmt);
    print_line("", fmt, args);
    va_end(args);
}

static __attribute__((format(printf, 2, 3))) void complain(const char *prefix, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    print_line(prefix, fmt, args);
    va_end(args);
}

void output_warning(void *ctx, const char *message)
{
    (void)ctx;
    if (!state.quiet)
        complain("gemcut: warning: ", "%s", message);
}

/* ---- the end ---- */

static enum exit_code exit_code(int rc)
{
    switch (rc) {
    case 0:
        return EXIT_DONE;
    case 1:
        return EXIT_NO;
    case ERR_USAGE:
        return EXIT_USAGE;
    default:
        return EXIT_FAILED;
    }
}

static void report_error(int rc)
{
    if (state.json && !state.document_written) {
        struct text t = {0};
        output_json_begin(&t, NULL, NULL);
        json_put_key(&t, "error");
        json_begin_object(&t);
        json_kv_string(&t, "kind", err_name(rc));
        json_kv_string(&t, "message", err_message());
        json_end_object(&t);
        if (output_json_end(&t) == 0)
            return;
    }
    /* a usage error is about the command line, so it names the command that read it */
    if (rc == ERR_USAGE && state.command)
        complain("gemcut ", "%s: %s", state.command, err_message());
    else
        complain("gemcut: ", "%s", err_message());
}

enum exit_code output_finish(int rc)
{
    progress_end();
    if (rc < 0)
        report_error(rc);
    errno = 0;
    const bool flushed = fflush(stdout) == 0 && !ferror(stdout);
    if (!flushed && !state.write_errno)
        state.write_errno = errno ? errno : EIO;
    if (!state.write_errno)
        return exit_code(rc);
    complain("gemcut: ", "cannot write to stdout: %s", strerror(state.write_errno));
    return EXIT_FAILED;
}

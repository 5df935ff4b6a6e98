/* Errors as values. A function that can fail returns 0 or a negative `enum err`; the message is recorded in
 * thread-local storage where the detail is known, and callers hand the code up. Libraries never print or exit.
 * A message names the file, the object, what was found and what was expected, in one line. */
#ifndef GEMCUT_BASE_ERR_H
#define GEMCUT_BASE_ERR_H

enum err {
    ERR_OK = 0,
    ERR_USAGE = -1,       /* the request itself is wrong                  → exit 2 */
    ERR_IO = -2,          /* the system refused to read or write          → exit 3 */
    ERR_FORMAT = -3,      /* a file is not what it should be              → exit 3 */
    ERR_MEMORY = -4,      /* out of host or device memory                 → exit 3 */
    ERR_UNSUPPORTED = -5, /* well-formed, but nothing gemcut can work on  → exit 3 */
    ERR_INTERRUPTED = -6, /* SIGINT or SIGTERM                            → exit 3 */
};

/* Records the message and returns `code`, so that callers write `return err_set(…)`. */
int err_set(enum err code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* As err_set(ERR_IO, …), with ": " and the text of `errno` appended. */
int err_errno(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Puts "context: " in front of the recorded message; returns `code` unchanged. */
int err_context(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The message last recorded on this thread; "" when there was none. Valid until the next err_* call. */
const char *err_message(void);

/* Name of a code, e.g. "format"; used in JSON output. */
const char *err_name(int code);

/* An invariant of the program, not of its input. Stays on in Release; prints file, line and condition, aborts. */
#define CHECK(cond) ((cond) ? (void)0 : err_check_failed(#cond, __FILE__, __LINE__))
void err_check_failed(const char *cond, const char *file, int line) __attribute__((noreturn));

/* Set by the signal handler; long loops poll it and return err_interrupted(). */
void err_request_interrupt(void);
int err_interrupt_requested(void);
int err_interrupted(void);

#endif

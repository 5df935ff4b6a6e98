#include "base/err.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MESSAGE_BYTES = 2048 };

static _Thread_local char message[MESSAGE_BYTES];
static volatile sig_atomic_t interrupt_requested;

/* Control bytes would break the promise of one line and could drive a terminal: file names and tensor names
 * come from outside. */
static void make_printable(char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f)
            *s = '?';
}

int err_set(enum err code, const char *fmt, ...)
{
    char text[MESSAGE_BYTES]; /* the arguments may point into `message` */
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    make_printable(text);
    memcpy(message, text, sizeof message);
    return code;
}

int err_errno(const char *fmt, ...)
{
    const int saved = errno;
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return err_set(ERR_IO, "%s: %s", text, strerror(saved));
}

int err_context(int code, const char *fmt, ...)
{
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return err_set((enum err)code, "%s: %s", text, message);
}

const char *err_message(void)
{
    return message;
}

const char *err_name(int code)
{
    switch (code) {
    case ERR_OK:
        return "ok";
    case ERR_USAGE:
        return "usage";
    case ERR_IO:
        return "io";
    case ERR_FORMAT:
        return "format";
    case ERR_MEMORY:
        return "memory";
    case ERR_UNSUPPORTED:
        return "unsupported";
    case ERR_INTERRUPTED:
        return "interrupted";
    default:
        return "unknown";
    }
}

void err_check_failed(const char *cond, const char *file, int line)
{
    fprintf(stderr, "gemcut: internal error: %s does not hold (%s:%d)\n", cond, file, line);
    abort();
}

void err_request_interrupt(void)
{
    interrupt_requested = 1;
}

int err_interrupt_requested(void)
{
    return interrupt_requested != 0;
}

int err_interrupted(void)
{
    return err_set(ERR_INTERRUPTED, "interrupted");
}

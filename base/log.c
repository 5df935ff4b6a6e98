#include "base/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static log_sink sink;
static void *sink_ctx;

void log_set_sink(log_sink fn, void *ctx)
{
    sink = fn;
    sink_ctx = ctx;
}

void log_warn(const char *fmt, ...)
{
    if (!sink)
        return;
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    pthread_mutex_lock(&lock);
    sink(sink_ctx, text);
    pthread_mutex_unlock(&lock);
}

/* Warnings from libraries, which never print: they go to a sink that the program installs. Without one they
 * are dropped. Results do not travel here, only what a user should know although the call succeeded. */
#ifndef GEMCUT_BASE_LOG_H
#define GEMCUT_BASE_LOG_H

typedef void (*log_sink)(void *ctx, const char *message);

/* Installs the receiver of warnings; NULL drops them. Called once, before threads start. */
void log_set_sink(log_sink sink, void *ctx);

/* One line without a newline. May be called from any thread; the sink is entered by one thread at a time. */
void log_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif

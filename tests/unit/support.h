/* What several unit tests need: cmocka with its headers, temporary folders, small files, reproducible random
 * numbers. A test that uses it owns one folder at a time, which is removed with all that lies in it. */
#ifndef GEMCUT_TESTS_UNIT_SUPPORT_H
#define GEMCUT_TESTS_UNIT_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/err.h"

#define N_OF(array) (sizeof(array) / sizeof *(array))

/* A call that must succeed; its message is shown when it does not. */
#define assert_ok(call) support_assert_ok((call), #call, __FILE__, __LINE__)
void support_assert_ok(int rc, const char *call, const char *file, int line);

/* A call that must fail with `code` and a message that contains `part`. */
#define assert_error(call, code, part) support_assert_error((call), (code), (part), #call, __FILE__, __LINE__)
void support_assert_error(int rc, int code, const char *part, const char *call, const char *file, int line);

/* Group fixtures: a fresh folder under $TMPDIR or /tmp, and its removal. */
int support_make_folder(void **state);
int support_remove_folder(void **state);
const char *support_folder(void);

/* "FOLDER/name" in static storage; 64 calls later it is overwritten. */
const char *support_path(const char *format, ...) __attribute__((format(printf, 1, 2)));

void support_write(const char *path, const void *data, size_t n);
char *support_read(const char *path, size_t *n); /* released with free() */

/* splitmix64; the same numbers on every machine. */
uint64_t support_random(uint64_t *state);
double support_uniform(uint64_t *state); /* in [−1, 1) */

#endif

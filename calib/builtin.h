/* Text that ships inside the program, so that a model can be judged and calibrated without any file:
 * data/eval/prose.txt and data/calib/builtin.jsonl.zst. They share no text. Sources and licences: data/MANIFEST.json,
 * data/calib/SOURCES.md. */
#ifndef GEMCUT_CALIB_BUILTIN_H
#define GEMCUT_CALIB_BUILTIN_H

#include <stddef.h>

/* English essays, UTF-8, not NUL-terminated. */
const char *builtin_prose(size_t *len);

/* A mixture of prose, languages, source code and conversations: the bytes of a .jsonl.zst for documents_parse. */
const void *builtin_calibration(size_t *len);

#endif

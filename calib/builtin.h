/* Text that ships inside the program, so that a model can be judged without any file: data/eval/prose.txt. */
#ifndef GEMCUT_CALIB_BUILTIN_H
#define GEMCUT_CALIB_BUILTIN_H

#include <stddef.h>

/* English essays, UTF-8, not NUL-terminated. Source and licence: data/MANIFEST.json. */
const char *builtin_prose(size_t *len);

#endif

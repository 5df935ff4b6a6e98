/* Documents from files, for calibration. What a file holds is told by its name:
 *   .txt     one document, as it is
 *   .jsonl   one JSON object a line, each a document: "text" is one, else "messages" is a conversation, written in the
 *            model's chat format. Lines without either are an error, blank ones are skipped.
 * each also with .zst appended. Text is UTF-8; a byte order mark at its start is dropped. Files are read whole:
 * decompressed they may have DOCUMENTS_MAX_BYTES, and one document or line 1 GiB. */
#ifndef GEMCUT_CALIB_TEXT_H
#define GEMCUT_CALIB_TEXT_H

#include "formats/chat_template.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DOCUMENTS_MAX_BYTES ((uint64_t)4 << 30)
#define DOCUMENTS_BUILTIN   "builtin" /* the file name that means builtin_calibration() */

struct document {
    char *text; /* [len] UTF-8 and a NUL, owned; may be empty and, from .txt, hold NULs */
    size_t len;
    size_t line;  /* where it begins in the file, from 1 */
    bool is_chat; /* control tokens are spelled out in the text, "<bos>" first */
};

/* In file order. */
struct documents {
    struct document *list;
    size_t n;
    enum chat_format chat; /* that conversations are written in */
};

/* Reads a file, or with DOCUMENTS_BUILTIN the mixture that ships with gemcut. Errors name the file and, where there are
 * lines, the line. */
int documents_read(struct documents *out, const char *path, enum chat_format chat);

/* The same from memory: a file called `name` of `len` bytes, which may grow to max_bytes when it is decompressed. */
int documents_parse(struct documents *out, const void *data, size_t len, const char *name,
                    enum chat_format chat, uint64_t max_bytes);
void documents_free(struct documents *d);

#endif

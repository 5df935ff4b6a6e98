/* Text as windows of token ids, the unit in which perplexity and divergence are measured. */
#ifndef GEMCUT_CALIB_WINDOWS_H
#define GEMCUT_CALIB_WINDOWS_H

#include "formats/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

struct windows {
    int32_t *ids; /* [n, length] */
    size_t n;
    int64_t length;
};

/* The text's tokens in order, cut into windows of <bos> and length − 1 of them; what does not fill a window is left
 * out; a <bos> that the text itself begins with is not there twice. At most max_windows (0 = all). Too little text for one window is an error that says how much there is.
 * n_tokens_max: ids must be below it (the model's vocabulary). `name` is used in messages. */
int windows_make(struct windows *out, const struct tokenizer *t, const char *text, size_t len, int64_t length,
                 size_t max_windows, int64_t n_tokens_max, const char *name);
void windows_free(struct windows *w);

#endif

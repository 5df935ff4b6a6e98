#include "calib/windows.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static int fill(struct windows *w, int32_t bos, const int32_t *ids)
{
    const size_t step = (size_t)w->length - 1;
    w->ids = mem_alloc(w->n * (size_t)w->length, sizeof *w->ids, "token windows");
    if (!w->ids)
        return ERR_MEMORY;
    for (size_t i = 0; i < w->n; i++) {
        int32_t *window = w->ids + i * (size_t)w->length;
        window[0] = bos;
        memcpy(window + 1, ids + i * step, step * sizeof *window);
    }
    return 0;
}

int windows_make(struct windows *w, const struct tokenizer *t, const char *text, size_t len, int64_t length,
                 size_t max_windows, int64_t n_tokens_max, const char *name)
{
    *w = (struct windows){.length = length};
    CHECK(length >= 2);
    struct token_list tokens = {0};
    int rc = tokenizer_encode(t, text, len, false, &tokens);
    for (size_t i = 0; !rc && i < tokens.n; i++)
        if (tokens.ids[i] >= n_tokens_max)
            rc = err_set(ERR_FORMAT,
                         "%s: has the token %d, the model's vocabulary ends at %lld: the tokenizer is not "
                         "this model's",
                         name, tokens.ids[i], (long long)n_tokens_max);
    const size_t skip = tokens.n && tokens.ids[0] == tokenizer_bos(t); /* a text that spells its own */
    if (!rc) {
        w->n = (tokens.n - skip) / ((size_t)length - 1);
        if (max_windows && w->n > max_windows)
            w->n = max_windows;
        rc = w->n ? fill(w, tokenizer_bos(t), tokens.ids + skip)
                  : err_set(ERR_USAGE, "%s: has %zu tokens, expected at least %lld for one window", name,
                            tokens.n - skip, (long long)length - 1);
    }
    token_list_free(&tokens);
    if (rc < 0)
        windows_free(w);
    return rc;
}

void windows_free(struct windows *w)
{
    free(w->ids);
    *w = (struct windows){0};
}

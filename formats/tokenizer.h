/* tokenizer.json as the Gemma families use it: byte-pair encoding over code points with byte fallback, spaces
 * written as U+2581, added tokens matched in the raw text. Ids are those of Hugging Face tokenizers, to the id.
 * Whatever else such a file can ask for (other models, normalizers, pre-tokenizers, decoders, added tokens that
 * strip or match whole words) is refused by name. Its truncation, padding and post_processor are not looked at:
 * length is the caller's matter, and <bos> follows one rule for every family, below.
 *
 * A tokenizer is constant after opening; any number of threads may use it at once.
 *
 * Text need not be valid UTF-8: each byte that is not part of a valid sequence becomes its byte token <0xXX>. A
 * run of byte tokens decodes to its bytes when they are valid UTF-8 as a whole, else to one U+FFFD per byte. So
 * decode(encode(x)) = x for valid UTF-8 in which no literal U+2581 stands: that one comes back as a space. */
#ifndef GEMCUT_FORMATS_TOKENIZER_H
#define GEMCUT_FORMATS_TOKENIZER_H

#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* Ids, owned; {0} is an empty list. */
struct token_list {
    int32_t *ids;
    size_t n, capacity;
};

void token_list_free(struct token_list *list);

/* Reads a tokenizer.json. */
int tokenizer_open(struct tokenizer **out, const char *path);

/* The same from memory; `name` is used in messages. */
int tokenizer_parse(struct tokenizer **out, const char *text, size_t len, const char *name);
void tokenizer_close(struct tokenizer *t);

/* One more than the largest id; ids in between may be unused. */
size_t tokenizer_n_tokens(const struct tokenizer *t);

/* The id of a token as the file spells it ("<end_of_turn>", "▁the"), or -1. */
int32_t tokenizer_token_id(const struct tokenizer *t, const char *name);

/* The spelling of an id, or NULL when the id is not used. */
const char *tokenizer_token_name(const struct tokenizer *t, int32_t id);

/* Marked "special" in the file; false for ids that are not used. */
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

int32_t tokenizer_bos(const struct tokenizer *t); /* <bos>; every file has it */
int32_t tokenizer_eos(const struct tokenizer *t); /* <eos>, or -1 */

/* Appends the ids of text[0..len), len < 4 GiB. add_bos puts <bos> in front unless the text itself begins with
 * it, whatever the file's post_processor says (Gemma 4's adds none, and every Gemma needs one). Time is
 * O(len · log len) for any text. On failure *out is as it was. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool add_bos,
                     struct token_list *out);

/* Appends the text of ids[0..n). Ids that are not used add nothing. skip_special leaves out special tokens. */
int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                     struct text *out);

/* Decoding token by token. Runs of byte tokens are held back until they end, so what is appended is always
 * whole characters, and the pieces together are what tokenizer_decode gives. */
struct token_stream {
    const struct tokenizer *tokenizer;
    bool skip_special;
    uint8_t *run; /* [n_run] byte tokens held back, owned */
    size_t n_run, capacity;
};

void token_stream_init(struct token_stream *s, const struct tokenizer *t, bool skip_special);
int token_stream_add(struct token_stream *s, int32_t id, struct text *out);
int token_stream_finish(struct token_stream *s, struct text *out); /* appends what is held back */
void token_stream_free(struct token_stream *s);

#endif

/* Messages to the text a Gemma was trained to answer. The formats are those of the models' own jinja templates,
 * character by character, errors included; see docs/formats.md. Text only: images and tools are not handled. */
#ifndef GEMCUT_FORMATS_CHAT_TEMPLATE_H
#define GEMCUT_FORMATS_CHAT_TEMPLATE_H

#include "base/text.h"
#include "formats/hf_config.h"
#include "formats/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>

enum chat_format {
    CHAT_GEMMA2, /* Gemma 1 and 2: no system role */
    CHAT_GEMMA3, /* Gemma 3 and 3n: a leading system message goes in front of the first turn */
    CHAT_GEMMA4, /* Gemma 4: turns of its own for system messages; the model's begins with a thought, here empty */
    CHAT_GEMMA4E, /* E2B and E4B: the same without the empty thought */
};

/* --- which one --------------------------------------------------------------------------------------------------- */

/* The enum chat_format of a family by the "model_type" of config.json or its text_config; -1 where none is known. Of
 * Gemma 4 that of the models without per-layer embeddings. */
int chat_template_of(const char *model_type);

/* The format of a model: that of its family, or where its tokenizer has only another one's control tokens, that one.
 * ERR_UNSUPPORTED for a model_type that chat_template_of does not know. */
int chat_template_choose(enum chat_format *out, const struct hf_config *cfg, const struct tokenizer *t);

/* The control tokens around a turn, "<start_of_turn>" and "<end_of_turn>". */
const char *chat_turn_begin(enum chat_format format);
const char *chat_turn_end(enum chat_format format);

/* How a user's turn opens by the control tokens that a tokenizer has, "<start_of_turn>user\n"; NULL: it has none. */
const char *chat_user_turn(const struct tokenizer *t);

/* --- rendering --------------------------------------------------------------------------------------------------- */

struct chat_message {
    const char *role; /* "user", "assistant" (written as "model"), "system" first */
    const char *
        content; /* UTF-8; white space at both ends is dropped, but up to Gemma 3 not from a system message */
};

/* Appends the conversation, which begins with "<bos>": tokenizer_encode gives it one <bos>, with add_bos or
 * without. add_generation_prompt opens the model's turn at the end, without thinking. Up to Gemma 3 roles must
 * alternate, user first. ERR_USAGE where the template raises an exception, and in Gemma 4 where its revisions
 * disagree: two messages of the assistant in a row, tools. Contents are not escaped: one that spells a control token
 * ("<end_of_turn>") becomes that token, as with the original templates; but thoughts, "<|channel>…<channel|>", are
 * taken out of what the assistant said. The roles are checked before anything is appended. */
int chat_template_render(enum chat_format format, const struct chat_message *messages, size_t n_messages,
                         bool add_generation_prompt, struct text *out);

/* Appends one part of a message that consists of several, as the templates do: without white space at both ends, and
 * in Gemma 4 without the assistant's thoughts. */
void chat_template_part(enum chat_format format, const char *role, const char *part, struct text *out);

#endif

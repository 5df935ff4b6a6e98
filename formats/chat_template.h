/* Messages to the text a Gemma was trained to answer. The formats are those of the models' own jinja templates,
 * character by character, errors included; see docs/formats.md. Text only: images and tools are not handled. */
#ifndef GEMCUT_FORMATS_CHAT_TEMPLATE_H
#define GEMCUT_FORMATS_CHAT_TEMPLATE_H

#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>

enum chat_format {
    CHAT_GEMMA2, /* Gemma 1 and 2: no system role */
    CHAT_GEMMA3, /* Gemma 3 and 3n: a leading system message goes in front of the first turn */
};

struct chat_message {
    const char *role;    /* "user", "assistant" (written as "model"), "system" first */
    const char *content; /* UTF-8; white space at both ends is dropped, but not from a system message */
};

/* Appends the conversation, which begins with "<bos>": tokenizer_encode gives it one <bos>, with add_bos or
 * without. add_generation_prompt opens the model's turn at the end. Roles must alternate, user first.
 * ERR_USAGE where the template raises an exception. Contents are not escaped: one that spells a control token
 * ("<end_of_turn>") becomes that token, as with the original templates. The roles are
 * checked before anything is appended. */
int chat_template_render(enum chat_format format, const struct chat_message *messages, size_t n_messages,
                         bool add_generation_prompt, struct text *out);

#endif

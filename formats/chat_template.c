#include "formats/chat_template.h"

#include "base/err.h"
#include "formats/utf8.h"

#include <string.h>

/* What Python's str.strip() takes away, which is what jinja's `trim` filter is: str.isspace(). */
static bool is_space(uint32_t cp)
{
    return (cp >= 0x09 && cp <= 0x0d) || (cp >= 0x1c && cp <= 0x20) || cp == 0x85 || cp == 0xa0 ||
           cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 || cp == 0x2029 || cp == 0x202f ||
           cp == 0x205f || cp == 0x3000;
}

static void append_trimmed(struct text *out, const char *content)
{
    const uint8_t *s = (const uint8_t *)content;
    size_t n = strlen(content), len;
    uint32_t cp = 0;
    while ((len = utf8_decode(s, n, &cp)) && is_space(cp)) {
        s += len;
        n -= len;
    }
    while (n) {
        size_t last = n - 1;
        while (last && (s[last] & 0xc0) == 0x80)
            last--;
        len = utf8_decode(s + last, n - last, &cp);
        if (last + len != n || !is_space(cp))
            break;
        n = last;
    }
    text_append(out, (const char *)s, n);
}

/* The turns alternate, user first; the system message has been taken off. */
static int check_roles(const struct chat_message *messages, size_t n, size_t n_system)
{
    for (size_t i = 0; i < n; i++) {
        const bool is_user = strcmp(messages[i].role, "user") == 0;
        if (is_user != (i % 2 == 0))
            return err_set(ERR_USAGE,
                           "message %zu has the role \"%.32s\": roles must alternate user/assistant",
                           i + n_system + 1, messages[i].role);
    }
    return 0;
}

int chat_template_render(enum chat_format format, const struct chat_message *messages, size_t n_messages,
                         bool add_generation_prompt, struct text *out)
{
    if (!n_messages)
        return err_set(ERR_USAGE, "a conversation without messages");
    const bool has_system = !strcmp(messages[0].role, "system");
    if (has_system && format == CHAT_GEMMA2)
        return err_set(ERR_USAGE, "message 1 has the role \"system\", which Gemma 1 and 2 do not support");
    const struct chat_message *turns = messages + has_system;
    const size_t n_turns = n_messages - has_system;
    const int rc = check_roles(turns, n_turns, has_system);
    if (rc < 0)
        return rc;
    text_add(out, "<bos>");
    for (size_t i = 0; i < n_turns; i++) {
        text_add(out, "<start_of_turn>");
        text_add(out, strcmp(turns[i].role, "assistant") ? turns[i].role : "model");
        text_add(out, "\n");
        if (i == 0 && has_system) {
            text_add(out, messages[0].content);
            text_add(out, "\n\n");
        }
        append_trimmed(out, turns[i].content);
        text_add(out, "<end_of_turn>\n");
    }
    if (add_generation_prompt)
        text_add(out, "<start_of_turn>model\n");
    return text_finish(out);
}

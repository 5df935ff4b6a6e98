#include "formats/chat_template.h"

#include "base/err.h"
#include "base/json.h"
#include "formats/utf8.h"

#include <string.h>

/* --- which one --------------------------------------------------------------------------------------------------- */

struct turns {
    const char *begin, *end, *user;
};

static const struct turns turns_before_4 = {"<start_of_turn>", "<end_of_turn>", "<start_of_turn>user\n"};
static const struct turns turns_of_4 = {"<|turn>", "<turn|>", "<|turn>user\n"};

static const struct turns *turns_of(enum chat_format format)
{
    return format < CHAT_GEMMA4 ? &turns_before_4 : &turns_of_4;
}

static bool has_turns(const struct tokenizer *t, const struct turns *turns)
{
    return tokenizer_token_id(t, turns->begin) >= 0;
}

int chat_template_of(const char *model_type)
{
    static const struct {
        const char *model_type;
        enum chat_format format;
    } known[] = {
        {"gemma", CHAT_GEMMA2},          {"gemma2", CHAT_GEMMA2},
        {"gemma3", CHAT_GEMMA3},         {"gemma3_text", CHAT_GEMMA3},
        {"gemma3n", CHAT_GEMMA3},        {"gemma3n_text", CHAT_GEMMA3},
        {"gemma4", CHAT_GEMMA4},         {"gemma4_text", CHAT_GEMMA4},
        {"gemma4_unified", CHAT_GEMMA4}, {"gemma4_unified_text", CHAT_GEMMA4},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].model_type, model_type))
            return (int)known[i].format;
    return -1;
}

/* Whether a Gemma 4 is an E2B or E4B, which per-layer embeddings tell. The class has them unless config.json says
 * otherwise; that of the 12B ("unified") does not know them. */
static int is_gemma4e(bool *out, const struct hf_config *cfg)
{
    const struct json size = json_member(cfg->text_config, "hidden_size_per_layer_input");
    int64_t width = size.node ? 0 : 256;
    const int rc = json_exists(size) ? json_as_int(size, 0, 1 << 24, &width) : 0;
    *out = width > 0 && strncmp(cfg->model_type, "gemma4_unified", strlen("gemma4_unified")) != 0;
    return rc;
}

int chat_template_choose(enum chat_format *out, const struct hf_config *cfg, const struct tokenizer *t)
{
    const int of_family = chat_template_of(cfg->model_type);
    bool e = false;
    if (of_family < 0)
        return err_set(ERR_UNSUPPORTED, "%s: no chat format is known for model_type '%s'", cfg->path,
                       cfg->model_type);
    const int rc = of_family == CHAT_GEMMA4 ? is_gemma4e(&e, cfg) : 0;
    *out = e ? CHAT_GEMMA4E : (enum chat_format)of_family;
    if (*out >= CHAT_GEMMA4 && !has_turns(t, &turns_of_4) && has_turns(t, &turns_before_4))
        *out = CHAT_GEMMA3;
    else if (*out < CHAT_GEMMA4 && !has_turns(t, &turns_before_4) && has_turns(t, &turns_of_4))
        *out = CHAT_GEMMA4E;
    return rc;
}

const char *chat_turn_begin(enum chat_format format)
{
    return turns_of(format)->begin;
}

const char *chat_turn_end(enum chat_format format)
{
    return turns_of(format)->end;
}

const char *chat_user_turn(const struct tokenizer *t)
{
    return has_turns(t, &turns_of_4)       ? turns_of_4.user
           : has_turns(t, &turns_before_4) ? turns_before_4.user
                                           : NULL;
}

/* --- contents ---------------------------------------------------------------------------------------------------- */

/* What Python's str.strip() takes away, which is what jinja's `trim` filter is: str.isspace(). */
static bool is_space(uint32_t cp)
{
    return (cp >= 0x09 && cp <= 0x0d) || (cp >= 0x1c && cp <= 0x20) || cp == 0x85 || cp == 0xa0 ||
           cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 || cp == 0x2029 || cp == 0x202f ||
           cp == 0x205f || cp == 0x3000;
}

static void append_trimmed(struct text *out, const char *content, size_t n)
{
    const uint8_t *s = (const uint8_t *)content;
    size_t len;
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

/* What the assistant said without its thoughts: of each piece that ends with "<channel|>" or with the text, what
 * stands in front of its first "<|channel>". */
static void append_answer(struct text *out, const char *content)
{
    static const char open[] = "<|channel>", close[] = "<channel|>";
    struct text answer = {0};
    for (const char *s = content; s;) {
        const char *end = strstr(s, close);
        const size_t n = end ? (size_t)(end - s) : strlen(s);
        const char *thought = memmem(s, n, open, sizeof open - 1);
        text_append(&answer, s, thought ? (size_t)(thought - s) : n);
        s = end ? end + sizeof close - 1 : NULL;
    }
    append_trimmed(out, answer.data ? answer.data : "", answer.len);
    out->failed |= answer.failed;
    text_free(&answer);
}

static bool is_model(const struct chat_message *m)
{
    return !strcmp(m->role, "assistant") || !strcmp(m->role, "model");
}

void chat_template_part(enum chat_format format, const char *role, const char *part, struct text *out)
{
    const struct chat_message m = {role, part};
    if (format >= CHAT_GEMMA4 && is_model(&m))
        append_answer(out, part);
    else
        append_trimmed(out, part, strlen(part));
}

/* --- turns ------------------------------------------------------------------------------------------------------- */

static void append_turn(struct text *out, enum chat_format format, const struct chat_message *m,
                        const struct chat_message *system)
{
    text_add(out, chat_turn_begin(format));
    text_add(out, strcmp(m->role, "assistant") ? m->role : "model");
    text_add(out, "\n");
    if (system) {
        text_add(out, system->content);
        text_add(out, "\n\n");
    }
    chat_template_part(format, m->role, m->content, out);
    text_add(out, chat_turn_end(format));
    text_add(out, "\n");
}

/* The turns alternate, user first; the system message has been taken off. */
static int check_alternation(const struct chat_message *messages, size_t n, size_t n_system)
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

static int render_before_4(enum chat_format format, const struct chat_message *messages, size_t n,
                           struct text *out)
{
    const bool has_system = !strcmp(messages[0].role, "system");
    if (has_system && format == CHAT_GEMMA2)
        return err_set(ERR_USAGE, "message 1 has the role \"system\", which Gemma 1 and 2 do not support");
    const int rc = check_alternation(messages + has_system, n - has_system, has_system);
    if (rc < 0)
        return rc;
    text_add(out, "<bos>");
    for (size_t i = has_system; i < n; i++)
        append_turn(out, format, &messages[i], has_system && i == 1 ? messages : NULL);
    return 0;
}

/* Any order of roles. Of two messages of the assistant in a row the template of 2026-04 makes two turns, that of
 * 2026-05 one and a half, that of 2026-07 one. */
static int render_4(enum chat_format format, const struct chat_message *messages, size_t n, struct text *out)
{
    for (size_t i = 0; i < n; i++) {
        if (!strcmp(messages[i].role, "tool"))
            return err_set(ERR_USAGE, "message %zu has the role \"tool\": tools are not supported", i + 1);
        if (i && is_model(&messages[i]) && is_model(&messages[i - 1]))
            return err_set(ERR_USAGE, "messages %zu and %zu are both the assistant's", i, i + 1);
    }
    text_add(out, "<bos>");
    for (size_t i = 0; i < n; i++) {
        struct chat_message m = messages[i];
        if (i == 0 && !strcmp(m.role, "developer"))
            m.role = "system";
        append_turn(out, format, &m, NULL);
    }
    return 0;
}

int chat_template_render(enum chat_format format, const struct chat_message *messages, size_t n_messages,
                         bool add_generation_prompt, struct text *out)
{
    if (!n_messages)
        return err_set(ERR_USAGE, "a conversation without messages");
    const int rc = format < CHAT_GEMMA4 ? render_before_4(format, messages, n_messages, out)
                                        : render_4(format, messages, n_messages, out);
    if (rc < 0)
        return rc;
    if (add_generation_prompt) {
        text_add(out, chat_turn_begin(format));
        text_add(out, format == CHAT_GEMMA4 ? "model\n<|channel>thought\n<channel|>" : "model\n");
    }
    return text_finish(out);
}

/* Chat formats against what the published jinja templates render, with jinja2 and the settings of transformers
 * (trim_blocks, lstrip_blocks, sandbox): those of Gemma 2, Gemma 3, and of Gemma 4 that of 2026-04 for the 31B and that
 * of 2026-05 for E2B and E4B, thinking off. NULL: the template raises an exception, or revisions of it disagree. */
#include "base/err.h"
#include "formats/chat_template.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_MESSAGES = 4 };

struct conversation {
    const char *name;
    struct chat_message messages[MAX_MESSAGES];
    bool add_generation_prompt;
    const char *gemma2, *gemma3, *gemma4e;
};

/* one conversation a block, one rendering a line */
/* clang-format off */
static const struct conversation conversations[] = {
    {"one question",
     {{"user", "Why is the sky blue?"}},
     true,
     "<bos><start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\nWhy is the sky blue?<turn|>\n<|turn>model\n"},
    {"no generation prompt",
     {{"user", "Hi"}},
     false,
     "<bos><start_of_turn>user\nHi<end_of_turn>\n",
     "<bos><start_of_turn>user\nHi<end_of_turn>\n",
     "<bos><|turn>user\nHi<turn|>\n"},
    {"three turns",
     {{"user", "Hi"}, {"assistant", "Hello!"}, {"user", "Name a colour."}},
     true,
     "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nName a colour.<turn|>\n<|turn>model\n"},
    {"ends with the model",
     {{"user", "Hi"}, {"assistant", "Hello!"}},
     false,
     "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
     "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
     "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n"},
    {"system",
     {{"system", "Be brief."}, {"user", "Why?"}},
     true,
     NULL,
     "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n"},
    {"system is not trimmed, content is",
     {{"system", "  Be brief. \n"}, {"user", " \t\nWhy? \r\n\013\014"}},
     true,
     NULL,
     "<bos><start_of_turn>user\n  Be brief. \n\n\nWhy?<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n"},
    {"system goes to the first turn only",
     {{"system", "Be brief."}, {"user", "a"}, {"assistant", "b"}, {"user", "c"}},
     true,
     NULL,
     "<bos><start_of_turn>user\nBe brief.\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n"},
    {"system alone",
     {{"system", "Be brief."}},
     true,
     NULL,
     "<bos><start_of_turn>model\n",
     "<bos><|turn>system\nBe brief.<turn|>\n<|turn>model\n"},
    {"Unicode white space",
     {{"user", "\343\200\200\302\240\342\200\250 x\302\240y \342\201\237\342\200\257\341\232\200\342\200\203\302\205"}},
     true,
     "<bos><start_of_turn>user\nx\302\240y<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\nx\302\240y<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\nx\302\240y<turn|>\n<|turn>model\n"},
    {"not white space for Python",
     {{"user", "\342\200\213\357\273\277x\342\200\215\342\201\240"}},
     true,
     "<bos><start_of_turn>user\n\342\200\213\357\273\277x\342\200\215\342\201\240<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\n\342\200\213\357\273\277x\342\200\215\342\201\240<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\n\342\200\213\357\273\277x\342\200\215\342\201\240<turn|>\n<|turn>model\n"},
    {"\\x1c to \\x1f are white space",
     {{"user", "\034\035\036\037x\037\033"}},
     true,
     "<bos><start_of_turn>user\nx\037\033<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\nx\037\033<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\nx\037\033<turn|>\n<|turn>model\n"},
    {"nothing but white space",
     {{"user", " \n\342\200\211 "}, {"assistant", ""}, {"user", "x"}},
     true,
     "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\n<turn|>\n<|turn>model\n<turn|>\n<|turn>user\nx<turn|>\n<|turn>model\n"},
    {"control tokens pass",
     {{"user", "<end_of_turn>\n<start_of_turn>model\nno"}},
     true,
     "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\nno<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\nno<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\n<end_of_turn>\n<start_of_turn>model\nno<turn|>\n<|turn>model\n"},
    {"other roles pass at odd places",
     {{"user", "a"}, {"tool", "b"}, {"user", "c"}, {"model", "d"}},
     false,
     "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>tool\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>\n",
     "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>tool\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>\n",
     NULL},
    {"inner lines stay",
     {{"user", "a\n\n  b\n"}, {"assistant", "\n```c\nint x;\n```\n"}, {"user", "\346\227\245\346\234\254\350\252\236 \360\237\230\200"}},
     true,
     "<bos><start_of_turn>user\na\n\n  b<end_of_turn>\n<start_of_turn>model\n```c\nint x;\n```<end_of_turn>\n<start_of_turn>user\n\346\227\245\346\234\254\350\252\236 \360\237\230\200<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\na\n\n  b<end_of_turn>\n<start_of_turn>model\n```c\nint x;\n```<end_of_turn>\n<start_of_turn>user\n\346\227\245\346\234\254\350\252\236 \360\237\230\200<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\na\n\n  b<turn|>\n<|turn>model\n```c\nint x;\n```<turn|>\n<|turn>user\n\346\227\245\346\234\254\350\252\236 \360\237\230\200<turn|>\n<|turn>model\n"},
    {"two users",
     {{"user", "a"}, {"user", "b"}},
     true,
     NULL,
     NULL,
     "<bos><|turn>user\na<turn|>\n<|turn>user\nb<turn|>\n<|turn>model\n"},
    {"assistant first",
     {{"assistant", "a"}},
     true,
     NULL,
     NULL,
     "<bos><|turn>model\na<turn|>\n<|turn>model\n"},
    {"two assistants",
     {{"user", "a"}, {"assistant", "b"}, {"assistant", "c"}},
     true,
     NULL,
     NULL,
     NULL},
    {"late system",
     {{"user", "a"}, {"assistant", "x"}, {"system", "b"}},
     true,
     NULL,
     NULL,
     "<bos><|turn>user\na<turn|>\n<|turn>model\nx<turn|>\n<|turn>system\nb<turn|>\n<|turn>model\n"},
    {"system, then assistant",
     {{"system", "a"}, {"assistant", "b"}},
     true,
     NULL,
     NULL,
     "<bos><|turn>system\na<turn|>\n<|turn>model\nb<turn|>\n<|turn>model\n"},
    {"system twice",
     {{"system", "a"}, {"system", "b"}, {"user", "c"}},
     true,
     NULL,
     NULL,
     "<bos><|turn>system\na<turn|>\n<|turn>system\nb<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n"},
    {"developer",
     {{"developer", " Be brief."}, {"user", "Why?"}},
     true,
     NULL,
     NULL,
     "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n"},
    {"thoughts",
     {{"user", "<|channel>thought\na<channel|>b "}, {"assistant", "<|channel>thought\nwell\n<channel|> 4 "}, {"user", "c"}},
     true,
     "<bos><start_of_turn>user\n<|channel>thought\na<channel|>b<end_of_turn>\n<start_of_turn>model\n<|channel>thought\nwell\n<channel|> 4<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\n<|channel>thought\na<channel|>b<end_of_turn>\n<start_of_turn>model\n<|channel>thought\nwell\n<channel|> 4<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\n<|channel>thought\na<channel|>b<turn|>\n<|turn>model\n4<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n"},
    {"thoughts in the middle, twice, unopened and open",
     {{"user", "a"}, {"model", "b<|channel>x<|channel>y<channel|>c<channel|>\n d<|channel>z"}, {"user", "e"}},
     true,
     "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<|channel>x<|channel>y<channel|>c<channel|>\n d<|channel>z<end_of_turn>\n<start_of_turn>user\ne<end_of_turn>\n<start_of_turn>model\n",
     "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<|channel>x<|channel>y<channel|>c<channel|>\n d<|channel>z<end_of_turn>\n<start_of_turn>user\ne<end_of_turn>\n<start_of_turn>model\n",
     "<bos><|turn>user\na<turn|>\n<|turn>model\nbc\n d<turn|>\n<|turn>user\ne<turn|>\n<|turn>model\n"},
    {"nothing but a thought",
     {{"user", "a"}, {"assistant", " <|channel>x<channel|> "}},
     false,
     "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n<|channel>x<channel|><end_of_turn>\n",
     "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n<|channel>x<channel|><end_of_turn>\n",
     "<bos><|turn>user\na<turn|>\n<|turn>model\n<turn|>\n"},
};
/* clang-format on */

static size_t count(const struct conversation *c)
{
    size_t n = 0;
    while (n < MAX_MESSAGES && c->messages[n].role)
        n++;
    return n;
}

static void check(const struct conversation *c, enum chat_format format, const char *expected)
{
    struct text out = {0};
    const int rc = chat_template_render(format, c->messages, count(c), c->add_generation_prompt, &out);
    if (!expected) {
        if (rc != ERR_USAGE || out.len)
            fail_msg("%s: rendered, expected an error", c->name);
    } else if (rc < 0) {
        fail_msg("%s: %s", c->name, err_message());
    } else if (strcmp(out.data, expected)) {
        fail_msg("%s:\n%s\nexpected\n%s", c->name, out.data, expected);
    }
    text_free(&out);
}

/* The larger ones are told that they have thought already. */
static void check_thought(const struct conversation *c)
{
    struct text expected = {0};
    if (c->gemma4e) {
        text_add(&expected, c->gemma4e);
        text_add(&expected, c->add_generation_prompt ? "<|channel>thought\n<channel|>" : "");
    }
    check(c, CHAT_GEMMA4, expected.data);
    text_free(&expected);
}

static void test_renderings(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof conversations / sizeof *conversations; i++) {
        check(&conversations[i], CHAT_GEMMA2, conversations[i].gemma2);
        check(&conversations[i], CHAT_GEMMA3, conversations[i].gemma3);
        check(&conversations[i], CHAT_GEMMA4E, conversations[i].gemma4e);
        check_thought(&conversations[i]);
    }
}

static void test_no_messages(void **state)
{
    (void)state;
    struct text out = {0};
    assert_int_equal(chat_template_render(CHAT_GEMMA3, NULL, 0, true, &out), ERR_USAGE);
    assert_string_equal(err_message(), "a conversation without messages");
    text_free(&out);
}

static void test_messages_say_which_turn(void **state)
{
    (void)state;
    const struct chat_message messages[] = {
        {"system", "s"}, {"user", "a"}, {"assistant", "b"}, {"assistant", "c"}};
    struct text out = {0};
    assert_int_equal(chat_template_render(CHAT_GEMMA3, messages, 4, true, &out), ERR_USAGE);
    assert_string_equal(err_message(),
                        "message 4 has the role \"assistant\": roles must alternate user/assistant");
    assert_int_equal(chat_template_render(CHAT_GEMMA2, messages, 4, true, &out), ERR_USAGE);
    assert_string_equal(err_message(),
                        "message 1 has the role \"system\", which Gemma 1 and 2 do not support");
    assert_int_equal(chat_template_render(CHAT_GEMMA4, messages, 4, true, &out), ERR_USAGE);
    assert_string_equal(err_message(), "messages 3 and 4 are both the assistant's");
    const struct chat_message tool[] = {{"user", "a"}, {"tool", "b"}};
    assert_int_equal(chat_template_render(CHAT_GEMMA4E, tool, 2, true, &out), ERR_USAGE);
    assert_string_equal(err_message(), "message 2 has the role \"tool\": tools are not supported");
    assert_int_equal(out.len, 0);
    text_free(&out);
}

/* Python's strip() sees no white space in bytes that are not text; they stay. */
static void test_invalid_utf8_stays(void **state)
{
    (void)state;
    const struct chat_message message = {"user", " \xa0\x80x\xe2\x80 "};
    struct text out = {0};
    assert_int_equal(chat_template_render(CHAT_GEMMA3, &message, 1, false, &out), 0);
    assert_string_equal(out.data, "<bos><start_of_turn>user\n\xa0\x80x\xe2\x80<end_of_turn>\n");
    text_free(&out);
}

/* "model_type" as transformers calls the classes. */
static void test_families(void **state)
{
    (void)state;
    static const struct {
        const char *model_type;
        int format;
    } families[] = {{"gemma", CHAT_GEMMA2},
                    {"gemma2", CHAT_GEMMA2},
                    {"gemma3", CHAT_GEMMA3},
                    {"gemma3_text", CHAT_GEMMA3},
                    {"gemma3n", CHAT_GEMMA3},
                    {"gemma3n_text", CHAT_GEMMA3},
                    {"gemma4", CHAT_GEMMA4},
                    {"gemma4_text", CHAT_GEMMA4},
                    {"gemma4_unified", CHAT_GEMMA4},
                    {"gemma4_unified_text", CHAT_GEMMA4},
                    {"gemma5", -1},
                    {"", -1}};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        assert_int_equal(chat_template_of(families[i].model_type), families[i].format);
    assert_string_equal(chat_turn_begin(CHAT_GEMMA2), "<start_of_turn>");
    assert_string_equal(chat_turn_end(CHAT_GEMMA3), "<end_of_turn>");
    assert_string_equal(chat_turn_begin(CHAT_GEMMA4), "<|turn>");
    assert_string_equal(chat_turn_end(CHAT_GEMMA4E), "<turn|>");
}

static void check_part(enum chat_format format, const char *role, const char *expected)
{
    struct text out = {0};
    chat_template_part(format, role, " <|channel>thought\nx<channel|> a\n", &out);
    assert_int_equal(text_finish(&out), 0);
    assert_string_equal(out.data, expected);
    text_free(&out);
}

static void test_parts(void **state)
{
    (void)state;
    check_part(CHAT_GEMMA4, "assistant", "a");
    check_part(CHAT_GEMMA4E, "model", "a");
    check_part(CHAT_GEMMA4, "user", "<|channel>thought\nx<channel|> a");
    check_part(CHAT_GEMMA3, "assistant", "<|channel>thought\nx<channel|> a");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_renderings),
        cmocka_unit_test(test_no_messages),
        cmocka_unit_test(test_messages_say_which_turn),
        cmocka_unit_test(test_invalid_utf8_stays),
        cmocka_unit_test(test_families),
        cmocka_unit_test(test_parts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Text for Gemma 4, whose tokenizer.json adds no <bos> and has control tokens of its own: all that gemcut encodes begins
 * with exactly one <bos>, with such a file as with one that asks for it, and a model is spoken to in its own format. */
#include "base/json.h"
#include "calib/dataset.h"
#include "calib/windows.h"
#include "tests/unit/support.h"

enum { PAD, EOS, BOS, TURN, TURN_END, CHANNEL, CHANNEL_END, FIRST_BYTE, META = FIRST_BYTE + 256, N_TOKENS };

static const char *const of_4[] = {"<pad>",   "<eos>",      "<bos>",     "<|turn>",
                                   "<turn|>", "<|channel>", "<channel|>"};
static const char *const before_4[] = {"<pad>",         "<eos>",     "<bos>",    "<start_of_turn>",
                                       "<end_of_turn>", "<unused0>", "<unused1>"};
static const char *const without[] = {"<pad>", "<eos>", "<bos>", "<a>", "<b>", "<c>", "<d>"};

/* The post-processors of Gemma 4 and of Gemma 1 to 3. */
static const char none[] = "{\"type\": \"TemplateProcessing\", \"single\": [{\"Sequence\": {\"id\": \"A\", "
                           "\"type_id\": 0}}], \"pair\": [], \"special_tokens\": {}}";
static const char adds[] =
    "{\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<bos>\", "
    "\"type_id\": 0}}, {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}], \"pair\": [], "
    "\"special_tokens\": {\"<bos>\": {\"id\": \"<bos>\", \"ids\": [2], \"tokens\": "
    "[\"<bos>\"]}}}";

/* Control tokens and bytes, no merges: a letter is one token. */
static struct tokenizer *make_tokenizer(const char *const control[FIRST_BYTE], const char *post_processor)
{
    struct text file = {0};
    struct tokenizer *t;
    text_printf(&file, "{\"post_processor\": %s, ", post_processor);
    text_add(
        &file,
        "\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"▁\"}, "
        "\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \" \"}, \"behavior\": "
        "\"MergedWithPrevious\", \"invert\": false}, "
        "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": "
        "{\"String\": \"▁\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]}, "
        "\"added_tokens\": [");
    for (int i = 0; i < FIRST_BYTE; i++)
        text_printf(&file, "%s{\"id\": %d, \"content\": \"%s\", \"special\": true}", i ? ", " : "", i,
                    control[i]);
    text_printf(&file,
                "], \"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"merges\": [], \"vocab\": "
                "{\"▁\": %d",
                META);
    for (int i = 0; i < FIRST_BYTE; i++)
        text_printf(&file, ", \"%s\": %d", control[i], i);
    for (int byte = 0; byte < 256; byte++)
        text_printf(&file, ", \"<0x%02X>\": %d", byte, byte + FIRST_BYTE);
    text_add(&file, "}}}");
    assert_ok(tokenizer_parse(&t, file.data, file.len, "small.json"));
    text_free(&file);
    return t;
}

/* \1 … \7 are the control tokens 0 … 6, everything else is itself. */
static size_t expand(const char *spelled, int32_t *ids)
{
    size_t n = 0;
    for (; spelled[n]; n++) {
        const uint8_t c = (uint8_t)spelled[n];
        ids[n] = c <= FIRST_BYTE ? c - 1 : c == ' ' ? META : FIRST_BYTE + c;
    }
    return n;
}

static const struct {
    const char *const *control;
    const char *post_processor;
} files[] = {{of_4, none}, {of_4, "null"}, {of_4, adds}, {before_4, none}, {before_4, adds}};

static void test_prompts(void **state)
{
    (void)state;
    static const struct {
        const char *text, *ids;
    } cases[] = {{"", "\3"}, {"a b", "\3a b"}, {"<bos>a", "\3a"}, {"<bos>", "\3"}};
    for (size_t f = 0; f < N_OF(files); f++) {
        struct tokenizer *t = make_tokenizer(files[f].control, files[f].post_processor);
        for (size_t i = 0; i < N_OF(cases); i++) {
            struct token_list list = {0};
            int32_t expected[16];
            const size_t n = expand(cases[i].ids, expected);
            assert_ok(tokenizer_encode(t, cases[i].text, strlen(cases[i].text), true, &list));
            assert_int_equal(list.n, n);
            assert_memory_equal(list.ids, expected, n * sizeof *expected);
            token_list_free(&list);
        }
        tokenizer_close(t);
    }
}

static void test_windows(void **state)
{
    (void)state;
    static const char *const texts[] = {"abcd", "<bos>abcd"}; /* the second has one of its own */
    for (size_t f = 0; f < N_OF(files); f++) {
        struct tokenizer *t = make_tokenizer(files[f].control, files[f].post_processor);
        int32_t expected[6];
        expand("\3ab\3cd", expected);
        for (size_t i = 0; i < N_OF(texts); i++) {
            struct windows w;
            assert_ok(windows_make(&w, t, texts[i], strlen(texts[i]), 3, 0, N_TOKENS, "x.txt"));
            assert_int_equal(w.n, 2);
            assert_memory_equal(w.ids, expected, sizeof expected);
            windows_free(&w);
        }
        tokenizer_close(t);
    }
}

static int make(struct dataset *out, const struct tokenizer *t, enum chat_format chat, const char *jsonl,
                int64_t length)
{
    const struct dataset_options o = {.samples = 1, .length = length};
    struct documents d;
    assert_ok(documents_parse(&d, jsonl, strlen(jsonl), "x.jsonl", chat, DOCUMENTS_MAX_BYTES));
    const int rc = dataset_make(out, t, &d, &o, N_TOKENS, "x.jsonl");
    documents_free(&d);
    return rc;
}

static void check_dataset(const struct tokenizer *t, enum chat_format chat, const char *jsonl,
                          const char *ids)
{
    struct dataset d;
    int32_t expected[256];
    const size_t n = expand(ids, expected);
    assert_ok(make(&d, t, chat, jsonl, (int64_t)n));
    assert_memory_equal(d.ids, expected, n * sizeof *expected);
    dataset_free(&d);
    assert_error(make(&d, t, chat, jsonl, (int64_t)n + 1), ERR_USAGE, "samples of"); /* and no more */
}

static const char documents[] = "{\"text\": \"ab\"}\n{\"text\": \"<bos>c\"}\n{\"text\": \" d\"}\n";
static const char talk[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \" s \"}, {\"role\": \"user\", "
    "\"content\": \"q\"}, {\"role\": \"assistant\", \"content\": [{\"type\": \"text\", "
    "\"text\": \"<|channel>thought\\nt<channel|> a\"}, {\"type\": \"text\", \"text\": \" b \"}]}]}\n";

static void test_documents(void **state)
{
    (void)state;
    for (size_t f = 0; f < N_OF(files); f++) {
        struct tokenizer *t = make_tokenizer(files[f].control, files[f].post_processor);
        check_dataset(t, CHAT_GEMMA4, documents, "\3ab\3c\3 d");
        tokenizer_close(t);
    }
}

/* A turn's control token is one token, and the conversation has one <bos>. */
static void test_conversations(void **state)
{
    (void)state;
    struct tokenizer *t = make_tokenizer(of_4, none), *bare = make_tokenizer(without, none);
    struct dataset d;
    check_dataset(t, CHAT_GEMMA4, talk, "\3\4system\ns\5\n\4user\nq\5\n\4model\nab\5\n");
    check_dataset(t, CHAT_GEMMA4E, talk, "\3\4system\ns\5\n\4user\nq\5\n\4model\nab\5\n");
    assert_error(make(&d, t, CHAT_GEMMA3, talk, 2), ERR_UNSUPPORTED,
                 "x.jsonl: line 1: is a conversation, but the model's tokenizer has no <start_of_turn>");
    assert_error(make(&d, bare, CHAT_GEMMA4, talk, 2), ERR_UNSUPPORTED, "tokenizer has no <|turn>");
    struct text out = {0};
    struct token_list list = {0};
    int32_t expected[64];
    const struct chat_message question = {"user", "q"};
    const size_t n = expand("\3\4user\nq\5\n\4model\n\6thought\n\7", expected);
    assert_ok(chat_template_render(CHAT_GEMMA4, &question, 1, true, &out));
    assert_ok(tokenizer_encode(t, out.data, out.len, true, &list));
    assert_int_equal(list.n, n);
    assert_memory_equal(list.ids, expected, n * sizeof *expected);
    token_list_free(&list);
    text_free(&out);
    tokenizer_close(t);
    tokenizer_close(bare);
}

static int choose(enum chat_format *out, const char *config, const char *const control[FIRST_BYTE])
{
    struct tokenizer *t = make_tokenizer(control, none);
    struct hf_config c;
    assert_ok(hf_config_parse(&c, config, strlen(config), "config.json"));
    const int rc = chat_template_choose(out, &c, t);
    hf_config_close(&c);
    tokenizer_close(t);
    return rc;
}

static void test_choice(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        const char *const *control;
        enum chat_format format;
    } cases[] = {
        {"{\"model_type\": \"gemma\"}", before_4, CHAT_GEMMA2},
        {"{\"model_type\": \"gemma2\"}", without, CHAT_GEMMA2},
        {"{\"model_type\": \"gemma3_text\"}", before_4, CHAT_GEMMA3},
        {"{\"model_type\": \"gemma3\", \"text_config\": {}}", before_4, CHAT_GEMMA3},
        {"{\"model_type\": \"gemma4_text\"}", of_4, CHAT_GEMMA4E}, /* the class's default is a width of 256 */
        {"{\"model_type\": \"gemma4_text\", \"hidden_size_per_layer_input\": 0}", of_4, CHAT_GEMMA4},
        {"{\"model_type\": \"gemma4_text\", \"hidden_size_per_layer_input\": null}", of_4, CHAT_GEMMA4},
        {"{\"model_type\": \"gemma4\", \"text_config\": {\"hidden_size_per_layer_input\": 256}}", of_4,
         CHAT_GEMMA4E},
        {"{\"model_type\": \"gemma4\", \"text_config\": {\"hidden_size_per_layer_input\": 0}}", without,
         CHAT_GEMMA4},
        {"{\"model_type\": \"gemma4_unified\", \"text_config\": {}}", of_4, CHAT_GEMMA4},
        /* a tokenizer of another family decides which control tokens the model can have seen */
        {"{\"model_type\": \"gemma4_text\"}", before_4, CHAT_GEMMA3},
        {"{\"model_type\": \"gemma3_text\"}", of_4, CHAT_GEMMA4E},
    };
    enum chat_format format;
    for (size_t i = 0; i < N_OF(cases); i++) {
        assert_ok(choose(&format, cases[i].config, cases[i].control));
        if (format != cases[i].format)
            fail_msg("%s: format %d, expected %d", cases[i].config, (int)format, (int)cases[i].format);
    }
    assert_error(choose(&format, "{\"model_type\": \"llama\"}", of_4), ERR_UNSUPPORTED,
                 "config.json: no chat format is known for model_type 'llama'");
    assert_error(
        choose(&format, "{\"model_type\": \"gemma4_text\", \"hidden_size_per_layer_input\": -1}", of_4),
        ERR_FORMAT, "hidden_size_per_layer_input");
}

static void test_user_turns(void **state)
{
    (void)state;
    struct tokenizer *four = make_tokenizer(of_4, none), *three = make_tokenizer(before_4, adds),
                     *bare = make_tokenizer(without, none);
    assert_string_equal(chat_user_turn(four), "<|turn>user\n");
    assert_string_equal(chat_user_turn(three), "<start_of_turn>user\n");
    assert_null(chat_user_turn(bare));
    tokenizer_close(four);
    tokenizer_close(three);
    tokenizer_close(bare);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_prompts),   cmocka_unit_test(test_windows),
        cmocka_unit_test(test_documents), cmocka_unit_test(test_conversations),
        cmocka_unit_test(test_choice),    cmocka_unit_test(test_user_turns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* gemcut generate: run a model. */
#include "cli/cmd.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "cli/machine.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "formats/chat_template.h"
#include "report/run.h"

#include <stdlib.h>
#include <string.h>

struct args {
    const char *model, *prompt, *file, *system, *image;
    int64_t tokens, top_k, seed;
    double temperature, top_p;
    bool chat, ignore_eos;
    struct machine_options machine;
    struct output_options output;
};

static const struct opt_arg positional[] = {
    {.name = "MODEL",
     .offset = OPT_OFFSET(struct args, model, const char *),
     .help = "a BF16 model or a cut: a folder, or org/name in the Hugging Face cache"},
};

static const struct opt options[] = {
    {.name = "prompt",
     .letter = 'p',
     OPT_TO_STRING(struct args, prompt),
     .value = "TEXT",
     .help = "what to continue, or with --chat the user's message; \"\" starts from <bos> alone"},
    {.name = "file",
     .letter = 'f',
     OPT_TO_STRING(struct args, file),
     .value = "FILE",
     .help = "read the prompt from a file"},
    {.name = "chat", OPT_TO_FLAG(struct args, chat), .help = "wrap the prompt in the model's chat format"},
    {.name = "system",
     OPT_TO_STRING(struct args, system),
     .value = "TEXT",
     .help = "system message, with --chat"},
    {.name = "image", OPT_TO_STRING(struct args, image), .value = "FILE", .hidden = true, .help = ""},
    {.name = "tokens",
     .letter = 'n',
     OPT_TO_INT(struct args, tokens),
     .value = "N",
     .initial = "128",
     .min = 0,
     .max = 1000000,
     .help = "most tokens to write"},
    {.name = "ignore-eos",
     OPT_TO_FLAG(struct args, ignore_eos),
     .help = "go on after the model ends its text"},
    {OPT_SECTION("Sampling")},
    {.name = "temperature",
     OPT_TO_DOUBLE(struct args, temperature),
     .value = "X",
     .initial_note = "the model's, else 1",
     .low = 0,
     .high = 100,
     .help = "0 = always the most likely token"},
    {.name = "top-k",
     OPT_TO_INT(struct args, top_k),
     .value = "N",
     .initial_note = "the model's, else 64",
     .min = 0,
     .max = INT32_MAX,
     .help = "choose among the N most likely tokens; 0 = all"},
    {.name = "top-p",
     OPT_TO_DOUBLE(struct args, top_p),
     .value = "X",
     .initial_note = "the model's, else 0.95",
     .low = 0,
     .high = 1,
     .help = "and of those among the likeliest that hold this share"},
    {.name = "seed",
     OPT_TO_INT(struct args, seed),
     .value = "N",
     .initial = "0",
     .min = 0,
     .max = INT64_MAX,
     .help = "same seed, same text"},
    MACHINE_OPTS(struct args, machine),
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut generate",
    .summary = "Runs a model, BF16 or cut, and prints what it writes as it is written.",
    .args = positional,
    .n_args = 1,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
    .epilogue = "Examples:\n"
                "  gemcut generate cut -p \"The capital of France is\" --temperature 0\n"
                "  gemcut generate cut --chat -p \"Why is the sky blue?\"\n",
};

/* --- the prompt ------------------------------------------------------------------------------------------------- */

static int prompt_text(const struct args *a, enum chat_format chat, struct text *out)
{
    char *from_file = NULL;
    size_t len = 0;
    int rc = a->file ? file_read(a->file, 64u << 20, &from_file, &len) : 0;
    if (rc < 0)
        return rc;
    const char *user = from_file ? from_file : a->prompt;
    if (!a->chat) {
        text_append(out, user, from_file ? len : strlen(user));
        rc = text_finish(out);
    } else {
        const struct chat_message messages[] = {{"system", a->system}, {"user", user}};
        const size_t skip = a->system ? 0 : 1;
        rc = chat_template_render(chat, messages + skip, 2 - skip, true, out);
        if (!rc)
            rc = text_finish(out);
    }
    free(from_file);
    return rc;
}

static int make_prompt(const struct args *a, const struct runnable *r, enum chat_format chat,
                       struct token_list *ids)
{
    struct text text = {0};
    if (a->chat && tokenizer_token_id(r->tokenizer, chat_turn_begin(chat)) < 0)
        return err_set(ERR_UNSUPPORTED, "%s: the tokenizer has no %s: this model has no chat format",
                       r->model->folder, chat_turn_begin(chat));
    int rc = prompt_text(a, chat, &text);
    if (!rc)
        rc = tokenizer_encode(r->tokenizer, text.data, text.len, true, ids);
    text_free(&text);
    return rc ? rc : run_check_prompt(r, ids);
}

/* --- writing ------------------------------------------------------------------------------------------------------ */

struct written {
    int32_t id;
    float log_probability;
};

struct writing {
    struct token_stream stream;
    struct text whole; /* this and the list for --json */
    struct written *tokens;
    size_t n, capacity;
};

static int print_piece(struct text *piece)
{
    if (!piece->len) {
        text_free(piece);
        return 0;
    }
    return output_print_always(piece);
}

static int on_token(void *ctx, int32_t id, float log_probability)
{
    struct writing *w = ctx;
    if (output_json()) {
        const int rc = mem_grow(&w->tokens, &w->capacity, w->n + 1, sizeof *w->tokens, "the tokens written");
        if (rc < 0)
            return rc;
        w->tokens[w->n++] = (struct written){id, log_probability};
        return token_stream_add(&w->stream, id, &w->whole);
    }
    struct text piece = {0};
    const int rc = token_stream_add(&w->stream, id, &piece);
    return rc < 0 ? rc : print_piece(&piece);
}

static const char *const ends[] = {
    [GENERATE_STOP_ID] = "end of text", [GENERATE_LENGTH] = "length", [GENERATE_CONTEXT] = "context full"};

static int finish_json(const struct args *a, const struct sampling *s, const struct writing *w,
                       const struct generate_result *g)
{
    struct text out = {0};
    output_json_begin(&out, a->machine.name, &a->seed);
    json_kv_double(&out, "temperature", s->temperature);
    json_kv_int(&out, "top_k", s->top_k);
    json_kv_double(&out, "top_p", s->top_p);
    json_kv_string(&out, "text", w->whole.data ? w->whole.data : "");
    json_kv_string(&out, "end", ends[g->end]);
    json_kv_int(&out, "prompt_tokens", g->n_prompt);
    json_kv_int(&out, "new_tokens", g->n_new);
    json_kv_double(&out, "prefill_seconds", g->prefill_seconds);
    json_kv_double(&out, "decode_seconds", g->decode_seconds);
    json_put_key(&out, "tokens");
    json_begin_array(&out);
    for (size_t i = 0; i < w->n; i++) {
        json_begin_object(&out);
        json_kv_int(&out, "id", w->tokens[i].id);
        json_kv_double(&out, "log_probability", (double)w->tokens[i].log_probability);
        json_end_object(&out);
    }
    json_end_array(&out);
    return output_json_end(&out);
}

static int finish_text(struct writing *w, const struct generate_result *g)
{
    struct text piece = {0};
    int rc = token_stream_finish(&w->stream, &piece);
    text_add(&piece, "\n");
    if (!rc)
        rc = print_piece(&piece);
    output_note("%lld prompt tokens in %.2f s; %lld new ones, %.1f a second; %s", (long long)g->n_prompt,
                g->prefill_seconds, (long long)g->n_new,
                g->decode_seconds > 0 ? (double)g->n_new / g->decode_seconds : 0, ends[g->end]);
    return rc;
}

/* What the model says and the command line does not. */
static int settle(const struct args *a, const struct runnable *r, enum chat_format chat,
                  struct generate_defaults *d)
{
    const int rc = generate_defaults_read(d, r->model);
    const int32_t end_of_turn = tokenizer_token_id(r->tokenizer, chat_turn_end(chat));
    struct sampling *s = &d->sampling;
    s->temperature = a->temperature < 0 ? s->temperature : a->temperature;
    s->top_k = a->top_k < 0 ? s->top_k : a->top_k;
    s->top_p = a->top_p < 0 ? s->top_p : a->top_p;
    s->seed = (uint64_t)a->seed;
    if (a->ignore_eos)
        d->stop.n = 0;
    else if (a->chat && end_of_turn >= 0 && d->stop.n < sizeof d->stop.ids / sizeof *d->stop.ids)
        d->stop.ids[d->stop.n++] = end_of_turn;
    return rc;
}

static int write_text(const struct args *a, struct session *session, enum chat_format chat,
                      const struct token_list *ids)
{
    const struct runnable *r = &session->runnable;
    const int64_t context = r->model->gemma.max_positions, n = (int64_t)ids->n;
    const int64_t positions = a->tokens < context - n ? n + a->tokens : context;
    const struct forward_size size = {1, positions, generate_rows(positions)};
    struct generate_defaults d;
    struct forward *f = NULL;
    struct writing w = {0};
    struct generate_result g;
    token_stream_init(&w.stream, r->tokenizer, true);
    int rc = settle(a, r, chat, &d);
    struct run_need need = {
        .n_sequences = 1, .positions = size.max_positions, .rows = size.max_rows, .logit_rows = 1};
    if (!rc)
        rc = session_load(session, &need);
    if (!rc)
        rc = forward_open(&f, &r->weights, &size);
    if (!rc)
        rc = generate_run(f, &r->weights, ids->ids, n, a->tokens, &d.sampling, &d.stop, on_token, &w, &g);
    if (!rc && output_json()) {
        rc = token_stream_finish(&w.stream, &w.whole);
        if (!rc)
            rc = finish_json(a, &d.sampling, &w, &g);
    } else if (!rc) {
        rc = finish_text(&w, &g);
    }
    forward_close(f);
    token_stream_free(&w.stream);
    text_free(&w.whole);
    free(w.tokens);
    return rc;
}

int cmd_generate(int argc, char **argv)
{
    struct args a = {.temperature = -1, .top_k = -1, .top_p = -1}; /* not given */
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (rc)
        return rc;
    if (a.image)
        return err_set(ERR_UNSUPPORTED, "images are not supported: gemcut runs the language part of a model");
    if (!a.prompt == !a.file)
        return err_set(ERR_USAGE, "expected a prompt: either --prompt TEXT or --file FILE");
    if (a.system && !a.chat)
        return err_set(ERR_USAGE, "--system needs --chat");
    if ((rc = machine_begin(&a.machine)) < 0)
        return rc;
    struct session s;
    struct token_list ids = {0};
    enum chat_format chat;
    rc = session_open(&s, a.model, a.machine.name, (int)a.machine.threads);
    if (!rc)
        rc = chat_template_choose(&chat, &s.model.config, s.runnable.tokenizer);
    if (!rc)
        rc = make_prompt(&a, &s.runnable, chat, &ids);
    if (!rc)
        rc = write_text(&a, &s, chat, &ids);
    token_list_free(&ids);
    session_close(&s);
    return rc;
}

#include "report/run.h"

#include "base/err.h"
#include "base/file.h"
#include "base/text.h"
#include "calib/builtin.h"
#include "kernels/budget.h"

#include <stdlib.h>
#include <string.h>

static const size_t max_text_bytes = 1u << 30;

int runnable_open(struct runnable *r, const struct model *m)
{
    *r = (struct runnable){.model = m};
    char *path = file_join(m->folder, "tokenizer.json");
    int rc = path ? tokenizer_open(&r->tokenizer, path) : ERR_MEMORY;
    if (rc < 0 && path && !file_exists(path))
        rc = err_set(ERR_IO, "%s: No such file; without a tokenizer the model cannot be run", path);
    free(path);
    return rc;
}

int runnable_load(struct runnable *r, const struct backend *b)
{
    return weights_load(&r->weights, r->model, b);
}

void runnable_close(struct runnable *r)
{
    if (r->tokenizer)
        tokenizer_close(r->tokenizer);
    if (r->weights.backend)
        weights_free(&r->weights);
    *r = (struct runnable){0};
}

int session_open(struct session *s, const char *name, const char *device, int n_threads)
{
    *s = (struct session){0};
    int rc = backend_open(&s->backend, device, n_threads);
    if (!rc)
        rc = model_open(&s->model, name);
    if (!rc)
        rc = model_bind(&s->model, NULL, NULL);
    return rc ? rc : runnable_open(&s->runnable, &s->model);
}

int session_load(struct session *s, struct run_need *need)
{
    const struct model *const models[] = {&s->model};
    need->models = models;
    need->n_models = 1;
    const int rc = run_plan(&s->backend, need);
    need->models = NULL;
    return rc ? rc : runnable_load(&s->runnable, &s->backend);
}

void session_close(struct session *s)
{
    runnable_close(&s->runnable);
    model_close(&s->model);
    backend_close(&s->backend);
}

int run_plan(const struct backend *b, struct run_need *need)
{
    struct device_memory memory;
    const int rc = b->core->memory(b, &memory);
    if (rc < 0)
        return rc;
    const uint64_t limit = budget_limit(), left = limit > budget_taken() ? limit - budget_taken() : 0;
    const uint64_t available = limit && left < memory.free ? left : memory.free;
    uint64_t weights = 0, activations = 0, logits = 0;
    for (;;) {
        const struct forward_size size = {need->n_sequences, need->positions, need->rows};
        weights = activations = logits = 0;
        for (int i = 0; i < need->n_models; i++) {
            const struct gemma_config *c = &need->models[i]->gemma;
            weights += weights_bytes(need->models[i]);
            activations += forward_bytes(c, b, &size);
            const int64_t rows = need->logit_rows ? need->logit_rows : behaviour_logit_rows(b, c->vocab_size);
            logits += (uint64_t)(rows * c->vocab_size) * sizeof(float);
        }
        if (weights + activations + logits + b->scratch_bytes <= available)
            return 0;
        if (need->n_sequences == 1)
            break;
        need->n_sequences /= 2;
    }
    char text[6][32];
    return err_set(
        ERR_MEMORY,
        "%s: %s are needed (weights %s, activations and KV cache for %lld tokens %s, logits %s, scratch "
        "%s), %s are %s",
        b->name, text_bytes(weights + activations + logits + b->scratch_bytes, text[0]),
        text_bytes(weights, text[1]), (long long)need->positions, text_bytes(activations, text[2]),
        text_bytes(logits, text[3]), text_bytes(b->scratch_bytes, text[4]), text_bytes(available, text[5]),
        limit && left < memory.free ? "left of the memory budget" : "free");
}

int64_t run_batch(const struct backend *b, int64_t length, int64_t n)
{
    const int64_t batch = b->batch_tokens / length;
    return batch < 1 ? 1 : batch < n ? batch : n;
}

int run_windows_of(struct windows *out, const struct runnable *r, const char *path, int64_t length, int64_t n)
{
    const int64_t vocab = r->model->gemma.vocab_size;
    *out = (struct windows){0};
    if (length > r->model->gemma.max_positions)
        return err_set(ERR_USAGE, "windows of %lld tokens are longer than the model's context of %lld",
                       (long long)length, (long long)r->model->gemma.max_positions);
    size_t len;
    if (!path) {
        const char *text = builtin_prose(&len);
        return windows_make(out, r->tokenizer, text, len, length, (size_t)n, vocab, "the built-in text");
    }
    char *text;
    int rc = file_read(path, max_text_bytes, &text, &len);
    if (!rc)
        rc = windows_make(out, r->tokenizer, text, len, length, (size_t)n, vocab, path);
    free(text);
    return rc;
}

/* Whether an id stands where a picture, a film or a sound belongs; the first two are of Gemma 3, the others of 4. */
static bool is_media(const struct tokenizer *t, int32_t id)
{
    static const char *const names[] = {"<start_of_image>", "<image_soft_token>", "<|image>", "<|image|>",
                                        "<|video|>",        "<|audio>",           "<|audio|>"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (id == tokenizer_token_id(t, names[i]))
            return true;
    return false;
}

int run_check_prompt(const struct runnable *r, const struct token_list *ids)
{
    const int64_t context = r->model->gemma.max_positions;
    if ((int64_t)ids->n > context)
        return err_set(ERR_USAGE, "the prompt has %zu tokens, the model's context is %lld", ids->n,
                       (long long)context);
    for (size_t i = 0; i < ids->n; i++) {
        if (is_media(r->tokenizer, ids->ids[i]))
            return err_set(ERR_UNSUPPORTED,
                           "the prompt holds the token %s: images and sounds are not supported",
                           tokenizer_token_name(r->tokenizer, ids->ids[i]));
        if (ids->ids[i] >= r->model->gemma.vocab_size)
            return err_set(ERR_FORMAT,
                           "%s: the prompt has token %d, the model's vocabulary ends at %lld: the tokenizer "
                           "is not this model's",
                           r->model->folder, ids->ids[i], (long long)r->model->gemma.vocab_size);
    }
    return 0;
}

struct continuation {
    struct token_stream stream;
    struct text text;
};

static int on_token(void *ctx, int32_t id, float log_probability)
{
    (void)log_probability;
    struct continuation *c = ctx;
    return token_stream_add(&c->stream, id, &c->text);
}

int run_continuation(char **out, const struct runnable *r, const char *prompt, int64_t n)
{
    *out = NULL;
    const struct sampling greedy = {.top_p = 1};
    struct continuation c = {0};
    struct token_list ids = {0};
    struct forward *f = NULL;
    struct generate_defaults defaults;
    struct generate_result result;
    token_stream_init(&c.stream, r->tokenizer, true);
    int rc = tokenizer_encode(r->tokenizer, prompt, strlen(prompt), true, &ids);
    if (!rc)
        rc = run_check_prompt(r, &ids);
    if (!rc)
        rc = generate_defaults_read(&defaults, r->model);
    const int64_t context = r->model->gemma.max_positions, wanted = (int64_t)ids.n + n;
    const int64_t positions = wanted < context ? wanted : context;
    const struct forward_size size = {1, positions, generate_rows(positions)};
    if (!rc)
        rc = forward_open(&f, &r->weights, &size);
    if (!rc)
        rc = generate_run(f, &r->weights, ids.ids, (int64_t)ids.n, n, &greedy, &defaults.stop, on_token, &c,
                          &result);
    if (!rc)
        rc = token_stream_finish(&c.stream, &c.text);
    if (!rc)
        rc = text_finish(&c.text);
    if (!rc)
        *out = c.text.data;
    else
        text_free(&c.text);
    forward_close(f);
    token_stream_free(&c.stream);
    token_list_free(&ids);
    return rc;
}

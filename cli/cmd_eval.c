/* gemcut eval: how well a model does. */
#include "cli/cmd.h"

#include "base/err.h"
#include "cli/machine.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "report/run.h"

struct args {
    const char *model, *text;
    int task;
    int64_t windows, length;
    struct machine_options machine;
    struct output_options output;
};

static const char *const tasks[] = {"ppl", NULL};

static const struct opt_arg positional[] = {
    {.name = "MODEL",
     .offset = OPT_OFFSET(struct args, model, const char *),
     .help = "a BF16 model or a cut: a folder, or org/name in the Hugging Face cache"},
};

static const struct opt options[] = {
    {.name = "tasks",
     OPT_TO_CHOICE(struct args, task),
     .value = "TASK",
     .choices = tasks,
     .initial = "ppl",
     .help = "ppl: perplexity on text"},
    {.name = "text",
     OPT_TO_STRING(struct args, text),
     .value = "FILE",
     .initial_note = "English prose that ships with gemcut",
     .help = "UTF-8 text"},
    {.name = "windows",
     OPT_TO_INT(struct args, windows),
     .value = "N",
     .initial = "8",
     .min = 0,
     .max = 1000000,
     .help = "pieces of text, each run by itself; 0 = all there are"},
    {.name = "length",
     OPT_TO_INT(struct args, length),
     .value = "N",
     .initial = "1024",
     .min = 2,
     .max = 1000000,
     .help = "tokens of a window, <bos> included"},
    MACHINE_OPTS(struct args, machine),
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut eval",
    .summary =
        "Measures a model. Perplexity: e to the mean negative log-likelihood of every token of a window after "
        "<bos>.",
    .args = positional,
    .n_args = 1,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
};

static void on_window(void *ctx, size_t window)
{
    (void)ctx;
    progress_update(window + 1, NULL);
}

static int print_likelihood(const struct args *a, const struct likelihood *l)
{
    struct text out = {0};
    if (!output_json()) {
        text_printf(&out, "perplexity  %.4f (95 %%: %.3f … %.3f), %.5f nats a token\n", l->perplexity,
                    l->perplexity_low, l->perplexity_high, l->nll);
        text_printf(&out, "text        %s: %zu windows of %lld tokens\n",
                    a->text ? a->text : "built-in prose", l->n_windows, (long long)a->length);
        return output_print(&out);
    }
    output_json_begin(&out, a->machine.name, NULL);
    json_kv_string(&out, "model", a->model);
    json_kv_string(&out, "text", a->text);
    json_kv_uint(&out, "windows", l->n_windows);
    json_kv_int(&out, "length", a->length);
    json_kv_uint(&out, "tokens", l->n_tokens);
    json_kv_double(&out, "perplexity", l->perplexity);
    json_kv_double(&out, "perplexity_low", l->perplexity_low);
    json_kv_double(&out, "perplexity_high", l->perplexity_high);
    json_kv_double(&out, "nll", l->nll);
    return output_json_end(&out);
}

static int measure(const struct args *a, struct session *s)
{
    struct windows text;
    struct likelihood l;
    int rc = run_windows_of(&text, &s->runnable, a->text, a->length, a->windows);
    if (rc < 0)
        return rc;
    struct run_need need = {.n_sequences = run_batch(&s->backend, a->length, (int64_t)text.n),
                            .positions = a->length,
                            .rows = a->length};
    rc = session_load(s, &need);
    progress_begin("perplexity", PROGRESS_ITEMS, text.n);
    if (!rc)
        rc = likelihood_measure(&l, &s->runnable.weights, &text, need.n_sequences, on_window, NULL);
    progress_end();
    windows_free(&text);
    return rc < 0 ? rc : print_likelihood(a, &l);
}

int cmd_eval(int argc, char **argv)
{
    struct args a = {0};
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (rc)
        return rc;
    if ((rc = machine_begin(&a.machine)) < 0)
        return rc;
    struct session s;
    rc = session_open(&s, a.model, a.machine.name, (int)a.machine.threads);
    if (!rc)
        rc = measure(&a, &s);
    session_close(&s);
    return rc;
}

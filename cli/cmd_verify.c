/* gemcut verify: is this cut what it says it is, and how far are its weights from the original's? */
#include "cli/cmd.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/human.h"
#include "cli/machine.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "report/run.h"
#include "report/verify.h"

#include <math.h>
#include <stdlib.h>

enum { WORST_SHOWN = 10, FINDINGS_SHOWN = 20 };

static int by_error(const void *a, const void *b)
{
    const struct weight_report *x = *(const struct weight_report *const *)a,
                               *y = *(const struct weight_report *const *)b;
    if (x->error != y->error)
        return x->error > y->error ? -1 : 1;
    return x < y ? -1 : 1;
}

/* The quantized linears, worst first; fresh memory. NULL (recorded) when out of memory. */
static const struct weight_report **worst_first(const struct verify_report *r)
{
    const struct weight_report **order = mem_alloc(r->cut.n_linears, sizeof *order, "a list of linears");
    size_t n = 0;
    for (size_t i = 0; order && i < r->cut.n_linears; i++)
        if (r->weights[i].linear)
            order[n++] = &r->weights[i];
    if (n)
        qsort(order, n, sizeof *order, by_error);
    return order;
}

/* --- text ----------------------------------------------------------------------------------------------------- */

static size_t count_findings(const struct verify_report *r, enum finding_kind kind)
{
    size_t n = 0;
    for (size_t i = 0; i < r->n_findings; i++)
        n += r->findings[i].kind == kind;
    return n;
}

static int write_worst(const struct verify_report *r, struct text *out)
{
    static const struct human_column columns[] = {{"worst linears", false}, {"bits", true},
                                                  {"group", true},          {"error", true},
                                                  {"SQNR", true},           {"worst group", true}};
    struct human_table table = {.columns = columns, .n_columns = 6};
    const struct weight_report **order = worst_first(r);
    if (!order)
        return ERR_MEMORY;
    for (size_t i = 0; i < r->n_quantized && i < WORST_SHOWN; i++) {
        const struct model_linear *l = order[i]->linear;
        human_table_cell(&table, "%s", l->spec->name);
        human_table_cell(&table, "%d", l->scheme.bits);
        human_table_cell(&table, "%lld", (long long)(l->scheme.group ? l->scheme.group : l->spec->shape[1]));
        human_table_cell(&table, "%.4f", order[i]->error);
        human_table_cell(&table, "%.1f dB", verify_sqnr(order[i]->error));
        human_table_cell(&table, "%.3f", order[i]->worst_group);
    }
    text_add(out, "\n");
    const int rc = human_table_render(&table, out);
    human_table_free(&table);
    free(order);
    return rc;
}

static void write_findings(const struct verify_report *r, struct text *out)
{
    text_add(out, "\n");
    for (size_t i = 0; i < r->n_findings && i < FINDINGS_SHOWN; i++)
        text_printf(out, "%-9s  %s %s\n", finding_kind_names[r->findings[i].kind], r->findings[i].object,
                    r->findings[i].message);
    if (r->n_findings > FINDINGS_SHOWN)
        text_printf(out, "… and %zu more (--json lists all)\n", r->n_findings - FINDINGS_SHOWN);
}

static int describe(const struct verify_report *r, struct text *out)
{
    const size_t structure = count_findings(r, FINDING_STRUCTURE);
    text_printf(out, "cut          %s\n", r->cut.folder);
    if (r->source.folder)
        text_printf(out, "against      %s\n", r->source.folder);
    text_printf(out, "structure    %zu tensors, %zu of %zu linears quantized: %s\n", r->n_tensors,
                r->n_quantized, r->cut.n_linears,
                structure ? "NOT as config.json describes" : "as config.json describes");
    if (model_n_dequantized(&r->cut))
        text_printf(out,
                    "             scales beyond BF16: %zu linears are computed from dequantized weights\n",
                    model_n_dequantized(&r->cut));
    if (r->has_record)
        text_printf(out, "record       %zu of %zu tensors and %zu files are as gemcut wrote them\n",
                    r->n_recorded_equal, r->n_tensors, r->n_files_equal);
    else
        text_add(out, "record       none (no gemcut.json): damage to codes cannot be told\n");
    if (r->n_unquantized)
        text_printf(out, "unquantized  %zu of %zu tensors are bit-equal to the source\n", r->n_source_equal,
                    r->n_unquantized);
    int rc = 0;
    if (r->mean_error == r->mean_error) {
        text_printf(out, "weights      mean relative error %.4f, %.1f dB\n", r->mean_error,
                    verify_sqnr(r->mean_error));
        rc = write_worst(r, out);
    }
    return rc;
}

static void describe_result(const struct verify_report *r, struct text *out)
{
    if (r->n_findings)
        write_findings(r, out);
    text_printf(out, "\nresult       %s", r->n_findings ? "NOT OK" : "ok");
    if (r->n_findings)
        text_printf(out, ": %zu problem%s", r->n_findings, r->n_findings == 1 ? "" : "s");
    text_add(out, !r->n_findings && !r->source.folder
                      ? " (without --against, nothing was compared with the original)\n"
                      : "\n");
}

/* --- JSON ----------------------------------------------------------------------------------------------------- */

static int describe_json(const struct verify_report *r, struct text *out)
{
    json_kv_string(out, "cut", r->cut.folder);
    json_kv_string(out, "against", r->source.folder);
    json_kv_bool(out, "ok", r->n_findings == 0);
    json_kv_string(out, "format", r->cut.quantized ? quant_config_title(&r->cut.quant) : NULL);
    json_kv_uint(out, "dequantized_linears", model_n_dequantized(&r->cut));
    json_kv_uint(out, "tensors", r->n_tensors);
    json_kv_bool(out, "has_record", r->has_record);
    json_kv_uint(out, "tensors_as_recorded", r->n_recorded_equal);
    json_kv_uint(out, "files_as_recorded", r->n_files_equal);
    json_kv_uint(out, "unquantized_tensors", r->n_unquantized);
    json_kv_uint(out, "unquantized_bit_equal", r->n_source_equal);
    json_kv_double(out, "mean_weight_error", r->mean_error);
    const struct weight_report **order = worst_first(r);
    if (!order)
        return ERR_MEMORY;
    json_put_key(out, "linears"); /* worst first */
    json_begin_array(out);
    for (size_t i = 0; i < r->n_quantized; i++) {
        const struct weight_report *w = order[i];
        json_begin_object(out);
        json_kv_string(out, "name", w->linear->spec->name);
        json_kv_int(out, "bits", w->linear->scheme.bits);
        json_kv_int(out, "group_size",
                    w->linear->scheme.group ? w->linear->scheme.group : w->linear->spec->shape[1]);
        if (r->mean_error == r->mean_error) {
            json_kv_double(out, "weight_error", w->error);
            json_kv_double(out, "sqnr_db", verify_sqnr(w->error));
            json_kv_double(out, "worst_group_error", w->worst_group);
        }
        json_end_object(out);
    }
    json_end_array(out);
    free(order);
    json_put_key(out, "problems");
    json_begin_array(out);
    for (size_t i = 0; i < r->n_findings; i++) {
        json_begin_object(out);
        json_kv_string(out, "kind", finding_kind_names[r->findings[i].kind]);
        json_kv_string(out, "object", r->findings[i].object);
        json_kv_string(out, "message", r->findings[i].message);
        json_end_object(out);
    }
    json_end_array(out);
    return 0;
}

/* --- behaviour ------------------------------------------------------------------------------------------------ */

struct args {
    const char *cut, *against, *text, *prompt;
    int64_t windows, length, tokens;
    double max_kl, min_top1, max_perplexity_ratio;
    bool no_run;
    struct machine_options machine;
    struct output_options output;
};

/* What running both models gave. */
struct run_report {
    bool ran;
    struct behaviour behaviour;
    char *original, *cut; /* the prompt's continuations */
};

static void on_window(void *ctx, size_t window)
{
    (void)ctx;
    progress_update(window + 1, NULL);
}

/* Both models on the text, then each on the prompt. */
static int run_both(const struct args *a, const struct runnable *original, const struct runnable *cut,
                    const struct windows *text, int64_t batch, struct run_report *out)
{
    progress_begin("running both models", PROGRESS_ITEMS, text->n);
    int rc =
        behaviour_measure(&out->behaviour, &original->weights, &cut->weights, text, batch, on_window, NULL);
    progress_end();
    out->ran = !rc;
    if (!rc)
        rc = run_continuation(&out->original, original, a->prompt, a->tokens);
    return rc ? rc : run_continuation(&out->cut, cut, a->prompt, a->tokens);
}

/* Plans memory before anything is loaded. */
static int load_both(const struct args *a, const struct backend *b, struct runnable *original,
                     struct runnable *cut, const struct windows *text, int64_t *batch)
{
    const struct model *const models[] = {original->model, cut->model};
    struct run_need need = {.models = models,
                            .n_models = 2,
                            .n_sequences = run_batch(b, a->length, (int64_t)text->n),
                            .positions = a->length,
                            .rows = a->length};
    int rc = run_plan(b, &need);
    *batch = need.n_sequences;
    if (!rc)
        rc = runnable_load(original, b);
    return rc ? rc : runnable_load(cut, b);
}

static int run_models(const struct args *a, const struct verify_report *r, struct run_report *out)
{
    struct backend b;
    struct runnable original = {0}, cut = {0};
    struct windows text = {0};
    int64_t batch;
    int rc = backend_open(&b, a->machine.name, (int)a->machine.threads);
    if (rc < 0)
        return rc;
    rc = runnable_open(&original, &r->source);
    if (!rc)
        rc = runnable_open(&cut, &r->cut);
    if (!rc)
        rc = run_windows_of(&text, &original, a->text, a->length, a->windows);
    if (!rc)
        rc = load_both(a, &b, &original, &cut, &text, &batch);
    if (!rc)
        rc = run_both(a, &original, &cut, &text, batch, out);
    windows_free(&text);
    runnable_close(&cut);
    runnable_close(&original);
    backend_close(&b);
    return rc;
}

/* Thresholds that the user set; a NaN misses every one. */
static int check_gates(const struct args *a, const struct run_report *run, struct verify_report *r)
{
    const struct behaviour *b = &run->behaviour;
    const double ratio = b->cut.perplexity / b->original.perplexity;
    int rc = 0;
    if (a->max_kl >= 0 && !(b->kl_mean <= a->max_kl))
        rc = verify_add(r, FINDING_BEHAVIOUR, "KL", "is %.4f, expected at most %g (--max-kl)", b->kl_mean,
                        a->max_kl);
    if (!rc && a->min_top1 >= 0 && !(b->top1 >= a->min_top1))
        rc = verify_add(r, FINDING_BEHAVIOUR, "top-1 agreement", "is %.4f, expected at least %g (--min-top1)",
                        b->top1, a->min_top1);
    if (!rc && a->max_perplexity_ratio >= 0 && !(ratio <= a->max_perplexity_ratio))
        rc = verify_add(r, FINDING_BEHAVIOUR, "perplexity",
                        "is %.4f of the original's, expected at most %g "
                        "(--max-ppl-ratio)",
                        ratio, a->max_perplexity_ratio);
    if (!rc && !(b->kl_mean >= -1e-3))
        rc =
            verify_add(r, FINDING_BEHAVIOUR, "KL", "is %.4g: the models' outputs are not finite", b->kl_mean);
    return rc;
}

static void describe_blocks(const struct behaviour *b, struct text *out)
{
    const int64_t shown = 8;
    text_add(out, "error after  ");
    for (int64_t i = 0; i < shown && i < b->n_layers; i++) {
        const int64_t layer = b->n_layers <= shown ? i : i * (b->n_layers - 1) / (shown - 1);
        text_printf(out, "%sblock %lld: %.3f", i ? ", " : "", (long long)layer, b->block_error[layer]);
    }
    text_add(out, " of the residual stream\n");
}

static void describe_run(const struct args *a, const struct run_report *run, struct text *out)
{
    const struct behaviour *b = &run->behaviour;
    text_printf(out, "\ntext         %s: %zu windows of %lld tokens\n", a->text ? a->text : "built-in prose",
                b->original.n_windows, (long long)a->length);
    text_printf(out, "perplexity   original %.3f, cut %.3f (× %.4f)\n", b->original.perplexity,
                b->cut.perplexity, b->cut.perplexity / b->original.perplexity);
    text_printf(out, "KL           mean %.4f (95 %%: %.4f … %.4f), median %.4f, p99 %.3f nats\n", b->kl_mean,
                b->kl_low, b->kl_high, b->kl_median, b->kl_p99);
    text_printf(out, "top-1        %.1f %% agreement\n", 100 * b->top1);
    describe_blocks(b, out);
    text_printf(out, "\nprompt       %s\noriginal     %s\ncut          %s\n", a->prompt, run->original,
                run->cut);
}

static void put_likelihood(struct text *out, const char *key, const struct likelihood *l)
{
    json_put_key(out, key);
    json_begin_object(out);
    json_kv_double(out, "perplexity", l->perplexity);
    json_kv_double(out, "perplexity_low", l->perplexity_low);
    json_kv_double(out, "perplexity_high", l->perplexity_high);
    json_kv_double(out, "nll", l->nll);
    json_end_object(out);
}

static void run_json(const struct args *a, const struct run_report *run, struct text *out)
{
    const struct behaviour *b = &run->behaviour;
    json_put_key(out, "behaviour");
    json_begin_object(out);
    json_kv_string(out, "text", a->text);
    json_kv_uint(out, "windows", b->original.n_windows);
    json_kv_int(out, "length", a->length);
    json_kv_uint(out, "tokens", b->original.n_tokens);
    put_likelihood(out, "original", &b->original);
    put_likelihood(out, "cut", &b->cut);
    json_kv_double(out, "kl_mean", b->kl_mean);
    json_kv_double(out, "kl_low", b->kl_low);
    json_kv_double(out, "kl_high", b->kl_high);
    json_kv_double(out, "kl_median", b->kl_median);
    json_kv_double(out, "kl_p99", b->kl_p99);
    json_kv_double(out, "top1", b->top1);
    json_put_key(out, "block_error");
    json_begin_array(out);
    for (int64_t i = 0; i < b->n_layers; i++)
        json_put_double(out, b->block_error[i]);
    json_end_array(out);
    json_kv_string(out, "prompt", a->prompt);
    json_kv_string(out, "continuation_original", run->original);
    json_kv_string(out, "continuation_cut", run->cut);
    json_end_object(out);
}

/* --- command -------------------------------------------------------------------------------------------------- */

static const struct opt_arg positional[] = {
    {.name = "CUT",
     .offset = OPT_OFFSET(struct args, cut, const char *),
     .help = "the quantized model's folder"},
};

static const struct opt options[] = {
    {.name = "against",
     OPT_TO_STRING(struct args, against),
     .value = "MODEL",
     .help =
         "the original: compares weights, every tensor that was not quantized bit for bit, and the models' "
         "behaviour on text"},
    {OPT_SECTION("Running both models")},
    {.name = "no-run", OPT_TO_FLAG(struct args, no_run), .help = "compare files only"},
    {.name = "text",
     OPT_TO_STRING(struct args, text),
     .value = "FILE",
     .initial_note = "English prose that ships with gemcut",
     .help = "UTF-8 text to run on"},
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
     .initial = "512",
     .min = 2,
     .max = 1000000,
     .help = "tokens of a window, <bos> included"},
    {.name = "prompt",
     OPT_TO_STRING(struct args, prompt),
     .value = "TEXT",
     .initial = "The capital of France is",
     .help = "what both models continue"},
    {.name = "tokens",
     OPT_TO_INT(struct args, tokens),
     .value = "N",
     .initial = "24",
     .min = 1,
     .max = 100000,
     .help = "tokens that they continue it by"},
    {OPT_SECTION("Thresholds; missing one is exit code 1")},
    {.name = "max-kl",
     OPT_TO_DOUBLE(struct args, max_kl),
     .value = "X",
     .initial_note = "none",
     .low = 0,
     .high = INFINITY,
     .help = "mean KL divergence from the original, nats a token"},
    {.name = "min-top1",
     OPT_TO_DOUBLE(struct args, min_top1),
     .value = "X",
     .initial_note = "none",
     .low = 0,
     .high = 1,
     .help = "share of tokens on whose successor both models agree"},
    {.name = "max-ppl-ratio",
     OPT_TO_DOUBLE(struct args, max_perplexity_ratio),
     .value = "X",
     .initial_note = "none",
     .low = 0,
     .high = INFINITY,
     .help = "perplexity, as a multiple of the original's"},
    MACHINE_OPTS(struct args, machine),
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut verify",
    .summary =
        "Checks that a cut is what it says it is. Structure: every tensor that the model demands is there, as "
        "config.json describes it. Bytes: scales are usable, everything is as gemcut.json recorded it, what "
        "was not quantized is bit-equal to the original. Weights: the relative error of every linear. "
        "Behaviour: both models run on text, their perplexity, divergence and agreement.\n"
        "Exit code 1 when anything is wrong.",
    .args = positional,
    .n_args = 1,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
};

static int print_report(const struct args *a, const struct verify_report *r, const struct run_report *run)
{
    struct text out = {0};
    int rc;
    if (output_json()) {
        output_json_begin(&out, a->machine.name, NULL);
        rc = describe_json(r, &out);
        if (run->ran)
            run_json(a, run, &out);
        if (!rc)
            rc = output_json_end(&out);
    } else {
        rc = describe(r, &out);
        if (run->ran)
            describe_run(a, run, &out);
        describe_result(r, &out);
        if (!rc)
            rc = output_print(&out);
    }
    text_free(&out);
    return rc;
}

int cmd_verify(int argc, char **argv)
{
    struct args a = {.max_kl = -1, .min_top1 = -1, .max_perplexity_ratio = -1};
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (rc)
        return rc;
    const bool gated = a.max_kl >= 0 || a.min_top1 >= 0 || a.max_perplexity_ratio >= 0;
    if (gated && (!a.against || a.no_run))
        return err_set(ERR_USAGE, "thresholds need --against, and no --no-run");
    if ((rc = machine_begin(&a.machine)) < 0)
        return rc;
    const struct verify_options verify = {
        .cut = a.cut, .source = a.against, .device = a.machine.name, .n_workers = (int)a.machine.threads};
    struct verify_report report;
    struct run_report run = {0};
    rc = verify_run(&report, &verify);
    /* a cut whose structure is broken cannot run; what is wrong with it is the report */
    if (!rc && a.against && !a.no_run && !count_findings(&report, FINDING_STRUCTURE))
        rc = run_models(&a, &report, &run);
    if (!rc && run.ran)
        rc = check_gates(&a, &run, &report);
    if (!rc)
        rc = print_report(&a, &report, &run);
    if (!rc && report.n_findings)
        rc = CMD_NO;
    behaviour_free(&run.behaviour);
    free(run.original);
    free(run.cut);
    verify_free(&report);
    return rc;
}

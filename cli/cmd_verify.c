/* gemcut verify: is this cut what it says it is, and how far are its weights from the original's? */
#include "cli/cmd.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/human.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "report/verify.h"

#include <stdlib.h>

enum { WORST_SHOWN = 10, FINDINGS_SHOWN = 20 };

static int by_error(const void *a, const void *b)
{
    const struct weight_report *x = *(const struct weight_report *const *)a, *y = *(const struct weight_report *const *)b;
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
    static const struct human_column columns[] = {{"worst linears", false}, {"bits", true}, {"group", true},
                                                  {"error", true}, {"SQNR", true}, {"worst group", true}};
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
    const size_t structure = count_findings(r, FINDING_STRUCTURE), bytes = count_findings(r, FINDING_BYTES);
    text_printf(out, "cut          %s\n", r->cut.folder);
    if (r->source.folder)
        text_printf(out, "against      %s\n", r->source.folder);
    text_printf(out, "structure    %zu tensors, %zu of %zu linears quantized: %s\n", r->n_tensors, r->n_quantized,
                r->cut.n_linears, structure ? "NOT as config.json describes" : "as config.json describes");
    if (r->has_record)
        text_printf(out, "record       %zu of %zu tensors and %zu files are as gemcut wrote them\n", r->n_recorded_equal,
                    r->n_tensors, r->n_files_equal);
    else
        text_add(out, "record       none (no gemcut.json): damage to codes cannot be told\n");
    if (r->n_unquantized)
        text_printf(out, "unquantized  %zu of %zu tensors are bit-equal to the source\n", r->n_source_equal,
                    r->n_unquantized);
    int rc = 0;
    if (r->mean_error == r->mean_error) {
        text_printf(out, "weights      mean relative error %.4f, %.1f dB\n", r->mean_error, verify_sqnr(r->mean_error));
        rc = write_worst(r, out);
    }
    if (r->n_findings)
        write_findings(r, out);
    text_printf(out, "\nresult       %s", r->n_findings ? "NOT OK" : "ok");
    if (r->n_findings)
        text_printf(out, ": %zu problem%s", r->n_findings, r->n_findings == 1 ? "" : "s");
    text_add(out, structure + bytes == 0 && !r->source.folder ? " (without --against, weights were not compared)\n" : "\n");
    return rc;
}

/* --- JSON ----------------------------------------------------------------------------------------------------- */

static int describe_json(const struct verify_report *r, struct text *out)
{
    json_kv_string(out, "cut", r->cut.folder);
    json_kv_string(out, "against", r->source.folder);
    json_kv_bool(out, "ok", r->n_findings == 0);
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
        json_kv_int(out, "group_size", w->linear->scheme.group ? w->linear->scheme.group : w->linear->spec->shape[1]);
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

/* --- command -------------------------------------------------------------------------------------------------- */

struct args {
    const char *cut, *against, *device;
    int64_t threads;
    struct output_options output;
};

static const struct opt_arg positional[] = {
    {.name = "CUT", .offset = OPT_OFFSET(struct args, cut, const char *), .help = "the quantized model's folder"},
};

static const struct opt options[] = {
    {.name = "against", OPT_TO_STRING(struct args, against), .value = "MODEL",
     .help = "the original: compares weights, and every tensor that was not quantized bit for bit"},
    {.name = "device", OPT_TO_STRING(struct args, device), .value = "DEVICE", .initial = "auto",
     .help = "auto or cpu"},
    {.name = "threads", OPT_TO_INT(struct args, threads), .value = "N", .min = 0, .max = 1024, .initial = "0",
     .help = "0 = one for each processor"},
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut verify",
    .summary = "Checks that a cut is what it says it is. Structure: every tensor that the model demands is there, as "
               "config.json describes it. Bytes: scales are usable, everything is as gemcut.json recorded it, what "
               "was not quantized is bit-equal to the original. Weights: the relative error of every linear.\n"
               "Exit code 1 when anything is wrong.",
    .args = positional, .n_args = 1, .opts = options, .n_opts = sizeof options / sizeof *options,
};

int cmd_verify(int argc, char **argv)
{
    struct args args = {0};
    int rc = cmd_begin(&spec, argc, argv, &args, &args.output);
    if (rc)
        return rc;
    const struct verify_options verify = {
        .cut = args.cut, .source = args.against, .device = args.device, .n_workers = (int)args.threads};
    struct verify_report report;
    struct text out = {0};
    rc = verify_run(&report, &verify);
    if (!rc && output_json()) {
        output_json_begin(&out, args.device, NULL);
        rc = describe_json(&report, &out);
        if (!rc)
            rc = output_json_end(&out);
    } else if (!rc) {
        rc = describe(&report, &out);
        if (!rc)
            rc = output_print(&out);
    }
    if (!rc && report.n_findings)
        rc = CMD_NO;
    text_free(&out);
    verify_free(&report);
    return rc;
}

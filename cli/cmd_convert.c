/* gemcut convert: a cut in another format, without quantizing again. */
#include "cli/cmd.h"

#include "base/clock.h"
#include "base/err.h"
#include "cli/human.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "quantize/convert.h"

struct args {
    const char *model, *out;
    int format;
    uint64_t shard_size;
    int64_t threads;
    bool overwrite;
    struct output_options output;
};

static const char *const formats[] = {"compressed-tensors", "auto-round", "gptq", NULL};

static const struct opt_arg positional[] = {
    {.name = "MODEL",
     .offset = OPT_OFFSET(struct args, model, const char *),
     .help =
         "a cut by gemcut, llm-compressor, AutoRound or GPTQModel: a folder, or org/name in the Hugging Face cache"},
    {.name = "OUT", .offset = OPT_OFFSET(struct args, out, const char *), .help = "the folder to create"},
};

static const struct opt options[] = {
    {.name = "format",
     OPT_TO_CHOICE(struct args, format),
     .choices = formats,
     .initial_note = "must be given",
     .help = "what to write"},
    {.name = "shard-size",
     OPT_TO_SIZE(struct args, shard_size),
     .value = "SIZE",
     .initial = "5GB",
     .min = 1,
     .max = INT64_MAX,
     .help = "largest file"},
    {.name = "overwrite", OPT_TO_FLAG(struct args, overwrite), .help = "replace OUT, if gemcut wrote it"},
    {.name = "threads",
     OPT_TO_INT(struct args, threads),
     .value = "N",
     .min = 0,
     .max = 1024,
     .initial = "0",
     .help = "0 = one for each processor, up to 8; the result is the same with any number"},
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut convert",
    .summary =
        "Packs a cut into another format: same codes, scales and zero points, every other tensor and file as it is. "
        "What the format cannot hold is refused by name: zero points in auto-round and gptq, scales that BF16 "
        "(compressed-tensors) or F16 (the others) does not have exactly. OUT appears whole or not at all.",
    .args = positional,
    .n_args = 2,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
    .epilogue = "Examples:\n"
                "  gemcut convert cut cut-gptq --format gptq\n",
};

static void on_check(void *ctx, uint64_t total)
{
    (void)ctx;
    progress_begin("reading back", PROGRESS_BYTES, total);
}

static void on_bytes(void *ctx, uint64_t bytes)
{
    (void)ctx;
    progress_advance(bytes, NULL);
}

static int print_result(const struct convert *c, const struct args *a, double seconds)
{
    const struct convert_totals t = convert_totals(c);
    const char *from = quant_config_title(&convert_source(c)->quant);
    struct text out = {0};
    if (output_json()) {
        output_json_begin(&out, NULL, NULL);
        json_kv_string(&out, "out", a->out);
        json_kv_string(&out, "from", from);
        json_kv_string(&out, "to", formats[a->format]);
        json_kv_uint(&out, "linears", t.n_linears);
        json_kv_uint(&out, "source_bytes", t.source_bytes);
        json_kv_uint(&out, "output_bytes", t.output_bytes);
        json_kv_double(&out, "seconds", seconds);
        return output_json_end(&out);
    }
    text_printf(&out, "cut      %s\n", a->out);
    text_printf(&out, "format   %s → %s\n", from, formats[a->format]);
    text_printf(&out, "linears  %zu packed anew; everything else is as it was\n", t.n_linears);
    text_printf(&out, "size     %s → %s\n", human_bytes(t.source_bytes).s, human_bytes(t.output_bytes).s);
    text_printf(&out, "time     %s, read back and compared\n", human_seconds(seconds).s);
    return output_print(&out);
}

int cmd_convert(int argc, char **argv)
{
    struct args a = {.format = -1};
    struct convert *c = NULL;
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (rc)
        return rc;
    if (a.format < 0)
        return err_set(ERR_USAGE, "expected --format: compressed-tensors, auto-round or gptq");
    const struct convert_options job = {.model = a.model,
                                        .out = a.out,
                                        .version = GEMCUT_VERSION,
                                        .format = (enum quant_format)a.format,
                                        .shard_bytes = a.shard_size,
                                        .n_workers = (int)a.threads,
                                        .overwrite = a.overwrite};
    const struct convert_events events = {.on_check = on_check, .on_bytes = on_bytes};
    rc = convert_open(&c, &job);
    if (!rc) {
        progress_begin("converting", PROGRESS_BYTES, convert_totals(c).source_bytes);
        const double start = clock_seconds();
        rc = convert_run(c, &events);
        progress_end();
        if (!rc)
            rc = print_result(c, &a, clock_seconds() - start);
    }
    convert_close(c);
    return rc;
}

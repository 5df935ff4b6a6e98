/* gemcut quantize: from a BF16 checkpoint to a cut. */
#include "cli/cmd.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/machine.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "cli/quantize_run.h"
#include "cli/recipe_args.h"

#include <stdlib.h>
#include <string.h>

struct args {
    const char *model, *out, *group_size, *report, *calib;
    int quality, method, scheme, scales, scale_sign, ragged, order, order_columns, format;
    int64_t samples, length, seed, refine; /* refine −1: not given */
    double damping;
    struct tune_args tune;
    bool skip_bos;
    struct opt_list ignore, only, overrides;
    uint64_t shard_size;
    bool allow_nonfinite, dry_run, overwrite, no_verify, resume;
    struct machine_options machine;
    struct output_options output;
};

static const char *const qualities[] = {"draft", "good", "better", NULL};
static const char *const methods[] = {"rtn", "gptq", "autoround", NULL}; /* one for each quality */
enum { BETTER = 2, FULL_TUNING = 200, SHORT_TUNING = 50 };
static const char *const schemes[] = {"w4a16", "w4a16-asym", "w8a16", NULL};
static const char *const scale_rules[] = {"auto", "block", "weighted", "range", "absmax", "mse", NULL};
static const char *const orders[] = {"shuffle", "file", NULL};
static const char *const column_orders[] = {"activation", "natural", NULL};
static const char *const scale_signs[] = {"any", "positive", NULL};
static const char *const ragged_rules[] = {"smaller", "keep", "error", "auto", NULL};
static const char *const formats[] = {"compressed-tensors", "auto-round", "gptq", NULL};

static const struct opt_arg positional[] = {
    {.name = "MODEL",
     .offset = OPT_OFFSET(struct args, model, const char *),
     .help = "a folder with config.json and *.safetensors, or org/name in the Hugging Face cache"},
    {.name = "OUT", .offset = OPT_OFFSET(struct args, out, const char *), .help = "the folder to create"},
};

static const struct opt options[] = {
    {OPT_SECTION("Method")},
    {.name = "quality",
     OPT_TO_CHOICE(struct args, quality),
     .choices = qualities,
     .initial = "good",
     .help = "draft: rtn; good: gptq; better: gptq, then 50 iterations of autoround"},
    {.name = "method",
     OPT_TO_CHOICE(struct args, method),
     .choices = methods,
     .initial_note = "as --quality says",
     .help =
         "rtn: round to nearest, without data unless --calib is given; gptq: each column makes up for the errors of "
         "those before it, under the activations of calibration text; autoround: then all roundings and scales of a "
         "block are tuned together, by gradients of its output's error"},
    {.name = "scheme",
     OPT_TO_CHOICE(struct args, scheme),
     .choices = schemes,
     .initial = "w4a16",
     .help = "bits of the weights (activations stay in 16), symmetric or with zero points"},
    {.name = "group-size",
     OPT_TO_STRING(struct args, group_size),
     .value = "N",
     .initial = "128",
     .help = "columns that share a scale: 32, 64, 128, 256, or channel for a whole row"},
    {.name = "scales",
     OPT_TO_CHOICE(struct args, scales),
     .choices = scale_rules,
     .initial = "auto",
     .help =
         "block and weighted: searched for the least error of the output, by the group's block of the Hessian or by its "
         "diagonal; range: the larger side of a group maps to the lowest code, so scales are signed; absmax: max/7.5, as "
         "llm-compressor; mse: least squared error (usually worse on Gemma). auto: block with calibration, else range"},
    {.name = "scale-sign",
     OPT_TO_CHOICE(struct args, scale_sign),
     .choices = scale_signs,
     .initial = "any",
     .help = "positive: for readers that cannot take negative scales"},
    {OPT_SECTION("Calibration")},
    {.name = "calib",
     OPT_TO_STRING(struct args, calib),
     .value = "FILE",
     .initial_note = "builtin",
     .help =
         "text: .txt, .jsonl (\"text\" or \"messages\"), either also with .zst; builtin = a mixture that ships with "
         "gemcut; self = what the model itself writes; builtin+self = half of each. gemcut calib shows what a text "
         "comes to"},
    {.name = "samples",
     OPT_TO_INT(struct args, samples),
     .value = "N",
     .initial = "128",
     .min = 1,
     .max = 1000000,
     .help = "pieces of text, each run by itself"},
    {.name = "length",
     OPT_TO_INT(struct args, length),
     .value = "N",
     .min = 2,
     .max = 1000000,
     .initial_note = "2048, or the model's context",
     .help = "tokens of a sample"},
    {.name = "order",
     OPT_TO_CHOICE(struct args, order),
     .value = "ORDER",
     .choices = orders,
     .initial = "shuffle",
     .help = "of the documents: shuffle, by --seed, or file, as they come"},
    {.name = "seed",
     OPT_TO_INT(struct args, seed),
     .value = "N",
     .initial = "0",
     .min = 0,
     .max = INT64_MAX,
     .help = "same seed, same order"},
    {.name = "skip-bos",
     OPT_TO_FLAG(struct args, skip_bos),
     .help = "leave the activations of <bos> out of what is measured"},
    {OPT_SECTION("GPTQ")},
    {.name = "order-columns",
     OPT_TO_CHOICE(struct args, order_columns),
     .value = "ORDER",
     .choices = column_orders,
     .initial = "activation",
     .help =
         "activation: those with the largest inputs first; groups stay as they are, so readers see no difference"},
    {.name = "damping",
     OPT_TO_DOUBLE(struct args, damping),
     .value = "SHARE",
     .initial = "0.01",
     .low = 1e-6,
     .high = 1,
     .help = "of the Hessian's mean diagonal, added to it; more where that is not enough, and reported"},
    {.name = "refine",
     OPT_TO_INT(struct args, refine),
     .value = "N",
     .min = 0,
     .max = 1000,
     .initial_note = "8; 4 before a tuning",
     .help = "passes of coordinate descent over scales and codes after GPTQ; 0: none"},
    {OPT_SECTION("AutoRound")},
    TUNE_OPTS(struct args, tune),
    {OPT_SECTION(
        "Selection; globs speak of tensor names, and whole fused sets (q/k/v, gate/up) are decided alike")},
    {.name = "ignore",
     OPT_TO_LIST(struct args, ignore),
     .value = "GLOB",
     .help = "keep these linears in 16 bits"},
    {.name = "only", OPT_TO_LIST(struct args, only), .value = "GLOB", .help = "quantize these linears alone"},
    {.name = "override",
     OPT_TO_LIST(struct args, overrides),
     .value = "GLOB=SCHEME,GROUP",
     .help = "another scheme or group size for these linears; the last match wins"},
    {.name = "ragged",
     OPT_TO_CHOICE(struct args, ragged),
     .choices = ragged_rules,
     .initial = "auto",
     .help =
         "where the group size does not divide a width: the largest smaller one that does, keep 16 bits, or "
         "error; auto: smaller for experts and multiples of 128, else keep"},
    {.name = "allow-nonfinite",
     OPT_TO_FLAG(struct args, allow_nonfinite),
     .help = "take NaN and infinite weights as 0 instead of refusing them"},
    {OPT_SECTION("Output")},
    {.name = "format",
     OPT_TO_CHOICE(struct args, format),
     .choices = formats,
     .initial = "compressed-tensors",
     .help =
         "what is written; the others hold symmetric schemes alone. gemcut convert changes it afterwards"},
    {.name = "shard-size",
     OPT_TO_SIZE(struct args, shard_size),
     .value = "SIZE",
     .initial = "5GB",
     .min = 1,
     .max = INT64_MAX,
     .help = "largest file"},
    {.name = "overwrite", OPT_TO_FLAG(struct args, overwrite), .help = "replace OUT, if gemcut wrote it"},
    {.name = "resume",
     OPT_TO_FLAG(struct args, resume),
     .help = "go on where a run with the same flags was interrupted; the result is the same, byte for byte"},
    {.name = "dry-run", OPT_TO_FLAG(struct args, dry_run), .help = "show the plan and write nothing"},
    {.name = "no-verify",
     OPT_TO_FLAG(struct args, no_verify),
     .help = "do not read the result back and compare it"},
    {.name = "report",
     OPT_TO_STRING(struct args, report),
     .value = "FILE",
     .help = "write the result as JSON, with every linear's error and the times"},
    MACHINE_OPTS(struct args, machine),
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut quantize",
    .summary =
        "Cuts a BF16, F16 or F32 checkpoint of Gemma 1, 2, 3 or dense 4 to 4-bit (or 8-bit) weights that vLLM and "
        "transformers load: "
        "safetensors in the format of compressed-tensors, AutoRound or GPTQ. OUT appears whole or not at all.",
    .args = positional,
    .n_args = 2,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
    .epilogue =
        "Examples:\n"
        "  gemcut quantize gemma-3-4b-it cut\n"
        "  gemcut quantize gemma-3-4b-it cut --ignore '*.layers.0.*' --override '*down_proj=w8a16,64'\n"
        "  gemcut quantize gemma-3-4b-it cut --dry-run\n",
};

/* --- the recipe ----------------------------------------------------------------------------------------------- */

static int choose_method(const struct args *a, struct recipe *r)
{
    const struct recipe_args chosen = {.method = methods[a->method >= 0 ? a->method : a->quality],
                                       .scales = scale_rules[a->scales],
                                       .natural_order = a->order_columns == 1,
                                       .damping = a->damping,
                                       .passes = a->refine,
                                       .tune = a->tune,
                                       .iterations =
                                           a->method < 0 && a->quality == BETTER ? SHORT_TUNING : FULL_TUNING,
                                       .calib = {.text = a->calib,
                                                 .samples = a->samples,
                                                 .length = a->length,
                                                 .seed = (uint64_t)a->seed,
                                                 .shuffle = a->order == 0,
                                                 .skip_bos = a->skip_bos}};
    return recipe_args_apply(&chosen, r);
}

static int make_recipe(const struct args *a, struct recipe *r)
{
    *r = (struct recipe){.format = (enum quant_format)a->format,
                         .scales.positive_only = a->scale_sign == 1,
                         .ragged = (enum ragged_rule)a->ragged,
                         .ignore = a->ignore.items,
                         .n_ignore = a->ignore.n,
                         .only = a->only.items,
                         .n_only = a->only.n,
                         .allow_nonfinite = a->allow_nonfinite};
    int rc = choose_method(a, r);
    if (!rc)
        rc = recipe_parse_scheme(schemes[a->scheme], &r->scheme);
    if (!rc)
        rc = recipe_parse_group(a->group_size, &r->scheme.group);
    if (!rc && !(r->overrides = mem_alloc(a->overrides.n, sizeof *r->overrides, "overrides")))
        rc = ERR_MEMORY;
    for (; !rc && r->n_overrides < a->overrides.n; r->n_overrides += !rc)
        rc = recipe_parse_override(a->overrides.items[r->n_overrides], r->scheme,
                                   &r->overrides[r->n_overrides]);
    return rc;
}

static void free_recipe(struct recipe *r)
{
    for (size_t i = 0; i < r->n_overrides; i++)
        free(r->overrides[i].glob);
    free(r->overrides);
}

/* --- command -------------------------------------------------------------------------------------------------- */

int cmd_quantize(int argc, char **argv)
{
    struct args a = {.method = -1, .refine = -1, .tune = TUNE_ARGS_NONE};
    struct recipe recipe = {0};
    struct cut *cut = NULL;
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (!rc)
        rc = machine_begin(&a.machine);
    if (!rc)
        rc = make_recipe(&a, &recipe);
    if (!rc) {
        const struct cut_options job = {.model = a.model,
                                        .out = a.out,
                                        .device = a.machine.name,
                                        .version = GEMCUT_VERSION,
                                        .recipe = recipe,
                                        .count_time = a.report != NULL,
                                        .shard_bytes = a.shard_size,
                                        .n_workers = (int)a.machine.threads,
                                        .resume = a.resume,
                                        .overwrite = a.overwrite,
                                        .skip_check = a.no_verify};
        rc = cut_open(&cut, &job);
    }
    if (!rc)
        rc = quantize_run(
            cut, &(struct quantize_job){&recipe, a.out, a.machine.name, a.report, a.dry_run, a.no_verify});
    cut_close(cut);
    free_recipe(&recipe);
    opt_list_free(&a.ignore);
    opt_list_free(&a.only);
    opt_list_free(&a.overrides);
    return rc;
}

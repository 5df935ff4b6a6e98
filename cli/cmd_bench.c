/* gemcut bench: how fast it is here, beside what this machine can do. */
#include "cli/cmd.h"

#include "base/err.h"
#include "cli/bench.h"
#include "cli/bench_work.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "cli/recipe_args.h"

#include <string.h>

struct args {
    const char *what, *group_size;
    int shape, method, scheme, scales;
    int64_t samples, length, refine; /* 0, 0, −1: not given */
    struct tune_args tune;
    struct bench bench;
    struct output_options output;
};

static const char *const checks[] = {"auto", "yes", "no", NULL};
enum { METHOD_RTN, METHOD_GPTQ, METHOD_AUTOROUND };
static const char *const methods[] = {"rtn", "gptq", "autoround", NULL};
static const char *const schemes[] = {"w4a16", "w4a16-asym", "w8a16", NULL};
static const char *const scale_rules[] = {"auto", "block", "weighted", "range", "absmax", "mse", NULL};

static const struct opt_arg positional[] = {
    {.name = "WHAT",
     .offset = OPT_OFFSET(struct args, what, const char *),
     .help =
         "ops: every operation of the device; prefill, decode: the forward pass; quantize: the whole job; "
         "tune: an iteration of AutoRound"},
};

static const struct opt options[] = {
    {OPT_SECTION("Model")},
    {.name = "shape",
     OPT_TO_CHOICE(struct args, shape),
     .value = "NAME",
     .choices = bench_shape_names,
     .initial = "gemma-3-4b",
     .help = "whose sizes; the weights are made up"},
    {.name = "seed",
     OPT_TO_INT(struct args, bench.seed),
     .value = "N",
     .initial = "0",
     .min = 0,
     .max = INT64_MAX,
     .help = "of the made-up weights"},
    {.name = "dir",
     OPT_TO_STRING(struct args, bench.dir),
     .value = "DIR",
     .initial_note = "$TMPDIR or /tmp; for prefill, decode and tune /dev/shm, where the model fits",
     .help = "where a checkpoint is made, and a cut of it; both are removed at the end"},
    {.name = "keep",
     OPT_TO_STRING(struct args, bench.keep),
     .value = "DIR",
     .help = "make the checkpoint in this folder and leave it, or use the one that is there"},
    {OPT_SECTION("Measurement")},
    {.name = "rounds",
     OPT_TO_INT(struct args, bench.rounds),
     .value = "N",
     .min = 1,
     .max = 10000,
     .initial_note = "ops, prefill and tune 10, on the CPU 3; quantize and decode 3",
     .help = "times that everything is measured"},
    {.name = "tokens",
     OPT_TO_INT(struct args, bench.tokens),
     .value = "N",
     .min = 1,
     .max = 1 << 20,
     .initial_note = "ops 16384, on the CPU 512; prefill and tune 2048, on the CPU 512; decode 128",
     .help = "ops: rows of activations; prefill, tune: tokens of a sequence; decode: tokens written"},
    {.name = "sequences",
     OPT_TO_INT(struct args, bench.sequences),
     .value = "N",
     .min = 1,
     .max = 4096,
     .initial_note = "8, on the CPU 1",
     .help = "prefill: sequences at a time; tune: samples of an iteration"},
    {.name = "check",
     OPT_TO_CHOICE(struct args, bench.check),
     .choices = checks,
     .initial = "auto",
     .help =
         "compare with the CPU's result first; auto: always for ops, for prefill and decode up to 2 billion "
         "parameters"},
    {OPT_SECTION("Quantizing, for quantize, tune and decode --cut")},
    {.name = "cut", OPT_TO_FLAG(struct args, bench.cut), .help = "decode: with the weights of a cut"},
    {.name = "method",
     OPT_TO_CHOICE(struct args, method),
     .choices = methods,
     .initial = "rtn",
     .help =
         "as in quantize, like what follows; with rtn nothing is calibrated unless the scales ask for it"},
    {.name = "scheme",
     OPT_TO_CHOICE(struct args, scheme),
     .choices = schemes,
     .initial = "w4a16",
     .help = "bits of the weights"},
    {.name = "group-size",
     OPT_TO_STRING(struct args, group_size),
     .value = "N",
     .initial = "128",
     .help = "columns that share a scale"},
    {.name = "scales",
     OPT_TO_CHOICE(struct args, scales),
     .choices = scale_rules,
     .initial = "auto",
     .help = "how scales are chosen: block and weighted need calibration; auto: block with it, else range"},
    {.name = "samples",
     OPT_TO_INT(struct args, samples),
     .value = "N",
     .min = 1,
     .max = 1000000,
     .initial_note = "128",
     .help = "to calibrate with, of random tokens"},
    {.name = "length",
     OPT_TO_INT(struct args, length),
     .value = "N",
     .min = 2,
     .max = 1000000,
     .initial_note = "2048, or the model's context",
     .help = "tokens of a sample"},
    {.name = "refine",
     OPT_TO_INT(struct args, refine),
     .value = "N",
     .min = 0,
     .max = 1000,
     .initial_note = "8; 4 before a tuning",
     .help = "gptq: passes over scales and codes"},
    TUNE_OPTS(struct args, tune),
    {.name = "no-verify",
     OPT_TO_FLAG(struct args, bench.no_verify),
     .help = "quantize: do not read the result back"},
    MACHINE_OPTS(struct args, bench.machine),
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut bench",
    .summary =
        "Measures speed on made-up weights of a real model's shape, beside what the machine can do, measured in "
        "the same run. Results are compared with the CPU's first; exit code 1 when they differ.",
    .args = positional,
    .n_args = 1,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
    .epilogue = "Examples:\n"
                "  gemcut bench quantize --shape gemma-3-1b\n"
                "  gemcut bench quantize --method gptq --rounds 1\n"
                "  gemcut bench tune --shape gemma-3-1b\n"
                "  gemcut bench ops --json\n"
                "  gemcut bench decode --shape gemma-3-270m --cut\n",
};

static const struct part {
    const char *name;
    int (*run)(const struct bench *q);
} parts[] = {{"ops", bench_ops},
             {"prefill", bench_prefill},
             {"decode", bench_decode},
             {"quantize", bench_quantize},
             {"tune", bench_tune}};

enum { N_PARTS = sizeof parts / sizeof *parts };

static int find_part(const struct part **out, const char *name)
{
    const char *known[N_PARTS];
    for (size_t i = 0; i < N_PARTS; i++) {
        known[i] = parts[i].name;
        if (!strcmp(name, known[i])) {
            *out = &parts[i];
            return 0;
        }
    }
    struct text t = {0};
    text_printf(&t, "cannot measure '%s'", name);
    opt_suggest(&t, name, "", known, N_PARTS);
    const int rc = text_finish(&t) < 0 ? ERR_MEMORY : err_set(ERR_USAGE, "%s", t.data);
    text_free(&t);
    return rc;
}

/* An option that says nothing to this measurement was a mistake. */
static int refuse_foreign(const struct args *a)
{
    const struct bench *q = &a->bench;
    const struct {
        const char *option;
        bool given;
        const char *parts[4];
    } rules[] = {
        {"tokens", q->tokens > 0, {"ops", "prefill", "decode", "tune"}},
        {"sequences", q->sequences > 0, {"prefill", "tune"}},
        {"cut", q->cut, {"decode"}},
        {"no-verify", q->no_verify, {"quantize"}},
        {"samples", a->samples > 0, {"decode", "quantize"}},
        {"length", a->length > 0, {"decode", "quantize"}},
        {"refine", a->refine >= 0, {"decode", "quantize"}},
        {"method", a->method != METHOD_RTN, {"decode", "quantize"}},
        {"batch", a->tune.batch > 0, {"decode", "quantize"}},
        {"dir", q->dir != NULL, {"prefill", "decode", "quantize", "tune"}},
        {"keep", q->keep != NULL, {"prefill", "decode", "quantize", "tune"}},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        bool fits = !rules[i].given;
        for (size_t k = 0; k < 4 && rules[i].parts[k]; k++)
            fits = fits || !strcmp(q->what, rules[i].parts[k]);
        if (!fits)
            return err_set(ERR_USAGE, "option '--%s' is not for '%s'", rules[i].option, q->what);
    }
    return 0;
}

static int refuse_uncalibrated(const struct args *a, const struct recipe *r)
{
    const struct {
        const char *option;
        bool given, fits;
        const char *what;
    } rules[] = {
        {"samples", a->samples > 0, r->calibrated, "methods that calibrate"},
        {"length", a->length > 0, r->calibrated, "methods that calibrate"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].given && !rules[i].fits)
            return err_set(ERR_USAGE, "option '--%s' is only for %s", rules[i].option, rules[i].what);
    return 0;
}

static int make_recipe(const struct args *a, struct recipe *r)
{
    const struct recipe_args chosen = {
        .method = methods[strcmp(a->bench.what, "tune") ? a->method : METHOD_AUTOROUND],
        .scales = scale_rules[a->scales],
        .damping = 0.01,
        .passes = a->refine,
        .tune = a->tune,
        .iterations = 200,
        .calib = {.samples = a->samples ? a->samples : 128, .length = a->length}};
    *r = (struct recipe){.ragged = RAGGED_AUTO};
    int rc = recipe_args_apply(&chosen, r);
    r->calib.text = NULL; /* ids are made up */
    if (!rc && r->calibrated)
        rc = bench_settle_length(a->bench.shape, &r->calib.length);
    if (!rc)
        rc = recipe_parse_scheme(schemes[a->scheme], &r->scheme);
    if (!rc)
        rc = recipe_parse_group(a->group_size, &r->scheme.group);
    return rc ? rc : refuse_uncalibrated(a, r);
}

/* A family that cannot be run is refused before gigabytes of weights are made up for it. */
static int refuse_unknown(const struct bench *b)
{
    struct gemma_config config;
    const int rc = bench_shape_config(b->shape, &config);
    if (rc < 0)
        return rc;
    gemma_config_free(&config);
    return 0;
}

int cmd_bench(int argc, char **argv)
{
    struct args a = {.refine = -1, .tune = TUNE_ARGS_NONE};
    const struct part *part = NULL;
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (rc)
        return rc;
    rc = find_part(&part, a.what);
    if (rc < 0)
        return rc;
    a.bench.what = part->name;
    a.bench.shape = bench_shape(a.shape);
    rc = refuse_foreign(&a);
    if (!rc)
        rc = make_recipe(&a, &a.bench.recipe);
    if (!rc)
        rc = refuse_unknown(&a.bench);
    if (!rc)
        rc = machine_begin(&a.bench.machine);
    return rc ? rc : part->run(&a.bench);
}

/* Options (parsing, every kind of error, suggestions, help) and the text for people that the commands print. */
#include "base/err.h"
#include "cli/human.h"
#include "cli/opt.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_WORDS = 16 };

struct args {
    const char *model, *out;
    bool quiet, dry_run, hidden;
    int scheme, method;
    int64_t samples, seed;
    uint64_t memory;
    double damp;
    const char *report;
    struct opt_list ignore;
};

static const char *const schemes[] = {"w4a16", "w4a16-asym", "w8a16", NULL};
static const char *const methods[] = {"rtn", "gptq", NULL};

static const struct opt opts[] = {
    {.name = "quiet", .letter = 'q', OPT_TO_FLAG(struct args, quiet), .help = "print nothing but errors"},
    {OPT_SECTION("What to do")},
    {.name = "scheme",
     OPT_TO_CHOICE(struct args, scheme),
     .value = "NAME",
     .choices = schemes,
     .initial = "w8a16",
     .help = "kind of weights"},
    {.name = "method",
     OPT_TO_CHOICE(struct args, method),
     .value = "NAME",
     .choices = methods,
     .initial_note = "the best there is",
     .help = "how codes are chosen"},
    {.name = "samples",
     .letter = 'n',
     OPT_TO_INT(struct args, samples),
     .value = "N",
     .initial = "128",
     .min = 1,
     .max = 4096,
     .help = "documents"},
    {.name = "seed", OPT_TO_INT(struct args, seed), .value = "N", .initial = "0", .help = "of the order"},
    {.name = "memory",
     OPT_TO_SIZE(struct args, memory),
     .value = "SIZE",
     .initial = "20GiB",
     .min = 1024,
     .max = INT64_MAX,
     .help = "a budget"},
    {.name = "damp",
     OPT_TO_DOUBLE(struct args, damp),
     .value = "X",
     .initial = "0.01",
     .high = INFINITY,
     .help = "damping"},
    {.name = "dry-run", OPT_TO_FLAG(struct args, dry_run), .help = "plan only"},
    {.name = "report", OPT_TO_STRING(struct args, report), .value = "FILE", .help = "where the report goes"},
    {.name = "ignore", OPT_TO_LIST(struct args, ignore), .value = "GLOB", .help = "tensors to leave alone"},
    {.name = "secret", OPT_TO_FLAG(struct args, hidden), .hidden = true, .help = "for tests"},
};

static const struct opt_arg positional[] = {
    {.name = "MODEL", .offset = OPT_OFFSET(struct args, model, const char *), .help = "a folder"},
    {.name = "OUT",
     .optional = true,
     .offset = OPT_OFFSET(struct args, out, const char *),
     .help = "a new one"},
};

static const struct opt_spec spec = {
    .command = "gemcut cut",
    .summary =
        "Cuts a model. This sentence is here to be wrapped, since it alone is longer than the one hundred "
        "columns that a line of help may have.\nA second paragraph.",
    .args = positional,
    .n_args = 2,
    .opts = opts,
    .n_opts = sizeof opts / sizeof *opts,
    .epilogue = "Examples:\n  gemcut cut model out",
};

/* Parses the words of a line, separated by single spaces; values point into a buffer that the next call reuses. */
static int parse(struct args *a, const char *line)
{
    static char buffer[1024];
    char *argv[MAX_WORDS] = {"cut"};
    int argc = 1;
    assert_true(strlen(line) < sizeof buffer);
    strcpy(buffer, line);
    for (char *word = *buffer ? buffer : NULL; word; argc++) {
        assert_true(argc < MAX_WORDS);
        argv[argc] = word;
        word = strchr(word, ' ');
        if (word)
            *word++ = '\0';
    }
    *a = (struct args){.method = -1};
    return opt_parse(&spec, argc, argv, a);
}

static void assert_error(const char *line, const char *message)
{
    struct args a;
    assert_int_equal(parse(&a, line), ERR_USAGE);
    assert_string_equal(err_message(), message);
    opt_list_free(&a.ignore);
}

static void test_defaults(void **state)
{
    (void)state;
    struct args a;
    assert_int_equal(parse(&a, "m"), 0);
    assert_string_equal(a.model, "m");
    assert_null(a.out);
    assert_false(a.quiet || a.dry_run || a.hidden);
    assert_int_equal(a.scheme, 2);
    assert_int_equal(a.method, -1); /* no default: as the caller left it */
    assert_int_equal(a.samples, 128);
    assert_int_equal(a.seed, 0);
    assert_true(a.memory == 20ull << 30);
    assert_true(a.damp == 0.01);
    assert_null(a.report);
    assert_int_equal(a.ignore.n, 0);
}

static void test_forms(void **state)
{
    (void)state;
    struct args a;
    assert_int_equal(
        parse(&a, "--scheme w4a16-asym m --method=gptq -qn7 --ignore a --ignore=b=c out --dry-run"), 0);
    assert_string_equal(a.model, "m");
    assert_string_equal(a.out, "out");
    assert_true(a.quiet && a.dry_run);
    assert_int_equal(a.scheme, 1);
    assert_int_equal(a.method, 1);
    assert_int_equal(a.samples, 7);
    assert_int_equal(a.ignore.n, 2);
    assert_string_equal(a.ignore.items[0], "a");
    assert_string_equal(a.ignore.items[1], "b=c");
    opt_list_free(&a.ignore);
    assert_int_equal(parse(&a, "-n 9 --seed -5 --report= --secret -- -q --dry-run"), 0);
    assert_int_equal(a.samples, 9);
    assert_int_equal(a.seed, -5);
    assert_string_equal(a.report, "");
    assert_true(a.hidden);
    assert_false(a.quiet || a.dry_run);
    assert_string_equal(a.model, "-q");
    assert_string_equal(a.out, "--dry-run");
    assert_int_equal(parse(&a, "- --report -"), 0);
    assert_string_equal(a.model, "-");
    assert_string_equal(a.report, "-");
}

static void test_help_wins_over_missing(void **state)
{
    (void)state;
    struct args a;
    assert_int_equal(parse(&a, "--help"), OPT_HELP);
    assert_int_equal(parse(&a, "-h"), OPT_HELP);
    assert_int_equal(parse(&a, "-qh"), OPT_HELP);
    assert_int_equal(parse(&a, "m out --samples 3 --help"), OPT_HELP);
    assert_int_equal(parse(&a, "-- --help"), 0);
}

static void test_sizes(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        uint64_t bytes;
    } cases[] = {
        {"m --memory 4096", 4096},          {"m --memory 4096B", 4096},      {"m --memory 1KiB", 1024},
        {"m --memory 1.5MiB", 1572864},     {"m --memory 2GiB", 2ull << 30}, {"m --memory 1TiB", 1ull << 40},
        {"m --memory 2kB", 2000},           {"m --memory 3MB", 3000000},     {"m --memory 20gb", 20000000000},
        {"m --memory=0.5TB", 500000000000},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct args a;
        assert_int_equal(parse(&a, cases[i].line), 0);
        assert_true(a.memory == cases[i].bytes);
    }
    static const char *const bad[] = {"",       "GiB", "4x",     "4G",     "-4096", "+4096",
                                      "4096 B", "1e4", "0x1000", "1..5MB", "nan",   "inf"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct args a = {0};
        char option[32] = "--memory=";
        char *argv[] = {"cut", "m", strcat(option, bad[i]), NULL};
        assert_int_equal(opt_parse(&spec, 3, argv, &a), ERR_USAGE);
    }
    assert_error("m --memory 20",
                 "option '--memory': '20' is out of range, expected a number of bytes of at least 1024");
    assert_error(
        "m --memory 9000000000GiB",
        "option '--memory': '9000000000GiB' is out of range, expected a number of bytes of at least 1024");
    assert_error("m --memory 4k", "option '--memory': '4k' is not a size such as 4096, 512MiB or 20GB");
}

static void test_bad_values(void **state)
{
    (void)state;
    assert_error("m --samples 0", "option '--samples': '0' is not an integer from 1 to 4096");
    assert_error("m -n4097", "option '--samples': '4097' is not an integer from 1 to 4096");
    assert_error("m --samples 1.5", "option '--samples': '1.5' is not an integer from 1 to 4096");
    assert_error("m --samples=", "option '--samples': '' is not an integer from 1 to 4096");
    assert_error("m --samples 0x10", "option '--samples': '0x10' is not an integer from 1 to 4096");
    assert_error("m --seed 9223372036854775808", "option '--seed': '9223372036854775808' is not an integer");
    assert_error("m --damp -1", "option '--damp': '-1' is not a number of at least 0");
    assert_error("m --damp nan", "option '--damp': 'nan' is not a number of at least 0");
    assert_error("m --damp 1e999", "option '--damp': '1e999' is not a number of at least 0");
    assert_error("m --scheme w4", "option '--scheme': 'w4' is not one of w4a16, w4a16-asym, w8a16");
    assert_error("m --scheme W4A16", "option '--scheme': 'W4A16' is not one of w4a16, w4a16-asym, w8a16");
}

static void test_usage_errors(void **state)
{
    (void)state;
    assert_error("", "missing argument MODEL; usage: gemcut cut MODEL [OUT] [options]");
    assert_error("a b c", "unexpected argument 'c'; usage: gemcut cut MODEL [OUT] [options]");
    assert_error("m --samples", "option '--samples' needs a value N");
    assert_error("m -n", "option '--samples' needs a value N");
    assert_error("m --report --dry-run", "option '--report' needs a value FILE, got the option '--dry-run' "
                                         "(if it is the value: '--report=--dry-run')");
    assert_error("m --report -q", "option '--report' needs a value FILE, got the option '-q' "
                                  "(if it is the value: '--report=-q')");
    assert_error("m --dry-run=yes", "option '--dry-run' takes no value, got 'yes'");
    assert_error("m --seed 1 --seed 1", "option '--seed' is given twice");
    assert_error("m -q --quiet", "option '--quiet' is given twice");
    assert_error("m --ignore a --nothing", "unknown option '--nothing'; the nearest known one is '--method'");
}

static void test_unknown_options(void **state)
{
    (void)state;
    assert_error("m --sheme w4a16", "unknown option '--sheme'; did you mean '--scheme'?");
    assert_error("m --sheme=w4a16", "unknown option '--sheme'; did you mean '--scheme'?");
    assert_error("m --SCHEME", "unknown option '--SCHEME'; did you mean '--scheme'?");
    assert_error("m --dryrun", "unknown option '--dryrun'; did you mean '--dry-run'?");
    assert_error("m --samp", "unknown option '--samp'; did you mean '--samples'?");
    assert_error("m --hepl", "unknown option '--hepl'; did you mean '--help'?");
    assert_error("m --secert", "unknown option '--secert'; the nearest known one is '--seed'");
    assert_error("m -r x", "unknown option '-r'; did you mean '--report'?");
    assert_error("m -seed", "unknown option '-s' in '-seed'; did you mean '--seed'?");
    assert_error("m --\x1b[31m", "unknown option '--?[31m'; the nearest known one is '--quiet'");
}

static void test_nearest(void **state)
{
    (void)state;
    static const char *const known[] = {"quantize", "inspect", "verify", "eval"};
    bool close = false;
    assert_string_equal(opt_nearest("qauntize", known, 4, &close), "quantize");
    assert_true(close);
    assert_string_equal(opt_nearest("verfy", known, 4, &close), "verify");
    assert_true(close);
    assert_string_equal(opt_nearest("quant", known, 4, &close), "quantize");
    assert_true(close);
    assert_string_equal(opt_nearest("xxxxxxxxxxxx", known, 4, &close), "quantize");
    assert_false(close);
    assert_non_null(opt_nearest("", known, 4, &close));
    assert_false(close);
    char long_word[300];
    memset(long_word, 'v', sizeof long_word);
    long_word[sizeof long_word - 1] = '\0';
    assert_non_null(opt_nearest(long_word, known, 4, &close));
    assert_false(close);
    assert_null(opt_nearest("eval", known, 0, &close));
    assert_false(close);
}

/* The line of a text that contains `what`. */
static void assert_has(const char *text, const char *what)
{
    if (!strstr(text, what))
        fail_msg("the help lacks: %s\n%s", what, text);
}

static void test_help(void **state)
{
    (void)state;
    struct text t = {0};
    opt_help(&spec, &t);
    assert_int_equal(text_finish(&t), 0);
    assert_int_equal(strncmp(t.data, "Usage: gemcut cut MODEL [OUT] [options]\n\nCuts a model.", 54), 0);
    assert_has(t.data, "may have.\nA second paragraph.\n");
    assert_has(t.data, "\nArguments:\n  MODEL                     a folder\n");
    assert_has(t.data, "\nOptions:\n  -q, --quiet               print nothing but errors\n\nWhat to do:\n");
    assert_has(
        t.data,
        "      --scheme NAME         kind of weights [one of w4a16, w4a16-asym, w8a16; default: w8a16]\n");
    assert_has(t.data, "[one of rtn, gptq; default: the best");
    assert_has(t.data, "  -n, --samples N           documents [from 1 to 4096; default: 128]\n");
    assert_has(t.data, "a budget [at least 1024; default: 20GiB]\n");
    assert_has(t.data, "damping [at least 0; default: 0.01]\n");
    assert_has(t.data, "where the report goes [default: none]\n");
    assert_has(t.data, "tensors to leave alone [may be repeated; default: none]\n");
    assert_has(t.data, "  -h, --help                print this text\n\nExamples:\n  gemcut cut model out\n");
    assert_null(strstr(t.data, "secret"));
    for (size_t i = 0; i < spec.n_opts; i++)
        if (spec.opts[i].name && !spec.opts[i].hidden)
            assert_has(t.data, spec.opts[i].name);
    for (const char *line = t.data; *line; line += strcspn(line, "\n") + 1) {
        assert_true(strcspn(line, "\n") <= 100);
        assert_true(line[0] == '\n' || line[strcspn(line, "\n") - 1] != ' ');
    }
    text_free(&t);
}

static void test_human_bytes(void **state)
{
    (void)state;
    static const struct {
        uint64_t bytes;
        const char *text;
    } cases[] = {
        {0, "0 B"},
        {999, "999 B"},
        {1000, "1.0 kB"},
        {1049, "1.0 kB"},
        {99949, "99.9 kB"},
        {99950, "100 kB"},
        {999499, "999 kB"},
        {999500, "1.0 MB"},
        {8600000000, "8.6 GB"},
        {62546177752, "62.5 GB"},
        {1000000000000, "1.0 TB"},
        {UINT64_MAX, "18.4 EB"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(human_bytes(cases[i].bytes).s, cases[i].text);
}

static void test_human_seconds(void **state)
{
    (void)state;
    static const struct {
        double seconds;
        const char *text;
    } cases[] = {
        {0, "0 ms"},
        {0.0352, "35 ms"},
        {0.0994, "99 ms"},
        {0.0995, "0.1 s"},
        {9.94, "9.9 s"},
        {9.96, "10 s"},
        {59.4, "59 s"},
        {59.6, "1 min 00 s"},
        {185, "3 min 05 s"},
        {3599.6, "1 h 00 min"},
        {8040, "2 h 14 min"},
        {360000, "100 h 00 min"},
        {-1, "?"},
        {NAN, "?"},
        {INFINITY, "?"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(human_seconds(cases[i].seconds).s, cases[i].text);
}

static void test_width(void **state)
{
    (void)state;
    assert_int_equal(human_width("abc"), 3);
    assert_int_equal(human_width("Größe"), 5);
    assert_int_equal(human_width("e\u0301"), 1);
    assert_int_equal(human_width("漢字"), 4);
    assert_int_equal(human_width("😀"), 2);
    assert_int_equal(human_width("\xff\xc3"), 2); /* bytes that are no UTF-8 count one each */
    assert_int_equal(human_fit("Größe", 3), 4);
    assert_int_equal(human_fit("漢字", 3), 3);
    assert_int_equal(human_fit("abc", 9), 3);
    assert_int_equal(human_fit("abc", 0), 0);
}

static void test_table(void **state)
{
    (void)state;
    static const struct human_column columns[] = {{"name", false}, {"size", true}, {"note", false}};
    struct human_table table = {.columns = columns, .n_columns = 3};
    human_table_cell(&table, "a\nb");
    human_table_cell(&table, "%d", 12345);
    human_table_cell(&table, "%s", "");
    human_table_cell(&table, "größer");
    human_table_cell(&table, "%d", 7);
    human_table_cell(&table, "last");
    struct text t = {0};
    assert_int_equal(human_table_render(&table, &t), 0);
    assert_int_equal(text_finish(&t), 0);
    assert_string_equal(t.data, "name     size  note\n"
                                "a?b     12345\n"
                                "größer      7  last\n");
    text_free(&t);
    human_table_free(&table);

    static const struct human_column untitled[] = {{NULL, false}, {NULL, false}};
    struct human_table pairs = {.columns = untitled, .n_columns = 2};
    human_table_cell(&pairs, "layers");
    human_table_cell(&pairs, "26");
    assert_int_equal(human_table_render(&pairs, &t), 0);
    assert_int_equal(text_finish(&t), 0);
    assert_string_equal(t.data, "layers  26\n");
    text_free(&t);
    human_table_free(&pairs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_forms),
        cmocka_unit_test(test_help_wins_over_missing),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_bad_values),
        cmocka_unit_test(test_usage_errors),
        cmocka_unit_test(test_unknown_options),
        cmocka_unit_test(test_nearest),
        cmocka_unit_test(test_help),
        cmocka_unit_test(test_human_bytes),
        cmocka_unit_test(test_human_seconds),
        cmocka_unit_test(test_width),
        cmocka_unit_test(test_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

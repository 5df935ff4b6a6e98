#include "cli/opt.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/human.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_OPTS = 64, HELP_COLUMNS = 100, HELP_INDENT = 28 };

void opt_list_free(struct opt_list *list)
{
    free(list->items);
    *list = (struct opt_list){0};
}

/* What bounds say in words: " from 1 to 9", " of at least 1"; "" when there are none. */
static struct human bounds(const struct opt *o)
{
    struct human h = {""};
    if (o->type == OPT_DOUBLE && (o->low != 0 || o->high != 0)) {
        if (isinf(o->high))
            snprintf(h.s, sizeof h.s, " of at least %g", o->low);
        else
            snprintf(h.s, sizeof h.s, " from %g to %g", o->low, o->high);
    } else if (o->type != OPT_DOUBLE && (o->min || o->max)) {
        if (o->max == INT64_MAX)
            snprintf(h.s, sizeof h.s, " of at least %" PRId64, o->min);
        else
            snprintf(h.s, sizeof h.s, " from %" PRId64 " to %" PRId64, o->min, o->max);
    }
    return h;
}

static int store_int(const struct opt *o, const char *text, int64_t *out)
{
    char *end = NULL;
    errno = 0;
    const long long v = strtoll(text, &end, 10);
    const bool number = *text && strspn(text, "+-0123456789") == strlen(text) && !*end;
    const bool bounded = o->min || o->max;
    if (!number || errno == ERANGE || (bounded && (v < o->min || v > o->max)))
        return err_set(ERR_USAGE, "option '--%s': '%s' is not an integer%s", o->name, text, bounds(o).s);
    *out = v;
    return 0;
}

static int store_double(const struct opt *o, const char *text, double *out)
{
    char *end = NULL;
    const double v = strtod(text, &end);
    const bool number = *text && strspn(text, "+-.0123456789eE") == strlen(text) && !*end && isfinite(v);
    const bool bounded = o->low != 0 || o->high != 0;
    if (!number || (bounded && !(v >= o->low && v <= o->high)))
        return err_set(ERR_USAGE, "option '--%s': '%s' is not a number%s", o->name, text, bounds(o).s);
    *out = v;
    return 0;
}

/* Bytes in one unit of that name; 0 when it is unknown. */
static double size_unit(const char *name)
{
    static const struct {
        const char *name;
        double bytes;
    } units[] = {
        {"", 1},         {"B", 1},    {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30},
        {"TiB", 0x1p40}, {"KB", 1e3}, {"MB", 1e6},     {"GB", 1e9},     {"TB", 1e12},
    };
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (!strcasecmp(name, units[i].name))
            return units[i].bytes;
    return 0;
}

static int store_size(const struct opt *o, const char *text, uint64_t *out)
{
    const size_t n_number = strspn(text, ".0123456789");
    char *end = NULL;
    const double number = strtod(text, &end), unit = size_unit(text + n_number);
    if (!n_number || end != text + n_number || unit == 0)
        return err_set(ERR_USAGE, "option '--%s': '%s' is not a size such as 4096, 512MiB or 20GB", o->name,
                       text);
    const double bytes = number * unit;
    const bool bounded = o->min || o->max;
    if (!(bytes < 0x1p63) || (bounded && (bytes < (double)o->min || bytes > (double)o->max)))
        return err_set(ERR_USAGE, "option '--%s': '%s' is out of range, expected a number of bytes%s",
                       o->name, text, bounds(o).s);
    *out = (uint64_t)bytes;
    return 0;
}

/* "a, b, c" */
static void add_choices(struct text *out, const struct opt *o)
{
    for (size_t i = 0; o->choices[i]; i++)
        text_printf(out, "%s%s", i ? ", " : "", o->choices[i]);
}

/* Records the message in `t`, frees it. */
static int usage_error(struct text *t)
{
    const int rc = text_finish(t) < 0 ? ERR_MEMORY : err_set(ERR_USAGE, "%s", t->data);
    text_free(t);
    return rc;
}

static int store_choice(const struct opt *o, const char *text, int *out)
{
    for (int i = 0; o->choices[i]; i++) {
        if (!strcmp(text, o->choices[i])) {
            *out = i;
            return 0;
        }
    }
    struct text t = {0};
    text_printf(&t, "option '--%s': '%s' is not one of ", o->name, text);
    add_choices(&t, o);
    return usage_error(&t);
}

static int store_item(const char *text, struct opt_list *list)
{
    const int rc =
        mem_grow(&list->items, &list->capacity, list->n + 1, sizeof *list->items, "a list of options");
    if (rc == 0)
        list->items[list->n++] = text;
    return rc;
}

static int store(const struct opt *o, const char *text, void *base)
{
    void *target = (char *)base + o->offset;
    switch (o->type) {
    case OPT_FLAG:
        *(bool *)target = true;
        return 0;
    case OPT_STRING:
        *(const char **)target = text;
        return 0;
    case OPT_INT:
        return store_int(o, text, target);
    case OPT_SIZE:
        return store_size(o, text, target);
    case OPT_DOUBLE:
        return store_double(o, text, target);
    case OPT_CHOICE:
        return store_choice(o, text, target);
    case OPT_LIST:
        return store_item(text, target);
    }
    return err_set(ERR_USAGE, "option '--%s' has no type", o->name);
}

/* ---- names ---- */

static int min3(int a, int b, int c)
{
    const int m = a < b ? a : b;
    return m < c ? m : c;
}

static int lower(char c)
{
    return c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c;
}

/* Optimal string alignment: insertions, deletions, substitutions and swaps of neighbours cost 1 each. */
static int edit_distance(const char *a, const char *b)
{
    enum { LONGEST = 64 };
    const int n_a = (int)strnlen(a, LONGEST + 1), n_b = (int)strnlen(b, LONGEST + 1);
    if (n_a > LONGEST || n_b > LONGEST)
        return 2 * LONGEST;
    int rows[3][LONGEST + 1];
    for (int j = 0; j <= n_b; j++)
        rows[0][j] = j;
    for (int i = 1; i <= n_a; i++) {
        int *row = rows[i % 3];
        const int *up = rows[(i + 2) % 3], *up2 = rows[(i + 1) % 3];
        row[0] = i;
        for (int j = 1; j <= n_b; j++) {
            const bool same = lower(a[i - 1]) == lower(b[j - 1]);
            row[j] = min3(up[j] + 1, row[j - 1] + 1, up[j - 1] + !same);
            const bool swapped =
                i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) && lower(a[i - 2]) == lower(b[j - 1]);
            if (swapped && up2[j - 2] + 1 < row[j])
                row[j] = up2[j - 2] + 1;
        }
    }
    return rows[n_a % 3][n_b];
}

const char *opt_nearest(const char *word, const char *const *known, size_t n, bool *close)
{
    const char *best = NULL;
    int best_distance = 0;
    for (size_t i = 0; i < n; i++) {
        int distance = edit_distance(word, known[i]);
        /* an abbreviation is far from the full name by the number of edits, but near in meaning */
        if (*word && distance > 1 && !strncasecmp(word, known[i], strlen(word)))
            distance = 1;
        if (!best || distance < best_distance) {
            best = known[i];
            best_distance = distance;
        }
    }
    const int allowed = (int)strnlen(word, 32) / 3 < 2 ? 2 : (int)strnlen(word, 32) / 3;
    *close = best && best_distance <= allowed && best_distance < (int)strlen(best);
    return best;
}

void opt_suggest(struct text *out, const char *word, const char *prefix, const char *const *known, size_t n)
{
    bool close = false;
    const char *nearest = opt_nearest(word, known, n, &close);
    if (nearest && close)
        text_printf(out, "; did you mean '%s%s'?", prefix, nearest);
    else if (nearest)
        text_printf(out, "; the nearest known one is '%s%s'", prefix, nearest);
}

static int unknown_option(const struct opt_spec *spec, const char *shown, const char *word)
{
    const char *known[MAX_OPTS + 1];
    size_t n = 0;
    for (size_t i = 0; i < spec->n_opts; i++)
        if (spec->opts[i].name && !spec->opts[i].hidden)
            known[n++] = spec->opts[i].name;
    known[n++] = "help";
    struct text t = {0};
    text_printf(&t, "unknown option '%s'", shown);
    opt_suggest(&t, word, "--", known, n);
    return usage_error(&t);
}

/* ---- parsing ---- */

struct parse {
    const struct opt_spec *spec;
    void *target;
    char **argv;
    int argc, next;
    uint64_t given; /* one bit an option */
    size_t n_args;  /* positional arguments so far */
};

static const struct opt *find_name(const struct opt_spec *spec, const char *name, size_t n)
{
    for (size_t i = 0; i < spec->n_opts; i++) {
        const char *known = spec->opts[i].name;
        if (known && strlen(known) == n && !memcmp(known, name, n))
            return &spec->opts[i];
    }
    return NULL;
}

static const struct opt *find_letter(const struct opt_spec *spec, char letter)
{
    for (size_t i = 0; i < spec->n_opts; i++)
        if (spec->opts[i].name && spec->opts[i].letter == letter)
            return &spec->opts[i];
    return NULL;
}

/* Whether a word that stands where a value is due is itself an option of this command. */
static bool is_option(const struct opt_spec *spec, const char *word)
{
    if (!strncmp(word, "--", 2) && word[2])
        return find_name(spec, word + 2, strcspn(word + 2, "=")) || !strcmp(word, "--help");
    return word[0] == '-' && word[1] && !word[2] && (find_letter(spec, word[1]) || word[1] == 'h');
}

static const char *value_name(const struct opt *o)
{
    return o->value ? o->value : "VALUE";
}

/* Takes one option whose value, if any, is `value`, or else the next word. */
static int take(struct parse *p, const struct opt *o, const char *value)
{
    const uint64_t bit = 1ull << (o - p->spec->opts);
    if (p->given & bit && o->type != OPT_LIST)
        return err_set(ERR_USAGE, "option '--%s' is given twice", o->name);
    p->given |= bit;
    if (o->type == OPT_FLAG || value)
        return store(o, value, p->target);
    if (p->next >= p->argc)
        return err_set(ERR_USAGE, "option '--%s' needs a value %s", o->name, value_name(o));
    const char *word = p->argv[p->next++];
    if (is_option(p->spec, word))
        return err_set(ERR_USAGE,
                       "option '--%s' needs a value %s, got the option '%s' (if it is the value: '--%s=%s')",
                       o->name, value_name(o), word, o->name, word);
    return store(o, word, p->target);
}

/* body: what follows "--" */
static int take_long(struct parse *p, const char *body)
{
    const size_t n_name = strcspn(body, "=");
    const char *value = body[n_name] ? body + n_name + 1 : NULL;
    if (!strcmp(body, "help"))
        return OPT_HELP;
    const struct opt *o = find_name(p->spec, body, n_name);
    if (!o) {
        char *name = mem_strndup(body, n_name), *shown = name ? mem_printf("--%s", name) : NULL;
        const int rc = shown ? unknown_option(p->spec, shown, name) : ERR_MEMORY;
        free(name);
        free(shown);
        return rc;
    }
    if (o->type == OPT_FLAG && value)
        return err_set(ERR_USAGE, "option '--%s' takes no value, got '%s'", o->name, value);
    return take(p, o, value);
}

static int unknown_letter(const struct opt_spec *spec, char letter, const char *letters)
{
    char *shown = letters[1] ? mem_printf("-%c' in '-%s", letter, letters) : mem_printf("-%c", letter);
    const int rc = shown ? unknown_option(spec, shown, letters) : ERR_MEMORY;
    free(shown);
    return rc;
}

/* letters: what follows "-". The rest of the word is the value of the first letter that takes one. */
static int take_letters(struct parse *p, const char *letters)
{
    for (const char *l = letters; *l; l++) {
        if (*l == 'h' && !find_letter(p->spec, 'h'))
            return OPT_HELP;
        const struct opt *o = find_letter(p->spec, *l);
        if (!o)
            return unknown_letter(p->spec, *l, letters);
        const bool takes_value = o->type != OPT_FLAG;
        const int rc = take(p, o, takes_value && l[1] ? l + 1 : NULL);
        if (rc != 0 || takes_value)
            return rc;
    }
    return 0;
}

static int args_error(const struct opt_spec *spec, const char *what, const char *name)
{
    struct text t = {0};
    text_printf(&t, "%s %s; usage: ", what, name);
    opt_usage(spec, &t);
    return usage_error(&t);
}

static int take_arg(struct parse *p, const char *word)
{
    if (p->n_args == p->spec->n_args) {
        char *quoted = mem_printf("'%s'", word);
        const int rc = quoted ? args_error(p->spec, "unexpected argument", quoted) : ERR_MEMORY;
        free(quoted);
        return rc;
    }
    *(const char **)((char *)p->target + p->spec->args[p->n_args++].offset) = word;
    return 0;
}

int opt_parse(const struct opt_spec *spec, int argc, char **argv, void *target)
{
    CHECK(spec->n_opts <= MAX_OPTS);
    struct parse p = {.spec = spec, .target = target, .argv = argv, .argc = argc, .next = 1};
    for (size_t i = 0; i < spec->n_opts; i++)
        if (spec->opts[i].initial)
            CHECK(store(&spec->opts[i], spec->opts[i].initial, target) == 0);
    bool options_ended = false;
    while (p.next < argc) {
        const char *word = argv[p.next++];
        int rc = 0;
        if (options_ended || word[0] != '-' || !word[1])
            rc = take_arg(&p, word);
        else if (!strcmp(word, "--"))
            options_ended = true;
        else if (word[1] == '-')
            rc = take_long(&p, word + 2);
        else
            rc = take_letters(&p, word + 1);
        if (rc != 0)
            return rc;
    }
    if (p.n_args < spec->n_args && !spec->args[p.n_args].optional)
        return args_error(spec, "missing argument", spec->args[p.n_args].name);
    return 0;
}

/* ---- help ---- */

void opt_usage(const struct opt_spec *spec, struct text *out)
{
    text_add(out, spec->command);
    for (size_t i = 0; i < spec->n_args; i++)
        text_printf(out, spec->args[i].optional ? " [%s]" : " %s", spec->args[i].name);
    text_add(out, " [options]");
}

/* Words of s in lines of at most HELP_COLUMNS that start at `indent`; the current line has `column` columns. */
static void wrap(struct text *out, const char *s, int indent, int column)
{
    bool line_start = true;
    while (*s) {
        const size_t n = strcspn(s, " \n");
        char word[HELP_COLUMNS + 1];
        snprintf(word, sizeof word, "%.*s", (int)n, s);
        const int width = human_width(word);
        if (!line_start && column + 1 + width > HELP_COLUMNS) {
            text_add(out, "\n");
            column = 0;
            line_start = true;
        }
        if (line_start) {
            text_printf(out, "%*s", n && column < indent ? indent - column : 0, "");
            column = column < indent ? indent : column;
        } else if (n) {
            text_add(out, " ");
            column++;
        }
        text_append(out, s, n);
        column += width;
        line_start = n ? false : line_start;
        s += n;
        if (*s == '\n') {
            text_add(out, "\n");
            column = 0;
            line_start = true;
        }
        s += *s != '\0';
    }
    text_add(out, "\n");
}

/* One entry: the left column, then the text beside it, or below when the left column is too long. */
static void help_entry(struct text *out, const char *left, const char *help)
{
    text_add(out, left);
    int column = human_width(left);
    if (column > HELP_INDENT - 2) {
        text_add(out, "\n");
        column = 0;
    }
    wrap(out, help, HELP_INDENT, column);
}

/* "[1 to 9; default: 5]" and the like */
static void add_facts(struct text *out, const struct opt *o)
{
    if (o->type == OPT_FLAG)
        return;
    text_add(out, " [");
    if (o->type == OPT_CHOICE) {
        text_add(out, "one of ");
        add_choices(out, o);
        text_add(out, "; ");
    } else if (o->type == OPT_LIST) {
        text_add(out, "may be repeated; ");
    } else if (*bounds(o).s) {
        const struct human h = bounds(o);
        text_printf(out, "%s; ", h.s + (strncmp(h.s, " of ", 4) ? 1 : 4));
    }
    const char *shown = o->initial_note ? o->initial_note : o->initial ? o->initial : "none";
    text_printf(out, "default: %s]", shown);
}

static void help_option(struct text *out, const struct opt *o)
{
    struct text left = {0}, help = {0};
    const char letter[] = {'-', o->letter, ',', '\0'};
    text_printf(&left, "  %3s --%s", o->letter ? letter : "", o->name);
    if (o->type != OPT_FLAG)
        text_printf(&left, " %s", value_name(o));
    text_add(&help, o->help);
    add_facts(&help, o);
    if (text_finish(&left) == 0 && text_finish(&help) == 0)
        help_entry(out, left.data, help.data);
    else
        out->failed = true;
    text_free(&left);
    text_free(&help);
}

void opt_help_options(const struct opt_spec *spec, struct text *out)
{
    if (!spec->n_opts || spec->opts[0].name)
        text_add(out, "\nOptions:\n");
    for (size_t i = 0; i < spec->n_opts; i++) {
        const struct opt *o = &spec->opts[i];
        if (!o->name)
            text_printf(out, "\n%s:\n", o->help);
        else if (!o->hidden)
            help_option(out, o);
    }
    help_entry(out, "  -h, --help", "print this text");
}

void opt_help(const struct opt_spec *spec, struct text *out)
{
    text_add(out, "Usage: ");
    opt_usage(spec, out);
    text_add(out, "\n\n");
    wrap(out, spec->summary, 0, 0);
    if (spec->n_args)
        text_add(out, "\nArguments:\n");
    for (size_t i = 0; i < spec->n_args; i++) {
        char left[HELP_COLUMNS];
        snprintf(left, sizeof left, "  %s", spec->args[i].name);
        help_entry(out, left, spec->args[i].help);
    }
    opt_help_options(spec, out);
    if (spec->epilogue)
        text_printf(out, "\n%s\n", spec->epilogue);
}

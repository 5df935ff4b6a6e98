/* Options as data: one constant table per command drives parsing, the usage line and the help text. A default is
 * written once, as the user would type it; the parser applies it and the help shows it, so they cannot differ.
 * Targets are members of a struct of the caller, given by offset; strings point into argv or into the table. */
#ifndef GEMCUT_CLI_OPT_H
#define GEMCUT_CLI_OPT_H

#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum opt_type {
    OPT_FLAG,   /* bool */
    OPT_STRING, /* const char * */
    OPT_INT,    /* int64_t */
    OPT_SIZE,   /* uint64_t, bytes: 4096, 512KiB, 1.5GiB, 20GB */
    OPT_DOUBLE, /* double, finite */
    OPT_CHOICE, /* int, index into choices */
    OPT_LIST,   /* struct opt_list; the only type that may be given more than once */
};

struct opt_list {
    const char **items; /* released with opt_list_free; the strings are argv's */
    size_t n, capacity;
};

struct opt {
    const char *name;           /* long name without dashes; NULL: `help` is the title of a section */
    char letter;                /* short name or 0 */
    enum opt_type type;         /* with offset, by one of the OPT_TO_ macros */
    size_t offset;              /* of the target in the caller's struct */
    const char *value;          /* what the help calls the value, "FILE"; not for flags */
    const char *initial;        /* default, parsed like an argument; NULL: the target keeps what it holds */
    const char *initial_note;   /* the default in words, when it is not one value: "one for each processor" */
    const char *const *choices; /* OPT_CHOICE: names, NULL at the end */
    int64_t min, max;           /* OPT_INT, OPT_SIZE: inclusive; both 0: no bounds; INT64_MAX: no upper one */
    double low, high;           /* OPT_DOUBLE: inclusive; both 0: no bounds; INFINITY: no upper one */
    bool hidden;                /* neither in the help nor suggested */
    const char *help;
};

/* The offset of a member, and a warning at compile time when it has not the type that the option stores. */
#define OPT_OFFSET(s, member, type) (offsetof(s, member) + 0 * sizeof(&((s *)0)->member == (type *)0))
#define OPT_TO_FLAG(s, member)      .type = OPT_FLAG, .offset = OPT_OFFSET(s, member, bool)
#define OPT_TO_STRING(s, member)    .type = OPT_STRING, .offset = OPT_OFFSET(s, member, const char *)
#define OPT_TO_INT(s, member)       .type = OPT_INT, .offset = OPT_OFFSET(s, member, int64_t)
#define OPT_TO_SIZE(s, member)      .type = OPT_SIZE, .offset = OPT_OFFSET(s, member, uint64_t)
#define OPT_TO_DOUBLE(s, member)    .type = OPT_DOUBLE, .offset = OPT_OFFSET(s, member, double)
#define OPT_TO_CHOICE(s, member)    .type = OPT_CHOICE, .offset = OPT_OFFSET(s, member, int)
#define OPT_TO_LIST(s, member)      .type = OPT_LIST, .offset = OPT_OFFSET(s, member, struct opt_list)

/* A heading, {OPT_SECTION("Output")}; the options below it belong to it. */
#define OPT_SECTION(title) .name = NULL, .help = title

/* A positional argument. Optional ones stand last. */
struct opt_arg {
    const char *name;
    bool optional;
    size_t offset; /* of a const char *, by OPT_OFFSET(s, member, const char *) */
    const char *help;
};

struct opt_spec {
    const char *command;        /* "gemcut quantize" */
    const char *summary;        /* paragraphs under the usage line; '\n' ends one */
    const struct opt_arg *args; /* [n_args] */
    size_t n_args;
    const struct opt *opts; /* [n_opts], at most 64; --help is added to every table */
    size_t n_opts;
    const char *epilogue; /* examples, printed as they are; NULL: none */
};

enum { OPT_HELP = 1 }; /* --help was given */

/* Sets the defaults, then reads argv[1..argc) into `target`. 0, OPT_HELP, ERR_USAGE or ERR_MEMORY. Lists must be
 * freed whatever it returns. */
int opt_parse(const struct opt_spec *spec, int argc, char **argv, void *target);
void opt_list_free(struct opt_list *list);

/* "gemcut quantize MODEL OUT [options]" */
void opt_usage(const struct opt_spec *spec, struct text *out);

/* The whole help, at most 100 columns wide; or the list of options alone. */
void opt_help(const struct opt_spec *spec, struct text *out);
void opt_help_options(const struct opt_spec *spec, struct text *out);

/* The known name nearest to word by edit distance, ignoring case; words that continue `word` count as near. NULL
 * when n is 0. *close: whether it may be what was meant. */
const char *opt_nearest(const char *word, const char *const *known, size_t n, bool *close);

/* Appends "; did you mean 'PREFIXnearest'?", or "; the nearest known one is …" when nothing is close. */
void opt_suggest(struct text *out, const char *word, const char *prefix, const char *const *known, size_t n);

#endif

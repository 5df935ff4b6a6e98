#include "formats/quant_match.h"

#include "base/err.h"
#include "base/hash.h"
#include "base/mem.h"
#include "base/text.h"

#include <ctype.h>
#include <regex.h>
#include <stdlib.h>
#include <string.h>

/* glibc keeps every state that an expression has been in, 2 KiB and more each, which a hostile one can make as many of as
 * there are characters in all names: after so many tries all expressions are compiled anew. */
enum { MAX_TRIES = 1024 };

static const size_t no_group = SIZE_MAX;

struct expression {
    const char *text; /* behind "re:" */
    size_t group;
    bool compiled;
    regex_t regex;
};

/* The ignores, or the targets of all groups, in the order in which they are tried: exact names, expressions, class names;
 * of each kind the first one of the description counts. */
struct pattern_list {
    struct name_table inner, bare; /* names with dots, without the levels in front; without dots → group */
    struct expression *expressions;
    size_t n_expressions, capacity;
    size_t class_group; /* of "Linear" */
};

struct quant_matcher {
    const struct quant_config *cfg;
    struct pattern_list ignore, targets; /* of an ignore, the group says nothing */
    int n_tries;                         /* of expressions, since they were compiled */
};

/* --- the lists -------------------------------------------------------------------------------------------------- */

static int add_expression(struct pattern_list *l, const char *text, size_t group)
{
    const int rc = mem_grow(&l->expressions, &l->capacity, l->n_expressions + 1, sizeof *l->expressions,
                            "regular expressions");
    if (!rc)
        l->expressions[l->n_expressions++] = (struct expression){.text = text, .group = group};
    return rc;
}

static int add_patterns(struct pattern_list *l, char *const *patterns, size_t n, size_t group)
{
    int rc = 0;
    for (size_t i = 0; rc >= 0 && i < n; i++) {
        const char *p = patterns[i];
        if (!strcmp(p, "Linear") && l->class_group == no_group)
            l->class_group = group;
        if (!strncmp(p, "re:", 3))
            rc = add_expression(l, p + 3, group);
        else if (strchr(p, '.'))
            rc = name_table_add(&l->inner, quant_inner_name(p), group);
        else
            rc = name_table_add(&l->bare, p, group);
    }
    return rc < 0 ? rc : 0;
}

static void forget_compiled(struct pattern_list *l)
{
    for (size_t i = 0; i < l->n_expressions; i++) {
        if (l->expressions[i].compiled)
            regfree(&l->expressions[i].regex);
        l->expressions[i].compiled = false;
    }
}

static void free_list(struct pattern_list *l)
{
    forget_compiled(l);
    free(l->expressions);
    name_table_free(&l->inner);
    name_table_free(&l->bare);
}

int quant_matcher_open(struct quant_matcher **out, const struct quant_config *cfg)
{
    struct quant_matcher *m = *out = mem_alloc(1, sizeof *m, "a description's patterns");
    if (!m)
        return ERR_MEMORY;
    m->cfg = cfg;
    m->ignore.class_group = m->targets.class_group = no_group;
    int rc = add_patterns(&m->ignore, cfg->ignore, cfg->n_ignore, 0);
    for (size_t g = 0; !rc && g < cfg->n_groups; g++)
        rc = add_patterns(&m->targets, cfg->groups[g].targets, cfg->groups[g].n_targets, g);
    if (rc < 0) {
        quant_matcher_close(m);
        *out = NULL;
    }
    return rc;
}

void quant_matcher_close(struct quant_matcher *m)
{
    if (!m)
        return;
    free_list(&m->ignore);
    free_list(&m->targets);
    free(m);
}

/* --- matching --------------------------------------------------------------------------------------------------- */

/* Whether POSIX extended syntax would read a pattern otherwise than Python does, or glibc might not compile it in
 * bounded memory: it copies the operand of every '+', so that each nested one doubles it, and it recurses into
 * parentheses. */
static bool is_beyond_posix(const char *pattern)
{
    const size_t max_plus = 8, max_open = 64;
    size_t n_plus = 0, n_open = 0;
    if (strstr(pattern, "(?") || strchr(pattern, '{'))
        return true;
    for (const char *s = pattern; *s; s++) {
        if (*s == '\\') {
            if (isalnum((unsigned char)s[1])) /* \d, \w, \1 */
                return true;
            s += s[1] != '\0';
            continue;
        }
        if (strchr("*+?", *s) && s[1] && strchr("*+?", s[1])) /* lazy and possessive ones */
            return true;
        n_plus += *s == '+';
        n_open += *s == '(';
    }
    return n_plus > max_plus || n_open > max_open;
}

/* Python's re.match is anchored at the start only. POSIX extended syntax covers what such lists contain; a
 * pattern with other constructs is reported, not guessed. */
static int compile(struct expression *e)
{
    if (is_beyond_posix(e->text))
        return err_set(ERR_UNSUPPORTED, "cannot evaluate the pattern 're:%s'", e->text);
    char *anchored = mem_printf("^(%s)", e->text);
    if (!anchored)
        return ERR_MEMORY;
    e->compiled = !regcomp(&e->regex, anchored, REG_EXTENDED | REG_NOSUB);
    free(anchored);
    return e->compiled ? 0 : err_set(ERR_FORMAT, "'re:%s' is not a regular expression", e->text);
}

static int try_expression(struct quant_matcher *m, struct expression *e, const char *module)
{
    if (m->n_tries == MAX_TRIES) {
        forget_compiled(&m->ignore);
        forget_compiled(&m->targets);
        m->n_tries = 0;
    }
    m->n_tries++;
    const int rc = e->compiled ? 0 : compile(e);
    return rc ? rc : regexec(&e->regex, module, 0, NULL, 0) == 0;
}

/* 1 and *group when a pattern matches, 0 when none does, negative for the first one that cannot be evaluated. */
static int find(struct quant_matcher *m, struct pattern_list *l, const char *module, size_t *group)
{
    size_t inner = no_group, bare = no_group;
    name_table_find(&l->inner, quant_inner_name(module), &inner);
    name_table_find(&l->bare, module, &bare);
    *group = inner < bare ? inner : bare;
    if (*group != no_group)
        return 1;
    for (size_t i = 0; i < l->n_expressions; i++) {
        const int rc = try_expression(m, &l->expressions[i], module);
        *group = l->expressions[i].group;
        if (rc)
            return rc;
    }
    *group = l->class_group;
    return *group != no_group;
}

static bool is_inside(const struct quant_config *cfg, const char *module)
{
    bool inside = !cfg->n_inside;
    for (size_t i = 0; !inside && i < cfg->n_inside; i++)
        inside = text_ends_with(module, cfg->inside[i]);
    return inside;
}

int quant_matcher_find(struct quant_matcher *m, const char *module, struct quant_scheme *scheme)
{
    size_t group;
    if (!is_inside(m->cfg, module))
        return 0;
    int rc = find(m, &m->ignore, module, &group);
    if (rc)
        return rc < 0 ? rc : 0;
    rc = find(m, &m->targets, module, &group);
    if (rc > 0)
        *scheme = m->cfg->groups[group].scheme;
    return rc;
}

int quant_config_match(const struct quant_config *cfg, const char *module, struct quant_scheme *scheme)
{
    struct quant_matcher *m;
    int rc = quant_matcher_open(&m, cfg);
    if (!rc)
        rc = quant_matcher_find(m, module, scheme);
    quant_matcher_close(m);
    return rc;
}

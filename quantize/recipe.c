#include "quantize/recipe.h"

#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"

#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    int bits;
    bool symmetric;
} schemes[] = {
    {"w4a16", 4, true},
    {"w4a16-asym", 4, false},
    {"w8a16", 8, true},
};

static const struct {
    const char *name;
    int64_t columns;
} groups[] = {
    {"32", 32}, {"64", 64}, {"128", 128}, {"256", 256}, {"channel", 0},
};

static const char *const scale_rules[] = {[SCALE_RANGE] = "range",
                                          [SCALE_ABSMAX] = "absmax",
                                          [SCALE_MSE] = "mse",
                                          [SCALE_WEIGHTED] = "weighted",
                                          [SCALE_BLOCK] = "block"};
static const char *const ragged_rules[] = {
    [RAGGED_SMALLER] = "smaller", [RAGGED_KEEP] = "keep", [RAGGED_ERROR] = "error", [RAGGED_AUTO] = "auto"};

#define N_OF(array) (sizeof(array) / sizeof *(array))

int recipe_parse_scheme(const char *name, struct quant_scheme *out)
{
    for (size_t i = 0; i < N_OF(schemes); i++)
        if (!strcmp(schemes[i].name, name)) {
            out->bits = schemes[i].bits;
            out->symmetric = schemes[i].symmetric;
            return 0;
        }
    return err_set(ERR_USAGE, "unknown scheme '%s', expected w4a16, w4a16-asym or w8a16", name);
}

const char *recipe_scheme_name(struct quant_scheme s)
{
    for (size_t i = 0; i < N_OF(schemes); i++)
        if (schemes[i].bits == s.bits && schemes[i].symmetric == s.symmetric)
            return schemes[i].name;
    return "unknown";
}

int recipe_parse_group(const char *text, int64_t *group)
{
    for (size_t i = 0; i < N_OF(groups); i++)
        if (!strcmp(groups[i].name, text)) {
            *group = groups[i].columns;
            return 0;
        }
    return err_set(ERR_USAGE, "unknown group size '%s', expected 32, 64, 128, 256 or channel", text);
}

int recipe_parse_scales(const char *name, enum scale_rule *out)
{
    for (size_t i = 0; i < N_OF(scale_rules); i++)
        if (!strcmp(scale_rules[i], name)) {
            *out = (enum scale_rule)i;
            return 0;
        }
    return err_set(ERR_USAGE, "unknown scale rule '%s', expected range, absmax, mse, weighted or block",
                   name);
}

const char *recipe_scales_name(enum scale_rule rule)
{
    return scale_rules[rule];
}

struct gptq_options recipe_gptq(const struct recipe *r)
{
    return (struct gptq_options){
        .sweep = r->sweep,
        .natural_order = r->natural_order,
        .damping = r->damping,
        .passes = r->passes,
        .search = {.block = r->scales.rule == SCALE_BLOCK, .positive_only = r->scales.positive_only},
        .scales = r->scales.rule};
}

int recipe_parse_override(const char *text, struct quant_scheme base, struct recipe_override *out)
{
    const char *equals = strrchr(text, '=');
    if (!equals || equals == text || !equals[1])
        return err_set(ERR_USAGE, "override '%s' is not GLOB=scheme,group", text);
    *out = (struct recipe_override){.scheme = base};
    char *value = mem_strdup(equals + 1);
    if (!value)
        return ERR_MEMORY;
    char *comma = strchr(value, ',');
    if (comma)
        *comma = '\0';
    int rc = *value ? recipe_parse_scheme(value, &out->scheme) : 0;
    if (!rc && comma)
        rc = recipe_parse_group(comma + 1, &out->scheme.group);
    free(value);
    if (rc < 0)
        return err_context(rc, "override '%s'", text);
    out->glob = mem_strndup(text, (size_t)(equals - text));
    return out->glob ? 0 : ERR_MEMORY;
}

/* --- resolving ------------------------------------------------------------------------------------------------ */

/* A glob speaks of the tensor's name, or of the module's (without ".weight"). */
static bool glob_matches(const char *glob, const char *tensor_name)
{
    if (!fnmatch(glob, tensor_name, 0))
        return true;
    char module[512];
    snprintf(module, sizeof module, "%.*s", (int)(strlen(tensor_name) - strlen(".weight")), tensor_name);
    return !fnmatch(glob, module, 0);
}

/* How a pattern was used, over all sets: so that a typo does not pass unnoticed, nor that a set is wider than
 * the pattern. */
struct usage {
    size_t sets, partial; /* sets that it matched; that it matched in part */
    const char *example;  /* a linear of the first of the latter */
};

/* Whether a glob matches any of the n linears of one fused set. */
static bool set_matches(const struct linear_plan *set, size_t n, const char *glob, struct usage *used)
{
    size_t matches = 0;
    for (size_t i = 0; i < n; i++)
        matches += glob_matches(glob, set[i].tensor->name);
    used->sets += matches > 0;
    if (matches && matches < n && !used->partial++)
        used->example = set[0].tensor->name;
    return matches > 0;
}

static int check_used(const char *option, const char *glob, const struct usage *used)
{
    if (!used->sets)
        return err_set(ERR_USAGE, "%s '%s' matches no linear of this model", option, glob);
    if (used->partial)
        log_warn(
            "%s '%s' names only a part of what readers run as one matrix in %zu places (first: with %s); it is "
            "applied to the whole there",
            option, glob, used->partial, used->example);
    return 0;
}

struct usages {
    struct usage *ignore, *only, *overrides;
};

static void apply_patterns(struct linear_plan *set, size_t n, const struct recipe *r, struct usages *used)
{
    bool keep = r->n_only > 0;
    struct quant_scheme scheme = r->scheme;
    const char *why = keep ? "not in --only" : NULL;
    for (size_t i = 0; i < r->n_only; i++)
        if (set_matches(set, n, r->only[i], &used->only[i])) {
            keep = false;
            why = NULL;
        }
    for (size_t i = 0; i < r->n_overrides; i++)
        if (set_matches(set, n, r->overrides[i].glob, &used->overrides[i])) {
            scheme = r->overrides[i].scheme;
            why = keep ? why : "override";
        }
    for (size_t i = 0; i < r->n_ignore; i++)
        if (set_matches(set, n, r->ignore[i], &used->ignore[i])) {
            keep = true;
            why = "ignored";
        }
    for (size_t i = 0; i < n; i++) {
        set[i].quantized = !keep;
        set[i].scheme = scheme;
        set[i].why = why;
    }
}

static bool divides_all(int64_t group, const struct linear_plan *set, size_t n)
{
    bool all = true;
    for (size_t i = 0; i < n; i++)
        all = all && set[i].tensor->shape[1] % group == 0;
    return all;
}

/* Whether a set whose width the group does not divide gets a smaller one. */
static bool shrinks(const struct linear_plan *set, size_t n, enum ragged_rule rule)
{
    enum { KERNEL_COLUMNS = 128 };
    return rule == RAGGED_SMALLER ||
           (rule == RAGGED_AUTO && (set->tensor->expert >= 0 || divides_all(KERNEL_COLUMNS, set, n)));
}

/* Members of a dense set have the same width; experts have two, and one group for both. */
static int apply_ragged(struct linear_plan *set, size_t n, enum ragged_rule rule)
{
    const int64_t group = set[0].scheme.group;
    if (!set[0].quantized || group == 0 || divides_all(group, set, n))
        return 0;
    for (size_t i = 0; rule == RAGGED_ERROR && i < n; i++)
        if (set[i].tensor->shape[1] % group)
            return err_set(ERR_UNSUPPORTED,
                           "tensor '%s' has %lld columns, which groups of %lld do not divide "
                           "(--ragged auto, smaller or keep)",
                           set[i].tensor->name, (long long)set[i].tensor->shape[1], (long long)group);
    int64_t smaller = 0;
    for (size_t g = 0; shrinks(set, n, rule) && g < N_OF(groups); g++)
        if (groups[g].columns && groups[g].columns < group && divides_all(groups[g].columns, set, n))
            smaller = groups[g].columns;
    for (size_t i = 0; i < n; i++) {
        set[i].quantized = smaller > 0;
        set[i].scheme.group = smaller;
        set[i].why = "ragged";
    }
    return 0;
}

static void report_ragged(const struct recipe_plan *plan, const struct recipe *r)
{
    size_t smaller = 0, kept = 0;
    const char *example = NULL;
    for (size_t i = 0; i < plan->n; i++) {
        const struct linear_plan *l = &plan->linears[i];
        if (!l->why || strcmp(l->why, "ragged"))
            continue;
        smaller += l->quantized;
        kept += !l->quantized;
        example = example ? example : l->tensor->name;
    }
    if (smaller + kept)
        log_warn(
            "the group size does not divide the width of %zu linears (first: %s): %zu get a smaller group, %zu "
            "stay in 16 bits",
            smaller + kept, example, smaller, kept);
    if (r->scheme.group == 256)
        log_warn("groups of 256 have no fast kernel in vLLM");
}

/* What is decided alike: a fused set, or all experts of a layer, which readers run as one. */
enum { SET_EXPERTS = N_FUSED, N_SETS };
static int set_kind(const struct gemma_tensor *t)
{
    return t->expert >= 0 ? (int)SET_EXPERTS : (int)gemma_fused_set(t->role);
}

/* Orders the linears so that the members of a set stand together: by layer, set, then model order, in which experts' are by
 * fused sets. */
static int by_set(const void *a, const void *b)
{
    const struct linear_plan *x = a, *y = b;
    if (x->tensor->layer != y->tensor->layer)
        return x->tensor->layer < y->tensor->layer ? -1 : 1;
    const int fx = set_kind(x->tensor), fy = set_kind(y->tensor);
    if (fx != fy)
        return fx < fy ? -1 : 1;
    return x->tensor < y->tensor ? -1 : 1;
}

static bool same_set(const struct linear_plan *a, const struct linear_plan *b)
{
    return a->tensor->layer == b->tensor->layer && set_kind(a->tensor) == set_kind(b->tensor);
}

static int resolve_sets(struct recipe_plan *plan, const struct recipe *r, struct usages *used)
{
    int rc = 0;
    bool any = false;
    for (size_t i = 0, end; !rc && i < plan->n; i = end) {
        for (end = i + 1; end < plan->n && same_set(&plan->linears[i], &plan->linears[end]); end++)
            ;
        apply_patterns(&plan->linears[i], end - i, r, used);
        rc = apply_ragged(&plan->linears[i], end - i, r->ragged);
        any |= plan->linears[i].quantized;
    }
    for (size_t i = 0; !rc && i < r->n_ignore; i++)
        rc = check_used("--ignore", r->ignore[i], &used->ignore[i]);
    for (size_t i = 0; !rc && i < r->n_only; i++)
        rc = check_used("--only", r->only[i], &used->only[i]);
    for (size_t i = 0; !rc && i < r->n_overrides; i++)
        rc = check_used("--override", r->overrides[i].glob, &used->overrides[i]);
    for (size_t i = 0; !rc && i < plan->n; i++)
        if (plan->linears[i].quantized)
            rc = quant_format_check(r->format, plan->linears[i].scheme, plan->linears[i].tensor->name,
                                    plan->linears[i].tensor->shape);
    if (!rc && !any)
        rc = err_set(ERR_USAGE, "this recipe quantizes nothing: every linear is ignored, excluded or ragged");
    return rc;
}

int recipe_resolve(struct recipe_plan *plan, const struct recipe *r, const struct gemma_tensors *tensors)
{
    *plan = (struct recipe_plan){.linears = mem_alloc(tensors->n, sizeof *plan->linears, "the plan")};
    struct usages used = {mem_alloc(r->n_ignore, sizeof(struct usage), "the plan"),
                          mem_alloc(r->n_only, sizeof(struct usage), "the plan"),
                          mem_alloc(r->n_overrides, sizeof(struct usage), "the plan")};
    int rc = plan->linears && used.ignore && used.only && used.overrides ? 0 : ERR_MEMORY;
    for (size_t i = 0; !rc && i < tensors->n; i++)
        if (gemma_is_linear(tensors->list[i].role))
            plan->linears[plan->n++].tensor = &tensors->list[i];
    if (!rc) {
        qsort(plan->linears, plan->n, sizeof *plan->linears, by_set);
        rc = resolve_sets(plan, r, &used);
    }
    if (!rc)
        report_ragged(plan, r);
    else
        recipe_plan_free(plan);
    free(used.ignore);
    free(used.only);
    free(used.overrides);
    return rc;
}

void recipe_plan_free(struct recipe_plan *plan)
{
    free(plan->linears);
    *plan = (struct recipe_plan){0};
}

/* --- describing ----------------------------------------------------------------------------------------------- */

/* The projections of a set as an expression that also matches the name under which vLLM fuses them. */
static const char *const set_patterns[N_SETS] = {
    [FUSED_QKV] = "self_attn\\.(q|k|v|qkv)_proj$",     [FUSED_O] = "self_attn\\.o_proj$",
    [FUSED_GATE_UP] = "mlp\\.(gate|up|gate_up)_proj$", [FUSED_DOWN] = "mlp\\.down_proj$",
    [SET_EXPERTS] = "(.*\\.)?experts\\..*_proj$", /* vLLM has a module between */
};

/* What a set of linears shares in the description: kept in 16 bits, or a scheme. */
static bool described_alike(const struct linear_plan *a, const struct linear_plan *b)
{
    if (!a->quantized || !b->quantized)
        return a->quantized == b->quantized;
    return a->scheme.bits == b->scheme.bits && a->scheme.symmetric == b->scheme.symmetric &&
           a->scheme.group == b->scheme.group;
}

/* One expression for each fused set of the plan that is described like `like`; the layers are listed unless all
 * of them are. */
static int add_patterns(char ***list, size_t *n, const struct recipe_plan *plan,
                        const struct linear_plan *like)
{
    int rc = 0;
    for (int set = 0; !rc && set < N_SETS; set++) {
        struct text layers = {0}, pattern = {0};
        size_t matching = 0, others = 0;
        int last_layer = -1;
        for (size_t i = 0; i < plan->n; i++) {
            const struct linear_plan *l = &plan->linears[i];
            if (set_kind(l->tensor) != set || l->tensor->layer == last_layer)
                continue;
            last_layer = l->tensor->layer;
            if (described_alike(l, like))
                text_printf(&layers, "%s%d", matching++ ? "|" : "", last_layer);
            else
                others++;
        }
        if (others)
            text_printf(&pattern, "re:.*layers\\.(%s)\\.%s", layers.data ? layers.data : "",
                        set_patterns[set]);
        else
            text_printf(&pattern, "re:.*layers\\.[0-9]+\\.%s", set_patterns[set]);
        if (matching)
            rc = text_finish(&pattern);
        if (matching && !rc)
            rc = quant_config_add(list, n, pattern.data);
        text_free(&layers);
        text_free(&pattern);
    }
    return rc;
}

static bool begins_set(const struct recipe_plan *plan, size_t i)
{
    return i == 0 || !same_set(&plan->linears[i - 1], &plan->linears[i]);
}

/* The scheme of most sets is described by the class name "Linear"; others by expressions, which readers try first. */
static const struct linear_plan *most_common(const struct recipe_plan *plan)
{
    const struct linear_plan *best = NULL;
    size_t best_count = 0;
    for (size_t i = 0; i < plan->n; i++) {
        if (!plan->linears[i].quantized || !begins_set(plan, i))
            continue;
        size_t count = 0;
        for (size_t k = 0; k < plan->n; k++)
            count += begins_set(plan, k) && described_alike(&plan->linears[i], &plan->linears[k]);
        if (count > best_count) {
            best = &plan->linears[i];
            best_count = count;
        }
    }
    return best;
}

/* A linear's name as AutoRound lists it: as it is in memory of transformers, which the last prefix of a family stands
 * for, and which vLLM maps to its own. */
static char *listed_name(const struct gemma_tensor *t, const struct gemma_config *cfg)
{
    char *module = gemma_module(t), *name = NULL;
    const char *prefix = cfg->family->prefixes[0];
    for (int i = 0; i < GEMMA_MAX_PREFIXES && cfg->family->prefixes[i]; i++)
        prefix = cfg->family->prefixes[i];
    if (module)
        name = mem_printf("%s%s", prefix, quant_inner_name(module));
    free(module);
    return name;
}

/* Every linear of the plan that is described like `like`, by name. */
static int add_names(char ***list, size_t *n, const struct recipe_plan *plan, const struct linear_plan *like,
                     const struct gemma_config *cfg)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < plan->n; i++) {
        if (!described_alike(&plan->linears[i], like))
            continue;
        const struct gemma_tensor *t = plan->linears[i].tensor;
        char *name = listed_name(t, cfg);
        rc = name ? quant_config_add(list, n, name) : ERR_MEMORY;
        /* vLLM makes a v projection of a k projection that stands for both, and looks for its name */
        if (!rc && t->role == GEMMA_K && cfg->layers[t->layer].k_is_v) {
            strstr(name, ".k_proj")[1] = 'v';
            rc = quant_config_add(list, n, name);
        }
        free(name);
    }
    return rc;
}

static int add_alike(struct quant_config *q, char ***list, size_t *n, const struct recipe_plan *plan,
                     const struct linear_plan *like, const struct gemma_config *cfg)
{
    return q->format == QUANT_AUTO_ROUND ? add_names(list, n, plan, like, cfg)
                                         : add_patterns(list, n, plan, like);
}

/* The parent of the decoder blocks: what stands before the first linear's layer number. */
static int name_block(struct quant_config *q, const struct recipe_plan *plan, const struct gemma_config *cfg)
{
    static const char last[] = "layers";
    char *name = listed_name(plan->linears[0].tensor, cfg), *end = name ? strstr(name, last) : NULL;
    if (end)
        q->block = mem_strndup(name, (size_t)(end - name) + strlen(last));
    free(name);
    return q->block ? 0 : ERR_MEMORY;
}

/* Linears inside the blocks that are never quantized: those of the layers' own inputs, and routers. */
static int name_kept(struct quant_config *q, const struct gemma_config *cfg)
{
    const struct {
        const char *name;
        bool is_there;
    } linears[] = {{"per_layer_input_gate", cfg->ple_size > 0},
                   {"per_layer_projection", cfg->ple_size > 0},
                   {"router.proj", cfg->n_experts > 0}};
    int rc = 0;
    for (size_t i = 0; !rc && i < N_OF(linears) * (size_t)cfg->n_layers; i++) {
        if (!linears[i % N_OF(linears)].is_there)
            continue;
        char *name = mem_printf("%s.%zu.%s", q->block, i / N_OF(linears), linears[i % N_OF(linears)].name);
        rc = name ? quant_config_add(&q->ignore, &q->n_ignore, name) : ERR_MEMORY;
        free(name);
    }
    return rc;
}

bool recipe_act_order(const struct recipe *r)
{
    return r->sweep && !r->natural_order;
}

int recipe_quant_config(struct quant_config *out, const struct recipe_plan *plan, enum quant_format format,
                        bool act_order, const struct gemma_config *cfg)
{
    const bool by_rows = format == QUANT_COMPRESSED_TENSORS;
    *out = (struct quant_config){.format = format,
                                 .layout = by_rows ? QUANT_BY_ROWS : QUANT_TRANSPOSED,
                                 .zero_bias = !by_rows,
                                 .act_order = act_order};
    const struct linear_plan *common = most_common(plan);
    struct quant_group *group;
    int rc = quant_config_add_group(out, common->scheme, &group);
    if (!rc)
        rc = quant_config_add(&group->targets, &group->n_targets, "Linear");
    for (size_t i = 0; !rc && i < plan->n; i++) {
        const struct linear_plan *l = &plan->linears[i];
        bool seen = !l->quantized || described_alike(l, common);
        for (size_t k = 0; !seen && k < i; k++)
            seen = described_alike(l, &plan->linears[k]);
        if (seen)
            continue;
        rc = quant_config_add_group(out, l->scheme, &group);
        if (!rc)
            rc = add_alike(out, &group->targets, &group->n_targets, plan, l, cfg);
    }
    /* AutoRound's block keeps other parts unquantized */
    if (!rc && format == QUANT_AUTO_ROUND)
        rc = name_block(out, plan, cfg);
    if (!rc && format == QUANT_AUTO_ROUND)
        rc = name_kept(out, cfg);
    for (int i = 0; !rc && !out->block && i < GEMMA_MAX_IGNORES && cfg->family->ignores[i]; i++)
        rc = quant_config_add(&out->ignore, &out->n_ignore, cfg->family->ignores[i]);
    if (!rc && !out->block && cfg->n_experts) /* a Linear to readers, like those of the blocks */
        rc = quant_config_add(&out->ignore, &out->n_ignore, "re:.*router.*");
    for (size_t i = 0; !rc && i < plan->n; i++)
        if (!plan->linears[i].quantized) {
            rc = add_alike(out, &out->ignore, &out->n_ignore, plan, &plan->linears[i], cfg);
            break;
        }
    if (rc < 0)
        quant_config_free(out);
    return rc;
}

static void write_globs(struct text *out, const char *key, const char *const *globs, size_t n)
{
    json_put_key(out, key);
    json_begin_array(out);
    for (size_t i = 0; i < n; i++)
        json_put_string(out, globs[i]);
    json_end_array(out);
}

static void write_scheme(struct text *out, struct quant_scheme s)
{
    json_kv_string(out, "scheme", recipe_scheme_name(s));
    json_put_key(out, "group_size");
    if (s.group)
        json_put_int(out, s.group);
    else
        json_put_string(out, "channel");
}

static void write_tuning(const struct recipe *r, struct text *out)
{
    const struct tune_options *t = &r->tune;
    json_put_key(out, "tuning");
    json_begin_object(out);
    json_kv_int(out, "iterations", t->iterations);
    json_kv_int(out, "batch", t->batch);
    json_kv_double(out, "lr", t->lr);
    json_kv_double(out, "scale_lr", t->range_lr);
    json_kv_string(out, "init", t->init == TUNE_FROM_NONE ? "none" : r->sweep ? "gptq" : "rtn");
    json_kv_string(out, "keep", t->keep == TUNE_KEEP_BEST ? "best" : "last");
    json_kv_uint(out, "seed", t->seed);
    json_end_object(out);
}

void recipe_write(const struct recipe *r, struct text *out)
{
    json_begin_object(out);
    json_kv_string(out, "method", r->method);
    json_kv_string(out, "format", quant_format_names[r->format]);
    write_scheme(out, r->scheme);
    json_kv_string(out, "scales", scale_rules[r->scales.rule]);
    json_kv_string(out, "scale_sign", r->scales.positive_only ? "positive" : "any");
    json_kv_string(out, "ragged", ragged_rules[r->ragged]);
    write_globs(out, "ignore", r->ignore, r->n_ignore);
    write_globs(out, "only", r->only, r->n_only);
    json_put_key(out, "override");
    json_begin_array(out);
    for (size_t i = 0; i < r->n_overrides; i++) {
        json_begin_object(out);
        json_kv_string(out, "glob", r->overrides[i].glob);
        write_scheme(out, r->overrides[i].scheme);
        json_end_object(out);
    }
    json_end_array(out);
    json_kv_bool(out, "allow_nonfinite", r->allow_nonfinite);
    if (r->calibrated) {
        json_kv_string(out, "order_columns", r->natural_order ? "natural" : "activation");
        json_kv_double(out, "damping", r->damping);
        json_kv_int(out, "refine", r->passes);
    }
    if (r->tune.iterations)
        write_tuning(r, out);
    json_end_object(out);
}

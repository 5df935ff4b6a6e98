/* Sources: intel/auto-round, export/export_to_autoround and inference/convert_model.py (extra_config);
 * ModelCloud/GPTQModel, quantization/config.py; vllm-project/vllm, layers/quantization/{auto_round,gptq_marlin}.py for
 * what readers make of them. */
#include "formats/quant_gptq.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* The release of AutoRound whose layout this is. */
static const char autoround_version[] = "0.16.1";

static const char packing_prefix[] = "auto_round:";

/* vLLM has no kernel for zero points in this packing that computes in BF16, and readers differ in what they take a zero
 * point of 0, stored as 0 − 1, for; AutoRound's own tests leave such files out, as not loading correctly. Widths: readers
 * divide rows and columns by 32. */
int quant_format_check(enum quant_format format, struct quant_scheme s, const char *name,
                       const int64_t shape[2])
{
    const char *title = quant_format_names[format];
    if (s.group && shape[1] % s.group)
        return err_set(
            ERR_UNSUPPORTED,
            "tensor '%s' has %lld columns, which groups of %lld do not divide: readers of %s refuse it", name,
            (long long)shape[1], (long long)s.group, title);
    if (format == QUANT_COMPRESSED_TENSORS)
        return 0;
    if (!s.symmetric)
        return err_set(
            ERR_USAGE,
            "tensor '%s' is to have zero points, which readers of %s get wrong or cannot compute in BF16: "
            "take compressed-tensors, or a symmetric scheme",
            name, title);
    if (shape[0] % 32 || shape[1] % 32)
        return err_set(
            ERR_UNSUPPORTED,
            "tensor '%s' is %lld × %lld; readers of %s need multiples of 32 (--ignore keeps it in 16 bits)",
            name, (long long)shape[0], (long long)shape[1], title);
    return 0;
}

/* --- writing ---------------------------------------------------------------------------------------------------- */

static void put_scheme(struct quant_scheme s, struct text *out)
{
    json_kv_int(out, "bits", s.bits);
    json_kv_int(out, "group_size", s.group ? s.group : -1);
    json_kv_bool(out, "sym", s.symmetric);
}

/* A pattern as it stands in a key: expressions are told from names by what they contain. */
static const char *bare(const char *pattern)
{
    return strncmp(pattern, "re:", 3) ? pattern : pattern + 3;
}

static void put_extra_config(const struct quant_config *cfg, struct text *out)
{
    if (cfg->n_groups < 2 && !cfg->n_ignore)
        return;
    json_put_key(out, "extra_config");
    json_begin_object(out);
    for (size_t g = 1; g < cfg->n_groups; g++)
        for (size_t i = 0; i < cfg->groups[g].n_targets; i++) {
            json_put_key(out, bare(cfg->groups[g].targets[i]));
            json_begin_object(out);
            put_scheme(cfg->groups[g].scheme, out);
            json_kv_string(out, "data_type", "int");
            json_end_object(out);
        }
    for (size_t i = 0; i < cfg->n_ignore; i++) {
        json_put_key(out, bare(cfg->ignore[i]));
        json_begin_object(out);
        json_kv_int(out, "bits", 16);
        json_kv_string(out, "data_type", "float");
        json_end_object(out);
    }
    json_end_object(out);
}

static void write_auto_round(const struct quant_config *cfg, struct text *out)
{
    json_begin_object(out);
    put_scheme(cfg->groups[0].scheme, out);
    json_kv_string(out, "data_type", "int");
    json_kv_string(out, "autoround_version", autoround_version);
    if (cfg->block)
        json_kv_string(out, "block_name_to_quantize", cfg->block);
    json_kv_string(out, "quant_method", "auto-round");
    json_kv_string(out, "packing_format",
                   cfg->layout == QUANT_AWQ ? "auto_round:auto_awq"
                   : cfg->zero_bias         ? "auto_round:auto_gptq"
                                            : "auto_round:gptqmodel");
    put_extra_config(cfg, out);
    json_end_object(out);
}

static void begin_rule(char sign, const char *pattern, struct text *out)
{
    char *key = mem_printf("%c:%s", sign, pattern + 3);
    if (key)
        json_put_key(out, key);
    out->failed |= !key;
    free(key);
    json_begin_object(out);
}

static bool is_regex(const char *pattern)
{
    return !strncmp(pattern, "re:", 3);
}

/* Rules are tried in their order and the first that matches counts; ours do not overlap. */
static void put_dynamic(const struct quant_config *cfg, struct text *out)
{
    json_put_key(out, "dynamic");
    json_begin_object(out);
    for (size_t i = 0; i < cfg->n_ignore; i++)
        if (is_regex(cfg->ignore[i])) {
            begin_rule('-', cfg->ignore[i], out);
            json_end_object(out);
        }
    for (size_t g = 1; g < cfg->n_groups; g++)
        for (size_t i = 0; i < cfg->groups[g].n_targets; i++)
            if (is_regex(cfg->groups[g].targets[i])) {
                begin_rule('+', cfg->groups[g].targets[i], out);
                put_scheme(cfg->groups[g].scheme, out);
                json_end_object(out);
            }
    json_end_object(out);
}

static void write_gptq(const struct quant_config *cfg, struct text *out)
{
    json_begin_object(out);
    put_scheme(cfg->groups[0].scheme, out);
    json_kv_bool(out, "desc_act", false);
    json_kv_bool(out, "lm_head", false);
    json_kv_string(out, "quant_method", "gptq");
    json_kv_string(out, "checkpoint_format", cfg->zero_bias ? "gptq" : "gptq_v2");
    json_kv_string(out, "pack_dtype", "int32");
    if (cfg->n_inside) {
        json_put_key(out, "modules_in_block_to_quantize");
        json_begin_array(out);
        for (size_t i = 0; i < cfg->n_inside; i++)
            json_put_string(out, cfg->inside[i]);
        json_end_array(out);
    }
    put_dynamic(cfg, out);
    json_end_object(out);
}

void quant_gptq_write(const struct quant_config *cfg, struct text *out)
{
    if (cfg->format == QUANT_AUTO_ROUND)
        write_auto_round(cfg, out);
    else
        write_gptq(cfg, out);
}

/* --- reading ---------------------------------------------------------------------------------------------------- */

/* bits, group_size and sym of an object; what is missing is as in *s. 1, and *s is untouched, for 16 bits. */
static int read_scheme(struct json o, struct quant_scheme *s)
{
    int64_t bits = s->bits, group = s->group ? s->group : -1;
    bool symmetric = s->symmetric;
    const char *type;
    int rc = json_opt_int(o, "bits", 1, 32, bits, &bits);
    if (!rc && bits >= 16)
        return 1;
    if (!rc)
        rc = json_opt_int(o, "group_size", -1, INT32_MAX, group, &group);
    if (!rc)
        rc = json_opt_bool(o, "sym", symmetric, &symmetric);
    if (!rc)
        rc = json_opt_string(o, "data_type", "int", &type);
    if (rc < 0)
        return rc;
    if (strcmp(type, "int") || (bits != 4 && bits != 8))
        return json_error(o, "is %s%d, expected int4 or int8", type, (int)bits);
    if (group == 0)
        return json_error(o, "has group_size 0, expected -1 or at least 1");
    *s = (struct quant_scheme){(int)bits, symmetric, group < 0 ? 0 : group};
    return 0;
}

/* The scheme of all linears. */
static int read_base(struct quant_config *out, struct json q)
{
    struct quant_scheme s = {0, true, 0};
    struct quant_group *group = NULL;
    int64_t ignored;
    int rc = json_get_int(q, "bits", 1, 32, &ignored);
    if (!rc)
        rc = json_get_int(q, "group_size", -1, INT32_MAX, &ignored);
    if (!rc)
        rc = read_scheme(q, &s);
    if (rc > 0)
        rc = json_error(json_member(q, "bits"), "is 16 or more, expected 4 or 8");
    if (!rc)
        rc = quant_config_add_group(out, s, &group);
    return rc ? rc : quant_config_add(&group->targets, &group->n_targets, "Linear");
}

/* One exception: `pattern` gets what the object says. */
static int add_exception(struct quant_config *out, struct json o, const char *pattern)
{
    struct quant_scheme s = out->groups[0].scheme;
    struct quant_group *group = NULL;
    int rc = json_is_object(o) ? read_scheme(o, &s) : json_error(o, "is not an object");
    if (rc > 0)
        return quant_config_add(&out->ignore, &out->n_ignore, pattern);
    if (!rc)
        rc = quant_config_add_group(out, s, &group);
    return rc ? rc : quant_config_add(&group->targets, &group->n_targets, pattern);
}

/* A key of extra_config is a module's name, or an expression that is searched for in names. */
static int read_extra(struct quant_config *out, struct json e)
{
    const char *key = json_key(e);
    const bool expression = strpbrk(key, "*+?^$[](){}|\\") != NULL;
    const bool anchored = *key == '^' || !strncmp(key, ".*", 2);
    char *pattern = mem_printf("%s%s%s", expression ? "re:" : "", expression && !anchored ? ".*" : "", key);
    const int rc = pattern ? add_exception(out, e, pattern) : ERR_MEMORY;
    free(pattern);
    return rc;
}

static bool names_the_blocks(const char *name, size_t n)
{
    static const char last[] = "layers";
    const char *inner = quant_inner_name(name);
    return (size_t)(inner - name) + strlen(last) == n && !strncmp(inner, last, strlen(last));
}

/* One name, several with commas between, or a list: the language model's blocks must be among them. */
static int read_block(struct quant_config *out, struct json block)
{
    if (!json_exists(block))
        return 0;
    struct json each = json_is_array(block) ? json_first(block) : block;
    for (; !out->block && each.node; each = json_is_array(block) ? json_next(each) : (struct json){0}) {
        const char *name;
        if (json_as_string(each, &name) < 0)
            return ERR_FORMAT;
        for (size_t n; !out->block && *name; name += n + (name[n] == ',')) {
            n = strcspn(name, ",");
            if (names_the_blocks(name, n) && !(out->block = mem_strndup(name, n)))
                return ERR_MEMORY;
        }
    }
    return out->block ? 0 : json_error(block, "does not name the decoder blocks, expected model.layers");
}

static int read_packing(struct quant_config *out, struct json q)
{
    const char *packing;
    int rc = json_opt_string(q, "packing_format", "auto_round:auto_gptq", &packing);
    if (rc < 0)
        return rc;
    const char *layout = packing;
    if (!strncmp(packing, packing_prefix, strlen(packing_prefix)))
        layout += strlen(packing_prefix);
    out->layout = strcmp(layout, "auto_awq") ? QUANT_TRANSPOSED : QUANT_AWQ;
    out->zero_bias = !strcmp(layout, "auto_gptq");
    if (out->layout == QUANT_AWQ || out->zero_bias || !strcmp(layout, "gptqmodel"))
        return 0;
    return json_error(json_member(q, "packing_format"),
                      "is '%s', expected auto_round:auto_gptq, auto_round:auto_awq or auto_round:gptqmodel",
                      packing);
}

int quant_auto_round_read(struct quant_config *out, struct json q)
{
    out->format = QUANT_AUTO_ROUND;
    int64_t act_bits;
    int rc = read_packing(out, q);
    if (!rc)
        rc = json_opt_int(q, "act_bits", 1, 64, 16, &act_bits);
    if (!rc && act_bits < 16)
        return json_error(json_member(q, "act_bits"),
                          "is %d: activations are quantized, expected weights only", (int)act_bits);
    if (!rc)
        rc = read_base(out, q);
    if (!rc)
        rc = read_block(out, json_member(q, "block_name_to_quantize"));
    const struct json extra = json_member(q, "extra_config");
    if (!rc && json_exists(extra) && !json_is_object(extra))
        return json_error(extra, "is not an object");
    for (struct json e = rc ? (struct json){0} : json_first(extra); !rc && e.node; e = json_next(e))
        rc = read_extra(out, e);
    for (size_t g = 0; !rc && out->layout == QUANT_AWQ && g < out->n_groups; g++)
        if (out->groups[g].scheme.bits != 4)
            return json_error(q, "has 8 bits in AWQ's packing, expected 4");
    return rc;
}

static int read_dynamic(struct quant_config *out, struct json rules)
{
    if (!json_exists(rules) || json_is_bool(rules)) /* false: none */
        return 0;
    if (!json_is_object(rules))
        return json_error(rules, "is not an object");
    int rc = 0;
    for (struct json e = json_first(rules); !rc && e.node; e = json_next(e)) {
        const char *key = json_key(e);
        const bool skip = !strncmp(key, "-:", 2);
        char *pattern = mem_printf("re:%s", skip || !strncmp(key, "+:", 2) ? key + 2 : key);
        rc = !pattern ? ERR_MEMORY
             : skip   ? quant_config_add(&out->ignore, &out->n_ignore, pattern)
                      : add_exception(out, e, pattern);
        free(pattern);
    }
    return rc;
}

/* Names, or lists of names: GPTQ quantizes a block's linears in several steps. */
static int read_inside(struct quant_config *out, struct json list)
{
    if (!json_exists(list))
        return 0;
    if (!json_is_array(list))
        return json_error(list, "is not a list");
    int rc = 0;
    for (struct json e = json_first(list); !rc && e.node; e = json_next(e)) {
        const char *name;
        if (json_is_array(e))
            rc = read_inside(out, e);
        else if (!(rc = json_as_string(e, &name)))
            rc = quant_config_add(&out->inside, &out->n_inside, name);
    }
    return rc;
}

int quant_gptq_read(struct quant_config *out, struct json q)
{
    out->format = QUANT_GPTQ;
    out->layout = QUANT_TRANSPOSED;
    const char *version, *words;
    int rc = json_opt_string(q, "format", "gptq", &version);
    if (!rc)
        rc = json_opt_string(q, "checkpoint_format", version, &version);
    if (!rc && strcmp(version, "gptq") && strcmp(version, "gptq_v2"))
        return json_error(q, "has checkpoint_format '%s', expected gptq or gptq_v2", version);
    if (!rc)
        rc = json_opt_string(q, "pack_dtype", "int32", &words);
    if (!rc && strcmp(words, "int32"))
        return json_error(json_member(q, "pack_dtype"), "is '%s', expected int32", words);
    if (rc < 0)
        return rc;
    out->zero_bias = !strcmp(version, "gptq");
    rc = read_base(out, q);
    if (!rc)
        rc = read_inside(out, json_member(q, "modules_in_block_to_quantize"));
    return rc ? rc : read_dynamic(out, json_member(q, "dynamic"));
}

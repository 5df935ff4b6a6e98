#include "formats/quant_config.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_gptq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const quant_format_names[N_QUANT_FORMATS] = {[QUANT_COMPRESSED_TENSORS] = "compressed-tensors",
                                                         [QUANT_AUTO_ROUND] = "auto-round",
                                                         [QUANT_GPTQ] = "gptq"};

const char *quant_config_title(const struct quant_config *cfg)
{
    if (cfg->format == QUANT_COMPRESSED_TENSORS)
        return "compressed-tensors pack-quantized";
    if (cfg->format == QUANT_GPTQ)
        return cfg->zero_bias ? "gptq" : "gptq_v2";
    if (cfg->layout == QUANT_AWQ)
        return "auto-round (auto_awq)";
    return cfg->zero_bias ? "auto-round (auto_gptq)" : "auto-round (gptqmodel)";
}

int quant_config_add(char ***list, size_t *n, const char *pattern)
{
    char **bigger = realloc(*list, (*n + 1) * sizeof *bigger);
    if (!bigger)
        return err_set(ERR_MEMORY, "out of memory for a list of patterns");
    *list = bigger;
    if (!(bigger[*n] = mem_strdup(pattern)))
        return ERR_MEMORY;
    ++*n;
    return 0;
}

int quant_config_add_group(struct quant_config *cfg, struct quant_scheme scheme, struct quant_group **group)
{
    struct quant_group *bigger = realloc(cfg->groups, (cfg->n_groups + 1) * sizeof *bigger);
    if (!bigger)
        return err_set(ERR_MEMORY, "out of memory for a quantization group");
    cfg->groups = bigger;
    *group = &bigger[cfg->n_groups++];
    **group = (struct quant_group){.scheme = scheme};
    return 0;
}

static void free_list(char **list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(list[i]);
    free(list);
}

void quant_config_free(struct quant_config *cfg)
{
    for (size_t g = 0; g < cfg->n_groups; g++)
        free_list(cfg->groups[g].targets, cfg->groups[g].n_targets);
    free(cfg->groups);
    free_list(cfg->ignore, cfg->n_ignore);
    free_list(cfg->inside, cfg->n_inside);
    free(cfg->block);
    *cfg = (struct quant_config){0};
}

/* --- writing -------------------------------------------------------------------------------------------------- */

static void write_list(struct text *out, const char *key, char *const *list, size_t n)
{
    json_put_key(out, key);
    json_begin_array(out);
    for (size_t i = 0; i < n; i++)
        json_put_string(out, list[i]);
    json_end_array(out);
}

static void write_group(const struct quant_config *cfg, size_t index, struct text *out)
{
    const struct quant_group *g = &cfg->groups[index];
    char key[32];
    snprintf(key, sizeof key, "group_%zu", index);
    json_put_key(out, key);
    json_begin_object(out);
    write_list(out, "targets", g->targets, g->n_targets);
    json_put_key(out, "weights");
    json_begin_object(out);
    json_kv_int(out, "num_bits", g->scheme.bits);
    json_kv_string(out, "type", "int");
    json_kv_bool(out, "symmetric", g->scheme.symmetric);
    json_kv_string(out, "strategy", g->scheme.group ? "group" : "channel");
    json_put_key(out, "group_size");
    if (g->scheme.group)
        json_put_int(out, g->scheme.group);
    else
        json_put_null(out);
    json_kv_bool(out, "dynamic", false);
    json_kv_string(out, "actorder", cfg->act_order ? "weight" : NULL);
    json_kv_string(out, "observer", "minmax");
    json_put_key(out, "observer_kwargs");
    json_begin_object(out);
    json_end_object(out);
    json_kv_string(out, "block_structure", NULL);
    json_end_object(out);
    json_kv_string(out, "input_activations", NULL);
    json_kv_string(out, "output_activations", NULL);
    json_end_object(out);
}

void quant_config_write(const struct quant_config *cfg, struct text *out)
{
    if (cfg->format != QUANT_COMPRESSED_TENSORS) {
        quant_gptq_write(cfg, out);
        return;
    }
    json_begin_object(out);
    json_put_key(out, "config_groups");
    json_begin_object(out);
    for (size_t g = 0; g < cfg->n_groups; g++)
        write_group(cfg, g, out);
    json_end_object(out);
    json_kv_string(out, "format", "pack-quantized");
    json_kv_string(out, "global_compression_ratio", NULL);
    write_list(out, "ignore", cfg->ignore, cfg->n_ignore);
    json_kv_string(out, "kv_cache_scheme", NULL);
    json_kv_string(out, "quant_method", "compressed-tensors");
    json_kv_string(out, "quantization_status", "compressed");
    json_end_object(out);
}

/* --- reading -------------------------------------------------------------------------------------------------- */

static int read_list(struct json obj, const char *key, char ***list, size_t *n)
{
    const struct json array = json_member(obj, key);
    if (!json_exists(array))
        return 0;
    if (!json_is_array(array))
        return json_error(array, "is not a list");
    int rc = 0;
    for (struct json e = json_first(array); !rc && e.node; e = json_next(e)) {
        const char *pattern;
        rc = json_as_string(e, &pattern);
        if (!rc)
            rc = quant_config_add(list, n, pattern);
    }
    return rc;
}

static int read_scheme(struct json group, struct quant_scheme *s, bool *act_order)
{
    struct json weights;
    int64_t bits;
    const char *type, *strategy, *actorder;
    int rc = json_get_object(group, "weights", &weights);
    if (!rc)
        rc = json_get_int(weights, "num_bits", 1, 16, &bits);
    if (!rc)
        rc = json_opt_string(weights, "type", "int", &type);
    if (!rc)
        rc = json_opt_bool(weights, "symmetric", true, &s->symmetric);
    if (!rc)
        rc = json_get_string(weights, "strategy", &strategy);
    if (!rc)
        rc = json_opt_int(weights, "group_size", -1, INT32_MAX, -1, &s->group);
    if (!rc && json_is_string(json_member(weights, "actorder"))) {
        rc = json_get_string(weights, "actorder", &actorder);
        *act_order = true;
    }
    if (rc < 0)
        return rc;
    if (strcmp(type, "int") || (bits != 4 && bits != 8))
        return json_error(weights, "is %s%d, expected int4 or int8", type, (int)bits);
    if (strcmp(strategy, "group") && strcmp(strategy, "channel"))
        return json_error(weights, "has strategy '%s', expected group or channel", strategy);
    if (json_exists(json_member(group, "input_activations")))
        return json_error(group, "quantizes activations, expected weights only");
    if (!strcmp(strategy, "channel"))
        s->group = 0;
    else if (s->group < 1)
        return json_error(weights, "has strategy 'group' without a group_size of at least 1");
    s->bits = (int)bits;
    return 0;
}

static int read_compressed_tensors(struct quant_config *out, struct json q)
{
    const char *format;
    struct json groups;
    int rc = json_get_string(q, "format", &format);
    if (!rc && strcmp(format, "pack-quantized"))
        return json_error(json_member(q, "format"), "is '%s', expected pack-quantized", format);
    if (!rc)
        rc = json_get_object(q, "config_groups", &groups);
    for (struct json g = rc ? (struct json){0} : json_first(groups); !rc && g.node; g = json_next(g)) {
        struct quant_group *group = NULL;
        struct quant_scheme scheme = {0};
        rc = json_is_object(g) ? read_scheme(g, &scheme, &out->act_order) : json_error(g, "is not an object");
        if (!rc)
            rc = quant_config_add_group(out, scheme, &group);
        if (!rc)
            rc = read_list(g, "targets", &group->targets, &group->n_targets);
    }
    return rc ? rc : read_list(q, "ignore", &out->ignore, &out->n_ignore);
}

int quant_config_read(struct quant_config *out, struct json q)
{
    *out = (struct quant_config){0};
    const char *method;
    int rc = json_get_string(q, "quant_method", &method);
    if (rc < 0)
        return rc;
    if (!strcmp(method, quant_format_names[QUANT_COMPRESSED_TENSORS]))
        rc = read_compressed_tensors(out, q);
    else if (!strcmp(method, quant_format_names[QUANT_AUTO_ROUND]))
        rc = quant_auto_round_read(out, q);
    else if (!strcmp(method, quant_format_names[QUANT_GPTQ]))
        rc = quant_gptq_read(out, q);
    else
        rc = json_error(json_member(q, "quant_method"),
                        "is '%s', expected compressed-tensors, auto-round or gptq", method);
    if (rc < 0)
        quant_config_free(out);
    return rc;
}

/* --- names and shapes -------------------------------------------------------------------------------------------- */

const char *quant_inner_name(const char *name)
{
    static const char *const levels[] = {"model.", "language_model."};
    for (size_t i = 0; i < sizeof levels / sizeof *levels;)
        if (!strncmp(name, levels[i], strlen(levels[i]))) {
            name += strlen(levels[i]);
            i = 0;
        } else {
            i++;
        }
    return name;
}

int64_t quant_packed_cols(struct quant_scheme s, int64_t cols)
{
    const int64_t per_word = 32 / s.bits;
    return (cols + per_word - 1) / per_word;
}

int64_t quant_groups(struct quant_scheme s, int64_t cols)
{
    return s.group ? (cols + s.group - 1) / s.group : 1;
}

int64_t quant_zero_rows(struct quant_scheme s, int64_t rows)
{
    return quant_packed_cols(s, rows);
}

void quant_pack_zeros(struct quant_scheme s, const int8_t *zeros, int64_t rows, int64_t groups,
                      uint32_t *words)
{
    const int64_t per_word = 32 / s.bits;
    const uint32_t offset = 1u << (s.bits - 1), mask = (1u << s.bits) - 1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++)
            words[r / per_word * groups + g] |= (((uint32_t)zeros[r * groups + g] + offset) & mask)
                                                << r % per_word * s.bits;
}

void quant_unpack_zeros(struct quant_scheme s, const uint32_t *words, int64_t rows, int64_t groups,
                        int8_t *zeros)
{
    const int64_t per_word = 32 / s.bits;
    const uint32_t mask = (1u << s.bits) - 1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const uint32_t code = words[r / per_word * groups + g] >> r % per_word * s.bits & mask;
            zeros[r * groups + g] = (int8_t)((int32_t)code - (1 << (s.bits - 1)));
        }
}

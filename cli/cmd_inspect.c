/* gemcut inspect: what a model folder holds, on one screen; --tensors lists every tensor. */
#include "cli/cmd.h"

#include "base/err.h"
#include "cli/human.h"
#include "cli/opt.h"
#include "cli/output.h"
#include "formats/record.h"
#include "runtime/model.h"

#include <stdlib.h>
#include <string.h>

/* Bytes and elements by part of the model and type. */
struct share {
    const char *part;
    enum dtype dtype;
    uint64_t bytes;
    int64_t elements;
    size_t n_tensors;
};

struct contents {
    struct share shares[4 * N_DTYPES];
    size_t n_shares;
    uint64_t bytes;
    int64_t parameters;       /* elements of the unpacked model */
    int64_t quantized;        /* of them, in quantized linears */
    uint64_t quantized_bytes; /* what those take: codes, scales, zero points, shapes */
};

static const char *part_of(const struct model *m, const char *name)
{
    if (strncmp(name, m->prefix, strlen(m->prefix)))
        return "other";
    if (gemma_is_dead(&m->gemma, m->prefix, name))
        return "unused";
    if (strstr(name, "embed_tokens.weight"))
        return "embedding";
    if (strstr(name, "per_layer") && !strstr(name, "norm.weight"))
        return "per layer";
    return strstr(name, "norm.weight") || strstr(name, "layer_scalar") ? "norms" : "linears";
}

static void add_share(struct contents *c, const char *part, const struct tensor *t)
{
    size_t i = 0;
    while (i < c->n_shares && (strcmp(c->shares[i].part, part) || c->shares[i].dtype != t->dtype))
        i++;
    if (i == c->n_shares)
        c->shares[c->n_shares++] = (struct share){.part = part, .dtype = t->dtype};
    c->shares[i].bytes += t->bytes;
    c->shares[i].elements += tensor_rows(t) * tensor_cols(t);
    c->shares[i].n_tensors++;
    c->bytes += t->bytes;
}

static struct contents count_contents(const struct model *m)
{
    struct contents c = {0};
    for (size_t i = 0; i < m->checkpoint.n_tensors; i++) {
        const struct tensor *t = &m->checkpoint.tensors[i];
        add_share(&c, part_of(m, t->name), t);
        c.parameters += tensor_rows(t) * tensor_cols(t);
    }
    for (size_t i = 0; i < m->n_linears; i++) {
        const struct model_linear *l = &m->linears[i];
        const struct tensor *const parts[] = {l->packed, l->scales, l->zeros, l->shape, l->middle, l->g_idx};
        for (size_t k = 0; l->quantized && k < sizeof parts / sizeof *parts; k++)
            if (parts[k]) {
                c.quantized_bytes += parts[k]->bytes;
                c.parameters -= tensor_rows(parts[k]) * tensor_cols(parts[k]);
            }
        if (l->quantized) {
            c.quantized += l->spec->shape[0] * l->spec->shape[1];
            c.parameters += l->spec->shape[0] * l->spec->shape[1];
        }
    }
    return c;
}

/* --- text ----------------------------------------------------------------------------------------------------- */

static void describe_layers(const struct model *m, struct text *out)
{
    const struct gemma_config *g = &m->gemma;
    int64_t sliding = 0, sharing = 0;
    for (int64_t i = 0; i < g->n_layers; i++) {
        sliding += g->layers[i].sliding;
        sharing += g->layers[i].kv_source != i;
    }
    text_printf(out, "architecture  %s (%s), %lld layers", g->family->title,
                *m->config.architecture ? m->config.architecture : m->config.model_type,
                (long long)g->n_layers);
    if (sliding)
        text_printf(out, ": %lld with a window of %lld tokens, %lld global", (long long)sliding,
                    (long long)g->sliding_window, (long long)(g->n_layers - sliding));
    text_add(out, "\n");
    text_printf(
        out,
        "sizes         hidden %lld, MLP %lld, %lld heads and %lld key/value heads of %lld, vocabulary %lld\n",
        (long long)g->hidden_size, (long long)g->intermediate_size, (long long)g->n_heads,
        (long long)g->n_kv_heads, (long long)g->head_dim, (long long)g->vocab_size);
    if (g->n_experts)
        text_printf(out, "experts       %lld in a layer beside the MLP, each %lld wide; %lld for a token\n",
                    (long long)g->n_experts, (long long)g->expert_size, (long long)g->top_k);
    if (g->family->varied)
        text_printf(out,
                    "layers        global ones have heads of %lld, %lld read another's keys and values, %lld "
                    "inputs of their own\n",
                    (long long)g->rope_dim[GEMMA_GLOBAL], (long long)sharing, (long long)g->ple_size);
    text_printf(out, "context       %lld tokens, RoPE %.0f global, %.0f in windows",
                (long long)g->max_positions, g->rope[GEMMA_GLOBAL].theta, g->rope[GEMMA_SLIDING].theta);
    if (g->rope[GEMMA_GLOBAL].factor != 1)
        text_printf(out, ", positions divided by %g", g->rope[GEMMA_GLOBAL].factor);
    text_add(out, "\n");
}

static void describe_quantization(const struct model *m, const struct contents *c, struct text *out)
{
    if (!m->quantized) {
        text_add(out, "quantization  none\n");
        return;
    }
    for (size_t g = 0; g < m->quant.n_groups; g++) {
        const struct quant_scheme s = m->quant.groups[g].scheme;
        size_t n = 0;
        for (size_t i = 0; i < m->n_linears; i++) {
            const struct model_linear *l = &m->linears[i];
            n += l->quantized && l->scheme.bits == s.bits && l->scheme.symmetric == s.symmetric &&
                 l->scheme.group == s.group;
        }
        text_printf(out, "%s%d bits, %s, ", g ? "              " : "quantization  ", s.bits,
                    s.symmetric ? "symmetric" : "asymmetric");
        if (s.group)
            text_printf(out, "groups of %lld", (long long)s.group);
        else
            text_add(out, "one scale a row");
        text_printf(out, ": %zu of %zu linears%s%s\n", n, m->n_linears,
                    g + 1 == m->quant.n_groups ? "; " : "",
                    g + 1 == m->quant.n_groups ? quant_config_title(&m->quant) : "");
    }
    if (model_n_dequantized(m))
        text_printf(out,
                    "              scales beyond BF16: %zu linears are computed from dequantized weights\n",
                    model_n_dequantized(m));
    if (c->quantized)
        text_printf(out, "              %.3f bits a quantized weight\n",
                    8 * (double)c->quantized_bytes / (double)c->quantized);
}

static int describe_record(const struct model *m, struct text *out)
{
    struct record record;
    bool found;
    const int rc = record_open(&record, m->folder, &found);
    if (rc < 0)
        return rc;
    const char *method, *scales, *from;
    if (found && json_exists(json_member(record.recipe, "method")) &&
        json_opt_string(record.recipe, "method", "?", &method) == 0 &&
        json_opt_string(record.recipe, "scales", "?", &scales) == 0)
        text_printf(out, "made by       gemcut %s: %s, scales %s\n", record.version, method, scales);
    const struct json converted = found ? json_member(json_root(record.doc), "converted") : (struct json){0};
    if (json_exists(converted) && json_opt_string(converted, "from", "?", &from) == 0)
        text_printf(out, "converted     from %s\n", from);
    record_close(&record);
    return 0;
}

static int describe_shares(const struct contents *c, struct text *out)
{
    static const struct human_column columns[] = {{"part", false},    {"dtype", false}, {"tensors", true},
                                                  {"elements", true}, {"size", true},   {"share", true}};
    struct human_table table = {.columns = columns, .n_columns = 6};
    for (size_t i = 0; i < c->n_shares; i++) {
        const struct share *s = &c->shares[i];
        human_table_cell(&table, "%s", s->part);
        human_table_cell(&table, "%s", dtype_name(s->dtype));
        human_table_cell(&table, "%zu", s->n_tensors);
        human_table_cell(&table, "%lld", (long long)s->elements);
        human_table_cell(&table, "%s", human_bytes(s->bytes).s);
        human_table_cell(&table, "%.1f %%", c->bytes ? 100 * (double)s->bytes / (double)c->bytes : 0);
    }
    text_add(out, "\n");
    const int rc = human_table_render(&table, out);
    human_table_free(&table);
    return rc;
}

static int list_tensors(const struct model *m, struct text *out)
{
    static const struct human_column columns[] = {
        {"tensor", false}, {"dtype and shape", false}, {"size", true}};
    struct human_table table = {.columns = columns, .n_columns = 3};
    char text[TENSOR_TEXT_BYTES];
    for (size_t i = 0; i < m->checkpoint.n_tensors; i++) {
        const struct tensor *t = &m->checkpoint.tensors[i];
        human_table_cell(&table, "%s", t->name);
        human_table_cell(&table, "%s", tensor_text(t->dtype, t->n_dims, t->shape, text));
        human_table_cell(&table, "%s", human_bytes(t->bytes).s);
    }
    text_add(out, "\n");
    const int rc = human_table_render(&table, out);
    human_table_free(&table);
    return rc;
}

static int describe(const struct model *m, bool tensors, struct text *out)
{
    const struct contents c = count_contents(m);
    text_printf(out, "model         %s\n", m->folder);
    describe_layers(m, out);
    text_printf(out, "parameters    %.1f million in %zu tensors, %zu file%s, %s\n",
                (double)c.parameters / 1e6, m->checkpoint.n_tensors, m->checkpoint.n_files,
                m->checkpoint.n_files == 1 ? "" : "s", human_bytes(c.bytes).s);
    describe_quantization(m, &c, out);
    int rc = describe_record(m, out);
    if (!rc)
        rc = describe_shares(&c, out);
    if (!rc && tensors)
        rc = list_tensors(m, out);
    return rc;
}

/* --- JSON ----------------------------------------------------------------------------------------------------- */

static void put_architecture(const struct model *m, struct text *out)
{
    const struct gemma_config *g = &m->gemma;
    json_put_key(out, "architecture");
    json_begin_object(out);
    json_kv_string(out, "family", g->family->title);
    json_kv_string(out, "model_type", m->config.model_type);
    json_kv_int(out, "num_hidden_layers", g->n_layers);
    json_kv_int(out, "hidden_size", g->hidden_size);
    json_kv_int(out, "intermediate_size", g->intermediate_size);
    json_kv_int(out, "num_attention_heads", g->n_heads);
    json_kv_int(out, "num_key_value_heads", g->n_kv_heads);
    json_kv_int(out, "head_dim", g->head_dim);
    if (g->family->varied) {
        json_kv_int(out, "global_head_dim", g->rope_dim[GEMMA_GLOBAL]);
        json_kv_int(out, "hidden_size_per_layer_input", g->ple_size);
    }
    if (g->n_experts) {
        json_kv_int(out, "num_experts", g->n_experts);
        json_kv_int(out, "top_k_experts", g->top_k);
        json_kv_int(out, "moe_intermediate_size", g->expert_size);
    }
    json_kv_int(out, "vocab_size", g->vocab_size);
    json_kv_int(out, "sliding_window", g->sliding_window);
    json_kv_int(out, "max_position_embeddings", g->max_positions);
    json_end_object(out);
}

static void put_linears(const struct model *m, struct text *out)
{
    json_put_key(out, "quantized_linears");
    json_begin_array(out);
    for (size_t i = 0; i < m->n_linears; i++) {
        const struct model_linear *l = &m->linears[i];
        if (!l->quantized)
            continue;
        json_begin_object(out);
        json_kv_string(out, "name", l->spec->name);
        json_kv_int(out, "bits", l->scheme.bits);
        json_kv_bool(out, "symmetric", l->scheme.symmetric);
        json_kv_int(out, "group_size", l->scheme.group ? l->scheme.group : l->spec->shape[1]);
        json_kv_bool(out, "dequantized", !l->direct);
        json_end_object(out);
    }
    json_end_array(out);
}

static void put_tensors(const struct model *m, struct text *out)
{
    json_put_key(out, "tensors");
    json_begin_array(out);
    for (size_t i = 0; i < m->checkpoint.n_tensors; i++) {
        const struct tensor *t = &m->checkpoint.tensors[i];
        json_begin_object(out);
        json_kv_string(out, "name", t->name);
        json_kv_string(out, "dtype", dtype_name(t->dtype));
        json_put_key(out, "shape");
        json_begin_array(out);
        for (int d = 0; d < t->n_dims; d++)
            json_put_int(out, t->shape[d]);
        json_end_array(out);
        json_kv_uint(out, "bytes", t->bytes);
        json_end_object(out);
    }
    json_end_array(out);
}

static void describe_json(const struct model *m, struct text *out)
{
    const struct contents c = count_contents(m);
    json_kv_string(out, "model", m->folder);
    put_architecture(m, out);
    json_kv_int(out, "parameters", c.parameters);
    json_kv_int(out, "quantized_parameters", c.quantized);
    json_kv_uint(out, "bytes", c.bytes);
    json_kv_int(out, "files", (int64_t)m->checkpoint.n_files);
    json_kv_string(out, "format", m->quantized ? quant_config_title(&m->quant) : NULL);
    put_linears(m, out);
    put_tensors(m, out);
}

/* --- command -------------------------------------------------------------------------------------------------- */

struct args {
    const char *model;
    bool tensors;
    struct output_options output;
};

static const struct opt_arg positional[] = {
    {.name = "MODEL",
     .offset = OPT_OFFSET(struct args, model, const char *),
     .help = "a folder with config.json and *.safetensors, or org/name in the Hugging Face cache"},
};

static const struct opt options[] = {
    {.name = "tensors", OPT_TO_FLAG(struct args, tensors), .help = "list every tensor too"},
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut inspect",
    .summary = "Shows what a checkpoint holds: architecture, sizes, types, quantization.",
    .args = positional,
    .n_args = 1,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
};

int cmd_inspect(int argc, char **argv)
{
    struct args args = {0};
    int rc = cmd_begin(&spec, argc, argv, &args, &args.output);
    if (rc)
        return rc;
    struct model m;
    struct text out = {0};
    rc = model_open(&m, args.model);
    if (!rc)
        rc = model_bind(&m, NULL, NULL);
    if (!rc && output_json()) {
        output_json_begin(&out, NULL, NULL);
        describe_json(&m, &out);
        rc = output_json_end(&out);
    } else if (!rc) {
        rc = describe(&m, args.tensors, &out);
        if (!rc)
            rc = output_print(&out);
    }
    text_free(&out);
    model_close(&m);
    return rc;
}

#include "runtime/model.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/quant_match.h"
#include "runtime/packed.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int refuse_quantized(const struct model *m)
{
    const char *method = "an unnamed method";
    if (json_exists(m->config.quantization)) {
        const int rc = json_opt_string(m->config.quantization, "quant_method", method, &method);
        return rc < 0 ? rc
                      : err_set(ERR_UNSUPPORTED,
                                "%s: is already quantized (%s), expected a BF16, F16 or F32 model", m->folder,
                                method);
    }
    static const char *const suffixes[] = {QUANT_PACKED, QUANT_QWEIGHT};
    for (size_t i = 0; i < m->checkpoint.n_tensors; i++)
        for (size_t s = 0; s < 2; s++) {
            const char *name = m->checkpoint.tensors[i].name;
            const size_t n = strlen(name), k = strlen(suffixes[s]);
            if (n > k && !strcmp(name + n - k, suffixes[s]))
                return err_set(ERR_UNSUPPORTED, "%s: is already quantized: tensor '%s'", m->folder, name);
        }
    return 0;
}

static int open_folder(struct model *m, const char *name, bool quantized_allowed)
{
    *m = (struct model){0};
    int rc = checkpoint_find(&m->folder, name);
    if (!rc)
        rc = hf_config_open(&m->config, m->folder);
    if (!rc)
        rc = gemma_config_read(&m->gemma, &m->config);
    if (!rc)
        rc = checkpoint_open(&m->checkpoint, m->folder);
    if (!rc && !quantized_allowed)
        rc = refuse_quantized(m);
    m->quantized = !rc && json_exists(m->config.quantization);
    if (!rc && m->quantized)
        rc = quant_config_read(&m->quant, m->config.quantization);
    if (!rc)
        rc = gemma_prefix(&m->prefix, &m->gemma, &m->checkpoint);
    if (!rc)
        rc = unfuse_experts(&m->fused, &m->checkpoint, &m->gemma, m->prefix);
    if (!rc)
        rc = gemma_tensors(&m->tensors, &m->gemma, m->prefix);
    if (rc < 0)
        model_close(m);
    return rc;
}

int model_open(struct model *m, const char *name)
{
    return open_folder(m, name, true);
}

int model_open_unquantized(struct model *m, const char *name)
{
    return open_folder(m, name, false);
}

void model_close(struct model *m)
{
    free(m->linears);
    quant_config_free(&m->quant);
    gemma_tensors_free(&m->tensors);
    checkpoint_close(&m->checkpoint);
    fused_tensors_free(&m->fused);
    gemma_config_free(&m->gemma);
    hf_config_close(&m->config);
    free(m->folder);
    *m = (struct model){0};
}

/* --- binding -------------------------------------------------------------------------------------------------- */

struct binding {
    struct model *m;
    struct quant_matcher *matcher; /* when quantized */
    model_problem on_problem;
    void *ctx;
};

/* Reports one deviation: 0 to go on. */
static int problem(const struct binding *b, const char *object, const char *message)
{
    if (b->on_problem)
        return b->on_problem(b->ctx, object, message);
    return err_set(ERR_FORMAT, "%s: '%s' %s", b->m->folder, object, message);
}

static bool same_shape(const struct tensor *t, int n_dims, const int64_t *shape)
{
    bool same = t->n_dims == n_dims;
    for (int d = 0; same && d < n_dims; d++)
        same = t->shape[d] == shape[d];
    return same;
}

/* What a tensor must be; "float" stands for BF16, F16 and F32. */
struct expected {
    const char *module, *suffix;
    bool is_float;
    enum dtype dtype; /* unless is_float */
    int n_dims;
    int64_t shape[2];
};

/* *out = the tensor, or NULL after its absence or deviation was reported. */
static int expect(const struct binding *b, const struct expected *e, const struct tensor **out)
{
    *out = NULL;
    char *name = mem_printf("%s%s", e->module, e->suffix), message[320];
    if (!name)
        return ERR_MEMORY;
    const struct tensor *t = checkpoint_tensor(&b->m->checkpoint, name);
    char is[TENSOR_TEXT_BYTES], wanted[TENSOR_TEXT_BYTES];
    tensor_text(e->is_float ? DTYPE_BF16 : e->dtype, e->n_dims, e->shape, wanted);
    int rc = 0;
    if (!t) {
        snprintf(message, sizeof message, "is missing, expected %s", wanted);
        rc = problem(b, name, message);
    } else if (!(e->is_float ? t->dtype == DTYPE_BF16 || t->dtype == DTYPE_F16 || t->dtype == DTYPE_F32
                             : t->dtype == e->dtype) ||
               !same_shape(t, e->n_dims, e->shape)) {
        snprintf(message, sizeof message, "is %s, expected %s%s",
                 tensor_text(t->dtype, t->n_dims, t->shape, is), wanted, e->is_float ? " (or F16, F32)" : "");
        rc = problem(b, name, message);
    } else {
        *out = t;
    }
    free(name);
    return rc;
}

/* The tensor of another layout is there: the description and the weights disagree. */
static int refuse_present(const struct binding *b, const char *module, const char *suffix, const char *why)
{
    char *name = mem_printf("%s%s", module, suffix);
    if (!name)
        return ERR_MEMORY;
    const int rc = checkpoint_tensor(&b->m->checkpoint, name) ? problem(b, name, why) : 0;
    free(name);
    return rc;
}

/* A tensor that only some write. */
static int bind_g_idx(const struct binding *b, struct model_linear *l, const char *module, const char *suffix)
{
    const struct expected e = {module, suffix, false, DTYPE_I32, 1, {l->spec->shape[1]}};
    char *name = mem_printf("%s%s", module, suffix);
    if (!name)
        return ERR_MEMORY;
    const int rc = checkpoint_tensor(&b->m->checkpoint, name) ? expect(b, &e, &l->g_idx) : 0;
    free(name);
    return rc;
}

static int bind_by_rows(const struct binding *b, struct model_linear *l, const char *module)
{
    const struct quant_scheme s = l->scheme;
    const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1], groups = quant_groups(s, cols);
    struct expected e = {module, QUANT_PACKED, false, DTYPE_I32, 2, {rows, quant_packed_cols(s, cols)}};
    int rc = expect(b, &e, &l->packed);
    e = (struct expected){module, QUANT_SCALE, true, DTYPE_BF16, 2, {rows, groups}};
    if (!rc)
        rc = expect(b, &e, &l->scales);
    e = (struct expected){module, QUANT_SHAPE, false, DTYPE_I64, 1, {2}};
    if (!rc)
        rc = expect(b, &e, &l->shape);
    e = (struct expected){module, QUANT_ZERO, false, DTYPE_I32, 2, {quant_zero_rows(s, rows), groups}};
    if (!rc && !s.symmetric)
        rc = expect(b, &e, &l->zeros);
    if (!rc && s.symmetric)
        rc = refuse_present(b, module, QUANT_ZERO,
                            "is there, although config.json calls the scheme symmetric");
    return rc ? rc : bind_g_idx(b, l, module, QUANT_GROUP_INDEX);
}

static int bind_transposed(const struct binding *b, struct model_linear *l, const char *module)
{
    const struct quant_scheme s = l->scheme;
    const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1], groups = quant_groups(s, cols);
    const bool awq = b->m->quant.layout == QUANT_AWQ;
    const int64_t zero_words = quant_zero_rows(s, rows), words = quant_packed_cols(s, cols);
    if (awq && rows % 8)
        return problem(b, l->spec->name, "has rows that 8 does not divide, which AWQ's packing cannot hold");
    struct expected e = {module, QUANT_QWEIGHT, false, DTYPE_I32, 2, {words, rows}};
    if (awq)
        e = (struct expected){module, QUANT_QWEIGHT, false, DTYPE_I32, 2, {cols, zero_words}};
    int rc = expect(b, &e, &l->packed);
    e = (struct expected){module, QUANT_SCALES, true, DTYPE_BF16, 2, {groups, rows}};
    if (!rc)
        rc = expect(b, &e, &l->scales);
    e = (struct expected){module, QUANT_QZEROS, false, DTYPE_I32, 2, {groups, zero_words}};
    if (!rc)
        rc = expect(b, &e, s.symmetric ? &l->middle : &l->zeros);
    return rc ? rc : bind_g_idx(b, l, module, QUANT_G_IDX);
}

static int bind_packed(const struct binding *b, struct model_linear *l, const char *module)
{
    const struct tensor *object;
    char message[PACKED_MESSAGE_BYTES];
    int rc = b->m->quant.layout == QUANT_BY_ROWS ? bind_by_rows(b, l, module) : bind_transposed(b, l, module);
    if (!rc && model_is_bound(l) && (rc = packed_check(b->m, l, &object, message)) > 0)
        rc = problem(b, object->name, message);
    return rc ? rc : refuse_present(b, module, ".weight", "is there beside the packed weight");
}

static int bind_linear(const struct binding *b, struct model_linear *l)
{
    char *module = gemma_module(l->spec);
    if (!module)
        return ERR_MEMORY;
    int rc = b->matcher ? quant_matcher_find(b->matcher, module, &l->scheme) : 0;
    if (rc > 0) {
        l->quantized = true;
        rc = bind_packed(b, l, module);
    } else if (!rc) {
        const struct expected e = {module,     ".weight", true,
                                   DTYPE_BF16, 2,         {l->spec->shape[0], l->spec->shape[1]}};
        rc = expect(b, &e, &l->weight);
        static const char *const suffixes[] = {QUANT_PACKED, QUANT_QWEIGHT};
        for (size_t i = 0; !rc && i < 2; i++)
            rc = refuse_present(b, module, suffixes[i],
                                "is there, although config.json leaves it unquantized");
    }
    free(module);
    return rc;
}

static int bind_plain(const struct binding *b, const struct gemma_tensor *spec)
{
    const struct tensor *t;
    const struct expected e = {spec->name, "",           true,
                               DTYPE_BF16, spec->n_dims, {spec->shape[0], spec->shape[1]}};
    return expect(b, &e, &t);
}

int model_bind(struct model *m, model_problem on_problem, void *ctx)
{
    struct binding b = {.m = m, .on_problem = on_problem, .ctx = ctx};
    m->linears = mem_alloc(m->tensors.n, sizeof *m->linears, "the model's linears");
    int rc = m->linears ? 0 : ERR_MEMORY;
    if (!rc && m->quantized)
        rc = quant_matcher_open(&b.matcher, &m->quant);
    for (size_t i = 0; !rc && i < m->tensors.n; i++) {
        const struct gemma_tensor *spec = &m->tensors.list[i];
        if (!gemma_is_linear(spec->role)) {
            rc = bind_plain(&b, spec);
            continue;
        }
        m->linears[m->n_linears].spec = spec;
        rc = bind_linear(&b, &m->linears[m->n_linears++]);
    }
    quant_matcher_close(b.matcher);
    return rc;
}

bool model_is_bound(const struct model_linear *l)
{
    return l->quantized && l->packed && l->scales && (l->scheme.symmetric || l->zeros);
}

size_t model_n_dequantized(const struct model *m)
{
    size_t n = 0;
    for (size_t i = 0; i < m->n_linears; i++)
        n += model_is_bound(&m->linears[i]) && !m->linears[i].direct;
    return n;
}

const struct gemma_tensor *model_table(const struct model *m)
{
    for (size_t i = 0; m->gemma.ple_size && i < m->tensors.n; i++)
        if (text_ends_with(m->tensors.list[i].name, ".embed_tokens_per_layer.weight"))
            return &m->tensors.list[i];
    return NULL;
}

int model_live_tensors(const struct model *m, const bool *apart, struct checkpoint *out)
{
    const struct checkpoint *all = &m->checkpoint;
    *out = *all;
    out->n_tensors = 0;
    out->tensors = mem_alloc(all->n_tensors, sizeof *out->tensors, "a list of tensors");
    for (size_t i = 0; out->tensors && i < all->n_tensors; i++)
        if (!gemma_is_dead(&m->gemma, m->prefix, all->tensors[i].name))
            out->tensors[out->n_tensors++] = all->tensors[i];
    if (!out->tensors)
        return ERR_MEMORY;
    out->n_tensors = fused_restore(&m->fused, out->tensors, out->n_tensors, apart);
    return 0;
}

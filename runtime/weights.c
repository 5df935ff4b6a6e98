#include "runtime/loader.h"

#include "base/err.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/text.h"
#include "formats/quant_layout.h"
#include "runtime/packed.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct weight_buf {
    struct buf buf;
    int part;
};

/* Device memory that the weights own. */
static int acquire(struct weights *w, size_t bytes, const char *what, void **out)
{
    int rc = mem_grow(&w->bufs, &w->capacity, w->n_bufs + 1, sizeof *w->bufs, "the weight list");
    if (!rc)
        rc = w->backend->core->acquire(w->backend, bytes, what, &w->bufs[w->n_bufs].buf);
    if (rc < 0)
        return rc;
    w->bufs[w->n_bufs].part = w->loader->part;
    *out = w->bufs[w->n_bufs++].buf.ptr;
    w->bytes += bytes;
    return 0;
}

static int load_tensor(struct loader *l, const struct tensor *t, struct mat *out)
{
    void *data = NULL;
    int rc = acquire(l->w, (size_t)t->bytes, t->name, &data);
    if (!rc)
        rc = loader_add(l, t, data);
    *out = (struct mat){data, t->dtype, tensor_rows(t), tensor_cols(t), tensor_cols(t)};
    return rc;
}

/* --- linears ------------------------------------------------------------------------------------------------------ */

/* Whether it is packed on the device too. */
static bool is_packed(const struct model_linear *l)
{
    return l->quantized && l->direct;
}

/* Of a linear that is not packed on the device. */
static enum dtype plain_dtype(const struct model_linear *l)
{
    return l->quantized ? DTYPE_BF16 : l->weight->dtype;
}

static bool same_form(const struct model_linear *a, const struct model_linear *b)
{
    if (is_packed(a) != is_packed(b))
        return false;
    return is_packed(a) ? a->scheme.bits == b->scheme.bits && a->scheme.group == b->scheme.group &&
                              a->scheme.symmetric == b->scheme.symmetric
                        : plain_dtype(a) == plain_dtype(b);
}

static int64_t count_rows(const struct model_linear *const *members, int n)
{
    int64_t rows = 0;
    for (int i = 0; i < n; i++)
        rows += members[i]->spec->shape[0];
    return rows;
}

/* Linears of equal form, one below the other in one matrix; parts[i] are its rows that belong to members[i]. */
static int load_plain_rows(struct loader *l, const struct model_linear *const *members, int n,
                           struct linear *whole, struct linear *parts)
{
    const struct model_linear *first = members[0];
    const enum dtype dtype = plain_dtype(first);
    const int64_t cols = first->spec->shape[1], rows = count_rows(members, n);
    void *data = NULL;
    int rc = acquire(l->w, (size_t)(rows * cols) * dtype_bytes(dtype), first->spec->name, &data);
    *whole = (struct linear){.weight = {data, dtype, rows, cols, cols}};
    for (int64_t i = 0, row = 0; !rc && i < n; row += members[i++]->spec->shape[0]) {
        parts[i] = (struct linear){.weight = mat_rows(&whole->weight, row, members[i]->spec->shape[0])};
        void *to = parts[i].weight.data;
        rc = members[i]->quantized ? loader_add_unpacked(l, members[i], to)
                                   : loader_add(l, members[i]->weight, to);
    }
    return rc;
}

/* Whether a tensor of a packed linear lies in the file as the kernels take it. */
static bool lies_by_rows(const struct loader *l, const struct tensor *t)
{
    return l->m->quant.layout == QUANT_BY_ROWS && (t->dtype == DTYPE_BF16 || t->dtype == DTYPE_I32);
}

/* Scales that have another type or order, and zero points, which always lie packed: few, and converted on the way. */
static int load_steps(struct loader *l, const struct model_linear *from, const struct qmat *q)
{
    const struct core_ops *core = l->w->backend->core;
    const int64_t rows = q->scales.rows, groups = q->scales.cols;
    const size_t n = (size_t)(rows * groups);
    const bool scales_too = !lies_by_rows(l, from->scales);
    float *scales = NULL;
    int8_t *zeros = NULL;
    if (!scales_too && !from->zeros)
        return 0;
    uint16_t *in_bf16 = mem_alloc_aligned(n * sizeof *in_bf16, "scales");
    int rc = in_bf16 ? packed_read_all_steps(l->m, from, &scales, &zeros) : ERR_MEMORY;
    if (!rc && scales_too) {
        layout_write_scales(scales, rows, groups, false, DTYPE_BF16, in_bf16);
        rc = core->upload(l->w->backend, q->scales.data, in_bf16, n * sizeof *in_bf16);
    }
    if (!rc && zeros)
        rc = core->upload(l->w->backend, q->zeros.data, zeros, n);
    free(in_bf16);
    free(scales);
    free(zeros);
    return rc;
}

static int load_packed(struct loader *l, const struct model_linear *from, const struct qmat *q)
{
    int rc = lies_by_rows(l, from->packed) ? loader_add(l, from->packed, q->packed.data)
                                           : loader_add_unpacked(l, from, q->packed.data);
    if (!rc && lies_by_rows(l, from->scales))
        rc = loader_add(l, from->scales, q->scales.data);
    return rc ? rc : load_steps(l, from, q);
}

/* Rows [row, row + n) of a linear. */
static struct linear linear_rows(const struct linear *l, int64_t row, int64_t n)
{
    struct linear part = *l;
    if (!l->quantized) {
        part.weight = mat_rows(&l->weight, row, n);
        return part;
    }
    part.packed.packed = mat_rows(&l->packed.packed, row, n);
    part.packed.scales = mat_rows(&l->packed.scales, row, n);
    if (l->packed.zeros.data)
        part.packed.zeros = mat_rows(&l->packed.zeros, row, n);
    return part;
}

static int load_packed_rows(struct loader *l, const struct model_linear *const *members, int n,
                            struct linear *whole, struct linear *parts)
{
    const struct model_linear *first = members[0];
    const int64_t cols = first->spec->shape[1], rows = count_rows(members, n);
    const int64_t words = quant_packed_cols(first->scheme, cols), groups = quant_groups(first->scheme, cols);
    void *packed = NULL, *scales = NULL, *zeros = NULL;
    int rc = acquire(l->w, (size_t)(rows * words) * sizeof(uint32_t), first->packed->name, &packed);
    if (!rc)
        rc = acquire(l->w, (size_t)(rows * groups) * sizeof(uint16_t), first->scales->name, &scales);
    if (!rc && first->zeros)
        rc = acquire(l->w, (size_t)(rows * groups), first->zeros->name, &zeros);
    if (rc < 0)
        return rc;
    *whole = (struct linear){true, .packed = packed_qmat(first, 0, rows, packed, scales, zeros)};
    for (int64_t i = 0, row = 0; !rc && i < n; row += members[i++]->spec->shape[0]) {
        parts[i] = linear_rows(whole, row, members[i]->spec->shape[0]);
        rc = load_packed(l, members[i], &parts[i].packed);
    }
    return rc;
}

static int load_rows(struct loader *l, const struct model_linear *const *members, int n, struct linear *whole,
                     struct linear *parts)
{
    return is_packed(members[0]) ? load_packed_rows(l, members, n, whole, parts)
                                 : load_plain_rows(l, members, n, whole, parts);
}

/* members: the set's linears in order. */
static int load_set(struct loader *l, const struct model_linear *const *members, int n,
                    struct linear_set *set)
{
    struct linear alone;
    *set = (struct linear_set){.n = n, .fused = true};
    for (int i = 1; i < n; i++)
        set->fused = set->fused && same_form(members[0], members[i]);
    if (set->fused)
        return load_rows(l, members, n, &set->whole, set->parts);
    int rc = 0;
    for (int i = 0; !rc && i < n; i++)
        rc = load_rows(l, &members[i], 1, &alone, &set->parts[i]);
    return rc;
}

/* Linears of all experts of a block in one matrix: of each expert its n ones, places[…] of a set. */
static int load_expert_sets(struct loader *l, const struct model_linear *const *members, int n,
                            struct expert *experts, bool down)
{
    const int n_experts = (int)l->w->config.n_experts, all = n_experts * n;
    struct linear *parts = mem_alloc((size_t)all, sizeof *parts, "the experts"), whole;
    int rc = parts ? 0 : ERR_MEMORY;
    for (int i = 1; !rc && i < all; i++)
        if (!same_form(members[0], members[i]))
            rc = err_set(ERR_UNSUPPORTED,
                         "%s: '%s' and '%s' are stored in different ways, which is not supported for experts",
                         l->m->folder, members[0]->spec->name, members[i]->spec->name);
    if (!rc)
        rc = load_rows(l, members, all, &whole, parts);
    for (int e = 0; !rc && e < n_experts; e++) {
        struct linear_set *set = down ? &experts[e].down : &experts[e].gate_up;
        const int64_t rows = count_rows(members + e * n, n), row = count_rows(members, e * n);
        *set = (struct linear_set){.n = n, .fused = true, .whole = linear_rows(&whole, row, rows)};
        memcpy(set->parts, parts + e * n, (size_t)n * sizeof *parts);
    }
    free(parts);
    return rc;
}

/* first: of a block's experts' linears, which come expert by expert: gate, up, down */
static int load_experts(struct loader *l, const struct model_linear *first, struct expert *experts)
{
    const size_t n = (size_t)l->w->config.n_experts;
    const struct model_linear **gate_up = mem_alloc(3 * n, sizeof *gate_up, "the experts");
    const struct model_linear **down = gate_up + 2 * n;
    int rc = gate_up ? 0 : ERR_MEMORY;
    for (size_t e = 0; !rc && e < n; e++) {
        gate_up[2 * e] = &first[3 * e];
        gate_up[2 * e + 1] = &first[3 * e + 1];
        down[e] = &first[3 * e + 2];
    }
    if (!rc)
        rc = load_expert_sets(l, gate_up, 2, experts, false);
    if (!rc)
        rc = load_expert_sets(l, down, 1, experts, true);
    free(gate_up);
    return rc;
}

/* The linears come in model order: q, k, v, o, gate, up, down of each block, then those of its experts. */
static int load_linears(struct loader *l)
{
    const struct model *m = l->m;
    int rc = 0;
    for (size_t i = 0, end; !rc && i < m->n_linears; i = end) {
        const struct model_linear *members[3] = {NULL};
        const struct gemma_tensor *spec = m->linears[i].spec;
        if (spec->expert >= 0) {
            if (spec->layer == l->part)
                rc = load_experts(l, &m->linears[i], l->w->blocks[spec->layer].experts);
            end = i + 3 * (size_t)m->gemma.n_experts;
            continue;
        }
        struct block *block = &l->w->blocks[spec->layer];
        struct linear_set *const places[N_FUSED] = {[FUSED_QKV] = &block->qkv,
                                                    [FUSED_O] = &block->o,
                                                    [FUSED_GATE_UP] = &block->gate_up,
                                                    [FUSED_DOWN] = &block->down};
        const enum gemma_fused set = gemma_fused_set(spec->role);
        int n = 0;
        for (end = i; end < m->n_linears && n < 3 && m->linears[end].spec->layer == spec->layer &&
                      m->linears[end].spec->expert < 0 && gemma_fused_set(m->linears[end].spec->role) == set;
             end++)
            members[n++] = &m->linears[end];
        if (spec->layer == l->part)
            rc = load_set(l, members, n, places[set]);
    }
    return rc;
}

/* --- the rest ----------------------------------------------------------------------------------------------------- */

/* A number, which the host needs. */
static int load_scalar(const struct loader *l, const struct tensor *t, float *out)
{
    uint32_t bits = 0;
    const int rc = checkpoint_read(&l->m->checkpoint, t, 0, t->bytes, &bits);
    if (t->dtype == DTYPE_F32)
        memcpy(out, &bits, sizeof *out);
    else
        *out = t->dtype == DTYPE_BF16 ? half_from_bf16((uint16_t)bits) : half_from_f16((uint16_t)bits);
    return rc;
}

struct place {
    const char *name; /* how the tensor's name ends */
    struct mat *to;
};

static int load_into(struct loader *l, const struct tensor *t, const struct place *places, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text_ends_with(t->name, places[i].name))
            return load_tensor(l, t, places[i].to);
    return err_set(ERR_UNSUPPORTED, "tensor '%s' has no place in the model", t->name);
}

/* What is not a linear finds its place by the last part of its name. */
static int load_plain(struct loader *l, const struct gemma_tensor *spec)
{
    struct weights *w = l->w;
    const struct tensor *t = checkpoint_tensor(&l->m->checkpoint, spec->name);
    CHECK(t);
    if (spec->layer < 0) {
        const struct place outer[] = {
            {".embed_tokens.weight", &w->embedding},
            {".norm.weight", &w->final_norm},
            {".embed_tokens_per_layer.weight", &w->per_layer.table},
            {".per_layer_model_projection.weight", &w->per_layer.projection},
            {".per_layer_projection_norm.weight", &w->per_layer.norm},
        };
        return load_into(l, t, outer, sizeof outer / sizeof *outer);
    }
    struct block *b = &w->blocks[spec->layer];
    if (spec->role == GEMMA_SCALAR)
        return load_scalar(l, t, &b->scalar);
    const struct place inner[] = {
        {".input_layernorm.weight", &b->input_norm},
        {".q_norm.weight", &b->q_norm},
        {".k_norm.weight", &b->k_norm},
        /* where there are two norms, the second is called as the first of four that follow a branch */
        {".post_attention_layernorm.weight",
         w->config.family->two_norms ? &b->pre_mlp_norm : &b->post_attention_norm},
        {".pre_feedforward_layernorm.weight", &b->pre_mlp_norm},
        {".post_feedforward_layernorm.weight", &b->post_mlp_norm},
        {".per_layer_input_gate.weight", &b->ple_gate},
        {".per_layer_projection.weight", &b->ple_projection},
        {".post_per_layer_input_norm.weight", &b->ple_norm},
        {".router.proj.weight", &b->router},
        {".router.scale", &b->router_scale},
        {".router.per_expert_scale", &b->expert_scales},
        {".pre_feedforward_layernorm_2.weight", &b->pre_experts_norm},
        {".post_feedforward_layernorm_2.weight", &b->post_experts_norm},
        {".post_feedforward_layernorm_1.weight", &b->post_dense_norm},
    };
    return load_into(l, t, inner, sizeof inner / sizeof *inner);
}

/* 1/(factor·θ^(2i/d)) for the pairs that turn, 0 for the others. */
static int make_inv_freq(struct weights *w)
{
    const struct gemma_config *c = &w->config;
    for (int kind = 0; kind < GEMMA_KINDS; kind++) {
        const struct gemma_rope *r = &c->rope[kind];
        const int64_t dim = c->rope_dim[kind], half = dim / 2,
                      turning = (int64_t)(r->rotated * (double)dim) / 2;
        float *f = w->inv_freq[kind] = mem_alloc((size_t)half, sizeof *f, "RoPE frequencies");
        if (!f)
            return ERR_MEMORY;
        for (int64_t i = 0; i < half; i++)
            f[i] = i < turning ? (float)(1 / pow(r->theta, 2 * (double)i / (double)dim) / r->factor) : 0;
    }
    return 0;
}

static void describe_block(struct weights *w, int64_t i)
{
    const struct gemma_config *c = &w->config;
    const struct gemma_layer *l = &c->layers[i];
    w->blocks[i] = (struct block){.n_heads = (int)c->n_heads,
                                  .n_kv_heads = (int)l->n_kv_heads,
                                  .head_dim = (int)l->head_dim,
                                  .inner = l->intermediate_size,
                                  .window = l->sliding ? c->sliding_window : 0,
                                  .score_scale = (float)(1 / sqrt(c->query_pre_attn_scalar)),
                                  .softcap = (float)c->attention_softcap,
                                  .rope = l->sliding ? GEMMA_SLIDING : GEMMA_GLOBAL,
                                  .kv_source = (int)l->kv_source,
                                  .k_is_v = l->k_is_v,
                                  .values_normed = c->family->varied,
                                  .scalar = 1,
                                  .n_experts = (int)c->n_experts,
                                  .top_k = (int)c->top_k,
                                  .expert_inner = c->expert_size,
                                  .experts = w->experts + i * c->n_experts};
}

int weights_open(struct weights *w, const struct model *m, const struct backend *b)
{
    *w = (struct weights){.model = m, .backend = b, .config = m->gemma};
    w->blocks = mem_alloc((size_t)m->gemma.n_layers, sizeof *w->blocks, "the blocks");
    w->experts =
        mem_alloc((size_t)(m->gemma.n_layers * m->gemma.n_experts), sizeof *w->experts, "the experts");
    w->loader = mem_alloc(1, sizeof *w->loader, "the loader");
    int rc = w->blocks && w->experts && w->loader ? make_inv_freq(w) : ERR_MEMORY;
    if (rc < 0) {
        weights_free(w);
        return rc;
    }
    *w->loader = (struct loader){.w = w, .m = m};
    for (int64_t i = 0; i < m->gemma.n_layers; i++)
        describe_block(w, i);
    return 0;
}

/* Takes memory for a part and notes its transfers. */
static int plan_part(struct weights *w, int part)
{
    struct loader *l = w->loader;
    l->w = w; /* which may have moved since it was opened */
    l->part = part;
    int rc = load_linears(l);
    for (size_t i = 0; !rc && i < l->m->tensors.n; i++)
        if (!gemma_is_linear(l->m->tensors.list[i].role) &&
            weights_part(l->m, &l->m->tensors.list[i]) == part)
            rc = load_plain(l, &l->m->tensors.list[i]);
    return rc;
}

int weights_load_part(struct weights *w, int part)
{
    const int rc = plan_part(w, part);
    return rc ? rc : loader_run(w->loader);
}

void weights_unload_part(struct weights *w, int part)
{
    size_t n = 0;
    for (size_t i = 0; i < w->n_bufs; i++) {
        if (w->bufs[i].part != part) {
            w->bufs[n++] = w->bufs[i];
            continue;
        }
        w->bytes -= w->bufs[i].buf.bytes;
        w->backend->core->release(w->backend, &w->bufs[i].buf);
    }
    w->n_bufs = n;
    if (part >= 0)
        describe_block(w, part);
}

int weights_load(struct weights *w, const struct model *m, const struct backend *b)
{
    int rc = weights_open(w, m, b);
    for (int part = WEIGHTS_TABLE; !rc && part < (int)m->gemma.n_layers; part++)
        rc = plan_part(w, part);
    if (!rc)
        rc = loader_run(w->loader);
    loader_close(w->loader);
    w->loader = NULL;
    if (rc < 0)
        weights_free(w);
    return rc;
}

uint64_t weights_part_bytes(const struct model *m, int part)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < m->n_linears; i++) {
        const struct model_linear *l = &m->linears[i];
        const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1];
        const int64_t groups = l->quantized ? quant_groups(l->scheme, cols) : 0;
        if (l->spec->layer != part)
            continue;
        bytes +=
            (uint64_t)rows *
            (is_packed(l) ? (uint64_t)(quant_packed_cols(l->scheme, cols) * 4 + groups * (l->zeros ? 3 : 2))
                          : (uint64_t)cols * dtype_bytes(plain_dtype(l)));
    }
    for (size_t i = 0; i < m->tensors.n; i++)
        if (!gemma_is_linear(m->tensors.list[i].role) && m->tensors.list[i].role != GEMMA_SCALAR &&
            weights_part(m, &m->tensors.list[i]) == part)
            bytes += checkpoint_tensor(&m->checkpoint, m->tensors.list[i].name)->bytes;
    return bytes;
}

uint64_t weights_bytes(const struct model *m)
{
    uint64_t bytes = 0;
    for (int part = WEIGHTS_TABLE; part < (int)m->gemma.n_layers; part++)
        bytes += weights_part_bytes(m, part);
    return bytes;
}

void weights_free(struct weights *w)
{
    for (size_t i = 0; i < w->n_bufs; i++)
        w->backend->core->release(w->backend, &w->bufs[i].buf);
    loader_close(w->loader);
    free(w->bufs);
    free(w->blocks);
    free(w->experts);
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        free(w->inv_freq[kind]);
    *w = (struct weights){0};
}

static int linear_forward(const struct backend *b, const struct linear *l, const struct mat *x,
                          const struct mat *out)
{
    return l->quantized ? b->core->q_gemm(b, x, &l->packed, out) : b->core->gemm(b, x, &l->weight, out);
}

int linear_set_forward(const struct backend *b, const struct linear_set *s, const struct mat *x,
                       const struct mat *out)
{
    if (s->fused)
        return linear_forward(b, &s->whole, x, out);
    int rc = 0;
    for (int64_t i = 0, col = 0; !rc && i < s->n; i++) {
        const struct linear *l = &s->parts[i];
        const struct mat part = mat_cols(out, col, l->quantized ? l->packed.packed.rows : l->weight.rows);
        rc = linear_forward(b, l, x, &part);
        col += part.cols;
    }
    return rc;
}

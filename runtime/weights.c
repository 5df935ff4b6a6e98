#include "runtime/weights.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK_BYTES = 4 << 20 };

/* Device memory that the weights own. */
static int acquire(struct weights *w, size_t bytes, const char *what, void **out)
{
    int rc = mem_grow(&w->bufs, &w->capacity, w->n_bufs + 1, sizeof *w->bufs, "the weight list");
    if (!rc)
        rc = w->backend->core->acquire(w->backend, bytes, what, &w->bufs[w->n_bufs]);
    if (rc < 0)
        return rc;
    *out = w->bufs[w->n_bufs++].ptr;
    w->bytes += bytes;
    return 0;
}

/* Brings a tensor to the device as it lies in the file. */
static int load_tensor(struct weights *w, const struct model *m, const struct tensor *t, struct mat *out)
{
    void *data = NULL;
    int rc = acquire(w, (size_t)t->bytes, t->name, &data);
    char *chunk = rc ? NULL : mem_alloc_aligned(CHUNK_BYTES, "a piece of a tensor");
    if (!rc && !chunk)
        rc = ERR_MEMORY;
    for (uint64_t at = 0; !rc && at < t->bytes; at += CHUNK_BYTES) {
        const size_t n = (size_t)(t->bytes - at < CHUNK_BYTES ? t->bytes - at : CHUNK_BYTES);
        rc = checkpoint_read(&m->checkpoint, t, at, n, chunk);
        if (!rc)
            rc = w->backend->core->upload(w->backend, (char *)data + at, chunk, n);
    }
    free(chunk);
    *out = (struct mat){data, t->dtype, tensor_rows(t), tensor_cols(t), tensor_cols(t)};
    return rc;
}

static int load_packed(struct weights *w, const struct model *m, const struct model_linear *l,
                       struct qmat *out)
{
    struct mat packed, scales;
    int rc = load_tensor(w, m, l->packed, &packed);
    if (!rc)
        rc = load_tensor(w, m, l->scales, &scales);
    if (rc < 0)
        return rc;
    *out = model_qmat(l, 0, packed.rows, packed.data, scales.data, NULL);
    if (!l->zeros)
        return 0;
    uint16_t *host_scales;
    int8_t *zeros;
    void *data = NULL;
    const size_t n = (size_t)(scales.rows * scales.cols);
    if ((rc = model_read_scales(m, l, &host_scales, &zeros)) < 0)
        return rc;
    rc = acquire(w, n, l->zeros->name, &data);
    if (!rc)
        rc = w->backend->core->upload(w->backend, data, zeros, n);
    if (!rc)
        out->zeros.data = data;
    free(host_scales);
    free(zeros);
    return rc;
}

static int load_linear(struct weights *w, const struct model *m, const struct model_linear *l)
{
    struct block *block = &w->blocks[l->spec->layer];
    struct linear *const places[] = {
        [GEMMA_Q] = &block->q,      [GEMMA_K] = &block->k,       [GEMMA_V] = &block->v,
        [GEMMA_O] = &block->o,      [GEMMA_GATE] = &block->gate, [GEMMA_UP] = &block->up,
        [GEMMA_DOWN] = &block->down};
    struct linear *out = places[l->spec->role];
    out->quantized = l->quantized;
    return l->quantized ? load_packed(w, m, l, &out->packed) : load_tensor(w, m, l->weight, &out->weight);
}

/* Norms and the embedding find their places by the last part of their names. */
static int load_plain(struct weights *w, const struct model *m, const struct gemma_tensor *spec)
{
    const struct tensor *t = checkpoint_tensor(&m->checkpoint, spec->name);
    CHECK(t);
    if (spec->role == GEMMA_EMBEDDING)
        return load_tensor(w, m, t, &w->embedding);
    if (spec->layer < 0)
        return load_tensor(w, m, t, &w->final_norm);
    struct block *b = &w->blocks[spec->layer];
    const struct {
        const char *name;
        struct mat *place;
    } norms[] = {
        {".input_layernorm.weight", &b->input_norm},
        {".q_norm.weight", &b->q_norm},
        {".k_norm.weight", &b->k_norm},
        {".post_attention_layernorm.weight", &b->post_attention_norm},
        {".pre_feedforward_layernorm.weight", &b->pre_mlp_norm},
        {".post_feedforward_layernorm.weight", &b->post_mlp_norm},
    };
    for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) {
        const size_t n = strlen(spec->name), k = strlen(norms[i].name);
        if (n > k && !strcmp(spec->name + n - k, norms[i].name))
            return load_tensor(w, m, t, norms[i].place);
    }
    return err_set(ERR_UNSUPPORTED, "tensor '%s' has no place in a block", spec->name);
}

/* 1/θ^(2i/d), global layers divided by the linear scaling factor. */
static int make_inv_freq(struct weights *w)
{
    const struct gemma_config *c = &w->config;
    const int64_t half = c->head_dim / 2;
    for (int sliding = 0; sliding < 2; sliding++) {
        float *f = w->inv_freq[sliding] = mem_alloc((size_t)half, sizeof *f, "RoPE frequencies");
        if (!f)
            return ERR_MEMORY;
        const double theta = sliding ? c->rope_local_theta : c->rope_theta;
        const double factor = sliding ? 1 : c->rope_factor;
        for (int64_t i = 0; i < half; i++)
            f[i] = (float)(1 / pow(theta, 2 * (double)i / (double)c->head_dim) / factor);
    }
    return 0;
}

static void describe_blocks(struct weights *w)
{
    const struct gemma_config *c = &w->config;
    for (int64_t i = 0; i < c->n_layers; i++) {
        const bool sliding = c->is_sliding[i];
        w->blocks[i] = (struct block){.n_heads = (int)c->n_heads,
                                      .n_kv_heads = (int)c->n_kv_heads,
                                      .head_dim = (int)c->head_dim,
                                      .window = sliding ? c->sliding_window : 0,
                                      .score_scale = (float)(1 / sqrt(c->query_pre_attn_scalar)),
                                      .rope = sliding};
    }
}

int weights_load(struct weights *w, const struct model *m, const struct backend *b)
{
    *w = (struct weights){.backend = b, .config = m->gemma};
    w->blocks = mem_alloc((size_t)m->gemma.n_layers, sizeof *w->blocks, "the blocks");
    int rc = w->blocks ? make_inv_freq(w) : ERR_MEMORY;
    if (!rc)
        describe_blocks(w);
    for (size_t i = 0; !rc && i < m->n_linears; i++)
        rc = load_linear(w, m, &m->linears[i]);
    for (size_t i = 0; !rc && i < m->tensors.n; i++)
        if (!gemma_is_linear(m->tensors.list[i].role))
            rc = load_plain(w, m, &m->tensors.list[i]);
    if (rc < 0)
        weights_free(w);
    return rc;
}

void weights_free(struct weights *w)
{
    for (size_t i = 0; i < w->n_bufs; i++)
        w->backend->core->release(w->backend, &w->bufs[i]);
    free(w->bufs);
    free(w->blocks);
    free(w->inv_freq[0]);
    free(w->inv_freq[1]);
    *w = (struct weights){0};
}

int linear_forward(const struct backend *b, const struct linear *l, const struct mat *x,
                   const struct mat *out)
{
    return l->quantized ? b->core->q_gemm(b, x, &l->packed, out) : b->core->gemm(b, x, &l->weight, out);
}

#include "tests/unit/expert_support.h"

#include "tests/unit/naive.h"

#include <math.h>

const struct tiny_gemma *const mixture = &tiny_families[TINY_GEMMA4_EXPERTS];

const int32_t *mixture_ids(void)
{
    static int32_t ids[TOKENS];
    for (int i = 0; i < TOKENS; i++)
        ids[i] = i % LENGTH && i % 7 ? (i * 7919 + i / 31 + 13) % (int)mixture->vocab : SKIPPED;
    return ids;
}

/* --- in double ------------------------------------------------------------------------------------------------------ */

/* A linear's weight [rows, cols], unpacked where it is packed; released by free_matrices. */
static double *weight_of(const struct linear *l)
{
    if (!l->quantized)
        return naive_rows(&l->weight);
    const struct qmat *q = &l->packed;
    double *out = room((size_t)(q->packed.rows * q->cols), sizeof *out);
    for (int64_t r = 0; r < q->packed.rows; r++)
        for (int64_t c = 0; c < q->cols; c++) {
            const uint32_t word = ((const uint32_t *)q->packed.data)[r * q->packed.stride + c * q->bits / 32];
            const int code = (int)(word >> c * q->bits % 32 & ((1u << q->bits) - 1)) - (1 << (q->bits - 1)),
                      zero = q->zeros.data
                                 ? ((const int8_t *)q->zeros.data)[r * q->zeros.stride + c / q->group]
                                 : 0;
            out[r * q->cols + c] = naive_bf16((code - zero) * naive_element(&q->scales, r, c / q->group));
        }
    return out;
}

struct naive_experts naive_experts_of(const struct weights *w, int layer)
{
    struct naive_experts n = {.k = &w->blocks[layer], .spec = block_norm(&w->config)};
    n.router = naive_rows(&n.k->router);
    for (int e = 0; e < N_EXPERTS; e++) {
        n.gate[e] = weight_of(&n.k->experts[e].gate_up.parts[0]);
        n.up[e] = weight_of(&n.k->experts[e].gate_up.parts[1]);
        n.down[e] = weight_of(&n.k->experts[e].down.parts[0]);
    }
    return n;
}

static void product(const double *w, int64_t rows, int64_t cols, const double *x, double *out)
{
    for (int64_t r = 0; r < rows; r++) {
        out[r] = 0;
        for (int64_t c = 0; c < cols; c++)
            out[r] += w[r * cols + c] * x[c];
    }
}

struct route naive_expert_route(const struct naive_experts *n, const double *x)
{
    double in[HIDDEN], logits[N_EXPERTS], sum = 0;
    struct route out;
    naive_norm_row(x, HIDDEN, &n->k->router_scale, &n->spec, in);
    for (int i = 0; i < HIDDEN; i++)
        in[i] /= sqrt(HIDDEN);
    product(n->router, N_EXPERTS, HIDDEN, in, logits);
    for (int i = 0; i < TOP; i++) {
        int best = 0;
        for (int e = 1; e < N_EXPERTS; e++)
            best = logits[e] > logits[best] ? e : best;
        out.expert[i] = best;
        sum += out.weight[i] = exp(logits[best]);
        logits[best] = -INFINITY;
    }
    for (int i = 0; i < TOP; i++)
        out.weight[i] *= naive_element(&n->k->expert_scales, 0, out.expert[i]) / sum;
    return out;
}

void naive_expert_inputs(const struct naive_experts *n, int expert, const double *x, double *in,
                         double *inner)
{
    double up[INNER];
    naive_norm_row(x, HIDDEN, &n->k->pre_experts_norm, &n->spec, in);
    product(n->gate[expert], INNER, HIDDEN, in, inner);
    product(n->up[expert], INNER, HIDDEN, in, up);
    for (int i = 0; i < INNER; i++) {
        const double g = inner[i];
        inner[i] = 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * up[i];
    }
}

void naive_experts_add(const struct naive_experts *n, const double *x, const double *branch, double *out)
{
    const struct route route = naive_expert_route(n, x);
    double in[HIDDEN], inner[INNER], given[HIDDEN], sum[HIDDEN] = {0};
    for (int i = 0; i < TOP; i++) {
        naive_expert_inputs(n, route.expert[i], x, in, inner);
        product(n->down[route.expert[i]], HIDDEN, INNER, inner, given);
        for (int c = 0; c < HIDDEN; c++)
            sum[c] += route.weight[i] * given[c];
    }
    naive_norm_row(sum, HIDDEN, &n->k->post_experts_norm, &n->spec, sum);
    naive_norm_row(branch, HIDDEN, &n->k->post_dense_norm, &n->spec, out);
    for (int c = 0; c < HIDDEN; c++)
        out[c] += sum[c];
}

/* --- whole blocks --------------------------------------------------------------------------------------------------- */

struct mat dense(int64_t rows, int64_t cols)
{
    struct mat m = make(DTYPE_F32, rows, cols);
    m.stride = cols;
    return m;
}

struct walk walk_open(const struct weights *w, const int32_t *ids)
{
    const struct gemma_widths widest = gemma_widest(&w->config);
    const struct backend *b = w->backend;
    struct walk k = {.w = w,
                     .x = dense(TOKENS, HIDDEN),
                     .normed = dense(TOKENS, HIDDEN),
                     .branch = dense(TOKENS, HIDDEN),
                     .qkv = dense(TOKENS, widest.qkv),
                     .q = dense(TOKENS, widest.q),
                     .attention = dense(TOKENS, widest.q),
                     .gate_up = dense(TOKENS, 2 * widest.inner)};
    assert_ok(b->core->embed(b, &w->embedding, ids, sqrtf(HIDDEN), &k.x));
    for (int i = 0; i < GEMMA_KINDS; i++) {
        k.rope[i] = dense(LENGTH, w->config.rope_dim[i]);
        assert_ok(b->core->rope_table(b, w->inv_freq[i], 0, &k.rope[i]));
    }
    return k;
}

void walk_to_experts(struct walk *s, int layer)
{
    const struct weights *w = s->w;
    const struct backend *b = w->backend;
    const struct block *k = &w->blocks[layer];
    const struct norm_spec spec = block_norm(&w->config);
    const int64_t kv = (int64_t)k->n_kv_heads * k->head_dim;
    const struct mat attention = mat_cols(&s->attention, 0, block_heads(k)),
                     gate_up = mat_cols(&s->gate_up, 0, 2 * k->inner),
                     inner = mat_cols(&gate_up, 0, k->inner);
    const struct block_pass pass = {.sequences = {SAMPLES, 0, LENGTH},
                                    .rope = &s->rope[k->rope],
                                    .qkv = s->qkv,
                                    .q = s->q,
                                    .keys = dense(TOKENS, kv),
                                    .values = dense(TOKENS, kv)};
    assert_ok(b->core->rms_norm(b, &s->x, &k->input_norm, &spec, &s->normed));
    assert_ok(block_attention(w, layer, &pass, &s->normed, &attention));
    assert_ok(linear_set_forward(b, &k->o, &attention, &s->branch));
    assert_ok(block_join(w, &s->branch, &k->post_attention_norm, &s->x, &k->pre_mlp_norm, &s->normed));
    assert_ok(block_mlp(w, layer, &s->normed, &gate_up, &inner));
    assert_ok(linear_set_forward(b, &k->down, &inner, &s->branch));
}

void walk_to_end(struct walk *s, int layer)
{
    const struct naive_experts n = naive_experts_of(s->w, layer);
    double *x = naive_rows(&s->x), *branch = naive_rows(&s->branch), out[HIDDEN];
    for (int64_t t = 0; t < TOKENS; t++) {
        naive_experts_add(&n, x + t * HIDDEN, branch + t * HIDDEN, out);
        for (int c = 0; c < HIDDEN; c++)
            put(&s->branch, t, c, out[c]);
    }
    assert_ok(block_end(s->w, layer, NULL, &s->branch, &s->x, NULL, &s->normed));
}

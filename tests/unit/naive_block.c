#include "tests/unit/naive_block.h"

#include "tests/unit/naive.h"

#include <math.h>

static void linear(const double *x, int64_t cols, const double *w, int64_t rows, double *out)
{
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < cols; c++)
                sum += x[t * cols + c] * w[r * cols + c];
            out[t * rows + r] = sum;
        }
}

/* w->data NULL: no norm */
static void norm_rows(const struct naive_block *n, const double *x, const struct mat *w, double *out)
{
    for (int64_t t = 0; t < TOKENS; t++)
        if (w->data)
            naive_norm_row(x + t * HIDDEN, HIDDEN, w, &n->spec, out + t * HIDDEN);
}

static void turn(const struct naive_block *n, int64_t token, double *x)
{
    const int half = n->k->head_dim / 2;
    for (int i = 0; i < half; i++) {
        const double c = (double)at(n->rope, token, i), s = (double)at(n->rope, token, half + i);
        const double a = x[i], b = x[half + i];
        x[i] = a * c - b * s;
        x[half + i] = b * c + a * s;
    }
}

/* A head as it is projected, normed and turned. */
static void place_head(const struct naive_block *n, int64_t token, const struct mat *norm, const double *x,
                       double *out)
{
    memcpy(out, x, (size_t)n->k->head_dim * sizeof *out);
    if (norm->data)
        naive_norm_row(x, n->k->head_dim, norm, &n->spec, out);
    turn(n, token % LENGTH, out);
}

/* q, keys, values: [TOKENS, heads·dim] */
static void split(const struct naive_block *n, const double *qkv, double *q, double *keys, double *values)
{
    const int64_t d = n->k->head_dim,
                  parts = !keys          ? 0
                          : n->k->k_is_v ? 1
                                         : 2,
                  cols = (HEADS + parts * KV_HEADS) * d;
    for (int64_t t = 0; t < TOKENS; t++) {
        const double *x = qkv + t * cols, *k = x + HEADS * d, *v = k + (parts - 1) * KV_HEADS * d;
        for (int h = 0; h < HEADS; h++)
            place_head(n, t, &n->k->q_norm, x + h * d, q + (t * HEADS + h) * d);
        for (int h = 0; keys && h < KV_HEADS; h++) {
            double *to = values + (t * KV_HEADS + h) * d;
            place_head(n, t, &n->k->k_norm, k + h * d, keys + (t * KV_HEADS + h) * d);
            memcpy(to, v + h * d, (size_t)d * sizeof *to);
            if (n->k->values_normed)
                naive_norm_row(to, d, NULL, &n->spec, to);
        }
    }
}

/* One query of one head. */
static void attend(const struct naive_block *n, const double *q, const double *keys, const double *values,
                   int64_t row, int head, double *out)
{
    const int64_t token = row % LENGTH, first = row - token, d = n->k->head_dim;
    const int64_t from = n->k->window && token >= n->k->window ? token - n->k->window + 1 : 0;
    const int64_t shift = head / (HEADS / KV_HEADS) * d;
    double p[LENGTH], total = 0;
    for (int64_t t = from; t <= token; t++) {
        double sum = 0;
        for (int i = 0; i < d; i++)
            sum += q[(row * HEADS + head) * d + i] * keys[(first + t) * KV_HEADS * d + shift + i];
        sum *= (double)n->k->score_scale;
        const double cap = (double)n->k->softcap;
        total += p[t] = exp(cap > 0 ? cap * tanh(sum / cap) : sum);
    }
    for (int i = 0; i < d; i++) {
        out[i] = 0;
        for (int64_t t = from; t <= token; t++)
            out[i] += p[t] / total * values[(first + t) * KV_HEADS * d + shift + i];
    }
}

static void attention(const struct naive_block *n, const double *normed, double *out)
{
    static double qkv[TOKENS * (HEADS + 2 * KV_HEADS) * MAX_DIM], q[TOKENS * HEADS * MAX_DIM], keys[MAX_KV],
        values[MAX_KV];
    const int64_t d = n->k->head_dim, parts = n->keys ? 0 : n->k->k_is_v ? 1 : 2;
    linear(normed, HIDDEN, n->sets[FUSED_QKV], (HEADS + parts * KV_HEADS) * d, qkv);
    split(n, qkv, q, n->keys ? NULL : keys, values);
    for (int64_t t = 0; t < TOKENS; t++)
        for (int h = 0; h < HEADS; h++)
            attend(n, q, n->keys ? n->keys : keys, n->keys ? n->values : values, t, h,
                   out + (t * HEADS + h) * d);
}

static double gelu(double z)
{
    return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
}

/* out += the layer's own input through its gate */
static void add_input(const struct naive_block *n)
{
    double gate[TOKENS * PLE], branch[TOKENS * HIDDEN];
    linear(n->out, HIDDEN, n->gate, PLE, gate);
    for (int i = 0; i < TOKENS * PLE; i++)
        gate[i] = gelu(gate[i]) * n->input[i];
    linear(gate, PLE, n->projection, HIDDEN, branch);
    norm_rows(n, branch, &n->k->ple_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] += branch[i];
}

/* What an expert makes of a token's input: down(gelu(gate) ⊙ up) */
static void run_expert(const struct naive_block *n, int64_t expert, const double *in, double *out)
{
    const double *gate_up = n->sets[SET_EXPERTS_GATE_UP] + expert * 2 * EXPERT_FFN * HIDDEN,
                 *down = n->sets[SET_EXPERTS_DOWN] + expert * HIDDEN * EXPERT_FFN;
    double inner[EXPERT_FFN];
    for (int i = 0; i < EXPERT_FFN; i++) {
        double g = 0, u = 0;
        for (int c = 0; c < HIDDEN; c++) {
            g += gate_up[i * HIDDEN + c] * in[c];
            u += gate_up[(EXPERT_FFN + i) * HIDDEN + c] * in[c];
        }
        inner[i] = gelu(g) * u;
    }
    for (int r = 0; r < HIDDEN; r++) {
        out[r] = 0;
        for (int i = 0; i < EXPERT_FFN; i++)
            out[r] += down[r * EXPERT_FFN + i] * inner[i];
    }
}

/* Softmax over the chosen experts of a token, times their factors. x: the residual stream */
static void weigh_experts(const struct naive_block *n, const double *x, const int32_t *chosen,
                          double *weights)
{
    double in[HIDDEN], sum = 0;
    naive_norm_row(x, HIDDEN, &n->k->router_scale, &n->spec, in);
    for (int j = 0; j < TOP; j++) {
        double logit = 0;
        for (int c = 0; c < HIDDEN; c++)
            logit += n->router[chosen[j] * HIDDEN + c] * in[c] / sqrt(HIDDEN);
        sum += weights[j] = exp(logit);
    }
    for (int j = 0; j < TOP; j++)
        weights[j] *= naive_element(&n->k->expert_scales, 0, chosen[j]) / sum;
}

/* branch = RMSNorm(branch) + RMSNorm(Σ weight·expert(x)), token by token */
static void add_experts(const struct naive_block *n, double *branch)
{
    for (int64_t t = 0; t < TOKENS; t++) {
        const double *x = n->out + t * HIDDEN;
        double in[HIDDEN], out[HIDDEN], sum[HIDDEN] = {0}, weights[TOP];
        weigh_experts(n, x, n->chosen + t * TOP, weights);
        naive_norm_row(x, HIDDEN, &n->k->pre_experts_norm, &n->spec, in);
        for (int j = 0; j < TOP; j++) {
            run_expert(n, n->chosen[t * TOP + j], in, out);
            for (int c = 0; c < HIDDEN; c++)
                sum[c] += weights[j] * out[c];
        }
        naive_norm_row(sum, HIDDEN, &n->k->post_experts_norm, &n->spec, sum);
        naive_norm_row(branch + t * HIDDEN, HIDDEN, &n->k->post_dense_norm, &n->spec, out);
        for (int c = 0; c < HIDDEN; c++)
            branch[t * HIDDEN + c] = out[c] + sum[c];
    }
}

double naive_block_loss(const void *block)
{
    const struct naive_block *n = block;
    static double normed[TOKENS * HIDDEN], attended[TOKENS * HEADS * MAX_DIM], branch[TOKENS * HIDDEN],
        gate_up[TOKENS * 2 * MAX_FFN], inner[TOKENS * MAX_FFN];
    const int64_t ffn = n->k->inner;
    norm_rows(n, n->x, &n->k->input_norm, normed);
    attention(n, normed, attended);
    linear(attended, HEADS * n->k->head_dim, n->sets[FUSED_O], HIDDEN, branch);
    norm_rows(n, branch, &n->k->post_attention_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] = n->x[i] + branch[i];
    norm_rows(n, n->out, &n->k->pre_mlp_norm, normed);
    linear(normed, HIDDEN, n->sets[FUSED_GATE_UP], 2 * ffn, gate_up);
    for (int64_t i = 0; i < TOKENS * ffn; i++) {
        const double *row = gate_up + i / ffn * 2 * ffn + i % ffn;
        inner[i] = gelu(row[0]) * row[ffn];
    }
    linear(inner, ffn, n->sets[FUSED_DOWN], HIDDEN, branch);
    if (n->router)
        add_experts(n, branch);
    norm_rows(n, branch, &n->k->post_mlp_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] += branch[i];
    if (n->input)
        add_input(n);
    double sum = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        sum += n->dout[i] * (n->out[i] *= (double)n->k->scalar);
    return sum;
}

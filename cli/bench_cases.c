/* Which operations are measured, at which sizes: those of one layer of the model. */
#include "cli/bench_builder.h"

#include "base/err.h"
#include "runtime/gemma.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct bench_case *bench_add(struct bench_builder *k, const char *op, bench_run run, const char *fmt, ...)
{
    CHECK(k->n < MAX_CASES);
    struct bench_case *c = &k->list[k->n++];
    const struct gemma_config *g = k->c;
    *c = (struct bench_case){.op = op,
                             .run = run,
                             .norm = {(float)g->rms_norm_eps, true},
                             .heads = {(int)g->n_heads, (int)g->n_kv_heads, (int)g->head_dim},
                             .sequences = {k->tokens / k->length, 0, k->length}};
    va_list args;
    va_start(args, fmt);
    vsnprintf(c->sizes, sizeof c->sizes, fmt, args);
    va_end(args);
    return c;
}

struct operand *bench_operand(struct bench_case *c, enum operand_use use, enum dtype dtype, int64_t rows,
                              int64_t cols)
{
    CHECK(c->n_operands < CASE_OPERANDS);
    struct operand *o = &c->operands[c->n_operands++];
    *o = (struct operand){.use = use, .dtype = dtype, .rows = rows, .cols = cols, .sigma = 1};
    return o;
}

void bench_activations(struct bench_case *c, enum operand_use use, int64_t rows, int64_t cols)
{
    bench_operand(c, use, DTYPE_F32, rows, cols)->activation = true;
}

struct operand *bench_weight(struct bench_case *c, int64_t rows, int64_t cols)
{
    struct operand *o = bench_operand(c, OPERAND_IN, DTYPE_BF16, rows, cols);
    o->sigma = 0.02;
    return o;
}

double bench_bytes(const struct bench_builder *k, const struct bench_case *c)
{
    double bytes = 0;
    for (int i = 0; i < c->n_operands; i++) {
        const struct operand *o = &c->operands[i];
        const size_t unit = dtype_bytes(o->activation ? k->b->activation : o->dtype);
        bytes += (double)(o->rows * o->cols) * (double)unit * (o->use == OPERAND_INOUT ? 2 : 1);
    }
    return bytes;
}

/* --- checks of weights ---------------------------------------------------------------------------------------------- */

static int run_find_nonfinite(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->find_nonfinite(b, &m[0], m[1].data);
}

static int run_zero_nonfinite(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->zero_nonfinite(b, &m[0], m[1].data);
}

static int run_squared_error(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return c->group ? b->core->group_squared_error(b, &m[0], &m[1], c->group, m[2].data)
                    : b->core->squared_error(b, &m[0], &m[1], m[2].data);
}

static void add_weight_checks(struct bench_builder *k)
{
    const int64_t cols = k->c->hidden_size, rows = k->small ? 64 : k->c->intermediate_size, group = 128;
    struct bench_case *c =
        bench_add(k, "find_nonfinite", run_find_nonfinite, "[%lld, %lld]", (long long)rows, (long long)cols);
    bench_weight(c, rows, cols)->fill = FILL_PLANTED;
    bench_operand(c, OPERAND_OUT, DTYPE_I64, 1, 1);
    c->exact = c->alone = true;
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "zero_nonfinite", run_zero_nonfinite, "[%lld, %lld], none", (long long)rows,
                  (long long)cols);
    bench_weight(c, rows, cols)->fill = FILL_PLANTED;
    bench_operand(c, OPERAND_OUT, DTYPE_I64, 1, 1);
    c->exact = c->alone = true;
    c->bytes = bench_bytes(k, c);
    c->operands[0].use = OPERAND_INOUT; /* but nothing is written where nothing is found */
    for (int grouped = 0; grouped < 2; grouped++) {
        c = bench_add(k, grouped ? "group_squared_error" : "squared_error", run_squared_error,
                      "[%lld, %lld]%s", (long long)rows, (long long)cols, grouped ? ", groups of 128" : "");
        bench_weight(c, rows, cols);
        bench_weight(c, rows, cols);
        bench_operand(c, OPERAND_OUT, DTYPE_F64, grouped ? rows : 1,
                      grouped ? (cols + group - 1) / group * 2 : 2);
        c->group = grouped ? group : 0;
        c->alone = true;
        c->bytes = bench_bytes(k, c);
    }
}

/* --- rows of activations -------------------------------------------------------------------------------------------- */

static int run_embed(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return b->core->embed(b, &m[0], m[1].data, sqrtf((float)c->cols), &m[2]);
}

static int run_rms_norm(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return b->core->rms_norm(b, &m[0], &m[1], &c->norm, &m[2]);
}

static int run_add_norm(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return b->core->add_norm(b, &m[0], &m[1], &m[2], &m[3], &c->norm, &m[4]);
}

static int run_geglu(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct mat gate = mat_cols(&m[0], 0, c->cols), up = mat_cols(&m[0], c->cols, c->cols);
    return b->core->geglu(b, &gate, &up, &m[1]);
}

static int run_softcap(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->softcap(b, &m[0], 30);
}

static int run_scale(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->scale(b, 0.5f, &m[0], false, &m[1]);
}

static int run_compare_rows(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->compare_rows(b, &m[0], &m[1], m[2].data, m[3].data);
}

static void add_rows(struct bench_builder *k)
{
    const int64_t n = k->tokens, h = k->c->hidden_size, ffn = k->c->intermediate_size;
    struct bench_case *c = bench_add(k, "embed", run_embed, "%lld of [%lld, %lld]", (long long)n,
                                     (long long)k->vocab, (long long)h);
    bench_weight(c, k->vocab, h);
    struct operand *ids = bench_operand(c, OPERAND_IN, DTYPE_I32, 1, n);
    ids->host = true;
    ids->fill = FILL_IDS;
    ids->limit = k->vocab;
    bench_operand(c, OPERAND_OUT, DTYPE_F32, n, h);
    c->cols = h;
    c->bytes = (double)(n * h) * (2 + 4);
    c = bench_add(k, "rms_norm", run_rms_norm, "[%lld, %lld]", (long long)n, (long long)h);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, h);
    bench_weight(c, 1, h);
    bench_activations(c, OPERAND_OUT, n, h);
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "add_norm", run_add_norm, "[%lld, %lld]", (long long)n, (long long)h);
    bench_activations(c, OPERAND_IN, n, h);
    bench_weight(c, 1, h);
    bench_operand(c, OPERAND_INOUT, DTYPE_F32, n, h);
    bench_weight(c, 1, h);
    bench_activations(c, OPERAND_OUT, n, h);
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "geglu", run_geglu, "[%lld, 2·%lld]", (long long)n, (long long)ffn);
    bench_activations(c, OPERAND_IN, n, 2 * ffn);
    bench_activations(c, OPERAND_OUT, n, ffn);
    c->cols = ffn;
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "scale", run_scale, "[%lld, %lld]", (long long)n, (long long)h);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, h);
    bench_activations(c, OPERAND_OUT, n, h);
    c->bytes = bench_bytes(k, c);
}

static void add_logits(struct bench_builder *k)
{
    const int64_t fitting = (int64_t)k->b->logit_bytes / 4 / k->vocab;
    const int64_t n = k->small ? 8 : fitting < 1 ? 1 : fitting < k->tokens ? fitting : k->tokens;
    struct bench_case *c =
        bench_add(k, "softcap", run_softcap, "[%lld, %lld]", (long long)n, (long long)k->vocab);
    bench_operand(c, OPERAND_INOUT, DTYPE_F32, n, k->vocab)->sigma = 20;
    c->alone = true;
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "compare_rows", run_compare_rows, "2 of [%lld, %lld]", (long long)n,
                  (long long)k->vocab);
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, k->vocab)->sigma = 3;
    bench_operand(c, OPERAND_IN, DTYPE_F32, n, k->vocab)->sigma = 3;
    struct operand *targets = bench_operand(c, OPERAND_IN, DTYPE_I32, 1, n);
    targets->host = true;
    targets->fill = FILL_IDS;
    targets->limit = k->vocab;
    c->bytes = bench_bytes(k, c);
    struct operand *rows =
        bench_operand(c, OPERAND_OUT, DTYPE_F32, n, sizeof(struct row_comparison) / sizeof(float));
    rows->host = true;
    rows->compared = 3; /* nll_a, nll_b, kl; what follows are no floats */
}

/* --- products ------------------------------------------------------------------------------------------------------- */

static int run_gemm(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    (void)c;
    return b->core->gemm(b, &m[0], &m[1], &m[2]);
}

struct qmat bench_packed(const struct bench_case *c, const struct mat *words, const struct mat *scales)
{
    return (struct qmat){
        .packed = *words, .scales = *scales, .bits = c->bits, .group = c->group, .cols = c->cols};
}

static int run_q_gemm(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct qmat w = bench_packed(c, &m[1], &m[2]);
    return b->core->q_gemm(b, &m[0], &w, &m[3]);
}

void bench_packed_weight(struct bench_case *c, enum operand_use use, int64_t rows, int64_t cols)
{
    c->bits = 4;
    c->group = cols < 128 ? cols : 128;
    c->cols = cols;
    bench_operand(c, use, DTYPE_I32, rows, (cols + 7) / 8)->fill = FILL_BITS;
    struct operand *scales = bench_operand(c, use, DTYPE_BF16, rows, (cols + c->group - 1) / c->group);
    scales->mean = 0.003;
    scales->sigma = 0.0004; /* never 0 */
}

/* One product with n rows. Few rows are judged by the weight's bytes. */
static void add_product(struct bench_builder *k, const char *name, bool quantized, int64_t n, int64_t rows,
                        int64_t cols, bool f32)
{
    struct bench_case *c =
        bench_add(k, quantized ? "q_gemm" : "gemm", quantized ? run_q_gemm : run_gemm,
                  "%s [%lld, %lld] × %lld", name, (long long)rows, (long long)cols, (long long)n);
    bench_activations(c, OPERAND_IN, n, cols);
    if (quantized)
        bench_packed_weight(c, OPERAND_IN, rows, cols);
    else
        bench_weight(c, rows, cols);
    if (f32)
        bench_operand(c, OPERAND_OUT, DTYPE_F32, n, rows);
    else
        bench_activations(c, OPERAND_OUT, n, rows);
    c->bytes = bench_bytes(k, c);
    c->flops = n > 16 ? 2.0 * (double)n * (double)rows * (double)cols : 0;
}

void bench_linears(const struct gemma_config *g, struct bench_linear out[BENCH_LINEARS])
{
    const int64_t h = g->hidden_size, q = g->n_heads * g->head_dim, kv = g->n_kv_heads * g->head_dim;
    out[0] = (struct bench_linear){"qkv", q + 2 * kv, h};
    out[1] = (struct bench_linear){"o", h, q};
    out[2] = (struct bench_linear){"gate_up", 2 * g->intermediate_size, h};
    out[3] = (struct bench_linear){"down", h, g->intermediate_size};
}

static void add_products(struct bench_builder *k)
{
    struct bench_linear linears[BENCH_LINEARS];
    bench_linears(k->c, linears);
    for (int quantized = 0; quantized < 2; quantized++)
        for (int one = 0; one < 2; one++)
            for (int i = 0; i < BENCH_LINEARS; i++)
                add_product(k, linears[i].name, quantized, one ? 1 : k->tokens, linears[i].rows,
                            linears[i].cols, false);
    add_product(k, "head", false, 1, k->vocab, k->c->hidden_size, true);
}

/* --- attention ------------------------------------------------------------------------------------------------------ */

static int run_rope_table(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return b->core->rope_table(b, m[0].data, c->sequences.first_position, &m[1]);
}

static int run_split_qkv(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct qkv_spec spec = {c->heads, c->sequences, c->norm, &m[1], &m[1], &m[2], false, false};
    return b->core->split_qkv(b, &spec, &m[0], &m[3], &m[4], &m[5]);
}

static int run_attention(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct attention_spec spec = {c->heads, c->sequences, 1 / sqrtf((float)c->heads.head_dim),
                                        c->window, 0};
    return b->core->attention(b, &spec, &m[0], &m[1], &m[2], &m[3], NULL);
}

/* q, keys, values, out, lse, dout, dq, dkeys, dvalues. */
static int run_attention_backward(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    const struct attention_spec spec = {c->heads, c->sequences, 1 / sqrtf((float)c->heads.head_dim),
                                        c->window, 0};
    const struct attention_tape tape = {m[0], m[1], m[2], m[3], m[4]};
    return b->train->attention_backward(b, &spec, &tape, &m[5], &m[6], &m[7], &m[8]);
}

static void add_positions(struct bench_builder *k)
{
    const int64_t d = k->c->head_dim, q = k->c->n_heads * d, kv = k->c->n_kv_heads * d;
    struct bench_case *c =
        bench_add(k, "rope_table", run_rope_table, "[%lld, %lld]", (long long)k->length, (long long)d);
    struct operand *frequencies = bench_operand(c, OPERAND_IN, DTYPE_F32, 1, d / 2);
    frequencies->host = true;
    frequencies->mean = 0.02; /* angles of some radians */
    frequencies->sigma = 0.005;
    bench_operand(c, OPERAND_OUT, DTYPE_F32, k->length, d);
    c->bytes = bench_bytes(k, c);
    c = bench_add(k, "split_qkv", run_split_qkv, "[%lld, %lld]", (long long)k->tokens,
                  (long long)(q + 2 * kv));
    bench_activations(c, OPERAND_IN, k->tokens, q + 2 * kv);
    bench_weight(c, 1, d);
    bench_operand(c, OPERAND_IN, DTYPE_F32, k->length, d);
    bench_activations(c, OPERAND_OUT, k->tokens, q);
    bench_activations(c, OPERAND_OUT, k->tokens, kv);
    bench_activations(c, OPERAND_OUT, k->tokens, kv);
    c->bytes = bench_bytes(k, c);
}

double bench_attention_pairs(int64_t first_position, int64_t n_new, int64_t window)
{
    double pairs = 0;
    for (int64_t p = first_position + 1; p <= first_position + n_new; p++)
        pairs += (double)(window && window < p ? window : p);
    return pairs;
}

/* n_new tokens of each of n sequences, the last of `length`. */
static void add_attention(struct bench_builder *k, const char *name, int64_t n, int64_t length, int64_t n_new,
                          int64_t window)
{
    const int64_t d = k->c->head_dim, q = k->c->n_heads * d, kv = k->c->n_kv_heads * d;
    struct bench_case *c = bench_add(k, "attention", run_attention, "%s, %lld × %lld of %lld", name,
                                     (long long)n, (long long)n_new, (long long)length);
    const double pairs = (double)n * bench_attention_pairs(length - n_new, n_new, window);
    bench_activations(c, OPERAND_IN, n * n_new, q);
    bench_activations(c, OPERAND_IN, n * length, kv);
    bench_activations(c, OPERAND_IN, n * length, kv);
    bench_activations(c, OPERAND_OUT, n * n_new, q);
    c->sequences = (struct sequences){n, length - n_new, length};
    c->window = window;
    if (n_new > 1)
        c->flops = 4 * (double)q * pairs;
    c->bytes = 2 * pairs * (double)kv *
               (double)dtype_bytes(k->b->activation); /* of one token: keys and values once */
}

/* Whole sequences. */
static void add_attention_backward(struct bench_builder *k, const char *name, int64_t n, int64_t length,
                                   int64_t window)
{
    const int64_t d = k->c->head_dim, q = k->c->n_heads * d, kv = k->c->n_kv_heads * d, tokens = n * length;
    struct bench_case *c = bench_add(k, "attention_backward", run_attention_backward, "%s, %lld × %lld", name,
                                     (long long)n, (long long)length);
    bench_activations(c, OPERAND_IN, tokens, q);
    bench_activations(c, OPERAND_IN, tokens, kv);
    bench_activations(c, OPERAND_IN, tokens, kv);
    bench_activations(c, OPERAND_IN, tokens, q);
    struct operand *lse = bench_operand(c, OPERAND_IN, DTYPE_F32, tokens, k->c->n_heads);
    lse->mean = 7; /* about ln of the keys in reach, as scores of sigma 1 have it */
    lse->sigma = 0.5;
    bench_activations(c, OPERAND_IN, tokens, q);
    bench_activations(c, OPERAND_OUT, tokens, q);
    bench_activations(c, OPERAND_OUT, tokens, kv);
    bench_activations(c, OPERAND_OUT, tokens, kv);
    c->sequences = (struct sequences){n, 0, length};
    c->window = window;
    c->flops = 10 * (double)q * (double)n * bench_attention_pairs(0, length, window); /* five products */
    c->bytes = bench_bytes(k, c);
}

static void add_attentions(struct bench_builder *k)
{
    const int64_t window = k->c->sliding_window, reach = k->small ? window + window / 4 : k->length;
    const int64_t n = k->small ? 1 : k->tokens / k->length, cached = k->small ? window + 40 : 4096;
    add_attention(k, "window", n, reach, reach, window);
    add_attention(k, "global", n, reach, reach, 0);
    add_attention(k, "window", 1, cached, 1, window);
    add_attention(k, "global", 1, cached, 1, 0);
    add_attention_backward(k, "window", n, reach, window);
    add_attention_backward(k, "global", n, reach, 0);
}

/* --- quantizing ----------------------------------------------------------------------------------------------------- */

/* Rows that the pipeline would hand over at a time. */
static int64_t block_rows(const struct backend *b, const struct mat *w)
{
    const int64_t rows = (int64_t)(b->block_bytes / ((size_t)w->cols * dtype_bytes(w->dtype)));
    return rows < 1 ? 1 : rows < w->rows ? rows : w->rows;
}

enum quant_step { FIND_SCALES, QUANTIZE, DEQUANTIZE };

/* w, codes, scales: block by block. */
static int run_quant(const struct backend *b, const struct bench_case *c, const struct mat *m,
                     enum quant_step step)
{
    const struct scale_spec spec = {c->rule, false};
    const int64_t block = block_rows(b, &m[0]);
    int rc = 0;
    for (int64_t row = 0; !rc && row < m[0].rows; row += block) {
        const int64_t n = m[0].rows - row < block ? m[0].rows - row : block;
        const struct mat w = mat_rows(&m[0], row, n), words = mat_rows(&m[1], row, n),
                         scales = mat_rows(&m[2], row, n);
        struct qmat q = bench_packed(c, &words, &scales);
        rc = step == FIND_SCALES ? b->quant->find_scales(b, &w, &spec, &q)
             : step == QUANTIZE  ? b->quant->quantize(b, &w, &q)
                                 : b->quant->dequantize(b, &q, &w);
    }
    return rc;
}

static int run_find_scales(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return run_quant(b, c, m, FIND_SCALES);
}

static int run_quantize(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return run_quant(b, c, m, QUANTIZE);
}

static int run_dequantize(const struct backend *b, const struct bench_case *c, const struct mat *m)
{
    return run_quant(b, c, m, DEQUANTIZE);
}

static void add_quant(struct bench_builder *k)
{
    static const char *const rules[] = {"range", "absmax", "mse"};
    const int64_t cols = k->c->hidden_size, rows = k->small ? 64 : k->c->intermediate_size;
    for (int i = 0; i < 5; i++) {
        static const char *const ops[] = {"find_scales", "find_scales", "find_scales", "quantize",
                                          "dequantize"};
        static const bench_run runs[] = {run_find_scales, run_find_scales, run_find_scales, run_quantize,
                                         run_dequantize};
        struct bench_case *c = bench_add(k, ops[i], runs[i], "%s%s[%lld, %lld]", i < 3 ? rules[i] : "",
                                         i < 3 ? " " : "", (long long)rows, (long long)cols);
        bench_weight(c, rows, cols);
        bench_packed_weight(c, OPERAND_IN, rows, cols);
        c->rule = i < 3 ? (enum scale_rule)i : SCALE_RANGE;
        c->exact = c->alone = true;
        c->bytes = bench_bytes(k, c);
        if (i < 3)
            c->bytes -= (double)(rows * c->operands[1].cols) * 4; /* it leaves the codes alone */
        c->operands[i < 3 ? 2 : i == 3 ? 1 : 0].use = OPERAND_OUT;
    }
}

int bench_cases(struct bench_case out[MAX_CASES], const struct gemma_config *c, const struct backend *b,
                int64_t tokens, bool small)
{
    const int64_t most = 2048, few = 96;
    struct bench_builder k = {.list = out,
                              .c = c,
                              .b = b,
                              .tokens = small && tokens > few ? few : tokens,
                              .vocab = small && c->vocab_size > 4096 ? 4096 : c->vocab_size,
                              .small = small};
    k.length = small ? (k.tokens + 1) / 2 : k.tokens < most ? k.tokens : most;
    k.tokens = k.tokens / k.length * k.length; /* whole sequences */
    add_weight_checks(&k);
    add_rows(&k);
    add_positions(&k);
    add_attentions(&k);
    add_products(&k);
    add_logits(&k);
    add_quant(&k);
    bench_expert_cases(&k);
    bench_train_cases(&k);
    return k.n;
}

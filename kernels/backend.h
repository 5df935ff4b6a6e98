/* The one interface to everything that computes on tensors. A backend is one open device with one stream of
 * work; several may be open on the same device and then run side by side. Operations know dtypes and shapes,
 * never tensor names, configs or files. They do not allocate, and an unsupported shape or dtype is an error
 * that says so, never a slower path taken in silence. The CPU backend is the reference: another one is right
 * when it gives the same result. On the CPU the operations of the forward pass share the backend's threads; the others
 * work on the calling thread, and who wants more of them opens more backends.
 *
 * Shapes: a linear's weight is [rows = out_features, cols = in_features], row-major. `group` consecutive columns
 * of a row share one scale; the last group of a row may be shorter. */
#ifndef GEMCUT_KERNELS_BACKEND_H
#define GEMCUT_KERNELS_BACKEND_H

#include "base/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A view of a row-major matrix; never owns. */
struct mat {
    void *data;
    enum dtype dtype;
    int64_t rows, cols, stride; /* stride: elements from row to row */
};

/* A weight in 4 or 8 bits. The dequantized weight is bf16(q·scale), symmetric, or bf16((q − zero)·scale). */
struct qmat {
    struct mat
        packed; /* I32 [rows, ceil(cols·bits/32)]: element c in bits (c mod 32/bits)·bits, as q + 2^(bits−1);
                          unused high bits of a row's last word are 0 */
    struct mat scales; /* BF16 [rows, groups], finite and non-zero, either sign */
    struct mat zeros;  /* I8 [rows, groups], in q's range; data = NULL when symmetric */
    int bits;          /* 4 or 8; q in [−2^(bits−1), 2^(bits−1) − 1] */
    int64_t group;     /* > 0; = cols for one scale a row */
    int64_t cols;      /* of the weight */
};

/* How a group's scale follows from its weights alone (no calibration). docs/algorithms.md has the formulas. */
enum scale_rule {
    SCALE_RANGE, /* the larger side of the group maps to the lowest code: uses all codes, scale may be negative */
    SCALE_ABSMAX, /* max |w| / (2^(bits−1) − 0.5), as llm-compressor does */
    SCALE_MSE,    /* the candidate around SCALE_RANGE with the least squared error */
};

struct scale_spec {
    enum scale_rule rule;
    bool positive_only; /* for readers that cannot take negative scales */
};

/* Memory on the device; owned by who acquired it. */
struct buf {
    void *ptr;
    size_t bytes;
};

/* How RMSNorm is meant: x / sqrt(mean(x²) + eps) · (unit_offset ? 1 + w : w). */
struct norm_spec {
    float eps;
    bool unit_offset;
};

/* Causal attention of `q.rows` new tokens at positions first_position … over all keys up to their own. */
struct attention_spec {
    int n_heads, n_kv_heads, head_dim; /* query head h reads key/value head h / (n_heads / n_kv_heads) */
    float scale;                       /* of the scores, before softmax */
    int64_t window;                    /* keys a query sees, itself included; 0 = all */
    int64_t first_position; /* of q's first row; keys 0 … first_position + q.rows − 1 are in the cache */
};

/* What the distributions of two models say about one token. */
struct row_comparison {
    float nll_a, nll_b; /* −log p of the target, nats */
    float kl;           /* KL(a ‖ b), nats */
    int32_t top_a, top_b;
};

struct backend;

/* Activations are F32 on the CPU. Weights are BF16, F16 or F32 matrices, or qmats. */
struct core_ops {
    int (*acquire)(const struct backend *b, size_t bytes, const char *what, struct buf *out);
    void (*release)(const struct backend *b, struct buf *buf);
    int (*upload)(const struct backend *b, void *to, const void *from, size_t bytes);
    int (*download)(const struct backend *b, void *to, const void *from, size_t bytes);

    /* *index = row·cols + column of the first NaN or infinity in w, or −1. w: BF16, F16 or F32. */
    int (*find_nonfinite)(const struct mat *w, int64_t *index);
    /* Sets NaNs and infinities to 0 in place; *count = how many. */
    int (*zero_nonfinite)(const struct mat *w, int64_t *count);
    /* Σ (a − b)² and Σ a², in a fixed order. Both BF16, F16 or F32, of equal shape. */
    int (*squared_error)(const struct mat *a, const struct mat *b, double *error, double *reference);

    /* out [ids, hidden] = table[id]·scale. ids are in range. */
    int (*embed)(const struct backend *b, const struct mat *table, const int32_t *ids, float scale,
                 const struct mat *out);
    /* out = (residual or 0) + RMSNorm(x), row by row. w: [cols], NULL = no weight. out may be x or residual. */
    int (*rms_norm)(const struct backend *b, const struct mat *x, const struct mat *w,
                    const struct norm_spec *spec, const struct mat *residual, const struct mat *out);
    /* out [n, rows(w)] = x [n, cols(w)] · wᵀ */
    int (*gemm)(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out);
    int (*q_gemm)(const struct backend *b, const struct mat *x, const struct qmat *w, const struct mat *out);
    /* table [n, 2·half]: cosines, then sines, of position·inv_freq[i] (host, [half]); row r is at first_position + r */
    int (*rope_table)(const struct backend *b, const float *inv_freq, int64_t first_position,
                      const struct mat *table);
    /* Rotates in place every head of x [n, heads·head_dim]: dimension i with i + head_dim/2, by the table's row. */
    int (*rope)(const struct backend *b, const struct mat *x, int head_dim, const struct mat *table);
    /* out [n, heads·head_dim]; keys, values [positions, kv_heads·head_dim] */
    int (*attention)(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                     const struct mat *keys, const struct mat *values, const struct mat *out);
    /* out = gelu_tanh(gate) ⊙ up; out may be gate */
    int (*geglu)(const struct backend *b, const struct mat *gate, const struct mat *up,
                 const struct mat *out);
    /* x = cap·tanh(x / cap) in place */
    int (*softcap)(const struct backend *b, const struct mat *x, float cap);
    /* For every row of logits a (and b, or NULL: then only nll_a and top_a): targets[row] in [0, cols). */
    int (*compare_rows)(const struct backend *b, const struct mat *logits_a, const struct mat *logits_b,
                        const int32_t *targets, struct row_comparison *out);
};

struct quant_ops {
    /* Fills q->scales (and q->zeros when it has data) from w. */
    int (*find_scales)(const struct mat *w, const struct scale_spec *spec, struct qmat *q);
    /* Fills q->packed: round to nearest even of w / scale, clamped. */
    int (*quantize)(const struct mat *w, struct qmat *q);
    /* out: BF16 or F32 [rows, cols], the dequantized weight (its BF16 value in either case). */
    int (*dequantize)(const struct qmat *q, const struct mat *out);
};

struct backend {
    const char *name; /* "cpu" */
    const struct core_ops *core;
    const struct quant_ops *quant;
    void *state; /* the device's own */
};

/* Opens the device of that name: "cpu", or "auto" for the best that this build and machine have. n_threads: how
 * many the CPU's operations of the forward pass may use, the calling one included; 0 = one for each processor. */
int backend_open(struct backend *out, const char *device, int n_threads);
void backend_close(struct backend *b);

#endif

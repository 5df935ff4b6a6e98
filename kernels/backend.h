/* The one interface to everything that computes on tensors. A backend is one open device with one stream of
 * work; several may be open on the same device and then run side by side. Operations know dtypes and shapes,
 * never tensor names, configs or files. An unsupported shape or dtype is an error that says so, never a slower path
 * taken in silence. The CPU backend is the reference: another one is right when it gives the same result. On the CPU
 * the operations of the forward pass share the backend's threads; the others work on the calling thread, and who
 * wants more of them opens more backends.
 *
 * Pointers in mats and qmats, and results marked "device", lie in memory of the device. Operations enqueue on the
 * handle's stream and return; download and stage_out wait for what was enqueued before them, and so do operations that
 * return something to host memory. They allocate nothing, but for one piece of scratch memory that a handle takes with
 * its first product.
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

/* Rows [first, first + n). */
static inline struct mat mat_rows(const struct mat *m, int64_t first, int64_t n)
{
    struct mat v = *m;
    v.data = (char *)m->data + (size_t)(first * m->stride) * dtype_bytes(m->dtype);
    v.rows = n;
    return v;
}

/* Columns [first, first + n). */
static inline struct mat mat_cols(const struct mat *m, int64_t first, int64_t n)
{
    struct mat v = *m;
    v.data = (char *)m->data + (size_t)first * dtype_bytes(m->dtype);
    v.cols = n;
    return v;
}

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
    /* under a Hessian, by search_scales alone: */
    SCALE_WEIGHTED, /* the candidate of least error weighed by its diagonal, … */
    SCALE_BLOCK,    /* … by the block of the group */
};

struct scale_spec {
    enum scale_rule rule;
    bool positive_only; /* for readers that cannot take negative scales */
};

/* How search_scales weighs the errors of a group's weights. */
struct search_spec {
    bool block; /* by the group's block of the Hessian, eHeᵀ; else by its diagonal, Σ Hⱼⱼ·eⱼ² */
    bool positive_only;
};

/* A weight on its way into codes. */
struct rounding {
    const struct mat *w;  /* [rows, cols]: BF16, F16 or F32 */
    const struct qmat *q; /* scales and zero points of all its groups; packed is not used */
    const struct mat
        *codes; /* I8 [rows, cols], columns in the weight's order: q − zero, so ŵ = bf16(code·scale) */
};

enum { SWEEP_COLUMNS = 128 }; /* that sweep_block and descend_block take at a time, at most */

/* A weight whose rounding is tuned: with t = w / scale + v a code is the nearest to t, clamped (less the zero point where
 * there is one), and ŵ = bf16(code·scale). A group's scale is bf16(start·high), its zero point fixed; or, without start,
 * it spans the group's range from least·low to most·high (0 included), as enum scale_rule's SCALE_RANGE has it, with the
 * zero point that follows. */
struct tuning {
    const struct mat *w;          /* [rows, cols]: BF16, F16 or F32 */
    const struct mat *v;          /* F32 [rows, cols], in steps */
    const struct mat *start;      /* BF16 [rows, groups] or NULL */
    const struct mat *low, *high; /* F32 [rows, groups]; low: without start only */
    float lowest, highest;        /* bounds of low and high */
    float distance; /* in steps, < ½: of the start from the centre of a code that is not the nearest */
    bool ends_clip; /* weights at the lowest and highest code count as clipped: PyTorch's clamp since 2.14 */
    const struct qmat *q;       /* scales and zero points of the iterate; packed is not used */
    const struct mat *restored; /* BF16 or F32 [rows, cols]: ŵ of the iterate */
    /* The best iterate so far: */
    const struct mat *codes; /* I8 [rows, cols], q − zero */
    const struct qmat *kept; /* its scales and zero points */
};

/* Sizes of a step of tuning. */
struct tune_rates {
    float v, range;
};

/* Memory on the device; owned by who acquired it. */
struct buf {
    void *ptr;
    size_t bytes;
};

/* What route takes, at most: experts of a layer, and how many of them a token is sent to. */
enum { MAX_EXPERTS = 1024, MAX_CHOSEN = 64 };

/* How RMSNorm is meant: x / sqrt(mean(x²) + eps) · (unit_offset ? 1 + w : w). */
struct norm_spec {
    float eps;
    bool unit_offset;
};

/* A batch of sequences of equal length: row s·n + i of the activations is token i of the n new ones of sequence s,
 * at position first_position + i. Its keys and values are row s·max_positions + position of the cache. */
struct sequences {
    int64_t n; /* sequences */
    int64_t first_position, max_positions;
};

/* Heads of a layer: query head h reads key/value head h / (n_heads / n_kv_heads). */
struct heads {
    int n_heads, n_kv_heads, head_dim;
};

/* From a layer's projections to its queries and its share of the cache. */
struct qkv_spec {
    struct heads heads;
    struct sequences sequences;
    struct norm_spec norm;
    const struct mat *q_norm, *k_norm; /* [1, head_dim]; NULL = not normed */
    const struct mat *rope;            /* [new tokens of a sequence, head_dim], as rope_table makes it */
    bool k_is_v;        /* values are not projected: they are the keys, before these are normed and turned */
    bool values_normed; /* RMSNorm without a weight, head by head */
};

/* Causal attention of the new tokens over all keys of their sequence up to their own. */
struct attention_spec {
    struct heads heads;
    struct sequences sequences;
    float scale;    /* of the scores, before softmax */
    int64_t window; /* keys a query sees, itself included; 0 = all */
    float softcap;  /* scores are softcap·tanh(scale·qk / softcap); 0 = they are scale·qk */
};

/* What attention read and gave, for its backward pass; as struct core_ops has them. */
struct attention_tape {
    struct mat q, keys, values, out, lse;
};

/* What a mixture of experts read and gave, for its router's backward pass; as struct core_ops has them. */
struct route_tape {
    struct mat logits, factors, experts; /* of route; factors.data NULL: 1 */
    struct mat y, slots;                 /* of combine_rows, which had route's weights */
};

/* What the distributions of two models say about one token. */
struct row_comparison {
    float nll_a, nll_b; /* −log p of the target, nats */
    float kl;           /* KL(a ‖ b), nats */
    int32_t top_a, top_b;
};

struct backend;

/* Memory that the host fills or reads and the device computes on: two pieces, between which stage_in and stage_out
 * copy; where the device works on host memory, they are one. */
struct staged_buf {
    void *host, *device;
    size_t bytes;
};

struct device_memory {
    uint64_t free, total;
};

/* Activations ("act") have the backend's activation dtype; the residual stream and logits are F32. Weights are BF16,
 * F16 or F32 matrices, or qmats. */
struct core_ops {
    int (*acquire)(const struct backend *b, size_t bytes, const char *what, struct buf *out);
    void (*release)(const struct backend *b, struct buf *buf);
    int (*acquire_staging)(const struct backend *b, size_t bytes, const char *what, struct staged_buf *out);
    void (*release_staging)(const struct backend *b, struct staged_buf *s);
    /* Memory of the host alone, that copies to and from the device are fast with. */
    int (*acquire_host)(const struct backend *b, size_t bytes, const char *what, struct buf *out);
    void (*release_host)(const struct backend *b, struct buf *buf);
    int (*memory)(const struct backend *b, struct device_memory *out);

    /* Host memory to the device and back. upload may return before the device has the bytes, but no longer needs
     * the host's; stage_in still needs them, until something has waited. */
    int (*upload)(const struct backend *b, void *to, const void *from, size_t bytes);
    int (*download)(const struct backend *b, void *to, const void *from, size_t bytes);
    int (*stage_in)(const struct backend *b, const struct staged_buf *s, size_t offset, size_t bytes);
    int (*stage_out)(const struct backend *b, const struct staged_buf *s, size_t offset, size_t bytes);
    /* From one place on the device to another. */
    int (*copy)(const struct backend *b, void *to, const void *from, size_t bytes);
    /* Waits for everything enqueued. */
    int (*wait)(const struct backend *b);

    /* *index (device) = row·cols + column of the first NaN or infinity in w, or −1. w: BF16, F16 or F32. */
    int (*find_nonfinite)(const struct backend *b, const struct mat *w, int64_t *index);
    /* Sets NaNs and infinities to 0 in place; *count (device) = how many. */
    int (*zero_nonfinite)(const struct backend *b, const struct mat *w, int64_t *count);
    /* sums (device): Σ (x − y)² and Σ x², in a fixed order. Both BF16, F16 or F32, of equal shape. */
    int (*squared_error)(const struct backend *b, const struct mat *x, const struct mat *y, double sums[2]);
    /* squared_error for every group of columns of every row: sums (device) [rows, groups, 2]. */
    int (*group_squared_error)(const struct backend *b, const struct mat *x, const struct mat *y,
                               int64_t group, double *sums);
    /* *sum (device): Σ x⊙y, in a fixed order. BF16, F16 or F32, of equal shape. */
    int (*dot)(const struct backend *b, const struct mat *x, const struct mat *y, double *sum);
    /* Every element = 0. Any dtype. */
    int (*zero)(const struct backend *b, const struct mat *m);

    /* out F32 [ids, hidden] = table[id]·scale. ids: on the host, in range. */
    int (*embed)(const struct backend *b, const struct mat *table, const int32_t *ids, float scale,
                 const struct mat *out);
    /* out = RMSNorm(x), row by row. x, out: F32 or act; w: [1, cols], NULL = no weight. out may be x. */
    int (*rms_norm)(const struct backend *b, const struct mat *x, const struct mat *w,
                    const struct norm_spec *spec, const struct mat *out);
    /* What stands between two branches: x += RMSNorm(branch)·branch_norm, then out = RMSNorm(x)·next_norm.
     * x: F32; branch, out: act. */
    int (*add_norm)(const struct backend *b, const struct mat *branch, const struct mat *branch_norm,
                    const struct mat *x, const struct mat *next_norm, const struct norm_spec *spec,
                    const struct mat *out);
    /* out [n, rows(w)] = x [n, cols(w)] · wᵀ. x: act; out: act or F32. Where act is BF16, w is rounded to BF16 too. */
    int (*gemm)(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out);
    int (*q_gemm)(const struct backend *b, const struct mat *x, const struct qmat *w, const struct mat *out);
    /* out F32 [n, cols] = (add ? out : 0) + alpha·x [n, k]·m [k, cols], whatever the activation type: accurate to 2⁻¹⁶
     * of the operands or better. x: BF16, F16, F32 or I8; m: F32, or where x is BF16 also BF16. */
    int (*matmul)(const struct backend *b, float alpha, const struct mat *x, const struct mat *m, bool add,
                  const struct mat *out);
    /* table F32 [n, 2·half]: cosines, then sines, of position·inv_freq[i] (host, [half]); row r is at
     * first_position + r */
    int (*rope_table)(const struct backend *b, const float *inv_freq, int64_t first_position,
                      const struct mat *table);
    /* qkv act [tokens, (n_heads + 2·n_kv_heads)·head_dim], queries, keys, values: norms the heads of the first two,
     * turns them (dimension i with i + head_dim/2, by the table's row), puts q [tokens, n_heads·head_dim] where it
     * says and keys and values into the cache [sequences·max_positions, n_kv_heads·head_dim]. With k_is_v, qkv has no
     * values. keys and values NULL: queries alone, in qkv too. All act. */
    int (*split_qkv)(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                     const struct mat *q, const struct mat *keys, const struct mat *values);
    /* out [tokens, n_heads·head_dim]; keys, values: the cache. All act. lse F32 [tokens, n_heads] or NULL: of every query
     * the logarithm of its softmax's sum, ln Σ exp(score). */
    int (*attention)(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                     const struct mat *keys, const struct mat *values, const struct mat *out,
                     const struct mat *lse);
    /* out = gelu_tanh(gate) ⊙ up; out may be gate. All act. */
    int (*geglu)(const struct backend *b, const struct mat *gate, const struct mat *up,
                 const struct mat *out);
    /* out = x / rms(y), row by row, y's columns being others than x's; where y is 0, 0. All act. */
    int (*over_norm)(const struct backend *b, const struct mat *x, const struct mat *y,
                     const struct mat *out);
    /* Mixtures of experts. Of each row of logits F32 [tokens, n_experts] the k greatest, of equals the first: experts I32
     * [tokens, k] in ascending order, weights F32 [tokens, k] = softmax over the chosen ones alone, times
     * factors[expert] ([1, n_experts]: BF16, F16 or F32; NULL: 1). A row with a NaN gets experts 0 … k − 1 and weights
     * of NaN; so does, in its weights, one whose greatest logit is infinite. */
    int (*route)(const struct backend *b, const struct mat *logits, const struct mat *factors,
                 const struct mat *experts, const struct mat *weights);
    /* out[i] = x[rows[i]]·factors[i]. x, out: F32 or act; rows: I32 [1, n] on the device, in range, NULL: i; factors:
     * F32 [1, n] on the device, NULL: 1. out may be x where rows is NULL. */
    int (*gather_rows)(const struct backend *b, const struct mat *x, const struct mat *rows,
                       const struct mat *factors, const struct mat *out);
    /* out[t] = Σ_j weights[t, j]·y[slots[t, j]], j ascending, in FP32. y, out: act, not the same; slots: I32 [tokens, k],
     * rows of y; weights: F32 [tokens, k], NULL: 1. k > 0 */
    int (*combine_rows)(const struct backend *b, const struct mat *y, const struct mat *slots,
                        const struct mat *weights, const struct mat *out);
    /* x = cap·tanh(x / cap) in place, F32 */
    int (*softcap)(const struct backend *b, const struct mat *x, float cap);
    /* out = (add ? out : 0) + factor·x. x, out: F32 or act; out may be x. */
    int (*scale)(const struct backend *b, float factor, const struct mat *x, bool add, const struct mat *out);
    /* For every row of logits a (and b, or NULL: then only nll_a and top_a), F32: targets[row] in [0, cols).
     * targets and out: on the host. */
    int (*compare_rows)(const struct backend *b, const struct mat *logits_a, const struct mat *logits_b,
                        const int32_t *targets, struct row_comparison *out);
    /* For every row of logits F32 [n, cols] a token drawn from softmax(logits / temperature): the column with the
     * greatest (logit − highest)/temperature + g, of equals the first. g = −log(−log(1 − v)) (Gumbel), v = (h + ½)·2⁻³²,
     * and h is 32 bits of a hash of seed + row, step and column: rows of a matrix that is cut draw the same tokens when
     * seed grows by the first row. temperature 0: the greatest logit. A row with a NaN or without a finite maximum is
     * ERR_FORMAT. out [n]: on the host. */
    int (*sample_rows)(const struct backend *b, const struct mat *logits, float temperature, uint64_t seed,
                       int64_t step, int32_t *out);
};

struct quant_ops {
    /* Fills q->scales (and q->zeros when it has data) from w. */
    int (*find_scales)(const struct backend *b, const struct mat *w, const struct scale_spec *spec,
                       struct qmat *q);
    /* Fills q->packed: round to nearest even of w / scale, clamped. */
    int (*quantize)(const struct backend *b, const struct mat *w, struct qmat *q);
    /* out: BF16 or F32 [rows, cols], the dequantized weight (its BF16 value in either case). */
    int (*dequantize)(const struct backend *b, const struct qmat *q, const struct mat *out);

    /* What calibrated methods consist of. H, the Hessian of a linear's inputs x, is Σ xᵀx, F32 [cols, cols]; of two
     * columns i and j in different 128-column blocks, hessian_add may leave out the pair above the diagonal (i < j),
     * and hessian_finish puts it there. */
    int (*hessian_add)(const struct backend *b, const struct mat *x, const struct mat *h);
    int (*hessian_finish)(const struct backend *b, const struct mat *h);
    /* to (host, [cols]): the diagonal */
    int (*diagonal)(const struct backend *b, const struct mat *h, float *to);
    /* h += value·I */
    int (*add_diagonal)(const struct backend *b, const struct mat *h, float value);
    /* P(H + added·I)Pᵀ = M·D·Mᵀ with M unit upper triangular, P putting column order[j] at place j (order: I32 [1, cols]).
     * factor F32 [cols, cols] = M; below its diagonal anything. In FP64; work: F64 [cols, cols]. *definite (host) = 0
     * where the matrix is not positive definite. */
    int (*factorize)(const struct backend *b, const struct mat *h, const struct mat *order, float added,
                     const struct mat *work, const struct mat *factor, int *definite);
    /* Fills q->scales (and q->zeros when it has data) with the candidates of least weighed squared error. */
    int (*search_scales)(const struct backend *b, const struct mat *w, const struct mat *h,
                         const struct search_spec *spec, const struct qmat *q);
    /* codes = the nearest, as quantize has them */
    int (*round_codes)(const struct backend *b, const struct rounding *r);
    /* GPTQ, places [first, first + errors->cols) of the order: with t = w + feedback (F32 [rows, cols], by place; taken
     * as it is for these columns), place by place the nearest code of t, the error e = w − ŵ, and t += e·factor[j, k] at
     * the places k behind it in this block. errors F32 [rows, n] = e. */
    int (*sweep_block)(const struct backend *b, const struct rounding *r, const struct mat *order,
                       const struct mat *factor, const struct mat *feedback, int64_t first,
                       const struct mat *errors);
    /* Coordinate descent, columns [first, first + changes->cols), with g = gradient[:, column] + feedback (F32 [rows, n]),
     * gradient F32 [rows, cols] = (w − ŵ)·H. Group by group: where the block holds all of it, first the scale of least
     * error for its codes c, s += g·c / cHcᵀ, rounded as it is stored and of the same sign, if it lowers the error; then
     * column by column the code nearest to code + g / (Hⱼⱼ·scale). What changes is taken off g, change·h[j, k], at the
     * columns k behind it in this block, for a scale in its own group too. changes BF16 [rows, n] = ŵ after − ŵ before, rounded.
     * Columns with Hⱼⱼ = 0 keep their codes. Groups are multiples of 32 columns or whole rows, and so is first. */
    int (*descend_block)(const struct backend *b, const struct rounding *r, const struct mat *h,
                         const struct mat *gradient, const struct mat *feedback, int64_t first,
                         const struct mat *changes);
    /* out F32 [rows, groups] = Σ over the group's columns of x⊙codes; x F32, codes I8 [rows, cols] */
    int (*group_dots)(const struct backend *b, const struct mat *x, const struct mat *codes, int64_t group,
                      const struct mat *out);
    /* Scales of least squared error for given codes, row by row: f(s) = s·A·sᵀ − 2·s·bᵀ with a F32 [rows, groups²], of
     * which the triangle j ≥ i of [i, j] is given and everything overwritten, and rhs F32 [rows, groups] = b. A row's
     * new scales, rounded as they are stored, stay only where they lower f; their signs are free unless positive_only.
     * *n_kept (device): rows that got new ones. */
    int (*solve_scales)(const struct backend *b, const struct mat *a, const struct mat *rhs,
                        bool positive_only, const struct qmat *q, int64_t *n_kept);
    /* out F32 [rows, cols] = w − ŵ */
    int (*residual)(const struct backend *b, const struct rounding *r, const struct mat *out);
    /* *count (device) = weights that lie beyond their group's codes by more than half a step */
    int (*count_clipped)(const struct backend *b, const struct rounding *r, int64_t *count);
    /* q->packed = codes + zero, as quantize writes them; bits beyond a row's last column are 0 */
    int (*pack_codes)(const struct backend *b, const struct mat *codes, const struct qmat *q);
};

/* Gradients of the forward pass, each of a loss by what the operation reads, given that by its result (dy, dout), and
 * what tunes a block's rounding by them. Gradients have the backend's activation dtype where nothing is said. */
struct train_ops {
    /* out [n, cols] = (add ? out : 0) + dy [n, rows]·w. w [rows, cols]: as gemm takes it */
    int (*gemm_dgrad)(const struct backend *b, const struct mat *dy, const struct mat *w, bool add,
                      const struct mat *out);
    /* dw F32 [rows, cols] = (add ? dw : 0) + dyᵀ·x. dy [n, rows], x [n, cols]: act */
    int (*gemm_wgrad)(const struct backend *b, const struct mat *dy, const struct mat *x, bool add,
                      const struct mat *dw);
    /* out = (add ? add : 0) + the gradient by x of RMSNorm(x) with weight w. x, dy, out: F32 or act; add: F32 or NULL.
     * out may be dy or add. */
    int (*rms_norm_backward)(const struct backend *b, const struct mat *x, const struct mat *w,
                             const struct norm_spec *spec, const struct mat *dy, const struct mat *add,
                             const struct mat *out);
    /* dgate and dup may be gate and up. All act. */
    int (*geglu_backward)(const struct backend *b, const struct mat *gate, const struct mat *up,
                          const struct mat *dy, const struct mat *dgate, const struct mat *dup);
    /* dq, dkeys, dvalues as split_qkv's results lie; qkv: what it read. dqkv may be qkv. dkeys and dvalues NULL: queries
     * alone. All act. */
    int (*split_qkv_backward)(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                              const struct mat *dq, const struct mat *dkeys, const struct mat *dvalues,
                              const struct mat *dqkv);
    /* Of whole sequences (first_position 0): q, keys, values, out, lse as the forward pass had them. dkeys and dvalues lie
     * as the cache does; every row of the sequences' tokens is written. All act, lse F32. */
    int (*attention_backward)(const struct backend *b, const struct attention_spec *spec,
                              const struct attention_tape *tape, const struct mat *dout, const struct mat *dq,
                              const struct mat *dkeys, const struct mat *dvalues);
    /* dlogits F32 [tokens, n_experts], which may be the tape's logits: by the router's logits, given dout (act) by
     * combine_rows' result; 0 for experts that were not chosen. */
    int (*route_backward)(const struct backend *b, const struct route_tape *tape, const struct mat *dout,
                          const struct mat *dlogits);
    /* *sum (device) += Σ (y − target)², in a fixed order; dy = factor·(y − target). y, target, dy: F32; dy may be y, or
     * NULL. */
    int (*error_backward)(const struct backend *b, const struct mat *y, const struct mat *target,
                          float factor, double *sum, const struct mat *dy);
    /* *improved = *loss < *best, and then *best = *loss. All on the device. */
    int (*keep_best)(const struct backend *b, const double *loss, double *best, int32_t *improved);
    /* The start of a tuning: low and high 1; v = 0, or with codes (I8 [rows, cols], q − zero, under t->start) where a code
     * is not the nearest to w / start, what brings t to t->distance from it, on w's side. */
    int (*tune_begin)(const struct backend *b, const struct tuning *t, const struct mat *codes);
    /* First, where keep (device) is given and not 0, the iterate becomes the best one. Then, with a gradient by ŵ, F32
     * [rows, cols], one step of SignSGD: v −= rates->v·sign, low and high −= rates->range·sign, each by its own gradient
     * (straight through roundings; through clamping as far as its bounds, see docs/algorithms.md), low and high
     * clamped. Last, q and restored of the new iterate. */
    int (*tune_step)(const struct backend *b, const struct tuning *t, const struct mat *gradient,
                     const struct tune_rates *rates, const int32_t *keep);
};

struct backend {
    const char *name; /* "cpu" or "cuda" */
    const struct core_ops *core;
    const struct quant_ops *quant;
    const struct train_ops *train;
    enum dtype activation;
    bool host_memory; /* the device works on memory of the host */
    int ordinal;      /* of several devices of a kind */
    int64_t
        batch_tokens; /* tokens of a forward pass that are worth having at a time; 1 = a sequence is enough */
    size_t
        block_bytes; /* of a weight that quant_ops should get at a time: what stays in cache, or fills the device */
    size_t scratch_bytes; /* that the first product takes */
    size_t logit_bytes;   /* of logits that are worth having at a time */
    void *state;          /* the device's own */
};

/* Opens the device of that name: "cpu", "cuda:0" …, or "auto" for the best that this build and machine have.
 * n_threads: how many the CPU's operations of the forward pass may use, the calling one included; 0 = one for each
 * processor. */
int backend_open(struct backend *out, const char *device, int n_threads);
void backend_close(struct backend *b);

/* Another handle on b's device, with a stream of its own and one thread. */
int backend_open_beside(struct backend *out, const struct backend *b);

/* Several pieces of staged memory, those of 0 bytes left out; what was acquired before a failure is released with the
 * rest. `place` is zeroed memory, and zeroed again by the release. */
struct staged_need {
    struct staged_buf *place;
    size_t bytes;
    const char *what;
};
int backend_acquire_staged(const struct backend *b, const struct staged_need *needs, size_t n);
void backend_release_staged(const struct backend *b, struct staged_buf *const *places, size_t n);

/* What "auto" and shorter forms stand for, e.g. "cuda:0", and the device in words, e.g. "NVIDIA H100 80GB HBM3". */
enum { DEVICE_TEXT_BYTES = 256 };
int backend_resolve(const char *device, char name[DEVICE_TEXT_BYTES], char title[DEVICE_TEXT_BYTES]);

#endif

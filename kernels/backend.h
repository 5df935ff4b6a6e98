/* The one interface to everything that computes on tensors. A backend is one open device with one stream of
 * work; several may be open on the same device and then run side by side. Operations know dtypes and shapes,
 * never tensor names, configs or files. They do not allocate, and an unsupported shape or dtype is an error
 * that says so, never a slower path taken in silence. The CPU backend is the reference: another one is right
 * when it gives the same result. Inside an operation the CPU backend works on the calling thread; who wants
 * more threads opens a backend for each.
 *
 * Shapes: a linear's weight is [rows = out_features, cols = in_features], row-major. `group` consecutive columns
 * of a row share one scale; the last group of a row may be shorter. */
#ifndef GEMCUT_KERNELS_BACKEND_H
#define GEMCUT_KERNELS_BACKEND_H

#include "base/dtype.h"

#include <stdbool.h>
#include <stdint.h>

/* A view of a row-major matrix; never owns. */
struct mat {
    void *data;
    enum dtype dtype;
    int64_t rows, cols, stride; /* stride: elements from row to row */
};

/* A weight in 4 or 8 bits. The dequantized weight is bf16(q·scale), symmetric, or bf16((q − zero)·scale). */
struct qmat {
    struct mat packed; /* I32 [rows, ceil(cols·bits/32)]: element c in bits (c mod 32/bits)·bits, as q + 2^(bits−1);
                          unused high bits of a row's last word are 0 */
    struct mat scales; /* BF16 [rows, groups], finite and non-zero, either sign */
    struct mat zeros;  /* I8 [rows, groups], in q's range; data = NULL when symmetric */
    int bits;          /* 4 or 8; q in [−2^(bits−1), 2^(bits−1) − 1] */
    int64_t group;     /* > 0; = cols for one scale a row */
    int64_t cols;      /* of the weight */
};

/* How a group's scale follows from its weights alone (no calibration). docs/algorithms.md has the formulas. */
enum scale_rule {
    SCALE_RANGE,  /* the larger side of the group maps to the lowest code: uses all codes, scale may be negative */
    SCALE_ABSMAX, /* max |w| / (2^(bits−1) − 0.5), as llm-compressor does */
    SCALE_MSE,    /* the candidate around SCALE_RANGE with the least squared error */
};

struct scale_spec {
    enum scale_rule rule;
    bool positive_only; /* for readers that cannot take negative scales */
};

struct core_ops {
    /* *index = row·cols + column of the first NaN or infinity in w, or −1. w: BF16, F16 or F32. */
    int (*find_nonfinite)(const struct mat *w, int64_t *index);
    /* Sets NaNs and infinities to 0 in place; *count = how many. */
    int (*zero_nonfinite)(const struct mat *w, int64_t *count);
    /* Σ (a − b)² and Σ a², in a fixed order. Both BF16, F16 or F32, of equal shape. */
    int (*squared_error)(const struct mat *a, const struct mat *b, double *error, double *reference);
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
};

/* Opens the device of that name: "cpu", or "auto" for the best that this build and machine have. */
int backend_open(struct backend *out, const char *device);
void backend_close(struct backend *b);

#endif

/* GPTQ (Frantar et al. 2022, arXiv 2210.17323) for linears that read the same inputs, then
 * refinement by coordinate descent over scales and codes.
 *
 * With e = w − ŵ the error of a row and H = Σ xᵀx over the calibration's inputs, a row's output error is eHeᵀ. Where the
 * original takes columns off an inverse, here H = M·D·Mᵀ with M unit upper triangular: eHeᵀ = Σ Dⱼ·(eM)ⱼ², and going
 * from left to right each column makes its own term least:
 *     ŵⱼ = nearest(wⱼ + Σ_{k<j} eₖ·Mₖⱼ)
 * This is the same result (LDLQ, Chee et al. 2023, arXiv 2307.13304) from one factorization. Columns are visited in
 * descending order of Hⱼⱼ; their groups stay those of the weight, so the order leaves no trace in the file. */
#ifndef GEMCUT_QUANTIZE_GPTQ_H
#define GEMCUT_QUANTIZE_GPTQ_H

#include "quantize/work.h"

struct gptq_options {
    bool sweep;         /* false: codes are the nearest, under scales that are searched all the same */
    bool natural_order; /* columns as they stand */
    double damping;     /* added to the diagonal, as a share of its mean; raised where that is not enough */
    int passes;         /* of refinement, over scales and codes */
    struct search_spec search;
    enum scale_rule scales; /* SCALE_WEIGHTED or SCALE_BLOCK: searched; others: from the weights alone */
};

/* What became of one weight. Squared output errors are shares of that of an output of zeros, Σ|(W − Ŵ)x|² / Σ|Wx|². */
struct gptq_stats {
    double nearest_error, error; /* with nearest codes under the same scales; as it is written */
    double weight_error;         /* Σ(w − ŵ)² / Σw² */
    double damping;              /* that it took */
    double clipped;   /* share of weights that lie beyond their group's codes by more than half a step */
    int64_t n_dead;   /* inputs that were always zero */
    int64_t n_tokens; /* that the router sent, where it is an expert's; not known here: 0 */
};

struct gptq;

/* The largest sets of linears that will come: rows together, cols, columns of a group. */
struct gptq_size {
    int64_t rows, cols, group;
};

/* Memory for any of these sizes is taken from b. The clock is told what it does. */
int gptq_open(struct gptq **out, const struct backend *b, const struct gptq_options *options,
              const struct gptq_size *sizes, size_t n, struct work_clock *clock);
void gptq_close(struct gptq *g);
uint64_t gptq_bytes(enum dtype activation, const struct gptq_size *sizes, size_t n);
uint64_t gptq_hessian_bytes(const struct gptq_size *sizes,
                            size_t n); /* of the largest Hessian, which is the caller's */

/* Takes a finished Hessian F32 [cols, cols]: damps it in place, for all that follows, since directions that hardly any
 * input had must not cost nothing; finds the order of its columns and its factor. Inputs that were not finite, and a
 * matrix that no damping up to its mean diagonal makes positive definite, are ERR_FORMAT. */
int gptq_prepare(struct gptq *g, const struct mat *h);

/* Several linears as one weight, one below the other. */
enum { GPTQ_MAX_PARTS = 3 };
struct gptq_parts {
    int n;
    int64_t rows[GPTQ_MAX_PARTS];
};

/* Quantizes a weight [rows, cols] whose inputs the last gptq_prepare saw: fills q's codes, scales and zero points, and
 * stats for each of its parts. codes: I8 [rows, cols] or NULL; they are left there as well, q − zero. */
int gptq_quantize(struct gptq *g, const struct mat *w, const struct qmat *q, const struct gptq_parts *parts,
                  const struct mat *codes, struct gptq_stats *stats);

#endif

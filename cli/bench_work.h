/* What a calibrated run has to compute, by kind of work, and how fast this device does such work when it does nothing
 * else. */
#ifndef GEMCUT_CLI_BENCH_WORK_H
#define GEMCUT_CLI_BENCH_WORK_H

#include "cli/bench.h"
#include "quantize/work.h"
#include "runtime/model.h"

/* What amounts of a kind of work are counted in. */
enum bench_unit { UNIT_BYTES, UNIT_FLOP, UNIT_TRIALS /* of a scale on a weight */ };

extern const enum bench_unit bench_work_units[N_WORK];

/* The calibration's pass. */
struct bench_pass {
    int64_t samples, length;
    bool keep_inner; /* the down projection's inputs are kept, so gate and up run once */
    int64_t n_ids;   /* different ones, where layers have inputs of their own */
};

/* Amounts of every kind. With T = samples·length tokens, and for each set of linears with the same inputs (q/k/v, o,
 * gate/up, down) N = rows of all of them and K = columns:
 *     load      bytes of the weights, the embedding among them, but of the layers' table only the rows that occur
 *     forward   2·N·K·T, but not down of the last block, and gate/up twice where its results are not kept;
 *               4·heads·head_dim for each pair of query and key; with a tuning all of that once for the reference and,
 *               but for the last block, once behind it, and for a start from codes, set by set, all but down once more
 *     hessian   K²·T, one triangle of 2·K²·T; for o and down, whose inputs are weighed by their outputs, 2·N·K·T too
 *     factor    K³/3 in FP64, gptq alone
 *     search    candidates·N·K
 *     measure   3 · 2·N·K²: W·H, and the gradient with nearest codes and at the end
 *     sweep     N·K², the triangle behind each column; gptq alone
 *     refit     0, scales being fitted in the descent; for groups beyond SWEEP_COLUMNS, which are not, (P + 1)·N·K² where
 *               there are P > 0 passes of refinement: a triangle before each and one at the end
 *     descend   (2·P + 1)·N·K²: a gradient, then its update in each pass, of which the last needs only a triangle; for the
 *               longer groups 3·P·N·K², a gradient and a triangle in each
 *     tune      t = tokens of a mini-batch: 2·N·K·t forward, 2·N·K·t by the weights and, but for q/k/v, 2·N·K·t by the
 *               inputs; 4·heads·head_dim for each pair, and 10 on the way back; times iterations, and forward alone once
 *               more where the last iterate is judged
 *     deliver   bytes of codes, scales and zero points
 * What comes of Hessians is 0 for a tuning that begins without codes.
 * What is small beside these is left out: norms, what blocks of columns do within themselves, the rows of <bos>. */
void bench_work_count(double out[N_WORK], const struct model *m, const struct recipe_plan *plan,
                      const struct recipe *recipe, const struct bench_pass *pass);

/* What each kind is judged by, in its unit a second; 0: by nothing. */
struct bench_bounds {
    double rates[N_WORK];
};

/* Measures them at the model's sizes; rates that are there are raised when higher ones are found.
 *     forward, tune            gemm [many tokens, hidden]·[2·intermediate, hidden]ᵀ
 *     hessian                  hessian_add at K = intermediate, as many tokens
 *     factor                   factorize at K = intermediate
 *     sweep, measure, descend  matmul FP32 [2·intermediate, 512]·[512, hidden], as many additions as FP32 would take
 *     refit                    the same with codes for the left matrix
 *     load, deliver            upload and download of 256 MiB of pinned memory; by nothing on the CPU */
int bench_bounds_measure(const struct backend *b, struct parallel *pool, const struct gemma_config *g,
                         struct bench_bounds *out);

/* The settings of a shape. Release with gemma_config_free. */
int bench_shape_config(const struct bench_shape *shape, struct gemma_config *out);

#endif

/* A quantized linear of any layout as the kernels take it: codes by rows, scales, zero points in the codes' range. Only
 * as much is read at a time as the caller asks for. */
#ifndef GEMCUT_RUNTIME_PACKED_H
#define GEMCUT_RUNTIME_PACKED_H

#include "runtime/model.h"

/* Runs of rows begin at a multiple of this and have a multiple of it, unless they reach the end. */
enum { PACKED_ROWS = 8 };

/* Codes of rows [row, row + n): packed [n, words], low bits first, as q + 2^(bits−1). */
int packed_read_codes(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                      uint32_t *packed);

/* Scales and zero points of the same, [n, groups]. zeros: where l->zeros is there; else it may be NULL. */
int packed_read_steps(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                      float *scales, int8_t *zeros);

/* The steps of all rows, in fresh memory; *zeros is NULL when the linear is symmetric. */
int packed_read_all_steps(const struct model *m, const struct model_linear *l, float **scales,
                          int8_t **zeros);

/* Weights of rows [row, row + n): out [n, cols] BF16, bf16((code − zero) · scale) with the product in FP32. */
int packed_read_weights(const struct model *m, const struct model_linear *l, int64_t row, int64_t n,
                        uint16_t *out);

/* The view of rows [row, row + n) that the kernels take; scales and zeros are those of the whole linear. */
struct qmat packed_qmat(const struct model_linear *l, int64_t row, int64_t n, uint32_t *packed,
                        uint16_t *scales, int8_t *zeros);

/* Looks at what shapes do not show: scales that are no numbers, zero points out of range, columns whose groups are not
 * in order; and fills l->direct. 1: *object is at fault, as the message says. */
enum { PACKED_MESSAGE_BYTES = 256 };
int packed_check(const struct model *m, struct model_linear *l, const struct tensor **object,
                 char message[PACKED_MESSAGE_BYTES]);

#endif

/* Packed linears in the layouts of others, to and from ours: codes [rows, words] by rows, low bits first, as
 * q + 2^(bits−1); zero points as int8 in the codes' range, [rows, groups]; scales as floats, [rows, groups]. In memory of
 * the host; a linear may come in runs of rows. quant_config.h names the tensors.
 * Sources: intel/auto-round, auto_round_extension/torch/qlinear_torch_zp.py; ModelCloud/GPTQModel, nn_modules/qlinear
 * (GPTQ, both versions of its zero points); casper-hansen/AutoAWQ, modules/linear/gemm.py (AWQ's order). */
#ifndef GEMCUT_FORMATS_QUANT_LAYOUT_H
#define GEMCUT_FORMATS_QUANT_LAYOUT_H

#include "base/dtype.h"
#include "formats/quant_config.h"

/* from [rows, cols] without gaps; element (r, c) goes to to[c·to_stride + r]. GPTQ's words are ours transposed. */
void layout_transpose(const uint32_t *from, int64_t rows, int64_t cols, uint32_t *to, int64_t to_stride);

/* GPTQ's zero points. words: [groups, rows·bits/32], packed along the rows, less `bias` (quant_config.zero_bias).
 * zeros NULL: symmetric, all 0. Unpacking returns the first index r·groups + g where stored + bias has no place in the
 * bits, −1 when all have one. */
void layout_pack_zeros(struct quant_scheme s, const int8_t *zeros, int64_t rows, int64_t groups, int bias,
                       uint32_t *words);
int64_t layout_unpack_zeros(struct quant_scheme s, const uint32_t *words, int64_t rows, int64_t groups,
                            int bias, int8_t *zeros);

/* AWQ, 4 bits. Codes of 8·n rows: from [cols, n] → packed [8·n, words]; zero points: from [groups, rows/8]. */
void layout_unpack_awq(const uint32_t *from, int64_t cols, int64_t n, uint32_t *packed, int64_t words);
void layout_unpack_awq_zeros(const uint32_t *from, int64_t rows, int64_t groups, int8_t *zeros);

/* Scales of any float type, [rows, groups] or (transposed) [groups, rows] → floats [rows, groups]. */
void layout_read_scales(const void *from, enum dtype dtype, int64_t rows, int64_t groups, bool transposed,
                        float *scales);

/* The other way, to BF16 or F16. Returns the first index r·groups + g whose value the type does not have exactly,
 * −1 when it has all; NaNs count as missing. out may be NULL to ask only that. */
int64_t layout_write_scales(const float *scales, int64_t rows, int64_t groups, bool transposed,
                            enum dtype dtype, uint16_t *out);

/* Weights of n rows: bf16((code − zero) · scale), the product in FP32. packed [n, words], scales and zeros (NULL: all 0)
 * [n, groups], out [n, cols]. */
void layout_dequantize(struct quant_scheme s, const uint32_t *packed, const float *scales,
                       const int8_t *zeros, int64_t n, int64_t cols, uint16_t *out);

#endif

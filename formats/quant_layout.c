#include "formats/quant_layout.h"

#include "base/err.h"
#include "base/half.h"

#include <string.h>

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

void layout_transpose(const uint32_t *from, int64_t rows, int64_t cols, uint32_t *to, int64_t to_stride)
{
    enum { BLOCK = 16 }; /* words of a line of cache, in both directions */
    for (int64_t r = 0; r < rows; r += BLOCK)
        for (int64_t c = 0; c < cols; c += BLOCK) {
            const int64_t r_end = min64(r + BLOCK, rows), c_end = min64(c + BLOCK, cols);
            for (int64_t j = c; j < c_end; j++)
                for (int64_t i = r; i < r_end; i++)
                    to[j * to_stride + i] = from[i * cols + j];
        }
}

/* --- zero points ------------------------------------------------------------------------------------------------ */

void layout_pack_zeros(struct quant_scheme s, const int8_t *zeros, int64_t rows, int64_t groups, int bias,
                       uint32_t *words)
{
    const int64_t per_word = 32 / s.bits, n_words = quant_zero_rows(s, rows);
    const int32_t half = 1 << (s.bits - 1), mask = (1 << s.bits) - 1;
    memset(words, 0, (size_t)(groups * n_words) * sizeof *words);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const int32_t zero = zeros ? zeros[r * groups + g] : 0;
            words[g * n_words + r / per_word] |= (uint32_t)((zero + half - bias) & mask)
                                                 << r % per_word * s.bits;
        }
}

int64_t layout_unpack_zeros(struct quant_scheme s, const uint32_t *words, int64_t rows, int64_t groups,
                            int bias, int8_t *zeros)
{
    const int64_t per_word = 32 / s.bits, n_words = quant_zero_rows(s, rows);
    const int32_t half = 1 << (s.bits - 1), mask = (1 << s.bits) - 1;
    int64_t bad = -1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const int32_t stored =
                (int32_t)(words[g * n_words + r / per_word] >> r % per_word * s.bits) & mask;
            if (stored + bias > mask && bad < 0)
                bad = r * groups + g;
            zeros[r * groups + g] = (int8_t)(((stored + bias) & mask) - half);
        }
    return bad;
}

/* --- AWQ -------------------------------------------------------------------------------------------------------- */

/* Nibble i of a word holds the row 8·word + awq_order[i]. */
static const int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};

void layout_unpack_awq(const uint32_t *from, int64_t cols, int64_t n, uint32_t *packed, int64_t words)
{
    memset(packed, 0, (size_t)(8 * n * words) * sizeof *packed);
    for (int64_t c = 0; c < cols; c++)
        for (int64_t w = 0; w < n; w++)
            for (int i = 0; i < 8; i++) {
                const uint32_t code = from[c * n + w] >> 4 * i & 15;
                packed[(8 * w + awq_order[i]) * words + c / 8] |= code << c % 8 * 4;
            }
}

void layout_unpack_awq_zeros(const uint32_t *from, int64_t rows, int64_t groups, int8_t *zeros)
{
    for (int64_t g = 0; g < groups; g++)
        for (int64_t w = 0; w < rows / 8; w++)
            for (int i = 0; i < 8; i++)
                zeros[(8 * w + awq_order[i]) * groups + g] =
                    (int8_t)((int32_t)(from[g * (rows / 8) + w] >> 4 * i & 15) - 8);
}

/* --- scales ----------------------------------------------------------------------------------------------------- */

static float read_float(const void *from, enum dtype dtype, int64_t i)
{
    if (dtype == DTYPE_F32)
        return ((const float *)from)[i];
    const uint16_t h = ((const uint16_t *)from)[i];
    return dtype == DTYPE_BF16 ? half_from_bf16(h) : half_from_f16(h);
}

void layout_read_scales(const void *from, enum dtype dtype, int64_t rows, int64_t groups, bool transposed,
                        float *scales)
{
    CHECK(dtype == DTYPE_F32 || dtype == DTYPE_BF16 || dtype == DTYPE_F16);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++)
            scales[r * groups + g] = read_float(from, dtype, transposed ? g * rows + r : r * groups + g);
}

int64_t layout_write_scales(const float *scales, int64_t rows, int64_t groups, bool transposed,
                            enum dtype dtype, uint16_t *out)
{
    CHECK(dtype == DTYPE_BF16 || dtype == DTYPE_F16);
    int64_t bad = -1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const float s = scales[r * groups + g];
            const uint16_t h = dtype == DTYPE_BF16 ? half_to_bf16(s) : half_to_f16(s);
            const float back = dtype == DTYPE_BF16 ? half_from_bf16(h) : half_from_f16(h);
            if (bad < 0 && !(back == s))
                bad = r * groups + g;
            if (out)
                out[transposed ? g * rows + r : r * groups + g] = h;
        }
    return bad;
}

/* --- weights ---------------------------------------------------------------------------------------------------- */

void layout_dequantize(struct quant_scheme s, const uint32_t *packed, const float *scales,
                       const int8_t *zeros, int64_t n, int64_t cols, uint16_t *out)
{
    const int64_t per_word = 32 / s.bits, words = quant_packed_cols(s, cols), groups = quant_groups(s, cols);
    const int64_t group = s.group ? s.group : cols;
    const int32_t half = 1 << (s.bits - 1), mask = (1 << s.bits) - 1;
    for (int64_t r = 0; r < n; r++)
        for (int64_t g = 0; g < groups; g++) {
            const float scale = scales[r * groups + g];
            const int32_t zero = half + (zeros ? zeros[r * groups + g] : 0);
            const int64_t end = min64((g + 1) * group, cols);
            for (int64_t c = g * group; c < end; c++) {
                const int32_t code =
                    (int32_t)(packed[r * words + c / per_word] >> c % per_word * s.bits) & mask;
                out[r * cols + c] = half_to_bf16((float)(code - zero) * scale);
            }
        }
}

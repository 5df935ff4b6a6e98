/* The "quantization_config" of compressed-tensors pack-quantized checkpoints: writing ours, reading anyone's,
 * and asking which scheme a module gets. Tensor names and shapes of a packed linear are here too.
 * Source: vllm-project/compressed-tensors, quantization/quant_config.py and compressors/pack_quantized. */
#ifndef GEMCUT_FORMATS_QUANT_CONFIG_H
#define GEMCUT_FORMATS_QUANT_CONFIG_H

#include "base/json.h"
#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct quant_scheme {
    int bits; /* 4 or 8 */
    bool symmetric;
    int64_t group; /* columns that share a scale; 0 = a whole row ("channel") */
};

struct quant_group {
    struct quant_scheme scheme;
    char **
        targets; /* class name, exact module name, or "re:" and a regular expression matched from the start */
    size_t n_targets;
};

struct quant_config {
    struct quant_group *groups;
    size_t n_groups;
    char **ignore;
    size_t n_ignore;
    bool act_order; /* GPTQ visited columns by importance; no effect on reading */
};

/* Appends a copy of `pattern` to a list of targets or ignores. */
int quant_config_add(char ***list, size_t *n, const char *pattern);
int quant_config_add_group(struct quant_config *cfg, struct quant_scheme scheme, struct quant_group **group);
void quant_config_free(struct quant_config *cfg);

/* Writes the JSON object that loads in transformers and vLLM alike: no per-group "format", no scale_dtype or
 * zp_dtype (older releases refuse them), "quantization_status": "compressed" (without it transformers loads
 * random weights without a word). */
void quant_config_write(const struct quant_config *cfg, struct text *out);

/* Reads a compressed-tensors pack-quantized description; other methods and formats are refused by name. */
int quant_config_read(struct quant_config *out, struct json quantization);

/* Which group a Linear module gets. Priority: ignore, then exact name, regex, class. 1 and *scheme when it is
 * quantized, 0 when it is not, negative when a pattern cannot be evaluated. */
int quant_config_match(const struct quant_config *cfg, const char *module, struct quant_scheme *scheme);

/* The tensors of a packed linear: the module's name plus these. */
#define QUANT_PACKED ".weight_packed" /* I32 [rows, cols·bits/32], low nibble first, code + 2^(bits-1) */
#define QUANT_SCALE  ".weight_scale"  /* BF16 [rows, groups] */
#define QUANT_ZERO                                                                                           \
    ".weight_zero_point" /* I32 [ceil(rows·bits/32), groups], packed along rows; asymmetric only */
#define QUANT_SHAPE ".weight_shape" /* I64 [2]: rows, cols */

int64_t quant_packed_cols(struct quant_scheme s, int64_t cols); /* 32-bit words in a row */
int64_t quant_groups(struct quant_scheme s, int64_t cols);      /* scales in a row */
int64_t quant_zero_rows(struct quant_scheme s, int64_t rows);   /* rows of the packed zero points */

/* Zero points [rows, groups] in the codes' range, and as they are stored: packed along the rows, 32/bits of them in a
 * word, as q + 2^(bits−1); words [quant_zero_rows, groups], zeroed before they are packed into. */
void quant_pack_zeros(struct quant_scheme s, const int8_t *zeros, int64_t rows, int64_t groups,
                      uint32_t *words);
void quant_unpack_zeros(struct quant_scheme s, const uint32_t *words, int64_t rows, int64_t groups,
                        int8_t *zeros);

#endif

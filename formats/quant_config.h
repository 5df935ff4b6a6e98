/* The "quantization_config" of a checkpoint: writing ours, reading anyone's, and asking which scheme a module gets.
 * What compressed-tensors, AutoRound and GPTQModel write is the same to everything that comes after. Tensor names and
 * shapes of a packed linear are here too; quant_layout.h has the bytes of those that are not laid out by rows.
 * Sources: vllm-project/compressed-tensors, quantization/quant_config.py and compressors/pack_quantized; quant_gptq.c
 * names those of the others. */
#ifndef GEMCUT_FORMATS_QUANT_CONFIG_H
#define GEMCUT_FORMATS_QUANT_CONFIG_H

#include "base/json.h"
#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Whose description it is. */
enum quant_format { QUANT_COMPRESSED_TENSORS, QUANT_AUTO_ROUND, QUANT_GPTQ, N_QUANT_FORMATS };

/* How the tensors of a linear lie: by rows (compressed-tensors), or transposed, in words that run along the columns
 * (GPTQ) or along the rows (AWQ). */
enum quant_layout { QUANT_BY_ROWS, QUANT_TRANSPOSED, QUANT_AWQ };

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
    enum quant_format format;
    enum quant_layout layout;
    int zero_bias; /* transposed: what zero points are stored less: 1 in GPTQ's first version, 0 in its second */
    char *block; /* auto-round: the module that holds the decoder blocks, "model.layers" */
    struct quant_group *groups;
    size_t n_groups;
    char **ignore;
    size_t n_ignore;
    char **inside; /* gptq: ends of the names that alone are quantized, "self_attn.q_proj"; empty: all */
    size_t n_inside;
    bool act_order; /* GPTQ visited columns by importance; no effect on reading */
};

/* Appends a copy of `pattern` to a list of targets or ignores. */
int quant_config_add(char ***list, size_t *n, const char *pattern);
int quant_config_add_group(struct quant_config *cfg, struct quant_scheme scheme, struct quant_group **group);
void quant_config_free(struct quant_config *cfg);

/* "compressed-tensors", "auto-round", "gptq": the names of --format. */
extern const char *const quant_format_names[N_QUANT_FORMATS];

/* Whether a format has a place for a linear of that scheme and shape (rows, columns), as its readers take it. */
int quant_format_check(enum quant_format format, struct quant_scheme s, const char *name,
                       const int64_t shape[2]);

/* The layout in words, for people: "compressed-tensors pack-quantized", "gptq", "auto-round (auto_gptq)", … */
const char *quant_config_title(const struct quant_config *cfg);

/* Writes the JSON object that loads in transformers and vLLM alike. compressed-tensors: no per-group "format", no
 * scale_dtype or zp_dtype (older releases refuse them), "quantization_status": "compressed" (without it transformers
 * loads random weights without a word). */
void quant_config_write(const struct quant_config *cfg, struct text *out);

/* Reads a description by compressed-tensors (pack-quantized), AutoRound or GPTQModel; other methods and formats are
 * refused by name. */
int quant_config_read(struct quant_config *out, struct json quantization);

/* Which group a Linear module gets. Priority: ignore, then exact name, regex, class. 1 and *scheme when it is
 * quantized, 0 when it is not, negative when a pattern cannot be evaluated. Exact names are compared without the levels
 * "model" and "language_model" in front, which differ between a model on disk and in memory. Of one module; for many, quant_match.h. */
int quant_config_match(const struct quant_config *cfg, const char *module, struct quant_scheme *scheme);

/* A module's name from there on. */
const char *quant_inner_name(const char *name);

/* The tensors of a packed linear: the module's name plus these. */
#define QUANT_PACKED ".weight_packed" /* I32 [rows, cols·bits/32], low nibble first, code + 2^(bits-1) */
#define QUANT_SCALE  ".weight_scale"  /* BF16 [rows, groups] */
#define QUANT_ZERO                                                                                           \
    ".weight_zero_point" /* I32 [ceil(rows·bits/32), groups], packed along rows; asymmetric only */
#define QUANT_SHAPE       ".weight_shape" /* I64 [2]: rows, cols */
#define QUANT_GROUP_INDEX ".weight_g_idx" /* I32 [cols]: each column's group; not ours */

/* Of a linear whose tensors are transposed, rows and columns as above: */
#define QUANT_QWEIGHT                                                                                        \
    ".qweight" /* I32 [cols·bits/32, rows], column c in word c·bits/32; AWQ: [cols, rows/8] */
#define QUANT_QZEROS ".qzeros" /* I32 [groups, rows·bits/32], always there */
#define QUANT_SCALES ".scales" /* F16 [groups, rows]; others write BF16 and F32 too */
#define QUANT_G_IDX  ".g_idx"  /* I32 [cols]: each column's group */

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

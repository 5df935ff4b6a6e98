/* How a quantized linear is written: the tensors of its format, announced to a writer and put there whole, from memory of
 * the host, with their hashes. */
#ifndef GEMCUT_QUANTIZE_LINEAR_OUT_H
#define GEMCUT_QUANTIZE_LINEAR_OUT_H

#include "base/hash.h"
#include "formats/quant_config.h"
#include "formats/writer.h"

/* One tensor that is written, for the record. */
struct written_tensor {
    char *name;
    struct hash128 hash;
};

enum { LINEAR_MAX_TENSORS = 4 };

struct linear_out {
    enum quant_format format;
    struct quant_scheme scheme;
    int64_t rows, cols;
    const char *name;                                 /* for messages */
    size_t codes_id, scales_id, zeros_id, closing_id; /* the writer's; closing: weight_shape, or g_idx */
    struct written_tensor *written;                   /* its codes, scales, closing tensor, zero points */
};

/* Announces the tensors of module `module`. o has format, scheme, rows, cols and name; the rest is filled. written: room
 * for LINEAR_MAX_TENSORS, which the caller keeps; *n: as many are used. */
int linear_out_announce(struct linear_out *o, struct writer *w, const char *module,
                        struct written_tensor *written, size_t *n);

/* Whether codes are written by rows; otherwise their words are transposed: [cols·bits/32, rows]. */
bool linear_out_by_rows(const struct linear_out *o);

/* Codes [rows, words] by rows; or, laid out as they are written already. */
int linear_out_put_codes(const struct linear_out *o, const struct writer *w, const uint32_t *codes);
int linear_out_put_words(const struct linear_out *o, const struct writer *w, const uint32_t *words);

/* Everything but the codes. zeros: NULL when symmetric. A scale that the format's type does not have exactly is an error
 * that names it. */
int linear_out_put_steps(const struct linear_out *o, const struct writer *w, const float *scales,
                         const int8_t *zeros);

/* Reads back what an earlier run has put, by rows, scales as BF16: 1; or 0 where it does not have those hashes.
 * expected: of codes, scales, zero points. */
int linear_out_get(const struct linear_out *o, const struct writer *w, uint32_t *codes, uint16_t *scales,
                   int8_t *zeros, const struct hash128 expected[3]);

#endif

/* What a cut folder has beside its weights: config.json with its copies, the end of gemcut.json; and the look at the
 * finished weights before the folder takes its name. For cuts that are made and cuts that are converted. */
#ifndef GEMCUT_QUANTIZE_BESIDE_H
#define GEMCUT_QUANTIZE_BESIDE_H

#include "base/parallel.h"
#include "base/text.h"
#include "formats/hf_config.h"
#include "quantize/linear_out.h"
#include "quantize/staging.h"

/* config.json: the source's text with this quantization_config; and the copy of the latter that some readers of the
 * format look for. */
int beside_write_config(const struct staging *place, const struct hf_config *source,
                        const struct quant_config *quant);

/* "key": "hash in hexadecimal" */
void beside_put_hash(struct text *t, const char *key, struct hash128 hash);

/* gemcut.json is written: *record holds its beginning, and gets the hashes of tensors and of all other files. */
int beside_finish_record(const struct staging *place, const struct written_tensor *tensors, size_t n,
                         struct text *record);

/* Reads the finished files as a stranger would and compares every tensor with what was meant to be written. */
int beside_check_weights(const struct staging *place, const struct written_tensor *tensors, size_t n,
                         struct parallel *pool, void (*on_bytes)(void *ctx, uint64_t bytes), void *ctx);

#endif

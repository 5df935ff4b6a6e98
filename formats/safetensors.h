/* Reading one safetensors file. The header is distrusted: sizes are capped, products overflow-checked, every
 * byte range must equal shape × dtype and together they must cover the data exactly, without overlap. Tensor
 * data is read on demand with pread. Source: the format's specification (github.com/huggingface/safetensors). */
#ifndef GEMCUT_FORMATS_SAFETENSORS_H
#define GEMCUT_FORMATS_SAFETENSORS_H

#include "base/dtype.h"
#include "base/hash.h"

#include <stddef.h>
#include <stdint.h>

enum { TENSOR_MAX_DIMS = 8 };

struct tensor {
    char *name;
    enum dtype dtype;
    int n_dims;                     /* 0 for a scalar */
    int64_t shape[TENSOR_MAX_DIMS]; /* row-major, last dimension contiguous */
    uint64_t offset, bytes;         /* in its file */
    int file;                       /* which file of a checkpoint; 0 in a single file */
};

struct safetensors {
    char *path;
    int fd;
    size_t n_tensors;
    struct tensor *tensors; /* ascending by offset */
};

/* Opens the file and checks its header. The error names the file, the tensor and what is wrong with it. */
int safetensors_open(struct safetensors *out, const char *path);
void safetensors_close(struct safetensors *st);

/* The header alone: header[0..header_bytes) is the JSON, data_bytes what follows it in the file; offsets in the
 * result count from data_start. Entry point of the fuzzer. */
int safetensors_parse(struct safetensors *out, const char *header, size_t header_bytes, uint64_t data_start,
                      uint64_t data_bytes);

/* A tensor seen as a matrix: all leading dimensions are rows, the last is the columns; a scalar is 1 × 1. */
int64_t tensor_rows(const struct tensor *t);
int64_t tensor_cols(const struct tensor *t);

/* "BF16 [640, 2048]" into buf, for messages and listings. */
enum { TENSOR_TEXT_BYTES = 128 };
const char *tensor_text(enum dtype dtype, int n_dims, const int64_t *shape, char buf[TENSOR_TEXT_BYTES]);

/* The hash of a tensor is defined so that pieces can be hashed in parallel: XXH3-128 over the concatenated
 * XXH3-128 digests of its pieces and the tensor_text of its dtype and shape. A piece is tensor_piece_rows() whole rows, the last one may be shorter. */
int64_t tensor_piece_rows(int64_t cols, enum dtype dtype); /* a power of two; ≤ 256 KiB, or one longer row */
int tensor_hash_combine(const struct hash128 *pieces, size_t n, enum dtype dtype, int n_dims,
                        const int64_t *shape, struct hash128 *out);

#endif

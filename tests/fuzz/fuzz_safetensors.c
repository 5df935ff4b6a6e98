/* The safetensors header: any text, any size of the data behind it. The input's first two bytes choose that size,
 * so that headers that fit exactly are within reach. */
#include "base/err.h"
#include "base/mem.h"
#include "formats/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What an accepted header promises: sorted, gap-free tensors that cover the data and are what they claim. */
static void check_accepted(const struct safetensors *st, uint64_t data_start, uint64_t data_bytes)
{
    uint64_t at = data_start;
    for (size_t i = 0; i < st->n_tensors; i++) {
        const struct tensor *t = &st->tensors[i];
        char text[TENSOR_TEXT_BYTES];
        CHECK(t->name && t->n_dims >= 0 && t->n_dims <= TENSOR_MAX_DIMS && t->dtype < N_DTYPES);
        CHECK(t->offset == at);
        CHECK(strlen(tensor_text(t->dtype, t->n_dims, t->shape, text)) < sizeof text);
        uint64_t n = dtype_bytes(t->dtype);
        for (int d = 0; d < t->n_dims; d++)
            n *= (uint64_t)t->shape[d];
        CHECK(n == t->bytes);
        if (t->bytes) /* a tensor of no elements may have an absurd other dimension */
            CHECK((uint64_t)tensor_rows(t) * (uint64_t)tensor_cols(t) * dtype_bytes(t->dtype) == t->bytes);
        CHECK(tensor_piece_rows(tensor_cols(t), t->dtype) >= 1);
        at += t->bytes;
    }
    CHECK(at == data_start + data_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    const uint64_t data_bytes = (uint64_t)data[0] | (uint64_t)data[1] << 8;
    struct safetensors st = {.fd = -1, .path = mem_strdup("fuzz.safetensors")};
    CHECK(st.path);
    const int rc = safetensors_parse(&st, (const char *)data + 2, size - 2, 8 + size - 2, data_bytes);
    if (rc == 0)
        check_accepted(&st, 8 + size - 2, data_bytes);
    else
        CHECK(rc < 0 && *err_message());
    safetensors_close(&st);
    return 0;
}

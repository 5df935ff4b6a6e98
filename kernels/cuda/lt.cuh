/* Products of BF16 matrices by cuBLASLt, with FP32 accumulation and by algorithms that add in a fixed order. */
#ifndef GEMCUT_KERNELS_CUDA_LT_CUH
#define GEMCUT_KERNELS_CUDA_LT_CUH

#include "kernels/cuda/common.cuh"

/* The library works in the end of the handle's scratch memory; what comes before it is for operands of a product. */
static const size_t LT_WORKSPACE_BYTES = (size_t)32 << 20,
                    OPERAND_BYTES = CUDA_SCRATCH_BYTES - LT_WORKSPACE_BYTES;

/* out [n, m] = (add ? out : 0) + alpha·x·y, where x is [n, k] or, transposed, lies there as [k, n], and y is [k, m] or,
 * transposed, lies there as [m, k]; not both. x, y: BF16; out: BF16 or F32. n, m, k > 0. */
struct lt_product {
    struct mat x, y, out;
    bool x_transposed, y_transposed, add;
    float alpha;
};

extern "C" {
/* op: whose product it is, for messages */
int lt_multiply(const struct backend *b, const struct lt_product *p, const char *op);
}

#endif

/* What the CUDA backend's files share: the state behind a handle, error handling, loads and stores of the float types,
 * reductions over warps and blocks. C++ ends here: everything that leaves a .cu file is extern "C". */
#ifndef GEMCUT_KERNELS_CUDA_COMMON_CUH
#define GEMCUT_KERNELS_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <float.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
#include "base/err.h"
#include "kernels/backend.h"
}

/* The state behind a handle. */
struct cuda_state {
    int ordinal, n_processors;
    cudaStream_t stream;
    void *scratch;             /* CUDA_SCRATCH_BYTES, taken by the first operation that needs some */
    double *partials;          /* [REDUCE_BLOCKS, 2] */
    struct products *products; /* lt.cu's own: cuBLASLt and the algorithms it chose */
    struct solver *solver;     /* hessian.cu's own: cuSOLVER and its workspace */
};

/* A panel of a dequantized weight, the partial results of decode attention, or the weights of attention's gradient. */
static const size_t CUDA_SCRATCH_BYTES = (size_t)256 << 20;

enum { REDUCE_BLOCKS = 1024 };

/* Makes the handle's device the calling thread's as well: handles are opened by one thread and used by another. */
static inline struct cuda_state *cuda_state(const struct backend *b)
{
    struct cuda_state *s = (struct cuda_state *)b->state;
    cudaSetDevice(s->ordinal);
    return s;
}

extern "C" {
/* 0, or the CUDA error as a recorded message "op: …" (also a sticky one of earlier work: that is what CUDA reports). */
int cuda_status(cudaError_t e, const char *op);
int cuda_scratch(const struct backend *b, void **out);
void cuda_products_close(struct products *p);
void cuda_solver_close(const struct backend *b, struct solver *s);

/* Operations, by file; cuda.cu puts them into the table. */
int cuda_find_nonfinite(const struct backend *b, const struct mat *w, int64_t *index);
int cuda_zero_nonfinite(const struct backend *b, const struct mat *w, int64_t *count);
int cuda_squared_error(const struct backend *b, const struct mat *x, const struct mat *y, double sums[2]);
int cuda_group_squared_error(const struct backend *b, const struct mat *x, const struct mat *y, int64_t group,
                             double *sums);
int cuda_embed(const struct backend *b, const struct mat *table, const int32_t *ids, float scale,
               const struct mat *out);
int cuda_rms_norm(const struct backend *b, const struct mat *x, const struct mat *w,
                  const struct norm_spec *spec, const struct mat *out);
int cuda_add_norm(const struct backend *b, const struct mat *branch, const struct mat *branch_norm,
                  const struct mat *x, const struct mat *next_norm, const struct norm_spec *spec,
                  const struct mat *out);
int cuda_gemm(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out);
int cuda_q_gemm(const struct backend *b, const struct mat *x, const struct qmat *w, const struct mat *out);
int cuda_rope_table(const struct backend *b, const float *inv_freq, int64_t first_position,
                    const struct mat *table);
int cuda_split_qkv(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                   const struct mat *q, const struct mat *keys, const struct mat *values);
int cuda_attention(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                   const struct mat *keys, const struct mat *values, const struct mat *out,
                   const struct mat *lse);
int cuda_geglu(const struct backend *b, const struct mat *gate, const struct mat *up, const struct mat *out);
int cuda_over_norm(const struct backend *b, const struct mat *x, const struct mat *y, const struct mat *out);
int cuda_route(const struct backend *b, const struct mat *logits, const struct mat *factors,
               const struct mat *experts, const struct mat *weights);
int cuda_gather_rows(const struct backend *b, const struct mat *x, const struct mat *rows,
                     const struct mat *factors, const struct mat *out);
int cuda_combine_rows(const struct backend *b, const struct mat *y, const struct mat *slots,
                      const struct mat *weights, const struct mat *out);
int cuda_softcap(const struct backend *b, const struct mat *x, float cap);
int cuda_scale(const struct backend *b, float factor, const struct mat *x, bool add, const struct mat *out);
int cuda_compare_rows(const struct backend *b, const struct mat *logits_a, const struct mat *logits_b,
                      const int32_t *targets, struct row_comparison *out);
int cuda_sample_rows(const struct backend *b, const struct mat *logits, float temperature, uint64_t seed,
                     int64_t step, int32_t *out);
int cuda_find_scales(const struct backend *b, const struct mat *w, const struct scale_spec *spec,
                     struct qmat *q);
int cuda_quantize(const struct backend *b, const struct mat *w, struct qmat *q);
int cuda_dequantize(const struct backend *b, const struct qmat *q, const struct mat *out);
int cuda_dot(const struct backend *b, const struct mat *x, const struct mat *y, double *sum);
int cuda_zero(const struct backend *b, const struct mat *m);
int cuda_matmul(const struct backend *b, float alpha, const struct mat *x, const struct mat *m, bool add,
                const struct mat *out);
int cuda_hessian_add(const struct backend *b, const struct mat *x, const struct mat *h);
int cuda_hessian_finish(const struct backend *b, const struct mat *h);
int cuda_diagonal(const struct backend *b, const struct mat *h, float *to);
int cuda_add_diagonal(const struct backend *b, const struct mat *h, float value);
int cuda_factorize(const struct backend *b, const struct mat *h, const struct mat *order, float added,
                   const struct mat *work, const struct mat *factor, int *definite);
int cuda_search_scales(const struct backend *b, const struct mat *w, const struct mat *h,
                       const struct search_spec *spec, const struct qmat *q);
int cuda_round_codes(const struct backend *b, const struct rounding *r);
int cuda_sweep_block(const struct backend *b, const struct rounding *r, const struct mat *order,
                     const struct mat *factor, const struct mat *feedback, int64_t first,
                     const struct mat *errors);
int cuda_descend_block(const struct backend *b, const struct rounding *r, const struct mat *h,
                       const struct mat *gradient, const struct mat *feedback, int64_t first,
                       const struct mat *changes);
int cuda_group_dots(const struct backend *b, const struct mat *x, const struct mat *codes, int64_t group,
                    const struct mat *out);
int cuda_solve_scales(const struct backend *b, const struct mat *a, const struct mat *rhs, bool positive_only,
                      const struct qmat *q, int64_t *n_kept);
int cuda_residual(const struct backend *b, const struct rounding *r, const struct mat *out);
int cuda_count_clipped(const struct backend *b, const struct rounding *r, int64_t *count);
int cuda_pack_codes(const struct backend *b, const struct mat *codes, const struct qmat *q);
int cuda_gemm_dgrad(const struct backend *b, const struct mat *dy, const struct mat *w, bool add,
                    const struct mat *out);
int cuda_gemm_wgrad(const struct backend *b, const struct mat *dy, const struct mat *x, bool add,
                    const struct mat *dw);
int cuda_rms_norm_backward(const struct backend *b, const struct mat *x, const struct mat *w,
                           const struct norm_spec *spec, const struct mat *dy, const struct mat *add,
                           const struct mat *out);
int cuda_geglu_backward(const struct backend *b, const struct mat *gate, const struct mat *up,
                        const struct mat *dy, const struct mat *dgate, const struct mat *dup);
int cuda_split_qkv_backward(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                            const struct mat *dq, const struct mat *dkeys, const struct mat *dvalues,
                            const struct mat *dqkv);
int cuda_attention_backward(const struct backend *b, const struct attention_spec *spec,
                            const struct attention_tape *tape, const struct mat *dout, const struct mat *dq,
                            const struct mat *dkeys, const struct mat *dvalues);
int cuda_route_backward(const struct backend *b, const struct route_tape *tape, const struct mat *dout,
                        const struct mat *dlogits);
int cuda_error_backward(const struct backend *b, const struct mat *y, const struct mat *target, float factor,
                        double *sum, const struct mat *dy);
int cuda_keep_best(const struct backend *b, const double *loss, double *best, int32_t *improved);
int cuda_tune_begin(const struct backend *b, const struct tuning *t, const struct mat *codes);
int cuda_tune_step(const struct backend *b, const struct tuning *t, const struct mat *gradient,
                   const struct tune_rates *rates, const int32_t *keep);
}

/* After a launch. */
static inline int cuda_launched(const char *op)
{
    return cuda_status(cudaGetLastError(), op);
}

static inline int cuda_check_float(const struct mat *m, const char *op)
{
    if (m->dtype == DTYPE_BF16 || m->dtype == DTYPE_F16 || m->dtype == DTYPE_F32)
        return 0;
    return err_set(ERR_UNSUPPORTED, "%s: dtype %s, expected BF16, F16 or F32", op, dtype_name(m->dtype));
}

/* --- on the device ------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ float to_float(float x)
{
    return x;
}
static __device__ __forceinline__ float to_float(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}
static __device__ __forceinline__ float to_float(__half x)
{
    return __half2float(x);
}

template <typename T> static __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* An element of a matrix whose dtype is known only at run time. */
static __device__ __forceinline__ float load_as_float(const void *p, enum dtype t, int64_t at)
{
    if (t == DTYPE_BF16)
        return to_float(((const __nv_bfloat16 *)p)[at]);
    if (t == DTYPE_F16)
        return to_float(((const __half *)p)[at]);
    return ((const float *)p)[at];
}

template <typename T> static __device__ __forceinline__ T warp_sum(T x)
{
    for (int i = 16; i; i >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

/* Σ over the block, known to every thread; shared: one T for each warp. Blocks are whole warps. */
template <typename T> static __device__ __forceinline__ T block_sum(T x, T *shared)
{
    x = warp_sum(x);
    __syncthreads(); /* shared may still be read from a sum before */
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = x;
    __syncthreads();
    T total = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++)
        total += shared[i];
    return total;
}

#endif

/* What attention's two ways share: instructions that C++ has no words for, and the softmax's running reference.
 * mma.sync, ldmatrix and cp.async only, so that one source runs from sm_80 to sm_90. */
#ifndef GEMCUT_KERNELS_CUDA_ATTENTION_CUH
#define GEMCUT_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/common.cuh"

typedef __nv_bfloat16 bf16;

/* A reference point of the exponentials follows the highest score only when it lags by more than this many powers of
 * two: P and O stay far from overflow, and O is hardly ever rescaled. */
static const float REFERENCE_LAG = 8;

/* What the kernels work on; matrices as in backend.h, strides in elements. */
struct problem {
    const bf16 *q, *keys, *values;
    bf16 *out;
    int64_t q_stride, keys_stride, values_stride, out_stride, max_positions;
    int n_new, first_position;
    int window; /* > 0 */
    int n_heads, n_kv_heads, head_dim;
    float scale; /* of the scores, to powers of two: the caller's · log2(e) */
};

/* Few new tokens a sequence (attention_few.cu). */
extern "C" int attention_few(const struct backend *b, const struct problem *a, int64_t n_sequences);

/* --- instructions ------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes to shared memory, or zeros; `from` is not read then, and may point anywhere. Goes around L1: tiles are shared between SMs, not within one. */
static __device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

static __device__ __forceinline__ void wait_for_copies(void)
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Four 8×8 matrices; lane 8·i + r says where row r of the i-th is, lane 4·r + c gets its columns 2·c and 2·c + 1. */
static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
}

static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
}

static __device__ __forceinline__ void store_word(uint32_t to, uint32_t word)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

/* c [16, 8] += a [16, 16] · b [16, 8]. Lane 4·g + t has of c rows g, g + 8 at columns 2·t, 2·t + 1; of a the same rows
 * at columns 2·t, 2·t + 1 (a[0], a[1]) and 2·t + 8, 2·t + 9 (a[2], a[3]); of b these as rows, at column g. */
static __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                    uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Of an 8×8 matrix held as ldmatrix leaves it. */
static __device__ __forceinline__ uint32_t transpose(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* exp2f without its care for denormal results, which vanish beside the weight 1 of the highest score. */
static __device__ __forceinline__ float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ uint32_t pack(float low, float high)
{
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

/* --- both kernels ------------------------------------------------------------------------------------------------- */

/* Where the exponentials of a row without scores have their reference: below any score, yet no infinity, so that
 * differences from it need no care. */
static const float NO_REFERENCE = -FLT_MAX;

/* Moves the reference, in powers of two, when the highest score ran away from it; returns the factor for what was
 * summed so far. */
static __device__ __forceinline__ float follow(float *reference, float highest, float scale)
{
    if (!(fmaf(highest, scale, -*reference) > REFERENCE_LAG))
        return 1;
    const float factor = power_of_two(*reference - highest * scale);
    *reference = highest * scale;
    return factor;
}

#endif

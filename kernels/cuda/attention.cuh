/* What attention's ways, forward and back, share: instructions that C++ has no words for, tiles in shared memory, and the
 * softmax's running reference.
 * mma.sync, ldmatrix and cp.async only, so that one source runs from sm_80 to sm_90. */
#ifndef GEMCUT_KERNELS_CUDA_ATTENTION_CUH
#define GEMCUT_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/common.cuh"

typedef __nv_bfloat16 bf16;

/* A reference point of the exponentials follows the highest score only when it lags by more than this many powers of
 * two: P and O stay far from overflow, and O is hardly ever rescaled. */
static const float REFERENCE_LAG = 8;

static const float LOG2_E = 1.4426950408889634f;

/* What the kernels work on; matrices as in backend.h, strides in elements. */
struct problem {
    const bf16 *q, *keys, *values;
    bf16 *out;
    float *lse; /* or NULL; few new tokens do without */
    int64_t q_stride, keys_stride, values_stride, out_stride, lse_stride, max_positions;
    int n_new, first_position;
    int window; /* > 0 */
    int n_heads, n_kv_heads, head_dim;
    float scale; /* of the scores, to powers of two: the caller's · log2(e), or cap · log2(e) of what is capped */
    float bend;  /* as capped takes it; 0: no soft cap */
};

enum { MAX_CAPPED = 256 }; /* the widest heads whose scores can have a soft cap */

/* Few new tokens a sequence (attention_few.cu). */
extern "C" int attention_few(const struct backend *b, const struct problem *a, int64_t n_sequences);

/* Whether the kernels can take these, and out [tokens, n_heads·head_dim]; op: for the error. */
extern "C" int attention_check(const char *op, const struct attention_spec *spec, const struct mat *q,
                               const struct mat *keys, const struct mat *values, const struct mat *out);

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

/* Copies since the last call become a group, possibly an empty one. */
static __device__ __forceinline__ void end_copy_group(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits for all groups but the last n. */
template <int N> static __device__ __forceinline__ void wait_for_copy_groups(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
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

/* --- tiles in shared memory --------------------------------------------------------------------------------------- */

/* Row-major, in chunks of 16 bytes whose place within 128 bytes is turned by the row, so that the 8 rows that ldmatrix
 * reads at a time lie in different banks. */
template <int ROW_BYTES> static __device__ __forceinline__ uint32_t place(int row, int chunk)
{
    const int turn = ROW_BYTES >= 128 ? row & 7 : row >> 1 & 3;
    return (uint32_t)(row * ROW_BYTES + ((chunk ^ turn) << 4));
}

/* From the place of a row's chunk c to that of c + n, where c and n have no bit in common. */
static __device__ __forceinline__ uint32_t chunks_on(uint32_t at, int n)
{
    return (at ^ (uint32_t)((n & 7) << 4)) + (uint32_t)(n >> 3) * 128;
}

/* Starts copying columns [0, n_cols) of rows [0, n_rows) into a tile [ROWS, COLS]; zeros in the rest of it. */
template <int THREADS, int ROWS, int COLS>
static __device__ __forceinline__ void load_tile(uint32_t to, const bf16 *from, int64_t stride, int n_rows,
                                                 int n_cols)
{
    const int chunk = threadIdx.x % (COLS / 8), first = threadIdx.x / (COLS / 8), step = THREADS * 8 / COLS;
    const int n = chunk * 8 < n_cols ? n_rows : 0;
    from += first * stride + chunk * 8;
#pragma unroll 4
    for (int i = 0; i < ROWS / step; i++, from += step * stride)
        copy_async(to + place<COLS * 2>(first + i * step, chunk), from, first + i * step < n);
}

/* c += A·Bᵀ, MT·16 rows of A and NT·8 of B, both in tiles of COLS columns; a, b: where this lane's first rows are. */
template <int MT, int NT, int COLS>
static __device__ __forceinline__ void multiply_rows(float (&c)[MT][NT][4], uint32_t a, uint32_t b)
{
#pragma unroll
    for (int step = 0; step < COLS / 16; step++) {
        uint32_t x[MT][4], y[NT / 2][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            load_matrices(x[m], chunks_on(a, 2 * step) + m * 16 * COLS * 2);
#pragma unroll
        for (int n = 0; n < NT / 2; n++)
            load_matrices(y[n], chunks_on(b, 2 * step) + n * 16 * COLS * 2);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int m = 0; m < MT; m++)
                multiply_add(c[m][n], x[m], y[n / 2][n % 2 * 2], y[n / 2][n % 2 * 2 + 1]);
    }
}

/* Whether any of the queries [position, position + n_queries) sees any of the keys [key, key + n_keys). Along the edges
 * it spares a warp, and the shared memory that all warps wait for, whole products. */
static __device__ __forceinline__ bool sees(int key, int n_keys, int position, int n_queries, int window)
{
    return key < position + n_queries && key + n_keys > position - window + 1;
}

/* --- softmax ------------------------------------------------------------------------------------------------------ */

/* What makes capped of a score that the caller's scale is still to be applied to. */
static inline float bend_of(float scale, float cap)
{
    return cap > 0 ? 2 * LOG2_E * scale / cap : 0;
}

/* tanh(scale·score / cap) = 1 − 2 / (1 + e^(2·scale·score / cap)); to 2^-21 of 1, which is nothing in a weight. */
static __device__ __forceinline__ float capped(float score, float bend)
{
    return 1 - __fdividef(2, 1 + power_of_two(score * bend));
}

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

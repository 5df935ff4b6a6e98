/* Causal attention with an optional window over a batch of sequences, BF16 with FP32 scores, softmax and sums. Many new
 * tokens a sequence: a flash-attention kernel, one block for a tile of queries of a head. Few (decoding): the keys are
 * split over blocks, and a second kernel combines what they found. Neither uses atomics, so results repeat to the bit.
 *
 * mma.sync, ldmatrix and cp.async only, so that one source runs from sm_80 to sm_90.
 *
 * NaNs and infinities go through: a query that sees one in its keys or values gets NaN. As in any attention that
 * multiplies a hidden key's weight 0 with its value, queries up to a tile before a NaN in the values get it as well;
 * rows of the cache beyond the last new token are never read. */
#include "kernels/cuda/common.cuh"

typedef __nv_bfloat16 bf16;

enum { FEW_TOKENS = 8 }; /* new tokens a sequence, up to which the keys are split */

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
static __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
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

/* --- many new tokens ---------------------------------------------------------------------------------------------- */

/* A block has WM·WN warps. For S = Q·Kᵀ a warp takes MT·16 of the BM queries and 1/WN of a tile's BN keys; for
 * O += P·V the same queries, all keys of the tile and 1/WN of the D dimensions. The WN warps of the same queries
 * exchange row maxima and P through shared memory. Wide warp tiles matter: shared memory's bandwidth is the bound. */
template <int D_, int WM_, int WN_, int MT_, int BN_> struct tiling {
    enum {
        D = D_, /* head_dim, padded with zeros */
        WM = WM_,
        WN = WN_,
        MT = MT_, /* m-tiles of 16 queries of a warp */
        BN = BN_,
        BM = WM * MT * 16,
        NT = BN / WN / 8, /* n-tiles of 8 keys of a warp */
        OT = D / WN / 8,  /* n-tiles of 8 dimensions of a warp */
        THREADS = WM * WN * 32,
        Q_BYTES = BM * D * 2,
        KV_BYTES = BN * D * 2,
        P_BYTES = BM * BN * 2,
        SHARED_BYTES = Q_BYTES + 2 * KV_BYTES + 2 * P_BYTES + BM * WN * 4,
    };
};

/* Tiles in shared memory are row-major, in chunks of 16 bytes whose place within 128 bytes is turned by the row, so
 * that the 8 rows that ldmatrix reads at a time lie in different banks. */
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

/* Starts copying rows [0, n_rows) of a head; zeros in the rest of the tile. */
template <class T, int ROWS>
static __device__ __forceinline__ void load_tile(uint32_t to, const bf16 *from, int64_t stride, int n_rows,
                                                 int head_dim)
{
    const int chunk = threadIdx.x % (T::D / 8), first = threadIdx.x / (T::D / 8), step = T::THREADS * 8 / T::D;
    const int n = chunk * 8 < head_dim ? n_rows : 0;
    from += first * stride + chunk * 8;
#pragma unroll 4
    for (int i = 0; i < ROWS / step; i++, from += step * stride)
        copy_async(to + place<T::D * 2>(first + i * step, chunk), from, first + i * step < n);
}

/* s = Q·Kᵀ; q, k: where this lane's first rows are. */
template <class T>
static __device__ __forceinline__ void score_tile(float (&s)[T::MT][T::NT][4], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < T::MT * T::NT * 4; i++)
        s[i / 4 / T::NT][i / 4 % T::NT][i % 4] = 0;
#pragma unroll
    for (int step = 0; step < T::D / 16; step++) {
        uint32_t a[T::MT][4], b[T::NT / 2][4];
#pragma unroll
        for (int m = 0; m < T::MT; m++)
            load_matrices(a[m], chunks_on(q, 2 * step) + m * 16 * T::D * 2);
#pragma unroll
        for (int n = 0; n < T::NT / 2; n++)
            load_matrices(b[n], chunks_on(k, 2 * step) + n * 16 * T::D * 2);
#pragma unroll
        for (int n = 0; n < T::NT; n++)
#pragma unroll
            for (int m = 0; m < T::MT; m++)
                multiply_add(s[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
}

/* Hides the keys that a query does not see. key, position: of this lane's first score. */
template <class T>
static __device__ __forceinline__ void hide_keys(float (&s)[T::MT][T::NT][4], int key, int position, int window)
{
#pragma unroll
    for (int i = 0; i < T::MT * T::NT * 4; i++) {
        const int m = i / 4 / T::NT, n = i / 4 % T::NT, e = i % 4;
        const int ahead = key + n * 8 + e % 2 - (position + m * 16 + e / 2 * 8);
        if (ahead > 0 || ahead <= -window)
            s[m][n][e] = -INFINITY;
    }
}

/* highest [BM, WN]: this warp's row maxima, for the other warps of its queries. */
template <class T>
static __device__ __forceinline__ void publish_highest(const float (&s)[T::MT][T::NT][4], float *highest, int row,
                                                       int warp_n)
{
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++) {
        const int m = i / 2, h = i % 2;
        float x = -INFINITY;
#pragma unroll
        for (int n = 0; n < T::NT; n++)
            x = fmaxf(x, fmaxf(s[m][n][h * 2], s[m][n][h * 2 + 1]));
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
        if (threadIdx.x % 4 == 0)
            highest[(row + m * 16 + h * 8) * T::WN + warp_n] = x;
    }
}

/* What a lane keeps of its rows, m-tile by m-tile: rows g and g + 8 of each. */
template <class T> struct row_state {
    float o[T::MT][T::OT][4];
    float reference[T::MT][2], sum[T::MT][2], factor[T::MT][2];
};

template <class T>
static __device__ __forceinline__ void follow_rows(struct row_state<T> *r, const float *highest, int row, float scale)
{
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++) {
        const int m = i / 2, h = i % 2;
        const float *mine = highest + (row + m * 16 + h * 8) * T::WN;
        float x = mine[0];
#pragma unroll
        for (int w = 1; w < T::WN; w++)
            x = fmaxf(x, mine[w]);
        r->factor[m][h] = follow(&r->reference[m][h], x, scale);
        r->sum[m][h] *= r->factor[m][h];
    }
}

/* P of one n-tile of keys, rounded. */
template <class T>
static __device__ __forceinline__ void exponentials(struct row_state<T> *r, const float (&s)[T::MT][T::NT][4], int n,
                                                    float scale, uint32_t (&p)[T::MT][T::NT][2])
{
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++) {
        const int m = i / 2, h = i % 2;
        const float x = power_of_two(fmaf(s[m][n][h * 2], scale, -r->reference[m][h]));
        const float y = power_of_two(fmaf(s[m][n][h * 2 + 1], scale, -r->reference[m][h]));
        r->sum[m][h] += x + y;
        p[m][n][h] = pack(x, y);
    }
}

/* O += P·V over 16 keys; p, v: where this lane's first rows are. */
template <class T>
static __device__ __forceinline__ void add_values(struct row_state<T> *r, int step, uint32_t p, uint32_t v)
{
    uint32_t a[T::MT][4];
#pragma unroll
    for (int m = 0; m < T::MT; m++)
        load_matrices(a[m], chunks_on(p, 2 * step) + m * 16 * T::BN * 2);
#pragma unroll
    for (int n = 0; n < T::OT; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, chunks_on(v, n) + step * 16 * T::D * 2);
#pragma unroll
        for (int m = 0; m < T::MT; m++) {
            multiply_add(r->o[m][n], a[m], b[0], b[1]);
            multiply_add(r->o[m][n + 1], a[m], b[2], b[3]);
        }
    }
}

/* The softmax of a tile's scores, and meanwhile O += P·V of the tile before it: exponentials go to other units than the
 * products, so both stand in one stretch of code for the compiler to interleave. P is stored at the end because a store
 * would hold up the loads of the steps after it. p: where this lane writes; the tile before lies in p_before. */
template <class T>
static __device__ __forceinline__ void soften_tile(struct row_state<T> *r, const float (&s)[T::MT][T::NT][4],
                                                   float scale, uint32_t p, bool any_before, uint32_t p_before,
                                                   uint32_t v)
{
    uint32_t rounded[T::MT][T::NT][2];
    if (any_before) {
#pragma unroll
        for (int step = 0; step < T::BN / 16; step++) {
            add_values<T>(r, step, p_before, v);
            if (step < T::NT)
                exponentials<T>(r, s, step, scale, rounded);
        }
    } else {
#pragma unroll
        for (int n = 0; n < T::NT; n++)
            exponentials<T>(r, s, n, scale, rounded);
    }
#pragma unroll
    for (int i = 0; i < T::MT * T::NT * 2; i++) {
        const int m = i / 2 / T::NT, n = i / 2 % T::NT, h = i % 2;
        store_word(chunks_on(p, n) + (m * 16 + h * 8) * T::BN * 2, rounded[m][n][h]);
    }
}

template <class T> static __device__ __forceinline__ void rescale_rows(struct row_state<T> *r)
{
    bool any = false;
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++)
        any |= r->factor[i / 2][i % 2] != 1;
    if (!__any_sync(0xffffffffu, any))
        return;
#pragma unroll
    for (int i = 0; i < T::MT * T::OT * 4; i++)
        r->o[i / 4 / T::OT][i / 4 % T::OT][i % 4] *= r->factor[i / 4 / T::OT][i % 4 / 2];
}

/* out: row 0 of this block's queries at this lane's first dimension; n_rows, n_dims: what of it exists from here on.
 * sums [BM, WN]. */
template <class T>
static __device__ __forceinline__ void store_rows(const struct row_state<T> *r, float *sums, int row, int warp_n,
                                                  bf16 *out, int64_t stride, int n_rows, int n_dims)
{
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++) {
        float x = r->sum[i / 2][i % 2];
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        x += __shfl_xor_sync(0xffffffffu, x, 2);
        if (threadIdx.x % 4 == 0)
            sums[(row + i * 8) * T::WN + warp_n] = x;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++) {
        const int at = row + i * 8;
        float total = sums[at * T::WN];
#pragma unroll
        for (int w = 1; w < T::WN; w++)
            total += sums[at * T::WN + w];
        const float inverse = 1 / total;
#pragma unroll
        for (int n = 0; n < T::OT; n++)
            if (at < n_rows && n * 8 < n_dims)
                *(uint32_t *)(out + at * stride + n * 8) =
                    pack(r->o[i / 2][n][i % 2 * 2] * inverse, r->o[i / 2][n][i % 2 * 2 + 1] * inverse);
    }
}

/* Grid: (heads of all sequences, tiles of queries). Scores of tile j, then its softmax beside the values of tile j − 1;
 * each of the two phases ends in a barrier and covers the copy that the next one needs. */
template <class T> static __global__ void __launch_bounds__(T::THREADS, 1) prefill_kernel(const struct problem a)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    float *highest = (float *)(shared + T::Q_BYTES + 2 * T::KV_BYTES + 2 * T::P_BYTES);
    const uint32_t sq = shared_address(shared), sk = sq + T::Q_BYTES, sv = sk + T::KV_BYTES, sp = sv + T::KV_BYTES;
    const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 / T::WN, warp_n = threadIdx.x / 32 % T::WN;
    const int head = blockIdx.x % a.n_heads, kv_head = head / (a.n_heads / a.n_kv_heads);
    const int64_t sequence = blockIdx.x / a.n_heads;
    /* late queries see the most keys and start first, so that the last blocks to run are short */
    const int token = (int)(gridDim.y - 1 - blockIdx.y) * T::BM, n_rows = min((int)T::BM, a.n_new - token);
    const int first = a.first_position + token, last = first + n_rows - 1;
    const int begin = max(0, first - a.window + 1), end = last + 1, n_tiles = (end - begin + T::BN - 1) / T::BN;
    const int64_t slot = sequence * a.max_positions + begin, out_row = sequence * a.n_new + token;
    const bf16 *keys = a.keys + slot * a.keys_stride + kv_head * a.head_dim;
    const bf16 *values = a.values + slot * a.values_stride + kv_head * a.head_dim;

    /* where this lane points ldmatrix, and its first row and column of S */
    const int warp_row = warp_m * T::MT * 16, row = warp_row + lane / 4, column = warp_n * T::NT * 8 + lane % 4 * 2;
    const uint32_t q_at = sq + place<T::D * 2>(warp_row + lane % 16, lane / 16);
    const uint32_t k_at = sk + place<T::D * 2>(warp_n * T::NT * 8 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t v_at = sv + place<T::D * 2>(lane % 16, warp_n * T::OT + lane / 16);
    const uint32_t p_at = sp + place<T::BN * 2>(warp_row + lane % 16, lane / 16);
    const uint32_t p_to = sp + place<T::BN * 2>(row, warp_n * T::NT) + lane % 4 * 4;
    struct row_state<T> r = {};
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++)
        r.reference[i / 2][i % 2] = NO_REFERENCE;

    load_tile<T, T::BM>(sq, a.q + out_row * a.q_stride + head * a.head_dim, a.q_stride, n_rows, a.head_dim);
    load_tile<T, T::BN>(sk, keys, a.keys_stride, end - begin, a.head_dim);
    wait_for_copies();
    __syncthreads();
    for (int j = 0; j < n_tiles; j++) {
        const int key = begin + j * T::BN;
        if (j > 0)
            load_tile<T, T::BN>(sv, values + (int64_t)(j - 1) * T::BN * a.values_stride, a.values_stride,
                                end - key + T::BN, a.head_dim);
        float s[T::MT][T::NT][4];
        score_tile<T>(s, q_at, k_at);
        if (key + T::BN - 1 > first || key <= last - a.window)
            hide_keys<T>(s, key + column, first + row, a.window);
        publish_highest<T>(s, highest, row, warp_n);
        wait_for_copies();
        __syncthreads();
        /* the keys' place is free: for the next keys, at the end for the last values */
        if (j + 1 < n_tiles)
            load_tile<T, T::BN>(sk, keys + (int64_t)(j + 1) * T::BN * a.keys_stride, a.keys_stride,
                                end - key - T::BN, a.head_dim);
        else
            load_tile<T, T::BN>(sk, values + (int64_t)j * T::BN * a.values_stride, a.values_stride, end - key,
                                a.head_dim);
        follow_rows<T>(&r, highest, row, a.scale);
        soften_tile<T>(&r, s, a.scale, p_to + j % 2 * T::P_BYTES, j > 0, p_at + (j + 1) % 2 * T::P_BYTES, v_at);
        rescale_rows<T>(&r);
        wait_for_copies();
        __syncthreads();
    }
#pragma unroll
    for (int step = 0; step < T::BN / 16; step++)
        add_values<T>(&r, step, p_at + (n_tiles - 1) % 2 * T::P_BYTES, v_at - T::KV_BYTES);
    const int dim = warp_n * T::OT * 8 + lane % 4 * 2;
    store_rows<T>(&r, highest, row, warp_n, a.out + out_row * a.out_stride + head * a.head_dim + dim, a.out_stride,
                  n_rows, a.head_dim - dim);
}

template <class T> static int launch_prefill(const struct backend *b, const struct problem *a, int64_t n_sequences)
{
    int rc = cuda_status(cudaFuncSetAttribute(prefill_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              T::SHARED_BYTES),
                         "attention");
    if (rc < 0)
        return rc;
    const dim3 grid((unsigned)(n_sequences * a->n_heads), (unsigned)((a->n_new + T::BM - 1) / T::BM));
    prefill_kernel<T><<<grid, T::THREADS, T::SHARED_BYTES, cuda_state(b)->stream>>>(*a);
    return cuda_launched("attention");
}

/* --- few new tokens ----------------------------------------------------------------------------------------------- */

enum {
    COLUMNS = 8, /* (query head, new token) pairs of a key/value head that one block serves */
    SPLIT_WARPS = 4,
    SPLIT_THREADS = SPLIT_WARPS * 32,
    STEP_KEYS = 16, /* of a warp at a time */
    BLOCK_KEYS = SPLIT_WARPS * STEP_KEYS,
};

/* How the work is cut, from shapes alone. The c-th pair of a key/value head is new token c / per_kv, head c mod per_kv
 * of those that share it. */
struct split {
    int per_kv, n_columns, n_groups; /* heads that share a key/value head; pairs, and groups of COLUMNS of them */
    int run, n_runs;                 /* keys of a block; blocks along the keys */
    float *partial;                  /* [tokens, n_heads, n_runs, head_dim], not yet divided by the sum */
    float2 *stats;                   /* [tokens, n_heads, n_runs]: reference in powers of two, sum */
};

/* Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, so that the few pairs are the short side of mma. Everything goes from global memory straight
 * to registers: a lane loads 16 consecutive bytes, and which dimension a fragment's element stands for is permuted to
 * match: for K and Q, lane t of four has dimensions 8·t … 8·t + 7 of a block of 32; for V, lane g of eight has
 * dimensions 8·g … 8·g + 7 of a block of 64. */
template <int D> struct column_state {
    float o[D / 16][4];
    float reference[2], sum[2]; /* of pairs 2·t, 2·t + 1 */
    int position[2];            /* −1: there is no such pair */
};

static __device__ __forceinline__ uint4 load_chunk(const bf16 *from, bool valid)
{
    return valid ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
}

/* Scores of keys g and g + 8 (of the n that exist), pairs 2·t and 2·t + 1. q [D / 32, lanes]: kept in shared memory,
 * since registers are short; keys: the first of the 16. */
template <int D>
static __device__ __forceinline__ void score_columns(float (&s)[4], const uint4 *q, const bf16 *keys, int64_t stride,
                                                     int n, int head_dim)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float part[2][4] = {}; /* independent chains, to be added up */
#pragma unroll (D > 256 ? 4 : 8)
    for (int i = 0; i < D / 32; i++) {
        const int dim = i * 32 + t * 8;
        const uint4 low = load_chunk(keys + g * stride + dim, g < n && dim < head_dim);
        const uint4 high = load_chunk(keys + (g + 8) * stride + dim, g + 8 < n && dim < head_dim);
        const uint32_t even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
        const uint4 b = q[i * 32 + threadIdx.x % 32];
        multiply_add(part[0], even, b.x, b.y);
        multiply_add(part[1], odd, b.z, b.w);
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        s[e] = part[0][e] + part[1][e];
}

/* Softmax over the 16 keys from `key` on; p: Pᵀ as mma wants its b. */
template <int D>
static __device__ __forceinline__ void soften_columns(struct column_state<D> *c, float (&s)[4], uint32_t (&p)[2],
                                                      int key, int window, float scale)
{
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float highest = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int ahead = key + threadIdx.x % 32 / 4 + h * 8 - c->position[i];
            if (ahead > 0 || ahead <= -window)
                s[h * 2 + i] = -INFINITY;
            highest = fmaxf(highest, s[h * 2 + i]);
        }
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2)
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
        factor[i] = follow(&c->reference[i], highest, scale);
        s[i] = power_of_two(fmaf(s[i], scale, -c->reference[i]));
        s[2 + i] = power_of_two(fmaf(s[2 + i], scale, -c->reference[i]));
        c->sum[i] = c->sum[i] * factor[i] + (s[i] + s[2 + i]);
    }
    p[0] = transpose(pack(s[0], s[1]));
    p[1] = transpose(pack(s[2], s[3]));
    if (__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
        for (int i = 0; i < D / 16 * 4; i++)
            c->o[i / 4][i % 4] *= factor[i % 2];
    }
}

template <int D>
static __device__ __forceinline__ void add_column_values(struct column_state<D> *c, const uint32_t (&p)[2],
                                                         const bf16 *values, int64_t stride, int n, int head_dim)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const int dim = i * 64 + g * 8;
        uint32_t v[4][4]; /* keys 2·t, 2·t + 1, 2·t + 8, 2·t + 9 */
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int key = 2 * t + k % 2 + k / 2 * 8;
            const uint4 x = load_chunk(values + key * stride + dim, key < n && dim < head_dim);
            v[k][0] = x.x, v[k][1] = x.y, v[k][2] = x.z, v[k][3] = x.w;
        }
#pragma unroll
        for (int w = 0; w < 4; w++) { /* rows g, g + 8 of this m-tile: dimensions dim + 2·w, dim + 2·w + 1 */
            const uint32_t a[4] = {
                __byte_perm(v[0][w], v[1][w], 0x5410), __byte_perm(v[0][w], v[1][w], 0x7632),
                __byte_perm(v[2][w], v[3][w], 0x5410), __byte_perm(v[2][w], v[3][w], 0x7632)};
            multiply_add(c->o[i * 4 + w], a, p[0], p[1]);
        }
    }
}

/* Adds up the warps, in their order. sum_o [COLUMNS, D + 1]: the odd stride spreads it over the banks; stats: as in
 * struct split, of the whole block. */
template <int D>
static __device__ __forceinline__ void add_up_warps(struct column_state<D> *c, float *sum_o,
                                                    float2 (&warp_stats)[SPLIT_WARPS][COLUMNS], float2 *stats)
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2)
            c->sum[i] += __shfl_xor_sync(0xffffffffu, c->sum[i], lanes);
        if (g == 0)
            warp_stats[warp][2 * t + i] = make_float2(c->reference[i], c->sum[i]);
    }
    __syncthreads();
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int column = 2 * t + i;
        float reference = NO_REFERENCE, sum = 0;
        for (int w = 0; w < SPLIT_WARPS; w++)
            reference = fmaxf(reference, warp_stats[w][column].x);
        for (int w = 0; w < SPLIT_WARPS; w++)
            sum += warp_stats[w][column].y * power_of_two(warp_stats[w][column].x - reference);
        weight[i] = power_of_two(c->reference[i] - reference);
        if (threadIdx.x < 4)
            stats[column] = make_float2(reference, sum);
    }
    for (int w = 0; w < SPLIT_WARPS; w++) {
#pragma unroll
        for (int i = 0; w == warp && i < D / 16 * 4; i++) {
            const int dim = i / 16 * 64 + g * 8 + i / 4 % 4 * 2 + i % 4 / 2;
            float *to = sum_o + (2 * t + i % 2) * (D + 1) + dim;
            *to = (w ? *to : 0) + c->o[i / 4][i % 4] * weight[i % 2];
        }
        __syncthreads();
    }
}

/* Grid: (groups of pairs of all key/value heads of all sequences, runs of keys). */
template <int D>
static __global__ void __launch_bounds__(SPLIT_THREADS, 2) split_kernel(const struct problem a, const struct split s)
{
    __shared__ uint4 queries[D / 32 * 32];
    __shared__ float sum_o[COLUMNS * (D + 1)];
    __shared__ float2 warp_stats[SPLIT_WARPS][COLUMNS], stats[COLUMNS];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int column = blockIdx.x % s.n_groups * COLUMNS, n_columns = min((int)COLUMNS, s.n_columns - column);
    const int kv_head = blockIdx.x / s.n_groups % a.n_kv_heads;
    const int64_t sequence = blockIdx.x / s.n_groups / a.n_kv_heads;
    /* keys that any of these pairs sees, then those of this block */
    const int first = a.first_position + column / s.per_kv, last = a.first_position + (column + n_columns - 1) / s.per_kv;
    const int begin = max(0, first - a.window + 1) + (int)blockIdx.y * s.run, end = min(begin + s.run, last + 1);

    struct column_state<D> c = {};
    const int64_t q_row = sequence * a.n_new + (column + g) / s.per_kv;
    const bf16 *q = a.q + q_row * a.q_stride + (kv_head * s.per_kv + (column + g) % s.per_kv) * a.head_dim;
    for (int i = warp; i < D / 32; i += SPLIT_WARPS)
        queries[i * 32 + threadIdx.x % 32] =
            load_chunk(q + i * 32 + t * 8, g < n_columns && i * 32 + t * 8 < a.head_dim);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        c.reference[i] = NO_REFERENCE;
        c.position[i] = 2 * t + i < n_columns ? a.first_position + (column + 2 * t + i) / s.per_kv : -1;
    }
    for (int key = begin + warp * STEP_KEYS; key < end; key += BLOCK_KEYS) {
        const int64_t slot = sequence * a.max_positions + key;
        float scores[4];
        uint32_t p[2];
        score_columns<D>(scores, queries, a.keys + slot * a.keys_stride + kv_head * a.head_dim, a.keys_stride, end - key,
                         a.head_dim);
        soften_columns<D>(&c, scores, p, key, a.window, a.scale);
        add_column_values<D>(&c, p, a.values + slot * a.values_stride + kv_head * a.head_dim, a.values_stride,
                             end - key, a.head_dim);
    }
    add_up_warps<D>(&c, sum_o, warp_stats, stats);
    for (int i = 0; i < n_columns; i++) {
        const int64_t token = sequence * a.n_new + (column + i) / s.per_kv;
        const int head = kv_head * s.per_kv + (column + i) % s.per_kv;
        const int64_t at = (token * a.n_heads + head) * s.n_runs + blockIdx.y;
        if (s.n_runs > 1 && threadIdx.x == 0)
            s.stats[at] = stats[i];
        for (int d = threadIdx.x; d < a.head_dim; d += SPLIT_THREADS)
            if (s.n_runs > 1)
                s.partial[at * a.head_dim + d] = sum_o[i * (D + 1) + d];
            else
                a.out[token * a.out_stride + head * a.head_dim + d] =
                    from_float<bf16>(sum_o[i * (D + 1) + d] / stats[i].y);
    }
}

/* One block for each head of each token. */
static __global__ void __launch_bounds__(SPLIT_THREADS) combine_kernel(const struct problem a, const struct split s)
{
    const int64_t token = blockIdx.x / a.n_heads;
    const int head = blockIdx.x % a.n_heads;
    const float2 *stats = s.stats + (int64_t)blockIdx.x * s.n_runs;
    const float *partial = s.partial + (int64_t)blockIdx.x * s.n_runs * a.head_dim;
    float reference = NO_REFERENCE;
    for (int i = threadIdx.x % 32; i < s.n_runs; i += 32)
        reference = fmaxf(reference, stats[i].x);
    for (int lanes = 1; lanes < 32; lanes *= 2)
        reference = fmaxf(reference, __shfl_xor_sync(0xffffffffu, reference, lanes));
    for (int d = threadIdx.x; d < a.head_dim; d += SPLIT_THREADS) {
        float o = 0, sum = 0;
#pragma unroll 8
        for (int i = 0; i < s.n_runs; i++) {
            const float weight = power_of_two(stats[i].x - reference);
            o += weight * partial[(int64_t)i * a.head_dim + d];
            sum += weight * stats[i].y;
        }
        a.out[token * a.out_stride + head * a.head_dim + d] = from_float<bf16>(o / sum);
    }
}

/* About two blocks for each multiprocessor, as far as runs of BLOCK_KEYS keys and the scratch memory allow. */
static struct split split_work(const struct backend *b, const struct problem *a, int64_t n_sequences)
{
    struct split s = {};
    s.per_kv = a->n_heads / a->n_kv_heads;
    s.n_columns = s.per_kv * a->n_new;
    s.n_groups = (s.n_columns + COLUMNS - 1) / COLUMNS;
    const int64_t positions = a->first_position + a->n_new, reach = (int64_t)a->window + a->n_new - 1;
    const int64_t n_keys = reach < positions ? reach : positions;
    const int64_t n_blocks = n_sequences * a->n_kv_heads * s.n_groups, n_outputs = n_sequences * a->n_new * a->n_heads;
    const int64_t fitting = (int64_t)CUDA_SCRATCH_BYTES / (n_outputs * (a->head_dim + 2) * (int64_t)sizeof(float));
    int64_t n = (2 * cuda_state(b)->n_processors + n_blocks - 1) / n_blocks;
    n = n < fitting ? n : fitting;
    n = n > 1 ? n : 1;
    const int64_t run = (n_keys + n - 1) / n;
    s.run = (int)((run + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS);
    s.n_runs = (int)((n_keys + s.run - 1) / s.run);
    return s;
}

template <int D> static int launch_split(const struct backend *b, const struct problem *a, int64_t n_sequences)
{
    struct split s = split_work(b, a, n_sequences);
    const cudaStream_t stream = cuda_state(b)->stream;
    const int64_t n_outputs = n_sequences * a->n_new * a->n_heads;
    if (s.n_runs > 1) {
        void *scratch;
        const int rc = cuda_scratch(b, &scratch);
        if (rc < 0)
            return rc;
        s.partial = (float *)scratch;
        s.stats = (float2 *)(s.partial + n_outputs * s.n_runs * a->head_dim);
    }
    const dim3 grid((unsigned)(n_sequences * a->n_kv_heads * s.n_groups), (unsigned)s.n_runs);
    split_kernel<D><<<grid, SPLIT_THREADS, 0, stream>>>(*a, s);
    if (s.n_runs > 1)
        combine_kernel<<<(unsigned)n_outputs, SPLIT_THREADS, 0, stream>>>(*a, s);
    return cuda_launched("attention");
}

/* --- the operation ------------------------------------------------------------------------------------------------ */

typedef int launch_fn(const struct backend *b, const struct problem *a, int64_t n_sequences);

/* In order of preference: the first that holds head_dim and whose tiles fit the device. */
static const struct {
    int head_dim, shared_bytes;
    launch_fn *prefill, *split;
} variants[] = {
#define PREFILL(D, WM, WN, MT, BN) tiling<D, WM, WN, MT, BN>::SHARED_BYTES, launch_prefill<tiling<D, WM, WN, MT, BN>>
    {64, PREFILL(64, 4, 2, 2, 128), launch_split<64>},
    {128, PREFILL(128, 4, 2, 2, 128), launch_split<128>},
    {256, PREFILL(256, 4, 2, 2, 64), launch_split<256>},
    {512, PREFILL(512, 2, 4, 2, 64), launch_split<512>}, /* sm_90 */
    {512, PREFILL(512, 4, 2, 1, 32), launch_split<512>}, /* sm_80 */
#undef PREFILL
};

static int check_alignment(const struct mat *m, const char *what)
{
    if ((uintptr_t)m->data % 16 == 0 && m->stride % 8 == 0 && m->stride >= m->cols)
        return 0;
    return err_set(ERR_UNSUPPORTED, "attention: %s at %p with %lld elements from row to row, expected multiples of 16 bytes",
                   what, m->data, (long long)m->stride);
}

static int check_operands(const struct attention_spec *spec, const struct mat *q, const struct mat *keys,
                          const struct mat *values, const struct mat *out)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    CHECK(q->dtype == DTYPE_BF16 && keys->dtype == DTYPE_BF16 && values->dtype == DTYPE_BF16 &&
          out->dtype == DTYPE_BF16);
    CHECK(s->n > 0 && q->rows % s->n == 0 && out->rows == q->rows && out->cols == q->cols);
    CHECK(h->n_kv_heads > 0 && h->n_heads % h->n_kv_heads == 0 && q->cols == (int64_t)h->n_heads * h->head_dim);
    CHECK(keys->cols == (int64_t)h->n_kv_heads * h->head_dim && values->cols == keys->cols);
    CHECK(s->first_position >= 0 && s->first_position + q->rows / s->n <= s->max_positions);
    CHECK(s->max_positions < 1 << 30); /* positions are int in the kernels */
    CHECK(keys->rows >= s->n * s->max_positions && values->rows >= s->n * s->max_positions);
    CHECK(spec->scale > 0 && spec->window >= 0);
    if (h->head_dim < 8 || h->head_dim > 512 || h->head_dim % 8)
        return err_set(ERR_UNSUPPORTED, "attention: heads of %d, expected a multiple of 8 up to 512", h->head_dim);
    int rc = check_alignment(q, "queries");
    rc = rc < 0 ? rc : check_alignment(keys, "keys");
    rc = rc < 0 ? rc : check_alignment(values, "values");
    return rc < 0 ? rc : check_alignment(out, "result");
}

extern "C" int cuda_attention(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                              const struct mat *keys, const struct mat *values, const struct mat *out)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    int rc = check_operands(spec, q, keys, values, out);
    if (rc < 0 || q->rows == 0)
        return rc;
    struct problem a = {};
    a.q = (const bf16 *)q->data, a.keys = (const bf16 *)keys->data, a.values = (const bf16 *)values->data;
    a.out = (bf16 *)out->data;
    a.q_stride = q->stride, a.keys_stride = keys->stride, a.values_stride = values->stride, a.out_stride = out->stride;
    a.max_positions = s->max_positions;
    a.n_new = (int)(q->rows / s->n), a.first_position = (int)s->first_position;
    const int positions = a.first_position + a.n_new;
    a.window = spec->window && spec->window < positions ? (int)spec->window : positions;
    a.n_heads = h->n_heads, a.n_kv_heads = h->n_kv_heads, a.head_dim = h->head_dim;
    a.scale = spec->scale * 1.4426950408889634f;

    int shared_bytes;
    rc = cuda_status(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            cuda_state(b)->ordinal),
                     "attention");
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        if (a.head_dim > variants[i].head_dim)
            continue;
        if (a.n_new <= FEW_TOKENS)
            return variants[i].split(b, &a, s->n);
        if (variants[i].shared_bytes <= shared_bytes)
            return variants[i].prefill(b, &a, s->n);
    }
    return err_set(ERR_UNSUPPORTED, "attention: heads of %d do not fit the device's %d bytes of shared memory",
                   a.head_dim, shared_bytes);
}

/* Gradients of attention. The weights P = exp(scale·score − lse) and what the loss changes by the scores, dS = P ⊙
 * (dout·Vᵀ − Σ dout ⊙ out)·scale, with a soft cap times 1 − tanh², are computed once, tile by tile, and stand as BF16
 * in scratch memory for as many heads at a time as fit; then dV = Pᵀ·dout, dK = dSᵀ·Q and dQ = dS·K are plain products
 * over the tiles that the mask leaves. Five products in all, where kernels that keep nothing need seven, and every sum
 * has one block and a fixed order: no atomics. The head's dimensions are what the first kernel sums over and the second
 * has as columns, so no size of heads needs tiles of its own. The query heads of one key head must fit together: almost
 * 4096 pairs of tiles of 128 queries and 128 keys, or, without a window, 3968 tokens for 8 heads and 11392 for 1.
 *
 * Only queries and keys of the sequences' tokens are read. A NaN goes where it goes in the forward pass and into all
 * gradients that depend on what it made NaN; as there, a hidden NaN reaches those whose tile holds it with weight 0. */
#include "kernels/cuda/attention.cuh"

enum {
    TILE = 128, /* queries and keys of a tile of P or dS, and rows of a tile of a gradient */
    TILE_BYTES = TILE * TILE * 2,
    STAGES = 3, /* of operands in shared memory: one at work, the others on their way */
    THREADS = 256,
    WARPS_N = 4,
    WARP_ROWS = TILE / (THREADS / 32 / WARPS_N),
    MT = WARP_ROWS / 16, /* m-tiles of a warp */
    SCORE_COLS = TILE / WARPS_N,
    SCORE_NT = SCORE_COLS / 8,
    RUN = 4, /* tiles of keys that a block of the first kernel takes */
};

/* Scratch memory: P and dS of the heads at work, [heads, tiles of a head], each tile as 16 × 16 matrices [8 queries,
 * 8 keys], so that ldmatrix reads 128 bytes in a row whichever side it takes as rows. A tile of queries sees the tiles
 * of keys [i − reach, i]; those of a head stand row by row. */
struct gradient {
    const bf16 *q, *keys, *values, *out, *dout;
    const float *lse;
    int64_t q_stride, keys_stride, values_stride, out_stride, dout_stride, lse_stride, max_positions;
    float2 *stats; /* [tokens, n_heads]: lse in powers of two, Σ dout ⊙ out */
    unsigned char *p, *ds;
    int64_t head_tiles;
    int n, window; /* tokens of a sequence; > 0 */
    int n_heads, n_kv_heads, per_kv, head_dim;
    int n_tiles, reach;
    int first_unit, n_units; /* key/value heads of all sequences at work */
    float scale, cap, bend;  /* bend: as capped takes it; 0: no soft cap */
};

/* One of the three products: tiles of P or dS times b, into c. */
struct product {
    const unsigned char *tiles;
    const bf16 *b;
    bf16 *c;
    int64_t b_stride, c_stride;
};

/* Of a head, in rows before the i-th. */
static __host__ __device__ __forceinline__ int64_t tiles_before(int i, int reach)
{
    const int64_t ramp = i <= reach ? i : reach + 1;
    return ramp * (ramp + 1) / 2 + (i - ramp) * (reach + 1);
}

/* head: of those at work. */
static __device__ __forceinline__ int64_t tile_at(const struct gradient &a, int head, int i, int j)
{
    return (head * a.head_tiles + tiles_before(i, a.reach) + j - max(0, i - a.reach)) * TILE_BYTES;
}

/* --- what the softmax left ---------------------------------------------------------------------------------------- */

/* A warp for each head of each token. */
static __global__ void __launch_bounds__(THREADS) stats_kernel(const struct gradient a, int64_t n_pairs)
{
    const int64_t pair = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (pair >= n_pairs)
        return;
    const int64_t token = pair / a.n_heads, column = pair % a.n_heads * a.head_dim;
    const bf16 *out = a.out + token * a.out_stride + column, *dout = a.dout + token * a.dout_stride + column;
    float sum = 0;
    for (int d = threadIdx.x % 32 * 2; d < a.head_dim; d += 64) {
        const float2 x = __bfloat1622float2(*(const __nv_bfloat162 *)(out + d)),
                     y = __bfloat1622float2(*(const __nv_bfloat162 *)(dout + d));
        sum += x.x * y.x + x.y * y.y;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        a.stats[pair] = make_float2(a.lse[token * a.lse_stride + pair % a.n_heads] * LOG2_E, sum);
}

/* --- P and dS ----------------------------------------------------------------------------------------------------- */

/* A stage holds BK dimensions of a tile's queries, keys, gradients of the result, and values. */
template <int BK> struct scoring {
    enum {
        OPERAND_BYTES = TILE * BK * 2,
        STAGE_BYTES = 4 * OPERAND_BYTES,
        SHARED_BYTES = STAGES * STAGE_BYTES
    };
};

/* What a block of the first kernel has to do: a tile of queries, and tiles of keys [begin, end). */
struct score_work {
    const bf16 *q, *dout, *keys, *values; /* of the first query of the tile, and of key 0 */
    const float2 *stats;
    int head, i, begin, end; /* head: of those at work */
};

static __device__ __forceinline__ struct score_work find_scores(const struct gradient &a)
{
    struct score_work w;
    const int n_runs = (min(a.n_tiles, a.reach + 1) + RUN - 1) / RUN;
    w.head = blockIdx.y;
    w.i = blockIdx.x / n_runs;
    w.begin = max(0, w.i - a.reach) + blockIdx.x % n_runs * RUN;
    w.end = min(w.begin + RUN, w.i + 1);
    const int unit = a.first_unit + w.head / a.per_kv, kv_head = unit % a.n_kv_heads;
    const int64_t sequence = unit / a.n_kv_heads, slot = sequence * a.max_positions,
                  row = sequence * a.n + w.i * TILE;
    const int head = kv_head * a.per_kv + w.head % a.per_kv;
    w.q = a.q + row * a.q_stride + head * a.head_dim;
    w.dout = a.dout + row * a.dout_stride + head * a.head_dim;
    w.keys = a.keys + slot * a.keys_stride + kv_head * a.head_dim;
    w.values = a.values + slot * a.values_stride + kv_head * a.head_dim;
    w.stats = a.stats + row * a.n_heads + head;
    return w;
}

/* Starts the copies of a stage: dimensions [dim, dim + BK) of the tile's queries and the j-th tile's keys. */
template <int BK>
static __device__ __forceinline__ void load_scores(uint32_t to, const struct gradient &a,
                                                   const struct score_work &w, int j, int dim)
{
    const int n_queries = a.n - w.i * TILE, n_keys = a.n - j * TILE, n_dims = a.head_dim - dim;
    const int64_t key = (int64_t)j * TILE;
    load_tile<THREADS, TILE, BK>(to, w.q + dim, a.q_stride, n_queries, n_dims);
    to += scoring<BK>::OPERAND_BYTES;
    load_tile<THREADS, TILE, BK>(to, w.keys + key * a.keys_stride + dim, a.keys_stride, n_keys, n_dims);
    to += scoring<BK>::OPERAND_BYTES;
    load_tile<THREADS, TILE, BK>(to, w.dout + dim, a.dout_stride, n_queries, n_dims);
    to += scoring<BK>::OPERAND_BYTES;
    load_tile<THREADS, TILE, BK>(to, w.values + key * a.values_stride + dim, a.values_stride, n_keys, n_dims);
}

/* P and dS of a tile from its scores and dout·Vᵀ, which become 0. row, column: of this lane's first in the tile. */
template <bool CAPPED>
static __device__ __forceinline__ void store_scores(const struct gradient &a, const struct score_work &w,
                                                    int j, float (&s)[MT][SCORE_NT][4],
                                                    float (&dp)[MT][SCORE_NT][4], int row, int column)
{
    const int64_t at = tile_at(a, w.head, w.i, j);
    uint32_t *p = (uint32_t *)(a.p + at), *ds = (uint32_t *)(a.ds + at);
    const int first = w.i * TILE, key = j * TILE + column;
    const bool edge = j == w.i || first + TILE > a.n || j * TILE <= first + TILE - 1 - a.window;
    const float scale = (CAPPED ? a.cap : a.scale) * LOG2_E;
    float2 stats[MT * 2]; /* all loads before the first store, which they could not pass */
#pragma unroll
    for (int i = 0; i < MT * 2; i++)
        stats[i] =
            first + row + i * 8 < a.n ? w.stats[(row + i * 8) * (int64_t)a.n_heads] : make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int m = i / 2, h = i % 2, query = row + i * 8;
#pragma unroll
        for (int n = 0; n < SCORE_NT; n++) {
            float x[2], y[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int ahead = key + n * 8 + e - first - query;
                const bool seen = !edge || (first + query < a.n && ahead <= 0 && ahead > -a.window);
                const float score = CAPPED ? capped(s[m][n][h * 2 + e], a.bend) : s[m][n][h * 2 + e],
                            slope = CAPPED ? a.scale * (1 - score * score) : a.scale;
                x[e] = seen ? power_of_two(fmaf(score, scale, -stats[i].x)) : 0;
                y[e] = seen ? x[e] * (dp[m][n][h * 2 + e] - stats[i].y) * slope : 0;
                s[m][n][h * 2 + e] = dp[m][n][h * 2 + e] = 0;
            }
            const int word = (query / 8 * (TILE / 8) + column / 8 + n) * 32 + threadIdx.x % 32;
            p[word] = pack(x[0], x[1]);
            ds[word] = pack(y[0], y[1]);
        }
    }
}

/* Grid: (tiles of queries times runs of tiles of keys, heads at work). The steps of all its tiles are one pipeline. */
template <int BK, bool CAPPED>
static __global__ void __launch_bounds__(THREADS, 1) score_kernel(const struct gradient a)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    const struct score_work w = find_scores(a);
    const int n_slices = (a.head_dim + BK - 1) / BK, n_steps = (w.end - w.begin) * n_slices;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 / WARPS_N * WARP_ROWS,
              warp_column = threadIdx.x / 32 % WARPS_N * SCORE_COLS;
    const uint32_t base = shared_address(shared);
    /* where this lane points ldmatrix within an operand */
    const uint32_t a_at = place<BK * 2>(warp_row + lane % 16, lane / 16),
                   b_at = place<BK * 2>(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    float s[MT][SCORE_NT][4] = {}, dp[MT][SCORE_NT][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < n_steps)
            load_scores<BK>(base + step * scoring<BK>::STAGE_BYTES, a, w, w.begin + step / n_slices,
                            step % n_slices * BK);
        end_copy_group();
    }
    for (int step = 0; step < n_steps; step++) {
        wait_for_copy_groups<STAGES - 2>();
        __syncthreads(); /* this step's operands are there, and nobody reads those of the step before */
        const int next = step + STAGES - 1, j = w.begin + step / n_slices;
        if (next < n_steps)
            load_scores<BK>(base + next % STAGES * scoring<BK>::STAGE_BYTES, a, w, w.begin + next / n_slices,
                            next % n_slices * BK);
        end_copy_group();
        const uint32_t at = base + step % STAGES * scoring<BK>::STAGE_BYTES;
        if (sees(j * TILE + warp_column, SCORE_COLS, w.i * TILE + warp_row, WARP_ROWS, a.window)) {
            multiply_rows<MT, SCORE_NT, BK>(s, at + a_at, at + scoring<BK>::OPERAND_BYTES + b_at);
            multiply_rows<MT, SCORE_NT, BK>(dp, at + 2 * scoring<BK>::OPERAND_BYTES + a_at,
                                            at + 3 * scoring<BK>::OPERAND_BYTES + b_at);
        }
        if (step % n_slices == n_slices - 1)
            store_scores<CAPPED>(a, w, j, s, dp, warp_row + lane / 4, warp_column + lane % 4 * 2);
    }
}

/* --- gradients ---------------------------------------------------------------------------------------------------- */

/* A block takes TILE rows and COLS columns of a result, BK rows of b at a time. TURNED: the rows are keys, and tiles are
 * read column by column; else they are queries. */
template <int COLS_, int BK_, bool TURNED_> struct multiplying {
    enum {
        COLS = COLS_,
        BK = BK_,
        TURNED = TURNED_,
        NT = COLS / WARPS_N / 8,
        SLICES = TILE / BK,
        A_BYTES = TILE * BK * 2,
        STAGE_BYTES = A_BYTES + BK * COLS * 2,
        SHARED_BYTES = STAGES * STAGE_BYTES,
    };
};

/* What a block of the second kernel has to do. */
struct product_work {
    const unsigned char *tiles;
    const bf16 *b; /* of row 0 of its sequence and the first head, at its first column */
    bf16 *c;       /* at row 0 of its tile and its first column */
    int64_t b_stride, c_stride;
    int head, tile, begin, end; /* first head at work; its tile of c; tiles along the sum */
    int n_heads;                /* that it sums over */
    int n_rows, n_columns;      /* of c, from here on */
};

template <class T>
static __device__ __forceinline__ struct product_work find_product(const struct gradient &a,
                                                                   const struct product &p)
{
    struct product_work w;
    const int n_blocks = (a.head_dim + T::COLS - 1) / T::COLS, column = blockIdx.x % n_blocks * T::COLS,
              group = blockIdx.x / n_blocks;
    const int unit = a.first_unit + (T::TURNED ? group : group / a.per_kv), kv_head = unit % a.n_kv_heads;
    const int first_head = kv_head * a.per_kv + (T::TURNED ? 0 : group % a.per_kv);
    const int64_t sequence = unit / a.n_kv_heads, row = sequence * a.n, slot = sequence * a.max_positions;
    /* what has the most tiles to sum starts first: early keys, late queries */
    w.tile = T::TURNED ? blockIdx.y : a.n_tiles - 1 - blockIdx.y;
    w.begin = T::TURNED ? w.tile : max(0, w.tile - a.reach);
    w.end = T::TURNED ? min(w.tile + a.reach + 1, a.n_tiles) : w.tile + 1;
    w.head = T::TURNED ? group * a.per_kv : group;
    w.n_heads = T::TURNED ? a.per_kv : 1;
    w.tiles = p.tiles;
    w.b_stride = p.b_stride, w.c_stride = p.c_stride;
    w.b = p.b + (T::TURNED ? row : slot) * p.b_stride + (T::TURNED ? first_head : kv_head) * a.head_dim +
          column;
    w.c = p.c + ((T::TURNED ? slot : row) + w.tile * TILE) * p.c_stride +
          (T::TURNED ? kv_head : first_head) * a.head_dim + column;
    w.n_rows = a.n - w.tile * TILE;
    w.n_columns = a.head_dim - column;
    return w;
}

/* Starts the copies of a step: a slice of a tile of P or dS, in the order of its matrices, and BK rows of b. */
template <class T>
static __device__ __forceinline__ void load_product(uint32_t to, const struct gradient &a,
                                                    const struct product_work &w, int step)
{
    const int slice = step % T::SLICES, n = w.end - w.begin, head = step / T::SLICES / n,
              along = w.begin + step / T::SLICES % n;
    const unsigned char *tile = w.tiles + (T::TURNED ? tile_at(a, w.head + head, along, w.tile)
                                                     : tile_at(a, w.head + head, w.tile, along));
#pragma unroll
    for (int i = 0; i < TILE * T::BK / 8 / THREADS; i++) {
        const int chunk = threadIdx.x + i * THREADS; /* of 16 bytes: a row of a matrix */
        const int from = T::TURNED ? slice * (TILE * T::BK / 8) + chunk
                                   : chunk / T::BK * TILE + slice * T::BK + chunk % T::BK;
        copy_async(to + chunk * 16, tile + from * 16, true);
    }
    const int row = along * TILE + slice * T::BK;
    load_tile<THREADS, T::BK, T::COLS>(to + T::A_BYTES, w.b + row * w.b_stride + head * a.head_dim,
                                       w.b_stride, a.n - row, w.n_columns);
}

/* Whether the mask leaves anything of a step to these rows. */
template <class T>
static __device__ __forceinline__ bool matters(const struct gradient &a, const struct product_work &w,
                                               int step, int warp_row)
{
    const int along = (w.begin + step / T::SLICES % (w.end - w.begin)) * TILE + step % T::SLICES * T::BK;
    const int row = w.tile * TILE + warp_row;
    return T::TURNED ? sees(row, WARP_ROWS, along, T::BK, a.window)
                     : sees(along, T::BK, row, WARP_ROWS, a.window);
}

/* c += a·b of a step; a_at, b_at: where this lane points ldmatrix. */
template <class T>
static __device__ __forceinline__ void multiply_slice(float (&c)[MT][T::NT][4], uint32_t a_at, uint32_t b_at)
{
    const int matrix = 128, line = (T::TURNED ? TILE : T::BK) / 8 * matrix; /* a line of matrices */
#pragma unroll
    for (int step = 0; step < T::BK / 16; step++) {
        uint32_t x[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (T::TURNED)
                load_matrices_transposed(x[m], a_at + 2 * step * line + 2 * m * matrix);
            else
                load_matrices(x[m], a_at + 2 * m * line + 2 * step * matrix);
        }
#pragma unroll
        for (int n = 0; n < T::NT; n += 2) {
            uint32_t y[4];
            load_matrices_transposed(y, chunks_on(b_at, n) + step * 16 * T::COLS * 2);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply_add(c[m][n], x[m], y[0], y[1]);
                multiply_add(c[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* Grid: (blocks of columns of the units' or heads' results, tiles of rows, 2 products for keys and 1 for queries). */
template <class T>
static __global__ void __launch_bounds__(THREADS, T::COLS > 128 ? 1 : 2)
    product_kernel(const struct gradient a, const struct product first, const struct product second)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    const struct product_work w = find_product<T>(a, blockIdx.z ? second : first);
    const int n_steps = w.n_heads * (w.end - w.begin) * T::SLICES;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 / WARPS_N * WARP_ROWS,
              warp_n = threadIdx.x / 32 % WARPS_N;
    const uint32_t base = shared_address(shared);
    /* a's fragment: two matrices along its rows, then the same further along the sum */
    const int along_rows = warp_row / 8 + lane / 8 % 2, along_sum = lane / 16;
    const uint32_t a_at = (T::TURNED ? along_sum * (TILE / 8) + along_rows
                                     : along_rows * (T::BK / 8) + along_sum) *
                              128 +
                          lane % 8 * 16,
                   b_at = T::A_BYTES + place<T::COLS * 2>(lane % 16, warp_n * T::NT + lane / 16);
    float c[MT][T::NT][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < n_steps)
            load_product<T>(base + step * T::STAGE_BYTES, a, w, step);
        end_copy_group();
    }
    for (int step = 0; step < n_steps; step++) {
        wait_for_copy_groups<STAGES - 2>();
        __syncthreads(); /* this step's operands are there, and nobody reads those of the step before */
        const int next = step + STAGES - 1;
        if (next < n_steps)
            load_product<T>(base + next % STAGES * T::STAGE_BYTES, a, w, next);
        end_copy_group();
        const uint32_t at = base + step % STAGES * T::STAGE_BYTES;
        if (matters<T>(a, w, step, warp_row))
            multiply_slice<T>(c, at + a_at, at + b_at);
    }
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int row = warp_row + i * 8 + lane / 4;
        bf16 *to = w.c + row * w.c_stride + warp_n * T::NT * 8 + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < T::NT; n++)
            if (row < w.n_rows && (warp_n * T::NT + n) * 8 < w.n_columns)
                *(uint32_t *)(to + n * 8) = pack(c[i / 2][n][i % 2 * 2], c[i / 2][n][i % 2 * 2 + 1]);
    }
}

/* --- launches ----------------------------------------------------------------------------------------------------- */

/* The kernels over the heads at work: dvalues, dkeys and dq. */
typedef int launch_fn(const struct backend *b, const struct gradient *a, const struct product products[3]);

template <int BK> static int launch_scores(const struct backend *b, const struct gradient *a)
{
    const int bytes = scoring<BK>::SHARED_BYTES;
    const auto kernel = a->bend > 0 ? score_kernel<BK, true> : score_kernel<BK, false>;
    const int rc =
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                    "attention_backward");
    if (rc < 0)
        return rc;
    const int most = a->n_tiles < a->reach + 1 ? a->n_tiles : a->reach + 1;
    const dim3 grid((unsigned)(a->n_tiles * ((most + RUN - 1) / RUN)), (unsigned)(a->n_units * a->per_kv));
    kernel<<<grid, THREADS, bytes, cuda_state(b)->stream>>>(*a);
    return cuda_launched("attention_backward");
}

/* second: of the same shapes as first, or NULL. */
template <class T>
static int launch_product(const struct backend *b, const struct gradient *a, const struct product *first,
                          const struct product *second)
{
    const int rc = cuda_status(
        cudaFuncSetAttribute(product_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::SHARED_BYTES),
        "attention_backward");
    if (rc < 0)
        return rc;
    const int n_blocks = (a->head_dim + T::COLS - 1) / T::COLS;
    const dim3 grid((unsigned)(a->n_units * (T::TURNED ? 1 : a->per_kv) * n_blocks), (unsigned)a->n_tiles,
                    second ? 2 : 1);
    product_kernel<T>
        <<<grid, THREADS, T::SHARED_BYTES, cuda_state(b)->stream>>>(*a, *first, second ? *second : *first);
    return cuda_launched("attention_backward");
}

template <int COLS, int BK>
static int launch(const struct backend *b, const struct gradient *a, const struct product products[3])
{
    int rc = launch_scores<BK>(b, a);
    if (!rc)
        rc = launch_product<multiplying<COLS, BK, true>>(b, a, &products[0], &products[1]);
    if (!rc)
        rc = launch_product<multiplying<COLS, BK, false>>(b, a, &products[2], NULL);
    return rc;
}

static constexpr int larger(int a, int b)
{
    return a > b ? a : b;
}

/* In order of preference: the first whose columns hold head_dim or that has the most, and whose stages fit. */
static const struct {
    int cols, shared_bytes;
    launch_fn *launch;
} variants[] = {
#define VARIANT(COLS, BK)                                                                                    \
    {                                                                                                        \
        COLS, larger(scoring<BK>::SHARED_BYTES, multiplying<COLS, BK, true>::SHARED_BYTES), launch<COLS, BK> \
    }
    VARIANT(64, 64),  VARIANT(64, 32), /* this and the last of each size: devices with 99 KiB */
    VARIANT(128, 64), VARIANT(128, 32), VARIANT(256, 64), VARIANT(256, 32),
#undef VARIANT
};
enum { MOST_COLS = 256 };

static int find_launch(const struct backend *b, int head_dim, launch_fn **out)
{
    int shared_bytes;
    const int rc = cuda_status(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                                      cuda_state(b)->ordinal),
                               "attention_backward");
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if ((variants[i].cols >= head_dim || variants[i].cols == MOST_COLS) &&
            variants[i].shared_bytes <= shared_bytes) {
            *out = variants[i].launch;
            return 0;
        }
    return err_set(ERR_UNSUPPORTED,
                   "attention_backward: tiles do not fit the device's %d bytes of shared memory",
                   shared_bytes);
}

/* --- the operation ------------------------------------------------------------------------------------------------ */

static struct gradient describe(const struct attention_spec *spec, const struct attention_tape *t,
                                const struct mat *dout)
{
    const struct heads *h = &spec->heads;
    gradient a = {};
    a.q = (const bf16 *)t->q.data, a.q_stride = t->q.stride;
    a.keys = (const bf16 *)t->keys.data, a.keys_stride = t->keys.stride;
    a.values = (const bf16 *)t->values.data, a.values_stride = t->values.stride;
    a.out = (const bf16 *)t->out.data, a.out_stride = t->out.stride;
    a.dout = (const bf16 *)dout->data, a.dout_stride = dout->stride;
    a.lse = (const float *)t->lse.data, a.lse_stride = t->lse.stride;
    a.max_positions = spec->sequences.max_positions;
    a.n = (int)(t->q.rows / spec->sequences.n);
    a.window = spec->window && spec->window < a.n ? (int)spec->window : a.n;
    a.n_heads = h->n_heads, a.n_kv_heads = h->n_kv_heads, a.per_kv = h->n_heads / h->n_kv_heads;
    a.head_dim = h->head_dim;
    a.n_tiles = (a.n + TILE - 1) / TILE;
    a.reach = (a.window - 1 + TILE - 1) / TILE;
    a.head_tiles = tiles_before(a.n_tiles, a.reach);
    a.scale = spec->scale, a.cap = spec->softcap, a.bend = bend_of(spec->scale, spec->softcap);
    return a;
}

/* As many key/value heads at a time as the scratch memory holds P and dS for, spread evenly over the turns. */
static int take_turns(const struct backend *b, struct gradient *a, struct product products[3],
                      int64_t n_units, launch_fn *run)
{
    const size_t stats_bytes = (size_t)(n_units * a->per_kv * a->n) * sizeof(float2) / 256 * 256 + 256,
                 part_bytes = (size_t)(a->per_kv * a->head_tiles) * TILE_BYTES;
    if (stats_bytes + 2 * part_bytes > CUDA_SCRATCH_BYTES)
        return err_set(
            ERR_UNSUPPORTED,
            "attention_backward: %d tokens a sequence, %d heads to a key head and %lld key heads in all "
            "need %zu MiB of scratch memory, expected at most %zu",
            a->n, a->per_kv, (long long)n_units, (stats_bytes + 2 * part_bytes) >> 20,
            CUDA_SCRATCH_BYTES >> 20);
    void *scratch;
    int rc = cuda_scratch(b, &scratch);
    if (rc < 0)
        return rc;
    a->stats = (float2 *)scratch;
    const int64_t n_pairs = n_units * a->per_kv * a->n;
    stats_kernel<<<(unsigned)((n_pairs + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0,
                   cuda_state(b)->stream>>>(*a, n_pairs);
    rc = cuda_launched("attention_backward");
    const int64_t fitting = (int64_t)((CUDA_SCRATCH_BYTES - stats_bytes) / (2 * part_bytes)),
                  n_turns = (n_units + fitting - 1) / fitting, at_a_time = (n_units + n_turns - 1) / n_turns;
    for (int64_t unit = 0; !rc && unit < n_units; unit += at_a_time) {
        a->first_unit = (int)unit;
        a->n_units = (int)(n_units - unit < at_a_time ? n_units - unit : at_a_time);
        a->p = (unsigned char *)scratch + stats_bytes;
        a->ds = a->p + a->n_units * part_bytes;
        products[0].tiles = a->p;
        products[1].tiles = products[2].tiles = a->ds;
        rc = run(b, a, products);
    }
    return rc;
}

extern "C" int cuda_attention_backward(const struct backend *b, const struct attention_spec *spec,
                                       const struct attention_tape *tape, const struct mat *dout,
                                       const struct mat *dq, const struct mat *dkeys,
                                       const struct mat *dvalues)
{
    const struct attention_tape *t = tape;
    CHECK(spec->sequences.first_position == 0);
    CHECK(t->lse.dtype == DTYPE_F32 && t->lse.rows == t->q.rows && t->lse.cols == spec->heads.n_heads);
    CHECK(dq->rows == t->q.rows);
    int rc = attention_check("attention_backward", spec, &t->q, &t->keys, &t->values, &t->out);
    if (!rc)
        rc = attention_check("attention_backward, gradients", spec, dq, dkeys, dvalues, dout);
    if (rc < 0 || t->q.rows == 0)
        return rc;
    launch_fn *run = NULL;
    rc = find_launch(b, spec->heads.head_dim, &run);
    if (rc < 0)
        return rc;
    struct gradient a = describe(spec, t, dout);
    struct product products[3] = {
        {NULL, a.dout, (bf16 *)dvalues->data, a.dout_stride, dvalues->stride},
        {NULL, a.q, (bf16 *)dkeys->data, a.q_stride, dkeys->stride},
        {NULL, a.keys, (bf16 *)dq->data, a.keys_stride, dq->stride},
    };
    return take_turns(b, &a, products, spec->sequences.n * spec->heads.n_kv_heads, run);
}

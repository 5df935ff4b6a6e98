/* Attention of few new tokens a sequence (decoding): the keys are split over blocks, and a second kernel combines what
 * they found. */
#include "kernels/cuda/attention.cuh"

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
    int per_kv;              /* heads that share a key/value head */
    int n_columns, n_groups; /* pairs, and groups of COLUMNS of them */
    int run, n_runs;         /* keys of a block; blocks along the keys */
    float *partial;          /* [tokens, n_heads, n_runs, head_dim], not yet divided by the sum */
    float2 *stats;           /* [tokens, n_heads, n_runs]: reference in powers of two, sum */
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
static __device__ __forceinline__ void score_columns(float (&s)[4], const uint4 *q, const bf16 *keys,
                                                     int64_t stride, int n, int head_dim)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float part[2][4] = {}; /* independent chains, to be added up */
#pragma unroll(D > 256 ? 4 : 8)
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
template <int D, bool CAPPED>
static __device__ __forceinline__ void soften_columns(struct column_state<D> *c, float (&s)[4],
                                                      uint32_t (&p)[2], int key, const struct problem &a)
{
    const float scale = a.scale;
    float factor[2];
#pragma unroll
    for (int e = 0; CAPPED && e < 4; e++)
        s[e] = capped(s[e], a.bend);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float highest = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int ahead = key + threadIdx.x % 32 / 4 + h * 8 - c->position[i];
            if (ahead > 0 || ahead <= -a.window)
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
                                                         const bf16 *values, int64_t stride, int n,
                                                         int head_dim)
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
template <int D, bool CAPPED>
static __global__ void __launch_bounds__(SPLIT_THREADS, 2)
    split_kernel(const struct problem a, const struct split s)
{
    __shared__ uint4 queries[D / 32 * 32];
    __shared__ float sum_o[COLUMNS * (D + 1)];
    __shared__ float2 warp_stats[SPLIT_WARPS][COLUMNS], stats[COLUMNS];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int column = blockIdx.x % s.n_groups * COLUMNS, n_columns = min((int)COLUMNS, s.n_columns - column);
    const int kv_head = blockIdx.x / s.n_groups % a.n_kv_heads;
    const int64_t sequence = blockIdx.x / s.n_groups / a.n_kv_heads;
    /* keys that any of these pairs sees, then those of this block */
    const int first = a.first_position + column / s.per_kv,
              last = a.first_position + (column + n_columns - 1) / s.per_kv;
    const int begin = max(0, first - a.window + 1) + (int)blockIdx.y * s.run,
              end = min(begin + s.run, last + 1);

    column_state<D> c = {};
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
        score_columns<D>(scores, queries, a.keys + slot * a.keys_stride + kv_head * a.head_dim, a.keys_stride,
                         end - key, a.head_dim);
        soften_columns<D, CAPPED>(&c, scores, p, key, a);
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
static __global__ void __launch_bounds__(SPLIT_THREADS)
    combine_kernel(const struct problem a, const struct split s)
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
    split s = {};
    s.per_kv = a->n_heads / a->n_kv_heads;
    s.n_columns = s.per_kv * a->n_new;
    s.n_groups = (s.n_columns + COLUMNS - 1) / COLUMNS;
    const int64_t positions = a->first_position + a->n_new, reach = (int64_t)a->window + a->n_new - 1;
    const int64_t n_keys = reach < positions ? reach : positions;
    const int64_t n_blocks = n_sequences * a->n_kv_heads * s.n_groups,
                  n_outputs = n_sequences * a->n_new * a->n_heads;
    const int64_t fitting =
        (int64_t)CUDA_SCRATCH_BYTES / (n_outputs * (a->head_dim + 2) * (int64_t)sizeof(float));
    int64_t n = (2 * cuda_state(b)->n_processors + n_blocks - 1) / n_blocks;
    n = n < fitting ? n : fitting;
    n = n > 1 ? n : 1;
    const int64_t run = (n_keys + n - 1) / n;
    s.run = (int)((run + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS);
    s.n_runs = (int)((n_keys + s.run - 1) / s.run);
    return s;
}

template <int D, bool CAPPED>
static int launch_split(const struct backend *b, const struct problem *a, int64_t n_sequences)
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
    split_kernel<D, CAPPED><<<grid, SPLIT_THREADS, 0, stream>>>(*a, s);
    if (s.n_runs > 1)
        combine_kernel<<<(unsigned)n_outputs, SPLIT_THREADS, 0, stream>>>(*a, s);
    return cuda_launched("attention");
}

extern "C" int attention_few(const struct backend *b, const struct problem *a, int64_t n_sequences)
{
    const bool capped = a->bend > 0;
    if (a->head_dim <= 64)
        return (capped ? launch_split<64, true> : launch_split<64, false>)(b, a, n_sequences);
    if (a->head_dim <= 128)
        return (capped ? launch_split<128, true> : launch_split<128, false>)(b, a, n_sequences);
    if (a->head_dim <= 256)
        return (capped ? launch_split<256, true> : launch_split<256, false>)(b, a, n_sequences);
    CHECK(!capped); /* attention_check */
    return launch_split<512, false>(b, a, n_sequences);
}

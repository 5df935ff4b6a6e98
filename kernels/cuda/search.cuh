/* The search for scales: candidates, and the choice among the best of them by the group's block of the Hessian. What
 * goes before, the choice by the diagonal, is in scales.cu, the one file that includes this. */
#ifndef GEMCUT_KERNELS_CUDA_SEARCH_CUH
#define GEMCUT_KERNELS_CUDA_SEARCH_CUH

#include "kernels/cuda/quant.cuh"

/* --- candidates --------------------------------------------------------------------------------------------------- */

enum kind { SIGNED, POSITIVE, ASYMMETRIC }; /* candidates of either sign; of one; with zero points */

enum {
    THREADS = 128,
    WARPS = THREADS / 32,
    N_RATIOS = 61,  /* symmetric: the extreme over 5, 5.1 … 11 of eight steps */
    N_SHRINKS = 45, /* asymmetric: both ends times 1, 0.99 … 0.56 */
    NEIGHBOURS = 6, /* on either side of the best that are judged by the block */
    N_JUDGED = 2 * NEIGHBOURS + 1,
    BLOCK_COLUMNS = 128, /* of the longest group that is */
};

struct search_job {
    const void *w;
    enum dtype dtype;
    const float *h;
    uint16_t *scales;
    int8_t *zeros;
    int64_t rows, cols, w_stride, h_stride, group, per_row, scales_stride, zeros_stride, rows_per_block;
    int bits;
    bool block;
};

/* The columns of a thread block's group, and its first row. */
struct place {
    int64_t g, col, n, row;
};

static __device__ __forceinline__ struct place place_of(const struct search_job &j)
{
    const int64_t g = blockIdx.x % j.per_row, col = g * j.group;
    return (struct place){g, col, j.cols - col < j.group ? j.cols - col : j.group,
                          blockIdx.x / j.per_row * j.rows_per_block};
}

static __device__ __forceinline__ float sign_of(int sign)
{
    return sign ? -1.0f : 1.0f;
}

static __device__ struct choice candidate(struct extremes e, int bits, bool symmetric, float sign, int i)
{
    if (!symmetric)
        return whole_range(e, code_range(bits), 1 - 0.01f * (float)i);
    const float extreme = fmaxf(-e.low, e.high);
    const float ratio = (5 + 0.1f * (float)i) * (float)(1 << (bits - 1)) / 8;
    return (struct choice){storable_scale(sign * (extreme / ratio)), 0};
}

static __device__ __forceinline__ float nearest_integer(float x)
{
    return (x + ROUND_MAGIC) - ROUND_MAGIC;
}

/* Mean of the group's diagonal, the same in every warp. */
static __device__ float mean_diagonal(const struct search_job &j, const struct place &p)
{
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < p.n; i += 32)
        sum += (double)j.h[(p.col + i) * (j.h_stride + 1)];
    return (float)(warp_sum(sum) / (double)p.n);
}

static __device__ __forceinline__ bool by_block(const struct search_job &j, const struct place &p, float mean)
{
    return j.block && p.n <= BLOCK_COLUMNS && mean > 0;
}

static __device__ void store_choice(const struct search_job &j, int64_t row, int64_t g, struct choice c)
{
    j.scales[row * j.scales_stride + g] = bf16_bits(c.scale);
    if (j.zeros)
        j.zeros[row * j.zeros_stride + g] = (int8_t)c.zero;
}

/* --- by the block ------------------------------------------------------------------------------------------------- */

/* eHeᵀ of N_JUDGED candidates at once. Half a warp takes them for one row and one sign; a lane has columns lane,
 * lane + 16, … of the group, PARTS of them. Of H the triangle above the diagonal and half the diagonal lie in shared
 * memory: eHeᵀ is twice what they give. Rows of H are walked in runs of 16; the errors of these 16 columns are worked
 * out by the lanes that have them and handed over through shared memory. An element of H read is used for 13 candidates
 * in two rows (or signs), an error read for PARTS columns. */
enum {
    ERROR_PITCH = 20, /* floats of a column's errors: 13, and banks that eight lanes do not share */
    ERROR_HALF = LANES * ERROR_PITCH + 16,        /* between those of the halves of a warp */
    WARP_FLOATS = 2 * ERROR_HALF + 2 * LANES * 4, /* the errors, and the candidates' grids */
};

/* A group's H as the lanes read it. Of a row its own part of the columns and those behind: four parts of a lane side by
 * side as long as there are four, the others one by one. */
template <int PARTS> struct half_block {
    static constexpr int N = LANES * PARTS, FLOATS = LANES * LANES * PARTS * (PARTS + 1) / 2;
    static __device__ __forceinline__ int at(int row, int part, int lane)
    {
        const int own = row / LANES, n = PARTS - own, i = part - own;
        const int begin = LANES * LANES * (own * PARTS - own * (own - 1) / 2) + row % LANES * n * LANES;
        return begin + (i < n / 4 * 4 ? i / 4 * 4 * LANES + lane * 4 + i % 4 : i * LANES + lane);
    }
};

template <int PARTS>
static __device__ void load_half_block(const struct search_job &j, const struct place &p, float *to)
{
    constexpr int N = half_block<PARTS>::N;
    const float *h = j.h + p.col * (j.h_stride + 1);
    for (int i = threadIdx.x; i < N * N; i += THREADS) {
        const int row = i / N, col = i % N;
        if (col / LANES < row / LANES)
            continue;
        const float x = col >= row && col < p.n ? h[row * j.h_stride + col] : 0;
        to[half_block<PARTS>::at(row, col / LANES, col % LANES)] = col == row ? 0.5f * x : x;
    }
    __syncthreads();
}

/* Of row k of the run PART: the parts from PART on; those before are not touched. */
template <int PARTS, int PART>
static __device__ __forceinline__ void read_parts(const float *h, int k, int lane, float (&to)[PARTS])
{
    constexpr int WHOLE = PART + (PARTS - PART) / 4 * 4;
#pragma unroll
    for (int part = PART; part < WHOLE; part += 4) {
        const float4 v = *(const float4 *)(h + half_block<PARTS>::at(PART * LANES + k, part, lane));
        to[part] = v.x;
        to[part + 1] = v.y;
        to[part + 2] = v.z;
        to[part + 3] = v.w;
    }
#pragma unroll
    for (int part = WHOLE; part < PARTS; part++)
        to[part] = h[half_block<PARTS>::at(PART * LANES + k, part, lane)];
}

/* The errors of this lane's column of part PART under all candidates → shared memory. */
static __device__ __forceinline__ void put_errors(float w, const float4 *grids, float *errors)
{
    float e[LANES];
#pragma unroll
    for (int i = 0; i < N_JUDGED; i++) {
        const float4 g = grids[i]; /* scale, inverse, low, high */
        e[i] = __fmaf_rn(nearest_integer(fminf(fmaxf(w * g.y, g.z), g.w)), g.x, -w);
    }
#pragma unroll
    for (int i = N_JUDGED; i < LANES; i++)
        e[i] = 0;
#pragma unroll
    for (int i = 0; i < LANES; i += 4)
        *(float4 *)(errors + i) = make_float4(e[i], e[i + 1], e[i + 2], e[i + 3]);
}

static __device__ __forceinline__ void get_errors(const float *errors, float (&e)[N_JUDGED])
{
#pragma unroll
    for (int i = 0; i + 4 <= N_JUDGED; i += 4) {
        const float4 v = *(const float4 *)(errors + i);
        e[i] = v.x;
        e[i + 1] = v.y;
        e[i + 2] = v.z;
        e[i + 3] = v.w;
    }
#pragma unroll
    for (int i = N_JUDGED / 4 * 4; i < N_JUDGED; i++)
        e[i] = errors[i];
}

/* Rows [16·PART, 16·PART + 16) of H; after them the columns of this part have all that stands above their diagonal. */
template <int PARTS, int PART>
static __device__ __forceinline__ void judge_part(const float *h, const float4 *grids, float *errors,
                                                  int lane, const float (&w)[PARTS],
                                                  float (&sum)[PARTS][N_JUDGED], float (&total)[N_JUDGED])
{
    put_errors(w[PART], grids, errors + lane * ERROR_PITCH);
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < LANES; k++) {
        float e[N_JUDGED], row[PARTS];
        get_errors(errors + k * ERROR_PITCH, e);
        read_parts<PARTS, PART>(h, k, lane, row);
#pragma unroll
        for (int part = PART; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < N_JUDGED; i++)
                sum[part][i] = __fmaf_rn(e[i], row[part], sum[part][i]);
    }
    float own[N_JUDGED];
    get_errors(errors + lane * ERROR_PITCH, own);
#pragma unroll
    for (int i = 0; i < N_JUDGED; i++)
        total[i] = __fmaf_rn(own[i], sum[PART][i], total[i]);
    __syncwarp();
    if constexpr (PART + 1 < PARTS)
        judge_part<PARTS, PART + 1>(h, grids, errors, lane, w, sum, total);
}

/* Lanes that are HALF apart each keep the sums of half of the candidates. */
template <int HALF> static __device__ __forceinline__ void halve(float (&x)[LANES], int lane)
{
    const bool upper = (lane & HALF) != 0;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float low = x[i], high = x[i + HALF];
        x[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, HALF);
    }
    if constexpr (HALF > 1)
        halve<HALF / 2>(x, lane);
}

/* Σ over the 16 lanes of each candidate's share; lane i gets candidate i's. */
static __device__ __forceinline__ float sum_for_lane(const float (&total)[N_JUDGED], int lane)
{
    float x[LANES];
#pragma unroll
    for (int i = 0; i < LANES; i++)
        x[i] = i < N_JUDGED ? total[i] : 0;
    halve<LANES / 2>(x, lane);
    return x[0];
}

/* Takes the lesser of two lanes' errors, of equals that of the lower number. */
static __device__ __forceinline__ void take_better(float &error, int &number, int distance)
{
    const float other = __shfl_xor_sync(0xffffffffu, error, distance);
    const int other_number = __shfl_xor_sync(0xffffffffu, number, distance);
    if (other < error || (other == error && other_number < number)) {
        error = other;
        number = other_number;
    }
}

template <int PARTS> static __device__ __forceinline__ struct extremes row_extremes(const float (&w)[PARTS])
{
    struct extremes e = {0, 0};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        e.low = fminf(e.low, w[part]);
        e.high = fmaxf(e.high, w[part]);
    }
    for (int i = LANES / 2; i; i >>= 1) {
        e.low = fminf(e.low, __shfl_xor_sync(0xffffffffu, e.low, i));
        e.high = fmaxf(e.high, __shfl_xor_sync(0xffffffffu, e.high, i));
    }
    return e;
}

template <int PARTS, enum kind KIND>
static __device__ void search_row(const struct search_job &j, const struct place &p, int64_t row, bool here,
                                  const float *h, float *warp_room)
{
    const int lane = threadIdx.x % LANES, half = threadIdx.x / LANES % 2, sign = KIND == SIGNED ? half : 0;
    float4 *grids = (float4 *)(warp_room + 2 * ERROR_HALF) + half * LANES;
    float w[PARTS], sum[PARTS][N_JUDGED], total[N_JUDGED];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int k = part * LANES + lane;
        w[part] = k < p.n ? load_as_float(j.w, j.dtype, row * j.w_stride + p.col + k) : 0;
#pragma unroll
        for (int i = 0; i < N_JUDGED; i++)
            sum[part][i] = total[i] = 0;
    }
    const int n = KIND == ASYMMETRIC ? N_SHRINKS : N_RATIOS;
    const uint16_t found = j.scales[row * j.scales_stride + p.g];
    /* beyond either end: the end once more, which changes nothing */
    const int i = min(max((sign ? found / 64 : found % 64) - NEIGHBOURS + lane, 0), n - 1);
    const struct choice c = candidate(row_extremes<PARTS>(w), j.bits, KIND != ASYMMETRIC, sign_of(sign), i);
    const struct code_range r = code_range(j.bits);
    grids[lane] = make_float4(c.scale, 1 / c.scale, r.low - c.zero, r.high - c.zero);
    __syncwarp();
    judge_part<PARTS, 0>(h, grids, warp_room + half * ERROR_HALF, lane, w, sum, total);
    const float mine = sum_for_lane(total, lane);
    float error = lane < N_JUDGED && mine < INFINITY ? mine : INFINITY;
    int number = sign * LANES + lane; /* where none is a number: the first */
    for (int distance = LANES / 2; distance; distance >>= 1)
        take_better(error, number, distance);
    if (KIND == SIGNED)
        take_better(error, number, LANES);
    if (here && number == sign * LANES + lane)
        store_choice(j, row, p.g, c);
}

template <int PARTS, enum kind KIND>
static __global__ void __launch_bounds__(THREADS, PARTS == 8 ? 3 : 4) search_block_kernel(struct search_job j)
{
    extern __shared__ float4 room[];
    constexpr int AT_ONCE = KIND == SIGNED ? 1 : 2; /* rows of a warp */
    float *h = (float *)room;
    const struct place p = place_of(j);
    if (!by_block(j, p, mean_diagonal(j, p)))
        return; /* decided by the diagonal */
    load_half_block<PARTS>(j, p, h);
    const int warp = threadIdx.x / 32;
    const int64_t end = p.row + j.rows_per_block < j.rows ? p.row + j.rows_per_block : j.rows;
    for (int64_t first = p.row + warp * AT_ONCE; first < end; first += WARPS * AT_ONCE) {
        const int64_t row = first + (AT_ONCE == 2 ? threadIdx.x / LANES % 2 : 0);
        search_row<PARTS, KIND>(j, p, row < end ? row : end - 1, row < end, h,
                                h + half_block<PARTS>::FLOATS + warp * WARP_FLOATS);
    }
}

#endif

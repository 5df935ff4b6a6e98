/* Causal attention with an optional window over a batch of sequences, BF16 with FP32 scores, softmax and sums. Many new
 * tokens a sequence: the flash-attention kernel here, one block for a tile of queries of a head. Few (decoding):
 * attention_few.cu. Neither uses atomics, so results repeat to the bit.
 *
 * NaNs go through: a query that sees one, in its keys or values or itself, gets NaN. As in any attention that
 * multiplies a hidden key's weight 0 with its value, queries up to a tile before a NaN in the values get it as well;
 * rows of the cache beyond the last new token are never read. */
#include "kernels/cuda/attention.cuh"

enum { FEW_TOKENS = 8 }; /* new tokens a sequence, up to which the keys are split */

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

/* s = Q·Kᵀ; q, k: where this lane's first rows are. */
template <class T>
static __device__ __forceinline__ void score_tile(float (&s)[T::MT][T::NT][4], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < T::MT * T::NT * 4; i++)
        s[i / 4 / T::NT][i / 4 % T::NT][i % 4] = 0;
    multiply_rows<T::MT, T::NT, T::D>(s, q, k);
}

template <class T> static __device__ __forceinline__ void cap_tile(float (&s)[T::MT][T::NT][4], float bend)
{
#pragma unroll
    for (int i = 0; i < T::MT * T::NT * 4; i++) {
        float *x = &s[i / 4 / T::NT][i / 4 % T::NT][i % 4];
        *x = capped(*x, bend);
    }
}

/* Hides the keys that a query does not see. key, position: of this lane's first score. */
template <class T>
static __device__ __forceinline__ void hide_keys(float (&s)[T::MT][T::NT][4], int key, int position,
                                                 int window)
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
static __device__ __forceinline__ void publish_highest(const float (&s)[T::MT][T::NT][4], float *highest,
                                                       int row, int warp_n)
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

template <class T> static __device__ __forceinline__ void start_rows(struct row_state<T> *r)
{
#pragma unroll
    for (int i = 0; i < T::MT * 2; i++)
        r->reference[i / 2][i % 2] = NO_REFERENCE;
}

template <class T>
static __device__ __forceinline__ void follow_rows(struct row_state<T> *r, const float *highest, int row,
                                                   float scale)
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
static __device__ __forceinline__ void exponentials(struct row_state<T> *r, const float (&s)[T::MT][T::NT][4],
                                                    int n, float scale, uint32_t (&p)[T::MT][T::NT][2])
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
 * would hold up the loads of the steps after it. p: where this lane writes; p_before, v: the
 * tile before, if there is one that matters. */
template <class T>
static __device__ __forceinline__ void soften_tile(struct row_state<T> *r, const float (&s)[T::MT][T::NT][4],
                                                   float scale, uint32_t p, bool before, uint32_t p_before,
                                                   uint32_t v)
{
    uint32_t rounded[T::MT][T::NT][2];
    if (before) {
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
 * lse: of row 0, or NULL. sums [BM, WN]. */
template <class T>
static __device__ __forceinline__ void store_rows(const struct problem &a, const struct row_state<T> *r,
                                                  float *sums, int row, int warp_n, bf16 *out, float *lse,
                                                  int n_rows, int n_dims)
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
        if (lse && at < n_rows && warp_n == 0 && threadIdx.x % 4 == 0)
            lse[at * a.lse_stride] = (r->reference[i / 2][i % 2] + log2f(total)) / LOG2_E;
#pragma unroll
        for (int n = 0; n < T::OT; n++)
            if (at < n_rows && n * 8 < n_dims)
                *(uint32_t *)(out + at * a.out_stride + n * 8) =
                    pack(r->o[i / 2][n][i % 2 * 2] * inverse, r->o[i / 2][n][i % 2 * 2 + 1] * inverse);
    }
}

/* What a block of the prefill kernel has to do. */
struct block_work {
    const bf16 *q, *keys, *values; /* of its first query, and of key `begin` */
    bf16 *out;
    float *lse;
    int n_rows, first, last; /* queries, and the positions of the first and the last */
    int begin, end;          /* keys that any of them sees */
};

static __device__ __forceinline__ struct block_work find_work(const struct problem &a, int tile_rows)
{
    struct block_work w;
    const int head = blockIdx.x % a.n_heads, kv_head = head / (a.n_heads / a.n_kv_heads);
    const int64_t sequence = blockIdx.x / a.n_heads;
    /* late queries see the most keys and start first, so that the last blocks to run are short */
    const int token = (int)(gridDim.y - 1 - blockIdx.y) * tile_rows;
    w.n_rows = min(tile_rows, a.n_new - token);
    w.first = a.first_position + token;
    w.last = w.first + w.n_rows - 1;
    w.begin = max(0, w.first - a.window + 1);
    w.end = w.last + 1;
    const int64_t slot = sequence * a.max_positions + w.begin, row = sequence * a.n_new + token;
    w.q = a.q + row * a.q_stride + head * a.head_dim;
    w.out = a.out + row * a.out_stride + head * a.head_dim;
    w.lse = a.lse ? a.lse + row * a.lse_stride + head : NULL;
    w.keys = a.keys + slot * a.keys_stride + kv_head * a.head_dim;
    w.values = a.values + slot * a.values_stride + kv_head * a.head_dim;
    return w;
}

/* Grid: (heads of all sequences, tiles of queries). Scores of tile j, then its softmax beside the values of tile j − 1;
 * each of the two phases ends in a barrier and covers the copy that the next one needs. */
template <class T, bool CAPPED>
static __global__ void __launch_bounds__(T::THREADS, 1) prefill_kernel(const struct problem a)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    float *highest = (float *)(shared + T::Q_BYTES + 2 * T::KV_BYTES + 2 * T::P_BYTES);
    const uint32_t sq = shared_address(shared), sk = sq + T::Q_BYTES, sv = sk + T::KV_BYTES,
                   sp = sv + T::KV_BYTES;
    const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 / T::WN, warp_n = threadIdx.x / 32 % T::WN;
    const struct block_work w = find_work(a, T::BM);
    const int n_tiles = (w.end - w.begin + T::BN - 1) / T::BN;

    /* where this lane points ldmatrix, and its first row and column of S */
    const int warp_row = warp_m * T::MT * 16, row = warp_row + lane / 4,
              column = warp_n * T::NT * 8 + lane % 4 * 2;
    const int warp_first = w.first + warp_row;
    const uint32_t q_at = sq + place<T::D * 2>(warp_row + lane % 16, lane / 16);
    const uint32_t k_at = sk + place<T::D * 2>(warp_n * T::NT * 8 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t v_at = sv + place<T::D * 2>(lane % 16, warp_n * T::OT + lane / 16);
    const uint32_t p_at = sp + place<T::BN * 2>(warp_row + lane % 16, lane / 16);
    const uint32_t p_to = sp + place<T::BN * 2>(row, warp_n * T::NT) + lane % 4 * 4;
    row_state<T> r = {};
    start_rows<T>(&r);
    load_tile<T::THREADS, T::BM, T::D>(sq, w.q, a.q_stride, w.n_rows, a.head_dim);
    load_tile<T::THREADS, T::BN, T::D>(sk, w.keys, a.keys_stride, w.end - w.begin, a.head_dim);
    wait_for_copies();
    __syncthreads();
    for (int j = 0; j < n_tiles; j++) {
        const int key = w.begin + j * T::BN;
        if (j > 0)
            load_tile<T::THREADS, T::BN, T::D>(sv, w.values + (int64_t)(j - 1) * T::BN * a.values_stride,
                                               a.values_stride, w.end - key + T::BN, a.head_dim);
        float s[T::MT][T::NT][4]; /* where it stays unset, hide_keys hides all of it */
        if (sees(key + warp_n * T::NT * 8, T::NT * 8, warp_first, T::MT * 16, a.window)) {
            score_tile<T>(s, q_at, k_at);
            if (CAPPED)
                cap_tile<T>(s, a.bend);
        }
        if (key + T::BN - 1 > w.first || key <= w.last - a.window)
            hide_keys<T>(s, key + column, w.first + row, a.window);
        publish_highest<T>(s, highest, row, warp_n);
        wait_for_copies();
        __syncthreads();
        /* the keys' place is free: for the next keys, at the end for the last values */
        if (j + 1 < n_tiles)
            load_tile<T::THREADS, T::BN, T::D>(sk, w.keys + (int64_t)(j + 1) * T::BN * a.keys_stride,
                                               a.keys_stride, w.end - key - T::BN, a.head_dim);
        else
            load_tile<T::THREADS, T::BN, T::D>(sk, w.values + (int64_t)j * T::BN * a.values_stride,
                                               a.values_stride, w.end - key, a.head_dim);
        follow_rows<T>(&r, highest, row, a.scale);
        const bool saw = j > 0 && sees(key - T::BN, T::BN, warp_first, T::MT * 16, a.window);
        soften_tile<T>(&r, s, a.scale, p_to + j % 2 * T::P_BYTES, saw, p_at + (j + 1) % 2 * T::P_BYTES, v_at);
        rescale_rows<T>(&r);
        wait_for_copies();
        __syncthreads();
    }
#pragma unroll
    for (int step = 0; step < T::BN / 16; step++)
        add_values<T>(&r, step, p_at + (n_tiles - 1) % 2 * T::P_BYTES, v_at - T::KV_BYTES);
    const int dim = warp_n * T::OT * 8 + lane % 4 * 2;
    store_rows<T>(a, &r, highest, row, warp_n, w.out + dim, w.lse, w.n_rows, a.head_dim - dim);
}

template <class T, bool CAPPED>
static int launch_prefill(const struct backend *b, const struct problem *a, int64_t n_sequences)
{
    int rc = cuda_status(cudaFuncSetAttribute(prefill_kernel<T, CAPPED>,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, T::SHARED_BYTES),
                         "attention");
    if (rc < 0)
        return rc;
    const dim3 grid((unsigned)(n_sequences * a->n_heads), (unsigned)((a->n_new + T::BM - 1) / T::BM));
    prefill_kernel<T, CAPPED><<<grid, T::THREADS, T::SHARED_BYTES, cuda_state(b)->stream>>>(*a);
    return cuda_launched("attention");
}

/* --- the operation ------------------------------------------------------------------------------------------------ */

typedef int launch_fn(const struct backend *b, const struct problem *a, int64_t n_sequences);

/* Kernels that cap scores are built only for the heads of models that do. */
template <class T> static constexpr launch_fn *capped_prefill(void)
{
    if constexpr ((int)T::D <= (int)MAX_CAPPED)
        return launch_prefill<T, true>;
    else
        return NULL;
}

/* In order of preference: the first that holds head_dim and whose tiles fit the device. */
static const struct {
    int head_dim, shared_bytes;
    launch_fn *prefill, *capped;
} variants[] = {
#define PREFILL(D, WM, WN, MT, BN)                                                                           \
    tiling<D, WM, WN, MT, BN>::SHARED_BYTES, launch_prefill<tiling<D, WM, WN, MT, BN>, false>,               \
        capped_prefill<tiling<D, WM, WN, MT, BN>>()
    {64, PREFILL(64, 4, 2, 2, 128)},
    {64, PREFILL(64, 4, 2, 1, 64)}, /* this and the last of each size: devices with 99 KiB */
    {128, PREFILL(128, 4, 2, 2, 128)},
    {128, PREFILL(128, 4, 2, 1, 64)},
    {256, PREFILL(256, 4, 2, 2, 64)},
    {256, PREFILL(256, 4, 2, 1, 32)},
    {512, PREFILL(512, 2, 4, 2, 64)}, /* sm_90 */
    {512, PREFILL(512, 4, 2, 1, 32)}, /* sm_80 */
    {512, PREFILL(512, 1, 2, 1, 32)},
#undef PREFILL
};

static int check_alignment(const char *op, const struct mat *m, const char *what)
{
    if ((uintptr_t)m->data % 16 == 0 && m->stride % 8 == 0 && m->stride >= m->cols)
        return 0;
    return err_set(ERR_UNSUPPORTED,
                   "%s: %s at %p with %lld elements from row to row, expected multiples of 16 bytes", op,
                   what, m->data, (long long)m->stride);
}

extern "C" int attention_check(const char *op, const struct attention_spec *spec, const struct mat *q,
                               const struct mat *keys, const struct mat *values, const struct mat *out)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    CHECK(q->dtype == DTYPE_BF16 && keys->dtype == DTYPE_BF16 && values->dtype == DTYPE_BF16 &&
          out->dtype == DTYPE_BF16);
    CHECK(s->n > 0 && q->rows % s->n == 0 && out->rows == q->rows && out->cols == q->cols);
    CHECK(h->n_kv_heads > 0 && h->n_heads % h->n_kv_heads == 0 &&
          q->cols == (int64_t)h->n_heads * h->head_dim);
    CHECK(keys->cols == (int64_t)h->n_kv_heads * h->head_dim && values->cols == keys->cols);
    CHECK(s->first_position >= 0 && s->first_position + q->rows / s->n <= s->max_positions);
    CHECK(s->max_positions < 1 << 30); /* positions are int in the kernels */
    CHECK(keys->rows >= s->n * s->max_positions && values->rows >= s->n * s->max_positions);
    CHECK(spec->scale > 0 && spec->window >= 0 && spec->softcap >= 0);
    if (spec->softcap > 0 && h->head_dim > MAX_CAPPED)
        return err_set(ERR_UNSUPPORTED, "%s: a soft cap on heads of %d, expected at most %d", op, h->head_dim,
                       MAX_CAPPED);
    if (h->head_dim < 8 || h->head_dim > 512 || h->head_dim % 8)
        return err_set(ERR_UNSUPPORTED, "%s: heads of %d, expected a multiple of 8 up to 512", op,
                       h->head_dim);
    int rc = check_alignment(op, q, "queries");
    rc = rc < 0 ? rc : check_alignment(op, keys, "keys");
    rc = rc < 0 ? rc : check_alignment(op, values, "values");
    return rc < 0 ? rc : check_alignment(op, out, "result");
}

extern "C" int cuda_attention(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                              const struct mat *keys, const struct mat *values, const struct mat *out,
                              const struct mat *lse)
{
    const struct heads *h = &spec->heads;
    const struct sequences *s = &spec->sequences;
    CHECK(!lse || (lse->dtype == DTYPE_F32 && lse->rows == q->rows && lse->cols == h->n_heads));
    int rc = attention_check("attention", spec, q, keys, values, out);
    if (rc < 0 || q->rows == 0)
        return rc;
    problem a = {};
    a.q = (const bf16 *)q->data, a.keys = (const bf16 *)keys->data, a.values = (const bf16 *)values->data;
    a.out = (bf16 *)out->data;
    a.q_stride = q->stride, a.keys_stride = keys->stride, a.values_stride = values->stride,
    a.out_stride = out->stride;
    a.lse = lse ? (float *)lse->data : NULL, a.lse_stride = lse ? lse->stride : 0;
    a.max_positions = s->max_positions;
    a.n_new = (int)(q->rows / s->n), a.first_position = (int)s->first_position;
    const int positions = a.first_position + a.n_new;
    a.window = spec->window && spec->window < positions ? (int)spec->window : positions;
    a.n_heads = h->n_heads, a.n_kv_heads = h->n_kv_heads, a.head_dim = h->head_dim;
    a.scale = (spec->softcap > 0 ? spec->softcap : spec->scale) * LOG2_E;
    a.bend = bend_of(spec->scale, spec->softcap);

    if (a.n_new <= FEW_TOKENS && !a.lse)
        return attention_few(b, &a, s->n);
    int shared_bytes;
    rc = cuda_status(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            cuda_state(b)->ordinal),
                     "attention");
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        if (a.head_dim > variants[i].head_dim)
            continue;
        if (variants[i].shared_bytes <= shared_bytes)
            return (a.bend > 0 ? variants[i].capped : variants[i].prefill)(b, &a, s->n);
    }
    return err_set(ERR_UNSUPPORTED,
                   "attention: heads of %d do not fit the device's %d bytes of shared memory", a.head_dim,
                   shared_bytes);
}

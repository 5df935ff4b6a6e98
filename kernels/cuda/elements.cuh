/* What the files share that touch each element once or twice: several elements an access where rows allow it, and the
 * weights of norms. */
#ifndef GEMCUT_KERNELS_CUDA_ELEMENTS_CUH
#define GEMCUT_KERNELS_CUDA_ELEMENTS_CUH

#include "kernels/cuda/common.cuh"

enum {
    THREADS = 256,  /* of a block */
    MAX_HALF = 256, /* of a head that is turned */
};

typedef __nv_bfloat16 bf16;

static inline int check_dtype(const struct mat *m, enum dtype t, const char *op)
{
    return m->dtype == t ? 0
                         : err_set(ERR_UNSUPPORTED, "%s: dtype %s, expected %s", op, dtype_name(m->dtype),
                                   dtype_name(t));
}

/* Whether every row begins at a multiple of `bytes` and holds whole pieces of that size. */
static inline bool in_pieces(const struct mat *m, size_t bytes)
{
    const size_t each = dtype_bytes(m->dtype);
    return (uintptr_t)m->data % bytes == 0 && (size_t)m->stride * each % bytes == 0 &&
           (size_t)m->cols * each % bytes == 0;
}

/* V consecutive elements as floats, and back. */
template <typename T, int V> static __device__ __forceinline__ void load(const T *p, float *out)
{
    struct alignas(V * sizeof(T)) vec {
        T e[V];
    };
    const struct vec v = *(const struct vec *)p;
#pragma unroll
    for (int i = 0; i < V; i++)
        out[i] = to_float(v.e[i]);
}

/* To memory of the device only, with instructions that say how wide they are: left to itself the compiler breaks some of
 * these stores up into elements. */
template <typename T, int V> static __device__ __forceinline__ void store(T *p, const float *x)
{
    constexpr int BYTES = V * sizeof(T);
    struct alignas(BYTES < 16 ? BYTES : 16) vec {
        T e[V];
    } v;
#pragma unroll
    for (int i = 0; i < V; i++)
        v.e[i] = from_float<T>(x[i]);
    if constexpr (BYTES % 16 == 0) {
        uint4 words[BYTES / 16];
        memcpy(words, &v, BYTES);
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++)
            __stwb((uint4 *)p + i, words[i]);
    } else if constexpr (BYTES == 8) {
        uint2 words;
        memcpy(&words, &v, BYTES);
        __stwb((uint2 *)p, words);
    } else {
        *(struct vec *)p = v;
    }
}

/* --- weights of norms ---------------------------------------------------------------------------------------------- */

struct norm_weight {
    const void *data; /* NULL: all ones */
    enum dtype dtype;
    float offset; /* 1 with unit_offset */
};

static inline struct norm_weight norm_weight(const struct mat *w, const struct norm_spec *spec)
{
    if (!w)
        return (struct norm_weight){NULL, DTYPE_F32, 0};
    return (struct norm_weight){w->data, w->dtype, spec->unit_offset ? 1.0f : 0.0f};
}

/* V consecutive weights, the offset added; they begin at a whole piece of V elements. */
template <int V>
static __device__ __forceinline__ void load_weight(const struct norm_weight &w, int64_t i, float *out)
{
    if (!w.data) {
#pragma unroll
        for (int k = 0; k < V; k++)
            out[k] = 1;
        return;
    }
    if (w.dtype == DTYPE_BF16)
        load<bf16, V>((const bf16 *)w.data + i, out);
    else if (w.dtype == DTYPE_F16)
        load<__half, V>((const __half *)w.data + i, out);
    else
        load<float, V>((const float *)w.data + i, out);
#pragma unroll
    for (int k = 0; k < V; k++)
        out[k] += w.offset;
}

/* Whether a weight may be read four or eight elements at a time. */
static inline bool weight_in_pieces(const struct mat *w)
{
    return !w || (uintptr_t)w->data % 32 == 0;
}

/* --- queries, keys and values -------------------------------------------------------------------------------------- */

/* Heads of a row of qkv; alone: of queries and nothing else. */
static inline int qkv_heads(const struct qkv_spec *spec, bool alone)
{
    const struct heads *h = &spec->heads;
    return h->n_heads + (alone ? 0 : spec->k_is_v ? 1 : 2) * h->n_kv_heads;
}

/* Whether split_qkv or, with gradients, its backward pass can take these; op: for the error. */
extern "C" int cuda_check_qkv(const char *op, const struct qkv_spec *spec, const struct mat *qkv,
                              const struct mat *q, const struct mat *keys, const struct mat *values);

/* Whether heads may be read eight elements at a time: either half of every one is a whole number of them. acts: where
 * they are, or NULL. */
static inline bool qkv_in_pieces(const struct qkv_spec *spec, const struct mat *const *acts, int n)
{
    bool pieces = spec->heads.head_dim % 16 == 0 && in_pieces(spec->rope, 32) &&
                  weight_in_pieces(spec->q_norm) && weight_in_pieces(spec->k_norm);
    for (int i = 0; i < n; i++)
        pieces = pieces && (!acts[i] || in_pieces(acts[i], 16));
    return pieces;
}

#endif

/* The CPU backend's tables, and what its files share: vectors of 16 floats. They are GCC's portable vector types:
 * the same source becomes SSE2, AVX2 or AVX-512 (chosen when the program starts, see CPU_CLONES), and because
 * lanes and order of summation are written out, every instruction set gives the same bits. */
#ifndef GEMCUT_KERNELS_CPU_CPU_H
#define GEMCUT_KERNELS_CPU_CPU_H

#include "base/half.h"
#include "base/parallel.h"
#include "kernels/backend.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define CPU_INLINE static inline __attribute__((always_inline))

extern const struct core_ops cpu_core_ops;
extern const struct quant_ops cpu_quant_ops;
extern const struct train_ops cpu_train_ops;

/* The state behind a CPU backend: its threads and a piece of scratch memory for each. */
enum { CPU_SCRATCH_BYTES = 8 << 20 };

struct cpu_state {
    struct parallel *pool;
    float **scratch; /* [workers], CPU_SCRATCH_BYTES each */
};

int cpu_open(struct backend *b, int n_threads);
void cpu_close(struct backend *b);
int cpu_title(char title[DEVICE_TEXT_BYTES]);

CPU_INLINE const struct cpu_state *cpu_state(const struct backend *b)
{
    return b->state;
}

/* Operations, by file; cpu.c puts them into the table. */
int cpu_find_nonfinite(const struct backend *b, const struct mat *w, int64_t *index);
int cpu_zero_nonfinite(const struct backend *b, const struct mat *w, int64_t *count);
int cpu_squared_error(const struct backend *b, const struct mat *x, const struct mat *y, double sums[2]);
int cpu_group_squared_error(const struct backend *b, const struct mat *x, const struct mat *y, int64_t group,
                            double *sums);
int cpu_dot(const struct backend *b, const struct mat *x, const struct mat *y, double *sum);
int cpu_zero(const struct backend *b, const struct mat *m);
int cpu_embed(const struct backend *b, const struct mat *table, const int32_t *ids, float scale,
              const struct mat *out);
int cpu_rms_norm(const struct backend *b, const struct mat *x, const struct mat *w,
                 const struct norm_spec *spec, const struct mat *out);
int cpu_add_norm(const struct backend *b, const struct mat *branch, const struct mat *branch_norm,
                 const struct mat *x, const struct mat *next_norm, const struct norm_spec *spec,
                 const struct mat *out);
int cpu_rope_table(const struct backend *b, const float *inv_freq, int64_t first_position,
                   const struct mat *table);
int cpu_split_qkv(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                  const struct mat *q, const struct mat *keys, const struct mat *values);
int cpu_geglu(const struct backend *b, const struct mat *gate, const struct mat *up, const struct mat *out);
int cpu_over_norm(const struct backend *b, const struct mat *x, const struct mat *y, const struct mat *out);
int cpu_route(const struct backend *b, const struct mat *logits, const struct mat *factors,
              const struct mat *experts, const struct mat *weights);
int cpu_gather_rows(const struct backend *b, const struct mat *x, const struct mat *rows,
                    const struct mat *factors, const struct mat *out);
int cpu_combine_rows(const struct backend *b, const struct mat *y, const struct mat *slots,
                     const struct mat *weights, const struct mat *out);
int cpu_softcap(const struct backend *b, const struct mat *x, float cap);
int cpu_scale(const struct backend *b, float factor, const struct mat *x, bool add, const struct mat *out);
int cpu_gemm(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out);
int cpu_q_gemm(const struct backend *b, const struct mat *x, const struct qmat *w, const struct mat *out);
int cpu_matmul(const struct backend *b, float alpha, const struct mat *x, const struct mat *m, bool add,
               const struct mat *out);
int cpu_attention(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                  const struct mat *keys, const struct mat *values, const struct mat *out,
                  const struct mat *lse);
int cpu_compare_rows(const struct backend *b, const struct mat *logits_a, const struct mat *logits_b,
                     const int32_t *targets, struct row_comparison *out);
int cpu_sample_rows(const struct backend *b, const struct mat *logits, float temperature, uint64_t seed,
                    int64_t step, int32_t *out);

int cpu_hessian_add(const struct backend *b, const struct mat *x, const struct mat *h);
int cpu_hessian_finish(const struct backend *b, const struct mat *h);
int cpu_diagonal(const struct backend *b, const struct mat *h, float *to);
int cpu_add_diagonal(const struct backend *b, const struct mat *h, float value);
int cpu_factorize(const struct backend *b, const struct mat *h, const struct mat *order, float added,
                  const struct mat *work, const struct mat *factor, int *definite);
int cpu_search_scales(const struct backend *b, const struct mat *w, const struct mat *h,
                      const struct search_spec *spec, const struct qmat *q);
int cpu_round_codes(const struct backend *b, const struct rounding *r);
int cpu_sweep_block(const struct backend *b, const struct rounding *r, const struct mat *order,
                    const struct mat *factor, const struct mat *feedback, int64_t first,
                    const struct mat *errors);
int cpu_descend_block(const struct backend *b, const struct rounding *r, const struct mat *h,
                      const struct mat *gradient, const struct mat *feedback, int64_t first,
                      const struct mat *changes);
int cpu_group_dots(const struct backend *b, const struct mat *x, const struct mat *codes, int64_t group,
                   const struct mat *out);
int cpu_solve_scales(const struct backend *b, const struct mat *a, const struct mat *rhs, bool positive_only,
                     const struct qmat *q, int64_t *n_kept);
int cpu_residual(const struct backend *b, const struct rounding *r, const struct mat *out);
int cpu_count_clipped(const struct backend *b, const struct rounding *r, int64_t *count);
int cpu_pack_codes(const struct backend *b, const struct mat *codes, const struct qmat *q);

int cpu_gemm_dgrad(const struct backend *b, const struct mat *dy, const struct mat *w, bool add,
                   const struct mat *out);
int cpu_gemm_wgrad(const struct backend *b, const struct mat *dy, const struct mat *x, bool add,
                   const struct mat *dw);
int cpu_rms_norm_backward(const struct backend *b, const struct mat *x, const struct mat *w,
                          const struct norm_spec *spec, const struct mat *dy, const struct mat *add,
                          const struct mat *out);
int cpu_geglu_backward(const struct backend *b, const struct mat *gate, const struct mat *up,
                       const struct mat *dy, const struct mat *dgate, const struct mat *dup);
int cpu_split_qkv_backward(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                           const struct mat *dq, const struct mat *dkeys, const struct mat *dvalues,
                           const struct mat *dqkv);
int cpu_attention_backward(const struct backend *b, const struct attention_spec *spec,
                           const struct attention_tape *tape, const struct mat *dout, const struct mat *dq,
                           const struct mat *dkeys, const struct mat *dvalues);
int cpu_route_backward(const struct backend *b, const struct route_tape *tape, const struct mat *dout,
                       const struct mat *dlogits);
int cpu_error_backward(const struct backend *b, const struct mat *y, const struct mat *target, float factor,
                       double *sum, const struct mat *dy);
int cpu_keep_best(const struct backend *b, const double *loss, double *best, int32_t *improved);
int cpu_tune_begin(const struct backend *b, const struct tuning *t, const struct mat *codes);
int cpu_tune_step(const struct backend *b, const struct tuning *t, const struct mat *gradient,
                  const struct tune_rates *rates, const int32_t *keep);

/* Dequantizes rows [row, row + n) of q as floats (BF16 values) into out [n, cols]. */
void cpu_dequantize_rows(const struct qmat *q, int64_t row, int64_t n, float *out);

enum { LANES = 16 };
typedef float vfloat __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint16_t vhalf __attribute__((vector_size(32)));
typedef uint8_t vbyte __attribute__((vector_size(16)));

/* Sanitizers and other architectures take the plain version; the test that compares instruction sets defines it
 * empty and compiles for each of them. */
#if defined(CPU_CLONES)
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CPU_CLONES
#endif

CPU_INLINE vfloat vload(const float *p)
{
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

CPU_INLINE void vstore(float *p, vfloat v)
{
    memcpy(p, &v, sizeof v);
}

CPU_INLINE vfloat vset(float x)
{
    return (vfloat){0} + x;
}

/* Where the mask (a comparison's result, 0 or −1 a lane) is set: a, elsewhere b. */
CPU_INLINE vfloat vselect(vint mask, vfloat a, vfloat b)
{
    return (vfloat)(((vint)a & mask) | ((vint)b & ~mask));
}

CPU_INLINE vfloat vmin(vfloat a, vfloat b)
{
    return vselect(a < b, a, b);
}

CPU_INLINE vfloat vmax(vfloat a, vfloat b)
{
    return vselect(a > b, a, b);
}

/* Adding 1.5·2^23 leaves the nearest integer (ties to even) in the low bits; exact for |x| < 2^22. */
#define ROUND_MAGIC      12582912.0f
#define ROUND_MAGIC_BITS 0x4b400000

CPU_INLINE vfloat vround(vfloat x)
{
    return (x + ROUND_MAGIC) - ROUND_MAGIC;
}

CPU_INLINE vfloat vround_bf16(vfloat x) /* finite x */
{
    const vuint u = (vuint)x;
    return (vfloat)((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000);
}

/* Lane i and lane i + 8, then 4, 2, 1: each loop of fixed length becomes one vector addition. */
CPU_INLINE float vsum(vfloat v)
{
    float s[LANES];
    vstore(s, v);
    for (int i = 0; i < 8; i++)
        s[i] += s[i + 8];
    for (int i = 0; i < 4; i++)
        s[i] += s[i + 4];
    for (int i = 0; i < 2; i++)
        s[i] += s[i + 2];
    return s[0] + s[1];
}

CPU_INLINE float vhighest(vfloat v)
{
    float m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] > m ? v[i] : m;
    return m;
}

CPU_INLINE float vlowest(vfloat v)
{
    float m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] < m ? v[i] : m;
    return m;
}

/* n elements of a row as floats, padded with zeros to a multiple of LANES. */
CPU_INLINE void load_row(const struct mat *m, int64_t row, int64_t col, int64_t n, float *out)
{
    const size_t at = (size_t)(row * m->stride + col);
    int64_t i = 0;
    if (m->dtype == DTYPE_BF16) {
        const uint16_t *p = (const uint16_t *)m->data + at;
        for (; i + LANES <= n; i += LANES) {
            vhalf h;
            memcpy(&h, p + i, sizeof h);
            vstore(out + i, (vfloat)(__builtin_convertvector(h, vuint) << 16));
        }
        for (; i < n; i++)
            out[i] = half_from_bf16(p[i]);
    } else if (m->dtype == DTYPE_F16) {
        for (const uint16_t *p = (const uint16_t *)m->data + at; i < n; i++)
            out[i] = half_from_f16(p[i]);
    } else {
        memcpy(out, (const float *)m->data + at, (size_t)n * sizeof *out);
        i = n;
    }
    for (; i % LANES; i++)
        out[i] = 0;
}

/* e^x, relative error below 2^-22; 0 below −87.3, saturates above 88. Cody–Waite reduction and a polynomial
 * for 2^f on [−½, ½] (minimax, degree 6). */
CPU_INLINE vfloat vexp(vfloat x)
{
    x = vmin(vset(88.0f), vmax(vset(-87.3f), x)); /* in this order a NaN stays one */
    const vfloat n = vround(x * 1.44269504f);
    const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vint exponent = ((vint)(n + ROUND_MAGIC) - ROUND_MAGIC_BITS + 127) << 23;
    return p * (vfloat)exponent;
}

/* tanh by e^2x; absolute error below 2^-22. */
CPU_INLINE vfloat vtanh(vfloat x)
{
    return 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f);
}

/* tanh with a relative error below 2^-22, also of small x: a polynomial below 0.625 (coefficients: Cephes, tanhf). */
CPU_INLINE vfloat vtanh_relative(vfloat x)
{
    const vfloat z = x * x;
    vfloat p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return vselect(z < 0.390625f, p * z * x + x, vtanh(x));
}

/* What attention makes of n products of a query with keys: cap·tanh(scale·s / cap), in place. */
CPU_INLINE void cap_scores(float *s, int64_t n, float scale, float cap)
{
    const float inner = scale / cap;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        vstore(s + i, cap * vtanh_relative(vload(s + i) * inner));
    float rest[LANES] = {0};
    memcpy(rest, s + i, (size_t)(n - i) * sizeof *rest);
    vstore(rest, cap * vtanh_relative(vload(rest) * inner));
    memcpy(s + i, rest, (size_t)(n - i) * sizeof *rest);
}

/* 0 when the matrix holds one of the float types that load_row knows. */
int cpu_check_float(const struct mat *m, const char *op);

#endif

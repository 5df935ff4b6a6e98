/* out = x·wᵀ. Many rows of x: a panel of w's rows is widened to FP32 in a thread's scratch memory and multiplied by
 * OpenBLAS. Few rows (decode): the weights are streamed once, straight from BF16 or four bits, and memory is the
 * limit. Panels depend on the width alone, so the result does not depend on the number of threads. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"
#include "kernels/cpu/blas.h"

enum {
    FEW_ROWS = 4,      /* up to this many rows of x are multiplied by streaming w */
    STREAM_TASKS = 16, /* tasks that w's rows are shared out to, when streamed; more where they would get … */
    STREAM_ROWS = 512, /* … more rows than this */
    MAX_PANEL = 256,   /* rows of w in a panel */
    MANY_PANELS =
        16, /* with fewer of them, x is cut into runs of RUN rows too, so that every thread has work */
    RUN = 256,
};

struct gemm_job {
    const struct cpu_state *state;
    const struct mat *x, *out;
    const struct mat *w; /* one of the two */
    const struct qmat *q;
    int64_t panel, n_panels, run; /* rows of w in a task; such panels; rows of x in a task */
    const float *ordered; /* x in the order of stream_nibbles_v4 or stream_pairs, where one of them is used */
};

/* --- panels for OpenBLAS ---------------------------------------------------------------------------------------- */

CPU_CLONES static void widen_rows(const struct mat *w, int64_t row, int64_t n, float *out)
{
    float tail[LANES];
    const int64_t whole = w->cols / LANES * LANES;
    for (int64_t r = 0; r < n; r++) {
        load_row(w, row + r, 0, whole, out + r * w->cols);
        load_row(w, row + r, whole, w->cols - whole, tail); /* its padding must not reach the next row */
        memcpy(out + r * w->cols + whole, tail, (size_t)(w->cols - whole) * sizeof *tail);
    }
}

static int panel_task(void *ctx, size_t index, int worker)
{
    const struct gemm_job *j = ctx;
    const int64_t rows = j->out->cols, cols = j->x->cols, row = (int64_t)index % j->n_panels * j->panel;
    const int64_t n = rows - row < j->panel ? rows - row : j->panel;
    const int64_t from = (int64_t)index / j->n_panels * j->run;
    const int64_t m = j->x->rows - from < j->run ? j->x->rows - from : j->run;
    float *panel = j->state->scratch[worker];
    const float *b = panel;
    int64_t stride = cols;
    if (j->q) {
        cpu_dequantize_rows(j->q, row, n, panel);
    } else if (j->w->dtype == DTYPE_F32) {
        b = (const float *)j->w->data + row * j->w->stride;
        stride = j->w->stride;
    } else {
        widen_rows(j->w, row, n, panel);
    }
    blas_sgemm(true, (int)m, (int)n, (int)cols, (const float *)j->x->data + from * j->x->stride,
               (int)j->x->stride, b, (int)stride, (float *)j->out->data + from * j->out->stride + row,
               (int)j->out->stride);
    return 0;
}

/* --- streaming -------------------------------------------------------------------------------------------------- */

/* Two BF16 weights in a 32-bit word: the even column in its low half, the odd one in its high half, which as a float is
 * that weight already once the low half is cleared. x is brought into that order beforehand: [cols/32][2][16]. */
enum { PAIRS = 2 * LANES };

static void order_for_pairs(const struct mat *x, float *out)
{
    for (int64_t c = 0; c < x->cols; c++)
        out[c / PAIRS * PAIRS + c % 2 * LANES + c % PAIRS / 2] = ((const float *)x->data)[c];
}

/* The dot product of one row of weights with one ordered row of x. */
CPU_CLONES static float stream_pairs(const float *x, const uint16_t *w, int64_t cols)
{
    vfloat even = {0}, odd = {0};
    for (int64_t c = 0; c < cols; c += PAIRS) {
        vuint words;
        memcpy(&words, w + c, sizeof words);
        even += (vfloat)(words << 16) * vload(x + c);
        odd += (vfloat)(words & 0xffff0000) * vload(x + c + LANES);
    }
    return vsum(even + odd);
}

/* Dot products of one row of BF16 weights with every row of x. */
CPU_CLONES static void stream_bf16(const struct mat *x, const uint16_t *w, float *out, int64_t stride)
{
    const int64_t cols = x->cols;
    vfloat sum[FEW_ROWS] = {{0}};
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
        vhalf h;
        memcpy(&h, w + c, sizeof h);
        const vfloat v = (vfloat)(__builtin_convertvector(h, vuint) << 16);
        for (int64_t r = 0; r < x->rows; r++)
            sum[r] += v * vload((const float *)x->data + r * x->stride + c);
    }
    for (int64_t r = 0; r < x->rows; r++) {
        float s = vsum(sum[r]);
        for (int64_t k = c; k < cols; k++)
            s += half_from_bf16(w[k]) * ((const float *)x->data)[r * x->stride + k];
        out[r * stride] = s;
    }
}

/* A group of 4-bit weights has 16 different values: bf16((code − 8 − zero)·scale). */
CPU_INLINE vfloat code_values(float scale, float zero)
{
    const vfloat codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return vround_bf16((codes - (8 + zero)) * scale);
}

/* Element index[i] of v in lane i; each compiler has its own word for it. */
CPU_INLINE vfloat pick(vfloat v, vint index)
{
#ifdef __clang__
    return __builtin_shufflevector(v, index);
#else
    return __builtin_shuffle(v, index);
#endif
}

/* 128 columns are 16 words; nibble i of all of them at once are the columns 8·lane + i. x is brought into that order
 * beforehand: [cols/128][8][16]. */
enum { BLOCK = 128 };

static void order_for_nibbles(const struct mat *x, float *out)
{
    for (int64_t r = 0; r < x->rows; r++) {
        const float *row = (const float *)x->data + r * x->stride;
        for (int64_t c = 0; c < x->cols; c++)
            out[r * x->cols + c / BLOCK * BLOCK + c % 8 * LANES + c % BLOCK / 8] = row[c];
    }
}

/* Dot products of one row of 4-bit weights with the n ordered rows of x. A code picks its value from the table of
 * its group, which is one permutation on AVX-512. Groups are whole blocks. */
CPU_INLINE void stream_nibbles_rows(const struct gemm_job *j, int64_t n, int64_t row)
{
    const struct qmat *q = j->q;
    const int64_t cols = q->cols;
    const uint32_t *words = (const uint32_t *)q->packed.data + row * q->packed.stride;
    const uint16_t *scales = (const uint16_t *)q->scales.data + row * q->scales.stride;
    const int8_t *zeros = q->zeros.data ? (const int8_t *)q->zeros.data + row * q->zeros.stride : NULL;
    vfloat sum[FEW_ROWS] = {{0}}, second[FEW_ROWS] = {{0}};
    for (int64_t g = 0, c = 0; c < cols; g++) {
        const vfloat values = code_values(half_from_bf16(scales[g]), zeros ? (float)zeros[g] : 0);
        for (const int64_t end = c + q->group < cols ? c + q->group : cols; c < end; c += BLOCK) {
            vuint block;
            memcpy(&block, words + c / 8, sizeof block);
            for (int i = 0; i < 8; i += 2) {
                const vfloat v0 = pick(values, (vint)(block >> 4 * i & 15));
                const vfloat v1 = pick(values, (vint)(block >> (4 * i + 4) & 15));
                for (int64_t r = 0; r < n; r++) {
                    const float *x = j->ordered + r * cols + c + i * LANES;
                    sum[r] += v0 * vload(x);
                    second[r] += v1 * vload(x + LANES);
                }
            }
        }
    }
    for (int64_t r = 0; r < n; r++)
        ((float *)j->out->data)[r * j->out->stride + row] = vsum(sum[r] + second[r]);
}

__attribute__((target("arch=x86-64-v4"))) static void stream_nibbles_v4(const struct gemm_job *j, int64_t row)
{
    if (j->x->rows == 1)
        stream_nibbles_rows(j, 1, row);
    else
        stream_nibbles_rows(j, j->x->rows, row);
}

/* Any other layout or processor: dequantize a row, then multiply. */
CPU_CLONES static void stream_floats(const struct mat *x, const float *w, int64_t cols, float *out,
                                     int64_t stride)
{
    for (int64_t r = 0; r < x->rows; r++) {
        const float *row = (const float *)x->data + r * x->stride;
        vfloat sum = {0};
        int64_t c = 0;
        for (; c + LANES <= cols; c += LANES)
            sum += vload(w + c) * vload(row + c);
        float s = vsum(sum);
        for (; c < cols; c++)
            s += w[c] * row[c];
        out[r * stride] = s;
    }
}

static int stream_task(void *ctx, size_t index, int worker)
{
    const struct gemm_job *j = ctx;
    const int64_t rows = j->out->cols, cols = j->x->cols, first = (int64_t)index * j->panel;
    const int64_t end = rows - first < j->panel ? rows : first + j->panel;
    float *scratch = j->state->scratch[worker];
    for (int64_t row = first; row < end; row++) {
        float *out = (float *)j->out->data + row;
        const uint16_t *bf16 =
            j->w && j->w->dtype == DTYPE_BF16 ? (const uint16_t *)j->w->data + row * j->w->stride : NULL;
        if (j->ordered && j->q) {
            stream_nibbles_v4(j, row);
        } else if (j->ordered) {
            *out = stream_pairs(j->ordered, bf16, cols);
        } else if (j->q) {
            cpu_dequantize_rows(j->q, row, 1, scratch);
            stream_floats(j->x, scratch, cols, out, j->out->stride);
        } else if (bf16) {
            stream_bf16(j->x, bf16, out, j->out->stride);
        } else {
            widen_rows(j->w, row, 1, scratch);
            stream_floats(j->x, scratch, cols, out, j->out->stride);
        }
    }
    return 0;
}

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static int stream(struct gemm_job *j)
{
    /* tasks on such weights need no scratch memory, so the first thread's holds x */
    if (j->w && j->w->dtype == DTYPE_BF16 && j->x->rows == 1 && j->x->cols % PAIRS == 0) {
        order_for_pairs(j->x, j->state->scratch[0]);
        j->ordered = j->state->scratch[0];
    }
    if (j->q && j->q->bits == 4 && j->q->group % BLOCK == 0 && j->q->cols % BLOCK == 0 && has_avx512() &&
        j->x->rows * j->x->cols <= CPU_SCRATCH_BYTES / 4) {
        order_for_nibbles(j->x, j->state->scratch[0]);
        j->ordered = j->state->scratch[0];
    }
    const int64_t share = (j->out->cols + STREAM_TASKS - 1) / STREAM_TASKS;
    j->panel = share < STREAM_ROWS ? share : STREAM_ROWS;
    return parallel_for(j->state->pool, (size_t)((j->out->cols + j->panel - 1) / j->panel), stream_task, j);
}

static int run(const struct backend *b, struct gemm_job *j)
{
    CHECK(j->x->dtype == DTYPE_F32 && j->out->dtype == DTYPE_F32 && j->x->rows == j->out->rows);
    const int64_t rows = j->out->cols, cols = j->x->cols;
    const int64_t fitting = CPU_SCRATCH_BYTES / 4 / (cols + LANES);
    if (fitting < 1)
        return err_set(ERR_UNSUPPORTED, "gemm: %lld columns, expected at most %d", (long long)cols,
                       CPU_SCRATCH_BYTES / 4);
    j->state = cpu_state(b);
    j->panel = fitting < MAX_PANEL ? fitting : MAX_PANEL;
    if (j->x->rows == 0)
        return 0;
    if (j->x->rows <= FEW_ROWS)
        return stream(j);
    const int rc = blas_load();
    if (rc < 0)
        return rc;
    j->n_panels = (rows + j->panel - 1) / j->panel;
    j->run = j->n_panels < MANY_PANELS ? RUN : j->x->rows;
    const int64_t n_runs = (j->x->rows + j->run - 1) / j->run;
    return parallel_for(j->state->pool, (size_t)(j->n_panels * n_runs), panel_task, j);
}

int cpu_gemm(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out)
{
    const int rc = cpu_check_float(w, "gemm");
    CHECK(w->cols == x->cols && w->rows == out->cols);
    struct gemm_job j = {.x = x, .out = out, .w = w};
    return rc < 0 ? rc : run(b, &j);
}

int cpu_q_gemm(const struct backend *b, const struct mat *x, const struct qmat *w, const struct mat *out)
{
    if (w->bits != 4 && w->bits != 8)
        return err_set(ERR_UNSUPPORTED, "q_gemm: %d bits, expected 4 or 8", w->bits);
    CHECK(w->cols == x->cols && w->packed.rows == out->cols);
    struct gemm_job j = {.x = x, .out = out, .q = w};
    return run(b, &j);
}

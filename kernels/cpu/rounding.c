/* Codes as bytes, on their way between weights and packed words. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/rounding.h"

#include "base/err.h"

#include <math.h>

struct rounding_job {
    const struct rounding *r;
    const struct mat *out;
};

static int round_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct rounding *r = ((const struct rounding_job *)ctx)->r;
    const int64_t row = (int64_t)index, cols = r->w->cols;
    const float half = (float)(1 << (r->q->bits - 1));
    int8_t *codes = (int8_t *)r->codes->data + row * r->codes->stride;
    for (int64_t c = 0; c < cols; c++) {
        const struct step s = step_of(r->q, row, c / r->q->group);
        const float t = load_one(r->w, row, c) / s.scale + s.zero;
        codes[c] = (int8_t)(rintf(fminf(fmaxf(t, -half), half - 1)) - s.zero);
    }
    return 0;
}

int cpu_check_rounding(const struct rounding *r, const char *op)
{
    const struct qmat *q = r->q;
    CHECK(r->codes->dtype == DTYPE_I8 && r->codes->rows == r->w->rows && r->codes->cols == r->w->cols);
    CHECK(q->cols == r->w->cols && q->scales.rows == r->w->rows && q->group > 0);
    if (q->bits != 4 && q->bits != 8)
        return err_set(ERR_UNSUPPORTED, "%s: %d bits, expected 4 or 8", op, q->bits);
    return cpu_check_float(r->w, op);
}

int cpu_round_codes(const struct backend *b, const struct rounding *r)
{
    const int rc = cpu_check_rounding(r, "round_codes");
    struct rounding_job j = {r, NULL};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)r->w->rows, round_row, &j);
}

static int residual_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct rounding_job *j = ctx;
    const struct rounding *r = j->r;
    const int64_t row = (int64_t)index;
    const int8_t *codes = (const int8_t *)r->codes->data + row * r->codes->stride;
    float *out = (float *)j->out->data + row * j->out->stride;
    for (int64_t c = 0; c < r->w->cols; c++)
        out[c] = load_one(r->w, row, c) -
                 half_round_bf16((float)codes[c] * step_of(r->q, row, c / r->q->group).scale);
    return 0;
}

int cpu_residual(const struct backend *b, const struct rounding *r, const struct mat *out)
{
    const int rc = cpu_check_rounding(r, "residual");
    CHECK(out->dtype == DTYPE_F32 && out->rows == r->w->rows && out->cols == r->w->cols);
    struct rounding_job j = {r, out};
    return rc ? rc : parallel_for(cpu_state(b)->pool, (size_t)r->w->rows, residual_row, &j);
}

int cpu_count_clipped(const struct backend *b, const struct rounding *r, int64_t *count)
{
    (void)b;
    const int rc = cpu_check_rounding(r, "count_clipped");
    const float half = (float)(1 << (r->q->bits - 1));
    *count = 0;
    for (int64_t row = 0; !rc && row < r->w->rows; row++)
        for (int64_t c = 0; c < r->w->cols; c++) {
            const struct step s = step_of(r->q, row, c / r->q->group);
            const float t = load_one(r->w, row, c) / s.scale + s.zero;
            *count += t < -half - 0.5f || t > half - 0.5f;
        }
    return rc;
}

struct pack_job {
    const struct mat *codes;
    const struct qmat *q;
};

static int pack_row(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct pack_job *j = ctx;
    const struct qmat *q = j->q;
    const int64_t row = (int64_t)index, per_word = 32 / q->bits;
    const int8_t *codes = (const int8_t *)j->codes->data + row * j->codes->stride;
    uint32_t *words = (uint32_t *)q->packed.data + row * q->packed.stride;
    const int offset = 1 << (q->bits - 1);
    memset(words, 0, (size_t)q->packed.cols * sizeof *words);
    for (int64_t c = 0; c < q->cols; c++) {
        const int zero =
            q->zeros.data ? ((const int8_t *)q->zeros.data)[row * q->zeros.stride + c / q->group] : 0;
        words[c / per_word] |= (uint32_t)(codes[c] + zero + offset) << c % per_word * q->bits;
    }
    return 0;
}

int cpu_pack_codes(const struct backend *b, const struct mat *codes, const struct qmat *q)
{
    CHECK(codes->dtype == DTYPE_I8 && codes->cols == q->cols && codes->rows == q->packed.rows &&
          q->packed.dtype == DTYPE_I32 && (q->bits == 4 || q->bits == 8));
    struct pack_job j = {codes, q};
    return parallel_for(cpu_state(b)->pool, (size_t)codes->rows, pack_row, &j);
}

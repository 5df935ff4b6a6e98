#include "cli/bench_case.h"

#include "base/err.h"
#include "base/half.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- operands ------------------------------------------------------------------------------------------------------- */

/* The operands of one call on one backend. */
struct operand_set {
    struct mat m[CASE_OPERANDS];
    struct buf bufs[CASE_OPERANDS];
};

static enum dtype dtype_on(const struct operand *o, const struct backend *b)
{
    return o->activation ? b->activation : o->dtype;
}

static size_t operand_bytes(const struct operand *o, const struct backend *b)
{
    return (size_t)(o->rows * o->cols) * dtype_bytes(dtype_on(o, b));
}

static int acquire(const struct backend *b, const struct operand *o, const char *op, struct buf *out)
{
    const size_t bytes = operand_bytes(o, b);
    if (!o->host)
        return b->core->acquire(b, bytes, op, out);
    *out = (struct buf){mem_alloc_aligned(bytes, op), bytes};
    return out->ptr ? 0 : ERR_MEMORY;
}

static int fill_ids(const struct backend *b, const struct operand *o, uint64_t seed, const struct mat *m)
{
    const size_t n = (size_t)(o->rows * o->cols);
    int32_t *ids = o->host ? m->data : mem_alloc(n, sizeof *ids, "made-up indices");
    if (!ids)
        return ERR_MEMORY;
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)(bench_mix(seed + i) % (uint64_t)o->limit);
    if (o->host)
        return 0;
    const int rc = b->core->upload(b, m->data, ids, n * sizeof *ids);
    free(ids);
    return rc;
}

/* A NaN or infinity behind the middle of a BF16 matrix. */
static int plant(const struct backend *b, const struct mat *m)
{
    const uint16_t infinity = 0x7f80;
    return b->core->upload(b, (uint16_t *)m->data + 2 * (m->rows * m->cols) / 3, &infinity, sizeof infinity);
}

static int fill(const struct backend *b, struct parallel *pool, const struct operand *o, const struct mat *m,
                uint64_t seed, bool planted)
{
    struct bench_values v;
    const struct backend *where = b;
    const struct backend host = {.host_memory = true};
    if (o->fill == FILL_IDS)
        return fill_ids(b, o, seed, m);
    if (o->fill == FILL_ZERO)
        return b->core->zero(b, m);
    if (o->host)
        where = &host;
    if (o->fill == FILL_BITS || (m->dtype != DTYPE_BF16 && m->dtype != DTYPE_F32))
        return bench_fill_device(where, pool, NULL, seed, m);
    bench_values_normal(&v, o->mean, o->sigma);
    const int rc = bench_fill_device(where, pool, &v, seed, m);
    return !rc && planted && o->fill == FILL_PLANTED ? plant(b, m) : rc;
}

static void release_set(const struct bench_case *c, const struct backend *b, struct operand_set *s)
{
    for (int i = 0; i < c->n_operands; i++)
        if (c->operands[i].host)
            free(s->bufs[i].ptr);
        else
            b->core->release(b, &s->bufs[i]);
}

/* Released with release_set whatever it returns. Outputs are filled too: memory that nobody has touched is slow. */
static int make_set(const struct bench_case *c, const struct backend *b, struct parallel *pool, bool planted,
                    struct operand_set *s)
{
    int rc = 0;
    *s = (struct operand_set){0};
    for (int i = 0; !rc && i < c->n_operands; i++) {
        const struct operand *o = &c->operands[i];
        rc = acquire(b, o, c->op, &s->bufs[i]);
        s->m[i] = (struct mat){s->bufs[i].ptr, dtype_on(o, b), o->rows, o->cols, o->cols};
        if (!rc)
            rc = fill(b, pool, o, &s->m[i], (uint64_t)i + 11, planted);
    }
    return rc;
}

/* --- comparing ------------------------------------------------------------------------------------------------------ */

static double value_at(const struct mat *m, int64_t i)
{
    switch (m->dtype) {
    case DTYPE_BF16:
        return (double)half_from_bf16(((const uint16_t *)m->data)[i]);
    case DTYPE_F32:
        return (double)((const float *)m->data)[i];
    default:
        CHECK(m->dtype == DTYPE_F64);
        return ((const double *)m->data)[i];
    }
}

static bool is_integer(enum dtype t)
{
    return t == DTYPE_I32 || t == DTYPE_I64 || t == DTYPE_I8;
}

/* The share of integers that differ. */
static double differing(const struct mat *x, const struct mat *y)
{
    const size_t n = (size_t)(x->rows * x->cols), unit = dtype_bytes(x->dtype);
    size_t different = 0;
    for (size_t i = 0; i < n; i++)
        different += memcmp((const char *)x->data + i * unit, (const char *)y->data + i * unit, unit) != 0;
    return n ? (double)different / (double)n : 0;
}

/* ‖x − y‖ / ‖y‖; a NaN on one side alone makes it NaN, one on both sides is no difference. */
static double distance(const struct mat *x, const struct mat *y, int64_t compared)
{
    double difference = 0, size = 0;
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t c = 0; c < compared; c++) {
            const double a = value_at(x, r * x->cols + c), b = value_at(y, r * y->cols + c);
            if (isfinite(b) || isfinite(a)) {
                difference += (a - b) * (a - b);
                size += b * b;
            }
        }
    return difference == 0 ? 0 : sqrt(difference / size);
}

/* An output of both sets, brought to the host. */
static int compare_operand(const struct operand *o, const struct backend *const b[2],
                           const struct mat *const m[2], double *error)
{
    struct mat host[2];
    int rc = 0;
    for (int i = 0; i < 2; i++) {
        host[i] = *m[i];
        if (!o->host && !(host[i].data = mem_alloc_aligned(operand_bytes(o, b[i]), "a result to compare")))
            rc = ERR_MEMORY;
        else if (!rc && !o->host)
            rc = b[i]->core->download(b[i], host[i].data, m[i]->data, operand_bytes(o, b[i]));
    }
    if (!rc)
        *error = is_integer(host[0].dtype)
                     ? differing(&host[0], &host[1])
                     : distance(&host[0], &host[1], o->compared ? o->compared : o->cols);
    for (int i = 0; i < 2; i++)
        if (!o->host)
            free(host[i].data);
    return rc;
}

int bench_case_compare(const struct bench_case *c, const struct backend *b, const struct backend *reference,
                       struct parallel *pool, double *error)
{
    const struct backend *const both[2] = {b, reference};
    struct operand_set sets[2] = {0};
    int rc = 0;
    for (int i = 0; !rc && i < 2; i++) {
        rc = make_set(c, both[i], pool, true, &sets[i]);
        if (!rc)
            rc = c->run(both[i], c, sets[i].m);
        if (!rc)
            rc = both[i]->core->wait(both[i]);
    }
    *error = 0;
    for (int k = 0; !rc && k < c->n_operands; k++) {
        const struct mat *const m[2] = {&sets[0].m[k], &sets[1].m[k]};
        double worst = 0;
        if (c->operands[k].use == OPERAND_IN)
            continue;
        rc = compare_operand(&c->operands[k], both, m, &worst);
        if (!(worst <= *error)) /* a NaN is the worst */
            *error = worst;
    }
    for (int i = 0; i < 2; i++)
        release_set(c, both[i], &sets[i]);
    return rc;
}

/* --- timing --------------------------------------------------------------------------------------------------------- */

/* Enough copies of the operands that a call finds none of its own in a cache, if so many will do. */
enum { MAX_COPIES = 256 };
static const size_t ROTATED_BYTES = (size_t)256 << 20;

struct timed {
    const struct bench_case *c;
    const struct backend *b;
    struct operand_set *sets; /* [n] */
    int64_t n;
};

static int timed_call(void *ctx, int64_t i)
{
    const struct timed *t = ctx;
    return t->c->run(t->b, t->c, t->sets[i % t->n].m);
}

int bench_case_time(const struct bench_case *c, const struct backend *b, struct parallel *pool,
                    int64_t rounds, struct bench_time *out)
{
    struct timed t = {.c = c, .b = b};
    size_t bytes = 0;
    for (int i = 0; i < c->n_operands; i++)
        bytes += c->operands[i].host ? 0 : operand_bytes(&c->operands[i], b);
    const size_t needed = (ROTATED_BYTES + bytes - 1) / bytes,
                 copies = needed < MAX_COPIES ? needed : MAX_COPIES;
    int rc = (t.sets = mem_alloc(copies, sizeof *t.sets, "operands")) ? 0 : ERR_MEMORY;
    while (!rc && t.n < (int64_t)copies)
        rc = make_set(c, b, pool, false, &t.sets[t.n++]);
    if (!rc)
        rc = bench_time(b, rounds, timed_call, &t, out);
    for (int64_t i = 0; i < t.n; i++)
        release_set(c, b, &t.sets[i]);
    free(t.sets);
    return rc;
}

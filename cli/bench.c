#include "cli/bench.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/half.h"
#include "base/mem.h"
#include "cli/output.h"

#include <math.h>
#include <stdlib.h>

/* --- results ------------------------------------------------------------------------------------------------------ */

const char *bench_commit(void)
{
    return GEMCUT_COMMIT;
}

void bench_json_begin(struct text *t, const struct bench *q)
{
    output_json_begin(t, q->machine.name, &q->seed);
    json_kv_string(t, "device_title", q->machine.title);
    json_kv_string(t, "commit", bench_commit());
    json_kv_string(t, "bench", q->what);
    json_kv_string(t, "shape", q->shape->name);
}

void bench_text_begin(struct text *t, const struct bench *q)
{
    text_printf(t, "bench        %s of %s, made-up weights (seed %lld)\n", q->what, q->shape->name,
                (long long)q->seed);
    text_printf(t, "device       %s, %s\n", q->machine.name, q->machine.title);
    text_printf(t, "build        %s, %s\n", GEMCUT_VERSION, bench_commit());
}

/* --- made-up numbers ---------------------------------------------------------------------------------------------- */

uint64_t bench_mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* Box–Muller over a grid of 512 radii and 32 angles: largest value 3.7 σ. */
void bench_values_normal(struct bench_values *v, double mean, double sigma)
{
    enum { ANGLES = 32, RADII = BENCH_VALUES / ANGLES };
    for (int i = 0; i < BENCH_VALUES; i++) {
        const double radius = sqrt(-2 * log((i / ANGLES + 0.5) / RADII));
        const double angle = 2 * acos(-1) * (i % ANGLES + 0.25) / ANGLES;
        v->bf16[i] = half_to_bf16((float)(mean + sigma * radius * cos(angle)));
    }
}

void bench_fill(const struct bench_values *v, uint64_t seed, uint64_t first, size_t n, uint16_t *out)
{
    const uint64_t start = bench_mix(seed + 1), step = 0x9e3779b97f4a7c15;
    CHECK(first % 4 == 0);
    size_t i = 0;
    for (uint64_t counter = first / 4; i + 4 <= n; i += 4, counter++) {
        const uint64_t bits = bench_mix(start + counter * step);
        for (size_t k = 0; k < 4; k++)
            out[i + k] = v->bf16[bits >> 16 * k & (BENCH_VALUES - 1)];
    }
    for (uint64_t bits = bench_mix(start + (first + i) / 4 * step); i < n; i++, bits >>= 16)
        out[i] = v->bf16[bits & (BENCH_VALUES - 1)];
}

enum { PIECE = 1 << 20 }; /* elements made at a time by one thread */

struct fill {
    const struct bench_values *v;
    uint64_t seed, first;
    size_t n; /* elements, or 16-bit words of random bits */
    enum dtype dtype;
    void *out; /* element `first` of the stream */
};

static int fill_task(void *ctx, size_t index, int worker)
{
    (void)worker;
    const struct fill *f = ctx;
    const size_t at = index * PIECE, n = f->n - at < PIECE ? f->n - at : PIECE;
    if (f->dtype != DTYPE_F32) {
        uint16_t *out = (uint16_t *)f->out + at;
        if (f->v)
            bench_fill(f->v, f->seed, f->first + at, n, out);
        for (size_t i = 0; !f->v && i < n; i++)
            out[i] = (uint16_t)bench_mix(f->seed + (f->first + at + i) * 0x9e3779b97f4a7c15);
        return 0;
    }
    uint16_t few[1024];
    for (size_t i = 0; i < n; i += 1024) {
        const size_t part = n - i < 1024 ? n - i : 1024;
        bench_fill(f->v, f->seed, f->first + at + i, part, few);
        for (size_t k = 0; k < part; k++)
            ((float *)f->out)[at + i + k] = half_from_bf16(few[k]);
    }
    return 0;
}

static int fill_host(struct parallel *pool, struct fill *f)
{
    return parallel_for(pool, (f->n + PIECE - 1) / PIECE, fill_task, f);
}

int bench_fill_device(const struct backend *b, struct parallel *pool, const struct bench_values *v,
                      uint64_t seed, const struct mat *m)
{
    CHECK(m->stride == m->cols && (m->dtype == DTYPE_F32 || m->dtype == DTYPE_BF16 || !v));
    const size_t bytes = (size_t)(m->rows * m->cols) * dtype_bytes(m->dtype);
    struct fill f = {v,      seed, 0, v ? (size_t)(m->rows * m->cols) : bytes / 2, v ? m->dtype : DTYPE_BF16,
                     m->data};
    if (b->host_memory)
        return fill_host(pool, &f);
    const size_t unit = v ? dtype_bytes(m->dtype) : 2, total = f.n, piece = (size_t)32 * PIECE;
    int rc = (f.out = mem_alloc_aligned((total < piece ? total : piece) * unit, "made-up numbers"))
                 ? 0
                 : ERR_MEMORY;
    for (; !rc && f.first < total; f.first += piece) {
        f.n = total - f.first < piece ? total - f.first : piece;
        rc = fill_host(pool, &f);
        if (!rc)
            rc = b->core->upload(b, (char *)m->data + f.first * unit, f.out, f.n * unit);
    }
    free(f.out);
    return rc;
}

int bench_matrix(const struct backend *b, struct parallel *pool, enum dtype dtype, int64_t rows, int64_t cols,
                 double sigma, uint64_t seed, struct buf *memory, struct mat *out)
{
    struct bench_values v;
    const int rc =
        b->core->acquire(b, (size_t)(rows * cols) * dtype_bytes(dtype), "a matrix to measure with", memory);
    if (rc < 0)
        return rc;
    bench_values_normal(&v, 0, sigma);
    *out = (struct mat){memory->ptr, dtype, rows, cols, cols};
    return bench_fill_device(b, pool, &v, seed, out);
}

/* --- times -------------------------------------------------------------------------------------------------------- */

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, size_t n)
{
    CHECK(n > 0);
    qsort(values, n, sizeof *values, compare_doubles);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/* Seconds of calls [first, first + n). */
static int time_calls(const struct backend *b, bench_call call, void *ctx, int64_t first, int64_t n,
                      double *seconds)
{
    int rc = err_interrupt_requested() ? err_interrupted() : 0;
    const double start = clock_seconds();
    for (int64_t i = first; !rc && i < first + n; i++)
        rc = call(ctx, i);
    if (!rc)
        rc = b->core->wait(b);
    *seconds = clock_seconds() - start;
    return rc;
}

int bench_time(const struct backend *b, int64_t rounds, bench_call call, void *ctx, struct bench_time *out)
{
    const double enough = 2e-3, plenty = 0.05;
    double seconds = 0, *times = mem_alloc((size_t)rounds, sizeof *times, "times");
    int64_t at = 0, n = 1;
    int rc = times ? time_calls(b, call, ctx, at++, 1, &seconds) : ERR_MEMORY; /* not counted */
    while (!rc && seconds < plenty) {
        rc = time_calls(b, call, ctx, at, n, &seconds);
        at += n;
        if (seconds >= enough || n >= 1 << 20)
            break;
        const double wanted = 1.2 * enough / (seconds > 1e-7 ? seconds : 1e-7);
        n = wanted < 2 ? 2 * n : wanted < 64 ? (int64_t)ceil((double)n * wanted) : 64 * n;
    }
    for (int64_t i = 0; !rc && i < rounds; i++, at += n) {
        rc = time_calls(b, call, ctx, at, n, &seconds);
        times[i] = seconds / (double)n;
    }
    if (!rc) {
        out->median = bench_median(times, (size_t)rounds);
        out->min = times[0];
    }
    free(times);
    return rc;
}

/* --- the machine's rates ------------------------------------------------------------------------------------------ */

int64_t bench_many_tokens(const struct backend *b)
{
    return b->host_memory ? 512 : 16384;
}

struct product {
    const struct backend *b;
    struct mat x, w, out;
};

static int product_call(void *ctx, int64_t i)
{
    (void)i;
    const struct product *p = ctx;
    return p->b->core->gemm(p->b, &p->x, &p->w, &p->out);
}

/* Seconds of x [n, cols]·wᵀ, w [rows, cols] in BF16. */
static int product_time(const struct backend *b, struct parallel *pool, int64_t n, int64_t rows, int64_t cols,
                        struct bench_time *t)
{
    struct product p = {.b = b};
    struct buf x = {0}, w = {0}, out = {0};
    int rc = bench_matrix(b, pool, b->activation, n, cols, 1, 1, &x, &p.x);
    if (!rc)
        rc = bench_matrix(b, pool, DTYPE_BF16, rows, cols, 0.02, 2, &w, &p.w);
    if (!rc)
        rc = b->core->acquire(b, (size_t)(n * rows) * dtype_bytes(b->activation), "the result of a product",
                              &out);
    p.out = (struct mat){out.ptr, b->activation, n, rows, rows};
    if (!rc)
        rc = bench_time(b, BENCH_PEAK_ROUNDS, product_call, &p, t);
    b->core->release(b, &x);
    b->core->release(b, &w);
    b->core->release(b, &out);
    return rc;
}

int bench_gemm_peak(const struct backend *b, struct parallel *pool, double *flops)
{
    const int64_t n = bench_many_tokens(b), rows = 10240, cols = 2560;
    struct bench_time t;
    const int rc = product_time(b, pool, n, rows, cols, &t);
    if (!rc)
        *flops = fmax(*flops, 2.0 * (double)n * (double)rows * (double)cols / t.median);
    return rc;
}

int bench_gemv_peak(const struct backend *b, struct parallel *pool, double *bytes)
{
    const int64_t rows = 65536, cols = 8192;
    struct bench_time t;
    const int rc = product_time(b, pool, 1, rows, cols, &t);
    if (!rc)
        *bytes = fmax(*bytes, 2.0 * (double)rows * (double)cols / t.median);
    return rc;
}

/* A handle for each worker: on the CPU this operation works on the calling thread. */
struct read_worker {
    struct backend backend;
    int64_t index;
};

struct reading {
    struct mat w;
    const struct backend *b;
    struct buf index;
    struct parallel *pool;
    struct read_worker *workers;
};

static int read_task(void *ctx, size_t row, int worker)
{
    const struct reading *r = ctx;
    struct read_worker *k = &r->workers[worker];
    const struct mat part = mat_rows(&r->w, (int64_t)row, 1);
    return k->backend.core->find_nonfinite(&k->backend, &part, &k->index);
}

static int read_call(void *ctx, int64_t i)
{
    (void)i;
    const struct reading *r = ctx;
    if (r->b->host_memory)
        return parallel_for(r->pool, (size_t)r->w.rows, read_task, ctx);
    return r->b->core->find_nonfinite(r->b, &r->w, r->index.ptr);
}

static int open_read_workers(struct reading *r)
{
    const int n = parallel_workers(r->pool);
    int rc = (r->workers = mem_alloc((size_t)n, sizeof *r->workers, "workers")) ? 0 : ERR_MEMORY;
    for (int i = 0; !rc && r->b->host_memory && i < n; i++)
        rc = backend_open_beside(&r->workers[i].backend, r->b);
    return rc;
}

int bench_read_peak(const struct backend *b, struct parallel *pool, double *bytes)
{
    const int64_t cols = 1 << 20, rows = b->host_memory ? 512 : 1024;
    struct reading r = {.b = b, .pool = pool};
    struct buf w = {0};
    struct bench_time t;
    int rc = open_read_workers(&r);
    if (!rc)
        rc = bench_matrix(b, pool, DTYPE_BF16, rows, cols, 0.02, 3, &w, &r.w);
    if (!rc)
        rc = b->core->acquire(b, sizeof(int64_t), "an index", &r.index);
    if (!rc)
        rc = bench_time(b, BENCH_PEAK_ROUNDS, read_call, &r, &t);
    if (!rc)
        *bytes = fmax(*bytes, 2.0 * (double)rows * (double)cols / t.median);
    for (int i = 0; r.workers && i < parallel_workers(pool); i++)
        backend_close(&r.workers[i].backend);
    free(r.workers);
    b->core->release(b, &w);
    b->core->release(b, &r.index);
    return rc;
}

struct copying {
    const struct backend *b;
    struct buf from, to;
};

static int copy_call(void *ctx, int64_t i)
{
    (void)i;
    const struct copying *c = ctx;
    return c->b->core->copy(c->b, c->to.ptr, c->from.ptr, c->from.bytes);
}

int bench_copy_peak(const struct backend *b, double *bytes)
{
    const int64_t n = b->host_memory ? 256 << 20 : 1 << 30;
    struct copying c = {.b = b};
    struct bench_time t;
    int rc = b->core->acquire(b, (size_t)n, "bytes to copy", &c.from);
    if (!rc)
        rc = b->core->acquire(b, (size_t)n, "bytes to copy", &c.to);
    if (!rc) /* memory that nobody has touched may be no memory yet */
        rc = b->core->zero(b, &(struct mat){c.from.ptr, DTYPE_I8, 1, n, n});
    if (!rc)
        rc = bench_time(b, BENCH_PEAK_ROUNDS, copy_call, &c, &t);
    if (!rc)
        *bytes = fmax(*bytes, 2 * (double)n / t.median);
    b->core->release(b, &c.from);
    b->core->release(b, &c.to);
    return rc;
}

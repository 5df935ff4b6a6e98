#include "quantize/calibrate.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"
#include "kernels/budget.h"

#include <stdlib.h>
#include <string.h>

/* Linears that read the same inputs, and what becomes of them. */
struct set {
    const struct linear_plan *members; /* in model order */
    int n;
    int64_t rows, cols; /* of all of them, one below the other */
};

struct run {
    const struct model *m;
    const struct recipe_plan *plan;
    const struct backend *b;
    const struct calibrate_options *o;
    const struct calibrate_events *events;
    struct weights weights;
    struct capture *capture;
    struct gptq *gptq;
    struct buf hessian;
    struct staged_buf packed, scales, zeros,
        found; /* of the largest set; found: where a weight is not finite */
    double *seconds, mark;
};

/* --- the sets --------------------------------------------------------------------------------------------------- */

/* The set of a layer; n = 0 where it has none. */
static struct set find_set(const struct recipe_plan *plan, int layer, enum gemma_fused set)
{
    struct set s = {0};
    for (size_t i = 0; i < plan->n; i++) { /* sorted by layer and set */
        const struct linear_plan *l = &plan->linears[i];
        if (l->tensor->layer != layer || gemma_fused_set(l->tensor->role) != set)
            continue;
        if (!s.n++)
            s.members = l;
        s.rows += l->tensor->shape[0];
        s.cols = l->tensor->shape[1];
    }
    return s;
}

static int64_t group_of(const struct set *s)
{
    const struct quant_scheme scheme = s->members->scheme;
    return scheme.group ? scheme.group : s->cols;
}

/* The sizes of all sets that are quantized; returns their number. */
static size_t list_sizes(const struct recipe_plan *plan, int64_t n_layers, struct gptq_size *out)
{
    size_t n = 0;
    for (int layer = 0; layer < (int)n_layers; layer++)
        for (int k = 0; k < N_FUSED; k++) {
            const struct set s = find_set(plan, layer, (enum gemma_fused)k);
            if (s.n && s.members->quantized)
                out[n++] = (struct gptq_size){s.rows, s.cols, group_of(&s)};
        }
    return n;
}

/* Bytes of codes, scales and zero points, the most of any set. */
struct result_bytes {
    size_t packed, scales;
};

static struct result_bytes largest_result(const struct recipe_plan *plan, int64_t n_layers)
{
    struct result_bytes most = {0};
    for (int layer = 0; layer < (int)n_layers; layer++)
        for (int k = 0; k < N_FUSED; k++) {
            const struct set s = find_set(plan, layer, (enum gemma_fused)k);
            if (!s.n || !s.members->quantized)
                continue;
            const struct quant_scheme q = s.members->scheme;
            const size_t packed = (size_t)(s.rows * quant_packed_cols(q, s.cols)) * 4,
                         scales = (size_t)(s.rows * quant_groups(q, s.cols)) * 2;
            most.packed = packed > most.packed ? packed : most.packed;
            most.scales = scales > most.scales ? scales : most.scales;
        }
    return most;
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

/* What the device needs beside states and activations. */
static int other_bytes(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                       uint64_t *out)
{
    const int64_t n_layers = m->gemma.n_layers;
    struct gptq_size *sizes = mem_alloc((size_t)n_layers * N_FUSED, sizeof *sizes, "the plan");
    if (!sizes)
        return ERR_MEMORY;
    const size_t n = list_sizes(plan, n_layers, sizes);
    uint64_t part = 0, hessian = 0;
    for (int layer = 0; layer < (int)n_layers; layer++) {
        const uint64_t bytes = weights_part_bytes(m, layer);
        part = bytes > part ? bytes : part;
    }
    for (size_t i = 0; i < n; i++) {
        const uint64_t bytes = (uint64_t)(sizes[i].cols * sizes[i].cols) * sizeof(float);
        hessian = bytes > hessian ? bytes : hessian;
    }
    const struct result_bytes result = largest_result(plan, n_layers);
    *out = part + hessian + gptq_bytes(sizes, n) + result.packed + 2 * result.scales + b->scratch_bytes;
    free(sizes);
    return 0;
}

int calibrate_plan(struct calibrate_plan *out, const struct model *m, const struct recipe_plan *plan,
                   const struct backend *b, int64_t samples, int64_t length)
{
    struct device_memory memory;
    uint64_t other;
    int rc = other_bytes(m, plan, b, &other);
    if (!rc)
        rc = b->core->memory(b, &memory);
    if (rc < 0)
        return rc;
    const uint64_t limit = budget_limit(),
                   usable = memory.free - memory.free / 16; /* what drivers and libraries take */
    uint64_t allowed = limit && limit < usable ? limit : usable;
    capture_plan(&out->capture, &m->gemma, b, samples, length, allowed > other ? allowed - other : 0);
    /* the embedding is there only while there is nothing but the states */
    const uint64_t outer = weights_part_bytes(m, WEIGHTS_OUTER);
    out->device_bytes = out->capture.device_bytes + (other > outer ? other : outer);
    out->host_bytes = out->capture.host_bytes;
    if (out->device_bytes <= allowed)
        return 0;
    char need[32], has[32];
    return err_set(ERR_MEMORY, "%s: %s are needed to calibrate with %lld samples of %lld tokens, %s are %s",
                   b->name, text_bytes(out->device_bytes, need), (long long)samples, (long long)length,
                   text_bytes(allowed, has), limit && limit < usable ? "in the memory budget" : "free");
}

static int open_run(struct run *r, const struct dataset *data)
{
    const int64_t n_layers = r->m->gemma.n_layers;
    struct calibrate_plan plan;
    int rc = calibrate_plan(&plan, r->m, r->plan, r->b, data->samples, data->length);
    struct gptq_size *sizes = rc ? NULL : mem_alloc((size_t)n_layers * N_FUSED, sizeof *sizes, "the plan");
    if (!rc && !sizes)
        rc = ERR_MEMORY;
    if (!rc)
        rc = weights_open(&r->weights, r->m, r->b);
    if (!rc)
        rc = capture_open(&r->capture, &r->weights, data, &plan.capture, r->o->skip_id);
    const size_t n = rc ? 0 : list_sizes(r->plan, n_layers, sizes);
    if (!rc)
        rc = gptq_open(&r->gptq, r->b, &r->o->gptq, sizes, n);
    int64_t cols = 0;
    for (size_t i = 0; i < n; i++)
        cols = sizes[i].cols > cols ? sizes[i].cols : cols;
    if (!rc)
        rc = r->b->core->acquire(r->b, (size_t)(cols * cols) * sizeof(float), "a Hessian", &r->hessian);
    const struct result_bytes bytes = largest_result(r->plan, n_layers);
    const struct staged_need needs[] = {{&r->packed, bytes.packed, "codes"},
                                        {&r->scales, bytes.scales, "scales"},
                                        {&r->zeros, bytes.scales / 2, "zero points"},
                                        {&r->found, sizeof(int64_t), "a place"}};
    if (!rc)
        rc = backend_acquire_staged(r->b, needs, sizeof needs / sizeof *needs);
    free(sizes);
    return rc;
}

static void close_run(struct run *r)
{
    struct staged_buf *const pieces[] = {&r->packed, &r->scales, &r->zeros, &r->found};
    backend_release_staged(r->b, pieces, sizeof pieces / sizeof *pieces);
    r->b->core->release(r->b, &r->hessian);
    gptq_close(r->gptq);
    capture_close(r->capture);
    weights_free(&r->weights);
}

/* Everything since the last call was that kind of work. */
static int spent(struct run *r, enum calibrate_work work)
{
    if (!r->seconds)
        return 0;
    const int rc = r->b->core->wait(r->b);
    const double now = clock_seconds();
    r->seconds[work] += now - r->mark;
    r->mark = now;
    return rc;
}

/* --- one set ---------------------------------------------------------------------------------------------------- */

/* Part of the staged result: rows [row, row + n) of the set, on the device or on the host. */
static struct qmat result_rows(const struct run *r, const struct set *s, int64_t row, int64_t n, bool host)
{
    const struct quant_scheme scheme = s->members->scheme;
    const int64_t words = quant_packed_cols(scheme, s->cols), groups = quant_groups(scheme, s->cols);
    const struct mat packed = {host ? r->packed.host : r->packed.device, DTYPE_I32, s->rows, words, words};
    const struct mat scales = {host ? r->scales.host : r->scales.device, DTYPE_BF16, s->rows, groups, groups};
    const struct mat zeros = {host ? r->zeros.host : r->zeros.device, DTYPE_I8, s->rows, groups, groups};
    struct qmat q = {.packed = mat_rows(&packed, row, n),
                     .scales = mat_rows(&scales, row, n),
                     .bits = scheme.bits,
                     .group = group_of(s),
                     .cols = s->cols};
    if (!scheme.symmetric)
        q.zeros = mat_rows(&zeros, row, n);
    return q;
}

/* BF16 values take the place of the weights. */
static int replace_weight(const struct run *r, struct linear *l, const struct qmat *q)
{
    if (l->weight.dtype == DTYPE_F16)
        l->weight.dtype = DTYPE_BF16;
    return r->b->quant->dequantize(r->b, q, &l->weight);
}

static int check_finite(const struct run *r, const struct linear_plan *plan, const struct mat *w)
{
    int64_t *found = r->found.device;
    int rc = r->o->allow_nonfinite ? r->b->core->zero_nonfinite(r->b, w, found)
                                   : r->b->core->find_nonfinite(r->b, w, found);
    if (!rc)
        rc = r->b->core->stage_out(r->b, &r->found, 0, sizeof *found);
    const int64_t at = *(const int64_t *)r->found.host;
    return rc || r->o->allow_nonfinite || at < 0
               ? rc
               : err_set(
                     ERR_FORMAT,
                     "%s: tensor '%s' has a NaN or an infinity at row %lld, column %lld (--allow-nonfinite takes such "
                     "weights as 0)",
                     r->m->folder, plan->tensor->name, (long long)(at / w->cols), (long long)(at % w->cols));
}

/* Linears of one set that lie together as one weight, or a single one: members [first, first + n), from `row` of the set
 * on. */
struct piece {
    struct linear *linear;
    int first, n;
    int64_t row, rows;
};

static int deliver(struct run *r, const struct set *s, const struct piece *p, const struct gptq_stats *stats)
{
    int rc = 0;
    for (int64_t i = 0, row = p->row; !rc && i < p->n; i++) {
        const struct linear_plan *plan = &s->members[p->first + i];
        const int64_t rows = plan->tensor->shape[0];
        const struct calibrated_linear done = {plan, result_rows(r, s, row, rows, true), *stats};
        rc = r->events->on_linear(r->events->ctx, &done);
        row += rows;
    }
    return rc;
}

static int stage_out_result(const struct run *r, const struct set *s)
{
    const struct core_ops *core = r->b->core;
    const struct qmat q = result_rows(r, s, 0, s->rows, true);
    const size_t n = (size_t)(q.scales.rows * q.scales.cols);
    int rc = core->stage_out(r->b, &r->packed, 0, (size_t)(q.packed.rows * q.packed.cols) * sizeof(uint32_t));
    if (!rc)
        rc = core->stage_out(r->b, &r->scales, 0, n * sizeof(uint16_t));
    return rc || !q.zeros.data ? rc : core->stage_out(r->b, &r->zeros, 0, n);
}

static int stage_in_result(const struct run *r, const struct set *s)
{
    const struct core_ops *core = r->b->core;
    const struct qmat q = result_rows(r, s, 0, s->rows, true);
    const size_t n = (size_t)(q.scales.rows * q.scales.cols);
    int rc = core->stage_in(r->b, &r->packed, 0, (size_t)(q.packed.rows * q.packed.cols) * sizeof(uint32_t));
    if (!rc)
        rc = core->stage_in(r->b, &r->scales, 0, n * sizeof(uint16_t));
    if (!rc && q.zeros.data)
        rc = core->stage_in(r->b, &r->zeros, 0, n);
    return rc ? rc : core->wait(r->b);
}

/* The pieces of a set: one where the weights lie together. */
static int list_pieces(const struct set *s, struct linear_set *l, struct piece out[3])
{
    if (l->fused) {
        out[0] = (struct piece){&l->whole, 0, s->n, 0, s->rows};
        return 1;
    }
    for (int64_t i = 0, row = 0; i < s->n; row += out[i++].rows)
        out[i] = (struct piece){&l->parts[i], (int)i, 1, row, s->members[i].tensor->shape[0]};
    return s->n;
}

static int solve(struct run *r, const struct set *s, struct linear_set *l, const struct mat *h)
{
    struct piece pieces[3];
    struct gptq_stats stats[3];
    const int n = list_pieces(s, l, pieces);
    int rc = r->b->quant->hessian_finish(r->b, h);
    if (!rc)
        rc = gptq_prepare(r->gptq, h);
    for (int i = 0; !rc && i < n; i++) {
        const struct piece *p = &pieces[i];
        const struct qmat q = result_rows(r, s, p->row, p->rows, false);
        rc = check_finite(r, &s->members[p->first], &p->linear->weight);
        if (!rc)
            rc = gptq_quantize(r->gptq, &p->linear->weight, &q, &stats[i]);
        if (!rc)
            rc = replace_weight(r, p->linear, &q);
    }
    if (!rc)
        rc = spent(r, WORK_SOLVE);
    if (!rc)
        rc = stage_out_result(r, s);
    for (int i = 0; !rc && i < n; i++)
        rc = deliver(r, s, &pieces[i], &stats[i]);
    return rc ? rc : spent(r, WORK_DELIVER);
}

/* 1: the whole set's result was known and has taken its place. */
static int take_known(struct run *r, const struct set *s, struct linear_set *l)
{
    struct piece pieces[3];
    int rc = r->events->known != NULL;
    for (int64_t i = 0, row = 0; rc > 0 && i < s->n; i++) {
        const int64_t rows = s->members[i].tensor->shape[0];
        const struct qmat q = result_rows(r, s, row, rows, true);
        rc = r->events->known(r->events->ctx, &s->members[i], &q);
        row += rows;
    }
    if (rc <= 0)
        return rc;
    rc = stage_in_result(r, s);
    const int n = list_pieces(s, l, pieces);
    for (int i = 0; !rc && i < n; i++) {
        const struct qmat q = result_rows(r, s, pieces[i].row, pieces[i].rows, false);
        rc = replace_weight(r, pieces[i].linear, &q);
    }
    return rc ? rc : 1;
}

static int run_set(struct run *r, int layer, enum gemma_fused kind)
{
    struct block *block = &r->weights.blocks[layer];
    struct linear_set *const places[N_FUSED] = {[FUSED_QKV] = &block->qkv,
                                                [FUSED_O] = &block->o,
                                                [FUSED_GATE_UP] = &block->gate_up,
                                                [FUSED_DOWN] = &block->down};
    const struct set s = find_set(r->plan, layer, kind);
    const bool quantized = s.n && s.members->quantized;
    const int known = quantized ? take_known(r, &s, places[kind]) : 0;
    if (known < 0)
        return known;
    const struct mat h = {r->hessian.ptr, DTYPE_F32, s.cols, s.cols, s.cols};
    const bool open = quantized && !known;
    int rc = open ? r->b->core->zero(r->b, &h) : 0;
    if (!rc)
        rc = capture_inputs(r->capture, layer, kind, open ? &h : NULL);
    if (!rc)
        rc = spent(r, WORK_FORWARD);
    if (!rc && open)
        rc = solve(r, &s, places[kind], &h);
    return rc < 0 && s.n ? err_context(rc, "%s", s.members->tensor->name) : rc;
}

/* --- all blocks ------------------------------------------------------------------------------------------------- */

static int run_block(struct run *r, int layer)
{
    int rc = weights_load_part(&r->weights, layer);
    if (!rc)
        rc = spent(r, WORK_LOAD);
    for (int k = 0; !rc && k < N_FUSED; k++)
        rc = run_set(r, layer, (enum gemma_fused)k);
    if (!rc && layer + 1 < (int)r->m->gemma.n_layers)
        rc = capture_end(r->capture, layer);
    if (!rc)
        rc = spent(r, WORK_FORWARD);
    weights_unload_part(&r->weights, layer);
    return rc;
}

int calibrate_run(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                  const struct dataset *data, const struct calibrate_options *options,
                  const struct calibrate_events *events, double *seconds)
{
    struct run r = {.m = m,
                    .plan = plan,
                    .b = b,
                    .o = options,
                    .events = events,
                    .seconds = seconds,
                    .mark = clock_seconds()};
    if (seconds)
        memset(seconds, 0, N_WORK * sizeof *seconds);
    int rc = open_run(&r, data);
    if (!rc)
        rc = spent(&r, WORK_LOAD);
    for (int layer = 0; !rc && layer < (int)m->gemma.n_layers; layer++)
        rc = run_block(&r, layer);
    close_run(&r);
    return rc;
}

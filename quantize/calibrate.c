#include "quantize/calibrate.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"
#include "kernels/budget.h"
#include "quantize/outbox.h"

#include <stdlib.h>
#include <string.h>

/* Linears that read the same inputs, and what becomes of them. */
struct set {
    const struct linear_plan *members; /* in model order */
    int n;
    int64_t rows, cols; /* of all of them, one below the other */
};

/* A set's results, on their way out. */
struct result {
    struct set set;
    struct gptq_stats stats[GPTQ_MAX_PARTS];
    int64_t n_nonfinite[GPTQ_MAX_PARTS];
};

struct run {
    const struct model *m;
    const struct recipe_plan *plan;
    const struct backend *b;
    const struct calibrate_options *o;
    const struct calibrate_events *events;
    struct work_clock clock;
    struct weights weights;
    struct capture *capture;
    struct gptq *gptq;
    struct buf hessian, codes; /* codes: with scales and zero points, of the largest set */
    struct staged_buf
        n_found; /* places or numbers of weights that are not finite, one for each of a set's linears */
    struct outbox *outbox;
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

/* Codes, scales and zero points of a set in memory, packed first. */
struct result_bytes {
    size_t packed, scales, zeros;
};

static struct result_bytes result_bytes(const struct set *s)
{
    const struct quant_scheme q = s->members->scheme;
    const size_t scales = (size_t)(s->rows * quant_groups(q, s->cols));
    return (struct result_bytes){(size_t)(s->rows * quant_packed_cols(q, s->cols)) * sizeof(uint32_t),
                                 scales * sizeof(uint16_t), q.symmetric ? 0 : scales};
}

static void grow_to(size_t *size, size_t need)
{
    *size = need > *size ? need : *size;
}

/* The most of any set. */
static struct result_bytes largest_result(const struct recipe_plan *plan, int64_t n_layers)
{
    struct result_bytes most = {0};
    for (int layer = 0; layer < (int)n_layers; layer++)
        for (int k = 0; k < N_FUSED; k++) {
            const struct set s = find_set(plan, layer, (enum gemma_fused)k);
            if (!s.n || !s.members->quantized)
                continue;
            const struct result_bytes bytes = result_bytes(&s);
            grow_to(&most.packed, bytes.packed);
            grow_to(&most.scales, bytes.scales);
            grow_to(&most.zeros, bytes.zeros);
        }
    return most;
}

static size_t rounded(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

/* Of all three, one behind the other. */
static size_t codes_bytes(const struct result_bytes *r)
{
    return rounded(r->packed) + rounded(r->scales) + rounded(r->zeros);
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

/* Of results on their way out, in the host's memory. */
static uint64_t results_bytes(const struct result_bytes *r)
{
    return outbox_bytes(&(struct outbox_size){r->packed, r->scales, r->zeros, sizeof(struct result)});
}

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
    *out = part + hessian + gptq_bytes(sizes, n) + codes_bytes(&result) + GPTQ_MAX_PARTS * sizeof(int64_t) +
           b->scratch_bytes + weights_loader_bytes(b);
    if (b->host_memory)
        *out += results_bytes(&result);
    free(sizes);
    return 0;
}

int calibrate_plan(struct calibrate_plan *out, const struct model *m, const struct recipe_plan *plan,
                   const struct backend *b, const struct dataset *data, uint64_t reserved)
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
    const uint64_t allowed = limit && limit < usable ? limit : usable, taken = other + reserved;
    capture_plan(&out->capture, &m->gemma, b, data->samples, data->length,
                 allowed > taken ? allowed - taken : 0);
    /* the embedding is there only while there is nothing but the states */
    const uint64_t outer = weights_part_bytes(m, WEIGHTS_OUTER) + weights_loader_bytes(b);
    out->device_bytes = out->capture.device_bytes + reserved + (other > outer ? other : outer);
    const struct result_bytes result = largest_result(plan, m->gemma.n_layers);
    out->host_bytes = out->capture.host_bytes + (b->host_memory ? 0 : results_bytes(&result));
    if (out->device_bytes <= allowed)
        return 0;
    char need[32], has[32];
    return err_set(ERR_MEMORY, "%s: %s are needed to calibrate with %lld samples of %lld tokens, %s are %s",
                   b->name, text_bytes(out->device_bytes, need), (long long)data->samples,
                   (long long)data->length, text_bytes(allowed, has),
                   limit && limit < usable ? "in the memory budget" : "free");
}

/* Seconds for a multiplication and an addition in a product of activations. */
static int measure_product(const struct backend *b, int64_t hidden, double *seconds)
{
    enum { ROWS = 1024, TIMES = 3 };
    const size_t act = dtype_bytes(b->activation), bytes = (size_t)((2 * ROWS + hidden) * hidden) * act;
    struct buf memory;
    int rc = b->core->acquire(b, bytes, "a trial product", &memory);
    if (rc < 0)
        return rc;
    char *at = memory.ptr;
    const struct mat x = {at, b->activation, ROWS, hidden, hidden},
                     out = {at + (size_t)(ROWS * hidden) * act, b->activation, ROWS, hidden, hidden},
                     w = {at + (size_t)(2 * ROWS * hidden) * act, b->activation, hidden, hidden, hidden};
    rc = b->core->zero(b, &(struct mat){at, b->activation, 2 * ROWS + hidden, hidden, hidden});
    double start = 0;
    for (int i = 0; !rc && i <= TIMES; i++) { /* the first one warms up */
        rc = b->core->gemm(b, &x, &w, &out);
        if (!rc && (i == 0 || i == TIMES))
            rc = b->core->wait(b);
        start = i ? start : clock_seconds();
    }
    *seconds = (clock_seconds() - start) / (2.0 * TIMES * ROWS * (double)(hidden * hidden));
    b->core->release(b, &memory);
    return rc;
}

int calibrate_estimate(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                       const struct dataset *data, int passes, double *seconds)
{
    const double tokens = (double)(data->samples * data->length);
    double work = 0, each = 0;
    for (int layer = 0; layer < (int)m->gemma.n_layers; layer++)
        for (int k = 0; k < N_FUSED; k++) {
            const struct set s = find_set(plan, layer, (enum gemma_fused)k);
            const double rows = (double)s.rows, cols = (double)s.cols;
            work += 2.6 * rows * cols * tokens; /* the pass, and what weighs tokens */
            if (s.n && s.members->quantized)    /* products with the Hessian are three of the device's */
                work +=
                    1.2 * cols * cols * tokens + cols * cols * cols + 6 * (4 + passes) * rows * cols * cols;
        }
    const int rc = measure_product(b, m->gemma.hidden_size, &each);
    *seconds = work * each;
    return rc;
}

static int deliver(void *ctx, const struct outbox_slot *slot, const void *item);

static int take_memory(struct run *r, int64_t cols)
{
    const struct result_bytes bytes = largest_result(r->plan, r->m->gemma.n_layers);
    const struct outbox_size size = {bytes.packed, bytes.scales, bytes.zeros, sizeof(struct result)};
    int rc = r->b->core->acquire(r->b, (size_t)(cols * cols) * sizeof(float), "a Hessian", &r->hessian);
    if (!rc)
        rc = r->b->core->acquire(r->b, codes_bytes(&bytes), "codes and scales", &r->codes);
    if (!rc)
        rc = r->b->core->acquire_staging(r->b, GPTQ_MAX_PARTS * sizeof(int64_t), "places", &r->n_found);
    return rc ? rc : outbox_open(&r->outbox, r->b, &size, deliver, r);
}

static int open_run(struct run *r, const struct dataset *data)
{
    const int64_t n_layers = r->m->gemma.n_layers;
    struct calibrate_plan plan;
    int rc = calibrate_plan(&plan, r->m, r->plan, r->b, data, r->o->reserved);
    struct gptq_size *sizes = rc ? NULL : mem_alloc((size_t)n_layers * N_FUSED, sizeof *sizes, "the plan");
    if (!rc && !sizes)
        rc = ERR_MEMORY;
    if (!rc)
        rc = weights_open(&r->weights, r->m, r->b);
    if (!rc)
        rc = capture_open(&r->capture, &r->weights, data, &plan.capture, r->o->skip_id, &r->clock);
    const size_t n = rc ? 0 : list_sizes(r->plan, n_layers, sizes);
    if (!rc)
        rc = gptq_open(&r->gptq, r->b, &r->o->gptq, sizes, n, &r->clock);
    int64_t cols = 0;
    for (size_t i = 0; i < n; i++)
        cols = sizes[i].cols > cols ? sizes[i].cols : cols;
    if (!rc)
        rc = take_memory(r, cols);
    free(sizes);
    return rc ? rc : work_spent(&r->clock, r->b, WORK_LOAD);
}

static void close_run(struct run *r)
{
    outbox_close(r->outbox);
    if (r->n_found.host)
        r->b->core->release_staging(r->b, &r->n_found);
    r->b->core->release(r->b, &r->codes);
    r->b->core->release(r->b, &r->hessian);
    gptq_close(r->gptq);
    capture_close(r->capture);
    weights_free(&r->weights);
}

/* --- results ---------------------------------------------------------------------------------------------------- */

/* Rows [row, row + n) of a set's result that lies in the three places. */
static struct qmat result_rows(const struct set *s, void *const places[3], int64_t row, int64_t n)
{
    const struct quant_scheme scheme = s->members->scheme;
    const int64_t words = quant_packed_cols(scheme, s->cols), groups = quant_groups(scheme, s->cols);
    const struct mat packed = {places[0], DTYPE_I32, s->rows, words, words};
    const struct mat scales = {places[1], DTYPE_BF16, s->rows, groups, groups};
    const struct mat zeros = {places[2], DTYPE_I8, s->rows, groups, groups};
    struct qmat q = {.packed = mat_rows(&packed, row, n),
                     .scales = mat_rows(&scales, row, n),
                     .bits = scheme.bits,
                     .group = group_of(s),
                     .cols = s->cols};
    if (!scheme.symmetric)
        q.zeros = mat_rows(&zeros, row, n);
    return q;
}

static struct qmat device_rows(const struct run *r, const struct set *s, int64_t row, int64_t n)
{
    const struct result_bytes bytes = result_bytes(s);
    char *base = r->codes.ptr;
    char *scales = base + rounded(bytes.packed);
    return result_rows(s, (void *const[]){base, scales, scales + rounded(bytes.scales)}, row, n);
}

static struct qmat slot_rows(const struct outbox_slot *slot, const struct set *s, int64_t row, int64_t n)
{
    return result_rows(s, (void *const[]){slot->packed.ptr, slot->scales.ptr, slot->zeros.ptr}, row, n);
}

/* In the outbox's thread: a set's linears, one by one. */
static int deliver(void *ctx, const struct outbox_slot *slot, const void *item)
{
    const struct run *r = ctx;
    const struct result *result = item;
    const struct set *s = &result->set;
    int rc = 0;
    for (int64_t i = 0, row = 0; !rc && i < s->n; i++) {
        const int64_t rows = s->members[i].tensor->shape[0];
        const struct calibrated_linear done = {&s->members[i], slot_rows(slot, s, row, rows),
                                               result->stats[i], result->n_nonfinite[i]};
        rc = r->events->on_linear(r->events->ctx, &done);
        row += rows;
    }
    return rc;
}

static int send(struct run *r, const struct result *result)
{
    const struct set *s = &result->set;
    const struct core_ops *core = r->b->core;
    const struct result_bytes bytes = result_bytes(s);
    const struct qmat q = device_rows(r, s, 0, s->rows);
    struct outbox_slot *slot;
    int rc = outbox_take(r->outbox, &slot);
    if (!rc)
        rc = core->download(r->b, slot->packed.ptr, q.packed.data, bytes.packed);
    if (!rc)
        rc = core->download(r->b, slot->scales.ptr, q.scales.data, bytes.scales);
    if (!rc && q.zeros.data)
        rc = core->download(r->b, slot->zeros.ptr, q.zeros.data, bytes.zeros);
    if (rc < 0)
        return rc;
    outbox_put(r->outbox, slot, result);
    return work_spent(&r->clock, r->b, WORK_DELIVER);
}

/* --- one set ---------------------------------------------------------------------------------------------------- */

/* Linears of one set that lie together as one weight, or a single one: members [first, first + parts.n), from `row` of
 * the set on. */
struct piece {
    struct linear *linear;
    int first;
    struct gptq_parts parts;
    int64_t row, rows;
};

/* The pieces of a set: one where the weights lie together. */
static int list_pieces(const struct set *s, struct linear_set *l, struct piece out[GPTQ_MAX_PARTS])
{
    CHECK(s->n <= GPTQ_MAX_PARTS);
    const int n = l->fused ? 1 : s->n;
    int64_t row = 0;
    for (int i = 0; i < n; i++) {
        out[i] = (struct piece){.linear = l->fused ? &l->whole : &l->parts[i], .first = i, .row = row};
        for (int k = i; k < (l->fused ? s->n : i + 1); k++) {
            const int64_t rows = s->members[k].tensor->shape[0];
            out[i].parts.rows[out[i].parts.n++] = rows;
            out[i].rows += rows;
        }
        row += out[i].rows;
    }
    return n;
}

/* BF16 values take the place of the weights. */
static int replace_weight(const struct run *r, struct linear *l, const struct qmat *q)
{
    if (l->weight.dtype == DTYPE_F16)
        l->weight.dtype = DTYPE_BF16;
    return r->b->quant->dequantize(r->b, q, &l->weight);
}

/* Counts weights that are not finite and sets them to 0, or refuses them. */
static int check_piece(const struct run *r, const struct set *s, const struct piece *p, int64_t *n_nonfinite)
{
    const struct core_ops *core = r->b->core;
    int64_t *found = r->n_found.device;
    int rc = 0;
    for (int64_t i = 0, row = 0; !rc && i < p->parts.n; row += p->parts.rows[i++]) {
        const struct mat w = mat_rows(&p->linear->weight, row, p->parts.rows[i]);
        rc = r->o->allow_nonfinite ? core->zero_nonfinite(r->b, &w, &found[i])
                                   : core->find_nonfinite(r->b, &w, &found[i]);
    }
    if (!rc)
        rc = core->stage_out(r->b, &r->n_found, 0, (size_t)p->parts.n * sizeof *found);
    for (int i = 0; !rc && i < p->parts.n; i++) {
        const int64_t at = ((const int64_t *)r->n_found.host)[i];
        if (r->o->allow_nonfinite)
            n_nonfinite[p->first + i] = at;
        else if (at >= 0)
            rc = err_set(
                ERR_FORMAT,
                "%s: tensor '%s' has a NaN or an infinity at row %lld, column %lld (--allow-nonfinite "
                "takes such weights as 0)",
                r->m->folder, s->members[p->first + i].tensor->name, (long long)(at / s->cols),
                (long long)(at % s->cols));
    }
    return rc;
}

static int check_finite(const struct run *r, const struct set *s, struct linear_set *l, int64_t *n_nonfinite)
{
    struct piece pieces[GPTQ_MAX_PARTS];
    const int n = list_pieces(s, l, pieces);
    int rc = 0;
    for (int i = 0; !rc && i < n; i++)
        rc = check_piece(r, s, &pieces[i], n_nonfinite);
    return rc;
}

static int solve(struct run *r, const struct set *s, struct linear_set *l, const struct mat *h,
                 const int64_t *n_nonfinite)
{
    struct piece pieces[GPTQ_MAX_PARTS];
    struct result result = {.set = *s};
    memcpy(result.n_nonfinite, n_nonfinite, sizeof result.n_nonfinite);
    const int n = list_pieces(s, l, pieces);
    int rc = r->b->quant->hessian_finish(r->b, h);
    if (!rc)
        rc = gptq_prepare(r->gptq, h);
    if (rc < 0)
        return err_context(rc, "%s", s->members->tensor->name);
    for (int i = 0; !rc && i < n; i++) {
        const struct piece *p = &pieces[i];
        const struct qmat q = device_rows(r, s, p->row, p->rows);
        rc = gptq_quantize(r->gptq, &p->linear->weight, &q, &p->parts, &result.stats[p->first]);
        if (!rc)
            rc = replace_weight(r, p->linear, &q);
    }
    return rc ? rc : send(r, &result);
}

/* 1: the whole set's result was known and has taken its place. */
static int take_known(struct run *r, const struct set *s, struct linear_set *l)
{
    struct piece pieces[GPTQ_MAX_PARTS];
    struct outbox_slot *slot;
    const struct core_ops *core = r->b->core;
    const struct result_bytes bytes = result_bytes(s);
    if (!r->events->known)
        return 0;
    int rc = outbox_wait(r->outbox);
    if (!rc)
        rc = outbox_take(r->outbox, &slot) ? ERR_MEMORY : 1; /* its memory is borrowed; it is not put */
    for (int64_t i = 0, row = 0; rc > 0 && i < s->n; row += s->members[i++].tensor->shape[0]) {
        const struct qmat q = slot_rows(slot, s, row, s->members[i].tensor->shape[0]);
        rc = r->events->known(r->events->ctx, &s->members[i], &q);
    }
    if (rc <= 0)
        return rc;
    const struct qmat all = device_rows(r, s, 0, s->rows);
    rc = core->upload(r->b, all.packed.data, slot->packed.ptr, bytes.packed);
    if (!rc)
        rc = core->upload(r->b, all.scales.data, slot->scales.ptr, bytes.scales);
    if (!rc && all.zeros.data)
        rc = core->upload(r->b, all.zeros.data, slot->zeros.ptr, bytes.zeros);
    const int n = list_pieces(s, l, pieces);
    for (int i = 0; !rc && i < n; i++) {
        const struct qmat q = device_rows(r, s, pieces[i].row, pieces[i].rows);
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
    int64_t n_nonfinite[GPTQ_MAX_PARTS] = {0};
    int rc = open ? check_finite(r, &s, places[kind], n_nonfinite) : 0;
    if (!rc && open)
        rc = r->b->core->zero(r->b, &h);
    if (!rc)
        rc = capture_inputs(r->capture, layer, kind, open ? &h : NULL);
    return rc || !open ? rc : solve(r, &s, places[kind], &h, n_nonfinite);
}

/* --- all blocks ------------------------------------------------------------------------------------------------- */

static int run_block(struct run *r, int layer)
{
    int rc = weights_load_part(&r->weights, layer);
    if (!rc)
        rc = work_spent(&r->clock, r->b, WORK_LOAD);
    for (int k = 0; !rc && k < N_FUSED; k++)
        rc = run_set(r, layer, (enum gemma_fused)k);
    if (!rc && layer + 1 < (int)r->m->gemma.n_layers)
        rc = capture_end(r->capture, layer);
    weights_unload_part(&r->weights, layer);
    return rc;
}

int calibrate_run(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                  const struct dataset *data, const struct calibrate_options *options,
                  const struct calibrate_events *events, double *seconds)
{
    struct run r = {.m = m, .plan = plan, .b = b, .o = options, .events = events};
    work_begin(&r.clock, seconds);
    int rc = open_run(&r, data);
    for (int layer = 0; !rc && layer < (int)m->gemma.n_layers; layer++)
        rc = run_block(&r, layer);
    if (!rc)
        rc = outbox_wait(r.outbox);
    if (!rc)
        rc = work_spent(&r.clock, b, WORK_DELIVER);
    close_run(&r);
    return rc;
}

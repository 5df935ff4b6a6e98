#include "quantize/calibrate_impl.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* --- memory ----------------------------------------------------------------------------------------------------- */

static int deliver(void *ctx, const struct outbox_slot *slot, const void *item);

static int take_memory(struct run *r)
{
    const struct result_bytes bytes = sets_largest_result(r->plan);
    const struct outbox_size size = {bytes.packed, bytes.scales, bytes.zeros, sizeof(struct result)};
    return outbox_open(&r->outbox, r->b, &size, deliver, r);
}

int solver_open(struct solver *s, const struct run *r, const struct backend *b, const struct gptq_size *sizes,
                size_t n, struct work_clock *clock)
{
    const struct result_bytes bytes = sets_largest_result(r->plan);
    s->b = b;
    int rc = n ? gptq_open(&s->gptq, b, &r->o->gptq, sizes, n, clock) : 0;
    if (!rc)
        rc = b->core->acquire(b, result_total(&bytes), "codes and scales", &s->codes);
    return rc ? rc : b->core->acquire_staging(b, GPTQ_MAX_PARTS * sizeof(int64_t), "places", &s->n_found);
}

void solver_close(struct solver *s)
{
    if (!s->b)
        return;
    if (s->n_found.host)
        s->b->core->release_staging(s->b, &s->n_found);
    s->b->core->release(s->b, &s->codes);
    gptq_close(s->gptq);
}

static int open_solver(struct run *r)
{
    const int64_t n_layers = r->m->gemma.n_layers;
    struct gptq_size *sizes = mem_alloc((size_t)n_layers * N_FUSED, sizeof *sizes, "the plan");
    if (!sizes)
        return ERR_MEMORY;
    const bool solves = calibrate_solves(&r->o->tune);
    const size_t n = solves ? calibrate_sizes(r->plan, n_layers, sizes) : 0;
    int rc = solver_open(&r->solver, r, r->b, sizes, n, &r->clock);
    if (!rc && solves)
        rc = r->b->core->acquire(r->b, gptq_hessian_bytes(sizes, n), "a Hessian", &r->hessian);
    free(sizes);
    return rc;
}

static int open_tuner(struct run *r, const struct dataset *data, int64_t micro_batch)
{
    const struct tune_options *o = &r->o->tune;
    r->losses = mem_alloc((size_t)o->iterations, sizeof *r->losses, "losses");
    return r->losses ? tuner_open(&r->tuner, r->m, r->plan, &r->weights, data, o, micro_batch, &r->clock)
                     : ERR_MEMORY;
}

static int open_run(struct run *r, const struct dataset *data)
{
    struct calibrate_plan plan;
    int rc = calibrate_plan(&plan, r->m, r->plan, r->b, data, &r->o->tune, r->o->reserved);
    if (!rc)
        rc = weights_open(&r->weights, r->m, r->b);
    if (!rc)
        rc = capture_open(&r->capture, &r->weights, data, &plan.capture, r->o->skip_id, &r->clock);
    if (!rc)
        rc = open_solver(r);
    if (!rc && r->m->gemma.n_experts)
        rc = calibrate_open_experts(r, &plan);
    if (!rc && r->o->tune.iterations)
        rc = open_tuner(r, data, plan.micro_batch);
    if (!rc)
        rc = take_memory(r);
    return rc ? rc : work_spent(&r->clock, r->b, WORK_LOAD);
}

static void close_run(struct run *r)
{
    outbox_close(r->outbox);
    calibrate_close_experts(r);
    tuner_close(r->tuner);
    free(r->losses);
    if (r->hessian.ptr)
        r->b->core->release(r->b, &r->hessian);
    solver_close(&r->solver);
    capture_close(r->capture);
    weights_free(&r->weights);
}

/* --- results ---------------------------------------------------------------------------------------------------- */

static struct qmat slot_rows(const struct outbox_slot *slot, const struct set *s, int64_t row, int64_t n)
{
    return set_result(s, (void *const[]){slot->packed.ptr, slot->scales.ptr, slot->zeros.ptr}, row, n);
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
                                               result->stats[i], result->tuned, result->n_nonfinite[i]};
        rc = r->events->on_linear(r->events->ctx, &done);
        row += rows;
    }
    return rc;
}

int calibrate_send(struct run *r, const struct solver *v, const struct result *result)
{
    const struct set *s = &result->set;
    const struct core_ops *core = v->b->core;
    const struct result_bytes bytes = set_result_bytes(s);
    const struct qmat q = set_result_at(s, v->codes.ptr, 0, s->rows);
    struct outbox_slot *slot;
    int rc = outbox_take(r->outbox, &slot);
    if (!rc)
        rc = core->download(v->b, slot->packed.ptr, q.packed.data, bytes.packed);
    if (!rc)
        rc = core->download(v->b, slot->scales.ptr, q.scales.data, bytes.scales);
    if (!rc && q.zeros.data)
        rc = core->download(v->b, slot->zeros.ptr, q.zeros.data, bytes.zeros);
    if (rc < 0)
        return rc;
    outbox_put(r->outbox, slot, result);
    return 0;
}

/* --- one set ---------------------------------------------------------------------------------------------------- */

/* BF16 values take the place of the weights. */
static int replace_weight(const struct backend *b, struct linear *l, const struct qmat *q)
{
    if (l->weight.dtype == DTYPE_F16)
        l->weight.dtype = DTYPE_BF16;
    return b->quant->dequantize(b, q, &l->weight);
}

/* Counts weights that are not finite and sets them to 0, or refuses them. */
static int check_piece(const struct run *r, const struct solver *v, const struct set *s,
                       const struct piece *p, int64_t *n_nonfinite)
{
    const struct core_ops *core = v->b->core;
    int64_t *found = v->n_found.device;
    int rc = 0;
    for (int64_t i = 0, row = 0; !rc && i < p->parts.n; row += p->parts.rows[i++]) {
        const struct mat w = mat_rows(&p->linear->weight, row, p->parts.rows[i]);
        rc = r->o->allow_nonfinite ? core->zero_nonfinite(v->b, &w, &found[i])
                                   : core->find_nonfinite(v->b, &w, &found[i]);
    }
    if (!rc)
        rc = core->stage_out(v->b, &v->n_found, 0, (size_t)p->parts.n * sizeof *found);
    for (int i = 0; !rc && i < p->parts.n; i++) {
        const int64_t at = ((const int64_t *)v->n_found.host)[i];
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

int calibrate_check_finite(const struct run *r, const struct solver *v, const struct set *s,
                           struct linear_set *l, int64_t *n_nonfinite)
{
    struct piece pieces[GPTQ_MAX_PARTS];
    const int n = set_pieces(s, l, pieces);
    int rc = 0;
    for (int i = 0; !rc && i < n; i++)
        rc = check_piece(r, v, s, &pieces[i], n_nonfinite);
    return rc;
}

/* Scales and zero points. */
static int copy_grid(const struct backend *b, const struct qmat *to, const struct qmat *from)
{
    const size_t n = (size_t)(from->scales.rows * from->scales.cols);
    const int rc = b->core->copy(b, to->scales.data, from->scales.data, n * sizeof(uint16_t));
    return rc || !from->zeros.data ? rc : b->core->copy(b, to->zeros.data, from->zeros.data, n);
}

/* Codes under the Hessian take the weights' place; a tuning gets them as its start, else they are the result. */
int calibrate_solve(struct run *r, const struct solver *v, struct linear_set *l, const struct mat *h,
                    struct result *result)
{
    const struct set *s = &result->set;
    struct piece pieces[GPTQ_MAX_PARTS];
    const int n = set_pieces(s, l, pieces);
    int rc = v->b->quant->hessian_finish(v->b, h);
    if (!rc)
        rc = gptq_prepare(v->gptq, h);
    if (rc < 0)
        return err_context(rc, "%s", s->members->tensor->name);
    for (int i = 0; !rc && i < n; i++) {
        const struct piece *p = &pieces[i];
        const struct qmat q = set_result_at(s, v->codes.ptr, p->row, p->rows);
        const struct tuned_weight start =
            r->tuner ? tuner_weight(r->tuner, s, p->row, p->rows) : (struct tuned_weight){0};
        rc = gptq_quantize(v->gptq, &p->linear->weight, &q, &p->parts, r->tuner ? &start.codes : NULL,
                           &result->stats[p->first]);
        if (!rc)
            rc = replace_weight(v->b, p->linear, &q);
        if (!rc && r->tuner)
            rc = copy_grid(v->b, &start.q, &q);
    }
    return rc;
}

/* 1: the whole set's result was known and has taken its place. */
int calibrate_take_known(struct run *r, const struct set *s, struct linear_set *l)
{
    struct piece pieces[GPTQ_MAX_PARTS];
    struct outbox_slot *slot;
    const struct core_ops *core = r->b->core;
    const struct result_bytes bytes = set_result_bytes(s);
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
    const struct qmat all = set_result_at(s, r->solver.codes.ptr, 0, s->rows);
    rc = core->upload(r->b, all.packed.data, slot->packed.ptr, bytes.packed);
    if (!rc)
        rc = core->upload(r->b, all.scales.data, slot->scales.ptr, bytes.scales);
    if (!rc && all.zeros.data)
        rc = core->upload(r->b, all.zeros.data, slot->zeros.ptr, bytes.zeros);
    const int n = set_pieces(s, l, pieces);
    for (int i = 0; !rc && i < n; i++) {
        const struct qmat q = set_result_at(s, r->solver.codes.ptr, pieces[i].row, pieces[i].rows);
        rc = replace_weight(r->b, pieces[i].linear, &q);
    }
    return rc ? rc : 1;
}

/* Brings all tokens to the set's inputs, and quantizes it under them. */
static int solve_set(struct run *r, int layer, enum gemma_fused kind, struct result *result)
{
    struct linear_set *l = set_place(&r->weights.blocks[layer], kind, SET_DENSE);
    const struct set *s = &result->set;
    const struct mat h = {r->hessian.ptr, DTYPE_F32, s->cols, s->cols, s->cols};
    int rc = r->b->core->zero(r->b, &h);
    if (!rc)
        rc = capture_inputs(r->capture, layer, kind, &h);
    return rc ? rc : calibrate_solve(r, &r->solver, l, &h, result);
}

static int run_set(struct run *r, int layer, enum gemma_fused kind)
{
    struct linear_set *l = set_place(&r->weights.blocks[layer], kind, SET_DENSE);
    struct result result = {.set = set_find(r->plan, layer, kind, SET_DENSE)};
    const bool quantized = set_quantized(&result.set);
    const int known = quantized ? calibrate_take_known(r, &result.set, l) : 0;
    if (known < 0)
        return known;
    if (!quantized || known)
        return capture_inputs(r->capture, layer, kind, NULL);
    int rc = calibrate_check_finite(r, &r->solver, &result.set, l, result.n_nonfinite);
    if (!rc)
        rc = solve_set(r, layer, kind, &result);
    if (!rc)
        rc = calibrate_send(r, &r->solver, &result);
    return rc ? rc : work_spent(&r->clock, r->b, WORK_DELIVER);
}

/* --- a block under tuning --------------------------------------------------------------------------------------- */

int calibrate_finish(struct run *r, struct linear_set *l, struct result *result)
{
    const struct set *s = &result->set;
    struct piece pieces[GPTQ_MAX_PARTS];
    const int n = set_pieces(s, l, pieces);
    int rc = 0;
    for (int i = 0; !rc && i < n; i++) {
        const struct piece *p = &pieces[i];
        const struct qmat q = set_result_at(s, r->solver.codes.ptr, p->row, p->rows);
        const struct tuned_weight tuned = tuner_weight(r->tuner, s, p->row, p->rows);
        double errors[GPTQ_MAX_PARTS], clipped[GPTQ_MAX_PARTS];
        rc = tuner_measure(r->tuner, s, p, errors, clipped);
        for (int k = 0; !rc && k < p->parts.n; k++) {
            result->stats[p->first + k].weight_error = errors[k];
            result->stats[p->first + k].clipped = clipped[k];
        }
        if (!rc)
            rc = copy_grid(r->b, &q, &tuned.q);
        if (!rc)
            rc = r->b->quant->pack_codes(r->b, &tuned.codes, &q);
        if (!rc)
            rc = replace_weight(r->b, p->linear, &q);
    }
    if (!rc)
        rc = calibrate_send(r, &r->solver, result);
    return rc ? rc : work_spent(&r->clock, r->b, WORK_DELIVER);
}

/* 1: every set of the block was known and has taken its place; otherwise the weights are what they were. */
static int take_known_block(struct run *r, int layer, const struct result results[N_FUSED])
{
    int known = r->events->known != NULL;
    for (int k = 0; known > 0 && k < N_FUSED; k++)
        if (set_quantized(&results[k].set))
            known = calibrate_take_known(
                r, &results[k].set, set_place(&r->weights.blocks[layer], (enum gemma_fused)k, SET_DENSE));
    if (known > 0 && r->m->gemma.n_experts)
        known = calibrate_recall_experts(r, layer);
    const int rc = known ? 0 : tuner_restore(r->tuner);
    return rc ? rc : known;
}

static int tune_block(struct run *r, int layer, struct result results[N_FUSED])
{
    const double start = clock_seconds();
    const bool solves = calibrate_solves(&r->o->tune), experts = r->m->gemma.n_experts > 0;
    struct calibrated_block block = {.layer = layer, .losses = r->losses, .n = r->o->tune.iterations};
    int rc = 0;
    for (int k = 0; !rc && solves && k < N_FUSED; k++)
        rc = set_quantized(&results[k].set) ? solve_set(r, layer, (enum gemma_fused)k, &results[k])
                                            : capture_inputs(r->capture, layer, (enum gemma_fused)k, NULL);
    if (!rc && solves && experts)
        rc = calibrate_start_experts(r, layer);
    if (!rc)
        rc = tuner_run(r->tuner, r->capture, &block.stats, r->losses);
    for (int k = 0; !rc && k < N_FUSED; k++)
        if (set_quantized(&results[k].set)) {
            results[k].tuned = block.stats;
            rc = calibrate_finish(r, set_place(&r->weights.blocks[layer], (enum gemma_fused)k, SET_DENSE),
                                  &results[k]);
        }
    if (!rc && experts)
        rc = calibrate_finish_experts(r, layer, &block.stats);
    block.seconds = clock_seconds() - start;
    if (!rc && r->events->on_block)
        r->events->on_block(r->events->ctx, &block);
    return rc;
}

/* The reference goes through the block as it is, then it is quantized, then the inputs follow. */
static int run_tuned_block(struct run *r, int layer)
{
    struct result results[N_FUSED];
    bool quantized = false;
    int rc = 0;
    for (int k = 0; !rc && k < N_FUSED; k++) {
        struct linear_set *l = set_place(&r->weights.blocks[layer], (enum gemma_fused)k, SET_DENSE);
        results[k] = (struct result){.set = set_find(r->plan, layer, (enum gemma_fused)k, SET_DENSE)};
        if (!set_quantized(&results[k].set))
            continue;
        quantized = true;
        rc = calibrate_check_finite(r, &r->solver, &results[k].set, l, results[k].n_nonfinite);
    }
    if (!rc && r->m->gemma.n_experts)
        rc = calibrate_begin_experts(r, layer, &quantized);
    if (!rc)
        rc = tuner_begin(r->tuner, layer);
    if (!rc)
        rc = capture_block(r->capture, layer, CAPTURE_REFERENCE);
    const int known = rc || !quantized ? rc : take_known_block(r, layer, results);
    if (known < 0)
        return known;
    if (quantized && !known)
        rc = tune_block(r, layer, results);
    return rc || layer + 1 == (int)r->m->gemma.n_layers ? rc
                                                        : capture_block(r->capture, layer, CAPTURE_INPUTS);
}

/* --- all blocks ------------------------------------------------------------------------------------------------- */

static int run_plain_block(struct run *r, int layer)
{
    int rc = 0;
    for (int k = 0; !rc && k < N_FUSED; k++)
        rc = run_set(r, layer, (enum gemma_fused)k);
    if (!rc && r->m->gemma.n_experts)
        rc = calibrate_run_experts(r, layer);
    return rc || layer + 1 == (int)r->m->gemma.n_layers ? rc : capture_end(r->capture, layer);
}

static int run_block(struct run *r, int layer)
{
    int rc = weights_load_part(&r->weights, layer);
    if (!rc)
        rc = work_spent(&r->clock, r->b, WORK_LOAD);
    if (!rc)
        rc = r->tuner ? run_tuned_block(r, layer) : run_plain_block(r, layer);
    weights_unload_part(&r->weights, layer);
    return rc;
}

int calibrate_run(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                  const struct dataset *data, const struct calibrate_options *options,
                  const struct calibrate_events *events, double *seconds)
{
    struct run r = {.m = m, .plan = plan, .b = b, .o = options, .events = events, .data = data};
    work_begin(&r.clock, seconds);
    int rc = open_run(&r, data);
    for (int layer = 0; !rc && layer < (int)m->gemma.n_layers; layer++)
        rc = run_block(&r, layer);
    if (!rc)
        calibrate_warn_of_starved(&r);
    if (!rc)
        rc = outbox_wait(r.outbox);
    if (!rc)
        rc = work_spent(&r.clock, b, WORK_DELIVER);
    close_run(&r);
    return rc;
}

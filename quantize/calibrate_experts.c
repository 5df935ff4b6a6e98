/* Mixtures of experts: each is a weight of its own under Hessians of its own, so that many can be quantized side by side. */
#include "quantize/calibrate_impl.h"

#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

enum { DEVICE_WORKERS = 8 }; /* solvers that a device which is not the host is shared by */

size_t calibrate_expert_sizes(const struct recipe_plan *plan, struct gptq_size out[EXPERT_SIZES])
{
    size_t n = 0;
    for (size_t i = 0; i < plan->n; i++) { /* the experts of a layer are all alike */
        const struct gemma_tensor *t = plan->linears[i].tensor;
        if (!plan->linears[i].quantized || t->expert != 0 || t->role == GEMMA_UP)
            continue;
        const struct set s = set_find(plan, t->layer, gemma_fused_set(t->role), 0);
        const struct gptq_size size = {s.rows, s.cols, set_group(&s)};
        bool known = false;
        for (size_t k = 0; k < n; k++)
            known = known || !memcmp(&out[k], &size, sizeof size);
        CHECK(known || n < EXPERT_SIZES);
        if (!known)
            out[n++] = size;
    }
    return n;
}

int calibrate_expert_workers(const struct backend *b)
{
    return b->host_memory ? parallel_processors() : DEVICE_WORKERS;
}

int calibrate_open_experts(struct run *r, const struct calibrate_plan *plan)
{
    struct expert_solvers *x = &r->experts;
    static struct work_clock uncounted; /* by themselves */
    struct gptq_size sizes[EXPERT_SIZES];
    const size_t n = calibrate_expert_sizes(r->plan, sizes);
    if (!n)
        return 0;
    x->at_once = plan->experts_at_once;
    x->fewest = INT64_MAX;
    if (r->o->tune.iterations) {
        x->results = mem_alloc(2 * (size_t)r->m->gemma.n_experts, sizeof *x->results, "experts' results");
        if (!x->results)
            return ERR_MEMORY;
    }
    if (!calibrate_solves(&r->o->tune))
        return 0;
    pthread_mutex_init(&x->lock, NULL);
    int rc = parallel_open(&x->pool, calibrate_expert_workers(r->b));
    if (rc < 0)
        return rc;
    const int workers = parallel_workers(x->pool);
    x->backends = mem_alloc((size_t)workers, sizeof *x->backends, "workers");
    x->list = mem_alloc((size_t)workers, sizeof *x->list, "workers");
    rc = x->backends && x->list ? 0 : ERR_MEMORY;
    if (!rc)
        rc = r->b->core->acquire(r->b, (size_t)x->at_once * gptq_hessian_bytes(sizes, n), "experts' Hessians",
                                 &x->hessian);
    for (; !rc && x->n < workers; x->n++) {
        rc = backend_open_beside(&x->backends[x->n], r->b);
        if (!rc)
            rc = solver_open(&x->list[x->n], r, &x->backends[x->n], sizes, n, &uncounted);
    }
    return rc;
}

void calibrate_close_experts(struct run *r)
{
    struct expert_solvers *x = &r->experts;
    for (int i = 0; x->list && i < parallel_workers(x->pool); i++) {
        solver_close(&x->list[i]);
        if (x->backends[i].state)
            backend_close(&x->backends[i]);
    }
    if (x->hessian.ptr)
        r->b->core->release(r->b, &x->hessian);
    if (x->pool)
        pthread_mutex_destroy(&x->lock);
    parallel_close(x->pool);
    free(x->list);
    free(x->backends);
    free(x->results);
}

/* --- some experts of a layer ------------------------------------------------------------------------------------ */

struct expert_job {
    struct run *r;
    int layer, first;
    enum gemma_fused kind;
    int64_t cols;
    const bool *known; /* [experts] */
};

/* Kept until the end of a tuning. */
static struct result *kept_result(const struct run *r, enum gemma_fused kind, int expert)
{
    return &r->experts.results[(kind == FUSED_DOWN) * r->m->gemma.n_experts + expert];
}

static int solve_expert(void *ctx, size_t index, int worker)
{
    const struct expert_job *j = ctx;
    struct run *r = j->r;
    const int expert = j->first + (int)index;
    const struct solver *v = &r->experts.list[worker];
    struct linear_set *l = set_place(&r->weights.blocks[j->layer], j->kind, expert);
    const struct mat all = {r->experts.hessian.ptr, DTYPE_F32, (int64_t)r->experts.at_once * j->cols, j->cols,
                            j->cols},
                     h = mat_rows(&all, (int64_t)index * j->cols, j->cols);
    struct result own = {0}, *result = r->tuner ? kept_result(r, j->kind, expert) : &own;
    int rc = 0;
    if (j->known[expert])
        return 0;
    if (!r->tuner) {
        own.set = set_find(r->plan, j->layer, j->kind, expert);
        rc = calibrate_check_finite(r, v, &own.set, l, own.n_nonfinite);
    }
    if (!rc)
        rc = calibrate_solve(r, v, l, &h, result);
    if (!rc)
        rc = v->b->core->wait(v->b);
    for (int i = 0; i < result->set.n; i++)
        result->stats[i].n_tokens = capture_expert_tokens(r->capture, expert);
    if (rc || r->tuner)
        return rc;
    pthread_mutex_lock(&r->experts.lock);
    rc = calibrate_send(r, v, result);
    pthread_mutex_unlock(&r->experts.lock);
    return rc;
}

/* One kind of set of all experts, as many at once as there is room for their Hessians. */
static int run_kind(struct run *r, int layer, enum gemma_fused kind, const bool *known)
{
    const int n_experts = (int)r->m->gemma.n_experts;
    const struct set some = set_find(r->plan, layer, kind, 0);
    struct expert_job j = {.r = r, .layer = layer, .kind = kind, .cols = some.cols, .known = known};
    int rc = 0;
    for (; !rc && j.first < n_experts; j.first += r->experts.at_once) {
        const int left = n_experts - j.first, n = left < r->experts.at_once ? left : r->experts.at_once;
        const struct mat h = {r->experts.hessian.ptr, DTYPE_F32, n * some.cols, some.cols, some.cols};
        bool all_known = true;
        for (int e = j.first; e < j.first + n; e++)
            all_known = all_known && known[e];
        if (all_known)
            continue;
        rc = r->b->core->zero(r->b, &h);
        if (!rc)
            rc = capture_expert_inputs(r->capture, layer, kind, j.first, n, &h);
        if (!rc)
            rc = r->b->core->wait(r->b);
        if (!rc)
            rc = parallel_for(r->experts.pool, (size_t)n, solve_expert, &j);
        if (!rc)
            rc = work_spent(&r->clock, r->b, WORK_EXPERTS);
    }
    return rc;
}

/* known: [experts] */
static int recall_kind(struct run *r, int layer, enum gemma_fused kind, bool *known)
{
    int rc = 0;
    for (int e = 0; rc >= 0 && e < (int)r->m->gemma.n_experts; e++) {
        const struct set s = set_find(r->plan, layer, kind, e);
        rc = calibrate_take_known(r, &s, set_place(&r->weights.blocks[layer], kind, e));
        known[e] = rc > 0;
    }
    return rc < 0 ? rc : 0;
}

static void note_starved(struct run *r, int layer)
{
    struct expert_solvers *x = &r->experts;
    const int64_t floor = capture_expert_floor(&r->m->gemma, r->data);
    for (int e = 0; e < (int)r->m->gemma.n_experts; e++) {
        const int64_t n = capture_expert_tokens(r->capture, e);
        x->n_seen++;
        x->n_starved += n < floor;
        if (n >= x->fewest)
            continue;
        x->fewest = n;
        x->fewest_layer = layer;
        x->fewest_expert = e;
    }
}

void calibrate_warn_of_starved(const struct run *r)
{
    const struct expert_solvers *x = &r->experts;
    if (x->n_starved)
        log_warn(
            "the text sent fewer than %lld tokens to %lld of %lld experts (fewest: %lld, layer %d, expert %d); they "
            "got others up to that; more samples would help",
            (long long)capture_expert_floor(&r->m->gemma, r->data), (long long)x->n_starved,
            (long long)x->n_seen, (long long)x->fewest, x->fewest_layer, x->fewest_expert);
}

static const enum gemma_fused kinds[2] = {FUSED_GATE_UP, FUSED_DOWN};

static bool experts_quantized(const struct run *r, int layer)
{
    const struct set some = set_find(r->plan, layer, FUSED_GATE_UP, 0);
    return set_quantized(&some);
}

/* Codes for all experts of a layer that has routes; recall: but for those that an earlier run has found. */
static int solve_experts(struct run *r, int layer, bool recall)
{
    bool *known = mem_alloc((size_t)r->m->gemma.n_experts, sizeof *known, "experts");
    int rc = known ? 0 : ERR_MEMORY;
    for (int k = 0; !rc && k < 2; k++) {
        rc = recall ? recall_kind(r, layer, kinds[k], known) : 0;
        if (!rc)
            rc = run_kind(r, layer, kinds[k], known);
    }
    if (!rc)
        note_starved(r, layer);
    free(known);
    return rc;
}

int calibrate_run_experts(struct run *r, int layer)
{
    const int rc = capture_route(r->capture, layer);
    return rc || !experts_quantized(r, layer) ? rc : solve_experts(r, layer, true);
}

/* --- a block under tuning ----------------------------------------------------------------------------------------- */

int calibrate_begin_experts(struct run *r, int layer, bool *quantized)
{
    int rc = 0;
    if (!experts_quantized(r, layer))
        return 0;
    *quantized = true;
    for (int i = 0; !rc && i < 2 * (int)r->m->gemma.n_experts; i++) {
        const enum gemma_fused kind = kinds[i % 2];
        struct result *result = kept_result(r, kind, i / 2);
        *result = (struct result){.set = set_find(r->plan, layer, kind, i / 2)};
        rc = calibrate_check_finite(r, &r->solver, &result->set,
                                    set_place(&r->weights.blocks[layer], kind, i / 2), result->n_nonfinite);
    }
    return rc;
}

int calibrate_recall_experts(struct run *r, int layer)
{
    int known = 1;
    for (int i = 0; experts_quantized(r, layer) && known > 0 && i < 2 * (int)r->m->gemma.n_experts; i++) {
        const enum gemma_fused kind = kinds[i % 2];
        known = calibrate_take_known(r, &kept_result(r, kind, i / 2)->set,
                                     set_place(&r->weights.blocks[layer], kind, i / 2));
    }
    return known;
}

int calibrate_start_experts(struct run *r, int layer)
{
    if (!experts_quantized(r, layer))
        return 0;
    const int rc = capture_route(r->capture, layer);
    return rc ? rc : solve_experts(r, layer, false);
}

int calibrate_finish_experts(struct run *r, int layer, const struct tune_stats *stats)
{
    int rc = 0;
    for (int i = 0; experts_quantized(r, layer) && !rc && i < 2 * (int)r->m->gemma.n_experts; i++) {
        const enum gemma_fused kind = kinds[i % 2];
        struct result *result = kept_result(r, kind, i / 2);
        result->tuned = *stats;
        rc = calibrate_finish(r, set_place(&r->weights.blocks[layer], kind, i / 2), result);
    }
    return rc;
}

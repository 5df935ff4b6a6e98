/* What a calibrated run will take: memory, and roughly how long. */
#include "quantize/calibrate_impl.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"
#include "kernels/budget.h"
#include "quantize/layer_inputs.h"

#include <stdlib.h>

size_t calibrate_sizes(const struct recipe_plan *plan, int64_t n_layers, struct gptq_size *out)
{
    size_t n = 0;
    for (int layer = 0; layer < (int)n_layers; layer++)
        for (int k = 0; k < N_FUSED; k++) {
            const struct set s = set_find(plan, layer, (enum gemma_fused)k, SET_DENSE);
            if (set_quantized(&s))
                out[n++] = (struct gptq_size){s.rows, s.cols, set_group(&s)};
        }
    return n;
}

/* Of results on their way out, in the host's memory. */
static uint64_t results_bytes(const struct result_bytes *r)
{
    return outbox_bytes(&(struct outbox_size){r->packed, r->scales, r->zeros, sizeof(struct result)});
}

/* A Hessian, and what works on it; nothing where a tuning begins with the range alone. */
static uint64_t solver_bytes(const struct backend *b, const struct gptq_size *sizes, size_t n,
                             const struct tune_options *tune)
{
    return calibrate_solves(tune) ? gptq_hessian_bytes(sizes, n) + gptq_bytes(b->activation, sizes, n) : 0;
}

/* Of what quantizes experts: Hessians of as many, and the solvers. */
static uint64_t experts_bytes(const struct recipe_plan *plan, const struct backend *b,
                              const struct tune_options *tune, int at_once)
{
    struct gptq_size sizes[EXPERT_SIZES];
    const size_t n = calibrate_solves(tune) ? calibrate_expert_sizes(plan, sizes) : 0;
    const struct result_bytes result = sets_largest_result(plan);
    return n ? (uint64_t)at_once * gptq_hessian_bytes(sizes, n) +
                   (uint64_t)calibrate_expert_workers(b) *
                       (gptq_bytes(b->activation, sizes, n) + result_total(&result) + b->scratch_bytes)
             : 0;
}

/* What the device needs beside states, activations, experts and a tuning. */
static int other_bytes(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                       const struct tune_options *tune, uint64_t *out)
{
    const int64_t n_layers = m->gemma.n_layers;
    struct gptq_size *sizes = mem_alloc((size_t)n_layers * N_FUSED, sizeof *sizes, "the plan");
    if (!sizes)
        return ERR_MEMORY;
    const size_t n = calibrate_sizes(plan, n_layers, sizes);
    uint64_t part = 0;
    for (int layer = 0; layer < (int)n_layers; layer++) {
        const uint64_t bytes = weights_part_bytes(m, layer);
        part = bytes > part ? bytes : part;
    }
    const struct result_bytes result = sets_largest_result(plan);
    *out = part + solver_bytes(b, sizes, n, tune) + result_total(&result) + GPTQ_MAX_PARTS * sizeof(int64_t) +
           b->scratch_bytes + weights_loader_bytes(b);
    if (b->host_memory)
        *out += results_bytes(&result);
    free(sizes);
    return 0;
}

static uint64_t without(uint64_t available, uint64_t taken)
{
    return available > taken ? available - taken : 0;
}

/* States and a tuning share what there is: whole batches first, then states on the device. *bytes: the tuning's. */
static int share_out(struct calibrate_plan *out, const struct model *m, const struct recipe_plan *plan,
                     const struct backend *b, const struct dataset *data, const struct tune_options *tune,
                     uint64_t available, uint64_t *bytes)
{
    const bool tuned = tune->iterations > 0;
    int64_t micro = tuned ? tune->batch < data->samples ? tune->batch : data->samples : 0;
    *bytes = tuned ? tuner_bytes(m, plan, b, data, tune, micro) : 0;
    int rc = capture_plan(&out->capture, &m->gemma, b, data, tuned, without(available, *bytes));
    if (!rc && tuned && (out->capture.states_on_host || out->capture.device_bytes + *bytes > available)) {
        const uint64_t least = tuner_bytes(m, plan, b, data, tune, 1);
        rc = capture_plan(&out->capture, &m->gemma, b, data, true, without(available, least));
        micro = tuner_micro_batch(m, plan, b, data, tune, without(available, out->capture.device_bytes));
        *bytes = tuner_bytes(m, plan, b, data, tune, micro);
    }
    out->micro_batch = micro;
    return rc;
}

int calibrate_plan(struct calibrate_plan *out, const struct model *m, const struct recipe_plan *plan,
                   const struct backend *b, const struct dataset *data, const struct tune_options *tune,
                   uint64_t reserved)
{
    struct device_memory memory;
    uint64_t other, tuning = 0;
    int rc = other_bytes(m, plan, b, tune, &other);
    if (!rc)
        rc = b->core->memory(b, &memory);
    if (rc < 0)
        return rc;
    const uint64_t limit = budget_limit(),
                   usable = memory.free - memory.free / 16; /* what drivers and libraries take */
    const uint64_t allowed = limit && limit < usable ? limit : usable;
    /* experts' Hessians are made in fewer goes at the price of states on the device */
    const int n_experts = (int)m->gemma.n_experts;
    uint64_t experts = 0;
    *out = (struct calibrate_plan){0};
    for (int n = n_experts; !rc && (n || !n_experts); n /= 2) {
        experts = experts_bytes(plan, b, tune, n);
        rc = share_out(out, m, plan, b, data, tune, without(allowed, other + experts + reserved), &tuning);
        out->experts_at_once = n;
        if (!n || out->capture.device_bytes + other + tuning + experts + reserved <= allowed)
            break;
    }
    if (rc < 0)
        return rc;
    other += tuning + experts;
    /* the embedding, and rows of the layers' table, are there only while there is nothing but the states */
    const uint64_t table = layer_inputs_bytes(m, out->capture.n_ids, out->capture.batch * data->length);
    const uint64_t outer = weights_part_bytes(m, WEIGHTS_OUTER) + weights_loader_bytes(b) + table;
    out->device_bytes = out->capture.device_bytes + reserved + (other > outer ? other : outer);
    const struct result_bytes result = sets_largest_result(plan);
    const uint64_t results = results_bytes(&result);
    out->host_bytes = out->capture.host_bytes + (b->host_memory ? 0 : results > table ? results : table);
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

/* Multiplications of a pass and, of an iteration, of the passes forward and back. */
static double tuning_work(const struct tune_options *tune, const struct dataset *data, double weights)
{
    const double samples = (double)(tune->batch < data->samples ? tune->batch : data->samples);
    const double overhead = 1.25; /* attention, norms, steps */
    return tune->iterations
               ? weights * (double)data->length *
                     (2 * (double)data->samples + 3 * overhead * samples * (double)tune->iterations)
               : 0;
}

/* Multiplications of experts, each of which sees its share of the tokens; their inner parts are computed twice. */
static double experts_work(const struct model *m, const struct recipe_plan *plan, const struct dataset *data,
                           const struct tune_options *tune, int passes)
{
    const struct gemma_config *c = &m->gemma;
    static const enum gemma_fused kinds[2] = {FUSED_GATE_UP, FUSED_DOWN};
    const double share = (double)c->top_k / (double)c->n_experts,
                 tokens = (double)(data->samples * data->length) * share;
    double work = 0;
    for (int i = 0; i < 2 * (int)c->n_layers; i++) {
        const struct set s = set_find(plan, i / 2, kinds[i % 2], 0);
        const double rows = (double)s.rows, cols = (double)s.cols;
        work += 2 * tuning_work(tune, data, rows * cols * share);
        if (set_quantized(&s) && calibrate_solves(tune))
            work += (2 * rows * cols + cols * cols) * tokens + cols * cols * cols +
                    6 * (4 + passes) * rows * cols * cols;
    }
    return work * (double)c->n_experts;
}

int calibrate_estimate(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                       const struct dataset *data, const struct tune_options *tune, int passes,
                       double *seconds)
{
    const double tokens = (double)(data->samples * data->length);
    double work = 0, each = 0;
    for (int layer = 0; layer < (int)m->gemma.n_layers; layer++)
        for (int k = 0; k < N_FUSED; k++) {
            const struct set s = set_find(plan, layer, (enum gemma_fused)k, SET_DENSE);
            const double rows = (double)s.rows, cols = (double)s.cols;
            work += 2.6 * rows * cols * tokens; /* the pass, and what weighs tokens */
            work += 2 * tuning_work(tune, data, rows * cols);
            if (set_quantized(&s) && calibrate_solves(tune)) /* products with H are three of the device's */
                work +=
                    1.2 * cols * cols * tokens + cols * cols * cols + 6 * (4 + passes) * rows * cols * cols;
        }
    work += m->gemma.n_experts ? experts_work(m, plan, data, tune, passes) : 0;
    const int rc = measure_product(b, m->gemma.hidden_size, &each);
    *seconds = work * each;
    return rc;
}

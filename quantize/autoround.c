#include "quantize/autoround.h"

#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "quantize/tuned_sets.h"
#include "runtime/block_grad.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Where a weight begins that another code is nearer to: so close to the boundary that a few steps can bring it back. */
static const float start_distance = 0.45f;

/* Bounds of the factors of a group's scale. */
static const float warm_bounds[] = {0.5f, 1.5f}, cold_bounds[] = {0, 1};

/* Numbers on the device. */
struct numbers {
    double best;
    int32_t improved, always;       /* always: 1 */
    double sums[GPTQ_MAX_PARTS][2]; /* Σ (w − ŵ)², Σ w² */
    int64_t clipped[GPTQ_MAX_PARTS];
    double
        losses[]; /* [iterations + 1]: Σ (y − target)² of every mini-batch, and of the first one at the end */
};

struct tuner {
    const struct model *m;
    const struct recipe_plan *plan;
    struct weights *w;
    const struct dataset *data;
    struct tune_options o;
    int64_t batch, micro; /* samples of an iteration; of them at a time */
    struct work_clock *clock;
    struct buf memory;
    struct staged_buf numbers;
    int64_t *order; /* [samples] */
    int64_t at;     /* samples of the order that have been used */
    struct rng rng;
    /* the block: */
    int layer;
    struct tuned_set sets[N_BLOCK_SETS];
    struct mat spare; /* F32 [length, hidden]: a target that is not on the device */
    void *activations;
    struct block_tape tape; /* its memory of the host */
};

static const struct backend *backend_of(const struct tuner *t)
{
    return t->w->backend;
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

static size_t numbers_bytes(const struct tune_options *o)
{
    return sizeof(struct numbers) + (size_t)(o->iterations + 1) * sizeof(double);
}

static uint64_t spare_bytes(const struct model *m, const struct dataset *data)
{
    return (uint64_t)(data->length * m->gemma.hidden_size) * sizeof(float);
}

static int64_t batch_of(const struct tune_options *o, const struct dataset *data)
{
    return o->batch < data->samples ? o->batch : data->samples;
}

uint64_t tuner_bytes(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                     const struct dataset *data, const struct tune_options *o, int64_t micro_batch)
{
    return tuned_sets_bytes(m, plan) + spare_bytes(m, data) +
           block_tape_bytes(&m->gemma, b->activation, micro_batch, data->length) + numbers_bytes(o);
}

int64_t tuner_micro_batch(const struct model *m, const struct recipe_plan *plan, const struct backend *b,
                          const struct dataset *data, const struct tune_options *o, uint64_t available)
{
    const int64_t batch = batch_of(o, data);
    int64_t n_parts = 1;
    while (n_parts < batch && tuner_bytes(m, plan, b, data, o, (batch + n_parts - 1) / n_parts) > available)
        n_parts++;
    return (batch + n_parts - 1) / n_parts;
}

int tuner_open(struct tuner **out, const struct model *m, const struct recipe_plan *plan, struct weights *w,
               const struct dataset *data, const struct tune_options *o, int64_t micro_batch,
               struct work_clock *clock)
{
    *out = NULL;
    struct tuner *t = mem_alloc(1, sizeof *t, "a tuning");
    if (!t)
        return ERR_MEMORY;
    *t = (struct tuner){.m = m,
                        .plan = plan,
                        .w = w,
                        .data = data,
                        .o = *o,
                        .batch = batch_of(o, data),
                        .micro = micro_batch,
                        .clock = clock};
    const struct backend *b = w->backend;
    const uint64_t sets = tuned_sets_bytes(m, plan),
                   bytes = tuner_bytes(m, plan, b, data, o, micro_batch) - numbers_bytes(o);
    t->order = mem_alloc((size_t)data->samples, sizeof *t->order, "an order of samples");
    int rc = t->order ? block_tape_open(&t->tape, &m->gemma, micro_batch, data->length) : ERR_MEMORY;
    if (!rc)
        rc = b->core->acquire(b, bytes, "a block under tuning", &t->memory);
    if (!rc)
        rc = b->core->acquire_staging(b, numbers_bytes(o), "losses", &t->numbers);
    if (rc < 0) {
        tuner_close(t);
        return rc;
    }
    char *base = (char *)t->memory.ptr + sets;
    t->spare = (struct mat){base, DTYPE_F32, data->length, m->gemma.hidden_size, m->gemma.hidden_size};
    t->activations = base + spare_bytes(m, data);
    *out = t;
    return 0;
}

void tuner_close(struct tuner *t)
{
    if (!t)
        return;
    const struct backend *b = backend_of(t);
    b->core->release(b, &t->memory);
    if (t->numbers.host)
        b->core->release_staging(b, &t->numbers);
    block_tape_close(&t->tape);
    free(t->order);
    free(t);
}

/* --- a block's weights ------------------------------------------------------------------------------------------ */

int tuner_begin(struct tuner *t, int layer)
{
    t->layer = layer;
    tuned_sets_place(t->sets, t->m, t->plan, layer, t->memory.ptr);
    return tuned_sets_take(t->sets, backend_of(t), &t->w->blocks[layer]);
}

int tuner_restore(struct tuner *t)
{
    return tuned_sets_restore(t->sets, backend_of(t), &t->w->blocks[t->layer]);
}

struct tuned_weight tuner_weight(const struct tuner *t, const struct set *set, int64_t row, int64_t n)
{
    const struct tuned_set *s = &t->sets[set_in_block(set)];
    const int64_t at = tuned_first_row(set) + row;
    return (struct tuned_weight){mat_rows(&s->codes, at, n),
                                 tuned_grid(s, &s->kept_scales, &s->kept_zeros, at, n)};
}

/* --- the step --------------------------------------------------------------------------------------------------- */

/* What tune_begin and tune_step get of a piece. */
struct tune_views {
    struct mat w, v, gradient, low, high, start, restored, codes;
    struct qmat q, kept;
    struct tuning tuning;
};

/* Rows [row, row + n) of the set, all of one piece. */
static void view_rows(const struct tuner *t, const struct tuned_set *s, int64_t row, int64_t n,
                      struct tune_views *u)
{
    const bool warm = t->o.init == TUNE_FROM_CODES;
    const float *bounds = warm ? warm_bounds : cold_bounds;
    const struct piece *p = &s->pieces[tuned_piece(s, row)];
    *u = (struct tune_views){.w = tuned_original(s, row, n),
                             .v = mat_rows(&s->v, row, n),
                             .gradient = mat_rows(&s->gradient, row, n),
                             .low = mat_rows(&s->low, row, n),
                             .high = mat_rows(&s->high, row, n),
                             .start = mat_rows(&s->start, row, n),
                             .restored = mat_rows(&p->linear->weight, row - p->row, n),
                             .codes = mat_rows(&s->codes, row, n),
                             .q = tuned_grid(s, &s->scales, &s->zeros, row, n),
                             .kept = tuned_grid(s, &s->kept_scales, &s->kept_zeros, row, n)};
    u->tuning = (struct tuning){.w = &u->w,
                                .v = &u->v,
                                .start = warm ? &u->start : NULL,
                                .low = warm ? NULL : &u->low,
                                .high = &u->high,
                                .lowest = bounds[0],
                                .highest = bounds[1],
                                .distance = start_distance,
                                .ends_clip = t->o.ends_clip,
                                .q = &u->q,
                                .restored = &u->restored,
                                .codes = &u->codes,
                                .kept = &u->kept};
}

static void view_piece(const struct tuner *t, const struct tuned_set *s, int piece, struct tune_views *u)
{
    view_rows(t, s, s->pieces[piece].row, s->pieces[piece].rows, u);
}

/* A piece's part of what all pieces do; rates NULL: no step. */
struct step {
    bool begin, descend;
    struct tune_rates rates;
    const int32_t *keep;
};

static int step_piece(const struct tuner *t, const struct tuned_set *s, int piece, const struct step *step)
{
    const struct backend *b = backend_of(t);
    struct tune_views u;
    int rc = 0;
    view_piece(t, s, piece, &u);
    if (step->begin && u.tuning.start) {
        const size_t groups = (size_t)(u.start.rows * u.start.cols);
        rc = b->core->copy(b, u.start.data, u.kept.scales.data, groups * sizeof(uint16_t));
        if (!rc && u.q.zeros.data)
            rc = b->core->copy(b, u.q.zeros.data, u.kept.zeros.data, groups);
        if (!rc) /* the codes' range follows from zero points alone, but scales are read with them */
            rc = b->core->copy(b, u.q.scales.data, u.kept.scales.data, groups * sizeof(uint16_t));
    }
    if (!rc && step->begin)
        rc = b->train->tune_begin(b, &u.tuning, u.tuning.start ? &u.codes : NULL);
    return rc ? rc
              : b->train->tune_step(b, &u.tuning, step->descend ? &u.gradient : NULL, &step->rates,
                                    step->keep);
}

static int step_all(const struct tuner *t, const struct step *step)
{
    int rc = 0;
    for (int k = 0; k < N_BLOCK_SETS; k++)
        for (int i = 0; !rc && i < t->sets[k].n_pieces; i++)
            rc = step_piece(t, &t->sets[k], i, step);
    return rc;
}

/* Codes of the range begin with what the first step makes of them, so it has scales to start from. */
static int begin(struct tuner *t)
{
    const struct backend *b = backend_of(t);
    const struct scale_spec range = {SCALE_RANGE, false};
    int rc = 0;
    for (int k = 0; t->o.init == TUNE_FROM_NONE && k < N_BLOCK_SETS; k++)
        for (int i = 0; !rc && i < t->sets[k].n_pieces; i++) {
            struct tune_views u;
            view_piece(t, &t->sets[k], i, &u);
            rc = b->quant->find_scales(b, &u.w, &range, &u.q);
        }
    tuned_sets_narrow(t->sets, &t->w->blocks[t->layer]);
    return rc ? rc : step_all(t, &(struct step){.begin = true});
}

/* --- an iteration ----------------------------------------------------------------------------------------------- */

static void shuffle(struct tuner *t)
{
    for (int64_t i = t->data->samples - 1; i > 0; i--) {
        const int64_t k = (int64_t)(rng_u32(&t->rng) % (uint32_t)(i + 1)), swap = t->order[i];
        t->order[i] = t->order[k];
        t->order[k] = swap;
    }
    t->at = 0;
}

/* The samples of the next mini-batch; those that are left of an order are not used where they are too few. */
static const int64_t *next_samples(struct tuner *t)
{
    if (t->at + t->batch > t->data->samples)
        shuffle(t);
    t->at += t->batch;
    return t->order + t->at - t->batch;
}

/* What the block reads of n samples into the tape, which is laid out for them. */
static int fetch(const struct tuner *t, const struct capture *c, const int64_t *samples, int64_t n,
                 struct block_tape *tape)
{
    int rc = 0;
    block_tape_place(tape, &t->m->gemma, t->layer, backend_of(t)->activation, t->activations, n,
                     t->data->length);
    tape->rope = capture_rope(c, t->layer);
    for (int64_t i = 0; !rc && i < n; i++)
        rc = capture_to_tape(c, t->layer, samples[i], i, tape);
    return rc;
}

/* *loss (device) += the squared errors of n samples, and with_gradient what the block's weights gain by. */
static int pass(const struct tuner *t, const struct capture *c, const int64_t *samples, int64_t n,
                double *loss, bool with_gradient, bool add)
{
    const struct backend *b = backend_of(t);
    const int64_t length = t->data->length;
    struct block_tape tape = t->tape;
    struct block_grads grads;
    for (int k = 0; k < N_BLOCK_SETS; k++)
        grads.sets[k] = t->sets[k].n_pieces ? t->sets[k].gradient : (struct mat){0};
    int rc = fetch(t, c, samples, n, &tape);
    if (!rc)
        rc = block_grad_forward(t->w, t->layer, &tape);
    for (int64_t i = 0; !rc && i < n; i++) {
        const struct mat y = mat_rows(&tape.out, i * length, length),
                         dy = mat_rows(&tape.dx, i * length, length);
        struct mat target;
        rc = capture_sample(c, CAPTURE_REFERENCE, samples[i], &t->spare, &target);
        if (!rc) /* signs do not ask for the mean's factor */
            rc = b->train->error_backward(b, &y, &target, 1, loss, with_gradient ? &dy : NULL);
    }
    return rc || !with_gradient ? rc : block_grad_backward(t->w, t->layer, &tape, add, false, &grads);
}

/* A mini-batch, in as many parts as it takes. */
static int run_batch(const struct tuner *t, const struct capture *c, const int64_t *samples, double *loss,
                     bool with_gradient)
{
    int rc = 0;
    for (int64_t i = 0; !rc && i < t->batch; i += t->micro) {
        const int64_t n = t->batch - i < t->micro ? t->batch - i : t->micro;
        rc = pass(t, c, samples + i, n, loss, with_gradient, i > 0);
    }
    return rc;
}

static int iterate(struct tuner *t, const struct capture *c, int64_t k, const int64_t *samples)
{
    const struct backend *b = backend_of(t);
    struct numbers *numbers = t->numbers.device;
    const double left = 1 - (double)k / (double)t->o.iterations;
    int rc = run_batch(t, c, samples, &numbers->losses[k], true);
    if (!rc && t->o.keep == TUNE_KEEP_BEST)
        rc = b->train->keep_best(b, &numbers->losses[k], &numbers->best, &numbers->improved);
    const bool judged = t->o.keep == TUNE_KEEP_BEST;
    const struct step step = {.descend = true,
                              .rates = {(float)(t->o.lr * left), (float)(t->o.range_lr * left)},
                              .keep = judged   ? &numbers->improved
                                      : k == 0 ? &numbers->always
                                               : NULL};
    if (!rc)
        rc = step_all(t, &step);
    if (!rc && err_interrupt_requested())
        rc = err_interrupted();
    return rc;
}

/* --- a block ---------------------------------------------------------------------------------------------------- */

static int clear_numbers(struct tuner *t, int64_t layer)
{
    struct numbers *numbers = t->numbers.host;
    memset(numbers, 0, t->numbers.bytes);
    numbers->best = INFINITY;
    numbers->always = 1;
    rng_seed(&t->rng, t->o.seed + (uint64_t)layer);
    for (int64_t i = 0; i < t->data->samples; i++)
        t->order[i] = i;
    shuffle(t);
    const int rc = backend_of(t)->core->stage_in(backend_of(t), &t->numbers, 0, t->numbers.bytes);
    return rc ? rc : backend_of(t)->core->wait(backend_of(t));
}

/* The loss of the last iterate on the samples that the first one had: the last one is kept where it is less. */
static int judge_last(struct tuner *t, const struct capture *c, const int64_t *samples)
{
    const struct backend *b = backend_of(t);
    struct numbers *device = t->numbers.device;
    const struct numbers *host = t->numbers.host;
    int rc = run_batch(t, c, samples, &device->losses[t->o.iterations], false);
    if (!rc)
        rc = b->core->stage_out(b, &t->numbers, 0, t->numbers.bytes);
    if (rc || !(host->losses[t->o.iterations] < host->losses[0]))
        return rc; /* the first one stays kept */
    return step_all(t, &(struct step){.keep = &device->always});
}

static void fill_stats(const struct tuner *t, struct tune_stats *stats, double *losses)
{
    const struct numbers *numbers = t->numbers.host;
    const double n = (double)(t->batch * t->data->length * t->m->gemma.hidden_size);
    const int64_t last = t->o.iterations;
    *stats = (struct tune_stats){.first = numbers->losses[0] / n, .last = numbers->losses[0] / n};
    if (t->o.keep == TUNE_KEEP_LAST && numbers->losses[last] < numbers->losses[0]) {
        stats->last = numbers->losses[last] / n;
        stats->kept = last;
    }
    for (int64_t k = 0; k < last; k++) {
        if (t->o.keep == TUNE_KEEP_BEST && numbers->losses[k] / n < stats->last) {
            stats->last = numbers->losses[k] / n;
            stats->kept = k;
        }
        if (losses)
            losses[k] = numbers->losses[k] / n;
    }
}

int tuner_run(struct tuner *t, const struct capture *c, struct tune_stats *stats, double *losses)
{
    const struct backend *b = backend_of(t);
    int64_t first[TUNE_MAX_BATCH];
    int rc = clear_numbers(t, t->layer);
    if (!rc)
        rc = begin(t);
    for (int64_t k = 0; !rc && k < t->o.iterations; k++) {
        const int64_t *samples = next_samples(t);
        if (k == 0)
            memcpy(first, samples, (size_t)t->batch * sizeof *first);
        rc = iterate(t, c, k, samples);
    }
    if (!rc)
        rc = t->o.keep == TUNE_KEEP_LAST ? judge_last(t, c, first)
                                         : b->core->stage_out(b, &t->numbers, 0, t->numbers.bytes);
    const struct numbers *numbers = t->numbers.host;
    if (!rc && !isfinite(numbers->losses[0]))
        rc = err_set(
            ERR_FORMAT,
            "block %d: the calibration's activations are not finite (NaN, or beyond the range of FP32)",
            t->layer);
    if (!rc)
        fill_stats(t, stats, losses);
    return rc ? rc : work_spent(t->clock, b, WORK_TUNE);
}

int tuner_measure(struct tuner *t, const struct set *set, const struct piece *p, double *weight_errors,
                  double *clipped)
{
    const struct backend *b = backend_of(t);
    const struct tuned_set *s = &t->sets[set_in_block(set)];
    struct numbers *device = t->numbers.device;
    const struct numbers *host = t->numbers.host;
    int rc = 0;
    for (int64_t i = 0, row = tuned_first_row(set) + p->row; !rc && i < p->parts.n;
         row += p->parts.rows[i++]) {
        struct tune_views u;
        view_rows(t, s, row, p->parts.rows[i], &u);
        const struct rounding r = {&u.w, &u.kept, &u.codes};
        rc = b->quant->residual(b, &r, &u.gradient);
        if (!rc)
            rc = b->core->dot(b, &u.gradient, &u.gradient, &device->sums[i][0]);
        if (!rc)
            rc = b->core->dot(b, &u.w, &u.w, &device->sums[i][1]);
        if (!rc)
            rc = b->quant->count_clipped(b, &r, &device->clipped[i]);
    }
    if (!rc)
        rc = b->core->stage_out(b, &t->numbers, 0, sizeof(struct numbers));
    for (int i = 0; !rc && i < p->parts.n; i++) {
        weight_errors[i] = host->sums[i][1] > 0 ? host->sums[i][0] / host->sums[i][1] : 0;
        clipped[i] = (double)host->clipped[i] / (double)(p->parts.rows[i] * set->cols);
    }
    return rc;
}

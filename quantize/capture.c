#include "quantize/capture.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"
#include "runtime/block.h"

#include <math.h>
#include <stdlib.h>

/* The state of all tokens. On the host: device is one batch of it, and moves. */
struct states {
    struct mat all;   /* on the device, or on the host */
    struct buf host;  /* pinned */
    struct mat batch; /* on the device, where all is not */
};

struct capture {
    struct weights *w;
    const struct dataset *data;
    struct capture_plan plan;
    int32_t skip_id;
    struct work_clock *clock;
    struct buf memory;
    struct states
        streams[N_STREAMS]; /* residual, at the block's beginning; [all tokens, …], as the next ones */
    struct states
        middle; /* residual, with attention's branch; where nothing is tuned, the first stream itself */
    struct states attention, inner;
    struct mat normed, branch, qkv, q, gate_up, keys, values; /* [tokens of a batch, …] */
    struct mat rope[GEMMA_KINDS];                             /* [length, head_dim] */
};

/* One batch of whole sequences. */
struct batch {
    int64_t first_row, rows, sequences;
};

/* --- memory ----------------------------------------------------------------------------------------------------- */

static void lay_out_states(struct states *s, void *base, uint64_t *at, bool on_host, const struct mat *shape,
                           int64_t batch_rows)
{
    const int64_t rows = on_host ? batch_rows : shape->rows;
    const struct mat m = arena_take(base, at, shape->dtype, rows, shape->cols);
    if (on_host) {
        s->all = (struct mat){s->host.ptr, shape->dtype, shape->rows, shape->cols, shape->cols};
        s->batch = m;
    } else {
        s->all = m;
    }
}

static uint64_t state_bytes(const struct mat *m)
{
    return (uint64_t)(m->rows * m->cols) * dtype_bytes(m->dtype);
}

/* Shapes of x, o's inputs and down's inputs for so many tokens. */
static void state_shapes(struct mat out[3], const struct gemma_config *c, enum dtype act, int64_t tokens)
{
    const struct gemma_widths widest = gemma_widest(c);
    out[0] = (struct mat){NULL, DTYPE_F32, tokens, c->hidden_size, c->hidden_size};
    out[1] = (struct mat){NULL, act, tokens, widest.q, widest.q};
    out[2] = (struct mat){NULL, act, tokens, widest.inner, widest.inner};
}

static uint64_t lay_out(struct capture *c, const struct gemma_config *g, enum dtype act, int64_t samples,
                        int64_t length)
{
    const struct gemma_widths widest = gemma_widest(g);
    const int64_t rows = c->plan.batch * length;
    const bool on_host = c->plan.states_on_host;
    void *base = c->memory.ptr;
    uint64_t at = 0;
    struct mat shapes[3];
    state_shapes(shapes, g, act, samples * length);
    lay_out_states(&c->streams[CAPTURE_INPUTS], base, &at, on_host, &shapes[0], rows);
    if (c->plan.tuned) {
        lay_out_states(&c->streams[CAPTURE_REFERENCE], base, &at, on_host, &shapes[0], rows);
        lay_out_states(&c->middle, base, &at, on_host, &shapes[0], rows);
    } else {
        c->middle = c->streams[CAPTURE_INPUTS];
    }
    lay_out_states(&c->attention, base, &at, on_host, &shapes[1], rows);
    if (c->plan.keep_inner)
        lay_out_states(&c->inner, base, &at, false, &shapes[2], rows);
    c->normed = arena_take(base, &at, act, rows, g->hidden_size);
    c->branch = arena_take(base, &at, act, rows, g->hidden_size);
    c->qkv = arena_take(base, &at, act, rows, widest.qkv);
    c->q = arena_take(base, &at, act, rows, widest.q);
    c->keys = arena_take(base, &at, act, rows, widest.kv);
    c->values = arena_take(base, &at, act, rows, widest.kv);
    c->gate_up = arena_take(base, &at, act, rows, 2 * widest.inner);
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        c->rope[kind] = arena_take(base, &at, DTYPE_F32, length, g->rope_dim[kind]);
    return at;
}

void capture_plan(struct capture_plan *out, const struct gemma_config *c, const struct backend *b,
                  const struct dataset *data, bool tuned, uint64_t available)
{
    const int64_t samples = data->samples, length = data->length;
    struct capture trial = {0};
    struct mat shapes[3];
    state_shapes(shapes, c, b->activation, samples * length);
    int64_t batch = b->batch_tokens / length;
    batch = batch < 1 ? 1 : batch > samples ? samples : batch;
    /* from what is fastest to what is smallest */
    for (int kind = 0; kind < 3; kind++) {
        trial.plan = (struct capture_plan){
            .batch = batch, .keep_inner = kind == 0, .states_on_host = kind == 2, .tuned = tuned};
        trial.plan.device_bytes = lay_out(&trial, c, b->activation, samples, length);
        if (trial.plan.states_on_host)
            trial.plan.host_bytes = (tuned ? 3 : 1) * state_bytes(&shapes[0]) + state_bytes(&shapes[1]);
        if (trial.plan.device_bytes <= available || (kind == 1 && b->host_memory))
            break;
    }
    *out = trial.plan;
}

static int take_memory(struct capture *c)
{
    const struct backend *b = c->w->backend;
    const struct gemma_config *g = &c->w->config;
    struct mat shapes[3];
    state_shapes(shapes, g, b->activation, c->data->samples * c->data->length);
    struct states *const streams[] = {&c->streams[CAPTURE_INPUTS], &c->streams[CAPTURE_REFERENCE],
                                      &c->middle};
    int rc = 0;
    for (int i = 0; !rc && c->plan.states_on_host && i < (c->plan.tuned ? 3 : 1); i++)
        rc = b->core->acquire_host(b, state_bytes(&shapes[0]), "the residual stream of all samples",
                                   &streams[i]->host);
    if (!rc && c->plan.states_on_host)
        rc =
            b->core->acquire_host(b, state_bytes(&shapes[1]), "attention of all samples", &c->attention.host);
    if (!rc)
        rc = b->core->acquire(b, c->plan.device_bytes, "activations of the calibration", &c->memory);
    if (!rc)
        lay_out(c, g, b->activation, c->data->samples, c->data->length);
    return rc;
}

/* --- batches ---------------------------------------------------------------------------------------------------- */

static bool next_batch(const struct capture *c, struct batch *t)
{
    const int64_t length = c->data->length, done = (t->first_row + t->rows) / length,
                  left = c->data->samples - done;
    t->first_row += t->rows;
    t->sequences = left < c->plan.batch ? left : c->plan.batch;
    t->rows = t->sequences * length;
    return left > 0;
}

static bool on_host(const struct states *s)
{
    return s->batch.data != NULL;
}

/* The batch's rows, on the device. */
static struct mat states_rows(const struct states *s, const struct batch *t)
{
    return on_host(s) ? mat_rows(&s->batch, 0, t->rows) : mat_rows(&s->all, t->first_row, t->rows);
}

static int states_fetch(const struct capture *c, const struct states *s, const struct batch *t)
{
    if (!on_host(s))
        return 0;
    const struct mat from = mat_rows(&s->all, t->first_row, t->rows);
    return c->w->backend->core->upload(c->w->backend, s->batch.data, from.data, (size_t)state_bytes(&from));
}

/* from: on the device; the state itself, where that is there too */
static int states_keep(const struct capture *c, const struct states *s, const struct mat *from,
                       const struct batch *t)
{
    if (!on_host(s))
        return 0;
    const struct mat to = mat_rows(&s->all, t->first_row, t->rows);
    return c->w->backend->core->download(c->w->backend, to.data, from->data, (size_t)state_bytes(&to));
}

/* --- the steps of a block, for one batch ------------------------------------------------------------------------ */

/* What one step works on, and the inputs that it ends with. */
struct step {
    struct capture *c;
    bool alone; /* all steps follow at once: nothing but the residual stream is kept */
    int layer;
    const struct batch *batch;
    const struct states *residual; /* where x is from, and where the block's result goes */
    struct mat x, attention, normed, branch, inner;
    struct mat spare; /* [tokens, …] for the inputs of o and down, weighed */
    const struct mat *inputs;
};

static int norm(struct step *s, const struct mat *weight)
{
    const struct weights *w = s->c->w;
    const struct norm_spec spec = block_norm(&w->config);
    s->inputs = &s->normed;
    return w->backend->core->rms_norm(w->backend, &s->x, weight, &spec, &s->normed);
}

static int to_qkv(struct step *s)
{
    return norm(s, &s->c->w->blocks[s->layer].input_norm);
}

static int to_o(struct step *s)
{
    struct capture *c = s->c;
    const struct block_pass pass = {.sequences = {s->batch->sequences, 0, c->data->length},
                                    .rope = &c->rope[c->w->blocks[s->layer].rope],
                                    .qkv = mat_rows(&c->qkv, 0, s->batch->rows),
                                    .q = mat_rows(&c->q, 0, s->batch->rows),
                                    .keys = c->keys,
                                    .values = c->values};
    int rc = to_qkv(s);
    if (!rc)
        rc = block_attention(c->w, s->layer, &pass, &s->normed, &s->attention);
    s->inputs = &s->attention;
    return rc || s->alone ? rc : states_keep(c, &c->attention, &s->attention, s->batch);
}

/* The block's inputs stay as they are for a tuning. */
static int leave_inputs(struct step *s)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct mat from = s->x;
    if (!c->plan.tuned || on_host(&c->middle)) /* there, what was fetched is a copy */
        return 0;
    s->x = states_rows(&c->middle, s->batch);
    return b->core->copy(b, s->x.data, from.data, (size_t)state_bytes(&from));
}

static int to_gate_up(struct step *s)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[s->layer];
    int rc = s->alone ? 0 : states_fetch(c, &c->attention, s->batch);
    if (!rc && !s->alone)
        rc = leave_inputs(s);
    if (!rc)
        rc = linear_set_forward(b, &k->o, &s->attention, &s->branch);
    if (!rc)
        rc = block_join(c->w, &s->branch, &k->post_attention_norm, &s->x, &k->pre_mlp_norm, &s->normed);
    s->inputs = &s->normed;
    return rc || s->alone ? rc : states_keep(c, &c->middle, &s->x, s->batch);
}

static int to_down(struct step *s)
{
    struct capture *c = s->c;
    const struct mat gate_up = mat_rows(&c->gate_up, 0, s->batch->rows);
    const int rc = norm(s, &c->w->blocks[s->layer].pre_mlp_norm);
    s->inputs = &s->inner;
    return rc ? rc : block_mlp(c->w, s->layer, &s->normed, &gate_up, &s->inner);
}

static int to_end(struct step *s)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[s->layer];
    int rc = c->plan.keep_inner && !s->alone ? 0 : to_down(s);
    if (!rc)
        rc = linear_set_forward(b, &k->down, &s->inner, &s->branch);
    if (!rc) /* the next block's norm waits for its weight */
        rc = block_join(c->w, &s->branch, &k->post_mlp_norm, &s->x, NULL, &s->normed);
    return rc ? rc : states_keep(c, s->residual, &s->x, s->batch);
}

/* What o and down give is normed before it is added to the residual stream (post-norms, from Gemma 2 on), so that an error counts
 * by its share of the output: a token's inputs are divided by the norm of what the weights make of them. KL of Gemma 3
 * 270M over three sets of tokens: 0.1528 without, 0.1509 with. */
static int weigh(struct step *s, enum gemma_fused set)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[s->layer];
    int rc = 0;
    if (!k->post_mlp_norm.data)
        return 0;
    if (set == FUSED_O) {
        s->spare = mat_rows(&c->q, 0, s->batch->rows);
        rc = linear_set_forward(b, &k->o, s->inputs, &s->branch);
    } else if (set == FUSED_DOWN) { /* the half of gate and up that is free now */
        const struct mat gate_up = mat_rows(&c->gate_up, 0, s->batch->rows);
        s->spare = mat_cols(&gate_up, c->plan.keep_inner ? 0 : s->inner.cols, s->inner.cols);
        rc = linear_set_forward(b, &k->down, s->inputs, &s->branch);
    } else {
        return 0;
    }
    if (!rc)
        rc = b->core->over_norm(b, s->inputs, &s->branch, &s->spare);
    s->inputs = &s->spare;
    return rc;
}

/* Rows in runs without the token that is to be left out. */
static int add_inputs(const struct step *s, const struct mat *h)
{
    const struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const int32_t *ids = c->data->ids + s->batch->first_row;
    if (c->skip_id < 0)
        return b->quant->hessian_add(b, s->inputs, h);
    int rc = 0;
    for (int64_t i = 0, end; !rc && i < s->batch->rows; i = end + 1) {
        for (end = i; end < s->batch->rows && ids[end] != c->skip_id; end++)
            ;
        const struct mat run = mat_rows(s->inputs, i, end - i);
        rc = b->quant->hessian_add(b, &run, h);
    }
    return rc;
}

static struct step begin_step(struct capture *c, int layer, const struct states *residual,
                              const struct batch *t)
{
    const struct mat gate_up = mat_rows(&c->gate_up, 0, t->rows);
    return (struct step){.c = c,
                         .layer = layer,
                         .batch = t,
                         .residual = residual,
                         .x = states_rows(residual, t),
                         .attention = states_rows(&c->attention, t),
                         .normed = mat_rows(&c->normed, 0, t->rows),
                         .branch = mat_rows(&c->branch, 0, t->rows),
                         .inner = c->plan.keep_inner ? states_rows(&c->inner, t)
                                                     : mat_cols(&gate_up, 0, c->w->blocks[layer].inner)};
}

static int run_steps(struct capture *c, int layer, int (*to)(struct step *), const struct mat *h,
                     enum gemma_fused set)
{
    const struct states *residual = set < FUSED_DOWN ? &c->streams[CAPTURE_INPUTS] : &c->middle;
    int rc = 0;
    for (struct batch t = {0}; !rc && next_batch(c, &t);) {
        struct step s = begin_step(c, layer, residual, &t);
        rc = states_fetch(c, residual, &t);
        if (!rc)
            rc = to(&s);
        if (!rc)
            rc = work_spent(c->clock, c->w->backend, WORK_FORWARD);
        if (!rc && h)
            rc = weigh(&s, set);
        if (!rc && h)
            rc = add_inputs(&s, h);
        if (!rc && h)
            rc = work_spent(c->clock, c->w->backend, WORK_HESSIAN);
        if (!rc && err_interrupt_requested())
            rc = err_interrupted();
    }
    return rc;
}

int capture_inputs(struct capture *c, int layer, enum gemma_fused set, const struct mat *h)
{
    static int (*const steps[N_FUSED])(struct step *) = {
        [FUSED_QKV] = to_qkv, [FUSED_O] = to_o, [FUSED_GATE_UP] = to_gate_up, [FUSED_DOWN] = to_down};
    /* nothing is carried out of a step that only norms, nor of the MLP's where its result is not kept */
    const bool idle = set == FUSED_QKV || (set == FUSED_DOWN && !c->plan.keep_inner);
    return !h && idle ? 0 : run_steps(c, layer, steps[set], h, set);
}

int capture_end(struct capture *c, int layer)
{
    CHECK(!c->plan.tuned);
    return run_steps(c, layer, to_end, NULL, N_FUSED);
}

int capture_block(struct capture *c, int layer, enum capture_stream stream)
{
    const struct states *residual = &c->streams[stream];
    int rc = 0;
    for (struct batch t = {0}; !rc && next_batch(c, &t);) {
        struct step s = begin_step(c, layer, residual, &t);
        s.alone = true;
        rc = states_fetch(c, residual, &t);
        if (!rc)
            rc = to_o(&s);
        if (!rc)
            rc = to_gate_up(&s);
        if (!rc)
            rc = to_end(&s);
        if (!rc && err_interrupt_requested())
            rc = err_interrupted();
    }
    return rc ? rc : work_spent(c->clock, c->w->backend, WORK_FORWARD);
}

int capture_sample(const struct capture *c, enum capture_stream stream, int64_t sample,
                   const struct mat *spare, struct mat *out)
{
    const struct states *s = &c->streams[stream];
    const struct mat rows = mat_rows(&s->all, sample * c->data->length, c->data->length);
    *out = on_host(s) ? *spare : rows;
    return on_host(s) ? c->w->backend->core->upload(c->w->backend, spare->data, rows.data,
                                                    (size_t)state_bytes(&rows))
                      : 0;
}

const struct mat *capture_rope(const struct capture *c, int layer)
{
    return &c->rope[c->w->blocks[layer].rope];
}

/* --- the beginning ---------------------------------------------------------------------------------------------- */

static int embed_all(struct capture *c)
{
    struct weights *w = c->w;
    const struct backend *b = w->backend;
    int rc = weights_load_part(w, WEIGHTS_OUTER);
    for (struct batch t = {0}; !rc && next_batch(c, &t);) {
        for (int i = 0; !rc && i < (c->plan.tuned ? N_STREAMS : 1); i++) {
            const struct mat x = states_rows(&c->streams[i], &t);
            rc = b->core->embed(b, &w->embedding, c->data->ids + t.first_row,
                                sqrtf((float)w->config.hidden_size), &x);
            if (!rc)
                rc = states_keep(c, &c->streams[i], &x, &t);
        }
    }
    if (!rc)
        rc = b->core->wait(b);
    weights_unload_part(w, WEIGHTS_OUTER);
    for (int i = 0; !rc && i < GEMMA_KINDS; i++)
        rc = b->core->rope_table(b, w->inv_freq[i], 0, &c->rope[i]);
    return rc;
}

int capture_open(struct capture **out, struct weights *w, const struct dataset *data,
                 const struct capture_plan *plan, int32_t skip_id, struct work_clock *clock)
{
    *out = NULL;
    struct capture *c = mem_alloc(1, sizeof *c, "the calibration pass");
    if (!c)
        return ERR_MEMORY;
    *c = (struct capture){.w = w, .data = data, .plan = *plan, .skip_id = skip_id, .clock = clock};
    int rc = take_memory(c);
    if (!rc)
        rc = embed_all(c);
    if (rc < 0)
        capture_close(c);
    else
        *out = c;
    return rc;
}

void capture_close(struct capture *c)
{
    if (!c)
        return;
    const struct backend *b = c->w->backend;
    b->core->release(b, &c->memory);
    for (int i = 0; i < N_STREAMS; i++)
        b->core->release_host(b, &c->streams[i].host);
    if (c->plan.tuned)
        b->core->release_host(b, &c->middle.host);
    b->core->release_host(b, &c->attention.host);
    free(c);
}

#include "quantize/capture_impl.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"
#include "runtime/block.h"

#include <math.h>
#include <stdlib.h>

static int n_streams(const struct capture_plan *p)
{
    return p->tuned ? N_STREAMS : 1;
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

/* Shapes of x, o's inputs and down's inputs for so many tokens, and of the layers' own inputs for so many ids. */
enum { SHAPE_X, SHAPE_ATTENTION, SHAPE_INNER, SHAPE_INPUTS, N_SHAPES };
static void state_shapes(struct mat out[N_SHAPES], const struct gemma_config *c, enum dtype act,
                         int64_t tokens, int64_t n_ids)
{
    const struct gemma_widths widest = gemma_widest(c);
    out[SHAPE_X] = (struct mat){NULL, DTYPE_F32, tokens, c->hidden_size, c->hidden_size};
    out[SHAPE_ATTENTION] = (struct mat){NULL, act, tokens, widest.q, widest.q};
    out[SHAPE_INNER] = (struct mat){NULL, act, tokens, widest.inner, widest.inner};
    out[SHAPE_INPUTS] = (struct mat){NULL, act, c->n_layers * n_ids, c->ple_size, c->ple_size};
}

static uint64_t lay_out(struct capture *c, const struct gemma_config *g, enum dtype act, int64_t samples,
                        int64_t length)
{
    const struct gemma_widths widest = gemma_widest(g);
    const int64_t rows = c->plan.batch * length;
    const bool on_host = c->plan.states_on_host;
    void *base = c->memory.ptr;
    uint64_t at = 0;
    struct mat shapes[N_SHAPES];
    state_shapes(shapes, g, act, samples * length, c->plan.n_ids);
    states_place(&c->streams[CAPTURE_INPUTS], base, &at, on_host, &shapes[SHAPE_X], rows);
    if (c->plan.tuned) {
        states_place(&c->streams[CAPTURE_REFERENCE], base, &at, on_host, &shapes[SHAPE_X], rows);
        states_place(&c->middle, base, &at, on_host, &shapes[SHAPE_X], rows);
    } else {
        c->middle = c->streams[CAPTURE_INPUTS];
    }
    states_place(&c->attention, base, &at, on_host, &shapes[SHAPE_ATTENTION], rows);
    if (c->plan.keep_inner)
        states_place(&c->inner, base, &at, false, &shapes[SHAPE_INNER], rows);
    if (g->ple_size) {
        states_place(&c->inputs.states, base, &at, on_host, &shapes[SHAPE_INPUTS], c->plan.n_ids);
        c->input.sum = arena_take(base, &at, DTYPE_F32, rows, g->ple_size);
        c->input.input = arena_take(base, &at, act, rows, g->ple_size);
        c->input.gate = c->input.gated = arena_take(base, &at, act, rows, g->ple_size);
    }
    c->normed = arena_take(base, &at, act, rows, g->hidden_size);
    c->branch = arena_take(base, &at, act, rows, g->hidden_size);
    c->qkv = arena_take(base, &at, act, rows, widest.qkv);
    c->q = arena_take(base, &at, act, rows, widest.q);
    c->keys = arena_take(base, &at, act, rows, widest.kv);
    c->values = arena_take(base, &at, act, rows, widest.kv);
    c->gate_up = arena_take(base, &at, act, rows, 2 * widest.inner);
    routes_lay_out(c, base, &at, g, act, samples * length, rows);
    for (int kind = 0; kind < GEMMA_KINDS; kind++)
        c->rope[kind] = arena_take(base, &at, DTYPE_F32, length, g->rope_dim[kind]);
    return at;
}

/* What the states take of the host's memory. */
static uint64_t host_bytes(const struct capture_plan *p, const struct gemma_config *c, enum dtype act,
                           int64_t tokens)
{
    struct mat shapes[N_SHAPES];
    state_shapes(shapes, c, act, tokens, p->n_ids);
    return (p->tuned ? 3 : 1) * states_bytes(&shapes[SHAPE_X]) + states_bytes(&shapes[SHAPE_ATTENTION]) +
           states_bytes(&shapes[SHAPE_INPUTS]);
}

int capture_plan(struct capture_plan *out, const struct gemma_config *c, const struct backend *b,
                 const struct dataset *data, bool tuned, uint64_t available)
{
    const int64_t samples = data->samples, length = data->length;
    struct capture trial = {.data = data};
    int64_t n_ids = 0;
    const int rc = c->ple_size ? layer_inputs_count(data, c->vocab_size, &n_ids) : 0;
    int64_t batch = b->batch_tokens / length;
    batch = batch < 1 ? 1 : batch > samples ? samples : batch;
    /* from what is fastest to what is smallest */
    for (int kind = 0; kind < 3; kind++) {
        trial.plan = (struct capture_plan){.batch = batch,
                                           .keep_inner = kind == 0,
                                           .states_on_host = kind == 2,
                                           .tuned = tuned,
                                           .n_ids = n_ids};
        trial.plan.device_bytes = lay_out(&trial, c, b->activation, samples, length);
        const uint64_t donors = donors_bytes(c, b->activation, samples * length, n_streams(&trial.plan));
        if (trial.plan.states_on_host)
            trial.plan.host_bytes = host_bytes(&trial.plan, c, b->activation, samples * length) + donors;
        else
            trial.plan.device_bytes += donors;
        if (trial.plan.device_bytes <= available || (kind == 1 && b->host_memory))
            break;
    }
    *out = trial.plan;
    return rc;
}

/* Pinned memory for one kind of states, where those are on the host. */
static int take_host(struct capture *c, struct states *s, const struct mat *shape, const char *what)
{
    const struct backend *b = c->w->backend;
    return c->plan.states_on_host && shape->cols
               ? b->core->acquire_host(b, states_bytes(shape), what, &s->memory)
               : 0;
}

static int take_memory(struct capture *c)
{
    const struct backend *b = c->w->backend;
    const struct gemma_config *g = &c->w->config;
    const int64_t tokens = c->data->samples * c->data->length;
    struct mat shapes[N_SHAPES];
    state_shapes(shapes, g, b->activation, tokens, c->plan.n_ids);
    struct states *const streams[] = {&c->streams[CAPTURE_INPUTS], &c->streams[CAPTURE_REFERENCE],
                                      &c->middle};
    int rc = 0;
    for (int i = 0; !rc && i < (c->plan.tuned ? 3 : 1); i++)
        rc = take_host(c, streams[i], &shapes[SHAPE_X], "the residual stream of all samples");
    if (!rc)
        rc = take_host(c, &c->attention, &shapes[SHAPE_ATTENTION], "attention of all samples");
    if (!rc)
        rc = take_host(c, &c->inputs.states, &shapes[SHAPE_INPUTS], "the layers' own inputs");
    if (!rc)
        rc = b->core->acquire(b, lay_out(c, g, b->activation, c->data->samples, c->data->length),
                              "activations of the calibration", &c->memory);
    if (rc < 0)
        return rc;
    lay_out(c, g, b->activation, c->data->samples, c->data->length);
    return donors_open(&c->donors, b, g, tokens, n_streams(&c->plan), c->plan.states_on_host, &c->keys,
                       &c->values);
}

/* --- batches ---------------------------------------------------------------------------------------------------- */

bool capture_next_batch(const struct capture *c, struct token_batch *t)
{
    const int64_t length = c->data->length, done = (t->first_row + t->rows) / length,
                  left = c->data->samples - done;
    t->first_row += t->rows;
    t->sequences = left < c->plan.batch ? left : c->plan.batch;
    t->rows = t->sequences * length;
    return left > 0;
}

/* --- the steps of a block, for one batch ------------------------------------------------------------------------ */

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

/* Attention of a batch. Keys and values are the block's own, which are kept where later ones read them, or those that
 * were kept of the same tokens in the same stream. */
static int attend(const struct step *s)
{
    const struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[s->layer];
    const struct donor *donor = donors_find(&c->donors, k->kv_source);
    const int64_t kv = (int64_t)k->n_kv_heads * k->head_dim;
    const struct block_pass pass = {
        .sequences = {s->batch->sequences, 0, c->data->length},
        .rope = &c->rope[k->rope],
        .qkv = mat_rows(&c->qkv, 0, s->batch->rows),
        .q = mat_rows(&c->q, 0, s->batch->rows),
        .keys = donor ? states_rows(&donor->keys[s->stream], s->batch) : mat_dense(&c->keys, kv),
        .values = donor ? states_rows(&donor->values[s->stream], s->batch) : mat_dense(&c->values, kv)};
    const bool reads = k->kv_source != s->layer;
    int rc = reads ? states_fetch(b, &donor->keys[s->stream], s->batch) : 0;
    if (!rc && reads)
        rc = states_fetch(b, &donor->values[s->stream], s->batch);
    if (!rc)
        rc = block_attention(c->w, s->layer, &pass, &s->normed, &s->attention);
    if (!rc && donor && !reads)
        rc = states_keep(b, &donor->keys[s->stream], &pass.keys, s->batch);
    if (!rc && donor && !reads)
        rc = states_keep(b, &donor->values[s->stream], &pass.values, s->batch);
    return rc;
}

static int to_o(struct step *s)
{
    struct capture *c = s->c;
    int rc = to_qkv(s);
    if (!rc)
        rc = attend(s);
    s->inputs = &s->attention;
    return rc || s->alone ? rc : states_keep(c->w->backend, &c->attention, &s->attention, s->batch);
}

/* The block's inputs stay as they are for a tuning. */
static int leave_inputs(struct step *s)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct mat from = s->x;
    if (!c->plan.tuned || states_on_host(&c->middle)) /* there, what was fetched is a copy */
        return 0;
    s->x = states_rows(&c->middle, s->batch);
    return b->core->copy(b, s->x.data, from.data, (size_t)states_bytes(&from));
}

static int to_gate_up(struct step *s)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[s->layer];
    int rc = s->alone ? 0 : states_fetch(c->w->backend, &c->attention, s->batch);
    if (!rc && !s->alone)
        rc = leave_inputs(s);
    if (!rc)
        rc = linear_set_forward(b, &k->o, &s->attention, &s->branch);
    if (!rc)
        rc = block_join(c->w, &s->branch, &k->post_attention_norm, &s->x, &k->pre_mlp_norm, &s->normed);
    s->inputs = &s->normed;
    return rc || s->alone ? rc : states_keep(c->w->backend, &c->middle, &s->x, s->batch);
}

static int to_down(struct step *s)
{
    struct capture *c = s->c;
    const struct mat widest = mat_rows(&c->gate_up, 0, s->batch->rows),
                     gate_up = mat_cols(&widest, 0, 2 * c->w->blocks[s->layer].inner);
    const int rc = norm(s, &c->w->blocks[s->layer].pre_mlp_norm);
    s->inputs = &s->inner;
    return rc ? rc : block_mlp(c->w, s->layer, &s->normed, &gate_up, &s->inner);
}

static int to_end(struct step *s)
{
    struct capture *c = s->c;
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[s->layer];
    const struct block_input *all = &c->input;
    struct block_input input = {0};
    int rc = c->plan.keep_inner && !s->alone ? 0 : to_down(s);
    if (!rc)
        rc = linear_set_forward(b, &k->down, &s->inner, &s->branch);
    if (!rc && k->n_experts)
        rc = routes_join(s);
    if (!rc && c->w->config.ple_size) {
        input = (struct block_input){.sum = mat_rows(&all->sum, 0, s->batch->rows),
                                     .input = mat_rows(&all->input, 0, s->batch->rows),
                                     .gate = mat_rows(&all->gate, 0, s->batch->rows),
                                     .gated = mat_rows(&all->gated, 0, s->batch->rows)};
        rc = layer_inputs_pick(&c->inputs, b, s->batch->first_row, &input);
    }
    if (!rc) /* the next block's norm waits for its weight */
        rc = block_end(c->w, s->layer, &input, &s->branch, &s->x, NULL, &s->normed);
    return rc ? rc : states_keep(c->w->backend, s->residual, &s->x, s->batch);
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
        const struct mat widest = mat_rows(&c->q, 0, s->batch->rows);
        s->spare = mat_cols(&widest, 0, s->inputs->cols);
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

static struct step begin_step(struct capture *c, int layer, enum capture_stream stream,
                              const struct states *residual, const struct token_batch *t)
{
    const struct mat gate_up = mat_rows(&c->gate_up, 0, t->rows);
    return (struct step){.c = c,
                         .layer = layer,
                         .stream = stream,
                         .batch = t,
                         .residual = residual,
                         .x = states_rows(residual, t),
                         .attention = states_rows(&c->attention, t),
                         .normed = mat_rows(&c->normed, 0, t->rows),
                         .branch = mat_rows(&c->branch, 0, t->rows),
                         .inner = c->plan.keep_inner ? states_rows(&c->inner, t)
                                                     : mat_cols(&gate_up, 0, c->w->blocks[layer].inner)};
}

/* States that vary in width take that of the layer, and what it does not compute itself is brought to the device. */
static int enter(struct capture *c, int layer)
{
    const struct backend *b = c->w->backend;
    const struct block *k = &c->w->blocks[layer];
    if (c->layer == layer)
        return 0;
    c->layer = layer;
    states_fit(&c->attention, block_heads(k));
    states_fit(&c->inner, k->inner);
    donors_release(&c->donors, b, layer);
    return c->w->config.ple_size ? layer_inputs_enter(&c->inputs, b, layer) : 0;
}

static int run_steps(struct capture *c, int layer, int (*to)(struct step *), const struct mat *h,
                     enum gemma_fused set)
{
    const struct states *residual = set < FUSED_DOWN ? &c->streams[CAPTURE_INPUTS] : &c->middle;
    int rc = enter(c, layer);
    for (struct token_batch t = {0}; !rc && capture_next_batch(c, &t);) {
        struct step s = begin_step(c, layer, CAPTURE_INPUTS, residual, &t);
        rc = states_fetch(c->w->backend, residual, &t);
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
    int rc = enter(c, layer);
    for (struct token_batch t = {0}; !rc && capture_next_batch(c, &t);) {
        struct step s = begin_step(c, layer, stream, residual, &t);
        s.alone = true;
        rc = states_fetch(c->w->backend, residual, &t);
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
    *out = states_on_host(s) ? *spare : rows;
    return states_on_host(s) ? c->w->backend->core->upload(c->w->backend, spare->data, rows.data,
                                                           (size_t)states_bytes(&rows))
                             : 0;
}

int capture_to_tape(const struct capture *c, int layer, int64_t sample, int64_t i,
                    const struct block_tape *tape)
{
    const struct backend *b = c->w->backend;
    const int64_t length = c->data->length, from = sample * length, to = i * length;
    const int source = c->w->blocks[layer].kv_source;
    const struct donor *donor = source == layer ? NULL : donors_find(&c->donors, source);
    const struct mat x = mat_rows(&tape->x, to, length), keys = mat_rows(&tape->keys, to, length),
                     values = mat_rows(&tape->values, to, length);
    CHECK(c->layer == layer);
    int rc = states_copy(b, &c->streams[CAPTURE_INPUTS], from, &x);
    if (!rc && donor)
        rc = states_copy(b, &donor->keys[CAPTURE_INPUTS], from, &keys);
    if (!rc && donor)
        rc = states_copy(b, &donor->values[CAPTURE_INPUTS], from, &values);
    if (rc || !c->w->config.ple_size)
        return rc;
    const struct block_input input = {.sum = mat_rows(&tape->input.sum, to, length),
                                      .input = mat_rows(&tape->input.input, to, length)};
    return layer_inputs_pick(&c->inputs, b, from, &input);
}

const struct mat *capture_rope(const struct capture *c, int layer)
{
    return &c->rope[c->w->blocks[layer].rope];
}

/* --- the beginning ---------------------------------------------------------------------------------------------- */

/* In the memory of the block that will come, and in a residual stream that is not begun. */
static int make_layer_inputs(struct capture *c)
{
    struct token_batch t = {0};
    capture_next_batch(c, &t);
    const struct mat x = states_rows(&c->streams[CAPTURE_INPUTS], &t);
    struct block_input input = c->input;
    input.x0 = c->normed;
    return layer_inputs_make(&c->inputs, c->w, c->data, &x, &input);
}

static int embed_all(struct capture *c)
{
    struct weights *w = c->w;
    const struct backend *b = w->backend;
    int rc = weights_load_part(w, WEIGHTS_OUTER);
    if (!rc && w->config.ple_size)
        rc = make_layer_inputs(c);
    for (struct token_batch t = {0}; !rc && capture_next_batch(c, &t);) {
        for (int i = 0; !rc && i < n_streams(&c->plan); i++) {
            const struct mat x = states_rows(&c->streams[i], &t);
            rc = b->core->embed(b, &w->embedding, c->data->ids + t.first_row,
                                sqrtf((float)w->config.hidden_size), &x);
            if (!rc)
                rc = states_keep(c->w->backend, &c->streams[i], &x, &t);
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
    *c = (struct capture){
        .w = w, .data = data, .plan = *plan, .skip_id = skip_id, .clock = clock, .layer = -1};
    int rc = take_memory(c);
    if (!rc)
        rc = routes_open(c);
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
    donors_release(&c->donors, b, (int)c->w->config.n_layers);
    for (int i = 0; i < N_STREAMS; i++)
        b->core->release_host(b, &c->streams[i].memory);
    if (c->plan.tuned)
        b->core->release_host(b, &c->middle.memory);
    b->core->release_host(b, &c->attention.memory);
    b->core->release_host(b, &c->inputs.states.memory);
    layer_inputs_free(&c->inputs);
    routes_close(&c->routes);
    free(c);
}

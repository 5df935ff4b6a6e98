#include "quantize/capture_impl.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"

#include <stdlib.h>
#include <string.h>

/* --- memory ----------------------------------------------------------------------------------------------------- */

int64_t capture_expert_floor(const struct gemma_config *c, const struct dataset *data)
{
    const int64_t tokens = data->samples * data->length;
    return tokens < c->hidden_size ? tokens : c->hidden_size;
}

/* Extra rows of a batch, if every expert were starved: each its share of the text, rounded up. */
static int64_t most_extra(const struct gemma_config *c, const struct dataset *data, int64_t rows)
{
    const int64_t tokens = data->samples * data->length, floor = capture_expert_floor(c, data);
    return c->n_experts * (floor * rows / tokens + 1);
}

void routes_lay_out(struct capture *c, void *base, uint64_t *at, const struct gemma_config *g, enum dtype act,
                    int64_t tokens, int64_t rows)
{
    struct routes *r = &c->routes;
    if (!g->n_experts)
        return;
    r->max_extra = most_extra(g, c->data, rows);
    r->chosen = arena_take(base, at, DTYPE_I32, tokens, g->top_k);
    r->weights = arena_take(base, at, DTYPE_F32, tokens, g->top_k);
    experts_lay_out(&r->room, base, at, g, act, rows, rows * g->top_k + r->max_extra);
}

static bool left_out(const struct capture *c, int64_t token)
{
    return c->skip_id >= 0 && c->data->ids[token] == c->skip_id;
}

int routes_open(struct capture *c)
{
    struct routes *r = &c->routes;
    const struct gemma_config *g = &c->w->config;
    const size_t all = (size_t)(c->data->samples * c->data->length * g->top_k);
    r->layer = -1;
    if (!g->n_experts)
        return 0;
    r->host = mem_alloc(all, sizeof *r->host, "tokens' experts");
    r->picked = mem_alloc((size_t)(r->room.max_tokens * g->top_k), sizeof *r->picked, "tokens' experts");
    r->counts = mem_alloc((size_t)g->n_experts, sizeof *r->counts, "tokens' experts");
    r->extra = mem_alloc((size_t)r->max_extra, sizeof *r->extra, "tokens' experts");
    r->passed = mem_alloc((size_t)g->n_experts, sizeof *r->passed, "tokens' experts");
    if (!r->host || !r->picked || !r->counts || !r->extra || !r->passed)
        return ERR_MEMORY;
    for (int64_t i = 0; i < c->data->samples * c->data->length; i++)
        r->n_kept += !left_out(c, i);
    return experts_open(&r->room, g);
}

void routes_close(struct routes *r)
{
    experts_close(&r->room);
    free(r->host);
    free(r->picked);
    free(r->counts);
    free(r->extra);
    free(r->passed);
}

/* --- the router ------------------------------------------------------------------------------------------------- */

/* The residual stream of a batch, with attention's branch, on the device. */
static int fetch(const struct capture *c, const struct token_batch *t, struct mat *x)
{
    *x = states_rows(&c->middle, t);
    return states_fetch(c->w->backend, &c->middle, t);
}

int capture_route(struct capture *c, int layer)
{
    struct routes *r = &c->routes;
    const struct backend *b = c->w->backend;
    const int k = c->w->blocks[layer].top_k;
    int rc = 0;
    for (struct token_batch t = {0}; !rc && capture_next_batch(c, &t);) {
        const struct mat chosen = mat_rows(&r->chosen, t.first_row, t.rows),
                         weights = mat_rows(&r->weights, t.first_row, t.rows);
        struct mat x;
        rc = fetch(c, &t, &x);
        if (!rc)
            rc = experts_route(c->w, layer, &r->room, &x, &chosen, &weights);
    }
    if (!rc)
        rc = b->core->download(b, r->host, r->chosen.data,
                               (size_t)(r->chosen.rows * r->chosen.cols) * sizeof *r->host);
    memset(r->counts, 0, (size_t)c->w->config.n_experts * sizeof *r->counts);
    for (int64_t i = 0; !rc && i < r->chosen.rows * k; i++)
        r->counts[r->host[i]] += !left_out(c, i / k);
    r->layer = layer;
    return rc ? rc : work_spent(c->clock, b, WORK_FORWARD);
}

int64_t capture_expert_tokens(const struct capture *c, int expert)
{
    return c->routes.counts[expert];
}

/* --- inputs ----------------------------------------------------------------------------------------------------- */

/* Tokens count alike: by what the router gives an expert for them, or by its square, makes no difference (KL of a tiny
 * mixture 0.0310 and 0.0315, each ± 0.0006). */

static bool is_sent(const struct routes *r, int64_t token, int expert)
{
    const int32_t *chosen = r->host + token * r->chosen.cols;
    bool sent = false;
    for (int64_t i = 0; !sent && i < r->chosen.cols; i++)
        sent = chosen[i] == expert;
    return sent;
}

/* The rows of a batch that an expert is given although they are not sent there, when it is starved: of all such rows of the
 * text that are not left out, evenly many. At most the share of them that the floor is of the whole text, so that a batch
 * never has more than there is room for. */
static void pick_extra(const struct capture *c, const struct token_batch *t, int expert,
                       struct expert_tokens *out)
{
    const struct routes *r = &c->routes;
    const int64_t tokens = r->chosen.rows, floor = capture_expert_floor(&c->w->config, c->data),
                  others = r->n_kept - r->counts[expert], most = others * floor / tokens;
    int64_t missing = floor - r->counts[expert];
    missing = missing < most ? missing : most;
    for (int64_t i = t->first_row; missing > 0 && i < t->first_row + t->rows; i++) {
        if (left_out(c, i) || is_sent(r, i, expert))
            continue;
        const int64_t before = r->passed[expert]++;
        if ((before + 1) * missing / others > before * missing / others)
            r->extra[out->n_extra++] = (struct extra_row){expert, (int32_t)(i - t->first_row)};
    }
}

/* The rows of a batch that experts [first, first + n) are calibrated on; batches come in order. */
static struct expert_tokens pick_tokens(const struct capture *c, const struct token_batch *t, int first,
                                        int n)
{
    const struct routes *r = &c->routes;
    const int k = c->w->blocks[r->layer].top_k;
    struct expert_tokens out = {.n = t->rows, .chosen = r->picked, .extra = r->extra};
    for (int64_t i = 0; i < t->rows * k; i++) {
        const int e = r->host[t->first_row * k + i];
        r->picked[i] = e < first || e >= first + n || left_out(c, t->first_row + i / k) ? -1 : e;
    }
    for (int e = first; e < first + n; e++)
        pick_extra(c, t, e, &out);
    return out;
}

int capture_expert_inputs(struct capture *c, int layer, enum gemma_fused set, int first, int n,
                          const struct mat *h)
{
    struct experts_room *room = &c->routes.room;
    const struct backend *b = c->w->backend;
    int rc = 0;
    CHECK(c->routes.layer == layer);
    memset(c->routes.passed, 0, (size_t)c->w->config.n_experts * sizeof *c->routes.passed);
    for (struct token_batch t = {0}; !rc && capture_next_batch(c, &t);) {
        const struct expert_tokens tokens = pick_tokens(c, &t, first, n);
        struct mat x;
        rc = fetch(c, &t, &x);
        if (!rc)
            rc = experts_assign(c->w, layer, room, &tokens);
        if (!rc)
            rc = experts_gather(c->w, layer, room, &x);
        if (!rc && set == FUSED_DOWN)
            rc = experts_inner(c->w, layer, room);
        if (!rc)
            rc = work_spent(c->clock, b, WORK_FORWARD);
        for (int e = first; !rc && e < first + n; e++) {
            const struct mat rows = set == FUSED_DOWN ? experts_inner_rows(room, e)
                                                      : experts_input_rows(room, e),
                             own = mat_rows(h, (e - first) * h->cols, h->cols);
            if (rows.rows)
                rc = b->quant->hessian_add(b, &rows, &own);
        }
        if (!rc)
            rc = work_spent(c->clock, b, WORK_HESSIAN);
        if (!rc && err_interrupt_requested())
            rc = err_interrupted();
    }
    return rc;
}

int routes_join(struct step *s)
{
    struct capture *c = s->c;
    struct routes *r = &c->routes;
    if (s->alone) /* tokens go where this stream sends them */
        return experts_add(c->w, s->layer, &r->room, &s->x, &s->branch);
    const struct mat weights = mat_rows(&r->weights, s->batch->first_row, s->batch->rows);
    const int64_t first = s->batch->first_row * weights.cols;
    CHECK(r->layer == s->layer);
    return experts_run(c->w, s->layer, &r->room, &s->x, r->host + first, &weights, &s->branch);
}

#include "cli/bench_profile.h"

#include "base/clock.h"
#include "base/err.h"
#include "cli/bench_case.h"

#include <string.h>

const char *profile_row_name(int row)
{
    static const char *const names[N_ROWS] = {[ROW_FORWARD + FUSED_QKV] = "forward q/k/v",
                                              [ROW_FORWARD + FUSED_O] = "forward o",
                                              [ROW_FORWARD + FUSED_GATE_UP] = "forward gate/up",
                                              [ROW_FORWARD + FUSED_DOWN] = "forward down",
                                              [ROW_FORWARD + SET_EXPERTS_GATE_UP] =
                                                  "forward experts' gate/up",
                                              [ROW_FORWARD + SET_EXPERTS_DOWN] = "forward experts' down",
                                              [ROW_DGRAD + FUSED_QKV] = "dgrad q/k/v",
                                              [ROW_DGRAD + FUSED_O] = "dgrad o",
                                              [ROW_DGRAD + FUSED_GATE_UP] = "dgrad gate/up",
                                              [ROW_DGRAD + FUSED_DOWN] = "dgrad down",
                                              [ROW_DGRAD + SET_EXPERTS_GATE_UP] = "dgrad experts' gate/up",
                                              [ROW_DGRAD + SET_EXPERTS_DOWN] = "dgrad experts' down",
                                              [ROW_WGRAD + FUSED_QKV] = "wgrad q/k/v",
                                              [ROW_WGRAD + FUSED_O] = "wgrad o",
                                              [ROW_WGRAD + FUSED_GATE_UP] = "wgrad gate/up",
                                              [ROW_WGRAD + FUSED_DOWN] = "wgrad down",
                                              [ROW_WGRAD + SET_EXPERTS_GATE_UP] = "wgrad experts' gate/up",
                                              [ROW_WGRAD + SET_EXPERTS_DOWN] = "wgrad experts' down",
                                              [ROW_STEP + FUSED_QKV] = "step q/k/v",
                                              [ROW_STEP + FUSED_O] = "step o",
                                              [ROW_STEP + FUSED_GATE_UP] = "step gate/up",
                                              [ROW_STEP + FUSED_DOWN] = "step down",
                                              [ROW_STEP + SET_EXPERTS_GATE_UP] = "step experts' gate/up",
                                              [ROW_STEP + SET_EXPERTS_DOWN] = "step experts' down",
                                              [ROW_ATTENTION] = "attention",
                                              [ROW_ATTENTION_BACKWARD] = "attention backward",
                                              [ROW_NORMS] = "norms",
                                              [ROW_NORMS_BACKWARD] = "norms backward",
                                              [ROW_HEADS] = "heads",
                                              [ROW_HEADS_BACKWARD] = "heads backward",
                                              [ROW_GATE] = "gated activation",
                                              [ROW_GATE_BACKWARD] = "gated activation backward",
                                              [ROW_ROUTER] = "router",
                                              [ROW_ROUTES] = "routes",
                                              [ROW_EXPERT_ROWS] = "experts' rows",
                                              [ROW_LOSS] = "loss",
                                              [ROW_COPIES] = "copies"};
    return names[row];
}

bool profile_row_computes(int row)
{
    return row < ROW_STEP || row == ROW_ATTENTION || row == ROW_ATTENTION_BACKWARD || row == ROW_ROUTER;
}

/* --- an operation ------------------------------------------------------------------------------------------------- */

/* One call on its way. */
struct span {
    const struct backend *real;
    struct profile_log *log;
    int row;
    double start;
};

static const struct bench_profile *profile_of(const struct backend *b)
{
    return (const struct bench_profile *)b;
}

static int end_iteration(const struct span *s)
{
    struct profile_log *log = s->log;
    log->stepped = false;
    log->at++;
    if (log->at != 1 && log->at != log->n)
        return 0;
    const int rc = s->real->core->wait(s->real);
    *(log->at == 1 ? &log->begin : &log->end) = clock_seconds();
    return rc;
}

static int span_begin(const struct backend *b, int row, struct span *s)
{
    const struct bench_profile *p = profile_of(b);
    *s = (struct span){p->real, p->log, row, 0};
    int rc = 0;
    if (p->log->stepped && (row < ROW_STEP || row >= ROW_STEP + N_BLOCK_SETS))
        rc = end_iteration(s);
    if (!rc && p->log->apart)
        rc = p->real->core->wait(p->real);
    s->start = p->log->apart ? clock_seconds() : 0;
    return rc;
}

static int span_end(const struct span *s, double amount)
{
    if (s->log->at >= s->log->n)
        return 0;
    struct profile_op *op = &s->log->iterations[s->log->at].ops[s->row];
    const int rc = s->log->apart ? s->real->core->wait(s->real) : 0;
    op->calls++;
    op->seconds += s->log->apart ? clock_seconds() - s->start : 0;
    op->amount += amount;
    return rc;
}

static double bytes_of(const struct mat *m)
{
    return m ? (double)(m->rows * m->cols) * (double)dtype_bytes(m->dtype) : 0;
}

/* --- products ----------------------------------------------------------------------------------------------------- */

static int set_row(const struct backend *b, int first, const struct mat *w)
{
    const struct profile_log *log = profile_of(b)->log;
    int i = 0;
    while (i < log->n_shapes && (log->shapes[i].rows != w->rows || log->shapes[i].cols != w->cols))
        i++;
    CHECK(i < log->n_shapes);
    return log->shapes[i].set == N_BLOCK_SETS ? ROW_ROUTER : first + log->shapes[i].set;
}

static double product_flop(const struct mat *w, int64_t tokens)
{
    return 2 * (double)w->rows * (double)w->cols * (double)tokens;
}

static int gemm(const struct backend *b, const struct mat *x, const struct mat *w, const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, set_row(b, ROW_FORWARD, w), &s);
    if (!rc)
        rc = s.real->core->gemm(s.real, x, w, out);
    return rc ? rc : span_end(&s, product_flop(w, x->rows));
}

static int gemm_dgrad(const struct backend *b, const struct mat *dy, const struct mat *w, bool add,
                      const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, set_row(b, ROW_DGRAD, w), &s);
    if (!rc)
        rc = s.real->train->gemm_dgrad(s.real, dy, w, add, out);
    return rc ? rc : span_end(&s, product_flop(w, dy->rows));
}

static int gemm_wgrad(const struct backend *b, const struct mat *dy, const struct mat *x, bool add,
                      const struct mat *dw)
{
    struct span s;
    int rc = span_begin(b, set_row(b, ROW_WGRAD, dw), &s);
    if (!rc)
        rc = s.real->train->gemm_wgrad(s.real, dy, x, add, dw);
    return rc ? rc : span_end(&s, product_flop(dw, dy->rows));
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

/* One product with every pair of query and key. */
static double attention_flop(const struct attention_spec *a, int64_t rows)
{
    const struct sequences *q = &a->sequences;
    return 2 * (double)(a->heads.n_heads * a->heads.head_dim) * (double)q->n *
           bench_attention_pairs(q->first_position, rows / q->n, a->window);
}

static int attention(const struct backend *b, const struct attention_spec *spec, const struct mat *q,
                     const struct mat *keys, const struct mat *values, const struct mat *out,
                     const struct mat *lse)
{
    struct span s;
    int rc = span_begin(b, ROW_ATTENTION, &s);
    if (!rc)
        rc = s.real->core->attention(s.real, spec, q, keys, values, out, lse);
    return rc ? rc : span_end(&s, 2 * attention_flop(spec, q->rows));
}

static int attention_backward(const struct backend *b, const struct attention_spec *spec,
                              const struct attention_tape *tape, const struct mat *dout, const struct mat *dq,
                              const struct mat *dkeys, const struct mat *dvalues)
{
    struct span s;
    int rc = span_begin(b, ROW_ATTENTION_BACKWARD, &s);
    if (!rc)
        rc = s.real->train->attention_backward(s.real, spec, tape, dout, dq, dkeys, dvalues);
    return rc ? rc : span_end(&s, 5 * attention_flop(spec, dout->rows));
}

static int split_qkv(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                     const struct mat *q, const struct mat *keys, const struct mat *values)
{
    struct span s;
    int rc = span_begin(b, ROW_HEADS, &s);
    if (!rc)
        rc = s.real->core->split_qkv(s.real, spec, qkv, q, keys, values);
    return rc ? rc : span_end(&s, 2 * bytes_of(qkv));
}

static int split_qkv_backward(const struct backend *b, const struct qkv_spec *spec, const struct mat *qkv,
                              const struct mat *dq, const struct mat *dkeys, const struct mat *dvalues,
                              const struct mat *dqkv)
{
    struct span s;
    int rc = span_begin(b, ROW_HEADS_BACKWARD, &s);
    if (!rc)
        rc = s.real->train->split_qkv_backward(s.real, spec, qkv, dq, dkeys, dvalues, dqkv);
    return rc ? rc : span_end(&s, 3 * bytes_of(qkv));
}

/* --- row by row, element by element ------------------------------------------------------------------------------- */

static int rms_norm(const struct backend *b, const struct mat *x, const struct mat *w,
                    const struct norm_spec *spec, const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, ROW_NORMS, &s);
    if (!rc)
        rc = s.real->core->rms_norm(s.real, x, w, spec, out);
    return rc ? rc : span_end(&s, bytes_of(x) + bytes_of(out));
}

static int add_norm(const struct backend *b, const struct mat *branch, const struct mat *branch_norm,
                    const struct mat *x, const struct mat *next_norm, const struct norm_spec *spec,
                    const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, ROW_NORMS, &s);
    if (!rc)
        rc = s.real->core->add_norm(s.real, branch, branch_norm, x, next_norm, spec, out);
    return rc ? rc : span_end(&s, bytes_of(branch) + 2 * bytes_of(x) + bytes_of(out));
}

static int rms_norm_backward(const struct backend *b, const struct mat *x, const struct mat *w,
                             const struct norm_spec *spec, const struct mat *dy, const struct mat *add,
                             const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, ROW_NORMS_BACKWARD, &s);
    if (!rc)
        rc = s.real->train->rms_norm_backward(s.real, x, w, spec, dy, add, out);
    return rc ? rc : span_end(&s, bytes_of(x) + bytes_of(dy) + bytes_of(add) + bytes_of(out));
}

static int geglu(const struct backend *b, const struct mat *gate, const struct mat *up, const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, ROW_GATE, &s);
    if (!rc)
        rc = s.real->core->geglu(s.real, gate, up, out);
    return rc ? rc : span_end(&s, 3 * bytes_of(out));
}

static int geglu_backward(const struct backend *b, const struct mat *gate, const struct mat *up,
                          const struct mat *dy, const struct mat *dgate, const struct mat *dup)
{
    struct span s;
    int rc = span_begin(b, ROW_GATE_BACKWARD, &s);
    if (!rc)
        rc = s.real->train->geglu_backward(s.real, gate, up, dy, dgate, dup);
    return rc ? rc : span_end(&s, 5 * bytes_of(dy));
}

static int error_backward(const struct backend *b, const struct mat *y, const struct mat *target,
                          float factor, double *sum, const struct mat *dy)
{
    struct span s;
    int rc = span_begin(b, ROW_LOSS, &s);
    if (!rc)
        rc = s.real->train->error_backward(s.real, y, target, factor, sum, dy);
    return rc ? rc : span_end(&s, bytes_of(y) + bytes_of(target) + bytes_of(dy));
}

static int keep_best(const struct backend *b, const double *loss, double *best, int32_t *improved)
{
    struct span s;
    int rc = span_begin(b, ROW_LOSS, &s);
    if (!rc)
        rc = s.real->train->keep_best(s.real, loss, best, improved);
    return rc ? rc : span_end(&s, 0);
}

/* Of every weight: itself, its v back and forth, its gradient, and what is restored; groups are small beside that, and
 * an iterate is seldom kept. */
static int tune_step(const struct backend *b, const struct tuning *t, const struct mat *gradient,
                     const struct tune_rates *rates, const int32_t *keep)
{
    struct span s;
    int rc = span_begin(b, set_row(b, ROW_STEP, t->w), &s);
    if (!rc)
        rc = s.real->train->tune_step(s.real, t, gradient, rates, keep);
    s.log->stepped = gradient != NULL;
    return rc ? rc
              : span_end(&s,
                         bytes_of(t->w) + 2 * bytes_of(t->v) + bytes_of(gradient) + bytes_of(t->restored));
}

/* --- experts ------------------------------------------------------------------------------------------------------ */

static int route(const struct backend *b, const struct mat *logits, const struct mat *factors,
                 const struct mat *experts, const struct mat *weights)
{
    struct span s;
    int rc = span_begin(b, ROW_ROUTES, &s);
    if (!rc)
        rc = s.real->core->route(s.real, logits, factors, experts, weights);
    return rc ? rc : span_end(&s, bytes_of(logits) + bytes_of(experts) + bytes_of(weights));
}

static int gather_rows(const struct backend *b, const struct mat *x, const struct mat *rows,
                       const struct mat *factors, const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, ROW_EXPERT_ROWS, &s);
    if (!rc)
        rc = s.real->core->gather_rows(s.real, x, rows, factors, out);
    return rc ? rc : span_end(&s, bytes_of(x) + bytes_of(out));
}

static int combine_rows(const struct backend *b, const struct mat *y, const struct mat *slots,
                        const struct mat *weights, const struct mat *out)
{
    struct span s;
    int rc = span_begin(b, ROW_EXPERT_ROWS, &s);
    if (!rc)
        rc = s.real->core->combine_rows(s.real, y, slots, weights, out);
    return rc ? rc : span_end(&s, bytes_of(y) + bytes_of(out));
}

static int route_backward(const struct backend *b, const struct route_tape *tape, const struct mat *dout,
                          const struct mat *dlogits)
{
    struct span s;
    int rc = span_begin(b, ROW_ROUTES, &s);
    if (!rc)
        rc = s.real->train->route_backward(s.real, tape, dout, dlogits);
    return rc ? rc : span_end(&s, bytes_of(&tape->y) + bytes_of(dout) + bytes_of(dlogits));
}

/* --- copies ------------------------------------------------------------------------------------------------------- */

static int copy(const struct backend *b, void *to, const void *from, size_t bytes)
{
    struct span s;
    int rc = span_begin(b, ROW_COPIES, &s);
    if (!rc)
        rc = s.real->core->copy(s.real, to, from, bytes);
    return rc ? rc : span_end(&s, 2 * (double)bytes);
}

static int upload(const struct backend *b, void *to, const void *from, size_t bytes)
{
    struct span s;
    int rc = span_begin(b, ROW_COPIES, &s);
    if (!rc)
        rc = s.real->core->upload(s.real, to, from, bytes);
    return rc ? rc : span_end(&s, (double)bytes);
}

static int stage_out(const struct backend *b, const struct staged_buf *staged, size_t offset, size_t bytes)
{
    struct span s;
    int rc = span_begin(b, ROW_COPIES, &s);
    if (!rc)
        rc = s.real->core->stage_out(s.real, staged, offset, bytes);
    return rc ? rc : span_end(&s, (double)bytes);
}

/* --- the backend -------------------------------------------------------------------------------------------------- */

static void add_shape(struct profile_log *log, int64_t rows, int64_t cols, int set)
{
    CHECK(log->n_shapes < PROFILE_SHAPES);
    log->shapes[log->n_shapes].rows = rows;
    log->shapes[log->n_shapes].cols = cols;
    log->shapes[log->n_shapes++].set = set;
}

static void add_linear(struct profile_log *log, const struct linear *l, int set)
{
    CHECK(!l->quantized);
    add_shape(log, l->weight.rows, l->weight.cols, set);
}

/* Products are an expert's, steps those of all experts. */
static void add_experts(struct profile_log *log, const struct block *block)
{
    const struct linear *const linears[] = {&block->experts->gate_up.whole, &block->experts->down.whole};
    for (int i = 0; i < 2; i++) {
        add_linear(log, linears[i], SET_EXPERTS_GATE_UP + i);
        add_shape(log, linears[i]->weight.rows * block->n_experts, linears[i]->weight.cols,
                  SET_EXPERTS_GATE_UP + i);
    }
    add_shape(log, block->router.rows, block->router.cols, N_BLOCK_SETS);
}

void bench_profile_begin(struct bench_profile *out, const struct backend *real, struct profile_log *log,
                         const struct block *block)
{
    const struct linear_set *const sets[N_FUSED] = {[FUSED_QKV] = &block->qkv,
                                                    [FUSED_O] = &block->o,
                                                    [FUSED_GATE_UP] = &block->gate_up,
                                                    [FUSED_DOWN] = &block->down};
    for (int k = 0; k < N_FUSED; k++) {
        if (sets[k]->fused)
            add_linear(log, &sets[k]->whole, k);
        for (int i = 0; !sets[k]->fused && i < sets[k]->n; i++)
            add_linear(log, &sets[k]->parts[i], k);
    }
    if (block->n_experts)
        add_experts(log, block);
    *out = (struct bench_profile){
        .backend = *real, .core = *real->core, .train = *real->train, .real = real, .log = log};
    out->backend.core = &out->core;
    out->backend.train = &out->train;
    out->core.copy = copy;
    out->core.upload = upload;
    out->core.stage_out = stage_out;
    out->core.rms_norm = rms_norm;
    out->core.add_norm = add_norm;
    out->core.gemm = gemm;
    out->core.split_qkv = split_qkv;
    out->core.attention = attention;
    out->core.geglu = geglu;
    out->core.route = route;
    out->core.gather_rows = gather_rows;
    out->core.combine_rows = combine_rows;
    out->train.gemm_dgrad = gemm_dgrad;
    out->train.gemm_wgrad = gemm_wgrad;
    out->train.rms_norm_backward = rms_norm_backward;
    out->train.geglu_backward = geglu_backward;
    out->train.split_qkv_backward = split_qkv_backward;
    out->train.attention_backward = attention_backward;
    out->train.route_backward = route_backward;
    out->train.error_backward = error_backward;
    out->train.keep_best = keep_best;
    out->train.tune_step = tune_step;
}

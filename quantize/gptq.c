#include "quantize/gptq.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"

#include <math.h>
#include <stdlib.h>

enum {
    FAN = 4,                           /* ranges of columns that one is cut into, … */
    PANEL = FAN * FAN * SWEEP_COLUMNS, /* … twice, down to what a kernel takes at a time */
    LEAST_ROWS = 64,                   /* of a weight whose scales are refitted at a time, … */
    NORMAL_BYTES = 256 << 20,          /* … and more of them while their normal equations fit */
};

/* Numbers that a weight's run leaves on the device, for each of its parts. */
enum sum {
    SUM_OUTPUT,        /* wHwᵀ over all rows, … */
    SUM_WEIGHT,        /* … and ww */
    SUM_NEAREST,       /* eHeᵀ with nearest codes, … */
    SUM_NEAREST_PLAIN, /* … and eeᵀ */
    SUM_ERROR,         /* the same at last */
    SUM_ERROR_PLAIN,
    N_SUMS
};

struct numbers {
    double sums[GPTQ_MAX_PARTS][N_SUMS];
    int64_t clipped[GPTQ_MAX_PARTS]; /* weights beyond their codes */
    int64_t n_refitted;              /* rows; nobody reads it */
};

static const double largest_damping = 1, damping_growth = 4;

/* Device memory, laid out anew for every weight. */
struct space {
    struct mat factor;             /* F32 [cols, cols] */
    struct mat rough;              /* H in the activations' type [cols, cols]; no rows where that is F32 */
    struct mat work;               /* F64 [cols, cols]; where the following ones lie */
    struct mat codes;              /* I8 [rows, cols] */
    struct mat wh, gradient, pool; /* F32 [rows, cols]: W·H; (W − Ŵ)·H; feedback, residuals, products */
    struct mat panel, feedback;    /* F32 [rows, PANEL or cols], whichever is less */
    struct mat changes;            /* BF16, the same */
    struct mat normal, rhs;        /* F32 [some rows, groups²], [some rows, groups] */
};

struct gptq {
    const struct backend *b;
    struct gptq_options o;
    struct work_clock *clock;
    struct buf memory;
    struct staged_buf order;   /* I32 [cols] */
    struct staged_buf numbers; /* struct numbers */
    const struct gptq_parts *parts;
    float *diagonal; /* [cols], host */
    const struct mat *h;
    double ridge;   /* that was added to its diagonal */
    double damping; /* as a share of the mean, with what the factor took beyond that */
    int64_t n_dead;
};

/* --- memory ----------------------------------------------------------------------------------------------------- */

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The factor and the rough H lie in front, where every weight of a set finds them. */
static uint64_t lay_out(void *base, enum dtype act, const struct gptq_size *s, struct space *out)
{
    const int64_t groups = (s->cols + s->group - 1) / s->group;
    const int64_t fitting = NORMAL_BYTES / (groups * groups * (int64_t)sizeof(float));
    const int64_t refit_rows = least(s->rows, fitting > LEAST_ROWS ? fitting : LEAST_ROWS);
    const int64_t panel = least(PANEL, s->cols);
    uint64_t at = 0, behind;
    out->factor = arena_take(base, &at, DTYPE_F32, s->cols, s->cols);
    out->rough = arena_take(base, &at, act, act == DTYPE_F32 ? 0 : s->cols, s->cols);
    behind = at;
    out->work = arena_take(base, &behind, DTYPE_F64, s->cols, s->cols);
    out->codes = arena_take(base, &at, DTYPE_I8, s->rows, s->cols);
    out->wh = arena_take(base, &at, DTYPE_F32, s->rows, s->cols);
    out->gradient = arena_take(base, &at, DTYPE_F32, s->rows, s->cols);
    out->pool = arena_take(base, &at, DTYPE_F32, s->rows, s->cols);
    out->panel = arena_take(base, &at, DTYPE_F32, s->rows, panel);
    out->feedback = arena_take(base, &at, DTYPE_F32, s->rows, panel);
    out->changes = arena_take(base, &at, DTYPE_BF16, s->rows, panel);
    out->normal = arena_take(base, &at, DTYPE_F32, refit_rows, groups * groups);
    out->rhs = arena_take(base, &at, DTYPE_F32, refit_rows, groups);
    return at > behind ? at : behind;
}

/* In one piece, the most of any size. */
static uint64_t space_bytes(enum dtype act, const struct gptq_size *sizes, size_t n)
{
    uint64_t most = 0;
    for (size_t i = 0; i < n; i++) {
        struct space unused;
        const uint64_t bytes = lay_out(NULL, act, &sizes[i], &unused);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static int64_t most_cols(const struct gptq_size *sizes, size_t n)
{
    int64_t cols = 0;
    for (size_t i = 0; i < n; i++)
        cols = sizes[i].cols > cols ? sizes[i].cols : cols;
    return cols;
}

uint64_t gptq_hessian_bytes(const struct gptq_size *sizes, size_t n)
{
    const int64_t cols = most_cols(sizes, n);
    return (uint64_t)(cols * cols) * sizeof(float);
}

uint64_t gptq_bytes(enum dtype act, const struct gptq_size *sizes, size_t n)
{
    return space_bytes(act, sizes, n) + (uint64_t)most_cols(sizes, n) * sizeof(int32_t) +
           sizeof(struct numbers);
}

int gptq_open(struct gptq **out, const struct backend *b, const struct gptq_options *options,
              const struct gptq_size *sizes, size_t n, struct work_clock *clock)
{
    *out = NULL;
    struct gptq *g = mem_alloc(1, sizeof *g, "GPTQ");
    if (!g)
        return ERR_MEMORY;
    *g = (struct gptq){.b = b, .o = *options, .clock = clock};
    const int64_t cols = most_cols(sizes, n);
    g->diagonal = mem_alloc((size_t)cols, sizeof *g->diagonal, "a Hessian's diagonal");
    int rc = g->diagonal ? 0 : ERR_MEMORY;
    if (!rc)
        rc = b->core->acquire(b, space_bytes(b->activation, sizes, n), "codes on their way", &g->memory);
    const struct staged_need needs[] = {
        {&g->order, (size_t)cols * sizeof(int32_t), "an order of columns"},
        {&g->numbers, sizeof(struct numbers), "errors"},
    };
    if (!rc)
        rc = backend_acquire_staged(b, needs, sizeof needs / sizeof *needs);
    if (rc < 0)
        gptq_close(g);
    else
        *out = g;
    return rc;
}

void gptq_close(struct gptq *g)
{
    if (!g)
        return;
    struct staged_buf *const pieces[] = {&g->order, &g->numbers};
    backend_release_staged(g->b, pieces, sizeof pieces / sizeof *pieces);
    if (g->memory.ptr)
        g->b->core->release(g->b, &g->memory);
    free(g->diagonal);
    free(g);
}

/* --- order and factor ------------------------------------------------------------------------------------------- */

struct column {
    float diagonal;
    int32_t index;
};

static int by_diagonal(const void *a, const void *b)
{
    const struct column *x = a, *y = b;
    if (x->diagonal != y->diagonal)
        return x->diagonal > y->diagonal ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

static int choose_order(struct gptq *g, int64_t n)
{
    int32_t *order = g->order.host;
    struct column *columns = mem_alloc((size_t)n, sizeof *columns, "an order of columns");
    if (!columns)
        return ERR_MEMORY;
    for (int64_t i = 0; i < n; i++)
        columns[i] = (struct column){g->diagonal[i], (int32_t)i};
    if (!g->o.natural_order)
        qsort(columns, (size_t)n, sizeof *columns, by_diagonal);
    for (int64_t i = 0; i < n; i++)
        order[i] = columns[i].index;
    free(columns);
    return g->b->core->stage_in(g->b, &g->order, 0, (size_t)n * sizeof *order);
}

static struct mat order_of(const struct gptq *g, int64_t n)
{
    return (struct mat){g->order.device, DTYPE_I32, 1, n, n};
}

/* Reads the diagonal: its mean, and how many columns are dead. */
static int judge_diagonal(struct gptq *g, const struct mat *h, double *mean)
{
    double sum = 0;
    g->n_dead = 0;
    const int rc = g->b->quant->diagonal(g->b, h, g->diagonal);
    for (int64_t i = 0; !rc && i < h->rows; i++) {
        sum += (double)g->diagonal[i];
        g->n_dead += g->diagonal[i] == 0;
    }
    if (!rc && !isfinite(sum))
        return err_set(ERR_FORMAT,
                       "the calibration's activations are not finite (NaN, or beyond the range of FP32)");
    *mean = sum / (double)h->rows;
    return rc;
}

int gptq_prepare(struct gptq *g, const struct mat *h)
{
    const struct quant_ops *quant = g->b->quant;
    double mean = 0;
    int rc = judge_diagonal(g, h, &mean);
    g->h = h;
    g->damping = 0;
    g->ridge = g->o.damping * (mean > 0 ? mean : 1);
    if (!rc)
        rc = quant->add_diagonal(g->b, h, (float)g->ridge);
    struct space s;
    lay_out(g->memory.ptr, g->b->activation, &(struct gptq_size){1, h->rows, h->rows}, &s);
    if (!rc && s.rough.rows)
        rc = g->b->core->scale(g->b, 1, h, false, &s.rough);
    if (rc < 0 || !g->o.sweep)
        return rc;
    rc = choose_order(g, h->rows);
    const struct mat order = order_of(g, h->rows);
    int definite = 0;
    for (double d = g->o.damping; !rc && !definite && d <= largest_damping; d *= damping_growth) {
        const float more = (float)((d - g->o.damping) * mean);
        rc = quant->factorize(g->b, h, &order, more, &s.work, &s.factor, &definite);
        g->damping = d;
    }
    if (!rc)
        rc = work_spent(g->clock, g->b, WORK_FACTOR);
    if (!rc && !definite)
        return err_set(ERR_FORMAT,
                       "the Hessian of the calibration's activations is not positive definite, even with %g "
                       "of its mean diagonal added",
                       g->damping);
    return rc;
}

/* --- the sweep -------------------------------------------------------------------------------------------------- */

/* Columns come in ranges within ranges: what a range's errors mean for the columns behind it is added within the range that
 * it is in, and beyond that for all of its ranges together. The larger the range, the more columns share a pass over what
 * they are added to. first … end: of one of so many columns in the panel that begins with `panel`. */
static int sweep_range(const struct gptq *g, const struct rounding *r, const struct space *s, int64_t panel,
                       int64_t first, int64_t end, int64_t columns)
{
    const struct backend *b = g->b;
    const struct mat order = order_of(g, r->w->cols);
    int rc = 0;
    if (columns == SWEEP_COLUMNS) {
        const struct mat errors = mat_cols(&s->panel, first - panel, end - first);
        return b->quant->sweep_block(b, r, &order, &s->factor, &s->pool, first, &errors);
    }
    for (int64_t at = first, next; !rc && at < end; at = next) {
        next = least(at + columns / FAN, end);
        rc = sweep_range(g, r, s, panel, at, next, columns / FAN);
        if (rc < 0 || next == end)
            continue;
        const struct mat errors = mat_cols(&s->panel, at - panel, next - at),
                         rows = mat_rows(&s->factor, at, next - at),
                         factor = mat_cols(&rows, next, end - next),
                         behind = mat_cols(&s->pool, next, end - next);
        rc = b->core->matmul(b, 1, &errors, &factor, true, &behind);
    }
    return rc;
}

static int sweep(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    const struct backend *b = g->b;
    const int64_t cols = r->w->cols;
    int rc = b->core->zero(b, &s->pool);
    for (int64_t panel = 0; !rc && panel < cols; panel += PANEL) {
        const int64_t end = least(panel + PANEL, cols);
        rc = sweep_range(g, r, s, panel, panel, end, PANEL);
        if (rc < 0 || end == cols)
            continue;
        const struct mat errors = mat_cols(&s->panel, 0, end - panel),
                         rows = mat_rows(&s->factor, panel, end - panel),
                         factor = mat_cols(&rows, end, cols - end),
                         behind = mat_cols(&s->pool, end, cols - end);
        rc = b->core->matmul(b, 1, &errors, &factor, true, &behind);
    }
    return rc;
}

/* --- refinement ------------------------------------------------------------------------------------------------- */

static struct qmat qmat_rows(const struct qmat *q, int64_t first, int64_t n)
{
    struct qmat part = *q;
    part.packed = mat_rows(&q->packed, first, n);
    part.scales = mat_rows(&q->scales, first, n);
    if (q->zeros.data)
        part.zeros = mat_rows(&q->zeros, first, n);
    return part;
}

/* Some rows' scales: with the codes c of a group as a vector over its columns, ŵ = Σ sᵢ·cᵢ, the row's error is
 * s·A·sᵀ − 2·s·bᵀ + constant, where Aᵢⱼ = cᵢ·H·cⱼᵀ and bᵢ = w·H·cᵢᵀ. */
static int refit_rows(const struct gptq *g, const struct mat *codes, const struct mat *wh,
                      const struct qmat *q, const struct space *s)
{
    const struct backend *b = g->b;
    const int64_t n = codes->rows, cols = codes->cols, groups = q->scales.cols;
    const struct mat normal = mat_rows(&s->normal, 0, n), rhs = mat_rows(&s->rhs, 0, n);
    int rc = b->quant->group_dots(b, wh, codes, q->group, &rhs);
    for (int64_t i = 0; !rc && i < groups; i++) {
        const int64_t first = i * q->group, width = least(q->group, cols - first);
        const struct mat own = mat_cols(codes, first, width), behind = mat_cols(codes, first, cols - first),
                         rows = mat_rows(g->h, first, width), h = mat_cols(&rows, first, cols - first),
                         whole = mat_rows(&s->pool, 0, n), product = mat_cols(&whole, 0, cols - first),
                         a = mat_cols(&normal, i * groups + i, groups - i);
        rc = b->core->matmul(b, 1, &own, &h, false, &product);
        if (!rc)
            rc = b->quant->group_dots(b, &product, &behind, q->group, &a);
    }
    struct numbers *numbers = g->numbers.device;
    return rc ? rc
              : b->quant->solve_scales(b, &normal, &rhs, g->o.search.positive_only, q, &numbers->n_refitted);
}

static int refit(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    int rc = 0;
    for (int64_t row = 0; !rc && row < r->w->rows; row += s->normal.rows) {
        const int64_t n = least(s->normal.rows, r->w->rows - row);
        const struct mat codes = mat_rows(r->codes, row, n), wh = mat_rows(&s->wh, row, n);
        const struct qmat q = qmat_rows(r->q, row, n);
        rc = refit_rows(g, &codes, &wh, &q, s);
    }
    return rc;
}

/* sums[part][sum] = Σ x⊙y over the rows of each part */
static int dots(const struct gptq *g, const struct mat *x, const struct mat *y, enum sum sum)
{
    struct numbers *numbers = g->numbers.device;
    int rc = 0;
    for (int64_t i = 0, row = 0; !rc && i < g->parts->n; row += g->parts->rows[i++]) {
        const struct mat u = mat_rows(x, row, g->parts->rows[i]), v = mat_rows(y, row, g->parts->rows[i]);
        rc = g->b->core->dot(g->b, &u, &v, &numbers->sums[i][sum]);
    }
    return rc;
}

/* Groups that a block of columns holds as a whole have their scales fitted on the way; longer ones before every pass. */
static bool fits_on_the_way(const struct rounding *r)
{
    return SWEEP_COLUMNS % r->q->group == 0 || r->w->cols <= SWEEP_COLUMNS;
}

/* gradient = (W − Ŵ)·H, W − Ŵ being left in the pool */
static int find_gradient(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    const int rc = g->b->quant->residual(g->b, r, &s->pool);
    return rc ? rc : g->b->core->matmul(g->b, 1, &s->pool, g->h, false, &s->gradient);
}

/* H for products whose result needs no more than the activations' precision: a third of the work, as it lies. */
static const struct mat *rough_h(const struct gptq *g, const struct space *s)
{
    return s->rough.rows ? &s->rough : g->h;
}

/* As find_gradient by the rough H, which is enough to report an error by: rows in turns, as many as the changes have memory
 * for. */
static int find_rough_gradient(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    const struct backend *b = g->b;
    const int64_t rows = r->w->rows, cols = r->w->cols, n = s->changes.rows * s->changes.cols / cols;
    if (!s->rough.rows || n < 1)
        return find_gradient(g, r, s);
    int rc = b->quant->residual(b, r, &s->pool);
    for (int64_t row = 0; !rc && row < rows; row += n) {
        const int64_t some = least(n, rows - row);
        const struct mat from = mat_rows(&s->pool, row, some), to = mat_rows(&s->gradient, row, some),
                         x = {s->changes.data, DTYPE_BF16, some, cols, cols};
        rc = b->core->scale(b, 1, &from, false, &x);
        if (!rc)
            rc = b->core->matmul(b, 1, &x, &s->rough, false, &to);
    }
    return rc;
}

/* Of W − Ŵ in the pool and the gradient: Σ (W − Ŵ)⊙(W − Ŵ)·H, and next to it Σ (W − Ŵ)² */
static int measure(const struct gptq *g, const struct space *s, enum sum sum)
{
    const int rc = dots(g, &s->pool, &s->gradient, sum);
    return rc ? rc : dots(g, &s->pool, &s->pool, sum + 1);
}

/* Of every part: weights beyond their codes. */
static int count_clipped(const struct gptq *g, const struct rounding *r)
{
    struct numbers *numbers = g->numbers.device;
    int rc = 0;
    for (int64_t i = 0, row = 0; !rc && i < g->parts->n; row += g->parts->rows[i++]) {
        const int64_t n = g->parts->rows[i];
        const struct mat w = mat_rows(r->w, row, n), codes = mat_rows(r->codes, row, n);
        const struct qmat q = qmat_rows(r->q, row, n);
        rc = g->b->quant->count_clipped(g->b, &(struct rounding){&w, &q, &codes}, &numbers->clipped[i]);
    }
    return rc;
}

/* As sweep_range; within a panel the changes go to a feedback of its own. */
static int descend_range(const struct gptq *g, const struct rounding *r, const struct space *s, int64_t panel,
                         int64_t first, int64_t end, int64_t columns)
{
    const struct backend *b = g->b;
    int rc = 0;
    if (columns == SWEEP_COLUMNS) {
        const struct mat changes = mat_cols(&s->changes, first - panel, end - first),
                         feedback = mat_cols(&s->feedback, first - panel, end - first);
        return b->quant->descend_block(b, r, g->h, &s->gradient, &feedback, first, &changes);
    }
    for (int64_t at = first, next; !rc && at < end; at = next) {
        next = least(at + columns / FAN, end);
        rc = descend_range(g, r, s, panel, at, next, columns / FAN);
        if (rc < 0 || next == end)
            continue;
        const struct mat changes = mat_cols(&s->changes, at - panel, next - at),
                         rows = mat_rows(rough_h(g, s), at, next - at), h = mat_cols(&rows, next, end - next),
                         behind = mat_cols(&s->feedback, next - panel, end - next);
        rc = b->core->matmul(b, -1, &changes, &h, true, &behind);
    }
    return rc;
}

/* One pass over all columns. After each panel the gradient of every column, its own too, is brought up to date by one
 * product. */
static int descend(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    const struct backend *b = g->b;
    const int64_t cols = r->w->cols;
    int rc = 0;
    for (int64_t panel = 0; !rc && panel < cols; panel += PANEL) {
        const int64_t end = least(panel + PANEL, cols);
        const struct mat changes = mat_cols(&s->changes, 0, end - panel),
                         h = mat_rows(rough_h(g, s), panel, end - panel);
        rc = b->core->zero(b, &s->feedback);
        if (!rc)
            rc = descend_range(g, r, s, panel, panel, end, PANEL);
        if (!rc)
            rc = b->core->matmul(b, -1, &changes, &h, true, &s->gradient);
    }
    return rc;
}

static int refine(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    const bool on_the_way = fits_on_the_way(r);
    const int passes = g->o.passes;
    int rc = 0;
    for (int pass = 0; !rc && pass < passes; pass++) {
        if (!on_the_way)
            rc = refit(g, r, s);
        if (!rc)
            rc = work_spent(g->clock, g->b, WORK_REFIT);
        if (!rc && (pass == 0 || !on_the_way))
            rc = find_gradient(g, r, s);
        if (!rc)
            rc = descend(g, r, s);
        if (!rc)
            rc = work_spent(g->clock, g->b, WORK_DESCEND);
    }
    if (!rc && passes && !on_the_way)
        rc = refit(g, r, s);
    return rc ? rc : work_spent(g->clock, g->b, WORK_REFIT);
}

/* --- one weight ------------------------------------------------------------------------------------------------- */

static int choose_scales(const struct gptq *g, const struct mat *w, const struct qmat *q)
{
    const struct scale_spec plain = {g->o.scales, g->o.search.positive_only};
    struct qmat out = *q;
    return g->o.scales == SCALE_WEIGHTED || g->o.scales == SCALE_BLOCK
               ? g->b->quant->search_scales(g->b, w, g->h, &g->o.search, q)
               : g->b->quant->find_scales(g->b, w, &plain, &out);
}

/* W·H and the output's own square, then the error of nearest codes. */
static int measure_nearest(const struct gptq *g, const struct rounding *r, const struct space *s)
{
    const struct backend *b = g->b;
    const bool rough = r->w->dtype == DTYPE_BF16 && fits_on_the_way(r); /* else scales are fitted by W·H */
    int rc = b->core->matmul(b, 1, r->w, rough ? rough_h(g, s) : g->h, false, &s->wh);
    if (!rc)
        rc = dots(g, r->w, &s->wh, SUM_OUTPUT);
    if (!rc)
        rc = dots(g, r->w, r->w, SUM_WEIGHT);
    if (!rc)
        rc = b->quant->round_codes(b, r);
    if (!rc)
        rc = find_rough_gradient(g, r, s);
    if (!rc)
        rc = measure(g, s, SUM_NEAREST);
    return rc ? rc : work_spent(g->clock, b, WORK_MEASURE);
}

/* The damping's part in the squared output errors is taken out again: it stands for inputs that were not there. */
static struct gptq_stats make_stats(const struct gptq *g, int part, double n_weights)
{
    const struct numbers *numbers = g->numbers.host;
    const double *sums = numbers->sums[part];
    const double whole = sums[SUM_OUTPUT] - g->ridge * sums[SUM_WEIGHT];
    const double rounding = g->b->activation == DTYPE_F32 ? 1e-5 : 0x1p-7; /* what it leaves of no inputs */
    const double output = whole > rounding * sums[SUM_OUTPUT] ? whole : 0;
    const double nearest = sums[SUM_NEAREST] - g->ridge * sums[SUM_NEAREST_PLAIN];
    const double error = sums[SUM_ERROR] - g->ridge * sums[SUM_ERROR_PLAIN];
    return (struct gptq_stats){.nearest_error = output > 0 ? fmax(nearest / output, 0) : 0,
                               .error = output > 0 ? fmax(error / output, 0) : 0,
                               .weight_error =
                                   sums[SUM_WEIGHT] > 0 ? sums[SUM_ERROR_PLAIN] / sums[SUM_WEIGHT] : 0,
                               .damping = g->damping,
                               .clipped = (double)numbers->clipped[part] / n_weights,
                               .n_dead = g->n_dead};
}

int gptq_quantize(struct gptq *g, const struct mat *w, const struct qmat *q, const struct gptq_parts *parts,
                  const struct mat *codes, struct gptq_stats *stats)
{
    const struct backend *b = g->b;
    const struct gptq_size size = {w->rows, w->cols, q->group};
    struct space s;
    lay_out(g->memory.ptr, b->activation, &size, &s);
    g->parts = parts;
    if (codes)
        s.codes = *codes;
    const struct rounding r = {w, q, &s.codes};
    int rc = choose_scales(g, w, q);
    if (!rc)
        rc = work_spent(g->clock, b, WORK_SEARCH);
    if (!rc)
        rc = measure_nearest(g, &r, &s);
    if (!rc && g->o.sweep)
        rc = sweep(g, &r, &s);
    if (!rc)
        rc = work_spent(g->clock, b, WORK_SWEEP);
    if (!rc)
        rc = refine(g, &r, &s);
    if (!rc)
        rc = find_rough_gradient(g, &r, &s);
    if (!rc)
        rc = measure(g, &s, SUM_ERROR);
    if (!rc)
        rc = count_clipped(g, &r);
    if (!rc)
        rc = work_spent(g->clock, b, WORK_MEASURE);
    if (!rc)
        rc = b->quant->pack_codes(b, &s.codes, q);
    if (!rc)
        rc = b->core->stage_out(b, &g->numbers, 0, sizeof(struct numbers));
    for (int i = 0; !rc && i < parts->n; i++)
        stats[i] = make_stats(g, i, (double)(parts->rows[i] * w->cols));
    return rc;
}

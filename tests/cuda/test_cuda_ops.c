/* A device against the CPU: the element-wise operations of the forward pass, rotary positions, the split of queries,
 * keys and values; and that a NaN comes through every operation.
 *   test_cuda_ops [DEVICE]      default: cuda:0 */
#include "tests/cuda/parity.h"
#include "tests/cuda/split_case.h"

#include <math.h>

static const enum dtype float_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
/* Gaps between rows: whole pieces of 16 bytes with and without them; and no alignment. */
static const int64_t slacks[] = {0, 8, 3};
/* Rounding to BF16 alone: 1.6e-3, of one element at most 3.9e-3. */
static const double act_bound = 5e-3;

/* --- embed ------------------------------------------------------------------------------------------------------ */

struct embed_args {
    struct twin table, out;
    float scale;
};

static const int32_t embed_ids[] = {0, 49, 7, 7, 31, 0, 48};

static int run_embed(const struct backend *b, enum side s, const void *args)
{
    const struct embed_args *a = args;
    return b->core->embed(b, &a->table.m[s], embed_ids, a->scale, &a->out.m[s]);
}

static void test_embed(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 100, 256, 640, 2560};
    struct outcome o = {"embed", 1e-7, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * 3 * 3; i++) {
        const int64_t cols = widths[i / 9], slack = slacks[i % 3];
        struct embed_args a = {twin_random(float_types[i / 3 % 3], 50, cols, slack, 0.1),
                               twin_make(DTYPE_F32, N_OF(embed_ids), cols, slack),
                               i % 2 ? 1 : sqrtf((float)cols)};
        parity_case(run_embed, &a, &(struct result){&o, &a.out, false}, 1, dtype_name(a.table.initial.dtype));
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

/* --- rms_norm and add_norm -------------------------------------------------------------------------------------- */

struct norm_args {
    struct twin x, w, out; /* w: where has_w; x: where it is not out itself */
    bool has_w, in_place;
    struct norm_spec spec;
};

static int run_norm(const struct backend *b, enum side s, const void *args)
{
    const struct norm_args *a = args;
    return b->core->rms_norm(b, a->in_place ? &a->out.m[s] : &a->x.m[s], a->has_w ? &a->w.m[s] : NULL,
                             &a->spec, &a->out.m[s]);
}

/* Rows from tiny, where eps decides, to large. */
static struct twin norm_input(int dtype, int64_t rows, int64_t cols, int64_t slack)
{
    struct twin t = twin_make(dtype, rows, cols, slack);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            twin_put(&t, r, c, support_uniform(&random_state) * pow(10, (double)(r % 7) - 4));
    twin_upload(&t);
    return t;
}

static void check_norm(struct outcome o[2], int64_t rows, int64_t cols, size_t kind)
{
    const int types[] = {DTYPE_F32, ACT}, x_type = types[kind % 2], out_type = types[kind / 2 % 2];
    const int64_t slack = slacks[kind / 4 % 3];
    struct norm_args a = {
        .has_w = kind / 12 % 4 < 3, .in_place = kind / 48 % 2, .spec = {1e-6f, kind / 96 % 2}};
    char text[120];
    if (a.in_place && x_type != out_type)
        return;
    snprintf(text, sizeof text, "%d × %d, slack %d, weight %d, from %s to %s%s", (int)rows, (int)cols,
             (int)slack, (int)(kind / 12 % 4), x_type == ACT ? "act" : "F32", out_type == ACT ? "act" : "F32",
             a.in_place ? ", in place" : "");
    a.x = norm_input(x_type, rows, cols, slack);
    a.out = a.in_place ? a.x : twin_make(out_type, rows, cols, slack);
    a.w = twin_random(float_types[kind / 12 % 3], 1, cols, 0, 2);
    parity_case(run_norm, &a, &(struct result){&o[out_type == ACT], &a.out, false}, 1, text);
    parity_free();
}

static void test_rms_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 100, 256, 257, 640, 2560, 5376}, heights[] = {1, 33};
    struct outcome o[2] = {{"rms_norm to F32", 2e-6, 0, 0}, {"rms_norm to activations", act_bound, 0, 0}};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 192; i++)
        check_norm(o, heights[i / 192 % 2], widths[i / 384], i % 192);
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

struct add_args {
    struct twin branch, x, out, weights[2];
    bool has_weight[2];
    struct norm_spec spec;
};

static int run_add(const struct backend *b, enum side s, const void *args)
{
    const struct add_args *a = args;
    return b->core->add_norm(b, &a->branch.m[s], a->has_weight[0] ? &a->weights[0].m[s] : NULL, &a->x.m[s],
                             a->has_weight[1] ? &a->weights[1].m[s] : NULL, &a->spec, &a->out.m[s]);
}

static void test_add_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {100, 256, 257, 640, 2560, 5376}, heights[] = {1, 33};
    struct outcome sum = {"add_norm: x", 2e-6, 0, 0}, o = {"add_norm: out", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 4 * 3 * 2; i++) {
        const int64_t cols = widths[i % 6], rows = heights[i / 6 % 2], slack = slacks[i / 48 % 3];
        const size_t weights = i / 12 % 4;
        struct add_args a = {.branch = norm_input(ACT, rows, cols, slack),
                             .x = twin_random(DTYPE_F32, rows, cols, slack, 3),
                             .out = twin_make(ACT, rows, cols, slack),
                             .weights = {twin_random(float_types[i % 3], 1, cols, 0, 2),
                                         twin_random(float_types[i / 3 % 3], 1, cols, 0, 2)},
                             .has_weight = {weights & 1, weights & 2},
                             .spec = {1e-6f, i / 144 % 2}};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, slack %d, weights %d", (int)rows, (int)cols, (int)slack,
                 (int)weights);
        parity_case(run_add, &a, (struct result[]){{&sum, &a.x, false}, {&o, &a.out, false}}, 2, text);
        parity_free();
    }
    parity_print(&sum, "relative L2 error");
    parity_print(&o, "relative L2 error");
}

/* --- rotary positions ------------------------------------------------------------------------------------------- */

struct table_args {
    float inv_freq[256];
    int64_t first_position;
    struct twin table;
};

static int run_table(const struct backend *b, enum side s, const void *args)
{
    const struct table_args *a = args;
    return b->core->rope_table(b, a->inv_freq, a->first_position, &a->table.m[s]);
}

static void test_rope_table(void **state)
{
    (void)state;
    static const int64_t dims[] = {2, 32, 64, 80, 256, 512}, heights[] = {1, 3, 300},
                         firsts[] = {0, 5, 8000, 131000};
    struct outcome o = {"rope_table", 1e-5, 0, 0};
    for (size_t i = 0; i < N_OF(dims) * N_OF(heights) * N_OF(firsts); i++) {
        const int64_t dim = dims[i % 6];
        struct table_args a = {.first_position = firsts[i / 18],
                               .table = twin_make(DTYPE_F32, heights[i / 6 % 3], dim, slacks[i % 3])};
        char text[100];
        snprintf(text, sizeof text, "%d of %d at %d", (int)a.table.initial.rows, (int)dim,
                 (int)a.first_position);
        for (int64_t k = 0; k < dim / 2; k++)
            a.inv_freq[k] = (float)pow(i % 2 ? 10000 : 1000000, -2.0 * (double)k / (double)dim);
        parity_case(run_table, &a, &(struct result){&o, &a.table, true}, 1, text);
        parity_free();
    }
    parity_print(&o, "largest difference");
}

struct split_args {
    struct split_case c; /* the matrices of its spec are set from those below */
    struct twin qkv, rope, q_norm, k_norm, q, keys, values;
};

static int run_split(const struct backend *b, enum side s, const void *args)
{
    const struct split_args *a = args;
    struct qkv_spec spec = a->c.spec;
    spec.q_norm = a->c.q_normed ? &a->q_norm.m[s] : NULL;
    spec.k_norm = a->c.k_normed ? &a->k_norm.m[s] : NULL;
    spec.rope = &a->rope.m[s];
    return b->core->split_qkv(b, &spec, &a->qkv.m[s], &a->q.m[s], a->c.alone ? NULL : &a->keys.m[s],
                              a->c.alone ? NULL : &a->values.m[s]);
}

/* o[1]: of values that are copied, bit for bit */
static void check_split(struct outcome o[2], const struct split_case *c)
{
    const struct heads *h = &c->spec.heads;
    const struct sequences *s = &c->spec.sequences;
    const int64_t kv = h->n_kv_heads * h->head_dim, tokens = s->n * c->length,
                  slots = s->n * s->max_positions + 2, slack = slacks[c->kind % 3];
    struct split_args a = {
        .c = *c,
        .qkv = twin_random(ACT, tokens, c->cols, slack, 3),
        .rope = twin_random(DTYPE_F32, c->length + (int64_t)(c->kind % 2), h->head_dim, slack, 1),
        .q_norm = twin_random(float_types[c->kind % 3], 1, h->head_dim, 0, 1),
        .k_norm = twin_random(float_types[c->kind / 3 % 3], 1, h->head_dim, 0, 1),
        .q = twin_make(ACT, tokens, h->n_heads * h->head_dim, slack),
        .keys = twin_make(ACT, slots, kv, slack),
        .values = twin_make(ACT, slots, kv, slack + 8)};
    const struct result results[] = {
        {&o[0], &a.q, false}, {&o[0], &a.keys, false}, {&o[!c->spec.values_normed], &a.values, false}};
    parity_case(run_split, &a, results, c->alone ? 1 : N_OF(results), c->text);
    parity_free();
}

static void test_split_qkv(void **state)
{
    (void)state;
    struct outcome o[2] = {{"split_qkv: queries, keys, normed values", act_bound, 0, 0},
                           {"split_qkv: values", 0, 0, 0}};
    for (size_t i = 0; i < SPLIT_CASES; i++) {
        const struct split_case c = split_case_of(i);
        check_split(o, &c);
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

/* --- activations ------------------------------------------------------------------------------------------------ */

struct geglu_args {
    struct twin gate, up, out;
};

static int run_geglu(const struct backend *b, enum side s, const void *args)
{
    const struct geglu_args *a = args;
    return b->core->geglu(b, &a->gate.m[s], &a->up.m[s], &a->out.m[s]);
}

/* As the forward pass has it: gate and up side by side, the result in the gate's place; or three matrices. */
static void test_geglu(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 100, 640, 2048, 6912}, heights[] = {1, 9, 70};
    struct outcome o = {"geglu", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * N_OF(heights) * 3 * 2; i++) {
        const int64_t cols = widths[i % 7], rows = heights[i / 7 % 3], slack = slacks[i / 21 % 3];
        const bool in_place = i / 63;
        /* beyond −3 the CPU's 1 + tanh loses digits (test_geglu_extremes allows for that) */
        struct twin both = twin_random(ACT, rows, 2 * cols, slack, 3),
                    out = twin_make(ACT, rows, cols, slack);
        struct geglu_args a = {twin_cols(&both, 0, cols), twin_cols(&both, cols, cols), out};
        char text[100];
        snprintf(text, sizeof text, "%d × %d, slack %d%s", (int)rows, (int)cols, (int)slack,
                 in_place ? ", in place" : "");
        if (in_place)
            a.out = a.gate;
        parity_case(run_geglu, &a, &(struct result){&o, in_place ? &both : &out, false}, 1, text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

/* A row of one gate at a time, so that the large ones do not hide the others. */
static void test_geglu_extremes(void **state)
{
    (void)state;
    enum { COLS = 24 };
    static const double extremes[] = {0, -0.0, 1e-30, -1e-30, 12, -12, 50, -50, 1e4, -1e4, 1e15, -1e15};
    struct outcome o = {"geglu, extreme gates", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(extremes); i++) {
        struct geglu_args a = {twin_make(ACT, 1, COLS, 0), twin_random(ACT, 1, COLS, 0, 2),
                               twin_make(ACT, 1, COLS, 0)};
        char text[40];
        snprintf(text, sizeof text, "gates of %g", extremes[i]);
        for (int64_t c = 0; c < COLS; c++)
            twin_put(&a.gate, 0, c, extremes[i]);
        twin_upload(&a.gate);
        /* the CPU's 1 + tanh leaves 0 of what is 10^-30: both must be next to nothing then */
        if (extremes[i] <= -12)
            parity_case(run_geglu, &a, &(struct result){&(struct outcome){o.op, 1e-5, 0, 0}, &a.out, true}, 1,
                        text);
        else
            parity_case(run_geglu, &a, &(struct result){&o, &a.out, false}, 1, text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

struct over_args {
    struct twin x, y, out;
};

static int run_over(const struct backend *b, enum side s, const void *args)
{
    const struct over_args *a = args;
    return b->core->over_norm(b, &a->x.m[s], &a->y.m[s], &a->out.m[s]);
}

static void test_over_norm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 16, 640, 2560, 10240};
    struct outcome o = {"over_norm", act_bound, 0, 0};
    for (size_t i = 0; i < N_OF(widths) * 2 * 3; i++) {
        const int64_t cols = widths[i % 6], y_cols = i / 6 % 2 ? 640 : 33, slack = slacks[i / 12];
        struct over_args a = {twin_random(ACT, 21, cols, slack, 3), twin_random(ACT, 21, y_cols, slack, 50),
                              twin_make(ACT, 21, cols, slack)};
        for (int64_t c = 0; c < y_cols; c++)
            twin_put(&a.y, 7, c, 0);
        twin_upload(&a.y);
        char text[80];
        snprintf(text, sizeof text, "%d over %d, slack %d", (int)cols, (int)y_cols, (int)slack);
        parity_case(run_over, &a, &(struct result){&o, &a.out, false}, 1, text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

struct scale_args {
    struct twin x, out;
    float factor;
    bool add;
};

static int run_scale(const struct backend *b, enum side s, const void *args)
{
    const struct scale_args *a = args;
    return b->core->scale(b, a->factor, &a->x.m[s], a->add, &a->out.m[s]);
}

/* From the residual stream to activations, back onto it, in place. */
static void test_scale(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 15, 256, 2560};
    struct outcome o[2] = {{"scale", act_bound, 0, 0}, {"scale, in F32", 1e-6, 0, 0}};
    for (size_t i = 0; i < N_OF(widths) * 2 * 2 * 2 * 2; i++) {
        const bool from_act = i / 4 % 2, to_act = i / 8 % 2, in_place = from_act == to_act && i / 32;
        const int64_t cols = widths[i % 4];
        struct scale_args a = {twin_random(from_act ? ACT : DTYPE_F32, 21, cols, slacks[i % 3], 3),
                               twin_random(to_act ? ACT : DTYPE_F32, 21, cols, slacks[i % 2], 3),
                               i % 3 ? 1 : 0.0045f, i / 16 % 2};
        if (in_place)
            a.out = a.x;
        char text[80];
        snprintf(text, sizeof text, "%d columns, %s to %s%s%s", (int)cols, from_act ? "act" : "F32",
                 to_act ? "act" : "F32", a.add ? ", added" : "", in_place ? ", in place" : "");
        parity_case(run_scale, &a, &(struct result){&o[!to_act], &a.out, false}, 1, text);
        parity_free();
    }
    parity_print(&o[0], "relative L2 error");
    parity_print(&o[1], "relative L2 error");
}

struct softcap_args {
    struct twin x;
    float cap;
};

static int run_softcap(const struct backend *b, enum side s, const void *args)
{
    const struct softcap_args *a = args;
    return b->core->softcap(b, &a->x.m[s], a->cap);
}

static void test_softcap(void **state)
{
    (void)state;
    static const double amplitudes[] = {1e-3, 1, 50, 1e4};
    struct outcome o = {"softcap", 1e-6, 0, 0};
    for (size_t i = 0; i < N_OF(amplitudes) * 3 * 2; i++) {
        struct softcap_args a = {
            twin_random(DTYPE_F32, 3, i % 2 ? 101 : 262144, slacks[i / 2 % 3], amplitudes[i / 6]),
            i % 2 ? 30 : 50};
        char text[100];
        snprintf(text, sizeof text, "3 × %d up to %g", (int)a.x.initial.cols, amplitudes[i / 6]);
        parity_case(run_softcap, &a, &(struct result){&o, &a.x, false}, 1, text);
        parity_free();
    }
    parity_print(&o, "relative L2 error");
}

/* --- what must not pass unseen ---------------------------------------------------------------------------------- */

/* The device's result at one place. */
static double seen(const struct twin *t, int64_t row, int64_t col)
{
    struct mat m = t->initial;
    m.data = room(twin_bytes(t), 1);
    twin_download(t, m.data);
    return naive_element(&m, row, col);
}

/* One row whose column `nan` is a NaN. */
static struct twin with_nan(int dtype, int64_t rows, int64_t cols, int64_t row, int64_t nan)
{
    struct twin t = twin_random(dtype, rows, cols, 0, 1);
    twin_put(&t, row, nan, NAN);
    twin_upload(&t);
    return t;
}

static void test_nan_stays_in_a_row(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct norm_spec norm = {1e-6f, true};
    const struct twin a = with_nan(ACT, 1, 64, 0, 33), up = twin_random(ACT, 1, 64, 0, 1),
                      x = twin_random(DTYPE_F32, 1, 64, 0, 1), out = twin_make(ACT, 1, 64, 0);
    assert_ok(b->core->geglu(b, &a.m[DEVICE], &up.m[DEVICE], &out.m[DEVICE]));
    assert_true(isnan(seen(&out, 0, 33)) && isfinite(seen(&out, 0, 32)));
    assert_ok(b->core->geglu(b, &up.m[DEVICE], &a.m[DEVICE], &out.m[DEVICE]));
    assert_true(isnan(seen(&out, 0, 33)) && isfinite(seen(&out, 0, 32)));
    assert_ok(b->core->rms_norm(b, &a.m[DEVICE], NULL, &norm, &out.m[DEVICE]));
    assert_true(isnan(seen(&out, 0, 33)) && isnan(seen(&out, 0, 0)));
    assert_ok(b->core->add_norm(b, &a.m[DEVICE], NULL, &x.m[DEVICE], NULL, &norm, &out.m[DEVICE]));
    assert_true(isnan(seen(&x, 0, 0)) && isnan(seen(&x, 0, 33)) && isnan(seen(&out, 0, 63)));
    const struct twin cap = with_nan(DTYPE_F32, 1, 64, 0, 5);
    assert_ok(b->core->softcap(b, &cap.m[DEVICE], 30));
    assert_true(isnan(seen(&cap, 0, 5)) && isfinite(seen(&cap, 0, 6)));
    const struct twin table = with_nan(DTYPE_BF16, 3, 64, 1, 9), rows = twin_make(DTYPE_F32, 2, 64, 0);
    assert_ok(b->core->embed(b, &table.m[DEVICE], (const int32_t[]){1, 2}, 4, &rows.m[DEVICE]));
    assert_true(isnan(seen(&rows, 0, 9)) && isfinite(seen(&rows, 0, 8)) && isfinite(seen(&rows, 1, 9)));
}

static void test_nan_stays_in_heads(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct twin qkv = with_nan(ACT, 1, 192, 0, 70), rope = twin_random(DTYPE_F32, 1, 64, 0, 1),
                      q = twin_make(ACT, 1, 64, 0), keys = twin_make(ACT, 1, 64, 0),
                      values = twin_make(ACT, 1, 64, 0);
    struct qkv_spec split = {{1, 1, 64}, {1, 0, 1}, {1e-6f, true}, NULL, NULL, &rope.m[DEVICE], false, false};
    assert_ok(
        b->core->split_qkv(b, &split, &qkv.m[DEVICE], &q.m[DEVICE], &keys.m[DEVICE], &values.m[DEVICE]));
    assert_true(isnan(seen(&keys, 0, 6)) && isnan(seen(&keys, 0, 38)) && isfinite(seen(&keys, 0, 5)));
    assert_true(isfinite(seen(&q, 0, 6)) && isfinite(seen(&values, 0, 6)));
    const struct twin norm = twin_random(DTYPE_BF16, 1, 64, 0, 1);
    split.k_norm = &norm.m[DEVICE];
    assert_ok(
        b->core->split_qkv(b, &split, &qkv.m[DEVICE], &q.m[DEVICE], &keys.m[DEVICE], &values.m[DEVICE]));
    assert_true(isnan(seen(&keys, 0, 5)) && isfinite(seen(&q, 0, 6)));
    /* attention: in the query, a key, a value; few new tokens and many */
    for (int64_t n = 1; n <= 20; n += 19)
        for (int where = 0; where < 3; where++) {
            const struct attention_spec spec = {{1, 1, 64}, {1, 39, 39 + n}, 0.125f, 0, 0};
            const int64_t slots = 39 + n, row = where ? 20 : 0;
            const struct twin bad = with_nan(ACT, where ? slots : n, 64, row, 33),
                              query = where ? twin_random(ACT, n, 64, 0, 1) : bad,
                              key = where == 1 ? bad : twin_random(ACT, slots, 64, 0, 1),
                              value = where == 2 ? bad : twin_random(ACT, slots, 64, 0, 1),
                              out = twin_make(ACT, n, 64, 0);
            assert_ok(b->core->attention(b, &spec, &query.m[DEVICE], &key.m[DEVICE], &value.m[DEVICE],
                                         &out.m[DEVICE], NULL));
            for (int64_t c = 0; where < 2 && c < 64; c++)
                assert_true(isnan(seen(&out, 0, c)));
            assert_true(isnan(seen(&out, where ? n - 1 : 0, 33)));
            parity_free();
        }
}

static void test_nan_stays_in_products(void **state)
{
    (void)state;
    const struct backend *b = &side[DEVICE];
    const struct qmat packed = make_packed(&(struct q_kind){4, 32, false}, 40, 64);
    const struct twin_q q = twin_q_of(&packed);
    for (int64_t rows = 2; rows <= 40; rows += 38)
        for (int type = 0; type < 2; type++) {
            const struct twin x = twin_random(ACT, rows, 64, 0, 1), bad = with_nan(ACT, rows, 64, 1, 33),
                              w = twin_random(DTYPE_BF16, 40, 64, 0, 1),
                              bad_w = with_nan(DTYPE_BF16, 40, 64, 7, 3),
                              out = twin_make(type ? ACT : DTYPE_F32, rows, 40, 0);
            assert_ok(b->core->gemm(b, &bad.m[DEVICE], &w.m[DEVICE], &out.m[DEVICE]));
            assert_true(isnan(seen(&out, 1, 0)) && isnan(seen(&out, 1, 39)) && isfinite(seen(&out, 0, 0)));
            assert_ok(b->core->gemm(b, &x.m[DEVICE], &bad_w.m[DEVICE], &out.m[DEVICE]));
            assert_true(isnan(seen(&out, 0, 7)) && isnan(seen(&out, rows - 1, 7)) &&
                        isfinite(seen(&out, 0, 6)));
            assert_ok(b->core->q_gemm(b, &bad.m[DEVICE], &q.m[DEVICE], &out.m[DEVICE]));
            assert_true(isnan(seen(&out, 1, 0)) && isnan(seen(&out, 1, 39)) && isfinite(seen(&out, 0, 0)));
        }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_embed, parity_clean_up),
        cmocka_unit_test_teardown(test_rms_norm, parity_clean_up),
        cmocka_unit_test_teardown(test_add_norm, parity_clean_up),
        cmocka_unit_test_teardown(test_rope_table, parity_clean_up),
        cmocka_unit_test_teardown(test_split_qkv, parity_clean_up),
        cmocka_unit_test_teardown(test_geglu, parity_clean_up),
        cmocka_unit_test_teardown(test_over_norm, parity_clean_up),
        cmocka_unit_test_teardown(test_geglu_extremes, parity_clean_up),
        cmocka_unit_test_teardown(test_scale, parity_clean_up),
        cmocka_unit_test_teardown(test_softcap, parity_clean_up),
        cmocka_unit_test_teardown(test_nan_stays_in_a_row, parity_clean_up),
        cmocka_unit_test_teardown(test_nan_stays_in_heads, parity_clean_up),
        cmocka_unit_test_teardown(test_nan_stays_in_products, parity_clean_up),
    };
    return parity_main(argc, argv, tests, N_OF(tests));
}

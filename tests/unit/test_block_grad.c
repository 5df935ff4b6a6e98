/* A block's forward pass that keeps what its backward pass needs, against the runtime's own; and its gradients against
 * central differences of a forward pass in double, written for this test. The model is made up (tiny_gemma.h), its
 * weights are F32. */
#include "runtime/block_grad.h"
#include "runtime/forward.h"
#include "tests/unit/cutting.h"
#include "tests/unit/forward_support.h"
#include "tests/unit/naive.h"

#include <math.h>

/* A sliding layer's window is shorter than a sequence; every second layer is global. */
static const struct tiny_gemma small = {.hidden = 48,
                                        .ffn = 72,
                                        .vocab = 64,
                                        .layers = 4,
                                        .heads = 4,
                                        .kv_heads = 2,
                                        .head_dim = 16,
                                        .dtype = DTYPE_F32,
                                        .window = 4,
                                        .pattern = 2};

#define TYPES4                                                                                                  \
    "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"], " \
    "\"global_head_dim\": 32, "

/* The same of the other families: branches without norms; capped scores; layers that share keys and values, differ in
 * width and have inputs of their own; values that are keys. */
static const struct {
    const char *name, *model_type, *more;
} kinds[] = {
    {"small", NULL, NULL},
    {"small1", "gemma", NULL},
    {"small2", "gemma2", "\"query_pre_attn_scalar\": 12, \"attn_logit_softcapping\": 0.7,"},
    {"small4", "gemma4_text",
     TYPES4 "\"num_kv_shared_layers\": 2, \"use_double_wide_mlp\": true, "
            "\"hidden_size_per_layer_input\": 8,"},
    {"small4v", "gemma4_text", TYPES4 "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0,"},
};
enum { PLAIN = 0 };

enum { SEQUENCES = 2, LENGTH = 11, TOKENS = SEQUENCES * LENGTH, SAMPLES = 200 };

static const char *const set_names[N_FUSED] = {"qkv", "o", "gate_up", "down"};

struct loaded {
    const struct backend *b;
    struct model model;
    struct weights weights;
    struct mat rope[2]; /* of global and of sliding layers */
    void *memory;       /* of the tape */
    struct block_tape tape;
    struct mat input, keys, values; /* that the block is given; data NULL: none */
};

static struct linear_set *set_of(struct block *k, int set)
{
    struct linear_set *const sets[N_FUSED] = {&k->qkv, &k->o, &k->gate_up, &k->down};
    return sets[set];
}

/* The made-up weights are small; four times as large, gates and scores leave the range where everything is a line. */
static void enlarge(struct weights *w)
{
    for (int layer = 0; layer < small.layers; layer++)
        for (int s = 0; s < N_FUSED; s++) {
            const struct linear_set *set = set_of(&w->blocks[layer], s);
            assert_true(set->fused && set->whole.weight.dtype == DTYPE_F32);
            float *data = set->whole.weight.data;
            for (int64_t i = 0; i < set->whole.weight.rows * set->whole.weight.cols; i++)
                data[i] *= 4;
        }
}

static void load(struct loaded *l, int kind)
{
    struct tiny_gemma g = small;
    g.model_type = kinds[kind].model_type;
    g.more = kinds[kind].more;
    *l = (struct loaded){.b = &cpu[1]};
    assert_ok(model_open(&l->model, cutting_model(kinds[kind].name, &g)));
    assert_ok(model_bind(&l->model, NULL, NULL));
    assert_ok(weights_load(&l->weights, &l->model, l->b));
    enlarge(&l->weights);
    for (int i = 0; i < 2; i++) {
        l->rope[i] = make(DTYPE_F32, LENGTH, l->weights.config.rope_dim[i]);
        assert_ok(l->b->core->rope_table(l->b, l->weights.inv_freq[i], 0, &l->rope[i]));
    }
    const uint64_t bytes = block_tape_bytes(&l->weights.config, DTYPE_F32, SEQUENCES, LENGTH);
    l->memory = room((size_t)bytes, 1);
    memset(l->memory, 0xff, (size_t)bytes);
}

static void unload(struct loaded *l)
{
    weights_free(&l->weights);
    model_close(&l->model);
    free_matrices();
}

static void run_forward(struct loaded *l, int layer, const struct mat *x)
{
    assert_true(
        block_tape_place(&l->tape, &l->weights.config, layer, DTYPE_F32, l->memory, SEQUENCES, LENGTH) > 0);
    l->tape.rope = &l->rope[l->weights.blocks[layer].rope];
    copy(x, &l->tape.x);
    if (l->input.data)
        copy(&l->input, &l->tape.input.input);
    if (l->keys.data) {
        copy(&l->keys, &l->tape.keys);
        copy(&l->values, &l->tape.values);
    }
    assert_ok(block_grad_forward(&l->weights, layer, &l->tape));
}

static void run_backward(struct loaded *l, int layer, const struct mat *dout, bool add, bool with_input,
                         const struct block_grads *g)
{
    copy(dout, &l->tape.dx);
    assert_ok(block_grad_backward(&l->weights, layer, &l->tape, add, with_input, g));
}

static struct block_grads make_grads(struct loaded *l, int layer)
{
    struct block_grads g;
    for (int s = 0; s < N_FUSED; s++) {
        const struct mat *w = &set_of(&l->weights.blocks[layer], s)->whole.weight;
        g.sets[s] = make(DTYPE_F32, w->rows, w->cols);
    }
    return g;
}

/* --- the forward pass ----------------------------------------------------------------------------------------------- */

struct stream {
    struct mat x[8]; /* before the blocks, and behind each */
};

static int observe(void *ctx, int layer, const struct mat *x)
{
    copy(x, &((struct stream *)ctx)->x[layer + 1]);
    return 0;
}

/* The layer's own input, as the forward pass makes it of the ids. x: before the first block */
static void make_input(struct loaded *l, int layer, const int32_t *ids, const struct mat *x)
{
    const int64_t ple = l->weights.config.ple_size;
    if (!ple)
        return;
    const struct block_input in = {.table = l->weights.per_layer.table,
                                   .ids = ids,
                                   .x0 = *x,
                                   .sum = make(DTYPE_F32, TOKENS, ple),
                                   .input = make(DTYPE_F32, TOKENS, ple),
                                   .gate = make(DTYPE_F32, TOKENS, ple)};
    assert_ok(block_make_input(&l->weights, layer, &in));
    l->input = in.input;
}

/* Keys and values that a layer made, for those that share them; donors: by kind. */
static void pass_on(struct loaded *l, int layer, struct mat donors[2][GEMMA_KINDS])
{
    const struct block *k = &l->weights.blocks[layer];
    if (k->kv_source != layer)
        return;
    donors[0][k->rope] = make(DTYPE_F32, TOKENS, l->tape.keys.cols);
    donors[1][k->rope] = make(DTYPE_F32, TOKENS, l->tape.values.cols);
    copy(&l->tape.keys, &donors[0][k->rope]);
    copy(&l->tape.values, &donors[1][k->rope]);
}

/* The same operations on the same operands: the same bytes. */
static void check_forward(int kind)
{
    struct loaded l;
    struct stream stream;
    struct forward *f;
    struct mat hidden;
    int32_t ids[TOKENS];
    struct mat donors[2][GEMMA_KINDS];
    load(&l, kind);
    for (int i = 0; i < TOKENS; i++)
        ids[i] = (int32_t)(support_random(&random_state) % (uint64_t)small.vocab);
    for (int i = 0; i <= small.layers; i++)
        stream.x[i] = make(DTYPE_F32, TOKENS, small.hidden);
    assert_ok(l.b->core->embed(l.b, &l.weights.embedding, ids, sqrtf((float)small.hidden), &stream.x[0]));
    assert_ok(forward_open(&f, &l.weights, &(struct forward_size){SEQUENCES, LENGTH, LENGTH}));
    forward_observe(f, observe, &stream);
    assert_ok(forward_run(f, ids, LENGTH, &hidden));
    for (int layer = 0; layer < small.layers; layer++) {
        const struct block *k = &l.weights.blocks[layer];
        const bool shares = k->kv_source != layer;
        make_input(&l, layer, ids, &stream.x[0]);
        l.keys = shares ? donors[0][k->rope] : (struct mat){0};
        l.values = shares ? donors[1][k->rope] : (struct mat){0};
        run_forward(&l, layer, &stream.x[layer]);
        pass_on(&l, layer, donors);
        for (int64_t r = 0; r < TOKENS; r++)
            assert_memory_equal((float *)l.tape.out.data + r * l.tape.out.stride,
                                (float *)stream.x[layer + 1].data + r * stream.x[layer + 1].stride,
                                (size_t)small.hidden * sizeof(float));
    }
    forward_close(f);
    unload(&l);
}

static void test_forward(void **state)
{
    (void)state;
    for (int kind = 0; kind < (int)N_OF(kinds); kind++)
        check_forward(kind);
}

/* --- in double ------------------------------------------------------------------------------------------------------ */

/* A block with its weights and what it reads in double; the loss is Σ dout⊙block(x). */
struct naive_block {
    const struct block *k;
    struct norm_spec spec;
    const struct mat *rope;
    double *sets[N_FUSED], *x, *dout;  /* as struct linear_set has them; [TOKENS, hidden] */
    double *input, *gate, *projection; /* of the layer's own input; NULL: it has none */
    double *keys, *values;             /* of another layer; NULL: its own */
    double *out;
};

enum {
    HIDDEN = 48,
    HEADS = 4,
    KV_HEADS = 2,
    PLE = 8,
    MAX_DIM = 32,
    MAX_FFN = 144,
    MAX_KV = TOKENS * KV_HEADS * MAX_DIM
};

static void linear(const double *x, int64_t cols, const double *w, int64_t rows, double *out)
{
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < cols; c++)
                sum += x[t * cols + c] * w[r * cols + c];
            out[t * rows + r] = sum;
        }
}

/* w->data NULL: no norm */
static void norm_rows(const struct naive_block *n, const double *x, const struct mat *w, double *out)
{
    for (int64_t t = 0; t < TOKENS; t++)
        if (w->data)
            naive_norm_row(x + t * HIDDEN, HIDDEN, w, &n->spec, out + t * HIDDEN);
}

static void turn(const struct naive_block *n, int64_t token, double *x)
{
    const int half = n->k->head_dim / 2;
    for (int i = 0; i < half; i++) {
        const double c = (double)at(n->rope, token, i), s = (double)at(n->rope, token, half + i);
        const double a = x[i], b = x[half + i];
        x[i] = a * c - b * s;
        x[half + i] = b * c + a * s;
    }
}

/* A head as it is projected, normed and turned. */
static void place_head(const struct naive_block *n, int64_t token, const struct mat *norm, const double *x,
                       double *out)
{
    memcpy(out, x, (size_t)n->k->head_dim * sizeof *out);
    if (norm->data)
        naive_norm_row(x, n->k->head_dim, norm, &n->spec, out);
    turn(n, token % LENGTH, out);
}

/* q, keys, values: [TOKENS, heads·dim] */
static void split(const struct naive_block *n, const double *qkv, double *q, double *keys, double *values)
{
    const int64_t d = n->k->head_dim,
                  parts = !keys          ? 0
                          : n->k->k_is_v ? 1
                                         : 2,
                  cols = (HEADS + parts * KV_HEADS) * d;
    for (int64_t t = 0; t < TOKENS; t++) {
        const double *x = qkv + t * cols, *k = x + HEADS * d, *v = k + (parts - 1) * KV_HEADS * d;
        for (int h = 0; h < HEADS; h++)
            place_head(n, t, &n->k->q_norm, x + h * d, q + (t * HEADS + h) * d);
        for (int h = 0; keys && h < KV_HEADS; h++) {
            double *to = values + (t * KV_HEADS + h) * d;
            place_head(n, t, &n->k->k_norm, k + h * d, keys + (t * KV_HEADS + h) * d);
            memcpy(to, v + h * d, (size_t)d * sizeof *to);
            if (n->k->values_normed)
                naive_norm_row(to, d, NULL, &n->spec, to);
        }
    }
}

/* One query of one head. */
static void attend(const struct naive_block *n, const double *q, const double *keys, const double *values,
                   int64_t row, int head, double *out)
{
    const int64_t token = row % LENGTH, first = row - token, d = n->k->head_dim;
    const int64_t from = n->k->window && token >= n->k->window ? token - n->k->window + 1 : 0;
    const int64_t shift = head / (HEADS / KV_HEADS) * d;
    double p[LENGTH], total = 0;
    for (int64_t t = from; t <= token; t++) {
        double sum = 0;
        for (int i = 0; i < d; i++)
            sum += q[(row * HEADS + head) * d + i] * keys[(first + t) * KV_HEADS * d + shift + i];
        sum *= (double)n->k->score_scale;
        const double cap = (double)n->k->softcap;
        total += p[t] = exp(cap > 0 ? cap * tanh(sum / cap) : sum);
    }
    for (int i = 0; i < d; i++) {
        out[i] = 0;
        for (int64_t t = from; t <= token; t++)
            out[i] += p[t] / total * values[(first + t) * KV_HEADS * d + shift + i];
    }
}

static void attention(const struct naive_block *n, const double *normed, double *out)
{
    static double qkv[TOKENS * (HEADS + 2 * KV_HEADS) * MAX_DIM], q[TOKENS * HEADS * MAX_DIM], keys[MAX_KV],
        values[MAX_KV];
    const int64_t d = n->k->head_dim, parts = n->keys ? 0 : n->k->k_is_v ? 1 : 2;
    linear(normed, HIDDEN, n->sets[FUSED_QKV], (HEADS + parts * KV_HEADS) * d, qkv);
    split(n, qkv, q, n->keys ? NULL : keys, values);
    for (int64_t t = 0; t < TOKENS; t++)
        for (int h = 0; h < HEADS; h++)
            attend(n, q, n->keys ? n->keys : keys, n->keys ? n->values : values, t, h,
                   out + (t * HEADS + h) * d);
}

static double gelu(double z)
{
    return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
}

/* out += the layer's own input through its gate */
static void add_input(const struct naive_block *n)
{
    double gate[TOKENS * PLE], branch[TOKENS * HIDDEN];
    linear(n->out, HIDDEN, n->gate, PLE, gate);
    for (int i = 0; i < TOKENS * PLE; i++)
        gate[i] = gelu(gate[i]) * n->input[i];
    linear(gate, PLE, n->projection, HIDDEN, branch);
    norm_rows(n, branch, &n->k->ple_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] += branch[i];
}

static double loss(const void *ctx)
{
    const struct naive_block *n = ctx;
    static double normed[TOKENS * HIDDEN], attended[TOKENS * HEADS * MAX_DIM], branch[TOKENS * HIDDEN],
        gate_up[TOKENS * 2 * MAX_FFN], inner[TOKENS * MAX_FFN];
    const int64_t ffn = n->k->inner;
    norm_rows(n, n->x, &n->k->input_norm, normed);
    attention(n, normed, attended);
    linear(attended, HEADS * n->k->head_dim, n->sets[FUSED_O], HIDDEN, branch);
    norm_rows(n, branch, &n->k->post_attention_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] = n->x[i] + branch[i];
    norm_rows(n, n->out, &n->k->pre_mlp_norm, normed);
    linear(normed, HIDDEN, n->sets[FUSED_GATE_UP], 2 * ffn, gate_up);
    for (int64_t i = 0; i < TOKENS * ffn; i++) {
        const double *row = gate_up + i / ffn * 2 * ffn + i % ffn;
        inner[i] = gelu(row[0]) * row[ffn];
    }
    linear(inner, ffn, n->sets[FUSED_DOWN], HIDDEN, branch);
    norm_rows(n, branch, &n->k->post_mlp_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] += branch[i];
    if (n->input)
        add_input(n);
    double sum = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        sum += n->dout[i] * (n->out[i] *= (double)n->k->scalar);
    return sum;
}

/* --- the backward pass ---------------------------------------------------------------------------------------------- */

/* Samples of one gradient against differences by the elements of `values`, which the loss reads. */
static void check_samples(struct outcome *o, const struct naive_block *n, double *values,
                          const struct mat *got, const char *text)
{
    double error = 0, size = 0;
    for (int i = 0; i < SAMPLES; i++) {
        const int64_t k = (int64_t)(support_random(&random_state) % (uint64_t)(got->rows * got->cols));
        const double expected = naive_slope(loss, n, &values[k], 1e-4),
                     e = (double)at(got, k / got->cols, k % got->cols) - expected;
        error += e * e;
        size += expected * expected;
    }
    const double relative = sqrt(error / size);
    if (!(relative <= o->bound))
        fail_msg("%s: %s: relative L2 error %.3e, at most %.1e allowed", o->op, text, relative, o->bound);
    o->worst = relative > o->worst ? relative : o->worst;
    o->cases++;
}

static void check_layer(struct outcome *forward, struct outcome *by_weight, struct outcome *by_input,
                        struct loaded *l, int layer)
{
    struct block *k = &l->weights.blocks[layer];
    const bool shares = k->kv_source != layer, inputs = k->ple_gate.data;
    const int64_t kv = KV_HEADS * (int64_t)k->head_dim;
    l->input = inputs ? make_random(DTYPE_F32, TOKENS, PLE, 2) : (struct mat){0};
    l->keys = shares ? make_random(DTYPE_F32, TOKENS, kv, 1) : (struct mat){0};
    l->values = shares ? make_random(DTYPE_F32, TOKENS, kv, 1) : (struct mat){0};
    const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                     dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1),
                     out = make(DTYPE_F32, TOKENS, small.hidden);
    struct naive_block n = {.k = k,
                            .spec = block_norm(&l->weights.config),
                            .input = inputs ? naive_rows(&l->input) : NULL,
                            .gate = inputs ? naive_rows(&k->ple_gate) : NULL,
                            .projection = inputs ? naive_rows(&k->ple_projection) : NULL,
                            .keys = shares ? naive_rows(&l->keys) : NULL,
                            .values = shares ? naive_rows(&l->values) : NULL,
                            .rope = &l->rope[k->rope],
                            .x = naive_rows(&x),
                            .dout = naive_rows(&dout),
                            .out = zeros(TOKENS * small.hidden)};
    const struct block_grads g = make_grads(l, layer);
    for (int s = 0; s < N_FUSED; s++)
        n.sets[s] = naive_rows(&set_of(k, s)->whole.weight);
    run_forward(l, layer, &x);
    copy(&l->tape.out, &out);
    loss(&n);
    check(forward, &out, n.out, 0, "the block");
    run_backward(l, layer, &dout, false, true, &g);
    for (int s = 0; s < N_FUSED; s++)
        check_samples(by_weight, &n, n.sets[s], &g.sets[s], set_names[s]);
    check_samples(by_input, &n, n.x, &l->tape.dx, "x");
}

static void test_gradients(void **state)
{
    (void)state;
    struct outcome forward = {"block_grad_forward", 2e-6, 0, 0}, by_weight = {"by the weights", 1e-5, 0, 0},
                   by_input = {"by the input", 1e-5, 0, 0};
    for (int kind = 0; kind < (int)N_OF(kinds); kind++) {
        struct loaded l;
        load(&l, kind);
        const bool sliding = l.weights.blocks[0].window == small.window;
        assert_true(sliding == (kind != 1) && l.weights.blocks[3].window == 0);
        for (int layer = 0; layer < small.layers; layer++)
            check_layer(&forward, &by_weight, &by_input, &l, layer);
        unload(&l);
    }
    print_outcome(&forward);
    print_outcome(&by_weight);
    print_outcome(&by_input);
}

/* --- what is added, wanted, fused ------------------------------------------------------------------------------------ */

static void check_grads(struct outcome *o, const struct block_grads *got, const struct block_grads *first,
                        const struct block_grads *second, const char *text)
{
    for (int s = 0; s < N_FUSED; s++) {
        double *expected = naive_rows(&first->sets[s]);
        const double *more = second ? naive_rows(&second->sets[s]) : NULL;
        for (int64_t i = 0; more && i < first->sets[s].rows * first->sets[s].cols; i++)
            expected[i] += more[i];
        check(o, &got->sets[s], expected, 0, text);
    }
}

/* A second batch adds to the first one's gradients. */
static void test_add(void **state)
{
    (void)state;
    struct outcome o = {"gradients of two batches", 1e-6, 0, 0};
    struct loaded l;
    load(&l, PLAIN);
    const struct block_grads each[] = {make_grads(&l, 1), make_grads(&l, 1)}, both = make_grads(&l, 1);
    for (int i = 0; i < 2; i++) {
        const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                         dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1);
        run_forward(&l, 1, &x);
        run_backward(&l, 1, &dout, false, true, &each[i]);
        run_forward(&l, 1, &x);
        run_backward(&l, 1, &dout, i > 0, true, &both);
    }
    check_grads(&o, &both, &each[0], &each[1], "both");
    unload(&l);
    print_outcome(&o);
}

/* What is not wanted changes nothing of the rest, to the byte. */
static void test_unwanted(void **state)
{
    (void)state;
    struct loaded l;
    load(&l, PLAIN);
    const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                     dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1),
                     dx = make(DTYPE_F32, TOKENS, small.hidden);
    const struct block_grads all = make_grads(&l, 2);
    run_forward(&l, 2, &x);
    run_backward(&l, 2, &dout, false, true, &all);
    copy(&l.tape.dx, &dx);
    for (int wanted = 0; wanted < 1 << N_FUSED; wanted++)
        for (int with_input = 0; with_input < 2; with_input++) {
            struct block_grads some = make_grads(&l, 2);
            for (int s = 0; s < N_FUSED; s++)
                if (!(wanted >> s & 1))
                    some.sets[s].data = NULL;
            run_forward(&l, 2, &x);
            run_backward(&l, 2, &dout, false, with_input, &some);
            for (int s = 0; s < N_FUSED; s++)
                if (some.sets[s].data)
                    assert_memory_equal(some.sets[s].data, all.sets[s].data,
                                        (size_t)(all.sets[s].rows * all.sets[s].stride) * sizeof(float));
            for (int64_t r = 0; with_input && r < TOKENS; r++)
                assert_memory_equal((float *)l.tape.dx.data + r * l.tape.dx.stride,
                                    (float *)dx.data + r * dx.stride, (size_t)dx.cols * sizeof(float));
        }
    unload(&l);
}

/* Linears of a set that lie apart, as those of different types do. */
static void test_apart(void **state)
{
    (void)state;
    struct outcome o = {"linears of a set one by one", 1e-6, 0, 0};
    struct loaded l;
    load(&l, PLAIN);
    const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                     dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1),
                     dx = make(DTYPE_F32, TOKENS, small.hidden);
    const struct block_grads whole = make_grads(&l, 0), apart = make_grads(&l, 0);
    run_forward(&l, 0, &x);
    run_backward(&l, 0, &dout, false, true, &whole);
    copy(&l.tape.dx, &dx);
    for (int s = 0; s < N_FUSED; s++)
        set_of(&l.weights.blocks[0], s)->fused = false;
    run_forward(&l, 0, &x);
    run_backward(&l, 0, &dout, false, true, &apart);
    check_grads(&o, &apart, &whole, NULL, "by the weights");
    const double *expected = naive_rows(&dx);
    copy(&l.tape.dx, &dx);
    check(&o, &dx, expected, 0, "by the input");
    unload(&l);
    print_outcome(&o);
}

static int open_all(void **state)
{
    const int rc = support_make_folder(state);
    return rc ? rc : open_backends(state);
}

static int close_all(void **state)
{
    close_backends(state);
    return support_remove_folder(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_forward, clean_up),
        cmocka_unit_test_teardown(test_gradients, clean_up),
        cmocka_unit_test_teardown(test_add, clean_up),
        cmocka_unit_test_teardown(test_unwanted, clean_up),
        cmocka_unit_test_teardown(test_apart, clean_up),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

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

/* The same of the other families that have a backward pass: branches without norms, capped scores. */
static const struct {
    const char *name, *model_type, *more;
} kinds[] = {
    {"small", NULL, NULL},
    {"small1", "gemma", NULL},
    {"small2", "gemma2", "\"query_pre_attn_scalar\": 12, \"attn_logit_softcapping\": 0.7,"},
};
enum { PLAIN = 0 };

enum { SEQUENCES = 2, LENGTH = 11, TOKENS = SEQUENCES * LENGTH, SAMPLES = 200 };

static const char *const set_names[N_FUSED] = {"qkv", "o", "gate_up", "down"};

struct loaded {
    const struct backend *b;
    struct model model;
    struct weights weights;
    struct mat rope[2]; /* of global and of sliding layers */
    struct block_tape tape;
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
        l->rope[i] = make(DTYPE_F32, LENGTH, small.head_dim);
        assert_ok(l->b->core->rope_table(l->b, l->weights.inv_freq[i], 0, &l->rope[i]));
    }
    const struct gemma_config *c = &l->weights.config;
    const uint64_t bytes = block_tape_place(&l->tape, c, DTYPE_F32, NULL, SEQUENCES, LENGTH);
    void *memory = room((size_t)bytes, 1);
    memset(memory, 0xff, (size_t)bytes);
    assert_int_equal(block_tape_place(&l->tape, c, DTYPE_F32, memory, SEQUENCES, LENGTH), bytes);
}

static void unload(struct loaded *l)
{
    weights_free(&l->weights);
    model_close(&l->model);
    free_matrices();
}

static void run_forward(struct loaded *l, int layer, const struct mat *x)
{
    l->tape.rope = &l->rope[l->weights.blocks[layer].rope];
    copy(x, &l->tape.x);
    assert_ok(block_grad_forward(&l->weights, layer, &l->tape));
}

static void run_backward(struct loaded *l, int layer, const struct mat *dout, bool add, bool with_input,
                         const struct block_grads *g)
{
    copy(dout, &l->tape.dx);
    assert_ok(block_grad_backward(&l->weights, layer, &l->tape, add, with_input, g));
}

static struct block_grads make_grads(struct loaded *l)
{
    struct block_grads g;
    for (int s = 0; s < N_FUSED; s++) {
        const struct mat *w = &set_of(&l->weights.blocks[0], s)->whole.weight;
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

/* The same operations on the same operands: the same bytes. */
static void check_forward(int kind)
{
    struct loaded l;
    struct stream stream;
    struct forward *f;
    struct mat hidden;
    int32_t ids[TOKENS];
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
        run_forward(&l, layer, &stream.x[layer]);
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

/* A block with its weights and input in double; the loss is Σ dout⊙block(x). */
struct naive_block {
    const struct block *k;
    const struct mat *rope;
    double *sets[N_FUSED], *x, *dout; /* as struct linear_set has them; [TOKENS, hidden] */
    double *out;
};

static const struct norm_spec spec = {1e-6f, true};

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
static void norm_rows(const double *x, const struct mat *w, double *out)
{
    for (int64_t t = 0; t < TOKENS; t++)
        if (w->data)
            naive_norm_row(x + t * small.hidden, small.hidden, w, &spec, out + t * small.hidden);
}

static void turn(const struct naive_block *n, int64_t token, double *x)
{
    const int half = small.head_dim / 2;
    for (int i = 0; i < half; i++) {
        const double c = (double)at(n->rope, token, i), s = (double)at(n->rope, token, half + i);
        const double a = x[i], b = x[half + i];
        x[i] = a * c - b * s;
        x[half + i] = b * c + a * s;
    }
}

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, QKV = (HEADS + 2 * KV_HEADS) * DIM };

/* One query of one head; qkv: rows of all tokens, normed and turned. */
static void attend(const struct naive_block *n, const double *qkv, int64_t row, int head, double *out)
{
    const int64_t token = row % LENGTH, first = row - token;
    const int64_t from = n->k->window && token >= n->k->window ? token - n->k->window + 1 : 0;
    const double *q = qkv + row * QKV + head * DIM;
    const int key = (HEADS + head / (HEADS / KV_HEADS)) * DIM;
    double p[LENGTH], total = 0;
    for (int64_t t = from; t <= token; t++) {
        double sum = 0;
        for (int i = 0; i < DIM; i++)
            sum += q[i] * qkv[(first + t) * QKV + key + i];
        sum *= (double)n->k->score_scale;
        const double cap = (double)n->k->softcap;
        total += p[t] = exp(cap > 0 ? cap * tanh(sum / cap) : sum);
    }
    for (int i = 0; i < DIM; i++) {
        out[i] = 0;
        for (int64_t t = from; t <= token; t++)
            out[i] += p[t] / total * qkv[(first + t) * QKV + key + KV_HEADS * DIM + i];
    }
}

static void attention(const struct naive_block *n, double *qkv, double *out)
{
    for (int64_t t = 0; t < TOKENS; t++)
        for (int h = 0; h < HEADS + KV_HEADS; h++) {
            double *x = qkv + t * QKV + h * DIM;
            if (n->k->q_norm.data)
                naive_norm_row(x, DIM, h < HEADS ? &n->k->q_norm : &n->k->k_norm, &spec, x);
            turn(n, t % LENGTH, x);
        }
    for (int64_t t = 0; t < TOKENS; t++)
        for (int h = 0; h < HEADS; h++)
            attend(n, qkv, t, h, out + (t * HEADS + h) * DIM);
}

static double gelu(double z)
{
    return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
}

static double loss(const void *ctx)
{
    const struct naive_block *n = ctx;
    enum { HIDDEN = 48, FFN = 72 };
    static double normed[TOKENS * HIDDEN], qkv[TOKENS * QKV], attended[TOKENS * HEADS * DIM],
        branch[TOKENS * HIDDEN], gate_up[TOKENS * 2 * FFN], inner[TOKENS * FFN];
    assert_true(HIDDEN == small.hidden && FFN == small.ffn && DIM == small.head_dim);
    norm_rows(n->x, &n->k->input_norm, normed);
    linear(normed, HIDDEN, n->sets[FUSED_QKV], QKV, qkv);
    attention(n, qkv, attended);
    linear(attended, HEADS * DIM, n->sets[FUSED_O], HIDDEN, branch);
    norm_rows(branch, &n->k->post_attention_norm, branch);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        n->out[i] = n->x[i] + branch[i];
    norm_rows(n->out, &n->k->pre_mlp_norm, normed);
    linear(normed, HIDDEN, n->sets[FUSED_GATE_UP], 2 * FFN, gate_up);
    for (int i = 0; i < TOKENS * FFN; i++) {
        const double *row = gate_up + i / FFN * 2 * FFN + i % FFN;
        inner[i] = gelu(row[0]) * row[FFN];
    }
    linear(inner, FFN, n->sets[FUSED_DOWN], HIDDEN, branch);
    norm_rows(branch, &n->k->post_mlp_norm, branch);
    double sum = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        n->out[i] += branch[i];
        sum += n->dout[i] * n->out[i];
    }
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
    const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                     dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1),
                     out = make(DTYPE_F32, TOKENS, small.hidden);
    struct naive_block n = {.k = k,
                            .rope = &l->rope[k->rope],
                            .x = naive_rows(&x),
                            .dout = naive_rows(&dout),
                            .out = zeros(TOKENS * small.hidden)};
    const struct block_grads g = make_grads(l);
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
        check_layer(&forward, &by_weight, &by_input, &l, 0);
        check_layer(&forward, &by_weight, &by_input, &l, 3);
        unload(&l);
    }
    print_outcome(&forward);
    print_outcome(&by_weight);
    print_outcome(&by_input);
}

/* What has none says so. */
static void test_unsupported(void **state)
{
    (void)state;
    struct model model;
    struct weights weights;
    struct block_tape tape = {0};
    const struct tiny_gemma *g = &tiny_families[TINY_GEMMA4_SHARING];
    assert_ok(model_open(&model, cutting_model("small4", g)));
    assert_ok(model_bind(&model, NULL, NULL));
    assert_ok(weights_load(&weights, &model, &cpu[0]));
    assert_error(block_grad_forward(&weights, 0, &tape), ERR_UNSUPPORTED, "tuning of Gemma 4");
    weights_free(&weights);
    model_close(&model);
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
    const struct block_grads each[] = {make_grads(&l), make_grads(&l)}, both = make_grads(&l);
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
    const struct block_grads all = make_grads(&l);
    run_forward(&l, 2, &x);
    run_backward(&l, 2, &dout, false, true, &all);
    copy(&l.tape.dx, &dx);
    for (int wanted = 0; wanted < 1 << N_FUSED; wanted++)
        for (int with_input = 0; with_input < 2; with_input++) {
            struct block_grads some = make_grads(&l);
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
    const struct block_grads whole = make_grads(&l), apart = make_grads(&l);
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
        cmocka_unit_test_teardown(test_unsupported, clean_up),
        cmocka_unit_test_teardown(test_add, clean_up),
        cmocka_unit_test_teardown(test_unwanted, clean_up),
        cmocka_unit_test_teardown(test_apart, clean_up),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

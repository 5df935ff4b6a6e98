/* A block's forward pass that keeps what its backward pass needs, against the runtime's own; and its gradients against
 * central differences of a forward pass in double (naive_block.h). The model is made up (tiny_gemma.h), its weights
 * are F32. */
#include "runtime/forward.h"
#include "tests/unit/cutting.h"
#include "tests/unit/naive.h"
#include "tests/unit/naive_block.h"

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
 * width and have inputs of their own; values that are keys; experts beside the MLP. */
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
    {"small4m", "gemma4_text",
     TYPES4 "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0, \"enable_moe_block\": true, "
            "\"num_experts\": 16, \"top_k_experts\": 2, \"moe_intermediate_size\": 40,"},
};
enum { PLAIN = 0, MIXTURE = 5, SAMPLES = 200 };

static const char *const set_names[N_BLOCK_SETS] = {
    "qkv", "o", "gate_up", "down", "experts' gate_up", "experts' down"};

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

/* The weights of a whole set, those of all experts one below the other; data NULL: there is none. */
static struct mat weight_of(struct block *k, int set)
{
    if (set < N_FUSED)
        return set_of(k, set)->whole.weight;
    if (!k->n_experts)
        return (struct mat){0};
    struct mat m = set == SET_EXPERTS_DOWN ? k->experts->down.whole.weight : k->experts->gate_up.whole.weight;
    m.rows *= k->n_experts;
    return m;
}

/* The made-up weights are small; four times as large, gates and scores leave the range where everything is a line. */
static void enlarge(struct weights *w)
{
    for (int layer = 0; layer < small.layers; layer++)
        for (int s = 0; s < N_BLOCK_SETS; s++) {
            const struct mat weight = weight_of(&w->blocks[layer], s);
            float *data = weight.data;
            assert_true((s >= N_FUSED || set_of(&w->blocks[layer], s)->fused) &&
                        weight.stride == weight.cols);
            for (int64_t i = 0; i < weight.rows * weight.cols; i++)
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
    assert_ok(block_tape_open(&l->tape, &l->weights.config, SEQUENCES, LENGTH));
    const uint64_t bytes = block_tape_bytes(&l->weights.config, DTYPE_F32, SEQUENCES, LENGTH);
    l->memory = room((size_t)bytes, 1);
    memset(l->memory, 0xff, (size_t)bytes);
}

static void unload(struct loaded *l)
{
    block_tape_close(&l->tape);
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
    for (int s = 0; s < N_BLOCK_SETS; s++) {
        const struct mat w = weight_of(&l->weights.blocks[layer], s);
        g.sets[s] = w.data ? make(DTYPE_F32, w.rows, w.cols) : w;
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

/* --- the backward pass ---------------------------------------------------------------------------------------------- */

/* Samples of one gradient against differences by the elements of `values`, which the loss reads. */
static void check_samples(struct outcome *o, const struct naive_block *n, double *values,
                          const struct mat *got, const char *text)
{
    double error = 0, size = 0;
    for (int i = 0; i < SAMPLES; i++) {
        const int64_t k = (int64_t)(support_random(&random_state) % (uint64_t)(got->rows * got->cols));
        const double expected = naive_slope(naive_block_loss, n, &values[k], 1e-4),
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
                            .router = k->n_experts ? naive_rows(&k->router) : NULL,
                            .rope = &l->rope[k->rope],
                            .x = naive_rows(&x),
                            .dout = naive_rows(&dout),
                            .out = zeros(TOKENS * small.hidden)};
    const struct block_grads g = make_grads(l, layer);
    for (int s = 0; s < N_BLOCK_SETS; s++) {
        const struct mat w = weight_of(k, s);
        n.sets[s] = w.data ? naive_rows(&w) : NULL;
    }
    run_forward(l, layer, &x);
    copy(&l->tape.out, &out);
    n.chosen = l->tape.experts.chosen.data;
    naive_block_loss(&n);
    check(forward, &out, n.out, 0, "the block");
    run_backward(l, layer, &dout, false, true, &g);
    for (int s = 0; s < N_BLOCK_SETS; s++)
        if (n.sets[s])
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
    for (int s = 0; s < N_BLOCK_SETS && first->sets[s].data; s++) {
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
    load(&l, MIXTURE);
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
    load(&l, MIXTURE);
    const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                     dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1),
                     dx = make(DTYPE_F32, TOKENS, small.hidden);
    const struct block_grads all = make_grads(&l, 2);
    run_forward(&l, 2, &x);
    run_backward(&l, 2, &dout, false, true, &all);
    copy(&l.tape.dx, &dx);
    for (int wanted = 0; wanted < 1 << N_BLOCK_SETS; wanted++)
        for (int with_input = 0; with_input < 2; with_input++) {
            struct block_grads some = make_grads(&l, 2);
            for (int s = 0; s < N_BLOCK_SETS; s++)
                if (!(wanted >> s & 1))
                    some.sets[s].data = NULL;
            run_forward(&l, 2, &x);
            run_backward(&l, 2, &dout, false, with_input, &some);
            for (int s = 0; s < N_BLOCK_SETS; s++)
                if (some.sets[s].data)
                    assert_memory_equal(some.sets[s].data, all.sets[s].data,
                                        (size_t)(all.sets[s].rows * all.sets[s].stride) * sizeof(float));
            for (int64_t r = 0; with_input && r < TOKENS; r++)
                assert_memory_equal((float *)l.tape.dx.data + r * l.tape.dx.stride,
                                    (float *)dx.data + r * dx.stride, (size_t)dx.cols * sizeof(float));
        }
    unload(&l);
}

/* The gradient of an expert that no token is sent to is 0, whatever was there; of any other it is not. */
static void test_idle_experts(void **state)
{
    (void)state;
    struct loaded l;
    int n_idle = 0;
    load(&l, MIXTURE);
    const struct mat x = make_random(DTYPE_F32, TOKENS, small.hidden, 2),
                     dout = make_random(DTYPE_F32, TOKENS, small.hidden, 1);
    const struct block_grads g = make_grads(&l, 0);
    run_forward(&l, 0, &x);
    run_backward(&l, 0, &dout, false, false, &g);
    for (int e = 0; e < EXPERTS; e++) {
        const bool idle = l.tape.experts.starts[e] == l.tape.experts.starts[e + 1];
        n_idle += idle;
        for (int s = SET_EXPERTS_GATE_UP; s < N_BLOCK_SETS; s++) {
            const int64_t n = g.sets[s].rows / EXPERTS;
            const struct mat own = mat_rows(&g.sets[s], e * n, n);
            double size = 0;
            for (int64_t i = 0; i < n * own.cols; i++)
                size += fabs((double)at(&own, i / own.cols, i % own.cols));
            assert_true(idle ? size == 0 : size > 0);
        }
    }
    print_message("%d of %d experts got no token\n", n_idle, EXPERTS);
    assert_in_range(n_idle, 1, EXPERTS / 2);
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
        cmocka_unit_test_teardown(test_idle_experts, clean_up),
        cmocka_unit_test_teardown(test_apart, clean_up),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

/* A whole forward pass on a device against the CPU: hidden states, logits and the distributions of the next token, of
 * a BF16 model of every family and of its cut to 4 bits, fed in one piece, in several, and token by token; and whether a
 * device can calibrate and tune every family.
 *   test_cuda_forward [DEVICE [MODEL]]      default: cuda:0, made-up models; MODEL: that one and its cut as well */
#include "base/file.h"
#include "calib/builtin.h"
#include "calib/windows.h"
#include "runtime/forward.h"
#include "tests/cuda/parity.h"
#include "tests/unit/cutting.h"

#include <math.h>

enum { SEQUENCES = 2, LENGTH = 300, POSITIONS = 310, ROWS = 256, LOGIT_ROWS = 16 };

static const char *device, *model_folder; /* the arguments */

/* A rounding may send a token to another expert: that one's states are others then. */
static const double l2_bound = 3e-2, kl_bound = 2e-3, experts_l2_bound = 1e-1, experts_kl_bound = 1e-2;

struct runner {
    struct weights weights;
    struct forward *forward;
};

/* Squared differences beside squares, and the divergence of next-token distributions. */
struct difference {
    double hidden[2], logits[2], kl;
    int64_t n;
};

static void add_squares(double sums[2], const float *got, const float *expected, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)got[i] - (double)expected[i];
        sums[0] += d * d;
        sums[1] += (double)expected[i] * (double)expected[i];
    }
}

static double relative(const double sums[2])
{
    assert_true(isfinite(sums[0]) && sums[1] > 0);
    return sqrt(sums[0] / sums[1]);
}

/* --- ids -------------------------------------------------------------------------------------------------------- */

/* What the model's tokenizer makes of the prose that ships with the program, or made-up ids. ids [SEQUENCES][LENGTH] */
static void make_ids(const char *folder, int64_t vocab, int32_t *ids)
{
    char *path = file_join(folder, "tokenizer.json");
    struct tokenizer *t;
    struct windows w;
    size_t n;
    const char *prose = builtin_prose(&n);
    if (tokenizer_open(&t, path) < 0) {
        uint64_t seed = 5;
        for (int i = 0; i < SEQUENCES * LENGTH; i++)
            ids[i] = (int32_t)(support_random(&seed) % (uint64_t)vocab);
    } else {
        assert_ok(windows_make(&w, t, prose, n, LENGTH, SEQUENCES, vocab, "prose"));
        assert_int_equal(w.n, SEQUENCES);
        memcpy(ids, w.ids, SEQUENCES * LENGTH * sizeof *ids);
        windows_free(&w);
        tokenizer_close(t);
    }
    free(path);
}

/* --- running ---------------------------------------------------------------------------------------------------- */

/* A matrix of the side's as floats on the host. */
static float *fetch(enum side s, const struct mat *m)
{
    const size_t n = (size_t)(m->rows * m->stride);
    assert_int_equal(m->stride, m->cols);
    struct mat host = *m;
    host.data = malloc(n * dtype_bytes(m->dtype) + 1);
    float *out = malloc(n * sizeof *out + 1);
    assert_true(host.data && out);
    assert_ok(side[s].core->download(&side[s], host.data, m->data, n * dtype_bytes(m->dtype)));
    for (size_t i = 0; i < n; i++)
        out[i] = (float)naive_element(&host, 0, (int64_t)i);
    free(host.data);
    return out;
}

static void compare_logits(struct difference *d, const struct mat logits[N_SIDES], const int32_t *targets)
{
    float *got = fetch(DEVICE, &logits[DEVICE]);
    struct mat from_device = logits[CPU];
    struct row_comparison rows[LOGIT_ROWS];
    from_device.data = got;
    add_squares(d->logits, got, logits[CPU].data, logits[CPU].rows * logits[CPU].cols);
    assert_ok(side[CPU].core->compare_rows(&side[CPU], &logits[CPU], &from_device, targets, rows));
    for (int64_t r = 0; r < logits[CPU].rows; r++)
        d->kl += (double)rows[r].kl;
    d->n += logits[CPU].rows;
    free(got);
}

/* The next n tokens of every sequence on both sides. */
static void step(struct runner run[N_SIDES], const int32_t *ids, int64_t at, int64_t n, struct difference *d)
{
    int32_t piece[SEQUENCES * LENGTH];
    struct mat hidden[N_SIDES];
    for (int q = 0; q < SEQUENCES; q++)
        memcpy(piece + q * n, ids + q * LENGTH + at, (size_t)n * sizeof *piece);
    for (int s = 0; s < N_SIDES; s++)
        assert_ok(forward_run(run[s].forward, piece, n, &hidden[s]));
    float *expected = fetch(CPU, &hidden[CPU]), *got = fetch(DEVICE, &hidden[DEVICE]);
    add_squares(d->hidden, got, expected, hidden[CPU].rows * hidden[CPU].cols);
    free(expected);
    free(got);
    const int64_t vocab = run[CPU].weights.embedding.rows;
    for (int64_t r = 0; r < hidden[CPU].rows; r += LOGIT_ROWS) {
        const int64_t rows = hidden[CPU].rows - r < LOGIT_ROWS ? hidden[CPU].rows - r : LOGIT_ROWS;
        struct mat logits[N_SIDES];
        for (int s = 0; s < N_SIDES; s++) {
            const struct mat part = mat_rows(&hidden[s], r, rows);
            logits[s] = (struct mat){parity_memory(s, (size_t)(rows * vocab) * sizeof(float)), DTYPE_F32,
                                     rows, vocab, vocab};
            assert_ok(forward_logits(&run[s].weights, &part, &logits[s]));
        }
        compare_logits(d, logits, piece + r);
        parity_free();
    }
}

/* The same pass once more gives the same bytes. */
static void check_repeats(struct runner *run, const int32_t *ids)
{
    float *states[2];
    struct mat hidden;
    int32_t piece[SEQUENCES * ROWS];
    for (int q = 0; q < SEQUENCES; q++)
        memcpy(piece + q * ROWS, ids + q * LENGTH, ROWS * sizeof *piece);
    for (int i = 0; i < 2; i++) {
        forward_begin(run->forward, SEQUENCES);
        assert_ok(forward_run(run->forward, piece, ROWS, &hidden));
        assert_ok(forward_run(run->forward, ids, 1, &hidden));
        states[i] = fetch(DEVICE, &hidden);
    }
    assert_memory_equal(states[0], states[1], (size_t)(hidden.rows * hidden.cols) * sizeof(float));
    free(states[0]);
    free(states[1]);
}

static void check_pieces(struct runner run[N_SIDES], const int32_t *ids, const char *name)
{
    /* whole; in pieces of the most that is fed at a time, of many, of few, of one */
    static const int64_t pieces[][8] = {
        {ROWS, LENGTH - ROWS}, {100, 9, 1, 1, 2, 8, 100, 79}, {1, 1, 1, 1, 1, 1, 30}};
    for (size_t p = 0; p < N_OF(pieces); p++) {
        struct difference d = {0};
        for (int s = 0; s < N_SIDES; s++)
            forward_begin(run[s].forward, SEQUENCES);
        for (int64_t i = 0, at = 0; i < 8 && pieces[p][i]; at += pieces[p][i++])
            step(run, ids, at, pieces[p][i], &d);
        const bool experts = run[0].weights.config.n_experts > 0;
        const double allowed = experts ? experts_l2_bound : l2_bound,
                     allowed_kl = experts ? experts_kl_bound : kl_bound;
        const double hidden = relative(d.hidden), logits = relative(d.logits), kl = d.kl / (double)d.n;
        print_message(
            "%s, %d × %d tokens: hidden states %.2e, logits %.2e, at most %.1e allowed; KL %.2e nats a token, "
            "at most %.1e allowed\n",
            name, SEQUENCES, (int)(d.n / SEQUENCES), hidden, logits, allowed, kl, allowed_kl);
        assert_true(hidden <= allowed && logits <= allowed && kl >= -1e-6 && kl <= allowed_kl);
    }
}

static void check_model(const char *name, const char *folder)
{
    static const struct forward_size size = {SEQUENCES, POSITIONS, ROWS};
    struct model model;
    struct runner run[N_SIDES];
    static int32_t ids[SEQUENCES * LENGTH];
    assert_ok(model_open(&model, folder));
    assert_ok(model_bind(&model, NULL, NULL));
    for (int s = 0; s < N_SIDES; s++) {
        assert_ok(weights_load(&run[s].weights, &model, &side[s]));
        assert_ok(forward_open(&run[s].forward, &run[s].weights, &size));
    }
    make_ids(model.folder, run[CPU].weights.embedding.rows, ids);
    check_pieces(run, ids, name);
    check_repeats(&run[DEVICE], ids);
    for (int s = 0; s < N_SIDES; s++) {
        forward_close(run[s].forward);
        weights_free(&run[s].weights);
    }
    model_close(&model);
}

/* The first n of these. */
static void check_cuts(const char *name, const char *folder, size_t n)
{
    static const struct quant_scheme schemes[] = {{4, true, 128}, {4, false, 32}, {8, true, 0}};
    for (size_t i = 0; i < n && i < N_OF(schemes); i++) {
        struct cut_options o = cutting_options(folder, support_path("%s-%zu", name, i));
        char text[100];
        snprintf(text, sizeof text, "%s, %d bits%s, group %d", name, schemes[i].bits,
                 schemes[i].symmetric ? "" : " asymmetric", (int)schemes[i].group);
        o.recipe.scheme = schemes[i];
        assert_ok(cutting_run(&o, &cutting_silent));
        check_model(text, o.out);
    }
}

static void test_made_up_model(void **state)
{
    (void)state;
    const char *folder = cutting_model("plain", &tiny_gemma_plain);
    check_model("made-up", folder);
    check_cuts("made-up", folder, 3);
}

/* Every other family with heads as wide as its models have: Gemma 1; 2 with soft caps that bite; 4 with inputs of the
 * layers' own and shared keys and values; 4 with values that are the keys; the same with a mixture of experts. */
#define TYPES                                                                                                \
    "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"], "
#define WIDE                                                                                                 \
    .hidden = 256, .ffn = 384, .vocab = 1100, .heads = 4, .head_dim = 256, .window = 100, .dtype = DTYPE_BF16
static const struct tiny_gemma families[] = {
    [TINY_GEMMA1] = {.model_type = "gemma", .layers = 3, .kv_heads = 1, WIDE},
    [TINY_GEMMA2] = {.model_type = "gemma2",
                     .more = "\"query_pre_attn_scalar\": 24, \"attn_logit_softcapping\": 1.0, "
                             "\"final_logit_softcapping\": 2.0,",
                     .layers = 4,
                     .kv_heads = 2,
                     WIDE},
    [TINY_GEMMA4_SHARING] = {.model_type = "gemma4_text",
                             .more = TYPES "\"num_kv_shared_layers\": 2, \"use_double_wide_mlp\": true, "
                                           "\"hidden_size_per_layer_input\": 128, \"global_head_dim\": 512, "
                                           "\"final_logit_softcapping\": 2.0,",
                             .layers = 4,
                             .kv_heads = 1,
                             WIDE},
    [TINY_GEMMA4_K_IS_V] =
        {.model_type = "gemma4_text",
         .more =
             TYPES "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0, \"per_layer_config\": "
                   "{\"1\": {\"head_dim\": 512, \"num_key_value_heads\": 1}, "
                   "\"3\": {\"head_dim\": 512, \"num_key_value_heads\": 1}},",
         .layers = 4,
         .kv_heads = 2,
         WIDE},
    [TINY_GEMMA4_EXPERTS] =
        {.model_type = "gemma4_text",
         .more = TYPES
         "\"attention_k_eq_v\": true, \"hidden_size_per_layer_input\": 0, \"enable_moe_block\": true, "
         "\"num_experts\": 16, \"top_k_experts\": 4, \"moe_intermediate_size\": 128, \"per_layer_config\": "
         "{\"1\": {\"head_dim\": 512, \"num_key_value_heads\": 1}, "
         "\"3\": {\"head_dim\": 512, \"num_key_value_heads\": 1}},",
         .layers = 4,
         .kv_heads = 2,
         WIDE},
};

static void test_families(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(families); i++) {
        const char *folder = cutting_model(tiny_family_names[i], &families[i]);
        check_model(tiny_family_names[i], folder);
        check_cuts(tiny_family_names[i], folder, 1);
    }
}

/* GPTQ and a few iterations of AutoRound on the device: it has every operation that a family's blocks need, forward and
 * back, and two runs give the same bytes. */
static void test_calibrated(void **state)
{
    (void)state;
    enum { SAMPLES = 4, TOKENS = 150 };
    static int32_t ids[SAMPLES * TOKENS];
    for (int i = 0; i < SAMPLES * TOKENS; i++)
        ids[i] = i % TOKENS ? (i * 7919 + 13) % 1100 : 2;
    const struct dataset data = {.samples = SAMPLES, .length = TOKENS, .ids = ids};
    for (size_t i = 0; i < N_OF(families); i++) {
        const char *outs[2];
        for (int k = 0; k < 2; k++) {
            struct cut_options o = cutting_options(cutting_model(tiny_family_names[i], &families[i]),
                                                   support_path("calibrated-%zu-%d", i, k));
            o.device = device;
            o.recipe.method = "autoround";
            o.recipe.sweep = o.recipe.calibrated = true;
            o.recipe.scales.rule = SCALE_BLOCK;
            o.recipe.damping = 0.01;
            o.recipe.passes = 1;
            o.recipe.calib.text = "made up";
            o.recipe.tune = (struct tune_options){
                .iterations = 3, .batch = 2, .lr = 0.1, .range_lr = 0.02, .init = TUNE_FROM_CODES};
            o.data = &data;
            outs[k] = o.out;
            assert_ok(cutting_run(&o, &cutting_silent));
        }
        cutting_check_same(outs[0], outs[1]);
    }
}

static void test_model(void **state)
{
    (void)state;
    if (!model_folder)
        skip();
    check_model(model_folder, model_folder);
    check_cuts("cut", model_folder, 3);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_made_up_model, parity_clean_up),
        cmocka_unit_test_teardown(test_families, parity_clean_up),
        cmocka_unit_test_teardown(test_calibrated, parity_clean_up),
        cmocka_unit_test_teardown(test_model, parity_clean_up),
    };
    device = argc > 1 ? argv[1] : "cuda:0";
    model_folder = argc > 2 ? argv[2] : NULL;
    return parity_run(argc, argv, tests, N_OF(tests), support_make_folder, support_remove_folder);
}

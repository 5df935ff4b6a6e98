/* What `gemcut bench` makes up: values by family and role, and a forward pass through a small shape of each family. */
#include "tests/unit/support.h"

#include "base/file.h"
#include "base/half.h"
#include "base/text.h"
#include "cli/bench.h"
#include "runtime/forward.h"

#include <math.h>

/* --- values --------------------------------------------------------------------------------------------------------- */

static void values_follow_roles(void **state)
{
    static const struct {
        const char *line;
        bool plain;
        double mean, sigma;
    } rows[] = {
        {"layers.0.input_layernorm.weight BF16 640", false, 0, 0.1},
        {"layers.0.self_attn.k_norm.weight BF16 256", false, 0, 0.1},
        {"layers.0.input_layernorm.weight BF16 640", true, 1, 0.1},
        {"per_layer_projection_norm.weight BF16 256", true, 1, 0.1},
        {"layers.0.post_feedforward_layernorm_1.weight BF16 640", true, 1, 0.1},
        {"layers.0.self_attn.q_norm.weight BF16 256", true, 1, 0.1},
        {"layers.0.self_attn.k_norm.weight BF16 256", true, 0.125, 0.0125},
        {"layers.0.self_attn.k_norm.weight BF16 1024", true, 0.0625, 0.00625},
        {"layers.0.layer_scalar BF16 1", true, 0.75, 0.078},
        {"layers.0.router.scale BF16 2816", true, 1, 0.1},
        {"layers.0.router.per_expert_scale BF16 128", true, 1, 0.1},
        {"layers.0.router.proj.weight BF16 128x4096", true, 0, 1.0 / 64},
        {"layers.0.experts.down_proj BF16 128x2816x1024", true, 0, 1.0 / 32},
        {"layers.0.experts.gate_up_proj BF16 128x1408x256", true, 0, 1.0 / 16},
        {"embed_tokens_per_layer.weight BF16 512x256", true, 0, 1.0 / 16},
        {"layers.0.mlp.down_proj.weight BF16 640x1024", false, 0, 1.0 / 32},
        {"vision_embedder.patch_dense.bias BF16 640", true, 0, 0.02},
        {"vision_tower.layers.0.q_proj.output_min BF16 scalar", true, 0, 0.02},
    };
    (void)state;
    for (size_t i = 0; i < N_OF(rows); i++) {
        struct bench_tensors t = {0};
        assert_ok(bench_tensors_add_line(&t, rows[i].line, strlen(rows[i].line)));
        const struct bench_normal n = bench_tensor_normal(&t.list[0], rows[i].plain);
        if (!(fabs(n.mean - rows[i].mean) < 1e-9 && fabs(n.sigma - rows[i].sigma) < 1e-9))
            fail_msg("%s: %g ± %g, expected %g ± %g", rows[i].line, n.mean, n.sigma, rows[i].mean,
                     rows[i].sigma);
        bench_tensors_free(&t);
    }
}

/* --- a pass --------------------------------------------------------------------------------------------------------- */

#define TYPES4                                                                                               \
    "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"sliding_attention\", "                   \
    "\"full_attention\", \"sliding_attention\", \"full_attention\"], \"global_head_dim\": 128, "             \
    "\"final_logit_softcapping\": 30.0, "

static const struct {
    const char *name, *model_type, *more;
} kinds[] = {
    {"one", "gemma", ""},
    {"two", "gemma2", "\"query_pre_attn_scalar\": 64, "},
    {"three", "gemma3_text", "\"query_pre_attn_scalar\": 64, "},
    {"sharing", "gemma4_text",
     TYPES4 "\"num_kv_shared_layers\": 2, \"use_double_wide_mlp\": true, "
            "\"hidden_size_per_layer_input\": 64, "},
    {"k_is_v", "gemma4_text",
     TYPES4 "\"attention_k_eq_v\": true, \"num_global_key_value_heads\": 1, "
            "\"hidden_size_per_layer_input\": 0, "},
    {"experts", "gemma4_text",
     TYPES4 "\"enable_moe_block\": true, \"num_experts\": 8, \"top_k_experts\": 2, "
            "\"moe_intermediate_size\": 128, \"hidden_size_per_layer_input\": 0, "},
};

enum { TOKENS = 24, HIDDEN = 256, VOCAB = 512 };

static void write_config(struct text *t, size_t kind)
{
    text_printf(
        t,
        "{\"model_type\": \"%s\", %s\"vocab_size\": %d, \"hidden_size\": %d, \"intermediate_size\": 512, "
        "\"num_hidden_layers\": 6, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, "
        "\"head_dim\": 64, \"sliding_window\": 16}",
        kinds[kind].model_type, kinds[kind].more, VOCAB, HIDDEN);
    assert_ok(text_finish(t));
}

/* A line for each tensor that the runtime wants; experts' together, as releases hold them. */
static void write_lines(struct text *t, const struct text *config, const char *name)
{
    struct hf_config c;
    struct gemma_config g;
    struct gemma_tensors tensors;
    assert_ok(hf_config_parse(&c, config->data, config->len, name));
    assert_ok(gemma_config_read(&g, &c));
    assert_ok(gemma_tensors(&tensors, &g, "model."));
    if (g.n_experts) {
        const int n = (int)g.n_experts, inner = (int)g.expert_size;
        text_printf(t, "model.layers.{0..5}.experts.gate_up_proj BF16 %dx%dx%d\n", n, 2 * inner, HIDDEN);
        text_printf(t, "model.layers.{0..5}.experts.down_proj BF16 %dx%dx%d\n", n, HIDDEN, inner);
    }
    for (size_t i = 0; i < tensors.n; i++) {
        if (tensors.list[i].expert >= 0)
            continue;
        text_printf(t, "%s BF16", tensors.list[i].name);
        for (int d = 0; d < tensors.list[i].n_dims; d++)
            text_printf(t, "%c%d", d ? 'x' : ' ', (int)tensors.list[i].shape[d]);
        text_add(t, "\n");
    }
    assert_ok(text_finish(t));
    gemma_tensors_free(&tensors);
    gemma_config_free(&g);
    hf_config_close(&c);
}

static double rms(const float *x, size_t n)
{
    double squares = 0;
    for (size_t i = 0; i < n; i++)
        squares += (double)x[i] * x[i];
    return sqrt(squares / (double)n);
}

/* The residual stream after every block: of order one, and NaN fails. */
static int look(void *ctx, int layer, const struct mat *x)
{
    const double size = rms(x->data, (size_t)(x->rows * x->cols));
    if (!(size > 0.5 && size < 10))
        fail_msg("%s: after block %d the residual stream is of size %g", (const char *)ctx, layer, size);
    return 0;
}

static void run(const char *folder, const char *name)
{
    static float values[TOKENS * VOCAB];
    const struct forward_size size = {1, TOKENS, TOKENS};
    const struct mat logits = {values, DTYPE_F32, TOKENS, VOCAB, VOCAB};
    struct model m;
    struct backend cpu;
    struct weights w;
    struct forward *f;
    struct mat hidden;
    int32_t ids[TOKENS];
    for (int i = 0; i < TOKENS; i++)
        ids[i] = i * 37 % VOCAB;
    assert_ok(backend_open(&cpu, "cpu", 1));
    assert_ok(model_open_unquantized(&m, folder));
    assert_ok(model_bind(&m, NULL, NULL));
    assert_ok(weights_load(&w, &m, &cpu));
    assert_ok(forward_open(&f, &w, &size));
    forward_observe(f, look, (void *)(uintptr_t)name);
    forward_begin(f, 1);
    assert_ok(forward_run(f, ids, TOKENS, &hidden));
    assert_ok(forward_logits(&w, &hidden, &logits));
    const double deviation = rms(values, TOKENS * VOCAB);
    print_message("    %s: logits of size %.2f\n", name, deviation);
    assert_true(deviation > 0.5 && deviation < 3);
    forward_close(f);
    weights_free(&w);
    model_close(&m);
    backend_close(&cpu);
}

static void each_family_runs(void **state)
{
    struct parallel *pool;
    (void)state;
    assert_ok(parallel_open(&pool, 2));
    for (size_t i = 0; i < N_OF(kinds); i++) {
        struct text config = {0}, lines = {0};
        write_config(&config, i);
        write_lines(&lines, &config, kinds[i].name);
        const struct bench_shape shape = {kinds[i].name, lines.data, lines.data + lines.len, config.data,
                                          config.data + config.len};
        const char *folder = support_path("%s", kinds[i].name);
        assert_ok(file_make_folder(folder));
        assert_ok(bench_make_checkpoint(folder, &shape, 0, pool));
        run(folder, kinds[i].name);
        text_free(&config);
        text_free(&lines);
    }
    parallel_close(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_follow_roles),
        cmocka_unit_test(each_family_runs),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

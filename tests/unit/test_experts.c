/* A mixture of experts: its tensors, whichever way a checkpoint holds them, and what it adds to a block, against the plainest
 * implementation in double (expert_support.h). */
#include "base/file.h"
#include "formats/writer.h"
#include "kernels/arena.h"
#include "runtime/experts.h"
#include "runtime/forward.h"
#include "tests/unit/cutting.h"
#include "tests/unit/expert_support.h"
#include "tests/unit/naive.h"

static const char *plain(void)
{
    return cutting_model("plain", mixture);
}

static const char *apart(void)
{
    struct tiny_gemma g = *mixture;
    g.apart = true;
    return cutting_model("apart", &g);
}

static const char *cut(const char *name, struct quant_scheme scheme)
{
    struct cut_options o = cutting_options(plain(), support_path("%s", name));
    o.recipe.scheme = scheme;
    if (!file_exists(o.out))
        assert_ok(cutting_run(&o, &cutting_silent));
    return o.out;
}

static const struct quant_scheme groups = {4, false, 32}, rows = {8, true, 0};

/* --- tensors -------------------------------------------------------------------------------------------------------- */

static void *read_all(const struct model *m, const struct tensor *t)
{
    void *data = malloc(t->bytes);
    assert_non_null(data);
    assert_ok(checkpoint_read(&m->checkpoint, t, 0, t->bytes, data));
    return data;
}

static void check_same_linears(const char *folder, const char *other)
{
    struct model a, b;
    assert_ok(model_open(&a, folder));
    assert_ok(model_open(&b, other));
    assert_ok(model_bind(&a, NULL, NULL));
    assert_ok(model_bind(&b, NULL, NULL));
    assert_int_equal(a.n_linears, b.n_linears);
    assert_int_equal(a.checkpoint.n_tensors, b.checkpoint.n_tensors);
    for (size_t i = 0; i < a.n_linears; i++) {
        const struct tensor *x = a.linears[i].weight, *y = b.linears[i].weight;
        assert_string_equal(x->name, y->name);
        assert_true(x->n_dims == 2 && y->n_dims == 2 && x->bytes == y->bytes && x->dtype == y->dtype);
        assert_memory_equal(x->shape, y->shape, 2 * sizeof *x->shape);
        void *p = read_all(&a, x), *q = read_all(&b, y);
        if (memcmp(p, q, x->bytes))
            fail_msg("%s: %s and %s hold other bytes", x->name, folder, other);
        free(p);
        free(q);
    }
    model_close(&a);
    model_close(&b);
}

static const char *model_of(const char *name, enum dtype dtype, struct tiny_gemma g)
{
    char full[40];
    snprintf(full, sizeof full, "%s-%d", name, (int)dtype);
    g.dtype = dtype;
    return cutting_model(full, &g);
}

/* However they lie, an expert's linears are the same. */
static void test_layouts(void **state)
{
    (void)state;
    static const enum dtype types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
    struct tiny_gemma one = *mixture, shards = *mixture;
    one.apart = true;
    shards.shard_bytes = 200000;
    for (size_t i = 0; i < N_OF(types); i++) {
        const char *whole = model_of("whole", types[i], *mixture),
                   *split = model_of("shards", types[i], shards);
        check_same_linears(whole, model_of("each", types[i], one));
        check_same_linears(whole, split);
        char *index = file_join(split, "model.safetensors.index.json");
        assert_true(file_exists(index));
        free(index);
    }
}

/* What the list of tensors says of experts. */
static void test_list(void **state)
{
    (void)state;
    static const char *const names[] = {"gate_proj", "up_proj", "down_proj"};
    struct gemma_config c;
    struct gemma_tensors t;
    size_t n = 0, n_router = 0;
    tiny_gemma_tensors(mixture, &c, &t);
    assert_true(c.n_experts == N_EXPERTS && c.top_k == TOP && c.expert_size == INNER);
    for (size_t i = 0; i < t.n; i++) {
        const struct gemma_tensor *l = &t.list[i];
        n_router += l->role == GEMMA_ROUTER || l->role == GEMMA_ROUTER_SCALE;
        assert_true(gemma_is_linear(l->role) || l->expert < 0);
        if (l->expert < 0)
            continue;
        char name[100];
        const size_t part = n % 3, expert = n / 3 % N_EXPERTS, layer = n / 3 / N_EXPERTS;
        snprintf(name, sizeof name, "model.layers.%zu.experts.%zu.%s.weight", layer, expert, names[part]);
        assert_string_equal(l->name, name);
        assert_true(l->layer == (int)layer && l->expert == (int)expert && l->n_dims == 2);
        assert_true(l->role == (part == 0 ? GEMMA_GATE : part == 1 ? GEMMA_UP : GEMMA_DOWN));
        assert_true(l->shape[0] == (part < 2 ? INNER : HIDDEN) && l->shape[1] == (part < 2 ? HIDDEN : INNER));
        n++;
    }
    assert_int_equal(n, LAYERS * N_EXPERTS * 3);
    assert_int_equal(n_router, LAYERS * 3);
    gemma_tensors_free(&t);
    gemma_config_free(&c);
}

/* The model with one place of one of its files changed: to is not longer than from, and has blanks behind it. */
static const char *changed(const char *name, const struct tiny_gemma *g, const char *file, const char *from,
                           const char *to)
{
    const char *folder = cutting_model(name, g);
    char *path = file_join(folder, file);
    size_t n, at = 0, length = strlen(from);
    char *text = support_read(path, &n);
    while (at + length <= n && memcmp(text + at, from, length))
        at++;
    assert_true(at + length <= n && strlen(to) <= length);
    memset(text + at, ' ', length);
    memcpy(text + at, to, strlen(to));
    support_write(path, text, n);
    free(path);
    free(text);
    return folder;
}

static int open_and_bind(const char *folder)
{
    struct model m;
    int rc = model_open(&m, folder);
    if (!rc) {
        rc = model_bind(&m, NULL, NULL);
        model_close(&m);
    }
    return rc;
}

static void test_other_shapes(void **state)
{
    (void)state;
    static const char config[] = "config.json", weights[] = "model.safetensors";
    static const char size[] = "\"moe_intermediate_size\": 96",
                      other_size[] = "\"moe_intermediate_size\": 64";
    struct tiny_gemma one = *mixture;
    one.apart = true;
    assert_error(
        open_and_bind(changed("fewer", mixture, config, "\"num_experts\": 8", "\"num_experts\": 6")),
        ERR_FORMAT,
        "model.safetensors: tensor 'model.layers.0.experts.down_proj' is BF16 [8, 64, 96], expected BF16 [6, 64, 96]");
    assert_error(open_and_bind(changed("more", &one, config, "\"num_experts\": 8", "\"num_experts\": 9")),
                 ERR_FORMAT, "'model.layers.0.router.proj.weight' is BF16 [8, 64], expected BF16 [9, 64]");
    assert_error(open_and_bind(changed("narrow", mixture, config, size, other_size)), ERR_FORMAT,
                 "tensor 'model.layers.0.experts.down_proj' is BF16 [8, 64, 96], expected BF16 [8, 64, 64]");
    assert_error(open_and_bind(changed("narrow-one", &one, config, size, other_size)), ERR_FORMAT,
                 "'model.layers.0.experts.0.gate_proj.weight' is BF16 [96, 64], expected BF16 [64, 64]");
    assert_error(open_and_bind(changed("gone", mixture, weights, "layers.1.experts.gate_up_proj",
                                       "layers.9.experts.gate_up_proj")),
                 ERR_FORMAT,
                 "'model.layers.1.experts.0.gate_proj.weight' is missing, expected BF16 [96, 64]");
    assert_error(open_and_bind(changed("gone-one", &one, weights, "layers.2.experts.7.up_proj.weight",
                                       "layers.2.experts.8.up_proj.weight")),
                 ERR_FORMAT, "'model.layers.2.experts.7.up_proj.weight' is missing, expected BF16 [96, 64]");
    /* experts that the settings do not speak of */
    static const char key[] = "enable_moe_block", other_key[] = "enable_moe_blocx";
    assert_error(open_and_bind(changed("unsaid", mixture, config, key, other_key)), ERR_UNSUPPORTED,
                 "has tensor 'model.layers.0.experts.down_proj', but config.json does not say 'enable_moe_block'");
    assert_error(open_and_bind(changed("unsaid-one", &one, config, key, other_key)), ERR_UNSUPPORTED,
                 "has tensor 'model.layers.0.experts.");
}

/* A model of two files: the mixture's own, and one with one more tensor. */
static const char *with_tensor(const char *name, const char *tensor, const int64_t shape[2])
{
    const char *folder = support_path("%s", name), *more = support_path("%s-more", name);
    const uint16_t zeros[INNER * HIDDEN] = {0};
    struct writer *w;
    struct model m;
    struct text index = {0};
    size_t id, n;
    tiny_gemma_write(mixture, folder);
    assert_ok(file_make_folder(more));
    assert_ok(writer_open(&w, more, UINT64_MAX));
    assert_ok(writer_add(w, tensor, tensor, DTYPE_BF16, 2, shape, &id));
    assert_ok(writer_begin(w, false));
    assert_ok(writer_put(w, id, 0, zeros, (size_t)(shape[0] * shape[1]) * sizeof *zeros));
    assert_ok(writer_finish(w));
    writer_close(w);
    assert_ok(model_open(&m, folder));
    text_printf(&index, "{\"weight_map\": {\"%s\": \"more.safetensors\"", tensor);
    struct checkpoint stored = m.checkpoint;
    stored.tensors = malloc(stored.n_tensors * sizeof *stored.tensors);
    assert_non_null(stored.tensors);
    memcpy(stored.tensors, m.checkpoint.tensors, stored.n_tensors * sizeof *stored.tensors);
    stored.n_tensors = fused_restore(&m.fused, stored.tensors, stored.n_tensors, NULL);
    for (size_t i = 0; i < stored.n_tensors; i++)
        text_printf(&index, ", \"%s\": \"model.safetensors\"", stored.tensors[i].name);
    text_printf(&index, "}}");
    assert_ok(text_finish(&index));
    free(stored.tensors);
    model_close(&m);
    char *bytes = support_read(support_path("%s-more/model.safetensors", name), &n);
    support_write(support_path("%s/more.safetensors", name), bytes, n);
    support_write(support_path("%s/model.safetensors.index.json", name), index.data, index.len);
    free(bytes);
    text_free(&index);
    return folder;
}

static void test_both_layouts(void **state)
{
    (void)state;
    assert_error(open_and_bind(with_tensor("both", "model.layers.1.experts.3.up_proj.weight",
                                           (const int64_t[]){INNER, HIDDEN})),
                 ERR_FORMAT,
                 "tensor 'model.layers.1.experts.3.up_proj.weight' is there twice, once among all experts'");
    assert_ok(open_and_bind(with_tensor("other", "model.layers.1.experts.3.other", (const int64_t[]){2, 3})));
}

/* --- what a block gets of them --------------------------------------------------------------------------------------- */

struct add_case {
    struct weights w;
    int layer;
    struct mat x, branch;
};

static int run_add(const struct backend *b, const void *args, const struct mat *out)
{
    struct add_case a = *(const struct add_case *)args;
    struct experts_room r = {0};
    uint64_t bytes = 0, at = 0;
    a.w.backend = b;
    experts_lay_out(&r, NULL, &bytes, &a.w.config, DTYPE_F32, a.x.rows, a.x.rows * TOP);
    void *memory = room(bytes, 1);
    memset(memory, 0xff, bytes);
    experts_lay_out(&r, memory, &at, &a.w.config, DTYPE_F32, a.x.rows, a.x.rows * TOP);
    int rc = experts_open(&r, &a.w.config);
    copy(&a.branch, out);
    if (!rc)
        rc = experts_add(&a.w, a.layer, &r, &a.x, out);
    experts_close(&r);
    return rc;
}

static void check_add(struct outcome *o, const char *folder)
{
    static const int64_t heights[] = {1, 2, 5, 40};
    struct model m;
    struct add_case a = {0};
    assert_ok(model_open(&m, folder));
    assert_ok(model_bind(&m, NULL, NULL));
    assert_ok(weights_load(&a.w, &m, &cpu[0]));
    for (size_t i = 0; i < N_OF(heights) * LAYERS; i++) {
        a.layer = (int)i % LAYERS;
        a.x = make_random(DTYPE_F32, heights[i / LAYERS], HIDDEN, 3);
        a.branch = make_random(DTYPE_F32, heights[i / LAYERS], HIDDEN, 2);
        const struct naive_experts n = naive_experts_of(&a.w, a.layer);
        const struct mat out = make(DTYPE_F32, a.x.rows, HIDDEN);
        double *x = naive_rows(&a.x), *branch = naive_rows(&a.branch), *expected = zeros(a.x.rows * HIDDEN);
        char text[120];
        snprintf(text, sizeof text, "%s, layer %d, %d tokens", file_base(folder), a.layer, (int)a.x.rows);
        for (int64_t t = 0; t < a.x.rows; t++)
            naive_experts_add(&n, x + t * HIDDEN, branch + t * HIDDEN, expected + t * HIDDEN);
        run_everywhere(run_add, &a, &out, text);
        check(o, &out, expected, 0, text);
        free_matrices();
    }
    weights_free(&a.w);
    model_close(&m);
}

static void test_add(void **state)
{
    (void)state;
    struct outcome o = {"experts", 1e-5, 0, 0};
    check_add(&o, plain());
    check_add(&o, apart());
    check_add(&o, cut("groups", groups));
    check_add(&o, cut("rows", rows));
    print_outcome(&o);
}

/* --- whole blocks -------------------------------------------------------------------------------------------------- */

static double *stream[LAYERS]; /* [TOKENS, hidden] behind each block */

static int observe(void *ctx, int layer, const struct mat *x)
{
    (void)ctx;
    stream[layer] = naive_rows(x);
    return 0;
}

/* The residual stream behind every block of the runtime's forward pass. */
static void test_blocks(void **state)
{
    (void)state;
    const char *const folders[] = {plain(), cut("groups", groups), cut("rows", rows)};
    struct outcome o = {"blocks with experts", 1e-5, 0, 0};
    for (size_t i = 0; i < N_OF(folders); i++) {
        struct model m;
        struct weights w;
        struct forward *f;
        struct mat hidden;
        assert_ok(model_open(&m, folders[i]));
        assert_ok(model_bind(&m, NULL, NULL));
        assert_ok(weights_load(&w, &m, &cpu[1]));
        assert_ok(forward_open(&f, &w, &(struct forward_size){SAMPLES, LENGTH, LENGTH}));
        forward_observe(f, observe, NULL);
        assert_ok(forward_run(f, mixture_ids(), LENGTH, &hidden));
        struct walk k = walk_open(&w, mixture_ids());
        for (int layer = 0; layer < LAYERS; layer++) {
            walk_to_experts(&k, layer);
            walk_to_end(&k, layer);
            check(&o, &k.x, stream[layer], 0, file_base(folders[i]));
        }
        forward_close(f);
        weights_free(&w);
        model_close(&m);
        free_matrices();
    }
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
        cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_other_shapes),
        cmocka_unit_test(test_both_layouts),
        cmocka_unit_test_teardown(test_add, clean_up),
        cmocka_unit_test_teardown(test_blocks, clean_up),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

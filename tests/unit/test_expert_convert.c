/* Cuts of a mixture of experts in other formats, and damaged ones. The model is made up (tiny_gemma.h). */
#include "base/file.h"
#include "runtime/weights.h"
#include "tests/unit/expert_cutting.h"
#include "tests/unit/support.h"

/* --- converted ------------------------------------------------------------------------------------------------------ */

/* To another format and back: the same bytes. Experts that stay in 16 bits lie as they did. */
static void test_converted(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct cut_options o = mixture_gptq(support_path("from-%d", i));
        o.recipe.ignore = i == 1 ? mixture_all_experts : mixture_middle_layer;
        o.recipe.n_ignore = i > 0;
        mixture_made(&o);
        for (int f = QUANT_AUTO_ROUND; f < N_QUANT_FORMATS; f++) {
            struct cut_options direct = o;
            const char *to = support_path("to-%d-%d", i, f), *back = support_path("back-%d-%d", i, f);
            assert_ok(cutting_convert(o.out, to, (enum quant_format)f));
            mixture_check_good(to);
            if (i)
                mixture_check_kept(to, mixture_whole(), 1);
            assert_ok(cutting_convert(to, back, QUANT_COMPRESSED_TENSORS));
            mixture_check_good(back);
            mixture_check_same(back, o.out);
            direct.out = support_path("direct-%d-%d", i, f);
            direct.recipe.format = (enum quant_format)f;
            mixture_check_same(to, mixture_made(&direct));
        }
    }
}

/* --- damaged -------------------------------------------------------------------------------------------------------- */

/* A copy of the cut's two files with one place of one of them changed, which both have the length of. */
static const char *damaged(const char *name, const char *file, const char *from, const char *to)
{
    static const char *const files[] = {"config.json", "model.safetensors"};
    const struct cut_options o = mixture_rtn(support_path("rtn"));
    const char *folder = support_path("%s", name);
    mixture_made(&o);
    assert_ok(file_make_folder(folder));
    assert_int_equal(strlen(from), strlen(to));
    for (size_t i = 0; i < N_OF(files); i++) {
        char *in = file_join(o.out, files[i]), *out = file_join(folder, files[i]);
        size_t n, at = 0, length = strlen(from);
        char *text = support_read(in, &n);
        while (!strcmp(file, files[i]) && at + length <= n && memcmp(text + at, from, length))
            at++;
        assert_true(at + length <= n);
        if (!strcmp(file, files[i]))
            memcpy(text + at, to, length);
        support_write(out, text, n);
        free(in);
        free(out);
        free(text);
    }
    return folder;
}

static int load(const char *folder)
{
    struct backend b;
    struct model m;
    struct weights w;
    assert_ok(backend_open(&b, "cpu", 1));
    int rc = model_open(&m, folder);
    if (!rc && !(rc = model_bind(&m, NULL, NULL)) && !(rc = weights_load(&w, &m, &b)))
        weights_free(&w);
    model_close(&m);
    backend_close(&b);
    return rc;
}

static void test_damaged(void **state)
{
    (void)state;
    static const char missing[] = "model.layers.1.experts.3.up_proj.weight_packed";
    const char *gone =
        damaged("gone", "model.safetensors", missing, "model.layers.1.experts.9.up_proj.weight_packed");
    mixture_check_verified(gone, NULL, missing, "is missing, expected I32 [96, 8]");
    assert_error(load(gone), ERR_FORMAT, "experts.3.up_proj.weight_packed' is missing");
    assert_error(cutting_convert(gone, support_path("never"), QUANT_GPTQ), ERR_FORMAT, "is missing");
    const char *shape = damaged("shape", "model.safetensors", "experts.7.down_proj.weight_scale\"",
                                "experts.7.down_proj.weight_scald\"");
    mixture_check_verified(shape, NULL, "experts.7.down_proj.weight_scale",
                           "is missing, expected BF16 [64, 3]");
    const char *groups = damaged("coarser", "config.json", "\"group_size\": 32", "\"group_size\": 64");
    mixture_check_verified(groups, NULL, "q_proj.weight_scale", "is BF16 [128, 2], expected BF16 [128, 1]");
    cutting_check_absent(support_path("never"));
}

/* A byte of a tensor that holds all experts of a layer: it is named as it is stored, and as what is computed with. */
static void test_damaged_whole(void **state)
{
    (void)state;
    struct cut_options o = mixture_rtn(support_path("spoiled"));
    struct checkpoint ck;
    char some[64];
    size_t n, at = 0;
    o.recipe.ignore = mixture_middle_layer;
    o.recipe.n_ignore = 1;
    mixture_check_good(mixture_made(&o));
    assert_ok(checkpoint_open(&ck, o.out));
    const struct tensor *t = mixture_stored(&ck, 1, "gate_up_proj");
    const uint64_t expert = t->bytes / N_EXPERTS;
    assert_ok(checkpoint_read(&ck, t, 5 * expert, sizeof some, some));
    checkpoint_close(&ck);
    char *path = file_join(o.out, "model.safetensors"), *bytes = support_read(path, &n);
    while (at + sizeof some <= n && memcmp(bytes + at, some, sizeof some))
        at++;
    assert_true(at + sizeof some <= n);
    bytes[at] ^= 1;
    support_write(path, bytes, n);
    free(bytes);
    free(path);
    mixture_check_verified(o.out, NULL, "model.layers.1.experts.gate_up_proj",
                           "differs from what was written");
    char *record = file_join(o.out, "gemcut.json");
    assert_int_equal(remove(record), 0);
    free(record);
    mixture_check_verified(o.out, NULL, NULL, NULL);
    mixture_check_verified(o.out, mixture_whole(), "model.layers.1.experts.5.gate_proj.weight",
                           "is not quantized, yet differs from the source");
}

/* Some tensors of one cut's file, the others of another's, announced or put. */
static void take_tensors(struct writer *w, const struct checkpoint *ck, const char *name, bool named,
                         bool put, size_t *ids)
{
    for (size_t i = 0; i < ck->n_tensors; i++) {
        const struct tensor *t = &ck->tensors[i];
        if ((strstr(t->name, name) != NULL) != named)
            continue;
        if (!put) {
            assert_ok(writer_add(w, t->name, t->name, t->dtype, t->n_dims, t->shape, &ids[i]));
            continue;
        }
        char *bytes = malloc(t->bytes);
        assert_non_null(bytes);
        assert_ok(checkpoint_read(ck, t, 0, t->bytes, bytes));
        assert_ok(writer_put(w, ids[i], 0, bytes, t->bytes));
        free(bytes);
    }
}

/* One linear of one expert with groups of 64 among groups of 32, in tensors and description. */
static const char *one_other(void)
{
    static const char module[] = "model.layers.1.experts.3.up_proj", groups[] = "\"config_groups\": {";
    const struct cut_options fine = mixture_rtn(support_path("rtn"));
    struct cut_options coarse = mixture_rtn(support_path("coarse"));
    struct recipe_override override = {(char[]){"*experts*"}, {4, true, 0}};
    const char *folder = support_path("one-other");
    struct checkpoint a, b;
    struct writer *w;
    struct text config = {0};
    size_t *ids[2], n;
    coarse.recipe.overrides = &override;
    coarse.recipe.n_overrides = 1;
    assert_ok(checkpoint_open(&a, mixture_made(&fine)));
    assert_ok(checkpoint_open(&b, mixture_made(&coarse)));
    ids[0] = calloc(a.n_tensors, sizeof **ids);
    ids[1] = calloc(b.n_tensors, sizeof **ids);
    assert_true(ids[0] && ids[1]);
    assert_ok(file_make_folder(folder));
    assert_ok(writer_open(&w, folder, UINT64_MAX));
    take_tensors(w, &a, module, false, false, ids[0]);
    take_tensors(w, &b, module, true, false, ids[1]);
    assert_ok(writer_begin(w, false));
    take_tensors(w, &a, module, false, true, ids[0]);
    take_tensors(w, &b, module, true, true, ids[1]);
    assert_ok(writer_finish(w));
    writer_close(w);
    free(ids[0]);
    free(ids[1]);
    checkpoint_close(&a);
    checkpoint_close(&b);
    char *text = support_read(support_path("rtn/config.json"), &n), *at;
    text[n - 1] = '\0';
    assert_non_null(at = strstr(text, groups));
    at += strlen(groups);
    text_printf(&config,
                "%.*s\"group_9\": {\"targets\": [\"%s\"], \"weights\": {\"num_bits\": 4, \"type\": \"int\", "
                "\"symmetric\": true, \"strategy\": \"channel\"}}, %s",
                (int)(at - text), text, module, at);
    assert_ok(text_finish(&config));
    support_write(support_path("one-other/config.json"), config.data, config.len);
    text_free(&config);
    free(text);
    return folder;
}

/* It is whole, but readers run all experts of a layer in one go, and so does gemcut. */
static void test_one_other(void **state)
{
    (void)state;
    const char *folder = one_other();
    mixture_check_verified(folder, NULL, NULL, NULL);
    assert_error(load(folder), ERR_UNSUPPORTED, "which is not supported for experts");
    assert_non_null(strstr(err_message(), "'model.layers.1.experts.0.gate_proj.weight' and "
                                          "'model.layers.1.experts.3.up_proj.weight'"));
    assert_error(cutting_convert(folder, support_path("never"), QUANT_GPTQ), ERR_UNSUPPORTED,
                 "are quantized differently, and readers run them as one matrix");
    cutting_check_absent(support_path("never"));
}

/* --- another source ------------------------------------------------------------------------------------------------- */

/* Models of which some settings are the cut's: nothing is compared linear by linear. */
static void test_other_source(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *object, *message; /* of the members of config.json; what is found */
    } others[] = {
        {"\"num_experts\": 8", "\"num_experts\": 4", "num_experts", "is 8, the source has 4"},
        {"\"top_k_experts\": 2", "\"top_k_experts\": 3", "top_k_experts", "is 2, the source has 3"},
        {"_size\": 96", "_size\": 64", "moe_intermediate_size", "is 96, the source has 64"},
        {"moe_block\": true", "moe_block\": false", "num_experts", "is 8, the source has 0"},
        {"k_eq_v\": true", "k_eq_v\": false", "model.layers.2.self_attn.o_proj.weight",
         "is no linear of that shape"},
        {"\"num_key_value_heads\": 1", "\"num_key_value_heads\": 2", "model.layers.2.self_attn.k_proj.weight",
         "is no linear of that shape"},
    };
    const struct cut_options o = mixture_rtn(support_path("rtn"));
    mixture_made(&o);
    for (size_t i = 0; i < N_OF(others); i++) {
        struct tiny_gemma g = *mixture;
        char more[1024], name[20];
        const char *at = strstr(mixture->more, others[i].from);
        assert_non_null(at);
        snprintf(more, sizeof more, "%.*s%s%s", (int)(at - mixture->more), mixture->more, others[i].to,
                 at + strlen(others[i].from));
        snprintf(name, sizeof name, "other-%zu", i);
        g.more = more;
        mixture_check_verified(o.out, cutting_model(name, &g), others[i].object, others[i].message);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_converted),     cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_damaged_whole), cmocka_unit_test(test_one_other),
        cmocka_unit_test(test_other_source),
    };
    return cmocka_run_group_tests(tests, mixture_make, support_remove_folder);
}

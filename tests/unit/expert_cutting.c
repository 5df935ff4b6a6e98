#include "tests/unit/expert_cutting.h"

#include "base/file.h"
#include "kernels/budget.h"
#include "report/verify.h"
#include "tests/unit/support.h"

const struct tiny_gemma *const mixture = &tiny_families[TINY_GEMMA4_EXPERTS];
const char *const mixture_all_experts[1] = {"*experts*"};
const char *const mixture_middle_layer[1] = {"*layers.1.experts*"};
static struct dataset data = {.samples = SAMPLES, .length = LENGTH};

int mixture_make(void **state)
{
    static int32_t ids[SAMPLES * LENGTH];
    for (int i = 0; i < SAMPLES * LENGTH; i++)
        ids[i] = i % LENGTH ? (i * 7919 + 13) % (int32_t)mixture->vocab : 2;
    data.ids = ids;
    return support_make_folder(state);
}

const char *mixture_whole(void)
{
    return cutting_model("whole", mixture);
}

const char *mixture_apart(void)
{
    struct tiny_gemma g = *mixture;
    g.apart = true;
    return cutting_model("apart", &g);
}

struct cut_options mixture_rtn(const char *out)
{
    struct cut_options o = cutting_options(mixture_whole(), out);
    o.recipe.scheme.group = 32;
    return o;
}

struct cut_options mixture_gptq(const char *out)
{
    struct cut_options o = mixture_rtn(out);
    o.recipe.method = "gptq";
    o.recipe.sweep = o.recipe.calibrated = true;
    o.recipe.scales.rule = SCALE_BLOCK;
    o.recipe.damping = 0.01;
    o.recipe.passes = 1;
    o.recipe.calib.text = "made up";
    o.data = &data;
    return o;
}

const char *mixture_made(const struct cut_options *o)
{
    if (!file_exists(o->out))
        assert_ok(cutting_run(o, &cutting_silent));
    return o->out;
}

void mixture_check_same(const char *a, const char *b)
{
    cutting_check_same_file(a, b, "model.safetensors");
}

int mixture_lift_budget(void **state)
{
    (void)state;
    budget_set(0);
    return 0;
}

void mixture_check_verified(const char *cut, const char *source, const char *object, const char *finding)
{
    struct verify_report r;
    const struct verify_options o = {.cut = cut, .source = source, .device = "cpu", .n_workers = 2};
    assert_ok(verify_run(&r, &o));
    if (!finding && r.n_findings)
        fail_msg("%s against %s: '%s' %s", cut, source ? source : "nothing", r.findings[0].object,
                 r.findings[0].message);
    if (finding &&
        (!r.n_findings || !strstr(r.findings[0].object, object) || !strstr(r.findings[0].message, finding)))
        fail_msg("%s: found '%s' %s, expected '%s' %s", cut, r.n_findings ? r.findings[0].object : "nothing",
                 r.n_findings ? r.findings[0].message : "", object, finding);
    if (!finding && r.has_record) {
        assert_true(r.n_recorded_equal > 0 && r.n_files_equal > 0);
        assert_true(!source || (r.n_unquantized > 0 && r.n_source_equal == r.n_unquantized));
    }
    verify_free(&r);
}

void mixture_check_good(const char *cut)
{
    mixture_check_verified(cut, NULL, NULL, NULL);
    mixture_check_verified(cut, mixture_whole(), NULL, NULL);
    mixture_check_verified(cut, mixture_apart(), NULL, NULL);
}

const struct tensor *mixture_stored(const struct checkpoint *ck, int layer, const char *name)
{
    char full[100];
    snprintf(full, sizeof full, "model.layers.%d.experts.%s", layer, name);
    return checkpoint_tensor(ck, full);
}

void mixture_check_kept(const char *cut, const char *source, int layer)
{
    static const char *const names[] = {"gate_up_proj", "down_proj"};
    struct checkpoint a, b;
    assert_ok(checkpoint_open(&a, cut));
    assert_ok(checkpoint_open(&b, source));
    for (size_t i = 0; i < N_OF(names); i++) {
        const struct tensor *x = mixture_stored(&a, layer, names[i]),
                            *y = mixture_stored(&b, layer, names[i]);
        assert_true(x && y && x->n_dims == 3 && x->dtype == y->dtype && x->bytes == y->bytes);
        assert_memory_equal(x->shape, y->shape, 3 * sizeof *x->shape);
        char *p = malloc(x->bytes), *q = malloc(x->bytes);
        assert_true(p && q);
        assert_ok(checkpoint_read(&a, x, 0, x->bytes, p));
        assert_ok(checkpoint_read(&b, y, 0, x->bytes, q));
        assert_memory_equal(p, q, x->bytes);
        free(p);
        free(q);
    }
    assert_null(mixture_stored(&a, layer, "0.gate_proj.weight"));
    assert_null(mixture_stored(&a, layer, "0.gate_proj.weight_packed"));
    checkpoint_close(&a);
    checkpoint_close(&b);
}

/* What becomes of OUT and OUT.partial when something is in the way, goes wrong, is killed or interrupted; and
 * weights that are not finite. */
#include "base/file.h"
#include "formats/record.h"
#include "tests/unit/cutting.h"
#include "tests/unit/support.h"

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *plain(void)
{
    return cutting_model("plain", &tiny_gemma_plain);
}

static void put(const char *path)
{
    support_write(path, "precious", 8);
}

static void check_precious(const char *path)
{
    size_t n;
    char *text = support_read(path, &n);
    assert_string_equal(text, "precious");
    free(text);
}

/* A cut that nothing was in the way of, to compare others with. */
static const char *reference(void)
{
    const char *out = support_path("reference");
    if (!file_exists(out)) {
        const struct cut_options o = cutting_options(plain(), out);
        assert_ok(cutting_run(&o, &cutting_silent));
    }
    return out;
}

/* --- OUT ------------------------------------------------------------------------------------------------------ */

static void test_out_exists(void **state)
{
    (void)state;
    struct cut_options o = cutting_options(plain(), support_path("taken"));
    assert_ok(file_make_folder(o.out));
    put(support_path("taken/thesis.tex"));
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "taken: exists");
    o.overwrite = true; /* replaces only what gemcut wrote */
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "has no gemcut.json");
    check_precious(support_path("taken/thesis.tex"));
    o.out = support_path("taken/thesis.tex");
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "is not replaced");
    check_precious(o.out);
    assert_false(file_exists(support_path("taken.partial")));
    /* a link to a cut is not a cut */
    reference();
    o.out = support_path("link");
    assert_int_equal(symlink("reference", o.out), 0);
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "is not replaced");
    assert_int_equal(unlink(o.out), 0);
}

static void test_overwrite(void **state)
{
    (void)state;
    struct cut_options o = cutting_options(plain(), support_path("again"));
    o.recipe.scheme.group = 32;
    assert_ok(cutting_run(&o, &cutting_silent));
    o.recipe.scheme.group = 128;
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "again: exists (--overwrite");
    o.overwrite = true;
    assert_ok(cutting_run(&o, &cutting_silent));
    cutting_check_same(o.out, reference());
    assert_false(file_exists(cutting_partial(o.out)));
}

static void test_bad_out(void **state)
{
    (void)state;
    static const char *const names[] = {"", "/", "//", ".", "..", "a/..", "a/.", "./", "a/..//"};
    struct cut *c;
    for (size_t i = 0; i < N_OF(names); i++) {
        const struct cut_options o = cutting_options(plain(), names[i]);
        assert_error(cut_open(&c, &o), ERR_USAGE, "cannot be the output");
    }
    const struct cut_options nowhere = cutting_options(plain(), support_path("no/where"));
    assert_error(cutting_run(&nowhere, &cutting_silent), ERR_IO, "where.partial: cannot create the folder");
    char slashes[4096];
    snprintf(slashes, sizeof slashes, "%s///", support_path("slashes"));
    struct cut_options o = cutting_options(plain(), slashes);
    assert_ok(cutting_run(&o, &cutting_silent));
    cutting_check_same(support_path("slashes"), reference());
}

/* --- OUT.partial ---------------------------------------------------------------------------------------------- */

static void test_foreign_partial(void **state)
{
    (void)state;
    const struct cut_options o = cutting_options(plain(), support_path("foreign"));
    assert_ok(file_make_folder(cutting_partial(o.out)));
    put(support_path("foreign.partial/thesis.tex"));
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "is not the remains of a gemcut run");
    check_precious(support_path("foreign.partial/thesis.tex"));
    assert_false(file_exists(o.out));
}

static void test_locked_partial(void **state)
{
    (void)state;
    const struct cut_options o = cutting_options(plain(), support_path("locked"));
    assert_ok(file_make_folder(cutting_partial(o.out)));
    put(support_path("locked.partial/model.safetensors"));
    const int fd = open(support_path("locked.partial/.gemcut-partial"), O_RDWR | O_CREAT, 0600);
    assert_true(fd >= 0 && flock(fd, LOCK_EX) == 0);
    assert_error(cutting_run(&o, &cutting_silent), ERR_IO, "another gemcut is writing there");
    check_precious(support_path("locked.partial/model.safetensors")); /* not ours to remove */
    close(fd);
    assert_ok(cutting_run(&o, &cutting_silent)); /* the other one was killed */
    cutting_check_same(o.out, reference());
    assert_false(file_exists(cutting_partial(o.out)));
}

static void test_killed(void **state)
{
    (void)state;
    const struct cut_options o = cutting_options(plain(), support_path("killed"));
    int left = 4;
    cutting_run_killed(&o, &(struct cut_events){.on_linear = cutting_kill_here, .ctx = &left});
    assert_false(file_exists(o.out));
    assert_true(file_exists(support_path("killed.partial/.gemcut-partial")));
    cutting_run_killed(&o, &(struct cut_events){.on_stage = cutting_kill_at_check});
    assert_false(file_exists(o.out));
    assert_true(file_exists(support_path("killed.partial/gemcut.json")));
    assert_ok(cutting_run(&o, &cutting_silent));
    cutting_check_same(o.out, reference());
    assert_false(file_exists(cutting_partial(o.out)));
}

/* An old cut stays whole until the new one takes its place. */
static void test_killed_overwriting(void **state)
{
    (void)state;
    struct cut_options o = cutting_options(plain(), support_path("old"));
    assert_ok(cutting_run(&o, &cutting_silent));
    o.overwrite = true;
    o.recipe.scheme.group = 32;
    cutting_run_killed(&o, &(struct cut_events){.on_stage = cutting_kill_at_check});
    cutting_check_same(o.out, reference());
    o.recipe.scheme.group = 128;
    assert_ok(cutting_run(&o, &cutting_silent));
    cutting_check_same(o.out, reference());
    assert_false(file_exists(cutting_partial(o.out)));
}

static void interrupt_here(void *ctx, const struct cut_linear *linear)
{
    (void)ctx;
    (void)linear;
    err_request_interrupt();
}

/* In a child, because a request to stop cannot be taken back. */
static void test_interrupted(void **state)
{
    (void)state;
    const struct cut_options o = cutting_options(plain(), support_path("interrupted"));
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        _exit(cutting_run(&o, &(struct cut_events){.on_linear = interrupt_here}) == ERR_INTERRUPTED ? 0 : 1);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cutting_check_absent(o.out);
}

/* --- what is not finite --------------------------------------------------------------------------------------- */

static const struct {
    const char *name, *tensor;
    enum dtype dtype;
    int64_t index;
    float value;
    const char *message;
} nonfinite[] = {
    {"nan-down", "model.layers.1.mlp.down_proj.weight", DTYPE_BF16, 3 * 4352 + 4100, NAN,
     "row 3, column 4100"},
    {"inf-gate", "model.layers.0.mlp.gate_proj.weight", DTYPE_BF16, 4351 * 256 + 255, INFINITY,
     "row 4351, column 255"}, /* the last weight of the last of three tasks */
    {"nan-q-f16", "model.layers.0.self_attn.q_proj.weight", DTYPE_F16, 0, NAN, "row 0, column 0"},
    {"inf-o-f32", "model.layers.0.self_attn.o_proj.weight", DTYPE_F32, 256, -INFINITY, "row 1, column 0"},
    {"nan-norm", "model.norm.weight", DTYPE_BF16, 9, NAN, "row 0, column 9"},
    {"inf-embed", "model.embed_tokens.weight", DTYPE_BF16, 1099 * 256 + 1, INFINITY, "row 1099, column 1"},
};

static void test_nonfinite_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OF(nonfinite); i++) {
        struct tiny_gemma g = tiny_gemma_plain;
        g.dtype = nonfinite[i].dtype;
        g.bad_tensor = nonfinite[i].tensor;
        g.bad_index = nonfinite[i].index;
        g.bad_value = nonfinite[i].value;
        const struct cut_options o =
            cutting_options(cutting_model(nonfinite[i].name, &g), support_path("refused-%zu", i));
        assert_error(cutting_run(&o, &cutting_silent), ERR_FORMAT, nonfinite[i].tensor);
        assert_non_null(strstr(err_message(), nonfinite[i].message));
        cutting_check_absent(o.out);
    }
}

/* Allowed: the result is that of a zero in its place, but for the hash of the source; other tensors pass. */
static void test_nonfinite_allowed(void **state)
{
    (void)state;
    struct tiny_gemma g = tiny_gemma_plain;
    g.bad_tensor = nonfinite[0].tensor;
    g.bad_index = nonfinite[0].index;
    struct cut_options zero = cutting_options(cutting_model("zero-down", &g), support_path("zero"));
    struct cut_options o = cutting_options(support_path("%s", nonfinite[0].name), support_path("allowed"));
    o.recipe.allow_nonfinite = zero.recipe.allow_nonfinite = true;
    assert_ok(cutting_run(&zero, &cutting_silent));
    assert_ok(cutting_run(&o, &cutting_silent));
    size_t n, m;
    char *a = support_read(support_path("zero/model.safetensors"), &n);
    char *b = support_read(support_path("allowed/model.safetensors"), &m);
    assert_true(n == m && !memcmp(a, b, n));
    free(a);
    free(b);
    char *record = support_read(support_path("allowed/gemcut.json"), &n);
    assert_non_null(strstr(record, "\"nonfinite_as_zero\": 1"));
    free(record);
    o = cutting_options(support_path("nan-norm"), support_path("norm-allowed"));
    o.recipe.allow_nonfinite = true;
    assert_ok(cutting_run(&o, &cutting_silent));
    a = support_read(support_path("norm-allowed/model.safetensors"), &n);
    const char *nan = memmem(a, n, "\xc0\x7f", 2);
    assert_non_null(nan); /* unquantized tensors keep their bits */
    free(a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_out_exists),
        cmocka_unit_test(test_overwrite),
        cmocka_unit_test(test_bad_out),
        cmocka_unit_test(test_foreign_partial),
        cmocka_unit_test(test_locked_partial),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_killed_overwriting),
        cmocka_unit_test(test_interrupted),
        cmocka_unit_test(test_nonfinite_refused),
        cmocka_unit_test(test_nonfinite_allowed),
    };
    return cmocka_run_group_tests(tests, support_make_folder, support_remove_folder);
}

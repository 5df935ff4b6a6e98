/* A calibrated run that is killed anywhere and resumed ends in the same bytes; what does not belong together is not
 * put together. */
#include "base/file.h"
#include "quantize/journal.h"
#include "tests/unit/cutting.h"
#include "tests/unit/support.h"

#include <sys/wait.h>
#include <unistd.h>

enum { SAMPLES = 4, LENGTH = 24, N_LINEARS = 14 };

static const struct tiny_gemma small = {.hidden = 64,
                                        .ffn = 96,
                                        .vocab = 128,
                                        .layers = 2,
                                        .heads = 2,
                                        .kv_heads = 1,
                                        .head_dim = 32,
                                        .dtype = DTYPE_BF16};
static struct dataset data = {.samples = SAMPLES, .length = LENGTH};

static int make_data(void **state)
{
    (void)state;
    static int32_t ids[SAMPLES * LENGTH];
    for (int i = 0; i < SAMPLES * LENGTH; i++)
        ids[i] = i % LENGTH ? (i * 7919 + 13) % (int32_t)small.vocab : 2;
    data.ids = ids;
    return support_make_folder(state);
}

static struct cut_options options(const char *out)
{
    struct cut_options o = cutting_options(cutting_model("small", &small), out);
    o.recipe.method = "gptq";
    o.recipe.sweep = true;
    o.recipe.scheme = (struct quant_scheme){4, false, 32}; /* with zero points: they are packed */
    o.recipe.scales.rule = SCALE_BLOCK;
    o.recipe.calibrated = true;
    o.recipe.damping = 0.01;
    o.recipe.passes = 2;
    o.recipe.calib.text = "made up";
    o.data = &data;
    return o;
}

/* The same with a tuning of each block behind it. */
static struct cut_options tuned(const char *out)
{
    struct cut_options o = options(out);
    o.recipe.method = "autoround";
    o.recipe.tune = (struct tune_options){
        .iterations = 3, .batch = 2, .lr = 0.1, .range_lr = 0.02, .init = TUNE_FROM_CODES};
    return o;
}

/* What a run that nothing disturbs gives. */
static const char *reference(const struct cut_options *like)
{
    const char *out = support_path("reference-%s-%s", like->recipe.method, file_base(like->model));
    if (!file_exists(out)) {
        struct cut_options o = *like;
        o.out = out;
        o.resume = false;
        assert_ok(cutting_run(&o, &cutting_silent));
    }
    return out;
}

/* --- dying ------------------------------------------------------------------------------------------------------ */

/* Killed as the n-th linear is told of, when it is not in the journal yet. */
static void kill_after(struct cut_options o, int n)
{
    cutting_run_killed(&o, &(struct cut_events){.on_linear = cutting_kill_here, .ctx = &n});
    assert_false(file_exists(o.out));
}

static size_t resume(struct cut_options o)
{
    struct cut *c;
    o.resume = true;
    assert_ok(cut_open(&c, &o));
    assert_ok(cut_run(c, &cutting_silent));
    const size_t n = cut_recalled(c);
    cut_close(c);
    cutting_check_same(o.out, reference(&o));
    assert_false(file_exists(cutting_partial(o.out)));
    return n;
}

static void test_killed_anywhere(void **state)
{
    (void)state;
    for (int n = 1; n <= N_LINEARS; n++) {
        const struct cut_options o = options(support_path("killed-%d", n));
        kill_after(o, n);
        /* q, k and v are one set: it counts when all of it was noted */
        const size_t recalled = resume(o), noted = (size_t)n - 1;
        assert_true(recalled <= noted && recalled + 2 >= noted);
    }
}

/* A tuned block counts when all of it was noted: its linears have been tuned together. */
static void test_tuning_killed_anywhere(void **state)
{
    (void)state;
    enum { EACH = N_LINEARS / 2 };
    for (int n = 1; n <= N_LINEARS; n++) {
        const struct cut_options o = tuned(support_path("tuned-%d", n));
        kill_after(o, n);
        const size_t recalled = resume(o), whole_blocks = (size_t)(n - 1) / EACH * EACH;
        assert_int_equal(recalled, whole_blocks);
    }
}

/* What a block reads of earlier ones, and of the embeddings, is there again: the last three layers of this model read
 * keys and values of two before them. */
static void test_sharing_killed(void **state)
{
    (void)state;
    enum { WHOLE = 3 * 7, SHARING = 3 * 5 };
    for (int i = 0; i < 2; i++)
        for (int n = 5; n <= WHOLE + SHARING; n += 6) {
            const char *out = support_path("sharing-%d-%d", i, n);
            struct cut_options o = i ? tuned(out) : options(out);
            o.model = cutting_model("sharing", &tiny_families[TINY_GEMMA4_SHARING]);
            kill_after(o, n);
            const size_t recalled = resume(o);
            assert_true(recalled < (size_t)n && recalled + 7 >= (size_t)n);
        }
}

static void test_killed_again(void **state)
{
    (void)state;
    struct cut_options o = options(support_path("again"));
    kill_after(o, 4);
    o.resume = true;
    kill_after(o, 9);
    cutting_run_killed(&o, &(struct cut_events){.on_stage = cutting_kill_at_check});
    assert_int_equal(resume(o), N_LINEARS);
}

/* Formats that are written transposed are read back transposed. */
static void test_killed_in_other_formats(void **state)
{
    (void)state;
    for (int f = QUANT_AUTO_ROUND; f < N_QUANT_FORMATS; f++) {
        struct cut_options whole = options(support_path("whole-%d", f)),
                           o = options(support_path("part-%d", f));
        whole.recipe.scheme.symmetric = o.recipe.scheme.symmetric = true;
        whole.recipe.format = o.recipe.format = (enum quant_format)f;
        assert_ok(cutting_run(&whole, &cutting_silent));
        kill_after(o, 9);
        o.resume = true;
        struct cut *c;
        assert_ok(cut_open(&c, &o));
        assert_ok(cut_run(c, &cutting_silent));
        assert_true(cut_recalled(c) >= 6);
        cut_close(c);
        cutting_check_same(o.out, whole.out);
    }
}

/* --- what does not fit ------------------------------------------------------------------------------------------ */

/* Turns over one byte of a file, counted from its end. */
static void damage(const char *path, size_t from_end)
{
    size_t n;
    char *text = support_read(path, &n);
    assert_true(from_end < n);
    text[n - 1 - from_end] ^= 1;
    support_write(path, text, n);
    free(text);
}

static void test_damaged_codes(void **state)
{
    (void)state;
    const struct cut_options o = options(support_path("codes"));
    kill_after(o, N_LINEARS);
    size_t n;
    const char *path = support_path("codes.partial/model.safetensors");
    free(support_read(path, &n));
    for (size_t at = 0; at < n; at += n / 7 + 1) /* in whatever tensors those lie */
        damage(path, at);
    resume(o);
}

static void test_torn_journal(void **state)
{
    (void)state;
    for (size_t cut = 1; cut < 2000; cut += 311) {
        const struct cut_options o = options(support_path("torn-%zu", cut));
        kill_after(o, 8);
        const char *path = support_path("torn-%zu.partial/%s", cut, JOURNAL_NAME);
        size_t n;
        char *text = support_read(path, &n);
        assert_true(n > cut);
        support_write(path, text, n - cut);
        free(text);
        resume(o);
    }
}

static void check_refused(struct cut_options o, const char *message)
{
    o.resume = true;
    assert_error(cutting_run(&o, &cutting_silent), ERR_USAGE, message);
    assert_true(file_exists(support_path("other.partial/%s", JOURNAL_NAME)));
}

static void test_other_request(void **state)
{
    (void)state;
    const struct cut_options o = options(support_path("other"));
    kill_after(o, 5);
    struct cut_options changed = o;
    changed.recipe.damping = 0.02;
    check_refused(changed, "another recipe");
    changed = o;
    changed.version = "0.0";
    check_refused(changed, "another version");
    changed = o;
    struct dataset fewer = data;
    fewer.samples--;
    changed.data = &fewer;
    check_refused(changed, "another calibration text");
    changed = o;
    changed.shard_bytes = 1 << 20;
    check_refused(changed, "another recipe");
    resume(o);
}

/* Without --resume a run begins anew. */
static void test_anew(void **state)
{
    (void)state;
    const struct cut_options o = options(support_path("anew"));
    kill_after(o, 5);
    assert_ok(cutting_run(&o, &cutting_silent));
    cutting_check_same(o.out, reference(&o));
}

/* With --resume and nothing there, too. */
static void test_nothing_to_resume(void **state)
{
    (void)state;
    assert_int_equal(resume(options(support_path("nothing"))), 0);
}

static void interrupt_here(void *ctx, const struct cut_linear *linear)
{
    (void)linear;
    if (--*(int *)ctx == 0)
        err_request_interrupt();
}

static void test_interrupted(void **state)
{
    (void)state;
    const struct cut_options o = options(support_path("interrupted"));
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) { /* a request to stop cannot be taken back */
        int left = 6;
        const int rc = cutting_run(&o, &(struct cut_events){.on_linear = interrupt_here, .ctx = &left});
        _exit(rc == ERR_INTERRUPTED && strstr(err_message(), "--resume") ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_true(resume(o) >= 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_killed_anywhere),
        cmocka_unit_test(test_tuning_killed_anywhere),
        cmocka_unit_test(test_sharing_killed),
        cmocka_unit_test(test_killed_again),
        cmocka_unit_test(test_killed_in_other_formats),
        cmocka_unit_test(test_damaged_codes),
        cmocka_unit_test(test_torn_journal),
        cmocka_unit_test(test_other_request),
        cmocka_unit_test(test_anew),
        cmocka_unit_test(test_nothing_to_resume),
        cmocka_unit_test(test_interrupted),
    };
    return cmocka_run_group_tests(tests, make_data, support_remove_folder);
}

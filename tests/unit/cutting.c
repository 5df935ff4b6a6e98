#include "tests/unit/cutting.h"

#include "base/file.h"
#include "tests/unit/support.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

const struct cut_events cutting_silent;

struct cut_options cutting_options(const char *model, const char *out)
{
    return (struct cut_options){.model = model,
                                .out = out,
                                .device = "cpu",
                                .version = "test",
                                .recipe = {.method = "rtn", .scheme = {4, true, 128}},
                                .shard_bytes = UINT64_MAX,
                                .n_workers = 2};
}

int cutting_run(const struct cut_options *options, const struct cut_events *events)
{
    struct cut *c;
    int rc = cut_open(&c, options);
    if (!rc)
        rc = cut_run(c, events);
    if (!rc) {
        size_t n;
        const struct cut_linear *linears = cut_linears(c, &n);
        assert_int_equal(n, cut_totals(c).n_linears);
        for (size_t i = 0; i < n; i++)
            assert_true(linears[i].error >= 0 && linears[i].error < 0.5);
    }
    cut_close(c);
    return rc;
}

const char *cutting_model(const char *name, const struct tiny_gemma *g)
{
    const char *folder = support_path("%s", name);
    if (!file_exists(folder))
        tiny_gemma_write(g, folder);
    return folder;
}

void cutting_check_same_file(const char *a, const char *b, const char *name)
{
    size_t n, m;
    char *p = file_join(a, name), *q = file_join(b, name);
    char *s = support_read(p, &n), *t = support_read(q, &m);
    if (n != m || memcmp(s, t, n))
        fail_msg("%s and %s differ", p, q);
    free(p);
    free(q);
    free(s);
    free(t);
}

void cutting_check_same(const char *a, const char *b)
{
    struct file_list x, y;
    assert_ok(file_list(&x, a));
    assert_ok(file_list(&y, b));
    assert_int_equal(x.n, y.n);
    for (size_t i = 0; i < x.n; i++) {
        assert_string_equal(x.names[i], y.names[i]);
        cutting_check_same_file(a, b, x.names[i]);
    }
    file_list_free(&x);
    file_list_free(&y);
}

const char *cutting_partial(const char *out)
{
    return support_path("%s.partial", file_base(out));
}

void cutting_check_absent(const char *out)
{
    assert_false(file_exists(out));
    assert_false(file_exists(cutting_partial(out)));
}

void cutting_kill_here(void *ctx, const struct cut_linear *linear)
{
    (void)linear;
    if (--*(int *)ctx == 0)
        kill(getpid(), SIGKILL);
}

void cutting_kill_at_check(void *ctx, enum cut_stage stage, uint64_t total)
{
    (void)ctx;
    (void)total;
    if (stage == CUT_CHECK)
        kill(getpid(), SIGKILL);
}

int cutting_convert(const char *from, const char *to, enum quant_format format)
{
    static const struct convert_events silent;
    const struct convert_options o = {.model = from,
                                      .out = to,
                                      .version = "test",
                                      .format = format,
                                      .shard_bytes = UINT64_MAX,
                                      .n_workers = 2};
    struct convert *c;
    int rc = convert_open(&c, &o);
    if (!rc)
        rc = convert_run(c, &silent);
    convert_close(c);
    return rc;
}

void cutting_run_killed(const struct cut_options *o, const struct cut_events *events)
{
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        cutting_run(o, events);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

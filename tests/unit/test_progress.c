/* The progress line: what reaches stderr on a terminal and elsewhere. stderr is a temporary file meanwhile. */
#include "base/clock.h"
#include "cli/progress.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { N_THREADS = 8, UPDATES = 20000 };

static char captured[1 << 16];
static FILE *file;
static int saved;

static void capture_begin(void)
{
    fflush(stderr);
    file = tmpfile();
    assert_non_null(file);
    saved = dup(STDERR_FILENO);
    assert_true(dup2(fileno(file), STDERR_FILENO) >= 0);
}

static const char *capture_end(void)
{
    fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(saved);
    rewind(file);
    captured[fread(captured, 1, sizeof captured - 1, file)] = '\0';
    fclose(file);
    return captured;
}

static void test_terminal_line_is_removed(void **state)
{
    (void)state;
    capture_begin();
    progress_setup(false, true);
    progress_begin("cut", PROGRESS_ITEMS, 4);
    progress_print_line("a line");
    progress_update(2, "bad\nname");
    progress_end();
    assert_string_equal(capture_end(), "\rcut   0%  0 of 4"
                                       "\r                \r"
                                       "a line\n"
                                       "\rcut  50%  2 of 4  bad?name"
                                       "\r                          \r");
}

static void test_blocks_elsewhere(void **state)
{
    (void)state;
    capture_begin();
    progress_setup(false, false);
    progress_begin("cut", PROGRESS_BYTES, 4000);
    progress_advance(1000, "x");
    progress_block("block 1 of 4");
    progress_update(4000, "y");
    progress_update(3000, "older news"); /* from a slower thread */
    progress_block("block 4 of 4");
    progress_end();
    progress_block("nothing runs");
    assert_string_equal(capture_end(), "cut: block 1 of 4 (25%)\ncut: block 4 of 4 (100%)\n");
}

static void test_silent(void **state)
{
    (void)state;
    capture_begin();
    progress_setup(true, true);
    progress_begin("cut", PROGRESS_ITEMS, 0);
    progress_block("block");
    progress_update(1, "x");
    progress_end();
    assert_string_equal(capture_end(), "");
}

static void *work(void *ctx)
{
    (void)ctx;
    for (int i = 0; i < UPDATES; i++)
        progress_advance(1, "model.layers.0.mlp.down_proj");
    return NULL;
}

static void test_threads_share_the_line(void **state)
{
    (void)state;
    pthread_t threads[N_THREADS];
    capture_begin();
    progress_setup(false, true);
    const double start = clock_seconds();
    progress_begin("cut", PROGRESS_ITEMS, N_THREADS * UPDATES);
    for (int i = 0; i < N_THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, NULL), 0);
    for (int i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
    const double elapsed = clock_seconds() - start;
    progress_print_line("-");
    progress_advance(0, NULL); /* is drawn: the line above made it due */
    progress_end();
    const char *text = capture_end();
    int drawn = 0;
    for (const char *p = text; (p = strstr(p, "\rcut ")); p++)
        drawn++;
    assert_true(drawn <= 3 + 6 * elapsed);
    assert_non_null(strstr(text, "-\n\rcut 100%  160000 of 160000"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_terminal_line_is_removed),
        cmocka_unit_test(test_blocks_elsewhere),
        cmocka_unit_test(test_silent),
        cmocka_unit_test(test_threads_share_the_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

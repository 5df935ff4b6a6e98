#include "tests/unit/support.h"

#include "base/file.h"

#include <ftw.h>
#include <limits.h>
#include <unistd.h>

/* Under AddressSanitizer an impossible request must come back as NULL, as it does elsewhere. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1";
}

static char folder[PATH_MAX];

void support_assert_ok(int rc, const char *call, const char *file, int line)
{
    if (rc < 0)
        print_error("%s: %d: %s\n", call, rc, err_message());
    _assert_true(rc >= 0, call, file, line);
}

void support_assert_error(int rc, int code, const char *part, const char *call, const char *file, int line)
{
    const int as_expected = rc == code && strstr(err_message(), part) != NULL;
    if (!as_expected)
        print_error("%s: %d '%s', expected %d with '%s'\n", call, rc, rc < 0 ? err_message() : "", code,
                    part);
    _assert_true(as_expected, call, file, line);
}

int support_make_folder(void **state)
{
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/gemcut-test-XXXXXX", base && *base ? base : "/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

int support_remove_folder(void **state)
{
    (void)state;
    return nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

const char *support_folder(void)
{
    return folder;
}

const char *support_path(const char *format, ...)
{
    static char paths[64][PATH_MAX + 256];
    static unsigned next;
    char *path = paths[next++ % N_OF(paths)];
    const int n = snprintf(path, sizeof paths[0], "%s/", folder);
    va_list args;
    va_start(args, format);
    vsnprintf(path + n, sizeof paths[0] - (size_t)n, format, args);
    va_end(args);
    return path;
}

void support_write(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

char *support_read(const char *path, size_t *n)
{
    char *data;
    assert_ok(file_read(path, SIZE_MAX, &data, n));
    return data;
}

uint64_t support_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

double support_uniform(uint64_t *state)
{
    return (double)(support_random(state) >> 11) * 0x1p-52 - 1;
}

/* The journal of an unfinished run, read as --resume does, then gone on with and read again. */
#include "base/err.h"
#include "base/file.h"
#include "quantize/journal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char path[64];

static void remove_file(void)
{
    unlink(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!*path) {
        snprintf(path, sizeof path, "/tmp/gemcut-fuzz-XXXXXX");
        const int fd = mkstemp(path);
        CHECK(fd >= 0 && close(fd) == 0 && atexit(remove_file) == 0);
    }
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    const struct journal_key key = {.version = "1", .backend = "cpu", .recipe = "{}"};
    const struct journal_entry entry = {.stats = {.error = 0.5}};
    struct journal *j;
    if (journal_open(&j, path, &key, true) < 0)
        return 0;
    const size_t n = journal_entries(j);
    CHECK(journal_add(j, "new", &entry) == 0 && journal_entries(j) == n + 1);
    journal_close(j);
    /* what stood behind an unfinished line is gone, the new one follows the last whole one */
    CHECK(journal_open(&j, path, &key, true) == 0 && journal_entries(j) == n + 1 && journal_find(j, "new"));
    journal_close(j);
    return 0;
}

/* gemcut.json, read from a folder as the program does. */
#include "base/err.h"
#include "base/file.h"
#include "formats/record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char folder[64];

static void remove_folder(void)
{
    file_remove_folder(folder);
}

static void check_map(const struct record_map *map)
{
    for (size_t i = 0; i < map->n; i++)
        CHECK(record_find(map, map->entries[i].name) == &map->entries[i].hash);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char path[96];
    if (!*folder) {
        snprintf(folder, sizeof folder, "/tmp/gemcut-fuzz-XXXXXX");
        CHECK(mkdtemp(folder) && atexit(remove_folder) == 0);
        snprintf(path, sizeof path, "%s/%s", folder, RECORD_NAME);
    }
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    struct record r;
    bool found;
    const int rc = record_open(&r, folder, &found);
    CHECK(found == (rc == 0));
    if (rc == 0) {
        check_map(&r.tensors);
        check_map(&r.sources);
        check_map(&r.files);
        record_close(&r);
    }
    return 0;
}

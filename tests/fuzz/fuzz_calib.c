/* Text for calibration from anywhere, as it stands and compressed. The first byte picks the kind of file, the rest is
 * the file; what it decompresses to is capped, or a few bytes would fill the memory. */
#include "base/err.h"
#include "calib/text.h"
#include "formats/utf8.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_documents(const struct documents *d)
{
    size_t line = 0;
    for (size_t i = 0; i < d->n; i++) {
        const struct document *one = &d->list[i];
        CHECK(one->text && one->text[one->len] == '\0');
        CHECK(utf8_valid((const uint8_t *)one->text, one->len));
        CHECK(one->line > line);
        CHECK(!one->is_chat || !strncmp(one->text, "<bos>", 5));
        line = one->line;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[] = {"fuzz.jsonl", "fuzz.jsonl.zst", "fuzz.txt", "fuzz.txt.zst"};
    if (!size)
        return 0;
    const char *name = names[data[0] % 4];
    const enum chat_format chat = (enum chat_format)(data[0] >> 2 & 3);
    struct documents d;
    const int rc = documents_parse(&d, data + 1, size - 1, name, chat, 4 << 20);
    if (rc < 0) {
        CHECK(!d.list && !d.n && !strncmp(err_message(), name, strlen(name)));
        return 0;
    }
    check_documents(&d);
    documents_free(&d);
    return 0;
}

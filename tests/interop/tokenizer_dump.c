/* Texts in, ids out: the program that test_tokenizer.py holds against Hugging Face tokenizers.
 *   tokenizer_dump TOKENIZER_JSON [--bos] [--decode | --decode-ids] [--skip-special] [--bench N]
 * A record on stdin is its length in bytes, a newline, and the bytes (texts may hold anything, NULs included).
 * Prints a line of ids for each text; with --decode a record with decode(encode(text)); with --decode-ids the
 * records are ids and their text is printed as a record. --bench encodes everything N times and prints the
 * bytes of one round, the seconds of the fastest, and the seconds that opening the tokenizer took. */
#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"
#include "formats/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum mode { MODE_IDS, MODE_DECODE, MODE_DECODE_IDS };

struct options {
    enum mode mode;
    bool bos, skip_special;
    int n_bench;
};

struct records {
    struct text bytes;
    size_t *ends; /* [n] into bytes */
    size_t n, capacity;
};

static int read_records(struct records *r)
{
    size_t len;
    while (scanf("%zu", &len) == 1) {
        char *buf = mem_alloc(len, 1, "a record");
        if (!buf)
            return ERR_MEMORY;
        const bool whole = getchar() == '\n' && fread(buf, 1, len, stdin) == len;
        text_append(&r->bytes, buf, len);
        free(buf);
        if (!whole)
            return err_set(ERR_FORMAT, "stdin: record %zu is cut off", r->n);
        if (mem_grow(&r->ends, &r->capacity, r->n + 1, sizeof *r->ends, "records") < 0)
            return ERR_MEMORY;
        r->ends[r->n++] = r->bytes.len;
    }
    return text_finish(&r->bytes);
}

/* The records lie end to end, so that one is not a string: read no further than len. */
static int parse_ids(const char *s, size_t len, struct token_list *list)
{
    for (size_t at = 0; at < len; at++) {
        int32_t id = 0;
        for (; at < len && s[at] >= '0' && s[at] <= '9' && id < INT32_MAX / 10; at++)
            id = id * 10 + (s[at] - '0');
        if (mem_grow(&list->ids, &list->capacity, list->n + 1, sizeof *list->ids, "ids") < 0)
            return ERR_MEMORY;
        list->ids[list->n++] = id;
    }
    return 0;
}

static int dump(const struct tokenizer *t, const struct options *o, const char *s, size_t len)
{
    struct token_list list = {0};
    struct text text = {0};
    int rc =
        o->mode == MODE_DECODE_IDS ? parse_ids(s, len, &list) : tokenizer_encode(t, s, len, o->bos, &list);
    if (rc == 0 && o->mode != MODE_IDS)
        rc = tokenizer_decode(t, list.ids, list.n, o->skip_special, &text);
    if (rc == 0 && o->mode == MODE_IDS) {
        for (size_t i = 0; i < list.n; i++)
            printf(i ? " %d" : "%d", list.ids[i]);
        printf("\n");
    } else if (rc == 0) {
        printf("%zu\n", text.len);
        fwrite(text.data, 1, text.len, stdout);
    }
    text_free(&text);
    token_list_free(&list);
    return rc;
}

static int bench(const struct tokenizer *t, const struct options *o, const struct records *r,
                 double open_seconds)
{
    double best = 0;
    for (int round = 0; round < o->n_bench; round++) {
        const double start = clock_seconds();
        for (size_t i = 0, at = 0; i < r->n; at = r->ends[i++]) {
            struct token_list list = {0};
            const int rc = tokenizer_encode(t, r->bytes.data + at, r->ends[i] - at, o->bos, &list);
            token_list_free(&list);
            if (rc < 0)
                return rc;
        }
        const double seconds = clock_seconds() - start;
        if (!round || seconds < best)
            best = seconds;
    }
    printf("%zu %.9f %.6f\n", r->bytes.len, best, open_seconds);
    return 0;
}

static int run(const char *path, const struct options *o)
{
    struct records records = {0};
    struct tokenizer *t = NULL;
    const double start = clock_seconds();
    int rc = tokenizer_open(&t, path);
    const double open_seconds = clock_seconds() - start;
    if (rc == 0)
        rc = read_records(&records);
    if (rc == 0 && o->n_bench)
        rc = bench(t, o, &records, open_seconds);
    for (size_t i = 0, at = 0; rc == 0 && !o->n_bench && i < records.n; at = records.ends[i++])
        rc = dump(t, o, records.bytes.data + at, records.ends[i] - at);
    tokenizer_close(t);
    text_free(&records.bytes);
    free(records.ends);
    return rc;
}

int main(int argc, char **argv)
{
    struct options o = {0};
    int i = 2;
    for (; i < argc; i++) {
        if (!strcmp(argv[i], "--bos"))
            o.bos = true;
        else if (!strcmp(argv[i], "--decode"))
            o.mode = MODE_DECODE;
        else if (!strcmp(argv[i], "--decode-ids"))
            o.mode = MODE_DECODE_IDS;
        else if (!strcmp(argv[i], "--skip-special"))
            o.skip_special = true;
        else if (!strcmp(argv[i], "--bench") && i + 1 < argc)
            o.n_bench = atoi(argv[++i]);
        else
            break;
    }
    if (argc < 2 || i < argc) {
        fprintf(stderr,
                "usage: tokenizer_dump TOKENIZER_JSON [--bos] [--decode | --decode-ids] [--skip-special] "
                "[--bench N]\n");
        return 2;
    }
    if (run(argv[1], &o) < 0) {
        fprintf(stderr, "tokenizer_dump: %s\n", err_message());
        return 3;
    }
    return 0;
}

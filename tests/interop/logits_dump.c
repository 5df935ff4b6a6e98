/* Token ids in, logits out: the program that test_logits.py holds against transformers.
 *   logits_dump MODEL OUT.bin [--greedy N] [--threads N]
 * Whitespace-separated ids on stdin; OUT.bin gets FP32 logits [ids, vocab], row by row, in the byte order of the
 * machine. --greedy N prints the N ids that follow the last one, most likely first and heedless of ends of text. */
#include "base/err.h"
#include "base/mem.h"
#include "runtime/forward.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* RUN_ROWS: as `generate` prefills, so that keys and values of earlier pieces come from the cache.
 * LOGIT_ROWS: a row of Gemma's logits is a megabyte. */
enum { RUN_ROWS = 512, LOGIT_ROWS = 64 };

struct ids {
    int32_t *data;
    size_t n, capacity;
};

struct dump {
    const struct weights *w;
    struct forward *f;
    FILE *file;
    const char *path;
    struct buf logits; /* [LOGIT_ROWS, vocab] on the device */
    float *host;
};

static int add_id(struct ids *ids, int32_t id)
{
    const int rc = mem_grow(&ids->data, &ids->capacity, ids->n + 1, sizeof *ids->data, "ids");
    if (!rc)
        ids->data[ids->n++] = id;
    return rc;
}

static int read_ids(struct ids *ids, int64_t vocab)
{
    char word[32];
    int rc = 0;
    while (!rc && scanf("%31s", word) == 1) {
        char *end;
        const long id = strtol(word, &end, 10);
        if (*end || id < 0 || id >= vocab)
            return err_set(ERR_FORMAT, "stdin: '%s' is not an id below %lld", word, (long long)vocab);
        rc = add_id(ids, (int32_t)id);
    }
    return rc || ids->n ? rc : err_set(ERR_FORMAT, "stdin: no ids");
}

/* The logits of rows [row, row + n) of hidden, into d->host. */
static int compute_logits(struct dump *d, const struct mat *hidden, int64_t row, int64_t n)
{
    const int64_t vocab = d->w->embedding.rows;
    const struct backend *b = d->w->backend;
    const struct mat part = mat_rows(hidden, row, n);
    const int rc = forward_logits(d->w, &part, &(struct mat){d->logits.ptr, DTYPE_F32, n, vocab, vocab});
    return rc ? rc : b->core->download(b, d->host, d->logits.ptr, (size_t)(n * vocab) * sizeof(float));
}

/* *hidden is left as the states of the last piece. */
static int dump_all(struct dump *d, const struct ids *ids, struct mat *hidden)
{
    const int64_t n = (int64_t)ids->n;
    int rc = 0;
    for (int64_t at = 0; !rc && at < n; at += RUN_ROWS) {
        rc = forward_run(d->f, ids->data + at, n - at < RUN_ROWS ? n - at : RUN_ROWS, hidden);
        for (int64_t row = 0; !rc && row < hidden->rows; row += LOGIT_ROWS) {
            const int64_t rows = hidden->rows - row < LOGIT_ROWS ? hidden->rows - row : LOGIT_ROWS;
            const size_t count = (size_t)(rows * d->w->embedding.rows);
            rc = compute_logits(d, hidden, row, rows);
            if (!rc && fwrite(d->host, sizeof(float), count, d->file) != count)
                rc = err_errno("%s: cannot write", d->path);
        }
    }
    return rc;
}

static int continue_greedily(struct dump *d, struct mat hidden, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        int rc = compute_logits(d, &hidden, hidden.rows - 1, 1);
        if (rc)
            return rc;
        int32_t best = 0;
        for (int32_t id = 1; id < d->w->embedding.rows; id++)
            if (d->host[id] > d->host[best])
                best = id;
        printf("%d%c", best, i + 1 < n ? ' ' : '\n');
        if (i + 1 < n && (rc = forward_run(d->f, &best, 1, &hidden)) < 0)
            return rc;
    }
    return 0;
}

static int run(const struct weights *w, const char *path, int64_t n_greedy)
{
    struct dump d = {.w = w, .path = path};
    struct ids ids = {0};
    struct mat hidden = {0};
    const size_t count = LOGIT_ROWS * (size_t)w->embedding.rows;
    int rc = read_ids(&ids, w->embedding.rows);
    if (!rc && !(d.file = fopen(path, "wb")))
        rc = err_errno("%s: cannot create", path);
    if (!rc && !(d.host = mem_alloc_aligned(count * sizeof(float), "logits")))
        rc = ERR_MEMORY;
    if (!rc)
        rc = w->backend->core->acquire(w->backend, count * sizeof(float), "logits", &d.logits);
    const struct forward_size size = {1, (int64_t)ids.n + n_greedy,
                                      ids.n < RUN_ROWS ? (int64_t)ids.n : RUN_ROWS};
    if (!rc)
        rc = forward_open(&d.f, w, &size);
    if (!rc)
        rc = dump_all(&d, &ids, &hidden);
    if (!rc)
        rc = continue_greedily(&d, hidden, n_greedy);
    if (d.file && fclose(d.file) && !rc)
        rc = err_errno("%s: cannot write", path);
    forward_close(d.f);
    if (d.logits.ptr)
        w->backend->core->release(w->backend, &d.logits);
    free(d.host);
    free(ids.data);
    return rc;
}

static int run_model(const char *name, const char *path, int64_t n_greedy, int n_threads)
{
    struct model m = {0};
    struct backend b = {0};
    struct weights w = {0};
    int rc = backend_open(&b, "cpu", n_threads);
    if (rc < 0)
        return rc;
    rc = model_open(&m, name);
    if (!rc)
        rc = model_bind(&m, NULL, NULL);
    if (!rc)
        rc = weights_load(&w, &m, &b);
    if (!rc)
        rc = run(&w, path, n_greedy);
    if (w.backend)
        weights_free(&w);
    model_close(&m);
    backend_close(&b);
    return rc;
}

int main(int argc, char **argv)
{
    int greedy = 0, threads = 0, i = 3;
    for (; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--greedy"))
            greedy = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--threads"))
            threads = atoi(argv[i + 1]);
        else
            break;
    }
    if (argc < 3 || i < argc || greedy < 0 || threads < 0) {
        fprintf(stderr, "usage: logits_dump MODEL OUT.bin [--greedy N] [--threads N] < IDS\n");
        return 2;
    }
    if (run_model(argv[1], argv[2], greedy, threads) < 0) {
        fprintf(stderr, "logits_dump: %s\n", err_message());
        return 3;
    }
    return 0;
}

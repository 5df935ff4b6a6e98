/* gemcut bench quantize: the whole job beside what storage and memory can do, with the same number of threads. */
#include "cli/bench.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "cli/cmd.h"
#include "cli/human.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "quantize/cut.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const uint64_t SHARD_BYTES = 5000000000; /* of quantize, when it is not told otherwise */

/* --- what the machine can do -------------------------------------------------------------------------------------- */

enum { PIECE_BYTES = 1 << 20, COPY_PIECES = 64, COPY_ROUNDS = 4 };

/* Each of these does one thing with every thread and nothing else. */
enum resource { READ, WRITE, FLUSH, COPY, N_RESOURCES };

static const double NOTHING = 1e-4; /* seconds: memory has no disk to flush to */

static const char *const resource_names[] = {"read", "write", "flush", "copy"};

struct storage {
    struct parallel *pool;
    char **paths; /* the source's files */
    int *fds;
    uint64_t *bytes;
    size_t n_files;
    char **pieces; /* [workers] of COPY_PIECES pieces, read into, written from, copied in */
};

static int open_source(struct storage *s, const char *folder)
{
    struct file_list files;
    int rc = file_list(&files, folder);
    if (rc < 0)
        return rc;
    s->paths = mem_alloc(files.n, sizeof *s->paths, "a list of files");
    s->fds = mem_alloc(files.n, sizeof *s->fds, "a list of files");
    s->bytes = mem_alloc(files.n, sizeof *s->bytes, "a list of files");
    rc = s->paths && s->fds && s->bytes ? 0 : ERR_MEMORY;
    for (size_t i = 0; !rc && i < files.n; i++) {
        if (!text_ends_with(files.names[i], ".safetensors"))
            continue;
        char *path = file_join(folder, files.names[i]);
        const int fd = path ? file_open_read(path, &s->bytes[s->n_files]) : ERR_MEMORY;
        if (fd < 0) {
            free(path);
            rc = fd;
            continue;
        }
        s->paths[s->n_files] = path;
        s->fds[s->n_files++] = fd;
    }
    file_list_free(&files);
    return rc;
}

static int storage_open(struct storage *s, const char *folder, int n_threads)
{
    *s = (struct storage){0};
    int rc = parallel_open(&s->pool, n_threads);
    if (!rc)
        rc = open_source(s, folder);
    const size_t n = rc ? 0 : (size_t)parallel_workers(s->pool), bytes = (size_t)COPY_PIECES * PIECE_BYTES;
    if (!rc && !(s->pieces = mem_alloc(n, sizeof *s->pieces, "pieces to copy")))
        rc = ERR_MEMORY;
    for (size_t i = 0; !rc && i < n; i++) {
        if (!(s->pieces[i] = mem_alloc_aligned(bytes, "pieces to copy")))
            rc = ERR_MEMORY;
        else
            memset(s->pieces[i], (int)i + 1, bytes);
    }
    return rc;
}

static void storage_close(struct storage *s)
{
    for (size_t i = 0; i < s->n_files; i++) {
        close(s->fds[i]);
        free(s->paths[i]);
    }
    for (int i = 0; s->pieces && i < parallel_workers(s->pool); i++)
        free(s->pieces[i]);
    free(s->paths);
    free(s->fds);
    free(s->bytes);
    free(s->pieces);
    parallel_close(s->pool);
}

struct transfer {
    const struct storage *s;
    const char *path; /* of one file of `bytes` */
    int fd;
    uint64_t bytes;
};

static int read_task(void *ctx, size_t index, int worker)
{
    const struct transfer *t = ctx;
    const uint64_t at = index * (uint64_t)PIECE_BYTES;
    const size_t n = t->bytes - at < PIECE_BYTES ? (size_t)(t->bytes - at) : PIECE_BYTES;
    return file_pread(t->fd, t->s->pieces[worker], n, at, t->path);
}

static int write_task(void *ctx, size_t index, int worker)
{
    const struct transfer *t = ctx;
    const uint64_t at = index * (uint64_t)PIECE_BYTES;
    const size_t n = t->bytes - at < PIECE_BYTES ? (size_t)(t->bytes - at) : PIECE_BYTES;
    return file_pwrite(t->fd, t->s->pieces[worker], n, at, t->path);
}

/* One piece onto the next, so that neither is in the cache: both halves of 64 MiB a thread. */
static int copy_task(void *ctx, size_t index, int worker)
{
    const struct transfer *t = ctx;
    char *half = t->s->pieces[worker] + (size_t)(COPY_PIECES / 2) * PIECE_BYTES;
    const size_t at = index % (COPY_PIECES / 2) * PIECE_BYTES;
    memcpy(half + at, t->s->pieces[worker] + at, PIECE_BYTES);
    return 0;
}

static int read_source(const struct storage *s, double *seconds)
{
    const double start = clock_seconds();
    int rc = 0;
    for (size_t i = 0; !rc && i < s->n_files; i++) {
        struct transfer t = {s, s->paths[i], s->fds[i], s->bytes[i]};
        rc = parallel_for(s->pool, (size_t)((t.bytes + PIECE_BYTES - 1) / PIECE_BYTES), read_task, &t);
    }
    *seconds = clock_seconds() - start;
    return rc;
}

/* A file of that many bytes: reserved, written and flushed, as the job does; *flushed: the last part of that. */
static int write_file(const struct storage *s, const char *path, uint64_t bytes, double *written,
                      double *flushed)
{
    struct transfer t = {s, path, open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), bytes};
    if (t.fd < 0)
        return err_errno("%s", path);
    const double start = clock_seconds();
    int rc = posix_fallocate(t.fd, 0, (off_t)bytes)
                 ? err_set(ERR_IO, "%s: cannot reserve %s", path, human_bytes(bytes).s)
                 : parallel_for(s->pool, (size_t)((bytes + PIECE_BYTES - 1) / PIECE_BYTES), write_task, &t);
    const double middle = clock_seconds();
    if (!rc && fsync(t.fd) < 0)
        rc = err_errno("%s: flushing", path);
    *written += clock_seconds() - start;
    *flushed += clock_seconds() - middle;
    close(t.fd);
    return rc;
}

/* As many bytes as the cut has, in files as large as its files. */
static int write_output(const struct storage *s, const char *folder, uint64_t bytes,
                        double seconds[N_RESOURCES])
{
    char *path = file_join(folder, "written");
    int rc = path ? 0 : ERR_MEMORY;
    seconds[WRITE] = seconds[FLUSH] = 0;
    for (uint64_t left = bytes; !rc && left > 0;) {
        const uint64_t n = left < SHARD_BYTES ? left : SHARD_BYTES;
        rc = write_file(s, path, n, &seconds[WRITE], &seconds[FLUSH]);
        unlink(path);
        left -= n;
    }
    free(path);
    return rc;
}

/* Seconds that `bytes` take to be copied from memory to memory. */
static int copy_memory(const struct storage *s, uint64_t bytes, double *seconds)
{
    struct transfer t = {.s = s};
    const size_t n = (size_t)parallel_workers(s->pool) * COPY_PIECES * COPY_ROUNDS;
    const double start = clock_seconds();
    const int rc = parallel_for(s->pool, n, copy_task, &t);
    *seconds = (clock_seconds() - start) * (double)bytes / ((double)n * PIECE_BYTES);
    return rc;
}

/* --- a round ------------------------------------------------------------------------------------------------------ */

enum phase { PHASE_OPEN, PHASE_QUANTIZE, PHASE_CHECK, PHASE_FLUSH, N_PHASES };

static const char *const phase_names[] = {"open", "quantize", "check", "flush"};

struct round {
    double seconds, phases[N_PHASES], resources[N_RESOURCES];
};

static void on_stage(void *ctx, enum cut_stage stage, uint64_t total)
{
    struct bench_job *j = ctx;
    j->stages[stage] = j->last = clock_seconds();
    progress_begin(stage == CUT_CHECK ? "reading back" : "cutting",
                   stage == CUT_CALIBRATE ? PROGRESS_ITEMS : PROGRESS_BYTES, total);
}

static void on_bytes(void *ctx, uint64_t bytes)
{
    struct bench_job *j = ctx;
    j->last = clock_seconds();
    progress_advance(bytes, NULL);
}

static void on_linear(void *ctx, const struct cut_linear *linear)
{
    struct bench_job *j = ctx;
    j->last = clock_seconds();
    if (j->data)
        progress_advance(1, linear->plan->tensor->name);
}

int bench_run_job(const struct bench *q, const struct bench_place *place, struct bench_job *job)
{
    const struct cut_options options = {.model = place->model,
                                        .out = place->out,
                                        .device = q->machine.name,
                                        .version = GEMCUT_VERSION,
                                        .recipe = q->recipe,
                                        .data = job->data,
                                        .count_time = job->count_time,
                                        .shard_bytes = SHARD_BYTES,
                                        .n_workers = (int)q->machine.threads,
                                        .skip_check = q->no_verify};
    const struct cut_events events = {on_stage, on_bytes, on_linear, NULL, job};
    struct cut *c;
    job->start = clock_seconds();
    int rc = cut_open(&c, &options);
    if (!rc)
        job->totals = cut_totals(c);
    if (!rc)
        rc = cut_run(c, &events);
    progress_end();
    job->end = clock_seconds();
    if (!rc && job->on_end)
        job->on_end(job->ctx, c);
    cut_close(c);
    return rc;
}

int bench_cut(const struct bench *q, const struct bench_place *place)
{
    struct dataset data = {0};
    struct bench_job job = {0};
    int rc = q->recipe.calibrated ? bench_ids(q, &data) : 0;
    job.data = q->recipe.calibrated ? &data : NULL;
    if (!rc)
        rc = bench_run_job(q, place, &job);
    dataset_free(&data);
    return rc;
}

/* The job, then what it is judged by; the cut is removed between. */
static int run_round(const struct bench *q, const struct bench_place *place, const struct storage *s,
                     struct cut_totals *totals, struct round *r)
{
    struct bench_job j = {0};
    int rc = bench_run_job(q, place, &j);
    *totals = j.totals;
    if (!rc)
        rc = file_remove_folder(place->out);
    const double checked = j.stages[CUT_CHECK] > 0 ? j.stages[CUT_CHECK] : j.last;
    *r = (struct round){.seconds = j.end - j.start,
                        .phases = {j.stages[CUT_QUANTIZE] - j.start, checked - j.stages[CUT_QUANTIZE],
                                   j.last - checked, j.end - j.last}};
    const uint64_t in = totals->source_bytes, out = totals->output_bytes;
    if (!rc)
        rc = read_source(s, &r->resources[READ]);
    if (!rc)
        rc = write_output(s, place->root, out, r->resources);
    if (!rc)
        rc = copy_memory(s, in + out, &r->resources[COPY]);
    /* what is read back is read too */
    if (!q->no_verify)
        r->resources[READ] *= (double)(in + out) / (double)in;
    return rc;
}

/* --- the result --------------------------------------------------------------------------------------------------- */

struct result {
    const struct bench *q;
    const struct bench_place *place;
    struct cut_totals totals;
    struct round *rounds;
    size_t n;
    struct round median;
    double min;
    enum resource slowest;
    uint64_t bytes[N_RESOURCES];
};

/* Median over the rounds of the double at that offset of struct round. */
static double median_of(const struct result *r, size_t offset, double *scratch)
{
    for (size_t i = 0; i < r->n; i++)
        memcpy(&scratch[i], (const char *)&r->rounds[i] + offset, sizeof *scratch);
    return bench_median(scratch, r->n);
}

static int summarize(struct result *r)
{
    double *scratch = mem_alloc(r->n, sizeof *scratch, "times");
    if (!scratch)
        return ERR_MEMORY;
    for (size_t i = 0; i < N_PHASES; i++)
        r->median.phases[i] = median_of(r, offsetof(struct round, phases) + i * sizeof(double), scratch);
    for (size_t i = 0; i < N_RESOURCES; i++) {
        r->median.resources[i] =
            median_of(r, offsetof(struct round, resources) + i * sizeof(double), scratch);
        if (r->median.resources[i] > r->median.resources[r->slowest])
            r->slowest = (enum resource)i;
    }
    r->median.seconds = median_of(r, offsetof(struct round, seconds), scratch);
    r->min = scratch[0];
    free(scratch);
    const uint64_t in = r->totals.source_bytes, out = r->totals.output_bytes;
    r->bytes[READ] = in + (r->q->no_verify ? 0 : out);
    r->bytes[WRITE] = r->bytes[FLUSH] = out;
    r->bytes[COPY] = in + out;
    return 0;
}

void bench_recipe_text(const struct bench *q, struct text *out)
{
    const struct quant_scheme s = q->recipe.scheme;
    text_printf(out, "%s, %s, ", q->recipe.method, recipe_scheme_name(s));
    if (s.group)
        text_printf(out, "groups of %lld, ", (long long)s.group);
    else
        text_add(out, "one scale a row, ");
    text_printf(out, "scales %s", recipe_scales_name(q->recipe.scales.rule));
    if (q->recipe.calibrated && q->recipe.passes)
        text_printf(out, ", %d pass%s of refinement", q->recipe.passes, q->recipe.passes == 1 ? "" : "es");
}

static int print_text(const struct result *r)
{
    const struct bench *q = r->q;
    const double bytes = (double)(r->totals.source_bytes + r->totals.output_bytes);
    struct text out = {0};
    bench_text_begin(&out, q);
    bench_place_text(r->place, &out);
    text_printf(&out, "recipe       ");
    bench_recipe_text(q, &out);
    text_add(&out, q->no_verify ? ", not read back\n" : ", read back\n");
    text_printf(&out, "bytes        %s in, %s out, %d threads\n", human_bytes(r->totals.source_bytes).s,
                human_bytes(r->totals.output_bytes).s, r->totals.n_workers);
    text_printf(&out, "time         %.3f s median of %zu, %.3f s at best, %.2f GB/s in and out\n",
                r->median.seconds, r->n, r->min, bytes / r->median.seconds / 1e9);
    text_add(&out, "of which    ");
    for (size_t i = 0; i < N_PHASES; i++)
        text_printf(&out, "%s %s %.3f s", i ? "," : "", phase_names[i], r->median.phases[i]);
    text_add(&out, "\n\n");
    static const struct human_column columns[] = {
        {"alone", false}, {"bytes", true}, {"GB/s", true}, {"seconds", true}, {"job is", true}};
    struct human_table table = {.columns = columns, .n_columns = 5};
    for (size_t i = 0; i < N_RESOURCES; i++) {
        const double s = r->median.resources[i];
        human_table_cell(&table, "%s%s", resource_names[i], i == r->slowest ? " (slowest)" : "");
        human_table_cell(&table, "%s", human_bytes(r->bytes[i]).s);
        human_table_cell(&table, s > NOTHING ? "%.2f" : "-", (double)r->bytes[i] / s / 1e9);
        human_table_cell(&table, "%.3f", s);
        human_table_cell(&table, s > NOTHING ? "× %.2f" : "-", r->median.seconds / s);
    }
    int rc = human_table_render(&table, &out);
    human_table_free(&table);
    text_add(
        &out,
        "\nread: pread of what the job reads, from the page cache; write: fallocate, pwrite "
        "and fsync; flush: the\nfsync alone; copy: memcpy of all bytes in and out. Each by itself with as many "
        "threads, after each\nround; medians.\n");
    return rc ? rc : output_print(&out);
}

static int print_json(const struct result *r)
{
    const struct bench *q = r->q;
    struct text out = {0};
    bench_json_begin(&out, q);
    bench_place_json(r->place, &out);
    json_put_key(&out, "recipe");
    recipe_write(&q->recipe, &out);
    json_kv_bool(&out, "read_back", !q->no_verify);
    json_kv_int(&out, "threads", r->totals.n_workers);
    json_kv_uint(&out, "source_bytes", r->totals.source_bytes);
    json_kv_uint(&out, "output_bytes", r->totals.output_bytes);
    json_kv_double(&out, "seconds_median", r->median.seconds);
    json_kv_double(&out, "seconds_min", r->min);
    json_kv_double(&out, "gb_per_s", (double)r->bytes[COPY] / r->median.seconds / 1e9);
    json_put_key(&out, "phases");
    json_begin_object(&out);
    for (size_t i = 0; i < N_PHASES; i++)
        json_kv_double(&out, phase_names[i], r->median.phases[i]);
    json_end_object(&out);
    json_put_key(&out, "alone");
    json_begin_object(&out);
    for (size_t i = 0; i < N_RESOURCES; i++) {
        json_put_key(&out, resource_names[i]);
        json_begin_object(&out);
        json_kv_uint(&out, "bytes", r->bytes[i]);
        json_kv_double(&out, "seconds_median", r->median.resources[i]);
        if (r->median.resources[i] > NOTHING)
            json_kv_double(&out, "gb_per_s", (double)r->bytes[i] / r->median.resources[i] / 1e9);
        json_end_object(&out);
    }
    json_end_object(&out);
    json_kv_string(&out, "slowest", resource_names[r->slowest]);
    json_kv_double(&out, "ratio_to_slowest", r->median.seconds / r->median.resources[r->slowest]);
    json_put_key(&out, "seconds");
    json_begin_array(&out);
    for (size_t i = 0; i < r->n; i++)
        json_put_double(&out, r->rounds[i].seconds);
    json_end_array(&out);
    return output_json_end(&out);
}

static int measure(const struct bench *q, const struct bench_place *place)
{
    struct result r = {.q = q, .place = place, .n = q->rounds ? (size_t)q->rounds : 3};
    struct storage s;
    double unused;
    int rc = storage_open(&s, place->model, (int)q->machine.threads);
    if (!rc && !(r.rounds = mem_alloc(r.n, sizeof *r.rounds, "times")))
        rc = ERR_MEMORY;
    if (!rc)
        rc = read_source(&s, &unused); /* into the page cache, if it fits */
    if (q->recipe.calibrated) {
        storage_close(&s);
        free(r.rounds);
        return rc ? rc : bench_calibrate(q, place);
    }
    for (size_t i = 0; !rc && i < r.n; i++) {
        rc = run_round(q, place, &s, &r.totals, &r.rounds[i]);
        if (!rc)
            output_detail("round %zu: %.3f s", i + 1, r.rounds[i].seconds);
    }
    if (!rc)
        rc = summarize(&r);
    if (!rc)
        rc = output_json() ? print_json(&r) : print_text(&r);
    storage_close(&s);
    free(r.rounds);
    return rc;
}

int bench_quantize(const struct bench *q)
{
    struct parallel *pool;
    struct bench_place place;
    const struct bench_wish wish = {.cut = true};
    int rc = parallel_open(&pool, (int)q->machine.threads);
    if (rc < 0)
        return rc;
    rc = bench_place_open(&place, q, &wish, pool);
    parallel_close(pool);
    if (!rc)
        rc = measure(q, &place);
    bench_place_close(&place);
    return rc;
}

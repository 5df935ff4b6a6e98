/* A checkpoint with made-up weights in the shape of a real one, and the folder that it lies in. */
#include "cli/bench.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "cli/bench_work.h"
#include "cli/human.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "formats/checkpoint.h"
#include "formats/writer.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

/* --- making it ------------------------------------------------------------------------------------------------------ */

static const uint64_t SHARD_BYTES = 5000000000;

enum { PIECE_BYTES = 4 << 20 }; /* made, then written, at a time by one thread */

/* A distribution, and its table of values. */
struct drawn {
    struct bench_normal from;
    struct bench_values values;
};

struct maker {
    const struct bench_tensors *tensors;
    bool plain_norms; /* the family's */
    uint64_t seed;
    struct writer *writer;
    size_t *ids;        /* [tensors] of the writer */
    size_t *first_task; /* [tensors] */
    size_t *draws;      /* [tensors]: which of drawn */
    uint16_t **pieces;  /* [workers] */
    struct drawn *drawn;
    size_t n_drawn, capacity;
};

static int make_task(void *ctx, size_t task, int worker)
{
    const struct maker *m = ctx;
    const size_t low = parallel_find(m->first_task, sizeof *m->first_task, m->tensors->n, task);
    const struct bench_tensor *t = &m->tensors->list[low];
    const uint64_t at = (task - m->first_task[low]) * (uint64_t)PIECE_BYTES;
    const size_t n = (size_t)(t->bytes - at < PIECE_BYTES ? t->bytes - at : PIECE_BYTES);
    bench_fill(&m->drawn[m->draws[low]].values, bench_mix(m->seed) + low, at / 2, n / 2, m->pieces[worker]);
    const int rc = writer_put(m->writer, m->ids[low], at, m->pieces[worker], n);
    progress_advance(n, NULL);
    return rc;
}

/* Tensors of one shape and role share a table. */
static int choose_values(struct maker *m, size_t i)
{
    const struct bench_normal from = bench_tensor_normal(&m->tensors->list[i], m->plain_norms);
    size_t at = 0;
    while (at < m->n_drawn && (m->drawn[at].from.mean != from.mean || m->drawn[at].from.sigma != from.sigma))
        at++;
    m->draws[i] = at;
    if (at < m->n_drawn)
        return 0;
    const int rc = mem_grow(&m->drawn, &m->capacity, at + 1, sizeof *m->drawn, "made-up numbers");
    if (rc < 0)
        return rc;
    m->drawn[at].from = from;
    bench_values_normal(&m->drawn[at].values, from.mean, from.sigma);
    m->n_drawn++;
    return 0;
}

/* Announces the tensors and shares them out; *n_tasks in all. */
static int plan(struct maker *m, size_t *n_tasks)
{
    int rc = 0;
    *n_tasks = 0;
    for (size_t i = 0; !rc && i < m->tensors->n; i++) {
        const struct bench_tensor *t = &m->tensors->list[i];
        if (t->dtype != DTYPE_BF16)
            return err_set(ERR_UNSUPPORTED, "tensor '%s' is %s; only BF16 can be made up", t->name,
                           dtype_name(t->dtype));
        m->first_task[i] = *n_tasks;
        *n_tasks += (size_t)((t->bytes + PIECE_BYTES - 1) / PIECE_BYTES);
        rc = writer_add(m->writer, t->name, t->name, t->dtype, t->n_dims, t->dims, &m->ids[i]);
        if (!rc)
            rc = choose_values(m, i);
    }
    return rc;
}

static int allocate(struct maker *m, int n_workers)
{
    m->ids = mem_alloc(m->tensors->n, sizeof *m->ids, "the tensors of a shape");
    m->first_task = mem_alloc(m->tensors->n, sizeof *m->first_task, "the tensors of a shape");
    m->draws = mem_alloc(m->tensors->n, sizeof *m->draws, "the tensors of a shape");
    m->pieces = mem_alloc((size_t)n_workers, sizeof *m->pieces, "pieces of tensors");
    int rc = m->ids && m->first_task && m->draws && m->pieces ? 0 : ERR_MEMORY;
    for (int i = 0; !rc && i < n_workers; i++)
        if (!(m->pieces[i] = mem_alloc_aligned(PIECE_BYTES, "a piece of a tensor")))
            rc = ERR_MEMORY;
    return rc;
}

static void free_maker(struct maker *m, int n_workers)
{
    writer_close(m->writer);
    for (int i = 0; m->pieces && i < n_workers; i++)
        free(m->pieces[i]);
    free(m->pieces);
    free(m->ids);
    free(m->first_task);
    free(m->draws);
    free(m->drawn);
}

/* config.json comes last: a folder that has one is complete. */
static int write_config(const char *folder, const struct bench_shape *shape)
{
    char *path = file_join(folder, "config.json");
    const int rc = path ? file_write_atomic(path, shape->config, (size_t)(shape->config_end - shape->config))
                        : ERR_MEMORY;
    free(path);
    return rc;
}

static int make_weights(struct maker *m, const char *folder, struct parallel *pool)
{
    size_t n_tasks;
    int rc = allocate(m, parallel_workers(pool));
    if (!rc)
        rc = writer_open(&m->writer, folder, SHARD_BYTES);
    if (!rc)
        rc = plan(m, &n_tasks);
    if (!rc)
        rc = writer_begin(m->writer, false);
    if (!rc)
        rc = parallel_for(pool, n_tasks, make_task, m);
    if (!rc)
        rc = writer_index(m->writer);
    if (!rc)
        rc = writer_finish(m->writer);
    free_maker(m, parallel_workers(pool));
    return rc;
}

int bench_make_checkpoint(const char *folder, const struct bench_shape *shape, uint64_t seed,
                          struct parallel *pool)
{
    struct bench_tensors tensors;
    struct gemma_config config;
    char label[96];
    int rc = bench_shape_config(shape, &config);
    if (rc < 0)
        return rc;
    struct maker m = {.tensors = &tensors, .plain_norms = config.family->plain_norms, .seed = seed};
    gemma_config_free(&config);
    rc = bench_shape_expand(shape, &tensors);
    if (rc < 0)
        return rc;
    snprintf(label, sizeof label, "making a %s", shape->name);
    progress_begin(label, PROGRESS_BYTES, tensors.bytes);
    const double start = clock_seconds();
    rc = make_weights(&m, folder, pool);
    progress_end();
    output_detail("made at %.2f GB/s, flushed", (double)tensors.bytes / (clock_seconds() - start) / 1e9);
    bench_tensors_free(&tensors);
    return rc ? rc : write_config(folder, shape);
}

/* --- the folder ----------------------------------------------------------------------------------------------------- */

/* Bytes free for us on the file system of a folder; 0 when it cannot be asked. */
static uint64_t free_bytes(const char *folder)
{
    struct statvfs s;
    return statvfs(folder, &s) == 0 ? (uint64_t)s.f_bavail * s.f_frsize : 0;
}

/* The folder to work in, fresh memory. need: bytes of files; loads: bytes of memory beside them. */
static char *choose_folder(const struct bench_place *p, const struct bench *q, bool in_memory, uint64_t need,
                           uint64_t loads)
{
    const uint64_t spare = 2ull << 30;
    const char *tmp = getenv("TMPDIR"), *slash = p->kept ? strrchr(p->model, '/') : NULL;
    if (q->dir)
        return mem_strdup(q->dir);
    if (p->kept) /* beside it */
        return slash ? mem_strndup(p->model, slash > p->model ? (size_t)(slash - p->model) : 1)
                     : mem_strdup(".");
    if (in_memory && free_bytes("/dev/shm") > need && mem_available() > need + loads + spare)
        return mem_strdup("/dev/shm");
    return mem_strdup(tmp && *tmp ? tmp : "/tmp");
}

/* "folder/prefixXXXXXX", created. */
static int make_fresh_folder(char **out, const char *prefix)
{
    *out = mem_printf("%sXXXXXX", prefix);
    if (!*out)
        return ERR_MEMORY;
    if (mkdtemp(*out))
        return 0;
    const int rc = err_errno("%s", *out);
    free(*out);
    *out = NULL;
    return rc;
}

/* Cleaning up must not replace the error that made it necessary. */
static void remove_quietly(const char *folder)
{
    char *message = mem_strdup(err_message());
    if (file_remove_folder(folder) < 0)
        output_note("gemcut: %s", err_message());
    if (message)
        err_set(ERR_IO, "%s", message);
    free(message);
}

static bool same_shape(const struct tensor *t, const struct bench_tensor *expected)
{
    return t && t->dtype == expected->dtype && t->n_dims == expected->n_dims &&
           !memcmp(t->shape, expected->dims, (size_t)t->n_dims * sizeof *t->shape);
}

/* 0 when the folder holds a whole checkpoint of these tensors. */
static int check_kept(const char *folder, const struct bench_shape *shape,
                      const struct bench_tensors *tensors)
{
    struct checkpoint ck;
    char *config = file_join(folder, "config.json");
    if (!config)
        return ERR_MEMORY;
    int rc = file_exists(config)
                 ? checkpoint_open(&ck, folder)
                 : err_set(ERR_FORMAT, "%s: is not a checkpoint of this shape: no config.json", folder);
    free(config);
    if (rc < 0)
        return rc;
    if (ck.n_tensors != tensors->n)
        rc = err_set(ERR_FORMAT, "%s: has %zu tensors, a %s has %zu; name another folder with --keep", folder,
                     ck.n_tensors, shape->name, tensors->n);
    for (size_t i = 0; !rc && i < tensors->n; i++)
        if (!same_shape(checkpoint_tensor(&ck, tensors->list[i].name), &tensors->list[i]))
            rc = err_set(ERR_FORMAT, "%s: tensor '%s' is not as in a %s; name another folder with --keep",
                         folder, tensors->list[i].name, shape->name);
    checkpoint_close(&ck);
    return rc;
}

/* Builds in a folder beside, so that one that was interrupted is never taken for a whole one. */
static int make_kept(const char *folder, const struct bench *q, struct parallel *pool)
{
    char *prefix = mem_printf("%s.partial-", folder), *partial = NULL;
    int rc = prefix ? make_fresh_folder(&partial, prefix) : ERR_MEMORY;
    free(prefix);
    if (rc < 0)
        return rc;
    rc = bench_make_checkpoint(partial, q->shape, (uint64_t)q->seed, pool);
    if (!rc && chmod(partial, 0755) < 0)
        rc = err_errno("%s", partial);
    if (!rc)
        rc = file_rename(partial, folder);
    if (rc < 0)
        remove_quietly(partial);
    free(partial);
    return rc;
}

/* Whether there is anything in the folder. */
static bool is_empty(const char *folder)
{
    struct file_list files;
    if (file_list(&files, folder) < 0)
        return false;
    const bool empty = files.n == 0;
    file_list_free(&files);
    return empty;
}

static int make_model(struct bench_place *p, const struct bench *q, const struct bench_tensors *tensors,
                      struct parallel *pool)
{
    if (p->reused)
        return check_kept(p->model, q->shape, tensors);
    output_note("making a %s of %s in %s", q->shape->name, human_bytes(tensors->bytes).s, p->model);
    if (p->kept)
        return make_kept(p->model, q, pool);
    const int rc = file_make_folder(p->model);
    return rc ? rc : bench_make_checkpoint(p->model, q->shape, (uint64_t)q->seed, pool);
}

/* Names, and room for what is to lie there. */
static int choose_place(struct bench_place *p, const struct bench *q, const struct bench_wish *wish)
{
    /* of the 270M, whose embedding is two thirds of it, 4 bits leave 0.72 */
    const uint64_t cut = q->recipe.scheme.bits == 4 ? p->model_bytes / 4 * 3 : p->model_bytes;
    const uint64_t need = (wish->cut ? cut : 0) + (p->kept ? 0 : p->model_bytes);
    char *folder = choose_folder(p, q, wish->in_memory, need, (uint64_t)wish->loads * p->model_bytes);
    char *prefix = folder ? mem_printf("%s/gemcut-bench-", folder) : NULL;
    int rc = prefix ? make_fresh_folder(&p->root, prefix) : ERR_MEMORY;
    free(prefix);
    if (!rc && free_bytes(folder) < need)
        rc = err_set(ERR_IO, "%s: has %s free, expected at least %s; name another folder with --dir", folder,
                     human_bytes(free_bytes(folder)).s, human_bytes(need).s);
    free(folder);
    if (rc < 0)
        return rc;
    if (!p->kept)
        p->model = file_join(p->root, "model");
    p->out = file_join(p->root, "cut");
    return p->model && p->out ? 0 : ERR_MEMORY;
}

/* The folder of --keep without slashes at its end, and whether there is something in it. */
static int name_kept(struct bench_place *p, const char *keep)
{
    size_t n = strlen(keep);
    while (n > 1 && keep[n - 1] == '/')
        n--;
    p->kept = true;
    if (!(p->model = mem_strndup(keep, n)))
        return ERR_MEMORY;
    p->reused = file_exists(p->model) && !is_empty(p->model);
    return 0;
}

int bench_place_open(struct bench_place *p, const struct bench *q, const struct bench_wish *wish,
                     struct parallel *pool)
{
    struct bench_tensors tensors;
    *p = (struct bench_place){0};
    int rc = bench_shape_expand(q->shape, &tensors);
    if (rc < 0)
        return rc;
    p->model_bytes = tensors.bytes;
    if (q->keep)
        rc = name_kept(p, q->keep);
    if (!rc)
        rc = choose_place(p, q, wish);
    if (!rc)
        rc = make_model(p, q, &tensors, pool);
    if (!rc)
        p->free_bytes = free_bytes(p->model);
    bench_tensors_free(&tensors);
    return rc;
}

void bench_place_close(struct bench_place *p)
{
    if (p->model && !p->kept)
        remove_quietly(p->model);
    if (p->out)
        remove_quietly(p->out);
    if (p->root)
        remove_quietly(p->root);
    free(p->root);
    free(p->model);
    free(p->out);
    *p = (struct bench_place){0};
}

void bench_place_text(const struct bench_place *p, struct text *out)
{
    text_printf(out, "checkpoint   %s, %s%s; %s free there\n", p->model, human_bytes(p->model_bytes).s,
                p->reused ? ", made before"
                : p->kept ? ", kept"
                          : "",
                human_bytes(p->free_bytes).s);
}

void bench_place_json(const struct bench_place *p, struct text *out)
{
    json_kv_string(out, "checkpoint", p->model);
    json_kv_uint(out, "checkpoint_bytes", p->model_bytes);
    json_kv_bool(out, "checkpoint_reused", p->reused);
    json_kv_uint(out, "free_bytes", p->free_bytes);
}

#include "formats/checkpoint.h"

#include "base/err.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/text.h"

#include <stdlib.h>
#include <string.h>

static const char index_name[] = "model.safetensors.index.json";
static const size_t max_index_bytes = 256u << 20;

/* --- finding the folder ------------------------------------------------------------------------------------- */

static char *cache_folder(void)
{
    const char *hub = getenv("HF_HUB_CACHE"), *hf_home = getenv("HF_HOME"), *home = getenv("HOME");
    if (hub && *hub)
        return mem_strdup(hub);
    if (hf_home && *hf_home)
        return file_join(hf_home, "hub");
    return mem_printf("%s/.cache/huggingface/hub", home ? home : "");
}

/* models--org--name/refs/main holds the commit whose snapshot is current. */
static char *cached_snapshot(const char *model)
{
    const char *slash = strchr(model, '/');
    if (!slash || strchr(slash + 1, '/') || slash == model || !slash[1] || model[0] == '.')
        return NULL;
    char *hub = cache_folder(), *folder = NULL, *ref = NULL, *commit = NULL;
    size_t len = 0;
    if (hub)
        folder = mem_printf("%s/models--%.*s--%s", hub, (int)(slash - model), model, slash + 1);
    if (folder)
        ref = file_join(folder, "refs/main");
    char *snapshot = NULL;
    if (ref && file_read(ref, 256, &commit, &len) == 0) {
        commit[strcspn(commit, " \t\r\n")] = '\0';
        if (*commit && !strchr(commit, '/'))
            snapshot = mem_printf("%s/snapshots/%s", folder, commit);
    }
    free(hub);
    free(folder);
    free(ref);
    free(commit);
    return snapshot;
}

int checkpoint_find(char **folder, const char *model)
{
    *folder = NULL;
    if (file_is_folder(model))
        *folder = mem_strdup(model);
    else if (file_exists(model))
        return err_set(
            ERR_IO, "%s: is not a folder; expected a model folder with config.json and *.safetensors", model);
    else if (!(*folder = cached_snapshot(model)))
        return err_set(ERR_IO,
                       "%s: no such folder, and no such model in the Hugging Face cache (gemcut downloads "
                       "nothing)",
                       model);
    if (*folder && !file_is_folder(*folder)) {
        err_set(ERR_IO, "%s: the snapshot of %s is missing from the Hugging Face cache", *folder, model);
        free(*folder);
        *folder = NULL;
        return ERR_IO;
    }
    return *folder ? 0 : ERR_MEMORY;
}

/* --- opening -------------------------------------------------------------------------------------------------- */

static int add_file(struct checkpoint *ck, const char *name)
{
    char *path = file_join(ck->folder, name);
    if (!path)
        return ERR_MEMORY;
    struct safetensors *files = realloc(ck->files, (ck->n_files + 1) * sizeof *files);
    if (!files) {
        free(path);
        return err_set(ERR_MEMORY, "out of memory for the file list");
    }
    ck->files = files;
    const int rc = safetensors_open(&ck->files[ck->n_files], path);
    if (!rc)
        ck->n_files++;
    free(path);
    return rc;
}

/* Moves the tensors of all files into one list and indexes them. */
static int collect_tensors(struct checkpoint *ck)
{
    size_t n = 0;
    for (size_t f = 0; f < ck->n_files; f++)
        n += ck->files[f].n_tensors;
    ck->tensors = mem_alloc(n, sizeof *ck->tensors, "the tensor list");
    if (!ck->tensors || name_table_init(&ck->by_name, n) < 0)
        return ERR_MEMORY;
    int rc = 0;
    for (size_t f = 0; f < ck->n_files; f++) {
        struct safetensors *st = &ck->files[f];
        for (size_t i = 0; i < st->n_tensors; i++) {
            struct tensor *t = &ck->tensors[ck->n_tensors];
            *t = st->tensors[i];
            t->file = (int)f;
            st->tensors[i].name = NULL;
            const int added = name_table_add(&ck->by_name, t->name, ck->n_tensors++);
            if (!rc && added == 1)
                rc = err_set(ERR_FORMAT, "%s: tensor '%s' is in another file as well", st->path, t->name);
            else if (!rc)
                rc = added;
        }
        st->n_tensors = 0;
    }
    return rc;
}

/* Every file that the index names, in order of first mention. */
static int add_indexed_files(struct checkpoint *ck, struct json weight_map)
{
    struct name_table seen;
    int rc = name_table_init(&seen, 16);
    for (struct json e = json_first(weight_map); !rc && e.node; e = json_next(e)) {
        const char *name;
        rc = json_as_string(e, &name);
        if (!rc && (!*name || strchr(name, '/')))
            rc = json_error(e, "is '%s', expected a file name without a folder", name);
        if (rc < 0)
            break;
        rc = name_table_add(&seen, name, 0);
        if (rc == 0)
            rc = add_file(ck, name);
        else if (rc == 1)
            rc = 0;
    }
    name_table_free(&seen);
    return rc;
}

static int check_index(const struct checkpoint *ck, struct json weight_map)
{
    if (json_count(weight_map) != ck->n_tensors)
        return json_error(weight_map, "names %zu tensors, the files hold %zu", json_count(weight_map),
                          ck->n_tensors);
    for (struct json e = json_first(weight_map); e.node; e = json_next(e)) {
        const char *name;
        const int rc = json_as_string(e, &name);
        if (rc < 0)
            return rc;
        const struct tensor *t = checkpoint_tensor(ck, json_key(e));
        if (!t || strcmp(file_base(ck->files[t->file].path), name))
            return err_set(ERR_FORMAT, "%s/%s: tensor '%s' is not in %s, where %s has it", ck->folder, name,
                           json_key(e), name, index_name);
    }
    return 0;
}

static int open_indexed(struct checkpoint *ck, const char *index_path)
{
    struct json_doc *doc;
    struct json weight_map;
    int rc = json_load(&doc, index_path, max_index_bytes);
    if (rc < 0)
        return rc;
    rc = json_get_object(json_root(doc), "weight_map", &weight_map);
    if (!rc)
        rc = add_indexed_files(ck, weight_map);
    if (!rc)
        rc = collect_tensors(ck);
    if (!rc)
        rc = check_index(ck, weight_map);
    json_free(doc);
    return rc;
}

static int open_single(struct checkpoint *ck)
{
    struct file_list list;
    int rc = file_list(&list, ck->folder);
    if (rc < 0)
        return rc;
    const char *found = NULL;
    size_t n = 0;
    for (size_t i = 0; i < list.n; i++) {
        if (!text_ends_with(list.names[i], ".safetensors"))
            continue;
        n++;
        if (!found || !strcmp(list.names[i], "model.safetensors"))
            found = list.names[i];
    }
    if (n == 0)
        rc = err_set(ERR_IO, "%s: has no *.safetensors file", ck->folder);
    else if (n > 1 && strcmp(found, "model.safetensors"))
        rc = err_set(ERR_FORMAT, "%s: has %zu *.safetensors files but no %s that says which belong together",
                     ck->folder, n, index_name);
    else
        rc = add_file(ck, found);
    file_list_free(&list);
    return rc < 0 ? rc : collect_tensors(ck);
}

int checkpoint_open(struct checkpoint *ck, const char *folder)
{
    *ck = (struct checkpoint){0};
    char *index_path = file_join(folder, index_name);
    ck->folder = mem_strdup(folder);
    int rc = index_path && ck->folder ? 0 : ERR_MEMORY;
    if (!rc)
        rc = file_exists(index_path) ? open_indexed(ck, index_path) : open_single(ck);
    free(index_path);
    if (rc < 0)
        checkpoint_close(ck);
    return rc;
}

void checkpoint_close(struct checkpoint *ck)
{
    for (size_t i = 0; i < ck->n_tensors; i++)
        free(ck->tensors[i].name);
    for (size_t f = 0; f < ck->n_files; f++)
        safetensors_close(&ck->files[f]);
    name_table_free(&ck->by_name);
    free(ck->tensors);
    free(ck->files);
    free(ck->folder);
    *ck = (struct checkpoint){0};
}

/* --- access --------------------------------------------------------------------------------------------------- */

const struct tensor *checkpoint_tensor(const struct checkpoint *ck, const char *name)
{
    size_t i;
    return name_table_find(&ck->by_name, name, &i) ? &ck->tensors[i] : NULL;
}

int checkpoint_read(const struct checkpoint *ck, const struct tensor *t, uint64_t offset, size_t n, void *buf)
{
    CHECK(offset <= t->bytes && n <= t->bytes - offset);
    const struct safetensors *st = &ck->files[t->file];
    return file_pread(st->fd, buf, n, t->offset + offset, st->path);
}

const char *checkpoint_path(const struct checkpoint *ck, const struct tensor *t)
{
    return ck->files[t->file].path;
}

/* --- hashing -------------------------------------------------------------------------------------------------- */

/* A task hashes a run of pieces of one tensor, so that one huge tensor still occupies every worker. */
enum { PIECES_PER_TASK = 16 };

struct hash_job {
    const struct checkpoint *ck;
    uint64_t *piece_bytes; /* [n_tensors] */
    size_t *first_piece;   /* [n_tensors + 1], into pieces */
    size_t *first_task;    /* [n_tensors + 1] */
    struct hash128 *pieces;
    void **buffers; /* [workers] */
    void (*on_bytes)(void *ctx, uint64_t bytes);
    void *ctx;
};

static int hash_task(void *arg, size_t task, int worker)
{
    const struct hash_job *job = arg;
    const size_t low = parallel_find(job->first_task, sizeof *job->first_task, job->ck->n_tensors, task);
    const struct tensor *t = &job->ck->tensors[low];
    const size_t n_pieces = job->first_piece[low + 1] - job->first_piece[low];
    size_t piece = (task - job->first_task[low]) * PIECES_PER_TASK;
    uint64_t done = 0;
    for (int i = 0; i < PIECES_PER_TASK && piece < n_pieces; i++, piece++) {
        const uint64_t at = piece * job->piece_bytes[low], left = t->bytes - at;
        const size_t n = (size_t)(left < job->piece_bytes[low] ? left : job->piece_bytes[low]);
        const int rc = checkpoint_read(job->ck, t, at, n, job->buffers[worker]);
        if (rc < 0)
            return rc;
        job->pieces[job->first_piece[low] + piece] = hash_bytes(job->buffers[worker], n);
        done += n;
    }
    if (job->on_bytes)
        job->on_bytes(job->ctx, done);
    return 0;
}

static int plan_hashes(struct hash_job *job, int n_workers, size_t *n_buffers)
{
    const struct checkpoint *ck = job->ck;
    uint64_t largest = 0;
    for (size_t i = 0; i < ck->n_tensors; i++) {
        const struct tensor *t = &ck->tensors[i];
        const uint64_t piece = (uint64_t)tensor_piece_rows(tensor_cols(t), t->dtype) *
                               (uint64_t)tensor_cols(t) * dtype_bytes(t->dtype);
        const size_t n = t->bytes ? (size_t)((t->bytes + piece - 1) / piece) : 0;
        job->piece_bytes[i] = piece;
        job->first_piece[i + 1] = job->first_piece[i] + n;
        job->first_task[i + 1] = job->first_task[i] + (n + PIECES_PER_TASK - 1) / PIECES_PER_TASK;
        const uint64_t need = piece < t->bytes ? piece : t->bytes;
        largest = need > largest ? need : largest;
    }
    job->pieces = mem_alloc(job->first_piece[ck->n_tensors], sizeof *job->pieces, "tensor hashes");
    if (!job->pieces)
        return ERR_MEMORY;
    for (; *n_buffers < (size_t)n_workers; ++*n_buffers)
        if (!(job->buffers[*n_buffers] = mem_alloc_aligned(largest, "a piece of a tensor")))
            return ERR_MEMORY;
    return 0;
}

int checkpoint_hash_all(const struct checkpoint *ck, struct parallel *pool, struct hash128 *hashes,
                        void (*on_bytes)(void *ctx, uint64_t bytes), void *ctx)
{
    const int n_workers = parallel_workers(pool);
    size_t n_buffers = 0;
    struct hash_job job = {
        .ck = ck,
        .piece_bytes = mem_alloc(ck->n_tensors, sizeof *job.piece_bytes, "tensor hashes"),
        .first_piece = mem_alloc(ck->n_tensors + 1, sizeof *job.first_piece, "tensor hashes"),
        .first_task = mem_alloc(ck->n_tensors + 1, sizeof *job.first_task, "tensor hashes"),
        .buffers = mem_alloc((size_t)n_workers, sizeof *job.buffers, "tensor hashes"),
        .on_bytes = on_bytes,
        .ctx = ctx,
    };
    int rc = job.piece_bytes && job.first_piece && job.first_task && job.buffers ? 0 : ERR_MEMORY;
    if (!rc)
        rc = plan_hashes(&job, n_workers, &n_buffers);
    if (!rc)
        rc = parallel_for(pool, job.first_task[ck->n_tensors], hash_task, &job);
    for (size_t i = 0; !rc && i < ck->n_tensors; i++) {
        const struct tensor *t = &ck->tensors[i];
        rc = tensor_hash_combine(job.pieces + job.first_piece[i], job.first_piece[i + 1] - job.first_piece[i],
                                 t->dtype, t->n_dims, t->shape, &hashes[i]);
    }
    for (size_t i = 0; i < n_buffers; i++)
        free(job.buffers[i]);
    free(job.buffers);
    free(job.pieces);
    free(job.first_task);
    free(job.first_piece);
    free(job.piece_bytes);
    return rc;
}

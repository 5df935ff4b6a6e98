#include "quantize/staging.h"

#include "base/err.h"
#include "base/mem.h"
#include "base/text.h"
#include "formats/record.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static const char marker_name[] = ".gemcut-partial";

int staging_init(struct staging *w, const char *out)
{
    *w = (struct staging){.lock = -1};
    size_t n = strlen(out);
    while (n > 1 && out[n - 1] == '/')
        n--;
    if (!(w->out = mem_strndup(out, n)))
        return ERR_MEMORY;
    const char *base = file_base(w->out); /* "" for the root */
    if (!*base || !strcmp(base, ".") || !strcmp(base, ".."))
        return err_set(ERR_USAGE, "'%s' cannot be the output: give the name of a new folder", out);
    w->partial = mem_printf("%s.partial", w->out);
    w->marker = w->partial ? file_join(w->partial, marker_name) : NULL;
    return w->marker ? 0 : ERR_MEMORY;
}

void staging_free(struct staging *w)
{
    if (w->lock >= 0)
        close(w->lock);
    free(w->out);
    free(w->partial);
    free(w->marker);
    *w = (struct staging){.lock = -1};
}

static bool is_real_folder(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* Only a folder that carries gemcut's record may be replaced. */
static int check_out(struct staging *w, bool overwrite)
{
    w->replaces = file_exists(w->out);
    if (!w->replaces)
        return 0;
    if (!overwrite)
        return err_set(ERR_IO, "%s: exists (--overwrite replaces a folder that gemcut wrote)", w->out);
    char *record = file_join(w->out, RECORD_NAME);
    if (!record)
        return ERR_MEMORY;
    const bool ours = is_real_folder(w->out) && file_exists(record);
    free(record);
    return ours ? 0
                : err_set(ERR_IO, "%s: has no %s, so it was not written by gemcut and is not replaced",
                          w->out, RECORD_NAME);
}

static int take_lock(struct staging *w)
{
    w->lock = open(w->marker, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (w->lock < 0)
        return err_errno("%s", w->marker);
    if (flock(w->lock, LOCK_EX | LOCK_NB) == 0)
        return 0;
    close(w->lock);
    w->lock = -1;
    return err_set(ERR_IO, "%s: another gemcut is writing there", w->partial);
}

/* Empties what a killed run left behind, marker excepted. */
static int clear_leftovers(const struct staging *w)
{
    struct file_list list;
    int rc = file_list(&list, w->partial);
    for (size_t i = 0; !rc && i < list.n; i++) {
        char *path = strcmp(list.names[i], marker_name) ? file_join(w->partial, list.names[i]) : NULL;
        if (path && unlink(path) < 0)
            rc = err_errno("%s: cannot remove", path);
        free(path);
    }
    file_list_free(&list);
    return rc;
}

int staging_begin(struct staging *w, bool overwrite, bool keep)
{
    int rc = check_out(w, overwrite);
    if (rc < 0)
        return rc;
    if (!file_exists(w->partial)) {
        rc = file_make_folder(w->partial);
        return rc < 0 ? rc : take_lock(w);
    }
    /* a run killed at the very end leaves the old OUT here, which has a record and no marker */
    char *record = file_join(w->partial, RECORD_NAME);
    if (!record)
        return ERR_MEMORY;
    const bool ours = is_real_folder(w->partial) && (file_exists(w->marker) || file_exists(record));
    free(record);
    if (!ours)
        return err_set(ERR_IO, "%s: exists and is not the remains of a gemcut run; move it away", w->partial);
    rc = take_lock(w);
    return rc < 0 || keep ? rc : clear_leftovers(w);
}

int staging_write(const struct staging *w, const char *name, const void *data, size_t n)
{
    char *path = file_join(w->partial, name);
    const int rc = path ? file_write_atomic(path, data, n) : ERR_MEMORY;
    free(path);
    return rc;
}

/* Weights in any format, their indices and what is written anew stay behind. */
static bool is_side_file(const char *name)
{
    static const char *const kept[] = {".json", ".jinja", ".model", ".txt", ".md"};
    static const char *const left[] = {".index.json", "config.json", RECORD_NAME, "quantize_config.json",
                                       "quantization_config.json"};
    for (size_t i = 0; i < sizeof left / sizeof *left; i++)
        if (left[i][0] == '.' ? text_ends_with(name, left[i]) : !strcmp(name, left[i]))
            return false;
    if (name[0] == '.')
        return false;
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
        if (text_ends_with(name, kept[i]))
            return true;
    return !strncmp(name, "LICENSE", 7) || !strncmp(name, "NOTICE", 6);
}

int staging_copy_side_files(const struct staging *w, const char *model_folder)
{
    struct file_list list;
    int rc = file_list(&list, model_folder);
    for (size_t i = 0; !rc && i < list.n; i++) {
        if (!is_side_file(list.names[i]))
            continue;
        char *from = file_join(model_folder, list.names[i]), *to = file_join(w->partial, list.names[i]);
        rc = from && to ? file_copy(from, to) : ERR_MEMORY;
        free(from);
        free(to);
    }
    file_list_free(&list);
    return rc;
}

int staging_files(const struct staging *w, struct file_list *out)
{
    int rc = file_list(out, w->partial);
    if (rc < 0)
        return rc;
    size_t n = 0;
    for (size_t i = 0; i < out->n; i++) {
        char *name = out->names[i];
        if (name[0] == '.' || !strcmp(name, RECORD_NAME) || text_ends_with(name, ".safetensors") ||
            text_ends_with(name, ".index.json"))
            free(name);
        else
            out->names[n++] = name;
    }
    out->n = n;
    return 0;
}

/* The marker goes last: whatever is killed on the way, a later run recognizes the remains. With RENAME_EXCHANGE
 * the old OUT and the new one change places in one step, then the old one goes. */
int staging_commit(struct staging *w)
{
    int rc = file_sync(w->partial);
    if (!rc && !w->replaces)
        rc = file_rename(w->partial, w->out);
    else if (!rc && renameat2(AT_FDCWD, w->partial, AT_FDCWD, w->out, RENAME_EXCHANGE) < 0)
        rc = err_errno("%s: cannot take the place of %s", w->partial, w->out);
    if (rc < 0)
        return rc;
    char *marker = file_join(w->out, marker_name);
    if (!marker)
        return ERR_MEMORY;
    if (unlink(marker) < 0)
        rc = err_errno("%s: cannot remove", marker);
    free(marker);
    return !rc && w->replaces ? file_remove_folder(w->partial) : rc;
}

int staging_remove(const struct staging *w, const char *name)
{
    char *path = file_join(w->partial, name);
    if (!path)
        return ERR_MEMORY;
    const int rc = unlink(path) < 0 && errno != ENOENT ? err_errno("%s: cannot remove", path) : 0;
    free(path);
    return rc;
}

void staging_abandon(struct staging *w)
{
    char *message = mem_strdup(err_message());
    /* its failure changes nothing: the next run clears what is left */
    file_remove_folder(w->partial);
    if (message)
        err_set(ERR_IO, "%s", message);
    free(message);
}

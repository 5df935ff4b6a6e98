#include "quantize/calib_data.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "quantize/self_calib.h"

#include <stdlib.h>
#include <string.h>

enum { USUAL_LENGTH = 2048 };

/* What all kinds of text are made with. */
struct job {
    const struct model *m;
    const struct backend *b;
    const struct tokenizer *t;
    const struct calib_spec *spec;
    int64_t length;
};

static int read_text(struct dataset *out, const struct job *j, const char *name, int64_t samples)
{
    const struct dataset_options options = {
        .samples = samples, .length = j->length, .seed = j->spec->seed, .shuffle = j->spec->shuffle};
    struct documents documents;
    enum chat_format chat;
    int rc = chat_template_choose(&chat, &j->m->config, j->t);
    if (!rc)
        rc = documents_read(&documents, name, chat);
    if (rc < 0)
        return rc;
    rc = dataset_make(out, j->t, &documents, &options, j->m->gemma.vocab_size, name);
    documents_free(&documents);
    return rc;
}

static int write_self(struct dataset *out, const struct job *j, const struct self_options *o)
{
    struct weights w;
    int rc = weights_load(&w, j->m, j->b);
    if (rc < 0)
        return rc;
    rc = self_calib_make(out, &w, j->t, o, NULL, NULL);
    weights_free(&w);
    return rc;
}

static int recall_self(struct dataset *out, const struct job *j, int64_t samples)
{
    const struct self_options o = self_options_default(samples, j->length, j->spec->seed);
    struct self_cache cache;
    int rc = self_calib_path(&cache, j->m, j->t, &o, j->b->name);
    if (rc < 0)
        return rc;
    rc = self_calib_load(out, &cache, &o, j->m->gemma.vocab_size);
    if (!rc && !(rc = write_self(out, j, &o)))
        self_calib_save(out, &cache);
    self_cache_free(&cache);
    return rc < 0 ? rc : 0;
}

/* The samples of one, then those of the other. */
static int read_both(struct dataset *out, const struct job *j)
{
    struct dataset own = {0};
    int rc = read_text(out, j, DOCUMENTS_BUILTIN, j->spec->samples - j->spec->samples / 2);
    if (!rc && j->spec->samples / 2)
        rc = recall_self(&own, j, j->spec->samples / 2);
    const size_t n = (size_t)(out->samples * j->length), more = (size_t)(own.samples * j->length);
    int32_t *ids = rc ? NULL : mem_alloc(n + more, sizeof *ids, "calibration samples");
    if (!rc && !ids)
        rc = ERR_MEMORY;
    if (!rc) {
        memcpy(ids, out->ids, n * sizeof *ids);
        memcpy(ids + n, own.ids, more * sizeof *ids);
        free(out->ids);
        out->ids = ids;
        out->samples += own.samples;
    }
    dataset_free(&own);
    return rc;
}

int calib_data_make(struct dataset *out, const struct model *m, const struct backend *b,
                    const struct calib_spec *spec, int32_t *bos)
{
    *out = (struct dataset){0};
    const int64_t context = m->gemma.max_positions, usual = context < USUAL_LENGTH ? context : USUAL_LENGTH;
    if (spec->length > context)
        return err_set(ERR_USAGE, "samples of %lld tokens are longer than the model's context of %lld",
                       (long long)spec->length, (long long)context);
    struct tokenizer *t;
    char *path = file_join(m->folder, "tokenizer.json");
    int rc = path ? tokenizer_open(&t, path) : ERR_MEMORY;
    free(path);
    if (rc < 0)
        return rc;
    const struct job j = {m, b, t, spec, spec->length ? spec->length : usual};
    *bos = tokenizer_bos(t);
    if (!strcmp(spec->text, CALIB_SELF))
        rc = recall_self(out, &j, spec->samples);
    else if (!strcmp(spec->text, CALIB_BOTH))
        rc = read_both(out, &j);
    else
        rc = read_text(out, &j, spec->text, spec->samples);
    tokenizer_close(t);
    if (rc < 0)
        dataset_free(out);
    return rc;
}

const char *calib_data_name(const struct calib_spec *spec)
{
    return file_base(spec->text);
}

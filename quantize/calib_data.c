#include "quantize/calib_data.h"

#include "base/err.h"
#include "base/file.h"

#include <stdlib.h>

enum { USUAL_LENGTH = 2048 };

static int make(struct dataset *out, const struct model *m, const struct tokenizer *t,
                const struct calib_spec *spec)
{
    const int64_t context = m->gemma.max_positions, usual = context < USUAL_LENGTH ? context : USUAL_LENGTH;
    const struct dataset_options options = {.samples = spec->samples,
                                            .length = spec->length ? spec->length : usual,
                                            .seed = spec->seed,
                                            .shuffle = spec->shuffle};
    struct documents documents;
    int rc = documents_read(&documents, spec->text, CHAT_GEMMA3);
    if (rc < 0)
        return rc;
    rc = dataset_make(out, t, &documents, &options, m->gemma.vocab_size, spec->text);
    documents_free(&documents);
    return rc;
}

int calib_data_make(struct dataset *out, const struct model *m, const struct calib_spec *spec, int32_t *bos)
{
    *out = (struct dataset){0};
    if (spec->length > m->gemma.max_positions)
        return err_set(ERR_USAGE, "samples of %lld tokens are longer than the model's context of %lld",
                       (long long)spec->length, (long long)m->gemma.max_positions);
    struct tokenizer *t;
    char *path = file_join(m->folder, "tokenizer.json");
    int rc = path ? tokenizer_open(&t, path) : ERR_MEMORY;
    free(path);
    if (rc < 0)
        return rc;
    *bos = tokenizer_bos(t);
    rc = make(out, m, t, spec);
    tokenizer_close(t);
    return rc;
}

const char *calib_data_name(const struct calib_spec *spec)
{
    return file_base(spec->text);
}

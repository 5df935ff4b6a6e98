/* The token ids that calibration runs through the model, from what the user named. */
#ifndef GEMCUT_QUANTIZE_CALIB_DATA_H
#define GEMCUT_QUANTIZE_CALIB_DATA_H

#include "calib/dataset.h"
#include "runtime/model.h"

#define CALIB_SELF "self"         /* text that the model writes itself */
#define CALIB_BOTH "builtin+self" /* half of the samples of either */

struct calib_spec {
    const char *text;        /* a file, DOCUMENTS_BUILTIN, CALIB_SELF or CALIB_BOTH */
    int64_t samples, length; /* length 0: 2048, or the model's context */
    uint64_t seed;
    bool shuffle;
    bool skip_bos; /* the rows of <bos> stay out of the Hessians */
};

/* Reads the text with the model's tokenizer; *bos: its id. b runs the model, where it is to write. */
int calib_data_make(struct dataset *out, const struct model *m, const struct backend *b,
                    const struct calib_spec *spec, int32_t *bos);

/* The name under which the text is recorded: a file's without its folder. */
const char *calib_data_name(const struct calib_spec *spec);

#endif

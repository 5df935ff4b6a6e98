/* Is this cut what it says it is? Three questions that need no forward pass: structure (every tensor that the
 * model demands is there, as config.json describes it), bytes (scales usable, everything as the record hashed it,
 * what was not quantized bit-equal to the source) and weights (how far each linear is from its source). */
#ifndef GEMCUT_REPORT_VERIFY_H
#define GEMCUT_REPORT_VERIFY_H

#include "report/weights.h"

#include <stdbool.h>

enum finding_kind { FINDING_STRUCTURE, FINDING_BYTES, FINDING_WEIGHTS, FINDING_BEHAVIOUR };
extern const char *const finding_kind_names[];

struct finding {
    enum finding_kind kind;
    char *object;  /* tensor, file or setting */
    char *message; /* what is wrong with it, one line */
};

struct verify_report {
    struct model cut, source; /* source.folder = NULL without one */
    bool has_record;
    size_t n_tensors, n_recorded_equal, n_files_equal; /* the last two against the record */
    size_t n_unquantized, n_source_equal; /* tensors that were passed on; bit-equal ones of them */
    size_t n_quantized;
    struct weight_report *weights; /* [cut.n_linears]; linear = NULL for those not quantized */
    double mean_error;             /* of the quantized linears; NaN without a source */
    struct finding *findings;
    size_t n_findings, findings_capacity;
};

struct verify_options {
    const char *cut, *source; /* source may be NULL */
    const char *device;
    int n_workers;
};

/* Looks at everything and collects what is wrong; n_findings = 0 means that all is well. A negative return means
 * that it could not look. Release with verify_free in either case. */
int verify_run(struct verify_report *out, const struct verify_options *options);
void verify_free(struct verify_report *r);

/* Adds what was found otherwise. */
int verify_add(struct verify_report *r, enum finding_kind kind, const char *object, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* Signal-to-quantization-noise ratio in dB for a relative error. */
double verify_sqnr(double error);

#endif

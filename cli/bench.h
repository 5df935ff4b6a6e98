/* What the parts of `gemcut bench` share: the request, made-up numbers, times, the machine's own rates, and the folder
 * in which a made-up checkpoint lies. Speeds are measured beside the bound they are judged by, in the same run. */
#ifndef GEMCUT_CLI_BENCH_H
#define GEMCUT_CLI_BENCH_H

#include "base/parallel.h"
#include "base/text.h"
#include "cli/bench_shapes.h"
#include "cli/machine.h"
#include "quantize/cut.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum bench_check { BENCH_CHECK_AUTO, BENCH_CHECK_YES, BENCH_CHECK_NO };

/* What the command line asks for; 0 where the default depends on the device. */
struct bench {
    const char *what;
    const struct bench_shape *shape;
    struct machine_options machine;
    int64_t rounds, tokens, sequences, seed;
    int check; /* enum bench_check */
    bool cut, no_verify;
    const char *dir, *keep; /* NULL: not given */
    struct recipe recipe;
};

/* Each prints its result and returns CMD_DONE, CMD_NO (a correctness check failed) or an error. */
int bench_ops(const struct bench *q);
int bench_prefill(const struct bench *q);
int bench_decode(const struct bench *q);
int bench_quantize(const struct bench *q);
int bench_tune(const struct bench *q);

const char *bench_commit(void); /* what was built: git describe, or "unknown" */

/* The head of every result. */
void bench_json_begin(struct text *t, const struct bench *q);
void bench_text_begin(struct text *t, const struct bench *q);

/* --- made-up numbers ---------------------------------------------------------------------------------------------- */

/* A normal distribution as a table of BF16 values: made-up numbers are picked from it by the bits of a counter's hash,
 * so that any part of a tensor can be made by itself, and memory is the limit. Every value is exact in BF16. */
enum { BENCH_VALUES = 1 << 14 };
struct bench_values {
    uint16_t bf16[BENCH_VALUES];
};

void bench_values_normal(struct bench_values *v, double mean, double sigma);

/* Elements [first, first + n) of the stream of that seed; `first` is a multiple of 4. */
void bench_fill(const struct bench_values *v, uint64_t seed, uint64_t first, size_t n, uint16_t *out);

uint64_t bench_mix(uint64_t x); /* SplitMix64's finalizer */

/* Memory of the device, filled: BF16 or F32 numbers; other types get random bits. v may be NULL for those. */
int bench_fill_device(const struct backend *b, struct parallel *pool, const struct bench_values *v,
                      uint64_t seed, const struct mat *m);
int bench_matrix(const struct backend *b, struct parallel *pool, enum dtype dtype, int64_t rows, int64_t cols,
                 double sigma, uint64_t seed, struct buf *memory, struct mat *out);

/* --- times -------------------------------------------------------------------------------------------------------- */

struct bench_time {
    double median, min; /* seconds of one call */
};

/* Call i of what is measured; it may only enqueue. */
typedef int (*bench_call)(void *ctx, int64_t i);

/* Warms up, then takes `rounds` times of as many calls as fill two milliseconds, with the wait for the device. */
int bench_time(const struct backend *b, int64_t rounds, bench_call call, void *ctx, struct bench_time *out);

double bench_median(double *values, size_t n); /* sorts them */

/* --- the machine's rates ------------------------------------------------------------------------------------------ */

/* Each is measured before and after what it is the bound of, because machines drift: a call raises the rate that is there
 * when it finds a higher one. */
enum { BENCH_PEAK_ROUNDS = 10 };

/* FLOP/s of gemm: [10240, 2560] BF16 on 16384 rows (the CPU: 512). */
int bench_gemm_peak(const struct backend *b, struct parallel *pool, double *flops);
/* Bytes/s of gemm with one row on [65536, 8192] BF16: 1 GiB read once. */
int bench_gemv_peak(const struct backend *b, struct parallel *pool, double *bytes);
/* Bytes/s of find_nonfinite over 2 GiB (the CPU: 1 GiB): a pure read. On the CPU the pool's workers share it. */
int bench_read_peak(const struct backend *b, struct parallel *pool, double *bytes);
/* Bytes/s, read and written, of a copy of 1 GiB from one place on the device to another (the CPU: 256 MiB). */
int bench_copy_peak(const struct backend *b, double *bytes);

int64_t bench_many_tokens(const struct backend *b); /* 16384; the CPU: 512 */

/* --- the checkpoint ------------------------------------------------------------------------------------------------ */

/* What a tensor's values are drawn from: such that activations, and attention's scores, are of order one. plain_norms: as
 * the family says. */
struct bench_normal {
    double mean, sigma;
};
struct bench_normal bench_tensor_normal(const struct bench_tensor *t, bool plain_norms);

/* Writes a checkpoint of that shape and its config.json into an existing empty folder: the same bytes for the same seed,
 * whatever the number of threads. */
int bench_make_checkpoint(const char *folder, const struct bench_shape *shape, uint64_t seed,
                          struct parallel *pool);

/* Where the checkpoint of this run lies. Everything but a checkpoint that is to be kept goes when it is closed. */
struct bench_place {
    char *root;  /* a fresh folder for what is removed at the end */
    char *model; /* the checkpoint's folder, in root or where --keep says */
    char *out;   /* a name in root for a cut; nothing is there yet */
    bool kept, reused;
    uint64_t model_bytes, free_bytes; /* free: on the file system of model, once it is there */
};

struct bench_wish {
    bool cut;       /* room for a cut beside it */
    bool in_memory; /* in /dev/shm rather than on a disk, where it fits … */
    int loads;      /* … and that many copies in memory too */
};

/* Makes or finds the checkpoint. Release with bench_place_close whatever it returns. */
int bench_place_open(struct bench_place *out, const struct bench *q, const struct bench_wish *wish,
                     struct parallel *pool);
void bench_place_close(struct bench_place *p);
void bench_place_text(const struct bench_place *p, struct text *out);
void bench_place_json(const struct bench_place *p, struct text *out);

/* --- cuts ---------------------------------------------------------------------------------------------------------- */

/* One run of `gemcut quantize`, and when what happened. */
struct bench_job {
    const struct dataset *data;                       /* of a calibrated recipe */
    bool count_time;                                  /* of the kinds of work, for cut_seconds */
    void (*on_end)(void *ctx, const struct cut *cut); /* may be NULL */
    void *ctx;
    struct cut_totals totals;
    double start, end;
    double stages[CUT_CHECK + 1]; /* when each began; 0: never */
    double last;                  /* when the last bytes or the last linear were done */
};

/* With the request's recipe, from place->model to place->out, which stays. */
int bench_run_job(const struct bench *q, const struct bench_place *place, struct bench_job *job);

/* The same for those who want only the cut. */
int bench_cut(const struct bench *q, const struct bench_place *place);
void bench_recipe_text(const struct bench *q, struct text *out);

/* Tokens of a sample, 0 where that was not given: at most the shape's context. */
int bench_settle_length(const struct bench_shape *shape, int64_t *length);

/* Ids to calibrate with, as many as the recipe says: made up too, with <bos> in front of each sample. Release with dataset_free. */
int bench_ids(const struct bench *q, struct dataset *out);

/* bench_quantize for a calibrated recipe, once there is a checkpoint. */
int bench_calibrate(const struct bench *q, const struct bench_place *place);

#endif

/* The shapes of real Gemmas, from data/shapes, inside the program: what tensors a checkpoint of that name holds, and
 * its config.json. No weights: `gemcut bench` makes them up. */
#ifndef GEMCUT_CLI_BENCH_SHAPES_H
#define GEMCUT_CLI_BENCH_SHAPES_H

#include "formats/safetensors.h"

#include <stddef.h>
#include <stdint.h>

struct bench_shape {
    const char *name;                  /* "gemma-3-4b" */
    const char *tensors, *tensors_end; /* a line each; tools/make-bench-shapes says how to read it */
    const char *config, *config_end;   /* the text of config.json */
};

/* By family and size, NULL at the end; and the shape of the name at that index. */
extern const char *const bench_shape_names[];
const struct bench_shape *bench_shape(int index);

struct bench_tensor {
    char *name;
    enum dtype dtype;
    int n_dims;
    int64_t dims[TENSOR_MAX_DIMS];
    uint64_t bytes;
};

struct bench_tensors {
    struct bench_tensor *list; /* layer by layer, as released checkpoints order them */
    size_t n, capacity;
    uint64_t bytes; /* of all of them */
};

int bench_shape_expand(const struct bench_shape *shape, struct bench_tensors *out);
void bench_tensors_free(struct bench_tensors *t);

/* Adds the tensors that one line stands for, e.g. "layers.{0..5}.mlp.up_proj.weight BF16 768x256". ERR_FORMAT. */
int bench_tensors_add_line(struct bench_tensors *out, const char *line, size_t len);

#endif

/* How the list of measured operations is put together; bench_cases.c and bench_train.c do it. */
#ifndef GEMCUT_CLI_BENCH_BUILDER_H
#define GEMCUT_CLI_BENCH_BUILDER_H

#include "cli/bench_case.h"

/* The list under construction. */
struct bench_builder {
    struct bench_case *list;
    int n;
    const struct gemma_config *c;
    const struct backend *b;
    int64_t tokens, length, vocab; /* length: tokens of one sequence */
    bool small;
};

typedef int (*bench_run)(const struct backend *b, const struct bench_case *c, const struct mat *m);

/* A case without operands; what follows is its sizes in words. */
struct bench_case *bench_add(struct bench_builder *k, const char *op, bench_run run, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* Its next operand; activations have the device's activation dtype, a weight is BF16. */
struct operand *bench_operand(struct bench_case *c, enum operand_use use, enum dtype dtype, int64_t rows,
                              int64_t cols);
void bench_activations(struct bench_case *c, enum operand_use use, int64_t rows, int64_t cols);
struct operand *bench_weight(struct bench_case *c, int64_t rows, int64_t cols);

/* Bytes of the operands as this device holds them, written ones that are read too twice. */
double bench_bytes(const struct bench_builder *k, const struct bench_case *c);

/* The weight that a case's codes and scales stand for. */
struct qmat bench_packed(const struct bench_case *c, const struct mat *words, const struct mat *scales);

/* 4 bits, groups of 128: codes and scales of a [rows, cols] weight. */
void bench_packed_weight(struct bench_case *c, enum operand_use use, int64_t rows, int64_t cols);

/* The linears of a layer, as far as they are one product. */
enum { BENCH_LINEARS = 4 };

struct bench_linear {
    const char *name;
    int64_t rows, cols;
};

void bench_linears(const struct gemma_config *g, struct bench_linear out[BENCH_LINEARS]);

/* What a layer with experts does besides, where the model has such layers. */
void bench_expert_cases(struct bench_builder *k);

/* The gradients of a layer's operations, but for attention's, and the step of a tuning. */
void bench_train_cases(struct bench_builder *k);

#endif

/* One operation of the backend at one size, as data: its operands and how it is called. From that it can be run on
 * several devices with the same numbers, compared, and timed on operands that no cache holds. */
#ifndef GEMCUT_CLI_BENCH_CASE_H
#define GEMCUT_CLI_BENCH_CASE_H

#include "cli/bench.h"

enum operand_use { OPERAND_IN, OPERAND_OUT, OPERAND_INOUT };

enum operand_fill {
    FILL_NORMAL,  /* F32 and BF16, with mean and sigma */
    FILL_PLANTED, /* the same with an infinity in it, when operations are compared */
    FILL_BITS,
    FILL_ZERO,
    FILL_IDS, /* I32 in [0, limit) */
};

struct operand {
    enum operand_use use;
    enum dtype dtype; /* but the activation dtype, when */
    bool activation;
    bool host; /* lies in host memory on every device */
    int64_t rows, cols;
    enum operand_fill fill;
    double mean, sigma;
    int64_t limit;
    int64_t compared; /* columns that count in a comparison; 0 = all */
};

enum { CASE_OPERANDS = 9, CASE_TEXT = 64, MAX_CASES = 64 };

struct bench_case {
    const char *op; /* as backend.h calls it */
    char sizes[CASE_TEXT];
    int (*run)(const struct backend *b, const struct bench_case *c, const struct mat *m);
    struct operand operands[CASE_OPERANDS];
    int n_operands;
    double flops, bytes; /* of a call; flops > 0: judged by the rate of gemm, otherwise by that of reads */
    bool alone;          /* on the CPU it works on the calling thread */
    bool exact;          /* every device must give the same bits */
    /* settings, for the operations that have them */
    struct norm_spec norm;
    struct heads heads;
    struct sequences sequences;
    int64_t window, cols, group, n_experts;
    int bits;
    enum scale_rule rule;
};

/* Pairs of query and key that causal attention works on. */
double bench_attention_pairs(int64_t first_position, int64_t n_new, int64_t window);

/* The cases of a model's sizes. tokens: rows of activations. small: the same cases, in the same order, for comparing.
 * Returns how many. */
struct gemma_config;
int bench_cases(struct bench_case out[MAX_CASES], const struct gemma_config *c, const struct backend *b,
                int64_t tokens, bool small);

/* Runs it on both backends with the same numbers. *error: relative L2 distance of what it puts out from the reference,
 * or for integers the share that differs; the worst of the outputs. */
int bench_case_compare(const struct bench_case *c, const struct backend *b, const struct backend *reference,
                       struct parallel *pool, double *error);

int bench_case_time(const struct bench_case *c, const struct backend *b, struct parallel *pool,
                    int64_t rounds, struct bench_time *out);

#endif

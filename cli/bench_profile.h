/* A backend that counts and times a tuning's operations on another one as they are called: whoever runs on it runs what
 * is always run. It opens nothing; the other backend must stay open. */
#ifndef GEMCUT_CLI_BENCH_PROFILE_H
#define GEMCUT_CLI_BENCH_PROFILE_H

#include "cli/bench.h"
#include "runtime/gemma.h"
#include "runtime/weights.h"

/* Kinds of operations. The first four have a row for each of a block's sets of linears (runtime/gemma.h): add its number. */
enum profile_row {
    ROW_FORWARD,
    ROW_DGRAD = ROW_FORWARD + N_BLOCK_SETS, /* products by the inputs, … */
    ROW_WGRAD = ROW_DGRAD + N_BLOCK_SETS,   /* … by the weights */
    ROW_STEP = ROW_WGRAD + N_BLOCK_SETS,
    ROW_ATTENTION = ROW_STEP + N_BLOCK_SETS,
    ROW_ATTENTION_BACKWARD,
    ROW_NORMS,
    ROW_NORMS_BACKWARD,
    ROW_HEADS, /* q/k/v apart, normed and turned */
    ROW_HEADS_BACKWARD,
    ROW_GATE,
    ROW_GATE_BACKWARD,
    ROW_ROUTER,      /* of a mixture of experts: its products, forward and back */
    ROW_ROUTES,      /* which experts, and the gradient by how much they count */
    ROW_EXPERT_ROWS, /* gathered, and added up */
    ROW_LOSS,
    ROW_COPIES,
    N_ROWS
};

const char *profile_row_name(int row);
bool profile_row_computes(int row); /* amounts are FLOP; else bytes read and written */

struct profile_op {
    int64_t calls;
    double seconds, amount; /* of all calls */
};

struct profile_iteration {
    struct profile_op ops[N_ROWS];
};

enum { PROFILE_SHAPES = N_FUSED * 3 + 5 };

/* What is counted. An iteration ends with its last step; what comes before the first one's operations is counted with
 * it, what comes behind the last one's not at all. */
struct profile_log {
    bool
        apart; /* waits before and behind each operation; else at the end of the first and of the last iteration */
    struct profile_iteration *iterations; /* [n] */
    int64_t n, at;
    double begin, end; /* clock: the first iteration's end, and the last one's */
    bool stepped;
    struct {
        int64_t rows, cols;
        int set;              /* of the block, or N_BLOCK_SETS: the router */
    } shapes[PROFILE_SHAPES]; /* of the block's weights, which tell products apart */
    int n_shapes;
};

struct bench_profile {
    struct backend backend; /* first: operations get its address */
    struct core_ops core;
    struct train_ops train;
    const struct backend *real;
    struct profile_log *log;
};

/* log: zeroed but for apart, iterations and n */
void bench_profile_begin(struct bench_profile *out, const struct backend *real, struct profile_log *log,
                         const struct block *block);

#endif

/* What the tests of the forward pass's operations share: backends with one, two and three threads, matrices whose rows
 * are longer than their width and end in NaNs (reading them spoils the result, writing them is seen), and the
 * comparison with a naive result. */
#ifndef GEMCUT_TESTS_UNIT_FORWARD_SUPPORT_H
#define GEMCUT_TESTS_UNIT_FORWARD_SUPPORT_H

#include "kernels/backend.h"
#include "tests/unit/support.h"

enum { N_BACKENDS = 3, SLACK = 3 };

extern struct backend cpu[N_BACKENDS]; /* with 1, 2, 3 threads */
extern uint64_t random_state;          /* every test starts from the same */

int open_backends(void **state);
int close_backends(void **state);
int clean_up(void **state); /* a test that failed must not change the numbers of the next */

void *room(size_t n, size_t size); /* released by free_matrices, as what follows */
double *zeros(int64_t n);
void free_matrices(void);
void poison(const struct mat *m);
struct mat make(enum dtype dtype, int64_t rows, int64_t cols);
struct mat make_random(enum dtype dtype, int64_t rows, int64_t cols, double amplitude);
void put(const struct mat *m, int64_t row, int64_t col, double value);
float at(const struct mat *m, int64_t row, int64_t col);
void copy(const struct mat *from, const struct mat *to);
bool row_chosen(int64_t row, int64_t rows);

/* How a made-up packed weight is laid out. */
struct q_kind {
    int bits;
    int64_t group; /* 0: a whole row */
    bool asymmetric;
};

/* Any words, scales of either sign, any zero points of the code's range. */
struct qmat make_packed(const struct q_kind *kind, int64_t n, int64_t cols);

/* What an operation's cases amount to: the worst relative L2 error of any, beside what is allowed. */
struct outcome {
    const char *op;
    double bound, worst;
    size_t cases;
};

void print_outcome(const struct outcome *o);
void check(struct outcome *o, const struct mat *out, const double *expected, double size_squared,
           const char *text);

/* One case of an operation; in-place operations copy their operand to `out` first. */
typedef int (*case_fn)(const struct backend *b, const void *args, const struct mat *out);
void run_everywhere(case_fn run, const void *args, const struct mat *out, const char *text);

/* RMSNorm of one row of n in double; out may be x. A matrix of any float type in double, row after row. */
void naive_norm_row(const double *x, int64_t n, const struct mat *w, const struct norm_spec *spec,
                    double *out);
double *naive_rows(const struct mat *m);

#endif

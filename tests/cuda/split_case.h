/* The shapes, and the kinds of keys and values, that split_qkv and its gradient are tried with. */
#ifndef GEMCUT_TESTS_CUDA_SPLIT_CASE_H
#define GEMCUT_TESTS_CUDA_SPLIT_CASE_H

#include "tests/cuda/parity.h"

struct split_case {
    struct qkv_spec spec; /* without its matrices */
    int64_t length, cols; /* tokens of a sequence; columns of qkv */
    bool alone;           /* queries without keys and values */
    bool q_normed, k_normed;
    size_t kind; /* for everything that takes its turns: gaps between rows, types of norms */
    char text[160];
};

enum {
    SPLIT_VARIANTS = 8, /* with and without either norm; four that have one of these */
    SPLIT_SHAPES = 4 * 7 * 2 * 3 * 2,
    SPLIT_CASES = SPLIT_SHAPES * SPLIT_VARIANTS
};

static inline struct split_case split_case_of(size_t index)
{
    static const int heads[][2] = {{1, 1}, {4, 1}, {4, 2}, {3, 3}}, dims[] = {2, 32, 64, 80, 128, 256, 512};
    static const int64_t n_sequences[] = {1, 3}, lengths[] = {1, 5, 33}, firsts[] = {0, 7};
    static const char *const names[] = {"",
                                        "",
                                        "",
                                        "",
                                        ", values normed",
                                        ", keys are values",
                                        ", keys are values, normed",
                                        ", queries alone"};
    const size_t i = index / SPLIT_VARIANTS, v = index % SPLIT_VARIANTS, norms = v < 4 ? v : (i + v) / 3 % 4;
    const struct heads h = {heads[i % 4][0], heads[i % 4][1], dims[i / 4 % 7]};
    struct split_case c = {.length = lengths[i / 56 % 3],
                           .alone = v == 7,
                           .q_normed = norms & 1,
                           .k_normed = norms & 2,
                           .kind = norms + 4 * (i % 9)};
    const int64_t first = firsts[i / 168];
    c.spec = (struct qkv_spec){
        .heads = h,
        .sequences = {n_sequences[i / 28 % 2], first, first + c.length + (int64_t)(i % 3) * 4},
        .norm = {1e-6f, c.kind % 2},
        .k_is_v = v == 5 || v == 6,
        .values_normed = v == 4 || v == 6};
    c.cols = (int64_t)(h.n_heads + (c.alone ? 0 : c.spec.k_is_v ? 1 : 2) * h.n_kv_heads) * h.head_dim;
    snprintf(c.text, sizeof c.text, "heads %d/%d of %d, %d × %d tokens at %d, norms %d, turn %d%s", h.n_heads,
             h.n_kv_heads, h.head_dim, (int)c.spec.sequences.n, (int)c.length, (int)first, (int)norms,
             (int)c.kind, names[v]);
    return c;
}

#endif

/* What OpenBLAS computes for us: products and Cholesky factors. The library is loaded when the first product needs it, because its
 * own threads, which we never use, spin when it is loaded: that made quantizing a small model a quarter slower. */
#ifndef GEMCUT_KERNELS_CPU_BLAS_H
#define GEMCUT_KERNELS_CPU_BLAS_H

#include <stdbool.h>

/* Loads OpenBLAS, once; ERR_UNSUPPORTED when it is not there. Before blas_sgemm, from a thread that works alone. */
int blas_load(void);

/* c [m, n] = a [m, k] · b, b: [k, n], or [n, k] when transpose_b. Row-major, strides lda, ldb, ldc. Runs on the calling
 * thread; several threads may call it at once. */
void blas_sgemm(bool transpose_b, int m, int n, int k, const float *a, int lda, const float *b, int ldb,
                float *c, int ldc);

/* The same with every choice: c = alpha·op(a)·op(b) + beta·c. */
struct blas_product {
    bool transpose_a, transpose_b;
    int m, n, k;
    float alpha, beta;
    const float *a, *b;
    int lda, ldb;
    float *c;
    int ldc;
};
void blas_product(const struct blas_product *p);

/* The lower triangle of a [n, n] row-major becomes L with a = L·Lᵀ. False where a is not positive definite. */
bool blas_cholesky(int n, double *a, int lda);

#endif

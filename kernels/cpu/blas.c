#include "kernels/cpu/blas.h"

#include "base/err.h"

#include <cblas.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static void *library;
static __typeof__(&cblas_sgemm) sgemm;
static void (*dpotrf)(const char *uplo, const int *n, double *a, const int *lda, int *info);

/* One thread a product: our tiles go to our threads, and OpenBLAS's results vary with its thread count. Said in the
 * environment it is heard before any thread is made. */
static void load(void)
{
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return;
    *(void **)&sgemm = dlsym(library, "cblas_sgemm");
    *(void **)&dpotrf = dlsym(library, "dpotrf_");
}

int blas_load(void)
{
    pthread_once(&once, load);
    if (sgemm && dpotrf)
        return 0;
    return err_set(ERR_UNSUPPORTED,
                   "libopenblas.so.0 cannot be loaded, and running a model needs it (Debian: "
                   "libopenblas0-pthread)");
}

void blas_sgemm(bool transpose_b, int m, int n, int k, const float *a, int lda, const float *b, int ldb,
                float *c, int ldc)
{
    sgemm(CblasRowMajor, CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans, m, n, k, 1, a, lda, b, ldb, 0,
          c, ldc);
}

void blas_product(const struct blas_product *p)
{
    sgemm(CblasRowMajor, p->transpose_a ? CblasTrans : CblasNoTrans,
          p->transpose_b ? CblasTrans : CblasNoTrans, p->m, p->n, p->k, p->alpha, p->a, p->lda, p->b, p->ldb,
          p->beta, p->c, p->ldc);
}

/* Read by columns, as LAPACK does, the lower triangle is the upper one. */
bool blas_cholesky(int n, double *a, int lda)
{
    int info = 0;
    dpotrf("U", &n, a, &lda, &info);
    return info == 0;
}

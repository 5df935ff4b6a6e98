/* In place of the CUDA backend in builds without it. */
#include "kernels/cuda/cuda.h"

#include "base/err.h"

int cuda_count(void)
{
    return 0;
}

int cuda_title(int ordinal, char title[DEVICE_TEXT_BYTES])
{
    title[0] = 0;
    return err_set(ERR_UNSUPPORTED, "device 'cuda:%d' is not available; this build has: cpu", ordinal);
}

int cuda_open(struct backend *b, int ordinal)
{
    *b = (struct backend){0};
    return err_set(ERR_UNSUPPORTED, "device 'cuda:%d' is not available; this build has: cpu", ordinal);
}

void cuda_close(struct backend *b)
{
    *b = (struct backend){0};
}

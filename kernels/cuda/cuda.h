/* What the CUDA backend offers to backend.c. A build without CUDA has the same functions, which say so. */
#ifndef GEMCUT_KERNELS_CUDA_CUDA_H
#define GEMCUT_KERNELS_CUDA_CUDA_H

#include "kernels/backend.h"

/* Devices that can be used; 0 when there are none, no driver, or no CUDA in this build. */
int cuda_count(void);
/* The device in words, or an error when there is no such device. */
int cuda_title(int ordinal, char title[DEVICE_TEXT_BYTES]);

int cuda_open(struct backend *b, int ordinal);
void cuda_close(struct backend *b);

#endif

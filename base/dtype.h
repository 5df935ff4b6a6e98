/* Element types as safetensors names them. */
#ifndef GEMCUT_BASE_DTYPE_H
#define GEMCUT_BASE_DTYPE_H

#include <stddef.h>

enum dtype {
    DTYPE_BOOL,
    DTYPE_U8,
    DTYPE_I8,
    DTYPE_F8_E4M3,
    DTYPE_F8_E5M2,
    DTYPE_U16,
    DTYPE_I16,
    DTYPE_F16,
    DTYPE_BF16,
    DTYPE_U32,
    DTYPE_I32,
    DTYPE_F32,
    DTYPE_U64,
    DTYPE_I64,
    DTYPE_F64,
    N_DTYPES
};

const char *dtype_name(enum dtype t);
size_t dtype_bytes(enum dtype t);

/* The type of that name, or -1. */
int dtype_parse(const char *name);

#endif

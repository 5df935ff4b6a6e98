#include "calib/builtin.h"

/* The assembler includes the files; the build gives their paths. */
#define INCLUDE_BYTES(name, path)                                                                            \
    __asm__(".section .rodata\n" name "_begin:\n.incbin \"" path "\"\n" name "_end:\n.byte 0\n.previous\n")

INCLUDE_BYTES("builtin_prose", GEMCUT_PROSE);
INCLUDE_BYTES("builtin_calibration", GEMCUT_CALIBRATION);

extern const char builtin_prose_begin[], builtin_prose_end[];
extern const char builtin_calibration_begin[], builtin_calibration_end[];

const char *builtin_prose(size_t *len)
{
    *len = (size_t)(builtin_prose_end - builtin_prose_begin);
    return builtin_prose_begin;
}

const void *builtin_calibration(size_t *len)
{
    *len = (size_t)(builtin_calibration_end - builtin_calibration_begin);
    return builtin_calibration_begin;
}

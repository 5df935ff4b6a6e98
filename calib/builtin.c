#include "calib/builtin.h"

/* The assembler includes the file; the build gives its path. */
__asm__(".section .rodata\n"
        "builtin_prose_begin:\n"
        ".incbin \"" GEMCUT_PROSE "\"\n"
        "builtin_prose_end:\n"
        ".byte 0\n"
        ".previous\n");

extern const char builtin_prose_begin[], builtin_prose_end[];

const char *builtin_prose(size_t *len)
{
    *len = (size_t)(builtin_prose_end - builtin_prose_begin);
    return builtin_prose_begin;
}

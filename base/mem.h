/* Checked memory: sizes are multiplied with overflow checks, failures are recorded as ERR_MEMORY and name what
 * the memory was for. Everything returned here is released with free(). */
#ifndef GEMCUT_BASE_MEM_H
#define GEMCUT_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* `count` zeroed objects of `size` bytes; NULL (recorded) on overflow or exhaustion. 0 bytes give a valid pointer. */
void *mem_alloc(size_t count, size_t size, const char *what);

/* As mem_alloc, aligned to 64 bytes and not zeroed: for bulk data that vector code walks over. */
void *mem_alloc_aligned(size_t bytes, const char *what);

/* As mem_alloc_aligned, on huge pages where the system grants them: for weights that are streamed again and again. */
void *mem_alloc_huge(size_t bytes, const char *what);

/* Grows *array to hold at least `need` objects of `size` bytes, doubling *capacity; 0 or ERR_MEMORY. */
int mem_grow(void *array, size_t *capacity, size_t need, size_t size, const char *what);

/* Copy of the first n bytes of s, NUL-terminated. */
char *mem_strndup(const char *s, size_t n);
char *mem_strdup(const char *s);

/* printf into fresh memory. */
char *mem_printf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* What the system can give to programs without swapping (page cache that it would drop included), and what it has. */
uint64_t mem_available(void);
uint64_t mem_total(void);

/* a*b and a+b; false when the result does not fit. */
static inline bool mem_mul_u64(uint64_t a, uint64_t b, uint64_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

static inline bool mem_add_u64(uint64_t a, uint64_t b, uint64_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

#endif

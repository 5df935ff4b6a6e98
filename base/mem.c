#include "base/mem.h"

#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static void *out_of_memory(size_t count, size_t size, const char *what)
{
    err_set(ERR_MEMORY, "out of memory: %zu × %zu bytes for %s", count, size, what);
    return NULL;
}

void *mem_alloc(size_t count, size_t size, const char *what)
{
    size_t bytes; /* calloc checks this too, but sanitizers take such a call for a bug */
    if (__builtin_mul_overflow(count, size, &bytes))
        return out_of_memory(count, size, what);
    void *p = calloc(1, bytes ? bytes : 1);
    return p ? p : out_of_memory(count, size, what);
}

void *mem_alloc_aligned(size_t bytes, const char *what)
{
    const size_t align = 64;
    if (bytes > SIZE_MAX - align)
        return out_of_memory(1, bytes, what);
    void *p = aligned_alloc(align, bytes ? (bytes + align - 1) / align * align : align);
    return p ? p : out_of_memory(1, bytes, what);
}

void *mem_alloc_huge(size_t bytes, const char *what)
{
    const size_t page = 2u << 20;
    if (bytes < page)
        return mem_alloc_aligned(bytes, what);
    if (bytes > SIZE_MAX - page)
        return out_of_memory(1, bytes, what);
    const size_t whole = (bytes + page - 1) / page * page;
    void *p = aligned_alloc(page, whole);
    if (!p)
        return out_of_memory(1, bytes, what);
    madvise(p, whole, MADV_HUGEPAGE); /* a wish: small pages serve as well */
    return p;
}

int mem_grow(void *array, size_t *capacity, size_t need, size_t size, const char *what)
{
    void **slot = array;
    if (need <= *capacity)
        return 0;
    size_t wanted = *capacity ? *capacity : 16;
    while (wanted < need) {
        if (wanted > SIZE_MAX / 2)
            return out_of_memory(need, size, what), ERR_MEMORY;
        wanted *= 2;
    }
    size_t bytes;
    if (__builtin_mul_overflow(wanted, size, &bytes))
        return out_of_memory(wanted, size, what), ERR_MEMORY;
    void *p = realloc(*slot, bytes);
    if (!p)
        return out_of_memory(wanted, size, what), ERR_MEMORY;
    *slot = p;
    *capacity = wanted;
    return 0;
}

char *mem_strndup(const char *s, size_t n)
{
    char *p = mem_alloc(n + 1, 1, "a string");
    if (p && n)
        memcpy(p, s, n);
    return p;
}

char *mem_strdup(const char *s)
{
    return mem_strndup(s, strlen(s));
}

char *mem_printf(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    const int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    char *p = n < 0 ? NULL : mem_alloc((size_t)n + 1, 1, "a string");
    if (!p)
        return NULL;
    va_start(args, fmt);
    vsnprintf(p, (size_t)n + 1, fmt, args);
    va_end(args);
    return p;
}

/* A line of /proc/meminfo in bytes; 0 when there is none. */
static uint64_t meminfo(const char *format)
{
    unsigned long long kib = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, format, &kib) == 1)
            break;
    if (f)
        fclose(f);
    return (uint64_t)kib << 10;
}

uint64_t mem_available(void)
{
    return meminfo("MemAvailable: %llu kB");
}

uint64_t mem_total(void)
{
    return meminfo("MemTotal: %llu kB");
}

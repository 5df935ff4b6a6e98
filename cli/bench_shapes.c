#include "cli/bench_shapes.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* --- what lies in the program ------------------------------------------------------------------------------------- */

#define SHAPES(X)                                                                                            \
    X(tiny, "gemma3-tiny")                                                                                   \
    X(gemma_2b, "gemma-2b")                                                                                  \
    X(gemma_7b, "gemma-7b")                                                                                  \
    X(gemma2_2b, "gemma-2-2b")                                                                               \
    X(gemma2_9b, "gemma-2-9b")                                                                               \
    X(gemma2_27b, "gemma-2-27b")                                                                             \
    X(gemma3_270m, "gemma-3-270m")                                                                           \
    X(gemma3_1b, "gemma-3-1b")                                                                               \
    X(gemma3_4b, "gemma-3-4b")                                                                               \
    X(gemma3_12b, "gemma-3-12b")                                                                             \
    X(gemma3_27b, "gemma-3-27b")                                                                             \
    X(gemma4_e2b, "gemma-4-E2B")                                                                             \
    X(gemma4_e4b, "gemma-4-E4B")                                                                             \
    X(gemma4_12b, "gemma-4-12B")                                                                             \
    X(gemma4_26b_a4b, "gemma-4-26B-A4B")                                                                     \
    X(gemma4_31b, "gemma-4-31B")

/* The assembler includes the files; the build gives their folder. */
#define INCLUDE(id, name)                                                                                    \
    __asm__(".section .rodata\n"                                                                             \
            "shape_" #id "_tensors:\n.incbin \"" GEMCUT_SHAPES "/" name ".txt\"\n"                           \
            "shape_" #id "_tensors_end:\n.byte 0\n"                                                          \
            "shape_" #id "_config:\n.incbin \"" GEMCUT_SHAPES "/" name ".json\"\n"                           \
            "shape_" #id "_config_end:\n.byte 0\n"                                                           \
            ".previous\n");                                                                                  \
    extern const char shape_##id##_tensors[], shape_##id##_tensors_end[], shape_##id##_config[],             \
        shape_##id##_config_end[];
SHAPES(INCLUDE)

#define ROW(id, name)                                                                                        \
    {name, shape_##id##_tensors, shape_##id##_tensors_end, shape_##id##_config, shape_##id##_config_end},
static const struct bench_shape shapes[] = {SHAPES(ROW)};

#define NAME(id, name) name,
const char *const bench_shape_names[] = {SHAPES(NAME) NULL};

const struct bench_shape *bench_shape(int index)
{
    CHECK(index >= 0 && (size_t)index < sizeof shapes / sizeof *shapes);
    return &shapes[index];
}

/* --- a line --------------------------------------------------------------------------------------------------------- */

enum { MAX_TENSORS = 1 << 20, MAX_NUMBER = 1 << 20 };

static int bad_line(const char *line, size_t len, const char *why)
{
    return err_set(ERR_FORMAT, "shape line '%.*s': %s", (int)(len < 200 ? len : 200), line, why);
}

/* Digits at *s as a number in [0, MAX_NUMBER], or -1; *s ends behind them. */
static int64_t read_number(const char **s)
{
    int64_t n = 0;
    const char *start = *s;
    for (; **s >= '0' && **s <= '9' && n <= MAX_NUMBER; ++*s)
        n = 10 * n + (**s - '0');
    return *s > start && n <= MAX_NUMBER ? n : -1;
}

/* "BF16 2560x10240" or "F32 scalar" → dtype, dims, bytes. */
static int read_kind(const char *kind, struct bench_tensor *t)
{
    const char *dims = strchr(kind, ' ');
    char dtype[16] = "";
    if (dims && (size_t)(dims - kind) < sizeof dtype)
        memcpy(dtype, kind, (size_t)(dims - kind));
    const int parsed = dtype_parse(dtype);
    if (parsed < 0)
        return -1;
    t->dtype = (enum dtype)parsed;
    t->bytes = dtype_bytes(t->dtype);
    t->n_dims = 0;
    if (!strcmp(++dims, "scalar"))
        return 0;
    for (const char *s = dims; t->n_dims < TENSOR_MAX_DIMS; s++) {
        const int64_t n = read_number(&s);
        if (n < 0 || !mem_mul_u64(t->bytes, (uint64_t)n, &t->bytes))
            return -1;
        t->dims[t->n_dims++] = n;
        if (*s != 'x')
            return *s ? -1 : 0;
    }
    return -1;
}

static int add_tensor(struct bench_tensors *out, const char *name, const struct bench_tensor *kind)
{
    if (out->n == MAX_TENSORS || !mem_add_u64(out->bytes, kind->bytes, &out->bytes))
        return err_set(ERR_FORMAT, "tensor '%s' is one too many", name);
    const int rc =
        mem_grow(&out->list, &out->capacity, out->n + 1, sizeof *out->list, "the tensors of a shape");
    if (rc < 0)
        return rc;
    out->list[out->n] = *kind;
    if (!(out->list[out->n].name = mem_strdup(name)))
        return ERR_MEMORY;
    out->n++;
    return 0;
}

/* Replaces the first braces by each of their numbers in turn, then the next ones in what comes of it. */
static int add_names(struct bench_tensors *out, const char *name, const struct bench_tensor *kind)
{
    const char *open = strchr(name, '{'), *close = open ? strchr(open, '}') : NULL;
    if (!open)
        return add_tensor(out, name, kind);
    int rc = close ? 0 : ERR_FORMAT;
    for (const char *s = open; !rc && s < close;) {
        s++; /* '{' or ',' */
        const int64_t first = read_number(&s);
        int64_t last = first;
        if (s[0] == '.' && s[1] == '.') {
            s += 2;
            last = read_number(&s);
        }
        if (first < 0 || last < first || (*s != ',' && s != close))
            rc = ERR_FORMAT;
        for (int64_t i = first; !rc && i <= last; i++) {
            char *one = mem_printf("%.*s%lld%s", (int)(open - name), name, (long long)i, close + 1);
            rc = one ? add_names(out, one, kind) : ERR_MEMORY;
            free(one);
        }
    }
    return rc == ERR_FORMAT ? err_set(ERR_FORMAT, "shape: braces of '%s' are not numbers", name) : rc;
}

int bench_tensors_add_line(struct bench_tensors *out, const char *line, size_t len)
{
    struct bench_tensor kind = {0};
    char *copy = mem_strndup(line, len), *space = copy ? strchr(copy, ' ') : NULL;
    int rc = copy ? 0 : ERR_MEMORY;
    if (!rc && (!space || space == copy || read_kind(space + 1, &kind) < 0))
        rc = bad_line(line, len, "expected 'NAME DTYPE ROWSxCOLS'");
    if (!rc) {
        *space = '\0';
        rc = add_names(out, copy, &kind);
    }
    free(copy);
    return rc;
}

/* --- a shape -------------------------------------------------------------------------------------------------------- */

/* layers.2 before layers.10, and all of layer 2 together. */
static int by_name(const void *a, const void *b)
{
    return strverscmp(((const struct bench_tensor *)a)->name, ((const struct bench_tensor *)b)->name);
}

int bench_shape_expand(const struct bench_shape *shape, struct bench_tensors *out)
{
    *out = (struct bench_tensors){0};
    int rc = 0;
    for (const char *s = shape->tensors; !rc && s < shape->tensors_end;) {
        const char *end = memchr(s, '\n', (size_t)(shape->tensors_end - s));
        end = end ? end : shape->tensors_end;
        rc = bench_tensors_add_line(out, s, (size_t)(end - s));
        s = end + 1;
    }
    if (rc < 0)
        bench_tensors_free(out);
    else
        qsort(out->list, out->n, sizeof *out->list, by_name);
    return rc;
}

void bench_tensors_free(struct bench_tensors *t)
{
    for (size_t i = 0; i < t->n; i++)
        free(t->list[i].name);
    free(t->list);
    *t = (struct bench_tensors){0};
}

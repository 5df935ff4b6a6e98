/* The CPU backend: opening it, its memory, and the table of its operations. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>

int cpu_open(struct backend *b, int n_threads)
{
    struct cpu_state *s = mem_alloc(1, sizeof *s, "the CPU backend");
    if (!s)
        return ERR_MEMORY;
    b->state = s;
    int rc = parallel_open(&s->pool, n_threads);
    if (!rc &&
        !(s->scratch = mem_alloc((size_t)parallel_workers(s->pool), sizeof *s->scratch, "scratch memory")))
        rc = ERR_MEMORY;
    for (int i = 0; !rc && i < parallel_workers(s->pool); i++)
        if (!(s->scratch[i] = mem_alloc_aligned(CPU_SCRATCH_BYTES, "scratch memory")))
            rc = ERR_MEMORY;
    if (rc < 0)
        cpu_close(b);
    return rc;
}

void cpu_close(struct backend *b)
{
    struct cpu_state *s = b->state;
    for (int i = 0; s->scratch && i < parallel_workers(s->pool); i++)
        free(s->scratch[i]);
    free(s->scratch);
    parallel_close(s->pool);
    free(s);
    b->state = NULL;
}

static int acquire(const struct backend *b, size_t bytes, const char *what, struct buf *out)
{
    (void)b;
    *out = (struct buf){mem_alloc_huge(bytes, what), bytes};
    return out->ptr ? 0 : ERR_MEMORY;
}

static void release(const struct backend *b, struct buf *buf)
{
    (void)b;
    free(buf->ptr);
    *buf = (struct buf){0};
}

static int copy(const struct backend *b, void *to, const void *from, size_t bytes)
{
    (void)b;
    memcpy(to, from, bytes);
    return 0;
}

const struct core_ops cpu_core_ops = {
    .acquire = acquire,
    .release = release,
    .upload = copy,
    .download = copy,
    .find_nonfinite = cpu_find_nonfinite,
    .zero_nonfinite = cpu_zero_nonfinite,
    .squared_error = cpu_squared_error,
    .embed = cpu_embed,
    .rms_norm = cpu_rms_norm,
    .gemm = cpu_gemm,
    .q_gemm = cpu_q_gemm,
    .rope_table = cpu_rope_table,
    .rope = cpu_rope,
    .attention = cpu_attention,
    .geglu = cpu_geglu,
    .softcap = cpu_softcap,
    .compare_rows = cpu_compare_rows,
};

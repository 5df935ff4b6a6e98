/* The CPU backend: opening it, its memory, and the table of its operations. */
#include "kernels/cpu/cpu.h"

#include "base/err.h"
#include "base/mem.h"
#include "kernels/budget.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int cpu_open(struct backend *b, int n_threads)
{
    struct cpu_state *s = mem_alloc(1, sizeof *s, "the CPU backend");
    if (!s)
        return ERR_MEMORY;
    *b = (struct backend){.name = "cpu",
                          .core = &cpu_core_ops,
                          .quant = &cpu_quant_ops,
                          .train = &cpu_train_ops,
                          .activation = DTYPE_F32,
                          .host_memory = true,
                          .batch_tokens = 1,
                          .block_bytes = 128
                                         << 10, /* source, codes and result stay in the second-level cache */
                          .logit_bytes = 64 << 20,
                          .state = s};
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

/* "model name" of the first processor, as the kernel tells it. */
int cpu_title(char title[DEVICE_TEXT_BYTES])
{
    char line[DEVICE_TEXT_BYTES + 64];
    snprintf(title, DEVICE_TEXT_BYTES, "CPU");
    FILE *f = fopen("/proc/cpuinfo", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "model name : %255[^\n]", title) == 1)
            break;
    if (f)
        fclose(f);
    return 0;
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
    *out = (struct buf){0};
    int rc = budget_take("cpu", bytes, what);
    if (rc < 0)
        return rc;
    *out = (struct buf){mem_alloc_huge(bytes, what), bytes};
    if (out->ptr)
        return 0;
    budget_give(bytes);
    *out = (struct buf){0};
    return ERR_MEMORY;
}

static void release(const struct backend *b, struct buf *buf)
{
    (void)b;
    free(buf->ptr);
    if (buf->ptr)
        budget_give(buf->bytes);
    *buf = (struct buf){0};
}

static int acquire_staging(const struct backend *b, size_t bytes, const char *what, struct staged_buf *out)
{
    struct buf buf;
    const int rc = acquire(b, bytes, what, &buf);
    *out = (struct staged_buf){buf.ptr, buf.ptr, buf.bytes};
    return rc;
}

static void release_staging(const struct backend *b, struct staged_buf *s)
{
    release(b, &(struct buf){s->host, s->bytes});
    *s = (struct staged_buf){0};
}

static int memory(const struct backend *b, struct device_memory *out)
{
    (void)b;
    *out = (struct device_memory){.free = mem_available(), .total = mem_total()};
    return 0;
}

static int copy(const struct backend *b, void *to, const void *from, size_t bytes)
{
    (void)b;
    memcpy(to, from, bytes);
    return 0;
}

static int stage(const struct backend *b, const struct staged_buf *s, size_t offset, size_t bytes)
{
    (void)b;
    CHECK(s->host == s->device && offset <= s->bytes && bytes <= s->bytes - offset);
    return 0;
}

static int wait(const struct backend *b)
{
    (void)b;
    return 0;
}

const struct core_ops cpu_core_ops = {
    .acquire = acquire,
    .release = release,
    .acquire_staging = acquire_staging,
    .release_staging = release_staging,
    .acquire_host = acquire,
    .release_host = release,
    .memory = memory,
    .upload = copy,
    .download = copy,
    .stage_in = stage,
    .stage_out = stage,
    .copy = copy,
    .wait = wait,
    .find_nonfinite = cpu_find_nonfinite,
    .zero_nonfinite = cpu_zero_nonfinite,
    .squared_error = cpu_squared_error,
    .group_squared_error = cpu_group_squared_error,
    .dot = cpu_dot,
    .zero = cpu_zero,
    .embed = cpu_embed,
    .rms_norm = cpu_rms_norm,
    .add_norm = cpu_add_norm,
    .gemm = cpu_gemm,
    .q_gemm = cpu_q_gemm,
    .matmul = cpu_matmul,
    .rope_table = cpu_rope_table,
    .split_qkv = cpu_split_qkv,
    .attention = cpu_attention,
    .geglu = cpu_geglu,
    .over_norm = cpu_over_norm,
    .route = cpu_route,
    .gather_rows = cpu_gather_rows,
    .combine_rows = cpu_combine_rows,
    .softcap = cpu_softcap,
    .scale = cpu_scale,
    .compare_rows = cpu_compare_rows,
    .sample_rows = cpu_sample_rows,
};

const struct train_ops cpu_train_ops = {
    .gemm_dgrad = cpu_gemm_dgrad,
    .gemm_wgrad = cpu_gemm_wgrad,
    .rms_norm_backward = cpu_rms_norm_backward,
    .geglu_backward = cpu_geglu_backward,
    .split_qkv_backward = cpu_split_qkv_backward,
    .attention_backward = cpu_attention_backward,
    .route_backward = cpu_route_backward,
    .error_backward = cpu_error_backward,
    .keep_best = cpu_keep_best,
    .tune_begin = cpu_tune_begin,
    .tune_step = cpu_tune_step,
};

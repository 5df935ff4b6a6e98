/* The CUDA backend: opening it, its memory, and the table of its operations. */
#include "kernels/cuda/common.cuh"

extern "C" {
#include "base/mem.h"
#include "kernels/budget.h"
#include "kernels/cuda/cuda.h"
}

#include <stdio.h>
#include <stdlib.h>

enum { LEAST_MAJOR = 8 }; /* compute capability: BF16 on tensor cores */

extern "C" int cuda_status(cudaError_t e, const char *op)
{
    if (e == cudaSuccess)
        return 0;
    cudaGetLastError(); /* a plain launch error is not sticky: the next operation starts clean */
    return err_set(e == cudaErrorMemoryAllocation ? ERR_MEMORY : ERR_UNSUPPORTED, "%s: CUDA: %s", op,
                   cudaGetErrorString(e));
}

extern "C" int cuda_count(void)
{
    int n = 0, usable = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess)
        return 0;
    for (int major; usable < n; usable++)
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, usable) != cudaSuccess ||
            major < LEAST_MAJOR)
            break;
    return usable;
}

extern "C" int cuda_title(int ordinal, char title[DEVICE_TEXT_BYTES])
{
    cudaDeviceProp p;
    int n = 0;
    title[0] = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess)
        return err_set(ERR_UNSUPPORTED, "device 'cuda:%d' is not available: %s", ordinal,
                       cudaGetErrorString(e));
    if (ordinal >= n)
        return err_set(ERR_UNSUPPORTED,
                       "device 'cuda:%d' is not available; this machine has %d CUDA device%s", ordinal, n,
                       n == 1 ? "" : "s");
    const int rc = cuda_status(cudaGetDeviceProperties(&p, ordinal), "device");
    if (rc < 0)
        return rc;
    if (p.major < LEAST_MAJOR)
        return err_set(ERR_UNSUPPORTED,
                       "device 'cuda:%d' (%s) has compute capability %d.%d, expected at least %d.0", ordinal,
                       p.name, p.major, p.minor, LEAST_MAJOR);
    snprintf(title, DEVICE_TEXT_BYTES, "%s", p.name);
    return 0;
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

static int memory(const struct backend *b, struct device_memory *out)
{
    size_t free_bytes, total;
    cuda_state(b);
    const int rc = cuda_status(cudaMemGetInfo(&free_bytes, &total), "memory");
    if (!rc)
        *out = (struct device_memory){free_bytes, total};
    return rc;
}

static int acquire(const struct backend *b, size_t bytes, const char *what, struct buf *out)
{
    const struct cuda_state *s = cuda_state(b);
    char device[32];
    snprintf(device, sizeof device, "cuda:%d", s->ordinal);
    *out = (struct buf){NULL, 0};
    const int rc = budget_take(device, bytes, what);
    if (rc < 0)
        return rc;
    void *p = NULL;
    const cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaSuccess) {
        *out = (struct buf){p, bytes};
        return 0;
    }
    cudaGetLastError();
    budget_give(bytes);
    struct device_memory m = {0, 0};
    if (e != cudaErrorMemoryAllocation || memory(b, &m) < 0)
        return cuda_status(e, what);
    return err_set(ERR_MEMORY, "%s: out of memory: %.2f GiB asked for %s, %.2f GiB of %.2f GiB are free",
                   device, (double)bytes / 0x1p30, what, (double)m.free / 0x1p30, (double)m.total / 0x1p30);
}

static void release(const struct backend *b, struct buf *buf)
{
    cuda_state(b);
    if (buf->ptr) {
        cudaFree(buf->ptr);
        budget_give(buf->bytes);
    }
    *buf = (struct buf){NULL, 0};
}

static int acquire_host(const struct backend *b, size_t bytes, const char *what, struct buf *out)
{
    cuda_state(b);
    void *p = NULL;
    const cudaError_t e = cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocPortable);
    *out = (struct buf){p, bytes};
    if (e == cudaSuccess)
        return 0;
    cudaGetLastError();
    *out = (struct buf){NULL, 0};
    return err_set(ERR_MEMORY, "out of memory: %.1f MiB of pinned host memory asked for %s: %s",
                   (double)bytes / 0x1p20, what, cudaGetErrorString(e));
}

static void release_host(const struct backend *b, struct buf *buf)
{
    cuda_state(b);
    if (buf->ptr)
        cudaFreeHost(buf->ptr);
    *buf = (struct buf){NULL, 0};
}

static int acquire_staging(const struct backend *b, size_t bytes, const char *what, struct staged_buf *out)
{
    struct buf device;
    *out = (struct staged_buf){NULL, NULL, 0};
    int rc = acquire(b, bytes, what, &device);
    if (rc < 0)
        return rc;
    struct buf host;
    rc = acquire_host(b, bytes, what, &host);
    if (rc < 0) {
        release(b, &device);
        return rc;
    }
    *out = (struct staged_buf){host.ptr, device.ptr, bytes};
    return 0;
}

static void release_staging(const struct backend *b, struct staged_buf *s)
{
    struct buf device = {s->device, s->bytes}, host = {s->host, s->bytes};
    release(b, &device);
    release_host(b, &host);
    *s = (struct staged_buf){NULL, NULL, 0};
}

extern "C" int cuda_scratch(const struct backend *b, void **out)
{
    struct cuda_state *s = cuda_state(b);
    int rc = 0;
    if (!s->scratch) {
        struct buf buf;
        rc = acquire(b, CUDA_SCRATCH_BYTES, "scratch memory", &buf);
        s->scratch = buf.ptr;
    }
    *out = s->scratch;
    return rc;
}

/* --- copies ------------------------------------------------------------------------------------------------------- */

static int wait(const struct backend *b)
{
    return cuda_status(cudaStreamSynchronize(cuda_state(b)->stream), "wait");
}

static int upload(const struct backend *b, void *to, const void *from, size_t bytes)
{
    const int rc = cuda_status(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cuda_state(b)->stream), "upload");
    return rc ? rc : wait(b); /* pinned memory is read after the call returns */
}

static int download(const struct backend *b, void *to, const void *from, size_t bytes)
{
    const int rc = cuda_status(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda_state(b)->stream), "download");
    return rc ? rc : wait(b);
}

static int stage_in(const struct backend *b, const struct staged_buf *s, size_t offset, size_t bytes)
{
    CHECK(offset <= s->bytes && bytes <= s->bytes - offset);
    return cuda_status(cudaMemcpyAsync((char *)s->device + offset, (const char *)s->host + offset, bytes,
                                       cudaMemcpyHostToDevice, cuda_state(b)->stream),
                       "stage_in");
}

static int stage_out(const struct backend *b, const struct staged_buf *s, size_t offset, size_t bytes)
{
    CHECK(offset <= s->bytes && bytes <= s->bytes - offset);
    return download(b, (char *)s->host + offset, (const char *)s->device + offset, bytes);
}

static int copy(const struct backend *b, void *to, const void *from, size_t bytes)
{
    return cuda_status(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_state(b)->stream),
                       "copy on the device");
}

/* --- the handle --------------------------------------------------------------------------------------------------- */

static struct core_ops make_core_ops(void)
{
    struct core_ops o = {};
    o.acquire = acquire;
    o.release = release;
    o.acquire_staging = acquire_staging;
    o.release_staging = release_staging;
    o.acquire_host = acquire_host;
    o.release_host = release_host;
    o.memory = memory;
    o.upload = upload;
    o.download = download;
    o.stage_in = stage_in;
    o.stage_out = stage_out;
    o.copy = copy;
    o.wait = wait;
    o.find_nonfinite = cuda_find_nonfinite;
    o.zero_nonfinite = cuda_zero_nonfinite;
    o.squared_error = cuda_squared_error;
    o.group_squared_error = cuda_group_squared_error;
    o.embed = cuda_embed;
    o.rms_norm = cuda_rms_norm;
    o.add_norm = cuda_add_norm;
    o.gemm = cuda_gemm;
    o.q_gemm = cuda_q_gemm;
    o.matmul = cuda_matmul;
    o.dot = cuda_dot;
    o.zero = cuda_zero;
    o.rope_table = cuda_rope_table;
    o.split_qkv = cuda_split_qkv;
    o.attention = cuda_attention;
    o.geglu = cuda_geglu;
    o.over_norm = cuda_over_norm;
    o.route = cuda_route;
    o.gather_rows = cuda_gather_rows;
    o.combine_rows = cuda_combine_rows;
    o.softcap = cuda_softcap;
    o.scale = cuda_scale;
    o.compare_rows = cuda_compare_rows;
    o.sample_rows = cuda_sample_rows;
    return o;
}

static const struct core_ops cuda_core_ops = make_core_ops();

static struct quant_ops make_quant_ops(void)
{
    struct quant_ops o = {};
    o.find_scales = cuda_find_scales;
    o.quantize = cuda_quantize;
    o.dequantize = cuda_dequantize;
    o.hessian_add = cuda_hessian_add;
    o.hessian_finish = cuda_hessian_finish;
    o.diagonal = cuda_diagonal;
    o.add_diagonal = cuda_add_diagonal;
    o.factorize = cuda_factorize;
    o.search_scales = cuda_search_scales;
    o.round_codes = cuda_round_codes;
    o.sweep_block = cuda_sweep_block;
    o.descend_block = cuda_descend_block;
    o.group_dots = cuda_group_dots;
    o.solve_scales = cuda_solve_scales;
    o.residual = cuda_residual;
    o.count_clipped = cuda_count_clipped;
    o.pack_codes = cuda_pack_codes;
    return o;
}

static const struct quant_ops cuda_quant_ops = make_quant_ops();

static struct train_ops make_train_ops(void)
{
    struct train_ops o = {};
    o.gemm_dgrad = cuda_gemm_dgrad;
    o.gemm_wgrad = cuda_gemm_wgrad;
    o.rms_norm_backward = cuda_rms_norm_backward;
    o.geglu_backward = cuda_geglu_backward;
    o.split_qkv_backward = cuda_split_qkv_backward;
    o.attention_backward = cuda_attention_backward;
    o.route_backward = cuda_route_backward;
    o.error_backward = cuda_error_backward;
    o.keep_best = cuda_keep_best;
    o.tune_begin = cuda_tune_begin;
    o.tune_step = cuda_tune_step;
    return o;
}

static const struct train_ops cuda_train_ops = make_train_ops();

extern "C" int cuda_open(struct backend *b, int ordinal)
{
    char title[DEVICE_TEXT_BYTES];
    *b = (struct backend){};
    int rc = cuda_title(ordinal, title);
    if (rc < 0)
        return rc;
    struct cuda_state *s = (struct cuda_state *)mem_alloc(1, sizeof *s, "the CUDA backend");
    if (!s)
        return ERR_MEMORY;
    s->ordinal = ordinal;
    b->name = "cuda";
    b->core = &cuda_core_ops;
    b->quant = &cuda_quant_ops;
    b->train = &cuda_train_ops;
    b->activation = DTYPE_BF16;
    b->ordinal = ordinal;
    b->batch_tokens = 16384; /* products of the 4B shapes reach their full rate from about 8192 on */
    b->block_bytes = SIZE_MAX;
    b->scratch_bytes = CUDA_SCRATCH_BYTES;
    b->logit_bytes = (size_t)1 << 30;
    b->state = s;
    rc = cuda_status(cudaSetDevice(ordinal), title);
    if (!rc)
        rc = cuda_status(cudaDeviceGetAttribute(&s->n_processors, cudaDevAttrMultiProcessorCount, ordinal),
                         title);
    if (!rc)
        rc = cuda_status(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking), title);
    if (!rc)
        rc = cuda_status(cudaMalloc((void **)&s->partials, 2 * REDUCE_BLOCKS * sizeof *s->partials), title);
    if (rc < 0)
        cuda_close(b);
    return rc;
}

extern "C" void cuda_close(struct backend *b)
{
    struct cuda_state *s = cuda_state(b);
    if (s->stream)
        cudaStreamSynchronize(s->stream);
    cuda_products_close(s->products);
    cuda_solver_close(b, s->solver);
    struct buf scratch = {s->scratch, CUDA_SCRATCH_BYTES};
    release(b, &scratch);
    cudaFree(s->partials);
    if (s->stream)
        cudaStreamDestroy(s->stream);
    free(s);
    *b = (struct backend){};
}

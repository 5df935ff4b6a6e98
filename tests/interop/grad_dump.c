/* Activations and a target in, a block's gradients out: the program that test_block_grad.py holds against autograd.
 *   grad_dump MODEL LAYER SEQUENCES LENGTH IN.bin OUT.bin
 * IN.bin: FP32 x, then target, [SEQUENCES·LENGTH, hidden] each; the layer's own input, where it has one; the keys and
 * values of another layer, where it reads them. OUT.bin: FP32 block(x), then the gradients of mean((block(x) − target)²) by
 * x and by the weights of q, k, v, o, gate, up and down, those that there are, then of all experts' gates and ups and of
 * their downs, row by row, in the byte order of the machine. The mean is printed. */
#include "base/err.h"
#include "base/mem.h"
#include "kernels/arena.h"
#include "runtime/block_grad.h"

#include <stdio.h>
#include <stdlib.h>

struct dump {
    const struct weights *w;
    int layer;
    int64_t sequences, length;
    struct buf memory;
    struct mat rope, target, sum; /* sum: F64 [1, 1] */
    struct block_tape tape;
    struct block_grads grads;
    FILE *in, *out;
    const char *in_path, *out_path;
};

/* The gradient by a set's weights. */
static struct mat take_gradient(const struct block *k, int set, char *base, uint64_t *at)
{
    const struct linear_set *const dense[N_FUSED] = {&k->qkv, &k->o, &k->gate_up, &k->down};
    if (set >= N_FUSED && !k->n_experts)
        return (struct mat){0};
    const struct linear_set *s = set < N_FUSED             ? dense[set]
                                 : set == SET_EXPERTS_DOWN ? &k->experts->down
                                                           : &k->experts->gate_up;
    int64_t rows = 0;
    for (int i = 0; i < s->n; i++)
        rows += s->parts[i].weight.rows;
    return arena_take(base, at, DTYPE_F32, set < N_FUSED ? rows : rows * k->n_experts, s->parts->weight.cols);
}

/* Lays everything out from base on (NULL: only counts) and returns the bytes. */
static uint64_t plan(struct dump *d, char *base)
{
    const struct gemma_config *c = &d->w->config;
    const struct block *k = &d->w->blocks[d->layer];
    uint64_t at =
        block_tape_place(&d->tape, c, d->layer, d->w->backend->activation, base, d->sequences, d->length);
    d->rope = arena_take(base, &at, DTYPE_F32, d->length, k->head_dim);
    d->target = arena_take(base, &at, DTYPE_F32, d->sequences * d->length, c->hidden_size);
    d->sum = arena_take(base, &at, DTYPE_F64, 1, 1);
    for (int s = 0; s < N_BLOCK_SETS; s++)
        d->grads.sets[s] = take_gradient(k, s, base, &at);
    return at;
}

static int read_mat(const struct dump *d, const struct mat *m)
{
    const size_t n = (size_t)(m->rows * m->cols);
    float *host = mem_alloc(n, sizeof *host, d->in_path);
    int rc = host ? 0 : ERR_MEMORY;
    if (!rc && fread(host, sizeof *host, n, d->in) != n)
        rc = err_set(ERR_FORMAT, "%s: shorter than what the block reads, %zu values are missing", d->in_path,
                     n);
    if (!rc)
        rc = d->w->backend->core->upload(d->w->backend, m->data, host, n * sizeof *host);
    free(host);
    return rc;
}

static int write_mat(const struct dump *d, const struct mat *m)
{
    const size_t n = (size_t)(m->rows * m->cols);
    float *host = mem_alloc(n, sizeof *host, d->out_path);
    int rc =
        host ? d->w->backend->core->download(d->w->backend, host, m->data, n * sizeof *host) : ERR_MEMORY;
    if (!rc && fwrite(host, sizeof *host, n, d->out) != n)
        rc = err_errno("%s: cannot write", d->out_path);
    free(host);
    return rc;
}

static int differentiate(struct dump *d)
{
    const struct backend *b = d->w->backend;
    struct block_tape *t = &d->tape;
    const double n = (double)(t->out.rows * t->out.cols);
    double sum;
    int rc = b->core->zero(b, &d->sum);
    if (!rc)
        rc = block_grad_forward(d->w, d->layer, t);
    if (!rc)
        rc = write_mat(d, &t->out);
    if (!rc)
        rc = b->train->error_backward(b, &t->out, &d->target, (float)(2 / n), d->sum.data, &t->dx);
    if (!rc)
        rc = block_grad_backward(d->w, d->layer, t, false, true, &d->grads);
    if (!rc)
        rc = write_mat(d, &t->dx);
    for (int s = 0; !rc && s < N_BLOCK_SETS && d->grads.sets[s].data; s++)
        rc = write_mat(d, &d->grads.sets[s]);
    if (!rc)
        rc = b->core->download(b, &sum, d->sum.data, sizeof sum);
    if (!rc)
        printf("%.9g\n", sum / n);
    return rc;
}

static int read_inputs(struct dump *d)
{
    const struct block *k = &d->w->blocks[d->layer];
    const bool reads = k->kv_source != d->layer;
    int rc = read_mat(d, &d->tape.x);
    if (!rc)
        rc = read_mat(d, &d->target);
    if (!rc && k->ple_gate.data)
        rc = read_mat(d, &d->tape.input.input);
    if (!rc && reads)
        rc = read_mat(d, &d->tape.keys);
    return rc || !reads ? rc : read_mat(d, &d->tape.values);
}

static int run(struct dump *d)
{
    const struct backend *b = d->w->backend;
    if (d->layer < 0 || d->layer >= d->w->config.n_layers)
        return err_set(ERR_USAGE, "layer %d, expected one of %lld", d->layer,
                       (long long)d->w->config.n_layers);
    const struct block *k = &d->w->blocks[d->layer];
    int rc = b->core->acquire(b, (size_t)plan(d, NULL), "a block's gradients", &d->memory);
    if (rc < 0)
        return rc;
    plan(d, d->memory.ptr);
    d->tape.rope = &d->rope;
    rc = b->core->rope_table(b, d->w->inv_freq[k->rope], 0, &d->rope);
    if (!rc && !(d->in = fopen(d->in_path, "rb")))
        rc = err_errno("%s: cannot open", d->in_path);
    if (!rc && !(d->out = fopen(d->out_path, "wb")))
        rc = err_errno("%s: cannot create", d->out_path);
    if (!rc)
        rc = read_inputs(d);
    if (!rc)
        rc = block_tape_open(&d->tape, &d->w->config, d->sequences, d->length);
    if (!rc)
        rc = differentiate(d);
    block_tape_close(&d->tape);
    if (d->in)
        fclose(d->in);
    if (d->out && fclose(d->out) && !rc)
        rc = err_errno("%s: cannot write", d->out_path);
    b->core->release(b, &d->memory);
    return rc;
}

static int run_model(const char *name, struct dump *d)
{
    struct model m = {0};
    struct backend b = {0};
    struct weights w = {0};
    int rc = backend_open(&b, "cpu", 0);
    if (rc < 0)
        return rc;
    rc = model_open(&m, name);
    if (!rc)
        rc = model_bind(&m, NULL, NULL);
    if (!rc)
        rc = weights_load(&w, &m, &b);
    d->w = &w;
    if (!rc)
        rc = run(d);
    if (w.backend)
        weights_free(&w);
    model_close(&m);
    backend_close(&b);
    return rc;
}

int main(int argc, char **argv)
{
    if (argc != 7 || atoi(argv[3]) < 1 || atoi(argv[4]) < 1) {
        fprintf(stderr, "usage: grad_dump MODEL LAYER SEQUENCES LENGTH IN.bin OUT.bin\n");
        return 2;
    }
    struct dump d = {.layer = atoi(argv[2]),
                     .sequences = atoi(argv[3]),
                     .length = atoi(argv[4]),
                     .in_path = argv[5],
                     .out_path = argv[6]};
    if (run_model(argv[1], &d) < 0) {
        fprintf(stderr, "grad_dump: %s\n", err_message());
        return 1;
    }
    return 0;
}

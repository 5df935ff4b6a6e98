#include "runtime/unfuse.h"

#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* The two tensors of a layer: what each expert has in them, one below the other. */
static const struct kind {
    const char *name; /* behind "layers.N." */
    int n_parts;
    const char *parts[2];
} kinds[] = {
    {"experts.gate_up_proj", 2, {"gate_proj", "up_proj"}},
    {"experts.down_proj", 1, {"down_proj"}},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

/* Which kind a tensor is, and of which layer; NULL: none. */
static const struct kind *find_kind(const struct gemma_config *c, const char *prefix, const char *name,
                                    int *layer)
{
    const char *own = gemma_name_in_layer(c, prefix, name, layer);
    for (int k = 0; own && k < N_KINDS; k++)
        if (!strcmp(own, kinds[k].name))
            return &kinds[k];
    return NULL;
}

/* Experts that the settings know nothing of would be left out of everything that is computed. */
static int refuse_experts(const struct checkpoint *ck, const struct gemma_config *c, const char *prefix)
{
    static const char experts[] = "experts.";
    int layer;
    for (size_t i = 0; i < ck->n_tensors; i++) {
        const char *own = gemma_name_in_layer(c, prefix, ck->tensors[i].name, &layer);
        if (own && !strncmp(own, experts, sizeof experts - 1))
            return err_set(ERR_UNSUPPORTED,
                           "%s: has tensor '%s', but config.json does not say 'enable_moe_block'", ck->folder,
                           ck->tensors[i].name);
    }
    return 0;
}

static int check_shape(const struct checkpoint *ck, const struct tensor *t, const struct gemma_config *c,
                       const struct kind *kind)
{
    const bool down = kind->n_parts == 1;
    const int64_t shape[3] = {c->n_experts, down ? c->hidden_size : 2 * c->expert_size,
                              down ? c->expert_size : c->hidden_size};
    char is[TENSOR_TEXT_BYTES], wanted[TENSOR_TEXT_BYTES];
    if (t->n_dims == 3 && !memcmp(t->shape, shape, sizeof shape))
        return 0;
    return err_set(ERR_FORMAT, "%s: tensor '%s' is %s, expected %s", checkpoint_path(ck, t), t->name,
                   tensor_text(t->dtype, t->n_dims, t->shape, is), tensor_text(t->dtype, 3, shape, wanted));
}

/* The parts of one tensor, in the order in which they lie. */
static int add_parts(struct tensor *out, size_t *n, const struct tensor *whole, const struct kind *kind)
{
    const int length = (int)(strrchr(whole->name, '.') - whole->name); /* "….experts" */
    const int64_t rows = whole->shape[1] / kind->n_parts;
    uint64_t at = whole->offset;
    for (int64_t e = 0; e < whole->shape[0]; e++)
        for (int k = 0; k < kind->n_parts; k++) {
            struct tensor *part = &out[*n];
            *part = (struct tensor){.dtype = whole->dtype,
                                    .n_dims = 2,
                                    .shape = {rows, whole->shape[2]},
                                    .offset = at,
                                    .bytes = (uint64_t)(rows * whole->shape[2]) * dtype_bytes(whole->dtype),
                                    .file = whole->file};
            part->name = mem_printf("%.*s.%lld.%s.weight", length, whole->name, (long long)e, kind->parts[k]);
            if (!part->name)
                return ERR_MEMORY;
            at += part->bytes;
            ++*n;
        }
    return 0;
}

static int index_names(struct checkpoint *ck)
{
    name_table_free(&ck->by_name);
    int rc = name_table_init(&ck->by_name, ck->n_tensors);
    for (size_t i = 0; !rc && i < ck->n_tensors; i++) {
        rc = name_table_add(&ck->by_name, ck->tensors[i].name, i);
        if (rc == 1)
            rc = err_set(ERR_FORMAT, "%s: tensor '%s' is there twice, once among all experts'",
                         checkpoint_path(ck, &ck->tensors[i]), ck->tensors[i].name);
    }
    return rc;
}

static int count(struct fused_tensors *out, const struct checkpoint *ck, const struct gemma_config *c,
                 const char *prefix, size_t *n_parts)
{
    int layer;
    *n_parts = 0;
    for (size_t i = 0; i < ck->n_tensors; i++) {
        const struct kind *kind = find_kind(c, prefix, ck->tensors[i].name, &layer);
        const int rc = kind ? check_shape(ck, &ck->tensors[i], c, kind) : 0;
        if (rc < 0)
            return rc;
        out->n += kind != NULL;
        *n_parts += kind ? (size_t)(kind->n_parts * c->n_experts) : 0;
    }
    return 0;
}

int unfuse_experts(struct fused_tensors *out, struct checkpoint *ck, const struct gemma_config *c,
                   const char *prefix)
{
    *out = (struct fused_tensors){0};
    size_t n_parts = 0, n = 0, n_fused = 0;
    int rc = c->n_experts ? count(out, ck, c, prefix, &n_parts) : refuse_experts(ck, c, prefix);
    if (rc < 0 || !out->n)
        return rc;
    struct tensor *list = mem_alloc(ck->n_tensors - out->n + n_parts, sizeof *list, "the tensor list");
    out->list = mem_alloc(out->n, sizeof *out->list, "the experts' tensors");
    if (!list || !out->list) {
        free(list);
        return ERR_MEMORY;
    }
    for (size_t i = 0; i < ck->n_tensors; i++) { /* each name gets one owner, whatever fails */
        int layer;
        const struct kind *kind = find_kind(c, prefix, ck->tensors[i].name, &layer);
        if (!kind) {
            list[n++] = ck->tensors[i];
            continue;
        }
        struct fused_tensor *f = &out->list[n_fused++];
        *f = (struct fused_tensor){ck->tensors[i], layer};
        if (!rc)
            rc = add_parts(list, &n, &f->whole, kind);
    }
    free(ck->tensors);
    ck->tensors = list;
    ck->n_tensors = n;
    return rc ? rc : index_names(ck);
}

void fused_tensors_free(struct fused_tensors *f)
{
    for (size_t i = 0; f->list && i < f->n; i++)
        free(f->list[i].whole.name);
    free(f->list);
    *f = (struct fused_tensors){0};
}

/* The whole that a tensor is a part of; NULL: it is one itself. */
static const struct fused_tensor *find_whole(const struct fused_tensors *f, const struct tensor *part)
{
    for (size_t i = 0; i < f->n; i++) {
        const struct tensor *whole = &f->list[i].whole;
        if (part->file == whole->file && part->offset >= whole->offset &&
            part->offset + part->bytes <= whole->offset + whole->bytes && part->bytes)
            return &f->list[i];
    }
    return NULL;
}

size_t fused_restore(const struct fused_tensors *f, struct tensor *list, size_t n, const bool *apart)
{
    size_t kept = 0;
    const struct fused_tensor *last = NULL;
    for (size_t i = 0; i < n; i++) {
        const struct fused_tensor *whole = find_whole(f, &list[i]);
        if (!whole || (apart && apart[whole->layer]))
            list[kept++] = list[i];
        else if (whole != last)
            list[kept++] = whole->whole;
        last = whole;
    }
    return kept;
}

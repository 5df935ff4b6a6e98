#include "calib/dataset.h"

#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"

#include <stdlib.h>
#include <string.h>

/* A dataset in the making. */
struct packing {
    const struct tokenizer *tokenizer;
    const struct documents *documents;
    int64_t n_tokens_max;
    const char *name;
    struct token_list tokens;
    struct dataset *out;
    size_t capacity; /* of out->used */
};

static int check_ids(const struct packing *p, const struct document *d, size_t from)
{
    for (size_t i = from; i < p->tokens.n; i++)
        if (p->tokens.ids[i] >= p->n_tokens_max)
            return err_set(
                ERR_FORMAT,
                "%s: line %zu: has the token %d, the model's vocabulary ends at %lld: the tokenizer is not "
                "this model's",
                p->name, d->line, p->tokens.ids[i], (long long)p->n_tokens_max);
    return 0;
}

static int add_document(struct packing *p, size_t index)
{
    const struct document *d = &p->documents->list[index];
    if (!d->len)
        return 0;
    const char *turn = chat_turn_begin(p->documents->chat);
    if (d->is_chat && tokenizer_token_id(p->tokenizer, turn) < 0)
        return err_set(
            ERR_UNSUPPORTED,
            "%s: line %zu: is a conversation, but the model's tokenizer has no %s: it has no chat format",
            p->name, d->line, turn);
    const size_t from = p->tokens.n;
    int rc = tokenizer_encode(p->tokenizer, d->text, d->len, true, &p->tokens);
    if (!rc)
        rc = check_ids(p, d, from);
    if (!rc)
        rc = mem_grow(&p->out->used, &p->capacity, p->out->n_used + 1, sizeof *p->out->used, "documents");
    if (!rc)
        p->out->used[p->out->n_used++] = (struct dataset_use){index, p->tokens.n - from};
    return rc;
}

/* Documents in order until there are `need` tokens. The order is made as it is used (Fisher and Yates). */
static int collect(struct packing *p, const struct dataset_options *o, size_t need)
{
    const size_t n = p->documents->n;
    size_t *order = mem_alloc(n, sizeof *order, "the order of documents");
    if (!order)
        return ERR_MEMORY;
    CHECK(n <= UINT32_MAX);
    for (size_t i = 0; i < n; i++)
        order[i] = i;
    struct rng rng;
    rng_seed(&rng, o->seed);
    int rc = 0;
    for (size_t i = 0; !rc && i < n && p->tokens.n < need; i++) {
        /* uniform in [i, n) but for 2^-32: a multiplication in place of a remainder */
        const size_t k = o->shuffle ? i + (size_t)((uint64_t)rng_u32(&rng) * (n - i) >> 32) : i;
        const size_t next = order[k];
        order[k] = order[i];
        rc = err_interrupt_requested() ? err_interrupted() : add_document(p, next);
    }
    free(order);
    return rc;
}

/* Too little text is told from what there is, before memory is taken for what there is not. */
static int cut(struct packing *p, size_t need)
{
    struct dataset *d = p->out;
    if (p->tokens.n < need)
        return err_set(ERR_USAGE, "%s: has %zu tokens in %zu document%s, but %lld samples of %lld need %zu",
                       p->name, p->tokens.n, d->n_used, d->n_used == 1 ? "" : "s", (long long)d->samples,
                       (long long)d->length, need);
    d->ids = mem_alloc_aligned(need * sizeof *d->ids, "calibration samples");
    if (!d->ids)
        return ERR_MEMORY;
    memcpy(d->ids, p->tokens.ids, need * sizeof *d->ids);
    return 0;
}

int dataset_make(struct dataset *out, const struct tokenizer *t, const struct documents *documents,
                 const struct dataset_options *o, int64_t n_tokens_max, const char *name)
{
    *out = (struct dataset){.samples = o->samples, .length = o->length};
    CHECK(o->samples >= 1 && o->length >= 1);
    uint64_t need;
    if (!mem_mul_u64((uint64_t)o->samples, (uint64_t)o->length, &need) || need > SIZE_MAX / sizeof *out->ids)
        return err_set(ERR_USAGE, "%lld samples of %lld tokens are more than memory can hold",
                       (long long)o->samples, (long long)o->length);
    struct packing p = {
        .tokenizer = t, .documents = documents, .n_tokens_max = n_tokens_max, .name = name, .out = out};
    int rc = collect(&p, o, (size_t)need);
    if (!rc)
        rc = cut(&p, (size_t)need);
    token_list_free(&p.tokens);
    if (rc < 0)
        dataset_free(out);
    return rc;
}

void dataset_free(struct dataset *d)
{
    free(d->ids);
    free(d->used);
    *d = (struct dataset){0};
}

#include "report/verify.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"
#include "formats/record.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const finding_kind_names[] = {[FINDING_STRUCTURE] = "structure",
                                          [FINDING_BYTES] = "bytes",
                                          [FINDING_WEIGHTS] = "weights",
                                          [FINDING_BEHAVIOUR] = "behaviour"};

/* Round-to-nearest in 4 bits leaves about 0.12 of a Gemma's weights, 8 bits 0.007: beyond this, the codes do not
 * describe this source. */
static const double implausible_error = 0.5;

int verify_add(struct verify_report *r, enum finding_kind kind, const char *object, const char *fmt, ...)
{
    int rc =
        mem_grow(&r->findings, &r->findings_capacity, r->n_findings + 1, sizeof *r->findings, "findings");
    if (rc < 0)
        return rc;
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    r->findings[r->n_findings] = (struct finding){kind, mem_strdup(object), mem_strdup(text)};
    const struct finding *f = &r->findings[r->n_findings++];
    return f->object && f->message ? 0 : ERR_MEMORY;
}

static int on_problem(void *ctx, const char *object, const char *message)
{
    return verify_add(ctx, FINDING_STRUCTURE, object, "%s", message);
}

/* --- structure ------------------------------------------------------------------------------------------------ */

/* The weight_shape tensors say what the shapes of the weights are. */
static int check_shapes(struct verify_report *r)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < r->cut.n_linears; i++) {
        const struct model_linear *l = &r->cut.linears[i];
        int64_t shape[2];
        if (!l->shape)
            continue;
        rc = checkpoint_read(&r->cut.checkpoint, l->shape, 0, sizeof shape, shape);
        if (!rc && (shape[0] != l->spec->shape[0] || shape[1] != l->spec->shape[1]))
            rc = verify_add(r, FINDING_STRUCTURE, l->shape->name, "is %lld × %lld, expected %lld × %lld",
                            (long long)shape[0], (long long)shape[1], (long long)l->spec->shape[0],
                            (long long)l->spec->shape[1]);
    }
    return rc;
}

/* Layers may differ where the settings above agree: then the first linear that the other has not is named. */
static int check_same_linears(struct verify_report *r, bool *same)
{
    const struct model *a = &r->cut, *b = &r->source;
    for (size_t i = 0; i < a->n_linears || i < b->n_linears; i++) {
        const struct gemma_tensor *x = i < a->n_linears ? a->linears[i].spec : NULL,
                                  *y = i < b->n_linears ? b->linears[i].spec : NULL;
        if (x && y && x->layer == y->layer && x->expert == y->expert && x->role == y->role &&
            !memcmp(x->shape, y->shape, sizeof x->shape))
            continue;
        *same = false;
        return x ? verify_add(r, FINDING_STRUCTURE, x->name, "is no linear of that shape in the source's layers")
                 : verify_add(r, FINDING_STRUCTURE, y->name, "is a linear of the source's layers, but not of these");
    }
    return 0;
}

/* Whether the two models are of one kind at all; differing settings make every further comparison moot. */
static int check_same_model(struct verify_report *r, bool *same)
{
    const struct gemma_config *a = &r->cut.gemma, *b = &r->source.gemma;
    const struct {
        const char *name;
        int64_t cut, source;
    } settings[] = {
        {"num_hidden_layers", a->n_layers, b->n_layers},
        {"hidden_size", a->hidden_size, b->hidden_size},
        {"intermediate_size", a->intermediate_size, b->intermediate_size},
        {"num_attention_heads", a->n_heads, b->n_heads},
        {"num_key_value_heads", a->n_kv_heads, b->n_kv_heads},
        {"head_dim", a->head_dim, b->head_dim},
        {"vocab_size", a->vocab_size, b->vocab_size},
        {"hidden_size_per_layer_input", a->ple_size, b->ple_size},
        {"num_experts", a->n_experts, b->n_experts},
        {"top_k_experts", a->top_k, b->top_k},
        {"moe_intermediate_size", a->expert_size, b->expert_size},
    };
    int rc = 0;
    *same = a->family == b->family;
    if (!*same)
        rc = verify_add(r, FINDING_STRUCTURE, "config.json", "is %s, the source is %s", a->family->title,
                        b->family->title);
    for (size_t i = 0; !rc && i < sizeof settings / sizeof *settings; i++)
        if (settings[i].cut != settings[i].source) {
            *same = false;
            rc = verify_add(r, FINDING_STRUCTURE, settings[i].name, "is %lld, the source has %lld",
                            (long long)settings[i].cut, (long long)settings[i].source);
        }
    return rc || !*same ? rc : check_same_linears(r, same);
}

/* --- bytes ---------------------------------------------------------------------------------------------------- */

/* Whether the cut's files have a tensor of that name. */
static bool is_stored(const struct model *m, const char *name)
{
    bool stored = checkpoint_tensor(&m->checkpoint, name) != NULL;
    for (size_t i = 0; !stored && i < m->fused.n; i++)
        stored = !strcmp(m->fused.list[i].whole.name, name);
    return stored;
}

/* ck: the cut's tensors as they are stored */
static int check_recorded_tensors(struct verify_report *r, const struct record *record,
                                  const struct checkpoint *ck, const struct hash128 *hashes)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < ck->n_tensors; i++) {
        const struct hash128 *recorded = record_find(&record->tensors, ck->tensors[i].name);
        if (!recorded)
            rc = verify_add(r, FINDING_BYTES, ck->tensors[i].name, "is not in %s", RECORD_NAME);
        else if (!hash_equal(*recorded, hashes[i]))
            rc = verify_add(r, FINDING_BYTES, ck->tensors[i].name,
                            "differs from what was written (hash in %s)", RECORD_NAME);
        else
            r->n_recorded_equal++;
    }
    for (size_t i = 0; !rc && i < record->tensors.n; i++)
        if (!is_stored(&r->cut, record->tensors.entries[i].name))
            rc = verify_add(r, FINDING_BYTES, record->tensors.entries[i].name, "was written, but is missing");
    return rc;
}

/* Where experts lie together in 16 bits, their tensors are hashed as they are written. */
static int check_record(struct verify_report *r, struct parallel *pool, const struct record *record,
                        const struct hash128 *hashes)
{
    const struct model *m = &r->cut;
    struct checkpoint stored = m->checkpoint;
    if (!m->fused.n)
        return check_recorded_tensors(r, record, &stored, hashes);
    struct hash128 *own = mem_alloc(stored.n_tensors, sizeof *own, "tensor hashes");
    stored.tensors = mem_alloc(stored.n_tensors, sizeof *stored.tensors, "a list of tensors");
    int rc = own && stored.tensors ? 0 : ERR_MEMORY;
    if (!rc) {
        memcpy(stored.tensors, m->checkpoint.tensors, stored.n_tensors * sizeof *stored.tensors);
        stored.n_tensors = fused_restore(&m->fused, stored.tensors, stored.n_tensors, NULL);
        rc = checkpoint_hash_all(&stored, pool, own, NULL, NULL);
    }
    if (!rc)
        rc = check_recorded_tensors(r, record, &stored, own);
    free(own);
    free(stored.tensors);
    return rc;
}

static int check_recorded_files(struct verify_report *r, const struct record *record)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < record->files.n; i++) {
        const struct record_entry *e = &record->files.entries[i];
        if (strchr(e->name, '/'))
            return err_set(ERR_FORMAT, "%s/%s: file name '%s' names a folder", r->cut.folder, RECORD_NAME,
                           e->name);
        char *path = file_join(r->cut.folder, e->name);
        struct hash128 hash;
        if (!path)
            return ERR_MEMORY;
        if (!file_exists(path))
            rc = verify_add(r, FINDING_BYTES, e->name, "was written, but is missing");
        else if ((rc = record_hash_file(path, &hash)) == 0 && !hash_equal(hash, e->hash))
            rc = verify_add(r, FINDING_BYTES, e->name, "differs from what was written (hash in %s)",
                            RECORD_NAME);
        else if (!rc)
            r->n_files_equal++;
        free(path);
    }
    return rc;
}

/* A linear that this source's weights were not cut from: the record remembers what they were. */
static int check_recorded_sources(struct verify_report *r, const struct record *record,
                                  const struct hash128 *hashes)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < r->source.n_linears; i++) {
        const struct tensor *w = r->source.linears[i].weight;
        char *module = gemma_module(r->source.linears[i].spec);
        if (!module)
            return ERR_MEMORY;
        const struct hash128 *recorded = record_find(&record->sources, module);
        if (recorded && w && !hash_equal(*recorded, hashes[w - r->source.checkpoint.tensors]))
            rc = verify_add(r, FINDING_BYTES, w->name, "of the source is not the weight that was quantized");
        free(module);
    }
    return rc;
}

/* Is this tensor of the source one that the cut has in packed form? */
static bool is_quantized_in_cut(const struct verify_report *r, const struct name_table *quantized,
                                const char *name)
{
    size_t i;
    return name_table_find(quantized, name, &i) && r->cut.linears[i].quantized;
}

static int check_against_source(struct verify_report *r, const struct hash128 *cut_hashes,
                                const struct hash128 *source_hashes)
{
    const struct checkpoint *cut = &r->cut.checkpoint, *source = &r->source.checkpoint;
    struct name_table linears;
    int rc = name_table_init(&linears, r->cut.n_linears);
    for (size_t i = 0; !rc && i < r->cut.n_linears; i++)
        rc = name_table_add(&linears, r->cut.linears[i].spec->name, i);
    for (size_t i = 0; !rc && i < source->n_tensors; i++) {
        const struct tensor *want = &source->tensors[i];
        if (is_quantized_in_cut(r, &linears, want->name) ||
            gemma_is_dead(&r->source.gemma, r->source.prefix, want->name))
            continue;
        const struct tensor *have = checkpoint_tensor(cut, want->name);
        char a[TENSOR_TEXT_BYTES], b[TENSOR_TEXT_BYTES];
        r->n_unquantized++;
        if (!have)
            rc = verify_add(r, FINDING_BYTES, want->name, "is in the source, but missing here");
        else if (strcmp(tensor_text(have->dtype, have->n_dims, have->shape, a),
                        tensor_text(want->dtype, want->n_dims, want->shape, b)))
            rc = verify_add(r, FINDING_BYTES, want->name, "is %s, the source has %s", a, b);
        else if (!hash_equal(cut_hashes[have - cut->tensors], source_hashes[i]))
            rc = verify_add(r, FINDING_BYTES, want->name, "is not quantized, yet differs from the source");
        else
            r->n_source_equal++;
    }
    name_table_free(&linears);
    return rc;
}

/* Another vocabulary gives every text other ids, and perplexities that cannot be compared. */
static int check_tokenizer(struct verify_report *r)
{
    static const char name[] = "tokenizer.json";
    char *ours = file_join(r->cut.folder, name), *theirs = file_join(r->source.folder, name);
    int rc = ours && theirs ? 0 : ERR_MEMORY;
    struct hash128 a, b;
    if (!rc && file_exists(theirs) && !file_exists(ours))
        rc = verify_add(r, FINDING_BYTES, name, "is in the source, but missing here");
    else if (!rc && file_exists(theirs) && !(rc = record_hash_file(ours, &a)) &&
             !(rc = record_hash_file(theirs, &b)) && !hash_equal(a, b))
        rc = verify_add(r, FINDING_BYTES, name, "differs from the source's");
    free(ours);
    free(theirs);
    return rc;
}

static int check_bytes(struct verify_report *r, struct parallel *pool, bool same_model)
{
    struct hash128 *cut = mem_alloc(r->cut.checkpoint.n_tensors, sizeof *cut, "tensor hashes");
    struct hash128 *source = mem_alloc(r->source.checkpoint.n_tensors, sizeof *source, "tensor hashes");
    struct record record = {0};
    int rc = cut && source ? record_open(&record, r->cut.folder, &r->has_record) : ERR_MEMORY;
    if (!rc)
        rc = checkpoint_hash_all(&r->cut.checkpoint, pool, cut, NULL, NULL);
    if (!rc && r->source.folder)
        rc = checkpoint_hash_all(&r->source.checkpoint, pool, source, NULL, NULL);
    if (!rc && r->has_record)
        rc = check_record(r, pool, &record, cut);
    if (!rc && r->has_record)
        rc = check_recorded_files(r, &record);
    if (!rc && r->source.folder)
        rc = check_tokenizer(r);
    if (!rc && same_model)
        rc = check_against_source(r, cut, source);
    if (!rc && same_model && r->has_record)
        rc = check_recorded_sources(r, &record, source);
    record_close(&record);
    free(cut);
    free(source);
    return rc;
}

/* --- weights -------------------------------------------------------------------------------------------------- */

static int check_weights(struct verify_report *r, struct parallel *pool, const char *device, bool same_model)
{
    r->weights = mem_alloc(r->cut.n_linears, sizeof *r->weights, "weight errors");
    if (!r->weights)
        return ERR_MEMORY;
    int rc = weights_compare(&r->cut, same_model ? &r->source : NULL, pool, device, r->weights);
    double sum = 0;
    for (size_t i = 0; !rc && i < r->cut.n_linears; i++) {
        const struct weight_report *w = &r->weights[i];
        if (!w->linear)
            continue;
        const int64_t groups = quant_groups(w->linear->scheme, w->linear->spec->shape[1]);
        r->n_quantized++;
        sum += w->error;
        if (w->bad_scales)
            rc = verify_add(
                r, FINDING_BYTES, w->linear->scales->name,
                "has %lld unusable scales (zero, subnormal, infinite or NaN), the first at row %lld, "
                "group %lld",
                (long long)w->bad_scales, (long long)(w->first_bad / groups),
                (long long)(w->first_bad % groups));
        else if (same_model && !(w->error <= implausible_error))
            rc = verify_add(r, FINDING_WEIGHTS, w->linear->packed->name,
                            "is not a quantization of the source: relative error %.3g, expected at most %.1f",
                            w->error, implausible_error);
    }
    r->mean_error = same_model && r->n_quantized ? sum / (double)r->n_quantized : NAN;
    return rc;
}

double verify_sqnr(double error)
{
    return -20 * log10(error);
}

/* --- all ------------------------------------------------------------------------------------------------------ */

static int open_models(struct verify_report *r, const struct verify_options *o, bool *same_model)
{
    int rc = model_open(&r->cut, o->cut);
    if (!rc)
        rc = model_bind(&r->cut, on_problem, r);
    if (!rc && !r->cut.quantized)
        rc = verify_add(r, FINDING_STRUCTURE, "config.json",
                        "has no quantization_config: this model is not quantized");
    if (!rc)
        rc = check_shapes(r);
    *same_model = false;
    if (rc < 0 || !o->source)
        return rc;
    rc = model_open_unquantized(&r->source, o->source);
    if (!rc)
        rc = model_bind(&r->source, NULL, NULL);
    return rc < 0 ? rc : check_same_model(r, same_model);
}

int verify_run(struct verify_report *r, const struct verify_options *o)
{
    *r = (struct verify_report){.mean_error = NAN};
    bool same_model;
    struct parallel *pool = NULL;
    int rc = parallel_open(&pool, o->n_workers);
    if (!rc)
        rc = open_models(r, o, &same_model);
    r->n_tensors = r->cut.checkpoint.n_tensors;
    if (!rc)
        rc = check_bytes(r, pool, same_model);
    if (!rc)
        rc = check_weights(r, pool, o->device, same_model);
    parallel_close(pool);
    return rc;
}

void verify_free(struct verify_report *r)
{
    for (size_t i = 0; i < r->n_findings; i++) {
        free(r->findings[i].object);
        free(r->findings[i].message);
    }
    free(r->findings);
    free(r->weights);
    model_close(&r->cut);
    model_close(&r->source);
    *r = (struct verify_report){0};
}

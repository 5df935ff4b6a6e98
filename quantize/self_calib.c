#include "quantize/self_calib.h"

#include "base/err.h"
#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/rng.h"
#include "formats/chat_template.h"
#include "kernels/budget.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum {
    METHOD_VERSION = 1
}; /* of the way samples are written: cached ones of another version are not taken */

struct self_options self_options_default(int64_t samples, int64_t length, uint64_t seed)
{
    return (struct self_options){
        .samples = samples, .length = length, .seed = seed, .temperature = 1, .turns = 0.5};
}

/* --- how samples begin -------------------------------------------------------------------------------------------- */

/* <bos> alone, or with the beginning of a user's turn. */
static int beginning(const struct tokenizer *t, bool turn, struct token_list *out)
{
    const char *opening = turn ? chat_user_turn(t) : NULL, *text = opening ? opening : "";
    return tokenizer_encode(t, text, strlen(text), true, out);
}

/* Spreads the share evenly over the samples. */
static bool is_turn(const struct self_options *o, int64_t sample)
{
    return (int64_t)((double)(sample + 1) * o->turns) > (int64_t)((double)sample * o->turns);
}

/* --- writing ------------------------------------------------------------------------------------------------------ */

/* Samples [first, first + n) in the making. */
struct writing {
    const struct weights *w;
    const struct self_options *o;
    struct token_list beginnings[2]; /* by is_turn */
    int32_t bos, eos;
    uint64_t seed; /* of sample 0 */
    int64_t at_a_time, first, n;
    struct forward *forward;
    struct buf logits;
    int32_t *last, *drawn; /* [at_a_time]: one token of each sample */
    struct dataset *out;
    self_progress on_tokens;
    void *ctx;
};

static uint64_t free_bytes(const struct backend *b)
{
    struct device_memory memory = {0};
    if (b->core->memory(b, &memory) < 0)
        return 0;
    const uint64_t limit = budget_limit(), left = limit > budget_taken() ? limit - budget_taken() : 0;
    return limit && left < memory.free ? left : memory.free / 8 * 7;
}

int64_t self_calib_at_a_time(const struct weights *w, const struct self_options *o)
{
    const struct backend *b = w->backend;
    const uint64_t available = free_bytes(b), row = (uint64_t)w->embedding.rows * sizeof(float);
    const int64_t rows = (int64_t)(b->logit_bytes / row), most = rows < 1 ? 1 : rows;
    for (int64_t rounds = (o->samples + most - 1) / most; rounds < o->samples; rounds++) {
        const int64_t n = (o->samples + rounds - 1) / rounds;
        const struct forward_size size = {n, o->length, 1};
        if (forward_bytes(&w->config, b, &size) + (uint64_t)n * row + b->scratch_bytes <= available)
            return n;
    }
    return 1;
}

static int32_t *token_at(const struct writing *s, int64_t sample, int64_t position)
{
    return &s->out->ids[(s->first + sample) * s->out->length + position];
}

/* What stands at a position that the tokens before it, or the beginning, leave no choice for; else what was drawn. */
static int32_t token_for(const struct writing *s, int64_t sample, int64_t position)
{
    const struct token_list *beginning_of = &s->beginnings[is_turn(s->o, s->first + sample)];
    if (position < (int64_t)beginning_of->n)
        return beginning_of->ids[position];
    return *token_at(s, sample, position - 1) == s->eos ? s->bos : s->drawn[sample];
}

/* All samples are one token longer after each round. */
static int write_together(struct writing *s)
{
    const struct backend *b = s->w->backend;
    const int64_t vocab = s->w->embedding.rows;
    const struct mat logits = {s->logits.ptr, DTYPE_F32, s->n, vocab, vocab};
    int rc = 0;
    forward_begin(s->forward, s->n);
    for (int64_t position = 0; !rc && position < s->o->length; position++) {
        struct mat hidden;
        if (position > 0)
            rc = forward_run(s->forward, s->last, 1, &hidden);
        if (!rc && position > 0)
            rc = forward_logits(s->w, &hidden, &logits);
        if (!rc && position > 0)
            rc = b->core->sample_rows(b, &logits, s->o->temperature, s->seed + (uint64_t)s->first, position,
                                      s->drawn);
        for (int64_t i = 0; !rc && i < s->n; i++)
            s->last[i] = *token_at(s, i, position) = token_for(s, i, position);
        if (!rc && s->on_tokens)
            s->on_tokens(s->ctx, s->n);
        if (!rc && err_interrupt_requested())
            rc = err_interrupted();
    }
    return rc;
}

static int check_options(const struct self_options *o, const struct weights *w)
{
    uint64_t n;
    CHECK(o->samples >= 1 && o->length >= 1 && o->at_a_time >= 0);
    CHECK(o->temperature >= 0 && o->turns >= 0 && o->turns <= 1);
    if (o->length > w->config.max_positions)
        return err_set(ERR_USAGE,
                       "samples of %" PRId64 " tokens are longer than the model's context of %" PRId64,
                       o->length, w->config.max_positions);
    if (!mem_mul_u64((uint64_t)o->samples, (uint64_t)o->length, &n) || n > SIZE_MAX / sizeof(int32_t))
        return err_set(ERR_USAGE, "%" PRId64 " samples of %" PRId64 " tokens are more than memory can hold",
                       o->samples, o->length);
    return 0;
}

static int begin(struct writing *s, const struct tokenizer *t)
{
    int rc = 0;
    for (int turn = 0; !rc && turn < 2; turn++) {
        rc = beginning(t, turn, &s->beginnings[turn]);
        for (size_t i = 0; !rc && i < s->beginnings[turn].n; i++)
            if (s->beginnings[turn].ids[i] >= s->w->embedding.rows)
                rc = err_set(ERR_FORMAT,
                             "token %d is beyond the model's vocabulary of %" PRId64
                             ": the tokenizer is not this model's",
                             s->beginnings[turn].ids[i], s->w->embedding.rows);
    }
    return rc;
}

static int acquire(struct writing *s)
{
    const struct backend *b = s->w->backend;
    const struct forward_size size = {s->at_a_time, s->o->length, 1};
    struct dataset *d = s->out;
    d->ids = mem_alloc_aligned((size_t)(d->samples * d->length) * sizeof *d->ids, "calibration samples");
    s->last = mem_alloc((size_t)s->at_a_time, sizeof *s->last, "tokens");
    s->drawn = mem_alloc((size_t)s->at_a_time, sizeof *s->drawn, "tokens");
    if (!d->ids || !s->last || !s->drawn)
        return ERR_MEMORY;
    const int rc = forward_open(&s->forward, s->w, &size);
    return rc ? rc
              : b->core->acquire(b, (size_t)(s->at_a_time * s->w->embedding.rows) * sizeof(float), "logits",
                                 &s->logits);
}

static void release(struct writing *s)
{
    if (s->logits.ptr)
        s->w->backend->core->release(s->w->backend, &s->logits);
    forward_close(s->forward);
    free(s->last);
    free(s->drawn);
    token_list_free(&s->beginnings[0]);
    token_list_free(&s->beginnings[1]);
}

int self_calib_make(struct dataset *out, const struct weights *w, const struct tokenizer *t,
                    const struct self_options *o, self_progress on_tokens, void *ctx)
{
    *out = (struct dataset){.samples = o->samples, .length = o->length};
    struct writing s = {.w = w,
                        .o = o,
                        .bos = tokenizer_bos(t),
                        .eos = tokenizer_eos(t),
                        .out = out,
                        .on_tokens = on_tokens,
                        .ctx = ctx};
    struct rng rng; /* neighbouring seeds would be the same samples, moved by one */
    rng_seed(&rng, o->seed);
    s.seed = (uint64_t)rng_u32(&rng) << 32;
    s.seed |= rng_u32(&rng);
    int rc = check_options(o, w);
    if (!rc)
        rc = begin(&s, t);
    if (!rc) {
        const int64_t wanted = o->at_a_time ? o->at_a_time : self_calib_at_a_time(w, o);
        s.at_a_time = wanted < o->samples ? wanted : o->samples;
        rc = acquire(&s);
    }
    for (; !rc && s.first < o->samples; s.first += s.n) {
        s.n = o->samples - s.first < s.at_a_time ? o->samples - s.first : s.at_a_time;
        rc = write_together(&s);
    }
    release(&s);
    if (rc < 0)
        dataset_free(out);
    return rc;
}

/* --- key ---------------------------------------------------------------------------------------------------------- */

enum { PIECES = 8, PIECE_BYTES = 4096 };

/* Equally spaced pieces, the first and the last bytes among them; all of it where it is short. */
static int put_tensor(struct text *key, const struct checkpoint *ck, const struct tensor *t)
{
    uint8_t bytes[PIECES * PIECE_BYTES];
    char shape[TENSOR_TEXT_BYTES], hex[HASH_HEX_BYTES];
    size_t n = 0;
    int rc = 0;
    if (t->bytes <= sizeof bytes) {
        n = (size_t)t->bytes;
        rc = checkpoint_read(ck, t, 0, n, bytes);
    } else {
        for (uint64_t i = 0; !rc && i < PIECES; i++, n += PIECE_BYTES)
            rc = checkpoint_read(ck, t, (t->bytes - PIECE_BYTES) / (PIECES - 1) * i, PIECE_BYTES, bytes + n);
    }
    if (rc < 0)
        return rc;
    hash_to_hex(hash_bytes(bytes, n), hex);
    text_printf(key, "%s %s %s\n", t->name, tensor_text(t->dtype, t->n_dims, t->shape, shape), hex);
    return 0;
}

static int put_beginnings(struct text *key, const struct tokenizer *t)
{
    struct token_list list = {0};
    const int rc = beginning(t, true, &list);
    text_printf(key, "<bos> %d <eos> %d, turns begin with", tokenizer_bos(t), tokenizer_eos(t));
    for (size_t i = 0; i < list.n; i++)
        text_printf(key, " %d", list.ids[i]);
    text_add(key, "\n");
    token_list_free(&list);
    return rc;
}

static int make_key(struct hash128 *out, const struct model *m, const struct tokenizer *t,
                    const struct self_options *o, const char *backend)
{
    struct text key = {0};
    text_printf(&key,
                "version %d, %s, %" PRId64 " samples of %" PRId64 ", seed %" PRIu64
                ", temperature %a, turns %a\n",
                METHOD_VERSION, backend, o->samples, o->length, o->seed, (double)o->temperature, o->turns);
    int rc = put_beginnings(&key, t);
    text_append(&key, m->config.text, m->config.text_len);
    for (size_t i = 0; !rc && i < m->checkpoint.n_tensors; i++)
        rc = put_tensor(&key, &m->checkpoint, &m->checkpoint.tensors[i]);
    if (!rc)
        rc = text_finish(&key);
    if (!rc)
        *out = hash_bytes(key.data, key.len);
    text_free(&key);
    return rc;
}

/* --- cache -------------------------------------------------------------------------------------------------------- */

static const char magic[8] = "gemcutid";
enum { FILE_VERSION = 1 };

/* Little-endian, as the ids [samples, length] int32 that follow. */
struct header {
    char magic[8];
    uint32_t version, zero;
    int64_t samples, length;
    struct hash128 key, ids;
};

/* ".cache" in the home folder, or what stands in its place; NULL without a message where neither is known. */
static int cache_home(char **out)
{
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    *out = NULL;
    if (xdg && *xdg == '/') /* the specification wants relative ones ignored */
        *out = mem_strdup(xdg);
    else if (home && *home == '/')
        *out = file_join(home, ".cache");
    else
        return 0;
    return *out ? 0 : ERR_MEMORY;
}

int self_calib_path(struct self_cache *out, const struct model *m, const struct tokenizer *t,
                    const struct self_options *o, const char *backend)
{
    char *home = NULL, hex[HASH_HEX_BYTES];
    *out = (struct self_cache){0};
    int rc = make_key(&out->key, m, t, o, backend);
    if (!rc)
        rc = cache_home(&home);
    if (rc < 0 || !home)
        return rc;
    hash_to_hex(out->key, hex);
    out->path = mem_printf("%s/gemcut/self-%s.ids", home, hex);
    free(home);
    return out->path ? 0 : ERR_MEMORY;
}

void self_cache_free(struct self_cache *c)
{
    free(c->path);
    *c = (struct self_cache){0};
}

/* The size is checked before. */
static int check_file(const char *data, const struct self_cache *c, const struct dataset *expected,
                      int64_t n_tokens_max)
{
    const size_t n = (size_t)(expected->samples * expected->length);
    const char *ids = data + sizeof(struct header);
    struct header h;
    memcpy(&h, data, sizeof h);
    if (memcmp(h.magic, magic, sizeof magic) || h.version != FILE_VERSION || h.zero)
        return err_set(ERR_FORMAT, "%s: is not a file of calibration samples, version %d", c->path,
                       FILE_VERSION);
    if (h.samples != expected->samples || h.length != expected->length || !hash_equal(h.key, c->key))
        return err_set(ERR_FORMAT, "%s: holds other samples than its name says", c->path);
    if (!hash_equal(h.ids, hash_bytes(ids, n * sizeof(int32_t))))
        return err_set(ERR_FORMAT, "%s: the ids do not have the hash that the header says", c->path);
    for (size_t i = 0; i < n; i++) {
        int32_t id;
        memcpy(&id, ids + i * sizeof id, sizeof id);
        if (id < 0 || id >= n_tokens_max)
            return err_set(ERR_FORMAT, "%s: has the token %d, the model's vocabulary ends at %" PRId64,
                           c->path, id, n_tokens_max);
    }
    return 0;
}

int self_calib_load(struct dataset *out, const struct self_cache *c, const struct self_options *o,
                    int64_t n_tokens_max)
{
    *out = (struct dataset){.samples = o->samples, .length = o->length};
    uint64_t bytes;
    CHECK(o->samples >= 1 && o->length >= 1);
    if (!c->path || !file_exists(c->path) ||
        !mem_mul_u64((uint64_t)o->samples, (uint64_t)o->length, &bytes) ||
        !mem_mul_u64(bytes, sizeof *out->ids, &bytes) || !mem_add_u64(bytes, sizeof(struct header), &bytes) ||
        bytes >= SIZE_MAX)
        return 0;
    char *data = NULL;
    size_t len;
    int rc = file_read(c->path, (size_t)bytes, &data, &len);
    if (!rc && len != bytes)
        rc = err_set(ERR_FORMAT, "%s: is %zu bytes, expected %" PRIu64, c->path, len, bytes);
    if (!rc)
        rc = check_file(data, c, out, n_tokens_max);
    if (!rc && !(out->ids = mem_alloc_aligned((size_t)bytes - sizeof(struct header), "calibration samples")))
        rc = ERR_MEMORY;
    if (!rc)
        memcpy(out->ids, data + sizeof(struct header), (size_t)bytes - sizeof(struct header));
    free(data);
    if (!rc)
        return 1;
    *out = (struct dataset){0};
    if (rc == ERR_MEMORY)
        return rc;
    log_warn("%s; the samples are written anew", err_message());
    return 0;
}

static int make_folder_of(const char *path)
{
    char *folder = mem_strndup(path, (size_t)(strrchr(path, '/') - path));
    char *parent = folder ? mem_strndup(folder, (size_t)(strrchr(folder, '/') - folder)) : NULL;
    int rc = parent ? 0 : ERR_MEMORY;
    if (!rc && *parent && !file_is_folder(parent))
        rc = file_make_folder(parent);
    if (!rc && !file_is_folder(folder) && (rc = file_make_folder(folder)) < 0 && file_is_folder(folder))
        rc = 0; /* somebody else was faster */
    free(parent);
    free(folder);
    return rc;
}

void self_calib_save(const struct dataset *d, const struct self_cache *c)
{
    if (!c->path)
        return;
    const size_t bytes = (size_t)(d->samples * d->length) * sizeof *d->ids;
    struct header h = {.version = FILE_VERSION,
                       .samples = d->samples,
                       .length = d->length,
                       .key = c->key,
                       .ids = hash_bytes(d->ids, bytes)};
    memcpy(h.magic, magic, sizeof magic);
    char *data = mem_alloc_aligned(sizeof h + bytes, "a file of calibration samples");
    int rc = data ? make_folder_of(c->path) : ERR_MEMORY;
    if (!rc) {
        memcpy(data, &h, sizeof h);
        memcpy(data + sizeof h, d->ids, bytes);
        rc = file_write_atomic(c->path, data, sizeof h + bytes);
    }
    free(data);
    if (rc < 0)
        log_warn("%s; the calibration samples are not kept", err_message());
}

#include "runtime/generate.h"

#include "base/clock.h"
#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

enum { PREFILL_ROWS = 512 };

/* --- choosing a token ------------------------------------------------------------------------------------------- */

static int32_t most_likely(const float *logits, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static int by_logit(const void *a, const void *b, void *logits)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const float u = ((const float *)logits)[x], v = ((const float *)logits)[y];
    if (isnan(u) || isnan(v)) /* last; what follows notices them */
        return !isnan(u) != !isnan(v) ? !!isnan(u) - !!isnan(v) : (x > y) - (x < y);
    if (u != v)
        return u > v ? -1 : 1;
    return x < y ? -1 : 1;
}

/* The k greatest, greatest first. Of 262 144 logits few displace one of the k best so far: one pass is enough. */
static void select_top(const float *logits, int32_t n, int32_t k, int32_t *order)
{
    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++) {
        if (kept == k && !(logits[i] > logits[order[k - 1]]))
            continue;
        int32_t at = kept < k ? kept++ : k - 1;
        for (; at > 0 && logits[i] > logits[order[at - 1]]; at--)
            order[at] = order[at - 1];
        order[at] = i;
    }
}

/* The tokens that may be chosen, most likely first; how many. */
static int32_t candidates(float *logits, int32_t n, int64_t top_k, int32_t *order)
{
    if (top_k && top_k < n) {
        select_top(logits, n, (int32_t)top_k, order);
        return (int32_t)top_k;
    }
    for (int32_t i = 0; i < n; i++)
        order[i] = i;
    qsort_r(order, (size_t)n, sizeof *order, by_logit, logits);
    return n;
}

int32_t sample_token(float *logits, int32_t n, const struct sampling *s, struct rng *rng, int32_t *order)
{
    if (s->temperature == 0)
        return most_likely(logits, n);
    const int32_t kept = candidates(logits, n, s->top_k, order);
    const float highest = logits[order[0]];
    double total = 0;
    for (int32_t i = 0; i < kept; i++)
        total += exp((double)(logits[order[i]] - highest) / s->temperature);
    /* the shortest beginning that holds top_p of what top_k left */
    double mass = 0;
    int32_t end = 0;
    while (end < kept && (end == 0 || mass < s->top_p * total))
        mass += exp((double)(logits[order[end++]] - highest) / s->temperature);
    double left = (double)rng_float(rng) * mass;
    for (int32_t i = 0; i < end; i++) {
        left -= exp((double)(logits[order[i]] - highest) / s->temperature);
        if (left < 0)
            return order[i];
    }
    return order[end - 1];
}

/* --- what the model says --------------------------------------------------------------------------------------------- */

static int read_ids(struct stop_ids *out, struct json v)
{
    const bool list = json_is_array(v);
    int rc = 0;
    if (!json_exists(v))
        return 0;
    for (struct json e = list ? json_first(v) : v; !rc && e.node;
         e = list ? json_next(e) : (struct json){0}) {
        int64_t id;
        rc = json_as_int(e, 0, INT32_MAX, &id);
        if (!rc && out->n == sizeof out->ids / sizeof *out->ids)
            rc = json_error(v, "has more than 16 ids");
        if (!rc)
            out->ids[out->n++] = (int32_t)id;
    }
    return rc;
}

static int read_range(struct json obj, const char *key, double low, double high, double *value)
{
    const int rc = json_opt_double(obj, key, *value, value);
    if (!rc && !(*value >= low && *value <= high))
        return json_error(json_member(obj, key), "is %g, expected %g … %g", *value, low, high);
    return rc;
}

static int read_sampling(struct sampling *s, struct json config)
{
    bool sample;
    int rc = read_range(config, "temperature", 0, 100, &s->temperature);
    if (!rc)
        rc = json_opt_int(config, "top_k", 0, INT32_MAX, s->top_k, &s->top_k);
    if (!rc)
        rc = read_range(config, "top_p", 0, 1, &s->top_p);
    if (!rc)
        rc = json_opt_bool(config, "do_sample", true, &sample);
    if (!rc && !sample)
        s->temperature = 0;
    return rc;
}

int generate_defaults_read(struct generate_defaults *out, const struct model *m)
{
    *out = (struct generate_defaults){.sampling = {.temperature = 1, .top_k = 64, .top_p = 0.95}};
    char *path = file_join(m->folder, "generation_config.json");
    if (!path)
        return ERR_MEMORY;
    struct json_doc *doc = NULL;
    int rc = file_exists(path) ? json_load(&doc, path, 1 << 20) : 0;
    free(path);
    if (!rc && doc)
        rc = read_sampling(&out->sampling, json_root(doc));
    const struct json places[] = {doc ? json_root(doc) : (struct json){0}, m->config.root,
                                  m->config.text_config};
    for (size_t i = 0; !rc && !out->stop.n && i < sizeof places / sizeof *places; i++)
        rc = read_ids(&out->stop, json_member(places[i], "eos_token_id"));
    json_free(doc);
    if (!rc && !out->stop.n)
        out->stop = (struct stop_ids){.ids = {1}, .n = 1};
    return rc;
}

static bool is_stop(const struct stop_ids *stop, int32_t id)
{
    for (size_t i = 0; i < stop->n; i++)
        if (stop->ids[i] == id)
            return true;
    return false;
}

/* --- the loop ------------------------------------------------------------------------------------------------------ */

int64_t generate_rows(int64_t positions)
{
    return positions < PREFILL_ROWS ? positions : PREFILL_ROWS;
}

static int prefill(struct forward *f, const int32_t *ids, int64_t n, struct mat *last)
{
    int rc = 0;
    struct mat hidden = {0};
    for (int64_t at = 0; !rc && at < n; at += PREFILL_ROWS)
        rc = forward_run(f, ids + at, n - at < PREFILL_ROWS ? n - at : PREFILL_ROWS, &hidden);
    if (!rc)
        *last = mat_rows(&hidden, hidden.rows - 1, 1);
    return rc;
}

struct scratch {
    struct buf logits; /* on the device */
    float *host;
    int32_t *order;
};

static int decode(struct forward *f, const struct weights *w, struct mat last, int64_t max_new,
                  const struct sampling *s, const struct stop_ids *stop, struct scratch *t,
                  generate_callback on_token, void *ctx, struct generate_result *result)
{
    const int32_t vocab = (int32_t)w->embedding.rows;
    const struct mat logits = {t->logits.ptr, DTYPE_F32, 1, vocab, vocab};
    struct rng rng;
    rng_seed(&rng, s->seed);
    result->end = GENERATE_LENGTH;
    for (int rc; result->n_new < max_new;) {
        if ((rc = forward_logits(w, &last, &logits)) < 0 ||
            (rc = w->backend->core->download(w->backend, t->host, t->logits.ptr, t->logits.bytes)) < 0)
            return rc;
        int32_t id = sample_token(t->host, vocab, s, &rng, t->order);
        struct row_comparison row;
        if ((rc = w->backend->core->compare_rows(w->backend, &logits, NULL, &id, &row)) < 0)
            return rc;
        if (!isfinite(row.nll_a))
            return err_set(ERR_FORMAT,
                           "the model's logits are not finite after %lld tokens: damaged weights?",
                           (long long)forward_position(f));
        if (is_stop(stop, id)) {
            result->end = GENERATE_STOP_ID;
            return 0;
        }
        result->n_new++;
        if ((rc = on_token(ctx, id, -row.nll_a)) < 0)
            return rc;
        if (err_interrupt_requested())
            return err_interrupted();
        if (result->n_new == max_new)
            return 0;
        if (forward_position(f) >= w->config.max_positions) {
            result->end = GENERATE_CONTEXT;
            return 0;
        }
        if ((rc = forward_run(f, &id, 1, &last)) < 0)
            return rc;
    }
    return 0;
}

int generate_run(struct forward *f, const struct weights *w, const int32_t *prompt, int64_t n_prompt,
                 int64_t max_new, const struct sampling *s, const struct stop_ids *stop,
                 generate_callback on_token, void *ctx, struct generate_result *result)
{
    *result = (struct generate_result){.n_prompt = n_prompt};
    CHECK(n_prompt >= 1);
    const size_t vocab = (size_t)w->embedding.rows;
    struct scratch t = {.host = mem_alloc(vocab, sizeof *t.host, "logits"),
                        .order = mem_alloc(vocab, sizeof *t.order, "logits")};
    int rc = t.host && t.order
                 ? w->backend->core->acquire(w->backend, vocab * sizeof(float), "logits", &t.logits)
                 : ERR_MEMORY;
    struct mat last;
    const double start = clock_seconds();
    if (!rc)
        rc = prefill(f, prompt, n_prompt, &last);
    const double filled = clock_seconds();
    result->prefill_seconds = filled - start;
    if (!rc)
        rc = decode(f, w, last, max_new, s, stop, &t, on_token, ctx, result);
    result->decode_seconds = clock_seconds() - filled;
    if (t.logits.ptr)
        w->backend->core->release(w->backend, &t.logits);
    free(t.host);
    free(t.order);
    return rc;
}

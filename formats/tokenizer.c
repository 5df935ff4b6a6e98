#include "base/err.h"
#include "base/mem.h"
#include "formats/tokenizer_impl.h"
#include "formats/utf8.h"

#include <stdlib.h>
#include <string.h>

void token_list_free(struct token_list *list)
{
    free(list->ids);
    *list = (struct token_list){0};
}

static int push_id(struct token_list *list, int32_t id)
{
    const int rc = mem_grow(&list->ids, &list->capacity, list->n + 1, sizeof *list->ids, "token ids");
    if (rc == 0)
        list->ids[list->n++] = id;
    return rc;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t)
        return;
    bpe_close(t->bpe);
    name_table_free(&t->names);
    free(t->added);
    free(t->tokens);
    free(t->pool);
    free(t);
}

size_t tokenizer_n_tokens(const struct tokenizer *t)
{
    return t->n_tokens;
}

int32_t tokenizer_token_id(const struct tokenizer *t, const char *name)
{
    size_t id;
    return name_table_find(&t->names, name, &id) ? (int32_t)id : -1;
}

static const struct token *find_token(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && (size_t)id < t->n_tokens && t->tokens[id].name ? &t->tokens[id] : NULL;
}

const char *tokenizer_token_name(const struct tokenizer *t, int32_t id)
{
    const struct token *token = find_token(t, id);
    return token ? token->name : NULL;
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    const struct token *token = find_token(t, id);
    return token && token->special;
}

int32_t tokenizer_bos(const struct tokenizer *t)
{
    return t->bos;
}

int32_t tokenizer_eos(const struct tokenizer *t)
{
    return t->eos;
}

/* Bytes of the longest added token at the start of s[0..n) and its id; 0 when there is none. */
static size_t match_added(const struct tokenizer *t, const uint8_t *s, size_t n, int32_t *id)
{
    size_t longest = 0;
    uint32_t node = t->added_first[s[0]];
    for (size_t i = 1; node; i++) {
        if (t->added[node].id >= 0) {
            longest = i;
            *id = t->added[node].id;
        }
        node = i < n ? tokenizer_added_child(t, node, s[i]) : 0;
    }
    return longest;
}

static int encode(const struct tokenizer *t, struct bpe_run *run, size_t len)
{
    const uint8_t *text = run->text;
    size_t begin = 0, at = 0;
    int32_t id = -1;
    int rc = 0;
    while (rc == 0 && at < len) {
        const size_t matched = t->added_first[text[at]] ? match_added(t, text + at, len - at, &id) : 0;
        if (!matched) {
            at++;
            continue;
        }
        rc = bpe_run_segment(run, begin, at);
        if (rc == 0)
            rc = push_id(run->out, id);
        begin = at += matched;
    }
    return rc < 0 ? rc : bpe_run_segment(run, begin, len);
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool add_bos,
                     struct token_list *out)
{
    const size_t before = out->n;
    if (len >= UINT32_MAX)
        return err_set(ERR_UNSUPPORTED, "a text of %zu bytes, expected less than 4 GiB", len);
    int32_t first = -1;
    if (add_bos && !(len && match_added(t, (const uint8_t *)text, len, &first) && first == t->bos) &&
        push_id(out, t->bos) < 0)
        return ERR_MEMORY;
    struct bpe_run run;
    int rc = bpe_run_begin(&run, t->bpe, text, len, out);
    if (rc == 0)
        rc = encode(t, &run, len);
    bpe_run_end(&run);
    if (rc < 0)
        out->n = before;
    return rc;
}

static void append_run(const uint8_t *run, size_t n, struct text *out)
{
    if (n && utf8_valid(run, n)) {
        text_append(out, (const char *)run, n);
        return;
    }
    for (size_t i = 0; i < n; i++)
        text_add(out, "\xef\xbf\xbd"); /* U+FFFD */
}

/* The name with spaces for U+2581. */
static void append_token(const struct token *token, struct text *out)
{
    const char *at = token->name;
    for (const char *next; token->has_metaspace && (next = strstr(at, METASPACE));
         at = next + sizeof METASPACE - 1) {
        text_append(out, at, (size_t)(next - at));
        text_append(out, " ", 1);
    }
    text_add(out, at);
}

void token_stream_init(struct token_stream *s, const struct tokenizer *t, bool skip_special)
{
    *s = (struct token_stream){.tokenizer = t, .skip_special = skip_special};
}

int token_stream_add(struct token_stream *s, int32_t id, struct text *out)
{
    const struct token *token = find_token(s->tokenizer, id);
    if (!token || (s->skip_special && token->special))
        return 0; /* as if it were not there: a run goes on */
    if (token->byte >= 0) {
        const int rc = mem_grow(&s->run, &s->capacity, s->n_run + 1, 1, "byte tokens");
        if (rc == 0)
            s->run[s->n_run++] = (uint8_t)token->byte;
        return rc;
    }
    append_run(s->run, s->n_run, out);
    s->n_run = 0;
    append_token(token, out);
    return text_finish(out);
}

int token_stream_finish(struct token_stream *s, struct text *out)
{
    append_run(s->run, s->n_run, out);
    s->n_run = 0;
    return text_finish(out);
}

void token_stream_free(struct token_stream *s)
{
    free(s->run);
    *s = (struct token_stream){0};
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                     struct text *out)
{
    struct token_stream s;
    token_stream_init(&s, t, skip_special);
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < n; i++)
        rc = token_stream_add(&s, ids[i], out);
    if (rc == 0)
        rc = token_stream_finish(&s, out);
    token_stream_free(&s);
    return rc;
}

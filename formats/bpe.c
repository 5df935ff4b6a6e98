/* A text without spaces is one word to Gemma's tokenizer, so a whole document line would go through one heap.
 * Two neighbouring characters can only ever be merged across when some merge (a, b) exists with a ending in the
 * first and b beginning with the second. Where none does, the text is cut: exact, and it leaves pieces about as
 * long as words, which a small cache of earlier pieces mostly answers. */
#include "formats/bpe.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/utf8.h"

#include <stdlib.h>
#include <string.h>

enum {
    SPACE = 0x20,
    METASPACE = 0x2581,
    JOIN_BITS = 20,     /* Gemma 3 has 33,695 joinable pairs: 3 % of the bits are set */
    SHORT_SYMBOLS = 64, /* up to here scanning for the lowest rank beats a heap */
    CACHED_BYTES = 64,  /* longer pieces seldom come back */
    CACHE_MIN_TEXT = 256,
    CACHE_MAX_SLOTS = 1 << 15, /* 16 bytes each: half a typical L2 */
    N_CODE_POINTS = 0x110000,
};

static const uint32_t NO_RANK = UINT32_MAX;
static const uint64_t MIX = 0x9e3779b97f4a7c15; /* 2^64 / golden ratio */

struct pair_slot {
    int32_t left, right; /* left -1: empty */
    uint32_t rank;
};

struct bpe {
    struct pair_slot *pairs; /* [1 << (64 - pair_shift)], at most half full */
    unsigned pair_shift;
    int32_t *results; /* [capacity], by rank */
    size_t n_merges, capacity;
    int32_t bytes[256];
    int32_t *chars; /* [N_CODE_POINTS] id + 1 of a character, 0: unknown; most of it is never touched */
    uint64_t
        ascii_joins[128]
                   [2]; /* bit: whether a merge may reach across the pair; row and bit SPACE: METASPACE */
    uint64_t
        joins[(1 << JOIN_BITS) / 64]; /* the same by hash for other pairs: a false 1 costs time, no more */
};

struct bpe_cached {
    uint32_t hash;
    uint32_t text_at, ids_at; /* where the piece last stood in the text, and its ids after out_begin */
    uint8_t n_bytes, n_ids;   /* n_bytes 0: empty */
};

struct bpe_symbol {
    int32_t id;
    uint32_t prev, next; /* indices; NO_SYMBOL at the ends */
    uint32_t rank; /* of the merge with the next symbol, NO_RANK when there is none or the symbol is gone */
};

static const uint32_t NO_SYMBOL = UINT32_MAX;

int bpe_open(struct bpe **out, size_t n_merges)
{
    *out = NULL;
    if (n_merges > UINT32_MAX / 4)
        return err_set(ERR_UNSUPPORTED, "%zu merges, expected at most %u", n_merges, UINT32_MAX / 4);
    struct bpe *b = mem_alloc(1, sizeof *b, "a tokenizer's merge engine");
    if (!b)
        return ERR_MEMORY;
    unsigned bits = 4;
    while ((size_t)1 << bits < 2 * n_merges)
        bits++;
    b->pair_shift = 64 - bits;
    b->capacity = n_merges;
    b->pairs = mem_alloc((size_t)1 << bits, sizeof *b->pairs, "a tokenizer's merge table");
    b->results = mem_alloc(n_merges, sizeof *b->results, "a tokenizer's merges");
    b->chars = mem_alloc(N_CODE_POINTS, sizeof *b->chars, "a tokenizer's characters");
    if (!b->pairs || !b->results || !b->chars) {
        bpe_close(b);
        return ERR_MEMORY;
    }
    for (size_t i = 0; i < (size_t)1 << bits; i++)
        b->pairs[i].left = -1;
    *out = b;
    return 0;
}

void bpe_close(struct bpe *b)
{
    if (!b)
        return;
    free(b->chars);
    free(b->pairs);
    free(b->results);
    free(b);
}

void bpe_set_byte(struct bpe *b, uint8_t byte, int32_t id)
{
    b->bytes[byte] = id;
}

void bpe_set_char(struct bpe *b, uint32_t cp, int32_t id)
{
    if (cp == SPACE) /* no text has one after normalization */
        return;
    b->chars[cp] = id + 1;
    if (cp == METASPACE)
        b->chars[SPACE] = id + 1;
}

static inline size_t pair_hash(const struct bpe *b, int32_t left, int32_t right)
{
    return (size_t)(((uint64_t)(uint32_t)left << 32 ^ (uint32_t)right) * MIX >> b->pair_shift);
}

/* The slot of the pair, or the empty one where it belongs. */
static inline struct pair_slot *find_pair(const struct bpe *b, int32_t left, int32_t right)
{
    const size_t mask = ((size_t)1 << (64 - b->pair_shift)) - 1;
    size_t i = pair_hash(b, left, right);
    while (b->pairs[i].left >= 0 && (b->pairs[i].left != left || b->pairs[i].right != right))
        i = (i + 1) & mask;
    return &b->pairs[i];
}

static inline uint32_t pair_rank(const struct bpe *b, int32_t left, int32_t right)
{
    const struct pair_slot *slot = find_pair(b, left, right);
    return slot->left >= 0 ? slot->rank : NO_RANK;
}

static inline size_t join_hash(uint32_t a, uint32_t b)
{
    return (size_t)(((uint64_t)a << 21 | b) * MIX >> (64 - JOIN_BITS));
}

static inline bool can_join(const struct bpe *b, uint32_t left, uint32_t right)
{
    if ((left | right) < 0x80)
        return b->ascii_joins[left][right >> 6] >> (right & 63) & 1;
    const size_t bit = join_hash(left == SPACE ? METASPACE : left, right == SPACE ? METASPACE : right);
    return b->joins[bit >> 6] >> (bit & 63) & 1;
}

void bpe_add_merge(struct bpe *b, const struct bpe_merge *m)
{
    CHECK(b->n_merges < b->capacity);
    struct pair_slot *slot = find_pair(b, m->left, m->right);
    *slot = (struct pair_slot){m->left, m->right, (uint32_t)b->n_merges};
    b->results[b->n_merges++] = m->result;
    const size_t bit = join_hash(m->left_end, m->right_begin);
    b->joins[bit >> 6] |= 1ull << (bit & 63);
    const uint32_t left = m->left_end == METASPACE ? SPACE : m->left_end;
    const uint32_t right = m->right_begin == METASPACE ? SPACE : m->right_begin;
    if ((left | right) < 0x80)
        b->ascii_joins[left][right >> 6] |= 1ull << (right & 63);
}

/* Appends the symbols of a piece before any merge, one for each character of the vocabulary, one for each byte
 * of anything else. out has room for `len` more. */
static size_t add_symbols(const struct bpe_run *r, size_t at, size_t len)
{
    const struct bpe *b = r->bpe;
    int32_t *ids = r->out->ids + r->out->n;
    size_t n = 0, char_bytes;
    for (size_t end = at + len; at < end; at += char_bytes) {
        uint32_t cp;
        char_bytes = utf8_decode(r->text + at, end - at, &cp);
        const int32_t id = char_bytes ? b->chars[cp] - 1 : -1;
        if (!char_bytes)
            char_bytes = 1;
        if (id >= 0)
            ids[n++] = id;
        else
            for (size_t i = 0; i < char_bytes; i++)
                ids[n++] = b->bytes[r->text[at + i]];
    }
    return n;
}

/* Merges ids[0..n), n ≤ SHORT_SYMBOLS, in place; returns how many are left. */
static size_t merge_short(const struct bpe *b, int32_t *ids, size_t n)
{
    uint32_t ranks[SHORT_SYMBOLS]; /* of the merge of i and i + 1 */
    if (n < 2)
        return n;
    for (size_t i = 0; i + 1 < n; i++)
        ranks[i] = pair_rank(b, ids[i], ids[i + 1]);
    for (;;) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (ranks[i] < ranks[best])
                best = i;
        if (n < 2 || ranks[best] == NO_RANK)
            return n;
        ids[best] = b->results[ranks[best]];
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        memmove(ranks + best, ranks + best + 1, (n - best - 1) * sizeof *ranks);
        if (best + 1 < n)
            ranks[best] = pair_rank(b, ids[best], ids[best + 1]);
        if (best > 0)
            ranks[best - 1] = pair_rank(b, ids[best - 1], ids[best]);
    }
}

/* A 4-ary min-heap of rank << 32 | symbol: lowest rank first, then leftmost. */
enum { HEAP_ARITY = 4 };

static void heap_sift_down(uint64_t *heap, size_t n, size_t at)
{
    const uint64_t item = heap[at];
    for (;;) {
        const size_t first = HEAP_ARITY * at + 1;
        if (first >= n)
            break;
        const size_t last = first + HEAP_ARITY < n ? first + HEAP_ARITY : n;
        size_t least = first;
        for (size_t i = first + 1; i < last; i++)
            if (heap[i] < heap[least])
                least = i;
        if (heap[least] >= item)
            break;
        heap[at] = heap[least];
        at = least;
    }
    heap[at] = item;
}

static int heap_push(struct bpe_run *r, uint64_t item)
{
    if (mem_grow(&r->heap, &r->heap_capacity, r->n_heap + 1, sizeof *r->heap, "merging a long piece") < 0)
        return ERR_MEMORY;
    size_t at = r->n_heap++;
    while (at > 0 && r->heap[(at - 1) / HEAP_ARITY] > item) {
        r->heap[at] = r->heap[(at - 1) / HEAP_ARITY];
        at = (at - 1) / HEAP_ARITY;
    }
    r->heap[at] = item;
    return 0;
}

static uint64_t heap_pop(struct bpe_run *r)
{
    const uint64_t item = r->heap[0];
    r->heap[0] = r->heap[--r->n_heap];
    if (r->n_heap)
        heap_sift_down(r->heap, r->n_heap, 0);
    return item;
}

/* Ranks symbol i with its next one anew and queues the pair. */
static int rank_symbol(struct bpe_run *r, uint32_t i)
{
    struct bpe_symbol *s = &r->symbols[i];
    s->rank = s->next == NO_SYMBOL ? NO_RANK : pair_rank(r->bpe, s->id, r->symbols[s->next].id);
    return s->rank == NO_RANK ? 0 : heap_push(r, (uint64_t)s->rank << 32 | i);
}

static int load_symbols(struct bpe_run *r, const int32_t *ids, size_t n)
{
    if (mem_grow(&r->symbols, &r->symbols_capacity, n, sizeof *r->symbols, "merging a long piece") < 0)
        return ERR_MEMORY;
    for (uint32_t i = 0; i < n; i++)
        r->symbols[i] = (struct bpe_symbol){.id = ids[i],
                                            .prev = i ? i - 1 : NO_SYMBOL,
                                            .next = i + 1 < n ? i + 1 : NO_SYMBOL,
                                            .rank = NO_RANK};
    r->n_heap = 0;
    for (uint32_t i = 0; i < n; i++)
        if (rank_symbol(r, i) < 0)
            return ERR_MEMORY;
    return 0;
}

/* Merges ids[0..*n) in place. Entries of the heap are not removed when their pair goes away: one counts only
 * while the symbol still has that rank with its neighbour. */
static int merge_long(struct bpe_run *r, int32_t *ids, size_t *n)
{
    if (load_symbols(r, ids, *n) < 0)
        return ERR_MEMORY;
    struct bpe_symbol *s = r->symbols;
    while (r->n_heap) {
        const uint64_t item = heap_pop(r);
        const uint32_t i = (uint32_t)item, rank = (uint32_t)(item >> 32);
        if (s[i].rank != rank)
            continue;
        const uint32_t gone = s[i].next, after = s[gone].next;
        s[i].id = r->bpe->results[rank];
        s[i].next = after;
        s[gone].rank = NO_RANK;
        if (after != NO_SYMBOL)
            s[after].prev = i;
        if (rank_symbol(r, i) < 0 || (s[i].prev != NO_SYMBOL && rank_symbol(r, s[i].prev) < 0))
            return ERR_MEMORY;
    }
    size_t n_left = 0;
    for (uint32_t i = 0; i != NO_SYMBOL; i = s[i].next)
        ids[n_left++] = s[i].id;
    *n = n_left;
    return 0;
}

/* Appends the ids of the piece text[at..at + len). */
static int merge_piece(struct bpe_run *r, size_t at, size_t len)
{
    int32_t *ids = r->out->ids + r->out->n;
    size_t n = add_symbols(r, at, len);
    if (n <= SHORT_SYMBOLS)
        n = merge_short(r->bpe, ids, n);
    else if (merge_long(r, ids, &n) < 0)
        return ERR_MEMORY;
    r->out->n += n;
    return 0;
}

static inline uint64_t load_bytes(const uint8_t *s, size_t n)
{
    uint64_t v = 0;
    memcpy(&v, s, n);
    return v;
}

static inline uint32_t piece_hash(const uint8_t *s, size_t n)
{
    uint64_t h = n * MIX;
    for (; n >= 8; s += 8, n -= 8) {
        h = (h ^ load_bytes(s, 8)) * MIX;
        h ^= h >> 32;
    }
    h = (h ^ load_bytes(s, n)) * MIX;
    return (uint32_t)(h >> 32);
}

/* As merge_piece, by way of the cache. */
static int encode_piece(struct bpe_run *r, size_t at, size_t len)
{
    struct token_list *out = r->out;
    if (mem_grow(&out->ids, &out->capacity, out->n + len, sizeof *out->ids, "token ids") < 0)
        return ERR_MEMORY;
    if (!r->cache || len > CACHED_BYTES || len == 1)
        return merge_piece(r, at, len);
    const uint32_t hash = piece_hash(r->text + at, len);
    struct bpe_cached *c = &r->cache[hash & r->cache_mask];
    const size_t begin = out->n;
    if (c->n_bytes == len && c->hash == hash && !memcmp(r->text + c->text_at, r->text + at, len)) {
        memcpy(out->ids + begin, out->ids + r->out_begin + c->ids_at, c->n_ids * sizeof *out->ids);
        out->n += c->n_ids;
    } else if (merge_piece(r, at, len) < 0) {
        return ERR_MEMORY;
    }
    /* the latest place is the one still in the processor's cache */
    *c = (struct bpe_cached){.hash = hash,
                             .text_at = (uint32_t)at,
                             .ids_at = (uint32_t)(begin - r->out_begin),
                             .n_bytes = (uint8_t)len,
                             .n_ids = (uint8_t)(out->n - begin)};
    return 0;
}

/* Where the piece that begins at `at` ends: before the first character that nothing can join to the one before. */
static inline size_t piece_end(const struct bpe_run *r, size_t at, size_t end)
{
    uint32_t prev, cp;
    size_t len = utf8_decode(r->text + at, end - at, &prev);
    if (!len)
        return at + 1;
    for (at += len; at < end; at += len) {
        len = utf8_decode(r->text + at, end - at, &cp);
        if (!len || !can_join(r->bpe, prev, cp))
            break;
        prev = cp;
    }
    return at;
}

int bpe_run_segment(struct bpe_run *r, size_t begin, size_t end)
{
    for (size_t at = begin, next; at < end; at = next) {
        next = piece_end(r, at, end);
        const int rc = encode_piece(r, at, next - at);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int bpe_run_begin(struct bpe_run *r, const struct bpe *b, const char *text, size_t len,
                  struct token_list *out)
{
    *r = (struct bpe_run){.bpe = b, .text = (const uint8_t *)text, .out = out, .out_begin = out->n};
    if (len < CACHE_MIN_TEXT)
        return 0;
    size_t slots = CACHE_MIN_TEXT / 4;
    while (slots < CACHE_MAX_SLOTS && slots < len / 4)
        slots *= 2;
    r->cache_mask = slots - 1;
    r->cache = mem_alloc(slots, sizeof *r->cache, "the cache of an encoder");
    return r->cache ? 0 : ERR_MEMORY;
}

void bpe_run_end(struct bpe_run *r)
{
    free(r->cache);
    free(r->symbols);
    free(r->heap);
    *r = (struct bpe_run){0};
}

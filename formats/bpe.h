/* The merge engine under formats/tokenizer: code points to symbols, symbols merged by rank, ids out. It knows
 * ids and code points; names, files and added tokens are the tokenizer's part. The normalizer of the Gemma
 * families is built in: U+0020 is U+2581 here. */
#ifndef GEMCUT_FORMATS_BPE_H
#define GEMCUT_FORMATS_BPE_H

#include "formats/tokenizer.h"

struct bpe;

/* For up to n_merges merges. Everything is set before the first run; after that a bpe is constant. */
int bpe_open(struct bpe **out, size_t n_merges);
void bpe_close(struct bpe *b);

void bpe_set_byte(struct bpe *b, uint8_t byte, int32_t id); /* all 256 must be set */
void bpe_set_char(struct bpe *b, uint32_t cp, int32_t id);

/* A merge of two neighbours; its rank is the number of merges added before it. Of two merges of one pair the
 * later counts, as in Hugging Face's. Byte tokens must not take part: no merge reaches across a character that
 * is not in the vocabulary. */
struct bpe_merge {
    int32_t left, right, result;
    uint32_t left_end, right_begin; /* the last code point of left, the first one of right */
};
void bpe_add_merge(struct bpe *b, const struct bpe_merge *m);

/* The scratch of one text. `text` stays where it is during the run; ids are appended to *out, which nobody else
 * truncates meanwhile: the cache of pieces points into both. */
struct bpe_run {
    const struct bpe *bpe;
    const uint8_t *text;
    struct token_list *out;
    size_t out_begin;         /* out->n at the start */
    struct bpe_cached *cache; /* [cache_mask + 1], NULL for short texts */
    size_t cache_mask;
    struct bpe_symbol *symbols; /* [symbols_capacity], for long pieces */
    size_t symbols_capacity;
    uint64_t *heap; /* [n_heap] */
    size_t n_heap, heap_capacity;
};

int bpe_run_begin(struct bpe_run *r, const struct bpe *b, const char *text, size_t len,
                  struct token_list *out);

/* Appends the ids of text[begin..end), as one word. */
int bpe_run_segment(struct bpe_run *r, size_t begin, size_t end);
void bpe_run_end(struct bpe_run *r);

#endif

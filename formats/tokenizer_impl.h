/* The inside of a tokenizer, shared by tokenizer.c and tokenizer_load.c alone. */
#ifndef GEMCUT_FORMATS_TOKENIZER_IMPL_H
#define GEMCUT_FORMATS_TOKENIZER_IMPL_H

#include "base/hash.h"
#include "formats/bpe.h"
#include "formats/tokenizer.h"

static const char METASPACE[] = "\xe2\x96\x81"; /* U+2581 */

struct token {
    const char *name; /* in the pool, or NULL: the id is not used */
    uint16_t len;
    int16_t byte; /* of a byte token, else -1 */
    bool special, has_metaspace;
};

/* A byte of an added token, in a tree of first child and next sibling. Indices; 0: none. */
struct added_node {
    uint32_t child, sibling;
    int32_t id; /* of the added token that ends here, else -1 */
    uint8_t byte;
};

struct tokenizer {
    char *pool; /* the names, each NUL-terminated */
    size_t pool_len, pool_bytes;
    struct token *tokens; /* [n_tokens] */
    size_t n_tokens;
    struct name_table names;
    struct bpe *bpe;
    struct added_node *added; /* [n_added]; 0 is not a node */
    size_t n_added, added_capacity;
    uint32_t added_first[256]; /* node of the first byte */
    int32_t bos, eos;
};

/* The node that follows `node` with that byte; 0 when there is none. */
static inline uint32_t tokenizer_added_child(const struct tokenizer *t, uint32_t node, uint8_t byte)
{
    uint32_t child = t->added[node].child;
    while (child && t->added[child].byte != byte)
        child = t->added[child].sibling;
    return child;
}

#endif

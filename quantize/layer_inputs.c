#include "quantize/layer_inputs.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

/* places [vocab], zeros: of each id that occurs its place among them, −1 of the others. Returns their number. */
static int64_t number_ids(const struct dataset *data, int64_t vocab, int32_t *places)
{
    int32_t n = 0;
    for (int64_t i = 0; i < data->samples * data->length; i++) {
        CHECK(data->ids[i] >= 0 && data->ids[i] < vocab);
        places[data->ids[i]] = 1;
    }
    for (int64_t id = 0; id < vocab; id++)
        places[id] = places[id] ? n++ : -1;
    return n;
}

int layer_inputs_count(const struct dataset *data, int64_t vocab, int64_t *n)
{
    int32_t *places = mem_alloc((size_t)vocab, sizeof *places, "the ids of the text");
    if (!places)
        return ERR_MEMORY;
    *n = number_ids(data, vocab, places);
    free(places);
    return 0;
}

/* ids [n_ids], ascending, and l->places. */
static int list_ids(struct layer_inputs *l, const struct dataset *data, int64_t vocab, int32_t **ids)
{
    const int64_t tokens = data->samples * data->length;
    int32_t *places = mem_alloc((size_t)vocab, sizeof *places, "the ids of the text");
    if (!places)
        return ERR_MEMORY;
    l->n_ids = number_ids(data, vocab, places);
    *ids = mem_alloc((size_t)l->n_ids, sizeof **ids, "the ids of the text");
    l->places = mem_alloc((size_t)tokens, sizeof *l->places, "the ids of the text");
    for (int64_t id = 0; *ids && id < vocab; id++)
        if (places[id] >= 0)
            (*ids)[places[id]] = (int32_t)id;
    for (int64_t i = 0; l->places && i < tokens; i++)
        l->places[i] = places[data->ids[i]];
    free(places);
    return *ids && l->places ? 0 : ERR_MEMORY;
}

static struct token_batch rows_of(const struct layer_inputs *l, int layer, int64_t first, int64_t n)
{
    return (struct token_batch){.first_row = layer * l->n_ids + first, .rows = n};
}

/* Of the ids [first, first + x->rows), of all layers. */
static int make_some(const struct layer_inputs *l, const struct weights *w, int64_t first,
                     const struct mat *x, const struct block_input *in)
{
    const struct backend *b = w->backend;
    int rc = b->core->embed(b, &w->embedding, in->ids, sqrtf((float)w->config.hidden_size), x);
    if (!rc)
        rc = b->core->scale(b, 1, x, false, &in->x0);
    for (int layer = 0; !rc && layer < (int)w->config.n_layers; layer++) {
        const struct token_batch t = rows_of(l, layer, first, x->rows);
        const struct mat to = states_rows(&l->states, &t);
        rc = block_make_input(w, layer, in);
        if (!rc)
            rc = states_on_host(&l->states)
                     ? states_keep(b, &l->states, &in->input, &t)
                     : b->core->copy(b, to.data, in->input.data, (size_t)states_bytes(&in->input));
    }
    return rc;
}

int layer_inputs_make(struct layer_inputs *l, const struct weights *w, const struct dataset *data,
                      const struct mat *x, const struct block_input *in)
{
    int32_t *ids = NULL;
    int rc = list_ids(l, data, w->config.vocab_size, &ids);
    CHECK(rc < 0 || l->states.all.rows == l->n_ids * w->config.n_layers);
    for (int64_t first = 0, n; !rc && first < l->n_ids; first += n) {
        n = l->n_ids - first < x->rows ? l->n_ids - first : x->rows;
        const struct mat rows = mat_rows(x, 0, n);
        const struct block_input part = {.ids = ids + first,
                                         .x0 = mat_rows(&in->x0, 0, n),
                                         .sum = mat_rows(&in->sum, 0, n),
                                         .input = mat_rows(&in->input, 0, n),
                                         .gate = mat_rows(&in->gate, 0, n)};
        rc = make_some(l, w, first, &rows, &part);
    }
    l->layer = -1;
    free(ids);
    return rc;
}

void layer_inputs_free(struct layer_inputs *l)
{
    free(l->places);
    l->places = NULL;
}

int layer_inputs_enter(struct layer_inputs *l, const struct backend *b, int layer)
{
    const struct token_batch t = rows_of(l, layer, 0, l->n_ids);
    const int rc = states_fetch(b, &l->states, &t);
    l->layer = layer;
    return rc;
}

int layer_inputs_pick(const struct layer_inputs *l, const struct backend *b, int64_t first,
                      const struct block_input *to)
{
    CHECK(l->layer >= 0);
    const struct token_batch t = rows_of(l, l->layer, 0, l->n_ids);
    const struct mat table = states_rows(&l->states, &t);
    const int rc = b->core->embed(b, &table, l->places + first, 1, &to->sum);
    return rc ? rc : b->core->scale(b, 1, &to->sum, false, &to->input);
}

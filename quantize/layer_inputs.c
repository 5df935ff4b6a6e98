#include "quantize/layer_inputs.h"

#include "base/err.h"
#include "base/mem.h"
#include "base/parallel.h"

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

/* --- rows of the table -------------------------------------------------------------------------------------------- */

enum {
    IDS_AT_A_TIME = 4096, /* 88 MB of Gemma 4 E4B's */
    TASK_BYTES = 1 << 20, /* read by one thread */
};

/* The rows of some ids, on their way to the device. */
struct table_rows {
    const struct checkpoint *checkpoint;
    const struct tensor *table;
    struct parallel *pool;
    struct staged_buf memory; /* [at_a_time, layers·ple] */
    int32_t *numbers;         /* [at_a_time]: 0, 1, … */
    int64_t at_a_time, n;
    const int32_t *ids; /* [n], ascending */
};

static uint64_t row_bytes(const struct tensor *t)
{
    return (uint64_t)tensor_cols(t) * dtype_bytes(t->dtype);
}

static const struct tensor *find_table(const struct model *m)
{
    const struct gemma_tensor *table = model_table(m);
    return table ? checkpoint_tensor(&m->checkpoint, table->name) : NULL;
}

static int64_t ids_at_a_time(int64_t n_ids, int64_t rows)
{
    const int64_t n = rows < IDS_AT_A_TIME ? rows : IDS_AT_A_TIME;
    return n_ids < n ? n_ids : n;
}

uint64_t layer_inputs_bytes(const struct model *m, int64_t n_ids, int64_t rows)
{
    return layer_inputs_read_bytes(m, ids_at_a_time(n_ids, rows));
}

uint64_t layer_inputs_read_bytes(const struct model *m, int64_t n_ids)
{
    const struct tensor *t = find_table(m);
    return t ? (uint64_t)n_ids * row_bytes(t) : 0;
}

static int64_t task_rows(const struct tensor *t)
{
    const int64_t rows = (int64_t)(TASK_BYTES / row_bytes(t));
    return rows ? rows : 1;
}

/* Rows of neighbouring ids are read at once. */
static int read_task(void *ctx, size_t task, int worker)
{
    const struct table_rows *r = ctx;
    const uint64_t bytes = row_bytes(r->table);
    const int64_t first = (int64_t)task * task_rows(r->table), left = r->n - first,
                  end = left < task_rows(r->table) ? r->n : first + task_rows(r->table);
    int rc = 0;
    (void)worker;
    for (int64_t i = first, next; !rc && i < end; i = next) {
        for (next = i + 1; next < end && r->ids[next] == r->ids[next - 1] + 1; next++)
            ;
        rc = checkpoint_read(r->checkpoint, r->table, (uint64_t)r->ids[i] * bytes,
                             (size_t)((uint64_t)(next - i) * bytes),
                             (char *)r->memory.host + (uint64_t)i * bytes);
    }
    return rc;
}

/* Brings the rows of n ids to the device, once it has done with those before. */
static int read_rows(struct table_rows *r, const struct backend *b, const int32_t *ids, int64_t n)
{
    const int64_t step = task_rows(r->table);
    r->ids = ids;
    r->n = n;
    int rc = b->core->wait(b);
    if (!rc)
        rc = parallel_for(r->pool, (size_t)((n + step - 1) / step), read_task, r);
    return rc ? rc : b->core->stage_in(b, &r->memory, 0, (size_t)((uint64_t)n * row_bytes(r->table)));
}

static int open_rows(struct table_rows *r, const struct model *m, const struct backend *b, int64_t at_a_time)
{
    *r = (struct table_rows){.checkpoint = &m->checkpoint, .table = find_table(m), .at_a_time = at_a_time};
    CHECK(r->table);
    r->numbers = mem_alloc((size_t)at_a_time, sizeof *r->numbers, "the ids of the text");
    int rc = r->numbers ? parallel_open(&r->pool, 0) : ERR_MEMORY;
    for (int64_t i = 0; !rc && i < at_a_time; i++)
        r->numbers[i] = (int32_t)i;
    return rc ? rc
              : b->core->acquire_staging(b, (size_t)((uint64_t)at_a_time * row_bytes(r->table)),
                                         r->table->name, &r->memory);
}

/* The device has done with them. */
static void close_rows(struct table_rows *r, const struct backend *b)
{
    if (r->memory.host)
        b->core->release_staging(b, &r->memory);
    parallel_close(r->pool);
    free(r->numbers);
}

/* --- making them ---------------------------------------------------------------------------------------------------- */

/* Of the ids [first, first + x->rows), whose rows of the table are there, of all layers. */
static int make_some(const struct layer_inputs *l, const struct weights *w, const int32_t *ids, int64_t first,
                     const struct mat *x, const struct block_input *in)
{
    const struct backend *b = w->backend;
    int rc = b->core->embed(b, &w->embedding, ids + first, sqrtf((float)w->config.hidden_size), x);
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
    const struct backend *b = w->backend;
    struct table_rows table = {0};
    int32_t *ids = NULL;
    int rc = list_ids(l, data, w->config.vocab_size, &ids);
    CHECK(rc < 0 || l->states.all.rows == l->n_ids * w->config.n_layers);
    if (!rc)
        rc = open_rows(&table, w->model, b, ids_at_a_time(l->n_ids, x->rows));
    for (int64_t first = 0, n; !rc && first < l->n_ids; first += n) {
        n = l->n_ids - first < table.at_a_time ? l->n_ids - first : table.at_a_time;
        const struct mat rows = mat_rows(x, 0, n);
        const int64_t cols = tensor_cols(table.table);
        const struct block_input part = {.table = {table.memory.device, table.table->dtype, n, cols, cols},
                                         .ids = table.numbers,
                                         .x0 = mat_rows(&in->x0, 0, n),
                                         .sum = mat_rows(&in->sum, 0, n),
                                         .input = mat_rows(&in->input, 0, n),
                                         .gate = mat_rows(&in->gate, 0, n)};
        rc = read_rows(&table, b, ids + first, n);
        if (!rc)
            rc = make_some(l, w, ids, first, &rows, &part);
    }
    if (!rc)
        rc = b->core->wait(b);
    close_rows(&table, b);
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

#include "quantize/states.h"

#include "base/err.h"
#include "kernels/arena.h"

uint64_t states_bytes(const struct mat *m)
{
    return (uint64_t)(m->rows * m->cols) * dtype_bytes(m->dtype);
}

void states_place(struct states *s, void *base, uint64_t *at, bool on_host, const struct mat *shape,
                  int64_t batch_rows)
{
    const int64_t rows = on_host ? batch_rows : shape->rows;
    const struct mat m = arena_take(base, at, shape->dtype, rows, shape->cols);
    if (on_host) {
        s->all = (struct mat){s->memory.ptr, shape->dtype, shape->rows, shape->cols, shape->cols};
        s->batch = m;
    } else {
        s->all = m;
    }
}

void states_fit(struct states *s, int64_t cols)
{
    s->all = mat_dense(&s->all, cols);
    s->batch = mat_dense(&s->batch, cols);
}

struct mat states_rows(const struct states *s, const struct token_batch *t)
{
    return states_on_host(s) ? mat_rows(&s->batch, 0, t->rows) : mat_rows(&s->all, t->first_row, t->rows);
}

int states_fetch(const struct backend *b, const struct states *s, const struct token_batch *t)
{
    if (!states_on_host(s))
        return 0;
    const struct mat from = mat_rows(&s->all, t->first_row, t->rows);
    return b->core->upload(b, s->batch.data, from.data, (size_t)states_bytes(&from));
}

int states_keep(const struct backend *b, const struct states *s, const struct mat *from,
                const struct token_batch *t)
{
    if (!states_on_host(s))
        return 0;
    const struct mat to = mat_rows(&s->all, t->first_row, t->rows);
    return b->core->download(b, to.data, from->data, (size_t)states_bytes(&to));
}

int states_copy(const struct backend *b, const struct states *s, int64_t first_row, const struct mat *to)
{
    const struct mat from = mat_rows(&s->all, first_row, to->rows);
    CHECK(to->cols == from.cols && to->stride == to->cols);
    return states_on_host(s) ? b->core->upload(b, to->data, from.data, (size_t)states_bytes(&from))
                             : b->core->copy(b, to->data, from.data, (size_t)states_bytes(&from));
}

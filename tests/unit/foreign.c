#include "tests/unit/foreign.h"

#include "base/file.h"
#include "base/half.h"
#include "formats/writer.h"
#include "tests/unit/naive.h"
#include "tests/unit/support.h"

/* --- a cut of ours, element by element -------------------------------------------------------------------------- */

static uint32_t word_of(const struct model *m, const struct tensor *t, int64_t row, int64_t col)
{
    uint32_t word;
    assert_ok(checkpoint_read(&m->checkpoint, t, (uint64_t)(row * t->shape[1] + col) * 4, 4, &word));
    return word;
}

static int code_of(const struct model *m, const struct model_linear *l, int64_t row, int64_t col)
{
    const int bits = l->scheme.bits, per_word = 32 / bits;
    return (int)(word_of(m, l->packed, row, col / per_word) >> col % per_word * bits & ((1u << bits) - 1));
}

/* 0 … 2^bits − 1 */
static int zero_of(const struct model *m, const struct model_linear *l, int64_t row, int64_t g)
{
    const int bits = l->scheme.bits, per_word = 32 / bits;
    if (!l->zeros)
        return 1 << (bits - 1);
    return (int)(word_of(m, l->zeros, row / per_word, g) >> row % per_word * bits & ((1u << bits) - 1));
}

/* As the type has it that is written. */
static float scale_of(const struct foreign *f, const struct model *m, const struct model_linear *l,
                      int64_t row, int64_t g)
{
    uint16_t h;
    assert_ok(
        checkpoint_read(&m->checkpoint, l->scales, (uint64_t)(row * l->scales->shape[1] + g) * 2, 2, &h));
    const float s = half_from_bf16(h) * f->scale_factor;
    return f->scales == DTYPE_F16 ? (float)naive_value16(naive_bits16(s, 5), 5) : s;
}

uint16_t foreign_weight(const struct foreign *f, const struct model *cut, const struct model_linear *l,
                        int64_t row, int64_t col)
{
    const int64_t g = l->scheme.group ? col / l->scheme.group : 0;
    const int difference = code_of(cut, l, row, col) - zero_of(cut, l, row, g);
    return naive_bits16((float)difference * scale_of(f, cut, l, row, g), 8);
}

/* --- writing ---------------------------------------------------------------------------------------------------- */

struct part {
    size_t id;
    void *data;
    size_t bytes;
};

struct output {
    struct writer *w;
    struct part parts[512];
    size_t n;
};

static void *add(struct output *o, const char *module, const char *suffix, enum dtype dtype, int n_dims,
                 int64_t rows, int64_t cols)
{
    char name[256];
    struct part *p = &o->parts[o->n++];
    assert_true(o->n <= N_OF(o->parts));
    snprintf(name, sizeof name, "%s%s", module, suffix);
    assert_ok(writer_add(o->w, name, module, dtype, n_dims, (int64_t[]){rows, cols}, &p->id));
    p->bytes = (size_t)(rows * (n_dims == 2 ? cols : 1)) * dtype_bytes(dtype);
    return p->data = calloc(1, p->bytes + 1);
}

static void put_scales(const struct foreign *f, const struct model *m, const struct model_linear *l, void *to,
                       bool spoiled)
{
    const int64_t rows = l->spec->shape[0], groups = l->scales->shape[1];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = f->layout == QUANT_BY_ROWS ? r * groups + g : g * rows + r;
            const bool nan = spoiled && f->nan_scale && r == 3 && g == 1;
            const float s = scale_of(f, m, l, r, g);
            if (f->scales == DTYPE_F32)
                ((float *)to)[at] = nan ? half_float(0x7fc00000) : s;
            else
                ((uint16_t *)to)[at] = nan ? 0x7fff : naive_bits16(s, f->scales == DTYPE_F16 ? 5 : 8);
        }
}

/* Where AWQ has row r of a word's eight. */
static int awq_place(int64_t r)
{
    static const int places[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    return places[r % 8];
}

static void put_codes(const struct foreign *f, const struct model *m, const struct model_linear *l,
                      uint32_t *to)
{
    const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1];
    const int bits = l->scheme.bits, per_word = 32 / bits;
    const int64_t words = (cols + per_word - 1) / per_word;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const uint32_t code = (uint32_t)code_of(m, l, r, c);
            if (f->layout == QUANT_BY_ROWS)
                to[r * words + c / per_word] |= code << c % per_word * bits;
            else if (f->layout == QUANT_TRANSPOSED)
                to[c / per_word * rows + r] |= code << c % per_word * bits;
            else
                to[c * (rows / 8) + r / 8] |= code << 4 * awq_place(r);
        }
}

static void put_zeros(const struct foreign *f, const struct model *m, const struct model_linear *l,
                      uint32_t *to, bool spoiled)
{
    const int64_t rows = l->spec->shape[0], groups = l->scales->shape[1];
    const int bits = l->scheme.bits, per_word = 32 / bits;
    const int64_t words = (rows + per_word - 1) / per_word;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            uint32_t z = (uint32_t)(zero_of(m, l, r, g) - f->zero_bias);
            if (spoiled && f->odd_zero && r == 5 && g == 1)
                z = 15;
            if (f->layout == QUANT_BY_ROWS)
                to[r / per_word * groups + g] |= z << r % per_word * bits;
            else if (f->layout == QUANT_TRANSPOSED)
                to[g * words + r / per_word] |= z << r % per_word * bits;
            else
                to[g * (rows / 8) + r / 8] |= z << 4 * awq_place(r);
        }
}

static void add_linear(const struct foreign *f, const struct model *m, const struct model_linear *l,
                       struct output *o)
{
    const int64_t rows = l->spec->shape[0], cols = l->spec->shape[1], groups = l->scales->shape[1];
    const int64_t words = quant_packed_cols(l->scheme, cols), zero_words = quant_zero_rows(l->scheme, rows);
    const bool by_rows = f->layout == QUANT_BY_ROWS, awq = f->layout == QUANT_AWQ;
    char *module = gemma_module(l->spec);
    assert_non_null(module);
    const bool spoiled = f->spoiled && !strcmp(module, f->spoiled);
    put_codes(f, m, l,
              by_rows ? add(o, module, QUANT_PACKED, DTYPE_I32, 2, rows, words)
              : awq   ? add(o, module, QUANT_QWEIGHT, DTYPE_I32, 2, cols, zero_words)
                      : add(o, module, QUANT_QWEIGHT, DTYPE_I32, 2, words, rows));
    put_scales(f, m, l,
               by_rows ? add(o, module, QUANT_SCALE, f->scales, 2, rows, groups)
                       : add(o, module, QUANT_SCALES, f->scales, 2, groups, rows),
               spoiled);
    if (by_rows) {
        int64_t *shape = add(o, module, QUANT_SHAPE, DTYPE_I64, 1, 2, 0);
        shape[0] = rows;
        shape[1] = cols;
    }
    if ((l->zeros || !by_rows) && !(spoiled && f->no_zeros))
        put_zeros(f, m, l,
                  by_rows ? add(o, module, QUANT_ZERO, DTYPE_I32, 2, zero_words, groups)
                          : add(o, module, QUANT_QZEROS, DTYPE_I32, 2, groups, zero_words),
                  spoiled);
    if (f->g_idx) {
        int32_t *index = add(o, module, by_rows ? QUANT_GROUP_INDEX : QUANT_G_IDX, DTYPE_I32, 1, cols, 0);
        for (int64_t c = 0; c < cols; c++)
            index[c] = (int32_t)(c / (cols / groups));
        if (spoiled && f->swap_g_idx)
            index[2] = 1;
    }
    free(module);
}

static void add_rest(const struct model *m, struct output *o)
{
    for (size_t i = 0; i < m->tensors.n; i++) {
        const struct gemma_tensor *spec = &m->tensors.list[i];
        const struct tensor *t = checkpoint_tensor(&m->checkpoint, spec->name);
        if (t)
            assert_ok(checkpoint_read(
                &m->checkpoint, t, 0, (size_t)t->bytes,
                add(o, spec->name, "", t->dtype, t->n_dims, t->shape[0], t->n_dims == 2 ? t->shape[1] : 0)));
    }
}

static void write_config(const struct foreign *f, const struct model *m, const char *folder)
{
    struct quant_config q = {.format = f->format, .layout = f->layout, .zero_bias = f->zero_bias};
    struct quant_group *group;
    struct text json = {0}, config = {0};
    char *path = file_join(folder, "config.json");
    assert_ok(quant_config_add_group(&q, m->quant.groups[0].scheme, &group));
    assert_ok(quant_config_add(&group->targets, &group->n_targets, "Linear"));
    quant_config_write(&q, &json);
    assert_ok(text_finish(&json));
    assert_ok(hf_config_splice(&m->config, json.data, &config));
    support_write(path, config.data, config.len);
    quant_config_free(&q);
    text_free(&json);
    text_free(&config);
    free(path);
}

void foreign_write(const struct foreign *f, const struct model *m, const char *folder)
{
    static struct output o;
    o = (struct output){0};
    assert_ok(file_make_folder(folder));
    assert_ok(writer_open(&o.w, folder, UINT64_MAX));
    for (size_t i = 0; i < m->n_linears; i++)
        add_linear(f, m, &m->linears[i], &o);
    add_rest(m, &o);
    assert_ok(writer_begin(o.w, false));
    for (size_t i = 0; i < o.n; i++) {
        assert_ok(writer_put(o.w, o.parts[i].id, 0, o.parts[i].data, o.parts[i].bytes));
        free(o.parts[i].data);
    }
    assert_ok(writer_index(o.w));
    assert_ok(writer_finish(o.w));
    writer_close(o.w);
    write_config(f, m, folder);
}

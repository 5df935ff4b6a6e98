#include "tests/unit/kernel_cases.h"

#include "tests/unit/naive.h"
#include "tests/unit/support.h"

#include <math.h>

enum { N_KINDS = 8, SLACK = 3 }; /* SLACK: elements between the end of a row and the next one */

bool kernel_case(size_t index, struct kernel_case *out)
{
    static const enum dtype dtypes[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
    static const struct scale_spec specs[] = {{SCALE_RANGE, false},  {SCALE_RANGE, true},
                                              {SCALE_ABSMAX, false}, {SCALE_ABSMAX, true},
                                              {SCALE_MSE, false},    {SCALE_MSE, true}};
    static const int64_t groups[] = {32, 64, 128, 256, 0};
    static const int64_t widths[] = {13, 100, 256, 640, 4100};
    const size_t n[] = {N_OF(dtypes), 2, 2, N_OF(specs), N_OF(groups), N_OF(widths)};
    size_t digit[N_OF(n)];
    for (size_t i = 0; i < N_OF(n); i++) {
        digit[i] = index % n[i];
        index /= n[i];
    }
    *out = (struct kernel_case){.dtype = dtypes[digit[0]],
                                .bits = digit[1] ? 8 : 4,
                                .symmetric = digit[2] == 0,
                                .spec = specs[digit[3]],
                                .group = groups[digit[4]],
                                .cols = widths[digit[5]],
                                .rows = N_KINDS + 1};
    return index == 0;
}

const char *kernel_case_text(const struct kernel_case *c)
{
    static char text[160];
    static const char *const rules[] = {
        [SCALE_RANGE] = "range", [SCALE_ABSMAX] = "absmax", [SCALE_MSE] = "mse"};
    snprintf(text, sizeof text, "%s %d × %d, %d bits%s, group %d, %s%s", dtype_name(c->dtype), (int)c->rows,
             (int)c->cols, c->bits, c->symmetric ? "" : " asymmetric", (int)c->group, rules[c->spec.rule],
             c->spec.positive_only ? ", positive" : "");
    return text;
}

/* F16 has neither BF16's huge nor its tiny values; what is out of its range is brought in. */
static double made_up(int64_t kind, int64_t col, bool f16, uint64_t *state)
{
    const double u = support_uniform(state), v = support_uniform(state);
    switch (kind) {
    case 0:
        return 0.05 * (u + v);
    case 1:
        return fabs(u) * 0.3 + 1e-3;
    case 2:
        return -fabs(u);
    case 3:
        return 0;
    case 4:
        return u * (f16 ? 0x1p-22 : 0x1p-130); /* subnormal */
    case 5:
        return u * (f16 ? 6e4 : 1e38);
    case 6:
        return col % 29 == 7 ? 30 * v : 0.01 * u;
    default:
        return col % 32 == 0 ? -8 : nearbyint(u * 15) / 2; /* quotients that lie halfway */
    }
}

static void put(const struct mat *m, int64_t row, int64_t col, double value)
{
    const int64_t at = row * m->stride + col;
    if (m->dtype == DTYPE_F32)
        ((float *)m->data)[at] = (float)value;
    else
        ((uint16_t *)m->data)[at] = naive_bits16(value, m->dtype == DTYPE_F16 ? 5 : 8);
}

static void *room(struct kernel_data *d, int which, int64_t elements, size_t size)
{
    d->memory[which] = malloc((size_t)elements * size);
    assert_non_null(d->memory[which]);
    memset(d->memory[which], 0x5a, (size_t)elements * size);
    return d->memory[which];
}

void kernel_data_make(struct kernel_data *d, const struct kernel_case *c)
{
    const int64_t rows = c->rows, cols = c->cols, stride = cols + SLACK, group = c->group ? c->group : cols;
    const int64_t words = (cols * c->bits + 31) / 32, groups = (cols + group - 1) / group;
    *d = (struct kernel_data){.weights = {NULL, c->dtype, rows, cols, stride},
                              .q = {.packed = {NULL, DTYPE_I32, rows, words, words + SLACK},
                                    .scales = {NULL, DTYPE_BF16, rows, groups, groups + SLACK},
                                    .zeros = {NULL, DTYPE_I8, rows, groups, groups + SLACK},
                                    .bits = c->bits,
                                    .group = group,
                                    .cols = cols},
                              .restored = {NULL, DTYPE_BF16, rows, cols, stride}};
    d->weights.data = room(d, 0, rows * stride, dtype_bytes(c->dtype));
    d->q.packed.data = room(d, 1, rows * (words + SLACK), 4);
    d->q.scales.data = room(d, 2, rows * (groups + SLACK), 2);
    if (!c->symmetric)
        d->q.zeros.data = room(d, 3, rows * (groups + SLACK), 1);
    d->restored.data = room(d, 4, rows * stride, 2);
    uint64_t state = 1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < cols; k++)
            put(&d->weights, r, k, made_up(r % N_KINDS, k, c->dtype == DTYPE_F16, &state));
    for (int64_t k = 32; k < 64 && k < cols; k++) /* zeros between groups that are not */
        put(&d->weights, 0, k, 0);
}

void kernel_data_free(struct kernel_data *d)
{
    for (size_t i = 0; i < N_OF(d->memory); i++)
        free(d->memory[i]);
    *d = (struct kernel_data){0};
}

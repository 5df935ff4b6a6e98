#include "cli/human.h"

#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct human human_bytes(uint64_t bytes)
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
    struct human h;
    if (bytes < 1000) {
        snprintf(h.s, sizeof h.s, "%d B", (int)bytes);
        return h;
    }
    double v = (double)bytes;
    size_t unit = 0;
    while (v >= 999.5) { /* what would be printed as 1000 belongs to the next unit */
        v /= 1000;
        unit++;
    }
    snprintf(h.s, sizeof h.s, v < 99.95 ? "%.1f %s" : "%.0f %s", v, units[unit]);
    return h;
}

struct human human_seconds(double seconds)
{
    struct human h;
    if (!(seconds >= 0 && seconds < 1e12)) {
        snprintf(h.s, sizeof h.s, "?");
        return h;
    }
    const long long s = llround(seconds);
    if (seconds < 0.0995)
        snprintf(h.s, sizeof h.s, "%.0f ms", seconds * 1000);
    else if (seconds < 9.95)
        snprintf(h.s, sizeof h.s, "%.1f s", seconds);
    else if (s < 60)
        snprintf(h.s, sizeof h.s, "%lld s", s);
    else if (s < 3600)
        snprintf(h.s, sizeof h.s, "%lld min %02lld s", s / 60, s % 60);
    else
        snprintf(h.s, sizeof h.s, "%lld h %02lld min", s / 3600, s % 3600 / 60);
    return h;
}

/* The character at s and its length in bytes; a byte that is no valid start or sequence counts as itself. */
static uint32_t decode(const char *s, size_t *n_bytes)
{
    const unsigned char *u = (const unsigned char *)s;
    const size_t n = u[0] < 0xc2 ? 1 : u[0] < 0xe0 ? 2 : u[0] < 0xf0 ? 3 : u[0] < 0xf5 ? 4 : 1;
    uint32_t c = n == 1 ? u[0] : u[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((u[i] & 0xc0) != 0x80) {
            *n_bytes = 1;
            return u[0];
        }
        c = c << 6 | (u[i] & 0x3f);
    }
    *n_bytes = n;
    return c;
}

/* The common ranges of Unicode's East Asian Width W and F, and of zero-width marks; not the full tables. */
static int char_width(uint32_t c)
{
    static const struct {
        uint32_t first, last;
        int width;
    } ranges[] = {
        {0x0300, 0x036f, 0},   {0x200b, 0x200f, 0},   {0x20d0, 0x20ff, 0},   {0xfe00, 0xfe0f, 0},
        {0x1100, 0x115f, 2},   {0x2e80, 0xa4cf, 2},   {0xac00, 0xd7a3, 2},   {0xf900, 0xfaff, 2},
        {0xfe30, 0xfe6f, 2},   {0xff00, 0xff60, 2},   {0xffe0, 0xffe6, 2},   {0x1f300, 0x1f64f, 2},
        {0x1f680, 0x1f6ff, 2}, {0x1f900, 0x1f9ff, 2}, {0x20000, 0x3fffd, 2},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (c >= ranges[i].first && c <= ranges[i].last)
            return ranges[i].width;
    return 1;
}

int human_width(const char *s)
{
    int width = 0;
    for (size_t n; *s; s += n)
        width += char_width(decode(s, &n));
    return width;
}

size_t human_fit(const char *s, int columns)
{
    const char *p = s;
    for (size_t n; *p; p += n) {
        columns -= char_width(decode(p, &n));
        if (columns < 0)
            break;
    }
    return (size_t)(p - s);
}

void human_clean(char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f)
            *s = '?';
}

void human_table_cell(struct human_table *t, const char *fmt, ...)
{
    char *cell = NULL;
    va_list args;
    va_start(args, fmt);
    const int n = vasprintf(&cell, fmt, args);
    va_end(args);
    if (n < 0)
        t->failed = true;
    if (t->failed || mem_grow(&t->cells, &t->capacity, t->n_cells + 1, sizeof *t->cells, "a table") < 0) {
        if (n >= 0)
            free(cell);
        t->failed = true;
        return;
    }
    human_clean(cell);
    t->cells[t->n_cells++] = cell;
}

static int column_width(const struct human_table *t, size_t column)
{
    int width = t->columns[column].title ? human_width(t->columns[column].title) : 0;
    for (size_t i = column; i < t->n_cells; i += t->n_columns) {
        const int w = human_width(t->cells[i]);
        width = w > width ? w : width;
    }
    return width;
}

/* One cell; padding that a left-aligned cell needs is owed to the next one, so that lines end without spaces. */
static void render_cell(struct text *out, const char *s, int width, bool right, int *owed)
{
    const int padding = width - human_width(s);
    const int before = *s ? *owed + (right ? padding : 0) : 0;
    text_printf(out, "%*s%s", before, "", s);
    if (*s)
        *owed = (right ? 0 : padding) + 2;
    else
        *owed += width + 2;
}

int human_table_render(const struct human_table *t, struct text *out)
{
    if (t->failed)
        return err_set(ERR_MEMORY, "out of memory for a table of %zu cells", t->n_cells);
    CHECK(t->n_columns > 0 && t->n_cells % t->n_columns == 0);
    int *widths = mem_alloc(t->n_columns, sizeof *widths, "a table");
    if (!widths)
        return ERR_MEMORY;
    bool header = false;
    for (size_t c = 0; c < t->n_columns; c++) {
        widths[c] = column_width(t, c);
        header = header || t->columns[c].title;
    }
    if (header) {
        int owed = 0;
        for (size_t c = 0; c < t->n_columns; c++) {
            const char *title = t->columns[c].title;
            render_cell(out, title ? title : "", widths[c], t->columns[c].right, &owed);
        }
        text_add(out, "\n");
    }
    for (size_t i = 0; i < t->n_cells; i += t->n_columns) {
        int owed = 0;
        for (size_t c = 0; c < t->n_columns; c++)
            render_cell(out, t->cells[i + c], widths[c], t->columns[c].right, &owed);
        text_add(out, "\n");
    }
    free(widths);
    return 0;
}

void human_table_free(struct human_table *t)
{
    for (size_t i = 0; i < t->n_cells; i++)
        free(t->cells[i]);
    free(t->cells);
    t->cells = NULL;
    t->n_cells = t->capacity = 0;
}

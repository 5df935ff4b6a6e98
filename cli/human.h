/* Text for people: numbers with units, the width of UTF-8 text in terminal columns, small tables. Everything
 * here only makes text; nothing prints. Machine-readable output is written with base/text.h instead. */
#ifndef GEMCUT_CLI_HUMAN_H
#define GEMCUT_CLI_HUMAN_H

#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Returned by value, so that a call can stand among printf's arguments: human_bytes(n).s */
struct human {
    char s[64];
};

/* "8.6 GB": decimal SI units, as storage is sold and as file managers show it. */
struct human human_bytes(uint64_t bytes);

/* "35 ms", "4.2 s", "12 s", "3 min 05 s", "2 h 14 min"; "?" when negative or not finite. */
struct human human_seconds(double seconds);

/* Columns that s takes on a terminal: combining marks 0, East Asian wide characters and emoji 2. */
int human_width(const char *s);

/* Bytes of the longest beginning of s that fits into `columns`; never cuts a character. */
size_t human_fit(const char *s, int columns);

/* Replaces control bytes by '?': names from files must not break lines or drive the terminal. */
void human_clean(char *s);

/* Cells are added row by row. Allocation failures are sticky and reported by human_table_render. */
struct human_column {
    const char *title; /* all NULL: no header line */
    bool right;        /* aligned to the right */
};

struct human_table {
    const struct human_column *columns; /* [n_columns], outlives the table */
    size_t n_columns;
    char **cells;
    size_t n_cells, capacity;
    bool failed;
};

void human_table_cell(struct human_table *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Appends the table to `out`, two spaces between columns, no space at line ends. The last row must be complete.
 * 0 or ERR_MEMORY. */
int human_table_render(const struct human_table *t, struct text *out);
void human_table_free(struct human_table *t);

#endif

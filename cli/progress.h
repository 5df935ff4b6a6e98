/* How far a long job is, on stderr. On a terminal one line is redrawn at most 6 times a second and removed at the
 * end; elsewhere there is one line for each progress_block. One job at a time. The functions may be called from
 * any thread and are cheap: an update that comes too early, or while another thread draws, only counts. */
#ifndef GEMCUT_CLI_PROGRESS_H
#define GEMCUT_CLI_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

enum progress_unit { PROGRESS_BYTES, PROGRESS_ITEMS };

/* silent: no progress at all. fake_terminal: draw although stderr is no terminal. Before threads start. */
void progress_setup(bool silent, bool fake_terminal);

/* Starts a job of `total` units, 0 when that is not known; ends the one before. */
void progress_begin(const char *label, enum progress_unit unit, uint64_t total);

/* `done` units so far; the largest value counts. detail: what is being worked on; NULL leaves it as it was. */
void progress_update(uint64_t done, const char *detail);

/* `amount` more units are done. */
void progress_advance(uint64_t amount, const char *detail);

/* A milestone, such as a finished block: a line of its own where stderr is no terminal, else the detail. */
void progress_block(const char *text);

/* Whether there is a terminal to draw on. */
bool progress_terminal(void);

/* Removes the line from the terminal. Nothing happens when no job runs. */
void progress_end(void);

/* Writes a whole line to stderr, around the progress line when there is one. */
void progress_print_line(const char *line);

#endif

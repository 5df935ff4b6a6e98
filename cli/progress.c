#include "cli/progress.h"

#include "base/clock.h"
#include "cli/human.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LABEL_BYTES = 64, DETAIL_BYTES = 256, FALLBACK_COLUMNS = 100 };

static const double DRAW_INTERVAL = 1.0 / 6; /* seconds */

static struct {
    pthread_mutex_t lock; /* over everything here but `done` */
    bool silent, terminal, fake;
    bool active;
    char label[LABEL_BYTES], detail[DETAIL_BYTES];
    enum progress_unit unit;
    uint64_t total;
    double started, next_draw;
    int drawn; /* columns of the line that stands on the terminal */
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

static _Atomic uint64_t done;

static void copy(char *to, size_t size, const char *from)
{
    snprintf(to, size, "%s", from);
    human_clean(to);
}

static int terminal_columns(void)
{
    struct winsize size;
    if (!state.fake && ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        return size.ws_col;
    return FALLBACK_COLUMNS;
}

static int percent(uint64_t n)
{
    if (!state.total || n >= state.total)
        return state.total ? 100 : 0;
    return (int)((double)n / (double)state.total * 100);
}

/* Seconds that the rest takes at the mean rate so far; negative while that is not known. */
static double seconds_left(uint64_t n, double elapsed)
{
    if (!state.total || !n || elapsed < 1)
        return -1;
    return n < state.total ? elapsed / (double)n * (double)(state.total - n) : 0;
}

static void add_amounts(struct text *line, uint64_t n, double elapsed)
{
    if (state.total)
        text_printf(line, " %3d%%", percent(n));
    if (state.unit == PROGRESS_BYTES)
        text_printf(line, "  %s", human_bytes(n).s);
    else
        text_printf(line, "  %llu", (unsigned long long)n);
    if (state.total && state.unit == PROGRESS_BYTES)
        text_printf(line, " of %s", human_bytes(state.total).s);
    else if (state.total)
        text_printf(line, " of %llu", (unsigned long long)state.total);
    if (elapsed >= 1 && state.unit == PROGRESS_BYTES)
        text_printf(line, "  %s/s", human_bytes((uint64_t)((double)n / elapsed)).s);
    else if (elapsed >= 1)
        text_printf(line, "  %.1f/s", (double)n / elapsed);
    const double left = seconds_left(n, elapsed);
    if (left >= 0)
        text_printf(line, "  %s left", human_seconds(left).s);
}

/* Spaces over the old line rather than an escape sequence: any terminal understands them. */
static void erase(void)
{
    if (state.drawn)
        fprintf(stderr, "\r%*s\r", state.drawn, "");
    state.drawn = 0;
}

static void draw(double now)
{
    const uint64_t n = atomic_load_explicit(&done, memory_order_relaxed);
    struct text line = {0};
    text_add(&line, state.label);
    add_amounts(&line, n, now - state.started);
    if (*state.detail)
        text_printf(&line, "  %s", state.detail);
    if (text_finish(&line) == 0) {
        /* the last column stays free: some terminals wrap as soon as it is written */
        line.data[human_fit(line.data, terminal_columns() - 1)] = '\0';
        const int width = human_width(line.data);
        fprintf(stderr, "\r%s%*s", line.data, state.drawn > width ? state.drawn - width : 0, "");
        state.drawn = state.drawn > width ? state.drawn : width;
    }
    text_free(&line);
    state.next_draw = now + DRAW_INTERVAL;
}

/* Called with the lock held. */
static void draw_if_due(void)
{
    if (!state.active || state.silent || !state.terminal)
        return;
    const double now = clock_seconds();
    if (now >= state.next_draw)
        draw(now);
}

bool progress_terminal(void)
{
    return state.terminal && !state.silent;
}

void progress_setup(bool silent, bool fake_terminal)
{
    pthread_mutex_lock(&state.lock);
    state.silent = silent;
    state.fake = fake_terminal;
    state.terminal = fake_terminal || isatty(STDERR_FILENO);
    pthread_mutex_unlock(&state.lock);
}

void progress_begin(const char *label, enum progress_unit unit, uint64_t total)
{
    pthread_mutex_lock(&state.lock);
    erase();
    copy(state.label, sizeof state.label, label);
    state.detail[0] = '\0';
    state.unit = unit;
    state.total = total;
    state.started = clock_seconds();
    state.next_draw = 0;
    state.active = true;
    atomic_store(&done, 0);
    draw_if_due();
    pthread_mutex_unlock(&state.lock);
}

/* When another thread holds the lock it is drawing, and this update waits for nobody. */
static void refresh(const char *detail)
{
    if (pthread_mutex_trylock(&state.lock) != 0)
        return;
    if (detail)
        copy(state.detail, sizeof state.detail, detail);
    draw_if_due();
    pthread_mutex_unlock(&state.lock);
}

void progress_update(uint64_t n, const char *detail)
{
    uint64_t seen = atomic_load_explicit(&done, memory_order_relaxed);
    while (seen < n && !atomic_compare_exchange_weak(&done, &seen, n)) {
    }
    refresh(detail);
}

void progress_advance(uint64_t amount, const char *detail)
{
    atomic_fetch_add_explicit(&done, amount, memory_order_relaxed);
    refresh(detail);
}

void progress_block(const char *text)
{
    pthread_mutex_lock(&state.lock);
    copy(state.detail, sizeof state.detail, text);
    if (state.active && !state.silent && !state.terminal) {
        const uint64_t n = atomic_load(&done);
        const double left = seconds_left(n, clock_seconds() - state.started);
        char amount[96] = "";
        if (state.total && left > 0)
            snprintf(amount, sizeof amount, " (%d%%, %s left)", percent(n), human_seconds(left).s);
        else if (state.total)
            snprintf(amount, sizeof amount, " (%d%%)", percent(n));
        fprintf(stderr, "%s: %s%s\n", state.label, state.detail, amount);
    }
    draw_if_due();
    pthread_mutex_unlock(&state.lock);
}

void progress_end(void)
{
    pthread_mutex_lock(&state.lock);
    erase();
    state.active = false;
    pthread_mutex_unlock(&state.lock);
}

void progress_print_line(const char *line)
{
    pthread_mutex_lock(&state.lock);
    erase();
    fprintf(stderr, "%s\n", line);
    state.next_draw = 0; /* the progress line comes back with the next update */
    pthread_mutex_unlock(&state.lock);
}

/* Time for reports and progress; never for decisions that change a result. */
#ifndef GEMCUT_BASE_CLOCK_H
#define GEMCUT_BASE_CLOCK_H

/* Monotonic seconds since an arbitrary start. */
double clock_seconds(void);

#endif

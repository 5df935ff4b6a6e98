/* The options about the machine that the commands share: on which device, with how many threads and how much memory. */
#ifndef GEMCUT_CLI_MACHINE_H
#define GEMCUT_CLI_MACHINE_H

#include "cli/opt.h"
#include "kernels/backend.h"

/* A member of a command's argument struct. */
struct machine_options {
    const char *device; /* as given */
    int64_t threads;
    uint64_t memory;              /* 0: no limit */
    char name[DEVICE_TEXT_BYTES]; /* the device that it is, from machine_begin */
    char title[DEVICE_TEXT_BYTES];
};

/* The rows of the option table for member `m` of struct `s`. */
#define MACHINE_OPTS(s, m)                                                                                   \
    {OPT_SECTION("Machine")},                                                                                \
        {.name = "device",                                                                                   \
         OPT_TO_STRING(s, m.device),                                                                         \
         .value = "DEVICE",                                                                                  \
         .initial = "auto",                                                                                  \
         .help = "auto, cpu or cuda:N; auto is the first GPU, without one the CPU"},                         \
        {.name = "threads",                                                                                  \
         OPT_TO_INT(s, m.threads),                                                                           \
         .value = "N",                                                                                       \
         .min = 0,                                                                                           \
         .max = 1024,                                                                                        \
         .initial = "0",                                                                                     \
         .help = "0 = one for each processor; the result is the same with any number"},                      \
    {                                                                                                        \
        .name = "memory", OPT_TO_SIZE(s, m.memory), .value = "SIZE", .initial_note = "what is free",         \
        .max = INT64_MAX,                                                                                    \
        .help = "of the device's memory, what weights and activations may take at most, e.g. 20GiB"          \
    }

/* Finds the device and sets the memory budget. */
int machine_begin(struct machine_options *m);

#endif

/* The commands. Each lives in a file of its own, reads its options with cmd_begin and returns CMD_DONE, CMD_NO or
 * a negative error, which main.c reports: commands never print errors and never exit. argv[0] is the name of the
 * command. */
#ifndef GEMCUT_CLI_CMD_H
#define GEMCUT_CLI_CMD_H

#include "cli/opt.h"
#include "cli/output.h"

enum cmd_result {
    CMD_DONE = 0,
    CMD_NO = 1,     /* ran, and the answer is no */
    CMD_HELPED = 2, /* from cmd_begin alone: help was printed, nothing is left to do */
};

/* Parses argv into args and takes over its output options. 0: go on; otherwise the command returns the value,
 * after freeing its lists. */
int cmd_begin(const struct opt_spec *spec, int argc, char **argv, void *args,
              const struct output_options *output);

int cmd_quantize(int argc, char **argv);
int cmd_convert(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_calib(int argc, char **argv);
int cmd_bench(int argc, char **argv);

#endif

/* The program: finds the command, and is the only place that turns its outcome into an exit code. */
#include "base/err.h"
#include "base/log.h"
#include "cli/cmd.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static int cmd_help(int argc, char **argv);

struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *summary;
};

static const struct command commands[] = {
    {"quantize", cmd_quantize, "cut a BF16 checkpoint to 4-bit weights"},
    {"convert", cmd_convert, "pack a cut into another format, without quantizing again"},
    {"inspect", cmd_inspect, "show what a checkpoint holds"},
    {"verify", cmd_verify, "check that a cut is what it says, and how far it is from the original"},
    {"eval", cmd_eval, "measure a model: perplexity"},
    {"generate", cmd_generate, "run a model, BF16 or cut"},
    {"bench", cmd_bench, "measure speed here, beside what the machine can do"},
    {"calib", cmd_calib, "show what calibration would be fed from a file"},
    {"help", cmd_help, "explain a command"},
};

enum { N_COMMANDS = sizeof commands / sizeof *commands };

struct main_args {
    bool version;
};

static const struct opt main_opts[] = {
    {.name = "version", OPT_TO_FLAG(struct main_args, version), .help = "print the version"},
};

static const struct opt_spec main_spec = {.command = "gemcut", .opts = main_opts, .n_opts = 1};

int cmd_begin(const struct opt_spec *spec, int argc, char **argv, void *args,
              const struct output_options *output)
{
    int rc = opt_parse(spec, argc, argv, args);
    if (rc == OPT_HELP) {
        struct text t = {0};
        opt_help(spec, &t);
        rc = output_print_always(&t);
        return rc < 0 ? rc : CMD_HELPED;
    }
    return rc < 0 ? rc : output_configure(output);
}

static int print_main_help(void)
{
    struct text t = {0};
    text_add(&t, "Usage: gemcut COMMAND [arguments]\n\n"
                 "Cuts BF16 Gemma checkpoints to 4-bit weights, checks the result and runs it.\n\n"
                 "Commands:\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        text_printf(&t, "  %-26s%s\n", commands[i].name, commands[i].summary);
    opt_help_options(&main_spec, &t);
    text_add(&t, "\n'gemcut help COMMAND' or 'gemcut COMMAND --help' explains a command.\n"
                 "Exit code: 0 done, 1 ran and the answer is no, 2 wrong usage, 3 could not.\n");
    return output_print_always(&t);
}

static const struct command *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (!strcmp(commands[i].name, name))
            return &commands[i];
    const char *known[N_COMMANDS];
    for (size_t i = 0; i < N_COMMANDS; i++)
        known[i] = commands[i].name;
    struct text t = {0};
    text_printf(&t, "unknown command '%s'", name);
    opt_suggest(&t, name, "", known, N_COMMANDS);
    if (text_finish(&t) == 0)
        err_set(ERR_USAGE, "%s", t.data);
    text_free(&t);
    return NULL;
}

struct help_args {
    const char *command;
};

static int cmd_help(int argc, char **argv)
{
    static const struct opt_arg positional[] = {
        {.name = "COMMAND",
         .optional = true,
         .offset = OPT_OFFSET(struct help_args, command, const char *),
         .help = "what to explain; without it the commands are listed"},
    };
    static const struct opt_spec spec = {
        .command = "gemcut help", .summary = "Explains a command.", .args = positional, .n_args = 1};
    struct help_args args = {0};
    const struct output_options output = {0};
    const int rc = cmd_begin(&spec, argc, argv, &args, &output);
    if (rc != 0)
        return rc;
    if (!args.command)
        return print_main_help();
    const struct command *c = find_command(args.command);
    if (!c)
        return ERR_USAGE;
    char help[] = "--help";
    char *words[] = {argv[1], help, NULL};
    return c->run(2, words);
}

/* `gemcut --help` and `gemcut --version`; word: the first argument, which starts with '-'. */
static int run_main_option(char *program, char *word)
{
    char *words[] = {program, word, NULL};
    struct main_args args = {0};
    const int rc = opt_parse(&main_spec, 2, words, &args);
    if (rc == OPT_HELP)
        return print_main_help();
    if (rc < 0)
        return rc;
    if (!args.version)
        return err_set(ERR_USAGE, "expected a command before '%s'", word);
    struct text t = {0};
    text_add(&t, "gemcut " GEMCUT_VERSION "\n");
    return output_print_always(&t);
}

/* Errors in the command line must already know whether they are to be JSON, before it is parsed. */
static bool asks_for_json(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--json"))
            return true;
    return false;
}

static int run(int argc, char **argv)
{
    output_start(NULL, asks_for_json(argc, argv));
    if (argc < 2)
        return err_set(ERR_USAGE,
                       "expected a command; usage: gemcut COMMAND [arguments], see 'gemcut --help'");
    if (argv[1][0] == '-')
        return run_main_option(argv[0], argv[1]);
    const struct command *c = find_command(argv[1]);
    if (!c)
        return ERR_USAGE;
    output_start(c->name, output_json());
    return c->run(argc - 1, argv + 1);
}

/* Only a request; the second signal finds the default action and ends the program at once. */
static void on_signal(int number)
{
    (void)number;
    err_request_interrupt();
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}

static void install_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    const int numbers[] = {SIGINT, SIGTERM};
    for (size_t i = 0; i < 2; i++) {
        struct sigaction old;
        /* a parent that had it ignored, such as nohup or a shell's background job, goes on being obeyed */
        if (sigaction(numbers[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            sigaction(numbers[i], &action, NULL);
    }
    signal(SIGXFSZ, SIG_IGN); /* a limit on file sizes is a failed write too */
    signal(SIGPIPE, SIG_IGN); /* a reader that went away is a failed write, reported as such */
}

/* A standard stream that the caller closed would be taken by the next file opened, and that file would get our
 * messages. /dev/null for reading holds the place: reads end, writes fail and are noticed. */
static int hold_standard_streams(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF && open("/dev/null", O_RDONLY) != fd)
            return err_errno("/dev/null");
    return 0;
}

int main(int argc, char **argv)
{
    int rc = hold_standard_streams();
    install_signals();
    log_set_sink(output_warning, NULL);
    if (rc == 0)
        rc = run(argc, argv);
    return (int)output_finish(rc == CMD_HELPED ? 0 : rc);
}

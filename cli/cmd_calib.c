/* gemcut calib: what calibration would be fed from a file. */
#include "cli/cmd.h"

#include "base/err.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/mem.h"
#include "calib/dataset.h"
#include "cli/human.h"
#include "formats/utf8.h"
#include "runtime/gemma.h"

#include <stdlib.h>
#include <string.h>

enum { N_FIRST = 5, FIRST_COLUMNS = 72 };

struct args {
    const char *file, *model;
    int64_t samples, length, seed;
    int order;
    struct output_options output;
};

static const char *const orders[] = {"shuffle", "file", NULL};

static const struct opt_arg positional[] = {
    {.name = "FILE",
     .offset = OPT_OFFSET(struct args, file, const char *),
     .help = "text: .txt, .jsonl (\"text\" or \"messages\"), either also with .zst; builtin = the "
             "mixture of prose, languages, code and conversations that ships with gemcut"},
};

static const struct opt options[] = {
    {.name = "model",
     OPT_TO_STRING(struct args, model),
     .value = "MODEL",
     .help =
         "whose tokens are counted: a folder, or org/name in the Hugging Face cache; only config.json and "
         "tokenizer.json are read"},
    {.name = "samples",
     OPT_TO_INT(struct args, samples),
     .value = "N",
     .initial = "128",
     .min = 1,
     .max = 1000000,
     .help = "pieces of text, each run by itself"},
    {.name = "length",
     OPT_TO_INT(struct args, length),
     .value = "N",
     .initial = "2048",
     .min = 2,
     .max = 1000000,
     .help = "tokens of a sample"},
    {.name = "order",
     OPT_TO_CHOICE(struct args, order),
     .value = "ORDER",
     .choices = orders,
     .initial = "shuffle",
     .help = "of the documents: shuffle, by --seed, or file, as they come"},
    {.name = "seed",
     OPT_TO_INT(struct args, seed),
     .value = "N",
     .initial = "0",
     .min = 0,
     .max = INT64_MAX,
     .help = "same seed, same order"},
    OUTPUT_OPTS(struct args, output),
};

static const struct opt_spec spec = {
    .command = "gemcut calib",
    .summary =
        "Shows what calibration would be fed from a file: documents, <bos> before each, one after another, "
        "cut into samples of equal length. Too little text for them is an error.",
    .args = positional,
    .n_args = 1,
    .opts = options,
    .n_opts = sizeof options / sizeof *options,
    .epilogue = "Examples:\n"
                "  gemcut calib c4.jsonl.zst --model gemma-3-4b-it\n"
                "  gemcut calib builtin --model gemma-3-4b-it --samples 4 --length 1024\n",
};

/* --- scripts -------------------------------------------------------------------------------------------------- */

/* Blocks of letters and what to call them; a block's own digits and signs count along. Common digits, punctuation,
 * symbols and combining marks are in none. Ascending. Source: Unicode 15, Blocks.txt. */
static const struct block {
    uint32_t first, last;
    const char *script;
} blocks[] = {
    {0x41, 0x5a, "Latin"},        {0x61, 0x7a, "Latin"},        {0xc0, 0xd6, "Latin"},
    {0xd8, 0xf6, "Latin"},        {0xf8, 0x2af, "Latin"},       {0x370, 0x3ff, "Greek"},
    {0x400, 0x52f, "Cyrillic"},   {0x531, 0x58a, "Armenian"},   {0x5d0, 0x5f4, "Hebrew"},
    {0x620, 0x6ff, "Arabic"},     {0x700, 0x74f, "other"},      {0x750, 0x77f, "Arabic"},
    {0x780, 0x89f, "other"},      {0x8a0, 0x8ff, "Arabic"},     {0x900, 0x97f, "Devanagari"},
    {0x980, 0x9ff, "Bengali"},    {0xa00, 0xa7f, "Gurmukhi"},   {0xa80, 0xaff, "Gujarati"},
    {0xb00, 0xb7f, "other"},      {0xb80, 0xbff, "Tamil"},      {0xc00, 0xc7f, "Telugu"},
    {0xc80, 0xcff, "Kannada"},    {0xd00, 0xd7f, "Malayalam"},  {0xd80, 0xdff, "Sinhala"},
    {0xe00, 0xe7f, "Thai"},       {0xe80, 0xeff, "Lao"},        {0xf00, 0xfff, "Tibetan"},
    {0x1000, 0x109f, "Myanmar"},  {0x10a0, 0x10ff, "Georgian"}, {0x1100, 0x11ff, "Hangul"},
    {0x1200, 0x139f, "Ethiopic"}, {0x13a0, 0x177f, "other"},    {0x1780, 0x17ff, "Khmer"},
    {0x1800, 0x1c7f, "other"},    {0x1c80, 0x1c8f, "Cyrillic"}, {0x1c90, 0x1cbf, "Georgian"},
    {0x1d00, 0x1dbf, "Latin"},    {0x1e00, 0x1eff, "Latin"},    {0x1f00, 0x1fff, "Greek"},
    {0x2c60, 0x2c7f, "Latin"},    {0x2d00, 0x2d2f, "Georgian"}, {0x2d30, 0x2d7f, "other"},
    {0x2d80, 0x2ddf, "Ethiopic"}, {0x2de0, 0x2dff, "Cyrillic"}, {0x3041, 0x309f, "Kana"},
    {0x30a1, 0x30ff, "Kana"},     {0x3105, 0x312f, "other"},    {0x3131, 0x318f, "Hangul"},
    {0x31f0, 0x31ff, "Kana"},     {0x3400, 0x4dbf, "Han"},      {0x4e00, 0x9fff, "Han"},
    {0xa000, 0xa63f, "other"},    {0xa640, 0xa69f, "Cyrillic"}, {0xa722, 0xa7ff, "Latin"},
    {0xa800, 0xabff, "other"},    {0xac00, 0xd7ff, "Hangul"},   {0xf900, 0xfaff, "Han"},
    {0xfb00, 0xfb06, "Latin"},    {0xfb1d, 0xfb4f, "Hebrew"},   {0xfb50, 0xfdff, "Arabic"},
    {0xfe70, 0xfefe, "Arabic"},   {0xff21, 0xff3a, "Latin"},    {0xff41, 0xff5a, "Latin"},
    {0xff66, 0xff9f, "Kana"},     {0xffa0, 0xffdc, "Hangul"},   {0x10280, 0x1afff, "other"},
    {0x1b000, 0x1b16f, "Kana"},   {0x1e000, 0x1e8df, "other"},  {0x20000, 0x323af, "Han"},
};

enum { N_BLOCKS = sizeof blocks / sizeof *blocks };

struct script {
    const char *name;
    uint64_t letters;
};

struct scripts {
    struct script list[N_BLOCKS]; /* most letters first */
    size_t n;
    uint64_t letters;
};

/* The block of a code point, or -1. */
static int find_block(uint32_t cp)
{
    int low = 0, high = N_BLOCKS;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (cp > blocks[middle].last)
            low = middle + 1;
        else
            high = middle;
    }
    return low < N_BLOCKS && cp >= blocks[low].first ? low : -1;
}

static void add_letters(struct scripts *s, const char *name, uint64_t letters)
{
    size_t i = 0;
    while (i < s->n && strcmp(s->list[i].name, name))
        i++;
    if (i == s->n)
        s->list[s->n++] = (struct script){.name = name};
    s->list[i].letters += letters;
    s->letters += letters;
}

static int by_letters(const void *a, const void *b)
{
    const struct script *x = a, *y = b;
    if (x->letters != y->letters)
        return x->letters < y->letters ? 1 : -1;
    return strcmp(x->name, y->name);
}

static void count_scripts(struct scripts *s, const char *text, size_t len)
{
    uint64_t letters[N_BLOCKS] = {0};
    uint32_t cp = 0;
    for (size_t at = 0, n; at < len; at += n) {
        n = utf8_decode((const uint8_t *)text + at, len - at, &cp);
        const int block = n ? find_block(cp) : -1;
        if (block >= 0)
            letters[block]++;
        n = n ? n : 1;
    }
    *s = (struct scripts){0};
    for (size_t i = 0; i < N_BLOCKS; i++)
        if (letters[i])
            add_letters(s, blocks[i].script, letters[i]);
    qsort(s->list, s->n, sizeof *s->list, by_letters);
}

/* --- what there is to tell ------------------------------------------------------------------------------------- */

struct summary {
    const struct args *args;
    const struct documents *documents;
    const struct dataset *dataset;
    struct scripts scripts;
    size_t n_empty, n_chats_used;
    size_t min, max; /* tokens of a document that is used */
    double median;
    char hash[HASH_HEX_BYTES]; /* of the ids as little-endian int32 */
};

static int compare_sizes(const void *a, const void *b)
{
    const size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x > y) - (x < y);
}

static int measure_documents(struct summary *s)
{
    const struct dataset *d = s->dataset;
    size_t *tokens = mem_alloc(d->n_used, sizeof *tokens, "document lengths");
    if (!tokens)
        return ERR_MEMORY;
    for (size_t i = 0; i < d->n_used; i++) {
        tokens[i] = d->used[i].n_tokens;
        s->n_chats_used += s->documents->list[d->used[i].document].is_chat;
    }
    qsort(tokens, d->n_used, sizeof *tokens, compare_sizes);
    s->min = tokens[0];
    s->max = tokens[d->n_used - 1];
    s->median = ((double)tokens[(d->n_used - 1) / 2] + (double)tokens[d->n_used / 2]) / 2;
    free(tokens);
    for (size_t i = 0; i < s->documents->n; i++)
        s->n_empty += !s->documents->list[i].len;
    return 0;
}

/* The scripts are those of the ids: what is fed, not what the documents would have gone on with. */
static int summarize(struct summary *s, const struct tokenizer *t)
{
    const struct dataset *d = s->dataset;
    const size_t n = (size_t)(d->samples * d->length);
    struct text text = {0};
    int rc = tokenizer_decode(t, d->ids, n, true, &text);
    if (!rc)
        count_scripts(&s->scripts, text.data ? text.data : "", text.len);
    text_free(&text);
    hash_to_hex(hash_bytes(d->ids, n * sizeof *d->ids), s->hash);
    return rc ? rc : measure_documents(s);
}

/* Appends a document's first line that is not blank, without white space around, cut to FIRST_COLUMNS. The first line
 * of a conversation says only who speaks. */
static int first_line(const struct document *d, struct text *out)
{
    size_t from = d->is_chat ? strcspn(d->text, "\n") : 0, to;
    while (from < d->len && strchr(" \t\r\n", d->text[from]))
        from++;
    for (to = from; to < d->len && d->text[to] != '\n';)
        to++;
    while (to > from && strchr(" \t\r", d->text[to - 1]))
        to--;
    char *line = mem_strndup(d->text + from, to - from);
    if (!line)
        return ERR_MEMORY;
    human_clean(line);
    const size_t fits = human_fit(line, FIRST_COLUMNS);
    text_append(out, line, fits);
    if (line[fits])
        text_add(out, "…");
    free(line);
    return text_finish(out);
}

/* --- text ----------------------------------------------------------------------------------------------------- */

static int tabulate_scripts(const struct summary *s, struct text *out)
{
    static const struct human_column columns[] = {{"script", false}, {"letters", true}, {"share", true}};
    struct human_table table = {.columns = columns, .n_columns = 3};
    for (size_t i = 0; i < s->scripts.n; i++) {
        const struct script *script = &s->scripts.list[i];
        human_table_cell(&table, "%s", script->name);
        human_table_cell(&table, "%llu", (unsigned long long)script->letters);
        human_table_cell(&table, "%.2f %%", 100 * (double)script->letters / (double)s->scripts.letters);
    }
    text_add(out, "\n");
    const int rc = s->scripts.n ? human_table_render(&table, out) : 0;
    human_table_free(&table);
    return rc;
}

static int tabulate_first(const struct summary *s, struct text *out)
{
    static const struct human_column columns[] = {{"line", true}, {"tokens", true}, {"begins with", false}};
    struct human_table table = {.columns = columns, .n_columns = 3};
    int rc = 0;
    for (size_t i = 0; !rc && i < s->dataset->n_used && i < N_FIRST; i++) {
        const struct dataset_use *use = &s->dataset->used[i];
        const struct document *d = &s->documents->list[use->document];
        struct text line = {0};
        rc = first_line(d, &line);
        human_table_cell(&table, "%zu", d->line);
        human_table_cell(&table, "%zu", use->n_tokens);
        human_table_cell(&table, "%s", line.data ? line.data : "");
        text_free(&line);
    }
    text_add(out, "\n");
    if (!rc)
        rc = human_table_render(&table, out);
    human_table_free(&table);
    return rc;
}

static int print_text(const struct summary *s)
{
    const struct args *a = s->args;
    struct text out = {0};
    text_printf(&out, "text       %s, ", a->file);
    if (a->order == 0)
        text_printf(&out, "shuffled with seed %lld\n", (long long)a->seed);
    else
        text_add(&out, "in file order\n");
    text_printf(&out, "tokens     %lld: %lld samples of %lld\n", (long long)(a->samples * a->length),
                (long long)a->samples, (long long)a->length);
    text_printf(&out, "documents  %zu of %zu", s->dataset->n_used, s->documents->n);
    if (s->n_chats_used)
        text_printf(&out, ", %zu of them conversations", s->n_chats_used);
    if (s->n_empty)
        text_printf(&out, "; %zu in the file %s empty", s->n_empty, s->n_empty == 1 ? "is" : "are");
    text_printf(&out, "\nlengths    %zu … %zu tokens, median %.10g\n", s->min, s->max, s->median);
    text_printf(&out, "hash       %s\n", s->hash);
    int rc = tabulate_scripts(s, &out);
    if (!rc)
        rc = tabulate_first(s, &out);
    if (rc < 0)
        text_free(&out);
    return rc < 0 ? rc : output_print(&out);
}

/* --- JSON ----------------------------------------------------------------------------------------------------- */

static void put_scripts(const struct summary *s, struct text *out)
{
    json_put_key(out, "scripts");
    json_begin_array(out);
    for (size_t i = 0; i < s->scripts.n; i++) {
        json_begin_object(out);
        json_kv_string(out, "script", s->scripts.list[i].name);
        json_kv_uint(out, "letters", s->scripts.list[i].letters);
        json_kv_double(out, "share", (double)s->scripts.list[i].letters / (double)s->scripts.letters);
        json_end_object(out);
    }
    json_end_array(out);
}

static int put_first(const struct summary *s, struct text *out)
{
    json_put_key(out, "first");
    json_begin_array(out);
    int rc = 0;
    for (size_t i = 0; !rc && i < s->dataset->n_used && i < N_FIRST; i++) {
        const struct dataset_use *use = &s->dataset->used[i];
        const struct document *d = &s->documents->list[use->document];
        struct text line = {0};
        rc = first_line(d, &line);
        json_begin_object(out);
        json_kv_uint(out, "line", d->line);
        json_kv_uint(out, "tokens", use->n_tokens);
        json_kv_bool(out, "chat", d->is_chat);
        json_kv_string(out, "text", line.data);
        json_end_object(out);
        text_free(&line);
    }
    json_end_array(out);
    return rc;
}

static int print_json(const struct summary *s)
{
    const struct args *a = s->args;
    struct text out = {0};
    output_json_begin(&out, NULL, &a->seed);
    json_kv_string(&out, "file", a->file);
    json_kv_string(&out, "model", a->model);
    json_kv_int(&out, "samples", a->samples);
    json_kv_int(&out, "length", a->length);
    json_kv_string(&out, "order", orders[a->order]);
    json_kv_int(&out, "tokens", a->samples * a->length);
    json_kv_string(&out, "hash", s->hash);
    json_kv_uint(&out, "documents", s->documents->n);
    json_kv_uint(&out, "documents_empty", s->n_empty);
    json_kv_uint(&out, "documents_used", s->dataset->n_used);
    json_kv_uint(&out, "conversations_used", s->n_chats_used);
    json_put_key(&out, "document_tokens");
    json_begin_object(&out);
    json_kv_uint(&out, "min", s->min);
    json_kv_double(&out, "median", s->median);
    json_kv_uint(&out, "max", s->max);
    json_end_object(&out);
    put_scripts(s, &out);
    const int rc = put_first(s, &out);
    if (rc < 0)
        text_free(&out);
    return rc < 0 ? rc : output_json_end(&out);
}

/* --- command -------------------------------------------------------------------------------------------------- */

/* What is needed of a model. */
struct vocabulary {
    char *folder;
    struct hf_config config;
    struct gemma_config gemma;
    struct tokenizer *tokenizer;
};

static int vocabulary_open(struct vocabulary *v, const char *model)
{
    *v = (struct vocabulary){0};
    int rc = checkpoint_find(&v->folder, model);
    if (!rc)
        rc = hf_config_open(&v->config, v->folder);
    if (!rc)
        rc = gemma_config_read(&v->gemma, &v->config);
    if (rc < 0)
        return rc;
    char *path = file_join(v->folder, "tokenizer.json");
    rc = path ? tokenizer_open(&v->tokenizer, path) : ERR_MEMORY;
    free(path);
    return rc;
}

static void vocabulary_close(struct vocabulary *v)
{
    tokenizer_close(v->tokenizer);
    gemma_config_free(&v->gemma);
    hf_config_close(&v->config);
    free(v->folder);
}

static int show(const struct args *a, const struct vocabulary *v)
{
    if (a->length > v->gemma.max_positions)
        return err_set(ERR_USAGE, "samples of %lld tokens are longer than the model's context of %lld",
                       (long long)a->length, (long long)v->gemma.max_positions);
    const struct dataset_options o = {
        .samples = a->samples, .length = a->length, .seed = (uint64_t)a->seed, .shuffle = a->order == 0};
    struct documents documents = {0};
    struct dataset dataset = {0};
    enum chat_format chat;
    int rc = chat_template_choose(&chat, &v->config, v->tokenizer);
    if (!rc)
        rc = documents_read(&documents, a->file, chat);
    if (!rc)
        rc = dataset_make(&dataset, v->tokenizer, &documents, &o, v->gemma.vocab_size, a->file);
    struct summary s = {.args = a, .documents = &documents, .dataset = &dataset};
    if (!rc)
        rc = summarize(&s, v->tokenizer);
    if (!rc)
        rc = output_json() ? print_json(&s) : print_text(&s);
    dataset_free(&dataset);
    documents_free(&documents);
    return rc;
}

int cmd_calib(int argc, char **argv)
{
    struct args a = {0};
    int rc = cmd_begin(&spec, argc, argv, &a, &a.output);
    if (rc)
        return rc;
    if (!a.model)
        return err_set(ERR_USAGE, "expected --model MODEL, whose tokenizer the text is read with");
    struct vocabulary v;
    rc = vocabulary_open(&v, a.model);
    if (!rc)
        rc = show(&a, &v);
    vocabulary_close(&v);
    return rc;
}

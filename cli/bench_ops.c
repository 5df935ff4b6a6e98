/* gemcut bench ops: every operation of a device, right first, then how fast, beside the rate of large products or of
 * reads, measured in the same run. */
#include "cli/bench_case.h"

#include "base/err.h"
#include "base/mem.h"
#include "cli/cmd.h"
#include "cli/human.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "formats/hf_config.h"
#include "runtime/gemma.h"

#include <stdio.h>
#include <stdlib.h>

struct row {
    const struct bench_case *c;
    struct bench_time time;
    double error, bound; /* error: −1 when it was not compared */
    char *failure;       /* what the device said instead */
};

struct table {
    const struct bench *q;
    struct gemma_config config;
    struct backend b, reference;
    struct parallel *pool, *one;   /* pools with all threads and with one */
    double gemm, read, read_alone; /* rates; alone: of one thread, on the CPU */
    int64_t rounds, tokens;
    struct bench_case *cases, *small; /* [n] */
    struct row *rows;
    int n;
};

/* What rounding to the activation dtype can do; sums in another order. */
static double bound_of(const struct table *t, const struct bench_case *c)
{
    bool rounded = false;
    for (int i = 0; i < c->n_operands; i++)
        rounded = rounded || (c->operands[i].activation && t->b.activation != DTYPE_F32);
    return c->exact ? 0 : rounded ? 1e-2 : 1e-4;
}

static bool row_ok(const struct row *r)
{
    return !r->failure && (r->error < 0 || r->error <= r->bound);
}

/* Takes the message of an operation that the device cannot do; other errors end the run. */
static int note_failure(struct row *r, int rc)
{
    if (rc != ERR_UNSUPPORTED)
        return rc;
    r->error = -1;
    r->failure = mem_strdup(err_message());
    return r->failure ? 0 : ERR_MEMORY;
}

static int measure_row(struct table *t, int i)
{
    struct row *r = &t->rows[i];
    const struct bench_case *c = &t->cases[i];
    *r = (struct row){.c = c, .error = -1, .bound = bound_of(t, c)};
    char text[CASE_TEXT + 32];
    snprintf(text, sizeof text, "%s %s", c->op, c->sizes);
    progress_update((uint64_t)i, text);
    int rc = 0;
    if (t->q->check != BENCH_CHECK_NO)
        rc = bench_case_compare(&t->small[i], &t->b, &t->reference, t->pool, &r->error);
    if (!rc)
        rc = bench_case_time(c, &t->b, t->pool, t->rounds, &r->time);
    return rc ? note_failure(r, rc) : 0;
}

static double peak_of(const struct table *t, const struct row *r)
{
    return r->c->flops > 0 ? t->gemm : r->c->alone && t->b.host_memory ? t->read_alone : t->read;
}

static double rate_of(const struct row *r)
{
    return (r->c->flops > 0 ? r->c->flops : r->c->bytes) / r->time.median;
}

/* --- the result --------------------------------------------------------------------------------------------------- */

static void add_cells(struct human_table *h, const struct table *t, const struct row *r)
{
    human_table_cell(h, "%s", r->c->op);
    human_table_cell(h, "%s", r->c->sizes);
    if (r->error < 0)
        human_table_cell(h, "-");
    else
        human_table_cell(h, "%.1e%s", r->error, row_ok(r) ? "" : " WRONG");
    if (r->failure) {
        human_table_cell(h, "-");
        human_table_cell(h, "-");
        human_table_cell(h, "%s", r->failure);
        human_table_cell(h, "-");
        return;
    }
    human_table_cell(h, "%.1f", r->time.median * 1e6);
    human_table_cell(h, "%.1f", r->time.min * 1e6);
    human_table_cell(h, r->c->flops > 0 ? "%.3g TFLOP/s" : "%.1f GB/s",
                     rate_of(r) / (r->c->flops > 0 ? 1e12 : 1e9));
    human_table_cell(h, "%.0f %%", 100 * rate_of(r) / peak_of(t, r));
}

static int print_text(const struct table *t)
{
    struct text out = {0};
    bench_text_begin(&out, t->q);
    text_printf(&out, "rows         %lld tokens\n", (long long)t->tokens);
    text_printf(&out,
                "peaks        gemm [10240, 2560] × %lld: %.4g TFLOP/s; find_nonfinite over %s: %.1f GB/s",
                (long long)bench_many_tokens(&t->b), t->gemm / 1e12, t->b.host_memory ? "1 GiB" : "2 GiB",
                t->read / 1e9);
    if (t->b.host_memory)
        text_printf(&out, ", %.1f by one thread", t->read_alone / 1e9);
    text_printf(&out, "\nerror        relative L2 against %s, of a small case\n\n",
                t->b.host_memory ? "one thread" : "the CPU");
    static const struct human_column columns[] = {{"op", false},       {"sizes", false}, {"error", true},
                                                  {"median µs", true}, {"min µs", true}, {"rate", true},
                                                  {"of peak", true}};
    struct human_table h = {.columns = columns, .n_columns = 7};
    for (int i = 0; i < t->n; i++)
        add_cells(&h, t, &t->rows[i]);
    const int rc = human_table_render(&h, &out);
    human_table_free(&h);
    return rc ? rc : output_print(&out);
}

/* On one line, so that lines can be searched and compared. */
static void row_json(const struct table *t, const struct row *r, struct text *out)
{
    const int indent = out->indent;
    json_begin_object(out);
    out->indent = 0;
    json_kv_string(out, "op", r->c->op);
    json_kv_string(out, "shape", r->c->sizes);
    if (r->failure) {
        json_kv_string(out, "error", r->failure);
    } else {
        json_kv_double(out, "seconds_median", r->time.median);
        json_kv_double(out, "seconds_min", r->time.min);
        json_kv_double(out, r->c->flops > 0 ? "tflop_per_s" : "gb_per_s",
                       rate_of(r) / (r->c->flops > 0 ? 1e12 : 1e9));
        json_kv_double(out, "share_of_peak", rate_of(r) / peak_of(t, r));
    }
    if (r->error >= 0) {
        json_kv_double(out, "relative_error", r->error);
        json_kv_double(out, "bound", r->bound);
    }
    json_kv_bool(out, "ok", row_ok(r));
    json_kv_string(out, "device", t->q->machine.title);
    json_kv_string(out, "commit", bench_commit());
    json_end_object(out);
    out->indent = indent;
}

static int print_json(const struct table *t)
{
    struct text out = {0};
    bench_json_begin(&out, t->q);
    json_kv_int(&out, "tokens", t->tokens);
    json_kv_int(&out, "rounds", t->rounds);
    json_kv_double(&out, "gemm_tflop_per_s", t->gemm / 1e12);
    json_kv_double(&out, "read_gb_per_s", t->read / 1e9);
    if (t->b.host_memory)
        json_kv_double(&out, "read_alone_gb_per_s", t->read_alone / 1e9);
    json_put_key(&out, "ops");
    json_begin_array(&out);
    for (int i = 0; i < t->n; i++)
        row_json(t, &t->rows[i], &out);
    json_end_array(&out);
    return output_json_end(&out);
}

/* --- the run ------------------------------------------------------------------------------------------------------ */

static int read_config(const struct bench_shape *shape, struct gemma_config *out)
{
    struct hf_config config;
    int rc =
        hf_config_parse(&config, shape->config, (size_t)(shape->config_end - shape->config), shape->name);
    if (rc < 0)
        return rc;
    rc = gemma_config_read(out, &config);
    hf_config_close(&config);
    return rc;
}

static int open_table(struct table *t, const struct bench *q)
{
    *t = (struct table){.q = q};
    int rc = read_config(q->shape, &t->config);
    if (!rc)
        rc = backend_open(&t->b, q->machine.name, (int)q->machine.threads);
    /* the CPU is compared with itself: its result must not depend on the number of threads */
    if (!rc)
        rc = backend_open(&t->reference, "cpu", t->b.host_memory ? 1 : 0);
    if (!rc)
        rc = parallel_open(&t->pool, (int)q->machine.threads);
    if (!rc)
        rc = parallel_open(&t->one, 1);
    t->cases = mem_alloc(MAX_CASES, sizeof *t->cases, "the operations");
    t->small = mem_alloc(MAX_CASES, sizeof *t->small, "the operations");
    t->rows = mem_alloc(MAX_CASES, sizeof *t->rows, "the operations");
    if (!rc && !(t->cases && t->small && t->rows))
        rc = ERR_MEMORY;
    if (rc < 0)
        return rc;
    t->tokens = q->tokens ? q->tokens : bench_many_tokens(&t->b);
    t->rounds = q->rounds ? q->rounds : t->b.host_memory ? 3 : 10;
    t->n = bench_cases(t->cases, &t->config, &t->b, t->tokens, false);
    CHECK(bench_cases(t->small, &t->config, &t->b, t->tokens, true) == t->n);
    return 0;
}

static void close_table(struct table *t)
{
    for (int i = 0; t->rows && i < t->n; i++)
        free(t->rows[i].failure);
    free(t->cases);
    free(t->small);
    free(t->rows);
    parallel_close(t->pool);
    parallel_close(t->one);
    backend_close(&t->b);
    backend_close(&t->reference);
    gemma_config_free(&t->config);
}

static int measure_peaks(struct table *t)
{
    int rc = bench_gemm_peak(&t->b, t->pool, &t->gemm);
    if (!rc)
        rc = bench_read_peak(&t->b, t->pool, &t->read);
    if (!rc && t->b.host_memory)
        rc = bench_read_peak(&t->b, t->one, &t->read_alone);
    return rc;
}

int bench_ops(const struct bench *q)
{
    struct table t;
    int rc = open_table(&t, q);
    progress_begin("measuring", PROGRESS_ITEMS, (uint64_t)t.n);
    if (!rc)
        rc = measure_peaks(&t);
    for (int i = 0; !rc && i < t.n; i++)
        rc = measure_row(&t, i);
    if (!rc)
        rc = measure_peaks(&t);
    progress_end();
    bool ok = true;
    for (int i = 0; !rc && i < t.n; i++)
        ok = ok && row_ok(&t.rows[i]);
    if (!rc)
        rc = output_json() ? print_json(&t) : print_text(&t);
    close_table(&t);
    return rc ? rc : ok ? CMD_DONE : CMD_NO;
}

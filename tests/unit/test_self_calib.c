/* Samples that a model writes itself: what they depend on and what not, how documents begin and end; and the cache they
 * are kept in. How tokens are drawn: test_sample_rows.c. */
#include "quantize/self_calib.h"

#include "base/file.h"
#include "base/log.h"
#include "tests/unit/naive_draw.h"
#include "tests/unit/support.h"
#include "tests/unit/tiny_gemma.h"

/* --- a model and a tokenizer that belong together ----------------------------------------------------------------- */

enum { PAD, EOS, BOS, START_OF_TURN, END_OF_TURN, FIRST_BYTE, VOCAB = 272, SAMPLES = 12, LENGTH = 90 };

static const struct tiny_gemma tiny = {.hidden = 64,
                                       .ffn = 96,
                                       .vocab = VOCAB,
                                       .layers = 2,
                                       .heads = 2,
                                       .kv_heads = 1,
                                       .head_dim = 32,
                                       .dtype = DTYPE_BF16};

static const struct self_options options = {
    .samples = SAMPLES, .length = LENGTH, .seed = 1, .temperature = 1, .turns = 0.5};

static struct written {
    struct backend backend;
    struct model model;
    struct weights weights;
    struct tokenizer *tokenizer, *without_turns;
} with;

/* Control tokens and bytes: "user\n" is <start_of_turn> and five of them. */
static struct tokenizer *make_tokenizer(bool turns)
{
    static const char *const control[] = {"<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"};
    struct text file = {0};
    struct tokenizer *t;
    text_add(
        &file,
        "{\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"▁\"}, "
        "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": "
        "{\"String\": \"▁\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]}, "
        "\"added_tokens\": [");
    for (int i = 0; i < (turns ? FIRST_BYTE : START_OF_TURN); i++)
        text_printf(&file, "%s{\"id\": %d, \"content\": \"%s\", \"special\": true}", i ? ", " : "", i,
                    control[i]);
    text_printf(&file,
                "], \"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"merges\": [], \"vocab\": "
                "{\"▁\": %d",
                FIRST_BYTE + 256);
    for (int i = 0; i < (turns ? FIRST_BYTE : START_OF_TURN); i++)
        text_printf(&file, ", \"%s\": %d", control[i], i);
    for (int byte = 0; byte < 256; byte++)
        text_printf(&file, ", \"<0x%02X>\": %d", byte, byte + FIRST_BYTE);
    text_add(&file, "}}}");
    assert_ok(tokenizer_parse(&t, file.data, file.len, "small.json"));
    text_free(&file);
    return t;
}

static void warn(void *ctx, const char *message);

static int open_all(void **state)
{
    if (support_make_folder(state) < 0)
        return -1;
    const char *folder = support_path("tiny");
    tiny_gemma_write(&tiny, folder);
    assert_ok(backend_open(&with.backend, "cpu", 2));
    assert_ok(model_open(&with.model, folder));
    assert_ok(model_bind(&with.model, NULL, NULL));
    assert_ok(weights_load(&with.weights, &with.model, &with.backend));
    with.tokenizer = make_tokenizer(true);
    with.without_turns = make_tokenizer(false);
    log_set_sink(warn, NULL);
    return 0;
}

static int close_all(void **state)
{
    tokenizer_close(with.tokenizer);
    tokenizer_close(with.without_turns);
    weights_free(&with.weights);
    model_close(&with.model);
    backend_close(&with.backend);
    return support_remove_folder(state);
}

/* --- writing ---------------------------------------------------------------------------------------------------- */

static struct dataset write_with(const struct self_options *o)
{
    struct dataset d;
    assert_ok(self_calib_make(&d, &with.weights, with.tokenizer, o, NULL, NULL));
    assert_int_equal(d.samples, o->samples);
    assert_int_equal(d.length, o->length);
    assert_int_equal(d.n_used, 0);
    for (int64_t i = 0; i < d.samples * d.length; i++)
        assert_in_range(d.ids[i], 0, VOCAB - 1);
    return d;
}

static void check_same(const struct dataset *a, const struct dataset *b, int64_t samples)
{
    assert_memory_equal(a->ids, b->ids, (size_t)(samples * a->length) * sizeof *a->ids);
}

static int64_t n_equal(const struct dataset *a, const struct dataset *b, int64_t first_of_b)
{
    int64_t n = 0;
    for (int64_t i = 0; i < (a->samples - first_of_b) * a->length; i++)
        n += a->ids[i] == b->ids[first_of_b * b->length + i];
    return n;
}

static void test_seed(void **state)
{
    (void)state;
    struct self_options other = options;
    struct dataset a = write_with(&options), b = write_with(&options);
    check_same(&a, &b, SAMPLES);
    dataset_free(&b);
    other.seed = 2;
    b = write_with(&other);
    /* by chance, one in 272 is equal; sample 1 of a seed is not sample 0 of the next, either */
    for (int64_t shift = 0; shift < 3; shift++)
        assert_true(n_equal(&a, &b, shift) < SAMPLES * LENGTH / 8 &&
                    n_equal(&b, &a, shift) < SAMPLES * LENGTH / 8);
    dataset_free(&a);
    dataset_free(&b);
}

static void count_tokens(void *ctx, int64_t n)
{
    *(int64_t *)ctx += n;
}

static void test_any_batch(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1, 3, 5, 12, 1000};
    struct dataset expected = write_with(&options);
    for (size_t i = 0; i < N_OF(sizes); i++) {
        struct self_options o = options;
        struct dataset d;
        int64_t told = 0;
        o.at_a_time = sizes[i];
        assert_ok(self_calib_make(&d, &with.weights, with.tokenizer, &o, count_tokens, &told));
        assert_int_equal(told, SAMPLES * LENGTH);
        check_same(&d, &expected, SAMPLES);
        dataset_free(&d);
    }
    /* nor on how many there are, when none or all begin as turns */
    struct self_options o = options;
    o.turns = 0;
    struct dataset many = write_with(&o);
    o.samples = 5;
    struct dataset few = write_with(&o);
    check_same(&many, &few, 5);
    dataset_free(&expected);
    dataset_free(&many);
    dataset_free(&few);
}

static const int32_t turn[] = {BOS,
                               START_OF_TURN,
                               FIRST_BYTE + 'u',
                               FIRST_BYTE + 's',
                               FIRST_BYTE + 'e',
                               FIRST_BYTE + 'r',
                               FIRST_BYTE + '\n'};

static int64_t n_turns(const struct dataset *d)
{
    int64_t n = 0;
    for (int64_t s = 0; s < d->samples; s++) {
        assert_int_equal(d->ids[s * d->length], BOS);
        n += !memcmp(d->ids + s * d->length, turn, sizeof turn);
    }
    return n;
}

static void test_beginnings(void **state)
{
    (void)state;
    static const double shares[] = {0, 0.25, 0.5, 1};
    static const int64_t expected[] = {0, 3, 6, 12};
    for (size_t i = 0; i < N_OF(shares); i++) {
        struct self_options o = options;
        o.turns = shares[i];
        struct dataset d = write_with(&o);
        assert_int_equal(n_turns(&d), expected[i]);
        dataset_free(&d);
    }
    const struct self_options usual = self_options_default(SAMPLES, LENGTH, 1);
    struct dataset d = write_with(&usual), plain;
    assert_int_equal(n_turns(&d), 6);
    assert_true(memcmp(d.ids, turn, sizeof turn) && !memcmp(d.ids + LENGTH, turn, sizeof turn)); /* in turn */
    assert_ok(self_calib_make(&plain, &with.weights, with.without_turns, &usual, NULL, NULL));
    assert_int_equal(n_turns(&plain), 0);
    dataset_free(&d);
    dataset_free(&plain);
    /* samples that are full before the beginning is over */
    for (int64_t length = 1; length < (int64_t)N_OF(turn); length++) {
        struct self_options o = options;
        o.length = length;
        o.turns = 1;
        d = write_with(&o);
        for (int64_t s = 0; s < SAMPLES; s++)
            assert_memory_equal(d.ids + s * length, turn, (size_t)length * sizeof *turn);
        dataset_free(&d);
    }
}

static void test_documents(void **state)
{
    (void)state;
    struct self_options o = options;
    o.samples = 40;
    o.temperature = 3; /* all tokens are about as likely: one of 272 ends a document */
    struct dataset d = write_with(&o);
    int n = 0;
    for (int64_t s = 0; s < o.samples; s++)
        for (int64_t i = 1; i < LENGTH; i++)
            if (d.ids[s * LENGTH + i - 1] == EOS) {
                assert_int_equal(d.ids[s * LENGTH + i], BOS);
                n++;
            }
    print_message("%d documents ended, at least 3 expected\n", n);
    assert_true(n >= 3);
    dataset_free(&d);
}

/* Each token is the draw of its place from the logits that the tokens before it have, here without a KV cache. */
static void test_tokens(void **state)
{
    (void)state;
    enum { SHORT = 40 };
    struct self_options o = options;
    o.samples = 3;
    o.length = SHORT;
    o.temperature = 0;
    struct dataset d = write_with(&o);
    struct forward *f;
    assert_ok(forward_open(&f, &with.weights, &(struct forward_size){1, SHORT, SHORT}));
    for (int64_t s = 0; s < o.samples; s++) {
        static float logits[SHORT * VOCAB];
        const struct mat m = {logits, DTYPE_F32, SHORT, VOCAB, VOCAB};
        const int32_t *ids = d.ids + s * SHORT;
        struct mat hidden;
        forward_begin(f, 1);
        assert_ok(forward_run(f, ids, SHORT, &hidden));
        assert_ok(forward_logits(&with.weights, &hidden, &m));
        for (int64_t i = s % 2 ? (int64_t)N_OF(turn) : 1; i < SHORT; i++)
            if (ids[i - 1] != EOS)
                assert_int_equal(ids[i], naive_draw(logits + (i - 1) * VOCAB, VOCAB, 0, 0, 0, 0).token);
    }
    forward_close(f);
    dataset_free(&d);
}

static void test_at_a_time(void **state)
{
    (void)state;
    const size_t logit_bytes = with.backend.logit_bytes;
    struct self_options o = options;
    assert_int_equal(self_calib_at_a_time(&with.weights, &o), SAMPLES);
    with.backend.logit_bytes = 5 * VOCAB * sizeof(float);
    assert_int_equal(self_calib_at_a_time(&with.weights, &o), 4); /* not 5, 5, 2 */
    with.backend.logit_bytes = 1;
    assert_int_equal(self_calib_at_a_time(&with.weights, &o), 1);
    with.backend.logit_bytes = logit_bytes;
    o.length = (int64_t)1 << 40;
    assert_int_equal(self_calib_at_a_time(&with.weights, &o), 1);
}

static void test_refused(void **state)
{
    (void)state;
    struct dataset d;
    struct self_options o = options;
    o.length = with.weights.config.max_positions + 1;
    assert_error(self_calib_make(&d, &with.weights, with.tokenizer, &o, NULL, NULL), ERR_USAGE,
                 "are longer than the model's context of");
    assert_null(d.ids);
    struct weights fewer = with.weights;
    fewer.embedding.rows = FIRST_BYTE + 'r';
    assert_error(self_calib_make(&d, &fewer, with.tokenizer, &options, NULL, NULL), ERR_FORMAT,
                 "is beyond the model's vocabulary of");
}

/* --- cache ------------------------------------------------------------------------------------------------------ */

static char warnings[2048];
static int n_warnings;

static void warn(void *ctx, const char *message)
{
    (void)ctx;
    n_warnings++;
    snprintf(warnings, sizeof warnings, "%s", message);
}

static struct self_cache cache_of(const struct self_options *o, const struct model *m, const char *backend)
{
    struct self_cache c;
    assert_ok(self_calib_path(&c, m, with.tokenizer, o, backend));
    return c;
}

static void check_miss(const struct self_cache *c, const struct self_options *o, int64_t n_tokens,
                       const char *warning)
{
    struct dataset d;
    n_warnings = 0;
    assert_int_equal(self_calib_load(&d, c, o, n_tokens), 0);
    assert_null(d.ids);
    assert_int_equal(n_warnings, warning ? 1 : 0);
    if (warning && !strstr(warnings, warning))
        fail_msg("\"%s\" is not in \"%s\"", warning, warnings);
}

static void check_hit(const struct self_cache *c, const struct self_options *o,
                      const struct dataset *expected)
{
    struct dataset d;
    n_warnings = 0;
    assert_int_equal(self_calib_load(&d, c, o, VOCAB), 1);
    assert_int_equal(n_warnings, 0);
    assert_true(d.samples == expected->samples && d.length == expected->length && !d.n_used);
    check_same(&d, expected, d.samples);
    dataset_free(&d);
}

static void save(const struct dataset *d, const struct self_cache *c, const char *warning)
{
    n_warnings = 0;
    self_calib_save(d, c);
    assert_int_equal(n_warnings, warning ? 1 : 0);
    if (warning && !strstr(warnings, warning))
        fail_msg("\"%s\" is not in \"%s\"", warning, warnings);
}

/* test folders hold one level: the cache's own are removed by hand */
static void use_cache(const char *home)
{
    setenv("XDG_CACHE_HOME", home, 1);
}

static void remove_cache(const char *home)
{
    char *gemcut = file_join(home, "gemcut");
    assert_ok(file_remove_folder(gemcut));
    assert_ok(file_remove_folder(home));
    free(gemcut);
}

static void test_cache(void **state)
{
    (void)state;
    const char *home = support_path("cache");
    use_cache(home);
    struct self_cache c = cache_of(&options, &with.model, "cpu");
    assert_true(!strncmp(c.path, home, strlen(home)) && strstr(c.path, "/gemcut/self-"));
    check_miss(&c, &options, VOCAB, NULL);
    struct dataset d = write_with(&options);
    save(&d, &c, NULL);
    check_hit(&c, &options, &d);
    save(&d, &c, NULL); /* over the one that is there */
    check_hit(&c, &options, &d);
    self_cache_free(&c);
    c = cache_of(&options, &with.model, "cpu");
    check_hit(&c, &options, &d);
    self_cache_free(&c);
    dataset_free(&d);
    remove_cache(home);
}

static void test_key(void **state)
{
    (void)state;
    struct self_options o[6];
    struct hash128 keys[9];
    struct tiny_gemma changed = tiny;
    struct model other;
    for (size_t i = 0; i < N_OF(o); i++)
        o[i] = options;
    o[1].seed++;
    o[2].samples++;
    o[3].length++;
    o[4].temperature = 0.5f;
    o[5].turns = 0.25;
    for (size_t i = 0; i < N_OF(o) + 2; i++) {
        struct self_cache c = cache_of(&o[i < N_OF(o) ? i : 0], &with.model, i == 6 ? "cuda" : "cpu");
        if (i == 7) {
            self_cache_free(&c);
            assert_ok(self_calib_path(&c, &with.model, with.without_turns, &options, "cpu"));
        }
        keys[i] = c.key;
        self_cache_free(&c);
    }
    changed.bad_tensor = "model.norm.weight";
    changed.bad_index = 20;
    changed.bad_value = 0.5f;
    tiny_gemma_write(&changed, support_path("changed"));
    assert_ok(model_open(&other, support_path("changed")));
    struct self_cache c = cache_of(&options, &other, "cpu");
    keys[8] = c.key;
    self_cache_free(&c);
    model_close(&other);
    for (size_t i = 0; i < N_OF(keys); i++)
        for (size_t k = 0; k < i; k++)
            if (hash_equal(keys[i], keys[k]))
                fail_msg("keys %zu and %zu are equal", k, i);
    /* how many run side by side does not matter */
    o[0].at_a_time = 3;
    c = cache_of(&o[0], &with.model, "cpu");
    assert_true(hash_equal(c.key, keys[0]));
    self_cache_free(&c);
}

static void test_damaged_cache(void **state)
{
    (void)state;
    static const struct {
        size_t at;
        const char *warning;
    } damages[] = {{0, "is not a file of calibration samples"},
                   {8, "is not a file of calibration samples"},
                   {12, "is not a file of calibration samples"},
                   {16, "holds other samples"},
                   {24, "holds other samples"},
                   {40, "holds other samples"},
                   {50, "do not have the hash"},
                   {64, "do not have the hash"},
                   {64 + SAMPLES * LENGTH * 4 - 1, "do not have the hash"}};
    const char *home = support_path("damaged");
    use_cache(home);
    struct self_cache c = cache_of(&options, &with.model, "cpu");
    struct dataset d = write_with(&options);
    save(&d, &c, NULL);
    size_t n;
    char *file = support_read(c.path, &n);
    assert_int_equal(n, 64 + SAMPLES * LENGTH * 4);
    for (size_t i = 0; i < N_OF(damages); i++) {
        file[damages[i].at] ^= 0x40;
        support_write(c.path, file, n);
        check_miss(&c, &options, VOCAB, damages[i].warning);
        assert_non_null(strstr(warnings, "written anew"));
        file[damages[i].at] ^= 0x40;
    }
    for (size_t len = 0; len < n; len += len < 70 ? 1 : 997) {
        support_write(c.path, file, len);
        check_miss(&c, &options, VOCAB, "bytes, expected");
    }
    support_write(c.path, file, n);
    check_hit(&c, &options, &d);
    check_miss(&c, &options, 100, "the model's vocabulary ends at 100");
    d.ids[7] = -1; /* with a hash that is right */
    save(&d, &c, NULL);
    check_miss(&c, &options, VOCAB, "has the token -1");
    free(file);
    file = calloc(n + 1, 1);
    support_write(c.path, file, n + 1);
    check_miss(&c, &options, VOCAB, "bytes, expected at most");
    free(file);
    self_cache_free(&c);
    dataset_free(&d);
    remove_cache(home);
}

static void test_no_cache(void **state)
{
    (void)state;
    struct dataset d = write_with(&options);
    /* a file where the folder should be */
    support_write(support_path("file"), "x", 1);
    use_cache(support_path("file"));
    struct self_cache c = cache_of(&options, &with.model, "cpu");
    check_miss(&c, &options, VOCAB, NULL);
    save(&d, &c, "the calibration samples are not kept");
    self_cache_free(&c);
    /* a folder where the file should be */
    const char *home = support_path("folders");
    use_cache(home);
    c = cache_of(&options, &with.model, "cpu");
    assert_ok(file_make_folder(home));
    assert_ok(file_make_folder(support_path("folders/gemcut")));
    assert_ok(file_make_folder(c.path));
    check_miss(&c, &options, VOCAB, "is a folder");
    save(&d, &c, "the calibration samples are not kept");
    assert_ok(file_remove_folder(c.path));
    remove_cache(home);
    self_cache_free(&c);
    /* relative: ignored; no home either: no cache, and nothing to say about it */
    setenv("XDG_CACHE_HOME", "relative", 1);
    setenv("HOME", "/somewhere", 1);
    c = cache_of(&options, &with.model, "cpu");
    assert_int_equal(strncmp(c.path, "/somewhere/.cache/gemcut/self-", 30), 0);
    self_cache_free(&c);
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    c = cache_of(&options, &with.model, "cpu");
    assert_null(c.path);
    check_miss(&c, &options, VOCAB, NULL);
    save(&d, &c, NULL);
    self_cache_free(&c);
    dataset_free(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_seed),       cmocka_unit_test(test_any_batch),
        cmocka_unit_test(test_beginnings), cmocka_unit_test(test_documents),
        cmocka_unit_test(test_tokens),     cmocka_unit_test(test_at_a_time),
        cmocka_unit_test(test_refused),    cmocka_unit_test(test_cache),
        cmocka_unit_test(test_key),        cmocka_unit_test(test_damaged_cache),
        cmocka_unit_test(test_no_cache),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

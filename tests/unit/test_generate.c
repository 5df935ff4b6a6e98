/* Choosing tokens: exact cases, and frequencies of many draws against the probabilities that they should have;
 * the random numbers behind them; and text cut into windows of tokens. */
#include "base/json.h"
#include "base/rng.h"
#include "calib/windows.h"
#include "runtime/generate.h"
#include "tests/unit/support.h"

#include <math.h>

/* --- random numbers ------------------------------------------------------------------------------------------- */

/* PCG32 as pcg-random.org describes it, in its own words: XSH-RR of a 64-bit LCG, the seed added after a step. */
static uint32_t pcg_next(uint64_t *state, uint64_t increment)
{
    const uint64_t old = *state;
    *state = old * 6364136223846793005u + increment;
    const uint32_t word = (uint32_t)((old ^ (old >> 18)) >> 27);
    for (int i = 0; i < 32; i++)
        if ((uint64_t)i == old >> 59)
            return i ? (word >> i) | (word << (32 - i)) : word;
    return 0;
}

static void pcg_seed(uint64_t *state, uint64_t seed, uint64_t increment)
{
    *state = 0;
    pcg_next(state, increment);
    *state += seed;
    pcg_next(state, increment);
}

static void test_rng(void **state)
{
    (void)state;
    /* what the reference implementation prints for seed 42 in stream 54 */
    static const uint32_t published[] = {0xa15c02b7, 0x7b47f409, 0xba1d3330,
                                         0x83d2f293, 0xbfa4784b, 0xcbed606e};
    const uint64_t seeds[] = {0, 1, 42, UINT64_MAX}, stream = 1442695040888963407u;
    uint64_t expected;
    pcg_seed(&expected, 42, 54 << 1 | 1);
    for (size_t i = 0; i < N_OF(published); i++)
        assert_int_equal(pcg_next(&expected, 54 << 1 | 1), published[i]);
    for (size_t s = 0; s < N_OF(seeds); s++) {
        struct rng r;
        rng_seed(&r, seeds[s]);
        pcg_seed(&expected, seeds[s], stream);
        for (int i = 0; i < 1000; i++)
            assert_int_equal(rng_u32(&r), pcg_next(&expected, stream));
    }
}

static void test_rng_float(void **state)
{
    (void)state;
    enum { DRAWS = 100000, BINS = 16 };
    struct rng r, same;
    rng_seed(&r, 7);
    rng_seed(&same, 7);
    double sum = 0;
    int bins[BINS] = {0};
    for (int i = 0; i < DRAWS; i++) {
        const float u = rng_float(&r);
        assert_true(u >= 0 && u < 1);
        assert_true(u == (float)(rng_u32(&same) >> 8) / 16777216);
        sum += (double)u;
        bins[(int)(u * BINS)]++;
    }
    assert_true(fabs(sum / DRAWS - 0.5) < 4 * sqrt(1.0 / 12 / DRAWS));
    for (int i = 0; i < BINS; i++)
        assert_true(fabs(bins[i] - (double)DRAWS / BINS) < 4 * sqrt((double)DRAWS / BINS * (1 - 1.0 / BINS)));
}

/* --- choosing a token ------------------------------------------------------------------------------------------- */

static int32_t draw(const float *logits, int32_t n, const struct sampling *s, struct rng *rng)
{
    float copy[512];
    int32_t order[512];
    assert_true(n <= (int32_t)N_OF(copy));
    memcpy(copy, logits, (size_t)n * sizeof *copy);
    const int32_t id = sample_token(copy, n, s, rng, order);
    assert_in_range(id, 0, n - 1);
    return id;
}

/* The most likely token, by temperature 0, by one candidate and by a nucleus that one token fills. */
static void test_most_likely(void **state)
{
    (void)state;
    static const struct sampling kinds[] = {
        {0, 0, 1, 0}, {0, 5, 0.5, 0}, {1, 1, 1, 0}, {1, 0, 1e-9, 0}, {3, 4, 0, 0}};
    static const struct {
        float logits[5];
        int32_t n, top;
    } cases[] = {
        {{1, 3, 2, -1, 0}, 5, 1},      {{5, 4, 5, 5, 1}, 5, 0}, {{-2, -1, -3, -1, -1}, 5, 1},
        {{0, 0, 0, 0, 0}, 5, 0},       {{7, 0, 0, 0, 0}, 1, 0}, {{-80, 80, -80, 80, 80}, 5, 1},
        {{1, 2, 3, 4, 4.0001f}, 5, 4},
    };
    for (size_t k = 0; k < N_OF(kinds); k++)
        for (size_t c = 0; c < N_OF(cases); c++) {
            struct rng rng;
            rng_seed(&rng, c);
            for (int i = 0; i < 50; i++)
                assert_int_equal(draw(cases[c].logits, cases[c].n, &kinds[k], &rng), cases[c].top);
        }
}

enum { SAMPLED = 8 };
static const float sampled_logits[SAMPLED] = {0.5f, 2, -1, 2, 1.25f, -4, 0, 1.75f};

/* By full sorting (of so few: by counting who goes before), cutting and normalizing, in double. */
static void exact_probabilities(const struct sampling *s, double p[SAMPLED])
{
    int order[SAMPLED];
    for (int i = 0; i < SAMPLED; i++) {
        int before = 0;
        for (int k = 0; k < SAMPLED; k++)
            before +=
                sampled_logits[k] > sampled_logits[i] || (sampled_logits[k] == sampled_logits[i] && k < i);
        order[before] = i;
    }
    const int kept = s->top_k && s->top_k < SAMPLED ? (int)s->top_k : SAMPLED;
    double total = 0, mass = 0;
    for (int i = 0; i < kept; i++)
        total += p[order[i]] = exp((double)sampled_logits[order[i]] / s->temperature);
    for (int i = 0; i < SAMPLED; i++) {
        const bool in = i < kept && (i == 0 || mass < s->top_p * total);
        p[order[i]] = in ? p[order[i]] : 0;
        mass += p[order[i]];
    }
    for (int i = 0; i < SAMPLED; i++)
        p[i] /= mass;
}

static void test_frequencies(void **state)
{
    (void)state;
    enum { DRAWS = 20000 };
    static const struct sampling kinds[] = {
        {1, 0, 1, 1},   {0.5, 0, 1, 2}, {2, 0, 1, 3},      {1, 3, 1, 4},    {1, 7, 1, 5},
        {1, 0, 0.7, 6}, {1, 5, 0.8, 7}, {1.5, 2, 0.99, 8}, {1, 0, 0.95, 9}, {1, 100, 1, 10}};
    for (size_t k = 0; k < N_OF(kinds); k++) {
        double p[SAMPLED], worst = 0;
        int counts[SAMPLED] = {0};
        struct rng rng;
        rng_seed(&rng, kinds[k].seed);
        for (int i = 0; i < DRAWS; i++)
            counts[draw(sampled_logits, SAMPLED, &kinds[k], &rng)]++;
        exact_probabilities(&kinds[k], p);
        for (int i = 0; i < SAMPLED; i++) {
            if (p[i] == 0) {
                assert_int_equal(counts[i], 0);
                continue;
            }
            const double sigma = sqrt(DRAWS * p[i] * (1 - p[i])), off = fabs(counts[i] - DRAWS * p[i]);
            if (!(off <= 4 * sigma))
                fail_msg("kind %zu: token %d %d times, expected %.1f ± %.1f", k, i, counts[i], DRAWS * p[i],
                         sigma);
            worst = sigma > 0 && off / sigma > worst ? off / sigma : worst;
        }
        print_message("temperature %g, top_k %d, top_p %g: %.2f sigma, at most 4 allowed\n",
                      kinds[k].temperature, (int)kinds[k].top_k, kinds[k].top_p, worst);
    }
}

static void test_same_seed(void **state)
{
    (void)state;
    const struct sampling s = {1, 0, 1, 0};
    struct rng a, b, other;
    rng_seed(&a, 11);
    rng_seed(&b, 11);
    rng_seed(&other, 12);
    int different = 0;
    for (int i = 0; i < 1000; i++) {
        const int32_t id = draw(sampled_logits, SAMPLED, &s, &a);
        assert_int_equal(id, draw(sampled_logits, SAMPLED, &s, &b));
        different += id != draw(sampled_logits, SAMPLED, &s, &other);
    }
    assert_true(different > 100);
}

/* Candidates are chosen one way for few of them, and sorted for all: leaving out one that can never be drawn, or
 * cutting where both ways must cut, gives the same tokens. Many logits are equal. */
static void test_selection_is_sorting(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 200; round++) {
        float logits[300];
        const int32_t n = 2 + (int32_t)(support_random(&seed) % 299);
        for (int32_t i = 0; i < n; i++)
            logits[i] = (float)(int)(support_uniform(&seed) * (round % 2 ? 4 : 1000)) / 4;
        logits[support_random(&seed) % (uint64_t)n] = -2000;
        const struct sampling selected = {1, n - 1, 1, 0}, sorted = {1, 0, 1, 0};
        struct rng a, b;
        rng_seed(&a, (uint64_t)round);
        rng_seed(&b, (uint64_t)round);
        for (int i = 0; i < 20; i++)
            assert_int_equal(draw(logits, n, &selected, &a), draw(logits, n, &sorted, &b));
    }
}

/* --- windows ------------------------------------------------------------------------------------------------------ */

enum { BOS = 2, FIRST_BYTE = 3, META = FIRST_BYTE + 256, A = META + 1, B, AB, N_TOKENS };

/* Control tokens, bytes, "▁", "a", "b" and the merged "ab". */
static struct tokenizer *open_tokenizer(void)
{
    static const char *const control[] = {"<pad>", "<eos>", "<bos>"};
    struct text t = {0};
    text_add(&t, "{\"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"vocab\": ");
    json_begin_object(&t);
    for (int i = 0; i < FIRST_BYTE; i++)
        json_kv_int(&t, control[i], i);
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", byte);
        json_kv_int(&t, name, FIRST_BYTE + byte);
    }
    json_kv_int(&t, "▁", META);
    json_kv_int(&t, "a", A);
    json_kv_int(&t, "b", B);
    json_kv_int(&t, "ab", AB);
    json_end_object(&t);
    text_add(&t, ", \"merges\": [[\"a\", \"b\"]]}, \"added_tokens\": ");
    json_begin_array(&t);
    for (int i = 0; i < FIRST_BYTE; i++) {
        json_begin_object(&t);
        json_kv_int(&t, "id", i);
        json_kv_string(&t, "content", control[i]);
        json_kv_bool(&t, "normalized", false);
        json_kv_bool(&t, "special", true);
        json_end_object(&t);
    }
    json_end_array(&t);
    text_add(
        &t,
        ", \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"▁\"}"
        ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \" \"}, \"invert\": false}"
        ", \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": "
        "{\"String\": \"▁\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]}}");
    assert_ok(text_finish(&t));
    struct tokenizer *out;
    assert_ok(tokenizer_parse(&out, t.data, t.len, "tokenizer.json"));
    free(t.data);
    return out;
}

static void check_windows(const struct tokenizer *t, const char *text, int64_t length, size_t max_windows,
                          const int32_t *expected, size_t n)
{
    struct windows w;
    assert_ok(windows_make(&w, t, text, strlen(text), length, max_windows, N_TOKENS, "text.txt"));
    assert_int_equal(w.n, n);
    assert_int_equal(w.length, length);
    assert_memory_equal(w.ids, expected, n * (size_t)length * sizeof *expected);
    windows_free(&w);
    assert_null(w.ids);
}

static void test_windows(void **state)
{
    (void)state;
    struct tokenizer *t = open_tokenizer();
    /* "ab a bab" is ab ▁ a ▁ b ab */
    const int32_t threes[] = {BOS, AB, META, BOS, A, META, BOS, B, AB};
    const int32_t fives[] = {BOS, AB, META, A, META}, sevens[] = {BOS, AB, META, A, META, B, AB};
    check_windows(t, "ab a bab", 3, 0, threes, 3);
    check_windows(t, "ab a bab", 3, 3, threes, 3);
    check_windows(t, "ab a bab", 3, 4, threes, 3);
    check_windows(t, "ab a bab", 3, 2, threes, 2);
    check_windows(t, "ab a bab", 5, 0, fives, 1);
    check_windows(t, "ab a bab", 7, 1, sevens, 1);
    check_windows(t, "ab a bab a", 3, 0,
                  (const int32_t[]){BOS, AB, META, BOS, A, META, BOS, B, AB, BOS, META, A}, 4);
    check_windows(t, "ab a baba", 3, 0, threes, 3); /* the last token fills no window */
    check_windows(t, "b", 2, 0, (const int32_t[]){BOS, B}, 1);
    tokenizer_close(t);
}

static void test_bad_windows(void **state)
{
    (void)state;
    struct tokenizer *t = open_tokenizer();
    struct windows w;
    assert_error(windows_make(&w, t, "ab a bab", 8, 8, 0, N_TOKENS, "text.txt"), ERR_USAGE,
                 "text.txt: has 6 tokens, expected at least 7");
    assert_null(w.ids);
    assert_error(windows_make(&w, t, "", 0, 2, 0, N_TOKENS, "text.txt"), ERR_USAGE, "text.txt: has 0 tokens");
    assert_error(windows_make(&w, t, "aab", 3, 2, 0, AB, "text.txt"), ERR_FORMAT,
                 "text.txt: has the token 262");
    assert_null(w.ids);
    assert_int_equal(w.n, 0);
    assert_ok(windows_make(&w, t, "aa", 2, 2, 0, AB, "text.txt"));
    windows_free(&w);
    tokenizer_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rng),         cmocka_unit_test(test_rng_float),
        cmocka_unit_test(test_most_likely), cmocka_unit_test(test_frequencies),
        cmocka_unit_test(test_same_seed),   cmocka_unit_test(test_selection_is_sorting),
        cmocka_unit_test(test_windows),     cmocka_unit_test(test_bad_windows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

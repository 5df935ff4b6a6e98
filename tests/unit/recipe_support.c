#include "tests/unit/recipe_support.h"

#include "base/log.h"

struct gemma_config recipe_config;
struct gemma_tensors recipe_tensors;
char recipe_warnings[2048];

static void take_warning(void *ctx, const char *message)
{
    (void)ctx;
    const size_t n = strlen(recipe_warnings);
    snprintf(recipe_warnings + n, sizeof recipe_warnings - n, "%s\n", message);
}

int recipe_setup(const struct tiny_gemma *model)
{
    tiny_gemma_tensors(model, &recipe_config, &recipe_tensors);
    log_set_sink(take_warning, NULL);
    return 0;
}

int recipe_teardown(void **state)
{
    (void)state;
    log_set_sink(NULL, NULL);
    gemma_tensors_free(&recipe_tensors);
    gemma_config_free(&recipe_config);
    return 0;
}

void recipe_settle(struct recipe_plan *plan, const struct recipe *r)
{
    recipe_warnings[0] = '\0';
    assert_ok(recipe_resolve(plan, r, &recipe_tensors));
}

/* A made-up model's settings and tensors, and what the program warns of, for tests of recipes. */
#ifndef GEMCUT_TESTS_UNIT_RECIPE_SUPPORT_H
#define GEMCUT_TESTS_UNIT_RECIPE_SUPPORT_H

#include "quantize/recipe.h"
#include "tests/unit/support.h"
#include "tests/unit/tiny_gemma.h"

extern struct gemma_config recipe_config;
extern struct gemma_tensors recipe_tensors;
extern char recipe_warnings[2048]; /* since recipe_settle */

/* Of a group of tests; cmocka's return value. */
int recipe_setup(const struct tiny_gemma *model);
int recipe_teardown(void **state);

/* Resolves a recipe for the model, which must go well. */
void recipe_settle(struct recipe_plan *plan, const struct recipe *r);

#endif

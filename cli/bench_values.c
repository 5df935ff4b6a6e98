/* What the tensors of a made-up checkpoint hold. */
#include "cli/bench.h"

#include "base/text.h"

#include <math.h>
#include <string.h>

/* No tensor that is multiplied as it is may be near 0: no value is farther from the mean than 3.7 of these shares. */
static const double spread = 0.1;

/* Norms multiply by w in Gemma 4, by 1 + w before it. Where they do by w, scores are not divided by the root of head_dim:
 * of a query whose values are of order one they have a deviation of 2 by these keys, of √head_dim by keys of order one,
 * which would leave one key in the softmax. */
static struct bench_normal norm_values(const struct bench_tensor *t, bool plain_norms)
{
    if (!plain_norms)
        return (struct bench_normal){0, spread};
    const double mean = text_ends_with(t->name, ".k_norm.weight") ? 2 / sqrt((double)t->dims[0]) : 1;
    return (struct bench_normal){mean, spread * mean};
}

struct bench_normal bench_tensor_normal(const struct bench_tensor *t, bool plain_norms)
{
    if (strstr(t->name, "norm"))
        return norm_values(t, plain_norms);
    if (text_ends_with(t->name, ".layer_scalar")) /* 0.46 … 1.04 */
        return (struct bench_normal){0.75, 0.078};
    if (text_ends_with(t->name, "scale")) /* the router's */
        return (struct bench_normal){1, spread};
    if (t->n_dims < 2) /* biases and the like */
        return (struct bench_normal){0, 0.02};
    /* what a row gives of inputs of order one is of order one when its squares sum up to 1 */
    return (struct bench_normal){0, 1 / sqrt((double)t->dims[t->n_dims - 1])};
}

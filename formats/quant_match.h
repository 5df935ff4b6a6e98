/* Which scheme each of a model's linears gets by the lists of a description. A mixture of experts has ten thousand linears and
 * a description may list each of them by name, so names are looked up in tables and expressions are compiled once, not
 * for each linear. */
#ifndef GEMCUT_FORMATS_QUANT_MATCH_H
#define GEMCUT_FORMATS_QUANT_MATCH_H

#include "formats/quant_config.h"

struct quant_matcher;

/* The description must outlive the matcher, and stay as it is. A pattern that cannot be evaluated is no error here. */
int quant_matcher_open(struct quant_matcher **out, const struct quant_config *cfg);
void quant_matcher_close(struct quant_matcher *m); /* NULL does nothing */

/* As quant_config_match; not from several threads at once. */
int quant_matcher_find(struct quant_matcher *m, const char *module, struct quant_scheme *scheme);

#endif

/* The "quantization_config" of AutoRound and of GPTQModel: one scheme for all linears of the decoder blocks, and
 * exceptions by name or expression. quant_config.h is what others use. */
#ifndef GEMCUT_FORMATS_QUANT_GPTQ_H
#define GEMCUT_FORMATS_QUANT_GPTQ_H

#include "formats/quant_config.h"

/* quant_config_write for these formats. groups[0] is the scheme of all linears; the targets of the others, and ignore,
 * are exact names for AutoRound and expressions for GPTQ, which leaves other entries of ignore out. */
void quant_gptq_write(const struct quant_config *cfg, struct text *out);

/* quant_config_read; *out is empty, and freed by the caller when this fails. */
int quant_auto_round_read(struct quant_config *out, struct json q);
int quant_gptq_read(struct quant_config *out, struct json q);

#endif

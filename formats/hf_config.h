/* config.json as a document: which model it declares, where its text settings are, and how to add a
 * quantization_config without disturbing a byte of the rest. What the settings mean is runtime/gemma's part. */
#ifndef GEMCUT_FORMATS_HF_CONFIG_H
#define GEMCUT_FORMATS_HF_CONFIG_H

#include "base/json.h"
#include "base/text.h"

struct hf_config {
    char *path;
    char *text; /* the file as it is */
    size_t text_len;
    struct json_doc *doc;
    struct json root;
    struct json text_config;     /* the "text_config" member, or the root where there is none */
    const char *model_type;      /* of the root */
    const char *text_model_type; /* of the text config; = model_type where there is no text_config */
    const char *architecture;    /* architectures[0], "" when absent */
    const char *dtype;           /* "dtype" or "torch_dtype", root before text config; "" when absent */
    struct json quantization;    /* "quantization_config", absent when the model is not quantized */
};

/* Reads folder/config.json. */
int hf_config_open(struct hf_config *out, const char *folder);

/* The same from memory; `name` is used in messages. */
int hf_config_parse(struct hf_config *out, const char *text, size_t len, const char *name);
void hf_config_close(struct hf_config *cfg);

/* Appends to *out the original text with `"quantization_config": <json>` as the first member of the top level, or in
 * place of the one that is there, and with every "dtype"/"torch_dtype" string value
 * replaced by bfloat16: the dequantized weights are BF16, whatever the source was. `json` is indented to the depth
 * of a member. */
int hf_config_splice(const struct hf_config *cfg, const char *json, struct text *out);

#endif

#include "formats/hf_config.h"

#include "base/err.h"
#include "base/file.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static const size_t max_config_bytes = 16u << 20;

static int find_dtype(struct hf_config *cfg)
{
    static const char *const keys[] = {"dtype", "torch_dtype"};
    const struct json places[] = {cfg->root, cfg->text_config};
    cfg->dtype = "";
    for (size_t p = 0; p < 2; p++)
        for (size_t k = 0; k < 2; k++) {
            const char *value;
            const int rc = json_opt_string(places[p], keys[k], NULL, &value);
            if (rc < 0)
                return rc;
            if (value) {
                cfg->dtype = value;
                return 0;
            }
        }
    return 0;
}

static int read_fields(struct hf_config *cfg)
{
    cfg->root = json_root(cfg->doc);
    if (!json_is_object(cfg->root))
        return json_error(cfg->root, "is not an object");
    int rc = json_get_string(cfg->root, "model_type", &cfg->model_type);
    if (rc < 0)
        return rc;
    cfg->text_config = json_member(cfg->root, "text_config");
    if (!json_exists(cfg->text_config))
        cfg->text_config = cfg->root;
    else if (!json_is_object(cfg->text_config))
        return json_error(cfg->text_config, "is not an object");
    if ((rc = json_opt_string(cfg->text_config, "model_type", "", &cfg->text_model_type)) < 0)
        return rc;
    cfg->architecture = "";
    const struct json architectures = json_member(cfg->root, "architectures");
    if (json_is_array(architectures) && json_count(architectures) &&
        (rc = json_as_string(json_first(architectures), &cfg->architecture)) < 0)
        return rc;
    /* older multimodal exports keep it in the text config only */
    cfg->quantization = json_member(cfg->root, "quantization_config");
    if (!json_exists(cfg->quantization))
        cfg->quantization = json_member(cfg->text_config, "quantization_config");
    if (json_exists(cfg->quantization) && !json_is_object(cfg->quantization))
        return json_error(cfg->quantization, "is not an object");
    return find_dtype(cfg);
}

int hf_config_parse(struct hf_config *cfg, const char *text, size_t len, const char *name)
{
    *cfg = (struct hf_config){.path = mem_strdup(name), .text = mem_strndup(text, len), .text_len = len};
    int rc = cfg->path && cfg->text ? 0 : ERR_MEMORY;
    if (!rc)
        rc = json_parse(&cfg->doc, text, len, name);
    if (!rc)
        rc = read_fields(cfg);
    if (rc < 0)
        hf_config_close(cfg);
    return rc;
}

int hf_config_open(struct hf_config *cfg, const char *folder)
{
    *cfg = (struct hf_config){0};
    char *path = file_join(folder, "config.json"), *text = NULL;
    size_t len = 0;
    int rc = path ? file_read(path, max_config_bytes, &text, &len) : ERR_MEMORY;
    if (!rc)
        rc = hf_config_parse(cfg, text, len, path);
    free(text);
    free(path);
    return rc;
}

void hf_config_close(struct hf_config *cfg)
{
    json_free(cfg->doc);
    free(cfg->text);
    free(cfg->path);
    *cfg = (struct hf_config){0};
}

static bool is_key(const char *quote, const char *end, const char *key)
{
    const size_t n = strlen(key);
    return (size_t)(end - quote) == n + 2 && !memcmp(quote + 1, key, n);
}

int hf_config_splice(const struct hf_config *cfg, const char *json, struct text *out)
{
    static const char member[] = "quantization_config";
    /* One that is there gives way where it stands: as a second member it would win over ours in readers. */
    bool placed = !json_member(cfg->root, member).node;
    const char *run = cfg->text, *s = run + strspn(run, " \t\r\n");
    CHECK(*s == '{');
    s++;
    if (placed) {
        text_append(out, run, (size_t)(s - run));
        text_printf(out, "\n  \"%s\": %s%s", member, json, s[strspn(s, " \t\r\n")] == '}' ? "" : ",");
        run = s;
    }
    for (int depth = 1; *s;) {
        if (*s != '"') {
            depth += (*s == '{' || *s == '[') - (*s == '}' || *s == ']');
            s++;
            continue;
        }
        const char *end = json_skip_string(s), *value = end + strspn(end, " \t\r\n"), *replacement = NULL,
                   *after = NULL;
        const bool key = *value == ':';
        if (key)
            value += 1 + strspn(value + 1, " \t\r\n");
        if (key && *value == '"' && (is_key(s, end, "dtype") || is_key(s, end, "torch_dtype"))) {
            replacement = "\"bfloat16\"";
            after = json_skip_string(value);
        } else if (key && depth == 1 && is_key(s, end, member)) {
            replacement = json;
            after = json_skip_value(value);
            placed = true;
        }
        if (replacement) {
            text_append(out, run, (size_t)(value - run));
            text_add(out, replacement);
            run = after;
        }
        s = replacement ? after : end;
    }
    text_append(out, run, (size_t)(s - run));
    return placed ? text_finish(out) : err_set(ERR_FORMAT, "%s: its '%s' is not found", cfg->path, member);
}

#include "quantize/beside.h"

#include "base/err.h"
#include "base/mem.h"
#include "formats/checkpoint.h"
#include "formats/record.h"

#include <stdlib.h>

/* Where readers look when config.json has no quantization_config; NULL: nowhere else. */
static const char *const copies[N_QUANT_FORMATS] = {
    [QUANT_AUTO_ROUND] = "quantization_config.json", [QUANT_GPTQ] = "quantize_config.json"};

static int write_copy(const struct staging *place, const struct quant_config *quant)
{
    struct text json = {.indent = 2};
    if (!copies[quant->format])
        return 0;
    quant_config_write(quant, &json);
    text_add(&json, "\n");
    int rc = text_finish(&json);
    if (!rc)
        rc = staging_write(place, copies[quant->format], json.data, json.len);
    text_free(&json);
    return rc;
}

int beside_write_config(const struct staging *place, const struct hf_config *source,
                        const struct quant_config *quant)
{
    struct text json = {.indent = 2, .depth = 1, .after_key = true}, config = {0};
    quant_config_write(quant, &json);
    int rc = text_finish(&json);
    if (!rc)
        rc = hf_config_splice(source, json.data, &config);
    if (!rc)
        rc = staging_write(place, "config.json", config.data, config.len);
    if (!rc)
        rc = write_copy(place, quant);
    text_free(&config);
    text_free(&json);
    return rc;
}

void beside_put_hash(struct text *t, const char *key, struct hash128 hash)
{
    char hex[HASH_HEX_BYTES];
    hash_to_hex(hash, hex);
    json_kv_string(t, key, hex);
}

static int put_files(const struct staging *place, struct text *t)
{
    struct file_list list;
    int rc = staging_files(place, &list);
    if (rc < 0)
        return rc;
    json_put_key(t, "files");
    json_begin_object(t);
    for (size_t i = 0; !rc && i < list.n; i++) {
        char *path = file_join(place->partial, list.names[i]);
        struct hash128 hash;
        rc = path ? record_hash_file(path, &hash) : ERR_MEMORY;
        if (!rc)
            beside_put_hash(t, list.names[i], hash);
        free(path);
    }
    json_end_object(t);
    file_list_free(&list);
    return rc;
}

int beside_finish_record(const struct staging *place, const struct written_tensor *tensors, size_t n,
                         struct text *t)
{
    json_put_key(t, "tensors");
    json_begin_object(t);
    for (size_t i = 0; i < n; i++)
        beside_put_hash(t, tensors[i].name, tensors[i].hash);
    json_end_object(t);
    int rc = put_files(place, t);
    json_end_object(t);
    text_add(t, "\n");
    if (!rc)
        rc = text_finish(t);
    return rc ? rc : staging_write(place, RECORD_NAME, t->data, t->len);
}

int beside_check_weights(const struct staging *place, const struct written_tensor *tensors, size_t n,
                         struct parallel *pool, void (*on_bytes)(void *ctx, uint64_t bytes), void *ctx)
{
    struct checkpoint ck;
    int rc = checkpoint_open(&ck, place->partial);
    if (rc < 0)
        return err_context(rc, "reading back");
    struct hash128 *hashes = mem_alloc(ck.n_tensors, sizeof *hashes, "tensor hashes");
    rc = hashes ? checkpoint_hash_all(&ck, pool, hashes, on_bytes, ctx) : ERR_MEMORY;
    if (!rc && ck.n_tensors != n)
        rc = err_set(ERR_IO, "%s: reading back: %zu tensors, expected %zu", place->partial, ck.n_tensors, n);
    for (size_t i = 0; !rc && i < n; i++) {
        const struct tensor *t = checkpoint_tensor(&ck, tensors[i].name);
        if (!t || !hash_equal(hashes[t - ck.tensors], tensors[i].hash))
            rc = err_set(ERR_IO, "%s: reading back: tensor '%s' is not what was written", place->partial,
                         tensors[i].name);
    }
    free(hashes);
    checkpoint_close(&ck);
    return rc;
}

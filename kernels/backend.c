#include "kernels/backend.h"

#include "base/err.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* "cuda:3" → 3, "cuda" → 0; −1 when it is no such name. */
static int cuda_ordinal(const char *device)
{
    static const char prefix[] = "cuda:";
    if (!strcmp(device, "cuda"))
        return 0;
    if (strncmp(device, prefix, sizeof prefix - 1))
        return -1;
    const char *digits = device + sizeof prefix - 1;
    const size_t n = strspn(digits, "0123456789");
    return n >= 1 && n <= 3 && !digits[n] ? atoi(digits) : -1;
}

int backend_resolve(const char *device, char name[DEVICE_TEXT_BYTES], char title[DEVICE_TEXT_BYTES])
{
    if (!strcmp(device, "auto"))
        device = cuda_count() > 0 ? "cuda:0" : "cpu";
    if (!strcmp(device, "cpu")) {
        snprintf(name, DEVICE_TEXT_BYTES, "cpu");
        return cpu_title(title);
    }
    const int ordinal = cuda_ordinal(device);
    if (ordinal < 0)
        return err_set(ERR_UNSUPPORTED, "device '%s' is not known; expected auto, cpu or cuda:N", device);
    snprintf(name, DEVICE_TEXT_BYTES, "cuda:%d", ordinal);
    return cuda_title(ordinal, title);
}

int backend_open(struct backend *out, const char *device, int n_threads)
{
    *out = (struct backend){0};
    if (!strcmp(device, "cpu") || (!strcmp(device, "auto") && cuda_count() == 0))
        return cpu_open(out, n_threads);
    const int ordinal = strcmp(device, "auto") ? cuda_ordinal(device) : 0;
    if (ordinal < 0)
        return err_set(ERR_UNSUPPORTED, "device '%s' is not known; expected auto, cpu or cuda:N", device);
    return cuda_open(out, ordinal);
}

int backend_open_beside(struct backend *out, const struct backend *b)
{
    *out = (struct backend){0};
    return strcmp(b->name, "cpu") ? cuda_open(out, b->ordinal) : cpu_open(out, 1);
}

void backend_close(struct backend *b)
{
    if (b->state && !strcmp(b->name, "cpu"))
        cpu_close(b);
    else if (b->state)
        cuda_close(b);
    *b = (struct backend){0};
}

int backend_acquire_staged(const struct backend *b, const struct staged_need *needs, size_t n)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < n; i++)
        if (needs[i].bytes)
            rc = b->core->acquire_staging(b, needs[i].bytes, needs[i].what, needs[i].place);
    return rc;
}

void backend_release_staged(const struct backend *b, struct staged_buf *const *places, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (places[i]->host)
            b->core->release_staging(b, places[i]);
}

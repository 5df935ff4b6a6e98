#include "base/tmpfs_file.h"

#include "base/err.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>

enum {
    RESERVE_BYTES = 16 << 20,
    LARGE_BYTES =
        64 << 10, /* writes of at least this much make and drop their page tables by one call each */
};

struct tmpfs_file {
    char *data;
    uint64_t bytes;
    int fd;
    pthread_t thread;
    _Atomic uint64_t reserved;
    _Atomic bool stop;
};

bool tmpfs_file_is(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
}

/* posix_fallocate, again when a signal came in between; 0 or an errno. */
static int reserve(int fd, uint64_t at, uint64_t n)
{
    int code;
    do
        code = n ? posix_fallocate(fd, (off_t)at, (off_t)n) : 0;
    while (code == EINTR && !err_interrupt_requested());
    return code;
}

/* A failure ends it: who writes there will meet it again, and report it. */
static void *reserve_pages(void *arg)
{
    struct tmpfs_file *m = arg;
    for (uint64_t at = 0; at < m->bytes && !atomic_load(&m->stop); at += RESERVE_BYTES) {
        const uint64_t n = m->bytes - at < RESERVE_BYTES ? m->bytes - at : RESERVE_BYTES;
        if (reserve(m->fd, at, n))
            break;
        atomic_store(&m->reserved, at + n);
    }
    return NULL;
}

int tmpfs_file_open(struct tmpfs_file **out, int fd, uint64_t bytes)
{
    struct tmpfs_file *m = mem_alloc(1, sizeof *m, "a mapped file");
    if (!m)
        return ERR_MEMORY;
    *m = (struct tmpfs_file){.fd = fd, .bytes = bytes};
    m->data = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (m->data != MAP_FAILED && (errno = pthread_create(&m->thread, NULL, reserve_pages, m)) == 0) {
        *out = m;
        return 0;
    }
    const int code = errno;
    if (m->data != MAP_FAILED)
        munmap(m->data, (size_t)bytes);
    free(m);
    errno = code;
    return err_errno("mapping %llu bytes", (unsigned long long)bytes);
}

/* The pages that are written to next, taken from the file system where nobody has, and mapped: 0 or an errno. That needs no
 * lock of the whole file, unlike a reservation, and no fault for each page. */
static int take_pages(struct tmpfs_file *m, uint64_t first, uint64_t end)
{
    if (madvise(m->data + first, (size_t)(end - first), MADV_POPULATE_WRITE) == 0)
        return 0;
    if (errno == EFAULT) /* writing would be a signal */
        return ENOSPC;
    if (errno != EINVAL)
        return errno;
    /* before Linux 5.14 */
    return end > atomic_load(&m->reserved) ? reserve(m->fd, first, end - first) : 0;
}

/* The page tables of what is written are dropped at once: at the end that would be one thread's work. */
int tmpfs_file_put(struct tmpfs_file *m, const void *data, size_t n, uint64_t at)
{
    const uint64_t page = 4096, first = at / page * page;
    if (n >= LARGE_BYTES || at + n > atomic_load(&m->reserved)) {
        const int code = take_pages(m, first, at + n);
        if (code == EINTR)
            return err_interrupted();
        if (code) {
            errno = code;
            return err_errno("writing %zu bytes at %llu", n, (unsigned long long)at);
        }
    }
    memcpy(m->data + at, data, n);
    if (n >= LARGE_BYTES)
        madvise(m->data + first, (size_t)(at + n - first), MADV_DONTNEED);
    return 0;
}

void tmpfs_file_close(struct tmpfs_file *m)
{
    if (!m)
        return;
    atomic_store(&m->stop, true);
    pthread_join(m->thread, NULL);
    munmap(m->data, (size_t)m->bytes);
    free(m);
}

/* One UTF-8 sequence at a time, strictly: no overlong forms, no surrogates, nothing above U+10FFFF. */
#ifndef GEMCUT_FORMATS_UTF8_H
#define GEMCUT_FORMATS_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes (1 … 4) of the valid sequence at the start of s[0..n) and its code point; 0 when there is none. */
static inline size_t utf8_decode(const uint8_t *s, size_t n, uint32_t *cp)
{
    if (!n)
        return 0;
    const uint32_t a = s[0];
    if (a < 0x80) {
        *cp = a;
        return 1;
    }
    if (a < 0xc2 || a > 0xf4) /* a continuation, an overlong form, beyond U+13FFFF */
        return 0;
    const size_t len = a < 0xe0 ? 2 : a < 0xf0 ? 3 : 4;
    if (n < len)
        return 0;
    uint32_t v = a & (0x7fu >> len);
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        v = v << 6 | (s[i] & 0x3f);
    }
    if (len > 2 && (v < (len == 3 ? 0x800u : 0x10000u) || (v >= 0xd800 && v < 0xe000) || v > 0x10ffff))
        return 0;
    *cp = v;
    return len;
}

/* Whether all of s[0..n) is valid. */
static inline bool utf8_valid(const uint8_t *s, size_t n)
{
    uint32_t cp;
    for (size_t at = 0, len; at < n; at += len) {
        len = utf8_decode(s + at, n - at, &cp);
        if (!len)
            return false;
    }
    return true;
}

#endif

/* Writes around the caches: memory that is filled as a whole need not be read first, and is not read again soon. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define LS_LINE 64 /* bytes of a cache line; a write around the caches is fast where it fills whole ones */

/* Copies n words of four bytes. `stream_end` comes before anybody else is told of them. */
static inline void stream_words(void *to, const void *from, int64_t n) {
    int64_t i = 0;
#if defined(__x86_64__)
    if ((uintptr_t)to % LS_LINE == 0)
        for (; i + 16 <= n; i += 16)
            for (int part = 0; part < 16; part += 4)
                _mm_stream_si128((__m128i *)((uint32_t *)to + i + part),
                                 _mm_loadu_si128((const __m128i *)((const uint32_t *)from + i + part)));
#endif
    if (i < n) memcpy((uint32_t *)to + i, (const uint32_t *)from + i, (size_t)(n - i) * 4);
}

static inline void stream_end(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* The hash of a piece on its way: eight 64-bit lanes that each take every eighth word, and what was met of NaN. */
#pragma once
#include <stdint.h>
#include <string.h>

#define LS_DIGEST_LANES 8
#define LS_DIGEST_PRIME 0x9E3779B97F4A7C15ull
#define LS_DIGEST_EXPONENT 0x7f800000u /* all ones in NaN and infinity alone */

typedef uint64_t lanes_t __attribute__((vector_size(8 * LS_DIGEST_LANES)));
typedef uint32_t words_t __attribute__((vector_size(4 * LS_DIGEST_LANES)));

typedef struct {
    lanes_t lanes;
    words_t bad; /* not zero in the lanes that have met NaN or infinity */
} digest_state;

static inline void mix_word(digest_state *state, int lane, uint32_t word) {
    state->bad[lane] |= (word & LS_DIGEST_EXPONENT) == LS_DIGEST_EXPONENT;
    uint64_t h = (state->lanes[lane] ^ word) * LS_DIGEST_PRIME;
    state->lanes[lane] = h ^ (h >> 32);
}

#if defined(__AVX2__) && !defined(__AVX512DQ__)

/* There is no 64-bit multiplication, and what a compiler makes of it from 32-bit ones takes three times as long as
 * reading the words. Kept here are h and its upper halves, which the next multiplication needs by themselves: a word
 * changes the lower half of a lane alone. */
#include <immintrin.h>

typedef struct { __m256i h[2], upper[2], bad; } digest_registers;

static inline digest_registers digest_load(digest_state *state) {
    digest_registers r;
    for (int half = 0; half < 2; half++) {
        __m256i lanes = _mm256_loadu_si256((const __m256i *)&state->lanes + half);
        r.upper[half] = _mm256_srli_epi64(lanes, 32);
        r.h[half] = _mm256_xor_si256(lanes, r.upper[half]);
    }
    r.bad = _mm256_loadu_si256((const __m256i *)&state->bad);
    return r;
}

static inline void digest_store(digest_state *state, const digest_registers *r) {
    for (int half = 0; half < 2; half++)
        _mm256_storeu_si256((__m256i *)&state->lanes + half, _mm256_xor_si256(r->h[half], r->upper[half]));
    _mm256_storeu_si256((__m256i *)&state->bad, r->bad);
}

static inline void digest_mix(digest_registers *r, const uint32_t *data) {
    const __m256i low = _mm256_set1_epi64x(LS_DIGEST_PRIME & 0xffffffffu);
    const __m256i high = _mm256_set1_epi64x(LS_DIGEST_PRIME >> 32);
    const __m256i exponent = _mm256_set1_epi32(LS_DIGEST_EXPONENT);
    __m256i words = _mm256_loadu_si256((const __m256i *)data);
    r->bad = _mm256_or_si256(r->bad, _mm256_cmpeq_epi32(_mm256_and_si256(words, exponent), exponent));
    for (int half = 0; half < 2; half++) {
        __m256i wide = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)data + half));
        __m256i x = _mm256_xor_si256(_mm256_xor_si256(r->h[half], r->upper[half]), wide);
        __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(x, high), _mm256_mul_epu32(r->upper[half], low));
        r->h[half] = _mm256_add_epi64(_mm256_mul_epu32(x, low), _mm256_slli_epi64(cross, 32));
        r->upper[half] = _mm256_srli_epi64(r->h[half], 32);
    }
}

#else

typedef digest_state *digest_registers; /* the compiler knows better where to keep it */

static inline digest_registers digest_load(digest_state *state) { return state; }

static inline void digest_store(digest_state *state, const digest_registers *r) { (void)state, (void)r; }

static inline void digest_mix(digest_registers *r, const uint32_t *data) {
    words_t words;
    memcpy(&words, data, sizeof words);
    (*r)->bad |= (words_t)((words & LS_DIGEST_EXPONENT) == LS_DIGEST_EXPONENT);
    lanes_t h = ((*r)->lanes ^ __builtin_convertvector(words, lanes_t)) * LS_DIGEST_PRIME;
    (*r)->lanes = h ^ (h >> 32);
}

#endif

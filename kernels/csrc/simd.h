/* Sixteen float32 lanes with one meaning on every instruction set.
 *
 * All kernels are written against this header alone. Each operation is IEEE-754 exact per lane (add, multiply, divide,
 * square root, fused multiply-add), so AVX-512, AVX2 and plain C builds of the same source give the same bits. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LS_LINE 64        /* bytes of a line of the cache */
#define LS_SECOND_CACHE 2 /* __builtin_prefetch's locality for it */

#if defined(__AVX512F__)

#include <immintrin.h>
#if defined(__AVX512BF16__)
#define LS_ISA "avx512bf16"
#else
#define LS_ISA "avx512"
#endif
#define LS_TILE_VECTORS 4 /* vectors of a 64-wide panel that one register tile covers */
typedef __m512 v16;
typedef __m512i w16; /* sixteen 32-bit words, each a pair of bfloat16: even element low, odd element high */
static inline w16 w16_load(const void *p) { return _mm512_loadu_si512(p); }
static inline w16 w16_set1(uint32_t a) { return _mm512_set1_epi32((int)a); }
static inline v16 v16_even(w16 a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
static inline v16 v16_odd(w16 a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000u))); }
static inline v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v16_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
static inline v16 v16_set1(float a) { return _mm512_set1_ps(a); }
static inline v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
static inline v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
static inline v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
/* 2^n times a, for integral n in [-126, 128] and a in [0.5, 2): exact, or infinite when it overflows. */
static inline v16 v16_scale2(v16 a, v16 n) { return _mm512_scalef_ps(a, n); }
/* +0 where x < limit, a elsewhere. */
static inline v16 v16_zero_below(v16 a, v16 x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), a);
}
/* Lanes [first, last) of a; `fill` in the others. */
static inline v16 v16_keep(v16 a, int first, int last, float fill) {
    __mmask16 m = (__mmask16)(((last >= 16 ? 0xffffu : (1u << last) - 1u)) & ~((1u << first) - 1u));
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), m, a);
}

/* a signed zero where |judge| < limit, a elsewhere. */
static inline v16 v16_flush_small(v16 a, v16 judge, float limit) {
    __mmask16 is_small = _mm512_cmp_ps_mask(_mm512_abs_ps(judge), _mm512_set1_ps(limit), _CMP_LT_OQ);
    return _mm512_mask_and_ps(a, is_small, a, _mm512_set1_ps(-0.0f));
}

#elif defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#define LS_ISA "avx2"
#define LS_TILE_VECTORS 1
typedef struct { __m256 lo, hi; } v16;
typedef struct { __m256i lo, hi; } w16;
static inline w16 w16_load(const void *p) {
    return (w16){_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
static inline w16 w16_set1(uint32_t a) { __m256i x = _mm256_set1_epi32((int)a); return (w16){x, x}; }
static inline v16 v16_even(w16 a) {
    return (v16){_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
}
static inline v16 v16_odd(w16 a) {
    __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    return (v16){_mm256_castsi256_ps(_mm256_and_si256(a.lo, high)), _mm256_castsi256_ps(_mm256_and_si256(a.hi, high))};
}
#define LS_PAIR(op) ((v16){op(a.lo, b.lo), op(a.hi, b.hi)})
static inline v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void v16_store(float *p, v16 a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
static inline v16 v16_set1(float a) { __m256 x = _mm256_set1_ps(a); return (v16){x, x}; }
static inline v16 v16_add(v16 a, v16 b) { return LS_PAIR(_mm256_add_ps); }
static inline v16 v16_sub(v16 a, v16 b) { return LS_PAIR(_mm256_sub_ps); }
static inline v16 v16_mul(v16 a, v16 b) { return LS_PAIR(_mm256_mul_ps); }
static inline v16 v16_div(v16 a, v16 b) { return LS_PAIR(_mm256_div_ps); }
static inline v16 v16_max(v16 a, v16 b) { return LS_PAIR(_mm256_max_ps); }
static inline v16 v16_min(v16 a, v16 b) { return LS_PAIR(_mm256_min_ps); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    return (v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline __m256 ls_power2(__m256 n) { /* 2^n for integral n in [-126, 127] */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline __m256 ls_scale2(__m256 a, __m256 n) { /* in two exact steps, since 2^128 is no float */
    __m256 half = _mm256_floor_ps(_mm256_mul_ps(n, _mm256_set1_ps(0.5f)));
    return _mm256_mul_ps(_mm256_mul_ps(a, ls_power2(half)), ls_power2(_mm256_sub_ps(n, half)));
}
static inline v16 v16_scale2(v16 a, v16 n) { return (v16){ls_scale2(a.lo, n.lo), ls_scale2(a.hi, n.hi)}; }
static inline v16 v16_zero_below(v16 a, v16 x, float limit) {
    __m256 t = _mm256_set1_ps(limit);
    return (v16){_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, t, _CMP_NLT_UQ)),
                 _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, t, _CMP_NLT_UQ))};
}
static inline v16 v16_keep(v16 a, int first, int last, float fill) {
    float f[16];
    v16_store(f, a);
    for (int i = 0; i < 16; i++)
        if (i < first || i >= last) f[i] = fill;
    return v16_load(f);
}
static inline __m256 ls_flush_small(__m256 a, __m256 judge, float limit) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 is_small = _mm256_cmp_ps(_mm256_andnot_ps(sign, judge), _mm256_set1_ps(limit), _CMP_LT_OQ);
    return _mm256_andnot_ps(_mm256_andnot_ps(sign, is_small), a);
}
static inline v16 v16_flush_small(v16 a, v16 judge, float limit) {
    return (v16){ls_flush_small(a.lo, judge.lo, limit), ls_flush_small(a.hi, judge.hi, limit)};
}

#else

#define LS_ISA "generic"
#define LS_TILE_VECTORS 1
typedef struct { float f[16]; } v16;
typedef struct { uint32_t u[16]; } w16;
static inline w16 w16_load(const void *p) { w16 r; memcpy(r.u, p, sizeof r.u); return r; }
static inline w16 w16_set1(uint32_t a) { w16 r; for (int i = 0; i < 16; i++) r.u[i] = a; return r; }
static inline v16 v16_even(w16 a) {
    for (int i = 0; i < 16; i++) a.u[i] = a.u[i] << 16;
    v16 r;
    memcpy(r.f, a.u, sizeof r.f);
    return r;
}
static inline v16 v16_odd(w16 a) {
    for (int i = 0; i < 16; i++) a.u[i] = a.u[i] & 0xffff0000u;
    v16 r;
    memcpy(r.f, a.u, sizeof r.f);
    return r;
}
#define LS_EACH(expression) \
    v16 r;                  \
    for (int i = 0; i < 16; i++) r.f[i] = (expression); \
    return r
static inline v16 v16_load(const float *p) { v16 r; memcpy(r.f, p, sizeof r.f); return r; }
static inline void v16_store(float *p, v16 a) { memcpy(p, a.f, sizeof a.f); }
static inline v16 v16_set1(float a) { LS_EACH(a); }
static inline v16 v16_add(v16 a, v16 b) { LS_EACH(a.f[i] + b.f[i]); }
static inline v16 v16_sub(v16 a, v16 b) { LS_EACH(a.f[i] - b.f[i]); }
static inline v16 v16_mul(v16 a, v16 b) { LS_EACH(a.f[i] * b.f[i]); }
static inline v16 v16_div(v16 a, v16 b) { LS_EACH(a.f[i] / b.f[i]); }
static inline v16 v16_max(v16 a, v16 b) { LS_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
static inline v16 v16_min(v16 a, v16 b) { LS_EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { LS_EACH(__builtin_fmaf(a.f[i], b.f[i], c.f[i])); }
static inline float ls_power2(int n) { /* 2^n for n in [-126, 127] */
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static inline v16 v16_scale2(v16 a, v16 n) {
    v16 r;
    for (int i = 0; i < 16; i++) {
        int whole = (int)n.f[i], half = whole >> 1;
        r.f[i] = a.f[i] * ls_power2(half) * ls_power2(whole - half);
    }
    return r;
}
static inline v16 v16_zero_below(v16 a, v16 x, float limit) { LS_EACH(x.f[i] < limit ? 0.0f : a.f[i]); }
static inline v16 v16_keep(v16 a, int first, int last, float fill) { LS_EACH(i >= first && i < last ? a.f[i] : fill); }
static inline v16 v16_flush_small(v16 a, v16 judge, float limit) {
    LS_EACH(__builtin_fabsf(judge.f[i]) < limit ? __builtin_copysignf(0.0f, a.f[i]) : a.f[i]);
}

#endif

static inline v16 v16_zero(void) { return v16_set1(0.0f); }

#if defined(__AVX512F__)
/* a[i] = op(a[i], a[i + w]) for w = 8, 4, 2, 1, without a way through memory. */
#define LS_FOLD(op)                                                                                              \
    __m256 x = _mm512_castps512_ps256(a), y = _mm512_castps512_ps256(_mm512_shuffle_f32x4(a, a, 0x4e));           \
    x = _mm256_##op##_ps(x, y);                                                                                  \
    __m128 z = _mm_##op##_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));                            \
    z = _mm_##op##_ps(z, _mm_movehl_ps(z, z));                                                                   \
    return _mm_cvtss_f32(_mm_##op##_ss(z, _mm_movehdup_ps(z)))
#else
#define LS_FOLD(op)                          \
    float f[16];                             \
    v16_store(f, a);                         \
    for (int w = 8; w; w >>= 1)              \
        for (int i = 0; i < w; i++) f[i] = ls_##op(f[i], f[i + w]); \
    return f[0]
static inline float ls_add(float a, float b) { return a + b; }
static inline float ls_max(float a, float b) { return a > b ? a : b; }
#endif

/* T16, the one reduction of sixteen lanes: for w = 8, 4, 2, 1: a[i] += a[i + w]. */
static inline float v16_sum(v16 a) { LS_FOLD(add); }

/* The same tree for the maximum; equal operands keep the later one, so a zero's sign is fixed too. */
static inline float v16_highest(v16 a) { LS_FOLD(max); }

/* The first `n` lanes from memory, +0 in the rest. */
static inline v16 v16_load_first(const float *p, int n) {
    float f[16] = {0};
    memcpy(f, p, (size_t)n * sizeof(float));
    return v16_load(f);
}
static inline void v16_store_first(float *p, v16 a, int n) {
    float f[16];
    v16_store(f, a);
    memcpy(p, f, (size_t)n * sizeof(float));
}

/* One step of the bfloat16 dot product (x86's VDPBF16PS): acc + odd x * odd w, rounded, then + even x * even w, rounded.
 * Subnormal operands count as zero and a result is zero if, rounded with an unbounded exponent, it is below 2^-126. */
#if defined(__AVX512BF16__)
static inline v16 v16_dot(w16 x, w16 w, v16 acc) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w); }
#else
static inline v16 v16_flushed_fma(v16 a, v16 b, v16 c) {
    const float smallest = 0x1p-126f, up = 0x1p50f; /* scaled up, the same rounding has no subnormals in its way */
    v16 scale = v16_set1(up);
    a = v16_flush_small(a, a, smallest), b = v16_flush_small(b, b, smallest);
    v16 unbounded = v16_fma(v16_mul(a, scale), b, v16_mul(c, scale));
    return v16_flush_small(v16_fma(a, b, c), unbounded, smallest * up);
}
static inline v16 v16_dot(w16 x, w16 w, v16 acc) {
    return v16_flushed_fma(v16_even(x), v16_even(w), v16_flushed_fma(v16_odd(x), v16_odd(w), acc));
}
#endif

/* Sixteen bfloat16, widened exactly. */
static inline v16 v16_load_bf16(const uint16_t *p) {
#if defined(__AVX512F__)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#elif defined(__AVX2__) && defined(__FMA__)
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (v16){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
#else
    uint32_t words[16];
    v16 r;
    for (int i = 0; i < 16; i++) words[i] = (uint32_t)p[i] << 16;
    memcpy(r.f, words, sizeof words);
    return r;
#endif
}

/* a times 2^n, by adding n to the exponent: exact where neither a nor the result is subnormal. n is the integer that the
 * low bits of `magic`, a float32 of the form 1.5 * 2^23 + n, hold. */
static inline v16 v16_add_exponent(v16 a, v16 magic) {
#if defined(__AVX512F__)
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(magic), 23)));
#elif defined(__AVX2__) && defined(__FMA__)
#define LS_ADD_EXPONENT(x, n) \
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)))
    return (v16){LS_ADD_EXPONENT(a.lo, magic.lo), LS_ADD_EXPONENT(a.hi, magic.hi)};
#else
    uint32_t words[16], steps[16];
    memcpy(words, a.f, sizeof words);
    memcpy(steps, magic.f, sizeof steps);
    for (int i = 0; i < 16; i++) words[i] += steps[i] << 23;
    memcpy(a.f, words, sizeof words);
    return a;
#endif
}

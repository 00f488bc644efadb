/* bfloat16: the upper half of a float32. Rounding to it happens in this one place, for engine and trainer alike. */
#pragma once
#include <stdint.h>
#include <string.h>

/* Nearest, ties to even; what exceeds the largest bfloat16 becomes infinite, and a NaN stays one. */
static inline uint16_t bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Exact. */
static inline float float_from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

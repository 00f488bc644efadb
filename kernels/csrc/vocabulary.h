/* What every way to sample shares: the sums over one vocabulary block, and the uniform number of a draw. */
#pragma once
#include <math.h>

#include "exp_log.h"

#define LS_VOCAB_BLOCK 64

/* One block of logits z[64], of which `width` count, divided by the temperature in place; its maximum and its sum of
 * exponentials T16((e0 + e1) + (e2 + e3)). */
static inline void reduce_block(float *z, int width, float temperature, float *highest, float *sum) {
    v16 t = v16_set1(temperature), part[4], top = v16_set1(-INFINITY);
    for (int v = 0; v < 4; v++) {
        part[v] = v16_load(z + 16 * v);
        if (temperature != 1.0f) part[v] = v16_div(part[v], t);
        if (width < 16 * v + 16) part[v] = v16_keep(part[v], 0, width > 16 * v ? width - 16 * v : 0, -INFINITY);
        v16_store(z + 16 * v, part[v]);
        top = v16_max(top, part[v]);
    }
    *highest = v16_highest(top);
    v16 m = v16_set1(*highest);
    for (int v = 0; v < 4; v++) part[v] = v16_exp(v16_sub(part[v], m));
    *sum = v16_sum(v16_add(v16_add(part[0], part[1]), v16_add(part[2], part[3])));
}

/* 53 random bits: Philox4x32-10 (Salmon et al., 2011) under a 64-bit key; the counter is (position, index, 0, 0). */
static inline uint64_t philox_bits(uint64_t key, uint32_t position, uint32_t index) {
    uint32_t c[4] = {position, index, 0, 0}, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return ((uint64_t)c[0] << 32 | c[1]) >> 11;
}

/* Exponentials of a block relative to `top`, the highest logit of the row. */
static inline double block_mass(float highest, float sum, float top) { return (double)sum * (double)exp1(highest - top); }

/* The first block whose running total passes the target, with the total before it; if rounding leaves none, the last one
 * with mass and an infinite total. */
static inline int64_t block_at(const float *maxima, const float *sums, int64_t num_blocks, float top, double target,
                               double *running) {
    int64_t last = 0;
    *running = 0.0;
    for (int64_t block = 0; block < num_blocks; block++) {
        double mass = block_mass(maxima[block], sums[block], top);
        if (mass > 0.0) last = block;
        if (*running + mass > target) return block;
        *running += mass;
    }
    *running = INFINITY;
    return last;
}

/* The first of a block's ids at which the running total passes the target; if rounding leaves none, the last with mass. */
static inline int64_t id_in_block(const float *z, int64_t width, float highest, float top, double running,
                                  double target) {
    float e[LS_VOCAB_BLOCK];
    for (int v = 0; v < 4; v++) v16_store(e + 16 * v, v16_exp(v16_sub(v16_load(z + 16 * v), v16_set1(highest))));
    double scale = (double)exp1(highest - top);
    int64_t choice = 0;
    for (int64_t i = 0; i < width; i++) {
        if (e[i] > 0.0f) choice = i;
        running += (double)e[i] * scale;
        if (running > target && running != INFINITY) break;
    }
    return choice;
}

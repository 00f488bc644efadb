/* The one matrix-product routine: rows times a 64-wide panel of packed weights, in the canonical order of summation.
 *
 * A packed weight [N, K] is stored as [ceil(N / 64)][K][64]: lanes run over outputs, never over k. K is cut into blocks of
 * 128; a block is one FMA chain from +0 with k ascending; blocks add left to right within each of `segments` equal
 * segments of K; segments add as a complete binary tree. Nothing else chooses the arithmetic of an output. */
#pragma once
#include "simd.h"

#define LS_PANEL 64
#define LS_K_BLOCK 128
#define LS_TILE_ROWS 6
#define LS_MAX_SEGMENTS 8

/* The largest power of two up to 8 with K divisible by 128 times it, else 1. */
static inline int64_t ls_num_segments(int64_t K) {
    for (int64_t s = LS_MAX_SEGMENTS; s > 1; s >>= 1)
        if (K % (LS_K_BLOCK * s) == 0) return s;
    return 1;
}

/* out[ROWS][64]: the products of ROWS rows of x (row stride ldx) with one panel. */
#define LS_DEFINE_PANEL_PRODUCT(ROWS)                                                                                  \
    static void ls_panel_product_##ROWS(const float *x, int64_t ldx, const float *panel, int64_t K, int64_t segments,   \
                                        float *out) {                                                                  \
        for (int c = 0; c < LS_PANEL; c += 16 * LS_TILE_VECTORS) {                                                     \
            float level[4][ROWS][16 * LS_TILE_VECTORS]; /* the tree's open sums: one more per doubling of segments */   \
            int depth = 0;                                                                                             \
            for (int64_t segment = 0; segment < segments; segment++) {                                                 \
                int64_t first = segment * (K / segments), last = segment + 1 == segments ? K : first + K / segments;    \
                float(*sum)[16 * LS_TILE_VECTORS] = level[depth];                                                      \
                for (int64_t begin = first; begin < last; begin += LS_K_BLOCK) {                                       \
                    int64_t end = begin + LS_K_BLOCK < last ? begin + LS_K_BLOCK : last;                               \
                    v16 a[ROWS][LS_TILE_VECTORS];                                                                      \
                    for (int r = 0; r < ROWS; r++)                                                                     \
                        for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_zero();                                \
                    for (int64_t k = begin; k < end; k++) {                                                            \
                        const float *w = panel + k * LS_PANEL + c;                                                     \
                        v16 b[LS_TILE_VECTORS];                                                                        \
                        for (int v = 0; v < LS_TILE_VECTORS; v++) b[v] = v16_load(w + 16 * v);                         \
                        for (int r = 0; r < ROWS; r++) {                                                               \
                            v16 s = v16_set1(x[r * ldx + k]);                                                          \
                            for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_fma(s, b[v], a[r][v]);             \
                        }                                                                                              \
                    }                                                                                                  \
                    for (int r = 0; r < ROWS; r++)                                                                     \
                        for (int v = 0; v < LS_TILE_VECTORS; v++)                                                      \
                            v16_store(sum[r] + 16 * v,                                                                 \
                                      begin == first ? a[r][v] : v16_add(v16_load(sum[r] + 16 * v), a[r][v]));         \
                }                                                                                                      \
                depth++;                                                                                               \
                for (int64_t done = segment + 1; done % 2 == 0; done /= 2) {                                           \
                    depth--;                                                                                           \
                    for (int r = 0; r < ROWS; r++)                                                                     \
                        for (int v = 0; v < LS_TILE_VECTORS; v++)                                                      \
                            v16_store(level[depth - 1][r] + 16 * v, v16_add(v16_load(level[depth - 1][r] + 16 * v),    \
                                                                            v16_load(level[depth][r] + 16 * v)));      \
                }                                                                                                      \
            }                                                                                                          \
            for (int r = 0; r < ROWS; r++)                                                                             \
                for (int v = 0; v < LS_TILE_VECTORS; v++)                                                              \
                    v16_store(out + r * LS_PANEL + c + 16 * v, v16_load(level[0][r] + 16 * v));                        \
        }                                                                                                              \
    }
LS_DEFINE_PANEL_PRODUCT(1)
LS_DEFINE_PANEL_PRODUCT(2)
LS_DEFINE_PANEL_PRODUCT(3)
LS_DEFINE_PANEL_PRODUCT(4)
LS_DEFINE_PANEL_PRODUCT(5)
LS_DEFINE_PANEL_PRODUCT(6)

/* out[rows][64] for 1 to 6 rows. */
static inline void ls_panel_product(int rows, const float *x, int64_t ldx, const float *panel, int64_t K,
                                    int64_t segments, float *out) {
    switch (rows) {
        case 1: ls_panel_product_1(x, ldx, panel, K, segments, out); return;
        case 2: ls_panel_product_2(x, ldx, panel, K, segments, out); return;
        case 3: ls_panel_product_3(x, ldx, panel, K, segments, out); return;
        case 4: ls_panel_product_4(x, ldx, panel, K, segments, out); return;
        case 5: ls_panel_product_5(x, ldx, panel, K, segments, out); return;
        default: ls_panel_product_6(x, ldx, panel, K, segments, out); return;
    }
}

/* The one matrix-product routine: rows times a 64-wide panel of packed weights, in the canonical order of summation.
 *
 * A packed weight [N, K] is stored as [ceil(N / 64)][K][64] float32 or [ceil(N / 64)][K / 2][64][2] bfloat16: lanes run
 * over outputs, never over k. K is cut into blocks of 128; a block is one chain from +0 with k ascending; blocks add left
 * to right within each of `segments` equal segments of K; segments add as a complete binary tree. Nothing else chooses
 * the arithmetic of an output. */
#pragma once
#include "bf16.h"
#include "simd.h"

#define LS_PANEL 64
#define LS_K_BLOCK 128
#define LS_TILE_ROWS 6
#define LS_MAX_SEGMENTS 8
#define LS_TILE_WIDTH (16 * LS_TILE_VECTORS)
#define LS_INLINE static inline __attribute__((always_inline))

typedef enum {
    LS_FLOAT32,      /* float32 x and weights: a chain of fused multiply-adds */
    LS_BFLOAT16,     /* bfloat16 weights, widened; float32 x: the same chain */
    LS_BFLOAT16_DOT, /* bfloat16 x and weights: a chain of dot-product steps over pairs of k */
} ls_arithmetic;

/* A packed weight and how products with it are summed up. */
typedef struct {
    const char *data;
    int64_t K, segments;
    ls_arithmetic arithmetic;
} ls_weight;

/* The largest power of two up to 8 with K divisible by 128 times it, else 1. */
static inline int64_t ls_num_segments(int64_t K) {
    for (int64_t s = LS_MAX_SEGMENTS; s > 1; s >>= 1)
        if (K % (LS_K_BLOCK * s) == 0) return s;
    return 1;
}

static inline ls_weight ls_make_weight(const void *data, int64_t K, int64_t arithmetic) {
    return (ls_weight){data, K, ls_num_segments(K), (ls_arithmetic)arithmetic};
}
static inline int64_t ls_value_bytes(ls_arithmetic arithmetic) { return arithmetic == LS_FLOAT32 ? 4 : 2; }
static inline const char *ls_panel(const ls_weight *w, int64_t index) {
    return w->data + index * w->K * LS_PANEL * ls_value_bytes(w->arithmetic);
}
/* Row `index` of x, whose row stride is ldx elements. */
static inline const void *ls_row(const void *x, int64_t ldx, int64_t index, ls_arithmetic arithmetic) {
    return (const char *)x + index * ldx * (arithmetic == LS_BFLOAT16_DOT ? 2 : 4);
}

/* What to ask memory for while a product is computed: `lines` lines of the cache from `at` on in each step over k. */
typedef struct {
    const char *at;
    int lines;
} ls_ahead;

LS_INLINE void ls_ask_ahead(ls_ahead *ahead) {
    for (int i = 0; i < ahead->lines; i++, ahead->at += LS_LINE) __builtin_prefetch(ahead->at, 0, LS_SECOND_CACHE);
}

/* The chains of one block: a[r][v] += x[r][begin..end) times columns [16 v, 16 v + 16) from w on, which is at k = begin. */
LS_INLINE void ls_block_float32(int rows, const float *x, int64_t ldx, const float *w, int64_t n, ls_ahead *ahead,
                                v16 a[LS_TILE_ROWS][LS_TILE_VECTORS]) {
    for (int64_t k = 0; k < n; k++, w += LS_PANEL) {
        v16 b[LS_TILE_VECTORS];
        ls_ask_ahead(ahead);
        for (int v = 0; v < LS_TILE_VECTORS; v++) b[v] = v16_load(w + 16 * v);
        for (int r = 0; r < rows; r++) {
            v16 s = v16_set1(x[r * ldx + k]);
            for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_fma(s, b[v], a[r][v]);
        }
    }
}

LS_INLINE void ls_block_bfloat16(int rows, const float *x, int64_t ldx, const uint16_t *w, int64_t n, ls_ahead *ahead,
                                 v16 a[LS_TILE_ROWS][LS_TILE_VECTORS]) {
    for (int64_t k = 0; k < n; k += 2, w += 2 * LS_PANEL) {
        w16 pairs[LS_TILE_VECTORS];
        v16 b[LS_TILE_VECTORS];
        ls_ask_ahead(ahead);
        for (int v = 0; v < LS_TILE_VECTORS; v++) pairs[v] = w16_load(w + 32 * v), b[v] = v16_even(pairs[v]);
        for (int r = 0; r < rows; r++) {
            v16 s = v16_set1(x[r * ldx + k]);
            for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_fma(s, b[v], a[r][v]);
        }
        for (int v = 0; v < LS_TILE_VECTORS; v++) b[v] = v16_odd(pairs[v]);
        for (int r = 0; r < rows; r++) {
            v16 s = v16_set1(x[r * ldx + k + 1]);
            for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_fma(s, b[v], a[r][v]);
        }
    }
}

LS_INLINE void ls_block_bfloat16_dot(int rows, const uint16_t *x, int64_t ldx, const uint16_t *w, int64_t n,
                                     ls_ahead *ahead, v16 a[LS_TILE_ROWS][LS_TILE_VECTORS]) {
    for (int64_t k = 0; k < n; k += 2, w += 2 * LS_PANEL) {
        w16 b[LS_TILE_VECTORS];
        ls_ask_ahead(ahead);
        for (int v = 0; v < LS_TILE_VECTORS; v++) b[v] = w16_load(w + 32 * v);
        for (int r = 0; r < rows; r++) {
            uint32_t pair;
            memcpy(&pair, x + r * ldx + k, sizeof pair);
            w16 s = w16_set1(pair);
            for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_dot(s, b[v], a[r][v]);
        }
    }
}

/* sum[r] (+)= one block of k, for the columns from `column` on. */
LS_INLINE void ls_add_block(ls_arithmetic arithmetic, int rows, const void *x, int64_t ldx, const void *panel,
                            int64_t begin, int64_t end, int column, int is_first, ls_ahead *ahead,
                            float (*sum)[LS_TILE_WIDTH]) {
    v16 a[LS_TILE_ROWS][LS_TILE_VECTORS];
    int64_t place = begin * LS_PANEL + column;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < LS_TILE_VECTORS; v++) a[r][v] = v16_zero();
    if (arithmetic == LS_FLOAT32)
        ls_block_float32(rows, (const float *)x + begin, ldx, (const float *)panel + place, end - begin,
                         ahead, a);
    else if (arithmetic == LS_BFLOAT16)
        ls_block_bfloat16(rows, (const float *)x + begin, ldx, (const uint16_t *)panel + place + column,
                          end - begin, ahead, a);
    else
        ls_block_bfloat16_dot(rows, (const uint16_t *)x + begin, ldx, (const uint16_t *)panel + place + column,
                              end - begin, ahead, a);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < LS_TILE_VECTORS; v++)
            v16_store(sum[r] + 16 * v, is_first ? a[r][v] : v16_add(v16_load(sum[r] + 16 * v), a[r][v]));
}

LS_INLINE void ls_product_body(ls_arithmetic arithmetic, int rows, const void *x, int64_t ldx, const void *panel,
                               int64_t K, int64_t segments, ls_ahead ahead, float *out) {
    for (int c = 0; c < LS_PANEL; c += LS_TILE_WIDTH, ahead.lines = 0) {
        float level[4][LS_TILE_ROWS][LS_TILE_WIDTH]; /* the tree's open sums: one more per doubling of segments */
        int depth = 0;
        for (int64_t segment = 0; segment < segments; segment++) {
            int64_t first = segment * (K / segments), last = segment + 1 == segments ? K : first + K / segments;
            for (int64_t k = first; k < last; k += LS_K_BLOCK)
                ls_add_block(arithmetic, rows, x, ldx, panel, k, k + LS_K_BLOCK < last ? k + LS_K_BLOCK : last, c,
                             k == first, &ahead, level[depth]);
            depth++;
            for (int64_t done = segment + 1; done % 2 == 0; done /= 2) {
                depth--;
                for (int r = 0; r < rows; r++)
                    for (int v = 0; v < LS_TILE_WIDTH; v += 16)
                        v16_store(level[depth - 1][r] + v,
                                  v16_add(v16_load(level[depth - 1][r] + v), v16_load(level[depth][r] + v)));
            }
        }
        for (int r = 0; r < rows; r++) memcpy(out + r * LS_PANEL + c, level[0][r], sizeof level[0][r]);
    }
}

#define LS_DEFINE_PRODUCT(NAME, ARITHMETIC, ROWS)                                                                        \
    static void ls_product_##NAME##_##ROWS(const void *x, int64_t ldx, const void *panel, int64_t K, int64_t segments,   \
                                           ls_ahead ahead, float *out) {                                                \
        ls_product_body(ARITHMETIC, ROWS, x, ldx, panel, K, segments, ahead, out);                                      \
    }
#define LS_DEFINE_PRODUCTS(NAME, ARITHMETIC)   \
    LS_DEFINE_PRODUCT(NAME, ARITHMETIC, 1)     \
    LS_DEFINE_PRODUCT(NAME, ARITHMETIC, 2)     \
    LS_DEFINE_PRODUCT(NAME, ARITHMETIC, 3)     \
    LS_DEFINE_PRODUCT(NAME, ARITHMETIC, 4)     \
    LS_DEFINE_PRODUCT(NAME, ARITHMETIC, 5)     \
    LS_DEFINE_PRODUCT(NAME, ARITHMETIC, 6)
LS_DEFINE_PRODUCTS(float32, LS_FLOAT32)
LS_DEFINE_PRODUCTS(bfloat16, LS_BFLOAT16)
LS_DEFINE_PRODUCTS(dot, LS_BFLOAT16_DOT)

typedef void (*ls_product_fn)(const void *, int64_t, const void *, int64_t, int64_t, ls_ahead, float *);
#define LS_PRODUCTS(NAME)                                                                                      \
    {                                                                                                          \
        ls_product_##NAME##_1, ls_product_##NAME##_2, ls_product_##NAME##_3, ls_product_##NAME##_4,            \
            ls_product_##NAME##_5, ls_product_##NAME##_6                                                       \
    }
static const ls_product_fn ls_products[][LS_TILE_ROWS] = {LS_PRODUCTS(float32), LS_PRODUCTS(bfloat16), LS_PRODUCTS(dot)};

/* out[rows][64]: the products of 1 to 6 rows of x (row stride ldx elements) with panel `index` of a weight, while `ahead`
 * is on its way. */
static inline void ls_panel_product(int rows, const void *x, int64_t ldx, const ls_weight *w, int64_t index, ls_ahead ahead,
                                    float *out) {
    ls_products[w->arithmetic][rows - 1](x, ldx, ls_panel(w, index), w->K, w->segments, ahead, out);
}

/* Turns blocks of float32 round. */
#pragma once
#include "simd.h"

/* to[j][i] = from[i][j] for 8 rows of 8. */
static inline void transpose_8x8(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
#if defined(__AVX2__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

/* to[j][i] = from[i][j] for `rows` rows of `columns`. */
static inline void transpose(const float *from, int64_t from_stride, float *to, int64_t to_stride, int64_t rows, int64_t columns) {
    int64_t whole_rows = rows & ~7, whole_columns = columns & ~7;
    for (int64_t i = 0; i < whole_rows; i += 8)
        for (int64_t j = 0; j < whole_columns; j += 8)
            transpose_8x8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
            to[j * to_stride + i] = from[i * from_stride + j];
}

/* Linear layers over packed weights, packing and unpacking, embedding rows. */
#include "panel.h"
#include "pool.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Rows are dealt out in chunks of whole register tiles, small enough that every thread finds work. */
static int64_t rows_per_chunk(int64_t num_rows, int64_t num_panels) {
    int64_t row_tiles = (num_rows + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
    int64_t chunks = (8 * ls_get_num_threads() + num_panels - 1) / num_panels;
    int64_t tiles = row_tiles / smaller(chunks, row_tiles);
    return LS_TILE_ROWS * smaller(tiles, 16);
}

typedef struct {
    const float *x, *packed, *bias;
    float *y;
    int64_t M, N, K, ldx, ldy, segments, chunk_rows, num_chunks;
} linear_job;

static void linear_tile(void *argument, int64_t tile) {
    const linear_job *j = argument;
    int64_t p = tile / j->num_chunks, begin = (tile % j->num_chunks) * j->chunk_rows;
    int64_t end = smaller(begin + j->chunk_rows, j->M), column = p * LS_PANEL;
    int width = (int)smaller(LS_PANEL, j->N - column);
    const float *panel = j->packed + p * j->K * LS_PANEL;
    float out[LS_TILE_ROWS * LS_PANEL];
    for (int64_t m = begin; m < end; m += LS_TILE_ROWS) {
        int rows = (int)smaller(LS_TILE_ROWS, end - m);
        ls_panel_product(rows, j->x + m * j->ldx, j->ldx, panel, j->K, j->segments, out);
        for (int r = 0; r < rows; r++) {
            float *y = j->y + (m + r) * j->ldy + column;
            const float *o = out + r * LS_PANEL;
            if (j->bias)
                for (int i = 0; i < width; i++) y[i] = o[i] + j->bias[column + i];
            else
                memcpy(y, o, (size_t)width * sizeof(float));
        }
    }
}

/* y[M, N] = x[M, K] @ weight[N, K].T + bias[N]; bias may be null. Row strides in floats. */
void ls_linear(const float *x, int64_t ldx, const float *packed, const float *bias, float *y, int64_t ldy, int64_t M,
               int64_t N, int64_t K) {
    if (M <= 0 || N <= 0) return;
    int64_t num_panels = (N + LS_PANEL - 1) / LS_PANEL, chunk = rows_per_chunk(M, num_panels);
    linear_job job = {x, packed, bias, y, M, N, K, ldx, ldy, ls_num_segments(K), chunk, (M + chunk - 1) / chunk};
    ls_parallel(linear_tile, &job, num_panels * job.num_chunks);
}

typedef struct {
    float *packed, *rows;
    int64_t first_row, num_rows, K, first_panel;
} pack_job;

#define LS_PACK_BLOCK 16  /* columns of all rows of a panel that are moved while their cache lines are warm */
#define LS_PACK_AHEAD 64  /* floats of a row that are asked for before they are needed: 64 rows are too many streams for
                             the processor to foresee */

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
static void transpose(const float *from, int64_t from_stride, float *to, int64_t to_stride, int64_t rows, int64_t columns) {
    int64_t whole_rows = rows & ~7, whole_columns = columns & ~7;
    for (int64_t i = 0; i < whole_rows; i += 8)
        for (int64_t j = 0; j < whole_columns; j += 8)
            transpose_8x8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

typedef struct { /* the part of one panel that a range of rows covers */
    float *panel, *rows;
    int64_t num_rows;
} pack_part;

static pack_part find_part(const pack_job *j, int64_t tile) {
    int64_t p = j->first_panel + tile;
    int64_t begin = p * LS_PANEL > j->first_row ? p * LS_PANEL : j->first_row;
    int64_t end = smaller((p + 1) * LS_PANEL, j->first_row + j->num_rows);
    float *panel = j->packed + p * j->K * LS_PANEL + begin % LS_PANEL;
    return (pack_part){panel, j->rows + (begin - j->first_row) * j->K, end - begin};
}

static void pack_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    pack_part part = find_part(j, tile);
    for (int64_t k = 0; k < j->K; k += LS_PACK_BLOCK) {
        for (int64_t n = 0; n < part.num_rows; n++) __builtin_prefetch(part.rows + n * j->K + k + LS_PACK_AHEAD);
        transpose(part.rows + k, j->K, part.panel + k * LS_PANEL, LS_PANEL, part.num_rows, smaller(LS_PACK_BLOCK, j->K - k));
    }
}

static void unpack_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    pack_part part = find_part(j, tile);
    for (int64_t k = 0; k < j->K; k += LS_PACK_BLOCK)
        transpose(part.panel + k * LS_PANEL, LS_PANEL, part.rows + k, j->K, smaller(LS_PACK_BLOCK, j->K - k), part.num_rows);
}

static void run_pack(ls_tile_fn fn, float *packed, float *rows, int64_t first_row, int64_t num_rows, int64_t K) {
    if (num_rows <= 0) return;
    int64_t first = first_row / LS_PANEL, last = (first_row + num_rows - 1) / LS_PANEL;
    pack_job job = {packed, rows, first_row, num_rows, K, first};
    ls_parallel(fn, &job, last - first + 1);
}

/* Writes rows[num_rows, K] into rows [first_row, first_row + num_rows) of a packed weight. */
void ls_pack_rows(float *packed, const float *rows, int64_t first_row, int64_t num_rows, int64_t K) {
    run_pack(pack_tile, packed, (float *)rows, first_row, num_rows, K);
}

/* The inverse of ls_pack_rows. */
void ls_unpack_rows(const float *packed, float *rows, int64_t first_row, int64_t num_rows, int64_t K) {
    run_pack(unpack_tile, (float *)packed, rows, first_row, num_rows, K);
}

typedef struct {
    const float *packed;
    const int64_t *ids;
    float *out;
    int64_t num_ids, K;
} embedding_job;

static void embedding_tile(void *argument, int64_t tile) {
    const embedding_job *j = argument;
    for (int64_t i = tile * 16; i < smaller(tile * 16 + 16, j->num_ids); i++) {
        const float *column = j->packed + (j->ids[i] / LS_PANEL) * j->K * LS_PANEL + j->ids[i] % LS_PANEL;
        for (int64_t k = 0; k < j->K; k++) j->out[i * j->K + k] = column[k * LS_PANEL];
    }
}

/* out[T, K] = weight[ids] from a packed weight. */
void ls_embedding(const float *packed, const int64_t *ids, float *out, int64_t num_ids, int64_t K) {
    embedding_job job = {packed, ids, out, num_ids, K};
    ls_parallel(embedding_tile, &job, (num_ids + 15) / 16);
}

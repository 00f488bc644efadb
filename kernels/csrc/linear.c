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

#define LS_PACK_BLOCK 16 /* rows and columns of a block that is transposed while it is in the cache */

static void pack_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    int64_t p = j->first_panel + tile;
    int64_t begin = p * LS_PANEL > j->first_row ? p * LS_PANEL : j->first_row;
    int64_t end = smaller((p + 1) * LS_PANEL, j->first_row + j->num_rows);
    float *panel = j->packed + p * j->K * LS_PANEL;
    for (int64_t k0 = 0; k0 < j->K; k0 += LS_PACK_BLOCK)
        for (int64_t n0 = begin; n0 < end; n0 += LS_PACK_BLOCK)
            for (int64_t k = k0; k < smaller(k0 + LS_PACK_BLOCK, j->K); k++)
                for (int64_t n = n0; n < smaller(n0 + LS_PACK_BLOCK, end); n++)
                    panel[k * LS_PANEL + n % LS_PANEL] = j->rows[(n - j->first_row) * j->K + k];
}

static void unpack_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    int64_t p = j->first_panel + tile;
    int64_t begin = p * LS_PANEL > j->first_row ? p * LS_PANEL : j->first_row;
    int64_t end = smaller((p + 1) * LS_PANEL, j->first_row + j->num_rows);
    const float *panel = j->packed + p * j->K * LS_PANEL;
    for (int64_t k0 = 0; k0 < j->K; k0 += LS_PACK_BLOCK)
        for (int64_t n = begin; n < end; n++)
            for (int64_t k = k0; k < smaller(k0 + LS_PACK_BLOCK, j->K); k++)
                j->rows[(n - j->first_row) * j->K + k] = panel[k * LS_PANEL + n % LS_PANEL];
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

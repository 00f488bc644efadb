/* Linear layers over packed weights, packing and unpacking, embedding rows. */
#include "ops.h"
#include "pool.h"
#include "sharing.h"
#include "stream.h"
#include "transpose.h"

#define LS_ROUND_TASK 16384 /* elements rounded at once: below it a second thread costs more than it saves */

typedef struct {
    const void *x;
    const float *addend;
    float *y;
    ls_weight weight, next;
    int64_t N, ldx, lda, ldy;
    ls_sharing sharing;
} linear_job;

static void linear_tile(void *argument, int64_t index) {
    const linear_job *j = argument;
    ls_task task = ls_task_at(&j->sharing, index);
    const char *next = ls_next_panel(&j->sharing, &j->weight, &j->next, index, task.panel);
    int64_t column = task.panel * LS_PANEL, num_passes = (task.end - task.begin + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
    int width = (int)ls_least(LS_PANEL, j->N - column);
    float out[LS_TILE_ROWS * LS_PANEL];
    for (int64_t pass = 0, m = task.begin; m < task.end; pass++, m += LS_TILE_ROWS) {
        int rows = (int)ls_least(LS_TILE_ROWS, task.end - m);
        ls_ahead ahead = ls_part_ahead(&j->weight, next, pass, num_passes);
        ls_panel_product(rows, ls_row(j->x, j->ldx, m, j->weight.arithmetic), j->ldx, &j->weight, task.panel, ahead, out);
        for (int r = 0; r < rows; r++) {
            float *y = j->y + (m + r) * j->ldy + column;
            const float *o = out + r * LS_PANEL;
            if (j->addend)
                for (int i = 0; i < width; i++) y[i] = o[i] + j->addend[(m + r) * j->lda + column + i];
            else
                memcpy(y, o, (size_t)width * sizeof(float));
        }
    }
}

/* ls_linear when it is known that the weight `next` [.., next_K] (null: none) will be multiplied soon after. */
void ls_linear_then(const void *x, int64_t ldx, const void *packed, int64_t arithmetic, const float *addend, int64_t lda,
                    float *y, int64_t ldy, int64_t M, int64_t N, int64_t K, const void *next, int64_t next_K) {
    if (M <= 0 || N <= 0) return;
    linear_job job = {x, addend, y, ls_make_weight(packed, K, arithmetic), ls_make_weight(next, next_K, arithmetic),
                      N, ldx, lda, ldy, {0}};
    job.sharing = ls_share_out(&job.weight, M, N, ls_get_num_threads());
    ls_parallel(linear_tile, &job, job.sharing.num_tasks);
}

/* y[M, N] = x[M, K] @ weight[N, K].T + addend[M, N], which may be null, y itself or, with row stride 0, a bias. Row strides
 * in elements. x is float32, or bfloat16 where the arithmetic is the dot product's. */
void ls_linear(const void *x, int64_t ldx, const void *packed, int64_t arithmetic, const float *addend, int64_t lda,
               float *y, int64_t ldy, int64_t M, int64_t N, int64_t K) {
    ls_linear_then(x, ldx, packed, arithmetic, addend, lda, y, ldy, M, N, K, NULL, K);
}

typedef struct {
    void *packed;
    float *rows;
    int64_t first_row, num_rows, K, first_panel;
} pack_job;

#define LS_PACK_BLOCK 16  /* columns of all rows of a panel that are moved while their cache lines are warm */
#define LS_PACK_AHEAD 64  /* floats of a row that are asked for before they are needed: 64 rows are too many streams for
                             the processor to foresee */

typedef struct { /* the part of one panel that a range of rows covers */
    int64_t place; /* of its first element at k = 0, in elements of float32 storage */
    float *rows;
    int64_t num_rows;
} pack_part;

static pack_part find_part(const pack_job *j, int64_t tile) {
    int64_t p = j->first_panel + tile;
    int64_t begin = p * LS_PANEL > j->first_row ? p * LS_PANEL : j->first_row;
    int64_t end = ls_least((p + 1) * LS_PANEL, j->first_row + j->num_rows);
    return (pack_part){p * j->K * LS_PANEL + begin % LS_PANEL, j->rows + (begin - j->first_row) * j->K, end - begin};
}

static void prefetch_rows(const pack_job *j, const pack_part *part, int64_t k) {
    for (int64_t n = 0; n < part->num_rows; n++) __builtin_prefetch(part->rows + n * j->K + k + LS_PACK_AHEAD);
}

static void pack_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    pack_part part = find_part(j, tile);
    float *panel = (float *)j->packed + part.place;
    _Alignas(LS_LINE) float block[LS_PACK_BLOCK * LS_PANEL];
    for (int64_t k = 0; k < j->K; k += LS_PACK_BLOCK) {
        int64_t n = ls_least(LS_PACK_BLOCK, j->K - k);
        prefetch_rows(j, &part, k);
        transpose(part.rows + k, j->K, block, LS_PANEL, part.num_rows, n);
        for (int64_t i = 0; i < n; i++) stream_words(panel + (k + i) * LS_PANEL, block + i * LS_PANEL, part.num_rows);
    }
    stream_end();
}

static void unpack_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    pack_part part = find_part(j, tile);
    const float *panel = (const float *)j->packed + part.place;
    for (int64_t k = 0; k < j->K; k += LS_PACK_BLOCK)
        transpose(panel + k * LS_PANEL, LS_PANEL, part.rows + k, j->K, ls_least(LS_PACK_BLOCK, j->K - k), part.num_rows);
}

/* words[i] = the bfloat16 of even[i] below that of odd[i]. */
static inline void join_pairs(const float *even, const float *odd, uint32_t *words, int64_t n) {
    for (int64_t i = 0; i < n; i++) words[i] = bf16_from_float(even[i]) | (uint32_t)bf16_from_float(odd[i]) << 16;
}
static inline void split_pairs(const uint32_t *words, float *even, float *odd, int64_t n) {
    for (int64_t i = 0; i < n; i++) even[i] = float_from_bf16((uint16_t)words[i]), odd[i] = float_from_bf16(words[i] >> 16);
}

static uint32_t *first_pair(const pack_job *j, const pack_part *part) { /* storage has half as many words as elements */
    int64_t column = part->place % LS_PANEL;
    return (uint32_t *)j->packed + (part->place - column) / 2 + column;
}

static void pack_bf16_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    pack_part part = find_part(j, tile);
    uint32_t *panel = first_pair(j, &part), pairs[LS_PANEL];
    float block[LS_PACK_BLOCK][LS_PANEL];
    for (int64_t k = 0; k < j->K; k += LS_PACK_BLOCK) {
        int64_t n = ls_least(LS_PACK_BLOCK, j->K - k);
        prefetch_rows(j, &part, k);
        transpose(part.rows + k, j->K, block[0], LS_PANEL, part.num_rows, n);
        for (int64_t i = 0; i < n; i += 2) {
            join_pairs(block[i], block[i + 1], pairs, part.num_rows);
            stream_words(panel + (k + i) / 2 * LS_PANEL, pairs, part.num_rows);
        }
    }
    stream_end();
}

static void unpack_bf16_tile(void *argument, int64_t tile) {
    const pack_job *j = argument;
    pack_part part = find_part(j, tile);
    const uint32_t *panel = first_pair(j, &part);
    float block[LS_PACK_BLOCK][LS_PANEL];
    for (int64_t k = 0; k < j->K; k += LS_PACK_BLOCK) {
        int64_t n = ls_least(LS_PACK_BLOCK, j->K - k);
        for (int64_t i = 0; i < n; i += 2)
            split_pairs(panel + (k + i) / 2 * LS_PANEL, block[i], block[i + 1], part.num_rows);
        transpose(block[0], LS_PANEL, part.rows + k, j->K, n, part.num_rows);
    }
}

static void run_pack(ls_tile_fn fn, void *packed, float *rows, int64_t first_row, int64_t num_rows, int64_t K) {
    if (num_rows <= 0) return;
    int64_t first = first_row / LS_PANEL, last = (first_row + num_rows - 1) / LS_PANEL;
    pack_job job = {packed, rows, first_row, num_rows, K, first};
    ls_parallel(fn, &job, last - first + 1);
}

/* Writes rows[num_rows, K] into rows [first_row, first_row + num_rows) of a packed weight, rounded to its type. */
void ls_pack_rows(void *packed, int64_t arithmetic, const float *rows, int64_t first_row, int64_t num_rows, int64_t K) {
    run_pack(arithmetic == LS_FLOAT32 ? pack_tile : pack_bf16_tile, packed, (float *)rows, first_row, num_rows, K);
}

/* The inverse of ls_pack_rows. */
void ls_unpack_rows(const void *packed, int64_t arithmetic, float *rows, int64_t first_row, int64_t num_rows, int64_t K) {
    run_pack(arithmetic == LS_FLOAT32 ? unpack_tile : unpack_bf16_tile, (void *)packed, rows, first_row, num_rows, K);
}

typedef struct {
    const void *packed;
    const int64_t *ids;
    float *out;
    int64_t num_ids, K;
} embedding_job;

static void embedding_tile(void *argument, int64_t tile) {
    const embedding_job *j = argument;
    for (int64_t i = tile * 16; i < ls_least(tile * 16 + 16, j->num_ids); i++) {
        const float *column = (const float *)j->packed + (j->ids[i] / LS_PANEL) * j->K * LS_PANEL + j->ids[i] % LS_PANEL;
        for (int64_t k = 0; k < j->K; k++) j->out[i * j->K + k] = column[k * LS_PANEL];
    }
}

static void embedding_bf16_tile(void *argument, int64_t tile) {
    const embedding_job *j = argument;
    for (int64_t i = tile * 16; i < ls_least(tile * 16 + 16, j->num_ids); i++) {
        const uint16_t *panel = (const uint16_t *)j->packed + (j->ids[i] / LS_PANEL) * j->K * LS_PANEL;
        const uint16_t *column = panel + j->ids[i] % LS_PANEL * 2;
        for (int64_t k = 0; k < j->K; k++) j->out[i * j->K + k] = float_from_bf16(column[k / 2 * 2 * LS_PANEL + k % 2]);
    }
}

/* out[T, K] = weight[ids] from a packed weight. */
void ls_embedding(const void *packed, int64_t arithmetic, const int64_t *ids, float *out, int64_t num_ids, int64_t K) {
    embedding_job job = {packed, ids, out, num_ids, K};
    ls_parallel(arithmetic == LS_FLOAT32 ? embedding_tile : embedding_bf16_tile, &job, (num_ids + 15) / 16);
}


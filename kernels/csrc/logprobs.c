/* Log-probabilities and sampling straight from hidden states: a panel of the vocabulary is reduced while it is in
 * registers, so logits are never written out. Both sides of the promise, engine and trainer, run this file. */
#include "panel.h"
#include "pool.h"
#include "vocabulary.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    const float *x, *packed, *temperature;
    float *block_max, *block_sum;
    int64_t T, V, D, segments, num_blocks, chunk_rows, num_chunks;
} stats_job;

static void stats_tile(void *argument, int64_t tile) {
    const stats_job *j = argument;
    int64_t block = tile / j->num_chunks, begin = (tile % j->num_chunks) * j->chunk_rows;
    int64_t end = smaller(begin + j->chunk_rows, j->T);
    int width = (int)smaller(LS_PANEL, j->V - block * LS_PANEL);
    float z[LS_TILE_ROWS * LS_PANEL];
    for (int64_t row = begin; row < end; row += LS_TILE_ROWS) {
        int rows = (int)smaller(LS_TILE_ROWS, end - row);
        ls_panel_product(rows, j->x + row * j->D, j->D, j->packed + block * j->D * LS_PANEL, j->D, j->segments, z);
        for (int r = 0; r < rows; r++) {
            int64_t place = (row + r) * j->num_blocks + block;
            reduce_block(z + r * LS_PANEL, width, j->temperature[row + r], &j->block_max[place], &j->block_sum[place]);
        }
    }
}

/* block_max, block_sum [T, ceil(V / 64)] of the logits x[T, D] @ weight[V, D].T divided by temperature[T]. */
void ls_vocab_stats(const float *x, const float *packed, const float *temperature, float *block_max, float *block_sum,
                    int64_t T, int64_t V, int64_t D) {
    int64_t num_blocks = (V + LS_PANEL - 1) / LS_PANEL, chunk = smaller(96, (T + 5) / 6 * 6);
    if (T <= 0) return;
    stats_job job = {x, packed, temperature, block_max, block_sum, T, V, D, ls_num_segments(D), num_blocks, chunk,
                     (T + chunk - 1) / chunk};
    ls_parallel(stats_tile, &job, num_blocks * job.num_chunks);
}

typedef struct {
    const float *x, *packed, *temperature, *block_max, *block_sum;
    const int64_t *rows, *positions, *indices;
    const uint64_t *seeds;
    const uint8_t *is_greedy;
    int64_t *tokens;
    float *logprobs, *row_max;
    double *row_sum;
    int64_t num_draws, V, D, num_blocks;
} draw_job;

/* Logits over temperature of one block for one row, as ls_vocab_stats saw them. */
static void block_logits(const draw_job *j, int64_t row, int64_t block, float *z, float *highest) {
    float sum;
    ls_panel_product(1, j->x + row * j->D, j->D, j->packed + block * j->D * LS_PANEL, j->D, ls_num_segments(j->D), z);
    reduce_block(z, (int)smaller(LS_PANEL, j->V - block * LS_PANEL), j->temperature[row], highest, &sum);
}

/* The highest logit M and the running total C of a row. */
static double row_total(const draw_job *j, int64_t row, float *top) {
    const float *block_max = j->block_max + row * j->num_blocks, *block_sum = j->block_sum + row * j->num_blocks;
    float m = -INFINITY;
    for (int64_t b = 0; b < j->num_blocks; b++) m = block_max[b] > m ? block_max[b] : m;
    double total = 0.0;
    for (int64_t b = 0; b < j->num_blocks; b++) total += block_mass(block_max[b], block_sum[b], m);
    *top = m;
    return total;
}

/* The lowest id whose logit is `top`; the bounds matter where logits are NaN and none is. */
static int64_t greedy_token(const draw_job *j, int64_t row, float top) {
    float z[LS_PANEL], highest;
    int64_t block = 0, i = 0;
    while (block + 1 < j->num_blocks && j->block_max[row * j->num_blocks + block] != top) block++;
    block_logits(j, row, block, z, &highest);
    while (i + 1 < smaller(LS_PANEL, j->V - block * LS_PANEL) && z[i] != top) i++;
    return block * LS_PANEL + i;
}

/* The first block whose running total passes u * C, then the first id inside it; if rounding leaves none, the last id with
 * mass. */
static int64_t drawn_token(const draw_job *j, int64_t draw, int64_t row, float top, double total) {
    double u = (double)philox_bits(j->seeds[draw], (uint32_t)j->positions[draw], (uint32_t)j->indices[draw]) * 0x1p-53;
    double target = u * total, running;
    int64_t place = row * j->num_blocks;
    int64_t block = block_at(j->block_max + place, j->block_sum + place, j->num_blocks, top, target, &running);
    float z[LS_PANEL], highest;
    block_logits(j, row, block, z, &highest);
    int64_t width = smaller(LS_PANEL, j->V - block * LS_PANEL);
    return block * LS_PANEL + id_in_block(z, width, highest, top, running, target);
}

static void draw_tile(void *argument, int64_t draw) {
    const draw_job *j = argument;
    int64_t row = j->rows ? j->rows[draw] : draw;
    float top, z[LS_PANEL], highest;
    double total = row_total(j, row, &top);
    int64_t token;
    if (!j->seeds) token = j->tokens[draw];
    else token = j->tokens[draw] = j->is_greedy[draw] ? greedy_token(j, row, top) : drawn_token(j, draw, row, top, total);
    block_logits(j, row, token / LS_PANEL, z, &highest);
    /* A NaN or infinite logit leaves no finite total: the answer is NaN, not a number that looks like one. */
    j->logprobs[draw] = total < INFINITY ? (z[token % LS_PANEL] - top) - (float)log1(total) : NAN;
    if (j->row_max) j->row_max[draw] = top, j->row_sum[draw] = total;
}

/* logprobs[n] of given tokens[n] (seeds null) or of tokens drawn here, for rows[n] of x (draw i takes row i where rows is
 * null) whose statistics ls_vocab_stats has left in block_max and block_sum. A draw is keyed by seed, position and index
 * alone. row_max, row_sum [n] (or null) receive M and C for the backward pass. */
void ls_draw(const float *x, const float *packed, const float *temperature, const float *block_max,
             const float *block_sum, const int64_t *rows, const uint64_t *seeds, const int64_t *positions,
             const int64_t *indices, const uint8_t *is_greedy, int64_t *tokens, float *logprobs, float *row_max,
             double *row_sum, int64_t num_draws, int64_t V, int64_t D) {
    draw_job job = {x, packed, temperature, block_max, block_sum, rows, positions, indices, seeds, is_greedy, tokens,
                    logprobs, row_max, row_sum, num_draws, V, D, (V + LS_PANEL - 1) / LS_PANEL};
    ls_parallel(draw_tile, &job, num_draws);
}

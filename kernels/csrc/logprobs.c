/* Log-probabilities and sampling straight from hidden states: a panel of the vocabulary is reduced while it is in
 * registers, so logits are never written out. Both sides of the promise, engine and trainer, run this file. */
#include "pool.h"
#include "sharing.h"
#include "vocabulary.h"

typedef struct {
    const void *x;
    ls_weight head;
    const float *temperature;
    float *block_max, *block_sum;
    int64_t V, num_blocks;
    ls_sharing sharing;
} stats_job;

/* The logits of `rows` rows from `row` on in one block. */
static void panel_logits(const void *x, const ls_weight *head, int64_t row, int rows, int64_t block, ls_ahead ahead,
                         float *z) {
    ls_panel_product(rows, ls_row(x, head->K, row, head->arithmetic), head->K, head, block, ahead, z);
}

static void stats_tile(void *argument, int64_t index) {
    const stats_job *j = argument;
    ls_task task = ls_task_at(&j->sharing, index);
    const char *next = ls_next_panel(&j->sharing, &j->head, NULL, index, task.panel);
    int64_t num_passes = (task.end - task.begin + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
    int width = (int)ls_least(LS_PANEL, j->V - task.panel * LS_PANEL);
    float z[LS_TILE_ROWS * LS_PANEL];
    for (int64_t pass = 0, row = task.begin; row < task.end; pass++, row += LS_TILE_ROWS) {
        int rows = (int)ls_least(LS_TILE_ROWS, task.end - row);
        panel_logits(j->x, &j->head, row, rows, task.panel, ls_part_ahead(&j->head, next, pass, num_passes), z);
        for (int r = 0; r < rows; r++) {
            int64_t place = (row + r) * j->num_blocks + task.panel;
            reduce_block(z + r * LS_PANEL, width, j->temperature[row + r], &j->block_max[place], &j->block_sum[place]);
        }
    }
}

/* block_max, block_sum [T, ceil(V / 64)] of the logits x[T, D] @ weight[V, D].T divided by temperature[T]. x is bfloat16
 * where the arithmetic is the dot product's. */
void ls_vocab_stats(const void *x, const void *packed, int64_t arithmetic, const float *temperature, float *block_max,
                    float *block_sum, int64_t T, int64_t V, int64_t D) {
    if (T <= 0) return;
    ls_weight head = ls_make_weight(packed, D, arithmetic);
    stats_job job = {x, head, temperature, block_max, block_sum, V, (V + LS_PANEL - 1) / LS_PANEL,
                     ls_share_out(&head, T, V, ls_get_num_threads())};
    ls_parallel(stats_tile, &job, job.sharing.num_tasks);
}

typedef struct {
    const void *x;
    ls_weight head;
    const float *temperature, *block_max, *block_sum;
    const int64_t *rows, *positions, *indices;
    const uint64_t *seeds;
    const uint8_t *is_greedy;
    int64_t *tokens;
    float *logprobs, *row_max;
    double *row_sum;
    int64_t num_draws, V, num_blocks;
} draw_job;

/* Logits over temperature of one block for one row, as ls_vocab_stats saw them. */
static void block_logits(const draw_job *j, int64_t row, int64_t block, float *z, float *highest) {
    float sum;
    panel_logits(j->x, &j->head, row, 1, block, (ls_ahead){NULL, 0}, z);
    reduce_block(z, (int)ls_least(LS_PANEL, j->V - block * LS_PANEL), j->temperature[row], highest, &sum);
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
    while (i + 1 < ls_least(LS_PANEL, j->V - block * LS_PANEL) && z[i] != top) i++;
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
    int64_t width = ls_least(LS_PANEL, j->V - block * LS_PANEL);
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
void ls_draw(const void *x, const void *packed, int64_t arithmetic, const float *temperature, const float *block_max,
             const float *block_sum, const int64_t *rows, const uint64_t *seeds, const int64_t *positions,
             const int64_t *indices, const uint8_t *is_greedy, int64_t *tokens, float *logprobs, float *row_max,
             double *row_sum, int64_t num_draws, int64_t V, int64_t D) {
    draw_job job = {x, ls_make_weight(packed, D, arithmetic), temperature, block_max, block_sum, rows, positions, indices,
                    seeds, is_greedy, tokens, logprobs, row_max, row_sum, num_draws, V, (V + LS_PANEL - 1) / LS_PANEL};
    ls_parallel(draw_tile, &job, num_draws);
}

typedef struct {
    const void *x;
    ls_weight head;
    const float *temperature, *slope, *row_max, *weight;
    const int64_t *targets;
    float *dz;
    uint16_t *dz_rows, *dz_columns;
    int64_t T, V, ld_rows, ld_columns;
} gradient_job;

/* The gradient with respect to one row's logits in one block: slope (onehot - softmax), the logits being z * T. */
static void gradient_row(const gradient_job *j, int64_t row, int64_t block, float *z) {
    v16 t = v16_set1(j->temperature[row]), top = v16_set1(j->row_max[row]), weight = v16_set1(j->weight[row]);
    for (int i = 0; i < LS_PANEL; i += 16)
        v16_store(z + i, v16_mul(v16_exp(v16_sub(v16_div(v16_load(z + i), t), top)), weight));
    if (j->targets[row] / LS_PANEL == block) z[j->targets[row] % LS_PANEL] += j->slope[row];
}

static void gradient_tile(void *argument, int64_t block) {
    const gradient_job *j = argument;
    int64_t first = block * LS_PANEL;
    int width = (int)ls_least(LS_PANEL, j->V - first);
    float z[LS_TILE_ROWS * LS_PANEL];
    int64_t upcoming = block + ls_get_num_threads(), num_passes = (j->T + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
    const char *next = upcoming * LS_PANEL < j->V ? ls_panel(&j->head, upcoming) : NULL;
    for (int64_t pass = 0, row = 0; row < j->T; pass++, row += LS_TILE_ROWS) {
        int rows = (int)ls_least(LS_TILE_ROWS, j->T - row);
        panel_logits(j->x, &j->head, row, rows, block, ls_part_ahead(&j->head, next, pass, num_passes), z);
        for (int r = 0; r < rows; r++) {
            float *dz = z + r * LS_PANEL;
            gradient_row(j, row + r, block, dz);
            if (j->dz) memcpy(j->dz + (row + r) * j->V + first, dz, (size_t)width * sizeof(float));
            else
                for (int i = 0; i < width; i++) j->dz_rows[(row + r) * j->ld_rows + first + i] = bf16_from_float(dz[i]);
        }
        for (int i = 0; i < width && !j->dz; i++)
            for (int r = 0; r < rows; r++)
                j->dz_columns[(first + i) * j->ld_columns + row + r] = bf16_from_float(z[r * LS_PANEL + i]);
    }
}

/* dz[T, V] = slope (onehot(target) - exp(z - row_max) / row_sum) with z = x @ weight.T / temperature and weight[T] =
 * -slope / row_sum: float32 in dz, or (dz null) bfloat16 in dz_rows[T, ld_rows] and, transposed, dz_columns[V, ld_columns]. */
void ls_logit_gradient(const void *x, const void *packed, int64_t arithmetic, const float *temperature, const float *slope,
                       const float *row_max, const float *weight, const int64_t *targets, float *dz, uint16_t *dz_rows,
                       int64_t ld_rows, uint16_t *dz_columns, int64_t ld_columns, int64_t T, int64_t V, int64_t D) {
    gradient_job job = {x, ls_make_weight(packed, D, arithmetic), temperature, slope, row_max, weight, targets, dz, dz_rows,
                        dz_columns, T, V, ld_rows, ld_columns};
    ls_parallel(gradient_tile, &job, (V + LS_PANEL - 1) / LS_PANEL);
}

/* Operands of the bfloat16 dot product: activations and gradients rounded to bfloat16, in the layouts it reads. */
#include "bf16.h"
#include "panel.h"
#include "ops.h"
#include "pool.h"

#define LS_ROUND_TASK 16384 /* elements rounded at once: below it a second thread costs more than it saves */
#define LS_BLOCK 32         /* rows and columns that are turned round while their cache lines are warm */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    const float *x;
    uint16_t *y;
    int64_t num_rows, width, ldx, ldy, task_rows;
} round_job;

static void round_tile(void *argument, int64_t tile) {
    const round_job *j = argument;
    for (int64_t row = tile * j->task_rows; row < smaller((tile + 1) * j->task_rows, j->num_rows); row++) {
        const float *x = j->x + row * j->ldx;
        uint16_t *y = j->y + row * j->ldy;
        for (int64_t i = 0; i < j->width; i++) y[i] = bf16_from_float(x[i]);
        for (int64_t i = j->width; i < j->ldy; i++) y[i] = 0;
    }
}

/* y[num_rows, ldy] = x[num_rows, width] rounded to nearest even; zeros beyond the width. */
void ls_round_rows(const float *x, int64_t ldx, uint16_t *y, int64_t ldy, int64_t num_rows, int64_t width) {
    round_job job = {x, y, num_rows, width, ldx, ldy, width >= LS_ROUND_TASK ? 1 : LS_ROUND_TASK / width};
    ls_parallel(round_tile, &job, (num_rows + job.task_rows - 1) / job.task_rows);
}

static void round_transposed_tile(void *argument, int64_t tile) {
    const round_job *j = argument;
    int64_t first = tile * LS_BLOCK, last = smaller(first + LS_BLOCK, j->width);
    for (int64_t row = 0; row < j->ldy; row += LS_BLOCK)
        for (int64_t i = first; i < last; i++)
            for (int64_t r = row; r < smaller(row + LS_BLOCK, j->ldy); r++)
                j->y[i * j->ldy + r] = r < j->num_rows ? bf16_from_float(j->x[r * j->ldx + i]) : 0;
}

/* y[width, ldy] = x[num_rows, width] transposed and rounded; zeros beyond num_rows. */
void ls_round_transposed(const float *x, int64_t ldx, uint16_t *y, int64_t ldy, int64_t num_rows, int64_t width) {
    round_job job = {x, y, num_rows, width, ldx, ldy, 0};
    ls_parallel(round_transposed_tile, &job, (width + LS_BLOCK - 1) / LS_BLOCK);
}

typedef struct {
    const uint16_t *x;
    uint16_t *packed;
    int64_t num_rows, width, ldx, num_pairs;
} columns_job;

static void columns_tile(void *argument, int64_t panel) {
    const columns_job *j = argument;
    int64_t first = panel * LS_PANEL, width = smaller(LS_PANEL, j->width - first);
    for (int64_t pair = 0; pair < j->num_pairs; pair++) {
        uint16_t *to = j->packed + (panel * j->num_pairs + pair) * 2 * LS_PANEL;
        const uint16_t *even = j->x + 2 * pair * j->ldx + first, *odd = even + j->ldx;
        int has_odd = 2 * pair + 1 < j->num_rows;
        for (int64_t i = 0; i < width; i++) to[2 * i] = even[i], to[2 * i + 1] = has_odd ? odd[i] : 0;
    }
}

/* Packs x[num_rows, width] bfloat16 as the weight [width, num_rows] of a product over x's rows; an odd number of rows gets
 * one of zeros. */
void ls_pack_columns(const uint16_t *x, int64_t ldx, uint16_t *packed, int64_t num_rows, int64_t width) {
    columns_job job = {x, packed, num_rows, width, ldx, (num_rows + 1) / 2};
    ls_parallel(columns_tile, &job, (width + LS_PANEL - 1) / LS_PANEL);
}

/* Row-wise operations: RMSNorm (also fused with the residual sum), rotary embedding, silu-and-mul. */
#include <math.h>

#include "exp_log.h"
#include "ops.h"
#include "pool.h"

#define LS_TASK_FLOATS 8192 /* work handed out at once: below it a second thread costs more than it saves */

static int64_t rows_per_task(int64_t width) { return width >= LS_TASK_FLOATS ? 1 : LS_TASK_FLOATS / width; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static v16 load_some(const float *p, int64_t n) { return n >= 16 ? v16_load(p) : v16_load_first(p, (int)n); }
static void store_some(float *p, v16 a, int64_t n) {
    if (n >= 16) v16_store(p, a);
    else v16_store_first(p, a, (int)n);
}

typedef struct {
    const float *x, *delta, *weight;
    float *sum, *y, *scale;
    int64_t num_rows, num_heads, D, ldx, ldy, task_rows;
    float eps;
} norm_job;

static void norm_row(const norm_job *j, int64_t row) {
    int64_t D = j->D, token = row / j->num_heads, place = row % j->num_heads * D;
    const float *x = j->x + token * j->ldx + place;
    if (j->delta) {
        const float *delta = j->delta + row * D;
        float *sum = j->sum + row * D;
        for (int64_t i = 0; i < D; i++) sum[i] = x[i] + delta[i];
        x = sum;
    }
    v16 squares = v16_zero();
    int64_t whole = D & ~15;
    for (int64_t i = 0; i < whole; i += 16) {
        v16 v = v16_load(x + i);
        squares = v16_fma(v, v, squares);
    }
    if (whole < D) { /* lanes past the end keep their sums, signs and all */
        float lanes[16];
        v16_store(lanes, squares);
        for (int64_t i = whole; i < D; i++) lanes[i - whole] = __builtin_fmaf(x[i], x[i], lanes[i - whole]);
        squares = v16_load(lanes);
    }
    float r = 1.0f / __builtin_sqrtf(v16_sum(squares) / (float)D + j->eps);
    if (j->scale) j->scale[row] = r;
    float *y = j->y + token * j->ldy + place;
    for (int64_t i = 0; i < D; i++) y[i] = (x[i] * r) * j->weight[i];
}

static void norm_tile(void *argument, int64_t tile) {
    const norm_job *j = argument;
    int64_t first = tile * j->task_rows, last = smaller(first + j->task_rows, j->num_rows * j->num_heads);
    for (int64_t row = first; row < last; row++) norm_row(j, row);
}

/* y[T, heads, D] = rms_norm(x [+ delta]) * weight, each head of a row by itself; the heads of a row are adjacent. With
 * delta (and one head), sum[T, D] receives x + delta. scale[T, heads] (or null) receives 1 / rms for the backward pass. */
void ls_rms_norm(const float *x, int64_t ldx, const float *delta, const float *weight, float *sum, float *y, int64_t ldy,
                 float *scale, int64_t num_rows, int64_t num_heads, int64_t D, float eps) {
    norm_job job = {x, delta, weight, sum, y, scale, num_rows, num_heads, D, ldx, ldy, rows_per_task(D), eps};
    ls_parallel(norm_tile, &job, (num_rows * num_heads + job.task_rows - 1) / job.task_rows);
}

typedef struct {
    const float *x, *table;
    const int64_t *positions;
    float *y, sign;
    int64_t num_rows, num_heads, H, ldx, task_rows;
} rotary_job;

static void rotary_tile(void *argument, int64_t tile) {
    const rotary_job *j = argument;
    int64_t half = j->H / 2;
    for (int64_t row = tile * j->task_rows; row < smaller((tile + 1) * j->task_rows, j->num_rows); row++) {
        const float *cosine = j->table + j->positions[row] * j->H, *sine = cosine + half;
        for (int64_t head = 0; head < j->num_heads; head++) {
            const float *x = j->x + row * j->ldx + head * j->H;
            float *y = j->y + (row * j->num_heads + head) * j->H;
            for (int64_t i = 0; i < half; i++) {
                float s = sine[i] * j->sign, x1 = x[i], x2 = x[i + half];
                y[i] = __builtin_fmaf(x1, cosine[i], -(x2 * s));
                y[i + half] = __builtin_fmaf(x2, cosine[i], x1 * s);
            }
        }
    }
}

/* y[T, heads, H]: each head's halves (x1, x2) turned by the angles of its position. table is [positions][H]: cosines of
 * the H / 2 angles, then their sines. sign = -1 turns back (the backward pass). */
void ls_rotary(const float *x, int64_t ldx, const int64_t *positions, const float *table, float *y, int64_t num_rows,
               int64_t num_heads, int64_t H, float sign) {
    rotary_job job = {x, table, positions, y, sign, num_rows, num_heads, H, ldx, rows_per_task(num_heads * H)};
    ls_parallel(rotary_tile, &job, (num_rows + job.task_rows - 1) / job.task_rows);
}

typedef struct {
    const float *inv_freq;
    float *table;
    int64_t num_positions, H, task_rows;
} table_job;

static void table_tile(void *argument, int64_t tile) {
    const table_job *j = argument;
    int64_t half = j->H / 2;
    for (int64_t position = tile * j->task_rows; position < smaller((tile + 1) * j->task_rows, j->num_positions); position++)
        for (int64_t i = 0; i < half; i++) {
            double sine, cosine;
            sine_cosine1((float)position * j->inv_freq[i], &sine, &cosine);
            j->table[position * j->H + i] = (float)cosine;
            j->table[position * j->H + half + i] = (float)sine;
        }
}

/* table[positions][H]: cosines of float32(position * inv_freq), then sines, taken in double and rounded once. */
void ls_rotary_table(const float *inv_freq, float *table, int64_t num_positions, int64_t H) {
    table_job job = {inv_freq, table, num_positions, H, rows_per_task(H)};
    ls_parallel(table_tile, &job, (num_positions + job.task_rows - 1) / job.task_rows);
}

typedef struct {
    const float *x, *grad;
    float *y;
    int64_t num_rows, F, task_rows;
} silu_job;

static v16 one_plus_exp_minus(v16 g) { return v16_add(v16_set1(1.0f), v16_exp(v16_sub(v16_zero(), g))); }

static void silu_tile(void *argument, int64_t tile) {
    const silu_job *j = argument;
    for (int64_t row = tile * j->task_rows; row < smaller((tile + 1) * j->task_rows, j->num_rows); row++)
        for (int64_t i = 0; i < j->F; i += 16) {
            const float *gate = j->x + row * 2 * j->F + i, *up = gate + j->F;
            int64_t n = j->F - i;
            v16 g = load_some(gate, n);
            store_some(j->y + row * j->F + i, v16_mul(v16_div(g, one_plus_exp_minus(g)), load_some(up, n)), n);
        }
}

static void silu_backward_tile(void *argument, int64_t tile) {
    const silu_job *j = argument;
    for (int64_t row = tile * j->task_rows; row < smaller((tile + 1) * j->task_rows, j->num_rows); row++)
        for (int64_t i = 0; i < j->F; i += 16) {
            const float *gate = j->x + row * 2 * j->F + i;
            float *dgate = j->y + row * 2 * j->F + i;
            int64_t n = j->F - i;
            v16 g = load_some(gate, n), u = load_some(gate + j->F, n), d = load_some(j->grad + row * j->F + i, n);
            v16 sigmoid = v16_div(v16_set1(1.0f), one_plus_exp_minus(g)), silu = v16_mul(g, sigmoid);
            v16 slope = v16_mul(sigmoid, v16_add(v16_set1(1.0f), v16_sub(g, silu)));
            store_some(dgate, v16_mul(v16_mul(d, u), slope), n);
            store_some(dgate + j->F, v16_mul(d, silu), n);
        }
}

/* y[T, F] = silu(x[:, :F]) * x[:, F:] for x[T, 2F]. */
void ls_silu_and_mul(const float *x, float *y, int64_t num_rows, int64_t F) {
    silu_job job = {x, NULL, y, num_rows, F, rows_per_task(4 * F)};
    ls_parallel(silu_tile, &job, (num_rows + job.task_rows - 1) / job.task_rows);
}

/* dx[T, 2F] from grad[T, F]. */
void ls_silu_and_mul_backward(const float *x, const float *grad, float *dx, int64_t num_rows, int64_t F) {
    silu_job job = {x, grad, dx, num_rows, F, rows_per_task(4 * F)};
    ls_parallel(silu_backward_tile, &job, (num_rows + job.task_rows - 1) / job.task_rows);
}

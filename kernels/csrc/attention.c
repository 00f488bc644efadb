/* Attention over keys and values that lie in blocks: prefill, chunks, decode and the trainer are the same routine.
 *
 * Layout of one layer: keys [P, K, H, S] (the S slots of a block adjacent, so that 16 keys fill the lanes), values
 * [P, K, S, H]. Keys are visited at fixed absolute positions: chunks of 256, lanes of 16 inside them, whatever the block
 * size, the rows computed together, or the chunk boundaries of the schedule. */
#include <math.h>
#include <stdlib.h>

#include "exp_log.h"
#include "pool.h"

#define LS_CHUNK 256
#define LS_TILE_ROWS 6
#define LS_MAX_HEAD 256
#define LS_ROWS_PER_TASK 48

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct {
    int32_t sequence, kv_head, first_row, last_row; /* rows: (token, query head) pairs of one key-value head */
} attention_task;

typedef struct {
    const float *q, *keys, *values;
    float *out, *row_max, *row_sum;
    const int32_t *tables, *starts, *lengths;
    int64_t ldq, num_heads, num_kv_heads, H, S, max_blocks, window;
    float scale;
    const attention_task *tasks;
} attention_job;

typedef struct { /* one register tile of query rows and what it has summed up so far */
    const float *q[LS_TILE_ROWS];
    float *out[LS_TILE_ROWS];
    int64_t first[LS_TILE_ROWS], last[LS_TILE_ROWS]; /* keys in reach: [first, last) */
    float highest[LS_TILE_ROWS], sum[LS_TILE_ROWS];
    int is_started[LS_TILE_ROWS];
} row_tile;

/* scores[r][0..16) = ((a0 + a1) + (a2 + a3)) * scale, a_u the FMA chain over d = u mod 4. */
#define LS_DEFINE_SCORES(ROWS)                                                                                    \
    static void scores_##ROWS(const row_tile *t, const float *key, int64_t S, int64_t H, float scale,             \
                              float (*scores)[LS_CHUNK]) {                                                         \
        v16 a[ROWS][4], factor = v16_set1(scale);                                                                 \
        for (int r = 0; r < ROWS; r++)                                                                            \
            for (int u = 0; u < 4; u++) a[r][u] = v16_zero();                                                     \
        for (int64_t d = 0; d < H; d += 4)                                                                        \
            for (int u = 0; u < 4; u++) {                                                                         \
                v16 k = v16_load(key + (d + u) * S);                                                              \
                for (int r = 0; r < ROWS; r++) a[r][u] = v16_fma(v16_set1(t->q[r][d + u]), k, a[r][u]);           \
            }                                                                                                     \
        for (int r = 0; r < ROWS; r++)                                                                            \
            v16_store(scores[r], v16_mul(v16_add(v16_add(a[r][0], a[r][1]), v16_add(a[r][2], a[r][3])), factor)); \
    }

/* out[r][c..c+64 or H) += p[r][j] * value[j], one chain over j per output. */
#define LS_DEFINE_WEIGHTED(ROWS, VECTORS)                                                                        \
    static void weighted_##ROWS##_##VECTORS(const float *p, int64_t ldp, const float *value, int64_t H, int n,   \
                                            float *out, int64_t ldo) {                                           \
        v16 a[ROWS][VECTORS];                                                                                    \
        for (int r = 0; r < ROWS; r++)                                                                           \
            for (int v = 0; v < VECTORS; v++) a[r][v] = v16_load(out + r * ldo + 16 * v);                        \
        for (int j = 0; j < n; j++)                                                                              \
            for (int r = 0; r < ROWS; r++) {                                                                     \
                v16 s = v16_set1(p[r * ldp + j]);                                                                \
                for (int v = 0; v < VECTORS; v++)                                                                \
                    a[r][v] = v16_fma(s, v16_load(value + j * H + 16 * v), a[r][v]);                             \
            }                                                                                                    \
        for (int r = 0; r < ROWS; r++)                                                                           \
            for (int v = 0; v < VECTORS; v++) v16_store(out + r * ldo + 16 * v, a[r][v]);                        \
    }
#define LS_DEFINE_ROWS(ROWS) LS_DEFINE_SCORES(ROWS) LS_DEFINE_WEIGHTED(ROWS, 4) LS_DEFINE_WEIGHTED(ROWS, 1)
LS_DEFINE_ROWS(1)
LS_DEFINE_ROWS(2)
LS_DEFINE_ROWS(3)
LS_DEFINE_ROWS(4)
LS_DEFINE_ROWS(5)
LS_DEFINE_ROWS(6)

static void scores(int rows, const row_tile *t, const float *key, int64_t S, int64_t H, float scale,
                   float (*out)[LS_CHUNK]) {
    switch (rows) {
        case 1: scores_1(t, key, S, H, scale, out); return;
        case 2: scores_2(t, key, S, H, scale, out); return;
        case 3: scores_3(t, key, S, H, scale, out); return;
        case 4: scores_4(t, key, S, H, scale, out); return;
        case 5: scores_5(t, key, S, H, scale, out); return;
        default: scores_6(t, key, S, H, scale, out); return;
    }
}

static void weighted(int rows, const float *p, int64_t ldp, const float *value, int64_t H, int n, float *out) {
    int64_t c = 0;
#define LS_CALL(R, V) weighted_##R##_##V(p, ldp, value + c, H, n, out + c, LS_MAX_HEAD); break
#define LS_PICK(V)               \
    switch (rows) {              \
        case 1: LS_CALL(1, V);   \
        case 2: LS_CALL(2, V);   \
        case 3: LS_CALL(3, V);   \
        case 4: LS_CALL(4, V);   \
        case 5: LS_CALL(5, V);   \
        default: LS_CALL(6, V);  \
    }
    for (; c + 64 <= H; c += 64) LS_PICK(4)
    for (; c < H; c += 16) LS_PICK(1)
}

typedef struct { /* where the 16 keys from one absolute position on are stored */
    const float *key, *value;
} slots;

static slots find_slots(const attention_job *j, int32_t sequence, int64_t kv_head, int64_t position) {
    int64_t block = j->tables[sequence * j->max_blocks + position / j->S], slot = position % j->S;
    int64_t place = (block * j->num_kv_heads + kv_head) * j->H * j->S;
    return (slots){j->keys + place + slot, j->values + place + slot * j->H};
}

/* One chunk of keys for one tile of rows: exact maximum, exponentials, their sum, the weighted values; then the merge. */
static void visit_chunk(const attention_job *j, const attention_task *task, row_tile *t, int rows, int64_t chunk) {
    float p[LS_TILE_ROWS][LS_CHUNK], out[LS_TILE_ROWS][LS_MAX_HEAD], highest[LS_TILE_ROWS], sum[LS_TILE_ROWS];
    int64_t base = chunk * LS_CHUNK, begin = LS_CHUNK, end = 0, all_begin = 0, all_end = LS_CHUNK;
    int64_t from[LS_TILE_ROWS], to[LS_TILE_ROWS];
    for (int r = 0; r < rows; r++) {
        from[r] = smaller(larger(t->first[r] - base, 0), LS_CHUNK);
        to[r] = larger(smaller(t->last[r] - base, LS_CHUNK), from[r]);
        begin = smaller(begin, from[r]), end = larger(end, to[r]);
        all_begin = larger(all_begin, from[r]), all_end = smaller(all_end, to[r]);
    }
    begin &= ~15;
    for (int64_t k = begin; k < end; k += 16) {
        slots s = find_slots(j, task->sequence, task->kv_head, base + k);
        scores(rows, t, s.key, j->S, j->H, j->scale, (float(*)[LS_CHUNK])(p[0] + k));
    }
    for (int r = 0; r < rows; r++) {
        v16 top = v16_set1(-INFINITY), total = v16_zero();
        for (int64_t k = begin; k < end; k += 16) {
            v16 s = v16_load(p[r] + k);
            if (k < from[r] || k + 16 > to[r])
                s = v16_keep(s, (int)smaller(larger(from[r] - k, 0), 16), (int)larger(smaller(to[r] - k, 16), 0), -INFINITY);
            v16_store(p[r] + k, s);
            top = v16_max(top, s);
        }
        highest[r] = v16_highest(top);
        v16 m = v16_set1(highest[r]);
        if (from[r] < to[r])
            for (int64_t k = begin; k < end; k += 16) {
                v16 e = v16_exp(v16_sub(v16_load(p[r] + k), m));
                v16_store(p[r] + k, e);
                total = v16_add(total, e);
            }
        sum[r] = v16_sum(total);
        memset(out[r], 0, (size_t)j->H * sizeof(float));
    }
    /* Keys that all rows reach are taken together; the few that only some reach, row by row. A key out of reach is
     * skipped, never multiplied by zero. */
    for (int64_t k = begin; k < end; k += 16) {
        const float *value = find_slots(j, task->sequence, task->kv_head, base + k).value;
        int64_t all_from = larger(all_begin, k), all_to = smaller(all_end, k + 16);
        if (all_from < all_to && all_from == k && all_to == k + 16) {
            weighted(rows, p[0] + k, LS_CHUNK, value, j->H, 16, out[0]);
            continue;
        }
        if (all_from >= all_to) all_from = all_to = k + 16;
        for (int r = 0; r < rows; r++) {
            int64_t a = larger(from[r], k), b = smaller(to[r], all_from);
            if (a < b) weighted(1, p[r] + a, LS_CHUNK, value + (a - k) * j->H, j->H, (int)(b - a), out[r]);
        }
        if (all_from < all_to)
            weighted(rows, p[0] + all_from, LS_CHUNK, value + (all_from - k) * j->H, j->H, (int)(all_to - all_from), out[0]);
        for (int r = 0; r < rows; r++) {
            int64_t a = larger(from[r], all_to), b = smaller(to[r], k + 16);
            if (a < b) weighted(1, p[r] + a, LS_CHUNK, value + (a - k) * j->H, j->H, (int)(b - a), out[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        if (from[r] >= to[r]) continue;
        if (!t->is_started[r]) {
            t->is_started[r] = 1, t->highest[r] = highest[r], t->sum[r] = sum[r];
            memcpy(t->out[r], out[r], (size_t)j->H * sizeof(float));
            continue;
        }
        float m = t->highest[r] > highest[r] ? t->highest[r] : highest[r];
        float a = exp1(t->highest[r] - m), b = exp1(highest[r] - m);
        t->highest[r] = m, t->sum[r] = __builtin_fmaf(sum[r], b, t->sum[r] * a);
        for (int64_t d = 0; d < j->H; d++) t->out[r][d] = __builtin_fmaf(out[r][d], b, t->out[r][d] * a);
    }
}

static void attention_tile(void *argument, int64_t tile) {
    const attention_job *j = argument;
    const attention_task *task = &j->tasks[tile];
    int64_t group = j->num_heads / j->num_kv_heads, start = j->starts[task->sequence];
    int64_t first_position = j->lengths[task->sequence] - (j->starts[task->sequence + 1] - start);
    for (int64_t begin = task->first_row; begin < task->last_row; begin += LS_TILE_ROWS) {
        int rows = (int)smaller(LS_TILE_ROWS, task->last_row - begin);
        int64_t lowest = INT64_MAX, highest = 0, place[LS_TILE_ROWS];
        row_tile t;
        for (int r = 0; r < rows; r++) {
            int64_t token = (begin + r) / group, head = task->kv_head * group + (begin + r) % group;
            place[r] = (start + token) * j->num_heads + head;
            t.q[r] = j->q + (start + token) * j->ldq + head * j->H;
            t.out[r] = j->out + place[r] * j->H;
            t.last[r] = first_position + token + 1;
            t.first[r] = j->window > 0 ? larger(t.last[r] - j->window, 0) : 0;
            t.is_started[r] = 0;
            lowest = smaller(lowest, t.first[r]), highest = larger(highest, t.last[r]);
        }
        for (int64_t chunk = lowest / LS_CHUNK; chunk * LS_CHUNK < highest; chunk++) visit_chunk(j, task, &t, rows, chunk);
        for (int r = 0; r < rows; r++) {
            for (int64_t d = 0; d < j->H; d++) t.out[r][d] = t.out[r][d] / t.sum[r];
            if (j->row_max) j->row_max[place[r]] = t.highest[r], j->row_sum[place[r]] = t.sum[r];
        }
    }
}

/* out[T, N, H] for query rows q[T, N, H] (row stride ldq) of B sequences: rows [starts[b], starts[b + 1]) are the last
 * ones of lengths[b] positions, whose keys and values already lie in the blocks tables[b]. window 0 means no limit.
 * row_max and row_sum [T, N] (or null) receive the softmax statistics for the backward pass. Returns 0, or -1 without
 * memory for the task list. */
int ls_attention(const float *q, int64_t ldq, const float *keys, const float *values, const int32_t *tables,
                 const int32_t *starts, const int32_t *lengths, float *out, float *row_max, float *row_sum,
                 int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t H, int64_t S,
                 int64_t max_blocks, int64_t window, float scale) {
    int64_t group = num_heads / num_kv_heads, num_tasks = 0;
    for (int64_t b = 0; b < num_sequences; b++) {
        int64_t rows = (starts[b + 1] - starts[b]) * group;
        num_tasks += num_kv_heads * ((rows + LS_ROWS_PER_TASK - 1) / LS_ROWS_PER_TASK);
    }
    attention_task *tasks = malloc((size_t)larger(num_tasks, 1) * sizeof(attention_task)), *next = tasks;
    if (!tasks) return -1;
    for (int64_t b = 0; b < num_sequences; b++)
        for (int64_t head = 0; head < num_kv_heads; head++) {
            int64_t rows = (starts[b + 1] - starts[b]) * group;
            for (int64_t row = 0; row < rows; row += LS_ROWS_PER_TASK)
                *next++ = (attention_task){(int32_t)b, (int32_t)head, (int32_t)row,
                                           (int32_t)smaller(row + LS_ROWS_PER_TASK, rows)};
        }
    attention_job job = {q, keys, values, out, row_max, row_sum, tables, starts, lengths, ldq, num_heads, num_kv_heads,
                         H, S, max_blocks, window, scale, tasks};
    ls_parallel(attention_tile, &job, num_tasks);
    free(tasks);
    return 0;
}

typedef struct {
    const float *k, *v;
    float *keys, *values;
    const int64_t *rows, *slot_mapping;
    int64_t num_slots, ldk, ldv, num_kv_heads, H, S;
} store_job;

static void store_tile(void *argument, int64_t tile) {
    const store_job *j = argument;
    for (int64_t i = tile * 8; i < smaller(tile * 8 + 8, j->num_slots); i++) {
        int64_t row = j->rows ? j->rows[i] : i, block = j->slot_mapping[i] / j->S, slot = j->slot_mapping[i] % j->S;
        for (int64_t head = 0; head < j->num_kv_heads; head++) {
            const float *k = j->k + row * j->ldk + head * j->H, *v = j->v + row * j->ldv + head * j->H;
            int64_t place = (block * j->num_kv_heads + head) * j->H * j->S;
            for (int64_t d = 0; d < j->H; d++) j->keys[place + d * j->S + slot] = k[d];
            memcpy(j->values + place + slot * j->H, v, (size_t)j->H * sizeof(float));
        }
    }
}

/* Stores rows of k and v [T, K, H] (row strides ldk, ldv) at slots: row `rows[i]` (row i where rows is null) goes to slot
 * slot_mapping[i] = block * S + slot. */
void ls_kv_store(const float *k, int64_t ldk, const float *v, int64_t ldv, float *keys, float *values,
                 const int64_t *rows, const int64_t *slot_mapping, int64_t num_slots, int64_t num_kv_heads, int64_t H,
                 int64_t S) {
    store_job job = {k, v, keys, values, rows, slot_mapping, num_slots, ldk, ldv, num_kv_heads, H, S};
    ls_parallel(store_tile, &job, (num_slots + 7) / 8);
}

typedef struct {
    char *storage;
    const int64_t *pairs;
    int64_t num_blocks, block_bytes;
} copy_job;

static void copy_tile(void *argument, int64_t layer) {
    const copy_job *j = argument;
    char *base = j->storage + layer * j->num_blocks * j->block_bytes;
    for (int64_t i = 0; j->pairs[2 * i] >= 0; i++)
        memcpy(base + j->pairs[2 * i + 1] * j->block_bytes, base + j->pairs[2 * i] * j->block_bytes,
               (size_t)j->block_bytes);
}

/* Copies blocks inside a pool [planes][num_blocks][block_bytes], every plane alike, pair by pair in order; pairs
 * (source, destination) end with -1. */
void ls_copy_blocks(void *storage, const int64_t *pairs, int64_t num_planes, int64_t num_blocks, int64_t block_bytes) {
    copy_job job = {storage, pairs, num_blocks, block_bytes};
    ls_parallel(copy_tile, &job, num_planes);
}

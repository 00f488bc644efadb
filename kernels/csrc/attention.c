/* Attention over keys and values that lie in blocks: prefill, chunks, decode and the trainer are the same routine.
 *
 * Layout of one layer: keys [P, K, H, S] (the S slots of a block adjacent, so that 16 keys fill the lanes), values
 * [P, K, S, H], both float32 or both bfloat16. Keys are visited at fixed absolute positions: chunks of 256, lanes of 16
 * inside them, whatever the block size, the rows computed together, or the chunk boundaries of the schedule. */
#include <math.h>
#include <stdlib.h>

#include "exp_log.h"
#include "ops.h"
#include "pool.h"

#define LS_CHUNK 256
#define LS_TILE_ROWS 6       /* rows that one register tile takes */
#define LS_TASK_ROWS 48      /* rows for which keys and values are loaded together */
#define LS_TASK_TILES 16
#define LS_MAX_HEAD 256
#define LS_SCORE_STRIDE (LS_CHUNK + 16) /* no multiple of 1 KiB, which would put all rows into few sets of the cache */
#define LS_AHEAD 2           /* groups of 16 keys, or their values, that are asked for ahead of use in decode */
#define LS_SHARES 4          /* tasks for each thread below which contexts are split */
#define LS_VALUE_BYTES 16384 /* values that stay in the first cache while all tiles take them */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct { /* rows [first_row, last_row), (token, query head) pairs, of each of some key-value heads */
    int32_t sequence, kv_head, num_kv_heads, first_row, last_row;
    int32_t first_chunk, end_chunk;
    int64_t parts; /* -1, or for a part of the context: where its chunks' results begin in the job's parts, in rows */
} attention_task;

typedef struct {
    const float *q;
    const void *keys, *values;
    float *out, *row_max, *row_sum;
    const int32_t *tables, *starts, *lengths;
    int64_t ldq, num_heads, num_kv_heads, H, S, max_blocks, window;
    float scale;
    int is_bf16;
    const attention_task *tasks;
    int64_t num_tasks, num_threads;
    float *part_highest, *part_sum, *part_out; /* [chunk, row of its task], [.., H]; sum 0 where a row sees no key */
} attention_job;

typedef struct { /* the keys [from, to) of a chunk that a row reaches */
    int64_t from, to;
} row_reach;

typedef struct { /* consecutive rows of one key-value head, and what they reach of a chunk */
    int64_t kv_head, first;
    int rows;
    int64_t begin, end;         /* what any of them reaches, begin rounded down to 16 */
    int64_t all_begin, all_end; /* what all of them reach */
} row_tile;

typedef struct { /* the rows of a task and what they have summed up so far */
    int count, num_tiles;
    row_tile tiles[LS_TASK_TILES];
    int64_t place[LS_TASK_ROWS];                      /* token * num_heads + head */
    int64_t first[LS_TASK_ROWS], last[LS_TASK_ROWS];  /* keys in reach: [first, last) */
    int64_t end;                                      /* of the last key that any row reaches */
    int is_streamed;                                  /* one tile for each head: keys are read once, in order */
    row_reach reach[LS_TASK_ROWS];
    float highest[LS_TASK_ROWS], sum[LS_TASK_ROWS]; /* sum 0: no chunk yet */
    const float *q[LS_TASK_ROWS];
    float p[LS_TASK_ROWS * LS_SCORE_STRIDE];
} row_set;

/* Scores of a row become exponentials, in place; what it does not reach of their groups counts as -infinity. */
static void weigh_row(float *p, const row_reach *reach, float *highest, float *sum) {
    int64_t from = reach->from, to = reach->to, begin = from & ~(int64_t)15, end = (to + 15) & ~(int64_t)15;
    *highest = *sum = 0.0f;
    if (from >= to) return;
    if (from > begin) v16_store(p + begin, v16_keep(v16_load(p + begin), (int)(from - begin), 16, -INFINITY));
    if (to < end) v16_store(p + end - 16, v16_keep(v16_load(p + end - 16), 0, (int)(to - end + 16), -INFINITY));
    v16 top = v16_set1(-INFINITY), total = v16_zero();
    for (int64_t k = begin; k < end; k += 16) top = v16_max(top, v16_load(p + k));
    *highest = v16_highest(top);
    v16 m = v16_set1(*highest);
    for (int64_t k = begin; k < end; k += 16) {
        v16 e = v16_exp_falling(v16_sub(v16_load(p + k), m));
        v16_store(p + k, e);
        total = v16_add(total, e);
    }
    *sum = v16_sum(total);
}

#define LS_KV float
#define LS_LOAD_KV v16_load
#define LS_FOR_KV(name) name##_float32
#include "attention_loops.h"
#define LS_KV uint16_t
#define LS_LOAD_KV v16_load_bf16
#define LS_FOR_KV(name) name##_bf16
#include "attention_loops.h"

/* Lists the rows of a task, in tiles of nearly equal size. */
static void gather_rows(const attention_job *j, const attention_task *task, row_set *rows) {
    int64_t group = j->num_heads / j->num_kv_heads, start = j->starts[task->sequence];
    int64_t first_position = j->lengths[task->sequence] - (j->starts[task->sequence + 1] - start);
    int64_t per_head = task->last_row - task->first_row, num_tiles = (per_head + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
    rows->count = rows->num_tiles = 0;
    memset(rows->highest, 0, sizeof rows->highest);
    memset(rows->sum, 0, sizeof rows->sum);
    for (int64_t kv_head = task->kv_head; kv_head < task->kv_head + task->num_kv_heads; kv_head++)
        for (int64_t t = 0; t < num_tiles; t++) {
            int64_t first_row = task->first_row + per_head * t / num_tiles;
            int count = (int)(task->first_row + per_head * (t + 1) / num_tiles - first_row);
            rows->tiles[rows->num_tiles++] = (row_tile){.kv_head = kv_head, .first = rows->count, .rows = count};
            for (int r = 0; r < count; r++) {
                int64_t token = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
                int64_t last = first_position + token + 1;
                rows->q[rows->count] = j->q + (start + token) * j->ldq + head * j->H;
                rows->place[rows->count] = (start + token) * j->num_heads + head;
                rows->last[rows->count] = last;
                rows->first[rows->count] = j->window > 0 ? larger(last - j->window, 0) : 0;
                rows->count++;
            }
        }
    rows->end = rows->last[rows->count - 1];
    rows->is_streamed = rows->num_tiles == task->num_kv_heads;
}

static void find_reach(row_set *rows, int64_t base) {
    for (int i = 0; i < rows->num_tiles; i++) {
        row_tile *t = &rows->tiles[i];
        t->begin = LS_CHUNK, t->end = t->all_begin = 0, t->all_end = LS_CHUNK;
        for (int64_t r = t->first; r < t->first + t->rows; r++) {
            int64_t from = smaller(larger(rows->first[r] - base, 0), LS_CHUNK);
            int64_t to = larger(smaller(rows->last[r] - base, LS_CHUNK), from);
            rows->reach[r] = (row_reach){from, to};
            if (from < to) t->begin = smaller(t->begin, from), t->end = larger(t->end, to);
            t->all_begin = larger(t->all_begin, from), t->all_end = smaller(t->all_end, to);
        }
        t->begin &= ~(int64_t)15;
    }
}

/* Takes a chunk's results into what the rows have so far; the first chunk that a row sees is taken as it is. */
static void merge_chunk(const attention_job *j, row_set *rows, const float *highest, const float *sum, const float *out) {
    float before[LS_TASK_ROWS], now[LS_TASK_ROWS];
    for (int r = 0; r < rows->count; r += 16) {
        v16 old = v16_load(rows->highest + r), new = v16_load(highest + r), m = v16_max(old, new);
        v16_store(before + r, v16_exp_falling(v16_sub(old, m)));
        v16_store(now + r, v16_exp_falling(v16_sub(new, m)));
    }
    for (int r = 0; r < rows->count; r++, out += j->H) {
        float *total = j->out + rows->place[r] * j->H;
        if (sum[r] == 0.0f) continue;
        if (rows->sum[r] == 0.0f) {
            rows->highest[r] = highest[r], rows->sum[r] = sum[r];
            memcpy(total, out, (size_t)j->H * sizeof(float));
            continue;
        }
        rows->highest[r] = rows->highest[r] > highest[r] ? rows->highest[r] : highest[r];
        rows->sum[r] = __builtin_fmaf(sum[r], now[r], rows->sum[r] * before[r]);
        v16 a = v16_set1(before[r]), b = v16_set1(now[r]);
        for (int64_t d = 0; d < j->H; d += 16)
            v16_store(total + d, v16_fma(v16_load(out + d), b, v16_mul(v16_load(total + d), a)));
    }
}

static void finish_rows(const attention_job *j, const row_set *rows) {
    for (int r = 0; r < rows->count; r++) {
        float *out = j->out + rows->place[r] * j->H;
        v16 sum = v16_set1(rows->sum[r]);
        for (int64_t d = 0; d < j->H; d += 16) v16_store(out + d, v16_div(v16_load(out + d), sum));
        if (j->row_max) j->row_max[rows->place[r]] = rows->highest[r], j->row_sum[rows->place[r]] = rows->sum[r];
    }
}

static void attention_tile(void *argument, int64_t tile) {
    const attention_job *j = argument;
    const attention_task *task = &j->tasks[tile];
    float own_highest[LS_TASK_ROWS] = {0}, own_sum[LS_TASK_ROWS], own_out[LS_TASK_ROWS * LS_MAX_HEAD];
    row_set rows;
    gather_rows(j, task, &rows);
    for (int64_t chunk = task->first_chunk; chunk < task->end_chunk; chunk++) {
        int64_t part = task->parts + (chunk - task->first_chunk) * rows.count, is_part = task->parts >= 0;
        float *highest = is_part ? j->part_highest + part : own_highest, *sum = is_part ? j->part_sum + part : own_sum;
        float *out = is_part ? j->part_out + part * j->H : own_out;
        find_reach(&rows, chunk * LS_CHUNK);
        if (j->is_bf16) visit_chunk_bf16(j, task, &rows, chunk * LS_CHUNK, highest, sum, out);
        else visit_chunk_float32(j, task, &rows, chunk * LS_CHUNK, highest, sum, out);
        if (!is_part) merge_chunk(j, &rows, highest, sum, out);
    }
    if (task->parts < 0) finish_rows(j, &rows);
}

/* Merges the chunks of a context that several tasks have computed, in ascending order as one task would. */
static void merge_tile(void *argument, int64_t tile) {
    const attention_job *j = argument;
    const attention_task *task = &j->tasks[tile];
    row_set rows;
    if (task->parts < 0) return;
    gather_rows(j, task, &rows);
    for (int64_t part = task->parts, chunk = task->first_chunk; chunk < task->end_chunk; chunk++, part += rows.count)
        merge_chunk(j, &rows, j->part_highest + part, j->part_sum + part, j->part_out + part * j->H);
    finish_rows(j, &rows);
}

static void find_chunks(const attention_job *j, attention_task *task) {
    int64_t group = j->num_heads / j->num_kv_heads, start = j->starts[task->sequence];
    int64_t first_position = j->lengths[task->sequence] - (j->starts[task->sequence + 1] - start);
    int64_t lowest = first_position + task->first_row / group + 1 - j->window;
    task->first_chunk = j->window > 0 && lowest > 0 ? (int32_t)(lowest / LS_CHUNK) : 0;
    task->end_chunk = (int32_t)((first_position + (task->last_row - 1) / group) / LS_CHUNK + 1);
}

/* Writes the tasks (where `tasks` is not null) and returns their number. `most_heads` key-value heads of a sequence with
 * few rows make one task: their keys lie side by side in a block. */
static int64_t list_tasks(const attention_job *j, int64_t num_sequences, int64_t most_heads, attention_task *tasks) {
    int64_t group = j->num_heads / j->num_kv_heads, num_tasks = 0;
    for (int64_t b = 0; b < num_sequences; b++) {
        int64_t rows = (j->starts[b + 1] - j->starts[b]) * group;
        if (rows == 0) continue;
        int64_t tiles = (smaller(rows, LS_TASK_ROWS) + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
        int64_t heads = larger(smaller(most_heads, smaller(LS_TASK_ROWS / rows, LS_TASK_TILES / tiles)), 1);
        for (int64_t head = 0; head < j->num_kv_heads; head += heads)
            for (int64_t row = 0; row < rows; row += LS_TASK_ROWS, num_tasks++) {
                if (!tasks) continue;
                attention_task task = {.sequence = (int32_t)b, .kv_head = (int32_t)head, .parts = -1,
                                       .num_kv_heads = (int32_t)smaller(heads, j->num_kv_heads - head),
                                       .first_row = (int32_t)row, .last_row = (int32_t)smaller(row + LS_TASK_ROWS, rows)};
                find_chunks(j, &task);
                tasks[num_tasks] = task;
            }
    }
    return num_tasks;
}

static int64_t count_rows(const attention_task *task) {
    return (int64_t)task->num_kv_heads * (task->last_row - task->first_row);
}

static int64_t cost_of(const attention_task *task) {
    return (task->end_chunk - task->first_chunk) * larger(count_rows(task), LS_TILE_ROWS);
}

/* Splits tasks that are more than a fair share of the work between threads, at multiples of a chunk. Writes all tasks to
 * `parts` and returns their number; *num_rows becomes the number of rows whose results wait to be merged. */
static int64_t split_tasks(attention_task *tasks, int64_t num_tasks, int64_t num_shares, attention_task *parts,
                           int64_t *num_rows) {
    int64_t total = 0, num_parts = 0;
    for (int64_t i = 0; i < num_tasks; i++) total += cost_of(&tasks[i]);
    for (int64_t i = 0; i < num_tasks; i++) {
        int64_t chunks = tasks[i].end_chunk - tasks[i].first_chunk;
        int64_t pieces = larger(smaller(cost_of(&tasks[i]) * num_shares / total, chunks), 1);
        if (pieces > 1) tasks[i].parts = *num_rows;
        for (int64_t piece = 0; piece < pieces; piece++) {
            attention_task part = tasks[i];
            part.first_chunk = (int32_t)(tasks[i].first_chunk + chunks * piece / pieces);
            part.end_chunk = (int32_t)(tasks[i].first_chunk + chunks * (piece + 1) / pieces);
            if (pieces > 1) part.parts = *num_rows, *num_rows += (part.end_chunk - part.first_chunk) * count_rows(&part);
            parts[num_parts++] = part;
        }
    }
    return num_parts;
}

static int64_t count_chunks(const int32_t *starts, const int32_t *lengths, int64_t num_sequences) {
    int64_t chunks = 0;
    for (int64_t b = 0; b < num_sequences; b++)
        if (starts[b + 1] > starts[b]) chunks += lengths[b] / LS_CHUNK + 1;
    return chunks;
}

/* out[T, N, H] for query rows q[T, N, H] (row stride ldq) of B sequences: rows [starts[b], starts[b + 1]) are the last
 * ones of lengths[b] positions, whose keys and values already lie in the blocks tables[b]. window 0 means no limit.
 * row_max and row_sum [T, N] (or null) receive the softmax statistics for the backward pass. Returns 0, or -1 without
 * memory. */
int ls_attention(const float *q, int64_t ldq, const void *keys, const void *values, int64_t is_bf16, const int32_t *tables,
                 const int32_t *starts, const int32_t *lengths, float *out, float *row_max, float *row_sum,
                 int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t H, int64_t S,
                 int64_t max_blocks, int64_t window, float scale) {
    attention_job job = {.q = q, .keys = keys, .values = values, .out = out, .row_max = row_max, .row_sum = row_sum,
                         .tables = tables, .starts = starts, .lengths = lengths, .ldq = ldq, .num_heads = num_heads,
                         .num_kv_heads = num_kv_heads, .H = H, .S = S, .max_blocks = max_blocks, .window = window,
                         .scale = scale, .is_bf16 = (int)is_bf16, .num_threads = ls_get_num_threads()};
    int64_t num_shares = LS_SHARES * job.num_threads, chunks = count_chunks(starts, lengths, num_sequences);
    int64_t most_heads = num_kv_heads * chunks / num_shares; /* short contexts are shared out by heads */
    int64_t num_tasks = list_tasks(&job, num_sequences, most_heads, NULL), num_rows = 0;
    attention_task *tasks = malloc((size_t)(2 * num_tasks + num_shares) * sizeof(attention_task));
    if (!tasks) return -1;
    list_tasks(&job, num_sequences, most_heads, tasks);
    attention_task *parts = tasks + num_tasks;
    int64_t num_parts = split_tasks(tasks, num_tasks, num_shares, parts, &num_rows);
    float *results = num_rows ? malloc((size_t)(num_rows * (H + 2) + LS_TASK_ROWS) * sizeof(float)) : NULL;
    int failed = num_rows && !results;
    if (!failed) {
        job.part_out = results, job.part_highest = results + num_rows * H, job.part_sum = job.part_highest + num_rows;
        job.tasks = parts, job.num_tasks = num_parts;
        ls_parallel(attention_tile, &job, num_parts);
        job.tasks = tasks;
        if (num_rows) ls_parallel(merge_tile, &job, num_tasks);
    }
    free(results);
    free(tasks);
    return failed ? -1 : 0;
}

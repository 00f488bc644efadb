/* Gradients of attention for a packed batch whose segments may share a prompt.
 *
 * A segment's keys are its parent's rows, then its own. A parent and its children are a group. The keys of a group are
 * cut into tiles, which are dealt out to one to four shares; a task is a share of one key-value head. It goes over all
 * query rows that see its keys, owns the gradients of these keys and values, and has its own sum of the queries'
 * gradients; those of the shares are added in order at the end. Tiles and shares follow from the group alone, so the
 * result depends neither on the number of threads nor on what else is in the batch. */
#include <stdlib.h>

#include "exp_log.h"
#include "pool.h"

#define LS_TILE_KEYS 64
#define LS_TILE_ROWS 48 /* (token, query head) pairs */
#define LS_MAX_HEAD 256
#define LS_MAX_SHARES 4
#define LS_KEYS_PER_SHARE 256

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct {
    int64_t segment, first_row, count;
    float *keys, *values; /* [H][LS_TILE_KEYS], zero beyond count */
    float *dk, *dv;       /* [LS_TILE_KEYS][H] */
} key_tile;

typedef struct {
    int64_t group, kv_head, share, num_shares;
    key_tile *tiles;
    int64_t num_tiles;
} backward_task;

typedef struct {
    const float *q, *k, *v, *out, *grad, *row_max, *row_sum;
    float *dq, *dk, *dv;
    const int64_t *segments, *groups; /* segments [n][3]: first row, end row, parent or -1; groups: first segment of each */
    int64_t ldq, ldk, ldv, num_heads, num_kv_heads, H, window, num_groups;
    float scale;
    backward_task *tasks;
    float *share_dq[LS_MAX_SHARES]; /* like dq; that of the first share is dq */
} backward_job;

typedef struct { /* some query rows of one segment and key-value head */
    int64_t count, padded; /* padded with zero rows to a multiple of 4 */
    int64_t place[LS_TILE_ROWS], position[LS_TILE_ROWS];
    float q[LS_TILE_ROWS * LS_MAX_HEAD], grad[LS_TILE_ROWS * LS_MAX_HEAD], dq[LS_TILE_ROWS * LS_MAX_HEAD];
    float mean[LS_TILE_ROWS]; /* grad . out */
    float p[LS_TILE_ROWS * LS_TILE_KEYS], ds[LS_TILE_ROWS * LS_TILE_KEYS];
} query_tile;

/* c[4][16 VECTORS] += the sum over i < count of A(r, i) b[i][16 VECTORS]; A(r, i) is a[r * ROW + i * STEP]. */
#define LS_UNROLL _Pragma("GCC unroll 8")
#define LS_DEFINE_MULTIPLY(NAME, VECTORS, ROW, STEP)                                                                   \
    static void NAME##_##VECTORS(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t count, float *c,    \
                                 int64_t ldc) {                                                                        \
        v16 s[4][VECTORS];                                                                                             \
        LS_UNROLL for (int r = 0; r < 4; r++)                                                                          \
            LS_UNROLL for (int v = 0; v < VECTORS; v++) s[r][v] = v16_load(c + r * ldc + 16 * v);                      \
        for (int64_t i = 0; i < count; i++, a += STEP, b += ldb) {                                                     \
            v16 x[VECTORS];                                                                                            \
            LS_UNROLL for (int v = 0; v < VECTORS; v++) x[v] = v16_load(b + 16 * v);                                   \
            LS_UNROLL for (int r = 0; r < 4; r++)                                                                      \
                LS_UNROLL for (int v = 0; v < VECTORS; v++) s[r][v] = v16_fma(v16_set1(a[r * ROW]), x[v], s[r][v]);    \
        }                                                                                                              \
        LS_UNROLL for (int r = 0; r < 4; r++)                                                                          \
            LS_UNROLL for (int v = 0; v < VECTORS; v++) v16_store(c + r * ldc + 16 * v, s[r][v]);                      \
    }

#if LS_TILE_VECTORS == 4
#define LS_DEFINE_TILES(NAME, ROW, STEP)                                                   \
    LS_DEFINE_MULTIPLY(NAME, 1, ROW, STEP) LS_DEFINE_MULTIPLY(NAME, 2, ROW, STEP)          \
    LS_DEFINE_MULTIPLY(NAME, 3, ROW, STEP) LS_DEFINE_MULTIPLY(NAME, 4, ROW, STEP)
#define LS_TILES(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4}
#else
#define LS_DEFINE_TILES(NAME, ROW, STEP) LS_DEFINE_MULTIPLY(NAME, 1, ROW, STEP)
#define LS_TILES(NAME) {NAME##_1}
#endif

/* c[num_rows][num_columns] += A b, in register tiles of 4 rows; A is a, [num_rows][count], or transposed [count][..]. */
#define LS_DEFINE_PRODUCT(NAME, ROW, STEP)                                                                             \
    LS_DEFINE_TILES(NAME##_tile, ROW, STEP)                                                                            \
    static void NAME(int64_t num_rows, int64_t num_columns, const float *a, int64_t lda, const float *b, int64_t ldb,  \
                     int64_t count, float *c, int64_t ldc) {                                                           \
        static void (*const tiles[])(const float *, int64_t, const float *, int64_t, int64_t, float *, int64_t) =      \
            LS_TILES(NAME##_tile);                                                                                     \
        for (int64_t column = 0; column < num_columns; column += 16 * LS_TILE_VECTORS) {                               \
            int64_t vectors = smaller((num_columns - column) / 16, LS_TILE_VECTORS);                                   \
            for (int64_t r = 0; r < num_rows; r += 4)                                                                  \
                tiles[vectors - 1](a + r * ROW, lda, b + column, ldb, count, c + r * ldc + column, ldc);               \
        }                                                                                                              \
    }
LS_DEFINE_PRODUCT(multiply, lda, 1)
LS_DEFINE_PRODUCT(multiply_transposed, 1, lda)

static float dot(const float *a, const float *b, int64_t H) {
    v16 s = v16_zero();
    for (int64_t d = 0; d < H; d += 16) s = v16_fma(v16_load(a + d), v16_load(b + d), s);
    return v16_sum(s);
}

static void transpose(const float *rows, int64_t stride, int64_t count, int64_t H, float *out) {
    for (int64_t d = 0; d < H; d++, out += LS_TILE_KEYS) {
        for (int64_t i = 0; i < count; i++) out[i] = rows[i * stride + d];
        for (int64_t i = count; i < LS_TILE_KEYS; i++) out[i] = 0.0f;
    }
}

static void open_tile(const backward_job *j, int64_t kv_head, key_tile *t) {
    transpose(j->k + t->first_row * j->ldk + kv_head * j->H, j->ldk, t->count, j->H, t->keys);
    transpose(j->v + t->first_row * j->ldv + kv_head * j->H, j->ldv, t->count, j->H, t->values);
    memset(t->dk, 0, (size_t)(j->H * LS_TILE_KEYS) * sizeof(float));
    memset(t->dv, 0, (size_t)(j->H * LS_TILE_KEYS) * sizeof(float));
}

static void close_tile(const backward_job *j, int64_t kv_head, const key_tile *t) {
    for (int64_t i = 0; i < t->count; i++) {
        int64_t place = ((t->first_row + i) * j->num_kv_heads + kv_head) * j->H;
        memcpy(j->dk + place, t->dk + i * j->H, (size_t)j->H * sizeof(float));
        memcpy(j->dv + place, t->dv + i * j->H, (size_t)j->H * sizeof(float));
    }
}

static int64_t num_prompt_rows(const backward_job *j, const int64_t *segment) {
    if (segment[2] < 0) return 0;
    const int64_t *parent = j->segments + 3 * segment[2];
    return parent[1] - parent[0];
}

/* Rows [first, first + count) of a segment's (token, query head) pairs. */
static void gather_rows(const backward_job *j, const int64_t *segment, int64_t kv_head, int64_t first, int64_t count,
                        query_tile *t) {
    int64_t heads = j->num_heads / j->num_kv_heads, H = j->H, prompt_rows = num_prompt_rows(j, segment);
    t->count = count, t->padded = (count + 3) & ~(int64_t)3;
    for (int64_t r = 0; r < t->padded; r++) {
        float *q = t->q + r * H, *grad = t->grad + r * H;
        memset(t->dq + r * H, 0, (size_t)H * sizeof(float));
        if (r >= count) {
            memset(q, 0, (size_t)H * sizeof(float));
            memset(grad, 0, (size_t)H * sizeof(float));
            continue;
        }
        int64_t row = segment[0] + (first + r) / heads, head = kv_head * heads + (first + r) % heads;
        t->place[r] = row * j->num_heads + head;
        t->position[r] = prompt_rows + row - segment[0];
        memcpy(q, j->q + row * j->ldq + head * H, (size_t)H * sizeof(float));
        memcpy(grad, j->grad + t->place[r] * H, (size_t)H * sizeof(float));
        t->mean[r] = dot(grad, j->out + t->place[r] * H, H);
    }
}

/* Turns a row's scores and grad . v into probabilities and the gradients of the scores, zero outside [from, to). */
static void weigh_row(const backward_job *j, query_tile *t, int64_t r, int64_t from, int64_t to, int64_t columns) {
    float *p = t->p + r * LS_TILE_KEYS, *ds = t->ds + r * LS_TILE_KEYS;
    if (from >= to) {
        memset(p, 0, (size_t)columns * sizeof(float));
        memset(ds, 0, (size_t)columns * sizeof(float));
        return;
    }
    v16 scale = v16_set1(j->scale), mean = v16_set1(t->mean[r]);
    v16 highest = v16_set1(j->row_max[t->place[r]]), weight = v16_set1(1.0f / j->row_sum[t->place[r]]);
    for (int64_t k = 0; k < columns; k += 16) {
        v16 e = v16_mul(v16_exp(v16_sub(v16_mul(v16_load(p + k), scale), highest)), weight);
        v16 s = v16_mul(v16_mul(e, v16_sub(v16_load(ds + k), mean)), scale);
        if (k < from || k + 16 > to) {
            int first = (int)smaller(larger(from - k, 0), 16), last = (int)larger(smaller(to - k, 16), 0);
            e = v16_keep(e, first, last, 0.0f), s = v16_keep(s, first, last, 0.0f);
        }
        v16_store(p + k, e);
        v16_store(ds + k, s);
    }
}

/* One tile of rows against one tile of keys, the first of which has position `key_position` for them. */
static void visit_tile(const backward_job *j, int64_t kv_head, query_tile *t, const key_tile *keys, int64_t key_position) {
    int64_t H = j->H, from[LS_TILE_ROWS], to[LS_TILE_ROWS], begin = LS_TILE_KEYS, end = 0;
    for (int64_t r = 0; r < t->padded; r++) {
        from[r] = to[r] = 0;
        if (r >= t->count) continue;
        int64_t last = t->position[r] + 1 - key_position;
        from[r] = j->window > 0 ? larger(last - j->window, 0) : 0;
        to[r] = smaller(last, keys->count);
        if (from[r] < to[r]) begin = smaller(begin, from[r]), end = larger(end, to[r]);
    }
    if (begin >= end) return;
    int64_t columns = (end + 15) & ~(int64_t)15;
    size_t used = (size_t)(t->padded * LS_TILE_KEYS) * sizeof(float);
    memset(t->p, 0, used);
    memset(t->ds, 0, used);
    multiply(t->padded, columns, t->q, H, keys->keys, LS_TILE_KEYS, H, t->p, LS_TILE_KEYS);
    multiply(t->padded, columns, t->grad, H, keys->values, LS_TILE_KEYS, H, t->ds, LS_TILE_KEYS);
    for (int64_t r = 0; r < t->padded; r++) weigh_row(j, t, r, from[r], to[r], columns);
    multiply_transposed(columns, H, t->p, LS_TILE_KEYS, t->grad, H, t->count, keys->dv, H);
    multiply_transposed(columns, H, t->ds, LS_TILE_KEYS, t->q, H, t->count, keys->dk, H);
    multiply(t->padded, H, t->ds, LS_TILE_KEYS, j->k + keys->first_row * j->ldk + kv_head * H, j->ldk, end, t->dq, H);
}

static void visit_segment(const backward_job *j, const backward_task *task, int64_t s, query_tile *t) {
    const int64_t *segment = j->segments + 3 * s;
    int64_t num_rows = (segment[1] - segment[0]) * (j->num_heads / j->num_kv_heads);
    for (int64_t first = 0; first < num_rows; first += LS_TILE_ROWS) {
        gather_rows(j, segment, task->kv_head, first, smaller(LS_TILE_ROWS, num_rows - first), t);
        for (int64_t i = 0; i < task->num_tiles; i++) {
            const key_tile *keys = &task->tiles[i];
            if (keys->segment == s)
                visit_tile(j, task->kv_head, t, keys, num_prompt_rows(j, segment) + keys->first_row - segment[0]);
            else if (keys->segment == segment[2])
                visit_tile(j, task->kv_head, t, keys, keys->first_row - j->segments[3 * keys->segment]);
        }
        for (int64_t r = 0; r < t->count; r++)
            memcpy(j->share_dq[task->share] + t->place[r] * j->H, t->dq + r * j->H, (size_t)j->H * sizeof(float));
    }
}

static void backward_tile(void *argument, int64_t index) {
    const backward_job *j = argument;
    const backward_task *task = &j->tasks[index];
    query_tile tile;
    for (int64_t i = 0; i < task->num_tiles; i++) open_tile(j, task->kv_head, &task->tiles[i]);
    for (int64_t s = j->groups[task->group]; s < j->groups[task->group + 1]; s++) visit_segment(j, task, s, &tile);
    for (int64_t i = 0; i < task->num_tiles; i++) close_tile(j, task->kv_head, &task->tiles[i]);
}

static int64_t first_row_of(const backward_job *j, int64_t group) { return j->segments[3 * j->groups[group]]; }

static int64_t end_row_of(const backward_job *j, int64_t group) {
    return j->segments[3 * (j->groups[group + 1] - 1) + 1];
}

static int64_t num_shares_of(const backward_job *j, int64_t group) {
    int64_t rows = end_row_of(j, group) - first_row_of(j, group);
    return larger(smaller(rows / LS_KEYS_PER_SHARE, LS_MAX_SHARES), 1);
}

/* Adds what the shares of a group have for its queries, in order. */
static void add_shares(void *argument, int64_t group) {
    const backward_job *j = argument;
    int64_t width = j->num_heads * j->H, end = end_row_of(j, group) * width, num_shares = num_shares_of(j, group);
    for (int64_t share = 1; share < num_shares; share++)
        for (int64_t i = first_row_of(j, group) * width; i < end; i += 16)
            v16_store(j->dq + i, v16_add(v16_load(j->dq + i), v16_load(j->share_dq[share] + i)));
}

/* The key tiles of one share: every num_shares-th of its group. Returns their number; null `tiles` only counts. */
static int64_t list_tiles(const backward_job *j, const backward_task *task, key_tile *tiles) {
    int64_t number = 0, count = 0;
    for (int64_t s = j->groups[task->group]; s < j->groups[task->group + 1]; s++)
        for (int64_t row = j->segments[3 * s]; row < j->segments[3 * s + 1]; row += LS_TILE_KEYS, number++) {
            if (number % task->num_shares != task->share) continue;
            if (tiles)
                tiles[count] = (key_tile){.segment = s, .first_row = row,
                                          .count = smaller(LS_TILE_KEYS, j->segments[3 * s + 1] - row)};
            count++;
        }
    return count;
}

/* Writes the tasks (where `tasks` is not null) and returns their number; *num_tiles becomes that of their key tiles. */
static int64_t list_tasks(const backward_job *j, backward_task *tasks, key_tile *tiles, int64_t *num_tiles) {
    int64_t num_tasks = 0;
    *num_tiles = 0;
    for (int64_t group = 0; group < j->num_groups; group++)
        for (int64_t share = 0; share < num_shares_of(j, group); share++)
            for (int64_t kv_head = 0; kv_head < j->num_kv_heads; kv_head++) {
                backward_task task = {.group = group, .kv_head = kv_head, .share = share,
                                      .num_shares = num_shares_of(j, group)};
                task.tiles = tiles ? tiles + *num_tiles : NULL;
                task.num_tiles = list_tiles(j, &task, task.tiles);
                *num_tiles += task.num_tiles;
                if (tasks) tasks[num_tasks] = task;
                num_tasks++;
            }
    return num_tasks;
}

/* Memory for tasks, tiles and what they work in, as one piece that the caller frees; NULL without memory. */
static void *make_tasks(backward_job *j, int64_t *num_tasks) {
    int64_t num_tiles, num_rows = end_row_of(j, j->num_groups - 1), matrix = j->H * LS_TILE_KEYS, num_shares = 1;
    *num_tasks = list_tasks(j, NULL, NULL, &num_tiles);
    for (int64_t group = 0; group < j->num_groups; group++) num_shares = larger(num_shares, num_shares_of(j, group));
    int64_t num_values = 4 * num_tiles * matrix + (num_shares - 1) * num_rows * j->num_heads * j->H;
    size_t task_bytes = (size_t)*num_tasks * sizeof(backward_task), tile_bytes = (size_t)num_tiles * sizeof(key_tile);
    char *memory = malloc(task_bytes + tile_bytes + (size_t)num_values * sizeof(float));
    if (!memory) return NULL;
    j->tasks = (backward_task *)memory;
    key_tile *tiles = (key_tile *)(memory + task_bytes);
    float *room = (float *)(memory + task_bytes + tile_bytes);
    list_tasks(j, j->tasks, tiles, &num_tiles);
    for (int64_t i = 0; i < num_tiles; i++, room += 4 * matrix)
        tiles[i].keys = room, tiles[i].values = room + matrix, tiles[i].dk = room + 2 * matrix,
        tiles[i].dv = room + 3 * matrix;
    j->share_dq[0] = j->dq;
    for (int64_t share = 1; share < num_shares; share++, room += num_rows * j->num_heads * j->H) j->share_dq[share] = room;
    return memory;
}

/* Writes dq[T, N, H], dk[T, K, H], dv[T, K, H] from grad[T, N, H]; q, k, v have row strides. Returns 0, or -1 without
 * memory. */
int ls_attention_backward(const float *q, int64_t ldq, const float *k, int64_t ldk, const float *v, int64_t ldv,
                          const float *out, const float *grad, const float *row_max, const float *row_sum, float *dq,
                          float *dk, float *dv, const int64_t *segments, const int64_t *groups, int64_t num_groups,
                          int64_t num_heads, int64_t num_kv_heads, int64_t H, int64_t window, float scale) {
    backward_job job = {.q = q, .k = k, .v = v, .out = out, .grad = grad, .row_max = row_max, .row_sum = row_sum, .dq = dq,
                        .dk = dk, .dv = dv, .segments = segments, .groups = groups, .ldq = ldq, .ldk = ldk, .ldv = ldv,
                        .num_heads = num_heads, .num_kv_heads = num_kv_heads, .H = H, .window = window,
                        .num_groups = num_groups, .scale = scale};
    if (num_groups == 0) return 0;
    int64_t num_tasks;
    void *memory = make_tasks(&job, &num_tasks);
    if (!memory) return -1;
    ls_parallel(backward_tile, &job, num_tasks);
    ls_parallel(add_shares, &job, num_groups);
    free(memory);
    return 0;
}

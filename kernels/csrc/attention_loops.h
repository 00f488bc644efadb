/* The inner loops of attention over keys and values of one type; attention.c includes this once for each.
 *
 * LS_KV is the type that is stored, LS_LOAD_KV(p) widens sixteen of it, LS_FOR_KV(name) gives a function its name. */

#define LS_UNROLL _Pragma("GCC unroll 8") /* early enough for the tile to stay in registers */

typedef struct { /* where groups of 16 keys and values of one key-value head lie, those of a chunk and the next few */
    const LS_KV *keys[LS_CHUNK / 16 + LS_AHEAD], *values[LS_CHUNK / 16 + LS_AHEAD];
} LS_FOR_KV(groups);

/* One group of 16 keys for a register tile of rows: scores[r][0..16) = ((a0 + a1) + (a2 + a3)) * scale, a_u the FMA chain
 * over d = u mod 4. As many chains at a time as there are registers for. */
#define LS_DEFINE_SCORES(ROWS)                                                                                         \
    static void LS_FOR_KV(scores_##ROWS)(const float *const *q, const LS_KV *key, int64_t S, int64_t H, float scale,   \
                                         float *scores) {                                                              \
        v16 chains[ROWS][4], factor = v16_set1(scale);                                                                 \
        LS_UNROLL for (int first = 0; first < 4; first += LS_TILE_VECTORS) {                                           \
            v16 a[ROWS][LS_TILE_VECTORS];                                                                              \
            LS_UNROLL for (int r = 0; r < ROWS; r++)                                                                   \
                LS_UNROLL for (int u = 0; u < LS_TILE_VECTORS; u++) a[r][u] = v16_zero();                              \
            for (int64_t d = first; d < H; d += 4)                                                                     \
                LS_UNROLL for (int u = 0; u < LS_TILE_VECTORS; u++) {                                                  \
                    v16 k = LS_LOAD_KV(key + (d + u) * S);                                                             \
                    LS_UNROLL for (int r = 0; r < ROWS; r++) a[r][u] = v16_fma(v16_set1(q[r][d + u]), k, a[r][u]);     \
                }                                                                                                      \
            LS_UNROLL for (int r = 0; r < ROWS; r++)                                                                   \
                LS_UNROLL for (int u = 0; u < LS_TILE_VECTORS; u++) chains[r][first + u] = a[r][u];                    \
        }                                                                                                              \
        LS_UNROLL for (int r = 0; r < ROWS; r++) {                                                                     \
            v16 sum = v16_add(v16_add(chains[r][0], chains[r][1]), v16_add(chains[r][2], chains[r][3]));               \
            v16_store(scores + r * LS_SCORE_STRIDE, v16_mul(sum, factor));                                             \
        }                                                                                                              \
    }

/* out[r][0..16 VECTORS) += p[r][j] * value[j], one chain over j per output: keys [first, last) of each group of 16. */
#define LS_DEFINE_WEIGHTED(ROWS, VECTORS)                                                                              \
    static void LS_FOR_KV(weighted_##ROWS##_##VECTORS)(const float *p, const LS_KV *const *groups, int num_groups,     \
                                                       int first, int last, int64_t column, int64_t H, float *out) {   \
        v16 a[ROWS][VECTORS];                                                                                          \
        LS_UNROLL for (int r = 0; r < ROWS; r++)                                                                       \
            LS_UNROLL for (int v = 0; v < VECTORS; v++) a[r][v] = v16_load(out + r * H + column + 16 * v);             \
        for (int g = 0; g < num_groups; g++, p += 16) {                                                                \
            const LS_KV *value = groups[g] + first * H + column;                                                       \
            for (int j = first; j < last; j++, value += H) {                                                           \
                v16 x[VECTORS];                                                                                        \
                LS_UNROLL for (int v = 0; v < VECTORS; v++) x[v] = LS_LOAD_KV(value + 16 * v);                         \
                LS_UNROLL for (int r = 0; r < ROWS; r++) {                                                             \
                    v16 s = v16_set1(p[r * LS_SCORE_STRIDE + j]);                                                      \
                    LS_UNROLL for (int v = 0; v < VECTORS; v++) a[r][v] = v16_fma(s, x[v], a[r][v]);                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        LS_UNROLL for (int r = 0; r < ROWS; r++)                                                                       \
            LS_UNROLL for (int v = 0; v < VECTORS; v++) v16_store(out + r * H + column + 16 * v, a[r][v]);             \
    }

#if LS_TILE_VECTORS == 4
#define LS_DEFINE_ROWS(ROWS)                                \
    LS_DEFINE_SCORES(ROWS)                                  \
    LS_DEFINE_WEIGHTED(ROWS, 1) LS_DEFINE_WEIGHTED(ROWS, 2) \
    LS_DEFINE_WEIGHTED(ROWS, 3) LS_DEFINE_WEIGHTED(ROWS, 4)
#define LS_OF_ROWS(ROWS)                                                             \
    {LS_FOR_KV(weighted_##ROWS##_1), LS_FOR_KV(weighted_##ROWS##_2),                 \
     LS_FOR_KV(weighted_##ROWS##_3), LS_FOR_KV(weighted_##ROWS##_4)}
#else
#define LS_DEFINE_ROWS(ROWS) LS_DEFINE_SCORES(ROWS) LS_DEFINE_WEIGHTED(ROWS, 1)
#define LS_OF_ROWS(ROWS) {LS_FOR_KV(weighted_##ROWS##_1)}
#endif
LS_DEFINE_ROWS(1)
LS_DEFINE_ROWS(2)
LS_DEFINE_ROWS(3)
LS_DEFINE_ROWS(4)
LS_DEFINE_ROWS(5)
LS_DEFINE_ROWS(6)

static void LS_FOR_KV(scores)(int rows, const float *const *q, const LS_KV *key, int64_t S, int64_t H, float scale,
                              float *out) {
    static void (*const by_rows[])(const float *const *, const LS_KV *, int64_t, int64_t, float, float *) = {
        LS_FOR_KV(scores_1), LS_FOR_KV(scores_2), LS_FOR_KV(scores_3),
        LS_FOR_KV(scores_4), LS_FOR_KV(scores_5), LS_FOR_KV(scores_6)};
    by_rows[rows - 1](q, key, S, H, scale, out);
}

/* All columns, in as few and as even register tiles as they allow: 80 = 48 + 32, 96 = 48 + 48, 128 = 64 + 64. */
static void LS_FOR_KV(weighted)(int rows, const float *p, const LS_KV *const *groups, int num_groups, int first, int last,
                                int64_t H, float *out) {
    static void (*const by_shape[][LS_TILE_VECTORS])(const float *, const LS_KV *const *, int, int, int, int64_t,
                                                     int64_t, float *) = {
        LS_OF_ROWS(1), LS_OF_ROWS(2), LS_OF_ROWS(3), LS_OF_ROWS(4), LS_OF_ROWS(5), LS_OF_ROWS(6)};
    for (int64_t column = 0; column < H;) {
        int64_t left = (H - column) / 16, even = left <= 4 ? left : left <= 6 ? 3 : 4;
        int64_t vectors = smaller(even, LS_TILE_VECTORS);
        by_shape[rows - 1][vectors - 1](p, groups, num_groups, first, last, column, H, out);
        column += 16 * vectors;
    }
}

/* Where the 16 keys from position k on lie. */
static const LS_KV *LS_FOR_KV(key_group)(const attention_job *j, int64_t sequence, int64_t kv_head, int64_t k) {
    int64_t block = j->tables[sequence * j->max_blocks + k / j->S];
    return (const LS_KV *)j->keys + (block * j->num_kv_heads + kv_head) * j->H * j->S + k % j->S;
}

/* Where the groups of 16 in [begin, end) of a chunk lie, for one key-value head. */
static void LS_FOR_KV(find_groups)(const attention_job *j, int32_t sequence, int64_t kv_head, int64_t base, int64_t begin,
                                   int64_t end, LS_FOR_KV(groups) *g) {
    const int32_t *table = j->tables + sequence * j->max_blocks;
    for (int64_t k = begin; k < end; k += 16) {
        int64_t slot = (base + k) % j->S, place = (table[(base + k) / j->S] * j->num_kv_heads + kv_head) * j->H * j->S;
        g->keys[k / 16] = (const LS_KV *)j->keys + place + slot;
        g->values[k / 16] = (const LS_KV *)j->values + place + slot * j->H;
    }
}

/* The weighted values of groups [begin, end) for one tile. Keys that all its rows reach are taken together; the few that
 * only some reach, row by row. A key out of reach is skipped, never multiplied by zero. */
static void LS_FOR_KV(add_values)(const row_tile *t, const row_reach *reach, const float *p, const LS_KV *const *values,
                                  int64_t begin, int64_t end, int64_t H, float *out) {
    int64_t all_begin = larger(t->all_begin, begin), all_end = smaller(t->all_end, end);
    for (int64_t k = begin; k < end;) {
        if (k >= all_begin && k + 16 <= all_end) {
            int64_t full = (all_end - k) / 16;
            LS_FOR_KV(weighted)(t->rows, p + k, values + k / 16, (int)full, 0, 16, H, out);
            k += 16 * full;
            continue;
        }
        int64_t shared = smaller(larger(all_begin, k), k + 16), shared_end = smaller(larger(all_end, shared), k + 16);
        if (shared >= shared_end) shared = shared_end = k + 16;
        for (int r = 0; r < t->rows; r++) {
            int64_t a = larger(reach[r].from, k), b = smaller(reach[r].to, shared);
            if (a < b)
                LS_FOR_KV(weighted)(1, p + r * LS_SCORE_STRIDE + k, values + k / 16, 1, (int)(a - k), (int)(b - k), H,
                                    out + r * H);
        }
        if (shared < shared_end)
            LS_FOR_KV(weighted)(t->rows, p + k, values + k / 16, 1, (int)(shared - k), (int)(shared_end - k), H, out);
        for (int r = 0; r < t->rows; r++) {
            int64_t a = larger(reach[r].from, shared_end), b = smaller(reach[r].to, k + 16);
            if (a < b)
                LS_FOR_KV(weighted)(1, p + r * LS_SCORE_STRIDE + k, values + k / 16, 1, (int)(a - k), (int)(b - k), H,
                                    out + r * H);
        }
        k += 16;
    }
}

/* Asks for a group of keys or values, so that it is in the second cache when it is read. Blocks lie anywhere, and the
 * processor does not foresee the next one. */
static void LS_FOR_KV(prefetch_keys)(const LS_KV *key, int64_t S, int64_t H) {
    if (!key) return;
    int64_t step = S * (int64_t)sizeof(LS_KV) < 64 ? 64 / (S * (int64_t)sizeof(LS_KV)) : 1;
    for (int64_t d = 0; d < H; d += step) __builtin_prefetch(key + d * S, 0, LS_SECOND_CACHE);
}

static void LS_FOR_KV(prefetch_values)(const LS_KV *value, int64_t H) {
    for (int64_t i = 0; i < 16 * H; i += 64 / (int64_t)sizeof(LS_KV)) __builtin_prefetch(value + i, 0, LS_SECOND_CACHE);
}

/* Scores of all tiles, group by group, so that keys come from memory once. */
static void LS_FOR_KV(score_chunk)(const attention_job *j, row_set *rows, const LS_FOR_KV(groups) *groups, int64_t begin,
                                   int64_t end) {
    for (int64_t k = begin; k < end; k += 16)
        for (int t = 0; t < rows->num_tiles; t++) {
            const row_tile *tile = &rows->tiles[t];
            int64_t next = k / 16 + LS_AHEAD, values = next - end / 16 + begin / 16;
            if (rows->is_streamed && next < end / 16) LS_FOR_KV(prefetch_keys)(groups[t].keys[next], j->S, j->H);
            else if (rows->is_streamed && values < end / 16) LS_FOR_KV(prefetch_values)(groups[t].values[values], j->H);
            if (k >= tile->begin && k < tile->end)
                LS_FOR_KV(scores)(tile->rows, rows->q + tile->first, groups[t].keys[k / 16], j->S, j->H, j->scale,
                                  rows->p + tile->first * LS_SCORE_STRIDE + k);
        }
}

/* Weighted values of all tiles, as many groups at a time as the first cache holds. */
static void LS_FOR_KV(weigh_chunk)(const attention_job *j, row_set *rows, const LS_FOR_KV(groups) *groups, int64_t begin,
                                   int64_t end, int64_t known, float *out) {
    int64_t in_cache = LS_VALUE_BYTES / (16 * j->H * (int64_t)sizeof(float)), step = 16 * larger(in_cache, 1);
    if (rows->is_streamed) step = 16;
    for (int64_t k = begin; k < end; k += step)
        for (int t = 0; t < rows->num_tiles; t++) {
            const row_tile *tile = &rows->tiles[t];
            int64_t next = k / 16 + LS_AHEAD;
            if (rows->is_streamed && next < end / 16) LS_FOR_KV(prefetch_values)(groups[t].values[next], j->H);
            else if (rows->is_streamed && next < known / 16) LS_FOR_KV(prefetch_keys)(groups[t].keys[next], j->S, j->H);
            LS_FOR_KV(add_values)(tile, rows->reach + tile->first, rows->p + tile->first * LS_SCORE_STRIDE,
                                  groups[t].values, larger(k, tile->begin), smaller(k + step, tile->end), j->H,
                                  out + tile->first * j->H);
        }
}

/* Where the first groups of keys lie of the task that this thread will probably take next, for its key-value head t; null
 * where it has none. */
static void LS_FOR_KV(find_next_task)(const attention_job *j, const attention_task *task, int64_t t, const LS_KV **keys) {
    const attention_task *next = task + j->num_threads;
    int has_head = next < j->tasks + j->num_tasks && t < next->num_kv_heads;
    int64_t first = has_head ? next->first_chunk * LS_CHUNK : 0, last = has_head ? j->lengths[next->sequence] : 0;
    for (int64_t k = first; k < first + 16 * LS_AHEAD; k += 16, keys++)
        *keys = k < last ? LS_FOR_KV(key_group)(j, next->sequence, next->kv_head + t, k) : NULL;
}

/* One chunk of keys for all rows of a task: scores, then exact maximum, exponentials and their sum, then the weighted
 * values. */
static void LS_FOR_KV(visit_chunk)(const attention_job *j, const attention_task *task, row_set *rows, int64_t base,
                                   float *highest, float *sum, float *out) {
    LS_FOR_KV(groups) groups[LS_TASK_TILES];
    int64_t begin = LS_CHUNK, end = 0;
    for (int t = 0; t < rows->num_tiles; t++)
        begin = smaller(begin, rows->tiles[t].begin), end = larger(end, (rows->tiles[t].end + 15) & ~(int64_t)15);
    int64_t known = smaller(rows->end - base, LS_CHUNK + 16 * LS_AHEAD); /* the next chunk's first ones too */
    for (int t = 0; t < rows->num_tiles; t++)
        LS_FOR_KV(find_groups)(j, task->sequence, rows->tiles[t].kv_head, base, begin, known, &groups[t]);
    if (rows->is_streamed && base + LS_CHUNK >= rows->end) {
        known = end + 16 * LS_AHEAD;
        for (int t = 0; t < rows->num_tiles; t++) LS_FOR_KV(find_next_task)(j, task, t, &groups[t].keys[end / 16]);
    }
    LS_FOR_KV(score_chunk)(j, rows, groups, begin, end);
    for (int r = 0; r < rows->count; r++)
        weigh_row(rows->p + r * LS_SCORE_STRIDE, &rows->reach[r], &highest[r], &sum[r]);
    memset(out, 0, (size_t)(rows->count * j->H) * sizeof(float));
    LS_FOR_KV(weigh_chunk)(j, rows, groups, begin, end, known, out);
}

#undef LS_DEFINE_SCORES
#undef LS_DEFINE_WEIGHTED
#undef LS_DEFINE_ROWS
#undef LS_OF_ROWS
#undef LS_KV
#undef LS_LOAD_KV
#undef LS_FOR_KV

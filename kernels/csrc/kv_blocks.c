/* Writes and copies the blocks in which keys and values lie: keys [P, K, H, S], values [P, K, S, H]. */
#include "bf16.h"
#include "ops.h"
#include "pool.h"

#define LS_SLOTS_PER_TASK 8

typedef struct {
    const float *k, *v;
    void *keys, *values; /* float, or uint16_t with is_bf16 */
    const int64_t *rows, *slot_mapping;
    int64_t num_slots, ldk, ldv, num_kv_heads, H, S;
    int is_bf16;
} store_job;

static void store_head(const store_job *j, const float *k, const float *v, int64_t place, int64_t slot) {
    int64_t key = place + slot, value = place + slot * j->H;
    if (j->is_bf16) {
        uint16_t *keys = (uint16_t *)j->keys + key, *values = (uint16_t *)j->values + value;
        for (int64_t d = 0; d < j->H; d++) keys[d * j->S] = bf16_from_float(k[d]);
        for (int64_t d = 0; d < j->H; d++) values[d] = bf16_from_float(v[d]);
        return;
    }
    float *keys = (float *)j->keys + key;
    for (int64_t d = 0; d < j->H; d++) keys[d * j->S] = k[d];
    memcpy((float *)j->values + value, v, (size_t)j->H * sizeof(float));
}

static void store_tile(void *argument, int64_t tile) {
    const store_job *j = argument;
    int64_t first = tile * LS_SLOTS_PER_TASK, end = first + LS_SLOTS_PER_TASK;
    for (int64_t i = first; i < end && i < j->num_slots; i++) {
        int64_t row = j->rows ? j->rows[i] : i, block = j->slot_mapping[i] / j->S, slot = j->slot_mapping[i] % j->S;
        for (int64_t head = 0; head < j->num_kv_heads; head++)
            store_head(j, j->k + row * j->ldk + head * j->H, j->v + row * j->ldv + head * j->H,
                       (block * j->num_kv_heads + head) * j->H * j->S, slot);
    }
}

/* Stores rows of k and v [T, K, H] (row strides ldk, ldv) at slots, rounded to bfloat16 where is_bf16 is set: row
 * `rows[i]` (row i where rows is null) goes to slot slot_mapping[i] = block * S + slot. */
void ls_kv_store(const float *k, int64_t ldk, const float *v, int64_t ldv, void *keys, void *values, int64_t is_bf16,
                 const int64_t *rows, const int64_t *slot_mapping, int64_t num_slots, int64_t num_kv_heads, int64_t H,
                 int64_t S) {
    store_job job = {k, v, keys, values, rows, slot_mapping, num_slots, ldk, ldv, num_kv_heads, H, S, (int)is_bf16};
    ls_parallel(store_tile, &job, (num_slots + LS_SLOTS_PER_TASK - 1) / LS_SLOTS_PER_TASK);
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

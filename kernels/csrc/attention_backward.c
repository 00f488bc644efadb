/* Gradients of attention for a packed batch whose segments may share a prompt.
 *
 * A segment's keys are its parent's rows, then its own. A parent and its children form one task per key-value head, so
 * every gradient is summed by one thread in a fixed order and the result does not depend on the number of threads. */
#include "exp_log.h"
#include "pool.h"

#define LS_MAX_HEAD 256

typedef struct {
    const float *q, *k, *v, *out, *grad, *row_max, *row_sum;
    float *dq, *dk, *dv;
    const int64_t *segments, *groups; /* segments [n][3]: first row, end row, parent or -1; groups: first segment of each */
    int64_t ldq, ldk, ldv, num_heads, num_kv_heads, H, window;
    float scale;
} backward_job;

static float dot(const float *a, const float *b, int64_t H) {
    v16 s = v16_zero();
    for (int64_t d = 0; d < H; d += 16) s = v16_fma(v16_load(a + d), v16_load(b + d), s);
    return v16_sum(s);
}

static void add_scaled(float *out, float scale, const float *x, int64_t H) {
    v16 s = v16_set1(scale);
    for (int64_t d = 0; d < H; d += 16) v16_store(out + d, v16_fma(s, v16_load(x + d), v16_load(out + d)));
}

/* One query row of one head against the keys [first, position] of its segment. */
static void backward_row(const backward_job *j, int64_t row, int64_t head, int64_t parent_first, int64_t parent_rows,
                         int64_t own_first) {
    int64_t H = j->H, kv_head = head / (j->num_heads / j->num_kv_heads), place = row * j->num_heads + head;
    int64_t position = parent_rows + row - own_first;
    int64_t first = j->window > 0 && position + 1 > j->window ? position + 1 - j->window : 0;
    const float *q = j->q + row * j->ldq + head * H, *grad = j->grad + place * H;
    float highest = j->row_max[place], sum = j->row_sum[place], mean = dot(grad, j->out + place * H, H);
    float *dq = j->dq + place * H;
    for (int64_t key = first; key <= position; key++) {
        int64_t r = key < parent_rows ? parent_first + key : own_first + key - parent_rows;
        const float *k = j->k + r * j->ldk + kv_head * H, *v = j->v + r * j->ldv + kv_head * H;
        float p = exp1(dot(q, k, H) * j->scale - highest) / sum;
        float ds = p * (dot(grad, v, H) - mean) * j->scale;
        int64_t kv_place = (r * j->num_kv_heads + kv_head) * H;
        add_scaled(dq, ds, k, H);
        add_scaled(j->dk + kv_place, ds, q, H);
        add_scaled(j->dv + kv_place, p, grad, H);
    }
}

static void backward_tile(void *argument, int64_t tile) {
    const backward_job *j = argument;
    int64_t group = tile / j->num_kv_heads, kv_head = tile % j->num_kv_heads;
    int64_t heads = j->num_heads / j->num_kv_heads;
    for (int64_t s = j->groups[group]; s < j->groups[group + 1]; s++) {
        const int64_t *segment = j->segments + 3 * s;
        const int64_t *parent = segment[2] >= 0 ? j->segments + 3 * segment[2] : NULL;
        for (int64_t row = segment[0]; row < segment[1]; row++)
            for (int64_t h = 0; h < heads; h++)
                backward_row(j, row, kv_head * heads + h, parent ? parent[0] : 0, parent ? parent[1] - parent[0] : 0,
                             segment[0]);
    }
}

/* Adds to dq[T, N, H], dk[T, K, H], dv[T, K, H] (zeroed by the caller) from grad[T, N, H]; q, k, v have row strides. */
void ls_attention_backward(const float *q, int64_t ldq, const float *k, int64_t ldk, const float *v, int64_t ldv,
                           const float *out, const float *grad, const float *row_max, const float *row_sum, float *dq,
                           float *dk, float *dv, const int64_t *segments, const int64_t *groups, int64_t num_groups,
                           int64_t num_heads, int64_t num_kv_heads, int64_t H, int64_t window, float scale) {
    backward_job job = {q, k, v, out, grad, row_max, row_sum, dq, dk, dv, segments, groups,
                        ldq, ldk, ldv, num_heads, num_kv_heads, H, window, scale};
    ls_parallel(backward_tile, &job, num_groups * num_kv_heads);
}

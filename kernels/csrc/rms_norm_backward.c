/* Gradients of RMSNorm: y = x r w with r = (mean(x^2) + eps)^-1/2. */
#include "pool.h"
#include "simd.h"

#define LS_ROWS_PER_PART 32 /* rows whose shares of the weight's gradient are added up together, whatever the threads */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    const float *x, *scale, *weight, *grad, *grad_sum;
    float *dx, *parts;
    int64_t num_rows, num_heads, D, ldx, ldg, ldd;
} backward_job;

/* mean(grad w x r), the part of the gradient that goes along the normed row. */
static float along(const float *x, float r, const float *grad, const float *weight, int64_t D) {
    v16 sum = v16_zero();
    for (int64_t i = 0; i < D; i += 16) {
        int n = (int)smaller(16, D - i);
        v16 g = v16_mul(v16_load_first(grad + i, n), v16_load_first(weight + i, n));
        sum = v16_fma(g, v16_mul(v16_load_first(x + i, n), v16_set1(r)), sum);
    }
    return v16_sum(sum) / (float)D;
}

static void backward_tile(void *argument, int64_t tile) {
    const backward_job *j = argument;
    float *part = j->parts + tile * j->D;
    memset(part, 0, (size_t)j->D * sizeof(float));
    int64_t first = tile * LS_ROWS_PER_PART, last = smaller(first + LS_ROWS_PER_PART, j->num_rows * j->num_heads);
    for (int64_t row = first; row < last; row++) {
        int64_t token = row / j->num_heads, place = row % j->num_heads * j->D;
        const float *x = j->x + token * j->ldx + place, *grad = j->grad + token * j->ldg + place;
        float *dx = j->dx + token * j->ldd + place, r = j->scale[row], inner = along(x, r, grad, j->weight, j->D);
        for (int64_t i = 0; i < j->D; i++) {
            float normed = x[i] * r;
            dx[i] = (grad[i] * j->weight[i] - normed * inner) * r;
            part[i] += grad[i] * normed;
        }
        if (j->grad_sum)
            for (int64_t i = 0; i < j->D; i++) dx[i] += j->grad_sum[row * j->D + i];
    }
}

/* dx[T, heads, D] for grad[T, heads, D] of the normed rows, plus grad_sum[T, D] (or null) of the sum that the fused form also
 * returns; row strides ldx, ldg, ldd. parts[ceil(T heads / 32), D] receives what each 32 rows add to the weight's gradient. */
void ls_rms_norm_backward(const float *x, int64_t ldx, const float *scale, const float *weight, const float *grad, int64_t ldg,
                          const float *grad_sum, float *dx, int64_t ldd, float *parts, int64_t num_rows, int64_t num_heads,
                          int64_t D) {
    backward_job job = {x, scale, weight, grad, grad_sum, dx, parts, num_rows, num_heads, D, ldx, ldg, ldd};
    ls_parallel(backward_tile, &job, (num_rows * num_heads + LS_ROWS_PER_PART - 1) / LS_ROWS_PER_PART);
}

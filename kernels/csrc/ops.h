/* The operations of a forward pass, as `recording.c` calls them again; each is described where it is defined. */
#pragma once
#include <stdint.h>

void ls_embedding(const void *packed, int64_t arithmetic, const int64_t *ids, float *out, int64_t num_ids, int64_t K);
void ls_round_rows(const float *x, int64_t ldx, uint16_t *y, int64_t ldy, int64_t num_rows, int64_t width);
void ls_linear(const void *x, int64_t ldx, const void *packed, int64_t arithmetic, const float *addend, int64_t lda,
               float *y, int64_t ldy, int64_t M, int64_t N, int64_t K);
void ls_linear_then(const void *x, int64_t ldx, const void *packed, int64_t arithmetic, const float *addend, int64_t lda,
                    float *y, int64_t ldy, int64_t M, int64_t N, int64_t K, const void *next, int64_t next_K);
void ls_rms_norm(const float *x, int64_t ldx, const float *delta, const float *weight, float *sum, float *y, int64_t ldy,
                 float *scale, int64_t num_rows, int64_t num_heads, int64_t D, float eps);
void ls_rotary(const float *x, int64_t ldx, const int64_t *positions, const float *table, float *y, int64_t num_rows,
               int64_t num_heads, int64_t H, float sign);
void ls_silu_and_mul(const float *x, float *y, int64_t num_rows, int64_t F);
void ls_kv_store(const float *k, int64_t ldk, const float *v, int64_t ldv, void *keys, void *values, int64_t is_bf16,
                 const int64_t *rows, const int64_t *slot_mapping, int64_t num_slots, int64_t num_kv_heads, int64_t H,
                 int64_t S);
int ls_attention(const float *q, int64_t ldq, const void *keys, const void *values, int64_t is_bf16, const int32_t *tables,
                 const int32_t *starts, const int32_t *lengths, float *out, float *row_max, float *row_sum,
                 int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t H, int64_t S,
                 int64_t max_blocks, int64_t window, float scale);

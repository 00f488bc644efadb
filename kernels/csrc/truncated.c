/* Sampling from a changed distribution: penalties, bias and masks, temperature, then min-p, top-k and top-p.
 *
 * Every truncation keeps a prefix of one order: logit descending, id ascending. The prefix is found by a histogram over
 * the distance from the highest logit and an exact sort of the one bin that it ends in. Masses are integers, so their
 * sums have no order (docs/numerics.md, "Truncated sampling"). A draw is one task and shares nothing with the others. */
#include <stdatomic.h>
#include <stdlib.h>

#include "pool.h"
#include "vocabulary.h"

#define LS_MASS_SCALE 0x1p44 /* the mass of the highest logit */
#define LS_BINS_PER_UNIT 32.0f
#define LS_NUM_BINS 1024 /* beyond 32 units below the highest logit every mass rounds to 0 */
#define LS_INSERTION_LIMIT 32

typedef struct {
    const int64_t *offsets; /* [n + 1] */
    const int32_t *ids;
} id_lists;

typedef struct {
    const float *logits;
    const int64_t *row, *seed, *position, *index, *is_greedy;
    const double *temperature, *repetition, *presence, *frequency, *min_p, *top_k, *top_p, *is_plain;
    id_lists seen, biased, masked, allowed;
    const int32_t *counts;
    const float *bias;
    int64_t *tokens, *num_kept, *top_ids;
    float *logprobs, *raw_logprobs, *kept_mass, *top_logprobs;
    int64_t num_draws, V, num_blocks, num_top;
    char *scratch;
    int64_t scratch_bytes;
    _Atomic int64_t next_draw;
} truncated_job;

typedef struct { uint64_t mass; int64_t count; } bin;

/* The kept prefix: ids whose logit is above z, and those with z itself up to `last`. */
typedef struct {
    float z;
    int64_t last, count;
    uint64_t mass;
} prefix;

/* One draw's working memory. */
typedef struct {
    float *z, *e;                  /* [num_blocks * 64] logits sampled from, and exp(z - top); -inf and 0 where out */
    float *block_max, *block_sum;  /* [num_blocks rounded up to 16], as are the maxima of what is kept */
    float *kept_max;
    uint64_t *order, *other_order; /* [V] */
    bin *bins;                     /* [LS_NUM_BINS] */
    float top;
} draw_space;

static int64_t draw_space_bytes(int64_t V, int64_t num_blocks) {
    int64_t num_floats = 2 * num_blocks * LS_VOCAB_BLOCK + 3 * (num_blocks + 16);
    return num_floats * (int64_t)sizeof(float) + 2 * V * (int64_t)sizeof(uint64_t) + LS_NUM_BINS * (int64_t)sizeof(bin);
}

static draw_space lay_out(char *memory, int64_t V, int64_t num_blocks) {
    draw_space s = {.order = (uint64_t *)memory, .top = -INFINITY};
    s.other_order = s.order + V;
    s.bins = (bin *)(s.other_order + V);
    s.z = (float *)(s.bins + LS_NUM_BINS);
    s.e = s.z + num_blocks * LS_VOCAB_BLOCK;
    s.block_max = s.e + num_blocks * LS_VOCAB_BLOCK;
    s.block_sum = s.block_max + (num_blocks + 15) / 16 * 16;
    s.kept_max = s.block_sum + (num_blocks + 15) / 16 * 16;
    return s;
}

/* The nearest integer to e * 2^44, ties to even, for e in [0, 1]: adding 2^52 leaves it in the low bits. */
static inline uint64_t mass_of(float e) {
    double shifted = (double)e * LS_MASS_SCALE + 0x1p52;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4330000000000000ull;
}

/* Ascending in this number is descending in z, then ascending in id; z is no -0. */
static inline uint64_t rank_of(float z, int64_t id) {
    uint32_t bits;
    memcpy(&bits, &z, sizeof bits);
    uint32_t descending = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
    return (uint64_t)descending << 32 | (uint64_t)id;
}

/* The least float above z, which is no -0. */
static inline float above(float z) {
    uint32_t bits;
    memcpy(&bits, &z, sizeof bits);
    bits += bits & 0x80000000u ? -1u : 1u;
    memcpy(&z, &bits, sizeof bits);
    return z;
}

/* What is kept of block b, -inf in the other places. */
static inline void keep_block(const prefix *p, const float *z, int64_t b, float *kept) {
    int64_t place = p->last - b * LS_VOCAB_BLOCK;
    int last = place < 0 ? -1 : place < LS_VOCAB_BLOCK ? (int)place : LS_VOCAB_BLOCK;
    float more = above(p->z);
    for (int k = 0; k < LS_VOCAB_BLOCK; k++) {
        float one = z[b * LS_VOCAB_BLOCK + k];
        kept[k] = one >= (k <= last ? p->z : more) ? one : -INFINITY;
    }
}

/* Running total C of blocks whose maxima and sums are known, relative to the highest maximum `top`. */
static double blocks_total(const float *maxima, const float *sums, int64_t num_blocks, float top) {
    double total = 0.0;
    for (int64_t begin = 0; begin < num_blocks; begin += 16) {
        float factor[16];
        v16_store(factor, v16_exp(v16_sub(v16_load(maxima + begin), v16_set1(top))));
        for (int64_t b = begin; b < begin + 16 && b < num_blocks; b++)
            total += (double)sums[b] * (double)factor[b - begin];
    }
    return total;
}

/* Log-sum-exp of the logits as they come: their maximum and total. */
static double raw_total(const truncated_job *j, const float *x, draw_space *s, float *top) {
    float m = -INFINITY;
    for (int64_t b = 0; b < j->num_blocks; b++) {
        int64_t begin = b * LS_VOCAB_BLOCK, width = j->V - begin < LS_VOCAB_BLOCK ? j->V - begin : LS_VOCAB_BLOCK;
        float z[LS_VOCAB_BLOCK] = {0};
        memcpy(z, x + begin, (size_t)width * sizeof(float));
        reduce_block(z, (int)width, 1.0f, &s->block_max[b], &s->block_sum[b]);
        m = s->block_max[b] > m ? s->block_max[b] : m;
    }
    *top = m;
    return blocks_total(s->block_max, s->block_sum, j->num_blocks, m);
}

/* Log-sum-exp of the kept logits: the total relative to s->top. A block without a kept id adds nothing. */
static double kept_total(const truncated_job *j, const prefix *p, draw_space *s) {
    for (int64_t b = 0; b < j->num_blocks; b++) {
        float z[LS_VOCAB_BLOCK];
        s->block_sum[b] = 0.0f, s->kept_max[b] = -INFINITY;
        if (s->block_max[b] < p->z) continue;
        keep_block(p, s->z, b, z);
        reduce_block(z, LS_VOCAB_BLOCK, 1.0f, &s->kept_max[b], &s->block_sum[b]);
        if (s->kept_max[b] == -INFINITY) s->block_sum[b] = 0.0f;
    }
    return blocks_total(s->kept_max, s->block_sum, j->num_blocks, s->top);
}

/* Penalties, bias, allowed ids and, where they shall hold, masks: x becomes z, filled up with -inf to whole blocks. */
static void change_logits(const truncated_job *j, int64_t i, const float *x, draw_space *s, int has_masks) {
    float *z = s->z, r = (float)j->repetition[i], f = (float)j->frequency[i], a = (float)j->presence[i];
    memcpy(z, x, (size_t)j->V * sizeof(float));
    for (int64_t k = j->V; k < j->num_blocks * LS_VOCAB_BLOCK; k++) z[k] = -INFINITY;
    for (int64_t k = j->seen.offsets[i]; k < j->seen.offsets[i + 1]; k++) {
        float *one = &z[j->seen.ids[k]];
        *one = *one > 0.0f ? *one / r : *one * r;
        if (j->counts[k] > 0) *one = (*one - f * (float)j->counts[k]) - a;
    }
    for (int64_t k = j->biased.offsets[i]; k < j->biased.offsets[i + 1]; k++) z[j->biased.ids[k]] += j->bias[k];
    int64_t first = j->allowed.offsets[i], num_allowed = j->allowed.offsets[i + 1] - first;
    if (num_allowed) {
        float *values = (float *)s->order;
        for (int64_t k = 0; k < num_allowed; k++) values[k] = z[j->allowed.ids[first + k]];
        for (int64_t k = 0; k < j->V; k++) z[k] = -INFINITY;
        for (int64_t k = 0; k < num_allowed; k++) z[j->allowed.ids[first + k]] = values[k];
    }
    if (!has_masks) return;
    for (int64_t k = j->masked.offsets[i]; k < j->masked.offsets[i + 1]; k++) z[j->masked.ids[k]] = -INFINITY;
}

/* z over the temperature, -0 made +0; the blocks' maxima and the highest of all. */
static void scale_logits(const truncated_job *j, float temperature, draw_space *s) {
    v16 t = v16_set1(temperature);
    s->top = -INFINITY;
    for (int64_t b = 0; b < j->num_blocks; b++) {
        v16 highest = v16_set1(-INFINITY);
        for (float *z = s->z + b * LS_VOCAB_BLOCK; z < s->z + (b + 1) * LS_VOCAB_BLOCK; z += 16) {
            v16 part = v16_load(z);
            if (temperature != 1.0f) part = v16_div(part, t);
            part = v16_add(part, v16_zero());
            v16_store(z, part);
            highest = v16_max(highest, part);
        }
        s->block_max[b] = v16_highest(highest);
        s->top = s->block_max[b] > s->top ? s->block_max[b] : s->top;
    }
}

/* e = exp(z - top). False where some logit is NaN or infinite upwards, or all are -inf: then an e is not in [0, 1]. */
static int fill_exponentials(const truncated_job *j, draw_space *s) {
    v16 m = v16_set1(s->top), highest = v16_zero();
    for (int64_t k = 0; k < j->num_blocks * LS_VOCAB_BLOCK; k += 16) {
        v16 e = v16_exp(v16_sub(v16_load(s->z + k), m));
        v16_store(s->e + k, e);
        highest = v16_max(highest, e);
    }
    return s->top > -INFINITY && v16_highest(highest) == 1.0f;
}

/* Every id above -inf. */
static prefix keep_all(const truncated_job *j, const draw_space *s) {
    prefix all = {.z = -INFINITY, .last = -1};
    for (int64_t begin = 0; begin < j->num_blocks * LS_VOCAB_BLOCK; begin += LS_VOCAB_BLOCK) {
        int count = 0;
        for (int k = 0; k < LS_VOCAB_BLOCK; k++) count += s->z[begin + k] > -INFINITY;
        for (int k = 0; k < LS_VOCAB_BLOCK; k++) all.mass += mass_of(s->e[begin + k]);
        all.count += count;
    }
    return all;
}

/* Logits below `lowest` leave: z = -inf, e = 0. */
static void drop_below(const truncated_job *j, float lowest, draw_space *s) {
    for (int64_t k = 0; k < j->num_blocks * LS_VOCAB_BLOCK; k++) {
        s->e[k] = s->z[k] >= lowest ? s->e[k] : 0.0f;
        s->z[k] = s->z[k] >= lowest ? s->z[k] : -INFINITY;
    }
}

static void fill_bins(const truncated_job *j, draw_space *s) {
    memset(s->bins, 0, LS_NUM_BINS * sizeof(bin));
    float reach = (float)LS_NUM_BINS / LS_BINS_PER_UNIT;
    for (int64_t b = 0; b < j->num_blocks; b++) {
        if (!(s->top - s->block_max[b] < reach)) continue;
        for (int64_t k = b * LS_VOCAB_BLOCK; k < (b + 1) * LS_VOCAB_BLOCK; k++) {
            float distance = s->top - s->z[k];
            if (!(distance < reach)) continue;
            bin *one = &s->bins[(int)(distance * LS_BINS_PER_UNIT)];
            one->count++;
            one->mass += mass_of(s->e[k]);
        }
    }
}

/* Sorts order[n], whose low halves ascend, by the high halves: digits of 11 bits from the lowest, or insertion. Returns
 * which of the two buffers holds the result. */
static uint64_t *sort_ranks(uint64_t *order, uint64_t *other, int64_t n) {
    if (n <= LS_INSERTION_LIMIT) {
        for (int64_t k = 1; k < n; k++) {
            uint64_t one = order[k];
            int64_t place = k;
            for (; place > 0 && order[place - 1] > one; place--) order[place] = order[place - 1];
            order[place] = one;
        }
        return order;
    }
    for (int shift = 32; shift < 64; shift += 11) {
        int64_t starts[2049] = {0};
        for (int64_t k = 0; k < n; k++) starts[((order[k] >> shift) & 2047) + 1]++;
        for (int digit = 0; digit < 2048; digit++) starts[digit + 1] += starts[digit];
        for (int64_t k = 0; k < n; k++) other[starts[(order[k] >> shift) & 2047]++] = order[k];
        uint64_t *swap = order;
        order = other, other = swap;
    }
    return order;
}

/* Whether a logit is in the bin whose distances from the top begin at low and end before high; the last has no end. */
static inline int is_in_bin(float z, float top, float low, float high) {
    float distance = top - z;
    return (distance >= low) & ((distance < high) | ((high == INFINITY) & (z > -INFINITY)));
}

/* The ids of one bin (LS_NUM_BINS: those beyond the last), in order. Sixteen at a time are looked at without a branch:
 * most hold none. */
static uint64_t *sorted_bin(const truncated_job *j, int64_t number, draw_space *s, int64_t *count) {
    float top = s->top, low = (float)number / LS_BINS_PER_UNIT, high = (float)(number + 1) / LS_BINS_PER_UNIT;
    if (number == LS_NUM_BINS) high = INFINITY;
    *count = 0;
    for (int64_t begin = 0; begin < j->num_blocks * LS_VOCAB_BLOCK; begin += 16) {
        const float *z = s->z + begin;
        int any = 0;
        for (int k = 0; k < 16; k++) any |= is_in_bin(z[k], top, low, high);
        if (!any) continue;
        for (int k = 0; k < 16; k++)
            if (is_in_bin(z[k], top, low, high)) s->order[(*count)++] = rank_of(z[k], begin + k);
    }
    return sort_ranks(s->order, s->other_order, *count);
}

/* The shortest prefix with `max_count` ids or a mass of at least `min_mass`; bins are filled. */
static prefix cut(const truncated_job *j, int64_t max_count, uint64_t min_mass, draw_space *s) {
    prefix p = {.z = -INFINITY, .last = -1};
    int64_t number = 0, n;
    for (; number < LS_NUM_BINS; number++) {
        const bin *one = &s->bins[number];
        if (p.count + one->count >= max_count || p.mass + one->mass >= min_mass) break;
        p.count += one->count, p.mass += one->mass;
    }
    const uint64_t *order = sorted_bin(j, number, s, &n);
    for (int64_t k = 0; k < n && p.count < max_count && p.mass < min_mass; k++) {
        p.last = (int64_t)(order[k] & 0xffffffffu);
        p.z = s->z[p.last];
        p.count++, p.mass += mass_of(s->e[p.last]);
    }
    return p;
}

/* ceil(p * mass) by float64, from 1 to mass. */
static uint64_t share_of(uint64_t mass, double p) {
    double exact = p * (double)mass;
    uint64_t share = (uint64_t)exact;
    if ((double)share < exact) share++;
    return share < 1 ? 1 : share < mass ? share : mass;
}

/* min-p, then top-k, then top-p over what is left. Greedy takes the highest, which they all keep, so they are off. */
static prefix truncate_row(const truncated_job *j, int64_t i, draw_space *s, uint64_t *whole_mass) {
    prefix kept = keep_all(j, s);
    *whole_mass = kept.mass;
    if (j->is_greedy[i]) return kept;
    float p = (float)j->min_p[i];
    int64_t top_k = (int64_t)j->top_k[i];
    if (p > 0.0f) {
        drop_below(j, s->top + (float)log1((double)p), s);
        kept = keep_all(j, s);
    }
    int cuts_k = top_k > 0 && top_k < kept.count, cuts_p = j->top_p[i] < 1.0;
    if (cuts_k || cuts_p) fill_bins(j, s);
    if (cuts_k) kept = cut(j, top_k, UINT64_MAX, s);
    if (cuts_p) kept = cut(j, kept.count, share_of(kept.mass, j->top_p[i]), s);
    return kept;
}

static int64_t greedy_id(const truncated_job *j, const draw_space *s) {
    int64_t b = 0, k;
    while (b + 1 < j->num_blocks && s->block_max[b] != s->top) b++;
    for (k = b * LS_VOCAB_BLOCK; k + 1 < j->V && s->z[k] != s->top; k++) {}
    return k;
}

/* The first id, ascending, at which the running mass of kept ids passes floor(u * mass). */
static int64_t drawn_id(const truncated_job *j, int64_t i, const prefix *p, const draw_space *s) {
    uint64_t bits = philox_bits((uint64_t)j->seed[i], (uint32_t)j->position[i], (uint32_t)j->index[i]), running = 0;
    uint64_t target = (uint64_t)((unsigned __int128)bits * p->mass >> 53);
    for (int64_t b = 0; b < j->num_blocks; b++) {
        uint64_t mass[LS_VOCAB_BLOCK], sum = 0;
        float z[LS_VOCAB_BLOCK];
        if (s->block_max[b] < p->z) continue;
        keep_block(p, s->z, b, z);
        for (int k = 0; k < LS_VOCAB_BLOCK; k++) {
            mass[k] = mass_of(z[k] > -INFINITY ? s->e[b * LS_VOCAB_BLOCK + k] : 0.0f);
            sum += mass[k];
        }
        if (running + sum <= target) {
            running += sum;
            continue;
        }
        for (int64_t k = 0;; k++) {
            running += mass[k];
            if (running > target) return b * LS_VOCAB_BLOCK + k;
        }
    }
    return 0; /* not reached: the target is less than the mass */
}

/* The draw of a row that nothing changes, from the sums that kept_total has left: the one of logprobs.c. */
static int64_t plain_id(const truncated_job *j, int64_t i, const draw_space *s, double total) {
    double running;
    double u = (double)philox_bits((uint64_t)j->seed[i], (uint32_t)j->position[i], (uint32_t)j->index[i]) * 0x1p-53;
    int64_t b = block_at(s->kept_max, s->block_sum, j->num_blocks, s->top, u * total, &running);
    int64_t begin = b * LS_VOCAB_BLOCK, width = j->V - begin < LS_VOCAB_BLOCK ? j->V - begin : LS_VOCAB_BLOCK;
    return begin + id_in_block(s->z + begin, width, s->kept_max[b], s->top, running, u * total);
}

static int64_t choose_id(const truncated_job *j, int64_t i, const prefix *p, const draw_space *s, double total) {
    if (j->is_greedy[i]) return greedy_id(j, s);
    return j->is_plain[i] != 0.0 ? plain_id(j, i, s, total) : drawn_id(j, i, p, s);
}

/* The first num_top kept ids in order; -1 where fewer are kept. */
static void list_top(const truncated_job *j, int64_t i, const prefix *p, const draw_space *s, float log_total) {
    int64_t *ids = j->top_ids + i * j->num_top, found = 0;
    float *logprobs = j->top_logprobs + i * j->num_top;
    uint64_t *best = s->order;
    for (int64_t b = 0; b < j->num_blocks; b++) {
        if (s->block_max[b] < p->z) continue;
        if (found == j->num_top && rank_of(s->block_max[b], 0) > best[found - 1]) continue;
        float z[LS_VOCAB_BLOCK];
        keep_block(p, s->z, b, z);
        for (int64_t k = 0; k < LS_VOCAB_BLOCK; k++) {
            if (!(z[k] > -INFINITY)) continue;
            uint64_t rank = rank_of(z[k], b * LS_VOCAB_BLOCK + k);
            if (found == j->num_top && rank > best[found - 1]) continue;
            int64_t place = found < j->num_top ? found++ : found - 1;
            for (; place > 0 && best[place - 1] > rank; place--) best[place] = best[place - 1];
            best[place] = rank;
        }
    }
    for (int64_t k = 0; k < j->num_top; k++) {
        ids[k] = k < found ? (int64_t)(best[k] & 0xffffffffu) : -1;
        logprobs[k] = k < found ? (s->z[ids[k]] - s->top) - log_total : -INFINITY;
    }
}

/* A row without a distribution: id 0, and NaN where numbers would be. */
static void give_up(const truncated_job *j, int64_t i) {
    j->tokens[i] = 0, j->num_kept[i] = 0, j->logprobs[i] = j->kept_mass[i] = NAN;
    for (int64_t k = i * j->num_top; k < (i + 1) * j->num_top; k++) j->top_ids[k] = -1, j->top_logprobs[k] = -INFINITY;
}

static void draw_one(const truncated_job *j, int64_t i, draw_space *s) {
    const float *x = j->logits + j->row[i] * j->V;
    float raw_top, temperature = (float)j->temperature[i];
    double total = raw_total(j, x, s, &raw_top);
    change_logits(j, i, x, s, 1);
    scale_logits(j, temperature, s);
    if (s->top == -INFINITY) {
        change_logits(j, i, x, s, 0);
        scale_logits(j, temperature, s);
    }
    if (fill_exponentials(j, s)) {
        uint64_t whole_mass;
        prefix kept = truncate_row(j, i, s, &whole_mass);
        double mass = kept_total(j, &kept, s);
        float log_total = (float)log1(mass);
        int64_t token = j->tokens[i] = choose_id(j, i, &kept, s, mass);
        j->logprobs[i] = (s->z[token] - s->top) - log_total;
        j->kept_mass[i] = (float)((double)kept.mass / (double)whole_mass);
        j->num_kept[i] = kept.count;
        if (j->num_top) list_top(j, i, &kept, s, log_total);
    } else {
        give_up(j, i);
    }
    j->raw_logprobs[i] = total < INFINITY ? (x[j->tokens[i]] - raw_top) - (float)log1(total) : NAN;
}

/* A tile is a place to work at, not a draw: it takes draws until none is left. */
static void truncated_tile(void *argument, int64_t place) {
    truncated_job *j = argument;
    draw_space s = lay_out(j->scratch + place * j->scratch_bytes, j->V, j->num_blocks);
    for (int64_t i; (i = atomic_fetch_add(&j->next_draw, 1)) < j->num_draws;) draw_one(j, i, &s);
}

/* Draws of n samples from rows of logits[., V]. draws: [5][n] row, seed, position, index, greedy. numbers: [8][n]
 * temperature, repetition, presence and frequency penalty, min_p, top_k (0: all), top_p, plain. Lists of ids by draw,
 * offsets [n + 1]: seen ones with their counts in the output, biased ones with the bias, masked ones, allowed ones (none: all).
 * Results [n], and the num_top likeliest kept ids [n][num_top]. Returns 0, or -1 without memory. */
int ls_truncated_sample(const float *logits, const int64_t *draws, const double *numbers, const int64_t *seen_offsets,
                        const int32_t *seen_ids, const int32_t *counts, const int64_t *biased_offsets,
                        const int32_t *biased_ids, const float *bias, const int64_t *masked_offsets,
                        const int32_t *masked_ids, const int64_t *allowed_offsets, const int32_t *allowed_ids,
                        int64_t *tokens, float *logprobs, float *raw_logprobs, float *kept_mass, int64_t *num_kept,
                        int64_t *top_ids, float *top_logprobs, int64_t n, int64_t V, int64_t num_top) {
    int64_t num_blocks = (V + LS_VOCAB_BLOCK - 1) / LS_VOCAB_BLOCK, threads = ls_get_num_threads();
    int64_t places = n < threads ? n : threads, bytes = (draw_space_bytes(V, num_blocks) + 63) / 64 * 64;
    if (n <= 0) return 0;
    char *scratch = malloc((size_t)(places * bytes));
    if (!scratch) return -1;
    truncated_job job = {logits, draws, draws + n, draws + 2 * n, draws + 3 * n, draws + 4 * n,
                         numbers, numbers + n, numbers + 2 * n, numbers + 3 * n, numbers + 4 * n, numbers + 5 * n,
                         numbers + 6 * n, numbers + 7 * n, {seen_offsets, seen_ids}, {biased_offsets, biased_ids},
                         {masked_offsets, masked_ids}, {allowed_offsets, allowed_ids}, counts, bias, tokens, num_kept,
                         top_ids, logprobs, raw_logprobs, kept_mass, top_logprobs, n, V, num_blocks, num_top, scratch,
                         bytes, 0};
    ls_parallel(truncated_tile, &job, places);
    free(scratch);
    return 0;
}

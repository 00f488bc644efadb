/* A position-sensitive digest of float32 data at memory speed, which also finds NaN and infinity. */
#include <string.h>
#include <stdint.h>

#include "pool.h"

#define LS_DIGEST_PIECE (1 << 18) /* floats hashed by themselves; fixed, so that threads cannot show in the result */
#define LS_DIGEST_LANES 8
#define LS_DIGEST_PRIME 0x9E3779B97F4A7C15ull

typedef struct {
    const uint32_t *data;
    uint64_t *digests;
    uint8_t *has_nonfinite;
    int64_t n;
} digest_job;

static void digest_tile(void *argument, int64_t piece) {
    const digest_job *j = argument;
    int64_t begin = piece * LS_DIGEST_PIECE, end = begin + LS_DIGEST_PIECE < j->n ? begin + LS_DIGEST_PIECE : j->n;
    const uint32_t *data = j->data;
    uint64_t lanes[LS_DIGEST_LANES];
    uint32_t bad = 0;
    for (int l = 0; l < LS_DIGEST_LANES; l++) lanes[l] = (uint64_t)(l + 1) * LS_DIGEST_PRIME;
    int64_t i = begin;
    for (; i + LS_DIGEST_LANES <= end; i += LS_DIGEST_LANES)
        for (int l = 0; l < LS_DIGEST_LANES; l++) {
            uint32_t word = data[i + l];
            bad |= (word & 0x7f800000u) == 0x7f800000u;
            uint64_t h = (lanes[l] ^ word) * LS_DIGEST_PRIME;
            lanes[l] = h ^ (h >> 32);
        }
    for (int l = 0; i < end; i++, l++) {
        bad |= (data[i] & 0x7f800000u) == 0x7f800000u;
        uint64_t h = (lanes[l] ^ data[i]) * LS_DIGEST_PRIME;
        lanes[l] = h ^ (h >> 32);
    }
    memcpy(j->digests + piece * LS_DIGEST_LANES, lanes, sizeof lanes);
    j->has_nonfinite[piece] = (uint8_t)bad;
}

int64_t ls_digest_pieces(int64_t n) { return (n + LS_DIGEST_PIECE - 1) / LS_DIGEST_PIECE; }

/* digests[pieces][8] and has_nonfinite[pieces] of n floats. */
void ls_digest(const void *data, uint64_t *digests, uint8_t *has_nonfinite, int64_t n) {
    digest_job job = {data, digests, has_nonfinite, n};
    ls_parallel(digest_tile, &job, ls_digest_pieces(n));
}

/* A position-sensitive digest of float32 data at memory speed, which also finds NaN and infinity. */
#include <string.h>
#include <stdint.h>

#include "digest_lanes.h"
#include "pool.h"
#include "stream.h"

#define LS_DIGEST_PIECE (1 << 18) /* floats hashed by themselves; fixed, so that threads cannot show in the result */
#define LS_DIGEST_STREAMS 2       /* pieces hashed side by side: a hash waits for its own multiplication otherwise */
#define LS_DIGEST_BLOCK 2048      /* floats of each that are hashed and then copied while they are in the first cache */

typedef struct {
    const uint32_t *data;
    uint32_t *copy; /* null: none is wanted */
    uint64_t *digests;
    uint8_t *has_nonfinite;
    int64_t n;
} digest_job;

static void mix_block(digest_state *state, const uint32_t *data, int64_t n) {
    int64_t i = 0;
    digest_registers r = digest_load(state);
    for (; i + LS_DIGEST_LANES <= n; i += LS_DIGEST_LANES) digest_mix(&r, data + i);
    digest_store(state, &r);
    for (int l = 0; i < n; i++, l++) mix_word(state, l, data[i]);
}

/* A block of each of the pieces that are hashed side by side. */
static void mix_blocks(digest_state *states, const uint32_t *data) {
    digest_registers r[LS_DIGEST_STREAMS];
    for (int s = 0; s < LS_DIGEST_STREAMS; s++) r[s] = digest_load(&states[s]);
    for (int64_t i = 0; i < LS_DIGEST_BLOCK; i += LS_DIGEST_LANES)
        for (int s = 0; s < LS_DIGEST_STREAMS; s++) digest_mix(&r[s], data + s * LS_DIGEST_PIECE + i);
    for (int s = 0; s < LS_DIGEST_STREAMS; s++) digest_store(&states[s], &r[s]);
}

static void copy_block(const digest_job *j, int64_t begin, int64_t n) {
    if (j->copy) stream_words(j->copy + begin, j->data + begin, n);
}

static digest_state begin_piece(void) {
    digest_state state = {{0}, {0}};
    for (int l = 0; l < LS_DIGEST_LANES; l++) state.lanes[l] = (uint64_t)(l + 1) * LS_DIGEST_PRIME;
    return state;
}

static void end_piece(const digest_job *j, int64_t piece, const digest_state *state) {
    uint32_t bad = 0;
    for (int l = 0; l < LS_DIGEST_LANES; l++) bad |= state->bad[l];
    memcpy(j->digests + piece * LS_DIGEST_LANES, &state->lanes, sizeof state->lanes);
    j->has_nonfinite[piece] = bad != 0;
}

static void digest_piece(const digest_job *j, int64_t piece) {
    int64_t begin = piece * LS_DIGEST_PIECE, end = begin + LS_DIGEST_PIECE < j->n ? begin + LS_DIGEST_PIECE : j->n;
    digest_state state = begin_piece();
    for (int64_t i = begin; i < end; i += LS_DIGEST_BLOCK) {
        int64_t n = i + LS_DIGEST_BLOCK < end ? LS_DIGEST_BLOCK : end - i;
        mix_block(&state, j->data + i, n);
        copy_block(j, i, n);
    }
    end_piece(j, piece, &state);
}

static void digest_full_pieces(const digest_job *j, int64_t first) {
    digest_state states[LS_DIGEST_STREAMS];
    for (int s = 0; s < LS_DIGEST_STREAMS; s++) states[s] = begin_piece();
    for (int64_t i = first * LS_DIGEST_PIECE; i < (first + 1) * LS_DIGEST_PIECE; i += LS_DIGEST_BLOCK) {
        mix_blocks(states, j->data + i);
        for (int s = 0; s < LS_DIGEST_STREAMS; s++) copy_block(j, s * LS_DIGEST_PIECE + i, LS_DIGEST_BLOCK);
    }
    for (int s = 0; s < LS_DIGEST_STREAMS; s++) end_piece(j, first + s, &states[s]);
}

static void digest_tile(void *argument, int64_t tile) {
    const digest_job *j = argument;
    int64_t first = tile * LS_DIGEST_STREAMS, end = first + LS_DIGEST_STREAMS;
    if (end * LS_DIGEST_PIECE <= j->n) digest_full_pieces(j, first);
    else
        for (int64_t piece = first; piece < end && piece * LS_DIGEST_PIECE < j->n; piece++) digest_piece(j, piece);
    stream_end();
}

int64_t ls_digest_pieces(int64_t n) { return (n + LS_DIGEST_PIECE - 1) / LS_DIGEST_PIECE; }

/* digests[pieces][8] and has_nonfinite[pieces] of n floats, which are copied to `copy` on the way unless it is null. */
void ls_digest(const void *data, void *copy, uint64_t *digests, uint8_t *has_nonfinite, int64_t n) {
    digest_job job = {data, copy, digests, has_nonfinite, n};
    ls_parallel(digest_tile, &job, (ls_digest_pieces(n) + LS_DIGEST_STREAMS - 1) / LS_DIGEST_STREAMS);
}

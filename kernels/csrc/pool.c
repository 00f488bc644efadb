/* Persistent workers and an atomic tile counter.
 *
 * An operation ends when its tiles are done, not when every worker has arrived: a worker that the operating system has
 * put aside takes no tile and delays nobody. `ticket` packs (generation << 32 | next tile) in one word; a tile is taken
 * by compare-and-swap, which fails if the generation moved on, so a late worker never touches a finished job. */
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LS_MAX_THREADS 256
#define LS_JOBS 4            /* slots reused in turn; only the newest is ever taken from */
#define LS_SPINS 4000        /* about 40 us of polling before a worker or the caller sleeps */

typedef struct {
    _Atomic(ls_tile_fn) fn;
    _Atomic(void *) job;
    _Atomic int64_t num_tiles;
    _Atomic int64_t num_done;
} job_slot;

static job_slot slots[LS_JOBS];
static _Atomic uint64_t ticket;
static _Atomic uint32_t wake_word; /* futex: changes with every job */
static _Atomic uint32_t done_word; /* futex: changes when a job's last tile is done */
static _Atomic int caller_sleeps;
static _Atomic int num_sleeping;
static _Atomic int num_threads = 1;
static _Atomic int num_workers;    /* threads that exist, beside the caller's */
static pthread_mutex_t one_job = PTHREAD_MUTEX_INITIALIZER;

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

/* Round to nearest, no flush-to-zero, no denormals-are-zero: results are IEEE in every thread, the caller's too (a host
 * program may have set them otherwise). Returns the mode found, for set_float_mode. */
static unsigned normal_floats(void) {
#if defined(__x86_64__)
    unsigned found = _mm_getcsr();
    if (found & 0xe040u) _mm_setcsr(found & ~0xe040u);
    return found;
#else
    return 0;
#endif
}

static void set_float_mode(unsigned mode) {
#if defined(__x86_64__)
    if (mode & 0xe040u) _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Takes and runs tiles of the newest job until none is left. Returns whether it ran any. */
static int run_tiles(void) {
    int ran = 0;
    for (;;) {
        uint64_t seen = atomic_load(&ticket);
        job_slot *slot = &slots[(seen >> 32) % LS_JOBS];
        ls_tile_fn fn = atomic_load(&slot->fn);
        void *job = atomic_load(&slot->job);
        int64_t tile = (int64_t)(seen & 0xffffffffu), num_tiles = atomic_load(&slot->num_tiles);
        if (tile >= num_tiles) return ran;
        if (!atomic_compare_exchange_weak(&ticket, &seen, seen + 1)) continue;
        fn(job, tile);
        ran = 1;
        if (atomic_fetch_add(&slot->num_done, 1) + 1 < num_tiles) continue;
        atomic_fetch_add(&done_word, 1);
        if (atomic_load(&caller_sleeps)) futex_wake_all(&done_word);
    }
}

static void *worker(void *argument) {
    int index = (int)(intptr_t)argument;
    normal_floats();
    for (;;) {
        uint32_t seen = atomic_load(&wake_word);
        int is_used = index < atomic_load(&num_threads);
        if (is_used && run_tiles()) continue;
        int spins = is_used ? LS_SPINS : 0;
        while (spins-- > 0 && atomic_load(&wake_word) == seen) pause_cpu();
        if (atomic_load(&wake_word) != seen) continue;
        atomic_fetch_add(&num_sleeping, 1);
        futex_wait(&wake_word, seen);
        atomic_fetch_sub(&num_sleeping, 1);
    }
    return NULL;
}

static void after_fork(void) { /* threads do not survive a fork: the child starts its own when it asks for them */
    atomic_store(&num_workers, 0);
    atomic_store(&num_threads, 1);
    atomic_store(&num_sleeping, 0);
    for (int i = 0; i < LS_JOBS; i++) atomic_store(&slots[i].num_tiles, 0); /* the parent's unfinished job is not ours */
    pthread_mutex_init(&one_job, NULL);
}

int ls_set_num_threads(int wanted) {
    if (wanted < 1 || wanted > LS_MAX_THREADS) return -1;
    static _Atomic int fork_handler;
    if (!atomic_exchange(&fork_handler, 1)) pthread_atfork(NULL, NULL, after_fork);
    pthread_mutex_lock(&one_job);
    while (atomic_load(&num_workers) < wanted - 1) {
        pthread_t thread;
        int index = atomic_load(&num_workers) + 1;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)index)) break;
        pthread_detach(thread);
        atomic_fetch_add(&num_workers, 1);
    }
    int got = atomic_load(&num_workers) + 1;
    atomic_store(&num_threads, wanted < got ? wanted : got);
    pthread_mutex_unlock(&one_job);
    return atomic_load(&num_threads);
}

int ls_get_num_threads(void) { return atomic_load(&num_threads); }

/* Waits for tiles that others hold. A worker that lost its core to another program gets the caller's, but only if the caller
 * sleeps: a core that spins is not idle, and the tile would wait for the worker's next turn on its own. */
static void wait_until_done(job_slot *slot, int64_t num_tiles) {
    for (int spins = 0; spins < LS_SPINS; spins++) {
        if (atomic_load(&slot->num_done) == num_tiles) return;
        pause_cpu();
    }
    atomic_store(&caller_sleeps, 1);
    for (;;) {
        uint32_t seen = atomic_load(&done_word);
        if (atomic_load(&slot->num_done) == num_tiles) break;
        futex_wait(&done_word, seen);
    }
    atomic_store(&caller_sleeps, 0);
}

static void share_out(ls_tile_fn fn, void *job, int64_t num_tiles) {
    pthread_mutex_lock(&one_job);
    uint64_t generation = (atomic_load(&ticket) >> 32) + 1;
    job_slot *slot = &slots[generation % LS_JOBS];
    atomic_store(&slot->fn, fn);
    atomic_store(&slot->job, job);
    atomic_store(&slot->num_tiles, num_tiles);
    atomic_store(&slot->num_done, 0);
    atomic_store(&ticket, generation << 32);
    atomic_fetch_add(&wake_word, 1);
    if (atomic_load(&num_sleeping) > 0) futex_wake_all(&wake_word);
    run_tiles();
    wait_until_done(slot, num_tiles);
    pthread_mutex_unlock(&one_job);
}

void ls_parallel(ls_tile_fn fn, void *job, int64_t num_tiles) {
    if (num_tiles <= 0) return;
    unsigned mode = normal_floats();
    if (num_tiles > 1 && atomic_load(&num_threads) > 1) share_out(fn, job, num_tiles);
    else
        for (int64_t tile = 0; tile < num_tiles; tile++) fn(job, tile);
    set_float_mode(mode);
}

/* A pool of persistent worker threads that share out the tiles of one operation at a time. */
#pragma once
#include <stdint.h>

typedef void (*ls_tile_fn)(void *job, int64_t tile);

/* Runs fn(job, tile) for every tile in [0, num_tiles) and returns when the last tile is done. The caller works too. */
void ls_parallel(ls_tile_fn fn, void *job, int64_t num_tiles);
int ls_set_num_threads(int num_threads);
int ls_get_num_threads(void);

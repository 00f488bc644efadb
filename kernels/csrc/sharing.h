/* How the products of some rows with all panels of a weight are shared out among threads, and which panel each of them
 * asks memory for while it works on another. Speed alone: no bit depends on it. */
#pragma once
#include "panel.h"

#define LS_CHUNK_TILES 16
#define LS_CHUNK_BYTES (256 << 10)
#define LS_PIECES 4 /* into which each of the last tasks is cut */

/* How the products of M rows with the panels of a weight are shared out. Rows are dealt in chunks that stay in the second
 * cache while all panels pass; a task is a chunk and a panel, but the last few of them are cut into pieces of some rows,
 * so that all threads end together. */
typedef struct {
    int64_t M, num_row_tiles, num_chunks, num_panels, num_whole, num_pieces, num_tasks, num_threads;
} ls_sharing;

typedef struct { /* rows [begin, end) with one panel */
    int64_t panel, begin, end;
} ls_task;

static inline int64_t ls_least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline ls_sharing ls_share_out(const ls_weight *w, int64_t M, int64_t N, int64_t num_threads) {
    int64_t fitting = LS_CHUNK_BYTES / (LS_TILE_ROWS * w->K * 4), most = fitting < 4 ? 4 : ls_least(fitting, LS_CHUNK_TILES);
    ls_sharing s = {.M = M, .num_row_tiles = (M + LS_TILE_ROWS - 1) / LS_TILE_ROWS, .num_threads = num_threads};
    s.num_chunks = (s.num_row_tiles + most - 1) / most;
    s.num_panels = (N + LS_PANEL - 1) / LS_PANEL;
    s.num_pieces = ls_least(LS_PIECES, s.num_row_tiles / s.num_chunks);
    int64_t num_cut = num_threads > 1 ? ls_least(num_threads, s.num_panels) : 0;
    s.num_whole = s.num_chunks * s.num_panels - num_cut;
    s.num_tasks = s.num_whole + num_cut * s.num_pieces;
    return s;
}

static inline ls_task ls_task_at(const ls_sharing *s, int64_t index) {
    int64_t cut = index - s->num_whole, whole = cut < 0 ? index : s->num_whole + cut / s->num_pieces;
    int64_t chunk = whole / s->num_panels;
    int64_t first = s->num_row_tiles * chunk / s->num_chunks, last = s->num_row_tiles * (chunk + 1) / s->num_chunks;
    ls_task task = {whole % s->num_panels, first, last};
    if (cut >= 0) {
        int64_t piece = cut % s->num_pieces;
        task.begin = first + (last - first) * piece / s->num_pieces;
        task.end = first + (last - first) * (piece + 1) / s->num_pieces;
    }
    task.begin *= LS_TILE_ROWS, task.end = ls_least(task.end * LS_TILE_ROWS, s->M);
    return task;
}

/* Where the panel lies that a thread will probably take after task `index`, or null: one of this weight if it is another
 * than `panel`, or one of the weight `next` (or null) that is multiplied after this one. */
static inline const char *ls_next_panel(const ls_sharing *s, const ls_weight *w, const ls_weight *next, int64_t index,
                                        int64_t panel) {
    int64_t upcoming = index + s->num_threads;
    if (upcoming >= s->num_tasks) return next && next->data ? ls_panel(next, upcoming - s->num_tasks) : NULL;
    ls_task task = ls_task_at(s, upcoming);
    return task.panel == panel ? NULL : ls_panel(w, task.panel);
}

/* The part of the panel at `next` (null: none) to ask for in pass `pass` of the num_passes that a task's rows make over
 * another panel: all of it in all of them. */
static inline ls_ahead ls_part_ahead(const ls_weight *w, const char *next, int64_t pass, int64_t num_passes) {
    int64_t steps = w->arithmetic == LS_FLOAT32 ? w->K : w->K / 2; /* of four lines each */
    int64_t lines = num_passes < 4 ? (4 + num_passes - 1) / num_passes : 1;
    if (!next || pass * lines >= 4) return (ls_ahead){NULL, 0};
    return (ls_ahead){next + pass * lines * steps * LS_LINE, (int)lines};
}

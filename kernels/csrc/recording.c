/* Runs a recorded list of operations: one call from Python in place of hundreds. */
#include "ops.h"
#include <string.h>

typedef struct {
    int64_t op; /* index in RECORDABLE of kernels/recording.py */
    int64_t arguments[20]; /* pointers, integers, and float32 in the low half */
} ls_call;

enum { LINEAR = 2 };

static float as_float(int64_t argument) {
    float value;
    memcpy(&value, &argument, sizeof value);
    return value;
}

#define P(i) ((void *)(intptr_t)a[i])
#define I(i) a[i]
#define F(i) as_float(a[i])

/* The weight and its K of the first linear layer in calls[0..num_calls), so that memory is asked for it in time. */
static const int64_t *next_linear(const ls_call *calls, int64_t num_calls) {
    static const int64_t none[20];
    for (int64_t i = 0; i < num_calls; i++)
        if (calls[i].op == LINEAR) return calls[i].arguments;
    return none;
}

static void run_linear(const int64_t *a, const int64_t *next) {
    ls_linear_then(P(0), I(1), P(2), I(3), P(4), I(5), P(6), I(7), I(8), I(9), I(10), (void *)(intptr_t)next[2], next[10]);
}

static int run_call(const ls_call *call, int64_t num_after) {
    const int64_t *a = call->arguments;
    switch (call->op) {
        case 0: ls_embedding(P(0), I(1), P(2), P(3), I(4), I(5)); return 0;
        case 1: ls_round_rows(P(0), I(1), P(2), I(3), I(4), I(5)); return 0;
        case LINEAR: run_linear(a, next_linear(call + 1, num_after)); return 0;
        case 3: ls_rms_norm(P(0), I(1), P(2), P(3), P(4), P(5), I(6), P(7), I(8), I(9), I(10), F(11)); return 0;
        case 4: ls_rotary(P(0), I(1), P(2), P(3), P(4), I(5), I(6), I(7), F(8)); return 0;
        case 5: ls_silu_and_mul(P(0), P(1), I(2), I(3)); return 0;
        case 6: ls_kv_store(P(0), I(1), P(2), I(3), P(4), P(5), I(6), P(7), P(8), I(9), I(10), I(11), I(12)); return 0;
        case 7:
            return ls_attention(P(0), I(1), P(2), P(3), I(4), P(5), P(6), P(7), P(8), P(9), P(10), I(11), I(12), I(13),
                                I(14), I(15), I(16), I(17), F(18));
        default: return -1;
    }
}

/* Runs the calls in order. Returns how many succeeded: fewer than num_calls where one had no memory. */
int64_t ls_replay(const ls_call *calls, int64_t num_calls) {
    for (int64_t i = 0; i < num_calls; i++)
        if (run_call(&calls[i], num_calls - i - 1)) return i;
    return num_calls;
}

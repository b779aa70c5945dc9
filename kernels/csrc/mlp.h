/* The gated MLP inside a team, for sp_mlp and for sp_decode. */
#ifndef SPARSIFY_MLP_H
#define SPARSIFY_MLP_H

#include "linear.h"

typedef struct {
    int dtype, activation;
    float cut;
    const sp_linear *gate, *up, *down;
} sp_gated;

/* What a team shares for it: F is gate.outputs. */
typedef struct {
    float *gate, *up;           /* [T, F]; act(gate) * up ends in gate */
    float *gate_low, *up_low;   /* [T, R] */
    float *down_low;
    float *out; /* [T, D] */
} sp_gated_room;

size_t sp_gated_size(const sp_gated *mlp, int64_t tokens);
sp_gated_room sp_gated_room_in(char **memory, const sp_gated *mlp, int64_t tokens);
/* Elements of the sums that each thread needs, [T, outputs] for what is summed at once. */
int64_t sp_gated_partial(const sp_gated *mlp, int64_t tokens);
/* Longest input and largest rank, for sp_work. */
int64_t sp_gated_inputs(const sp_gated *mlp, int64_t inputs);
int64_t sp_gated_rank(const sp_gated *mlp);

/* out [T, D] = down(act(gate x) * up x) for this thread's columns [begin, end) of out, rounded to dtype. Barriers are
 * inside; one must follow before another thread's columns are read. */
void sp_gated_part(const sp_gated *mlp, const sp_gated_room *room, const sp_work *work, const sp_member *member,
                   const float *x, int64_t inputs, int64_t tokens, int run_dense, float *partial, int64_t *begin,
                   int64_t *end);

#endif

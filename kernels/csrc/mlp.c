/* The gated MLP in one call: gate and up by neurons, their product, its channels, down. */
#include "mlp.h"

size_t sp_gated_size(const sp_gated *mlp, int64_t tokens) {
    return 2 * sp_room(mlp->gate->outputs * tokens, 4) + sp_room(mlp->gate->rank * tokens, 4) +
           sp_room(mlp->up->rank * tokens, 4) + sp_room(mlp->down->rank * tokens, 4) +
           sp_room(mlp->down->outputs * tokens, 4);
}

sp_gated_room sp_gated_room_in(char **memory, const sp_gated *mlp, int64_t tokens) {
    sp_gated_room room;
    room.gate = sp_carve(memory, mlp->gate->outputs * tokens, 4);
    room.up = sp_carve(memory, mlp->gate->outputs * tokens, 4);
    room.gate_low = sp_carve(memory, mlp->gate->rank * tokens, 4);
    room.up_low = sp_carve(memory, mlp->up->rank * tokens, 4);
    room.down_low = sp_carve(memory, mlp->down->rank * tokens, 4);
    room.out = sp_carve(memory, mlp->down->outputs * tokens, 4);
    return room;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t sp_gated_inputs(const sp_gated *mlp, int64_t inputs) { return larger(inputs, mlp->gate->outputs); }

int64_t sp_gated_rank(const sp_gated *mlp) {
    return larger(mlp->gate->rank, larger(mlp->up->rank, mlp->down->rank));
}

int64_t sp_gated_partial(const sp_gated *mlp, int64_t tokens) {
    return tokens * larger(2 * mlp->gate->outputs, mlp->down->outputs);
}

/* up for the neurons whose gate is not 0, one token; the others' product is 0 whatever up is. */
static void up_of_active(const sp_gated *mlp, const sp_gated_room *room, const sp_work *work, const float *x,
                         int64_t inputs, int run_dense, int64_t begin, int64_t end) {
    const sp_kernels *table = sp_table();
    const sp_linear *up = mlp->up;
    int64_t active = 0;
    if (sp_is_sparse(up, run_dense)) {
        sp_mask(work, x, inputs, 1, up, 1);
        x = work->masked;
    }
    for (int64_t o = begin; o < end; o++) {
        work->index[active] = (int32_t)o;
        active += room->gate[o] != 0.0f;
    }
    for (int64_t k = 0; k < active; k++) work->coef[k] = 0.0f;
    table->dot[mlp->dtype](work->coef, active, up->weight, up->stride, work->index, active, x, inputs, 1, inputs);
    for (int64_t o = begin; o < end; o++) room->up[o] = 0.0f;
    for (int64_t k = 0; k < active; k++) {
        int32_t o = work->index[k];
        float bias = 0.0f;
        if (up->bias) table->widen[mlp->dtype](&bias, sp_at(up->bias, o, mlp->dtype), 1);
        room->up[o] = work->coef[k] + bias;
    }
}

/* gate x, its activation, up x and their product for this thread's neurons. */
static void neurons(const sp_gated *mlp, const sp_gated_room *room, const sp_work *work, const sp_member *member,
                    const float *x, int64_t inputs, int64_t tokens, int run_dense, float *partial) {
    const sp_kernels *table = sp_table();
    int dtype = mlp->dtype;
    int64_t size = mlp->gate->outputs, begin, end;
    float *up_partial = partial + tokens * size;
    int rows_of_active = !run_dense && mlp->activation == SP_RELU && mlp->up->by_rows && tokens == 1 &&
                         !sp_has_low_rank(mlp->up, run_dense);
    sp_partial(work, member, dtype, x, inputs, tokens, mlp->gate, run_dense, room->gate_low, partial, room->gate);
    if (!rows_of_active)
        sp_partial(work, member, dtype, x, inputs, tokens, mlp->up, run_dense, room->up_low, up_partial, room->up);
    sp_barrier(member);
    sp_finish(member, dtype, mlp->gate, tokens, partial, room->gate, &begin, &end);
    if (!rows_of_active) sp_finish(member, dtype, mlp->up, tokens, up_partial, room->up, &begin, &end);
    if (begin >= end) return;
    int64_t n = end - begin;
    for (int64_t t = 0; t < tokens; t++) {
        float *gate = room->gate + t * size + begin;
        table->round[dtype](gate, n);
        table->activate(gate, n, mlp->activation, mlp->cut);
        table->round[dtype](gate, n);
    }
    if (rows_of_active) up_of_active(mlp, room, work, x, inputs, run_dense, begin, end);
    for (int64_t t = 0; t < tokens; t++) {
        float *gate = room->gate + t * size + begin, *up = room->up + t * size + begin;
        table->round[dtype](up, n);
        table->multiply(gate, up, n);
        table->round[dtype](gate, n);
    }
}

void sp_gated_part(const sp_gated *mlp, const sp_gated_room *room, const sp_work *work, const sp_member *member,
                   const float *x, int64_t inputs, int64_t tokens, int run_dense, float *partial, int64_t *begin,
                   int64_t *end) {
    const sp_linear *gate = mlp->gate, *up = mlp->up, *down = mlp->down;
    int dtype = mlp->dtype, low_gate = sp_has_low_rank(gate, run_dense), low_up = sp_has_low_rank(up, run_dense);
    if (low_gate) sp_low_rank(work, member, dtype, x, inputs, tokens, gate, room->gate_low);
    if (low_up) sp_low_rank(work, member, dtype, x, inputs, tokens, up, room->up_low);
    if (low_gate || low_up) sp_barrier(member);
    if (member->thread == 0) {
        sp_count(gate, x, inputs, tokens, run_dense);
        sp_count(up, x, inputs, tokens, run_dense);
    }
    neurons(mlp, room, work, member, x, inputs, tokens, run_dense, partial);
    sp_barrier(member);
    if (sp_has_low_rank(down, run_dense)) {
        sp_low_rank(work, member, dtype, room->gate, gate->outputs, tokens, down, room->down_low);
        sp_barrier(member);
    }
    if (member->thread == 0) sp_count(down, room->gate, gate->outputs, tokens, run_dense);
    sp_partial(work, member, dtype, room->gate, gate->outputs, tokens, down, run_dense, room->down_low, partial, room->out);
    sp_barrier(member);
    sp_finish(member, dtype, down, tokens, partial, room->out, begin, end);
    for (int64_t t = 0; t < tokens; t++)
        if (*begin < *end) sp_table()->round[dtype](room->out + t * down->outputs + *begin, *end - *begin);
}

typedef struct {
    sp_gated mlp;
    const void *x;
    void *y;
    int64_t inputs, tokens;
} mlp_call;

static void mlp_part(void *argument, sp_member *member) {
    const mlp_call *call = argument;
    const sp_gated *mlp = &call->mlp;
    char *own = member->own, *shared = member->shared;
    sp_gated_room room = sp_gated_room_in(&shared, mlp, call->tokens);
    sp_work work = sp_work_in(&own, sp_gated_inputs(mlp, call->inputs), sp_gated_rank(mlp), call->tokens);
    float *x = sp_carve(&own, call->inputs * call->tokens, 4);
    float *partial = sp_carve(&own, sp_gated_partial(mlp, call->tokens), 4);
    int64_t begin, end, outputs = mlp->down->outputs;
    sp_table()->widen[mlp->dtype](x, call->x, call->inputs * call->tokens);
    sp_gated_part(mlp, &room, &work, member, x, call->inputs, call->tokens, 0, partial, &begin, &end);
    for (int64_t t = 0; t < call->tokens && begin < end; t++) {
        int64_t at = t * outputs + begin;
        sp_table()->narrow[mlp->dtype]((char *)call->y + at * sp_size_of(mlp->dtype), room.out + at, end - begin);
    }
}

int sp_mlp(int dtype, int activation, float cut, const void *x, int64_t inputs, int64_t tokens, const sp_linear *gate,
           const sp_linear *up, const sp_linear *down, void *y, int threads) {
    if (dtype < SP_F32 || dtype > SP_F16 || activation < SP_SILU || activation > SP_GELU || inputs < 1 || tokens < 1 ||
        tokens > SP_MAX_TOKENS || gate->outputs != up->outputs)
        return SP_BAD_ARGUMENT;
    mlp_call call = {{dtype, activation, cut, gate, up, down}, x, y, inputs, tokens};
    size_t own = sp_work_size(sp_gated_inputs(&call.mlp, inputs), sp_gated_rank(&call.mlp), tokens) +
                 sp_room(inputs * tokens, 4) + sp_room(sp_gated_partial(&call.mlp, tokens), 4);
    return sp_pool_run(mlp_part, &call, threads, own, sp_gated_size(&call.mlp, tokens));
}

/* The linears that share one input, in one call. */
#include "linear.h"

typedef struct {
    int dtype;
    const void *x;
    int64_t inputs, tokens;
    const sp_linear *linear;
    int64_t count, rank;
    void *const *y;
} site_call;

static void site_part(void *argument, sp_member *member) {
    const site_call *call = argument;
    const sp_kernels *table = sp_table();
    int64_t tokens = call->tokens;
    char *own = member->own, *shared = member->shared;
    sp_work work = sp_work_in(&own, call->inputs, call->rank, tokens);
    float *x = sp_carve(&own, call->inputs * tokens, 4);
    float *y[SP_MAX_SITE], *low[SP_MAX_SITE], *partial[SP_MAX_SITE];
    int any = 0;
    table->widen[call->dtype](x, call->x, call->inputs * tokens);
    for (int64_t l = 0; l < call->count; l++) {
        const sp_linear *linear = &call->linear[l];
        y[l] = sp_carve(&shared, linear->outputs * tokens, 4);
        low[l] = sp_carve(&shared, linear->rank * tokens, 4);
        partial[l] = sp_carve(&own, linear->outputs * tokens, 4);
        if (member->thread == 0) sp_count(linear, x, call->inputs, tokens, 0);
        if (!sp_has_low_rank(linear, 0)) continue;
        sp_low_rank(&work, member, call->dtype, x, call->inputs, tokens, linear, low[l]);
        any = 1;
    }
    if (any) sp_barrier(member);
    for (int64_t l = 0; l < call->count; l++)
        sp_partial(&work, member, call->dtype, x, call->inputs, tokens, &call->linear[l], 0, low[l], partial[l], y[l]);
    sp_barrier(member);
    for (int64_t l = 0; l < call->count; l++) {
        int64_t begin, end, outputs = call->linear[l].outputs;
        sp_finish(member, call->dtype, &call->linear[l], tokens, partial[l], y[l], &begin, &end);
        for (int64_t t = 0; t < tokens && begin < end; t++) {
            int64_t at = t * outputs + begin;
            table->narrow[call->dtype]((char *)call->y[l] + at * sp_size_of(call->dtype), y[l] + at, end - begin);
        }
    }
}

int sp_site(int dtype, const void *x, int64_t inputs, int64_t tokens, const sp_linear *linears, int64_t count,
            void *const *y, int threads) {
    if (dtype < SP_F32 || dtype > SP_F16 || inputs < 1 || tokens < 1 || tokens > SP_MAX_TOKENS || count < 1 || count > SP_MAX_SITE)
        return SP_BAD_ARGUMENT;
    site_call call = {dtype, x, inputs, tokens, linears, count, 0, y};
    size_t shared = 0, partial = 0;
    for (int64_t l = 0; l < count; l++) {
        partial += sp_room(linears[l].outputs * tokens, 4);
        call.rank = linears[l].rank > call.rank ? linears[l].rank : call.rank;
        shared += sp_room(linears[l].outputs * tokens, 4) + sp_room(linears[l].rank * tokens, 4);
    }
    size_t own = sp_work_size(inputs, call.rank, tokens) + sp_room(inputs * tokens, 4) + partial;
    return sp_pool_run(site_part, &call, threads, own, shared);
}

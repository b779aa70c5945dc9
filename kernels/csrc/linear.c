#include "linear.h"

#include <math.h>
#include <string.h>

/* Sums of y that stay near while the rows stream past: 32 KiB. Longer streams are worth more than a smaller y (4096 by
 * 14336 bf16: 99% of a plain read at 8192, 88% at 4096, 76% at 1024). */
enum { TILE = 8192, ALIGN = 32 };

size_t sp_work_size(int64_t inputs, int64_t rank, int64_t tokens) {
    int64_t longest = (inputs > rank ? inputs : rank) + 16;
    return 2 * sp_room(longest, 4) + sp_room(longest * tokens, 4) + sp_room(inputs * tokens, 4) + sp_room(rank * tokens, 4);
}

sp_work sp_work_in(char **memory, int64_t inputs, int64_t rank, int64_t tokens) {
    int64_t longest = (inputs > rank ? inputs : rank) + 16;
    sp_work work;
    work.index = sp_carve(memory, longest, 4);
    work.count_up = sp_carve(memory, longest, 4);
    work.coef = sp_carve(memory, longest * tokens, 4);
    work.masked = sp_carve(memory, inputs * tokens, 4);
    work.low = sp_carve(memory, rank * tokens, 4);
    for (int64_t i = 0; i < longest; i++) work.count_up[i] = (int32_t)i;
    return work;
}

void sp_share(const sp_member *member, int64_t size, int64_t *begin, int64_t *end) {
    int64_t blocks = (size + ALIGN - 1) / ALIGN;
    *begin = blocks * member->thread / member->threads * ALIGN;
    *end = blocks * (member->thread + 1) / member->threads * ALIGN;
    if (*end > size) *end = size;
    if (*begin > size) *begin = size;
}

static inline int kept(float x, const float *scale, int64_t j, float threshold) {
    float score = fabsf(x);
    if (scale) score *= scale[j];
    return !(score <= threshold);
}

/* The union of the tokens' channels; a token's value is 0 where only others keep the channel. */
static int64_t unite(const sp_work *work, const float *x, int64_t inputs, int64_t tokens, const sp_linear *linear) {
    float threshold = *linear->threshold;
    int64_t count = 0;
    for (int64_t j = 0; j < inputs; j++) {
        int any = 0;
        for (int64_t t = 0; t < tokens; t++) {
            int keep = kept(x[t * inputs + j], linear->scale, j, threshold);
            work->coef[count * tokens + t] = keep ? x[t * inputs + j] : 0.0f;
            any |= keep;
        }
        work->index[count] = (int32_t)j;
        count += any;
    }
    return count;
}

void sp_mask(const sp_work *work, const float *x, int64_t inputs, int64_t tokens, const sp_linear *linear,
             int keep_kept) {
    float threshold = *linear->threshold;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < inputs; j++) {
            float value = x[t * inputs + j];
            work->masked[t * inputs + j] = kept(value, linear->scale, j, threshold) == keep_kept ? value : 0.0f;
        }
}

void sp_low_rank(const sp_work *work, const sp_member *member, int dtype, const float *x, int64_t inputs,
                 int64_t tokens, const sp_linear *linear, float *low) {
    int64_t begin = linear->rank * member->thread / member->threads;
    int64_t end = linear->rank * (member->thread + 1) / member->threads;
    if (begin == end) return;
    sp_mask(work, x, inputs, tokens, linear, 0);
    for (int64_t t = 0; t < tokens; t++) memset(low + t * linear->rank + begin, 0, (size_t)(end - begin) * sizeof(float));
    sp_table()->dot[dtype](low + begin, linear->rank, sp_at(linear->lr_a, begin * inputs, dtype), inputs, NULL,
                           end - begin, work->masked, inputs, (int)tokens, inputs);
}

static void begin_with_bias(int dtype, const sp_linear *linear, int64_t tokens, float *y, int64_t begin, int64_t end) {
    size_t size = (size_t)(end - begin) * sizeof(float);
    for (int64_t t = 0; t < tokens; t++) {
        float *at = y + t * linear->outputs + begin;
        if (linear->bias)
            sp_table()->widen[dtype](at, sp_at(linear->bias, begin, dtype), end - begin);
        else
            memset(at, 0, size);
    }
}

static void by_rows(const sp_work *work, int dtype, const float *x, int64_t inputs, int64_t tokens,
                    const sp_linear *linear, int sparse, float *y, int64_t begin, int64_t end) {
    if (sparse) {
        sp_mask(work, x, inputs, tokens, linear, 1);
        x = work->masked;
    }
    sp_table()->dot[dtype](y + begin, linear->outputs, sp_at(linear->weight, begin * linear->stride, dtype),
                           linear->stride, NULL, end - begin, x, inputs, (int)tokens, inputs);
}

/* y += rows of `base` [count, stride] by their coefficients, tile by tile. */
static void by_channels(int dtype, const void *base, int64_t stride, const int32_t *index, int64_t count,
                        const float *coef, int64_t tokens, float *y, int64_t outputs) {
    int64_t most = TILE / tokens, tiles = (outputs + most - 1) / most;
    int64_t tile = tiles ? ((outputs + tiles - 1) / tiles + ALIGN - 1) / ALIGN * ALIGN : 1;
    for (int64_t at = 0; at < outputs; at += tile) {
        int64_t n = outputs - at < tile ? outputs - at : tile;
        sp_table()->axpy[dtype](y + at, outputs, sp_at(base, at, dtype), stride, index, count, coef, (int)tokens, n);
    }
}

/* The channels of W and their values: in the work memory, or dense. Returns how many. */
static int64_t channels(const sp_work *work, const float *x, int64_t inputs, int64_t tokens, const sp_linear *linear,
                        int sparse, const int32_t **index, const float **coef) {
    *index = work->index;
    *coef = work->coef;
    if (sparse && tokens == 1)
        return sp_table()->compact(x, linear->scale, *linear->threshold, inputs, work->index, work->coef);
    if (sparse) return unite(work, x, inputs, tokens, linear);
    *index = work->count_up;
    if (tokens == 1) *coef = x;
    for (int64_t j = 0; j < inputs && tokens > 1; j++)
        for (int64_t t = 0; t < tokens; t++) work->coef[j * tokens + t] = x[t * inputs + j];
    return inputs;
}

void sp_partial(const sp_work *work, const sp_member *member, int dtype, const float *x, int64_t inputs,
                int64_t tokens, const sp_linear *linear, int run_dense, const float *low, float *partial, float *y) {
    int sparse = sp_is_sparse(linear, run_dense);
    int64_t outputs = linear->outputs, thread = member->thread, threads = member->threads;
    const int32_t *index;
    const float *coef;
    if (linear->by_rows) {
        int64_t begin, end;
        sp_share(member, outputs, &begin, &end);
        if (begin < end) {
            begin_with_bias(dtype, linear, tokens, y, begin, end);
            by_rows(work, dtype, x, inputs, tokens, linear, sparse, y, begin, end);
        }
    }
    if (linear->by_rows && !linear->rank) return;
    memset(partial, 0, (size_t)(outputs * tokens) * sizeof(float));
    if (!linear->by_rows) {
        int64_t count = channels(work, x, inputs, tokens, linear, sparse, &index, &coef);
        int64_t first = count * thread / threads, last = count * (thread + 1) / threads;
        by_channels(dtype, linear->weight, linear->stride, index + first, last - first, coef + first * tokens, tokens,
                    partial, outputs);
    }
    if (sp_has_low_rank(linear, run_dense)) {
        int64_t first = linear->rank * thread / threads, last = linear->rank * (thread + 1) / threads;
        for (int64_t r = first; r < last; r++)
            for (int64_t t = 0; t < tokens; t++) work->low[r * tokens + t] = low[t * linear->rank + r];
        by_channels(dtype, linear->lr_b, outputs, work->count_up + first, last - first, work->low + first * tokens,
                    tokens, partial, outputs);
    }
}

void sp_finish(const sp_member *member, int dtype, const sp_linear *linear, int64_t tokens, const float *partial,
               float *y, int64_t *begin, int64_t *end) {
    int64_t outputs = linear->outputs;
    sp_share(member, outputs, begin, end);
    if (*begin >= *end || (linear->by_rows && !linear->rank)) return;
    if (!linear->by_rows) begin_with_bias(dtype, linear, tokens, y, *begin, *end);
    for (int other = 0; other < member->threads; other++) {
        const float *sums = sp_of_thread(member, partial, other);
        for (int64_t t = 0; t < tokens; t++)
            sp_table()->add(y + t * outputs + *begin, sums + t * outputs + *begin, *end - *begin);
    }
}

void sp_count(const sp_linear *linear, const float *x, int64_t inputs, int64_t tokens, int run_dense) {
    if (!linear->kept) return;
    int64_t count = inputs * tokens;
    if (sp_is_sparse(linear, run_dense)) {
        count = 0;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = 0; j < inputs; j++) count += kept(x[t * inputs + j], linear->scale, j, *linear->threshold);
    }
    *linear->kept += count;
}

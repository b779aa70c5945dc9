/* One sparse linear inside a team, in two steps with a barrier between them.
 *
 * Channel-contiguous: each thread adds up its share of the kept channels over all columns, then the threads' sums are
 * added, in the threads' order, each thread its own columns. Streams of whole rows are worth that: half a row at a
 * time, the processor's prefetcher reads on beyond each piece, a tenth to a fifth more than is used. Row-major: each
 * thread has rows of its own, in the first step. Sums depend on the number of threads, and on nothing else.
 */
#ifndef SPARSIFY_LINEAR_H
#define SPARSIFY_LINEAR_H

#include "kernels.h"
#include "pool.h"

/* The work memory of one thread, for inputs up to `inputs` and ranks up to `rank`. */
typedef struct {
    int32_t *index, *count_up; /* kept channels; 0, 1, 2, … */
    float *coef;               /* their values, [channels, T] */
    float *masked;             /* [T, inputs] */
    float *low;                /* [R, T] */
} sp_work;

size_t sp_work_size(int64_t inputs, int64_t rank, int64_t tokens);
sp_work sp_work_in(char **memory, int64_t inputs, int64_t rank, int64_t tokens);

/* Whether the linear runs by its threshold. */
static inline int sp_is_sparse(const sp_linear *linear, int run_dense) { return linear->threshold && !run_dense; }
static inline int sp_has_low_rank(const sp_linear *linear, int run_dense) {
    return sp_is_sparse(linear, run_dense) && linear->rank > 0;
}

/* work.masked [T, inputs] = x with the dropped channels set to 0, or with keep_kept 0 the kept ones. */
void sp_mask(const sp_work *work, const float *x, int64_t inputs, int64_t tokens, const sp_linear *linear,
             int keep_kept);

/* This thread's share of t = A (x * !keep), into low [T, R] of the team. A barrier must follow. */
void sp_low_rank(const sp_work *work, const sp_member *member, int dtype, const float *x, int64_t inputs,
                 int64_t tokens, const sp_linear *linear, float *low);

/* First step: this thread's sums into partial [T, outputs], in its own memory; or, row-major, its rows into y. */
void sp_partial(const sp_work *work, const sp_member *member, int dtype, const float *x, int64_t inputs,
                int64_t tokens, const sp_linear *linear, int run_dense, const float *low, float *partial, float *y);

/* Second step: y [T, outputs] in fp32 for the columns of this thread's share [begin, end), bias and all. */
void sp_finish(const sp_member *member, int dtype, const sp_linear *linear, int64_t tokens, const float *partial,
               float *y, int64_t *begin, int64_t *end);

/* Adds the channels that each token keeps to the linear's counter; one thread calls it. */
void sp_count(const sp_linear *linear, const float *x, int64_t inputs, int64_t tokens, int run_dense);

/* The part of [0, size) that belongs to a thread, on multiples of a cache line's elements. */
void sp_share(const sp_member *member, int64_t size, int64_t *begin, int64_t *end);

#endif

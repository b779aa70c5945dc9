/* A team of threads: the caller and workers of our own, which sleep between calls after a short spin. */
#ifndef SPARSIFY_POOL_H
#define SPARSIFY_POOL_H

#include <stddef.h>
#include <stdint.h>

#define SP_MAX_THREADS 256

/* What a task gets. `own` is memory of this thread, `shared` of the whole team, both 64-byte aligned, not cleared. */
typedef struct {
    int thread, threads;
    char *own, *shared;
    size_t own_bytes; /* from one thread's memory to the next one's */
} sp_member;

typedef void (*sp_task)(void *argument, sp_member *member);

/* Runs the task once in each of `threads` threads, at most one for each CPU of the process, and waits for all of them.
 * Calls from several threads take turns. SP_OK or SP_NO_MEMORY, with nothing run. */
int sp_pool_run(sp_task task, void *argument, int threads, size_t own_bytes, size_t shared_bytes);

/* Waits until every thread of the running team is here; what was written before is seen after. */
void sp_barrier(const sp_member *member);

/* The same place in another thread's memory. */
static inline const void *sp_of_thread(const sp_member *member, const void *own, int thread) {
    return (const char *)own + (ptrdiff_t)(thread - member->thread) * (ptrdiff_t)member->own_bytes;
}

/* Carves n elements of 4 or 8 bytes off a member's memory, on a cache line of their own. */
#define SP_LINE 64
static inline size_t sp_room(int64_t count, size_t size) {
    return ((size_t)count * size + SP_LINE - 1) / SP_LINE * SP_LINE;
}
static inline void *sp_carve(char **memory, int64_t count, size_t size) {
    void *start = *memory;
    *memory += sp_room(count, size);
    return start;
}

#endif

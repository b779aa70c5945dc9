#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sparsify_native.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

/* Pauses before the first yield, and yields before sleeping: about 20 and 100 microseconds. A stage of a step is
 * longer than a wake-up; a thread that waits longer than this has lost its core to someone else, or has no work. */
enum { PAUSES = 1000, YIELDS = 150 };

typedef struct {
    _Atomic uint32_t value;
    _Atomic uint32_t sleepers;
    char fill[SP_LINE - 8];
} gate_t;

static struct {
    pthread_mutex_t turn;
    gate_t call;  /* raised when there is work */
    gate_t done;  /* raised when the last worker has finished */
    gate_t phase; /* raised by the last at a barrier */
    _Atomic int arrived, pending;
    int workers, team;
    sp_task task;
    void *argument;
    char *memory;
    size_t size, own_bytes;
    pthread_t thread[SP_MAX_THREADS];
#if defined(__linux__)
    cpu_set_t cpus;
#endif
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void sleep_on(gate_t *gate, uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, &gate->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
    (void)gate, (void)seen;
    usleep(50);
#endif
}

/* Waits until the gate's value is no longer `seen`. */
static void wait_for(gate_t *gate, uint32_t seen) {
    for (int i = 0; i < PAUSES; i++) {
        if (atomic_load_explicit(&gate->value, memory_order_acquire) != seen) return;
        relax();
    }
    for (int i = 0; i < YIELDS; i++) {
        if (atomic_load_explicit(&gate->value, memory_order_acquire) != seen) return;
        sched_yield();
    }
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->value) == seen) sleep_on(gate, seen);
    atomic_fetch_sub(&gate->sleepers, 1);
}

static void raise_gate(gate_t *gate) {
    atomic_fetch_add(&gate->value, 1);
#if defined(__linux__)
    if (atomic_load(&gate->sleepers)) syscall(SYS_futex, &gate->value, FUTEX_WAKE_PRIVATE, SP_MAX_THREADS, NULL, NULL, 0);
#endif
}

static void run_as(int thread) {
    sp_member member = {thread, pool.team, pool.memory + (size_t)thread * pool.own_bytes,
                        pool.memory + (size_t)pool.team * pool.own_bytes, pool.own_bytes};
    pool.task(pool.argument, &member);
}

static void *work(void *argument) {
    int thread = (int)(intptr_t)argument;
    /* A worker is made before the call that it is for, so that this is the value before that call. */
    uint32_t seen = atomic_load(&pool.call.value);
    atomic_fetch_sub(&pool.pending, 1);
    for (;;) {
        wait_for(&pool.call, seen);
        seen = atomic_load(&pool.call.value);
        if (thread < pool.team) run_as(thread);
        /* Every worker answers, those without work too: none may look at the next call's fields late. */
        if (atomic_fetch_sub(&pool.pending, 1) == 1) raise_gate(&pool.done);
    }
    return NULL;
}

void sp_barrier(const sp_member *member) {
    if (member->threads == 1) return;
    uint32_t seen = atomic_load_explicit(&pool.phase.value, memory_order_acquire);
    if (atomic_fetch_add(&pool.arrived, 1) == member->threads - 1) {
        atomic_store(&pool.arrived, 0);
        raise_gate(&pool.phase);
    } else {
        wait_for(&pool.phase, seen);
    }
}

int sp_cpus(void) {
#if defined(__linux__)
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
#endif
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : (int)count;
}

/* Workers follow the caller's CPUs when those have changed. */
static void follow_affinity(void) {
#if defined(__linux__)
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) || CPU_EQUAL(&cpus, &pool.cpus)) return;
    pool.cpus = cpus;
    for (int i = 1; i <= pool.workers; i++) pthread_setaffinity_np(pool.thread[i], sizeof cpus, &cpus);
#endif
}

/* The child of a fork has none of the parent's threads. */
static void after_fork(void) {
    pthread_mutex_init(&pool.turn, NULL);
    pool.workers = 0;
    atomic_store(&pool.arrived, 0);
    atomic_store(&pool.call.sleepers, 0);
    atomic_store(&pool.done.sleepers, 0);
    atomic_store(&pool.phase.sleepers, 0);
}

/* Held over a fork, so that the child does not inherit a call half done. */
static void before_fork(void) { pthread_mutex_lock(&pool.turn); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&pool.turn); }

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork); }

/* Returns how many threads the team has: fewer than wanted where the system gives no more. */
static int hire(int wanted) {
    while (pool.workers < wanted - 1) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        atomic_store(&pool.pending, 1);
        int failed = pthread_create(&pool.thread[pool.workers + 1], &attributes, work, (void *)(intptr_t)(pool.workers + 1));
        pthread_attr_destroy(&attributes);
        if (failed) break;
        pool.workers++;
        while (atomic_load(&pool.pending)) sched_yield();
    }
    return wanted - 1 < pool.workers ? wanted : pool.workers + 1;
}

static int make_room(size_t size) {
    if (size <= pool.size) return SP_OK;
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, size)) return SP_NO_MEMORY;
    free(pool.memory);
    pool.memory = memory;
    pool.size = size;
    return SP_OK;
}

int sp_pool_run(sp_task task, void *argument, int threads, size_t own_bytes, size_t shared_bytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    int cpus = sp_cpus();
    threads = threads < cpus ? threads : cpus;
    threads = threads < 1 ? 1 : threads < SP_MAX_THREADS ? threads : SP_MAX_THREADS - 1;
    pthread_mutex_lock(&pool.turn);
    if (threads > 1) {
        threads = hire(threads);
        follow_affinity();
    }
    own_bytes = (own_bytes + 4095) / 4096 * 4096;
    int status = make_room(own_bytes * (size_t)threads + shared_bytes);
    if (status == SP_OK) {
        pool.task = task;
        pool.argument = argument;
        pool.team = threads;
        pool.own_bytes = own_bytes;
        if (threads == 1) {
            run_as(0);
        } else {
            uint32_t done = atomic_load(&pool.done.value);
            atomic_store(&pool.pending, pool.workers);
            raise_gate(&pool.call);
            run_as(0);
            wait_for(&pool.done, done);
        }
    }
    pthread_mutex_unlock(&pool.turn);
    return status;
}

/* Which instruction set runs, and the parts of the interface that need no team. */
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "pool.h"

/* Atomic, because the first call's threads all look for it. */
static const sp_kernels *_Atomic in_use = NULL;

#if defined(__x86_64__)
/* __builtin_cpu_supports knows f16c by name only from GCC 11 on, and clang 14 does not. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static int here(const sp_kernels *table) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (table == &sp_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (table == &sp_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
    (void)table;
    return 1;
}

static const sp_kernels *const tables[] = {
#if defined(__x86_64__)
    &sp_avx512, &sp_avx2,
#endif
#if defined(__aarch64__)
    &sp_neon,
#endif
    &sp_portable};

static const sp_kernels *nth(int index) {
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (here(tables[i]) && index-- == 0) return tables[i];
    return NULL;
}

const sp_kernels *sp_table(void) {
    const sp_kernels *table = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (!table) atomic_store_explicit(&in_use, table = nth(0), memory_order_relaxed);
    return table;
}

int sp_abi(void) { return SP_ABI; }

int64_t sp_sizeof(int which) {
    switch (which) {
        case 0: return sizeof(sp_linear);
        case 1: return sizeof(sp_block);
        case 2: return sizeof(sp_decoder);
        default: return SP_BAD_ARGUMENT;
    }
}

const char *sp_isa(int index) {
    const sp_kernels *table = index < 0 ? NULL : nth(index);
    return table ? table->name : NULL;
}

int sp_use_isa(const char *name) {
    for (int i = 0; nth(i); i++)
        if (strcmp(nth(i)->name, name) == 0) {
            in_use = nth(i);
            return SP_OK;
        }
    return SP_BAD_ARGUMENT;
}

const char *sp_isa_in_use(void) { return sp_table()->name; }

typedef struct {
    const char *data;
    int64_t size;
    _Atomic uint64_t sum;
} read_call;

static void read_part(void *argument, sp_member *member) {
    read_call *call = argument;
    int64_t lines = call->size / SP_LINE;
    int64_t begin = lines * member->thread / member->threads * SP_LINE;
    int64_t end = member->thread + 1 == member->threads ? call->size : lines * (member->thread + 1) / member->threads * SP_LINE;
    atomic_fetch_add(&call->sum, sp_table()->read(call->data + begin, end - begin));
}

int64_t sp_read(const void *data, int64_t size, int threads) {
    read_call call = {data, size, 0};
    sp_pool_run(read_part, &call, threads, 0, 0);
    return (int64_t)(atomic_load(&call.sum) >> 1);
}

typedef struct {
    const char *data;
    char *out;
    int64_t rows, columns, size;
} transpose_call;

enum { SQUARE = 64 };

static void transpose_part(void *argument, sp_member *member) {
    const transpose_call *call = argument;
    int64_t strips = (call->columns + SQUARE - 1) / SQUARE;
    int64_t first = strips * member->thread / member->threads * SQUARE;
    int64_t last = strips * (member->thread + 1) / member->threads * SQUARE;
    if (last > call->columns) last = call->columns;
    for (int64_t j = first; j < last; j += SQUARE)
        for (int64_t i = 0; i < call->rows; i += SQUARE) {
            int64_t right = j + SQUARE < last ? j + SQUARE : last, below = i + SQUARE < call->rows ? i + SQUARE : call->rows;
            if (call->size == 2) {
                const uint16_t *data = (const uint16_t *)call->data;
                for (int64_t c = j; c < right; c++)
                    for (int64_t r = i; r < below; r++) ((uint16_t *)call->out)[c * call->rows + r] = data[r * call->columns + c];
            } else {
                const uint32_t *data = (const uint32_t *)call->data;
                for (int64_t c = j; c < right; c++)
                    for (int64_t r = i; r < below; r++) ((uint32_t *)call->out)[c * call->rows + r] = data[r * call->columns + c];
            }
        }
}

int sp_transpose(const void *data, void *out, int64_t rows, int64_t columns, int64_t element_size, int threads) {
    if (element_size != 2 && element_size != 4) return SP_BAD_ARGUMENT;
    transpose_call call = {data, out, rows, columns, element_size};
    return sp_pool_run(transpose_part, &call, threads, 0, 0);
}

/* The whole pages inside a stretch of memory. */
static int whole_pages(const void *data, int64_t size, void **begin, size_t *length) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)data + page - 1) / page * page, last = ((uintptr_t)data + (uintptr_t)size) / page * page;
    *begin = (void *)first;
    *length = last > first ? last - first : 0;
    return last > first;
}

int sp_forget_mapped(const void *data, int64_t size) {
    void *begin;
    size_t length;
    if (whole_pages(data, size, &begin, &length)) madvise(begin, length, MADV_DONTNEED);
    return SP_OK;
}

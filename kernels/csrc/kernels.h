/* The table of inner loops that each instruction set fills in (isa_*.c); one thread runs each of them. */
#ifndef SPARSIFY_KERNELS_H
#define SPARSIFY_KERNELS_H

#include "sparsify_native.h"

typedef struct {
    const char *name;
    /* y[t * y_stride + i] += sum over k of coef[k * tokens + t] * w[index[k] * stride + i], i < n, k ascending. */
    void (*axpy[3])(float *y, int64_t y_stride, const void *w, int64_t stride, const int32_t *index, int64_t count,
                    const float *coef, int tokens, int64_t n);
    /* y[t * y_stride + k] += sum over j < n of x[t * x_stride + j] * w[row_k * stride + j]; row_k = rows[k], or k. */
    void (*dot[3])(float *y, int64_t y_stride, const void *w, int64_t stride, const int32_t *rows, int64_t count,
                   const float *x, int64_t x_stride, int tokens, int64_t n);
    void (*widen[3])(float *out, const void *x, int64_t n);
    void (*narrow[3])(void *out, const float *x, int64_t n);
    /* Rounds to the dtype's values in place. */
    void (*round[3])(float *x, int64_t n);
    /* The kept channels of x [n]: their indices ascending and values; returns how many. */
    int64_t (*compact)(const float *x, const float *scale, float threshold, int64_t n, int32_t *index, float *coef);
    float (*sum_of_squares)(const float *x, int64_t n);
    /* x[i] = act(x[i]). */
    void (*activate)(float *x, int64_t n, int activation, float cut);
    /* x = exp(x - max) in place; returns the sum. */
    float (*softmax)(float *x, int64_t n);
    void (*multiply)(float *x, const float *by, int64_t n);
    void (*add)(float *x, const float *other, int64_t n);
    uint64_t (*read)(const void *data, int64_t size);
} sp_kernels;

extern const sp_kernels sp_portable;
#if defined(__x86_64__)
extern const sp_kernels sp_avx2, sp_avx512;
#endif
#if defined(__aarch64__)
extern const sp_kernels sp_neon;
#endif

/* The table in use. */
const sp_kernels *sp_table(void);

static inline int64_t sp_size_of(int dtype) { return dtype == SP_F32 ? 4 : 2; }

static inline const void *sp_at(const void *base, int64_t element, int dtype) {
    return (const char *)base + element * sp_size_of(dtype);
}

#endif

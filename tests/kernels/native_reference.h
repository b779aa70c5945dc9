/* Plain loops in double for what the kernels compute, and buffers to compute it from. For native_driver.c. */
#ifndef NATIVE_REFERENCE_H
#define NATIVE_REFERENCE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsify_native.h"

static const char *const DTYPE[] = {"fp32", "bf16", "fp16"};
static const double EPS[] = {0x1p-23, 0x1p-7, 0x1p-10}, SMALLEST[] = {0x1p-149, 0x1p-133, 0x1p-24};

#define CHECK(condition, ...)                                        \
    do {                                                             \
        if (!(condition)) {                                          \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                            \
            fprintf(stderr, " (%s)\n", sp_isa_in_use());             \
            exit(1);                                                 \
        }                                                            \
    } while (0)

/* ---- numbers ---- */

typedef struct {
    uint64_t state;
} dice;

static uint64_t roll(dice *d) {
    d->state = d->state * 6364136223846793005u + 1442695040888963407u;
    return d->state >> 33;
}

/* About normal, of variance 1. */
static double normal(dice *d) {
    double sum = 0.0;
    for (int i = 0; i < 12; i++) sum += (double)roll(d) / 0x1p31;
    return sum - 6.0;
}

static int64_t size_of(int dtype) { return dtype == SP_F32 ? 4 : 2; }

/* The nearest number of a dtype, ties to even. */
static double rounded(int dtype, double value) {
    if (dtype == SP_F32) return (float)value;
    if (value == 0.0 || !isfinite(value)) return value;
    int digits = dtype == SP_BF16 ? 8 : 11, lowest = dtype == SP_BF16 ? -126 : -14, exponent = ilogb(value);
    int unit = (exponent > lowest ? exponent : lowest) - digits + 1;
    double result = ldexp(nearbyint(ldexp(value, -unit)), unit);
    double most = dtype == SP_BF16 ? 0x1.FEp127 : 65504.0;
    return fabs(result) > most ? copysign(INFINITY, value) : result;
}

static void put(int dtype, void *data, int64_t at, double value) {
    value = rounded(dtype, value);
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (dtype == SP_F32) {
        ((float *)data)[at] = single;
    } else if (dtype == SP_BF16) {
        ((uint16_t *)data)[at] = (uint16_t)(bits >> 16);
    } else {
        uint16_t half = isnan(value) ? 0x7E00 : isinf(value) ? 0x7C00 : 0;
        if (isfinite(value) && fabs(value) >= 0x1p-14) {
            int exponent = ilogb(value);
            half = (uint16_t)((exponent + 14) * 1024 + (int)ldexp(fabs(value), 10 - exponent));
        } else if (isfinite(value)) {
            half = (uint16_t)ldexp(fabs(value), 24);
        }
        ((uint16_t *)data)[at] = (uint16_t)(half | (signbit(value) ? 0x8000 : 0));
    }
}

static double get(int dtype, const void *data, int64_t at) {
    if (dtype == SP_F32) return ((const float *)data)[at];
    uint16_t half = ((const uint16_t *)data)[at];
    if (dtype == SP_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        float single;
        memcpy(&single, &bits, 4);
        return single;
    }
    int exponent = half >> 10 & 31, rest = half & 1023;
    double size = exponent == 31 ? (rest ? NAN : INFINITY)
                  : exponent     ? ldexp(1024 + rest, exponent - 25)
                                 : ldexp(rest, -24);
    return half & 0x8000 ? -size : size;
}

static void *room(int64_t bytes) {
    void *block = malloc(bytes ? (size_t)bytes : 1);
    CHECK(block, "%lld bytes", (long long)bytes);
    return block;
}

static void *numbers(dice *d, int dtype, int64_t count, double by) {
    void *data = room(count * size_of(dtype));
    for (int64_t i = 0; i < count; i++) put(dtype, data, i, by * normal(d));
    return data;
}

static void *nans(int dtype, int64_t count) {
    void *data = room(count * size_of(dtype));
    for (int64_t i = 0; i < count; i++) put(dtype, data, i, NAN);
    return data;
}

/* ---- one linear ---- */

typedef struct {
    int64_t outputs, inputs, rank, gap; /* gap: elements between rows that belong to nobody */
    int by_rows, bias, scaled, sparse;
    int fixed; /* the scale alone decides what is kept: no rounding of x moves a channel across the threshold */
    double threshold;
} shape;

static sp_linear make(dice *d, int dtype, const shape *s) {
    int64_t rows = s->by_rows ? s->outputs : s->inputs, columns = s->by_rows ? s->inputs : s->outputs;
    sp_linear l = {0};
    l.stride = columns + s->gap;
    void *weight = nans(dtype, (rows - 1) * l.stride + columns);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            put(dtype, weight, r * l.stride + c, normal(d) / sqrt((double)s->inputs));
    l.weight = weight;
    l.outputs = s->outputs;
    l.by_rows = s->by_rows;
    if (s->bias) l.bias = numbers(d, dtype, s->outputs, 1.0);
    if (s->sparse) {
        float *threshold = room(sizeof *threshold);
        *threshold = (float)s->threshold;
        l.threshold = threshold;
    }
    if (s->scaled || (s->fixed && s->sparse)) {
        float *scale = room(s->inputs * 4);
        for (int64_t j = 0; j < s->inputs; j++)
            scale[j] = s->fixed ? (roll(d) % 3 ? 1e30f : 0.0f) : (float)(0.5 + (double)roll(d) / 0x1p31);
        l.scale = scale;
    }
    l.rank = s->rank;
    if (s->rank) {
        l.lr_a = numbers(d, dtype, s->rank * s->inputs, 0.5 / sqrt((double)s->inputs));
        l.lr_b = numbers(d, dtype, s->rank * s->outputs, 1.0);
    }
    l.kept = room(sizeof *l.kept);
    *l.kept = 0;
    return l;
}

static void drop(sp_linear *l) {
    free((void *)l->weight), free((void *)l->bias), free((void *)l->threshold), free((void *)l->scale);
    free((void *)l->lr_a), free((void *)l->lr_b), free(l->kept);
}

/* y [outputs] of one token, and the size of the terms of each sum where it is wanted; counts what is kept. */
static void linear(int dtype, const sp_linear *l, const double *x, int64_t inputs, int run_dense, double *y,
                   double *size, int64_t *kept) {
    int sparse = l->threshold && !run_dense;
    for (int64_t o = 0; o < l->outputs; o++) {
        y[o] = l->bias ? get(dtype, l->bias, o) : 0.0;
        if (size) size[o] = fabs(y[o]);
    }
    for (int64_t j = 0; j < inputs; j++) {
        float score = fabsf((float)x[j]) * (l->scale ? l->scale[j] : 1.0f);
        int keep = !sparse || !(score <= *l->threshold);
        *kept += keep;
        for (int64_t o = 0; o < l->outputs; o++) {
            for (int64_t r = 0; r < (keep ? 1 : l->rank); r++) {
                double by;
                if (keep) by = get(dtype, l->weight, l->by_rows ? o * l->stride + j : j * l->stride + o);
                else by = get(dtype, l->lr_b, r * l->outputs + o) * get(dtype, l->lr_a, r * inputs + j);
                y[o] += by * x[j];
                if (size) size[o] += fabs(by * x[j]);
            }
        }
    }
}

#endif

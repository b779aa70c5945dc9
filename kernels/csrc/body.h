/* The inner loops, written once over a vector of WIDTH floats. Each isa_*.c defines VEC, WIDTH and the V_ macros for
 * its instruction set, then includes this file. A column's sum is the same whatever the vector width and the tile it
 * falls into: rows are added in ascending order, each by one fused multiply-add, in vectors and in tails alike.
 */
#include <math.h>
#include <stddef.h>

#include "half.h"
#include "kernels.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE static inline __attribute__((always_inline))

/* How far ahead in a row to prefetch, bytes. */
#define AHEAD 16384

INLINE float one_f32(const float *p) { return *p; }
INLINE float one_bf16(const sp_bf16 *p) { return sp_from_bf16(p->bits); }
INLINE float one_f16(const sp_f16 *p) { return sp_from_f16(p->bits); }

#define NAME f32
#define T float
#include "gemv.h"
#define NAME bf16
#define T sp_bf16
#include "gemv.h"
#define NAME f16
#define T sp_f16
#include "gemv.h"

/* ---- conversions ---- */

static void widen_f32(float *out, const void *x, int64_t n) { memcpy(out, x, (size_t)n * sizeof(float)); }
static void narrow_f32(void *out, const float *x, int64_t n) { memcpy(out, x, (size_t)n * sizeof(float)); }
static void round_f32(float *x, int64_t n) { (void)x, (void)n; }

static void widen_bf16(float *out, const void *x, int64_t n) {
    const uint16_t *bits = x;
    for (int64_t i = 0; i < n; i++) out[i] = sp_from_bf16(bits[i]);
}
static void narrow_bf16(void *out, const float *x, int64_t n) {
    uint16_t *bits = out;
    for (int64_t i = 0; i < n; i++) bits[i] = sp_to_bf16(x[i]);
}
static void round_bf16(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = sp_from_bf16(sp_to_bf16(x[i]));
}

static void widen_f16(float *out, const void *x, int64_t n) {
    const sp_f16 *half = x;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) V_STOREU(out + i, V_LOAD_f16(half + i));
    for (; i < n; i++) out[i] = one_f16(half + i);
}
static void narrow_f16(void *out, const float *x, int64_t n) {
    sp_f16 *half = out;
    int64_t i = 0;
#ifdef V_STORE_f16
    for (; i + WIDTH <= n; i += WIDTH) V_STORE_f16(half + i, V_LOADU(x + i));
#endif
    for (; i < n; i++) half[i].bits = sp_to_f16(x[i]);
}
static void round_f16(float *x, int64_t n) {
    sp_f16 half[WIDTH];
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        narrow_f16(half, x + i, WIDTH);
        V_STOREU(x + i, V_LOAD_f16(half));
    }
    for (; i < n; i++) x[i] = sp_from_f16(sp_to_f16(x[i]));
}

/* ---- channels, norms, activations ---- */

#ifndef OWN_COMPACT
static int64_t compact(const float *x, const float *scale, float threshold, int64_t n, int32_t *index, float *coef) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
        float score = fabsf(x[j]);
        if (scale) score *= scale[j];
        index[count] = (int32_t)j;
        coef[count] = x[j];
        /* Written so that a NaN is kept. */
        count += !(score <= threshold);
    }
    return count;
}
#endif

static float sum_of_squares(const float *x, int64_t n) {
    float part[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) part[l] += x[i + l] * x[i + l];
    for (; i < n; i++) part[0] += x[i] * x[i];
    float total = 0.0f;
    for (int l = 0; l < 16; l++) total += part[l];
    return total;
}

/* exp by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients), within 2 ulp; 0 and infinity at the ends. */
INLINE float exp_one(float x) {
    /* A NaN is clamped too: it has no integer. */
    float clamped = x > -104.0f ? x : -104.0f;
    clamped = clamped < 89.0f ? clamped : 89.0f;
    float n = clamped * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f;
    float r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* In two halves, so that neither leaves the normal range. */
    int32_t whole = (int32_t)n, half = whole >> 1;
    float result = p * sp_float((uint32_t)(half + 127) << 23) * sp_float((uint32_t)(whole - half + 127) << 23);
    return x != x ? x : result;
}

INLINE float tanh_one(float x) {
    float a = fabsf(x), e = exp_one(-2.0f * a);
    /* Near 0 the quotient loses its digits: the odd series has them. */
    float s = x * x;
    float small = a * (1.0f + s * (-1.0f / 3.0f + s * (2.0f / 15.0f - s * (17.0f / 315.0f))));
    float value = a < 0.25f ? small : (1.0f - e) / (1.0f + e);
    return copysignf(value, x);
}

static void activate(float *x, int64_t n, int activation, float cut) {
    switch (activation) {
        case SP_SILU:
            for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exp_one(-x[i]));
            break;
        case SP_GELU_TANH:
            for (int64_t i = 0; i < n; i++)
                x[i] = 0.5f * x[i] * (1.0f + tanh_one(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
            break;
        case SP_GELU:
            for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
            break;
        default:
            for (int64_t i = 0; i < n; i++) x[i] = x[i] <= cut ? 0.0f : x[i];
    }
}

static float softmax(float *x, int64_t n) {
    float most = x[0], total = 0.0f, part[16] = {0};
    for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) part[l] += x[i + l] = exp_one(x[i + l] - most);
    for (; i < n; i++) part[0] += x[i] = exp_one(x[i] - most);
    for (int l = 0; l < 16; l++) total += part[l];
    return total;
}

static void multiply(float *x, const float *by, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= by[i];
}

static void add(float *x, const float *other, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += other[i];
}

/* Sums 64-bit words: the loads are what is measured, in WIDTH * 4 bytes or what the compiler makes of it. */
static uint64_t read_all(const void *data, int64_t size) {
    const uint64_t *words = data;
    uint64_t part[32] = {0}, total = 0;
    int64_t count = size / 8, i = 0;
    for (; i + 32 <= count; i += 32) {
        __builtin_prefetch((const char *)(words + i) + 8192, 0, 2);
        for (int l = 0; l < 32; l++) part[l] += words[i + l];
    }
    for (; i < count; i++) part[0] += words[i];
    if (size % 8) memcpy(&total, words + count, (size_t)(size % 8));
    for (int l = 0; l < 32; l++) total += part[l];
    return total;
}

const sp_kernels TABLE = {
    .name = ISA_NAME,
    .axpy = {axpy_f32, axpy_bf16, axpy_f16},
    .dot = {dot_f32, dot_bf16, dot_f16},
    .widen = {widen_f32, widen_bf16, widen_f16},
    .narrow = {narrow_f32, narrow_bf16, narrow_f16},
    .round = {round_f32, round_bf16, round_f16},
    .compact = compact,
    .sum_of_squares = sum_of_squares,
    .activate = activate,
    .softmax = softmax,
    .multiply = multiply,
    .add = add,
    .read = read_all,
};

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

/* How far ahead in a row stream to prefetch, bytes. */
#define AHEAD 512

INLINE float one_f32(const float *p) { return *p; }
INLINE float one_bf16(const sp_bf16 *p) { return sp_from_bf16(p->bits); }
INLINE float one_f16(const sp_f16 *p) { return sp_from_f16(p->bits); }

/* ---- axpy: rows of channel-contiguous weights times the values of their channels ---- */

#define DEFINE_AXPY(NAME, T)                                                                                           \
    /* ROWS rows at once, so that y is loaded and stored once for all of them. */                                      \
    INLINE void rows_##NAME(float *y, int64_t y_stride, const T *const *rows, const T *const *next, const int count,  \
                            const float *coef, const int tokens, int64_t n) {                                          \
        int64_t i = 0;                                                                                                 \
        VEC c[8];                                                                                                      \
        if (tokens == 1)                                                                                               \
            for (int r = 0; r < count; r++) c[r] = V_SET1(coef[r]);                                                    \
        for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {                                                                   \
            VEC low[8], high[8];                                                                                       \
            for (int r = 0; r < count; r++) {                                                                          \
                low[r] = V_LOAD_##NAME(rows[r] + i);                                                                   \
                high[r] = V_LOAD_##NAME(rows[r] + i + WIDTH);                                                          \
                __builtin_prefetch(next[r] + i, 0, 3);                                                                 \
            }                                                                                                          \
            for (int t = 0; t < tokens; t++) {                                                                         \
                float *out = y + t * y_stride + i;                                                                     \
                VEC a = V_LOADU(out), b = V_LOADU(out + WIDTH);                                                        \
                for (int r = 0; r < count; r++) {                                                                      \
                    VEC by = tokens == 1 ? c[r] : V_SET1(coef[r * tokens + t]);                                        \
                    a = V_FMA(by, low[r], a);                                                                          \
                    b = V_FMA(by, high[r], b);                                                                         \
                }                                                                                                      \
                V_STOREU(out, a);                                                                                      \
                V_STOREU(out + WIDTH, b);                                                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < n; i++)                                                                                             \
            for (int t = 0; t < tokens; t++)                                                                           \
                for (int r = 0; r < count; r++)                                                                        \
                    y[t * y_stride + i] =                                                                              \
                        ONE_FMA(coef[r * tokens + t], one_##NAME(rows[r] + i), y[t * y_stride + i]);                   \
    }                                                                                                                  \
    INLINE void axpy_tokens_##NAME(float *y, int64_t y_stride, const T *w, int64_t stride, const int32_t *index,      \
                                   int64_t count, const float *coef, const int tokens, const int group, int64_t n) {  \
        int64_t k = 0;                                                                                                 \
        const T *rows[8], *next[8];                                                                                    \
        for (; k + group <= count; k += group) {                                                                       \
            for (int r = 0; r < group; r++) {                                                                          \
                int64_t later = k + group + r < count ? k + group + r : count - 1;                                     \
                rows[r] = w + (int64_t)index[k + r] * stride;                                                          \
                next[r] = w + (int64_t)index[later] * stride;                                                          \
            }                                                                                                          \
            rows_##NAME(y, y_stride, rows, next, group, coef + k * tokens, tokens, n);                                 \
        }                                                                                                              \
        for (; k < count; k++) {                                                                                       \
            rows[0] = w + (int64_t)index[k] * stride;                                                                  \
            next[0] = w + (int64_t)index[k + 1 < count ? k + 1 : k] * stride;                                          \
            rows_##NAME(y, y_stride, rows, next, 1, coef + k * tokens, tokens, n);                                     \
        }                                                                                                              \
    }                                                                                                                  \
    static void axpy_##NAME(float *y, int64_t y_stride, const void *w, int64_t stride, const int32_t *index,          \
                            int64_t count, const float *coef, int tokens, int64_t n) {                                 \
        switch (tokens) {                                                                                              \
            case 1: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 1, GROUP, n); break;                \
            case 2: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 2, 4, n); break;                    \
            case 3: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 3, 4, n); break;                    \
            case 4: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 4, 4, n); break;                    \
            case 5: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 5, 4, n); break;                    \
            case 6: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 6, 4, n); break;                    \
            case 7: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 7, 4, n); break;                    \
            default: axpy_tokens_##NAME(y, y_stride, w, stride, index, count, coef, 8, 4, n); break;                   \
        }                                                                                                              \
    }

DEFINE_AXPY(f32, float)
DEFINE_AXPY(bf16, sp_bf16)
DEFINE_AXPY(f16, sp_f16)

/* ---- dot: rows of row-major weights with x ---- */

#define DEFINE_DOT(NAME, T)                                                                                            \
    INLINE void dots_##NAME(float *y, int64_t y_stride, const T *const *rows, const int count, const float *x,        \
                            int64_t x_stride, const int tokens, int64_t n) {                                           \
        for (int t = 0; t < tokens; t++) {                                                                             \
            const float *xt = x + t * x_stride;                                                                        \
            VEC even[4], odd[4];                                                                                       \
            for (int r = 0; r < count; r++) even[r] = odd[r] = V_SET1(0.0f);                                           \
            int64_t j = 0;                                                                                             \
            for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) {                                                               \
                VEC a = V_LOADU(xt + j), b = V_LOADU(xt + j + WIDTH);                                                  \
                for (int r = 0; r < count; r++) {                                                                      \
                    even[r] = V_FMA(V_LOAD_##NAME(rows[r] + j), a, even[r]);                                           \
                    odd[r] = V_FMA(V_LOAD_##NAME(rows[r] + j + WIDTH), b, odd[r]);                                     \
                    if (t == 0) __builtin_prefetch((const char *)(rows[r] + j) + AHEAD, 0, 3);                         \
                }                                                                                                      \
            }                                                                                                          \
            for (int r = 0; r < count; r++) {                                                                          \
                float lanes[WIDTH], total = 0.0f;                                                                      \
                V_STOREU(lanes, V_ADD(even[r], odd[r]));                                                               \
                for (int l = 0; l < WIDTH; l++) total += lanes[l];                                                     \
                for (int64_t rest = j; rest < n; rest++) total = ONE_FMA(one_##NAME(rows[r] + rest), xt[rest], total); \
                y[t * y_stride + r] += total;                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void dot_##NAME(float *y, int64_t y_stride, const void *w, int64_t stride, const int32_t *rows,            \
                           int64_t count, const float *x, int64_t x_stride, int tokens, int64_t n) {                   \
        const T *at[4], *base = w;                                                                                     \
        int64_t k = 0;                                                                                                 \
        for (; k + 4 <= count; k += 4) {                                                                               \
            for (int r = 0; r < 4; r++) at[r] = base + (rows ? rows[k + r] : k + r) * stride;                          \
            dots_##NAME(y + k, y_stride, at, 4, x, x_stride, tokens, n);                                               \
        }                                                                                                              \
        for (; k < count; k++) {                                                                                       \
            at[0] = base + (rows ? rows[k] : k) * stride;                                                              \
            dots_##NAME(y + k, y_stride, at, 1, x, x_stride, tokens, n);                                               \
        }                                                                                                              \
    }

DEFINE_DOT(f32, float)
DEFINE_DOT(bf16, sp_bf16)
DEFINE_DOT(f16, sp_f16)

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
    float clamped = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
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

/* Sums 64-bit words: the loads are what is measured, in WIDTH * 4 bytes or what the compiler makes of it. */
static uint64_t read_all(const void *data, int64_t size) {
    const uint64_t *words = data;
    uint64_t part[32] = {0}, total = 0;
    int64_t count = size / 8, i = 0;
    for (; i + 32 <= count; i += 32) {
        __builtin_prefetch((const char *)(words + i) + 1024, 0, 3);
        for (int l = 0; l < 32; l++) part[l] += words[i + l];
    }
    for (; i < count; i++) part[0] += words[i];
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
    .read = read_all,
};

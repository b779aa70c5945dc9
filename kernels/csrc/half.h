/* bf16 and fp16 to and from fp32, one at a time, rounding to nearest even, in plain integer C. */
#ifndef SPARSIFY_HALF_H
#define SPARSIFY_HALF_H

#include <stdint.h>
#include <string.h>

typedef struct {
    uint16_t bits;
} sp_bf16;
typedef struct {
    uint16_t bits;
} sp_f16;

static inline float sp_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t sp_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float sp_from_bf16(uint16_t bits) { return sp_float((uint32_t)bits << 16); }

static inline uint16_t sp_to_bf16(float value) {
    uint32_t bits = sp_bits(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    /* A NaN must not round to infinity. */
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

static inline float sp_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t rest = half & 0x7FFF;
    if (rest >= 0x7C00) return sp_float(sign | 0x7F800000 | (rest & 0x3FF) << 13 | ((rest & 0x3FF) ? 0x400000 : 0));
    if (rest >= 0x400) return sp_float(sign | ((rest << 13) + (112u << 23)));
    return sp_float(sign | sp_bits((float)rest * 0x1p-24f));
}

static inline uint16_t sp_to_f16(float value) {
    uint32_t bits = sp_bits(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x3FF));
    if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (bits < 0x38800000) {
        /* Subnormal: adding 0.5 leaves the rounded mantissa in the low bits. */
        float shifted = sp_float(bits) + 0.5f;
        return (uint16_t)(sign | (sp_bits(shifted) - 0x3F000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13);
}

#endif

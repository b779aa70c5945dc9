/* AVX2 with FMA and F16C: 8 floats. Compiled with those flags; called only where the processor has them. */
#include <immintrin.h>

#include "half.h"

#define ISA_NAME "avx2"
#define TABLE sp_avx2
#define WIDTH 8
#define GROUP 4
#define VEC __m256
#define V_SET1 _mm256_set1_ps
#define V_ADD _mm256_add_ps
#define V_FMA _mm256_fmadd_ps
#define V_LOADU _mm256_loadu_ps
#define V_STOREU _mm256_storeu_ps
#define V_LOAD_f32(p) _mm256_loadu_ps(p)
#define V_LOAD_bf16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define V_LOAD_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define V_STORE_f16(p, v) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define ONE_FMA(a, b, c) fmaf(a, b, c)
static inline float V_SUM(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "body.h"

/* AVX-512 F, BW, DQ, VL: 16 floats. Compiled with those flags; called only where the processor and system have them. */
#include <immintrin.h>
#include <math.h>

#include "half.h"

#define ISA_NAME "avx512"
#define TABLE sp_avx512
#define WIDTH 16
#define GROUP 8
#define VEC __m512
#define V_SET1 _mm512_set1_ps
#define V_ADD _mm512_add_ps
#define V_FMA _mm512_fmadd_ps
#define V_LOADU _mm512_loadu_ps
#define V_STOREU _mm512_storeu_ps
#define V_LOAD_f32(p) _mm512_loadu_ps(p)
#define V_LOAD_bf16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define V_LOAD_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define V_STORE_f16(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define ONE_FMA(a, b, c) fmaf(a, b, c)

#define OWN_COMPACT
static int64_t compact(const float *x, const float *scale, float threshold, int64_t n, int32_t *index, float *coef) {
    int64_t count = 0, j = 0;
    const __m512 cut = _mm512_set1_ps(threshold);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + 16 <= n; j += 16) {
        __m512 value = _mm512_loadu_ps(x + j), score = _mm512_abs_ps(value);
        if (scale) score = _mm512_mul_ps(score, _mm512_loadu_ps(scale + j));
        __mmask16 keep = _mm512_cmp_ps_mask(score, cut, _CMP_NLE_UQ);
        /* Compressed in a register and stored whole: a compressing store is slow on some processors. The lists have
         * room for 16 more. */
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(keep, at));
        _mm512_storeu_ps(coef + count, _mm512_maskz_compress_ps(keep, value));
        count += __builtin_popcount(keep);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
    for (; j < n; j++) {
        float score = fabsf(x[j]);
        if (scale) score *= scale[j];
        index[count] = (int32_t)j;
        coef[count] = x[j];
        count += !(score <= threshold);
    }
    return count;
}
#define V_SUM _mm512_reduce_add_ps

#include "body.h"

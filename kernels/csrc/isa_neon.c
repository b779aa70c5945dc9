/* NEON, which every 64-bit ARM has: 4 floats. */
#include <arm_neon.h>

#include "half.h"

#define ISA_NAME "neon"
#define TABLE sp_neon
#define WIDTH 4
#define GROUP 4
#define VEC float32x4_t
#define V_SET1 vdupq_n_f32
#define V_ADD vaddq_f32
#define V_FMA(a, b, c) vfmaq_f32(c, a, b)
#define V_LOADU vld1q_f32
#define V_STOREU vst1q_f32
#define V_LOAD_f32(p) vld1q_f32(p)
#define V_LOAD_bf16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&(p)->bits), 16))
#define V_LOAD_f16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&(p)->bits)))
#define V_STORE_f16(p, v) vst1_u16(&(p)->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)))
#define ONE_FMA(a, b, c) fmaf(a, b, c)
#define V_SUM vaddvq_f32

#include "body.h"

/* Plain C: four floats that the compiler may or may not put into a vector register. */
#include "half.h"

typedef struct {
    float lane[4];
} four;

#define ISA_NAME "portable"
#define TABLE sp_portable
#define WIDTH 4
#define GROUP 4
#define VEC four
#define ONE_FMA(a, b, c) ((a) * (b) + (c))

static inline four V_SET1(float value) { return (four){{value, value, value, value}}; }
static inline four V_ADD(four a, four b) {
    for (int l = 0; l < 4; l++) a.lane[l] += b.lane[l];
    return a;
}
static inline four V_FMA(four a, four b, four c) {
    for (int l = 0; l < 4; l++) c.lane[l] = ONE_FMA(a.lane[l], b.lane[l], c.lane[l]);
    return c;
}
static inline four V_LOADU(const float *p) { return (four){{p[0], p[1], p[2], p[3]}}; }
static inline void V_STOREU(float *p, four v) {
    for (int l = 0; l < 4; l++) p[l] = v.lane[l];
}
#define V_LOAD_f32(p) V_LOADU(p)
static inline four V_LOAD_bf16(const sp_bf16 *p) {
    return (four){{sp_from_bf16(p[0].bits), sp_from_bf16(p[1].bits), sp_from_bf16(p[2].bits), sp_from_bf16(p[3].bits)}};
}
static inline four V_LOAD_f16(const sp_f16 *p) {
    return (four){{sp_from_f16(p[0].bits), sp_from_f16(p[1].bits), sp_from_f16(p[2].bits), sp_from_f16(p[3].bits)}};
}
#define V_SUM(v) ((v).lane[0] + (v).lane[2] + ((v).lane[1] + (v).lane[3]))

#include "body.h"

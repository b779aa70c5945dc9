/* Every instruction set of the library against plain loops in fp64, for machines that have no Python: exits with 1
 * and a line where they differ. tests/kernels/test_build.py runs it in an emulator. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../kernels/csrc/sparsify_native.h"

enum { INPUTS = 131, OUTPUTS = 77, RANK = 5 };

static double random_value(void) { return 4.0 * rand() / RAND_MAX - 2.0; }

/* Stores a value in the dtype and returns what is there now. */
static double put(int dtype, void *data, int64_t at, double value) {
    float wide = (float)value;
    if (dtype == SP_F32) {
        ((float *)data)[at] = wide;
        return wide;
    }
    if (dtype == SP_F16) {
        ((_Float16 *)data)[at] = (_Float16)wide;
        return ((_Float16 *)data)[at];
    }
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    bits &= 0xffff0000u;
    memcpy(&wide, &bits, 4);
    ((uint16_t *)data)[at] = (uint16_t)(bits >> 16);
    return wide;
}

static double get(int dtype, const void *data, int64_t at) {
    if (dtype == SP_F32) return ((const float *)data)[at];
    if (dtype == SP_F16) return ((const _Float16 *)data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static double error_of(int dtype, int tokens, int by_rows, int rank) {
    static float weight[INPUTS * OUTPUTS], a[RANK * INPUTS], b[RANK * OUTPUTS], bias[OUTPUTS], x[8 * INPUTS], y[8 * OUTPUTS];
    static double w64[OUTPUTS][INPUTS], a64[RANK][INPUTS], b64[OUTPUTS][RANK], x64[8][INPUTS], bias64[OUTPUTS];
    static float scale[INPUTS];
    float threshold = 0.9f;
    for (int o = 0; o < OUTPUTS; o++) {
        bias64[o] = put(dtype, bias, o, random_value());
        for (int j = 0; j < INPUTS; j++)
            w64[o][j] = put(dtype, weight, by_rows ? o * INPUTS + j : j * OUTPUTS + o, random_value());
        for (int r = 0; r < RANK; r++) b64[o][r] = put(dtype, b, r * OUTPUTS + o, random_value());
    }
    for (int j = 0; j < INPUTS; j++) {
        scale[j] = (float)fabs(random_value());
        for (int r = 0; r < RANK; r++) a64[r][j] = put(dtype, a, r * INPUTS + j, random_value() / 10);
        for (int t = 0; t < tokens; t++) x64[t][j] = put(dtype, x, t * INPUTS + j, random_value());
    }
    sp_linear linear = {weight, by_rows ? INPUTS : OUTPUTS, OUTPUTS, bias, &threshold, scale, a, b, rank, NULL, by_rows};
    void *out = y;
    if (sp_site(dtype, x, INPUTS, tokens, &linear, 1, &out, 2) != SP_OK) return INFINITY;
    double wrong = 0, norm = 0;
    for (int t = 0; t < tokens; t++)
        for (int o = 0; o < OUTPUTS; o++) {
            double sum = bias64[o];
            for (int j = 0; j < INPUTS; j++) {
                double low = 0;
                for (int r = 0; r < rank; r++) low += b64[o][r] * a64[r][j];
                sum += (fabsf((float)x64[t][j]) * scale[j] > threshold ? w64[o][j] : low) * x64[t][j];
            }
            wrong += pow(get(dtype, y, t * OUTPUTS + o) - sum, 2);
            norm += sum * sum;
        }
    return sqrt(wrong / norm);
}

int main(void) {
    static const double allowed[] = {1e-5, 1e-2, 2e-3};
    int failed = 0;
    for (int i = 0; sp_isa(i); i++) {
        sp_use_isa(sp_isa(i));
        for (int dtype = SP_F32; dtype <= SP_F16; dtype++)
            for (int tokens = 1; tokens <= SP_MAX_TOKENS; tokens++)
                for (int kind = 0; kind < 4; kind++) {
                    double error = error_of(dtype, tokens, kind & 1, kind & 2 ? RANK : 0);
                    if (error <= allowed[dtype]) continue;
                    printf("%s, dtype %d, %d tokens, kind %d: error %.1e\n", sp_isa(i), dtype, tokens, kind, error);
                    failed = 1;
                }
        printf("%s\n", sp_isa(i));
    }
    return failed;
}

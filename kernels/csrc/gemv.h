/* The two products for weights of type T, called NAME: body.h includes this once for each dtype. No include guard. */

#define LOAD JOIN(V_LOAD_, NAME)
#define ONE JOIN(one_, NAME)
#define ROWS JOIN(rows_, NAME)
#define AXPY_TOKENS JOIN(axpy_tokens_, NAME)
#define DOTS JOIN(dots_, NAME)

/* ---- axpy: rows of channel-contiguous weights times the values of their channels ---- */

/* `count` rows at once, so that y is loaded and stored once for all of them; the same place of the next rows is
 * fetched meanwhile, as no hardware prefetcher can guess which rows are kept. */
INLINE void ROWS(float *y, int64_t y_stride, const T *const *rows, const T *const *next, const int count,
                 const float *coef, const int tokens, int64_t n) {
    int64_t i = 0;
    VEC c[8];
    if (tokens == 1)
        for (int r = 0; r < count; r++) c[r] = V_SET1(coef[r]);
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        VEC low[8], high[8];
        for (int r = 0; r < count; r++) {
            low[r] = LOAD(rows[r] + i);
            high[r] = LOAD(rows[r] + i + WIDTH);
            __builtin_prefetch(next[r] + i, 0, 2);
        }
        for (int t = 0; t < tokens; t++) {
            float *out = y + t * y_stride + i;
            VEC a = V_LOADU(out), b = V_LOADU(out + WIDTH);
            for (int r = 0; r < count; r++) {
                VEC by = tokens == 1 ? c[r] : V_SET1(coef[r * tokens + t]);
                a = V_FMA(by, low[r], a);
                b = V_FMA(by, high[r], b);
            }
            V_STOREU(out, a);
            V_STOREU(out + WIDTH, b);
        }
    }
    for (; i < n; i++)
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < count; r++)
                y[t * y_stride + i] = ONE_FMA(coef[r * tokens + t], ONE(rows[r] + i), y[t * y_stride + i]);
}

INLINE void AXPY_TOKENS(float *y, int64_t y_stride, const T *w, int64_t stride, const int32_t *index, int64_t count,
                        const float *coef, const int tokens, const int group, int64_t n) {
    int64_t k = 0;
    const T *rows[8], *next[8];
    for (; k + group <= count; k += group) {
        for (int r = 0; r < group; r++) {
            int64_t later = k + group + r < count ? k + group + r : count - 1;
            rows[r] = w + (int64_t)index[k + r] * stride;
            next[r] = w + (int64_t)index[later] * stride;
        }
        ROWS(y, y_stride, rows, next, group, coef + k * tokens, tokens, n);
    }
    for (; k < count; k++) {
        rows[0] = w + (int64_t)index[k] * stride;
        next[0] = w + (int64_t)index[k + 1 < count ? k + 1 : k] * stride;
        ROWS(y, y_stride, rows, next, 1, coef + k * tokens, tokens, n);
    }
}

static void JOIN(axpy_, NAME)(float *y, int64_t y_stride, const void *w, int64_t stride, const int32_t *index,
                              int64_t count, const float *coef, int tokens, int64_t n) {
    /* The number of tokens is a constant in each of them: their sums stay in registers. */
    switch (tokens) {
        case 1: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 1, GROUP, n); break;
        case 2: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 2, 4, n); break;
        case 3: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 3, 4, n); break;
        case 4: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 4, 4, n); break;
        case 5: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 5, 4, n); break;
        case 6: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 6, 4, n); break;
        case 7: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 7, 4, n); break;
        default: AXPY_TOKENS(y, y_stride, w, stride, index, count, coef, 8, 4, n); break;
    }
}

/* ---- dot: rows of row-major weights with x ---- */

INLINE void DOTS(float *y, int64_t y_stride, const T *const *rows, const int count, const float *x, int64_t x_stride,
                 const int tokens, int64_t n) {
    for (int t = 0; t < tokens; t++) {
        const float *xt = x + t * x_stride;
        VEC even[4], odd[4];
        for (int r = 0; r < count; r++) even[r] = odd[r] = V_SET1(0.0f);
        int64_t j = 0;
        for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) {
            VEC a = V_LOADU(xt + j), b = V_LOADU(xt + j + WIDTH);
            for (int r = 0; r < count; r++) {
                even[r] = V_FMA(LOAD(rows[r] + j), a, even[r]);
                odd[r] = V_FMA(LOAD(rows[r] + j + WIDTH), b, odd[r]);
                if (t == 0) __builtin_prefetch((const char *)(rows[r] + j) + AHEAD, 0, 2);
            }
        }
        for (int r = 0; r < count; r++) {
            float total = V_SUM(V_ADD(even[r], odd[r]));
            for (int64_t rest = j; rest < n; rest++) total = ONE_FMA(ONE(rows[r] + rest), xt[rest], total);
            y[t * y_stride + r] += total;
        }
    }
}

static void JOIN(dot_, NAME)(float *y, int64_t y_stride, const void *w, int64_t stride, const int32_t *rows,
                             int64_t count, const float *x, int64_t x_stride, int tokens, int64_t n) {
    const T *at[4], *base = w;
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        for (int r = 0; r < 4; r++) at[r] = base + (rows ? rows[k + r] : k + r) * stride;
        DOTS(y + k, y_stride, at, 4, x, x_stride, tokens, n);
    }
    for (; k < count; k++) {
        at[0] = base + (rows ? rows[k] : k) * stride;
        DOTS(y + k, y_stride, at, 1, x, x_stride, tokens, n);
    }
}

#undef LOAD
#undef ONE
#undef ROWS
#undef AXPY_TOKENS
#undef DOTS
#undef NAME
#undef T

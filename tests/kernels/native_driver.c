/* Runs the kernels of sparsify_native.h against plain loops in double, for sanitizers and for other processors.
 *
 * Every buffer is a block of its own that ends where its numbers end, so that an address sanitizer sees each access
 * beside them. The first failed check ends it with status 1. Exact thresholds, bit patterns and large shapes are the
 * Python tests' work.
 */
#include <pthread.h>
#include <sys/mman.h>

#include "native_reference.h"

/* ---- sites ---- */

static void check_site(dice *d, int dtype, int64_t inputs, int64_t tokens, const shape *shapes, int count,
                       int threads) {
    sp_linear l[SP_MAX_SITE];
    void *y[SP_MAX_SITE], *x = numbers(d, dtype, tokens * inputs, 1.0);
    for (int k = 0; k < count; k++) {
        l[k] = make(d, dtype, &shapes[k]);
        y[k] = nans(dtype, tokens * l[k].outputs);
    }
    CHECK(sp_site(dtype, x, inputs, tokens, l, count, y, threads) == SP_OK, "sp_site");
    double *values = room(inputs * 8);
    for (int k = 0; k < count; k++) {
        int64_t outputs = l[k].outputs, kept = 0;
        double *expected = room(outputs * 8), *size = room(outputs * 8);
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t j = 0; j < inputs; j++) values[j] = get(dtype, x, t * inputs + j);
            linear(dtype, &l[k], values, inputs, 0, expected, size, &kept);
            for (int64_t o = 0; o < outputs; o++) {
                /* One rounding of the output, and those of a sum in fp32, which grow as the root of its length. */
                double allowed = EPS[dtype] / 2 * fabs(expected[o]) + SMALLEST[dtype] / 2 +
                                 EPS[SP_F32] * (2.0 + sqrt((double)(inputs + l[k].rank))) * size[o];
                double found = get(dtype, y[k], t * outputs + o);
                CHECK(fabs(found - expected[o]) <= allowed,
                      "%s, linear %d of %d [%lld, %lld], rank %lld, token %lld of %lld, output %lld: %g, not %g",
                      DTYPE[dtype], k, count, (long long)outputs, (long long)inputs, (long long)l[k].rank, (long long)t,
                      (long long)tokens, (long long)o, found, expected[o]);
            }
        }
        CHECK(*l[k].kept == kept, "%lld counted, %lld kept", (long long)*l[k].kept, (long long)kept);
        free(expected), free(size), free(y[k]);
        drop(&l[k]);
    }
    free(values), free(x);
}

static void check_sites(uint64_t seed) {
    static const int64_t shapes[][2] = {{1, 1}, {1, 13}, {7, 1}, {3, 5}, {17, 31}, {33, 8}, {70, 45}, {1101, 9}};
    static const double thresholds[] = {0.6, -1.0, 2.5, INFINITY};
    dice d = {seed};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int dtype = SP_F32; dtype <= SP_F16; dtype++)
            for (int64_t tokens = 1; tokens <= SP_MAX_TOKENS; tokens++) {
                shape s[3];
                int count = 1 + (int)(roll(&d) % 3);
                for (int k = 0; k < count; k++)
                    s[k] = (shape){.outputs = k ? 1 + (int64_t)(roll(&d) % 40) : shapes[i][0],
                                   .inputs = shapes[i][1],
                                   .rank = (int64_t)(roll(&d) % 4) * (int64_t)(roll(&d) % 3),
                                   .gap = (int64_t)(roll(&d) % 2) * 3,
                                   .by_rows = roll(&d) % 2,
                                   .bias = roll(&d) % 2,
                                   .scaled = roll(&d) % 2,
                                   .sparse = roll(&d) % 4 > 0,
                                   .threshold = thresholds[roll(&d) % 4]};
                check_site(&d, dtype, shapes[i][1], tokens, s, count, 1 + (int)(roll(&d) % 3));
            }
}

/* ---- the gated MLP ---- */

static double activated(int activation, double cut, double g) {
    switch (activation) {
        case SP_SILU: return g / (1.0 + exp(-g));
        case SP_GELU_TANH: return 0.5 * g * (1.0 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
        case SP_GELU: return 0.5 * g * (1.0 + erf(g * sqrt(0.5)));
        default: return g > cut ? g : 0.0;
    }
}

typedef struct {
    const sp_linear *gate, *up, *down;
    int activation;
    double cut;
    int64_t *kept; /* of gate, up, down */
} mlp_parts;

/* y [outputs] of one token, rounded where the modules round. */
static void mlp(int dtype, const mlp_parts *m, const double *x, int64_t inputs, int run_dense, double *y) {
    int64_t size = m->gate->outputs;
    double *gate = room(size * 8), *up = room(size * 8);
    linear(dtype, m->gate, x, inputs, run_dense, gate, NULL, &m->kept[0]);
    linear(dtype, m->up, x, inputs, run_dense, up, NULL, &m->kept[1]);
    for (int64_t i = 0; i < size; i++) {
        double active = rounded(dtype, activated(m->activation, m->cut, rounded(dtype, gate[i])));
        gate[i] = rounded(dtype, active * rounded(dtype, up[i]));
    }
    linear(dtype, m->down, gate, size, run_dense, y, NULL, &m->kept[2]);
    for (int64_t o = 0; o < m->down->outputs; o++) y[o] = rounded(dtype, y[o]);
    free(gate), free(up);
}

/* The norm of the error over that of what is right. In half precision some values round to their neighbour and every
 * layer takes that further: four or five steps of the dtype. fp32 shows the mistakes that those would hide. */
static void check_near(int dtype, const void *found, const double *expected, int64_t count, const char *what) {
    static const double tolerance[] = {1e-5, 3e-2, 5e-3};
    double wrong = 0.0, size = 1e-30;
    for (int64_t i = 0; i < count; i++) {
        double value = get(dtype, found, i);
        wrong += (value - expected[i]) * (value - expected[i]);
        size += expected[i] * expected[i];
    }
    CHECK(sqrt(wrong / size) <= tolerance[dtype], "%s in %s: error %g", what, DTYPE[dtype], sqrt(wrong / size));
}

static void check_mlps(uint64_t seed) {
    static const int64_t sizes[][3] = {{1, 1, 1}, {5, 7, 3}, {20, 33, 9}, {37, 150, 45}};
    dice d = {seed};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int run = 0; run < 3 * SP_MAX_TOKENS * 5; run++) {
            int dtype = run % 3, tokens = 1 + run / 3 % SP_MAX_TOKENS, way = run / 24, sparse = roll(&d) % 2;
            int activation = way < 4 ? way : SP_RELU;
            float cut = way == 4 ? 0.3f : 0.0f;
            int64_t inputs = sizes[i][0], rank = (int64_t)(roll(&d) % 2) * 2;
            shape s = {.outputs = sizes[i][1], .inputs = inputs, .rank = rank, .bias = roll(&d) % 2, .sparse = sparse,
                       .threshold = 0.2, .fixed = dtype != SP_F32, .scaled = roll(&d) % 2, .gap = 1};
            shape out = {.outputs = sizes[i][2], .inputs = sizes[i][1], .rank = rank, .bias = 1, .sparse = sparse,
                         .threshold = 0.02, .fixed = dtype != SP_F32};
            sp_linear gate = make(&d, dtype, &s);
            s.by_rows = roll(&d) % 2;
            s.rank = s.by_rows ? 0 : rank;
            sp_linear up = make(&d, dtype, &s), down = make(&d, dtype, &out);
            void *x = numbers(&d, dtype, tokens * inputs, 1.0), *y = nans(dtype, tokens * down.outputs);
            double *values = room(inputs * 8), *expected = room(tokens * down.outputs * 8);
            int64_t kept[3] = {0};
            mlp_parts parts = {&gate, &up, &down, activation, cut, kept};
            for (int64_t t = 0; t < tokens; t++) {
                for (int64_t j = 0; j < inputs; j++) values[j] = get(dtype, x, t * inputs + j);
                mlp(dtype, &parts, values, inputs, 0, expected + t * down.outputs);
            }
            int threads = 1 + (int)(roll(&d) % 3);
            CHECK(sp_mlp(dtype, activation, cut, x, inputs, tokens, &gate, &up, &down, y, threads) == SP_OK, "sp_mlp");
            check_near(dtype, y, expected, tokens * down.outputs, "MLP");
            CHECK(*gate.kept == kept[0] && *up.kept == kept[1], "kept");
            /* Numbers without meaning pass through without a step that has none in C. */
            for (int64_t j = 0; j < tokens * inputs; j++) put(dtype, x, j, j % 3 ? NAN : -INFINITY);
            CHECK(sp_mlp(dtype, activation, cut, x, inputs, tokens, &gate, &up, &down, y, threads) == SP_OK, "sp_mlp");
            if (inputs > 1) CHECK(isnan(get(dtype, y, 0)), "NaN is lost: %g", get(dtype, y, 0));
            drop(&gate), drop(&up), drop(&down);
            free(x), free(y), free(values), free(expected);
        }
}

/* ---- a decoder of two blocks ---- */

enum { D = 24, HEADS = 4, KV = 2, HEAD = 6, BLOCKS = 2, CAPACITY = 100 };
/* Inner size and vocabulary: the MLP, the logits or the heads are the widest. */
static const int64_t WIDTHS[][2] = {{40, 53}, {40, 301}, {7, 5}};

typedef struct {
    sp_decoder m;
    sp_block block[BLOCKS];
    int64_t kept[BLOCKS][7];
    double *keys[BLOCKS], *values[BLOCKS]; /* the reference's own cache, [T, KV, CAPACITY, HEAD] */
} model;

static void norm(int dtype, const double *x, const void *weight, int64_t n, double epsilon, double *out) {
    double squares = 0.0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    double by = 1.0 / sqrt(squares / (double)n + epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = rounded(dtype, rounded(dtype, x[i] * by) * get(dtype, weight, i));
}

/* Norm where there is one, and rotation, in place. */
static void turn(const model *m, double *x, const void *weight, const void *cosine, const void *sine) {
    int dtype = (int)m->m.dtype;
    double out[HEAD];
    if (weight) norm(dtype, x, weight, HEAD, m->m.epsilon, x);
    for (int i = 0; i < HEAD; i++) {
        double other = (i < HEAD / 2 ? -x[i + HEAD / 2] : x[i - HEAD / 2]) * get(dtype, sine, i);
        out[i] = rounded(dtype, rounded(dtype, x[i] * get(dtype, cosine, i)) + rounded(dtype, other));
    }
    memcpy(x, out, sizeof out);
}

static void project(int dtype, const sp_linear *l, const double *x, int64_t inputs, int run_dense, double *y,
                    int64_t *kept) {
    linear(dtype, l, x, inputs, run_dense, y, NULL, kept);
    for (int64_t o = 0; o < l->outputs; o++) y[o] = rounded(dtype, y[o]);
}

/* One token of sequence t through one block. */
static void run_block(model *m, int b, int t, double *hidden, const void *cosine, const void *sine, int run_dense) {
    const sp_block *block = &m->block[b];
    int dtype = (int)m->m.dtype;
    int64_t *kept = m->kept[b], length = block->length;
    double x[D], q[HEADS * HEAD], k[KV * HEAD], v[KV * HEAD], mixed[HEADS * HEAD], y[D];
    norm(dtype, hidden, block->attention_norm, D, m->m.epsilon, x);
    project(dtype, &block->q, x, D, run_dense, q, &kept[0]);
    project(dtype, &block->k, x, D, run_dense, k, &kept[1]);
    project(dtype, &block->v, x, D, run_dense, v, &kept[2]);
    for (int h = 0; h < KV; h++) {
        turn(m, k + h * HEAD, block->k_norm, cosine, sine);
        int64_t at = ((int64_t)(t * KV + h) * CAPACITY + length) * HEAD;
        memcpy(m->keys[b] + at, k + h * HEAD, sizeof(double) * HEAD);
        memcpy(m->values[b] + at, v + h * HEAD, sizeof(double) * HEAD);
    }
    for (int h = 0; h < HEADS; h++) {
        turn(m, q + h * HEAD, block->q_norm, cosine, sine);
        int64_t at = (int64_t)(t * KV + h / (HEADS / KV)) * CAPACITY * HEAD;
        double total = 0.0, *out = mixed + h * HEAD;
        memset(out, 0, sizeof(double) * HEAD);
        for (int64_t i = 0; i <= length; i++) {
            double score = 0.0;
            for (int e = 0; e < HEAD; e++) score += q[h * HEAD + e] * m->keys[b][at + i * HEAD + e];
            score = exp(score * m->m.scaling);
            total += score;
            for (int e = 0; e < HEAD; e++) out[e] += score * m->values[b][at + i * HEAD + e];
        }
        for (int e = 0; e < HEAD; e++) out[e] = rounded(dtype, out[e] / total);
    }
    project(dtype, &block->o, mixed, HEADS * HEAD, run_dense, y, &kept[3]);
    for (int i = 0; i < D; i++) hidden[i] = rounded(dtype, hidden[i] + y[i]);
    norm(dtype, hidden, block->mlp_norm, D, m->m.epsilon, x);
    mlp_parts parts = {&block->gate, &block->up, &block->down, (int)m->m.activation, 0.0, &kept[4]};
    mlp(dtype, &parts, x, D, run_dense, y);
    for (int i = 0; i < D; i++) hidden[i] = rounded(dtype, hidden[i] + y[i]);
}

static void make_model(dice *d, model *m, int dtype, int tokens, int64_t inner, int64_t vocabulary) {
    const int64_t sizes[7][2] = {{HEADS * HEAD, D}, {KV * HEAD, D}, {KV * HEAD, D}, {D, HEADS * HEAD},
                                        {inner, D},        {inner, D},     {D, inner}};
    int normed = roll(d) % 2;
    memset(m, 0, sizeof *m);
    m->m = (sp_decoder){.dtype = dtype, .hidden = D, .heads = HEADS, .kv_heads = KV, .head_dim = HEAD, .inner = inner,
                        .vocabulary = vocabulary, .blocks = BLOCKS, .activation = (int64_t)(roll(d) % 4),
                        .epsilon = 1e-5, .scaling = 1.0 / sqrt(HEAD), .block = m->block};
    m->m.embedding = numbers(d, dtype, vocabulary * D, 1.0);
    m->m.norm = numbers(d, dtype, D, 1.0);
    shape head = {.outputs = vocabulary, .inputs = D, .by_rows = roll(d) % 4 == 0, .sparse = roll(d) % 2,
                  .threshold = 0.1, .fixed = dtype != SP_F32};
    m->m.head = make(d, dtype, &head);
    for (int b = 0; b < BLOCKS; b++) {
        sp_block *block = &m->block[b];
        block->attention_norm = numbers(d, dtype, D, 1.0);
        block->mlp_norm = numbers(d, dtype, D, 1.0);
        block->q_norm = normed ? numbers(d, dtype, HEAD, 1.0) : NULL;
        block->k_norm = normed ? numbers(d, dtype, HEAD, 1.0) : NULL;
        for (int i = 0; i < 7; i++) {
            shape s = {.outputs = sizes[i][0], .inputs = sizes[i][1], .rank = (int64_t)(roll(d) % 3),
                       .bias = roll(d) % 2, .scaled = roll(d) % 2, .sparse = roll(d) % 4 > 0,
                       .threshold = i == 6 ? 0.05 : 0.3, .by_rows = roll(d) % 2, .fixed = dtype != SP_F32};
            block->linear[i] = make(d, dtype, &s);
        }
        block->head_stride = CAPACITY * HEAD;
        block->sequence_stride = KV * block->head_stride;
        int64_t count = tokens * block->sequence_stride;
        block->keys = numbers(d, dtype, count, 1.0);
        block->values = numbers(d, dtype, count, 1.0);
        m->keys[b] = room(count * 8), m->values[b] = room(count * 8);
        for (int64_t i = 0; i < count; i++) {
            m->keys[b][i] = get(dtype, block->keys, i);
            m->values[b][i] = get(dtype, block->values, i);
        }
    }
}

static void drop_model(model *m) {
    for (int b = 0; b < BLOCKS; b++) {
        sp_block *block = &m->block[b];
        for (int i = 0; i < 7; i++) drop(&block->linear[i]);
        free((void *)block->attention_norm), free((void *)block->mlp_norm);
        free((void *)block->q_norm), free((void *)block->k_norm);
        free(block->keys), free(block->values), free(m->keys[b]), free(m->values[b]);
    }
    drop(&m->m.head);
    free((void *)m->m.embedding), free((void *)m->m.norm);
}

static void check_step(dice *d, model *m, int tokens, int run_dense, int threads) {
    int dtype = (int)m->m.dtype;
    int64_t token[SP_MAX_TOKENS], head_kept = 0, vocabulary = m->m.vocabulary;
    void *cosine = nans(dtype, HEAD), *sine = nans(dtype, HEAD), *logits = nans(dtype, tokens * vocabulary);
    double *expected = room(tokens * vocabulary * 8), hidden[D], x[D];
    for (int i = 0; i < HEAD; i++) {
        double angle = (double)m->block[0].length * pow(0.3, i % (HEAD / 2));
        put(dtype, cosine, i, cos(angle)), put(dtype, sine, i, sin(angle));
    }
    for (int t = 0; t < tokens; t++) {
        token[t] = (int64_t)(roll(d) % vocabulary);
        for (int i = 0; i < D; i++) hidden[i] = get(dtype, m->m.embedding, token[t] * D + i);
        for (int b = 0; b < BLOCKS; b++) run_block(m, b, t, hidden, cosine, sine, run_dense);
        norm(dtype, hidden, m->m.norm, D, m->m.epsilon, x);
        project(dtype, &m->m.head, x, D, run_dense, expected + t * vocabulary, &head_kept);
    }
    CHECK(sp_decode(&m->m, token, tokens, cosine, sine, run_dense, logits, threads) == SP_OK, "sp_decode");
    check_near(dtype, logits, expected, tokens * vocabulary, "logits");
    for (int b = 0; b < BLOCKS; b++) {
        sp_block *block = &m->block[b];
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < KV; h++) {
                int64_t at = t * block->sequence_stride + h * block->head_stride + block->length * HEAD;
                int64_t size = size_of(dtype);
                check_near(dtype, (char *)block->keys + at * size, m->keys[b] + at, HEAD, "new keys");
                check_near(dtype, (char *)block->values + at * size, m->values[b] + at, HEAD, "new values");
                /* The next step starts from one cache, so that nothing adds up. */
                for (int e = 0; e < HEAD; e++) {
                    m->keys[b][at + e] = get(dtype, block->keys, at + e);
                    m->values[b][at + e] = get(dtype, block->values, at + e);
                }
            }
        for (int i = 0; i < 7; i++)
            CHECK(dtype != SP_F32 || *block->linear[i].kept == m->kept[b][i], "linear %d: %lld counted, %lld kept", i,
                  (long long)*block->linear[i].kept, (long long)m->kept[b][i]);
        block->length++;
    }
    free(cosine), free(sine), free(logits), free(expected);
}

static void check_decoders(uint64_t seed) {
    dice d = {seed};
    for (int dtype = SP_F32; dtype <= SP_F16; dtype++)
        for (int run = 0; run < 9; run++) {
            static const int counts[] = {1, 3, SP_MAX_TOKENS};
            int tokens = counts[run / 3];
            model m;
            make_model(&d, &m, dtype, tokens, WIDTHS[run % 3][0], WIDTHS[run % 3][1]);
            for (int step = 0; step < 6; step++) {
                /* The first steps have no past; the last ones one that is longer than any linear's input. */
                for (int b = 0; b < BLOCKS && step == 3; b++) m.block[b].length = CAPACITY - 3;
                check_step(&d, &m, tokens, step % 3 == 1, 1 + (int)(roll(&d) % 3));
            }
            int64_t beyond = m.m.vocabulary;
            CHECK(sp_decode(&m.m, &beyond, 1, NULL, NULL, 0, NULL, 1) == SP_BAD_ARGUMENT, "a token that there is not");
            drop_model(&m);
        }
}

/* ---- memory ---- */

/* What a file holds is still there when its memory was given back, from wherever on. */
static void check_mapped(void) {
    enum { SIZE = 50000 };
    FILE *file = tmpfile();
    CHECK(file, "no temporary file");
    for (int i = 0; i < SIZE; i++) fputc(i % 251, file);
    fflush(file);
    unsigned char *data = mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    CHECK(data != MAP_FAILED, "mmap");
    for (int at = 0; at <= SIZE; at += 4091) {
        CHECK(sp_forget_mapped(data + at, SIZE - at) == SP_OK, "sp_forget_mapped");
        for (int i = 0; i < SIZE; i++) CHECK(data[i] == i % 251, "byte %d of a file", i);
    }
    munmap(data, SIZE);
    fclose(file);
}

static void check_memory(uint64_t seed) {
    static const int64_t sizes[] = {0, 1, 7, 8, 9, 63, 64, 65, 255, 256, 1000, 4096, 70001};
    static const int64_t shapes[][2] = {{0, 3}, {1, 1}, {1, 70}, {70, 1}, {3, 5}, {64, 64}, {65, 129}, {200, 63}};
    dice d = {seed};
    for (int threads = 3; threads >= 1; threads--) {
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            unsigned char *data = room(sizes[i]);
            uint64_t sum = 0;
            for (int64_t j = 0; j < sizes[i]; j++) {
                data[j] = (unsigned char)roll(&d);
                sum += (uint64_t)data[j] << j % 8 * 8;
            }
            CHECK(sp_read(data, sizes[i], threads) == (int64_t)(sum >> 1), "%lld bytes", (long long)sizes[i]);
            free(data);
        }
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            for (int64_t size = 2; size <= 4; size += 2) {
                int64_t rows = shapes[i][0], columns = shapes[i][1];
                unsigned char *data = room(rows * columns * size), *out = room(rows * columns * size);
                for (int64_t j = 0; j < rows * columns * size; j++) data[j] = (unsigned char)roll(&d);
                CHECK(sp_transpose(data, out, rows, columns, size, threads) == SP_OK, "sp_transpose");
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < columns; c++)
                        CHECK(!memcmp(out + (c * rows + r) * size, data + (r * columns + c) * size, (size_t)size),
                              "[%lld, %lld] of %lld bytes", (long long)rows, (long long)columns, (long long)size);
                free(data), free(out);
            }
    }
    check_mapped();
}

/* ---- all of it ---- */

static void *another_thread(void *argument) {
    check_sites(*(const uint64_t *)argument);
    return NULL;
}

/* Of every instruction set that the machine has, or of those whose names are given. */
int main(int count, char **names) {
    CHECK(sp_abi() == SP_ABI, "another version");
    CHECK(sp_sizeof(0) == sizeof(sp_linear) && sp_sizeof(1) == sizeof(sp_block), "sizes");
    CHECK(sp_sizeof(2) == sizeof(sp_decoder), "size");
    /* Before an instruction set is chosen by name: the threads find the best one by themselves. */
    check_memory(1);
    check_sites(2);
    for (int i = 0; sp_isa(i); i++) {
        int wanted = count == 1;
        for (int k = 1; k < count; k++) wanted |= !strcmp(names[k], sp_isa(i));
        if (!wanted) continue;
        CHECK(sp_use_isa(sp_isa(i)) == SP_OK, "%s", sp_isa(i));
        check_memory(3);
        check_sites(4);
        check_mlps(5);
        check_decoders(6);
        printf("%s passed\n", sp_isa(i));
    }
    pthread_t threads[3];
    uint64_t seeds[] = {7, 8, 9};
    for (int i = 0; i < 3; i++) CHECK(!pthread_create(&threads[i], NULL, another_thread, &seeds[i]), "no thread");
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    printf("threads passed\n");
    return 0;
}

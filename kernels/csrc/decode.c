/* One step of a whole decoder in one call: what a token costs besides its weights is a few barriers a block.
 *
 * Values are rounded to dtype where transformers' modules round them (after each linear, norm, rotation, product and
 * residual sum), so that logits differ from theirs by the order of fp32 sums only.
 */
#include <math.h>
#include <string.h>

#include "mlp.h"

typedef struct {
    const sp_decoder *model;
    const int64_t *token;
    int64_t tokens;
    const void *cosine, *sine;
    int run_dense;
    void *logits;
    int64_t longest; /* keys that a head sees, with this one */
    int64_t rank, inputs, partial;
} step;

/* What the team shares. */
typedef struct {
    float *hidden;           /* [T, D], the residual stream */
    float *q, *k, *v;        /* [T, heads * head_dim] */
    float *low[4];           /* of q, k, v, o: [T, R] */
    float *attended;         /* [T, heads * head_dim] */
    float *out;              /* [T, D] */
    float *logits;           /* [T, vocabulary] */
    sp_gated_room mlp;
} step_room;

/* What each thread has. */
typedef struct {
    sp_work work;
    float *x;      /* [T, inputs], a normed input */
    float *weight; /* a norm's, widened */
    float *cosine, *sine, *key, *query, *scores, *wide;
    float *partial; /* what sp_partial needs */
} step_own;

static sp_gated gated(const sp_decoder *m, const sp_block *b, int run_dense) {
    float cut = b->cut && !run_dense ? *b->cut : 0.0f;
    sp_gated mlp = {(int)m->dtype, (int)m->activation, cut, &b->gate, &b->up, &b->down};
    return mlp;
}

/* The room of the block whose MLP needs most: ranks differ from block to block. */
static size_t largest_mlp(const sp_decoder *m, int64_t tokens) {
    size_t most = 0;
    for (int64_t b = 0; b < m->blocks; b++) {
        sp_gated mlp = gated(m, &m->block[b], 1);
        size_t size = sp_gated_size(&mlp, tokens);
        most = size > most ? size : most;
    }
    return most;
}

static size_t room_in(char **memory, step_room *room, const step *s) {
    const sp_decoder *m = s->model;
    char *start = *memory;
    int64_t T = s->tokens, wide = m->heads * m->head_dim, narrow = m->kv_heads * m->head_dim;
    room->hidden = sp_carve(memory, T * m->hidden, 4);
    room->q = sp_carve(memory, T * wide, 4);
    room->k = sp_carve(memory, T * narrow, 4);
    room->v = sp_carve(memory, T * narrow, 4);
    for (int i = 0; i < 4; i++) room->low[i] = sp_carve(memory, T * s->rank, 4);
    room->attended = sp_carve(memory, T * wide, 4);
    room->out = sp_carve(memory, T * m->hidden, 4);
    room->logits = sp_carve(memory, T * m->vocabulary, 4);
    return (size_t)(*memory - start);
}

static size_t own_in(char **memory, step_own *own, const step *s, int carve) {
    const sp_decoder *m = s->model;
    char *start = *memory;
    if (carve) own->work = sp_work_in(memory, s->inputs, s->rank, s->tokens);
    else *memory += sp_work_size(s->inputs, s->rank, s->tokens);
    own->x = sp_carve(memory, s->tokens * m->hidden, 4);
    own->weight = sp_carve(memory, m->hidden > m->head_dim ? m->hidden : m->head_dim, 4);
    own->cosine = sp_carve(memory, m->head_dim, 4);
    own->sine = sp_carve(memory, m->head_dim, 4);
    own->key = sp_carve(memory, m->head_dim, 4);
    own->query = sp_carve(memory, m->head_dim, 4);
    own->wide = sp_carve(memory, m->head_dim, 4);
    own->scores = sp_carve(memory, s->longest, 4);
    own->partial = sp_carve(memory, s->partial, 4);
    return (size_t)(*memory - start);
}

/* out = weight * round(x / rms(x)), rounded: transformers' RMSNorm. */
static void norm(const step *s, const step_own *own, const float *x, const void *weight, int64_t n, float *out) {
    const sp_kernels *table = sp_table();
    int dtype = (int)s->model->dtype;
    float by = 1.0f / sqrtf(table->sum_of_squares(x, n) / (float)n + (float)s->model->epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * by;
    table->round[dtype](out, n);
    table->widen[dtype](own->weight, weight, n);
    table->multiply(out, own->weight, n);
    table->round[dtype](out, n);
}

/* y = W x of several linears that share x, rounded; each thread ends with its share of each y. */
static void project(const step *s, const step_own *own, const step_room *room, const sp_member *member, const float *x,
                    int64_t inputs, const sp_linear *const *linear, float *const *y, int count) {
    int dtype = (int)s->model->dtype, any = 0;
    float *partial = own->partial;
    for (int i = 0; i < count; i++) {
        if (member->thread == 0) sp_count(linear[i], x, inputs, s->tokens, s->run_dense);
        if (!sp_has_low_rank(linear[i], s->run_dense)) continue;
        sp_low_rank(&own->work, member, dtype, x, inputs, s->tokens, linear[i], room->low[i]);
        any = 1;
    }
    if (any) sp_barrier(member);
    for (int i = 0; i < count; partial += s->tokens * linear[i]->outputs, i++)
        sp_partial(&own->work, member, dtype, x, inputs, s->tokens, linear[i], s->run_dense, room->low[i], partial, y[i]);
    sp_barrier(member);
    partial = own->partial;
    for (int i = 0; i < count; partial += s->tokens * linear[i]->outputs, i++) {
        int64_t begin, end;
        sp_finish(member, dtype, linear[i], s->tokens, partial, y[i], &begin, &end);
        for (int64_t t = 0; t < s->tokens && begin < end; t++)
            sp_table()->round[dtype](y[i] + t * linear[i]->outputs + begin, end - begin);
    }
}

/* x * cos + rotate_half(x) * sin, rounded as three operations are. */
static void rotate(const step *s, const step_own *own, const float *x, float *out) {
    int64_t n = s->model->head_dim, half = n / 2;
    int dtype = (int)s->model->dtype;
    const sp_kernels *table = sp_table();
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] * own->cosine[i];
        own->wide[i] = (i < half ? -x[i + half] : x[i - half]) * own->sine[i];
    }
    table->round[dtype](out, n);
    table->round[dtype](own->wide, n);
    for (int64_t i = 0; i < n; i++) out[i] += own->wide[i];
    table->round[dtype](out, n);
}

/* One query head of one token: its key head's new key and value, the scores over the cache, the mix of values. */
static void attend(const step *s, const step_own *own, const step_room *room, const sp_block *block, int64_t t,
                   int64_t head) {
    const sp_decoder *m = s->model;
    const sp_kernels *table = sp_table();
    int dtype = (int)m->dtype;
    int64_t n = m->head_dim, group = m->heads / m->kv_heads, kv = head / group, before = block->length;
    int64_t at = t * block->sequence_stride + kv * block->head_stride;
    char *keys = (char *)block->keys + at * sp_size_of(dtype), *values = (char *)block->values + at * sp_size_of(dtype);
    const float *q = room->q + (t * m->heads + head) * n, *k = room->k + (t * m->kv_heads + kv) * n;
    const float *v = room->v + (t * m->kv_heads + kv) * n;
    float *out = room->attended + (t * m->heads + head) * n, *scores = own->scores;
    if (block->k_norm) {
        norm(s, own, k, block->k_norm, n, own->query);
        rotate(s, own, own->query, own->key);
    } else {
        rotate(s, own, k, own->key);
    }
    if (head % group == 0) {
        table->narrow[dtype](keys + before * n * sp_size_of(dtype), own->key, n);
        table->narrow[dtype](values + before * n * sp_size_of(dtype), v, n);
    }
    if (block->q_norm) {
        norm(s, own, q, block->q_norm, n, out);
        rotate(s, own, out, own->query);
    } else {
        rotate(s, own, q, own->query);
    }
    memset(scores, 0, (size_t)(before + 1) * sizeof(float));
    /* The new key comes from this thread's own copy: another one may be writing it to the cache right now. */
    table->dot[dtype](scores, before, keys, n, NULL, before, own->query, n, 1, n);
    for (int64_t i = 0; i < n; i++) scores[before] += own->query[i] * own->key[i];
    for (int64_t i = 0; i <= before; i++) scores[i] *= (float)m->scaling;
    float by = 1.0f / table->softmax(scores, before + 1);
    /* As torch's attention does before it multiplies by the values. */
    table->round[dtype](scores, before + 1);
    memset(out, 0, (size_t)n * sizeof(float));
    for (int64_t i = 0; i < before; i += s->inputs) {
        int64_t count = before - i < s->inputs ? before - i : s->inputs;
        table->axpy[dtype](out, n, values + i * n * sp_size_of(dtype), n, own->work.count_up, count, scores + i, 1, n);
    }
    for (int64_t i = 0; i < n; i++) out[i] = (out[i] + scores[before] * v[i]) * by;
    table->round[dtype](out, n);
}

/* hidden += out for this thread's columns, rounded. */
static void add(const step *s, const step_room *room, const float *out, int64_t begin, int64_t end) {
    int64_t n = s->model->hidden;
    for (int64_t t = 0; t < s->tokens && begin < end; t++) {
        float *hidden = room->hidden + t * n;
        for (int64_t i = begin; i < end; i++) hidden[i] += out[t * n + i];
        sp_table()->round[s->model->dtype](hidden + begin, end - begin);
    }
}

static void run_block(const step *s, const step_own *own, const step_room *room, const sp_member *member,
                      const sp_block *block) {
    const sp_decoder *m = s->model;
    int64_t D = m->hidden, begin, end;
    const sp_linear *const qkv[] = {&block->q, &block->k, &block->v}, *const o[] = {&block->o};
    float *const y[] = {room->q, room->k, room->v}, *const out[] = {room->out};
    for (int64_t t = 0; t < s->tokens; t++) norm(s, own, room->hidden + t * D, block->attention_norm, D, own->x + t * D);
    project(s, own, room, member, own->x, D, qkv, y, 3);
    sp_barrier(member);
    int64_t units = s->tokens * m->heads;
    for (int64_t u = units * member->thread / member->threads; u < units * (member->thread + 1) / member->threads; u++)
        attend(s, own, room, block, u / m->heads, u % m->heads);
    sp_barrier(member);
    project(s, own, room, member, room->attended, m->heads * m->head_dim, o, out, 1);
    sp_share(member, D, &begin, &end);
    add(s, room, room->out, begin, end);
    sp_barrier(member);
    for (int64_t t = 0; t < s->tokens; t++) norm(s, own, room->hidden + t * D, block->mlp_norm, D, own->x + t * D);
    sp_gated mlp = gated(m, block, s->run_dense);
    sp_gated_part(&mlp, &room->mlp, &own->work, member, own->x, D, s->tokens, s->run_dense, own->partial, &begin,
                  &end);
    add(s, room, room->mlp.out, begin, end);
    sp_barrier(member);
}

static void step_part(void *argument, sp_member *member) {
    const step *s = argument;
    const sp_decoder *m = s->model;
    const sp_kernels *table = sp_table();
    int dtype = (int)m->dtype;
    char *mine = member->own, *shared = member->shared;
    step_room room;
    step_own own;
    own_in(&mine, &own, s, 1);
    room_in(&shared, &room, s);
    table->widen[dtype](own.cosine, s->cosine, m->head_dim);
    table->widen[dtype](own.sine, s->sine, m->head_dim);
    if (member->thread == 0)
        for (int64_t t = 0; t < s->tokens; t++)
            table->widen[dtype](room.hidden + t * m->hidden, sp_at(m->embedding, s->token[t] * m->hidden, dtype), m->hidden);
    sp_barrier(member);
    for (int64_t b = 0; b < m->blocks; b++) {
        char *memory = shared;
        sp_gated mlp = gated(m, &m->block[b], 1);
        room.mlp = sp_gated_room_in(&memory, &mlp, s->tokens);
        run_block(s, &own, &room, member, &m->block[b]);
    }
    for (int64_t t = 0; t < s->tokens; t++)
        norm(s, &own, room.hidden + t * m->hidden, m->norm, m->hidden, own.x + t * m->hidden);
    int64_t begin, end;
    sp_partial(&own.work, member, dtype, own.x, m->hidden, s->tokens, &m->head, s->run_dense, NULL, own.partial, room.logits);
    sp_barrier(member);
    sp_finish(member, dtype, &m->head, s->tokens, own.partial, room.logits, &begin, &end);
    for (int64_t t = 0; t < s->tokens && begin < end; t++) {
        int64_t at = t * m->vocabulary + begin;
        table->narrow[dtype]((char *)s->logits + at * sp_size_of(dtype), room.logits + at, end - begin);
    }
}

/* Elements of the largest sums of a step, over all that is summed between two barriers. */
static int64_t largest_partial(const sp_decoder *m, int64_t tokens) {
    int64_t most = (m->heads + 2 * m->kv_heads) * m->head_dim;
    most = m->hidden > most ? m->hidden : most;
    most = 2 * m->inner > most ? 2 * m->inner : most;
    most = m->vocabulary > most ? m->vocabulary : most;
    return most * tokens;
}

static int64_t largest_rank(const sp_decoder *m) {
    int64_t most = 0;
    for (int64_t b = 0; b < m->blocks; b++) {
        for (int i = 0; i < 7; i++) {
            int64_t rank = m->block[b].linear[i].rank;
            most = rank > most ? rank : most;
        }
    }
    return most;
}

int sp_decode(const sp_decoder *m, const int64_t *tokens, int64_t count, const void *cosine, const void *sine,
              int run_dense, void *logits, int threads) {
    if (count < 1 || count > SP_MAX_TOKENS || m->dtype < SP_F32 || m->dtype > SP_F16 || m->blocks < 1 ||
        m->kv_heads < 1 || m->heads % m->kv_heads || m->head.rank)
        return SP_BAD_ARGUMENT;
    for (int64_t t = 0; t < count; t++)
        if (tokens[t] < 0 || tokens[t] >= m->vocabulary) return SP_BAD_ARGUMENT;
    step s = {m, tokens, count, cosine, sine, run_dense, logits, 0, largest_rank(m), 0, largest_partial(m, count)};
    for (int64_t b = 0; b < m->blocks; b++)
        s.longest = m->block[b].length + 1 > s.longest ? m->block[b].length + 1 : s.longest;
    int64_t wide = m->heads * m->head_dim;
    s.inputs = m->hidden > m->inner ? m->hidden : m->inner;
    s.inputs = wide > s.inputs ? wide : s.inputs;
    step_own own;
    step_room room;
    /* Carved from an address that is never written, for the sizes alone. */
    char line[SP_LINE], *nowhere = line, *elsewhere = line;
    size_t own_bytes = own_in(&nowhere, &own, &s, 0);
    size_t shared_bytes = room_in(&elsewhere, &room, &s) + largest_mlp(m, count);
    return sp_pool_run(step_part, &s, threads, own_bytes, shared_bytes);
}

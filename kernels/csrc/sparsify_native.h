/* The C interface of sparsify's CPU kernels. Plain C11: no Python, no torch.
 *
 * Letters: I inputs, O outputs, R rank, T tokens (1 to SP_MAX_TOKENS), all sizes in elements. Every function returns
 * SP_OK or a negative sp_status; pointers must hold what the structs say: the Python side has checked it.
 */
#ifndef SPARSIFY_NATIVE_H
#define SPARSIFY_NATIVE_H

#include <stdint.h>

/* Raised with every change of a struct or a function here; the Python side refuses another one. */
#define SP_ABI 2
#define SP_MAX_TOKENS 8
#define SP_MAX_SITE 8

#if defined(__GNUC__)
#define SP_EXPORT __attribute__((visibility("default")))
#else
#define SP_EXPORT
#endif

typedef enum { SP_F32 = 0, SP_BF16 = 1, SP_F16 = 2 } sp_dtype;

typedef enum { SP_OK = 0, SP_NO_MEMORY = -1, SP_BAD_ARGUMENT = -2 } sp_status;

/* The function between gate and up. */
typedef enum { SP_SILU = 0, SP_GELU_TANH = 1, SP_RELU = 2, SP_GELU = 3 } sp_activation;

/* One linear: y = W (x * keep) + B A (x * !keep) + bias, keep_j = !(|x_j| * scale_j <= threshold), in fp32. */
typedef struct {
    /* by_rows 0: W[o, j] at weight[j * stride + o] (channel-contiguous). by_rows 1: at weight[o * stride + j]. */
    const void *weight;
    int64_t stride;
    int64_t outputs;
    const void *bias;       /* [O] or NULL */
    const float *threshold; /* one value, or NULL: dense, whatever else is here */
    const float *scale;     /* [I] fp32 or NULL */
    const void *lr_a;       /* A [R, I], row-major */
    const void *lr_b;       /* B [O, R], channel-contiguous: B[o, r] at lr_b[r * O + o] */
    int64_t rank;
    int64_t *kept; /* adds up the channels that each token keeps, or NULL */
    int64_t by_rows;
} sp_linear;

/* One decoder block: RMSNorm, attention with rotary positions and grouped heads, RMSNorm, gated MLP. */
typedef struct {
    const void *attention_norm; /* [D] */
    const void *mlp_norm;       /* [D] */
    const void *q_norm;         /* [head_dim] or NULL */
    const void *k_norm;         /* [head_dim] or NULL */
    union {
        struct {
            sp_linear q, k, v, o, gate, up, down;
        };
        sp_linear linear[7];
    };
    const float *cut; /* FATReLU's, one value, or NULL: 0; a dense step has none, and computes all rows of up */
    /* The cache of this block: [T, kv_heads, capacity, head_dim] by these strides; `length` tokens are there. */
    void *keys;
    void *values;
    int64_t sequence_stride;
    int64_t head_stride;
    int64_t length;
} sp_block;

typedef struct {
    int64_t dtype;
    int64_t hidden, heads, kv_heads, head_dim, inner, vocabulary, blocks;
    int64_t activation;
    double epsilon;
    double scaling; /* of the scores, head_dim^-1/2 */
    const void *embedding; /* [vocabulary, D] */
    const void *norm;      /* [D] */
    sp_linear head;
    sp_block *block;
} sp_decoder;

SP_EXPORT int sp_abi(void);
/* The size of sp_linear, sp_block and sp_decoder, for the Python side to compare with its own. */
SP_EXPORT int64_t sp_sizeof(int which);
/* Name of the instruction set at `index` that this machine can run, the best first; NULL beyond the last. */
SP_EXPORT const char *sp_isa(int index);
/* Uses this instruction set from now on; SP_BAD_ARGUMENT where this machine cannot. */
SP_EXPORT int sp_use_isa(const char *name);
SP_EXPORT const char *sp_isa_in_use(void);
/* CPUs that this process may use: what caps every `threads`. */
SP_EXPORT int sp_cpus(void);

/* y_k [T, O_k] for the linears of one site, all from x [T, I]; everything in dtype, rows contiguous. */
SP_EXPORT int sp_site(int dtype, const void *x, int64_t inputs, int64_t tokens, const sp_linear *linears,
                      int64_t count, void *const *y, int threads);

/* y [T, D] = down(act(gate x) * up x), x [T, D], D = down.outputs. activation SP_RELU with a cut: act(g) = g where
 * g > cut, else 0 (FATReLU); up's rows are then only computed for active neurons where up is by rows. */
SP_EXPORT int sp_mlp(int dtype, int activation, float cut, const void *x, int64_t inputs, int64_t tokens,
                     const sp_linear *gate, const sp_linear *up, const sp_linear *down, void *y, int threads);

/* One step of T sequences: logits [T, vocabulary] in dtype of the tokens [T]; keys and values are appended. cosine and
 * sine are [head_dim] in dtype, of this position. run_dense: every linear as if its threshold were NULL. */
SP_EXPORT int sp_decode(const sp_decoder *decoder, const int64_t *tokens, int64_t count, const void *cosine,
                        const void *sine, int run_dense, void *logits, int threads);

/* Reads bytes [0, size) as fast as it can; the result depends on them all, so that nothing is left out. */
SP_EXPORT int64_t sp_read(const void *data, int64_t size, int threads);

/* Transposes [rows, columns] of elements of 2 or 4 bytes into out [columns, rows]. */
SP_EXPORT int sp_transpose(const void *data, void *out, int64_t rows, int64_t columns, int64_t element_size,
                           int threads);
/* Gives back the memory of whole pages in [data, data + size), which must be a private mapping of a file that nobody
 * wrote to: they are read from the file again when they are touched. */
SP_EXPORT int sp_forget_mapped(const void *data, int64_t size);

#endif

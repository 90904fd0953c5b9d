// Everything between the mixers: norms, quantisation, matrix-vector products,
// embedding rows. Launchers: kernels/src/cuda/dense.rs.
#include "norm.cuh"

// ------------------------------------------------------------------- norms

// RMSNorm (`bias` null, `is_layer` 0) or LayerNorm of rows of x [rows, width],
// `x_stride` elements apart, in the order of kernels/src/ops.rs; with `delta`
// [rows, width], x += delta_scale * delta first, in place. Outputs where not
// null: out (f32, `out_stride` apart; may be x), and the quantised forms of
// [rows, width] in groups of 32 and of 256.
// Bytes: rows * width * (4 read, 8 more with delta, 4 for out, 1.25 for each
// quantised form) + 4 * width. Grid: (rows). Block: 64 to 512 threads.
// Dynamic shared memory: 4 * (width + 48).
extern "C" __global__ void __launch_bounds__(512)
norm_rows(float* x, const float* delta, float delta_scale, const float* weight, const float* bias,
          float epsilon, int is_layer, int width, int x_stride, int out_stride, float* out,
          i8* q_32, float* scales_32, i16* sums_32, i8* q_256, float* scales_256, i16* sums_256) {
    DYNAMIC_SHARED(float, shared);
    const u64 row = blockIdx.x;
    norm_row(x + row * x_stride, delta == nullptr ? nullptr : delta + row * width, delta_scale,
             weight, bias, epsilon, is_layer != 0, width,
             out == nullptr ? nullptr : out + row * out_stride,
             quantised_row<32>(q_32, scales_32, sums_32, row, width),
             quantised_row<256>(q_256, scales_256, sums_256, row, width), shared);
}

// x += scale * delta, both of `count` elements, each product and sum rounded.
// Bytes: 12 * count. Grid: (count / (4 * threads)).
extern "C" __global__ void __launch_bounds__(256)
add_scaled(float* x, const float* delta, float scale, int count) {
    const int first = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (first + j < count) x[first + j] = x[first + j] + scale * delta[first + j];
    }
}

template <int group>
DEVICE void quantise_rows(const float* x, int cols, int stride, i8* q, float* scales, i16* sums) {
    const u64 row = blockIdx.y;
    const QuantisedRow to = quantised_row<group>(q, scales, sums, row, cols);
    const int first = 8 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    float v[8] = {};
    if (first < cols) load_eight(x + row * stride + first, v);
    put_quantised<group>(to, v, first, cols);
}

// Quantises rows of x, `stride` (a multiple of 4) elements apart, in groups:
// q [rows, cols], scales [rows, cols / group], sums [rows, cols / 16]; cols is
// a multiple of the group. Bytes: rows * cols * 5.25.
// Grid: (cols / (8 * threads), rows). Block: whole warps.
extern "C" __global__ void __launch_bounds__(256)
quantise_32(const float* x, int cols, int stride, i8* q, float* scales, i16* sums) {
    quantise_rows<32>(x, cols, stride, q, scales, sums);
}
extern "C" __global__ void __launch_bounds__(256)
quantise_256(const float* x, int cols, int stride, i8* q, float* scales, i16* sums) {
    quantise_rows<256>(x, cols, stride, q, scales, sums);
}

// -------------------------------------------------------------------- gemv

// out[t, m, r] = value + bias[m, r]
struct GemvOut {
    float* out;
    const float* bias;
    int token_stride;

    DEVICE void operator()(int token, int row, float value) const {
        if (bias != nullptr) value = value + bias[row];
        out[static_cast<u64>(token) * token_stride + row] = value;
    }
    // Of matrix `m`.
    DEVICE static GemvOut of(float* out, const float* bias, int token_stride, int matrix_stride,
                             int rows, u64 m) {
        return {out + m * matrix_stride, bias == nullptr ? nullptr : bias + m * rows, token_stride};
    }
};

template <class F>
DEVICE void gemv(const u8* weights, const i8* q, const float* scales, const i16* sums,
                 const float* bias, float* out, int rows, int cols, int tokens, int x_token,
                 int x_matrix, int out_token, int out_matrix) {
    DYNAMIC_SHARED(u8, shared);
    const int blocks = cols / F::LEN, warps = static_cast<int>(blockDim.x) / 32;
    const u64 m = blockIdx.y, at = m * x_matrix;
    const u8* matrix = weights + m * rows * blocks * F::BYTES;
    const Quantised x = {q + at, scales + at / F::LEN, sums + at / 16, x_token};
    const int first = (static_cast<int>(blockIdx.x) * warps + warp_id()) * rows_of_warp(blocks);
    multiply_rows<F>(matrix, rows, blocks, first, tokens, x, Buffers<F>(shared, tokens),
                     GemvOut::of(out, bias, out_token, out_matrix, rows, m));
}

template <class F, int T>
DEVICE void gemv_floats(const u8* weights, const float* x, const float* bias, float* out, int rows,
                        int cols, int tokens, int x_token, int x_matrix, int out_token,
                        int out_matrix) {
    DYNAMIC_SHARED(u8, shared);
    const int warps = static_cast<int>(blockDim.x) / 32;
    const u64 m = blockIdx.y;
    const u8* matrix = weights + m * rows * cols * F::BYTES;
    const int first =
        (static_cast<int>(blockIdx.x) * warps + warp_id()) * FloatStage<F>::WARP_ROWS;
    multiply_float_rows<F, T>(matrix, rows, cols, first, tokens, x + m * x_matrix, x_token, shared,
                              GemvOut::of(out, bias, out_token, out_matrix, rows, m));
}

// out[t, m, r] = sum_c x[t, m, c] * W[m, r, c] + bias[m, r] for tokens 1..=8
// and one or several matrices [rows, cols] that follow each other: token t and
// matrix m have their input at element t * x_token + m * x_matrix (x_matrix 0:
// all the same) and their output at t * out_token + m * out_matrix. `bias`
// may be null. Weights are read once, whatever the number of tokens.
// Bytes: matrices * rows * row bytes, + tokens * (cols * 1.25 + 4 * rows).
// Grid: (rows / rows of a block, matrices), a block having `warps * 32 /
// min(blocks, 8)` rows. Block: 32 to 256 threads. Dynamic shared memory: see
// `Buffers`.
#define GEMV(name, F)                                                                          \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    gemv_##name(const u8* weights, const i8* q, const float* scales, const i16* sums,          \
                const float* bias, float* out, int rows, int cols, int tokens, int x_token,    \
                int x_matrix, int out_token, int out_matrix) {                                 \
        gemv<F>(weights, q, scales, sums, bias, out, rows, cols, tokens, x_token, x_matrix,    \
                out_token, out_matrix);                                                        \
    }
FOR_EACH_QUANTISED(GEMV)

// The same for float formats, whose x is as it is: one token, and up to 8.
#define GEMV_FLOATS(name, F)                                                                   \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    gemv_##name(const u8* weights, const float* x, const float* bias, float* out, int rows,    \
                int cols, int tokens, int x_token, int x_matrix, int out_token,                \
                int out_matrix) {                                                              \
        gemv_floats<F, 1>(weights, x, bias, out, rows, cols, tokens, x_token, x_matrix,        \
                          out_token, out_matrix);                                              \
    }                                                                                          \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    gemv_##name##_many(const u8* weights, const float* x, const float* bias, float* out,       \
                       int rows, int cols, int tokens, int x_token, int x_matrix,              \
                       int out_token, int out_matrix) {                                        \
        gemv_floats<F, 8>(weights, x, bias, out, rows, cols, tokens, x_token, x_matrix,        \
                          out_token, out_matrix);                                              \
    }
FOR_EACH_FLOAT(GEMV_FLOATS)

// -------------------------------------------------------------- transposed

// Columns of a block of threads, one per thread, and rows of a step.
template <class F>
struct Transposed {
    static constexpr int COLS = F::LEN == 256 ? 256 : 64;
    static constexpr int ROWS = 64;
    static constexpr int BYTES = COLS / F::LEN * F::BYTES;
    static constexpr int WORDS = (BYTES + 15 + 15) / 16;  // that cover a row's part
};

template <class F>
DEVICE void transposed(const u8* weights, const float* x, float* out, int rows, int cols,
                       int tokens, int x_token, int x_matrix, int out_token, int out_matrix) {
    typedef Transposed<F> T;
    SHARED(u8, stage, T::ROWS * T::WORDS * 16);
    SHARED(float, factors, 8 * T::ROWS);
    const int me = static_cast<int>(threadIdx.x), first_col = static_cast<int>(blockIdx.x) * T::COLS;
    const int width = cols - first_col < T::COLS ? cols - first_col : T::COLS;
    const u64 m = blockIdx.y, row_bytes = static_cast<u64>(cols / F::LEN) * F::BYTES;
    const u8* matrix = weights + m * rows * row_bytes + first_col / F::LEN * F::BYTES;
    const int part_bytes = width / F::LEN * F::BYTES;
    float acc[8];
#pragma unroll
    for (int t = 0; t < 8; t++) acc[t] = 0.0f;
    for (int first = 0; first < rows; first += T::ROWS) {
        const int count = rows - first < T::ROWS ? rows - first : T::ROWS;
        for (int i = me; i < count * T::WORDS; i += T::COLS) {
            const int r = i / T::WORDS, word = i % T::WORDS;
            const u8* from = matrix + (first + r) * row_bytes;
            const int shift = static_cast<int>(reinterpret_cast<u64>(from) & 15);
            if (16 * word < shift + part_bytes) cp_async_16(stage + 16 * i, from - shift + 16 * word);
        }
        cp_async_commit();
        for (int i = me; i < tokens * T::ROWS; i += T::COLS) {
            const int t = i / T::ROWS, r = i % T::ROWS;
            if (r < count) {
                factors[i] = x[static_cast<u64>(t) * x_token + m * x_matrix + first + r];
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (me < width) {
            for (int r = 0; r < count; r++) {
                const u64 from = reinterpret_cast<u64>(matrix + (first + r) * row_bytes);
                const u8* block = stage + r * T::WORDS * 16 + static_cast<int>(from & 15) +
                                  me / F::LEN * F::BYTES;
                const float w = element<F>(block, me % F::LEN);
#pragma unroll
                for (int t = 0; t < 8; t++) {
                    if (t < tokens) acc[t] = fma_rn(factors[t * T::ROWS + r], w, acc[t]);
                }
            }
        }
        __syncthreads();
    }
    if (me >= width) return;
#pragma unroll
    for (int t = 0; t < 8; t++) {
        if (t < tokens) out[static_cast<u64>(t) * out_token + m * out_matrix + first_col + me] = acc[t];
    }
}

// out[t, m, c] = sum_r x[t, m, r] * W[m, r, c], one fused multiply-add per row
// in index order, W dequantised as kernels/src/dequant.rs has it: the absorbed
// projections of latent attention, a matrix per head. Strides as in gemv;
// tokens 1..=8. Bytes: matrices * rows * row bytes + tokens * matrices * 4 *
// (rows + cols). Grid: (cols / 64, matrices), of 256-blocks (cols / 256,
// matrices). Block: 64 or 256 threads.
#define TRANSPOSED(name, F)                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                          \
    transposed_##name(const u8* weights, const float* x, float* out, int rows, int cols,       \
                      int tokens, int x_token, int x_matrix, int out_token, int out_matrix) {  \
        transposed<F>(weights, x, out, rows, cols, tokens, x_token, x_matrix, out_token,       \
                      out_matrix);                                                             \
    }
FOR_EACH_QUANTISED(TRANSPOSED)
FOR_EACH_FLOAT(TRANSPOSED)

// --------------------------------------------------------------- embedding

// out[t] = row ids[t] of `table` [rows, cols] as floats, times `scale`. An id
// outside the table gives NaN. Bytes: tokens * (row bytes + 4 * cols).
// Grid: (cols / threads, tokens).
template <class F>
DEVICE void embed(const u8* table, const int* ids, int rows, int cols, float scale, float* out) {
    const int col = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const u64 token = blockIdx.y;
    if (col >= cols) return;
    const int id = ids[token];
    float value = float_of(0x7fc00000u);
    if (id >= 0 && id < rows) {
        const u64 block = static_cast<u64>(id) * (cols / F::LEN) + col / F::LEN;
        value = element<F>(table + block * F::BYTES, col % F::LEN);
    }
    out[token * cols + col] = value * scale;
}
#define EMBED(name, F)                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                          \
    embed_##name(const u8* table, const int* ids, int rows, int cols, float scale,             \
                 float* out) {                                                                 \
        embed<F>(table, ids, rows, cols, scale, out);                                          \
    }
FOR_EACH_QUANTISED(EMBED)
FOR_EACH_FLOAT(EMBED)

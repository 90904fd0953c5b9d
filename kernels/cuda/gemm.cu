// Prefill: matrix products of many tokens, plain and grouped by expert.
//
//   gemm_<format>    quantised weights times quantised activations, int8 mma
//   gemm_f32, _f16, _bf16    float weights times f32 activations
//   group_tiles      tokens sorted by expert -> tiles of at most 64 tokens
//   gate_rows        the activation between gate and up, where their formats
//                    differ (else it is part of the product: "pairs")
//
// Answers are the contract's in every bit (docs/architecture.md): gemm_sums.cuh
// says how the eight lanes are kept. So a prompt's answers are those of
// decoding and of the CPU, wherever an expert happens to be.
//
// Tiles. Blocks of 256: 128 rows x 64 tokens (Turing 64 x 64), 8 warps of
// 32 x 32, slabs of 256 columns. Blocks of 32: 64 x 64, 8 warps of 64 x 64,
// each an eighth of a slab. Two buffers of activations; packed weights of the
// next slab come by cp.async while this one is computed. One block a
// multiprocessor by registers (217 to 230 a thread, of which accumulators take
// 128 to 160; ptxas, sm_80) and by shared memory: 8 warps, 17 % of 48, two for
// each scheduler. Shared memory of a block, in bytes:
//   Q2_K 86784  Q3_K 86272  Q4_K 92928  Q5_K 97024  Q6_K 98560  IQ4_XS 88320
//   Q8_0 72704  Q4_0, IQ4_NL, MXFP4 64512  Q4_1 69632  Q5_0 66560  Q5_1 71680
// (Turing 43520 to 56320; shared_bytes of kernels/src/cuda/gemm.rs).
//
// What bounds them, by arithmetic; nothing here was measured. An m16n8k32 is
// 4096 products and takes a scheduler's tensor core 16 cycles on GA10x and
// AD10x, 8 on A100, and about 6.5 on H100 by mma.sync. Beside each one a
// scheduler issues: for blocks of 32 three float operations for each of four
// sums, and about 5 for fragments, scales, copies and unpacking: 17 cycles;
// for blocks of 256 four multiply-adds by the sub-block's scale (at half rate:
// 8 cycles of that pipe; twice that where sub-blocks are 16 long), and an
// eighth of the floats of a block, of copies and of unpacking: 13 (21).
//   share of the mma.sync rate   blocks of 32   of 256, subs of 32   subs of 16
//   GA10x, AD10x                 16/17          16/16                16/21
//   A100                          8/17           8/13                 8/21
//   H100                        6.5/17         6.5/13               6.5/21
// less what is not hidden: unpacking stands between two barriers, about 400
// cycles a slab beside 1700 of computing (0.8). From the L2 cache come, for
// each 1000 products: 24 (4 bits) to 33 bytes (Q8_0) for blocks of 32, 17
// (Q4_K) to 21 (Q6_K) for 256.
//
// Float weights go by fma in the contract's 64 lanes, not by mma: mma would
// round activations to 11 or 8 bits, an error above all others of a layer, and
// an expert's answers would depend on where it is computed. Such matrices are
// small (routers) or rare.
#include "gemm_sums.cuh"

#define FLOAT_ROWS 32
#define FLOAT_TOKENS 8

// ------------------------------------------------------------- tiles of work

// Sorted tokens to tiles.
//   starts  i32 [experts + 1]: positions of an expert's tokens
//   table   u64 [experts]: address of each expert's block, 0 = not resident
//   tiles   i32 [4 + 4 most]: tiles[0] is their number; tile i is (expert,
//           first position, tokens, 0) at 4 + 4 i. Experts that are not
//           resident have none.
// One block of 256 threads. Moves 12 bytes an expert and 16 a tile.
extern "C" __global__ void __launch_bounds__(256)
    group_tiles(const i32* starts, const u64* table, int experts, int most, i32* tiles) {
    SHARED(int, ends, 256);
    const int thread = threadIdx.x;
    int before = 0;
    for (int base = 0; base < experts; base += 256) {
        const int expert = base + thread;
        int first = 0, count = 0;
        if (expert < experts && table[expert] != 0) {
            first = starts[expert];
            count = starts[expert + 1] - first;
        }
        const int own = (count + TILE_TOKENS - 1) / TILE_TOKENS;
        ends[thread] = own;
        __syncthreads();
        for (int step = 1; step < 256; step *= 2) {
            const int add = thread >= step ? ends[thread - step] : 0;
            __syncthreads();
            ends[thread] += add;
            __syncthreads();
        }
        for (int i = 0; i < own; i++) {
            const int at = before + ends[thread] - own + i;
            if (at >= most) break;
            const int left = count - i * TILE_TOKENS;
            i32* tile = tiles + 4 + 4 * at;
            tile[0] = expert;
            tile[1] = first + i * TILE_TOKENS;
            tile[2] = left < TILE_TOKENS ? left : TILE_TOKENS;
            tile[3] = 0;
        }
        before += ends[255];
        __syncthreads();
    }
    if (thread == 0) tiles[0] = before < most ? before : most;
}

// What a launch says of its work, beside weights and activations.
struct Work {
    u64 first, second;  // addresses, or with a table offsets in an expert's block
    const u64* table;   // null without experts
    const i32* tiles;   // of group_tiles; null without experts
    const i32* in_order;   // row of the input at a sorted position; null: the same
    const i32* out_order;  // row of the answer at a sorted position; null: the same
    int pair;
    const float* first_bias;  // [rows], or [experts, rows]; or null
    const float* second_bias;
    int rows, cols, tokens;
};

// This block's tile; count 0 if it has none.
DEVICE Tile tile_of(const Work& work, int rows_of_tile, int index, int* position) {
    Tile tile = {};
    tile.rows = work.rows;
    tile.cols = work.cols;
    tile.pair = work.pair != 0;
    tile.first_row = static_cast<int>(blockIdx.y) * (tile.pair ? rows_of_tile / 2 : rows_of_tile);
    u64 base = 0;
    if (work.tiles) {
        if (index >= work.tiles[0]) return tile;
        tile.expert = work.tiles[4 + 4 * index];
        *position = work.tiles[5 + 4 * index];
        tile.count = work.tiles[6 + 4 * index];
        base = work.table[tile.expert];
        if (base == 0) tile.count = 0;
    } else {
        *position = index * TILE_TOKENS;
        const int left = work.tokens - *position;
        tile.count = left < TILE_TOKENS ? left : TILE_TOKENS;
    }
    tile.first = reinterpret_cast<const u8*>(base + work.first);
    tile.second = reinterpret_cast<const u8*>(base + work.second);
    return tile;
}

// Rows of input and output of a tile's tokens; those behind the last repeat it.
DEVICE void list_rows(const Work& work, const Tile& tile, int position, int* in_row, int* out_row) {
    const int i = threadIdx.x;
    if (i < TILE_TOKENS) {
        const int at = position + (i < tile.count ? i : tile.count - 1);
        in_row[i] = work.in_order ? work.in_order[at] : at;
        out_row[i] = work.out_order ? work.out_order[at] : at;
    }
}

DEVICE const float* bias_of(const float* bias, const Tile& tile) {
    return bias ? bias + static_cast<u64>(tile.expert) * tile.rows : nullptr;
}

template <class F>
DEVICE void product(const Work& work, const Input& input, Answer answer, u8* shared) {
    typedef Layout<F> L;
    int position = 0;
    const Tile tile = tile_of(work, L::ROWS, static_cast<int>(blockIdx.x), &position);
    if (tile.count == 0) return;  // for all threads alike
    int* in_row = reinterpret_cast<int*>(shared + L::IN_ROW);
    int* out_row = reinterpret_cast<int*>(shared + L::OUT_ROW);
    list_rows(work, tile, position, in_row, out_row);
    Slabs<F> slabs(tile, input, shared);
    slabs.find_rows();
    __syncthreads();
    answer.first_bias = bias_of(work.first_bias, tile);
    answer.second_bias = bias_of(work.second_bias, tile);
    answer.out_row = out_row;
    if constexpr (L::WHOLE) {
        Whole<F> sums;
        sums.run(slabs);
        sums.store(tile, answer, reinterpret_cast<float*>(shared));
    } else {
        Eighths<F> sums;
        sums.run(slabs);
        sums.store(tile, answer, reinterpret_cast<float*>(shared));
    }
}

// out[t, r] = W[r] . x[t] (+ bias[r]); with pairs gated(gate[r], up[r]).
//   first, second  addresses of W, or of gate and up [rows, cols]; with a table
//                  offsets in the expert's block. second is read with pairs only
//   q, scales, sums    the quantised input [in rows, cols], per block of the format
//   out            f32 [out rows, rows]
// Without experts row t of input and answers is token t. With them row i of a
// tile is sorted position i, whose input is row in_order[i] (the choice's
// token) and whose answer is row out_order[i].
// Moves rows_of_weights * cols / LEN * BYTES (each expert's once) and, per tile
// of 128 (64) rows, the input: tokens * cols * (1 + 4 / LEN + 1 / 8); 4 bytes an
// answer.
// Grid: tiles of 64 tokens (with experts: as many as there may be) x tiles of
// Layout::ROWS rows, half of that with pairs. 256 threads, Layout::SIZE bytes.
#define GEMM(name, F)                                                                        \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 1) gemm_##name(               \
        u64 first, u64 second, const u64* table, const i32* tiles, const i32* in_order,      \
        const i32* out_order, int pair, int activation, float alpha, float limit,            \
        const float* first_bias, const float* second_bias, const i8* q, const float* scales, \
        const i16* sums, int rows, int cols, int tokens, float* out) {                       \
        DYNAMIC_SHARED(u8, shared);                                                          \
        const Work work = {first, second,     table,       tiles, in_order, out_order,       \
                           pair,  first_bias, second_bias, rows,  cols,     tokens};         \
        const Input input = {q, scales, sums};                                               \
        const Answer answer = {nullptr, nullptr, activation, alpha, limit, out, nullptr};    \
        product<F>(work, input, answer, shared);                                             \
    }
FOR_EACH_QUANTISED(GEMM)

// -------------------------------------------------------------- float weights

// A warp has four rows (two of gate and the same two of up, with pairs) and
// eight tokens at a time; thread l has lanes l and l + 32 of all 32 sums, which
// go to `room` [FLOAT_TOKENS, pitch].
template <class F>
DEVICE void float_sums(const Tile& tile, const float* x, const int* in_row, float* room) {
    const int lane = lane_id();
    const u8* weights[4];
    const float* inputs[FLOAT_TOKENS];
    // Row `m` of the warp in the tile.
    const auto place = [&](int m) {
        return tile.pair ? warp_id() * 2 + (m & 1) + (m & 2) * 8 : warp_id() * 4 + m;
    };
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const int i = place(m);
        const int row = tile.row(i) < tile.rows ? tile.row(i) : tile.rows - 1;
        weights[m] = tile.matrix(i) + static_cast<u64>(row) * tile.cols * F::BYTES;
    }
#pragma unroll
    for (int n = 0; n < FLOAT_TOKENS; n++) {
        inputs[n] = x + static_cast<u64>(in_row[n]) * tile.cols;
    }
    float sums[4][FLOAT_TOKENS][2] = {};
    for (int i = lane; i < tile.cols; i += 64) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (i + 32 * half >= tile.cols) break;
            float w[4];
#pragma unroll
            for (int m = 0; m < 4; m++) {
                w[m] = F::at(weights[m] + static_cast<u64>(i + 32 * half) * F::BYTES);
            }
#pragma unroll
            for (int n = 0; n < FLOAT_TOKENS; n++) {
                const float v = inputs[n][i + 32 * half];
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    sums[m][n][half] = fma_rn(w[m], v, sums[m][n][half]);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < FLOAT_TOKENS; n++) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const float sum = lane_tree_64(sums[m][n][0], sums[m][n][1]);
            if (lane == 0) room[n * sums_pitch(FLOAT_ROWS) + place(m)] = sum;
        }
    }
}

template <class F>
DEVICE void float_product(const Work& work, Answer answer, const float* x) {
    SHARED(int, in_row, TILE_TOKENS);
    SHARED(int, out_row, TILE_TOKENS);
    SHARED(float, room, FLOAT_TOKENS * sums_pitch(FLOAT_ROWS));
    int position = 0;
    const Tile tile = tile_of(work, FLOAT_ROWS, static_cast<int>(blockIdx.x), &position);
    if (tile.count == 0) return;  // for all threads alike
    list_rows(work, tile, position, in_row, out_row);
    __syncthreads();
    answer.first_bias = bias_of(work.first_bias, tile);
    answer.second_bias = bias_of(work.second_bias, tile);
    answer.out_row = out_row;
    for (int token = 0; token < tile.count; token += FLOAT_TOKENS) {
        float_sums<F>(tile, x, in_row + token, room);
        __syncthreads();
        const int left = tile.count - token;
        answer.store(tile, room, FLOAT_ROWS, sums_pitch(FLOAT_ROWS), 0, token,
                     left < FLOAT_TOKENS ? left : FLOAT_TOKENS);
        __syncthreads();
    }
}

// As GEMM, with the input x f32 [in rows, cols]. Moves the weights once and
// the input per tile of 32 rows; weights come again from the L2 cache for
// every 8 tokens. Grid: tiles of 64 tokens x tiles of 32 rows (16 with pairs);
// 256 threads, 1664 bytes of shared memory.
#define FLOAT_GEMM(name, F)                                                                \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) gemm_##name(                \
        u64 first, u64 second, const u64* table, const i32* tiles, const i32* in_order,    \
        const i32* out_order, int pair, int activation, float alpha, float limit,          \
        const float* first_bias, const float* second_bias, const float* x, int rows,       \
        int cols, int tokens, float* out) {                                                \
        const Work work = {first, second,     table,       tiles, in_order, out_order,     \
                           pair,  first_bias, second_bias, rows,  cols,     tokens};       \
        const Answer answer = {nullptr, nullptr, activation, alpha, limit, out, nullptr};  \
        float_product<F>(work, answer, x);                                                 \
    }
FOR_EACH_FLOAT(FLOAT_GEMM)

// gate[row, i] = gated(gate[row, i], up[row, i]) for the rows of all tiles.
//   gate, up   f32 [.., rows]
// Moves 12 bytes an element. Grid: as many blocks as there may be tiles; 256
// threads.
extern "C" __global__ void __launch_bounds__(256)
    gate_rows(const i32* tiles, const i32* out_order, int activation, float alpha, float limit,
              int rows, float* gate, const float* up) {
    const int tile = static_cast<int>(blockIdx.x);
    if (tile >= tiles[0]) return;
    const int position = tiles[5 + 4 * tile], count = tiles[6 + 4 * tile];
    for (int token = 0; token < count; token++) {
        const int at = out_order ? out_order[position + token] : position + token;
        for (int i = static_cast<int>(threadIdx.x); i < rows; i += 256) {
            const u64 element = static_cast<u64>(at) * rows + i;
            gate[element] = contract_gated(activation, alpha, limit, gate[element], up[element]);
        }
    }
}

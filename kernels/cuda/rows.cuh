// Rows of a matrix times one or a few tokens, in the contract's order: what
// gemv, gate-up and down have in common.
//
// Quantised rows: one thread is one of the contract's eight lanes of one row.
// A warp has four rows with eight lanes each; rows of fewer than eight blocks
// have fewer lanes and a warp more rows (768 columns are three blocks: ten
// rows). So a lane's chain stays in one register, nothing is exchanged before
// the final tree, and no thread idles on short rows.
//
// Bytes: a step is up to 1.1 KB of each of the warp's rows. The warp copies
// them as whole aligned 16-byte words, past the registers (cp.async), to its
// own part of shared memory and decodes there: so loads are coalesced whatever
// the size of a block, and 16 to 40 warps of a multiprocessor have 2 to 7 KB
// each in flight, several times what the latency of its share of the
// bandwidth needs (H100: 25 GB/s x 600 ns = 15 KB).
#pragma once
#include "formats.cuh"

// The least distance of rows in shared memory that holds `bytes` behind a
// start that is misaligned by at most 16 - align bytes. Eight words modulo
// sixteen, so that rows start in different banks.
DEVICE constexpr int row_pitch(int bytes, int align) {
    return (bytes + 16 - align + 31) / 64 * 64 + 32;
}

// At most eight warps to a block of threads. Two blocks to a multiprocessor
// leave 128 registers a thread; shared memory allows about as many.
#define ROW_BOUNDS __launch_bounds__(256, 2)

template <class F>
struct Stage {
    static constexpr int WARP_ROWS = 4;  // of eight blocks or more
    // Blocks of a row in a step; a multiple of the eight lanes.
    static constexpr int STEP = F::LEN == 256 ? 8 : F::BYTES > 24 ? 32 : 64;
    static constexpr int PITCH = row_pitch(STEP * F::BYTES, F::ALIGN);
    // Rows of at most eight blocks, at most 32 blocks, lie as in the matrix.
    static constexpr int RUN = (32 * F::BYTES + 16 - F::ALIGN + 15) / 16 * 16;
    static constexpr int WARP_BYTES = WARP_ROWS * PITCH > RUN ? WARP_ROWS * PITCH : RUN;
    // A block's activations, far enough apart that eight lanes read 16 bytes
    // each from different banks.
    static constexpr int Q_PITCH = F::LEN + 16;
    static constexpr int SUBS = wants_starts<F>() ? F::LEN / F::SUB : 0;
    static constexpr int TOKEN_BYTES = STEP * (Q_PITCH + 4 * SUBS + 4);
};

// kernels/src/cuda/rows.rs has the same sizes.
static_assert(Stage<Q8_0>::WARP_BYTES == 4480 && Stage<Q8_0>::TOKEN_BYTES == 1664, "Q8_0");
static_assert(Stage<MXFP4>::WARP_BYTES == 4480 && Stage<MXFP4>::TOKEN_BYTES == 3328, "MXFP4");
static_assert(Stage<Q5_1>::WARP_BYTES == 6272 && Stage<Q5_1>::TOKEN_BYTES == 3584, "Q5_1");
static_assert(Stage<Q4_K>::WARP_BYTES == 4736 && Stage<Q4_K>::TOKEN_BYTES == 2464, "Q4_K");
static_assert(Stage<Q6_K>::WARP_BYTES == 6784 && Stage<Q6_K>::TOKEN_BYTES == 2720, "Q6_K");

// Shared memory of a block of threads: weights [warps], activations of a step
// [tokens], lanes between steps [tokens, threads].
template <class F>
struct Buffers {
    typedef Stage<F> S;
    u8* stage;      // of this warp
    u8* q;          // [tokens, STEP, Q_PITCH]
    int* starts;    // [tokens, STEP, SUBS]
    float* scales;  // [tokens, STEP]
    float* lanes;   // [tokens, threads], at this thread

    DEVICE Buffers(u8* shared, int tokens) {
        const int warps = static_cast<int>(blockDim.x) / 32;
        stage = shared + warp_id() * S::WARP_BYTES;
        q = shared + warps * S::WARP_BYTES;
        starts = reinterpret_cast<int*>(q + tokens * S::STEP * S::Q_PITCH);
        scales = reinterpret_cast<float*>(starts + tokens * S::STEP * S::SUBS);
        lanes = scales + tokens * S::STEP + threadIdx.x;
    }
};

// Copies `bytes` from `from` to shared memory by one warp, as the aligned
// 16-byte words that cover them (`bytes` > 0): byte i lands at
// `to + (from & 15) + i`.
DEVICE void copy_run(u8* to, const u8* from, int bytes) {
    const int shift = static_cast<int>(reinterpret_cast<u64>(from) & 15);
    const u8* first = from - shift;
    const int words = (shift + bytes + 15) / 16;
#if __CUDA_ARCH__ >= 800
    for (int i = lane_id(); i < words; i += 32) cp_async_16(to + 16 * i, first + 16 * i);
#else
    // Through registers: several loads before the first store.
    for (int start = lane_id(); start < words; start += 32 * 4) {
        uint4 held[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (start + 32 * k < words) held[k] = load_16(first + 16 * (start + 32 * k));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (start + 32 * k < words) {
                *reinterpret_cast<uint4*>(to + 16 * (start + 32 * k)) = held[k];
            }
        }
    }
#endif
}

// ------------------------------------------------------------- activations

// Eight consecutive elements of each thread, quantised in groups of `group`
// (group / 8 neighbouring lanes; the whole warp takes part).
struct Eight {
    u32 codes[2];
    float scale;
    int sum;  // of the eight codes
};
template <int group>
DEVICE Eight quantise_eight(const float (&x)[8]) {
    u32 magnitude = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 bits = bits_of(x[i]) & 0x7fffffffu;
        magnitude = bits > magnitude ? bits : magnitude;
    }
    magnitude = group_max<group / 8>(magnitude);
    Eight out;
    float inverse;
    quantisation_scale(magnitude, out.scale, inverse);
    int codes[8];
    out.sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        codes[i] = quantised(x[i], inverse);
        out.sum += codes[i];
    }
    out.codes[0] = pack_codes(codes[0], codes[1], codes[2], codes[3]);
    out.codes[1] = pack_codes(codes[4], codes[5], codes[6], codes[7]);
    return out;
}

// Eight floats from a multiple of 16 bytes.
DEVICE void load_eight(const float* p, float (&out)[8]) {
    const uint4 a = load_16(p), b = load_16(p + 4);
    out[0] = float_of(a.x), out[1] = float_of(a.y), out[2] = float_of(a.z), out[3] = float_of(a.w);
    out[4] = float_of(b.x), out[5] = float_of(b.y), out[6] = float_of(b.z), out[7] = float_of(b.w);
}

// Activations that are quantised already, `stride` elements from token to
// token: q [.., cols], scales [.., cols / LEN], sums [.., cols / 16].
struct Quantised {
    const i8* q;
    const float* scales;
    const i16* sums;
    int stride;

    // Those of blocks first .. first + count to shared memory, by all threads.
    template <class F>
    DEVICE void stage(int first, int count, int tokens, const Buffers<F>& to) const {
        typedef Stage<F> S;
        constexpr int WORDS = F::LEN / 16;
        const int threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
        for (int t = 0; t < tokens; t++) {
            const u64 element = static_cast<u64>(t) * stride + static_cast<u64>(first) * F::LEN;
            for (int i = me; i < count * WORDS; i += threads) {
                u8* at = to.q + (t * S::STEP + i / WORDS) * S::Q_PITCH + i % WORDS * 16;
                cp_async_16(at, q + element + 16 * i);
            }
            for (int i = me; i < count; i += threads) {
                to.scales[t * S::STEP + i] = scales[element / F::LEN + i];
            }
            const i16* sum = sums + element / 16;
            for (int i = me; i < count * S::SUBS; i += threads) {
                const int codes = F::SUB == 32 ? sum[2 * i] + sum[2 * i + 1] : sum[i];
                to.starts[t * S::STEP * S::SUBS + i] = start_of<F>(codes);
            }
        }
    }
};

// One token's activations as floats, [cols], quantised on the way.
struct Unquantised {
    const float* x;

    template <class F>
    DEVICE void stage(int first, int count, int, const Buffers<F>& to) const {
        typedef Stage<F> S;
        const int warps = static_cast<int>(blockDim.x) / 32, total = count * F::LEN;
        for (int start = warp_id() * 256; start < total; start += warps * 256) {
            const int i = start + 8 * lane_id(), block = i / F::LEN;
            const bool is_inside = i < total;
            float v[8] = {};
            if (is_inside) load_eight(x + static_cast<u64>(first) * F::LEN + i, v);
            const Eight eight = quantise_eight<F::LEN>(v);
            const int sum = group_sum<F::SUB / 8>(eight.sum);
            if (is_inside) {
                uint2 codes;
                codes.x = eight.codes[0], codes.y = eight.codes[1];
                *reinterpret_cast<uint2*>(to.q + block * S::Q_PITCH + i % F::LEN) = codes;
                if (i % F::LEN == 0) to.scales[block] = eight.scale;
                if (S::SUBS > 0 && i % F::SUB == 0) {
                    to.starts[block * S::SUBS + i % F::LEN / F::SUB] = start_of<F>(sum);
                }
            }
        }
    }
};

// -------------------------------------------------------------------- rows

// Rows of a warp when a row has `blocks` blocks.
DEVICE int rows_of_warp(int blocks) { return 32 / (blocks < 8 ? blocks : 8); }

// Rows first_row .. of `matrix` [rows, blocks * LEN] times `tokens` tokens:
// calls `sink(token, row, value)` once for each, from one thread. All warps
// of the block call it, with the same `blocks`; a warp's rows may lie behind
// the last.
template <class F, class X, class Sink>
DEVICE void multiply_rows(const u8* matrix, int rows, int blocks, int first_row, int tokens,
                          const X& x, const Buffers<F>& to, const Sink& sink) {
    typedef Stage<F> S;
    const int threads = static_cast<int>(blockDim.x);
    const int lanes = blocks < 8 ? blocks : 8;
    const int row = lane_id() / lanes, lane = lane_id() % lanes;
    const int left = rows - first_row, most = rows_of_warp(blocks);
    const int here = left < 0 ? 0 : left < most ? left : most;
    const bool is_run = blocks <= 8;
    const u64 row_bytes = static_cast<u64>(blocks) * F::BYTES;
    const u8* mine = matrix + static_cast<u64>(first_row) * row_bytes;

    const int each = is_run ? blocks : S::STEP;
    for (int first = 0; first < blocks; first += each) {
        const int count = blocks - first < each ? blocks - first : each;
        const u8* source = mine + row * row_bytes + static_cast<u64>(first) * F::BYTES;
        const u8* from = is_run ? mine : source;
        const u8* staged = to.stage + (reinterpret_cast<u64>(from) & 15) +
                           (is_run ? row * static_cast<int>(row_bytes) : row * S::PITCH);
        if (is_run) {
            if (here > 0) copy_run(to.stage, mine, here * static_cast<int>(row_bytes));
        } else {
            for (int r = 0; r < here; r++) {
                const u8* start = mine + r * row_bytes + static_cast<u64>(first) * F::BYTES;
                copy_run(to.stage + r * S::PITCH, start, count * F::BYTES);
            }
        }
        x.stage(first, count, tokens, to);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        for (int t = 0; t < tokens; t++) {
            float sum = first == 0 ? 0.0f : to.lanes[t * threads];
            if (row < here) {
#pragma unroll 1
                for (int b = lane; b < count; b += 8) {
                    const int at = t * S::STEP + b;
                    sum = accumulate<F>(staged + b * F::BYTES, to.q + at * S::Q_PITCH,
                                        to.starts + at * S::SUBS, to.scales[at], sum);
                }
            }
            to.lanes[t * threads] = sum;
        }
        __syncthreads();
    }
    for (int t = 0; t < tokens; t++) {
        float sum = to.lanes[t * threads];
#pragma unroll
        for (int s = 4; s > 0; s /= 2) {
            const float other = __shfl_down_sync(FULL_WARP, sum, s);
            sum += lane + s < lanes ? other : 0.0f;
        }
        if (row < here && lane == 0) sink(t, first_row + row, sum);
    }
}

// ------------------------------------------------------------- float rows

// 64 lanes: eight threads of a row have eight neighbouring lanes each, so a
// thread takes 16 or 32 bytes of every 64 elements; four rows to a warp.
template <class F>
struct FloatStage {
    static constexpr int WARP_ROWS = 4;
    static constexpr int STEP = 1024 / F::BYTES;  // elements; a multiple of 64
    static constexpr int PITCH = row_pitch(1024, F::BYTES);
    static constexpr int WARP_BYTES = WARP_ROWS * PITCH;
};
static_assert(FloatStage<F16>::WARP_BYTES == 4224 && FloatStage<F16>::STEP == 512, "F16");

// Adds element 8 u .. of a group of 64 to the lanes of a thread.
template <class F, int T>
DEVICE void add_eight(const u8* weights, bool is_aligned, int have, const float* x, int tokens,
                      float (&lanes)[T][8]) {
    float w[8];
    if (have >= 8 && is_aligned) {
        F::load_8(weights, w);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) w[j] = j < have ? F::at(weights + j * F::BYTES) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (t >= tokens) break;
        const float* v = x + t * FloatStage<F>::STEP;
        if (have >= 8) {
            u32 words[8];
            load_words<16>(reinterpret_cast<const u8*>(v), words);
#pragma unroll
            for (int j = 0; j < 8; j++) lanes[t][j] = fma_rn(w[j], float_of(words[j]), lanes[t][j]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (j < have) lanes[t][j] = fma_rn(w[j], v[j], lanes[t][j]);
            }
        }
    }
}

// As `multiply_rows`, for F32, F16 and BF16 rows of any length and at most T
// tokens: `x` [tokens, stride] as floats. Shared memory: weights [warps], x of
// a step [T].
template <class F, int T, class Sink>
DEVICE void multiply_float_rows(const u8* matrix, int rows, int cols, int first_row, int tokens,
                                const float* x, int stride, u8* shared, const Sink& sink) {
    typedef FloatStage<F> S;
    const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
    u8* stage = shared + warp_id() * S::WARP_BYTES;
    float* staged_x = reinterpret_cast<float*>(shared + warps * S::WARP_BYTES);
    const int row = lane_id() / 8, part = lane_id() % 8;
    const int left = rows - first_row;
    const int here = left < 0 ? 0 : left < S::WARP_ROWS ? left : S::WARP_ROWS;
    const u64 row_bytes = static_cast<u64>(cols) * F::BYTES;
    const u8* mine = matrix + static_cast<u64>(first_row) * row_bytes;
    const bool is_aligned = row_bytes % 16 == 0;

    float lanes[T][8];
#pragma unroll
    for (int t = 0; t < T; t++) {
#pragma unroll
        for (int j = 0; j < 8; j++) lanes[t][j] = 0.0f;
    }
    for (int first = 0; first < cols; first += S::STEP) {
        const int count = cols - first < S::STEP ? cols - first : S::STEP;
        const u8* step = mine + static_cast<u64>(first) * F::BYTES;
        for (int r = 0; r < here; r++) {
            copy_run(stage + r * S::PITCH, step + r * row_bytes, count * F::BYTES);
        }
        cp_async_commit();
        for (int t = 0; t < tokens; t++) {
            for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
                staged_x[t * S::STEP + i] = x[static_cast<u64>(t) * stride + first + i];
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (row < here) {
            const u8* weights =
                stage + row * S::PITCH + (reinterpret_cast<u64>(step + row * row_bytes) & 15);
#pragma unroll 1
            for (int i = 8 * part; i < count; i += 64) {
                add_eight<F, T>(weights + i * F::BYTES, is_aligned, count - i, staged_x + i,
                                tokens, lanes);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (t >= tokens) break;
#pragma unroll
        for (int j = 0; j < 8; j++) lanes[t][j] = lane_tree<8>(lanes[t][j]);
#pragma unroll
        for (int s = 4; s > 0; s /= 2) {
#pragma unroll
            for (int j = 0; j < s; j++) lanes[t][j] += lanes[t][j + s];
        }
        if (row < here && part == 0) sink(t, first_row + row, lanes[t][0]);
    }
}

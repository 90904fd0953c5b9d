// Attention of a chunk of queries over the KV cache, by f16 mma: prefill.
//
//   flash_<width>    heads of 64, 80, 96, 112, 128, 192 or 256
//   flash_latent     multi-head latent attention, absorbed: keys 576, values 512
//
//   q       f32 [tokens, heads, key width]
//   keys, values   f16; head h of position p is the `width` cells from
//           h * head_stride + p * position_stride; 16-byte aligned
//   sinks   f32 [heads] or null: a logit per head without a value
//   out     f32 [tokens, heads, value width]
// Query t stands at first_position + t and sees positions up to its own, with
// a window only the last `window` of them. Query heads h * heads / kv_heads ..
// share cache head h.
//
// A block has the queries of some tokens for one cache head (token after
// token, so heads that share a cache head share its loads); each warp sixteen
// of them. It walks over the positions that any of them sees, POSITIONS at a
// time, with the softmax's running maximum and sum (Dao et al. 2022; Milakov,
// Gimelshein 2018).
//
// Not the CPU's bits (docs/architecture.md, "Attention on the CPU"), since mma
// takes 11-bit operands:
//   - a query is rounded to f16, after a power of two that makes its largest
//     element 1 to 2: a score's error is at most 2^-11 scale |q| . |k|, and
//     2^-25 scale max|q| sum|k| where elements underflow;
//   - probabilities are rounded to f16, relative 2^-11 or absolute 2^-25; the
//     sum is that of the rounded ones, so weights still add up to 1;
//   - sums are taken in the tensor core's order, which may truncate.
// kernels/tests/cuda_flash.rs computes this bound for its data and holds the
// kernel to it. A cache row that is infinite or NaN may spoil queries beside
// those that see it (up to POSITIONS before it).
//
// Moves q and out once, and keys and values of the visible positions once per
// tile of queries. Grid: tiles x cache heads; 128 threads;
//   shared = 2 (QUERIES + POSITIONS) (key width + 16) + 2 POSITIONS (value width + 8)
// bytes: 36352 for heads of 128. Blocks of a multiprocessor: by registers (103
// to 165 a thread, 198 for heads of 256; ptxas, sm_80) two to four, by shared
// memory of 100 KB two, so 8 warps of 48. One buffer: blocks hide each other's
// loads.
//
// By arithmetic, not measured, for heads of 128: in a step of 32 positions a
// warp does 64 mma, which take a scheduler's tensor core 2048 cycles on AD10x
// and 512 on A100; the fragments of four warps are 80 KB of shared memory, 640
// cycles; a thread has 16 exponentials, 230 cycles of issue. So tensor cores
// bound it on consumer cards, shared memory on A100 and H100.
#include "common.cuh"

#define FLASH_WARPS 4
#define FLASH_THREADS (32 * FLASH_WARPS)
#define MINUS_INFINITY float_of(0xff800000u)

struct Cells {
    const u16* at;
    u64 head_stride;
    u64 position_stride;

    DEVICE const u16* row(int head, int position) const {
        return at + head * head_stride + position * position_stride;
    }
};

// What a launch computes.
struct Attention {
    const float* q;
    Cells keys, values;
    const float* sinks;
    float* out;
    int tokens, heads, kv_heads, first_position, window;
    float scale;

    DEVICE int shared_heads() const { return heads / kv_heads; }
    DEVICE int first_visible(int position) const {
        const int first = position + 1 - window;
        return window > 0 && first > 0 ? first : 0;
    }
};

// Two f32 as f16 in a word.
DEVICE u32 pack_f16(float low, float high) {
    return static_cast<u32>(f32_to_f16(low)) | static_cast<u32>(f32_to_f16(high)) << 16;
}

// KEY, VALUE: widths. Warps: ROW_WARPS sixteens of queries; where values are
// too wide for a warp's registers, several warps share a sixteen, take a part
// of the values each, and compute its scores each for themselves.
template <int KEY, int VALUE, int ROW_WARPS, int POSITIONS>
struct Flash {
    static constexpr int QUERIES = 16 * ROW_WARPS;
    static constexpr int VALUE_WARPS = FLASH_WARPS / ROW_WARPS;
    static constexpr int OWN_VALUES = VALUE / VALUE_WARPS;
    // Row pitches that spread rows over the banks: of f16 and of words.
    static constexpr int PITCH = KEY + 16;
    static constexpr int VALUE_PITCH = VALUE + 8;
    static constexpr int SCORE_TILES = POSITIONS / 8;
    static constexpr int VALUE_TILES = OWN_VALUES / 8;

    const Attention& call;
    u16* queries;   // [QUERIES, PITCH]
    u16* keys;      // [POSITIONS, PITCH]
    u32* values;    // [POSITIONS / 2, VALUE_PITCH]: the pair 2i, 2i + 1 of a column
    float* factors; // [QUERIES]: what turns a product into a score
    int kv_head, first, count;  // queries of this block
    float acc[VALUE_TILES][4];
    // Of this thread's two rows, g and g + 8: running maximum, its own part of
    // the running sum, and the positions that the query sees.
    float top[2], sum[2], factor[2];
    int from[2], to[2];

    DEVICE Flash(const Attention& call, u16* shared, float* factors)
        : call(call), queries(shared), keys(queries + QUERIES * PITCH),
          values(reinterpret_cast<u32*>(keys + POSITIONS * PITCH)), factors(factors) {
        kv_head = static_cast<int>(blockIdx.y);
        // The last queries see most and start first.
        first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * QUERIES;
        const int left = call.tokens * call.shared_heads() - first;
        count = left < QUERIES ? left : QUERIES;
    }

    DEVICE int token(int i) const { return (first + i) / call.shared_heads(); }
    DEVICE int head(int i) const {
        return kv_head * call.shared_heads() + (first + i) % call.shared_heads();
    }
    DEVICE int position(int i) const { return call.first_position + token(i); }
    DEVICE static int first_row() { return warp_id() % ROW_WARPS * 16; }
    DEVICE static int first_value() { return warp_id() / ROW_WARPS * OWN_VALUES; }

    // Queries to f16, a warp a row; rows behind the last are zero.
    DEVICE void load_queries() {
        const int lane = lane_id();
        for (int i = warp_id(); i < QUERIES; i += FLASH_WARPS) {
            const bool there = i < count;
            const int safe = there ? i : 0;
            const float* row =
                call.q + (static_cast<u64>(token(safe)) * call.heads + head(safe)) * KEY;
            u32 magnitude = 0;
            for (int c = lane; c < KEY; c += 32) {
                const u32 bits = bits_of(row[c]) & 0x7fffffffu;
                magnitude = bits > magnitude ? bits : magnitude;
            }
            u32 exponent = group_max<32>(magnitude) >> 23;
            exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
            const float down = there ? float_of((254 - exponent) << 23) : 0.0f;
            for (int c = lane; c < KEY; c += 32) {
                queries[i * PITCH + c] = there ? f32_to_f16(row[c] * down) : u16(0);
            }
            if (lane == 0) factors[i] = call.scale * float_of(exponent << 23);
        }
    }

    // This thread's rows.
    DEVICE void start() {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = first_row() + 8 * h + (lane_id() >> 2);
            const bool there = i < count;
            to[h] = there ? position(i) + 1 : 0;
            from[h] = there ? call.first_visible(position(i)) : 0;
            factor[h] = factors[i];
            top[h] = MINUS_INFINITY;
            sum[h] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < VALUE_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) acc[n][e] = 0.0f;
        }
    }

    // Keys and values of `base ..`; positions at and behind `end` repeat the
    // last one, and nobody sees them.
    DEVICE void load_positions(int base, int end) {
        for (int item = threadIdx.x; item < POSITIONS * (KEY / 8); item += FLASH_THREADS) {
            const int p = item / (KEY / 8), chunk = item % (KEY / 8);
            const int at = base + p < end ? base + p : end - 1;
            cp_async_16(keys + p * PITCH + chunk * 8, call.keys.row(kv_head, at) + chunk * 8);
        }
        cp_async_commit();
        for (int item = threadIdx.x; item < POSITIONS / 2 * (VALUE / 8); item += FLASH_THREADS) {
            const int pair = item / (VALUE / 8), chunk = item % (VALUE / 8);
            const int even = base + 2 * pair < end ? base + 2 * pair : end - 1;
            const int odd = base + 2 * pair + 1 < end ? base + 2 * pair + 1 : end - 1;
            const uint4 a = load_16(call.values.row(kv_head, even) + chunk * 8);
            const uint4 b = load_16(call.values.row(kv_head, odd) + chunk * 8);
            uint4* to = reinterpret_cast<uint4*>(values + pair * VALUE_PITCH + chunk * 8);
            to[0] = make_uint4(pick_bytes(a.x, b.x, 0x5410), pick_bytes(a.x, b.x, 0x7632),
                               pick_bytes(a.y, b.y, 0x5410), pick_bytes(a.y, b.y, 0x7632));
            to[1] = make_uint4(pick_bytes(a.z, b.z, 0x5410), pick_bytes(a.z, b.z, 0x7632),
                               pick_bytes(a.w, b.w, 0x5410), pick_bytes(a.w, b.w, 0x7632));
        }
        cp_async_wait<0>();
    }

    // q . k of sixteen queries and POSITIONS keys. Columns 4t..4t+3 of sixteen
    // stand for the k's 2t, 2t+1, 2t+8, 2t+9 of both operands.
    DEVICE void scores(float (&s)[SCORE_TILES][4]) const {
        const int g = lane_id() >> 2, t = lane_id() & 3;
        const u16* row = queries + (first_row() + g) * PITCH + 4 * t;
        const u16* key = keys + g * PITCH + 4 * t;
#pragma unroll 4
        for (int c = 0; c < KEY; c += 16) {
            const uint2 above = *reinterpret_cast<const uint2*>(row + c);
            const uint2 below = *reinterpret_cast<const uint2*>(row + 8 * PITCH + c);
            const u32 a[4] = {above.x, below.x, above.y, below.y};
#pragma unroll
            for (int n = 0; n < SCORE_TILES; n++) {
                const uint2 k = *reinterpret_cast<const uint2*>(key + n * 8 * PITCH + c);
                const u32 b[2] = {k.x, k.y};
                mma_f16(s[n], a, b);
            }
        }
    }

    // Scores to probabilities against the new maximum; what was accumulated
    // before shrinks to it.
    DEVICE void softmax(int base, float (&s)[SCORE_TILES][4]) {
        const int t = lane_id() & 3;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = top[h];
#pragma unroll
            for (int n = 0; n < SCORE_TILES; n++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int position = base + 8 * n + 2 * t + k;
                    const bool seen = position >= from[h] && position < to[h];
                    const float score = seen ? s[n][2 * h + k] * factor[h] : MINUS_INFINITY;
                    s[n][2 * h + k] = score;
                    most = score > most ? score : most;
                }
            }
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                const float other = __shfl_xor_sync(FULL_WARP, most, step);
                most = other > most ? other : most;
            }
            // Nothing seen yet: any finite reference will do.
            const float reference = most == MINUS_INFINITY ? 0.0f : most;
            const float shrink = contract_exp(top[h] - reference);
            top[h] = most;
            float own = 0.0f;
#pragma unroll
            for (int n = 0; n < SCORE_TILES; n++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float p = contract_exp(s[n][2 * h + k] - reference);
                    s[n][2 * h + k] = f16_to_f32(f32_to_f16(p));
                    own += s[n][2 * h + k];
                }
            }
            sum[h] = fma_rn(sum[h], shrink, own);
#pragma unroll
            for (int n = 0; n < VALUE_TILES; n++) {
                acc[n][2 * h] *= shrink;
                acc[n][2 * h + 1] *= shrink;
            }
        }
    }

    DEVICE void add_values(const float (&s)[SCORE_TILES][4]) {
        const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
        for (int k = 0; k < POSITIONS / 16; k++) {
            const float(&low)[4] = s[2 * k];
            const float(&high)[4] = s[2 * k + 1];
            const u32 a[4] = {pack_f16(low[0], low[1]), pack_f16(low[2], low[3]),
                              pack_f16(high[0], high[1]), pack_f16(high[2], high[3])};
            const u32* pair = values + (8 * k + t) * VALUE_PITCH + first_value() + g;
#pragma unroll
            for (int n = 0; n < VALUE_TILES; n++) {
                const u32 b[2] = {pair[8 * n], pair[4 * VALUE_PITCH + 8 * n]};
                mma_f16(acc[n], a, b);
            }
        }
    }

    // The sink joins, then the division.
    DEVICE void store() {
        const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                sum[h] += __shfl_xor_sync(FULL_WARP, sum[h], step);
            }
            const int i = first_row() + 8 * h + g;
            if (i >= count) continue;
            float shrink = 1.0f, total = sum[h];
            if (call.sinks) {
                const float sink = call.sinks[head(i)];
                const float most = sink > top[h] ? sink : top[h];
                shrink = contract_exp(top[h] - most);
                total = fma_rn(total, shrink, contract_exp(sink - most));
            }
            float* row = call.out + (static_cast<u64>(token(i)) * call.heads + head(i)) * VALUE +
                         first_value() + 2 * t;
#pragma unroll
            for (int n = 0; n < VALUE_TILES; n++) {
                float2 pair;
                pair.x = acc[n][2 * h] * shrink / total;
                pair.y = acc[n][2 * h + 1] * shrink / total;
                *reinterpret_cast<float2*>(row + 8 * n) = pair;
            }
        }
    }

    DEVICE void run() {
        load_queries();
        __syncthreads();
        start();
        const int begin = call.first_visible(position(0)) / POSITIONS * POSITIONS;
        const int end = position(count - 1) + 1;
        // Positions that this warp's queries see.
        const int last = first_row() + 15 < count ? first_row() + 15 : count - 1;
        const bool works = first_row() < count;
        const int own_begin = works ? call.first_visible(position(first_row())) : 0;
        const int own_end = works ? position(last) + 1 : 0;
        for (int base = begin; base < end; base += POSITIONS) {
            load_positions(base, end);
            __syncthreads();
            if (base < own_end && base + POSITIONS > own_begin) {
                float s[SCORE_TILES][4] = {};
                scores(s);
                softmax(base, s);
                add_values(s);
            }
            __syncthreads();  // all have read what is overwritten next
        }
        store();
    }
};

// BLOCKS: of a multiprocessor, by registers.
#define FLASH(name, KEY, VALUE, ROW_WARPS, POSITIONS, BLOCKS)                               \
    extern "C" __global__ void __launch_bounds__(FLASH_THREADS, BLOCKS) flash_##name(               \
        const float* q, const u16* keys, u64 key_head_stride, u64 key_position_stride,      \
        const u16* values, u64 value_head_stride, u64 value_position_stride,                \
        const float* sinks, float* out, int tokens, int heads, int kv_heads,                \
        int first_position, int window, float scale) {                                      \
        DYNAMIC_SHARED(u16, shared);                                                        \
        SHARED(float, factors, 16 * ROW_WARPS);                                             \
        const Attention call = {q,                                                          \
                                {keys, key_head_stride, key_position_stride},               \
                                {values, value_head_stride, value_position_stride},         \
                                sinks, out, tokens, heads, kv_heads, first_position,        \
                                window, scale};                                             \
        Flash<KEY, VALUE, ROW_WARPS, POSITIONS>(call, shared, factors).run();               \
    }
FLASH(64, 64, 64, 4, 32, 3)
FLASH(80, 80, 80, 4, 32, 3)
FLASH(96, 96, 96, 4, 32, 3)
FLASH(112, 112, 112, 4, 32, 3)
FLASH(128, 128, 128, 4, 32, 3)
FLASH(192, 192, 192, 4, 16, 2)
FLASH(256, 256, 256, 4, 16, 2)
FLASH(latent, 576, 512, 1, 16, 3)

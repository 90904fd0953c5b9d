// The sums of a tile in the contract's order, by int8 mma.
//
// Inside a block (and a sub-block) sums are integers and exact, so the order
// inside an mma is free: a thread takes the eight codes 8t..8t+7 of a row for
// the k's 4t..4t+3 and 16+4t..16+4t+3 of both operands. Between blocks floats
// are added in eight lanes by block index, and the lanes by a tree.
//
// Blocks of 256 ("whole" slabs): all warps share a slab and visit the lanes
// one after the other in the order of the tree, 0 4 2 6 1 5 3 7, as a binary
// counter adds: one running lane and at most three parked sums are alive.
// Blocks of 32 ("eighths"): a slab has a block for each lane, and each of the
// eight warps is a lane, for all of the tile; the tree goes through shared
// memory once, at the end.
#pragma once
#include "gemm_tile.cuh"

// What happens to sums before they are stored.
struct Answer {
    const float* first_bias;  // [rows] of this expert, or null
    const float* second_bias;
    int activation;  // of pairs, as in contract_gated
    float alpha;
    float limit;
    float* out;          // [.., rows]
    const int* out_row;  // [count], in shared memory

    // Stores the tile's sums of `tokens` tokens from `first_token` on, which
    // stand in shared memory: that of row `i` of the tile at `i + token *
    // pitch`. With `lanes` a sum is that and what stands `lanes` behind it.
    DEVICE void store(const Tile& tile, const float* sums, int tile_rows, int pitch, int lanes,
                      int first_token, int tokens) const {
        const int rows = tile.pair ? tile_rows / 2 : tile_rows;
        for (int item = threadIdx.x; item < tokens * rows; item += TILE_THREADS) {
            const int token = item / rows, r = item % rows, row = tile.first_row + r;
            if (row >= tile.rows) continue;
            const int i = tile.pair ? (r >> 4) * 32 + (r & 15) : r;
            float value = sum_at(sums + i + token * pitch, lanes);
            if (first_bias) value = value + first_bias[row];
            if (tile.pair) {
                float up = sum_at(sums + i + 16 + token * pitch, lanes);
                if (second_bias) up = up + second_bias[row];
                value = contract_gated(activation, alpha, limit, value, up);
            }
            out[static_cast<u64>(out_row[first_token + token]) * tile.rows + row] = value;
        }
    }

    DEVICE static float sum_at(const float* sum, int lanes) {
        return lanes ? sum[0] + sum[lanes] : sum[0];
    }
};

// Rows of 64 or 128 sums and four more: what a warp's mma leaves in a register
// lies in 32 different banks.
DEVICE constexpr int sums_pitch(int rows) { return rows + 4; }

// Where in shared sums this thread's element of an mma lies, before what its
// tiles of rows and tokens add.
DEVICE int own_element(int pitch) { return 2 * (lane_id() & 3) * pitch + (lane_id() >> 2); }

// Where in a row of 256 bytes this thread finds its eight codes of group `j` of
// 32 columns, or its four of sub-block `k` of 16. Rows are counted from a
// multiple of eight plus lane / 4, which is all that `turn` looks at.
DEVICE int column_32(int j) {
    const int t = lane_id() & 3;
    return chunk_at(0, (2 * j + (t >> 1)) ^ turn(lane_id() >> 2)) + (t & 1) * 8;
}
DEVICE int column_16(int k) {
    return chunk_at(0, k ^ turn(lane_id() >> 2)) + (lane_id() & 3) * 4;
}
DEVICE uint2 codes_32(const u8* rows, int row, int column) {
    return *reinterpret_cast<const uint2*>(rows + row * SLAB + column);
}
DEVICE u32 codes_16(const u8* rows, int row, int column) {
    return *reinterpret_cast<const u32*>(rows + row * SLAB + column);
}

// ------------------------------------------------------------ blocks of 256

// Warps of a whole slab: each 32 rows (two times sixteen) by GROUPS times
// eight tokens. Groups of tokens take turns between the warps, so that few
// tokens still keep all warps busy.
template <class F>
struct Whole {
    typedef Layout<F> L;
    static constexpr int WARP_ROWS = L::ROWS / 32;
    static constexpr int WARP_COLS = 8 / WARP_ROWS;
    static constexpr int GROUPS = 8 / WARP_COLS;
    float lane[2][GROUPS][4];
    float parked[3][2][GROUPS][4];

    DEVICE static int first_row() { return warp_id() % WARP_ROWS * 32; }
    DEVICE static int group(int n) { return n * WARP_COLS + warp_id() / WARP_ROWS; }

    // The integers of a block, sub-block scales included.
    DEVICE static void sums(const Slabs<F>& slabs, i32 (&s)[2][GROUPS][4]) {
        const int g = lane_id() >> 2;
        const u8* weights = slabs.shared + L::WEIGHTS;
        const u8* x = slabs.x();
        const i8* sub_scales = slabs.template at<i8>(L::SUB_SCALES) + (first_row() + g) * 16;
#pragma unroll 1
        for (int k = 0; k < SLAB / F::SUB; k++) {
            const int column = F::SUB == 32 ? column_32(k) : column_16(k);
            u32 a[2][4];
            int scale[2][2];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const int row = first_row() + m * 16 + g;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    scale[m][h] = sub_scales[(m * 16 + h * 8) * 16 + k];
                    if constexpr (F::SUB == 32) {
                        const uint2 w = codes_32(weights, row + 8 * h, column);
                        a[m][h] = w.x, a[m][2 + h] = w.y;
                    } else {
                        a[m][h] = codes_16(weights, row + 8 * h, column);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < GROUPS; n++) {
                if (group(n) >= slabs.tile.groups()) break;
                u32 b[2];
                if constexpr (F::SUB == 32) {
                    const uint2 v = codes_32(x, group(n) * 8 + g, column);
                    b[0] = v.x, b[1] = v.y;
                } else {
                    b[0] = codes_16(x, group(n) * 8 + g, column);
                }
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    i32 dot[4] = {0, 0, 0, 0};
                    if constexpr (F::SUB == 32) {
                        mma_s8(dot, a[m], b);
                    } else {
                        mma_s8_16(dot, a[m][0], a[m][1], b[0]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++) s[m][n][e] += scale[m][e >> 1] * dot[e];
                }
            }
        }
    }

    // The minimums of rows against the sums of tokens: one more product of
    // sixteen columns, for each of the sums' two digits.
    DEVICE static void min_sums(const Slabs<F>& slabs, int row, int token, i32 (&t)[4]) {
        const int g = lane_id() >> 2, word = lane_id() & 3;
        const u32* mins = slabs.template at<u32>(L::SUB_MINS);
        const u32 above = mins[(row + g) * 4 + word], below = mins[(row + 8 + g) * 4 + word];
        i32 high[4] = {0, 0, 0, 0};
        mma_s8_16(t, above, below, slabs.template at<u32>(L::X_LOW)[(token + g) * 4 + word]);
        mma_s8_16(high, above, below, slabs.template at<u32>(L::X_HIGH)[(token + g) * 4 + word]);
#pragma unroll
        for (int e = 0; e < 4; e++) t[e] += 64 * high[e];
    }

    // Adds the slab's block to the running lane.
    DEVICE void add(const Slabs<F>& slabs) {
        i32 s[2][GROUPS][4] = {};
        sums(slabs, s);
        const int g = lane_id() >> 2, t = lane_id() & 3;
        const float* d = slabs.template at<float>(L::D) + first_row() + g;
        const float* m_of = slabs.template at<float>(L::M) + first_row() + g;
        const float* x_scale = slabs.template at<float>(L::X_SCALE) + 2 * t;
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            if (group(n) >= slabs.tile.groups()) break;
#pragma unroll
            for (int m = 0; m < 2; m++) {
                i32 mins[4] = {0, 0, 0, 0};
                if constexpr (L::HAS_MIN) {
                    min_sums(slabs, first_row() + m * 16, group(n) * 8, mins);
                }
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = m * 16 + (e >> 1) * 8;
                    const float x = x_scale[group(n) * 8 + (e & 1)];
                    float v = fma_rn(d[row] * x, static_cast<float>(s[m][n][e]), lane[m][n][e]);
                    if constexpr (L::HAS_MIN) {
                        v = fma_rn(-(m_of[row] * x), static_cast<float>(mins[e]), v);
                    }
                    lane[m][n][e] = v;
                }
            }
        }
    }

    // lane = from + lane
    DEVICE void join(const float (&from)[2][GROUPS][4]) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < GROUPS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) lane[m][n][e] = from[m][n][e] + lane[m][n][e];
    }
    DEVICE void park(float (&to)[2][GROUPS][4]) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < GROUPS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) to[m][n][e] = lane[m][n][e], lane[m][n][e] = 0.0f;
    }

    // After lane number `visit` of the tree's order: adds what is complete to
    // what is parked, as a counter carries.
    DEVICE void carry(int visit) {
        if (visit & 1) join(parked[0]);
        if ((visit & 3) == 3) join(parked[1]);
        if (visit == 7) join(parked[2]);
        if (!(visit & 1)) park(parked[0]);
        if ((visit & 3) == 1) park(parked[1]);
        if (visit == 3) park(parked[2]);
    }

    // Lane number `visit` of the tree's order: the bits of `visit`, mirrored.
    DEVICE static int lane_of(int visit) { return (visit & 1) << 2 | (visit & 2) | visit >> 2; }

    DEVICE void run(Slabs<F>& slabs) {
        const int blocks = slabs.blocks();
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < GROUPS; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    lane[m][n][e] = 0.0f;
                    parked[0][m][n][e] = parked[1][m][n][e] = parked[2][m][n][e] = 0.0f;
                }
            }
        }
        int visit = 0, block = 0;
        slabs.start(block);
        while (visit < 8) {
            int next_visit = visit, next = block + 8;
            while (next >= blocks && next_visit < 8) next = lane_of(++next_visit);
            const bool more = next_visit < 8;
            if (more) slabs.set_out(next);
            add(slabs);
            for (; visit < next_visit; visit++) carry(visit);
            slabs.arrive(next, more);
            block = next;
        }
    }

    DEVICE void store(const Tile& tile, const Answer& answer, float* room) const {
        constexpr int PITCH = sums_pitch(L::ROWS);
        static_assert(TILE_TOKENS * PITCH * 4 <= L::ROW_AT, "sums fit before the lists of rows");
        float* own = room + own_element(PITCH) + first_row();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < GROUPS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    own[(group(n) * 8 + (e & 1)) * PITCH + m * 16 + (e >> 1) * 8] = lane[m][n][e];
                }
        __syncthreads();
        answer.store(tile, room, L::ROWS, PITCH, 0, 0, tile.count);
    }
};

// ------------------------------------------------------------- blocks of 32

// 2^23 + 2^22: an integer below 2^22 added to the bits is the same integer
// added to the value, so subtracting the value converts exactly, at the speed
// of an addition.
#define MAGIC_BITS 0x4b400000
#define MAGIC 12582912.0f

template <class F>
struct Eighths {
    typedef Layout<F> L;
    // Tokens that a round of the tree holds in shared memory; floats of a
    // lane there.
    static constexpr int HALF = 32;
    static constexpr int PITCH = sums_pitch(64);
    static constexpr int LANE = HALF * PITCH;
    static_assert(4 * LANE * 4 <= L::ROW_AT, "lanes fit before the lists of rows");
    float lane[4][8][4];

    DEVICE void add(const Slabs<F>& slabs, int slab) {
        const int j = warp_id();
        if (j >= slabs.blocks_in(slab)) return;
        const int g = lane_id() >> 2, t = lane_id() & 3, column = column_32(j);
        const u8* weights = slabs.shared + L::WEIGHTS;
        const u8* x = slabs.x();
        u32 a[4][4];
        float d[4][2], m_of[4][2];
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = m * 16 + h * 8 + g;
                const uint2 w = codes_32(weights, row, column);
                a[m][h] = w.x, a[m][2 + h] = w.y;
                d[m][h] = slabs.template at<float>(L::D)[row * 8 + j];
                if constexpr (L::HAS_MIN) m_of[m][h] = slabs.template at<float>(L::M)[row * 8 + j];
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            if (n >= slabs.tile.groups()) break;
            const uint2 v = codes_32(x, n * 8 + g, column);
            const u32 b[2] = {v.x, v.y};
            const int token = (n * 8 + 2 * t) * 8 + j;
            const float* x_scale = slabs.template at<float>(L::X_SCALE) + token;
            const float* x_sum = slabs.template at<float>(L::X_SUM) + token;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                i32 dot[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
                mma_s8(dot, a[m], b);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float s = float_of(static_cast<u32>(dot[e])) - MAGIC;
                    const float scale = x_scale[(e & 1) * 8];
                    float v = fma_rn(d[m][e >> 1] * scale, s, lane[m][n][e]);
                    if constexpr (L::HAS_MIN) {
                        v = fma_rn(m_of[m][e >> 1] * scale, x_sum[(e & 1) * 8], v);
                    }
                    lane[m][n][e] = v;
                }
            }
        }
    }

    DEVICE void run(Slabs<F>& slabs) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) lane[m][n][e] = 0.0f;
            }
        }
        const int count = (slabs.blocks() + 7) / 8;
        slabs.start(0);
        for (int slab = 0; slab < count; slab++) {
            const bool more = slab + 1 < count;
            if (more) slabs.set_out(slab + 1);
            add(slabs, slab);
            slabs.arrive(slab + 1, more);
        }
    }

    // Element (m, n, e) of this thread, behind `own_element`.
    DEVICE static constexpr int place(int m, int n, int e) {
        return (n * 8 + (e & 1)) * PITCH + m * 16 + (e >> 1) * 8;
    }

    // The tree over the warps' lanes, then the answers, 32 tokens at a time.
    DEVICE void store(const Tile& tile, const Answer& answer, float* room) {
        float* own = room + own_element(PITCH);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half * HALF >= tile.count) return;  // for all threads alike
            // Lanes 4..8 are added to 0..4, then 2..4 to 0..2; lane 1 is added
            // to lane 0 where the answers are stored.
#pragma unroll 1
            for (int s = 4; s > 0; s /= 2) {
                const int from = s == 1 ? 0 : s;
                if (warp_id() >= from && warp_id() < 2 * s) {
                    float* mine = own + (warp_id() - from) * LANE;
#pragma unroll
                    for (int m = 0; m < 4; m++)
#pragma unroll
                        for (int n = 0; n < 4; n++)
#pragma unroll
                            for (int e = 0; e < 4; e++)
                                mine[place(m, n, e)] = lane[m][half * 4 + n][e];
                }
                __syncthreads();
                if (s > 1 && warp_id() < s) {
                    const float* other = own + warp_id() * LANE;
#pragma unroll
                    for (int m = 0; m < 4; m++)
#pragma unroll
                        for (int n = 0; n < 4; n++)
#pragma unroll
                            for (int e = 0; e < 4; e++)
                                lane[m][half * 4 + n][e] += other[place(m, n, e)];
                }
                if (s > 1) __syncthreads();  // before the room is written again
            }
            const int left = tile.count - half * HALF;
            answer.store(tile, room, 64, PITCH, LANE, half * HALF, left < HALF ? left : HALF);
            __syncthreads();
        }
    }
};

// Decode attention: the parts of one chunk of 256 positions for a tile of
// queries that share a cache head. Bits as kernels/src/cpu/attention.rs: 16
// lanes and a tree for q . k, sums of weights in 16 lanes by position, values
// in position order. How queries are cut into tiles never reaches a sum.
//
// A block of 128 threads walks over its cells in stages of 64 positions and
// 256 bytes of each row, first all of the keys, then all of the values; while
// one stage is computed the next is copied. Keys: a pair of threads has a
// position, one thread lanes 0-7, the other 8-15. Values: a warp has some of
// the queries and a thread four bytes of the row, and walks over positions.
#pragma once
#include "attention_merge.cuh"

constexpr int STAGE_ROWS = 64;
constexpr int STAGE_ROW_WORDS = 16;  // of 16 bytes
constexpr int STAGE_WORDS = STAGE_ROWS * STAGE_ROW_WORDS;
constexpr int ATTEND_THREADS = 128;
constexpr int ATTEND_WARPS = ATTEND_THREADS / 32;

// How a stage holds binary16 or binary32 cells. Words of a row are permuted
// by an exclusive or with `swizzle(row)`, so that the eight threads of a
// quarter warp, on four rows, meet all 32 banks.
struct HalfStage {
    static const int CELL_BYTES = 2;
    static const int ROUND_WORDS = 2;  // 16 cells
    static const int PER_4_BYTES = 2;

    static DEVICE int swizzle(int row) { return 2 * (row & 3); }
    static DEVICE void unpack(u32 bits, float* out) {
        out[0] = f16_to_f32(static_cast<u16>(bits & 0xffffu));
        out[1] = f16_to_f32(static_cast<u16>(bits >> 16));
    }
    // Half `h` of the round at `word`.
    static DEVICE void load_8(const uint4* row, int word, int h, int mask, float (&out)[8]) {
        const uint4 bits = row[(word + h) ^ mask];
        unpack(bits.x, out);
        unpack(bits.y, out + 2);
        unpack(bits.z, out + 4);
        unpack(bits.w, out + 6);
    }
};
struct FloatStage {
    static const int CELL_BYTES = 4;
    static const int ROUND_WORDS = 4;
    static const int PER_4_BYTES = 1;

    static DEVICE int swizzle(int row) { return (row & 1) | ((row & 2) << 1); }
    static DEVICE void unpack(u32 bits, float* out) { out[0] = float_of(bits); }
    static DEVICE void load_8(const uint4* row, int word, int h, int mask, float (&out)[8]) {
        const uint4 low = row[(word + 2 * h) ^ mask], high = row[(word + 2 * h + 1) ^ mask];
        out[0] = float_of(low.x), out[1] = float_of(low.y);
        out[2] = float_of(low.z), out[3] = float_of(low.w);
        out[4] = float_of(high.x), out[5] = float_of(high.y);
        out[6] = float_of(high.z), out[7] = float_of(high.w);
    }
};

// Consecutive queries of one cache head, token after token.
struct Tile {
    int kv_head, shared, first, count;
    int chunk;       // absolute index
    int part;        // index among the chunks that are seen
    int position;    // of token 0, from the start of the chunk
    int start, end;  // positions of the chunk that any of the queries sees

    DEVICE int token(int i) const { return (first + i) / shared; }
    // Row of query `i` in `q`, `out` and the partial answers.
    DEVICE int row(const AttendCall& call, int i) const {
        return token(i) * call.heads + kv_head * shared + (first + i) % shared;
    }
    // Positions of the chunk that query `i` sees: `from .. to`.
    DEVICE void visible(const AttendCall& call, int i, int& from, int& to) const {
        const int end = position + token(i) + 1;
        from = call.window == 0 ? 0 : max(end - call.window, 0);
        to = min(end, CHUNK);
        if (i >= count || to < from) to = from;
    }
};

// The cells that a block reads, stage after stage, one ahead of the other.
template <class Stage>
struct Stages {
    uint4* memory;  // two stages
    const u8 *keys, *values;
    i64 key_stride, value_stride;  // bytes from position to position
    int key_words, value_words;    // of 16 bytes in a row
    int start, end, first_quarter, quarters, key_slabs;
    int steps, step;

    DEVICE Stages(const AttendCall& call, const Tile& tile, uint4* stages) : memory(stages) {
        const i64 first = static_cast<i64>(tile.chunk) * CHUNK;
        const int bytes = Stage::CELL_BYTES;
        key_stride = static_cast<i64>(call.key_position_stride) * bytes;
        value_stride = static_cast<i64>(call.value_position_stride) * bytes;
        const i64 key_head = static_cast<i64>(tile.kv_head) * call.key_head_stride;
        const i64 value_head = static_cast<i64>(tile.kv_head) * call.value_head_stride;
        keys = reinterpret_cast<const u8*>(call.keys) + key_head * bytes + first * key_stride;
        values =
            reinterpret_cast<const u8*>(call.values) + value_head * bytes + first * value_stride;
        key_words = call.key_width * bytes / 16;
        value_words = call.value_width * bytes / 16;
        start = tile.start;
        end = tile.end;
        first_quarter = start / STAGE_ROWS;
        quarters = (end + STAGE_ROWS - 1) / STAGE_ROWS - first_quarter;
        key_slabs = (key_words + STAGE_ROW_WORDS - 1) / STAGE_ROW_WORDS;
        const int value_slabs = (value_words + STAGE_ROW_WORDS - 1) / STAGE_ROW_WORDS;
        step = 0;
        steps = quarters * (key_slabs + value_slabs);
        fetch(0);
    }

    // Keys go by quarter and then slab, values by slab and then quarter.
    DEVICE void fetch(int which) {
        const int key_steps = quarters * key_slabs;
        const bool is_key = which < key_steps;
        const int i = is_key ? which : which - key_steps;
        const int quarter = first_quarter + (is_key ? i / key_slabs : i % quarters);
        const int slab = is_key ? i % key_slabs : i / quarters;
        const u8* from = is_key ? keys : values;
        const i64 stride = is_key ? key_stride : value_stride;
        const int words = (is_key ? key_words : value_words) - slab * STAGE_ROW_WORDS;
        const int word = static_cast<int>(threadIdx.x) % STAGE_ROW_WORDS;
        uint4* to = memory + (which & 1) * STAGE_WORDS;
#pragma unroll 2
        for (int row = static_cast<int>(threadIdx.x) / STAGE_ROW_WORDS; row < STAGE_ROWS;
             row += ATTEND_THREADS / STAGE_ROW_WORDS) {
            const int position = quarter * STAGE_ROWS + row;
            if (word < words && position >= start && position < end) {
                cp_async_16(to + row * STAGE_ROW_WORDS + (word ^ Stage::swizzle(row)),
                            from + position * stride + (slab * STAGE_ROW_WORDS + word) * 16);
            }
        }
        cp_async_commit();
    }

    // The next stage, when it is there for every thread; the one after it
    // starts then, over the stage that all threads have left.
    DEVICE const uint4* next() {
        cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1);
        return memory + (step++ & 1) * STAGE_WORDS;
    }
};

// Adds one slab of keys to the lanes of every query: `acc[q][i]` is lane
// `8 * h + i`. `queries` points to the slab's part of query 0.
template <class Stage, int Q>
DEVICE void key_slab(const uint4* row, int mask, int h, const float* queries, int key_width,
                     int cells, float (&acc)[Q][8]) {
    int word = 0;
#pragma unroll(Q > 4 ? 1 : 2)  // registers
    for (int at = 8 * h; at < cells; at += 16, word += Stage::ROUND_WORDS) {
        float key[8];
        Stage::load_8(row, word, h, mask, key);
#pragma unroll
        for (int q = 0; q < Q; q++) {
            const float4* query = reinterpret_cast<const float4*>(queries + q * key_width + at);
            const float4 low = query[0], high = query[1];
            acc[q][0] = fma_rn(low.x, key[0], acc[q][0]);
            acc[q][1] = fma_rn(low.y, key[1], acc[q][1]);
            acc[q][2] = fma_rn(low.z, key[2], acc[q][2]);
            acc[q][3] = fma_rn(low.w, key[3], acc[q][3]);
            acc[q][4] = fma_rn(high.x, key[4], acc[q][4]);
            acc[q][5] = fma_rn(high.y, key[5], acc[q][5]);
            acc[q][6] = fma_rn(high.z, key[6], acc[q][6]);
            acc[q][7] = fma_rn(high.w, key[7], acc[q][7]);
        }
    }
}

// The tree over 16 lanes, of which `mine` are eight and the partner thread's
// `other` the other eight.
DEVICE float lane_tree_16(const float (&mine)[8], const float (&other)[8]) {
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = mine[i] + other[i];
#pragma unroll
    for (int s = 4; s > 0; s /= 2) {
#pragma unroll
        for (int i = 0; i < s; i++) sum[i] = sum[i] + sum[i + s];
    }
    return sum[0];
}

// Lanes to logits: `scores[q][position]`. The pair shares the queries out:
// each thread hands over its lanes of the other's queries.
template <int Q>
DEVICE void store_scores(const float (&acc)[Q][8], int h, float scale, bool is_seen,
                         float* scores) {
    constexpr int EACH = Q > 1 ? Q / 2 : 1;
#pragma unroll
    for (int q = 0; q < EACH; q++) {
        float mine[8], other[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float low = acc[q][i], high = acc[Q > 1 ? q + EACH : q][i];
            mine[i] = h == 0 ? low : high;
            other[i] = __shfl_xor_sync(FULL_WARP, h == 0 ? high : low, 1);
        }
        const float score = lane_tree_16(mine, other) * scale;
        if (is_seen && (Q > 1 || h == 0)) scores[(q + (Q > 1 ? h * EACH : 0)) * CHUNK] = score;
    }
}

// Logits of all queries and positions into `scores [Q, CHUNK]`.
template <class Stage, int Q>
DEVICE void key_phase(const AttendCall& call, Stages<Stage>& stages, const float* queries,
                      float* scores) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / 2, h = thread % 2, mask = Stage::swizzle(row);
    const int slab_cells = STAGE_ROW_WORDS * 16 / Stage::CELL_BYTES;
    for (int quarter = 0; quarter < stages.quarters; quarter++) {
        const int position = (stages.first_quarter + quarter) * STAGE_ROWS + row;
        const bool is_seen = position >= stages.start && position < stages.end;
        float acc[Q][8] = {};
        for (int slab = 0; slab < stages.key_slabs; slab++) {
            const uint4* stage = stages.next();
            if (is_seen) {
                const int first = slab * slab_cells;
                key_slab<Stage, Q>(stage + row * STAGE_ROW_WORDS, mask, h, queries + first,
                                   call.key_width, min(call.key_width - first, slab_cells), acc);
            }
        }
        store_scores<Q>(acc, h, call.scale, is_seen, scores + position);
    }
}

// Logits of one query to weights, by a warp; 0 outside `from .. to`.
DEVICE void softmax_chunk(float* scores, int from, int to, float& max_out, float& sum_out) {
    const int lane = lane_id();
    float weight[CHUNK / 32];
    float top = float_of(0xff800000u);
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        const int position = lane + 32 * i;
        weight[i] = 0.0f;
        if (position >= from && position < to) {
            weight[i] = scores[position];
            if (weight[i] > top) top = weight[i];
        }
    }
#pragma unroll
    for (int s = 16; s > 0; s /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, top, s);
        if (other > top) top = other;
    }
    // Sixteen lanes by position: thread `t < 16` has what it and `t + 16` hold.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        const int position = lane + 32 * i;
        if (position >= from && position < to) weight[i] = contract_exp(weight[i] - top);
        scores[position] = weight[i];
        const float later = __shfl_xor_sync(FULL_WARP, weight[i], 16);
        // Weights outside are +0 and leave a sum of positive numbers alone.
        sum = sum + weight[i];
        sum = sum + later;
    }
    max_out = top;
    sum_out = lane_tree<16>(sum);  // in lane 0
}

// Adds rows of a stage to the answers of `M` queries: query `m` takes
// `from[m] .. to[m]`. `WHOLE`: all queries take all rows.
template <class Stage, int M, bool WHOLE>
DEVICE void value_rows(const uint4* stage, const float* weights, const int (&from)[M],
                       const int (&to)[M], const bool (&has)[2],
                       float (&acc)[M][2][Stage::PER_4_BYTES]) {
    const int lane = lane_id();
    int low = WHOLE ? 0 : STAGE_ROWS, high = WHOLE ? STAGE_ROWS : 0;
    if (!WHOLE) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            if (from[m] >= to[m]) continue;
            low = min(low, from[m]);
            high = max(high, to[m]);
        }
    }
#pragma unroll 1
    for (int first = low & ~3; first < high; first += 4) {
        float4 weight[M];
#pragma unroll
        for (int m = 0; m < M; m++)
            weight[m] = *reinterpret_cast<const float4*>(weights + m * CHUNK + first);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = first + r;
            if (!WHOLE && (row < low || row >= high)) continue;
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (!has[part]) continue;
                const int word = (lane / 4 + 8 * part) ^ Stage::swizzle(r);
                const uint4* at = stage + row * STAGE_ROW_WORDS + word;
                float value[Stage::PER_4_BYTES];
                Stage::unpack(reinterpret_cast<const u32*>(at)[lane % 4], value);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    if (!WHOLE && (row < from[m] || row >= to[m])) continue;
                    const float w = r == 0   ? weight[m].x
                                    : r == 1 ? weight[m].y
                                    : r == 2 ? weight[m].z
                                             : weight[m].w;
#pragma unroll
                    for (int e = 0; e < Stage::PER_4_BYTES; e++)
                        acc[m][part][e] = fma_rn(w, value[e], acc[m][part][e]);
                }
            }
        }
    }
}

// Weighted values of the warp's `M` queries (from query `warp * M` of the
// tile) into their rows of `partial`.
template <class Stage, int Q, int M>
DEVICE void value_phase(const AttendCall& call, const Tile& tile, Stages<Stage>& stages,
                        const float* scores, const int (&from)[M], const int (&to)[M]) {
    constexpr int PER = Stage::PER_4_BYTES;
    const int slab_cells = STAGE_ROW_WORDS * 16 / Stage::CELL_BYTES;
    const int lane = lane_id(), first_query = warp_id() * M;
    for (int first = 0; first < call.value_width; first += slab_cells) {
        const int left = call.value_width - first;
        const bool has[2] = {lane * PER < left, slab_cells / 2 + lane * PER < left};
        float acc[M][2][PER] = {};
        for (int q = 0; q < stages.quarters; q++) {
            const uint4* stage = stages.next();
            if (first_query >= Q) continue;
            const int base = (stages.first_quarter + q) * STAGE_ROWS;
            int row_from[M], row_to[M];
            bool is_whole = true;
#pragma unroll
            for (int m = 0; m < M; m++) {
                row_from[m] = max(from[m] - base, 0);
                row_to[m] = min(to[m] - base, STAGE_ROWS);
                is_whole = is_whole && row_from[m] == 0 && row_to[m] == STAGE_ROWS;
            }
            const float* weights = scores + first_query * CHUNK + base;
            if (is_whole) {
                value_rows<Stage, M, true>(stage, weights, row_from, row_to, has, acc);
            } else {
                value_rows<Stage, M, false>(stage, weights, row_from, row_to, has, acc);
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            if (first_query >= Q || from[m] >= to[m]) continue;
            const i64 row = tile.row(call, first_query + m);
            float* to_row = call.partial + (row * call.chunks + tile.part) * call.value_width;
#pragma unroll
            for (int part = 0; part < 2; part++) {
                float* at = to_row + first + part * (slab_cells / 2) + lane * PER;
                if (!has[part]) continue;
                if (PER == 2) {
                    *reinterpret_cast<float2*>(at) = {acc[m][part][0], acc[m][part][PER - 1]};
                } else {
                    at[0] = acc[m][part][0];
                }
            }
        }
    }
}

// Everything that a block finds in its chunk: `memory` holds two stages, the
// queries [Q, key_width] and the scores [Q, CHUNK].
template <class Stage, int Q>
DEVICE void chunk_parts(const AttendCall& call, const Tile& tile, uint4* memory) {
    constexpr int M = Q >= ATTEND_WARPS ? Q / ATTEND_WARPS : 1;
    float* queries = reinterpret_cast<float*>(memory + 2 * STAGE_WORDS);
    float* scores = queries + Q * call.key_width;
    Stages<Stage> stages(call, tile, memory);
    for (int q = 0; q < Q; q++) {
        const float* from = call.q + static_cast<i64>(q < tile.count ? tile.row(call, q) : 0) *
                                         call.key_width;
        for (int i = static_cast<int>(threadIdx.x); i < call.key_width; i += ATTEND_THREADS)
            queries[q * call.key_width + i] = q < tile.count ? from[i] : 0.0f;
    }
    // The first barrier of the stages stands behind the queries as well.
    key_phase<Stage, Q>(call, stages, queries, scores);
    __syncthreads();
    int from[M], to[M];
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int i = warp_id() * M + m;
        from[m] = to[m] = 0;
        if (i >= Q) continue;
        tile.visible(call, i, from[m], to[m]);
        float top, sum;
        softmax_chunk(scores + i * CHUNK, from[m], to[m], top, sum);
        if (lane_id() == 0 && from[m] < to[m]) {
            const i64 row = tile.row(call, i);
            float* stats = call.stats + (row * call.chunks + tile.part) * 2;
            stats[0] = top;
            stats[1] = sum;
        }
    }
    // A warp reads only the weights that it made, behind the stages' barrier.
    value_phase<Stage, Q, M>(call, tile, stages, scores, from, to);
}

// A block: tile blockIdx.x of cache head blockIdx.z in chunk blockIdx.y of
// those that are seen; a grid may have blocks for more, which end at once.
// `counters` [kv_heads, tiles], zero before and after: the last block of a
// tile that has a chunk merges. Null: `attention_merge` follows.
template <class Stage, int Q>
DEVICE void attend(const AttendCall& call, u32* counters) {
    DYNAMIC_SHARED(uint4, memory);
    const int first = call.first_position();
    if (static_cast<int>(blockIdx.y) >= call.seen_chunks(first)) return;
    Tile tile;
    tile.kv_head = static_cast<int>(blockIdx.z);
    tile.shared = call.heads / call.kv_heads;
    tile.first = static_cast<int>(blockIdx.x) * Q;
    tile.count = min(call.tokens * tile.shared - tile.first, Q);
    tile.part = static_cast<int>(blockIdx.y);
    tile.chunk = call.first_chunk(first) + tile.part;
    const int base = tile.chunk * CHUNK;
    tile.position = first - base;
    tile.start = max(call.first_visible(first + tile.token(0)) - base, 0);
    tile.end = min(tile.position + tile.token(tile.count - 1) + 1, CHUNK);
    if (tile.start < tile.end) chunk_parts<Stage, Q>(call, tile, memory);
    if (!counters) return;

    u32* last = reinterpret_cast<u32*>(memory);
    __syncthreads();
    // Read again: no register holds it while the chunk is computed.
    const int again = call.first_position();
    if (threadIdx.x == 0) {
        // As in arrival.cuh.
        __threadfence();
        u32* counter = counters + blockIdx.z * gridDim.x + blockIdx.x;
        const u32 others = static_cast<u32>(call.seen_chunks(again)) - 1u;
        *last = atomicInc(counter, others) == others;
        __threadfence();
    }
    __syncthreads();
    if (*last == 0) return;
    __threadfence();
    const int slices = (call.value_width + 127) / 128;
    for (int i = warp_id(); i < tile.count * slices; i += ATTEND_WARPS) {
        const int row = tile.row(call, i / slices);
        merge_slice(call, again, row / call.heads, row % call.heads, i % slices);
    }
}

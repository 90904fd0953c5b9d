// Gated DeltaNet in chunks of C = 64 tokens (2412.06464, section 3.3). With
// F[t][s] = a_{s+1} .. a_t the decay from token s to t, F0[t] = a_0 .. a_t,
//   (I + A) D = beta (V - F0 K S),  A[t][s] = beta_t F[t][s] (k_t . k_s), s < t
//   O = F0 Q S + P D,               P[t][s] = F[t][s] (q_t . k_s), s <= t
//   S' = F0[C-1] S + sum_s F[C-1][s] k_s D_s^T
// delta_chunk_scores makes T = (I + A)^-1 beta, P, F0 and F[C-1] of all chunks
// at once; delta_chunk_scan walks over the chunks. Decays are products, never
// differences of logarithms: every factor keeps its relative precision.
// All in binary32 with fused multiply-adds; the order is not that of the steps
// one by one, so answers differ from them by rounding (kernels/src/cuda/
// delta_net.rs states the bound).
//
// Tokens past the end of a prompt have a = 1, beta = 0 and zeros as vectors:
// they change nothing.
#pragma once
#include "delta_net.cuh"

constexpr int C = 64;      // tokens of a chunk
constexpr int TILE = 32;   // keys of a tile, columns of the memory in a block
constexpr int PITCH = 36;  // floats from row to row of a tile: no bank conflicts
constexpr int CHUNK_THREADS = 128;
// Floats per chunk and head: T and P [C, C], F0 and F[C-1] [C].
constexpr int WORK_P = C * C;
constexpr int WORK_F0 = 2 * C * C;
constexpr int WORK_LAST = 2 * C * C + C;
constexpr int CHUNK_WORK = 2 * C * C + 2 * C;

struct ChunkCall {
    const float *mixed, *alpha, *beta, *decay, *decay_bias;
    float *work, *memory, *answers;
    int tokens, key_heads, value_heads, key_dim, value_dim, tiled;

    DEVICE int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
    DEVICE float* work_of(int chunk, int head) const {
        return work + (static_cast<i64>(chunk) * value_heads + head) * CHUNK_WORK;
    }
};

DEVICE float4 float4_at(const float* p) { return *reinterpret_cast<const float4*>(p); }
DEVICE float4 zero4() { return {0.0f, 0.0f, 0.0f, 0.0f}; }

// acc += a b
DEVICE void fma_4(float4& acc, float a, const float4& b) {
    acc.x = fma_rn(a, b.x, acc.x);
    acc.y = fma_rn(a, b.y, acc.y);
    acc.z = fma_rn(a, b.z, acc.z);
    acc.w = fma_rn(a, b.w, acc.w);
}
DEVICE float dot_4(const float4& a, const float4& b, float acc) {
    acc = fma_rn(a.x, b.x, acc);
    acc = fma_rn(a.y, b.y, acc);
    acc = fma_rn(a.z, b.z, acc);
    return fma_rn(a.w, b.w, acc);
}

// `tile [C, PITCH]` = columns `first .. first + TILE` of rows of `from`, zeros
// outside `rows` and `columns`; a row is `stride` floats after the one before.
DEVICE void load_tile(float* tile, const float* from, i64 stride, int rows, int first,
                      int columns) {
    for (int i = static_cast<int>(threadIdx.x); i < C * TILE / 4; i += CHUNK_THREADS) {
        const int row = i / (TILE / 4), column = first + i % (TILE / 4) * 4;
        const bool is_there = row < rows && column < columns;
        *reinterpret_cast<float4*>(tile + row * PITCH + column - first) =
            is_there ? float4_at(from + row * stride + column) : zero4();
    }
}

// Solves (I + A) X = I by columns, a thread each: `x [C, C]` from zeros.
DEVICE void invert(const float* a, float* x, int column) {
    // Rows before a warp's first column are zeros of all its threads.
    const int start = column & ~31;
    for (int t = 0; t < C; t++) {
        if (t < column) {
            x[t * C + column] = 0.0f;
            continue;
        }
        float4 sum = zero4();
        for (int s = start; s < t; s += 4) {
            // Entries of `a` from the diagonal on are zeros.
            const float4 row = float4_at(a + t * C + s);
            sum.x = fma_rn(row.x, s < t ? x[s * C + column] : 0.0f, sum.x);
            sum.y = fma_rn(row.y, s + 1 < t ? x[(s + 1) * C + column] : 0.0f, sum.y);
            sum.z = fma_rn(row.z, s + 2 < t ? x[(s + 2) * C + column] : 0.0f, sum.z);
            sum.w = fma_rn(row.w, s + 3 < t ? x[(s + 3) * C + column] : 0.0f, sum.w);
        }
        x[t * C + column] = (t == column ? 1.0f : 0.0f) - ((sum.x + sum.y) + (sum.z + sum.w));
    }
}

DEVICE void chunk_scores(const ChunkCall& call, int chunk, int head) {
    SHARED(float, tiles, 2 * C * PITCH);  // keys and queries, then X
    SHARED(float, a, C * C);              // F, then A
    SHARED(float, decay, C);
    SHARED(float, strength, C);
    const int thread = static_cast<int>(threadIdx.x);
    const int token = chunk * C + thread, rows = min(call.tokens - chunk * C, C);
    float* work = call.work_of(chunk, head);
    if (thread < C) {
        TokenGates gates = {1.0f, 0.0f};
        if (thread < rows) {
            const i64 at = static_cast<i64>(token) * call.value_heads + head;
            gates = token_gates(call.decay[head], call.decay_bias[head], call.alpha[at],
                                call.beta[at]);
        }
        decay[thread] = gates.decay;
        strength[thread] = gates.strength;
    }
    __syncthreads();
    if (thread < C) {
        float factor = 1.0f, whole = 1.0f;
        for (int t = 0; t < C; t++) {
            factor = t > thread ? factor * decay[t] : 1.0f;
            a[t * C + thread] = factor;
            if (t <= thread) whole = whole * decay[t];
        }
        work[WORK_F0 + thread] = whole;
        work[WORK_LAST + thread] = factor;
    }

    // Thread (ty, tx): tokens t = 4 ty + i against s = tx + 8 j.
    const int key_head = key_head_of(head, call.value_heads, call.key_heads, call.tiled);
    const float* q =
        call.mixed + static_cast<i64>(chunk) * C * call.channels() + key_head * call.key_dim;
    const float* k = q + call.key_heads * call.key_dim;
    float* queries = tiles + C * PITCH;
    const int tx = thread % 8, ty = thread / 8;
    float kk[4][8] = {}, qk[4][8] = {};
    for (int first = 0; first < call.key_dim; first += TILE) {
        __syncthreads();
        load_tile(tiles, k, call.channels(), rows, first, call.key_dim);
        load_tile(queries, q, call.channels(), rows, first, call.key_dim);
        __syncthreads();
        for (int at = 0; at < TILE; at += 4) {
            float4 key[4], query[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                key[i] = float4_at(tiles + (4 * ty + i) * PITCH + at);
                query[i] = float4_at(queries + (4 * ty + i) * PITCH + at);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float4 other = float4_at(tiles + (tx + 8 * j) * PITCH + at);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    kk[i][j] = dot_4(key[i], other, kk[i][j]);
                    qk[i][j] = dot_4(query[i], other, qk[i][j]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = 4 * ty + i, s = tx + 8 * j;
            const float factor = a[t * C + s];
            work[WORK_P + t * C + s] = s <= t ? factor * qk[i][j] : 0.0f;
            a[t * C + s] = s < t ? strength[t] * factor * kk[i][j] : 0.0f;
        }
    }
    __syncthreads();
    if (thread < C) invert(a, tiles, thread);
    __syncthreads();
    for (int i = thread; i < C * C; i += CHUNK_THREADS) work[i] = tiles[i] * strength[i % C];
}

// Thread (ty, tx) has tokens 4 ty .. and columns 4 tx ..: adds the product of
// `left [C, PITCH]` (two tiles: columns 0-31 and 32-63, lower triangular) and
// `right [C, PITCH]`.
DEVICE void add_triangular(const float* left, const float* right, int ty, int tx,
                           float4 (&acc)[4]) {
    for (int s = 0; s < 4 * ty + 4; s += 4) {
        const float* tile = left + (s < TILE ? s : C * PITCH + s - TILE);
        float4 row[4];
#pragma unroll
        for (int e = 0; e < 4; e++) row[e] = float4_at(right + (s + e) * PITCH + 4 * tx);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 weight = float4_at(tile + (4 * ty + i) * PITCH);
            fma_4(acc[i], weight.x, row[0]);
            fma_4(acc[i], weight.y, row[1]);
            fma_4(acc[i], weight.z, row[2]);
            fma_4(acc[i], weight.w, row[3]);
        }
    }
}

DEVICE void chunk_scan(const ChunkCall& call, int head, int slice) {
    DYNAMIC_SHARED(float, state);  // [key_dim, TILE]
    float* delta = state + call.key_dim * TILE;  // [C, PITCH]
    float* tiles = delta + C * PITCH;            // two of [C, PITCH]
    const int thread = static_cast<int>(threadIdx.x), tx = thread % 8, ty = thread / 8;
    const int column = slice * TILE + 4 * tx;
    const bool has_column = column < call.value_dim;
    const int channels = call.channels(), values = call.value_heads * call.value_dim;
    const int key_head = key_head_of(head, call.value_heads, call.key_heads, call.tiled);
    float* memory = call.memory + static_cast<i64>(head) * call.key_dim * call.value_dim;
    for (int row = ty; row < call.key_dim; row += CHUNK_THREADS / 8) {
        *reinterpret_cast<float4*>(state + row * TILE + 4 * tx) =
            has_column ? float4_at(memory + row * call.value_dim + column) : zero4();
    }
    for (int first_token = 0; first_token < call.tokens; first_token += C) {
        const int rows = min(call.tokens - first_token, C);
        const float* work = call.work_of(first_token / C, head);
        const float* q =
            call.mixed + static_cast<i64>(first_token) * channels + key_head * call.key_dim;
        const float* k = q + call.key_heads * call.key_dim;
        const float* v = call.mixed + static_cast<i64>(first_token) * channels +
                         2 * call.key_heads * call.key_dim + head * call.value_dim;

        // K S and Q S.
        float4 recalled[4] = {}, answer[4] = {};
        for (int first = 0; first < call.key_dim; first += TILE) {
            __syncthreads();
            load_tile(tiles, k, channels, rows, first, call.key_dim);
            load_tile(tiles + C * PITCH, q, channels, rows, first, call.key_dim);
            __syncthreads();
            const int width = min(call.key_dim - first, TILE);
            for (int at = 0; at < width; at += 4) {
                float4 cell[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    cell[e] = float4_at(state + (first + at + e) * TILE + 4 * tx);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* row = tiles + (4 * ty + i) * PITCH + at;
                    const float4 key = float4_at(row), query = float4_at(row + C * PITCH);
                    fma_4(recalled[i], key.x, cell[0]);
                    fma_4(recalled[i], key.y, cell[1]);
                    fma_4(recalled[i], key.z, cell[2]);
                    fma_4(recalled[i], key.w, cell[3]);
                    fma_4(answer[i], query.x, cell[0]);
                    fma_4(answer[i], query.y, cell[1]);
                    fma_4(answer[i], query.z, cell[2]);
                    fma_4(answer[i], query.w, cell[3]);
                }
            }
        }
        // V - F0 K S
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = 4 * ty + i;
            const float factor = work[WORK_F0 + t];
            float4 rest = t < rows && has_column
                              ? float4_at(v + static_cast<i64>(t) * channels + column)
                              : zero4();
            fma_4(rest, -factor, recalled[i]);
            *reinterpret_cast<float4*>(delta + t * PITCH + 4 * tx) = rest;
            float4 scaled = zero4();
            fma_4(scaled, factor, answer[i]);
            answer[i] = scaled;
        }
        // D = T (V - F0 K S)
        __syncthreads();
        load_tile(tiles, work, C, C, 0, C);
        load_tile(tiles + C * PITCH, work, C, C, TILE, C);
        __syncthreads();
        float4 solved[4] = {};
        add_triangular(tiles, delta, ty, tx, solved);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++)
            *reinterpret_cast<float4*>(delta + (4 * ty + i) * PITCH + 4 * tx) = solved[i];
        load_tile(tiles, work + WORK_P, C, C, 0, C);
        load_tile(tiles + C * PITCH, work + WORK_P, C, C, TILE, C);
        __syncthreads();
        // O = F0 Q S + P D
        add_triangular(tiles, delta, ty, tx, answer);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = 4 * ty + i;
            if (t >= rows || !has_column) continue;
            float* to = call.answers + static_cast<i64>(first_token + t) * values;
            *reinterpret_cast<float4*>(to + head * call.value_dim + column) = answer[i];
        }
        // S = F0[C-1] S + sum_s F[C-1][s] k_s D_s
        const float whole = work[WORK_F0 + C - 1];
        for (int first = 0; first < call.key_dim; first += TILE) {
            __syncthreads();
            load_tile(tiles, k, channels, rows, first, call.key_dim);
            __syncthreads();
            // Thread (ty, tx) has keys 2 ty, 2 ty + 1 of the tile.
            float4 sum[2] = {};
            for (int s = 0; s < rows; s++) {
                const float2 key = *reinterpret_cast<const float2*>(tiles + s * PITCH + 2 * ty);
                const float last = work[WORK_LAST + s];
                const float4 written = float4_at(delta + s * PITCH + 4 * tx);
                fma_4(sum[0], last * key.x, written);
                fma_4(sum[1], last * key.y, written);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = first + 2 * ty + e;
                if (row >= call.key_dim) continue;
                float4* cell = reinterpret_cast<float4*>(state + row * TILE + 4 * tx);
                fma_4(sum[e], whole, *cell);
                *cell = sum[e];
            }
        }
    }
    __syncthreads();
    if (!has_column) return;
    for (int row = ty; row < call.key_dim; row += CHUNK_THREADS / 8) {
        *reinterpret_cast<float4*>(memory + row * call.value_dim + column) =
            float4_at(state + row * TILE + 4 * tx);
    }
}

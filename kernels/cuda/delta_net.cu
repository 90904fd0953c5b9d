// Gated DeltaNet (2412.06464): the causal convolution, and per value head a
// memory `S [key_dim, value_dim]` with decay and a delta-rule write,
//   S = e^g S; S += k (beta (v - S^T k))^T; o = S^T q,
// token by token (bits of runtime/src/forward/delta_net.rs) or in chunks of 64
// (delta_chunk.cuh). `mixed [tokens, channels]` holds a token's queries and
// keys [key_heads, key_dim] and its values [value_heads, value_dim].
#include "delta_chunk.cuh"
#include "delta_net.cuh"

// Columns of a memory that a block of delta_decode has.
constexpr int DECODE_COLUMNS = 32;

// Input of the convolution at `time` of this chunk; negative: before it.
DEVICE float conv_input(const float* raw, const float* past, int time, int history, int channels,
                        int channel) {
    return time >= 0 ? raw[static_cast<i64>(time) * channels + channel]
                     : past[(history + time) * channels + channel];
}

// The inputs that the next chunk's first outputs need, over the old ones.
DEVICE void keep_inputs(const float* raw, float* past, int tokens, int history, int channels,
                        int channel) {
    for (int i = 0; i < history; i++) {
        past[i * channels + channel] =
            conv_input(raw, past, tokens - history + i, history, channels, channel);
    }
}

// Depth-wise causal convolution and SiLU; then queries and keys are divided
// by their norm per head, queries times `scale`.
//   raw, mixed [tokens, channels], taps [channels, kernel]
//   past [kernel - 1, channels], oldest first: replaced where one block row
//   has all tokens, else by delta_conv_keep
// Moves 8 tokens channels + 4 channels kernel + 8 (kernel - 1) channels bytes.
// Grid: [ceil((2 key_heads + value_heads) / 4), ceil(tokens / tile)] of 128
// threads: a warp has one head and `tile` tokens.
extern "C" __global__ void __launch_bounds__(128)
delta_conv(const float* raw, const float* taps, float* past, float* mixed, int tokens, int tile,
           int key_heads, int value_heads, int key_dim, int value_dim, int kernel, float epsilon,
           float scale) {
    const int head = static_cast<int>(blockIdx.x) * 4 + warp_id();
    if (head >= 2 * key_heads + value_heads) return;
    const int keys = key_heads * key_dim, channels = 2 * keys + value_heads * value_dim;
    const bool is_value = head >= 2 * key_heads;
    const int width = is_value ? value_dim : key_dim;
    const int first = is_value ? 2 * keys + (head - 2 * key_heads) * value_dim : head * key_dim;
    const int history = kernel - 1;
    const int start = static_cast<int>(blockIdx.y) * tile, end = min(start + tile, tokens);
    for (int token = start; token < end; token++) {
        float* out = mixed + static_cast<i64>(token) * channels + first;
        for (int i = lane_id(); i < width; i += 32) {
            float value = 0.0f;
            for (int tap = 0; tap < kernel; tap++) {
                const float input =
                    conv_input(raw, past, token + tap - history, history, channels, first + i);
                value = value + taps[(first + i) * kernel + tap] * input;
            }
            out[i] = value * contract_sigmoid(value);
        }
        if (is_value) continue;
        const float factor = 1.0f / sqrtf(sum_of_squares(out, width) + epsilon);
        for (int i = lane_id(); i < width; i += 32) {
            const float unit = out[i] * factor;
            out[i] = head < key_heads ? unit * scale : unit;
        }
    }
    if (gridDim.y > 1) return;
    for (int i = lane_id(); i < width; i += 32)
        keep_inputs(raw, past, tokens, history, channels, first + i);
}

// The last inputs of a long chunk, after delta_conv has read the old ones.
// Moves 8 (kernel - 1) channels bytes. Grid: a thread per channel.
extern "C" __global__ void __launch_bounds__(128)
delta_conv_keep(const float* raw, float* past, int tokens, int channels, int kernel) {
    const int channel = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (channel < channels) keep_inputs(raw, past, tokens, kernel - 1, channels, channel);
}

// `tokens` steps of every value head, one after the other; then per head RMS
// norm and gate.
//   mixed [tokens, channels], alpha, beta [tokens, value_heads]
//   decay, decay_bias [value_heads], norm [value_dim]
//   gate, answers [tokens, value_heads, value_dim]
//   memory [value_heads, key_dim, value_dim], read and replaced
//   counters [value_heads], zero before and after: the last block of a head
//   normalises
// Moves the memory twice, 8 value_heads key_dim value_dim bytes, and
// 4 tokens (channels + 2 value_heads (value_dim + 1)).
// Grid: [value_heads, ceil(value_dim / 32)] of one warp, a thread per column;
// dynamic shared memory: 128 key_dim for the memory, 8 key_dim for q and k.
extern "C" __global__ void __launch_bounds__(32)
delta_decode(const float* mixed, const float* alpha, const float* beta, const float* decay,
             const float* decay_bias, const float* norm, const float* gate, float* memory,
             float* answers, u32* counters, int tokens, int key_heads, int value_heads,
             int key_dim, int value_dim, int tiled, float epsilon) {
    DYNAMIC_SHARED(float, cells);  // [key_dim, DECODE_COLUMNS]
    float* k = cells + key_dim * DECODE_COLUMNS;
    float* q = k + key_dim;
    const int lane = lane_id(), head = static_cast<int>(blockIdx.x);
    const int first = static_cast<int>(blockIdx.y) * DECODE_COLUMNS, column = first + lane;
    const bool has_column = column < value_dim;
    const int key_head = key_head_of(head, value_heads, key_heads, tiled);
    const int keys = key_heads * key_dim, values = value_heads * value_dim;
    float* own = memory + static_cast<i64>(head) * key_dim * value_dim;
    for (int row = lane / 8; row < key_dim; row += 4) {
        const int at = first + lane % 8 * 4;
        if (at < value_dim)
            cp_async_16(cells + row * DECODE_COLUMNS + lane % 8 * 4, own + row * value_dim + at);
    }
    cp_async_commit();
    for (int token = 0; token < tokens; token++) {
        const float* row = mixed + static_cast<i64>(token) * (2 * keys + values);
        for (int i = lane; i < key_dim; i += 32) {
            q[i] = row[key_head * key_dim + i];
            k[i] = row[keys + key_head * key_dim + i];
        }
        const int at = token * value_heads + head;
        const TokenGates gates =
            token_gates(decay[head], decay_bias[head], alpha[at], beta[at]);
        const float v = has_column ? row[2 * keys + head * value_dim + column] : 0.0f;
        if (token == 0) cp_async_wait<0>();
        __syncthreads();
        if (has_column) {
            float recalled = 0.0f;
            for (int i = 0; i < key_dim; i++) {
                const float cell = cells[i * DECODE_COLUMNS + lane] * gates.decay;
                recalled = recalled + cell * k[i];
            }
            const float delta = (v - recalled) * gates.strength;
            float answer = 0.0f;
            for (int i = 0; i < key_dim; i++) {
                float cell = cells[i * DECODE_COLUMNS + lane] * gates.decay;
                cell = cell + k[i] * delta;
                answer = answer + cell * q[i];
                if (token + 1 < tokens) {
                    cells[i * DECODE_COLUMNS + lane] = cell;
                } else {
                    own[i * value_dim + column] = cell;
                }
            }
            answers[static_cast<i64>(token) * values + head * value_dim + column] = answer;
        }
        __syncthreads();
    }
    __syncthreads();
    u32 earlier = 0;
    if (lane == 0) {
        // As in arrival.cuh.
        __threadfence();
        earlier = atomicInc(counters + head, gridDim.y - 1);
        __threadfence();
    }
    earlier = __shfl_sync(FULL_WARP, earlier, 0);
    if (earlier != gridDim.y - 1) return;
    __syncwarp();
    __threadfence();
    for (int token = 0; token < tokens; token++) {
        const i64 at = static_cast<i64>(token) * values + head * value_dim;
        norm_and_gate(answers + at, gate + at, norm, value_dim, epsilon);
    }
}

// Norm and gate of the answers after delta_chunk_scan; shapes as there.
// Moves 12 tokens value_heads value_dim bytes. Grid: a warp per head of a
// token, 4 in a block.
extern "C" __global__ void __launch_bounds__(128)
delta_norm_gate(const float* norm, const float* gate, float* answers, int tokens, int value_heads,
                int value_dim, float epsilon) {
    const int row = static_cast<int>(blockIdx.x) * 4 + warp_id();
    if (row >= tokens * value_heads) return;
    const i64 at = static_cast<i64>(row) * value_dim;
    norm_and_gate(answers + at, gate + at, norm, value_dim, epsilon);
}

// A chunk of 64 tokens and a value head: what the scan needs that does not
// depend on the memory. See delta_chunk.cuh.
//   mixed, alpha, beta, decay, decay_bias as for delta_decode
//   work [chunks, value_heads, CHUNK_WORK]
// Moves 8 tokens value_heads key_dim bytes (from L2 but for the first of the
// heads that share a key head) and writes 4 CHUNK_WORK per chunk and head.
// Grid: [chunks, value_heads] of 128 threads.
extern "C" __global__ void __launch_bounds__(128)
delta_chunk_scores(const float* mixed, const float* alpha, const float* beta, const float* decay,
                   const float* decay_bias, float* work, int tokens, int key_heads,
                   int value_heads, int key_dim, int value_dim, int tiled) {
    const ChunkCall call = {mixed,   alpha,     beta,        decay,   decay_bias, work,
                            nullptr, nullptr,   tokens,      key_heads, value_heads, key_dim,
                            value_dim, tiled};
    chunk_scores(call, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
}

// All chunks of a value head, one after the other, for 32 columns of its
// memory: answers (before norm and gate) and the new memory.
//   memory [value_heads, key_dim, value_dim], read and replaced
//   answers [tokens, value_heads, value_dim]
// Moves the memory twice, 4 tokens value_heads (3 key_dim + 2 value_dim) bytes
// and 4 CHUNK_WORK per chunk and head; per 32 columns again from L2.
// Grid: [value_heads, ceil(value_dim / 32)] of 128 threads; dynamic shared
// memory: 128 key_dim for the memory, 12 C PITCH for three tiles.
extern "C" __global__ void __launch_bounds__(128)
delta_chunk_scan(const float* mixed, const float* work, float* memory, float* answers, int tokens,
                 int key_heads, int value_heads, int key_dim, int value_dim, int tiled) {
    const ChunkCall call = {mixed,   nullptr, nullptr, nullptr,   nullptr,     const_cast<float*>(work),
                            memory,  answers, tokens,  key_heads, value_heads, key_dim,
                            value_dim, tiled};
    chunk_scan(call, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
}

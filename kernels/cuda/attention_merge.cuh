// A call of decode attention, and the merge of a query's chunks: in index
// order, the sink last; then division and output gate. Bits as
// kernels/src/cpu/attention.rs.
#pragma once
#include "position.cuh"

typedef long long i64;

constexpr int CHUNK = 256;  // positions, at absolute multiples

struct AttendCall {
    const float* q;        // [tokens, heads, key_width]
    u64 keys, values;      // cells, 16-byte aligned rows
    const float* sinks;    // [heads] or null
    const float* gate;     // [tokens, heads, gate_stride] or null
    float* partial;        // [tokens * heads, chunks, value_width]
    float* stats;          // [tokens * heads, chunks, 2]: maximum and sum
    float* out;            // [tokens, heads, value_width]
    int tokens, heads, kv_heads, key_width, value_width;
    const int* step;       // see first_position_of()
    int first;
    int chunks;  // room for those of a query in `partial`, and blocks
    int window;
    float scale;
    int key_head_stride, key_position_stride, value_head_stride, value_position_stride;
    int gate_stride;

    // The first position that a query at `position` sees; window 0: all.
    DEVICE int first_visible(int position) const {
        return window == 0 || position < window ? 0 : position + 1 - window;
    }
    DEVICE int first_position() const { return first_position_of(step, first); }
    // The first chunk that a query sees, the first one being at `position`.
    DEVICE int first_chunk(int position) const { return first_visible(position) / CHUNK; }
    // Chunks from there that any query sees.
    DEVICE int seen_chunks(int position) const {
        return (position + tokens - 1) / CHUNK + 1 - first_chunk(position);
    }
};

// Joins what a later chunk found.
struct Running {
    float top, sum;

    // What the running sums and the later chunk's are multiplied by.
    DEVICE void join(float later_top, float& a, float& b) {
        const float joint = later_top > top ? later_top : top;
        a = contract_exp(top - joint);
        b = contract_exp(later_top - joint);
        top = joint;
    }
};

// Merges the chunks of one query for elements `128 * slice + 4 * lane ..` and
// finishes them: sink, division, output gate. By a warp. `first` is
// call.first_position().
DEVICE void merge_slice(const AttendCall& call, int first, int token, int head, int slice) {
    const int d = 128 * slice + 4 * lane_id();
    if (d >= call.value_width) return;
    const int position = first + token, first_chunk = call.first_chunk(first);
    const int from = call.first_visible(position) / CHUNK - first_chunk;
    const int to = position / CHUNK + 1 - first_chunk;
    const i64 row = static_cast<i64>(token) * call.heads + head;
    const float2* stats = reinterpret_cast<const float2*>(call.stats) + row * call.chunks;
    const float* partial = call.partial + row * call.chunks * call.value_width + d;
    Running running = {float_of(0xff800000u), 0.0f};
    float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
    float2 next_stats = stats[from];
    float4 next = *reinterpret_cast<const float4*>(partial + static_cast<i64>(from) *
                                                                 call.value_width);
    for (int chunk = from; chunk < to; chunk++) {
        const float2 found = next_stats;
        const float4 part = next;
        if (chunk + 1 < to) {
            next_stats = stats[chunk + 1];
            next = *reinterpret_cast<const float4*>(
                partial + static_cast<i64>(chunk + 1) * call.value_width);
        }
        float a, b;
        running.join(found.x, a, b);
        running.sum = fma_rn(running.sum, a, found.y * b);
        acc.x = fma_rn(acc.x, a, part.x * b);
        acc.y = fma_rn(acc.y, a, part.y * b);
        acc.z = fma_rn(acc.z, a, part.z * b);
        acc.w = fma_rn(acc.w, a, part.w * b);
    }
    if (call.sinks) {
        float a, b;
        running.join(call.sinks[head], a, b);
        running.sum = fma_rn(running.sum, a, b);
        acc.x = fma_rn(acc.x, a, 0.0f);
        acc.y = fma_rn(acc.y, a, 0.0f);
        acc.z = fma_rn(acc.z, a, 0.0f);
        acc.w = fma_rn(acc.w, a, 0.0f);
    }
    float4 out = {acc.x / running.sum, acc.y / running.sum, acc.z / running.sum,
                  acc.w / running.sum};
    if (call.gate) {
        const float4 gate = *reinterpret_cast<const float4*>(call.gate + row * call.gate_stride + d);
        out.x = out.x * contract_sigmoid(gate.x);
        out.y = out.y * contract_sigmoid(gate.y);
        out.z = out.z * contract_sigmoid(gate.z);
        out.w = out.w * contract_sigmoid(gate.w);
    }
    *reinterpret_cast<float4*>(call.out + row * call.value_width + d) = out;
}

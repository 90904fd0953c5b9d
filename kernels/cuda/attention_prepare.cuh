// Heads on their way to attention: clamp, RMS norm, rotation, append to the
// cache. One warp per head; bits as runtime/src/forward/attention.rs and
// latent.rs with kernels/src/ops.rs.
#pragma once
#include "position.cuh"

typedef long long i64;

constexpr int NORM_NONE = 0;
constexpr int NORM_HEAD = 1;   // over each head, weights [width]
constexpr int NORM_WHOLE = 2;  // over all heads of a token, weights [heads, width]

// Cells of a KV cache: binary16 to nearest even, or binary32 as it is.
struct HalfCells {
    typedef u16 Cell;
    static DEVICE Cell from(float value) { return f32_to_f16(value); }
};
struct FloatCells {
    typedef float Cell;
    static DEVICE Cell from(float value) { return value; }
};

// Between -limit and limit; a NaN stays.
DEVICE float clamped(float value, float limit) {
    if (value < -limit) return -limit;
    return value > limit ? limit : value;
}

// `1 / sqrt(mean(x^2) + epsilon)` of `x[0..width]` clamped, by a whole warp,
// in 64 lanes: a thread holds lanes `t` and `t + 32`. Every thread answers.
DEVICE float rms_factor(const float* x, int width, float limit, float epsilon) {
    float low = 0.0f, high = 0.0f;
    for (int i = lane_id(); i < width; i += 64) {
        const float first = clamped(x[i], limit);
        low = low + first * first;
        if (i + 32 < width) {
            const float second = clamped(x[i + 32], limit);
            high = high + second * second;
        }
    }
    const float squares = __shfl_sync(FULL_WARP, lane_tree_64(low, high), 0);
    return 1.0f / sqrtf(squares / static_cast<float>(width) + epsilon);
}

// A head as it is read: element `i` is clamped, then, for `i < norm_width`,
// multiplied by `factor` and its weight.
struct Head {
    const float* raw;
    const float* weight;
    int norm_width;
    float factor;
    float limit;

    DEVICE float at(int i) const {
        const float value = clamped(raw[i], limit);
        return i < norm_width ? value * factor * weight[i] : value;
    }
};

// Stores all of a head by a warp: elements `offset .. offset + 2 * half`
// rotated by `angles [half][cos, sin]`, the others as they are read.
template <class Store>
DEVICE void rotate_head(const Head& head, int width, const float* angles, int half, int offset,
                        int neighbours, const Store& store) {
    const int lane = lane_id();
    for (int i = lane; i < half; i += 32) {
        const int first = offset + (neighbours ? 2 * i : i);
        const int second = neighbours ? first + 1 : first + half;
        const float a = head.at(first), b = head.at(second);
        const float2 angle = reinterpret_cast<const float2*>(angles)[i];
        store(first, a * angle.x - b * angle.y);
        store(second, b * angle.x + a * angle.y);
    }
    for (int i = lane; i < width - 2 * half; i += 32) {
        const int at = i < offset ? i : i + 2 * half;
        store(at, head.at(at));
    }
}

struct FloatStore {
    float* to;
    DEVICE void operator()(int i, float value) const { to[i] = value; }
};
template <class Cells>
struct CellStore {
    typename Cells::Cell* to;
    DEVICE void operator()(int i, float value) const { to[i] = Cells::from(value); }
};

// Where a cache keeps head `head` of position `position`; strides in cells.
template <class Cells>
DEVICE CellStore<Cells> cell_store(u64 cells, int head, int head_stride, int position,
                                   int position_stride) {
    const i64 at = static_cast<i64>(head) * head_stride +
                   static_cast<i64>(position) * position_stride;
    return {reinterpret_cast<typename Cells::Cell*>(cells) + at};
}

struct PrepareCall {
    const float *q_raw, *k_raw, *v_raw, *q_norm, *k_norm, *table;
    float* q;
    u64 keys, values;
    int tokens, heads, kv_heads, width, q_stride;
    int norm;
    float epsilon, limit;
    int half, neighbours;
    const int* step;  // see first_position_of()
    int first;
    int key_head_stride, key_position_stride, value_head_stride, value_position_stride;
};

// One warp: a query, key or value head of a token, in this order.
template <class Cells>
DEVICE void prepare_head(const PrepareCall& call, int token, int head) {
    const int position = first_position_of(call.step, call.first) + token;
    const float* angles = call.table + static_cast<i64>(token) * call.half * 2;
    const int width = call.width;
    if (head >= call.heads + call.kv_heads) {
        const int kv_head = head - call.heads - call.kv_heads;
        const i64 row = static_cast<i64>(token) * call.kv_heads + kv_head;
        const Head value = {call.v_raw + row * width, nullptr, 0, 0.0f, call.limit};
        rotate_head(value, width, angles, 0, 0, 0,
                    cell_store<Cells>(call.values, kv_head, call.value_head_stride, position,
                                      call.value_position_stride));
        return;
    }
    const bool is_query = head < call.heads;
    const int index = is_query ? head : head - call.heads;
    const int count = is_query ? call.heads : call.kv_heads;
    // A gated query projection holds each head's query, then its gate.
    const int stride = is_query ? call.q_stride : width;
    const float* token_raw =
        (is_query ? call.q_raw : call.k_raw) + static_cast<i64>(token) * count * stride;
    const float* weight = is_query ? call.q_norm : call.k_norm;
    Head raw = {token_raw + static_cast<i64>(index) * stride, nullptr, 0, 0.0f, call.limit};
    if (call.norm != NORM_NONE) {
        const bool whole = call.norm == NORM_WHOLE;
        raw.weight = whole ? weight + static_cast<i64>(index) * width : weight;
        raw.norm_width = width;
        raw.factor = rms_factor(whole ? token_raw : raw.raw, whole ? count * width : width,
                                call.limit, call.epsilon);
    }
    if (is_query) {
        const i64 row = static_cast<i64>(token) * call.heads + head;
        rotate_head(raw, width, angles, call.half, 0, call.neighbours,
                    FloatStore{call.q + row * width});
    } else {
        rotate_head(raw, width, angles, call.half, 0, call.neighbours,
                    cell_store<Cells>(call.keys, index, call.key_head_stride, position,
                                      call.key_position_stride));
    }
}

struct LatentCall {
    const float *q_raw, *kv_raw, *kv_norm, *table;
    float* absorbed;
    u64 cells;
    int tokens, heads, nope, rope, rank;
    float epsilon;
    int half, neighbours;
    const int* step;  // see first_position_of()
    int first, position_stride;
};

// One warp: the rotary part of a query head, or (head == heads) the token's
// row for the cache.
template <class Cells>
DEVICE void prepare_latent(const LatentCall& call, int token, int head) {
    const int row_width = call.rank + call.rope;
    const float* angles = call.table + static_cast<i64>(token) * call.half * 2;
    const float unlimited = float_of(0x7f800000u);
    if (head < call.heads) {
        const i64 row = static_cast<i64>(token) * call.heads + head;
        const float* q = call.q_raw + row * (call.nope + call.rope) + call.nope;
        const Head raw = {q, nullptr, 0, 0.0f, unlimited};
        rotate_head(raw, call.rope, angles, call.half, 0, call.neighbours,
                    FloatStore{call.absorbed + row * row_width + call.rank});
        return;
    }
    const float* kv = call.kv_raw + static_cast<i64>(token) * row_width;
    const float factor = rms_factor(kv, call.rank, unlimited, call.epsilon);
    const Head raw = {kv, call.kv_norm, call.rank, factor, unlimited};
    rotate_head(raw, row_width, angles, call.half, call.rank, call.neighbours,
                cell_store<Cells>(call.cells, 0, 0,
                                  first_position_of(call.step, call.first) + token,
                                  call.position_stride));
}

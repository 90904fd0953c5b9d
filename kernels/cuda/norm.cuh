// Norms of rows and the quantisation of what they give.
#pragma once
#include "rows.cuh"

// Where one row's quantised form goes: q [cols], scales [cols / group],
// sums [cols / 16]; a null `q` wants none.
struct QuantisedRow {
    i8* q;
    float* scales;
    i16* sums;
};

// One row's part of [tokens, cols] outputs.
template <int group>
DEVICE QuantisedRow quantised_row(i8* q, float* scales, i16* sums, u64 row, int cols) {
    if (q == nullptr) return {nullptr, nullptr, nullptr};
    return {q + row * cols, scales + row * (cols / group), sums + row * (cols / 16)};
}

// Writes eight elements from element `i` of a row that has `cols`; whole warp.
template <int group>
DEVICE void put_quantised(const QuantisedRow& to, const float (&v)[8], int i, int cols) {
    const Eight eight = quantise_eight<group>(v);
    const int sum = group_sum<2>(eight.sum);
    if (i >= cols) return;
    uint2 codes;
    codes.x = eight.codes[0], codes.y = eight.codes[1];
    *reinterpret_cast<uint2*>(to.q + i) = codes;
    if (i % group == 0) to.scales[i / group] = eight.scale;
    if (i % 16 == 0) to.sums[i / 16] = static_cast<i16>(sum);
}

// 64 lanes and a tree over `term(i)`, i < width; called by all threads of a
// block of at least 64, who all get the sum. `halves` is shared, [33].
template <class Term>
DEVICE float lane_sum(int width, const Term& term, float* halves) {
    float lane = 0.0f;
    if (threadIdx.x < 64) {
#pragma unroll 8
        for (int i = static_cast<int>(threadIdx.x); i < width; i += 64) lane = lane + term(i);
        if (threadIdx.x >= 32) halves[threadIdx.x - 32] = lane;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const float sum = lane_tree_64(lane, halves[threadIdx.x]);
        if (threadIdx.x == 0) halves[32] = sum;
    }
    __syncthreads();
    const float sum = halves[32];
    __syncthreads();
    return sum;
}

struct Square {
    const float* x;
    DEVICE float operator()(int i) const { return x[i] * x[i]; }
};
struct Plain {
    const float* x;
    DEVICE float operator()(int i) const { return x[i]; }
};
struct SquareFrom {
    const float* x;
    float mean;
    DEVICE float operator()(int i) const { return (x[i] - mean) * (x[i] - mean); }
};

// What a norm does to an element: (x - mean) * factor * weight + bias, the
// mean and the bias only in LayerNorm.
struct Normal {
    float mean, factor;
    const float* weight;
    const float* bias;
    bool is_layer;

    DEVICE float operator()(float x, int i) const {
        if (!is_layer) return x * factor * weight[i];
        return (x - mean) * factor * weight[i] + (bias == nullptr ? 0.0f : bias[i]);
    }
};

// One row by one block of threads: x (+ scale * delta, written back), its
// norm as floats and quantised in groups of 32 and 256, each where wanted.
// `shared`: [width + 33].
DEVICE void norm_row(float* x, const float* delta, float delta_scale, const float* weight,
                     const float* bias, float epsilon, bool is_layer, int width, float* out,
                     const QuantisedRow& by_32, const QuantisedRow& by_256, float* shared) {
    const int threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
    float* row = shared + 48;
    for (int i = me; i < width; i += threads) {
        float value = x[i];
        if (delta != nullptr) {
            value = value + delta_scale * delta[i];
            x[i] = value;
        }
        row[i] = value;
    }
    __syncthreads();
    const float count = static_cast<float>(width);
    Normal normal = {0.0f, 0.0f, weight, bias, is_layer};
    float squares;
    if (is_layer) {
        normal.mean = lane_sum(width, Plain{row}, shared) / count;
        squares = lane_sum(width, SquareFrom{row, normal.mean}, shared);
    } else {
        squares = lane_sum(width, Square{row}, shared);
    }
    normal.factor = 1.0f / sqrtf(squares / count + epsilon);

    for (int start = warp_id() * 256; start < width; start += threads * 8) {
        const int first = start + 8 * lane_id();
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v[j] = first + j < width ? normal(row[first + j], first + j) : 0.0f;
            if (out != nullptr && first + j < width) out[first + j] = v[j];
        }
        if (by_32.q != nullptr) put_quantised<32>(by_32, v, first, width);
        if (by_256.q != nullptr) put_quantised<256>(by_256, v, first, width);
    }
}

// Pieces of gated DeltaNet (2412.06464) that several kernels use. Bits as
// runtime/src/forward/delta_net.rs, kernels/src/ops.rs and contract.rs.
#pragma once
#include "common.cuh"

typedef long long i64;

// log(1 + e^x) as contract.rs has it.
DEVICE float softplus(float x) {
    if (!(x <= 20.0f)) return x;
    const float e = contract_exp(x);
    const float u = 1.0f + e;
    // u = 2^k m, m in 2/3 .. 4/3.
    const i32 k = static_cast<i32>(bits_of(u) - 0x3f2aaaabu) >> 23;
    const float f = float_of(bits_of(u) - (static_cast<u32>(k) << 23)) - 1.0f;
    const float s = f / (2.0f + f);
    const float z = s * s;
    float p = 1.0f / 9.0f;
    p = fma_rn(p, z, 1.0f / 7.0f);
    p = fma_rn(p, z, 1.0f / 5.0f);
    p = fma_rn(p, z, 1.0f / 3.0f);
    const float twice = s + s;
    const float log_m = fma_rn(twice * z, p, twice);
    // What the sum 1 + e lost.
    const float lost = (e - (u - 1.0f)) / u;
    return fma_rn(static_cast<float>(k), 0.693147182f, log_m + lost);
}

// Sum of squares in 64 lanes and a tree, by a warp; every thread answers.
DEVICE float sum_of_squares(const float* x, int width) {
    float low = 0.0f, high = 0.0f;
    for (int i = lane_id(); i < width; i += 64) {
        low = low + x[i] * x[i];
        if (i + 32 < width) high = high + x[i + 32] * x[i + 32];
    }
    return __shfl_sync(FULL_WARP, lane_tree_64(low, high), 0);
}

// What one token does to a value head: `exp(decay softplus(alpha + bias))`
// and `sigmoid(beta)`.
struct TokenGates {
    float decay, strength;
};
DEVICE TokenGates token_gates(float decay, float decay_bias, float alpha, float beta) {
    return {contract_exp(decay * softplus(alpha + decay_bias)), contract_sigmoid(beta)};
}

// The key head of a value head; `tiled`: GGUF's order.
DEVICE int key_head_of(int head, int value_heads, int key_heads, int tiled) {
    return tiled ? head % key_heads : head / (value_heads / key_heads);
}

// One answer in place, by a warp: RMS norm with `weight [width]`, then times
// silu of `gate [width]`.
DEVICE void norm_and_gate(float* answer, const float* gate, const float* weight, int width,
                          float epsilon) {
    const float squares = sum_of_squares(answer, width);
    const float factor = 1.0f / sqrtf(squares / static_cast<float>(width) + epsilon);
    for (int i = lane_id(); i < width; i += 32) {
        const float z = gate[i];
        answer[i] = answer[i] * factor * weight[i] * (z * contract_sigmoid(z));
    }
}

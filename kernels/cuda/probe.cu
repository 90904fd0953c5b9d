// What the machine itself reaches, for kernels to be compared with: a copy, a
// read, matrix products out of registers, and a launch of nothing. Used by
// kernels/examples/gpu_bench only.
#include "common.cuh"

// Nothing: what a launch costs. Moves no bytes. One block of one warp.
extern "C" __global__ void __launch_bounds__(32) probe_empty(int) {}

// to [words] = from [words], words of 16 bytes. Moves 2 * 16 * words bytes.
// Any number of blocks of 256.
extern "C" __global__ void __launch_bounds__(256)
    probe_copy(uint4* to, const uint4* from, u64 words) {
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    // Four loads under way in each thread.
    for (; i + 3 * stride < words; i += 4 * stride) {
        const uint4 a = load_16(from + i);
        const uint4 b = load_16(from + i + stride);
        const uint4 c = load_16(from + i + 2 * stride);
        const uint4 d = load_16(from + i + 3 * stride);
        to[i] = a;
        to[i + stride] = b;
        to[i + 2 * stride] = c;
        to[i + 3 * stride] = d;
    }
    for (; i < words; i += stride) to[i] = load_16(from + i);
}

DEVICE u32 all_of(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// out [threads of the grid] = exclusive or of the words of 4 bytes that a
// thread has read; words of 16 bytes. Moves 16 * words bytes. Any number of
// blocks of 256.
extern "C" __global__ void __launch_bounds__(256)
    probe_read(u32* out, const uint4* from, u64 words) {
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    const u64 first = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    u64 i = first;
    u32 sum = 0;
    for (; i + 3 * stride < words; i += 4 * stride) {
        const uint4 a = load_16(from + i);
        const uint4 b = load_16(from + i + stride);
        const uint4 c = load_16(from + i + 2 * stride);
        const uint4 d = load_16(from + i + 3 * stride);
        sum ^= all_of(a) ^ all_of(b) ^ all_of(c) ^ all_of(d);
    }
    for (; i < words; i += stride) sum ^= all_of(load_16(from + i));
    out[first] = sum;
}

// Products under way in each warp of the two kernels below: enough to hide
// each one's latency.
#define CHAINS 8

// out [threads of the grid] = what a thread's accumulators add up to: each
// round adds CHAINS products of ones, 16 x 8 x 32 (int8), to them. Moves no
// bytes. Any number of blocks of 256.
extern "C" __global__ void __launch_bounds__(256) probe_mma_s8(i32* out, int rounds) {
    i32 d[CHAINS][4] = {};
    const u32 a[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
    const u32 b[2] = {0x01010101u, 0x01010101u};
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) mma_s8(d[chain], a, b);
    }
    i32 sum = 0;
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) {
        sum += d[chain][0] + d[chain][1] + d[chain][2] + d[chain][3];
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// The same with products 16 x 8 x 16 of binary16 ones in binary32.
extern "C" __global__ void __launch_bounds__(256) probe_mma_f16(float* out, int rounds) {
    float d[CHAINS][4] = {};
    const u32 a[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    const u32 b[2] = {0x3c003c00u, 0x3c003c00u};
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) mma_f16(d[chain], a, b);
    }
    float sum = 0.0f;
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) {
        sum += d[chain][0] + d[chain][1] + d[chain][2] + d[chain][3];
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// What every kernel shares: types, rounding, the contract's functions, warp
// helpers, and wrappers around everything that is inline PTX.
//
// On a GPU the wrappers below are PTX or builtins; with PREGATE_HOST the
// stand-in's `cuda_host.h`, which is included before any source, gives the
// wrappers and CUDA's own names (threadIdx, shuffles, __dp4a, ...).
//
// Compiled without fused contraction, with correctly rounded division and
// square root and with subnormals: `a * b + c` is two roundings, `fma_rn` one.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define FULL_WARP 0xffffffffu

// ---------------------------------------------------------------- wrappers
#ifndef PREGATE_HOST

// Static and dynamic shared memory, 16-byte aligned.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(dynamic_shared)

// a * b + c in one rounding.
DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// IEEE binary16 in the low bits of a u16; both exact or to nearest even.
DEVICE float f16_to_f32(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE u16 f32_to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// 16 bytes through the read-only path; `p` is 16-byte aligned.
DEVICE uint4 load_16(const void* p) { return __ldg(reinterpret_cast<const uint4*>(p)); }

// Copies 16 bytes from device to shared memory, both 16-byte aligned, past the
// registers where the machine can (sm_80). A thread sees its own copies after
// `cp_async_wait`, other threads' after a barrier behind it.
DEVICE void cp_async_16(void* to_shared, const void* from) {
#if __CUDA_ARCH__ >= 800
    u32 to = static_cast<u32>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
    *reinterpret_cast<uint4*>(to_shared) = load_16(from);
#endif
}
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's newest groups are under way.
template <int pending>
DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// d += a b, m16n8k32, int8 in int32. With g = lane / 4 and t = lane % 4:
// a[0], a[1]: rows g, g + 8, k 4t..4t+3; a[2], a[3]: the same rows, k + 16;
// b[0], b[1]: column g, k 4t..4t+3 and k + 16; d[0], d[1]: row g, columns
// 2t, 2t + 1; d[2], d[3]: row g + 8.
DEVICE void mma_s8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#define PREGATE_M8N8K16(d0, d1, a0, b0)                        \
    asm volatile(                                              \
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 "      \
        "{%0,%1}, {%2}, {%3}, {%0,%1};"                        \
        : "+r"(d0), "+r"(d1)                                   \
        : "r"(a0), "r"(b0))
    PREGATE_M8N8K16(d[0], d[1], a[0], b[0]);
    PREGATE_M8N8K16(d[2], d[3], a[1], b[0]);
    PREGATE_M8N8K16(d[0], d[1], a[2], b[1]);
    PREGATE_M8N8K16(d[2], d[3], a[3], b[1]);
#undef PREGATE_M8N8K16
#endif
}

// d += a b, m16n8k16, binary16 in binary32 (two elements a register, the
// lower k in the low half). a[0], a[1]: rows g, g + 8, k 2t, 2t+1; a[2], a[3]:
// k + 8; b[0], b[1]: column g, k 2t, 2t+1 and k + 8; d as in `mma_s8`.
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#define PREGATE_M16N8K8(a0, a1, b0)                            \
    asm volatile(                                              \
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "    \
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"         \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
        : "r"(a0), "r"(a1), "r"(b0))
    PREGATE_M16N8K8(a[0], a[1], b[0]);
    PREGATE_M16N8K8(a[2], a[3], b[1]);
#undef PREGATE_M16N8K8
#endif
}

// Asks for the 128 bytes around `p` to come to the second-level cache.
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Words that the host and other work on the device read and write while a
// kernel runs. What a thread has written, and what its block wrote before a
// barrier in front of the store, is seen by who reads the stored word (PTX
// manual, memory consistency model; .sys reaches the host).
DEVICE u64 load_acquire_system(const u64* p) {
    u64 v;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u32 load_acquire_system(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE void store_release_system(u64* p, u64 v) {
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// The device's clock. Its steps may be as long as a microsecond.
DEVICE u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// A rest in a loop that waits for the host: reads of its memory cross the link.
DEVICE void pause() { __nanosleep(100); }

#else

DEVICE void prefetch_l2(const void*) {}

#endif  // PREGATE_HOST

// d += a b, m16n8k16, int8 in int32: the half of `mma_s8` with k below 16.
DEVICE void mma_s8_16(i32 (&d)[4], u32 above, u32 below, u32 b) {
#if !defined(PREGATE_HOST) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(above), "r"(below), "r"(b));
#else
    const u32 rows[4] = {above, below, 0, 0};
    const u32 column[2] = {b, 0};
    mma_s8(d, rows, column);
#endif
}

// ------------------------------------------------------- numbers and loads

// The bits of a float, and back.
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }

// To the nearest integer, ties to even; saturates, NaN gives 0.
DEVICE int round_to_int(float x) { return __float2int_rn(x); }

// Low word of `high:low >> bits`, bits in 0..=31.
DEVICE u32 funnel_right(u32 low, u32 high, int bits) { return __funnelshift_r(low, high, bits); }

// Byte i of the answer is byte (selector >> 4 i) & 7 of `high:low`; bit 3 of a
// selector nibble must be clear. Only the low 16 bits of `selector` matter.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

DEVICE float bf16_to_f32(u16 h) { return float_of(static_cast<u32>(h) << 16); }

// A little-endian u16 at an even address of any memory, and one at any
// address.
DEVICE u16 load_u16(const u8* p) { return *reinterpret_cast<const u16*>(p); }
DEVICE u16 load_u16_bytes(const u8* p) { return static_cast<u16>(p[0] | p[1] << 8); }

// `count` consecutive little-endian words from an address of which `align`
// (1, 2, 4, 8 or 16) is known to be a divisor. Less than 4: reads the aligned
// words that cover them, so up to three bytes on either side.
template <int align, int count>
DEVICE void load_words(const u8* p, u32 (&out)[count]) {
    if constexpr (align >= 16 && count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < count; i += 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(p + 4 * i);
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        }
    } else if constexpr (align >= 8 && count % 2 == 0) {
#pragma unroll
        for (int i = 0; i < count; i += 2) {
            const uint2 v = *reinterpret_cast<const uint2*>(p + 4 * i);
            out[i] = v.x, out[i + 1] = v.y;
        }
    } else if constexpr (align >= 4) {
#pragma unroll
        for (int i = 0; i < count; i++) out[i] = reinterpret_cast<const u32*>(p)[i];
    } else {
        const u64 address = reinterpret_cast<u64>(p);
        const u32* words = reinterpret_cast<const u32*>(p - (address & 3));
        const int bits = static_cast<int>(address & 3) * 8;
        u32 low = words[0];
#pragma unroll
        for (int i = 0; i < count; i++) {
            // An aligned address must not read the word behind its last one.
            const u32 high = words[i + 1 < count || bits != 0 ? i + 1 : i];
            out[i] = funnel_right(low, high, bits);
            low = high;
        }
    }
}

// ------------------------------------------------------------ the contract

// docs/architecture.md "Numerical contract", exp(x).
DEVICE float contract_exp(float x) {
    if (x != x) return x;
    if (x < -87.0f) return 0.0f;
    if (x > 88.0f) return float_of(0x7f800000u);
    const float n = static_cast<float>(round_to_int(x * 1.44269504f));
    float r = fma_rn(n, -0.693359375f, x);
    r = fma_rn(n, 2.12194440e-4f, r);
    float p = 1.0f / 720.0f;
    p = fma_rn(p, r, 1.0f / 120.0f);
    p = fma_rn(p, r, 1.0f / 24.0f);
    p = fma_rn(p, r, 1.0f / 6.0f);
    p = fma_rn(p, r, 1.0f / 2.0f);
    p = fma_rn(p, r, 1.0f);
    p = fma_rn(p, r, 1.0f);
    return float_of(bits_of(p) + (static_cast<u32>(static_cast<i32>(n)) << 23));
}

DEVICE float contract_sigmoid(float x) { return 1.0f / (1.0f + contract_exp(-x)); }
DEVICE float contract_silu(float x) { return x / (1.0f + contract_exp(-x)); }

// `activation` 0: silu(gate) * up; 1: gpt-oss's clamped SwiGLU.
DEVICE float contract_gated(int activation, float alpha, float limit, float gate, float up) {
    if (activation == 0) return contract_silu(gate) * up;
    // Comparisons, not fminf: a NaN stays.
    const float g = gate > limit ? limit : gate;
    const float below = up > limit ? limit : up;
    const float u = below < -limit ? -limit : below;
    return (u + 1.0f) * (g * contract_sigmoid(alpha * g));
}

// Largest magnitude's bits of a group -> its scale, and what elements are
// multiplied by (0 where every code is 0).
DEVICE void quantisation_scale(u32 magnitude, float& scale, float& inverse) {
    const float largest = float_of(magnitude);
    inverse = 0.0f;
    if (magnitude >= 0x7f800000u) {
        scale = float_of(0x7fc00000u);
    } else if (largest < 7.8886090522101181e-31f) {  // 2^-100
        scale = 0.0f;
    } else {
        scale = largest / 127.0f;
        inverse = 127.0f / largest;
    }
}

// The code of one element; `inverse` 0 means that the group has none (the
// element may be infinite then).
DEVICE int quantised(float x, float inverse) {
    return inverse == 0.0f ? 0 : round_to_int(x * inverse);
}

DEVICE u32 pack_codes(int a, int b, int c, int d) {
    return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | static_cast<u32>(d) << 24;
}

// --------------------------------------------------------- warps and trees

DEVICE int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
DEVICE int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

// Over aligned groups of `width` lanes (a power of two); every lane answers.
template <int width>
DEVICE u32 group_max(u32 v) {
#pragma unroll
    for (int s = width / 2; s > 0; s /= 2) {
        const u32 other = __shfl_xor_sync(FULL_WARP, v, s);
        v = other > v ? other : v;
    }
    return v;
}
template <int width>
DEVICE int group_sum(int v) {
#pragma unroll
    for (int s = width / 2; s > 0; s /= 2) v += __shfl_xor_sync(FULL_WARP, v, s);
    return v;
}

// The contract's tree over aligned groups of `width` lanes, lane i of a group
// holding lane i of the sum: `lane[i] += lane[i + s]`. The answer is in lane 0
// of each group.
template <int width>
DEVICE float lane_tree(float v) {
#pragma unroll
    for (int s = width / 2; s > 0; s /= 2) v += __shfl_down_sync(FULL_WARP, v, s);
    return v;
}

// The tree over 64 lanes, of which lane i of a warp holds i (`low`) and
// i + 32 (`high`). The answer is in lane 0.
DEVICE float lane_tree_64(float low, float high) { return lane_tree<32>(low + high); }

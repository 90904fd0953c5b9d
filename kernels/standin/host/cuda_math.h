// CUDA's arithmetic builtins, with the device's rounding and edge cases.
// Approximate ones (__expf, rsqrtf, __fdividef ...) are left out on purpose:
// a kernel that uses one does not build here.
#pragma once

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(2) char2 { signed char x, y; };
struct alignas(2) uchar2 { unsigned char x, y; };
struct alignas(4) short2 { short x, y; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) short4 { short x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) double2 { double x, y; };
struct uint3 { unsigned x, y, z; };
struct int3 { int x, y, z; };
struct float3 { float x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline char4 make_char4(signed char x, signed char y, signed char z, signed char w) {
  return {x, y, z, w};
}

inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline int __float_as_int(float value) { return __builtin_bit_cast(int, value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float a) { return a >= 0.0f ? (a <= 1.0f ? a : 1.0f) : 0.0f; }

// Conversions saturate and send NaN to 0, as cvt does; a plain cast of a value
// out of range is undefined in C++ and is reported (hooks.cpp).
inline int standin_to_int(float a) {
  if (!(a == a)) return 0;
  if (a >= 2147483648.0f) return 2147483647;
  if (a < -2147483648.0f) return -2147483647 - 1;
  return int(a);
}
inline unsigned standin_to_unsigned(float a) {
  if (!(a > 0.0f)) return 0;
  return a >= 4294967296.0f ? 0xffffffffu : unsigned(a);
}
inline int __float2int_rn(float a) { return standin_to_int(rintf(a)); }
inline int __float2int_rz(float a) { return standin_to_int(truncf(a)); }
inline int __float2int_rd(float a) { return standin_to_int(floorf(a)); }
inline int __float2int_ru(float a) { return standin_to_int(ceilf(a)); }
inline unsigned __float2uint_rn(float a) { return standin_to_unsigned(rintf(a)); }
inline unsigned __float2uint_rz(float a) { return standin_to_unsigned(truncf(a)); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __ll2float_rn(long long a) { return float(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(unsigned(a)); }
inline int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline unsigned __brev(unsigned a) {
  unsigned out = 0;
  for (int i = 0; i < 32; i++) out |= ((a >> i) & 1u) << (31 - i);
  return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned(((uint64_t(high) << 32) | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned((((uint64_t(high) << 32) | low) << (by & 31)) >> 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t(high) << 32) | low;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = (selector >> (4 * i)) & 15;
    unsigned byte = unsigned(bytes >> (8 * (pick & 7))) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;  // replicate the sign
    out |= byte << (8 * i);
  }
  return out;
}
inline int __dp4a(int a, int b, int c) {
  unsigned sum = unsigned(c);  // wraps, as the instruction does
  for (int i = 0; i < 4; i++)
    sum += unsigned(int((signed char)(unsigned(a) >> (8 * i))) * int((signed char)(unsigned(b) >> (8 * i))));
  return int(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += ((a >> (8 * i)) & 255u) * ((b >> (8 * i)) & 255u);
  return c;
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
using std::isfinite;
using std::isinf;
using std::isnan;

inline float f16_to_f32(unsigned short half) {
  const unsigned sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, rest = half & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | rest << 13);
  if (exponent == 0) {
    return __uint_as_float(sign | __float_as_uint(float(rest) * 0x1p-24f));
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | rest << 13);
}
// Round to nearest even; NaN becomes the device's canonical NaN.
inline unsigned short f32_to_f16(float value) {
  const unsigned bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u;
  const unsigned size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // 65520 and above
  if (size < 0x38800000u) {  // below 2^-14: the unit of 0.5 is that of a subnormal half
    return (unsigned short)(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u));
  }
  return (unsigned short)(sign | ((size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13));
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
// 16 bytes on the read-only path; the address must be a multiple of 16.
inline uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }

inline unsigned atomicAdd(unsigned* a, unsigned v) { return standin::atomic_32(standin::Atomic::add, a, v); }
inline int atomicAdd(int* a, int v) { return standin::atomic_signed(standin::Atomic::add, a, v); }
inline unsigned long long atomicAdd(unsigned long long* a, unsigned long long v) {
  return standin::atomic_64(standin::Atomic::add, a, v);
}
inline unsigned atomicInc(unsigned* a, unsigned limit) {
  return standin::atomic_32(standin::Atomic::increment, a, limit);
}
inline unsigned atomicMax(unsigned* a, unsigned v) { return standin::atomic_32(standin::Atomic::maximum, a, v); }
inline int atomicMax(int* a, int v) { return standin::atomic_signed(standin::Atomic::maximum, a, v); }
inline unsigned long long atomicMax(unsigned long long* a, unsigned long long v) {
  return standin::atomic_64(standin::Atomic::maximum, a, v);
}
inline unsigned atomicMin(unsigned* a, unsigned v) { return standin::atomic_32(standin::Atomic::minimum, a, v); }
inline int atomicMin(int* a, int v) { return standin::atomic_signed(standin::Atomic::minimum, a, v); }
inline unsigned atomicOr(unsigned* a, unsigned v) { return standin::atomic_32(standin::Atomic::bit_or, a, v); }
inline unsigned atomicAnd(unsigned* a, unsigned v) { return standin::atomic_32(standin::Atomic::bit_and, a, v); }
inline unsigned atomicExch(unsigned* a, unsigned v) { return standin::atomic_32(standin::Atomic::exchange, a, v); }
inline unsigned atomicCAS(unsigned* a, unsigned expected, unsigned v) {
  return standin::atomic_compare(a, expected, v);
}

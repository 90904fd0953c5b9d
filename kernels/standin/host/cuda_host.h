// What a .cu file of ours sees when g++ compiles it for the CPU. Included
// before the file, which stays as it is: CUDA's keywords vanish, its builtins
// are functions of the machine in machine.cpp (one fiber per CUDA thread).
// Every memory access of a kernel is checked there too: the .cu files are
// compiled with -fsanitize=thread,bounds,..., whose entry points are ours
// (hooks.cpp), not libtsan's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define PREGATE_HOST 1
// The variant of the sources, as for the PTX of that target.
#ifdef PREGATE_CU
#define __CUDA_ARCH__ (10 * PREGATE_STANDIN_ARCH)
#endif
#ifdef PREGATE_SCAN  // the generator of build.rs looks for these words
#define __global__ pregate_kernel
#define __launch_bounds__(...) pregate_bounds(__VA_ARGS__)
#else
#define __global__ __attribute__((noinline, visibility("hidden")))
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#ifdef PREGATE_CU  // a .cu file: no header of the system comes after this one
#define __noinline__ __attribute__((noinline))
#endif
#define __align__(n) __attribute__((aligned(n)))

namespace standin {

struct Dim3 {
  unsigned x, y, z;
};

// A shared array of the source: one per SHARED() and per instantiation.
struct SharedSite {
  const char* name;
  const char* file;
  unsigned line;
  unsigned bytes, align;
  unsigned id;  // 0 until the machine has seen it
};

Dim3 thread_index();
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();

void* shared_static(SharedSite& site);
void* shared_dynamic();

void block_barrier(const char* file, unsigned line);
void pause_thread(const char* file, unsigned line);
uint64_t nanoseconds();
void fence();
uint64_t load_acquire(const void* address);
uint32_t load_acquire_32(const void* address);
void store_release(void* address, uint64_t value);
void warp_barrier(unsigned mask, const char* file, unsigned line);

enum class Shuffle : unsigned { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle how, unsigned mask, uint64_t value, int lane, int width, const char* file,
                 unsigned line);
unsigned ballot(unsigned mask, bool predicate, const char* file, unsigned line);

enum class Atomic : unsigned { add, exchange, maximum, minimum, bit_and, bit_or, increment };
uint32_t atomic_32(Atomic how, void* address, uint32_t value);
int32_t atomic_signed(Atomic how, void* address, int32_t value);
uint64_t atomic_64(Atomic how, void* address, uint64_t value);
uint32_t atomic_compare(void* address, uint32_t expected, uint32_t value);

void mma_s8(int* c, const unsigned* a, const unsigned* b, const char* file, unsigned line);
void mma_f16(float* c, const unsigned* a, const unsigned* b, const char* file, unsigned line);

void async_copy_16(void* shared, const void* source);
void async_commit();
void async_wait(unsigned left);

[[noreturn]] void trap(const char* file, unsigned line);

template <class T>
inline T shuffle_of(Shuffle how, unsigned mask, T value, int lane, int width, const char* file,
                    unsigned line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(how, mask, bits, lane, width, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Called by the generated registration of every kernel.
struct KernelSource {
  const char* module;  // the .cu file's name without its end
  const char* name;
  unsigned max_threads;  // of __launch_bounds__; 0 when there is none
  unsigned params;
  unsigned param_bytes[64];
  void (*call)(void* const* args);
};
void register_kernel(const KernelSource* kernel);

template <unsigned... I>
struct Indices {};
template <unsigned n, unsigned... I>
struct MakeIndices : MakeIndices<n - 1, n - 1, I...> {};
template <unsigned... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <auto kernel>
struct Register;
template <class... A, void (*kernel)(A...)>
struct Register<kernel> {
  static_assert(sizeof...(A) <= 64, "a kernel has at most 64 parameters here");
  static_assert((std::is_scalar_v<A> && ...), "parameters are pointers and numbers");
  KernelSource source;
  template <unsigned... I>
  static void call_with(void* const* args, Indices<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(args[I])...);
  }
  static void call(void* const* args) {
    call_with(args, typename MakeIndices<sizeof...(A)>::type{});
  }
  Register(const char* module, const char* name, unsigned max_threads)
      : source{module, name, max_threads, sizeof...(A), {unsigned(sizeof(A))...}, &call} {
    register_kernel(&source);
  }
};

}  // namespace standin

// Shared memory. SHARED declares a reference to an array, so that sizeof, a
// range and the bounds check of the compiler work.
#define SHARED(type, name, count)                                                              \
  static ::standin::SharedSite name##_site = {#name, __FILE__, __LINE__,                       \
                                              unsigned(sizeof(type) * (count)), alignof(type), \
                                              0};                                              \
  type(&name)[count] = *static_cast<type(*)[count]>(::standin::shared_static(name##_site))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::standin::shared_dynamic())

#define threadIdx (::standin::thread_index())
#define blockIdx (::standin::block_index())
#define blockDim (::standin::block_dim())
#define gridDim (::standin::grid_dim())
constexpr int warpSize = 32;

// Where a call stands in the source, for reports: default arguments of every
// collective, so that the text of the call stays CUDA's.
#define PREGATE_HERE const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()

inline void __syncthreads(PREGATE_HERE) { standin::block_barrier(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, PREGATE_HERE) {
  standin::warp_barrier(mask, file, line);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, PREGATE_HERE) {
  return standin::shuffle_of(standin::Shuffle::index, mask, value, lane, width, file, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, PREGATE_HERE) {
  return standin::shuffle_of(standin::Shuffle::up, mask, value, int(by), width, file, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, PREGATE_HERE) {
  return standin::shuffle_of(standin::Shuffle::down, mask, value, int(by), width, file, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, PREGATE_HERE) {
  return standin::shuffle_of(standin::Shuffle::exclusive_or, mask, value, with, width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PREGATE_HERE) {
  return standin::ballot(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, PREGATE_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PREGATE_HERE) {
  return __ballot_sync(mask, predicate, file, line) == 0xffffffffu;
}
inline void __trap(PREGATE_HERE) { standin::trap(file, line); }
inline void __threadfence() { standin::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { standin::fence(); }

#include "cuda_math.h"

// The wrappers around inline PTX that common.cuh has for the device; shapes
// and lanes as in the PTX manual.
// mma_s8: m16n8k32, c[4] += a[4] (s8, row) * b[2] (s8, column), exact.
// mma_f16: m16n8k16, c[4] (f32) += a[4] (f16, row) * b[2] (f16, column).
template <class C, class A, class B>
inline void mma_s8(C& c, const A& a, const B& b, PREGATE_HERE) {
  standin::mma_s8(reinterpret_cast<int*>(&c[0]), reinterpret_cast<const unsigned*>(&a[0]),
                  reinterpret_cast<const unsigned*>(&b[0]), file, line);
}
template <class A, class B>
inline void mma_f16(float* c, const A& a, const B& b, PREGATE_HERE) {
  standin::mma_f16(c, reinterpret_cast<const unsigned*>(&a[0]),
                   reinterpret_cast<const unsigned*>(&b[0]), file, line);
}
// Copies 16 bytes from global to shared memory; it lands in cp_async_wait.
inline void cp_async_16(void* shared, const void* source) {
  ::standin::async_copy_16(shared, source);
}
inline void cp_async_commit() { ::standin::async_commit(); }
// Waits until at most `left` of this thread's committed groups are in flight.
template <int left>
inline void cp_async_wait() {
  ::standin::async_wait(unsigned(left));
}

// What a thread that waits for the host calls. A launch whose threads all rest
// is suspended until the next call of the driver.
inline void pause(PREGATE_HERE) { standin::pause_thread(file, line); }
// How often the launch has gone on, in the place of the time.
inline unsigned long long nanoseconds() { return standin::nanoseconds(); }
inline unsigned long long load_acquire_system(const unsigned long long* at) {
  return standin::load_acquire(at);
}
inline unsigned load_acquire_system(const unsigned* at) { return standin::load_acquire_32(at); }
inline void store_release_system(unsigned long long* at, unsigned long long value) {
  standin::store_release(at, value);
}

// What a .cu file calls: indices, barriers, collectives of a warp, atomics,
// copies. Matrix products follow the fragment layouts of the PTX manual,
// "Matrix multiply-accumulate operation using mma instruction".
#include <cmath>

#include "machine.h"
#include "report.h"

namespace standin {

static Machine& machine() { return *Machine::current(); }

Dim3 thread_index() { return machine().fiber().index; }
Dim3 block_index() { return machine().block_at; }
Dim3 block_dim() { return machine().launch->block; }
Dim3 grid_dim() { return machine().launch->grid; }

void* shared_static(SharedSite& site) { return machine().static_shared(site); }
void* shared_dynamic() { return machine().dynamic_shared(); }

void block_barrier(const char* file, unsigned line) { machine().block_barrier({file, line}); }
void pause_thread(const char* file, unsigned line) { machine().pause({file, line}); }
uint64_t nanoseconds() { return machine().nanoseconds(); }

static Request request(const char* what, unsigned mask, const char* file, unsigned line,
                       void (*run)(Request* const*)) {
  Request made{};
  made.run = run;
  made.what = what;
  made.place = {file, line};
  made.mask = mask;
  return made;
}

static void run_order(Request* const*) { machine().warp_ordered(); }

void warp_barrier(unsigned mask, const char* file, unsigned line) {
  Request mine = request("__syncwarp", mask, file, line, run_order);
  machine().collective(mine);
}

static void run_shuffle(Request* const* lanes) {
  uint64_t values[WARP];
  for (unsigned i = 0; i < WARP; i++) values[i] = lanes[i]->value;
  for (int i = 0; i < int(WARP); i++) {
    Request& mine = *lanes[i];
    const int first = i & ~(mine.width - 1), last = first + mine.width - 1;
    int from = i;
    switch (Shuffle(mine.how)) {
      case Shuffle::index: from = first + (mine.lane & (mine.width - 1)); break;
      case Shuffle::up: from = i - mine.lane >= first ? i - mine.lane : i; break;
      case Shuffle::down: from = i + mine.lane <= last ? i + mine.lane : i; break;
      case Shuffle::exclusive_or: from = (i ^ mine.lane) <= last ? i ^ mine.lane : i; break;
    }
    mine.value = values[from];
  }
}

uint64_t shuffle(Shuffle how, unsigned mask, uint64_t value, int lane, int width, const char* file,
                 unsigned line) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  Request mine = request(names[unsigned(how)], mask, file, line, run_shuffle);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    machine().fail(format("a shuffle of width %d at %s", width, source_line(file, line).c_str()));
  }
  if (how != Shuffle::index && (lane < 0 || lane > 31)) {
    machine().fail(format("a shuffle by %d lanes at %s", lane, source_line(file, line).c_str()));
  }
  mine.how = unsigned(how);
  mine.value = value;
  mine.lane = lane;
  mine.width = width;
  machine().collective(mine);
  return mine.value;
}

static void run_ballot(Request* const* lanes) {
  uint64_t all = 0;
  for (unsigned i = 0; i < WARP; i++) all |= lanes[i]->value << i;
  for (unsigned i = 0; i < WARP; i++) lanes[i]->value = all;
}

unsigned ballot(unsigned mask, bool predicate, const char* file, unsigned line) {
  Request mine = request("__ballot_sync", mask, file, line, run_ballot);
  mine.value = predicate;
  machine().collective(mine);
  return unsigned(mine.value);
}

static int signed_byte(unsigned word, unsigned at) { return int(int8_t(word >> (8 * at))); }

// m16n8k32: lane = 4 g + t. a[r] holds row g + 8 (r & 1), columns 16 (r >> 1) +
// 4 t ..; b[r] rows 16 r + 4 t .. of column g; c[i] row g + 8 (i >> 1), column
// 2 t + (i & 1).
static void run_mma_s8(Request* const* lanes) {
  int8_t a[16][32], b[8][32];  // b by column
  for (unsigned lane = 0; lane < WARP; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned r = 0; r < 4; r++) {
      for (unsigned i = 0; i < 4; i++) {
        a[g + 8 * (r & 1)][16 * (r >> 1) + 4 * t + i] = int8_t(signed_byte(lanes[lane]->a[r], i));
      }
    }
    for (unsigned r = 0; r < 2; r++) {
      for (unsigned i = 0; i < 4; i++) b[g][16 * r + 4 * t + i] = int8_t(signed_byte(lanes[lane]->b[r], i));
    }
  }
  for (unsigned lane = 0; lane < WARP; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    int* c = static_cast<int*>(lanes[lane]->c);
    for (unsigned i = 0; i < 4; i++) {
      const int8_t *row = a[g + 8 * (i >> 1)], *column = b[2 * t + (i & 1)];
      int sum = 0;
      for (unsigned k = 0; k < 32; k++) sum += int(row[k]) * int(column[k]);
      c[i] = int(unsigned(c[i]) + unsigned(sum));  // wraps, as the instruction does
    }
  }
}

// m16n8k16: a[r] holds row g + 8 (r & 1), columns 8 (r >> 1) + 2 t ..; b[r]
// rows 8 r + 2 t .. of column g; c as above. Products are exact in binary32;
// the device's order and rounding of the sum are not specified, so callers
// compare with a tolerance.
static void run_mma_f16(Request* const* lanes) {
  float a[16][16], b[8][16];
  for (unsigned lane = 0; lane < WARP; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 2; i++) {
      for (unsigned r = 0; r < 4; r++) {
        a[g + 8 * (r & 1)][8 * (r >> 1) + 2 * t + i] = f16_to_f32((unsigned short)(lanes[lane]->a[r] >> (16 * i)));
      }
      for (unsigned r = 0; r < 2; r++) {
        b[g][8 * r + 2 * t + i] = f16_to_f32((unsigned short)(lanes[lane]->b[r] >> (16 * i)));
      }
    }
  }
  for (unsigned lane = 0; lane < WARP; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    float* c = static_cast<float*>(lanes[lane]->c);
    for (unsigned i = 0; i < 4; i++) {
      const float *row = a[g + 8 * (i >> 1)], *column = b[2 * t + (i & 1)];
      for (unsigned k = 0; k < 16; k++) c[i] += row[k] * column[k];
    }
  }
}

template <class C>
static void multiply(const char* what, C* c, const unsigned* a, const unsigned* b, const char* file, unsigned line,
                     unsigned count_a, void (*run)(Request* const*)) {
  // The fragments are registers on a device: copies here, so that no checked
  // memory is touched behind a thread's back.
  C sums[4];
  unsigned left[4] = {}, right[2];
  for (unsigned i = 0; i < 4; i++) sums[i] = c[i];
  for (unsigned i = 0; i < count_a; i++) left[i] = a[i];
  for (unsigned i = 0; i < 2; i++) right[i] = b[i];
  Request mine = request(what, 0xffffffffu, file, line, run);
  mine.c = sums;
  mine.a = left;
  mine.b = right;
  machine().collective(mine);
  for (unsigned i = 0; i < 4; i++) c[i] = sums[i];
}

void mma_s8(int* c, const unsigned* a, const unsigned* b, const char* file, unsigned line) {
  multiply("mma_s8", c, a, b, file, line, 4, run_mma_s8);
}

void mma_f16(float* c, const unsigned* a, const unsigned* b, const char* file, unsigned line) {
  multiply("mma_f16", c, a, b, file, line, 4, run_mma_f16);
}

void async_copy_16(void* shared, const void* source) { machine().start_copy(shared, source); }
void async_commit() { machine().commit_copies(); }
void async_wait(unsigned left) { machine().land_copies(left); }

void trap(const char* file, unsigned line) {
  machine().fail("__trap at " + source_line(file, line));
}

static void check_atomic(void* address, size_t bytes, const void* pc) {
  if (reinterpret_cast<uint64_t>(address) % bytes != 0) machine().fail("a misaligned atomic at " + source_of(pc));
  machine().access(address, bytes, Access::atomic, pc);
}

template <class T>
static T update(Atomic how, T* at, T value) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED), next;
  do {
    switch (how) {
      case Atomic::add: next = T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)); break;
      case Atomic::exchange: next = value; break;
      case Atomic::maximum: next = old < value ? value : old; break;
      case Atomic::minimum: next = value < old ? value : old; break;
      case Atomic::bit_and: next = old & value; break;
      case Atomic::bit_or: next = old | value; break;
      default: next = old >= value ? T(0) : T(old + 1); break;  // atomicInc
    }
  } while (!__atomic_compare_exchange_n(at, &old, next, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return old;
}

void fence() {
  if (Machine* machine = Machine::watching()) machine->fence();
}

uint32_t atomic_32(Atomic how, void* address, uint32_t value) {
  if (how == Atomic::increment && Machine::watching()) machine().count_block_in();
  check_atomic(address, 4, __builtin_return_address(0));
  return update(how, static_cast<uint32_t*>(address), value);
}

int32_t atomic_signed(Atomic how, void* address, int32_t value) {
  check_atomic(address, 4, __builtin_return_address(0));
  return update(how, static_cast<int32_t*>(address), value);
}

uint64_t atomic_64(Atomic how, void* address, uint64_t value) {
  check_atomic(address, 8, __builtin_return_address(0));
  return update(how, static_cast<uint64_t*>(address), value);
}

uint64_t load_acquire(const void* address) {
  check_atomic(const_cast<void*>(address), 8, __builtin_return_address(0));
  return __atomic_load_n(static_cast<const uint64_t*>(address), __ATOMIC_ACQUIRE);
}

uint32_t load_acquire_32(const void* address) {
  check_atomic(const_cast<void*>(address), 4, __builtin_return_address(0));
  return __atomic_load_n(static_cast<const uint32_t*>(address), __ATOMIC_ACQUIRE);
}

void store_release(void* address, uint64_t value) {
  check_atomic(address, 8, __builtin_return_address(0));
  __atomic_store_n(static_cast<uint64_t*>(address), value, __ATOMIC_RELEASE);
}

uint32_t atomic_compare(void* address, uint32_t expected, uint32_t value) {
  check_atomic(address, 4, __builtin_return_address(0));
  __atomic_compare_exchange_n(static_cast<uint32_t*>(address), &expected, value, false, __ATOMIC_SEQ_CST,
                              __ATOMIC_RELAXED);
  return expected;
}

}  // namespace standin

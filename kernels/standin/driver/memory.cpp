// Memory of the device and page-locked memory, and copies between them.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "state.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace standin {

static constexpr uint64_t PAGE = 4096;
// Device addresses are 256-byte aligned and no more.
static constexpr uint64_t OFFSET = 256;
// Freed addresses are not given out again before this much was freed.
static constexpr uint64_t RETIRED_BYTES = 64ull << 30;
static constexpr uint64_t POISONED_BYTES = 64 << 20;

static uint64_t whole_pages(uint64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// [guard page | allocation | guard page].
static uint64_t map_memory(uint64_t bytes, uint64_t offset) {
  const uint64_t inside = whole_pages(bytes + offset);
  void* at = mmap(nullptr, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return 0;
  char* usable = static_cast<char*>(at) + PAGE;
  if (mprotect(usable, inside, PROT_READ | PROT_WRITE) != 0) return 0;
  const uint64_t base = reinterpret_cast<uint64_t>(usable) + offset;
  memset(reinterpret_cast<void*>(base), POISON, std::min(bytes, POISONED_BYTES));
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(usable, inside);
  __asan_unpoison_memory_region(reinterpret_cast<void*>(base), bytes);
#endif
  return base;
}

static void retire(uint64_t base, uint64_t bytes, uint64_t offset) {
  State& s = state();
  const uint64_t inside = whole_pages(bytes + offset);
  char* usable = reinterpret_cast<char*>(base - offset);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(usable, inside);
#endif
  mmap(usable, inside, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  s.retired.push_back({reinterpret_cast<uint64_t>(usable) - PAGE, inside + 2 * PAGE});
  uint64_t sum = 0;
  for (const Region& region : s.retired) sum += region.bytes;
  while (sum > RETIRED_BYTES || s.retired.size() > 8192) {
    sum -= s.retired.front().bytes;
    munmap(reinterpret_cast<void*>(s.retired.front().base), s.retired.front().bytes);
    s.retired.pop_front();
  }
}

static bool on_device(uint64_t at, uint64_t bytes) {
  State& s = state();
  auto it = s.device.upper_bound(at);
  return it != s.device.begin() && (--it, Region{it->first, it->second}.holds(at, bytes));
}

// The pinned block that `at` lies in.
static const Region* pinned_at(uint64_t at) {
  static Region found;
  State& s = state();
  auto it = s.pinned.upper_bound(at);
  if (it == s.pinned.begin()) return nullptr;
  --it;
  found = {it->first, it->second};
  return found.holds(at, 1) ? &found : nullptr;
}

static uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

static Result allocate(uint64_t* out, uint64_t bytes) {
  State& s = state();
  if (!out || bytes == 0) return INVALID_VALUE;
  if (bytes > s.settings.vram_bytes || s.device_used > s.settings.vram_bytes - bytes) return OUT_OF_MEMORY;
  const uint64_t base = map_memory(bytes, OFFSET);
  if (!base) return OUT_OF_MEMORY;
  s.device[base] = bytes;
  s.device_used += bytes;
  s.map.add(base, bytes);
  *out = base;
  return SUCCESS;
}

static Result release(uint64_t base) {
  State& s = state();
  auto it = s.device.find(base);
  if (it == s.device.end()) return INVALID_VALUE;
  s.map.remove(base);
  s.device_used -= it->second;
  retire(base, it->second, OFFSET);
  s.device.erase(it);
  return SUCCESS;
}

// What is between the beginning and the end of one copy.
struct Flight {
  std::vector<unsigned char> source;
};

static Result corrupted(const char* call, const char* what, uint64_t at) {
  state().violation(format("%s: byte %llu of %s", call, (unsigned long long)at, what), true);
  return LAUNCH_FAILED;
}

static uint64_t first_difference(const unsigned char* a, const unsigned char* b, uint64_t bytes) {
  uint64_t at = 0;
  while (at < bytes && a[at] == b[at]) at++;
  return at;
}

static Work copy_of(const char* call, uint64_t to, uint64_t from, uint64_t bytes, bool pinned_to, bool pinned_from) {
  Work work;
  work.call = call;
  work.touches = {{to, bytes}, {from, bytes}};
  auto flight = std::make_shared<Flight>();
  auto* target = reinterpret_cast<unsigned char*>(to);
  auto* source = reinterpret_cast<const unsigned char*>(from);
  const uint64_t poisoned = std::min(bytes, POISONED_BYTES);
  work.begin = [=] {
    State& s = state();
    if (!s.map.find(to, bytes) || !s.map.find(from, bytes)) return;  // freed: told at the end
    if (pinned_from) flight->source.assign(source, source + poisoned);
    if (to != from) memset(target, POISON, poisoned);
  };
  work.end = [=]() -> Result {
    State& s = state();
    for (const uint64_t at : {to, from}) {
      if (s.map.find(at, bytes)) continue;
      s.violation(format("%s of %llu bytes touches %s", call, (unsigned long long)bytes, s.map.explain(at, bytes).c_str()),
                  false);
      return ILLEGAL_ADDRESS;
    }
    if (pinned_from && flight->source.size() == poisoned && memcmp(source, flight->source.data(), poisoned) != 0) {
      return corrupted(call, "its source was changed before the copy had ended",
                       first_difference(source, flight->source.data(), poisoned));
    }
    for (uint64_t i = 0; pinned_to && i < poisoned; i++) {
      if (target[i] != POISON) return corrupted(call, "its target was changed before the copy had ended", i);
    }
    memmove(target, source, bytes);
    flight->source.clear();
    return SUCCESS;
  };
  return work;
}

// From a copy of the pageable source, made now.
static Work snapshot_copy(const char* call, uint64_t to, const void* from, uint64_t bytes) {
  auto* source = static_cast<const unsigned char*>(from);
  auto kept = std::make_shared<std::vector<unsigned char>>(source, source + bytes);
  Work work;
  work.call = call;
  work.touches = {{to, bytes}};
  auto* target = reinterpret_cast<unsigned char*>(to);
  work.begin = [=] {
    if (state().map.find(to, bytes)) memset(target, POISON, std::min(bytes, POISONED_BYTES));
  };
  work.end = [=]() -> Result {
    State& s = state();
    if (!s.map.find(to, bytes)) {
      s.violation(format("%s of %llu bytes touches %s", call, (unsigned long long)bytes, s.map.explain(to, bytes).c_str()),
                  false);
      return ILLEGAL_ADDRESS;
    }
    memcpy(target, kept->data(), bytes);
    return SUCCESS;
  };
  return work;
}

static Result to_device(const char* call, uint64_t to, const void* from, uint64_t bytes,
                        const std::shared_ptr<Stream>& stream) {
  if (bytes == 0) return SUCCESS;
  if (!from || !on_device(to, bytes)) return INVALID_VALUE;
  const Region* block = pinned_at(address(from));
  if (!block) return enqueue(stream, snapshot_copy(call, to, from, bytes));
  if (!block->holds(address(from), bytes)) return INVALID_VALUE;
  return enqueue(stream, copy_of(call, to, address(from), bytes, false, true));
}

static Result from_device(const char* call, void* to, uint64_t from, uint64_t bytes,
                          const std::shared_ptr<Stream>& stream) {
  if (bytes == 0) return SUCCESS;
  if (!to || !on_device(from, bytes)) return INVALID_VALUE;
  const Region* block = pinned_at(address(to));
  if (block) {
    if (!block->holds(address(to), bytes)) return INVALID_VALUE;
    return enqueue(stream, copy_of(call, address(to), from, bytes, true, false));
  }
  // To pageable memory: the call returns when the copy has ended (CUDA driver
  // API, "API synchronization behavior").
  if (stream->capture) return CAPTURE_UNSUPPORTED;
  memset(to, POISON, bytes);
  if (Result code = synchronise(stream)) return code;
  memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return SUCCESS;
}

// A new machine, as far as the program can tell. Memory that somebody still
// holds stays mapped: a late free must not fault.
void reset_all() {
  State& s = state();
  for (auto& stream : all_streams()) abandon(*stream, INVALID_CONTEXT);
  s.leaving.clear();
  *s.null_stream = Stream{};
  s.streams.clear();
  s.events.clear();
  s.modules.clear();
  s.functions.clear();
  s.graphs.clear();
  s.executables.clear();
  while (!s.device.empty()) release(s.device.begin()->first);
  for (auto& [base, bytes] : s.pinned) s.map.remove(base);
  s.pinned.clear();
  s.pinned_used = 0;
  s.settings = Settings{};
  s.initialised = false;
  s.contexts = 0;
  s.rules.clear();
  s.stops.clear();
  s.sticky = s.pending = SUCCESS;
  s.hang_at = s.calls = s.launches = s.calls_after_sticky = s.races = 0;
  s.calls_by_name.clear();
  s.launches_by_name.clear();
  s.violations.clear();
  s.random = 1;
  s.changed.notify_all();
}

}  // namespace standin

using namespace standin;

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  ENTER("cuMemGetInfo");
  const State& s = state();
  *total = s.settings.vram_bytes;
  *free_bytes = s.settings.vram_bytes - std::min(s.device_used, s.settings.vram_bytes);
  return SUCCESS;
}

API cuMemAlloc_v2(uint64_t* out, size_t bytes) {
  ENTER("cuMemAlloc");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuMemAlloc");
  return allocate(out, bytes);
}

// Waits for all work first, as the driver does.
API cuMemFree_v2(uint64_t base) {
  ENTER("cuMemFree");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuMemFree");
  if (base == 0) return SUCCESS;
  if (!state().device.count(base)) return INVALID_VALUE;
  synchronise_all();
  return release(base);
}

API cuMemAllocAsync(uint64_t* out, size_t bytes, void* handle) {
  ENTER("cuMemAllocAsync");
  if (!stream_of(handle)) return INVALID_HANDLE;
  return allocate(out, bytes);
}

API cuMemFreeAsync(uint64_t base, void* handle) {
  ENTER("cuMemFreeAsync");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (!state().device.count(base)) return INVALID_VALUE;
  Work work;
  work.call = "cuMemFreeAsync";
  work.end = [=] { return release(base); };
  return enqueue(stream, std::move(work));
}

API cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
  ENTER("cuMemHostAlloc");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuMemHostAlloc");
  State& s = state();
  if (!out || bytes == 0 || flags > 7) return INVALID_VALUE;
  if (bytes > s.settings.pinned_bytes || s.pinned_used > s.settings.pinned_bytes - bytes) return OUT_OF_MEMORY;
  const uint64_t base = map_memory(bytes, 0);
  if (!base) return OUT_OF_MEMORY;
  s.pinned[base] = bytes;
  s.pinned_used += bytes;
  s.map.add(base, bytes);
  *out = reinterpret_cast<void*>(base);
  return SUCCESS;
}

// Does not wait: nothing promises that it would.
API cuMemFreeHost(void* pointer) {
  ENTER("cuMemFreeHost");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuMemFreeHost");
  State& s = state();
  const uint64_t base = address(pointer);
  auto it = s.pinned.find(base);
  if (it == s.pinned.end()) return INVALID_VALUE;
  const Region region{base, it->second};
  if (const char* call = in_use(region)) {
    s.violation(format("cuMemFreeHost frees memory that %s still uses", call), true);
  }
  s.map.remove(base);
  s.pinned_used -= region.bytes;
  s.pinned.erase(it);
  retire(base, region.bytes, 0);
  return SUCCESS;
}

API cuMemHostGetDevicePointer_v2(uint64_t* out, void* pointer, unsigned) {
  ENTER("cuMemHostGetDevicePointer");
  if (!pinned_at(address(pointer))) return INVALID_VALUE;
  *out = address(pointer);
  return SUCCESS;
}

API cuMemHostGetFlags(unsigned* flags, void* pointer) {
  ENTER("cuMemHostGetFlags");
  if (!pinned_at(address(pointer))) return INVALID_VALUE;
  *flags = 1;
  return SUCCESS;
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* handle) {
  ENTER("cuMemcpyHtoDAsync");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  return to_device("cuMemcpyHtoDAsync", to, from, bytes, stream);
}

API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* handle) {
  ENTER("cuMemcpyDtoHAsync");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  return from_device("cuMemcpyDtoHAsync", to, from, bytes, stream);
}

API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* handle) {
  ENTER("cuMemcpyDtoDAsync");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (bytes == 0) return SUCCESS;
  if (!on_device(to, bytes) || !on_device(from, bytes)) return INVALID_VALUE;
  if (to < from + bytes && from < to + bytes) return INVALID_VALUE;  // undefined: refused here
  return enqueue(stream, copy_of("cuMemcpyDtoDAsync", to, from, bytes, false, false));
}

// The synchronous forms use the null stream, and wait for nothing else.
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  ENTER("cuMemcpyHtoD");
  if (Result code = to_device("cuMemcpyHtoD", to, from, bytes, state().null_stream)) return code;
  return synchronise(state().null_stream);
}

API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  ENTER("cuMemcpyDtoH");
  if (Result code = from_device("cuMemcpyDtoH", to, from, bytes, state().null_stream)) return code;
  return synchronise(state().null_stream);
}

// `count` values of `size` bytes.
static Result fill(const char* call, uint64_t to, uint32_t value, uint64_t size, uint64_t count, void* handle) {
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (count == 0) return SUCCESS;
  if (to % size != 0 || count > UINT64_MAX / size || !on_device(to, count * size)) return INVALID_VALUE;
  Work work;
  work.call = call;
  work.touches = {{to, count * size}};
  work.end = [=]() -> Result {
    if (!state().map.find(to, count * size)) return ILLEGAL_ADDRESS;
    auto* bytes = reinterpret_cast<unsigned char*>(to);
    if (size == 1) memset(bytes, int(value), count);
    for (uint64_t i = 0; size == 4 && i < count; i++) {
      __atomic_store_n(reinterpret_cast<uint32_t*>(bytes) + i, value, __ATOMIC_RELEASE);
    }
    return SUCCESS;
  };
  return enqueue(stream, std::move(work));
}

API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* handle) {
  ENTER("cuMemsetD8Async");
  return fill("cuMemsetD8Async", to, value, 1, bytes, handle);
}

API cuMemsetD32Async(uint64_t to, unsigned value, size_t words, void* handle) {
  ENTER("cuMemsetD32Async");
  return fill("cuMemsetD32Async", to, value, 4, words, handle);
}

API cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
  ENTER("cuMemsetD8");
  if (!on_device(to, bytes)) return INVALID_VALUE;
  if (Result code = synchronise(state().null_stream)) return code;
  memset(reinterpret_cast<void*>(to), value, bytes);
  return SUCCESS;
}

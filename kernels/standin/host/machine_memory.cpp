// The machine's view of memory: what a thread may touch, and who touched it.
#include <cstring>

#include "fiber.h"
#include "machine.h"
#include "report.h"

extern "C" {
// Bounds of this library in memory, from the linker: tables of constants lie there.
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace standin {

static const char* verb(Access kind) {
  return kind == Access::read ? "reads" : kind == Access::write ? "writes" : "updates";
}

std::string Machine::thread_name(unsigned number) const { return "thread " + in_brackets(fibers[number].index); }

std::string Machine::heading() const {
  return format("kernel %s, block %s: ", launch->kernel->name, in_brackets(block_at).c_str());
}

void Machine::fail(std::string text, Fault fault) {
  if (!failed) found = {heading() + text, fault};
  failed = true;
  switch_to(nullptr);
  __builtin_unreachable();
}

std::string Machine::waiting() const {
  std::string text;
  std::vector<bool> told(threads, false);
  for (unsigned i = 0; i < threads; i++) {
    const Fiber& first = fibers[i];
    if (first.wait == Wait::done || told[i]) continue;
    unsigned count = 0;
    for (unsigned j = i; j < threads; j++) {
      const Fiber& other = fibers[j];
      if (other.wait != first.wait || other.what != first.what || other.place != first.place) continue;
      told[j] = true;
      count++;
    }
    text += format("%u threads wait in %s at %s (the first is %s); ", count, first.what,
                   source_line(first.place.file, first.place.line).c_str(), thread_name(i).c_str());
  }
  return text + format("%u of %u have ended", exited, threads);
}

void Machine::access(const void* address, size_t bytes, Access kind, const void* pc) {
  if (!launch->checks) return;
  if (suspect.bytes > 0) check_suspect();
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  const uint64_t in_shared = at - reinterpret_cast<uint64_t>(shared);
  if (in_shared < SHARED_BYTES) return shared_access(in_shared, bytes, kind, pc);
  for (const Region& region : recent) {
    if (region.holds(at, bytes)) return global_access(at, bytes, kind, pc);
  }
  if (at - reinterpret_cast<uint64_t>(now->stack) < STACK_BYTES) return;  // its own local memory
  if (const Region* region = map->find(at, bytes)) {
    recent[oldest++ % 4] = *region;
    return global_access(at, bytes, kind, pc);
  }
  if (kind == Access::read) {
    if (at - reinterpret_cast<uint64_t>(launch->args) < launch->args_bytes) return;
    if (at - reinterpret_cast<uint64_t>(__ehdr_start) < uint64_t(_end - __ehdr_start)) return;
  }
  outside(address, bytes, kind, pc);
}

void Machine::global_access(uint64_t at, size_t bytes, Access kind, const void* pc) {
  const Toucher me{block_number, uint16_t(now->number), barriers, warps[now->number / WARP].clock};
  Toucher other;
  if (global.touch(at, bytes, kind, me, &other)) return;
  const Dim3& grid = launch->grid;
  const Dim3 block{other.block % grid.x, other.block / grid.x % grid.y, other.block / grid.x / grid.y};
  const std::string text = format(
      "race: %s %s %zu bytes at 0x%llx, which %s of block %s wrote, and nothing orders the two (%s)",
      thread_name(now->number).c_str(), verb(kind), bytes, (unsigned long long)at,
      thread_name(other.thread).c_str(), in_brackets(block).c_str(), source_of(pc).c_str());
  if (kind != Access::write || bytes > sizeof suspect.old) fail(text, Fault::race);
  suspect.at = at;
  suspect.bytes = bytes;
  suspect.text = text;
  memcpy(suspect.old, reinterpret_cast<const void*>(at), bytes);
}

void Machine::check_suspect() {
  const size_t bytes = suspect.bytes;
  suspect.bytes = 0;
  if (bytes > 0 && memcmp(suspect.old, reinterpret_cast<const void*>(suspect.at), bytes) != 0) {
    fail(suspect.text, Fault::race);
  }
}

void Machine::outside(const void* address, size_t bytes, Access kind, const void* pc) {
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  std::string what = map->explain(at, bytes);
  for (unsigned i = 0; i < threads; i++) {
    if (at - reinterpret_cast<uint64_t>(fibers[i].stack) < STACK_BYTES) what = "local memory of " + thread_name(i);
  }
  fail(format("%s %s %zu bytes at 0x%llx, which is %s (%s)", thread_name(now->number).c_str(), verb(kind), bytes,
              (unsigned long long)at, what.c_str(), source_of(pc).c_str()),
       Fault::memory);
}

void Machine::shared_access(size_t at, size_t bytes, Access kind, const void* pc) {
  if (at + bytes > SHARED_BYTES) bytes = SHARED_BYTES - at;
  const uint32_t clock = warps[now->number / WARP].clock;
  const Conflict conflict = shadow.touch(at, bytes, kind, now->number, clock);
  if (conflict.kind == Conflict::none) return;
  const Region* array = nullptr;  // the one that begins last at or before the byte
  for (const Region& piece : pieces) {
    if (piece.base <= conflict.at && (!array || piece.base > array->base)) array = &piece;
  }
  const std::string byte =
      array ? format("byte %zu of %s shared array of %zu bytes", size_t(conflict.at - array->base),
                     array->base == dynamic_at ? "the dynamic" : "a", size_t(array->bytes))
            : std::string("shared memory before any array");
  const std::string me = thread_name(now->number), line = source_of(pc);
  if (conflict.kind == Conflict::outside) {
    fail(format("%s %s out of bounds: %s (%s)", me.c_str(), verb(kind), byte.c_str(), line.c_str()),
         Fault::memory);
  }
  const std::string other = thread_name(conflict.other);
  if (conflict.kind == Conflict::in_flight) {
    fail(format("race: %s %s %s while a cp_async of %s is on its way to it (%s)", me.c_str(), verb(kind), byte.c_str(),
                other.c_str(), line.c_str()),
         Fault::race);
  }
  const char* how = conflict.kind == Conflict::read_write ? "read" : "wrote";
  fail(format("race: %s %s %s, which %s %s with no barrier between (%s)", me.c_str(), verb(kind), byte.c_str(),
              other.c_str(), how, line.c_str()),
       Fault::race);
}

void* Machine::static_shared(SharedSite& site) {
  static unsigned sites = 0;
  if (site.id == 0) site.id = __atomic_add_fetch(&sites, 1, __ATOMIC_RELAXED);
  if (site_launch.size() <= site.id) {
    site_launch.resize(site.id + 16);
    site_at.resize(site.id + 16);
  }
  if (site_launch[site.id] != launch_number) {
    // At an odd multiple of its alignment: exactly as aligned as common.cuh
    // promises (SHARED has __align__(16)).
    const size_t align = site.align < 16 ? 16 : site.align;
    size_t at = (static_end + SHARED_GAP + align - 1) / align * align;
    if (at / align % 2 == 0) at += align;
    static_bytes += site.bytes;
    if (static_bytes > 48 * 1024 || static_bytes + launch->dynamic_bytes > launch->shared_limit) {
      fail(format("%s (%s) brings shared memory to %zu static and %zu dynamic bytes; the device has %zu", site.name,
                  source_line(site.file, site.line).c_str(), static_bytes, launch->dynamic_bytes,
                  launch->shared_limit));
    }
    if (at + site.bytes + SHARED_GAP > SHARED_BYTES) fail("too many shared arrays for the stand-in");
    site_launch[site.id] = launch_number;
    site_at[site.id] = uint32_t(at);
    static_end = at + site.bytes;
    give_shared(at, site.bytes);
  }
  return shared + site_at[site.id];
}

void Machine::start_copy(void* to, const void* from) {
  auto* target = static_cast<unsigned char*>(to);
  const void* pc = __builtin_return_address(0);
  const uint64_t both = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from);
  if (both % 16 != 0) fail(thread_name(now->number) + " calls cp_async_16 with an address that is no multiple of 16", Fault::misaligned);
  const size_t at = size_t(target - shared);
  if (at >= SHARED_BYTES) fail(thread_name(now->number) + " calls cp_async_16 with a target outside shared memory");
  access(from, 16, Access::read, pc);
  access(to, 16, Access::write, pc);
  if (PREGATE_STANDIN_ARCH < 80) {  // Turing copies through registers, at once
    memcpy(to, from, 16);
    return;
  }
  if (launch->checks) shadow.set_in_flight(at, 16, true);
  now->copies.push_back({target, static_cast<const unsigned char*>(from), now->group});
}

void Machine::land_copies(unsigned groups_left) {
  size_t kept = 0;
  for (const PendingCopy& copy : now->copies) {
    // A copy that was not committed belongs to the group that is still open.
    if (copy.group + groups_left >= now->group) {
      now->copies[kept++] = copy;
      continue;
    }
    if (launch->checks) shadow.set_in_flight(size_t(copy.shared - shared), 16, false);
    access(copy.source, 16, Access::read, __builtin_return_address(0));
    access(copy.shared, 16, Access::write, __builtin_return_address(0));
    memcpy(copy.shared, copy.source, 16);
  }
  now->copies.resize(kept);
}

}  // namespace standin

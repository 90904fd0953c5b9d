#include "machine.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>

#include "fiber.h"
#include "report.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace standin {

__thread Machine* Machine::active = nullptr;
__thread Machine* Machine::watcher = nullptr;

static uint64_t next_random(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dull;
}

static void sanitizer_hide([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(at, bytes);
#endif
}

static void sanitizer_show([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(at, bytes);
#endif
}

Machine::Machine() {
  void* at = mmap(nullptr, SHARED_BYTES, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  shared = static_cast<unsigned char*>(at);
}

Machine::~Machine() {
  for (Fiber& fiber : fibers) free_stack(fiber.stack);
  sanitizer_show(shared, SHARED_BYTES);
  munmap(shared, SHARED_BYTES);
}

static std::mutex idle_mutex;
static std::vector<std::unique_ptr<Machine>> idle_machines;

Running::Running(const Launch& what, uint64_t seed, const MemoryMap& memory) : launch(what) {
  {
    std::lock_guard guard(idle_mutex);
    if (!idle_machines.empty()) {
      machine = std::move(idle_machines.back());
      idle_machines.pop_back();
    }
  }
  if (!machine) machine.reset(new Machine);
  machine->begin(launch, seed, memory);
}

Running::~Running() {
  machine->abandon();
  std::lock_guard guard(idle_mutex);
  idle_machines.push_back(std::move(machine));
}

Outcome Machine::go_on(Violation* violation) {
  active = this;
  watcher = launch->checks ? this : nullptr;
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &main_bottom, &main_size);
  pthread_attr_destroy(&attributes);
#endif
  // Memory may have been freed since.
  for (Region& region : recent) region = {};
  progress = false;
  if (in_block) resumed++, wake_paused();
  Outcome outcome = Outcome::ended;
  while (outcome == Outcome::ended && next_block < blocks) {
    if (!in_block) begin_block();
    outcome = run_block();
    if (outcome == Outcome::ended) in_block = false, next_block++;
  }
  active = watcher = nullptr;
  if (outcome == Outcome::suspended) {
    idle = progress ? 0 : idle + 1;
    if (idle > launch->spins) {
      found = {heading() + "spins for ever: " + waiting(), Fault::other};
      outcome = Outcome::failed;
    }
  }
  if (outcome == Outcome::failed) *violation = found, abandon();
  return outcome;
}

void Machine::abandon() {
  if (!in_block) return;
  for (unsigned i = 0; i < threads; i++) {
    for (const PendingCopy& copy : fibers[i].copies) shadow.set_in_flight(size_t(copy.shared - shared), 16, false);
  }
  in_block = false;
}

void Machine::begin(const Launch& what, uint64_t seed, const MemoryMap& memory) {
  launch = &what;
  map = &memory;
  random = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  in_order = seed == 0;
  failed = false;
  blocks = uint64_t(what.grid.x) * what.grid.y * what.grid.z;
  next_block = resumed = idle = 0;
  in_block = false;
  order.clear();
  if (seed != 0 && blocks <= (1u << 20)) {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = blocks; i > 1; i--) std::swap(order[i - 1], order[next_random(random) % i]);
  }
  threads = what.block.x * what.block.y * what.block.z;
  while (fibers.size() < threads) {
    Fiber fiber;
    fiber.stack = new_stack();
    fiber.number = unsigned(fibers.size());
    fibers.push_back(std::move(fiber));
  }
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].index = {i % what.block.x, i / what.block.x % what.block.y, i / (what.block.x * what.block.y)};
  }
  warps.assign((threads + WARP - 1) / WARP, Warp{});
  for (unsigned i = 0; i < warps.size(); i++) warps[i].lanes = std::min(WARP, threads - i * WARP);
  shadow.clear();
  sanitizer_hide(shared, SHARED_BYTES);
  // 16 bytes is the alignment that CUDA promises for the dynamic part, and no more.
  dynamic_at = SHARED_GAP + 16;
  static_end = dynamic_at + what.dynamic_bytes;
  pieces.clear();
  give_shared(dynamic_at, what.dynamic_bytes);
  static_bytes = 0;
  launch_number++;
  if (what.checks) global.clear(blocks);
  suspect.bytes = 0;
}

void Machine::give_shared(size_t at, size_t bytes) {
  shadow.allow(at, bytes);
  sanitizer_show(shared + at, bytes);
  pieces.push_back({at, bytes});
  memset(shared + at, poison, bytes);
}

void Machine::begin_block() {
  const uint64_t block = order.empty() ? next_block : order[next_block];
  const Dim3& grid = launch->grid;
  block_number = uint32_t(block);
  block_at = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
  static const unsigned char poisons[] = {0xcd, 0xff, 0x7f, 0x00};
  poison = in_order ? 0xcd : poisons[next_random(random) % 4];
  for (const Region& piece : pieces) memset(shared + piece.base, poison, piece.bytes);
  shadow.next_epoch();
  for (Warp& warp : warps) warp.arrived = warp.exited = 0;
  ready.resize(threads);
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    sanitizer_show(fiber.stack, STACK_BYTES);
    fiber.stack_pointer = prepared_stack(fiber.stack, &fiber_main, fiber.number);
    fiber.fake_stack = nullptr;
    fiber.wait = Wait::run;
    fiber.copies.clear();
    fiber.group = 0;
    fiber.fenced = 0;
    ready[i] = i;
  }
  at_barrier = exited = barriers = 0;
  paused.clear();
  in_block = true;
}

Outcome Machine::run_block() {
  for (;;) {
    now = nullptr;
    switch_to(pick());
    if (failed) return Outcome::failed;
    if (exited == threads) return Outcome::ended;
    if (paused.empty()) {
      found = {heading() + "deadlock: " + waiting(), Fault::other};
      return Outcome::failed;
    }
    if (!progress) return Outcome::suspended;
    progress = false;
    idle = 0;
    wake_paused();
  }
}

void Machine::wake_paused() {
  for (const unsigned number : paused) {
    fibers[number].wait = Wait::run;
    ready.push_back(number);
  }
  paused.clear();
}

Fiber* Machine::pick() {
  if (ready.empty()) return nullptr;
  const size_t at = in_order ? size_t(std::min_element(ready.begin(), ready.end()) - ready.begin())
                             : next_random(random) % ready.size();
  std::swap(ready.back(), ready[at]);
  Fiber* next = &fibers[ready.back()];
  ready.pop_back();
  return next;
}

// Leaves the stack that runs for that of `next`, or for the one that started
// the block when `next` is null.
void Machine::switch_to(Fiber* next) {
  Fiber* from = now;
  now = next;
  void** save = from ? &from->stack_pointer : &main_stack;
  void* to = next ? next->stack_pointer : main_stack;
#if defined(__SANITIZE_ADDRESS__)
  void** fake = from ? &from->fake_stack : &main_fake_stack;
  const bool gone = from && (from->wait == Wait::done || failed);
  __sanitizer_start_switch_fiber(gone ? nullptr : fake, next ? next->stack : main_bottom,
                                 next ? STACK_BYTES : main_size);
  pregate_fiber_switch(save, to);
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#else
  pregate_fiber_switch(save, to);
#endif
}

void Machine::fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Machine* machine = active;
  machine->launch->kernel->call(reinterpret_cast<void* const*>(machine->launch->args));
  machine->end_fiber();
}

void Machine::end_fiber() {
  check_suspect();
  if (!now->copies.empty()) fail(thread_name(now->number) + " ends while its cp_async copies are in flight");
  now->wait = Wait::done;
  progress = true;
  exited++;
  warps[now->number / WARP].exited++;
  switch_to(pick());
  __builtin_unreachable();
}

void Machine::leave(Wait wait, const char* what, Place place) {
  check_suspect();
  now->wait = wait;
  now->what = what;
  now->place = place;
  switch_to(pick());
}

void Machine::release(Wait wait, unsigned first, unsigned end) {
  for (unsigned i = first; i < end; i++) {
    if (fibers[i].wait != wait || &fibers[i] == now) continue;
    fibers[i].wait = Wait::run;
    ready.push_back(i);
  }
  if (in_order) {  // the one that came last does not go first
    ready.push_back(now->number);
    switch_to(pick());
  }
}

void Machine::pause(Place place) {
  paused.push_back(now->number);
  leave(Wait::pause, "pause", place);
}

void Machine::count_block_in() {
  if (now->fenced == barriers + 1) return;
  fail("atomicInc without a __threadfence of the same thread between it and the barrier before it: what other threads "
       "of the block wrote may not be seen");
}

void Machine::block_barrier(Place place) {
  progress = true;
  if (exited > 0) {
    fail(format("__syncthreads at %s after %u of %u threads have ended",
                source_line(place.file, place.line).c_str(), exited, threads));
  }
  now->place = place;
  if (++at_barrier < threads) return leave(Wait::block, "__syncthreads", place);
  for (unsigned i = 0; i < threads; i++) {
    if (fibers[i].place == place) continue;
    fail("divergent barrier: " + thread_name(now->number) + " is at " + source_line(place.file, place.line) + ", " +
         thread_name(i) + " at " + source_line(fibers[i].place.file, fibers[i].place.line));
  }
  at_barrier = 0;
  barriers++;
  shadow.next_epoch();
  release(Wait::block, 0, threads);
}

void Machine::collective(Request& request) {
  progress = true;
  Warp& warp = warps[now->number / WARP];
  const auto refuse = [&](const std::string& why) {
    fail(thread_name(now->number) + ": " + request.what + " at " + source_line(request.place.file, request.place.line) +
         " " + why);
  };
  if (request.mask != 0xffffffffu) refuse(format("with the mask 0x%08x; ours are full", request.mask));
  if (warp.lanes < WARP) refuse(format("in a warp of %u lanes", warp.lanes));
  if (warp.exited > 0) refuse(format("after %u lanes of the warp have ended", warp.exited));
  warp.requests[lane()] = &request;
  if (++warp.arrived < WARP) return leave(Wait::warp, request.what, request.place);
  for (unsigned i = 0; launch->checks && i < WARP; i++) {
    const Request& other = *warp.requests[i];
    if (other.run == request.run && other.place == request.place && other.how == request.how) continue;
    refuse("while " + thread_name(now->number / WARP * WARP + i) + " is in " + other.what + " at " +
           source_line(other.place.file, other.place.line));
  }
  warp.arrived = 0;
  request.run(warp.requests);
  const unsigned first = now->number / WARP * WARP;
  release(Wait::warp, first, first + WARP);
}

}  // namespace standin

// The machine that runs a kernel: one fiber per CUDA thread, block after
// block, the next fiber picked at random wherever one has to wait. A launch
// whose threads all pause is suspended, its fibers kept; it may go on on
// another thread of the system.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "global_shadow.h"
#include "memory_map.h"
#include "shadow.h"

namespace standin {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;

// What went wrong in a launch, in words.
enum class Fault : unsigned char { other, race, memory, misaligned };
struct Violation {
  std::string text;
  Fault fault = Fault::other;
};

struct Place {
  const char* file = nullptr;
  unsigned line = 0;
  bool operator==(const Place&) const = default;
};

struct PendingCopy {
  unsigned char* shared;
  const unsigned char* source;
  unsigned group;
};

enum class Wait : unsigned char { run, block, warp, pause, done };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest usable byte
  void* fake_stack = nullptr;  // the address sanitizer's
  unsigned number = 0;
  Wait wait = Wait::run;
  const char* what = nullptr;  // the collective that it waits in
  Place place;
  Dim3 index{};
  std::vector<PendingCopy> copies;
  unsigned group = 0;  // number of committed cp_async groups
  uint32_t fenced = 0;  // barriers of the block at its last fence, and one
};

// What a lane brings to a warp's collective; the last lane to come runs it.
struct Request {
  void (*run)(Request* const* lanes);
  const char* what;
  Place place;
  unsigned mask;
  uint64_t value = 0;
  int lane = 0, width = 0;
  unsigned how = 0;
  void* c = nullptr;
  const unsigned* a = nullptr;
  const unsigned* b = nullptr;
};

struct Warp {
  unsigned lanes = 0, arrived = 0, exited = 0;
  uint32_t clock = 0;  // how often its lanes were ordered by __syncwarp
  Request* requests[WARP] = {};
};

struct Launch {
  const KernelSource* kernel;
  Dim3 grid, block;
  size_t dynamic_bytes;
  size_t shared_limit;  // static and dynamic together
  const unsigned char* args;  // pointers, then values: one piece of memory
  size_t args_bytes;
  uint64_t spins;  // resumptions in a row that may change nothing
  uint64_t tick;   // nanoseconds of one
  bool checks;     // whether accesses are looked at
};

// How a launch came out of a stretch of its run.
enum class Outcome { ended, failed, suspended };

class Machine {
 public:
  Machine();
  ~Machine();
  Machine(const Machine&) = delete;
  void operator=(const Machine&) = delete;
  void begin(const Launch& launch, uint64_t seed, const MemoryMap& memory);
  // Runs blocks until all have ended, something was wrong (what came first;
  // the launch ends there), or every thread of a block pauses. After the last
  // it may go on, on any thread of the system.
  Outcome go_on(Violation* violation);
  // The launch ends where it is.
  void abandon();
  static Machine* current() { return active; }
  // The machine if it looks at accesses.
  static Machine* watching() { return watcher; }

  Fiber& fiber() { return *now; }
  unsigned lane() const { return now->number % WARP; }
  void block_barrier(Place place);
  // Lets others run; goes on when they have done something, or when the
  // suspended launch does.
  void pause(Place place);
  // By how often the launch has gone on.
  uint64_t nanoseconds() const { return resumed * launch->tick; }
  void collective(Request& request);
  void access(const void* address, size_t bytes, Access kind, const void* pc);
  void* static_shared(SharedSite& site);
  void* dynamic_shared() { return shared + dynamic_at; }
  void start_copy(void* to, const void* from);
  void commit_copies() { now->group++; }
  // Waits until at most `groups_left` committed groups are in flight.
  void land_copies(unsigned groups_left);
  void fence() { now->fenced = barriers + 1; }
  // Counting blocks in (atomicInc) tells others of what this one wrote: by the
  // PTX memory model only what lies before a fence of this very thread, and of
  // other threads' writes only those before a barrier before that.
  void count_block_in();
  void warp_ordered() { warps[now->number / WARP].clock++; }
  [[noreturn]] void fail(std::string text, Fault fault = Fault::other);

  const Launch* launch = nullptr;
  Dim3 block_at{};

 private:
  void begin_block();
  Outcome run_block();
  void wake_paused();
  void leave(Wait wait, const char* what, Place place);
  void switch_to(Fiber* next);
  Fiber* pick();
  void release(Wait wait, unsigned first, unsigned end);
  void end_fiber();
  void give_shared(size_t at, size_t bytes);
  std::string waiting() const;
  std::string thread_name(unsigned number) const;
  void global_access(uint64_t at, size_t bytes, Access kind, const void* pc);
  void check_suspect();
  void shared_access(size_t at, size_t bytes, Access kind, const void* pc);
  [[noreturn]] void outside(const void* address, size_t bytes, Access kind, const void* pc);
  std::string heading() const;
  static void fiber_main();

  static __thread Machine* active __attribute__((tls_model("initial-exec")));
  static __thread Machine* watcher __attribute__((tls_model("initial-exec")));

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;
  Fiber* now = nullptr;
  void* main_stack = nullptr;
  void* main_fake_stack = nullptr;
  void* main_bottom = nullptr;
  size_t main_size = 0;
  unsigned threads = 0, at_barrier = 0, exited = 0;
  std::vector<unsigned> paused;
  bool progress = false;  // a thread did more than pause since all were woken
  uint64_t resumed = 0, idle = 0;
  std::vector<uint32_t> order;  // of blocks
  uint64_t blocks = 0, next_block = 0;
  bool in_block = false;
  uint32_t block_number = 0, barriers = 0;
  bool failed = false;
  Violation found;
  uint64_t random = 1;
  bool in_order = false;
  const MemoryMap* map = nullptr;
  Region recent[4];  // device allocations that were touched last
  unsigned oldest = 0;

  unsigned char* shared = nullptr;
  Shadow shadow;
  GlobalShadow global;
  // A write over another thread's write: harmless if the bytes stay as they
  // are, which shows when it has happened.
  struct Suspect {
    uint64_t at = 0;
    size_t bytes = 0;
    unsigned char old[16];
    std::string text;
  } suspect;
  size_t static_end = 0, static_bytes = 0, dynamic_at = 0;
  std::vector<Region> pieces;  // of shared memory, by offset
  std::vector<uint32_t> site_launch;  // by site id: the launch that placed it
  std::vector<uint32_t> site_at;
  uint32_t launch_number = 0;
  unsigned char poison = 0xcd;
};

// A launch that has begun: a machine of its own until it has ended.
class Running {
 public:
  Running(const Launch& launch, uint64_t seed, const MemoryMap& memory);
  ~Running();
  Running(const Running&) = delete;
  void operator=(const Running&) = delete;
  Outcome go_on(Violation* violation) { return machine->go_on(violation); }

 private:
  const Launch launch;
  std::unique_ptr<Machine> machine;
};

}  // namespace standin

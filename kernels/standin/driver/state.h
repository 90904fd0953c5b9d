// The stand-in for libcuda: host memory, streams that are queues, kernels run
// by the machine. One lock around everything; nothing runs on its own.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../host/machine.h"
#include "../host/memory_map.h"
#include "../host/report.h"

namespace standin {

using Result = int;  // CUresult
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
                 INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_PTX = 218,
                 UNSUPPORTED_PTX_VERSION = 222, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
                 ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719, NOT_PERMITTED = 800,
                 NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_WRONG_THREAD = 908;
// Fills memory whose contents nobody may use yet.
constexpr unsigned char POISON = 0xcd;

enum class Drain { lazy, eager, random };

struct Settings {
  Drain drain = Drain::lazy;
  uint64_t drain_seed = 1;
  uint64_t order_seed = 1;  // of threads and blocks; 0: in order
  uint64_t spins = 1'000'000;  // resumptions of a launch in a row that change nothing
  uint64_t tick = 1;           // nanoseconds of a kernel's clock for each resumption
  bool blocking = false;       // launches return when they have run
  bool watchdog = false;       // kernels that take long are ended: only told
  bool checks = true;          // of every access of a kernel
  uint64_t vram_bytes = 8ull << 30;
  uint64_t pinned_bytes = 8ull << 30;
  int driver_version = 12040;
  int devices = 1;
  Result init_code = SUCCESS;
  int major = PREGATE_STANDIN_ARCH == 75 ? 7 : 8, minor = PREGATE_STANDIN_ARCH == 75 ? 5 : 6;
  bool print = true;
  bool log = false;
};

// Fires at the `left`-th call from now, of `name` or (empty) of any name.
struct Rule {
  std::string name;
  uint64_t left;
  Result code;
  enum Kind { once, sticky, delayed, delayed_sticky } kind;
};

// The process is stopped at the end of the `left`-th call of `name`, for so
// long; the device goes on.
struct Stop {
  std::string name;
  uint64_t left, milliseconds;
};

struct Stream;
// Of a launch: it goes on when the driver is called next. No CUresult.
constexpr Result SUSPENDED = -1;

struct Event {
  std::shared_ptr<Stream> stream;  // of the last record
  uint64_t recorded = 0, done = 0;
  Result error = SUCCESS;
  unsigned polls = 0;
  bool timing = true, hung = false;
  double seconds = 0;
  bool captured = false;
};

// One piece of work in a stream. It waits for `event`, or begins when it is
// the head of its stream, and has its effect when it ends.
struct Work {
  const char* call = "";
  std::function<void()> begin;
  std::function<Result()> end;
  // Of launches, in the place of `end`: may answer SUSPENDED, and is asked
  // again then.
  std::function<Result(std::shared_ptr<Running>&)> run;
  std::shared_ptr<Running> running;
  std::shared_ptr<Event> event;  // waited for or recorded
  uint64_t ticket = 0;
  enum Kind { effect, wait, record } kind = effect;
  std::vector<Region> touches;  // memory that must stay until it ends
  bool begun = false;
};

struct Graph;

struct Stream {
  std::deque<Work> queue;
  Result failed = SUCCESS;
  unsigned flags = 0;
  int priority = 0;
  std::shared_ptr<Graph> capture;  // what is enqueued goes there
  bool origin = false;             // the capture began here
};

enum CaptureMode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Graph {
  std::vector<Work> work;  // in the order of submission, which is a legal one
  bool invalid = false;
  int mode = GLOBAL;
  std::thread::id owner;  // who began the capture
};

struct Function {
  const KernelSource* kernel;
  uint32_t dynamic_limit = 48 * 1024;
  bool loaded = false;
};

struct Module {
  std::vector<const KernelSource*> kernels;
  std::map<std::string, void*> functions;
};

template <class T>
class Handles {
 public:
  explicit Handles(uint64_t tag) : next(tag << 32 | 0x10) {}
  void* add(std::shared_ptr<T> thing) {
    void* handle = reinterpret_cast<void*>(next);
    next += 16;
    things[handle] = std::move(thing);
    return handle;
  }
  std::shared_ptr<T> get(void* handle) const {
    auto it = things.find(handle);
    return it == things.end() ? nullptr : it->second;
  }
  void replace(void* handle, std::shared_ptr<T> thing) { things[handle] = std::move(thing); }
  bool remove(void* handle) { return things.erase(handle) > 0; }
  void clear() { things.clear(); }
  auto begin() { return things.begin(); }
  auto end() { return things.end(); }
  size_t size() const { return things.size(); }

 private:
  uint64_t next;
  std::map<void*, std::shared_ptr<T>> things;
};

struct State {
  std::recursive_mutex mutex;
  std::condition_variable_any changed;  // a hung event was let go
  Settings settings;
  bool initialised = false;
  int contexts = 0;  // times the primary context was retained

  MemoryMap map;                            // what kernels may touch
  std::map<uint64_t, uint64_t> device;      // address to bytes
  std::map<uint64_t, uint64_t> pinned;
  uint64_t device_used = 0, pinned_used = 0;
  std::deque<Region> retired;  // freed device addresses, kept from reuse

  std::shared_ptr<Stream> null_stream = std::make_shared<Stream>();
  std::vector<std::shared_ptr<Stream>> leaving;  // destroyed with work left
  Handles<Stream> streams{0x57};
  Handles<Event> events{0x58};
  Handles<Module> modules{0x59};
  Handles<Function> functions{0x5a};
  Handles<Graph> graphs{0x5b}, executables{0x5c};

  std::vector<Rule> rules;
  std::vector<Stop> stops;
  Result sticky = SUCCESS, pending = SUCCESS;
  bool pending_sticky = false;
  uint64_t hang_at = 0;  // the how-manieth record from now hangs; 0: none
  uint64_t calls = 0, launches = 0;
  uint64_t calls_after_sticky = 0;
  std::map<std::string, uint64_t> calls_by_name, launches_by_name;
  std::vector<std::string> violations;
  uint64_t races = 0;
  uint64_t random = 1;

  uint64_t draw(uint64_t below);
  void violation(const std::string& text, bool race);
};

State& state();
std::map<std::string, const KernelSource*>& kernels();  // by name

// Begins every call of the driver: takes the lock, counts, and fires rules.
// `result` is what the call must answer at once, if not 0.
class Call {
 public:
  explicit Call(const char* name, bool needs_context = true);
  ~Call();
  Result result = SUCCESS;

 private:
  std::unique_lock<std::recursive_mutex> lock;
  uint64_t stop = 0;  // milliseconds
};

// Streams (queue.cpp).
std::shared_ptr<Stream> stream_of(void* handle);  // null: no such stream
Result enqueue(const std::shared_ptr<Stream>& stream, Work work);
Result synchronise(const std::shared_ptr<Stream>& stream);
Result synchronise_all();
// Runs the stream's head, and what it waits for. False: it hangs or is empty.
bool advance(const std::shared_ptr<Stream>& stream);
bool complete(Event& event, uint64_t ticket);
void let_run();  // as the drain policy wants, after each call
// Lets other threads call the driver, until a launch that is suspended may go
// on, or a hung event was let go.
void rest();
// Whether a capture forbids this thread a call that might wait or allocate
// (CUDA driver API, cuThreadExchangeStreamCaptureMode); it spoils the capture.
bool spoils_a_capture();
// After a launch, where launches return when they have run.
void finish_launch(const std::shared_ptr<Stream>& stream);
// A violation where a launch waits for the host: `what` may wait for the
// device, or for a lock of the driver that is held until the device is done.
void beside_spins(const std::string& what);
std::vector<std::shared_ptr<Stream>> all_streams();
void abandon(Stream& stream, Result code);  // nothing of it will have an effect
// Whether work that has not ended uses any of these bytes; names the call.
const char* in_use(const Region& region);

void reset_all();
// Dynamic shared memory that a block may opt in to.
int shared_optin(const Settings& settings);
void set_context_current(bool current);
bool context_current();

}  // namespace standin

#define API extern "C" __attribute__((visibility("default"))) standin::Result
#define ENTER(name)             \
  standin::Call call(name);     \
  if (call.result != standin::SUCCESS) return call.result
#define ENTER_FREE(name)           \
  standin::Call call(name, false); \
  if (call.result != standin::SUCCESS) return call.result
// For calls that may wait for the whole device (CUDA programming guide, lazy
// loading and implicit synchronisation).
#define BESIDE_SPINS(name) standin::beside_spins(name)
#define OUTSIDE_CAPTURES() \
  if (standin::spoils_a_capture()) return standin::CAPTURE_UNSUPPORTED

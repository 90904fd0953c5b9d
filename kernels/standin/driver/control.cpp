// The stand-in's own interface: one line of text sets one thing, by function
// or by the environment variable PREGATE_STANDIN (lines parted by ';').
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "state.h"

namespace standin {

std::map<std::string, const KernelSource*>& kernels() {
  static std::map<std::string, const KernelSource*> all;
  return all;
}

void register_kernel(const KernelSource* kernel) {
  auto [it, is_new] = kernels().emplace(kernel->name, kernel);
  if (!is_new) fprintf(stderr, "pregate-standin: two kernels are named %s\n", kernel->name);
}

uint64_t State::draw(uint64_t below) {
  random ^= random >> 12;
  random ^= random << 25;
  random ^= random >> 27;
  return below == 0 ? 0 : (random * 0x2545f4914f6cdd1dull >> 33) % below;
}

void State::violation(const std::string& text, bool race) {
  violations.push_back(text);
  races += race;
  if (settings.print) fprintf(stderr, "pregate-standin: %s\n", text.c_str());
}

static bool number(const std::string& text, uint64_t* out) {
  char* end = nullptr;
  const uint64_t value = strtoull(text.c_str(), &end, 10);
  const int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
  if (text.empty() || end == text.c_str() || (shift != 0 ? end[1] : end[0]) != 0) return false;
  *out = value << shift;
  return true;
}

static std::vector<std::string> parts(const std::string& text, char at) {
  std::vector<std::string> all;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) all.push_back(part);
  return all;
}

// `N:CODE`, `NAME:N:CODE`, each with the kind that the key says.
static bool add_rule(State& s, const std::string& value, Rule::Kind kind) {
  const std::vector<std::string> fields = parts(value, ':');
  if (fields.size() != 2 && fields.size() != 3) return false;
  const size_t at = fields.size() - 2;
  uint64_t nth, code;
  if (!number(fields[at], &nth) || !number(fields[at + 1], &code) || nth == 0) return false;
  s.rules.push_back({at == 1 ? fields[0] : "", nth, Result(code), kind});
  return true;
}

// `NAME:N:MILLISECONDS`.
static bool add_stop(State& s, const std::string& value) {
  const std::vector<std::string> fields = parts(value, ':');
  uint64_t nth, milliseconds;
  if (fields.size() != 3 || !number(fields[1], &nth) || !number(fields[2], &milliseconds) || nth == 0) return false;
  s.stops.push_back({fields[0], nth, milliseconds});
  return true;
}

static bool set_drain(State& s, const std::string& value) {
  Settings& to = s.settings;
  if (value == "lazy") return to.drain = Drain::lazy, true;
  if (value == "eager") return to.drain = Drain::eager, true;
  const std::vector<std::string> fields = parts(value, ':');
  if (fields.size() != 2 || fields[0] != "random" || !number(fields[1], &to.drain_seed)) return false;
  to.drain = Drain::random;
  s.random = to.drain_seed * 0x9e3779b97f4a7c15ull + 0x5bd1e995;
  return true;
}

static bool set(State& s, const std::string& key, const std::string& value) {
  if (key == "drain") return set_drain(s, value);
  if (key == "checks" && (value == "on" || value == "off")) return s.settings.checks = value == "on", true;
  if (key == "fail") return add_rule(s, value, Rule::once);
  if (key == "sticky") return add_rule(s, value, Rule::sticky);
  if (key == "delayed") return add_rule(s, value, Rule::delayed);
  if (key == "delayed_sticky") return add_rule(s, value, Rule::delayed_sticky);
  if (key == "stop") return add_stop(s, value);
  if (key == "capability") {
    const std::vector<std::string> fields = parts(value, '.');
    uint64_t major, minor;
    if (fields.size() != 2 || !number(fields[0], &major) || !number(fields[1], &minor)) return false;
    s.settings.major = int(major);
    s.settings.minor = int(minor);
    return true;
  }
  uint64_t n = 0;
  if (!number(value, &n)) return false;
  if (key == "order") return s.settings.order_seed = n, true;
  if (key == "spins") return s.settings.spins = n, true;
  if (key == "tick") return s.settings.tick = n, true;
  if (key == "blocking") return s.settings.blocking = n != 0, true;
  if (key == "watchdog") return s.settings.watchdog = n != 0, true;
  if (key == "vram") return s.settings.vram_bytes = n, true;
  if (key == "pinned") return s.settings.pinned_bytes = n, true;
  if (key == "driver") return s.settings.driver_version = int(n), true;
  if (key == "devices") return s.settings.devices = int(n), true;
  if (key == "init") return s.settings.init_code = Result(n), true;
  if (key == "print") return s.settings.print = n != 0, true;
  if (key == "log") return s.settings.log = n != 0, true;
  if (key == "hang") return s.hang_at = n, true;
  return false;
}

static void release_hung(State& s) {
  for (auto& [handle, event] : s.events) event->hung = false;
  for (auto& stream : all_streams()) {
    for (Work& work : stream->queue) {
      if (work.event) work.event->hung = false;
    }
  }
  s.hang_at = 0;
  s.changed.notify_all();
}

static void from_environment(State& s);

static bool command(State& s, const std::string& line) {
  if (line.empty()) return true;
  if (line == "reset") {
    reset_all();
    set_context_current(false);  // of this thread
    from_environment(s);
    return true;
  }
  if (line == "clear_faults") {
    s.rules.clear();
    s.stops.clear();
    s.sticky = s.pending = SUCCESS;
    for (auto& stream : all_streams()) stream->failed = SUCCESS;
    release_hung(s);
    return true;
  }
  if (line == "release") return release_hung(s), true;
  if (line == "forget_violations") return s.violations.clear(), s.races = 0, true;
  if (line == "forget_calls") {
    s.calls = s.launches = s.calls_after_sticky = 0;
    s.calls_by_name.clear();
    s.launches_by_name.clear();
    return true;
  }
  const size_t at = line.find('=');
  return at != std::string::npos && set(s, line.substr(0, at), line.substr(at + 1));
}

static void from_environment(State& s) {
  const char* blocking = getenv("CUDA_LAUNCH_BLOCKING");
  s.settings.blocking = blocking && strcmp(blocking, "0") != 0;
  const char* text = getenv("PREGATE_STANDIN");
  if (!text) return;
  for (const std::string& line : parts(text, ';')) {
    if (!command(s, line)) fprintf(stderr, "pregate-standin: PREGATE_STANDIN has '%s'\n", line.c_str());
  }
}

static void read_environment_once() {
  static bool once = (from_environment(state()), true);
  (void)once;
}

State& state() {
  static State* made = [] {  // never destroyed: threads may outlive main
    State* s = new State;
    return s;
  }();
  return *made;
}

static thread_local bool current = false;
void set_context_current(bool is) { current = is; }
bool context_current() { return current; }

Call::Call(const char* name, bool needs_context) : lock(state().mutex) {
  State& s = state();
  read_environment_once();
  s.calls++;
  s.calls_by_name[name]++;
  if (s.settings.log) fprintf(stderr, "pregate-standin: %llu %s\n", (unsigned long long)s.calls, name);
  const auto die = [&](Result code) {
    s.sticky = code;
    for (auto& stream : all_streams()) abandon(*stream, code);
    s.changed.notify_all();
  };
  for (Stop& one : s.stops) {
    if (one.left > 0 && one.name == name && --one.left == 0) stop = one.milliseconds;
  }
  if (s.sticky != SUCCESS) {
    s.calls_after_sticky++;
    result = s.sticky;
    return;
  }
  if (s.pending != SUCCESS) {
    result = s.pending;
    s.pending = SUCCESS;
    if (s.pending_sticky) die(result);
    return;
  }
  for (Rule& rule : s.rules) {
    if (rule.left == 0 || (!rule.name.empty() && rule.name != name) || --rule.left > 0) continue;
    if (rule.kind == Rule::delayed || rule.kind == Rule::delayed_sticky) {
      s.pending = rule.code;
      s.pending_sticky = rule.kind == Rule::delayed_sticky;
      continue;
    }
    result = rule.code;
    if (rule.kind == Rule::sticky) die(result);
    return;
  }
  if (!needs_context) return;
  if (!s.initialised) result = NOT_INITIALIZED;
  else if (!current || s.contexts == 0) result = INVALID_CONTEXT;
}

Call::~Call() {
  if (stop > 0) {
    // With the lock: no thread of a process that is stopped does anything.
    std::this_thread::sleep_for(std::chrono::milliseconds(stop));
    for (auto& stream : all_streams()) {
      while (advance(stream)) {
      }
    }
  }
  if (state().sticky == SUCCESS) let_run();
}

}  // namespace standin

using namespace standin;
#define CONTROL extern "C" __attribute__((visibility("default")))

// Answers 0, or 1 for a line that it does not know.
CONTROL int pregate_standin_control(const char* line) {
  std::lock_guard guard(state().mutex);
  read_environment_once();
  return command(state(), line) ? 0 : 1;
}

// `calls`, `calls:NAME`, `calls_after_sticky`, `launches`, `launches:KERNEL`, `races`, `violations`,
// `kernels`, `sanitizer`, `pending_work`; what is alive: `device_bytes`,
// `device_blocks`, `pinned_bytes`, `pinned_blocks`, `streams`, `events`,
// `modules`, `graphs`, `contexts`; whether one is `current` on the calling
// thread. Unknown names count 0.
CONTROL uint64_t pregate_standin_count(const char* what) {
  std::lock_guard guard(state().mutex);
  State& s = state();
  const std::string name = what;
  const size_t colon = name.find(':');
  if (colon != std::string::npos) {
    auto& map = name.substr(0, colon) == "launches" ? s.launches_by_name : s.calls_by_name;
    auto it = map.find(name.substr(colon + 1));
    return it == map.end() ? 0 : it->second;
  }
  if (name == "calls") return s.calls;
  if (name == "calls_after_sticky") return s.calls_after_sticky;
  if (name == "launches") return s.launches;
  if (name == "races") return s.races;
  if (name == "violations") return s.violations.size();
  if (name == "kernels") return kernels().size();
  if (name == "device_bytes") return s.device_used;
  if (name == "pinned_bytes") return s.pinned_used;
  if (name == "device_blocks") return s.device.size();
  if (name == "pinned_blocks") return s.pinned.size();
  if (name == "streams") return s.streams.size();
  if (name == "events") return s.events.size();
  if (name == "modules") return s.modules.size();
  if (name == "graphs") return s.graphs.size() + s.executables.size();
  if (name == "contexts") return uint64_t(s.contexts);
  if (name == "current") return context_current();
  if (name == "pending_work") {
    uint64_t sum = 0;
    for (auto& stream : all_streams()) sum += stream->queue.size();
    return sum;
  }
#if defined(__SANITIZE_ADDRESS__)
  if (name == "sanitizer") return 1;
#endif
  return 0;
}

// The text of one violation, cut to `size`; answers its whole length.
CONTROL uint64_t pregate_standin_violation(uint64_t index, char* out, uint64_t size) {
  std::lock_guard guard(state().mutex);
  State& s = state();
  if (index >= s.violations.size()) return 0;
  const std::string& text = s.violations[index];
  if (size > 0) {
    const size_t n = std::min<size_t>(text.size(), size - 1);
    memcpy(out, text.data(), n);
    out[n] = 0;
  }
  return text.size();
}

// The kernels of all modules: `module kernel` a line.
CONTROL uint64_t pregate_standin_kernels(char* out, uint64_t size) {
  std::string text;
  for (auto& [name, kernel] : kernels()) text += std::string(kernel->module) + " " + name + "\n";
  if (size > 0) {
    const size_t n = std::min<size_t>(text.size(), size - 1);
    memcpy(out, text.data(), n);
    out[n] = 0;
  }
  return text.size();
}

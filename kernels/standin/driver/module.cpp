// Modules, functions and launches. A module's image is either PTX, whose
// entries must be kernels of the sources with the same parameters, or the name
// of a .cu file.
#include <algorithm>
#include <cstring>

#include "ptx.h"
#include "state.h"

namespace standin {

// Kernel parameters: pointers to the values, then the values.
static std::shared_ptr<std::vector<uint64_t>> pack(const KernelSource& kernel, void* const* params) {
  const size_t words = kernel.params * 3;
  auto packed = std::make_shared<std::vector<uint64_t>>(words + 2);
  uint64_t* value = packed->data() + kernel.params;
  for (unsigned i = 0; i < kernel.params; i++, value++) {
    (*packed)[i] = reinterpret_cast<uint64_t>(value);
    memcpy(value, params[i], kernel.param_bytes[i]);
  }
  return packed;
}

// Begins the launch, or goes on with it.
static Result run_kernel(const Launch& launch, std::shared_ptr<Running>& running) {
  State& s = state();
  if (!running) {
    s.launches++;
    s.launches_by_name[launch.kernel->name]++;
    const uint64_t seed = s.settings.order_seed == 0 ? 0 : s.settings.order_seed * 1000003 + s.launches;
    running = std::make_shared<Running>(launch, seed, s.map);
  }
  Violation violation;
  const Outcome outcome = running->go_on(&violation);
  if (outcome == Outcome::suspended) return SUSPENDED;
  running = nullptr;
  if (outcome == Outcome::ended) return SUCCESS;
  s.violation(violation.text, violation.fault == Fault::race);
  switch (violation.fault) {
    case Fault::memory: return ILLEGAL_ADDRESS;
    case Fault::misaligned: return MISALIGNED_ADDRESS;
    default: return LAUNCH_FAILED;
  }
}

static Result launch(Function& function, const Dim3& grid, const Dim3& block, uint32_t dynamic_bytes, void* handle,
                     void* const* params) {
  const KernelSource& kernel = *function.kernel;
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) return INVALID_VALUE;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return INVALID_VALUE;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) return INVALID_VALUE;
  if (kernel.max_threads != 0 && threads > kernel.max_threads) return INVALID_VALUE;
  if (dynamic_bytes > function.dynamic_limit) return INVALID_VALUE;
  if (kernel.params > 0 && !params) return INVALID_VALUE;
  if (!function.loaded) beside_spins(format("the first launch of %s", kernel.name));
  function.loaded = true;
  const uint32_t limit = uint32_t(shared_optin(state().settings));
  auto packed = pack(kernel, params);
  const Launch launch{&kernel, grid, block, dynamic_bytes, limit,
                      reinterpret_cast<const unsigned char*>(packed->data()), packed->size() * 8,
                      state().settings.spins, state().settings.tick, state().settings.checks};
  Work work;
  work.call = kernel.name;
  work.run = [launch, packed](std::shared_ptr<Running>& running) { return run_kernel(launch, running); };
  if (Result code = enqueue(stream, std::move(work))) return code;
  finish_launch(stream);
  return SUCCESS;
}

// What the driver's compiler would say about the module; empty: nothing.
static std::string reject(const Ptx& ptx, const Settings& settings, Result* code) {
  if (ptx.major * 10 + ptx.minor > highest_ptx(settings.driver_version)) {
    *code = UNSUPPORTED_PTX_VERSION;
    return format("PTX %d.%d is newer than driver %d", ptx.major, ptx.minor, settings.driver_version);
  }
  *code = INVALID_PTX;
  if (ptx.target > settings.major * 10 + settings.minor) {
    return format(".target sm_%d is higher than the device's %d.%d", ptx.target, settings.major, settings.minor);
  }
  for (const PtxEntry& entry : ptx.entries) {
    auto it = kernels().find(entry.name);
    if (it == kernels().end()) return "entry " + entry.name + " is no kernel of kernels/cuda";
    const KernelSource& kernel = *it->second;
    const std::vector<unsigned> bytes(kernel.param_bytes, kernel.param_bytes + kernel.params);
    if (bytes != entry.param_bytes) return "entry " + entry.name + " has other parameters than its source";
  }
  *code = SUCCESS;
  return "";
}

static Result load(void** out, const char* image, std::string* log) {
  if (!out || !image) return INVALID_VALUE;
  const std::string text = image;
  auto module = std::make_shared<Module>();
  Ptx ptx;
  if (parse_ptx(text, &ptx)) {
    Result code = SUCCESS;
    *log = reject(ptx, state().settings, &code);
    if (code != SUCCESS) return code;
    for (const PtxEntry& entry : ptx.entries) module->kernels.push_back(kernels()[entry.name]);
  } else {
    for (auto& [name, kernel] : kernels()) {
      if (text == kernel->module) module->kernels.push_back(kernel);
    }
    if (module->kernels.empty()) {
      *log = "neither PTX nor the name of a file of kernels/cuda";
      return INVALID_IMAGE;
    }
  }
  *out = state().modules.add(module);
  return SUCCESS;
}

}  // namespace standin

using namespace standin;

API cuModuleLoadData(void** out, const void* image) {
  ENTER("cuModuleLoadData");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuModuleLoadData");
  std::string log;
  return load(out, static_cast<const char*>(image), &log);
}

API cuModuleLoadDataEx(void** out, const void* image, unsigned count, int* options, void** values) {
  ENTER("cuModuleLoadDataEx");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuModuleLoadDataEx");
  std::string log;
  const Result code = load(out, static_cast<const char*>(image), &log);
  char* buffer = nullptr;
  size_t bytes = 0;
  for (unsigned i = 0; i < count; i++) {
    if (options[i] == 5) buffer = static_cast<char*>(values[i]);              // error log
    if (options[i] == 6) bytes = reinterpret_cast<size_t>(values[i]) & 0xffffffffu;  // its size
  }
  if (buffer && bytes > 0) {
    strncpy(buffer, log.c_str(), bytes);
    buffer[bytes - 1] = 0;
  }
  return code;
}

API cuModuleUnload(void* handle) {
  ENTER("cuModuleUnload");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuModuleUnload");
  auto module = state().modules.get(handle);
  if (!module) return INVALID_HANDLE;
  for (auto& [name, function] : module->functions) state().functions.remove(function);
  state().modules.remove(handle);
  return SUCCESS;
}

API cuModuleGetFunction(void** out, void* handle, const char* name) {
  ENTER("cuModuleGetFunction");
  BESIDE_SPINS("cuModuleGetFunction");
  auto module = state().modules.get(handle);
  if (!module) return INVALID_HANDLE;
  if (!out || !name) return INVALID_VALUE;
  if (auto it = module->functions.find(name); it != module->functions.end()) {
    *out = it->second;
    return SUCCESS;
  }
  for (const KernelSource* kernel : module->kernels) {
    if (strcmp(kernel->name, name) != 0) continue;
    auto function = std::make_shared<Function>();
    function->kernel = kernel;
    *out = module->functions[name] = state().functions.add(function);
    return SUCCESS;
  }
  return NOT_FOUND;
}

// Else the first launch does it.
API cuFuncLoad(void* handle) {
  ENTER("cuFuncLoad");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuFuncLoad");
  auto function = state().functions.get(handle);
  if (!function) return INVALID_HANDLE;
  function->loaded = true;
  return SUCCESS;
}

API cuModuleGetGlobal_v2(uint64_t*, size_t*, void*, const char*) {
  ENTER("cuModuleGetGlobal");
  return NOT_FOUND;
}

API cuFuncGetAttribute(int* value, int attribute, void* handle) {
  ENTER("cuFuncGetAttribute");
  BESIDE_SPINS("cuFuncGetAttribute");
  auto function = state().functions.get(handle);
  if (!function) return INVALID_HANDLE;
  const unsigned bound = function->kernel->max_threads;
  switch (attribute) {
    case 0: *value = bound != 0 ? int(bound) : 1024; break;
    case 4: *value = 32; break;  // registers
    case 5: case 6: *value = state().settings.major * 10 + state().settings.minor; break;
    case 8: *value = int(function->dynamic_limit); break;
    default: *value = 0;  // static shared memory is known only when it runs
  }
  return SUCCESS;
}

API cuFuncSetAttribute(void* handle, int attribute, int value) {
  ENTER("cuFuncSetAttribute");
  BESIDE_SPINS("cuFuncSetAttribute");
  auto function = state().functions.get(handle);
  if (!function) return INVALID_HANDLE;
  if (attribute == 9) return SUCCESS;  // a hint
  if (attribute != 8 || value < 0 || value > shared_optin(state().settings)) return INVALID_VALUE;
  function->dynamic_limit = uint32_t(value);
  return SUCCESS;
}

API cuFuncSetCacheConfig(void* handle, int) {
  ENTER("cuFuncSetCacheConfig");
  return state().functions.get(handle) ? SUCCESS : INVALID_HANDLE;
}

API cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* bytes) {
  ENTER("cuFuncGetParamInfo");
  auto function = state().functions.get(handle);
  if (!function) return INVALID_HANDLE;
  const KernelSource& kernel = *function->kernel;
  if (index >= kernel.params) return INVALID_VALUE;
  size_t at = 0;
  for (size_t i = 0; i <= index; i++) {
    const size_t size = kernel.param_bytes[i];
    at = (at + size - 1) / size * size;
    if (i == index && offset) *offset = at;
    at += size;
  }
  if (bytes) *bytes = kernel.param_bytes[index];
  return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t) {
  ENTER("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (!state().functions.get(handle)) return INVALID_HANDLE;
  if (threads <= 0) return INVALID_VALUE;
  *blocks = std::min(16, 1536 / threads);
  return SUCCESS;
}

API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned dynamic_bytes, void* stream, void** params, void** extra) {
  ENTER("cuLaunchKernel");
  auto function = state().functions.get(handle);
  if (!function) return INVALID_HANDLE;
  if (extra) return NOT_SUPPORTED;
  return launch(*function, {gx, gy, gz}, {bx, by, bz}, dynamic_bytes, stream, params);
}

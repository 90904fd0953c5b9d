// The device, its primary context, and the names of errors.
#include <cstring>

#include "state.h"

namespace standin {

// CUDA C++ Programming Guide, table of technical specifications per compute
// capability.
int shared_optin(const Settings& settings) {
  const int major = settings.major, minor = settings.minor;
  if (major == 7) return minor == 0 ? 96 * 1024 : 64 * 1024;
  if (major == 8) return minor == 0 || minor == 7 ? 163 * 1024 : 99 * 1024;
  return major == 12 ? 99 * 1024 : 227 * 1024;
}

}  // namespace standin

using namespace standin;

API cuInit(unsigned flags) {
  ENTER_FREE("cuInit");
  if (flags != 0) return INVALID_VALUE;
  if (state().settings.init_code != SUCCESS) return state().settings.init_code;
  if (state().settings.devices == 0) return NO_DEVICE;
  state().initialised = true;
  return SUCCESS;
}

API cuDriverGetVersion(int* version) {
  ENTER_FREE("cuDriverGetVersion");
  if (!version) return INVALID_VALUE;
  *version = state().settings.driver_version;
  return SUCCESS;
}

static Result known(int device) {
  if (!state().initialised) return NOT_INITIALIZED;
  return device >= 0 && device < state().settings.devices ? SUCCESS : INVALID_DEVICE;
}

API cuDeviceGetCount(int* count) {
  ENTER_FREE("cuDeviceGetCount");
  if (!state().initialised) return NOT_INITIALIZED;
  *count = state().settings.devices;
  return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
  ENTER_FREE("cuDeviceGet");
  if (Result code = known(ordinal)) return code;
  *device = ordinal;
  return SUCCESS;
}

API cuDeviceGetName(char* name, int bytes, int device) {
  ENTER_FREE("cuDeviceGetName");
  if (Result code = known(device)) return code;
  if (bytes < 1) return INVALID_VALUE;
  strncpy(name, "Pregate stand-in", size_t(bytes));
  name[bytes - 1] = 0;
  return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int device) {
  ENTER_FREE("cuDeviceTotalMem");
  if (Result code = known(device)) return code;
  *bytes = state().settings.vram_bytes;
  return SUCCESS;
}

static Result uuid(unsigned char* out, int device) {
  if (Result code = known(device)) return code;
  for (int i = 0; i < 16; i++) out[i] = (unsigned char)(0x50 + i + device);
  return SUCCESS;
}

API cuDeviceGetUuid(unsigned char* out, int device) {
  ENTER_FREE("cuDeviceGetUuid");
  return uuid(out, device);
}

API cuDeviceGetUuid_v2(unsigned char* out, int device) {
  ENTER_FREE("cuDeviceGetUuid");
  return uuid(out, device);
}

API cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER_FREE("cuDeviceGetAttribute");
  if (Result code = known(device)) return code;
  if (!value) return INVALID_VALUE;
  const Settings& s = state().settings;
  switch (attribute) {
    case 1: case 2: case 3: *value = attribute == 3 ? 64 : 1024; break;  // threads of a block
    case 5: *value = 0x7fffffff; break;                                   // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = 48 * 1024; break;    // shared memory of a block
    case 9: *value = 64 * 1024; break;    // constant memory
    case 10: *value = 32; break;          // warp
    case 12: case 82: *value = 65536; break;  // registers
    case 13: *value = 1000000; break;     // clock, kHz
    case 16: *value = 4; break;           // multiprocessors
    case 17: *value = s.watchdog; break;  // kernels have a time limit
    case 18: case 20: case 32: *value = 0; break;  // integrated, mode, ECC
    case 19: case 31: case 41: case 78: case 95: *value = 1; break;
    case 33: *value = 1; break;           // PCI bus
    case 34: case 50: *value = 0; break;  // PCI device, domain
    case 36: *value = 1000000; break;     // memory clock, kHz
    case 37: *value = 128; break;         // memory bus, bits
    case 38: *value = 2 << 20; break;     // L2
    case 39: *value = 1536; break;        // threads of a multiprocessor
    case 40: *value = 2; break;           // copy engines
    case 75: *value = s.major; break;
    case 76: *value = s.minor; break;
    case 81: *value = shared_optin(s) + 1024; break;
    case 97: *value = shared_optin(s); break;
    case 106: *value = 16; break;         // blocks of a multiprocessor
    case 111: *value = 1024; break;       // reserved shared memory of a block
    default: *value = 0;                  // no pools, no managed memory
  }
  return SUCCESS;
}

static void* const CONTEXT = reinterpret_cast<void*>(0x5600000010);

API cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER_FREE("cuDevicePrimaryCtxRetain");
  if (Result code = known(device)) return code;
  if (!context) return INVALID_VALUE;
  state().contexts++;
  *context = CONTEXT;
  return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER_FREE("cuDevicePrimaryCtxRelease");
  if (Result code = known(device)) return code;
  if (state().contexts == 0) return INVALID_CONTEXT;
  if (--state().contexts == 0) synchronise_all();
  return SUCCESS;
}

API cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  ENTER_FREE("cuDevicePrimaryCtxGetState");
  if (Result code = known(device)) return code;
  *flags = 0;
  *active = state().contexts > 0;
  return SUCCESS;
}

API cuDevicePrimaryCtxSetFlags_v2(int device, unsigned) {
  ENTER_FREE("cuDevicePrimaryCtxSetFlags");
  return known(device);
}

API cuCtxSetCurrent(void* context) {
  ENTER_FREE("cuCtxSetCurrent");
  if (!state().initialised) return NOT_INITIALIZED;
  if (context && (context != CONTEXT || state().contexts == 0)) return INVALID_CONTEXT;
  set_context_current(context != nullptr);
  return SUCCESS;
}

API cuCtxGetCurrent(void** context) {
  ENTER_FREE("cuCtxGetCurrent");
  if (!state().initialised) return NOT_INITIALIZED;
  *context = context_current() ? CONTEXT : nullptr;
  return SUCCESS;
}

API cuCtxGetDevice(int* device) {
  ENTER("cuCtxGetDevice");
  *device = 0;
  return SUCCESS;
}

API cuCtxSynchronize() {
  ENTER("cuCtxSynchronize");
  OUTSIDE_CAPTURES();
  BESIDE_SPINS("cuCtxSynchronize");
  return synchronise_all();
}

API cuCtxSetFlags(unsigned) {
  ENTER("cuCtxSetFlags");
  return SUCCESS;
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER("cuCtxGetStreamPriorityRange");
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}

struct Named {
  Result code;
  const char *name, *text;
};
static const Named NAMES[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "device is busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {710, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {714, "CUDA_ERROR_HARDWARE_STACK_ERROR", "hardware stack error"},
    {715, "CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {717, "CUDA_ERROR_INVALID_ADDRESS_SPACE", "operation not supported on global/shared address space"},
    {718, "CUDA_ERROR_INVALID_PC", "invalid program counter"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {804, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "forward compatibility was attempted on non supported HW"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static const Named* named(Result code) {
  for (const Named& one : NAMES) {
    if (one.code == code) return &one;
  }
  return nullptr;
}

API cuGetErrorName(Result code, const char** out) {
  const Named* found = named(code);
  *out = found ? found->name : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(Result code, const char** out) {
  const Named* found = named(code);
  *out = found ? found->text : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}

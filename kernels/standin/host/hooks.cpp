// What the compiler calls around the memory accesses of a .cu file: it is
// compiled with -fsanitize=thread, but linked against these functions in place
// of libtsan, as the Linux kernel does for its own race detector. So every
// access of every thread is seen, through any pointer, and the source stays
// as it is. The same for the parts of -fsanitize=undefined that differ between
// the CPU and a device: alignment, bounds of arrays, wide shifts, division by
// zero, conversions out of range.
#include "machine.h"
#include "report.h"

namespace standin {

static void seen(void* address, size_t bytes, Access kind, bool aligned, const void* pc) {
  Machine* machine = Machine::watching();
  if (!machine) return;  // the registrations, before any launch; or checks=off
  if (aligned && (reinterpret_cast<uint64_t>(address) & (bytes - 1)) != 0) {
    machine->fail(format("an access of %zu bytes at 0x%llx is misaligned (%s)", bytes,
                         (unsigned long long)reinterpret_cast<uint64_t>(address), source_of(pc).c_str()),
                  Fault::misaligned);
  }
  machine->access(address, bytes, kind, pc);
}

// The first fields of every record that the compiler hands to a handler.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

static void undefined(const SourceLocation* at, const char* what) {
  Machine* machine = Machine::current();
  if (machine) machine->fail(std::string(what) + " at " + source_line(at->file, at->line), Fault::memory);
}

}  // namespace standin

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define SEEN(name, bytes, kind, aligned)                                                              \
  HOOK void name(void* address) {                                                                     \
    standin::seen(address, bytes, standin::Access::kind, aligned, __builtin_return_address(0));       \
  }
SEEN(__tsan_read1, 1, read, false)
SEEN(__tsan_read2, 2, read, true)
SEEN(__tsan_read4, 4, read, true)
SEEN(__tsan_read8, 8, read, true)
SEEN(__tsan_read16, 16, read, true)
SEEN(__tsan_write1, 1, write, false)
SEEN(__tsan_write2, 2, write, true)
SEEN(__tsan_write4, 4, write, true)
SEEN(__tsan_write8, 8, write, true)
SEEN(__tsan_write16, 16, write, true)
SEEN(__tsan_volatile_read1, 1, read, false)
SEEN(__tsan_volatile_read2, 2, read, true)
SEEN(__tsan_volatile_read4, 4, read, true)
SEEN(__tsan_volatile_read8, 8, read, true)
SEEN(__tsan_volatile_read16, 16, read, true)
SEEN(__tsan_volatile_write1, 1, write, false)
SEEN(__tsan_volatile_write2, 2, write, true)
SEEN(__tsan_volatile_write4, 4, write, true)
SEEN(__tsan_volatile_write8, 8, write, true)
SEEN(__tsan_volatile_write16, 16, write, true)
SEEN(__tsan_unaligned_read2, 2, read, false)
SEEN(__tsan_unaligned_read4, 4, read, false)
SEEN(__tsan_unaligned_read8, 8, read, false)
SEEN(__tsan_unaligned_read16, 16, read, false)
SEEN(__tsan_unaligned_write2, 2, write, false)
SEEN(__tsan_unaligned_write4, 4, write, false)
SEEN(__tsan_unaligned_write8, 8, write, false)
SEEN(__tsan_unaligned_write16, 16, write, false)
HOOK void __tsan_read_range(void* address, unsigned long bytes) {
  standin::seen(address, bytes, standin::Access::read, false, __builtin_return_address(0));
}
HOOK void __tsan_write_range(void* address, unsigned long bytes) {
  standin::seen(address, bytes, standin::Access::write, false, __builtin_return_address(0));
}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}

#define UNDEFINED(name, what, ...)                                                \
  HOOK void name(standin::SourceLocation* at, ##__VA_ARGS__) { standin::undefined(at, what); }
UNDEFINED(__ubsan_handle_type_mismatch_v1, "a misaligned or null pointer", unsigned long)
UNDEFINED(__ubsan_handle_out_of_bounds, "an index out of bounds", unsigned long)
UNDEFINED(__ubsan_handle_shift_out_of_bounds, "a shift by more bits than there are", unsigned long, unsigned long)
UNDEFINED(__ubsan_handle_divrem_overflow, "a division by zero", unsigned long, unsigned long)
UNDEFINED(__ubsan_handle_float_cast_overflow, "a float that does not fit its integer", unsigned long)

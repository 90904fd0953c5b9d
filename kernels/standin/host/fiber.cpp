#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__x86_64__)
asm(R"(
.text
.balign 16
.globl pregate_fiber_switch
.hidden pregate_fiber_switch
.type pregate_fiber_switch,@function
pregate_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pregate_fiber_switch,.-pregate_fiber_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.balign 16
.globl pregate_fiber_switch
.hidden pregate_fiber_switch
.type pregate_fiber_switch,%function
pregate_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size pregate_fiber_switch,.-pregate_fiber_switch
)");
#else
#error "the stand-in knows x86-64 and aarch64"
#endif

namespace standin {

static size_t page() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

char* new_stack() {
  void* at = mmap(nullptr, STACK_BYTES + page(), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  mprotect(at, page(), PROT_NONE);
  return static_cast<char*>(at) + page();
}

void free_stack(char* stack) { munmap(stack - page(), STACK_BYTES + page()); }

void* prepared_stack(char* stack, void (*entry)(), unsigned number) {
  auto* top = reinterpret_cast<uint64_t*>(stack + STACK_BYTES - 64 - number % 32 * 128);
#if defined(__x86_64__)
  *--top = 0;  // the entry's return address; also aligns the stack as a call does
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; i++) *--top = 0;
#else
  for (int i = 0; i < 20; i++) *--top = 0;
  top[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
  return top;
}

}  // namespace standin

// A context switch between stacks of one thread: saves what the calling
// convention asks a function to keep, and nothing else.
#pragma once
#include <cstddef>

namespace standin {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 256 * 1024;
#else
constexpr size_t STACK_BYTES = 64 * 1024;
#endif

// A stack with an unmapped page below it; its lowest usable byte.
char* new_stack();
void free_stack(char* stack);
// A stack pointer that, when switched to, calls `entry`, which never returns.
// `number` is that of the stack: of 32 in a row, no two begin at the same place
// of a page, so that what their threads keep does not share lines of a cache.
void* prepared_stack(char* stack, void (*entry)(), unsigned number);

extern "C" void pregate_fiber_switch(void** save, void* to);

}  // namespace standin

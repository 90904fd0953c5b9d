// Words for reports.
#pragma once
#include <string>

#include "cuda_host.h"

namespace standin {

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string in_brackets(const Dim3& at);
// `file:line` with the path cut to what follows `kernels/`.
std::string source_line(const char* file, unsigned line);
// The source line of an address of this library, by addr2line if it is there.
std::string source_of(const void* pc);

}  // namespace standin

#include "report.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

namespace standin {

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list list;
  va_start(list, pattern);
  vsnprintf(text, sizeof text, pattern, list);
  va_end(list);
  return text;
}

std::string in_brackets(const Dim3& at) { return format("(%u,%u,%u)", at.x, at.y, at.z); }

std::string source_line(const char* file, unsigned line) {
  std::string path = file ? file : "?";
  if (const size_t at = path.rfind("kernels/"); at != std::string::npos) path = path.substr(at);
  return path + format(":%u", line);
}

static std::string ask_for_source(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return "?";
  // The return address is behind the call; one byte before is inside it.
  const size_t at = size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1;
  const std::string command =
      format("LD_PRELOAD= addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, at);
  std::string line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char text[512];
    if (fgets(text, sizeof text, pipe)) line = text;
    pclose(pipe);
  }
  if (const size_t end = line.find_first_of("\n "); end != std::string::npos) line.resize(end);
  if (line.empty() || line[0] == '?') return format("%s+0x%zx", info.dli_fname, at);
  const size_t colon = line.rfind(':');
  return source_line(line.substr(0, colon).c_str(),
                     unsigned(strtoul(line.c_str() + colon + 1, nullptr, 10)));
}

std::string source_of(const void* pc) {
  static std::mutex mutex;
  static std::map<const void*, std::string> known;
  std::lock_guard guard(mutex);
  auto [it, is_new] = known.try_emplace(pc);
  if (is_new) it->second = ask_for_source(pc);
  return it->second;
}

}  // namespace standin

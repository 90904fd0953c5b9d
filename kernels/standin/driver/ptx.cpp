#include "ptx.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>

namespace standin {

static std::string word_at(const std::string& text, size_t at) {
  while (at < text.size() && isspace((unsigned char)text[at])) at++;
  size_t end = at;
  while (end < text.size() && (isalnum((unsigned char)text[end]) || text[end] == '_' || text[end] == '$')) end++;
  return text.substr(at, end - at);
}

// `.param .u64 .ptr .global .align 1 name`: the first type's size.
static unsigned size_of_param(const std::string& text) {
  for (size_t at = text.find('.'); at != std::string::npos; at = text.find('.', at + 1)) {
    const char kind = at + 1 < text.size() ? text[at + 1] : 0;
    if ((kind == 'u' || kind == 's' || kind == 'b' || kind == 'f') && at + 2 < text.size() &&
        isdigit((unsigned char)text[at + 2])) {
      return unsigned(atoi(text.c_str() + at + 2)) / 8;
    }
  }
  return 0;
}

static PtxEntry entry_at(const std::string& text, size_t at) {
  PtxEntry entry{word_at(text, at), {}};
  const size_t body = text.find('{', at), open = text.find('(', at);
  if (open == std::string::npos || open > body) return entry;
  const std::string list = text.substr(open, text.find(')', open) - open);
  for (size_t param = list.find(".param"); param != std::string::npos;) {
    const size_t next = list.find(".param", param + 6);
    entry.param_bytes.push_back(size_of_param(list.substr(param + 6, next == std::string::npos ? next : next - param - 6)));
    param = next;
  }
  return entry;
}

bool parse_ptx(const std::string& text, Ptx* out) {
  const size_t version = text.find(".version"), target = text.find(".target sm_");
  if (version == std::string::npos || target == std::string::npos) return false;
  if (sscanf(text.c_str() + version, ".version %d.%d", &out->major, &out->minor) != 2) return false;
  out->target = atoi(text.c_str() + target + 11);
  for (size_t at = text.find(".entry"); at != std::string::npos; at = text.find(".entry", at + 6)) {
    out->entries.push_back(entry_at(text, at + 6));
  }
  return true;
}

int highest_ptx(int driver_version) {
  const int major = driver_version / 1000, minor = driver_version % 1000 / 10;
  if (major >= 13) return 90 + minor;
  if (major < 12) return major == 11 ? 70 + minor : 60;
  static const int of_12[] = {80, 81, 82, 83, 84, 85, 85, 86, 87, 88};
  return of_12[minor > 9 ? 9 : minor];
}

}  // namespace standin

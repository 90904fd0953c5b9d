#include "memory_map.h"

#include <cstdio>

namespace standin {

void MemoryMap::add(uint64_t base, uint64_t bytes) {
  // Host memory may come back at an address that was freed before.
  for (auto it = freed.lower_bound(base); it != freed.end() && it->first < base + bytes;) it = freed.erase(it);
  live[base] = {base, bytes};
}

bool MemoryMap::remove(uint64_t base) {
  auto it = live.find(base);
  if (it == live.end()) return false;
  freed[base] = it->second;
  if (freed.size() > 4096) freed.erase(freed.begin());
  live.erase(it);
  return true;
}

const Region* MemoryMap::below(const std::map<uint64_t, Region>& map, uint64_t at) const {
  auto it = map.upper_bound(at);
  return it == map.begin() ? nullptr : &(--it)->second;
}

const Region* MemoryMap::find(uint64_t at, uint64_t bytes) const {
  const Region* region = below(live, at);
  return region && region->holds(at, bytes) ? region : nullptr;
}

const Region* MemoryMap::starting(uint64_t base) const {
  auto it = live.find(base);
  return it == live.end() ? nullptr : &it->second;
}

std::string MemoryMap::explain(uint64_t at, uint64_t bytes) const {
  char text[256];
  if (const Region* region = below(live, at); region && at - region->base < region->bytes + 4096) {
    snprintf(text, sizeof text, "bytes %llu to %llu of an allocation of %llu bytes",
             (unsigned long long)(at - region->base), (unsigned long long)(at - region->base + bytes),
             (unsigned long long)region->bytes);
    return text;
  }
  if (const Region* region = below(freed, at); region && at - region->base < region->bytes) {
    snprintf(text, sizeof text, "byte %llu of an allocation of %llu bytes that was freed",
             (unsigned long long)(at - region->base), (unsigned long long)region->bytes);
    return text;
  }
  return at < 4096 ? "a null pointer" : "no memory of the device";
}

}  // namespace standin

// What a kernel or a copy may touch: device allocations and pinned blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace standin {

struct Region {
  uint64_t base = 0, bytes = 0;
  bool holds(uint64_t at, uint64_t n) const { return at >= base && n <= bytes && at - base <= bytes - n; }
};

class MemoryMap {
 public:
  void add(uint64_t base, uint64_t bytes);
  bool remove(uint64_t base);
  // The live region that holds all of [at, at + bytes), or null.
  const Region* find(uint64_t at, uint64_t bytes) const;
  // The live region that begins at `base`, or null.
  const Region* starting(uint64_t base) const;
  // Why [at, at + bytes) is not memory of the device, in words.
  std::string explain(uint64_t at, uint64_t bytes) const;
  size_t count() const { return live.size(); }

 private:
  const Region* below(const std::map<uint64_t, Region>& map, uint64_t at) const;
  std::map<uint64_t, Region> live, freed;
};

}  // namespace standin

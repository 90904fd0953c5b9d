// Shadow of the device memory that a launch has written: who wrote a byte
// last. Another thread that touches it later, in the order of this run, must
// be ordered behind the write: by a barrier of the block, by __syncwarp in a
// warp, or, between blocks, by atomics in both (the block that reads has done
// one, and the one that wrote). Reads are not kept: another seed runs the
// other order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "shadow.h"

namespace standin {

struct Toucher {
  uint32_t block;   // number in the launch
  uint16_t thread;  // number in the block
  uint32_t barriers;  // of the block so far
  uint32_t warp_clock;
};

class GlobalShadow {
 public:
  // A new launch: nothing was written.
  void clear(uint64_t blocks);
  // False: `other` wrote one of these bytes, and nothing orders it before this.
  bool touch(uint64_t at, size_t bytes, Access kind, const Toucher& me, Toucher* other);

 private:
  struct Cell {
    uint32_t launch = 0, block = 0, barriers = 0, warp_clock = 0;
    uint16_t thread = 0;
    bool by_atomic = false;
  };
  struct Page {
    Cell cells[4096];
  };
  bool ordered(const Cell& cell, Access kind, const Toucher& me) const;
  Page* page(uint64_t number, bool make);

  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  struct Recent {
    uint64_t number = ~0ull;
    Page* page = nullptr;
  };
  Recent recent[64];
  std::vector<bool> has_atomics;  // by block
  uint32_t launch = 0;
};

}  // namespace standin

// Shadow of a block's shared memory: for each byte, who wrote and who read it
// last and when. Two accesses of different threads are ordered by a block
// barrier between them, or by a __syncwarp if both threads are in one warp; if
// they are not ordered and one writes, that is a race. A shuffle orders
// nothing (CUDA C++ Programming Guide, warp shuffle functions).
#pragma once
#include <cstddef>
#include <cstdint>

namespace standin {

enum class Access : unsigned char { read, write, atomic };

// Static arrays, a gap, then the dynamic part.
constexpr size_t SHARED_BYTES = 320 * 1024;
constexpr size_t SHARED_GAP = 256;

struct Moment {
  uint32_t block = 0;  // barriers of all blocks so far; 0 is never
  uint32_t warp = 0;   // the warp's own clock
};

struct Cell {
  Moment written, read;
  uint16_t writer, reader;
  bool by_atomic;
  bool in_flight;         // a cp_async is on its way to this byte
  unsigned char readers;  // 1: `reader`; 2: several of one warp; 3: of several warps
};

struct Conflict {
  enum Kind : unsigned char { none, outside, in_flight, write_write, read_write, write_read } kind = none;
  size_t at = 0;
  unsigned other = 0;
};

class Shadow {
 public:
  Shadow();
  ~Shadow();
  Shadow(const Shadow&) = delete;
  void operator=(const Shadow&) = delete;

  // Forgets which bytes belong to an array.
  void clear();
  void allow(size_t at, size_t bytes);
  // A new block begins, or all threads met at a barrier.
  void next_epoch();
  Conflict touch(size_t at, size_t bytes, Access kind, unsigned thread, uint32_t warp_clock);
  void set_in_flight(size_t at, size_t bytes, bool in_flight);

 private:
  bool ordered(const Moment& then, unsigned who, unsigned me, uint32_t warp_clock) const;
  Conflict byte(size_t at, Access kind, unsigned me, uint32_t warp_clock);
  Cell* cells;
  unsigned char* allowed;
  size_t cleared_to = 0;
  uint32_t epoch = 1;
};

}  // namespace standin

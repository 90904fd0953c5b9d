#include "shadow.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace standin {

Shadow::Shadow()
    : cells(static_cast<Cell*>(calloc(SHARED_BYTES, sizeof(Cell)))),
      allowed(static_cast<unsigned char*>(calloc(SHARED_BYTES, 1))) {
  if (!cells || !allowed) throw std::bad_alloc();
}

Shadow::~Shadow() {
  free(cells);
  free(allowed);
}

void Shadow::clear() {
  memset(allowed, 0, cleared_to);
  cleared_to = 0;
}

void Shadow::allow(size_t at, size_t bytes) {
  memset(allowed + at, 1, bytes);
  if (at + bytes > cleared_to) cleared_to = at + bytes;
}

void Shadow::next_epoch() {
  if (++epoch == 0) {  // after four billion barriers: forget everything once
    memset(static_cast<void*>(cells), 0, SHARED_BYTES * sizeof(Cell));
    epoch = 1;
  }
}

// Whether what `who` did at `then` comes before what `me` does now.
bool Shadow::ordered(const Moment& then, unsigned who, unsigned me, uint32_t warp_clock) const {
  if (then.block != epoch || who == me) return true;
  return who / 32 == me / 32 && then.warp != warp_clock;
}

Conflict Shadow::byte(size_t at, Access kind, unsigned me, uint32_t warp_clock) {
  Cell& cell = cells[at];
  if (!allowed[at]) return {Conflict::outside, at, 0};
  if (cell.in_flight) return {Conflict::in_flight, at, cell.writer};
  const bool both_atomic = kind == Access::atomic && cell.by_atomic;
  if (!both_atomic && !ordered(cell.written, cell.writer, me, warp_clock)) {
    const auto found = kind == Access::read ? Conflict::write_read : Conflict::write_write;
    return {found, at, cell.writer};
  }
  const bool seen = cell.read.block == epoch;
  if (kind != Access::read) {
    if (seen && cell.readers == 3) return {Conflict::read_write, at, cell.reader};
    // Several readers of one warp: at least one of them is another thread.
    const bool of_another = cell.readers == 2 || cell.reader != me;
    const bool by_syncwarp = cell.reader / 32 == me / 32 && cell.read.warp != warp_clock;
    if (seen && of_another && !by_syncwarp) return {Conflict::read_write, at, cell.reader};
    cell.written = {epoch, warp_clock};
    cell.writer = uint16_t(me);
    cell.by_atomic = kind == Access::atomic;
    return {};
  }
  if (!seen) {
    cell.readers = 1;
    cell.reader = uint16_t(me);
  } else if (cell.readers == 3 || cell.reader / 32 != me / 32) {
    cell.readers = 3;
  } else if (cell.read.warp != warp_clock) {
    cell.readers = 1;
    cell.reader = uint16_t(me);
  } else if (cell.reader != me) {
    cell.readers = 2;
  }
  cell.read = {epoch, warp_clock};
  return {};
}

Conflict Shadow::touch(size_t at, size_t bytes, Access kind, unsigned thread, uint32_t warp_clock) {
  for (size_t i = 0; i < bytes; i++) {
    const Conflict conflict = byte(at + i, kind, thread, warp_clock);
    if (conflict.kind != Conflict::none) return conflict;
  }
  return {};
}

void Shadow::set_in_flight(size_t at, size_t bytes, bool in_flight) {
  for (size_t i = 0; i < bytes; i++) cells[at + i].in_flight = in_flight;
}

}  // namespace standin

#include "global_shadow.h"

namespace standin {

// Pages of earlier launches are kept up to this many: 64 KiB each.
static constexpr size_t KEPT_PAGES = 4096;

void GlobalShadow::clear(uint64_t blocks) {
  launch++;
  if (pages.size() > KEPT_PAGES || launch == 0) pages.clear();
  for (Recent& entry : recent) entry = {};
  has_atomics.assign(blocks, false);
}

GlobalShadow::Page* GlobalShadow::page(uint64_t number, bool make) {
  Recent& entry = recent[number % 64];
  if (entry.number == number && (entry.page || !make)) return entry.page;
  auto it = pages.find(number);
  if (it == pages.end() && make) it = pages.emplace(number, std::make_unique<Page>()).first;
  entry = {number, it == pages.end() ? nullptr : it->second.get()};
  return entry.page;
}

bool GlobalShadow::ordered(const Cell& cell, Access kind, const Toucher& me) const {
  if (cell.launch != launch) return true;
  if (cell.by_atomic && kind == Access::atomic) return true;
  if (cell.block != me.block) return has_atomics[cell.block] && has_atomics[me.block];
  if (cell.thread == me.thread || cell.barriers != me.barriers) return true;
  return cell.thread / 32 == me.thread / 32 && cell.warp_clock != me.warp_clock;
}

bool GlobalShadow::touch(uint64_t at, size_t bytes, Access kind, const Toucher& me, Toucher* other) {
  if (kind == Access::atomic) has_atomics[me.block] = true;
  for (size_t i = 0; i < bytes;) {
    const uint64_t number = (at + i) / 4096, first = (at + i) % 4096;
    const size_t count = bytes - i < 4096 - first ? bytes - i : 4096 - first;
    Page* shadow = page(number, kind != Access::read);
    i += count;
    if (!shadow) continue;
    for (size_t j = 0; j < count; j++) {
      Cell& cell = shadow->cells[first + j];
      if (!ordered(cell, kind, me)) {
        *other = {cell.block, cell.thread, cell.barriers, cell.warp_clock};
        return false;
      }
    }
    for (size_t j = 0; kind != Access::read && j < count; j++) {
      shadow->cells[first + j] = {launch, me.block, me.barriers, me.warp_clock, me.thread, kind == Access::atomic};
    }
  }
  return true;
}

}  // namespace standin

// SPDX-License-Identifier: BSD-3-Clause
#include "global_races.h"

#include <algorithm>
#include <string>

#include "fault.h"

namespace ptxvm {
namespace {

// write_block, read_block: the block, and
constexpr uint32_t kBlock = 0x1fffffff;
constexpr uint32_t kAtomic = 1u << 31;   // of a write
constexpr uint32_t kOthers = 1u << 31;   // of a read: other blocks read it too
constexpr uint32_t kSeveral = 1u << 30;  // several warps of the block do: see readers_

// write_who, read_who: epoch * 1024 + thread.
constexpr uint32_t kThreadBits = 10;

uint32_t who(const Accessor& by) {
  return by.clock.now() << kThreadBits | (by.clock.warp * kLanes + by.lane);
}

// `bytewise`: less than a cell is accessed, whose other byte may be another lane's.
bool ordered(const Accessor& by, uint32_t other, bool bytewise) {
  const uint32_t thread = other & ((1 << kThreadBits) - 1), epoch = other >> kThreadBits;
  if (epoch <= (by.clock.known[thread] & (~0u >> kThreadBits))) return true;
  return static_cast<int>(thread / kLanes) == by.clock.warp &&
         (static_cast<int>(thread % kLanes) == by.lane || bytewise);
}

std::string thread_name(uint32_t other) {
  const uint32_t thread = other & ((1 << kThreadBits) - 1);
  return "warp " + std::to_string(thread / kLanes) + " lane " + std::to_string(thread % kLanes);
}

}  // namespace

void GlobalRaces::start_launch() {
  ++launch_;
  if (pages_.size() > 65536) pages_.clear();  // 256 MB of device memory's worth
  std::fill(std::begin(recent_), std::end(recent_), nullptr);
}

GlobalRaces::Page& GlobalRaces::page_of(uint64_t address) {
  const uint64_t number = address >> kPageShift;
  Page*& recent = recent_[number % kRecent];
  if (recent == nullptr || recent->number != number) {
    std::unique_ptr<Page>& page = pages_[number];
    if (page == nullptr) page = std::make_unique<Page>();
    if (page->launch != launch_) {
      std::fill(std::begin(page->cells), std::end(page->cells), Cell{});
      page->readers.clear();
      page->number = number;
      page->launch = launch_;
    }
    recent = page.get();
  }
  return *recent;
}

template <typename Visit>
void GlobalRaces::for_cells(uint64_t address, uint32_t bytes, const Visit& visit) {
  Page& page = page_of(address);
  Cell* cell = page.cells + address / 2 % kCellsPerPage;
  for (Cell* const end = cell + (address % 2 + bytes + 1) / 2; cell < end; ++cell)
    visit(page, *cell);
}

void GlobalRaces::check_writer(const Accessor& by, uint32_t block, const Cell& cell,
                               const char* what, bool bytewise) {
  const uint32_t writer = cell.write_block & kBlock;
  if (writer == 0) return;
  if (writer != block)
    throw Fault(std::string("race in global memory: ") + what + " what block " +
                    std::to_string(writer - 1) +
                    " of the same launch wrote; blocks may communicate only through the end of a "
                    "kernel",
                by.lane);
  if (!ordered(by, cell.write_who, bytewise))
    throw Fault(std::string("race in global memory: ") + what + " what " +
                    thread_name(cell.write_who) + " of the same block wrote, no barrier between",
                by.lane);
}

void GlobalRaces::check_readers(const Accessor& by, uint32_t block, const Page& page,
                                const Cell& cell, bool bytewise) {
  const uint32_t reader = cell.read_block & kBlock;
  if (reader == 0) return;
  if (reader != block || (cell.read_block & kOthers) != 0)
    throw Fault("race in global memory: write over what " +
                    (reader != block ? "block " + std::to_string(reader - 1) : "another block") +
                    " of the same launch read; blocks may communicate only through the end of a "
                    "kernel",
                by.lane);
  uint32_t racing = cell.read_who;
  bool race = !ordered(by, racing, bytewise);
  if ((cell.read_block & kSeveral) != 0) {
    const size_t warps = by.clock.whole.size();
    const uint32_t* readers = page.readers.data() + (&cell - page.cells) * warps;
    for (size_t warp = 0; warp < warps; ++warp) {
      const uint32_t other = readers[warp];
      if (other == 0 || ordered(by, other, bytewise)) continue;
      race = true;
      racing = other;
    }
  }
  if (race)
    throw Fault("race in global memory: write over what " + thread_name(racing) +
                    " of the same block may still be reading, no barrier between",
                by.lane);
}

void GlobalRaces::set_reader(const Accessor& by, uint32_t block, Page& page, Cell& cell) {
  const uint32_t me = who(by);
  if ((cell.read_block & kBlock) != block) {
    cell.read_block = block | (cell.read_block != 0 ? kOthers : 0);
    cell.read_who = me;
    return;
  }
  if (cell.read_who == me) return;
  if ((cell.read_block & kSeveral) == 0 && ordered(by, cell.read_who, false)) {
    cell.read_who = me;  // whoever is ordered after me is ordered after the other
    return;
  }
  const size_t warps = by.clock.whole.size();
  if (page.readers.empty()) page.readers.resize(kCellsPerPage * warps);
  uint32_t* readers = page.readers.data() + (&cell - page.cells) * warps;
  if ((cell.read_block & kSeveral) == 0) {
    cell.read_block |= kSeveral;
    std::fill_n(readers, warps, 0);
  }
  for (uint32_t other : {cell.read_who, me})
    readers[(other & ((1 << kThreadBits) - 1)) / kLanes] = other;
  cell.read_who = me;
}

void GlobalRaces::read(const Accessor& by, uint32_t block, uint64_t address, uint32_t bytes) {
  const uint32_t me = who(by);
  for_cells(address, bytes, [&](Page& page, Cell& cell) {
    if (cell.write_block != 0) check_writer(by, block + 1, cell, "load of", bytes == 1);
    if ((cell.read_block & kBlock) != block + 1 || cell.read_who != me)
      set_reader(by, block + 1, page, cell);
  });
}

void GlobalRaces::write(const Accessor& by, uint32_t block, uint64_t address, uint32_t bytes) {
  const uint32_t me = who(by);
  for_cells(address, bytes, [&](Page& page, Cell& cell) {
    if (cell.write_block != 0) check_writer(by, block + 1, cell, "store over", bytes == 1);
    if (cell.read_block != 0) check_readers(by, block + 1, page, cell, bytes == 1);
    cell.write_block = block + 1;
    cell.write_who = me;
  });
}

void GlobalRaces::atomic(const Accessor& by, uint32_t block, uint64_t address, uint32_t bytes) {
  const uint32_t me = who(by);
  for_cells(address, bytes, [&](Page& page, Cell& cell) {
    if ((cell.write_block & kAtomic) == 0) check_writer(by, block + 1, cell, "atomic on", false);
    if (cell.read_block != 0) check_readers(by, block + 1, page, cell, false);
    cell.write_block = (block + 1) | kAtomic;
    cell.write_who = me;
  });
}

}  // namespace ptxvm

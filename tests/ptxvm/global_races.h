// SPDX-License-Identifier: BSD-3-Clause
//
// The race detector of global memory. Blocks of one launch may communicate only through the end of
// a kernel: whatever one block writes, no other block of the launch may read or write, except with
// atomics throughout. Within a block Note [happens before] holds.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "shared_races.h"

namespace ptxvm {

class GlobalRaces {
 public:
  void start_launch();

  // Who in which block (from 0). All throw Fault.
  void read(const Accessor& by, uint32_t block, uint64_t address, uint32_t bytes);
  void write(const Accessor& by, uint32_t block, uint64_t address, uint32_t bytes);
  void atomic(const Accessor& by, uint32_t block, uint64_t address, uint32_t bytes);

 private:
  // Two bytes: neighbouring 16-bit elements are often of different threads. Blocks count from 1.
  struct Cell {
    uint32_t write_block = 0, write_who = 0;  // block and flags; epoch and thread
    uint32_t read_block = 0, read_who = 0;
  };
  static constexpr uint32_t kPageShift = 12, kCellsPerPage = 1 << (kPageShift - 1);
  struct Page {
    uint64_t number = ~uint64_t{0}, launch = 0;
    Cell cells[kCellsPerPage];
    // Of cells that several warps of one block read, in epochs that are not ordered: who, by warp.
    std::vector<uint32_t> readers;
  };

  Page& page_of(uint64_t address);
  // An access is aligned and so within a page: visits its cells.
  template <typename Visit>
  void for_cells(uint64_t address, uint32_t bytes, const Visit& visit);
  void check_writer(const Accessor& by, uint32_t block, const Cell& cell, const char* what,
                    bool bytewise);
  void check_readers(const Accessor& by, uint32_t block, const Page& page, const Cell& cell,
                     bool bytewise);
  void set_reader(const Accessor& by, uint32_t block, Page& page, Cell& cell);

  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  uint64_t launch_ = 0;
  static constexpr uint64_t kRecent = 64;
  Page* recent_[kRecent]{};  // pages of this launch, by the low bits of their numbers
};

}  // namespace ptxvm

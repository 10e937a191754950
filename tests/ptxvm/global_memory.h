// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptxvm {

// The ranges that kernels may touch.
class GlobalMemory {
 public:
  void add(uint64_t begin, uint64_t bytes, bool writable);
  void remove(uint64_t begin, uint64_t bytes);

  // Throws Fault.
  void check(uint64_t address, uint32_t bytes, bool write, int lane) {
    const Range& last = ranges_.empty() ? kNone : ranges_[last_];
    if (address >= last.begin && address + bytes <= last.end && (last.writable || !write)) return;
    search(address, bytes, write, lane);
  }

 private:
  struct Range {
    uint64_t begin, end;
    bool writable;
  };
  static constexpr Range kNone{1, 0, false};

  void search(uint64_t address, uint32_t bytes, bool write, int lane);

  std::vector<Range> ranges_;
  size_t last_ = 0;  // the one that matched last
};

}  // namespace ptxvm

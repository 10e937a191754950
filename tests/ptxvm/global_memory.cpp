// SPDX-License-Identifier: BSD-3-Clause
#include "global_memory.h"

#include <algorithm>
#include <cstdio>

#include "fault.h"

namespace ptxvm {

void GlobalMemory::add(uint64_t begin, uint64_t bytes, bool writable) {
  if (bytes != 0) ranges_.push_back({begin, begin + bytes, writable});
}

void GlobalMemory::remove(uint64_t begin, uint64_t bytes) {
  // The youngest, should there be several.
  const auto range = std::find_if(ranges_.rbegin(), ranges_.rend(), [&](const Range& r) {
    return r.begin == begin && r.end == begin + bytes;
  });
  if (range != ranges_.rend()) ranges_.erase(std::next(range).base());
  last_ = 0;
}

void GlobalMemory::search(uint64_t address, uint32_t bytes, bool write, int lane) {
  bool readable = false;
  int64_t nearest = INT64_MAX;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    const Range& range = ranges_[i];
    if (address >= range.begin && address + bytes <= range.end) {
      readable = true;
      if (write && !range.writable) continue;
      last_ = i;
      return;
    }
    const int64_t distance = address < range.begin
                                 ? static_cast<int64_t>(address - range.begin)
                                 : static_cast<int64_t>(address + bytes - range.end);
    if (std::abs(distance) < std::abs(nearest)) nearest = distance;
  }
  char text[160];
  if (readable) {
    std::snprintf(text, sizeof text, "global memory: store of %u bytes to read-only memory", bytes);
  } else if (std::abs(nearest) < (1 << 24)) {
    std::snprintf(text, sizeof text,
                  "global memory out of bounds: %s of %u bytes, %lld bytes %s registered memory",
                  write ? "store" : "load", bytes, static_cast<long long>(std::abs(nearest)),
                  nearest < 0 ? "before" : "past the end of");
  } else {
    std::snprintf(
        text, sizeof text,
        "global memory out of bounds: %s of %u bytes at 0x%llx, far from registered memory",
        write ? "store" : "load", bytes, static_cast<unsigned long long>(address));
  }
  throw Fault(text, lane);
}

}  // namespace ptxvm

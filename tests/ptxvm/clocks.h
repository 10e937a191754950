// SPDX-License-Identifier: BSD-3-Clause
//
// Note [happens before]. Each warp counts its epochs: a barrier, also bar.warp.sync, ends one. A
// warp knows for every other warp the last epoch that is ordered before what it does now. An
// access of epoch e by warp w is ordered before mine if I know of w's epoch e; my own lanes'
// accesses, if they are mine or of an earlier epoch. Two accesses, one of them a write, that are
// not ordered are a race, whatever the values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptxvm {

struct WarpClock {
  std::vector<uint32_t> known;  // epochs by warp; the own one is the present epoch
  // Whatever any warp did up to this epoch is ordered before what this warp does now.
  uint32_t settled = 0;
  int warp = 0;

  uint32_t now() const { return known[warp]; }

  void start(int own, int warps, uint32_t base) {
    warp = own;
    known.assign(warps, base);
    ++known[warp];
    settle();
  }

  void next_epoch() {
    ++known[warp];
    settle();
  }

  void join(const std::vector<uint32_t>& others) {
    for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], others[i]);
    settle();
  }

 private:
  void settle() {
    settled = known[warp] - 1;
    for (size_t i = 0; i < known.size(); ++i)
      if (static_cast<int>(i) != warp) settled = std::min(settled, known[i]);
  }
};

}  // namespace ptxvm

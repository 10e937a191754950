// SPDX-License-Identifier: BSD-3-Clause
//
// Note [happens before]. Each warp counts its epochs: a barrier, also bar.warp.sync, ends one. A
// warp knows for every other warp the last epoch that is ordered before what it does now. An
// access of epoch e by warp w is ordered before mine if I know of w's epoch e; my own lanes'
// accesses, if they are mine or of an earlier epoch. Two accesses, one of them a write, that are
// not ordered are a race, whatever the values.
//
// Note [proxies]. wgmma reads shared memory through the async proxy. What was written otherwise,
// the generic proxy's, is ordered before such a read only if a fence.proxy.async lies between: the
// writer's, after the write and before the barrier, or one of whoever knows of the write already.
// Each warp counts its fences, and a write remembers how many its warp had executed; of the others'
// fences a warp learns by barriers, as it does of epochs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptxvm {

// What a warp knows of each warp.
struct Knowledge {
  std::vector<uint32_t> known;    // epochs; the own one is the present epoch
  std::vector<uint32_t> fences;   // how often it had executed fence.proxy.async
  std::vector<uint32_t> proxied;  // the epoch up to which somebody fenced what it wrote

  void assign(size_t warps, uint32_t base) {
    known.assign(warps, base);
    fences.assign(warps, 0);
    proxied.assign(warps, base);
  }

  void join(const Knowledge& other) {
    const auto later = [](std::vector<uint32_t>& mine, const std::vector<uint32_t>& others) {
      for (size_t i = 0; i < mine.size(); ++i) mine[i] = std::max(mine[i], others[i]);
    };
    later(known, other.known);
    later(fences, other.fences);
    later(proxied, other.proxied);
  }
};

struct WarpClock : Knowledge {
  // Whatever any warp did up to this epoch is ordered before what this warp does now.
  uint32_t settled = 0;
  int warp = 0;

  uint32_t now() const { return known[warp]; }

  void start(int own, int warps, uint32_t base) {
    warp = own;
    assign(warps, base);
    ++known[warp];
    settle();
  }

  void next_epoch() {
    ++known[warp];
    settle();
  }

  void join(const Knowledge& other) {
    Knowledge::join(other);
    settle();
  }

  // fence.proxy.async. What the warp itself writes later in this epoch is not covered.
  void fence_proxies() {
    ++fences[warp];
    for (size_t i = 0; i < known.size(); ++i)
      if (static_cast<int>(i) != warp) proxied[i] = known[i];
  }

 private:
  void settle() {
    settled = known[warp] - 1;
    for (size_t i = 0; i < known.size(); ++i)
      if (static_cast<int>(i) != warp) settled = std::min(settled, known[i]);
  }
};

}  // namespace ptxvm

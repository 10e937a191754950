// SPDX-License-Identifier: BSD-3-Clause
//
// Note [happens before]. Each warp counts its epochs: a barrier, also bar.warp.sync, ends one, and
// so does an arrival at an mbarrier. A warp knows for every thread the last epoch that is ordered
// before what the warp does now. An access of epoch e is ordered before mine if I know of its
// thread's epoch e, or if it is my own. Two accesses, one of them a write, that are not ordered are
// a race, whatever the values. A barrier of the warp or the block tells of all of a warp's threads;
// an mbarrier only of those that arrive, and of what they know. Threads that wait for its phase
// know of it only together: when the last lane of their warp has waited, or at the next barrier.
//
// Note [proxies]. wgmma reads shared memory through the async proxy. What was written otherwise,
// the generic proxy's, is ordered before such a read only if a fence.proxy.async lies between: the
// writer's, after the write and before the barrier, or one of whoever knows of the write already.
// Each warp counts its fences, and a write remembers how many its warp had executed; of the others'
// fences a warp learns by barriers, as it does of epochs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "lanes.h"

namespace ptxvm {

// What a warp knows.
struct Knowledge {
  std::vector<uint32_t> known;    // epochs, by thread
  std::vector<uint32_t> fences;   // how often each warp had executed fence.proxy.async
  std::vector<uint32_t> proxied;  // by thread, the epoch up to which somebody fenced what it wrote

  void assign(size_t warps, uint32_t base) {
    known.assign(warps * kLanes, base);
    fences.assign(warps, 0);
    proxied.assign(warps * kLanes, base);
  }

  void join(const Knowledge& other) {
    const auto later = [](std::vector<uint32_t>& mine, const std::vector<uint32_t>& others) {
      for (size_t i = 0; i < mine.size(); ++i) mine[i] = std::max(mine[i], others[i]);
    };
    later(known, other.known);
    later(fences, other.fences);
    later(proxied, other.proxied);
  }

  // The last epoch of a warp that is known of all its lanes; of some lane.
  uint32_t of_all(int warp) const { return *std::ranges::min_element(lanes_of(warp)); }
  uint32_t of_any(int warp) const { return *std::ranges::max_element(lanes_of(warp)); }

 private:
  std::span<const uint32_t> lanes_of(int warp) const {
    return std::span(known).subspan(static_cast<size_t>(warp) * kLanes, kLanes);
  }
};

class WarpClock : public Knowledge {
 public:
  // Whatever any thread did up to this epoch is ordered before what this warp does now.
  uint32_t settled = 0;
  // The same of each warp; and the epoch up to which some lane's accesses are.
  std::vector<uint32_t> whole, latest;
  int warp = 0;

  uint32_t now() const { return epoch_; }
  uint32_t synced() const { return whole[warp]; }  // of the own lanes
  int thread(int lane) const { return warp * kLanes + lane; }

  void start(int own, int warps, uint32_t base) {
    warp = own;
    assign(static_cast<size_t>(warps), base);
    epoch_ = base + 1;
    waited_.clear();
    settle();
  }

  // All lanes meet.
  void next_epoch() {
    for (const Waited& one : waited_) join(one.known);
    waited_.clear();
    std::fill_n(known.begin() + thread(0), kLanes, epoch_);
    whole[warp] = latest[warp] = epoch_++;
    settled = *std::ranges::min_element(whole);
  }

  void join(const Knowledge& other) {
    Knowledge::join(other);
    settle();
  }

  // What these lanes know: together with what they alone have waited for.
  Knowledge known_to(LaneMask lanes) const {
    Knowledge result = *this;
    for (const Waited& one : waited_)
      if ((lanes & ~one.lanes) == 0) result.join(one.known);
    return result;
  }

  // These lanes arrive at an mbarrier, which learns of what they did.
  void release(LaneMask lanes, Knowledge& to) {
    to.join(known_to(lanes));
    for_lanes(lanes, [&](int lane) { to.known[thread(lane)] = epoch_; });
    ++epoch_;
  }

  // These lanes, of all that there are, have waited for what has this number.
  void acquire(LaneMask lanes, LaneMask all, uint64_t number, const Knowledge& from) {
    if (lanes == all) return join(from);
    auto one = std::ranges::find(waited_, number, &Waited::number);
    if (one == waited_.end()) one = waited_.insert(one, {number, 0, from});
    one->lanes |= lanes;
    if ((all & ~one->lanes) != 0) return;
    join(one->known);
    waited_.erase(one);
  }

  // fence.proxy.async. What the warp itself writes later in this epoch is not covered.
  void fence_proxies() {
    ++fences[warp];
    proxied = known;
  }

 private:
  struct Waited {
    uint64_t number;
    LaneMask lanes;
    Knowledge known;
  };

  void settle() {
    whole.resize(fences.size());
    latest.resize(fences.size());
    for (size_t i = 0; i < fences.size(); ++i) {
      whole[i] = of_all(static_cast<int>(i));
      latest[i] = of_any(static_cast<int>(i));
    }
    settled = *std::ranges::min_element(whole);
  }

  uint32_t epoch_ = 0;
  std::vector<Waited> waited_;  // by some of the lanes
};

}  // namespace ptxvm

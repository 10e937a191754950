// SPDX-License-Identifier: BSD-3-Clause
#include "mbarriers.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "block.h"
#include "fault.h"
#include "launch.h"

namespace ptxvm {

void Mbarriers::start() {
  for (const auto& [offset, barrier] : live_) block_.races.end_mbarrier(offset);
  live_.clear();
}

void Mbarriers::init(Warp& warp, int lane, uint32_t offset, uint32_t count) {
  if (count == 0 || count >= 1u << 20)
    throw Fault("mbarrier.init: a count of " + std::to_string(count), lane);
  if (const auto live = live_.find(offset); live != live_.end())
    throw Fault("mbarrier.init of an mbarrier", lane, live->second.instruction, "initialised");
  if (block_.launch.checks.races) block_.races.begin_mbarrier(warp.accessor(lane), offset);
  Mbarrier& barrier = live_[offset];
  barrier.count = count;
  barrier.thread = warp.clock.thread(lane);
  barrier.epoch = warp.clock.now();
  barrier.instruction = warp.pc();
  const size_t warps = warp.clock.whole.size();
  barrier.arriving.assign(warps, 0);
  barrier.waited.assign(warps, 0);
}

Mbarriers::Mbarrier& Mbarriers::find(Warp& warp, LaneMask lanes, const Knowledge& known,
                                     uint32_t offset, const char* what) {
  const auto live = live_.find(offset);
  if (live == live_.end()) throw Fault(std::string(what) + ": not initialised", first_lane(lanes));
  Mbarrier& barrier = live->second;
  const LaneMask others =
      barrier.thread / kLanes == warp.id ? lanes & ~(1u << barrier.thread % kLanes) : lanes;
  if (others != 0 && barrier.epoch > known.known[static_cast<size_t>(barrier.thread)] &&
      block_.launch.checks.races)
    throw Fault("race in shared memory: " + std::string(what) + " of what warp " +
                    std::to_string(barrier.thread / kLanes) + " lane " +
                    std::to_string(barrier.thread % kLanes) + " initialised, no barrier between",
                first_lane(others), barrier.instruction, "initialised");
  return barrier;
}

// Each of these lanes must know of all others' arrivals in the phase before.
void Mbarriers::check_order(const Mbarrier& barrier, const Warp& warp, LaneMask lanes,
                            const Knowledge& known) {
  for (size_t i = 0; i < barrier.completed.known.size(); ++i) {
    if (barrier.completed.known[i] <= known.known[i]) continue;
    const int thread = static_cast<int>(i);
    const LaneMask others = thread / kLanes == warp.id ? lanes & ~(1u << thread % kLanes) : lanes;
    if (others == 0) continue;
    throw Fault(
        "mbarrier.arrive: nothing orders it after the end of the phase before, for which "
        "warp " +
            std::to_string(thread / kLanes) + " lane " + std::to_string(thread % kLanes) +
            " arrived: more arrive than the " + std::to_string(barrier.count) +
            " it counts, or one has not waited",
        first_lane(others), barrier.instruction, "initialised");
  }
}

bool Mbarriers::arrive(Warp& warp, LaneMask lanes, uint32_t offset) {
  const Knowledge known = warp.clock.known_to(lanes);
  Mbarrier& barrier = find(warp, lanes, known, offset, "mbarrier.arrive");
  if (block_.launch.checks.races) check_order(barrier, warp, lanes, known);
  const auto arrivals = static_cast<uint32_t>(std::popcount(lanes));
  if (barrier.arrived + arrivals > barrier.count)
    throw Fault(
        "mbarrier.arrive: more arrive than the " + std::to_string(barrier.count) + " it counts",
        first_lane(lanes), barrier.instruction, "initialised");
  warp.clock.release(lanes, barrier.arriving);
  barrier.arrived += arrivals;
  if (barrier.arrived != barrier.count) return false;
  for (size_t i = 0; i < barrier.waited.size() && block_.launch.checks.races; ++i)
    if (barrier.waited[i] > barrier.arriving.of_any(static_cast<int>(i)))
      throw Fault("mbarrier.arrive: ends a phase while warp " + std::to_string(i) +
                      " may still wait for the one before",
                  first_lane(lanes), barrier.instruction, "initialised");
  std::ranges::fill(barrier.waited, 0);
  barrier.completed = barrier.arriving;
  barrier.arriving.assign(barrier.waited.size(), 0);
  barrier.arrived = 0;
  ++barrier.phase;
  return true;
}

bool Mbarriers::ended(Warp& warp, LaneMask lanes, uint32_t offset, uint32_t parity) {
  Mbarrier& barrier = find(warp, lanes, warp.clock.known_to(lanes), offset, "mbarrier.try_wait");
  if (parity > 1)
    throw Fault("mbarrier.try_wait: a parity of " + std::to_string(parity), first_lane(lanes));
  if (barrier.phase % 2 == parity) return false;
  if (barrier.phase != 0)
    warp.clock.acquire(lanes, warp.alive(), uint64_t{offset} << 32 | barrier.phase,
                       barrier.completed);
  barrier.waited[static_cast<size_t>(warp.id)] = warp.clock.now();
  return true;
}

std::string Mbarriers::describe(uint32_t offset) const {
  const Mbarrier& barrier = live_.at(offset);
  return "phase " + std::to_string(barrier.phase) + " of the mbarrier at " +
         std::to_string(offset + kSharedBegin) + ": " + std::to_string(barrier.arrived) + " of " +
         std::to_string(barrier.count) + " have arrived";
}

}  // namespace ptxvm

// SPDX-License-Identifier: BSD-3-Clause
//
// bar.sync, bar.arrive, bar.red (and barrier., barrier.cta.), bar.warp.sync.
#include <bit>

#include "../block.h"
#include "../launch.h"
#include "handlers.h"

namespace ptxvm {
namespace {

// arg: barrier, threads.
Flow run_sync(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.gathered_at_barrier(lanes)) return Flow::kRetry;
  warp.block.arrive(warp, warp.uniform_value(in.arg[0], lanes),
                    warp.uniform_value(in.arg[1], lanes), true);
  return Flow::kBlocked;
}

Flow run_arrive(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.gathered_at_barrier(lanes)) return Flow::kRetry;
  warp.block.arrive(warp, warp.uniform_value(in.arg[0], lanes),
                    warp.uniform_value(in.arg[1], lanes), false);
  return Flow::kNext;
}

enum Reduction : int32_t { kPopc, kAnd, kOr };

// arg: barrier, threads, destination, predicate. Executed once to arrive and once more, when the
// barrier is complete, for the result.
Flow run_reduction(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.awaits_votes) {
    if (!warp.gathered_at_barrier(lanes)) return Flow::kRetry;
    warp.awaits_votes = true;
    const uint32_t barrier = warp.uniform_value(in.arg[0], lanes);
    warp.block.vote(barrier,
                    static_cast<uint32_t>(std::popcount(warp.predicate(in.arg[3]) & lanes)),
                    static_cast<uint32_t>(std::popcount(lanes)));
    warp.block.arrive(warp, barrier, warp.uniform_value(in.arg[1], lanes), true);
    return Flow::kRetry;
  }
  warp.awaits_votes = false;
  const Votes& votes = warp.votes;
  if (in.immediate == kPopc) {
    for_lanes(lanes, [&](int lane) { warp.set_lane_value(in.arg[2], lane, false, votes.for_it); });
  } else {
    const bool holds = in.immediate == kAnd ? votes.for_it == votes.threads : votes.for_it != 0;
    warp.set_predicate(in.arg[2], lanes, holds ? kAllLanes : 0);
  }
  return Flow::kNext;
}

Flow run_warp_sync(Warp& warp, const Instruction& in, LaneMask lanes) {
  return warp.warp_barrier(warp.uniform_value(in.arg[0], lanes), lanes);
}

bool reduction(Decoder& d) {
  const bool popc = d.has("popc");
  if (!popc && !d.has("and") && !d.has("or")) return false;
  d.instruction.immediate = popc ? kPopc : d.has("and") ? kAnd : kOr;
  const size_t last = d.operand_count() - 1;
  d.instruction.arg = {d.source(1), last == 3 ? d.source(2) : d.constant(0),
                       popc ? d.destination(0) : d.predicate(0), d.predicate(last)};
  d.instruction.run = run_reduction;
  return true;
}

bool bar(Decoder& d) {
  if (d.has("cluster")) return false;
  if (d.word(1) == "warp") {
    d.instruction.arg = {d.source(0)};
    d.instruction.run = run_warp_sync;
    return true;
  }
  if (d.has("red")) return reduction(d);
  d.instruction.arg = {d.source(0), d.operand_count() > 1 ? d.source(1) : d.constant(0)};
  if (d.has("sync"))
    d.instruction.run = run_sync;
  else if (d.has("arrive"))
    d.instruction.run = run_arrive;
  else
    return false;
  return true;
}

}  // namespace

void add_barriers(Opcodes& opcodes) {
  for (const char* name : {"bar", "barrier"}) opcodes[name].push_back(bar);
}

}  // namespace ptxvm

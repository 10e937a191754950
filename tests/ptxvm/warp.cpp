// SPDX-License-Identifier: BSD-3-Clause
#include "warp.h"

#include <algorithm>

#include "block.h"
#include "launch.h"

namespace ptxvm {

Warp::Warp(Block& block, int id)
    : block(block), id(id), program_(block.launch.program), local_bytes_(program_.local_bytes) {}

void Warp::start(uint32_t base_epoch) {
  registers_ = program_.registers;
  predicates_ = program_.predicates;
  const int threads = block.launch.threads_per_block - id * kLanes;
  alive_ = threads >= kLanes ? kAllLanes : (LaneMask{1} << threads) - 1;
  converged_ = true;
  pc_ = 0;
  parked_ = at_warp_barrier_ = awaiting_ = barrier_members_ = 0;
  registers = program_.registers_per_thread;
  stuck_ = awaits_votes = false;
  copies_.clear();
  products.start(program_.watched.size());
  std::fill(std::begin(groups_), std::end(groups_), 0);
  local_.assign(static_cast<size_t>(local_bytes_) * kLanes, 0xff);
  state = State::kRunnable;
  clock.start(id, block.launch.warps_per_block, base_epoch);
  for (const SpecialRegister& special : program_.specials)
    for (int lane = 0; lane < kLanes; ++lane)
      set_lane_value(special.row, lane, special.wide, special.value(*this, lane));
}

// Diverged lanes run lowest instruction first, so that they meet again where branches join.
LaneMask Warp::select() {
  if (converged_) return alive_;
  LaneMask candidates = alive_ & ~parked_;
  stuck_ = candidates == 0;
  if (stuck_) candidates = alive_;
  pc_ = ~0u;
  for_lanes(candidates, [&](int lane) { pc_ = std::min(pc_, pcs_[lane]); });
  LaneMask here = 0;
  for_lanes(alive_, [&](int lane) { here |= static_cast<LaneMask>(pcs_[lane] == pc_) << lane; });
  parked_ &= ~here;
  at_warp_barrier_ &= ~here;
  awaiting_ &= ~here;
  converged_ = here == alive_;
  return here;
}

void Warp::diverge() {
  if (!converged_) return;
  converged_ = false;
  std::fill(std::begin(pcs_), std::end(pcs_), pc_);
}

void Warp::advance(LaneMask lanes, uint32_t target) {
  if (converged_)
    pc_ = target;
  else
    for_lanes(lanes, [&](int lane) { pcs_[lane] = target; });
}

void Warp::step() {
  if (awaiting_ != 0 && (alive_ & ~parked_) == 0) {
    state = State::kAwaiting;
    return;
  }
  const LaneMask here = select();
  const Instruction& instruction = program_.code[pc_];
  const LaneMask lanes =
      instruction.guard < 0 ? here : here & predicate(static_cast<uint32_t>(instruction.guard));
  const uint32_t next = pc_ + 1;
  program_.executed[pc_] += lanes != 0;
  if (instruction.watched && lanes != 0)
    products.touch(program_.watched_uses[pc_], lanes == alive_);
  const Flow flow = lanes == 0 ? Flow::kNext : instruction.run(*this, instruction, lanes);
  if (flow == Flow::kNext) return advance(here, next);
  if (flow == Flow::kRetry) return;
  if (flow == Flow::kBlocked) {
    advance(here, next);
    return;
  }
  if (lanes != here) diverge();
  if (flow == Flow::kJump) {
    advance(lanes, instruction.target);
  } else {
    alive_ &= ~lanes;
    if (alive_ == 0) state = State::kDone;
  }
  if (lanes != here) advance(here & ~lanes, next);
}

uint32_t Warp::uniform_value(uint32_t row, LaneMask lanes) const {
  const auto value = static_cast<uint32_t>(lane_value(row, first_lane(lanes), false));
  for_lanes(lanes, [&](int lane) {
    if (static_cast<uint32_t>(lane_value(row, lane, false)) != value)
      throw Fault("lanes differ in an operand they must agree on", lane);
  });
  return value;
}

void Warp::require_whole_warp(LaneMask lanes, const char* what) const {
  if (lanes != kAllLanes)
    throw Fault(std::string(what) + " executed by part of a warp", first_lane(lanes));
}

bool Warp::gathered(LaneMask members, LaneMask lanes, const char* what) {
  if ((lanes & ~members) != 0)
    throw Fault(std::string(what) + ": a lane executes it whom its mask does not name",
                first_lane(lanes & ~members));
  const LaneMask missing = members & alive_ & ~lanes;
  if (missing == 0) return true;
  if (stuck_ || converged_)
    throw Fault(std::string(what) + ": its mask names lane " + std::to_string(first_lane(missing)) +
                    ", which is not here",
                first_lane(lanes));
  parked_ |= lanes;
  return false;
}

bool Warp::gathered_at_barrier(LaneMask lanes) {
  if (barrier_members_ == 0) barrier_members_ = alive_;
  const LaneMask missing = barrier_members_ & ~lanes;
  if (missing == 0) {
    barrier_members_ = 0;
    return true;
  }
  if (stuck_ || converged_)
    throw Fault("divergent barrier: executed by part of a warp, lane " +
                    std::to_string(first_lane(missing)) + " is elsewhere",
                first_lane(lanes));
  parked_ |= lanes;
  return false;
}

Flow Warp::await(LaneMask lanes, uint32_t mbarrier) {
  parked_ |= lanes;
  awaiting_ |= lanes;
  awaited_ = mbarrier;
  return Flow::kRetry;
}

void Warp::wake() {
  parked_ &= ~awaiting_;
  awaiting_ = 0;
  if (state == State::kAwaiting) state = State::kRunnable;
}

Flow Warp::warp_barrier(LaneMask members, LaneMask lanes) {
  const LaneMask elsewhere = members & alive_ & ~lanes & at_warp_barrier_;
  if (elsewhere == 0) {
    if (!gathered(members, lanes, "bar.warp.sync")) {
      at_warp_barrier_ |= lanes;
      return Flow::kRetry;
    }
  } else if ((members & alive_ & ~lanes & ~at_warp_barrier_) != 0) {
    parked_ |= lanes;
    at_warp_barrier_ |= lanes;
    return Flow::kRetry;
  }
  for_lanes(elsewhere, [&](int lane) { ++pcs_[lane]; });
  parked_ &= ~elsewhere;
  at_warp_barrier_ &= ~elsewhere;
  clock.next_epoch();
  return Flow::kNext;
}

void Warp::issue_copy(const AsyncCopy& copy) {
  AsyncCopy& mine = copies_.emplace_back(copy);
  mine.group = groups_[copy.lane];
  if (!block.launch.checks.late_copies)
    std::copy_n(mine.data, mine.bytes, block.shared(mine.destination));
}

void Warp::commit_copies(LaneMask lanes) {
  for_lanes(lanes, [&](int lane) { ++groups_[lane]; });
}

void Warp::deliver(AsyncCopy& copy) {
  uint8_t* to = block.shared(copy.destination);
  for (int i = 0; i < copy.bytes; i += 4) std::memcpy(to + i, copy.data + i, 4);
  if (block.launch.checks.races)
    block.races.end_copy(accessor(copy.lane), copy.destination - kSharedBegin, copy.bytes);
}

void Warp::wait_copies(LaneMask lanes, int pending) {
  std::erase_if(copies_, [&](AsyncCopy& copy) {
    if (!has_lane(lanes, copy.lane)) return false;
    if (pending >= 0 && copy.group + pending >= groups_[copy.lane]) return false;
    deliver(copy);
    return true;
  });
}

}  // namespace ptxvm

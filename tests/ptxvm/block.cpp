// SPDX-License-Identifier: BSD-3-Clause
#include "block.h"

#include <algorithm>

#include "launch.h"

namespace ptxvm {

Block::Block(Launch& launch)
    : launch(launch),
      races(launch.shared_bytes(), launch.warps_per_block),
      shared_(launch.shared_bytes()) {
  races.check_uninitialised(launch.checks.uninitialised);
  for (int i = 0; i < launch.warps_per_block; ++i)
    warps_.push_back(std::make_unique<Warp>(*this, i));
}

void Block::start() {
  // NaN in every format: what is used before it is written shows.
  std::fill(shared_.begin(), shared_.end(), uint8_t{0xff});
  if (last_epoch_ > 1u << 20) {
    last_epoch_ = 0;
    races.clear();
  }
  races.start(last_epoch_);
  for (auto& barrier : barriers_) barrier = {};
  mbarriers.start();
  free_registers_ = 0;
  for (auto& steps : steps_) steps.clear();
  for (auto& warp : warps_) warp->start(last_epoch_);
}

void Block::run(uint32_t block_number) {
  number = block_number;
  index = {number % launch.grid.x, number / launch.grid.x % launch.grid.y,
           number / launch.grid.x / launch.grid.y};
  start();
  schedule();
  for (const auto& warp : warps_) {
    if (warp->copies_in_flight()) fail(warp.get(), Fault("exit with a cp.async not waited for"));
    if (warp->products.in_flight()) fail(warp.get(), Fault("exit with a wgmma not waited for"));
    if (const size_t steps = warp->products.steps, group = static_cast<size_t>(warp->id) / 4;
        group < steps_.size() && steps != steps_[group].size())
      fail(warp.get(), Fault(name_of(steps_[group][steps]) +
                             ": not executed by all four warps of the warpgroup"));
    last_epoch_ = std::max(last_epoch_, warp->clock.now());
  }
}

// A warp drawn at random runs for a while drawn at random.
void Block::schedule() {
  std::vector<Warp*> runnable;
  uint64_t steps = 0;
  while (true) {
    runnable.clear();
    bool all_done = true;
    for (const auto& warp : warps_) {
      if (warp->state == Warp::State::kRunnable) runnable.push_back(warp.get());
      all_done &= warp->state == Warp::State::kDone;
    }
    if (all_done) break;
    if (runnable.empty()) deadlock();
    Warp& warp = *runnable[launch.random() % runnable.size()];
    uint64_t quantum = launch.random() % 4 == 0 ? 1'000'000 : 1 + launch.random() % 200;
    try {
      for (; quantum != 0 && warp.state == Warp::State::kRunnable; --quantum, ++steps) warp.step();
      if (steps > launch.checks.instruction_limit)
        throw Fault("livelock: the block has executed " + std::to_string(steps) + " instructions");
    } catch (const Fault& fault) {
      fail(&warp, fault);
    }
    if (warp.state == Warp::State::kDone)
      for (Barrier& barrier : barriers_) complete_if_full(barrier);
  }
  launch.statistics.instructions += steps;
}

void Block::deadlock() const {
  const Warp* first = nullptr;
  for (const auto& warp : warps_) {
    if (warp->state == Warp::State::kAwaiting && warp->awaited() == Warp::kRegisters)
      fail(warp.get(), Fault("deadlock: waits for registers that no warp gives up"));
    if (warp->state != Warp::State::kDone && first == nullptr) first = warp.get();
  }
  const bool at_barrier = first->state == Warp::State::kAtBarrier;
  fail(first,
       Fault("deadlock: waits " + (at_barrier ? "at a barrier that cannot complete"
                                              : "for " + mbarriers.describe(first->awaited()))));
}

void Block::wake() {
  for (auto& warp : warps_) warp->wake();
}

bool Block::set_registers(Warp& warp, uint32_t count, bool more) {
  if (launch.program.registers_per_thread == 0)
    throw Fault("setmaxnreg: a kernel without __launch_bounds__");
  if (count % 8 != 0 || count < 24 || count > 256)
    throw Fault("setmaxnreg: " + std::to_string(count) + " is no multiple of 8 from 24 to 256");
  if (more ? count < warp.registers : count > warp.registers)
    throw Fault("setmaxnreg." + std::string(more ? "inc" : "dec") + " from " +
                std::to_string(warp.registers) + " to " + std::to_string(count));
  if (more && count - warp.registers > free_registers_) return false;
  free_registers_ += warp.registers - count;
  warp.registers = count;
  if (!more) wake();
  return true;
}

uint32_t Block::warps_alive() const {
  return static_cast<uint32_t>(std::count_if(warps_.begin(), warps_.end(), [](const auto& warp) {
    return warp->state != Warp::State::kDone;
  }));
}

bool Block::arrive(Warp& warp, uint32_t id, uint32_t threads, bool waits) {
  if (id >= barriers_.size()) throw Fault("barrier " + std::to_string(id) + " of 16");
  if (threads % kLanes != 0) throw Fault("a barrier's thread count is no multiple of 32");
  Barrier& barrier = barriers_[id];
  ++launch.statistics.barriers;
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.known.assign(warps_.size(), 0);
  } else if (barrier.expected != threads) {
    throw Fault("barrier " + std::to_string(id) + ": warps disagree on its thread count");
  }
  warp.clock.next_epoch();
  barrier.known.join(warp.clock);
  barrier.arrived += kLanes;
  if (barrier.expected != 0 && barrier.arrived > barrier.expected)
    throw Fault("barrier " + std::to_string(id) + ": more threads arrive than it expects");
  if (waits) {
    barrier.waiting.push_back(&warp);
    warp.state = Warp::State::kAtBarrier;
  }
  complete_if_full(barrier);
  return waits;
}

void Block::complete_if_full(Barrier& barrier) {
  if (barrier.arrived == 0) return;
  const uint32_t expected = barrier.expected != 0 ? barrier.expected : warps_alive() * kLanes;
  if (barrier.arrived < expected) return;
  for (Warp* warp : barrier.waiting) {
    warp->clock.join(barrier.known);
    warp->votes = barrier.votes;
    warp->state = Warp::State::kRunnable;
  }
  barrier.waiting.clear();
  barrier.votes = {};
  barrier.arrived = 0;
}

void Block::agree(Warp& warp, const WarpgroupStep& step) {
  const size_t group = static_cast<size_t>(warp.id) / 4;
  if (4 * group + 4 > warps_.size())
    throw Fault(name_of(step) + ": fewer than four warps in the warpgroup");
  steps_.resize(warps_.size() / 4);
  std::vector<WarpgroupStep>& steps = steps_[group];
  const size_t mine = warp.products.steps++;
  if (mine == steps.size()) return steps.push_back(step);
  const WarpgroupStep& others = steps[mine];
  if (others.instruction != step.instruction)
    throw Fault(name_of(step) + ": another warp of the warpgroup executed another one", -1,
                others.instruction, "that one is");
  if (others != step)
    throw Fault("wgmma: warps of the warpgroup disagree on descriptors or scale-d");
}

std::string Block::name_of(const WarpgroupStep& step) const {
  const std::string& text = launch.program.text[step.instruction];
  return text.substr(0, text.find('.'));
}

void Block::vote(uint32_t id, uint32_t for_it, uint32_t threads) {
  if (id >= barriers_.size()) return;  // arrive() will say so
  barriers_[id].votes.for_it += for_it;
  barriers_[id].votes.threads += threads;
}

void Block::fail(const Warp* warp, const Fault& fault) const {
  const Program& program = launch.program;
  const size_t pc = std::min<size_t>(warp->pc(), program.code.size() - 1);
  std::string text = fault.what();
  if (fault.other >= 0)
    text += std::string("; ") + fault.other_did + " at " +
            program.place_of(static_cast<size_t>(fault.other));
  text += "\n  kernel " + demangled(program.name) + "\n  at " + program.place_of(pc) +
          "\n  block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
          std::to_string(index.z) + "), warp " + std::to_string(warp->id);
  if (fault.lane >= 0) text += ", lane " + std::to_string(fault.lane);
  throw LaunchError(text + "\n  " + program.text[pc]);
}

}  // namespace ptxvm

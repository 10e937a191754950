// SPDX-License-Identifier: BSD-3-Clause
//
// A warp: registers, where its lanes are, and what its lanes have in flight.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "clocks.h"
#include "fault.h"
#include "program.h"
#include "shared_races.h"
#include "warpgroup.h"

namespace ptxvm {

class Block;

// The votes of a bar.red.
struct Votes {
  uint32_t for_it = 0, threads = 0;
};

// A register's values, where they lie. Those of 16 bits and less are the low bits of 4 bytes.
template <typename T>
struct Row {
  const uint8_t* at;

  T operator[](int lane) const {
    T value;
    std::memcpy(&value, at + lane * (sizeof(T) < 4 ? 4 : sizeof(T)), sizeof(T));
    return value;
  }
};

// A cp.async that has not been waited for.
struct AsyncCopy {
  uint32_t destination;  // in shared memory
  uint32_t group;        // of the lane's groups
  uint8_t bytes, lane;
  uint8_t data[16];
};

class Warp {
 public:
  enum class State : uint8_t { kRunnable, kAtBarrier, kAwaiting, kDone };

  Warp(Block& block, int id);

  // For the block's next index.
  void start(uint32_t base_epoch);
  // One instruction for the lanes that are furthest behind.
  void step();

  // Registers, by their place in the register file.
  template <typename T>
  Row<T> load(uint32_t row) const {
    return {registers_.data() + row};
  }
  template <typename T>
  void store(uint32_t row, LaneMask lanes, const Lanes<T>& values);
  uint8_t* row(uint32_t row) { return registers_.data() + row; }
  uint64_t lane_value(uint32_t row, int lane, bool wide) const;
  void set_lane_value(uint32_t row, int lane, bool wide, uint64_t value);
  // An operand that all lanes have in common.
  uint32_t uniform_value(uint32_t row, LaneMask lanes) const;
  LaneMask predicate(uint32_t arg) const {
    return predicates_[arg / 2] ^ (arg % 2 != 0 ? kAllLanes : 0);
  }
  void set_predicate(uint32_t arg, LaneMask lanes, LaneMask value) {
    LaneMask& now = predicates_[arg / 2];
    now = (now & ~lanes) | (value & lanes);
  }

  // For instructions that lanes execute together (.sync): true when all lanes that `members` names
  // are here. False: the caller returns kRetry, and the others get their turn. Faults when they
  // cannot come.
  bool gathered(LaneMask members, LaneMask lanes, const char* what);
  // bar.warp.sync: its lanes may be at different instructions.
  Flow warp_barrier(LaneMask members, LaneMask lanes);
  // The same for a barrier of the block, which counts warps: all lanes there were when the first
  // one came must come, and none may leave in between.
  bool gathered_at_barrier(LaneMask lanes);
  void require_whole_warp(LaneMask lanes, const char* what) const;
  // These lanes wait for what another warp, or other lanes, may do: an mbarrier's phase to end, or
  // registers to come free. They execute the instruction again after the next wake().
  Flow await(LaneMask lanes, uint32_t mbarrier);
  void wake();
  static constexpr uint32_t kRegisters = ~0u;
  uint32_t awaited() const { return awaited_; }  // the last one: an mbarrier's offset or kRegisters

  // The lane's memory in the .local space.
  uint8_t* local(int lane) { return local_.data() + static_cast<size_t>(lane) * local_bytes_; }
  uint32_t local_bytes() const { return local_bytes_; }

  void issue_copy(const AsyncCopy& copy);
  void commit_copies(LaneMask lanes);
  // Delivers all but the `pending` youngest groups of each lane; < 0: also what is in no group.
  void wait_copies(LaneMask lanes, int pending);
  bool copies_in_flight() const { return !copies_.empty(); }

  Accessor accessor(int lane) const { return {clock, lane, pc_}; }

  Block& block;
  const int id;
  State state = State::kRunnable;
  WarpClock clock;
  ProductsInFlight products{*this};
  // bar.red is executed again when the barrier is complete, for the votes.
  bool awaits_votes = false;
  Votes votes;
  uint32_t registers = 0;  // of each lane, see setmaxnreg

  uint32_t pc() const { return pc_; }
  LaneMask alive() const { return alive_; }

 private:
  LaneMask select();
  void diverge();
  void advance(LaneMask lanes, uint32_t target);
  void deliver(AsyncCopy& copy);

  const Program& program_;
  std::vector<uint8_t> registers_;
  std::vector<LaneMask> predicates_;
  LaneMask alive_ = 0;
  bool converged_ = true;   // all lanes alive are at pc_
  uint32_t pc_ = 0;         // of the instruction being executed
  uint32_t pcs_[kLanes]{};  // by lane, when diverged
  LaneMask parked_ = 0;     // lanes that wait at a .sync instruction for others of the warp
  LaneMask at_warp_barrier_ = 0;
  LaneMask awaiting_ = 0;  // of those parked, who wait for another warp
  uint32_t awaited_ = 0;
  bool stuck_ = false;  // all lanes are parked
  LaneMask barrier_members_ = 0;
  std::vector<AsyncCopy> copies_;
  uint32_t groups_[kLanes]{};  // committed so far, by lane
  uint32_t local_bytes_;
  std::vector<uint8_t> local_;
};

template <typename T>
void Warp::store(uint32_t row, LaneMask lanes, const Lanes<T>& values) {
  uint8_t* to = registers_.data() + row;
  const auto set = [&](int lane) {
    using Stored = std::conditional_t<(sizeof(T) < 4), uint32_t, T>;
    Stored raw{};
    std::memcpy(&raw, &values.value[lane], sizeof(T));
    std::memcpy(to + lane * sizeof raw, &raw, sizeof raw);
  };
  if (lanes == kAllLanes)
    for (int lane = 0; lane < kLanes; ++lane) set(lane);
  else
    for_lanes(lanes, set);
}

inline uint64_t Warp::lane_value(uint32_t row, int lane, bool wide) const {
  uint64_t value = 0;
  const size_t bytes = wide ? 8 : 4;
  std::memcpy(&value, registers_.data() + row + lane * bytes, bytes);
  return value;
}

inline void Warp::set_lane_value(uint32_t row, int lane, bool wide, uint64_t value) {
  const size_t bytes = wide ? 8 : 4;
  std::memcpy(registers_.data() + row + lane * bytes, &value, bytes);
}

}  // namespace ptxvm

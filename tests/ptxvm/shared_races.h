// SPDX-License-Identifier: BSD-3-Clause
//
// The race detector of shared memory: for every 4 bytes the last write, and each warp's last read.
// See Note [happens before].
#pragma once

#include <cstdint>
#include <vector>

#include "clocks.h"
#include "lanes.h"

namespace ptxvm {

enum class Reader : uint8_t {
  kLane,        // ld: by the lane that asks
  kCollective,  // ldmatrix: by the whole warp at once, nothing of the warp can overtake it
};

// Who accesses: a lane of a warp, at an instruction.
struct Accessor {
  const WarpClock& clock;
  int lane;
  uint32_t instruction;
};

class SharedRaces {
 public:
  class Reads;

  SharedRaces(uint32_t bytes, int warps);

  // A new block begins; epochs up to `base` are of earlier blocks.
  void start(uint32_t base) { base_ = base; }
  void clear();
  void check_uninitialised(bool check) { uninitialised_ = check; }

  // Offsets from the begin of shared memory. All throw Fault.
  void read(const Accessor& by, uint32_t offset, uint32_t bytes, Reader reader = Reader::kLane);
  void write(const Accessor& by, uint32_t offset, uint32_t bytes);
  void atomic(const Accessor& by, uint32_t offset, uint32_t bytes);
  // An asynchronous copy writes at some time between these two.
  void begin_copy(const Accessor& by, uint32_t offset, uint32_t bytes);
  void end_copy(const Accessor& by, uint32_t offset, uint32_t bytes);
  // A wgmma of the warp reads these 16 bytes each at some time between these two, through the async
  // proxy: see Note [proxies].
  void begin_async_reads(const Accessor& by, const std::vector<uint32_t>& offsets);
  void end_async_reads(const Accessor& by, const std::vector<uint32_t>& offsets);
  // 8 bytes become an mbarrier, which nobody may access otherwise, until the block has ended.
  void begin_mbarrier(const Accessor& by, uint32_t offset);
  void end_mbarrier(uint32_t offset);

 private:
  // write_epoch_ while a copy is in flight, and of an mbarrier: later than all epochs.
  static constexpr uint32_t kInFlight = ~0u, kMbarrier = ~0u - 1;
  // read_: epoch * 64 + the lane, or
  static constexpr uint32_t kEpochShift = 6, kLaneBits = (1 << kEpochShift) - 1;
  static constexpr uint32_t kSeveralLanes = 32, kWholeWarp = 33, kSubwordLane = 34;

  void check_writer(const Accessor& by, uint32_t cell, bool subword, const char* what);
  void check_proxy(const Accessor& by, uint32_t cell) const;
  void check_readers(const Accessor& by, uint32_t cell, bool subword);
  // Whether a warp's last read, if it is of so many lanes, is ordered before.
  static bool read_known(const WarpClock& clock, int warp, uint32_t epoch, uint32_t lane);
  // Whether all reads of the cells [begin, end) are ordered before, whoever made them.
  bool reads_settled(const Accessor& by, uint32_t begin, uint32_t end) const;
  void set_writer(const Accessor& by, uint32_t cell, uint32_t flags);

  uint32_t cells_;
  int warps_;
  uint32_t base_ = 0;
  bool uninitialised_ = true;
  std::vector<uint32_t> write_epoch_;
  std::vector<uint16_t> write_thread_;  // and flags
  std::vector<uint32_t> write_instruction_;
  std::vector<uint32_t> write_fences_;  // how many proxy fences the writer's warp had executed
  std::vector<uint32_t> read_;          // [warp][cell]: epoch and lane
  struct AsyncReads {
    uint32_t in_flight = 0, instruction = 0;  // of all warps; the one issued last
  };
  std::vector<AsyncReads> async_reads_;  // of every 16 bytes
};

// The reads of one instruction: what its lanes have in common is looked up once, and the usual
// case, a cell that was written in this block and ordered before, takes a comparison.
class SharedRaces::Reads {
 public:
  Reads(SharedRaces& races, const WarpClock& clock, uint32_t instruction)
      : races_(races),
        clock_(clock),
        instruction_(instruction),
        written_(races.write_epoch_.data()),
        reads_(races.read_.data() + static_cast<size_t>(clock.warp) * races.cells_),
        first_(races.base_ + 1),
        span_(clock.settled - races.base_),
        mine_(clock.now() << kEpochShift),
        unsynced_((clock.synced() + 1) << kEpochShift) {}

  // ld
  void lane(int lane, uint32_t offset, uint32_t bytes) {
    if (!ordered(offset, bytes)) return races_.read({clock_, lane, instruction_}, offset, bytes);
    const uint32_t me = mine_ | static_cast<uint32_t>(lane), end = (offset + bytes) / 4;
    for (uint32_t cell = offset / 4; cell < end; ++cell) {
      const uint32_t last = reads_[cell];
      const bool another_lane =
          last >= unsynced_ && ((last ^ me) & kLaneBits) != 0 && (last & kLaneBits) != kWholeWarp;
      reads_[cell] = another_lane ? mine_ | kSeveralLanes : me;
    }
  }

  // ld of one place by two lanes or more. False: they are to be asked one by one.
  bool together(uint32_t offset, uint32_t bytes) {
    if (!ordered(offset, bytes)) return false;
    for (uint32_t cell = offset / 4; cell < (offset + bytes) / 4; ++cell)
      reads_[cell] = mine_ | kSeveralLanes;
    return true;
  }

  // ldmatrix: 16 bytes.
  void row(int lane, uint32_t offset) {
    if (!ordered(offset, 16))
      return races_.read({clock_, lane, instruction_}, offset, 16, Reader::kCollective);
    for (uint32_t i = 0; i < 4; ++i) reads_[offset / 4 + i] = mine_ | kWholeWarp;
  }

 private:
  // Whole cells, written in this block and ordered before: in one comparison each.
  bool ordered(uint32_t offset, uint32_t bytes) const {
    bool all = bytes >= 4;
    for (uint32_t cell = offset / 4; cell < (offset + bytes) / 4; ++cell)
      all &= written_[cell] - first_ < span_;
    return all;
  }

  SharedRaces& races_;
  const WarpClock& clock_;
  const uint32_t instruction_;
  const uint32_t* const written_;
  uint32_t* const reads_;
  const uint32_t first_, span_, mine_, unsynced_;
};

}  // namespace ptxvm

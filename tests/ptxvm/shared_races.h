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

 private:
  void check_writer(const Accessor& by, uint32_t cell, bool subword, const char* what);
  void check_readers(const Accessor& by, uint32_t cell, bool subword);
  void set_writer(const Accessor& by, uint32_t cell, uint32_t flags);

  uint32_t cells_;
  int warps_;
  uint32_t base_ = 0;
  bool uninitialised_ = true;
  std::vector<uint32_t> write_epoch_;
  std::vector<uint16_t> write_thread_;  // and flags
  std::vector<uint32_t> write_instruction_;
  std::vector<uint32_t> read_;  // [warp][cell]: epoch and lane
};

}  // namespace ptxvm

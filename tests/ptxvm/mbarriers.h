// SPDX-License-Identifier: BSD-3-Clause
//
// The mbarriers in a block's shared memory.
//
// Note [mbarrier]. An arrival releases, a wait for a phase acquires what its arrivals released: see
// Note [happens before]. A parity names a phase only if nobody can be a phase ahead. So an arrival
// must be ordered after the end of the phase before its own (else it might have been one of that
// phase, and is one too many for it), and the end of a phase after every wait for the phase before
// (else who waits might find the parity changed back, and wait on). Both are asked of what warps
// know, not of the order met.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "clocks.h"

namespace ptxvm {

class Block;
class Warp;

class Mbarriers {
 public:
  explicit Mbarriers(Block& block) : block_(block) {}

  // A new block begins.
  void start();
  // Offsets from the begin of shared memory. All throw Fault.
  void init(Warp& warp, int lane, uint32_t offset, uint32_t count);
  // True: a phase has ended, and who waits should look again.
  bool arrive(Warp& warp, LaneMask lanes, uint32_t offset);
  // Whether the phase of this parity has ended.
  bool ended(Warp& warp, LaneMask lanes, uint32_t offset, uint32_t parity);
  // "phase 3 of the mbarrier at 1024: 2 of 4 have arrived"
  std::string describe(uint32_t offset) const;

 private:
  struct Mbarrier {
    uint32_t count, arrived = 0, phase = 0;
    int thread;  // that initialised it, and when
    uint32_t epoch, instruction;
    Knowledge arriving, completed;  // of this phase's arrivals; of the one before
    std::vector<uint32_t> waited;   // by warp: its epoch when it had waited for the phase before
  };

  Mbarrier& find(Warp& warp, LaneMask lanes, const Knowledge& known, uint32_t offset,
                 const char* what);
  static void check_order(const Mbarrier& barrier, const Warp& warp, LaneMask lanes,
                          const Knowledge& known);

  Block& block_;
  std::map<uint32_t, Mbarrier> live_;
};

}  // namespace ptxvm

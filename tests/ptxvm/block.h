// SPDX-License-Identifier: BSD-3-Clause
//
// A block: shared memory, barriers, warps in turn.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "mbarriers.h"
#include "shared_races.h"
#include "warp.h"

namespace ptxvm {

class Launch;

struct Index3 {
  uint32_t x = 1, y = 1, z = 1;

  uint64_t count() const { return uint64_t{x} * y * z; }
};

class Block {
 public:
  explicit Block(Launch& launch);

  // Runs the block of this linear number to its end.
  void run(uint32_t number);

  // Where an address of the shared space lies; the address has been checked.
  uint8_t* shared(uint32_t address) { return shared_.data() + (address - kSharedBegin); }
  uint32_t shared_bytes() const { return static_cast<uint32_t>(shared_.size()); }

  // bar.sync and bar.arrive: threads 0 means all. True: the warp waits.
  bool arrive(Warp& warp, uint32_t barrier, uint32_t threads, bool waits);
  // A warp executes an instruction of its warpgroup, wgmma or setmaxnreg. Throws Fault unless the
  // others do the same.
  void agree(Warp& warp, const WarpgroupStep& step);
  // For bar.red, before its arrival; warps find the sums when they resume.
  void vote(uint32_t barrier, uint32_t for_it, uint32_t threads);
  // Those who await something look again.
  void wake();
  // The warp's threads have so many registers from here on. False: others have to give up some of
  // theirs before. Throws Fault.
  bool set_registers(Warp& warp, uint32_t count, bool more);

  Launch& launch;
  Index3 index;
  uint32_t number = 0;
  SharedRaces races;
  Mbarriers mbarriers{*this};

 private:
  struct Barrier {
    uint32_t arrived = 0, expected = 0;  // threads; expected 0: all
    Knowledge known;                     // of all who arrived
    std::vector<Warp*> waiting;
    Votes votes;
  };

  void start();
  void schedule();
  [[noreturn]] void fail(const Warp* warp, const Fault& fault) const;
  void complete_if_full(Barrier& barrier);
  uint32_t warps_alive() const;
  [[noreturn]] void deadlock() const;
  // "wgmma" or "setmaxnreg"
  std::string name_of(const WarpgroupStep& step) const;

  std::vector<uint8_t> shared_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::array<Barrier, 16> barriers_;
  std::vector<std::vector<WarpgroupStep>> steps_;  // by warpgroup: what its first warp executed
  uint32_t free_registers_ = 0;                    // of the block, by lane
  uint32_t last_epoch_ = 0;
};

}  // namespace ptxvm

// SPDX-License-Identifier: BSD-3-Clause
//
// What a warp has in flight by wgmma.
//
// Note [wgmma]. Each warp of a warpgroup runs its part, 16 rows, by itself, and the warps need not
// keep step: that all execute the same is checked (Block::agree), and what a warp knows of the
// others it knows by barriers. A product reads its operands and writes D when it is issued or when
// it is waited for, as the seed has it. Between these two the warp may not touch its registers, and
// nobody may write what it reads. Registers that were written need a wgmma.fence before a product
// uses them; a copy is as old as its source, since nvcc copies where it likes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace ptxvm {

class Warp;

// A wgmma or setmaxnreg, as all warps of the warpgroup must execute it.
struct WarpgroupStep {
  uint32_t instruction;
  uint64_t a = 0, b = 0;  // descriptors
  bool accumulates = false;

  bool operator==(const WarpgroupStep&) const = default;
};

// A wgmma.mma_async that has not been waited for.
struct Product {
  const Instruction* instruction;
  void (*multiply)(Warp&, const Product&);
  WarpgroupStep step;
  std::vector<uint32_t> a, b;  // offsets in shared memory of the operands' pieces of 16 bytes
  uint32_t group = 0;
};

class ProductsInFlight {
 public:
  explicit ProductsInFlight(Warp& warp) : warp_(warp) {}

  void start(size_t watched_registers);
  // An instruction that is no wgmma names watched registers, for all lanes or some. Throws Fault.
  void touch(const std::vector<WatchedUse>& uses, bool all_lanes);
  void fence();
  // The registers are D's, then A's. Throws Fault.
  void issue(Product product, const std::vector<WatchedUse>& registers);
  void commit() { ++groups_; }
  // Finishes all but the `pending` youngest groups.
  void wait(uint32_t pending);
  bool in_flight() const { return !products_.empty(); }

  size_t steps = 0;  // WarpgroupSteps so far, by Block::agree

 private:
  struct Register {
    bool written = true;          // since the last wgmma.fence, other than by wgmma
    uint16_t in_d = 0, in_a = 0;  // of so many products in flight
    size_t d_registers = 0;       // the shape it accumulated in since the last wgmma.fence
    uint32_t instruction = 0;     // that has it in flight
  };

  [[noreturn]] void refuse(const std::string& what, uint32_t index) const;
  void run(size_t count);
  void finish(const Product& product);

  Warp& warp_;
  std::vector<Register> registers_;
  std::vector<Product> products_;
  size_t ran_ = 0;       // the first so many of these
  uint32_t groups_ = 0;  // committed so far
};

}  // namespace ptxvm

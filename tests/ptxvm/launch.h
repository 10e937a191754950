// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"
#include "global_memory.h"
#include "global_races.h"
#include "program.h"
#include "vm.h"

namespace ptxvm {

// A fault with its place.
class LaunchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A grid in execution.
class Launch {
 public:
  const Program& program;
  Index3 grid, block_size;
  uint32_t dynamic_shared_bytes;
  std::vector<uint8_t> parameters;
  Checks checks;
  GlobalMemory& memory;
  GlobalRaces& races;
  Statistics& statistics;
  std::mt19937_64 random;
  int threads_per_block, warps_per_block;

  uint32_t shared_bytes() const {
    return program.dynamic_shared_begin - kSharedBegin + dynamic_shared_bytes;
  }
  // Blocks one after the other, in an order drawn from the seed. Throws LaunchError.
  void run();
};

// A C++ name from a mangled one.
std::string demangled(const std::string& name);

}  // namespace ptxvm

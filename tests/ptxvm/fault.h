// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptxvm {

// What a kernel did wrong. The launch adds where: kernel, source line, block, warp, lane.
class Fault : public std::runtime_error {
 public:
  explicit Fault(const std::string& what, int lane = -1, int64_t writer = -1)
      : std::runtime_error(what), lane(lane), writer(writer) {}

  int lane;        // -1: the warp as a whole
  int64_t writer;  // the instruction that wrote what this one races with, or -1
};

}  // namespace ptxvm

// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptxvm {

// What a kernel did wrong. The launch adds where: kernel, source line, block, warp, lane.
class Fault : public std::runtime_error {
 public:
  explicit Fault(const std::string& what, int lane = -1, int64_t other = -1,
                 const char* other_did = "written")
      : std::runtime_error(what), lane(lane), other(other), other_did(other_did) {}

  int lane;       // -1: the warp as a whole
  int64_t other;  // the instruction that this one conflicts with, or -1
  const char* other_did;
};

}  // namespace ptxvm

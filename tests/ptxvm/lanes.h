// SPDX-License-Identifier: BSD-3-Clause
//
// One value per lane of a warp, and which lanes are meant.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace ptxvm {

constexpr int kLanes = 32;

using LaneMask = uint32_t;
constexpr LaneMask kAllLanes = ~LaneMask{0};

constexpr bool has_lane(LaneMask mask, int lane) { return mask >> lane & 1; }
constexpr int first_lane(LaneMask mask) { return std::countr_zero(mask); }

template <typename F>
void for_lanes(LaneMask mask, F&& f) {
  for (; mask != 0; mask &= mask - 1) f(first_lane(mask));
}

template <typename T>
struct Lanes {
  alignas(32) T value[kLanes];

  T& operator[](int lane) { return value[lane]; }
  const T& operator[](int lane) const { return value[lane]; }
};

}  // namespace ptxvm

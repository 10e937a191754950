// SPDX-License-Identifier: BSD-3-Clause
//
// Between the kernels' log2 units and the natural logarithms of the interface. An error of lse is a
// relative error of a whole row of P in the backward, so these few numbers per row are computed in
// fp64 and rounded once: fp32 gradients have 1.2 times the error otherwise.
#pragma once

#include <cmath>
#include <limits>

namespace ring_attention::cpu {

constexpr double kLog2e = 1.44269504088896340736;

// lse of a state, -inf if it saw no key.
template <typename State>
State log_sum_exp(State m, State l) {
  if (l == 0) return -std::numeric_limits<State>::infinity();
  return static_cast<State>((double{m} + std::log2(double{l})) * 0.69314718055994530942);
}

// high + low = lse in log2 units.
template <typename State>
struct Log2Units {
  State high, low;

  explicit Log2Units(State lse) {
    const double exact = double{lse} * kLog2e;
    high = static_cast<State>(exact);
    low = std::isfinite(high) ? static_cast<State>(exact - double{high}) : State{0};
  }
};

}  // namespace ring_attention::cpu

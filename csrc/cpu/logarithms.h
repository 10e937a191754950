// SPDX-License-Identifier: BSD-3-Clause
//
// Between the kernels' log2 units and the natural logarithms of the interface. An error of lse is a
// relative error of a whole row of P in the backward, so these few numbers per row are computed in
// fp64 and rounded once: fp32 gradients have 1.2 times the error otherwise.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "elements.h"

namespace ring_attention::cpu {

constexpr double kLog2e = 1.44269504088896340736;

// log2 of a positive finite number, to 1e-12. In steps that a compiler makes vectors of.
RA_INLINE double log2_of(float x) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kRootHalf = 0x3fe6a09e667f3bcd;
  // x = 2^(biased - 1023) mantissa, and the mantissa at most sqrt 2 away from 1.
  const uint64_t bits = std::bit_cast<uint64_t>(double{x});
  const uint64_t biased = (bits - kRootHalf + kOne) >> 52;
  const double mantissa = std::bit_cast<double>(bits - (biased << 52) + kOne);
  // As bits of a number of 2^52 or more, whose last bit is 1.
  const double exponent = std::bit_cast<double>(biased | 0x4330000000000000) - (0x1p52 + 1023);
  // The odd series of log2((1 + s) / (1 - s)), with |s| < 0.18.
  const double s = (mantissa - 1) / (mantissa + 1), square = s * s;
  double series = 2 * kLog2e / 13;
  for (int n = 11; n > 0; n -= 2) series = series * square + 2 * kLog2e / n;
  return exponent + series * s;
}

// lse of a state, -inf if it saw no key (l = 0, m = -inf).
RA_INLINE float log_sum_exp(float m, float l) {
  const double lse = (double{m} + log2_of(l)) * 0.69314718055994530942;
  // Added for the other numbers, not chosen, because a compiler keeps branches between floats:
  // log 0 = -inf, log inf = inf, and NaN.
  const uint32_t bits = std::bit_cast<uint32_t>(l), inf = 0x7f800000, nan = 0x7fc00000;
  const uint32_t special = bits << 1 == 0 ? inf | 0x80000000 : bits == inf ? inf : nan;
  const bool positive_finite = bits - 1 < inf - 1;
  return static_cast<float>(lse) + std::bit_cast<float>(positive_finite ? 0 : special);
}
RA_INLINE double log_sum_exp(double m, double l) {
  if (l == 0) return -std::numeric_limits<double>::infinity();
  return (m + std::log2(l)) * 0.69314718055994530942;
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

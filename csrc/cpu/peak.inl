// SPDX-License-Identifier: BSD-3-Clause
//
// The machine's peak as the kernels could reach it: multiply-adds between registers only.
#pragma once

#include <algorithm>
#include <chrono>

namespace ring_attention::cpu {
namespace {

// Calls loop(), which does `flops` operations, until `seconds` have passed; the best rate seen.
template <typename Loop>
double best_rate(double flops, double seconds, const Loop& loop) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point begin = Clock::now();
    loop();
    best = std::max(best, flops / since(begin));
  } while (since(start) < seconds);
  return best;
}

template <typename Arch>
double register_peak(double seconds) {
  using V = typename Arch::V;
  constexpr int kSums = 12, kSteps = 20000;  // enough chains to hide the latency
  V sum[kSums];
  for (V& x : sum) x = V::zero();
  V a = V::set(0), b = V::set(0);
  const auto loop = [&] {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) {
        sum[i] = Arch::multiply_add(a, b, sum[i]);
        pin(sum[i]);  // or the compiler would leave the loop out
      }
    }
  };
  return best_rate(2.0 * V::kLanes * Arch::kPair * kSums * kSteps, seconds, loop);
}

}  // namespace
}  // namespace ring_attention::cpu

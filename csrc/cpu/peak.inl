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

// `steps` times twelve independent multiply-adds, enough chains to hide the latency.
template <typename Arch>
__attribute__((noinline)) typename Arch::State multiply_add_loop(int steps) {
  using V = typename Arch::V;
  V sum[12], a = V::zero(), b = V::zero(), total = V::zero();
#pragma GCC unroll 16
  for (int i = 0; i < 12; ++i) sum[i] = V::zero();
  for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < 12; ++i) {
      sum[i] = Arch::multiply_add(a, b, sum[i]);
      pin(sum[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 12; ++i) total = total + sum[i];
  typename Arch::State lanes[V::kLanes];
  total.store(lanes);
  return lanes[0];
}

template <typename Arch>
double register_peak(double seconds) {
  constexpr int kSteps = 400000;
  volatile typename Arch::State sink;  // or the compiler would leave the loop out
  return best_rate(2.0 * Arch::V::kLanes * Arch::kPair * 12 * kSteps, seconds,
                   [&] { sink = multiply_add_loop<Arch>(kSteps); });
}

}  // namespace
}  // namespace ring_attention::cpu

// SPDX-License-Identifier: BSD-3-Clause
//
// The exponential and the hyperbolic tangent, over any Vec of floats.
#pragma once

namespace ring_attention::cpu {
namespace {

// (2^r - 1) / r on [-1/2, 1/2], minimax. As 1 + r times it, 2^r is exact at 0, with a relative
// error of 2.8e-6 (four terms, for 16-bit elements) or below fp32's rounding (six terms).
template <int kTerms, typename V>
RA_INLINE V exp2_minus_one(V r) {
  static_assert(kTerms == 4 || kTerms == 6);
  if constexpr (kTerms == 4) {
    V q = fma(V::set(9.582853184e-03f), r, V::set(5.590642514e-02f));
    q = fma(q, r, V::set(2.402409861e-01f));
    return fma(q, r, V::set(6.931241934e-01f));
  } else {
    V q = fma(V::set(1.540351282e-04f), r, V::set(1.339073554e-03f));
    q = fma(q, r, V::set(9.618237494e-03f));
    q = fma(q, r, V::set(5.550357434e-02f));
    q = fma(q, r, V::set(2.402264979e-01f));
    return fma(q, r, V::set(6.931471879e-01f));
  }
}

// x = 2^x, or 2^min(x, 0), for two vectors.
template <int kTerms, bool kAtMostOne, typename V>
RA_INLINE void exp2_both(V (&x)[2]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) x[i] = exp2<kTerms>(kAtMostOne ? min(V::zero(), x[i]) : x[i]);
}

// tanh(x) = e / (e + 2), e = exp(2 x) - 1, which keeps its relative accuracy near 0.
// A template so that nearest() and scale_by_power() are those of the file that includes this one.
template <typename V>
RA_INLINE V tanh(V x) {
  const V two_log2e = V::set(2.885390082f), one = V::set(1.0f);
  const V high = V::set(30.0f), low = V::set(-30.0f);  // beyond, tanh rounds to +-1
  const V scaled = x * two_log2e;
  const V z = select(less(high, scaled), high, max(low, scaled));
  const V n = nearest(z), r = z - n;
  const V power = scale_by_power(one, n);
  const V e = fma(exp2_minus_one<6>(r) * r, power, power - one);
  return quotient(e, e + V::set(2.0f));
}

}  // namespace
}  // namespace ring_attention::cpu

// SPDX-License-Identifier: BSD-3-Clause
//
// The exponential and the hyperbolic tangent, over any Vec of floats.
#pragma once

namespace ring_attention::cpu {
namespace {

// Two vectors in step. One chain of dependent instructions after the other would fill the
// scheduler, and the multiply-adds behind them would have to wait.
template <typename V>
struct Two {
  V a, b;

  static RA_INLINE Two set(float x) { return {V::set(x), V::set(x)}; }
};
template <typename V>
RA_INLINE Two<V> operator-(Two<V> x, Two<V> y) {
  return {x.a - y.a, x.b - y.b};
}
template <typename V>
RA_INLINE Two<V> fma(Two<V> x, Two<V> y, Two<V> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}

// (2^r - 1) / r on [-1/2, 1/2] or on [0, 1], minimax. As 1 + r times it, 2^r is exact at 0, with a
// relative error of 2.9e-6 (four terms, for 16-bit elements) or below fp32's rounding (six terms).
enum class Exp2Range { kAroundZero, kFromZero };

constexpr float kExp2Coefficients[2][2][6] = {
    {{6.931241934e-01f, 2.402409861e-01f, 5.590642514e-02f, 9.582853184e-03f},
     {6.931471879e-01f, 2.402264979e-01f, 5.550357434e-02f, 9.618237494e-03f, 1.339073554e-03f,
      1.540351282e-04f}},
    {{6.930448413e-01f, 2.412801981e-01f, 5.224247277e-02f, 1.342668384e-02f},
     {6.931470633e-01f, 2.402293086e-01f, 5.548528209e-02f, 9.675451554e-03f, 1.246784697e-03f,
      2.161291486e-04f}}};

template <int kTerms, Exp2Range kRange, typename V>
RA_INLINE V exp2_minus_one(V r) {
  static_assert(kTerms == 4 || kTerms == 6);
  const auto& c = kExp2Coefficients[kRange == Exp2Range::kFromZero][kTerms == 6];
  V q = V::set(c[kTerms - 1]);
#pragma GCC unroll 8
  for (int i = kTerms - 2; i >= 0; --i) q = fma(q, r, V::set(c[i]));
  return q;
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
  const V e = fma(exp2_minus_one<6, Exp2Range::kAroundZero>(r) * r, power, power - one);
  return quotient(e, e + V::set(2.0f));
}

}  // namespace
}  // namespace ring_attention::cpu

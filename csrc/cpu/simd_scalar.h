// SPDX-License-Identifier: BSD-3-Clause
//
// The portable row: Vec over the compiler's own vector types, 16 bytes wide, so that it is SSE2 on
// x86 and NEON on ARM without naming either. Float for fp32 and the 16-bit types, double for fp64.
//
// Note [Vec]. What a simd_*.h defines, and the algorithms of *.inl are written in:
//   Vec with Scalar, kLanes, zero(), set(x), load(p), p of any element type (widening), store(p)
//   + - *  quotient(a, b), to an ulp  fma(a, b, c)
//   min(a, b)  max(a, b): b where either is NaN
//   less(a, b)  within(x, low, high): a Mask;  select(mask, a, b)  Vec::any(mask)
//   pin(x): keeps x in a register
//   exp2<kTerms>(x): 0 below -127, good to 2^-126 up to -126; kTerms as in exp2_minus_one
//   exp2_both<kTerms, kAtMostOne>(x): of two vectors; of polynomial.inl, unless there is better
//   tanh(x)
//   sums_of_lanes(x): from kLanes vectors, the sum of each one's lanes
//   transpose_block(from, from_row, to, to_row): a kLanes x kLanes block of Scalar-sized units
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "polynomial.inl"

namespace ring_attention::cpu {
namespace {

template <typename T>
struct Vec {
  using Scalar = T;
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T Raw __attribute__((vector_size(16)));
  typedef Bits Mask __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T);

  Raw raw;

  static RA_INLINE Vec zero() { return {Raw{}}; }
  static RA_INLINE Vec set(T x) { return {Raw{} + x}; }
  static RA_INLINE Vec load(const T* from) {
    Vec x;
    std::memcpy(&x.raw, from, sizeof x.raw);
    return x;
  }
  template <typename Elem>
  static RA_INLINE Vec load(const Elem* from) {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x.raw[i] = widen(from[i]);
    return x;
  }
  static RA_INLINE bool any(Mask mask) {
    bool found = false;
    for (int i = 0; i < kLanes; ++i) found |= mask[i] != 0;
    return found;
  }
  RA_INLINE void store(T* to) const { std::memcpy(to, &raw, sizeof raw); }
  template <typename Elem>
  RA_INLINE void store(Elem* to) const {
    for (int i = 0; i < kLanes; ++i) narrow(raw[i], to[i]);
  }
};

template <typename T>
RA_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.raw + b.raw};
}
template <typename T>
RA_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.raw - b.raw};
}
template <typename T>
RA_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.raw * b.raw};
}
template <typename T>
RA_INLINE Vec<T> quotient(Vec<T> a, Vec<T> b) {
  return {a.raw / b.raw};
}
template <typename T>
RA_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.raw * b.raw + c.raw};
}
template <typename T>
RA_INLINE typename Vec<T>::Mask less(Vec<T> a, Vec<T> b) {
  return a.raw < b.raw;
}
template <typename T>
RA_INLINE typename Vec<T>::Mask within(Vec<T> x, Vec<T> low, Vec<T> high) {
  return (x.raw >= low.raw) & (x.raw < high.raw);
}
template <typename T>
RA_INLINE Vec<T> select(typename Vec<T>::Mask mask, Vec<T> a, Vec<T> b) {
  return {mask ? a.raw : b.raw};
}
template <typename T>
RA_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return {a.raw < b.raw ? a.raw : b.raw};
}
template <typename T>
RA_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.raw > b.raw ? a.raw : b.raw};
}
// The nearest integer of |x| < 2^22: the rounding of an addition does it.
RA_INLINE Vec<float> nearest(Vec<float> x) {
  const Vec<float> magic = Vec<float>::set(0x1.8p23f);
  return (x + magic) - magic;
}

// x 2^n for integers n of [-126, 127].
RA_INLINE Vec<float> scale_by_power(Vec<float> x, Vec<float> n) {
  const Vec<float>::Mask power = (__builtin_convertvector(n.raw, Vec<float>::Mask) + 127) << 23;
  Vec<float> factor;
  std::memcpy(&factor.raw, &power, sizeof power);
  return x * factor;
}

template <int kTerms>
RA_INLINE Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
  const V low = V::set(-126.0f), high = V::set(127.0f);
  const V bounded = select(less(high, x), high, max(low, x));
  const V n = nearest(bounded), r = bounded - n;
  const V p =
      scale_by_power(fma(exp2_minus_one<kTerms, Exp2Range::kAroundZero>(r), r, V::set(1.0f)), n);
  // At the bound the power is still right to a factor of two, enough to be noticed as too large.
  return select(less(x, low), V::zero(), p);
}

template <int kTerms>
RA_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) {
    x.raw[i] = x.raw[i] < -1022 ? 0.0 : std::exp2(x.raw[i]);
  }
  return x;
}

RA_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.raw[i] = std::tanh(x.raw[i]);
  return x;
}

template <typename T>
RA_INLINE Vec<T> sums_of_lanes(const Vec<T> (&x)[Vec<T>::kLanes]) {
  Vec<T> sums = Vec<T>::zero();
  for (int i = 0; i < Vec<T>::kLanes; ++i) {
    for (int j = 0; j < Vec<T>::kLanes; ++j) sums.raw[i] += x[i].raw[j];
  }
  return sums;
}

template <typename T>
RA_INLINE void transpose_block(const T* from, int64_t from_row, T* to, int64_t to_row, Vec<T>) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) {
    for (int j = 0; j < Vec<T>::kLanes; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
}

// Keeps x in a register.
template <typename T>
RA_INLINE void pin(Vec<T>& x) {
#if defined(__x86_64__)
  asm("" : "+x"(x.raw));
#elif defined(__aarch64__)
  asm("" : "+w"(x.raw));
#else
  (void)x;
#endif
}

}  // namespace
}  // namespace ring_attention::cpu

// SPDX-License-Identifier: BSD-3-Clause
//
// Vec of 8 floats for AVX2, FMA and F16C, see Note [Vec] in simd_scalar.h.
#pragma once

#include "elements.h"
#include "polynomial.inl"

namespace ring_attention::cpu {
namespace {

struct Vec256 {
  using Scalar = float;
  using Mask = __m256;
  static constexpr int kLanes = 8;

  __m256 raw;

  static RA_INLINE Vec256 zero() { return {_mm256_setzero_ps()}; }
  static RA_INLINE Vec256 set(float x) { return {_mm256_set1_ps(x)}; }
  static RA_INLINE Vec256 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static RA_INLINE Vec256 load(const BFloat16* from) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  }
  static RA_INLINE Vec256 load(const Float16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from))};
  }
  static RA_INLINE bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
  RA_INLINE void store(float* to) const { _mm256_storeu_ps(to, raw); }
  RA_INLINE void store(BFloat16* to) const {
    const __m256i bits = _mm256_castps_si256(raw);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(raw, raw, _CMP_UNORD_Q);
    const __m256i high =
        _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                               _mm256_castsi256_ps(quiet), nan)),
                          16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128((__m128i*)to, packed);
  }
  RA_INLINE void store(Float16* to) const {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(raw, _MM_FROUND_TO_NEAREST_INT));
  }
};

RA_INLINE Vec256 operator+(Vec256 a, Vec256 b) { return {_mm256_add_ps(a.raw, b.raw)}; }
RA_INLINE Vec256 operator-(Vec256 a, Vec256 b) { return {_mm256_sub_ps(a.raw, b.raw)}; }
RA_INLINE Vec256 operator*(Vec256 a, Vec256 b) { return {_mm256_mul_ps(a.raw, b.raw)}; }
RA_INLINE Vec256 quotient(Vec256 a, Vec256 b) { return {_mm256_div_ps(a.raw, b.raw)}; }
RA_INLINE Vec256 fma(Vec256 a, Vec256 b, Vec256 c) {
  return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)};
}
RA_INLINE Vec256 min(Vec256 a, Vec256 b) { return {_mm256_min_ps(a.raw, b.raw)}; }
RA_INLINE Vec256 max(Vec256 a, Vec256 b) { return {_mm256_max_ps(a.raw, b.raw)}; }
RA_INLINE __m256 less(Vec256 a, Vec256 b) { return _mm256_cmp_ps(a.raw, b.raw, _CMP_LT_OQ); }
RA_INLINE __m256 within(Vec256 x, Vec256 low, Vec256 high) {
  return _mm256_and_ps(_mm256_cmp_ps(x.raw, low.raw, _CMP_GE_OQ), less(x, high));
}
RA_INLINE Vec256 select(__m256 mask, Vec256 a, Vec256 b) {
  return {_mm256_blendv_ps(b.raw, a.raw, mask)};
}
RA_INLINE void pin(Vec256& x) { asm("" : "+x"(x.raw)); }

RA_INLINE Vec256 nearest(Vec256 x) {
  return {_mm256_round_ps(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// n is an integer of [-126, 127].
RA_INLINE Vec256 scale_by_power(Vec256 x, Vec256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.raw), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.raw, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

// NaN passes.
RA_INLINE Vec256 bounded(Vec256 x, Vec256 low, Vec256 high) {
  return {_mm256_min_ps(high.raw, _mm256_max_ps(low.raw, x.raw))};
}
RA_INLINE Two<Vec256> bounded(Two<Vec256> x, Two<Vec256> low, Two<Vec256> high) {
  return {bounded(x.a, low.a, high.a), bounded(x.b, low.b, high.b)};
}
RA_INLINE Two<Vec256> nearest(Two<Vec256> x) { return {nearest(x.a), nearest(x.b)}; }
// x 2^n by an addition to its exponent. Below the normal numbers it is good to 2^-126, and n = -127
// makes exactly 0 of 1.
RA_INLINE Vec256 add_to_exponent(Vec256 x, Vec256 n) {
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n.raw), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.raw), power))};
}
RA_INLINE Two<Vec256> add_to_exponent(Two<Vec256> x, Two<Vec256> n) {
  return {add_to_exponent(x.a, n.a), add_to_exponent(x.b, n.b)};
}

// 2^x for x up to `most` and 2^most beyond. At most = 127 that is too small, but large enough to be
// noticed as too large.
template <int kTerms, typename V>
RA_INLINE V exp2_up_to(float most, V x) {
  const V y = bounded(x, V::set(-127.0f), V::set(most));
  const V n = nearest(y), r = y - n;
  return add_to_exponent(fma(exp2_minus_one<kTerms, Exp2Range::kAroundZero>(r), r, V::set(1.0f)),
                         n);
}

template <int kTerms>
RA_INLINE Vec256 exp2(Vec256 x) {
  return exp2_up_to<kTerms>(127.0f, x);
}

template <int kTerms, bool kAtMostOne>
RA_INLINE void exp2_both(Vec256 (&x)[2]) {
  const Two<Vec256> power = exp2_up_to<kTerms>(kAtMostOne ? 0.0f : 127.0f, Two<Vec256>{x[0], x[1]});
  x[0] = power.a;
  x[1] = power.b;
}

RA_INLINE Vec256 sums_of_lanes(const Vec256 (&x)[8]) {
  __m256 a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 even = x[2 * i].raw, odd = x[2 * i + 1].raw;
    a[i] = _mm256_add_ps(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 low = a[2 * i], high = a[2 * i + 1];
    b[i] = _mm256_add_ps(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                        _mm256_permute2f128_ps(b[0], b[1], 0x31))};
}

RA_INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row,
                               Vec256) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_row);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

}  // namespace
}  // namespace ring_attention::cpu

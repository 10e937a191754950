// SPDX-License-Identifier: BSD-3-Clause
//
// Vec of 16 floats for AVX-512 (F, BW, DQ, VL), see Note [Vec] in simd_scalar.h.
#pragma once

#include "elements.h"
#include "instructions.h"
#include "polynomial.inl"

namespace ring_attention::cpu {
namespace {

struct Vec512 {
  using Scalar = float;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  __m512 raw;

  static RA_INLINE Vec512 zero() { return {_mm512_setzero_ps()}; }
  static RA_INLINE Vec512 set(float x) { return {_mm512_set1_ps(x)}; }
  static RA_INLINE Vec512 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static RA_INLINE Vec512 load(const BFloat16* from) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  }
  static RA_INLINE Vec512 load(const Float16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from))};
  }
  static RA_INLINE bool any(Mask mask) { return mask != 0; }
  RA_INLINE void store(float* to) const { _mm512_storeu_ps(to, raw); }
  RA_INLINE void store(BFloat16* to) const {
    const __m512i bits = _mm512_castps_si512(raw);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_add_epi32(bits, half);
    const Mask nan = _mm512_cmp_ps_mask(raw, raw, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  RA_INLINE void store(Float16* to) const {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(raw, _MM_FROUND_TO_NEAREST_INT));
  }
};

RA_INLINE Vec512 operator+(Vec512 a, Vec512 b) { return {_mm512_add_ps(a.raw, b.raw)}; }
RA_INLINE Vec512 operator-(Vec512 a, Vec512 b) { return {_mm512_sub_ps(a.raw, b.raw)}; }
RA_INLINE Vec512 operator*(Vec512 a, Vec512 b) { return {_mm512_mul_ps(a.raw, b.raw)}; }
RA_INLINE Vec512 fma(Vec512 a, Vec512 b, Vec512 c) {
  return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)};
}
// An estimate of 1 / b, one Newton step, one correction: a quarter of the division's time.
RA_INLINE Vec512 quotient(Vec512 a, Vec512 b) {
  const Vec512 estimate = {_mm512_rcp14_ps(b.raw)};
  const Vec512 inverse = {_mm512_fnmadd_ps(
      _mm512_fmsub_ps(b.raw, estimate.raw, _mm512_set1_ps(1.0f)), estimate.raw, estimate.raw)};
  const Vec512 q = a * inverse;
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(b.raw, q.raw, a.raw), inverse.raw, q.raw)};
}
RA_INLINE Vec512 min(Vec512 a, Vec512 b) { return {_mm512_min_ps(a.raw, b.raw)}; }
RA_INLINE Vec512 max(Vec512 a, Vec512 b) { return {_mm512_max_ps(a.raw, b.raw)}; }
RA_INLINE __mmask16 less(Vec512 a, Vec512 b) {
  return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_LT_OQ);
}
RA_INLINE __mmask16 within(Vec512 x, Vec512 low, Vec512 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.raw, low.raw, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.raw, high.raw, _CMP_LT_OQ);
}
RA_INLINE Vec512 select(__mmask16 mask, Vec512 a, Vec512 b) {
  return {_mm512_mask_blend_ps(mask, b.raw, a.raw)};
}
RA_INLINE void pin(Vec512& x) { asm("" : RA_IN_ZMM(x.raw)); }

RA_INLINE Vec512 nearest(Vec512 x) { return {_mm512_roundscale_ps(x.raw, 0)}; }
RA_INLINE Vec512 scale_by_power(Vec512 x, Vec512 n) { return {_mm512_scalef_ps(x.raw, n.raw)}; }

// x - floor(x)
RA_INLINE Vec512 fraction(Vec512 x) {
  return {_mm512_reduce_ps(x.raw, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
RA_INLINE Two<Vec512> fraction(Two<Vec512> x) { return {fraction(x.a), fraction(x.b)}; }
// p 2^floor(x), or 0 where x is below -126. NaN is not: "not less than" holds for it.
RA_INLINE Vec512 scale_by_floor(Vec512 p, Vec512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, p.raw, x.raw)};
}
RA_INLINE Two<Vec512> scale_by_floor(Two<Vec512> p, Two<Vec512> x) {
  return {scale_by_floor(p.a, x.a), scale_by_floor(p.b, x.b)};
}

template <int kTerms, typename V>
RA_INLINE V exp2_by_floor(V x) {
  const V r = fraction(x);
  return scale_by_floor(fma(exp2_minus_one<kTerms, Exp2Range::kFromZero>(r), r, V::set(1.0f)), x);
}

template <int kTerms>
RA_INLINE Vec512 exp2(Vec512 x) {
  return exp2_by_floor<kTerms>(x);
}

template <int kTerms, bool kAtMostOne>
RA_INLINE void exp2_both(Vec512 (&x)[2]) {
  if constexpr (kAtMostOne) x[0] = min(Vec512::zero(), x[0]), x[1] = min(Vec512::zero(), x[1]);
  const Two<Vec512> power = exp2_by_floor<kTerms>(Two<Vec512>{x[0], x[1]});
  x[0] = power.a;
  x[1] = power.b;
}

RA_INLINE __m512 unpack_low(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
RA_INLINE __m512 unpack_high(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}

// Neighbouring 128-bit lanes of low, then of high, added.
RA_INLINE __m512 add_lane_pairs(__m512 low, __m512 high) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                       _mm512_shuffle_f32x4(low, high, 0xdd));
}

RA_INLINE Vec512 sums_of_lanes(const Vec512 (&x)[16]) {
  __m512 a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 even = x[2 * i].raw, odd = x[2 * i + 1].raw;
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_add_ps(unpack_low(a[2 * i], a[2 * i + 1]), unpack_high(a[2 * i], a[2 * i + 1]));
  }
  return {add_lane_pairs(add_lane_pairs(b[0], b[1]), add_lane_pairs(b[2], b[3]))};
}

// A 16 x 16 block of 32-bit units of any type.
RA_INLINE void transpose_units(const void* from, int64_t from_row, void* to, int64_t to_row) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps((const float*)from + i * from_row);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = unpack_low(b[i], b[i + 2]);
    a[i + 1] = unpack_high(b[i], b[i + 2]);
    a[i + 2] = unpack_low(b[i + 1], b[i + 3]);
    a[i + 3] = unpack_high(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps((float*)to + i * to_row, a[i]);
}

RA_INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row,
                               Vec512) {
  transpose_units(from, from_row, to, to_row);
}

}  // namespace
}  // namespace ring_attention::cpu

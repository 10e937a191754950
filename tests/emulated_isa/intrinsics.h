// SPDX-License-Identifier: BSD-3-Clause
//
// The intrinsics of AVX-512 (F, BW, DQ, VL, BF16) that the kernels use, on AVX2, so that these
// kernels can be tested on machines without AVX-512 (make emulated); tiles.h has those of AMX. They
// give the bits that Intel's manual says, except _mm512_rcp14_ps, of which it gives a bound only.
// Of immediates they take those that the kernels use. Speed is nobody's concern.
//
// They hide the compiler's own, because names are looked up in ring_attention::cpu first. One that
// is missing here does not compile: its vectors are another type.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "../../csrc/cpu/elements.h"

#define RA_TARGET_EMULATED _Pragma("GCC target(\"avx2,fma,f16c\")")

// Inlined everywhere, the long ones would take the compiler minutes.
#define RA_CALLED __attribute__((noinline)) inline

#pragma GCC push_options
RA_TARGET_EMULATED

namespace ring_attention::cpu {
namespace emulated {

// --- vectors ----------------------------------------------------------------------------------

struct __m512i {
  __m256i low, high;
};
struct __m512d {
  __m256d low, high;
};
struct __m512bh {
  __m256i low, high;
  explicit operator __m512i() const { return {low, high}; }
};
struct __m512 {
  __m256 low, high;
  explicit operator __m512bh() const { return std::bit_cast<__m512bh>(*this); }
};

// A vector's lanes, for what is done one by one.
template <typename T>
struct LaneArray {
  T lane[64 / sizeof(T)];
};
template <typename T, typename Vector>
RA_INLINE LaneArray<T> lanes_of(Vector x) {
  return std::bit_cast<LaneArray<T>>(x);
}

// All bits of lane i where bit i of the mask is set.
RA_INLINE __m256i spread_mask(unsigned mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "ring_attention: emulated instructions: %s\n", what);
  std::abort();
}

// --- constants, casts, memory -----------------------------------------------------------------

RA_INLINE __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
RA_INLINE __m512i _mm512_setzero_si512() {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
RA_INLINE __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
RA_INLINE __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
// The last lane comes first.
template <typename... Short>
RA_INLINE __m512i _mm512_set_epi16(Short... x) {
  static_assert(sizeof...(x) == 32);
  LaneArray<int16_t> lanes = {{static_cast<int16_t>(x)...}};
  std::reverse(lanes.lane, lanes.lane + 32);
  return std::bit_cast<__m512i>(lanes);
}

RA_INLINE __m512d _mm512_castps_pd(__m512 x) { return std::bit_cast<__m512d>(x); }
RA_INLINE __m512i _mm512_castps_si512(__m512 x) { return std::bit_cast<__m512i>(x); }
RA_INLINE __m512 _mm512_castpd_ps(__m512d x) { return std::bit_cast<__m512>(x); }
RA_INLINE __m512 _mm512_castsi512_ps(__m512i x) { return std::bit_cast<__m512>(x); }
RA_INLINE __m256i _mm512_castsi512_si256(__m512i x) { return x.low; }
RA_INLINE __m256i _mm512_extracti64x4_epi64(__m512i x, int half) { return half ? x.high : x.low; }

RA_INLINE __m512 _mm512_loadu_ps(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
RA_INLINE __m512i _mm512_loadu_si512(const void* from) {
  const auto* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
RA_INLINE void _mm512_storeu_ps(float* to, __m512 x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
RA_INLINE void _mm512_storeu_si512(void* to, __m512i x) {
  auto* halves = static_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, x.low);
  _mm256_storeu_si256(halves + 1, x.high);
}
// Memory behind masked lanes is not touched.
RA_CALLED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  uint16_t lane[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(lane + i, static_cast<const char*>(from) + 2 * i, 2);
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
}
RA_CALLED void _mm512_mask_storeu_epi32(void* to, __mmask16 mask, __m512i x) {
  const auto lanes = lanes_of<uint32_t>(x);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + 4 * i, lanes.lane + i, 4);
  }
}

// --- integers ---------------------------------------------------------------------------------

RA_INLINE __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
RA_INLINE __m512i _mm512_and_epi32(__m512i a, __m512i b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
RA_INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
RA_INLINE __m512i _mm512_mask_or_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  const __m512i x = _mm512_or_si512(a, b);
  return {_mm256_blendv_epi8(other.low, x.low, spread_mask(mask)),
          _mm256_blendv_epi8(other.high, x.high, spread_mask(mask >> 8))};
}
RA_INLINE __m512i _mm512_slli_epi32(__m512i x, unsigned count) {
  return {_mm256_slli_epi32(x.low, static_cast<int>(count)),
          _mm256_slli_epi32(x.high, static_cast<int>(count))};
}
RA_INLINE __m512i _mm512_srli_epi32(__m512i x, unsigned count) {
  return {_mm256_srli_epi32(x.low, static_cast<int>(count)),
          _mm256_srli_epi32(x.high, static_cast<int>(count))};
}
RA_INLINE __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
RA_CALLED __m256i _mm512_cvtepi32_epi16(__m512i x) {  // the lower halves
  const auto lanes = lanes_of<uint32_t>(x);
  uint16_t lower[16];
  for (int i = 0; i < 16; ++i) lower[i] = static_cast<uint16_t>(lanes.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower));
}

// --- order ------------------------------------------------------------------------------------

RA_INLINE __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return {_mm256_unpacklo_ps(a.low, b.low), _mm256_unpacklo_ps(a.high, b.high)};
}
RA_INLINE __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return {_mm256_unpackhi_ps(a.low, b.low), _mm256_unpackhi_ps(a.high, b.high)};
}
RA_INLINE __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  return {_mm256_unpacklo_pd(a.low, b.low), _mm256_unpacklo_pd(a.high, b.high)};
}
RA_INLINE __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  return {_mm256_unpackhi_pd(a.low, b.low), _mm256_unpackhi_pd(a.high, b.high)};
}
// Quarters: two of a, then two of b.
RA_INLINE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int chosen) {
  struct Quarters {
    __m128 quarter[4];
  };
  const auto from_a = std::bit_cast<Quarters>(a), from_b = std::bit_cast<Quarters>(b);
  return std::bit_cast<__m512>(
      Quarters{{from_a.quarter[chosen & 3], from_a.quarter[chosen >> 2 & 3],
                from_b.quarter[chosen >> 4 & 3], from_b.quarter[chosen >> 6 & 3]}});
}
RA_CALLED __m512i _mm512_permutexvar_epi16(__m512i order, __m512i x) {
  const auto index = lanes_of<uint16_t>(order), lanes = lanes_of<uint16_t>(x);
  LaneArray<uint16_t> result;
  for (int i = 0; i < 32; ++i) result.lane[i] = lanes.lane[index.lane[i] % 32];
  return std::bit_cast<__m512i>(result);
}

// --- fp32 -------------------------------------------------------------------------------------

RA_INLINE __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
RA_INLINE __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
RA_INLINE __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
RA_INLINE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
RA_INLINE __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
RA_INLINE __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
RA_INLINE __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
RA_INLINE __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
RA_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, predicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, predicate));
  return static_cast<__mmask16>(low | high << 8);
}
RA_INLINE __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int predicate) {
  return mask & _mm512_cmp_ps_mask(a, b, predicate);
}
RA_INLINE __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return {_mm256_blendv_ps(a.low, b.low, _mm256_castsi256_ps(spread_mask(mask))),
          _mm256_blendv_ps(a.high, b.high, _mm256_castsi256_ps(spread_mask(mask >> 8)))};
}
// To integers, the nearest, ties to even.
RA_INLINE __m512 _mm512_roundscale_ps(__m512 x, int immediate) {
  if (immediate != 0) stop("expected 0 as the immediate of _mm512_roundscale_ps");
  return {_mm256_round_ps(x.low, 0), _mm256_round_ps(x.high, 0)};
}

// x - floor(x), rounded downwards like the floor, so that -1e-9 gives less than 1.
inline float less_floor(float x) {
  if (std::isnan(x)) return x;
  if (std::isinf(x)) return 0.0f;
  constexpr float kBelowOne = 0x1.fffffep-1f;
  if (-0x1p-24f < x && x < 0) return kBelowOne;
  const double exact = double{x} - std::floor(double{x});
  if (exact == 0) return -0.0f;
  const float nearest = static_cast<float>(exact);
  return nearest > exact ? std::nextafter(nearest, 0.0f) : nearest;
}
RA_CALLED __m512 _mm512_reduce_ps(__m512 x, int immediate) {
  if (immediate != (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)) {
    stop("expected the rounding to -inf of all as the immediate of _mm512_reduce_ps");
  }
  auto lanes = lanes_of<float>(x);
  for (float& lane : lanes.lane) lane = less_floor(lane);
  return std::bit_cast<__m512>(lanes);
}

// An exact reciprocal cut off after 14 bits: the largest error that the manual allows, just below
// 2^-14, so that a kernel that lacks a Newton step is noticed. Powers of two are exact.
RA_CALLED __m512 _mm512_rcp14_ps(__m512 x) {
  auto lanes = lanes_of<float>(x);
  for (float& lane : lanes.lane) {
    lane = 1.0f / lane;
    if (std::isnormal(lane)) lane = std::bit_cast<float>(std::bit_cast<uint32_t>(lane) & ~0x1ffu);
  }
  return std::bit_cast<__m512>(lanes);
}

// x times 2^floor(y), rounded once.
inline float scaled(float x, float y) {
  const auto quiet = [](float nan) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(nan) | 0x400000u);
  };
  const float infinity = std::numeric_limits<float>::infinity();
  const float indefinite = std::bit_cast<float>(0xffc00000u);
  if (std::isnan(x)) {
    const bool signals = (std::bit_cast<uint32_t>(x) & 0x400000u) == 0;
    if (std::isinf(y) && !signals) return y > 0 ? infinity : 0.0f;
    return quiet(x);
  }
  if (std::isnan(y)) return quiet(y);
  if (y == infinity) return x == 0 ? indefinite : std::copysign(infinity, x);
  if (y == -infinity) return std::isinf(x) ? indefinite : std::copysign(0.0f, x);
  // Every fp32 number times such a power is exact in fp64, and at the bounds beyond fp32's range.
  const auto power = static_cast<int>(std::clamp(std::floor(y), -400.0f, 400.0f));
  return static_cast<float>(x * std::bit_cast<double>(static_cast<uint64_t>(1023 + power) << 52));
}
RA_CALLED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  auto x = lanes_of<float>(a);
  const auto y = lanes_of<float>(b);
  for (int i = 0; i < 16; ++i) x.lane[i] = scaled(x.lane[i], y.lane[i]);
  return std::bit_cast<__m512>(x);
}
RA_INLINE __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  return _mm512_mask_blend_ps(mask, _mm512_setzero_ps(), _mm512_scalef_ps(a, b));
}

// --- 16-bit elements --------------------------------------------------------------------------

RA_INLINE __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
RA_INLINE __m256i _mm512_cvtps_ph(__m512 x, int rounding) {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, rounding), _mm256_cvtps_ph(x.low, rounding));
}

// Denormals become zero.
inline uint16_t rounded_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if ((bits & 0x7f800000u) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
// The lower half is that of b.
RA_CALLED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  const auto high = lanes_of<float>(a), low = lanes_of<float>(b);
  LaneArray<uint16_t> result;
  for (int i = 0; i < 16; ++i) {
    result.lane[i] = rounded_to_bf16(low.lane[i]);
    result.lane[16 + i] = rounded_to_bf16(high.lane[i]);
  }
  return std::bit_cast<__m512bh>(result);
}

// Control words: rounding to nearest, no exceptions, denormals read and written as zero.
constexpr unsigned kFlushDenormals = 0x9fc0;

RA_INLINE __m256 even_bf16(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
RA_INLINE __m256 odd_bf16(__m256i pairs) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(~0xffffu))));
}

// Two multiply-adds that each round and flush, that of the odd elements first. In one piece: the
// compiler does not know that arithmetic depends on the control word.
RA_CALLED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const unsigned flush = kFlushDenormals, usual = _mm_getcsr();
  asm("ldmxcsr %[flush]\n\t"
      "vfmadd231ps %[a1], %[b1], %[low]\n\t"
      "vfmadd231ps %[a3], %[b3], %[high]\n\t"
      "vfmadd231ps %[a0], %[b0], %[low]\n\t"
      "vfmadd231ps %[a2], %[b2], %[high]\n\t"
      "ldmxcsr %[usual]"
      : [low] "+&x"(sum.low), [high] "+&x"(sum.high)
      : [flush] "m"(flush), [usual] "m"(usual), [a0] "x"(even_bf16(a.low)),
        [a1] "x"(odd_bf16(a.low)), [a2] "x"(even_bf16(a.high)), [a3] "x"(odd_bf16(a.high)),
        [b0] "x"(even_bf16(b.low)), [b1] "x"(odd_bf16(b.low)), [b2] "x"(even_bf16(b.high)),
        [b3] "x"(odd_bf16(b.high)));
  return sum;
}

}  // namespace emulated
using namespace emulated;
}  // namespace ring_attention::cpu
#pragma GCC pop_options

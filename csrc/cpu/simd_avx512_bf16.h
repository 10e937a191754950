// SPDX-License-Identifier: BSD-3-Clause
//
// What the rows that multiply pairs of bf16 share (AVX-512 BF16, AMX): a unit is two elements that
// are neighbours in k, the vectors are those of simd_avx512.h.
#pragma once

#include "simd_avx512.h"

namespace ring_attention::cpu {
namespace {

struct BFloat16Pairs {
  using Elem = BFloat16;
  using State = float;
  using Unit = uint32_t;
  using V = Vec512;
  static constexpr int kPair = 2, kExpTerms = 4;
  static constexpr bool kScalesQueries = false;  // bf16 would round what the scale makes of them

  static RA_INLINE void transpose(const Unit* from, int64_t from_row, Unit* to, int64_t to_row) {
    transpose_units(from, from_row, to, to_row);
  }

  static RA_INLINE __m512i elements(const Elem* row, int64_t d, __mmask16 wanted) {
    if (row == nullptr) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, row + d));
  }

  // to[d] = the pair (first[d], second[d]); a null row is zeros.
  static void interleave(const Elem* first, const Elem* second, int64_t dim, Unit* to) {
    for (int64_t d = 0; d < dim; d += 16) {
      const auto wanted = static_cast<__mmask16>(dim - d >= 16 ? 0xffff : 0x00ff);
      const __m512i low = elements(first, d, wanted);
      const __m512i high = elements(second, d, wanted);
      _mm512_mask_storeu_epi32(to + d, wanted, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  // Two rows of keys, rounded: the first in the lower half.
  static RA_INLINE __m512i round_pair(const V* x) {
    return (__m512i)_mm512_cvtne2ps_pbh(x[1].raw, x[0].raw);
  }

  // As units that pair the two keys.
  static RA_INLINE void store_lanes(const V* x, Unit* to) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, round_pair(x)));
  }

  // As two rows of units that pair neighbouring lanes.
  static RA_INLINE void store_rows(const V* x, Unit* to, int64_t row) {
    const __m512i both = round_pair(x);
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(to + row), _mm512_extracti64x4_epi64(both, 1));
  }
};

}  // namespace
}  // namespace ring_attention::cpu

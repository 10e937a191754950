// SPDX-License-Identifier: BSD-3-Clause
//
// Eight columns of a product at once. To be included after immintrin.h and simd.h.
#pragma once

namespace ptxvm {

using Columns = float __attribute__((vector_size(32)));

inline Columns multiply_add(float a, Columns b, Columns c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
  return a * b + c;
#endif
}

}  // namespace ptxvm

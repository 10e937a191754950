// SPDX-License-Identifier: BSD-3-Clause
//
// The 16-bit element types, portably: what the vector rows do in one instruction.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../params.h"

#define RA_INLINE inline __attribute__((always_inline))

namespace ring_attention::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The dtype of a state and of everything that is summed.
template <typename Elem>
using StateOf = std::conditional_t<std::is_same_v<Elem, double>, double, float>;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(Float16 x) {
  // Moved to fp32's place, the exponent is 2^112 too small, and a product repairs denormals too.
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // Inf, NaN
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

// Rounds to nearest, ties to even.
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // Rounding could carry a NaN's payload away.
  to.bits = static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
}
inline void narrow(float x, Float16& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
  uint32_t half;
  if (!(magnitude == magnitude)) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    // Denormal: adding 1/2 leaves the value in units of 2^-24 in the low bits, rounded.
    half = std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t normal = std::bit_cast<uint32_t>(magnitude);
    half = (normal + 0xfffu + ((normal >> 13) & 1u) - (112u << 23)) >> 13;
  }
  to.bits = static_cast<uint16_t>(half | sign);
}

// Calls visit(Elem{}) for the C++ type of a dtype.
template <typename Visit>
void visit_elements(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kFloat64:
      return visit(double{});
  }
}

}  // namespace ring_attention::cpu

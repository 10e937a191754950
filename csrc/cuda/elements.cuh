// SPDX-License-Identifier: BSD-3-Clause
//
// The element types of tensors, each with what the kernels do differently for it.
#pragma once

#include "ptx.cuh"

namespace ring_attention::cuda {

struct BFloat16 {
  uint16_t bits;

  // P is at most 2^kLazyMax, see state.cuh.
  static constexpr float kLazyMax = 24;

  static RA_DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  RA_DEVICE float widen() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  static RA_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(sum, a, b0, b1);
  }
};

struct Float16 {
  uint16_t bits;

  static constexpr float kLazyMax = 15;  // 65504 is the largest number

  static RA_DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
  RA_DEVICE float widen() const { return widen_f16(bits); }
  static RA_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(sum, a, b0, b1);
  }
};

struct Float32 {
  float value;

  static constexpr float kLazyMax = 24;

  RA_DEVICE float widen() const { return value; }
};

}  // namespace ring_attention::cuda

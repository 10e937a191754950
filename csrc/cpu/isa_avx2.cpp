// SPDX-License-Identifier: BSD-3-Clause
//
// AVX2, FMA and F16C: fp32 multiply-adds, 16-bit elements widened once per tile.
#include "isa.h"

#ifdef RA_X86
#include <immintrin.h>

#include <algorithm>
#include <chrono>

#include "elements.h"
#include "key_parts.h"
#include "pair_schedule.h"
#include "problem.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "backward.inl"
#include "forward.inl"
#include "peak.inl"
#include "simd_avx2.h"

namespace ring_attention::cpu {
namespace {

template <typename Elem>
struct Avx2Arch : MultiplyAdd<Elem, Vec256> {
  static constexpr int kMaxVecs = 2;
  static constexpr int tile_rows(int vecs) { return vecs == 2 ? 6 : 8; }
  static constexpr int64_t kMaxKeyBlock = 144, kMaxPanel = 16;
  static constexpr TileShape forward_shape(int64_t) {
    return {.panel = 16, .key_block = 144, .panels = 32, .least_panels = 16};
  }
  static constexpr TileShape backward_shape(int64_t) {
    return {.panel = 16, .key_block = 96, .panels = 8, .pass = 4, .stripe = 96};
  }
};

}  // namespace

namespace avx2 {

void forward(const ForwardParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Forward<Avx2Arch<float>>::run(params, parallel);
    case DType::kBFloat16:
      return Forward<Avx2Arch<BFloat16>>::run(params, parallel);
    case DType::kFloat16:
      return Forward<Avx2Arch<Float16>>::run(params, parallel);
    case DType::kFloat64:
      return scalar::forward(params, parallel);
  }
}

void backward(const BackwardParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Backward<Avx2Arch<float>>::run(params, parallel);
    case DType::kBFloat16:
      return Backward<Avx2Arch<BFloat16>>::run(params, parallel);
    case DType::kFloat16:
      return Backward<Avx2Arch<Float16>>::run(params, parallel);
    case DType::kFloat64:
      return scalar::backward(params, parallel);
  }
}

double peak_flops(DType dtype, double seconds) {
  if (dtype == DType::kFloat64) return scalar::peak_flops(dtype, seconds);
  return register_peak<Avx2Arch<float>>(seconds);
}

}  // namespace avx2
}  // namespace ring_attention::cpu
#pragma GCC pop_options

namespace ring_attention::cpu::avx2 {
bool supported() {
  // Every processor with AVX2 and FMA converts fp16 too.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace ring_attention::cpu::avx2
#endif

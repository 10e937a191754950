// SPDX-License-Identifier: BSD-3-Clause
//
// AVX-512: fp32 multiply-adds, 16-bit elements widened once per tile.
#include "isa.h"

#ifdef RA_X86
#include <algorithm>
#include <chrono>

#include "elements.h"
#include "instructions.h"
#include "key_parts.h"
#include "pair_schedule.h"
#include "problem.h"

#pragma GCC push_options
// g++ 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
RA_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "backward.inl"
#include "forward.inl"
#include "peak.inl"
#include "simd_avx512.h"

namespace ring_attention::cpu {
namespace {

template <typename Elem>
struct Avx512Arch : MultiplyAdd<Elem, Vec512> {
  static constexpr int kMaxVecs = 4;
  static constexpr int tile_rows(int vecs) { return vecs == 1 ? 8 : 6; }
  static constexpr int64_t kMaxKeyBlock = 192, kMaxPanel = 64;
  static constexpr TileShape forward_shape(int64_t) {
    return {.panel = 64, .key_block = 96, .panels = 8, .least_panels = 4};
  }
  static constexpr TileShape backward_shape(int64_t dim) {
    if (dim <= 128) return {.panel = 64, .key_block = 96, .panels = 2, .pass = 2, .stripe = 96};
    return {.panel = 64, .key_block = 96, .panels = 1, .pass = 1, .stripe = 48};
  }
};

}  // namespace

namespace avx512 {

void forward(const ForwardParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Forward<Avx512Arch<float>>::run(params, parallel);
    case DType::kBFloat16:
      return Forward<Avx512Arch<BFloat16>>::run(params, parallel);
    case DType::kFloat16:
      return Forward<Avx512Arch<Float16>>::run(params, parallel);
    case DType::kFloat64:
      return scalar::forward(params, parallel);
  }
}

void backward(const BackwardParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Backward<Avx512Arch<float>>::run(params, parallel);
    case DType::kBFloat16:
      return Backward<Avx512Arch<BFloat16>>::run(params, parallel);
    case DType::kFloat16:
      return Backward<Avx512Arch<Float16>>::run(params, parallel);
    case DType::kFloat64:
      return scalar::backward(params, parallel);
  }
}

double peak_flops(DType dtype, double seconds) {
  if (dtype == DType::kFloat64) return scalar::peak_flops(dtype, seconds);
  return register_peak<Avx512Arch<float>>(seconds);
}

}  // namespace avx512
}  // namespace ring_attention::cpu
#pragma GCC pop_options

namespace ring_attention::cpu::avx512 {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         avx2::supported();
}
}  // namespace ring_attention::cpu::avx512
#endif

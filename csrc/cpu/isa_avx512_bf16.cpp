// SPDX-License-Identifier: BSD-3-Clause
//
// AVX-512 with BF16: pairs of bf16 by vdpbf16ps. The other element types are the AVX-512 row's.
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
RA_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#include "backward.inl"
#include "forward.inl"
#include "peak.inl"
#include "simd_avx512_bf16.h"

namespace ring_attention::cpu {
namespace {

struct Bf16DotArch : BFloat16Pairs {
  static constexpr int kKeyStep = 2, kDepthStep = 2, kWidthStep = 16;
  static constexpr bool kTransposeColumns = false, kOwnProduct = false;
  static constexpr int kMaxVecs = 4;
  static constexpr int tile_rows(int vecs) { return vecs == 1 ? 8 : 6; }
  static constexpr int64_t kMaxKeyBlock = 192, kMaxPanel = 64;
  static constexpr TileShape forward_shape(int64_t) {
    return {.panel = 64, .key_block = 192, .panels = 4, .least_panels = 4};
  }
  static constexpr TileShape backward_shape(int64_t) {
    return {.panel = 64, .key_block = 96, .panels = 4, .pass = 2, .stripe = 24};
  }
  struct Session {};

  static RA_INLINE V load_lanes(const Unit* from) {
    V lanes = {_mm512_castsi512_ps(_mm512_loadu_si512(from))};
    pin(lanes);
    return lanes;
  }
  static RA_INLINE V broadcast(const Unit* from) {
    int32_t pair;  // a row of bf16 need not lie on 4 bytes
    std::memcpy(&pair, from, sizeof pair);
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
  }
  static RA_INLINE V multiply_add(V a, V b, V c) {
    return {_mm512_dpbf16_ps(c.raw, (__m512bh)a.raw, (__m512bh)b.raw)};
  }
};

}  // namespace

namespace avx512_bf16 {

void forward(const ForwardParams& params, const Parallel& parallel) {
  if (params.dtype != DType::kBFloat16) return avx512::forward(params, parallel);
  Forward<Bf16DotArch>::run(params, parallel);
}

void backward(const BackwardParams& params, const Parallel& parallel) {
  if (params.dtype != DType::kBFloat16) return avx512::backward(params, parallel);
  Backward<Bf16DotArch>::run(params, parallel);
}

double peak_flops(DType dtype, double seconds) {
  if (dtype != DType::kBFloat16) return avx512::peak_flops(dtype, seconds);
  return register_peak<Bf16DotArch>(seconds);
}

}  // namespace avx512_bf16
}  // namespace ring_attention::cpu
#pragma GCC pop_options

namespace ring_attention::cpu::avx512_bf16 {

bool supported() { return __builtin_cpu_supports("avx512bf16") && avx512::supported(); }

// AMD's Zen 4 and 5 do twice fp32's work per vdpbf16ps. Intel's processors split it: measured on
// Sapphire Rapids, it is at half of what widening to fp32 reaches.
bool recommended() { return __builtin_cpu_is("amd"); }

}  // namespace ring_attention::cpu::avx512_bf16
#endif

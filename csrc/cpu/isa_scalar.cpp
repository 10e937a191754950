// SPDX-License-Identifier: BSD-3-Clause
//
// The portable row: any compiler target, all element types.
#include "backward.inl"
#include "forward.inl"
#include "isa.h"
#include "peak.inl"
#include "problem.h"
#include "simd_scalar.h"

namespace ring_attention::cpu {
namespace {

template <typename Elem>
struct ScalarArch : MultiplyAdd<Elem, Vec<StateOf<Elem>>> {
  static constexpr int kMaxVecs = 2;
  static constexpr int tile_rows(int) { return 4; }
  static constexpr int64_t kMaxKeyBlock = 64, kMaxPanel = 16;
  static constexpr TileShape forward_shape(int64_t) {
    return {.panel = 16, .key_block = 64, .panels = 8, .least_panels = 8};
  }
  static constexpr TileShape backward_shape(int64_t) {
    return {.panel = 16, .key_block = 64, .panels = 8, .pass = 4, .stripe = 64};
  }
};

}  // namespace

namespace scalar {

bool supported() { return true; }

void forward(const ForwardParams& params, const Parallel& parallel) {
  visit_elements(params.dtype,
                 [&]<typename E>(E) { Forward<ScalarArch<E>>::run(params, parallel); });
}

void backward(const BackwardParams& params, const Parallel& parallel) {
  visit_elements(params.dtype,
                 [&]<typename E>(E) { Backward<ScalarArch<E>>::run(params, parallel); });
}

double peak_flops(DType dtype, double seconds) {
  double result = 0;
  visit_elements(dtype, [&]<typename E>(E) { result = register_peak<ScalarArch<E>>(seconds); });
  return result;
}

}  // namespace scalar
}  // namespace ring_attention::cpu

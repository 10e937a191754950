// SPDX-License-Identifier: BSD-3-Clause
//
// Run-time values become types here and nowhere else. Visitors are generic lambdas over type tags:
//
//   visit_head_dims(params, [&]<typename Dims>(Dims) { launch<Dims::kQk, Dims::kV>(params); });
#pragma once

#include <algorithm>
#include <type_traits>

#include "params.h"

namespace ring_attention {

// A pair of head dims that kernels are compiled for. It serves all smaller ones: columns beyond the
// real head dim are zeros in shared memory.
template <int kQkDim, int kVDim>
struct HeadDims {
  static constexpr int kQk = kQkDim, kV = kVDim;
};

template <typename Visitor>
auto visit_head_dims(const AttentionParams& params, const Visitor& visitor) {
  const int64_t wide = std::max(params.head_dim, params.v_head_dim);
  if (wide <= 32) return visitor(HeadDims<32, 32>{});
  if (wide <= 64) return visitor(HeadDims<64, 64>{});
  if (wide <= 96) return visitor(HeadDims<96, 96>{});
  if (wide <= 128) return visitor(HeadDims<128, 128>{});
  if (wide <= 192 && params.v_head_dim <= 128) return visitor(HeadDims<192, 128>{});
  if (wide <= 192) return visitor(HeadDims<192, 192>{});
  return visitor(HeadDims<256, 256>{});
}

template <typename Visitor>
auto visit_flag(bool flag, const Visitor& visitor) {
  return flag ? visitor(std::true_type{}) : visitor(std::false_type{});
}

}  // namespace ring_attention

// SPDX-License-Identifier: BSD-3-Clause
//
// The launches of one element type and bucket of head dims.
#pragma once

#include "backward_keys.cuh"
#include "backward_launch.h"

namespace ring_attention::cuda::sm80 {

template <typename Elem, typename Dims, bool kLargeSmem, int kSums>
cudaError_t start_keys(const BackwardCall& call, cudaStream_t stream) {
  using Plan = BackwardPlan<Elem, Dims, kLargeSmem>;
  int64_t tiles = 0;
  for (int i = 0; i < call.blocks.count; ++i) {
    tiles += divide_up(call.blocks.block[i].k_len, Plan::kRows);
  }
  const int64_t parts = call.head_parts * call.row_parts;
  return start(reinterpret_cast<const void*>(backward_keys<Elem, Dims, kLargeSmem, kSums>),
               tiles * parts * call.kv_heads * call.batch, Plan::kThreads, Plan::kKeysBytes, call,
               stream);
}

template <typename Elem, typename Dims>
cudaError_t launch_backward(const BackwardCall& call, bool large_smem, cudaStream_t stream) {
  return visit_flag(large_smem, [&]<typename Large>(Large) {
    using Plan = BackwardPlan<Elem, Dims, Large::value>;
    const int64_t tiles = divide_up(call.q_len, Plan::kRows);
    cudaError_t error = start(reinterpret_cast<const void*>(backward_dq<Elem, Dims, Large::value>),
                              tiles * call.dq_parts * call.heads * call.batch, Plan::kThreads,
                              Plan::kDqBytes, call, stream);
    if (error == cudaSuccess) error = add_dq_parts(call, stream);
    if (error != cudaSuccess) return error;
    if constexpr (keys_in_two_passes(Dims::kQk, Dims::kV)) {
      error = start_keys<Elem, Dims, Large::value, kSumDk>(call, stream);
      if (error == cudaSuccess) error = start_keys<Elem, Dims, Large::value, kSumDv>(call, stream);
    } else {
      error = start_keys<Elem, Dims, Large::value, kSumDk | kSumDv>(call, stream);
    }
    return error == cudaSuccess ? add_keys_parts(call, stream) : error;
  });
}

}  // namespace ring_attention::cuda::sm80

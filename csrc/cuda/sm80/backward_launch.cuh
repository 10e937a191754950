// SPDX-License-Identifier: BSD-3-Clause
//
// The launches of one element type and bucket of head dims.
#pragma once

#include "backward_keys.cuh"
#include "backward_launch.h"

namespace ring_attention::cuda::sm80 {

template <typename Elem, typename Dims, bool kLargeSmem, int kSums>
cudaError_t start_keys(const BackwardCall& call, cudaStream_t stream) {
  using Plan = BackwardPlan<Elem, Dims, kLargeSmem, kSums>;
  int64_t tiles = 0;
  for (int i = 0; i < call.blocks.count; ++i) {
    tiles += divide_up(call.blocks.block[i].k_len, Plan::kRows);
  }
  const int64_t parts = call.head_parts * call.row_parts;
  return start(backward_keys<Elem, Dims, kLargeSmem, kSums>,
               tiles * parts * call.kv_heads * call.batch, Plan::kThreads, Plan::kSmemBytes, stream,
               call);
}

template <typename Elem, typename Dims, bool kLargeSmem>
cudaError_t start_dq(const BackwardCall& call, cudaStream_t stream) {
  using Plan = BackwardPlan<Elem, Dims, kLargeSmem, kSumDq>;
  const int64_t tiles = divide_up(call.q_len, Plan::kRows);
  return start(backward_dq<Elem, Dims, kLargeSmem>, tiles * call.dq_parts * call.heads * call.batch,
               Plan::kThreads, Plan::kSmemBytes, stream, call);
}

// dQ by atomics: one kernel.
template <typename Elem, typename Dims, bool kLargeSmem>
cudaError_t start_atomic(const BackwardCall& call, cudaStream_t stream) {
  return start_keys<Elem, Dims, kLargeSmem, kSumDk | kSumDv | kSumDq>(call, stream);
}

template <typename Elem, typename Dims, bool kLargeSmem>
cudaError_t start_deterministic(const BackwardCall& call, cudaStream_t stream) {
  cudaError_t error = start_dq<Elem, Dims, kLargeSmem>(call, stream);
  if (error == cudaSuccess) error = add_dq_parts(call, stream);
  if (error != cudaSuccess) return error;
  if constexpr (keys_in_two_passes(Dims::kQk, Dims::kV)) {
    error = start_keys<Elem, Dims, kLargeSmem, kSumDk>(call, stream);
    return error == cudaSuccess ? start_keys<Elem, Dims, kLargeSmem, kSumDv>(call, stream) : error;
  } else {
    return start_keys<Elem, Dims, kLargeSmem, kSumDk | kSumDv>(call, stream);
  }
}

template <typename Elem, typename Dims>
cudaError_t launch_backward(const BackwardCall& call, bool large_smem, cudaStream_t stream) {
  const cudaError_t error = visit_flag(large_smem, [&]<typename Large>(Large) {
    constexpr bool kLarge = Large::value && !same_tiles(sizeof(Elem), Dims::kQk, Dims::kV);
    if constexpr (has_atomic_dq(sizeof(Elem), Dims::kQk, Dims::kV)) {
      if (call.atomic_dq) return start_atomic<Elem, Dims, kLarge>(call, stream);
    }
    return start_deterministic<Elem, Dims, kLarge>(call, stream);
  });
  return error == cudaSuccess ? add_keys_parts(call, stream) : error;
}

}  // namespace ring_attention::cuda::sm80

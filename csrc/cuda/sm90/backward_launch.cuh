// SPDX-License-Identifier: BSD-3-Clause
//
// The launches of one element type and bucket of head dims.
#pragma once

#include "backward_dq.cuh"
#include "backward_keys.cuh"
#include "backward_launch.h"

namespace ring_attention::cuda::sm90 {

template <typename Elem, typename Dims, BackwardShape kShape = backward_shape(Dims::kQk, Dims::kV)>
cudaError_t start_dq(const BackwardCall& call, cudaStream_t stream) {
  using Tile = BackwardTile<Dims, kShape, kShape.keys>;
  static_assert(sizeof(DqSmem<Tile>) <= kMostSmemBytes);
  const int64_t tiles = divide_up(call.q_len, Tile::kRows);
  return start(backward_dq<Elem, Tile>, tiles * call.dq_parts * call.heads * call.batch,
               Tile::kRoles.threads, sizeof(DqSmem<Tile>), stream, call);
}

template <typename Elem, typename Dims, KeysSum kSum,
          BackwardShape kShape = backward_shape(Dims::kQk, Dims::kV)>
cudaError_t start_keys(const BackwardCall& call, cudaStream_t stream) {
  using Tile = BackwardTile<Dims, kShape, kShape.queries>;
  static_assert(sizeof(KeysSmem<Tile>) <= kMostSmemBytes);
  int64_t tiles = 0;
  for (int i = 0; i < call.blocks.count; ++i) {
    tiles += divide_up(call.blocks.block[i].k_len, Tile::kRows);
  }
  const int64_t parts = call.head_parts * call.row_parts;
  return start(backward_keys<Elem, Tile, kSum>, tiles * parts * call.kv_heads * call.batch,
               Tile::kRoles.threads, sizeof(KeysSmem<Tile>), stream, call);
}

template <typename Elem, typename Dims>
cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream) {
  cudaError_t error = start_dq<Elem, Dims>(call, stream);
  if (error == cudaSuccess) error = add_dq_parts(call, stream);
  if (error != cudaSuccess) return error;
  if constexpr (keys_in_two_passes(Dims::kQk, Dims::kV)) {
    error = start_keys<Elem, Dims, KeysSum::kDk>(call, stream);
    if (error == cudaSuccess) error = start_keys<Elem, Dims, KeysSum::kDv>(call, stream);
  } else {
    error = start_keys<Elem, Dims, KeysSum::kBoth>(call, stream);
  }
  return error == cudaSuccess ? add_keys_parts(call, stream) : error;
}

}  // namespace ring_attention::cuda::sm90

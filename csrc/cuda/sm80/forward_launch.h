// SPDX-License-Identifier: BSD-3-Clause
//
// Launches of the forward kernels, instantiated per dtype and head dims in files of their own.
#pragma once

#include "../forward_call.cuh"
#include "config.h"

namespace ring_attention::cuda::sm80 {

// Elem: BFloat16 or Float16. The tile of `call` is that of these head dims (a HeadDims) and this
// use.
template <typename Elem, typename Dims>
cudaError_t launch_forward(const ForwardCall& call, TileFor use, cudaStream_t stream);

// The tile is Fp32Tile<kMaxDim>.
template <int kMaxDim>
cudaError_t launch_forward_fp32(const ForwardCall& call, cudaStream_t stream);

}  // namespace ring_attention::cuda::sm80

// SPDX-License-Identifier: BSD-3-Clause
//
// Launches of the sm_90a forward kernels, instantiated per dtype and head dims in files of their
// own.
#pragma once

#include "../forward_call.cuh"
#include "config.h"

namespace ring_attention::cuda::sm90 {

// Elem: BFloat16 or Float16. The tile of `call` is that of these head dims (a HeadDims).
template <typename Elem, typename Dims>
cudaError_t launch_forward(const ForwardCall& call, cudaStream_t stream);

}  // namespace ring_attention::cuda::sm90

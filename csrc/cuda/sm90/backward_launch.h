// SPDX-License-Identifier: BSD-3-Clause
//
// Launches of the sm_90a backward kernels, instantiated per dtype and head dims in files of their
// own.
#pragma once

#include <cuda_runtime_api.h>

#include "backward_config.h"

namespace ring_attention::cuda::sm90 {

// dQ, dK and dV of a launch whose rows are described (backward_rows.cuh).
template <typename Elem, typename Dims>
cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream);

}  // namespace ring_attention::cuda::sm90

// SPDX-License-Identifier: BSD-3-Clause
//
// What the files of the backward kernels know of one another.
#pragma once

#include <cuda_runtime_api.h>

#include "../start.h"
#include "backward_config.h"

namespace ring_attention::cuda::sm80 {

// dQ, dK and dV of a launch whose rows are described (backward_rows.cuh). Instantiated in a file
// per element type and bucket of head dims.
template <typename Elem, typename Dims>
cudaError_t launch_backward(const BackwardCall& call, bool large_smem, cudaStream_t stream);

}  // namespace ring_attention::cuda::sm80

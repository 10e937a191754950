// SPDX-License-Identifier: BSD-3-Clause
#include "forward.cuh"

namespace ring_attention::cuda::sm90 {

template cudaError_t launch_forward<BFloat16, HeadDims<192, 128>>(const ForwardCall&, cudaStream_t);

}  // namespace ring_attention::cuda::sm90

// SPDX-License-Identifier: BSD-3-Clause
#include "forward.cuh"

namespace ring_attention::cuda::sm90 {

template cudaError_t launch_forward<Float16, HeadDims<256, 256>>(const ForwardCall&, cudaStream_t);

}  // namespace ring_attention::cuda::sm90
